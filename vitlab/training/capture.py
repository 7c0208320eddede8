"""Token scores through V and its gradient, for whole data sets.

*Efficient Token Compression for Vision Transformer with Spatial Information Preserved* (arXiv 2503.23455), methods A1.
"""
import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from vitlab.files import InputError
from vitlab.models import attention_block, check_supported, is_merged

ABSOLUTE = ("batch", "image")


@contextlib.contextmanager
def _frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradient for any parameter; both as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


class ValueGradient:
    """Hooks on each block's qkv. In the backward pass, <V[j], dLoss/dV[j]> is summed over heads, width and batch.

    That equals the sum over queries i of dLoss/dA[i, j] * A[i, j] with A the softmax attention (O = A V is linear in
    A), so nothing of size N x N is kept and fused attention stays on. It holds where attention dropout is 0.
    """

    def __init__(self, model: nn.Module, absolute: str) -> None:
        self.absolute = absolute
        self.attentions = [attention_block(b).attn for b in model.blocks]
        self.sums: list[Tensor | None] = [None] * len(self.attentions)
        self.handles = [a.qkv.register_forward_hook(self._hook(i)) for i, a in enumerate(self.attentions)]

    def _hook(self, index: int):
        def forward(module: nn.Module, inputs: tuple, qkv: Tensor) -> Tensor:
            if not qkv.requires_grad:                       # the first block: the graph begins here, not at the image
                qkv = qkv.detach().requires_grad_()
            width = self.attentions[index].attn_dim
            value = qkv.detach()[..., 2 * width:]                               # (B, N, H d)

            def backward(grad: Tensor) -> None:
                product = (value.float() * grad[..., 2 * width:].float()).sum(dim=2)           # (B, N)
                self.sums[index] = product.sum(dim=0).abs() if self.absolute == "batch" else product.abs().sum(dim=0)
            qkv.register_hook(backward)
            return qkv
        return forward

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def token_scores(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, absolute: str = "image",
                 device: str | torch.device | None = None, progress: bool = True) -> Tensor:
    """Gradient-weighted attention scores s (L, n), summed over batches, higher is kept (A1):

        s_l[j] += | sum over b, h, i of dLoss/dA[b,h,i,j] * A[b,h,i,j] | / (B * H * N)

    for every patch j (prefix tokens are left out), with the loss the mean cross-entropy of the batch. model: dense,
    taken in eval mode. absolute: "image" takes the absolute value for each image before summing over b; "batch" takes it
    after, as published, which makes the scores depend on the batch size and the order of the images (measured on
    DeiT-tiny: docs/prune_and_merge.md). Raises InputError where the family can't be handled, there is no batch, or no
    classifier.
    """
    check_supported(model)
    if absolute not in ABSOLUTE:
        raise InputError(f"absolute {absolute!r} is not known; known are {list(ABSOLUTE)}")
    if is_merged(model):
        raise InputError("token scores are of the dense model; this one merges tokens already")
    if model.num_classes == 0:
        raise InputError("token scores need a classifier; the model has num_classes=0")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device)
    total: Tensor | None = None
    capture = ValueGradient(model, absolute)
    try:
        with _frozen_eval(model), torch.enable_grad():
            for images, targets in tqdm(batches, desc="token scores", unit="batch", disable=not progress):
                images, targets = images.to(device), targets.to(device)
                F.cross_entropy(model(images), targets).backward()
                scale = [len(images) * a.num_heads * len(s) for a, s in zip(capture.attentions, capture.sums)]
                step = torch.stack([s / k for s, k in zip(capture.sums, scale)])      # (L, N)
                total = step if total is None else total + step
    finally:
        capture.remove()
    if total is None:
        raise InputError("there is no image to score tokens on")
    return total[:, model.num_prefix_tokens:].cpu()
