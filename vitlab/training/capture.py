"""Token scores for whole data sets: through V and its gradient, by the class token's attention, by dependence (HSIC).

*Efficient Token Compression for Vision Transformer with Spatial Information Preserved* (arXiv 2503.23455), methods A1;
HSIC as in *Multi-Dimensional Vision Transformer Compression* (arXiv 2201.00043), methods B1. Also what captures share.
"""
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vitlab import parallel
from vitlab.criteria.hsic import dependence, gaussian_kernels
from vitlab.files import InputError
from vitlab.models import attention_block, check_supported, is_merged, shape_of
from vitlab.models.held import Merged
from vitlab.models.match import MatchBlock
from vitlab.training.pixels import cross_entropy, logits_of

ABSOLUTE = ("batch", "image")
Batches = Iterable[tuple[Tensor, Tensor]]       # images (B, channels, height, width) and class numbers (B), or masks (B, height, width)


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
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


@contextlib.contextmanager
def hooks(handles: list) -> Iterator[None]:
    """The hooks of these handles are there inside, and gone afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def averaged(model: nn.Module, batches: Batches, step: Callable[[Tensor, Tensor], tuple[Tensor, ...]], *, what: str,
             device: str | torch.device | None, progress: bool, same_size: bool = False) -> tuple[tuple[Tensor, ...], int]:
    """(mean over images of what step(images, targets) gives for each batch, number of images), on the CPU.

    model: in eval mode and frozen meanwhile. Under torchrun each process gives its share of the batches, and all get the mean over
    all of them. same_size: only batches as large as the first are read, and it needs two
    images: HSIC grows with the square of the batch and says little of a few images, so that a last, smaller batch would
    spoil the mean. Raises InputError where there is no image.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device)
    mean: tuple[Tensor, ...] = ()
    seen = 0
    with frozen_eval(model):
        first, rest = first_of(tqdm(batches, desc=what, unit="batch", disable=not progress), what)
        if same_size and first < 2:
            raise InputError(f"{what}: dependence compares images; a batch of {first} has none to compare, 2 at least are needed")
        for images, targets in rest:
            if same_size and len(images) != first:
                continue
            seen += len(images)
            given = step(images.to(device), targets.to(device))
            mean = tuple(m + (g - m) * (len(images) / seen) for m, g in zip(mean, given)) if mean else given
    return _over_processes(tuple(m.detach().cpu() for m in mean), seen)


def first_of(batches: Batches, what: str) -> tuple[int, Batches]:
    """(images in the first batch of all processes, the batches of this one). Raises InputError, on all of them, where one has none."""
    rest = iter(batches)
    first = next(rest, None)
    sizes = parallel.gather(0 if first is None else len(first[0]))
    if not any(sizes):
        raise InputError(f"{what}: there is no image to score on")
    if not all(sizes):
        raise InputError(f"{what}: {sum(map(bool, sizes))} batches for {len(sizes)} processes; smaller batches, more images or fewer "
                         "processes are needed")
    return sizes[0], itertools.chain([first], rest)


def _over_processes(mean: tuple[Tensor, ...], seen: int) -> tuple[tuple[Tensor, ...], int]:
    """The mean over the images of all processes, and how many these are."""
    if parallel.world() == 1:
        return mean, seen
    shapes = next(filter(None, parallel.gather([tuple(m.shape) for m in mean])))    # a process may have had no batch of the right size
    images = int(parallel.total(torch.tensor(seen)))
    sums = [m.double() * seen for m in mean] or [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    return tuple((parallel.total(s) / images).float() for s in sums), images


def need_classifier(model: nn.Module, what: str) -> None:
    """InputError where the model gives no class probabilities."""
    if model.num_classes == 0:
        raise InputError(f"{what} need a classifier or decoder; the model has num_classes=0")


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


def _by_gradient(model: nn.Module, batches: Batches, absolute: str, device: str | torch.device | None, progress: bool) -> Tensor:
    """Gradient-weighted attention   (A1)."""
    need_classifier(model, "token scores")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device)
    total: Tensor | None = None
    capture = ValueGradient(model, absolute)
    with hooks(capture.handles), frozen_eval(model), torch.enable_grad():
        for images, targets in first_of(tqdm(batches, desc="token scores", unit="batch", disable=not progress), "token scores")[1]:
            images, targets = images.to(device), targets.to(device)
            cross_entropy(model(images), targets).backward()
            scale = [len(images) * a.num_heads * len(s) for a, s in zip(capture.attentions, capture.sums)]
            step = torch.stack([s / k for s, k in zip(capture.sums, scale)])      # (L, N)
            total = step if total is None else total + step
    return parallel.total(total[:, model.num_prefix_tokens:].cpu())


def _attention(attn: nn.Module, qkv: Tensor, queries: int | None = None) -> Tensor:
    """Softmax attention of the first `queries` tokens (None: of all) to every token: qkv (B, N, 3 H d) -> (B, H, queries, N)."""
    q, k, _ = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)       # each (B, H, N, d)
    q, k = attn.q_norm(q[:, :, :queries]), attn.k_norm(k)
    return (q * attn.scale @ k.mT).softmax(dim=-1)


def _attention_hooks(model: nn.Module, found: list, reduce: Callable[[Tensor], Tensor], queries: int | None = None) -> list:
    """Handles of hooks that put reduce(attention of block l) into found[l]."""
    def hook(index: int, attn: nn.Module):
        def forward(module: nn.Module, inputs: tuple, qkv: Tensor) -> None:
            found[index] = reduce(_attention(attn, qkv, queries))
        return forward
    return [b.attn.qkv.register_forward_hook(hook(i, b.attn)) for i, b in enumerate(model.blocks)]


def _by_class_attention(model: nn.Module, batches: Batches, absolute: str, device: str | torch.device | None,
                        progress: bool) -> Tensor:
    """The class token's attention, averaged over heads and images."""
    if model.cls_token is None:
        raise InputError("the criterion class_attention needs a class token; the model has none")
    found = [None] * len(model.blocks)

    def step(images: Tensor, targets: Tensor) -> tuple[Tensor]:
        model(images)
        return (torch.stack(found),)                                            # (L, N)
    # The class token is the first of the prefix tokens in every supported family.
    with hooks(_attention_hooks(model, found, lambda a: a.mean(dim=(0, 1, 2)), queries=1)), torch.no_grad():
        (scores,), _ = averaged(model, batches, step, what="token scores", device=device, progress=progress)
    return scores[:, model.num_prefix_tokens:]


def _by_hsic(model: nn.Module, batches: Batches, absolute: str, device: str | torch.device | None, progress: bool) -> Tensor:
    """Dependence of the softmax output on what enters the block at each patch   (B1)."""
    need_classifier(model, "token scores by hsic")
    prefix, kernels = model.num_prefix_tokens, [None] * len(model.blocks)

    def hook(index: int):
        def before(module: nn.Module, inputs: tuple) -> None:
            kernels[index] = gaussian_kernels(inputs[0][:, prefix:].transpose(0, 1))     # X_j (B, D) -> (n, B, B)
        return before

    def step(images: Tensor, targets: Tensor) -> tuple[Tensor]:
        probabilities = logits_of(model, images).softmax(dim=1).flatten(1)
        return (torch.stack([dependence(k, probabilities) for k in kernels]),)           # (L, n)
    with hooks([b.register_forward_pre_hook(hook(i)) for i, b in enumerate(model.blocks)]), torch.no_grad():
        (scores,), _ = averaged(model, batches, step, what="token scores by hsic", device=device, progress=progress, same_size=True)
    return scores


TOKEN_CRITERIA = {"gradient": _by_gradient, "class_attention": _by_class_attention, "hsic": _by_hsic}


def token_scores(model: nn.Module, batches: Batches, *, criterion: str = "gradient", absolute: str = "image",
                 device: str | torch.device | None = None, progress: bool = True) -> Tensor:
    """Scores s (L, n) of every patch in every block, higher is kept. model: dense, taken in eval mode.

    criterion "gradient": gradient-weighted attention (A1), summed over batches,

        s_l[j] += | sum over b, h, i of dLoss/dA[b,h,i,j] * A[b,h,i,j] | / (B * H * N)

    with the loss the mean cross-entropy of the batch. absolute: "image" takes the absolute value for each image before
    summing over b; "batch" takes it after, as published, which makes the scores depend on the batch size and the order of
    the images (measured on DeiT-tiny: docs/prune_and_merge.md). The other criteria have no use for it.

    criterion "class_attention": s_l[j] = mean over images and heads of A[b,h,0,j], the class token's attention, 0 to 1.

    criterion "hsic": s_l[j] = HSIC(X_j, softmax output), X_j (B x D) what enters block l at patch j (B1), averaged over
    the batches that are as large as the first.

    Raises InputError for an unknown criterion, where the family can't be handled, there is no batch, no classifier (or
    for class_attention no class token), or the model's tokens are merged already.
    """
    check_supported(model)
    if criterion not in TOKEN_CRITERIA:
        raise InputError(f"criterion {criterion!r} is not known; known are {sorted(TOKEN_CRITERIA)}")
    if absolute not in ABSOLUTE:
        raise InputError(f"absolute {absolute!r} is not known; known are {list(ABSOLUTE)}")
    if is_merged(model):
        raise InputError("token scores are of the dense model; this one merges tokens already")
    return TOKEN_CRITERIA[criterion](model, batches, absolute, device, progress)


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Softmax attention (L, B, H, N, N) of every block, for plots: images (B, channels, height, width).

    Rows (queries) sum to 1. Computed beside the forward, in which fused attention stays on. Raises InputError for a
    compressed model or a family that can't be handled.
    """
    shape_of(model)
    found = [None] * len(model.blocks)
    with hooks(_attention_hooks(model, found, Tensor.cpu)), frozen_eval(model):
        model(images.to(next(model.parameters()).device))
    return torch.stack(found)


@torch.no_grad()
def token_places(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Which token each patch went into, for plots: {block: (B, n), from 0} of every block from the first that merges by content
    on. Raises InputError for a model in which none does."""
    found = {}

    def hook(index: int):
        def forward(block: MatchBlock, inputs: tuple, given: Merged | Tensor) -> None:
            given = given if isinstance(given, Merged) else block.merged(*inputs)       # a last block has given the grid back
            if isinstance(given, Merged):
                found[index] = given.places.cpu()
        return forward
    matching = [(i, m) for i, block in enumerate(model.blocks) for m in block.modules() if isinstance(m, MatchBlock)]
    with hooks([block.register_forward_hook(hook(i)) for i, block in matching]), frozen_eval(model):
        model(images.to(next(model.parameters()).device))
    if not found:
        raise InputError("no block of the model merges tokens by content; a plan with rule \"match\" does")
    return found
