"""Token scores for whole data sets: through V and its gradient, by the class token's attention, by dependence (HSIC).

*Efficient Token Compression for Vision Transformer with Spatial Information Preserved* (arXiv 2503.23455), methods A1;
HSIC as in *Multi-Dimensional Vision Transformer Compression* (arXiv 2201.00043), methods B1.
"""
import contextlib
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitlab.criteria.hsic import at_least_float32, dependence, gaussian_kernels
from vitlab.measure.averaging import Averages, Batches, averaged, begun, draws_of_batches, frozen_eval, hooks
from vitlab.measure.distance import output_of
from vitlab.models import attention_block, check_supported, is_merged, shape_of
from vitlab.models.attention import KeyedAttention, OwnAttention, PrefixAttention, attention_as, token_weights
from vitlab.models.ends import class_token, prefix_of, tokens_of
from vitlab.models.held import Merged
from vitlab.models.left_out import LeftOut
from vitlab.models.match import MatchBlock
from vitlab.models.windowed import check_seen
from vitlab.plan.tokens import patch_distances
from vitlab.runtime.files import InputError, check_known, require

ABSOLUTE = ("batch", "image")
Scored = tuple[Tensor, int]                     # token scores (L, n), how many images had a part in them


@contextlib.contextmanager
def seen(model: nn.Module, see: Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Tensor]
         ) -> Generator[None, None, None]:
    """Inside, see(block, queries, keys, values, mask), (B, H, N, d) each as they are multiplied, and what is added to
    the logits, is called on the way through each attention; what it gives goes on in place of the values."""
    blocks = [attention_block(block) for block in model.blocks]
    for block in blocks:
        check_seen(block)
    own = [block.attn for block in blocks]
    try:
        for index, block in enumerate(blocks):
            kinds = [kind for kind in (KeyedAttention, PrefixAttention) if isinstance(block.attn, kind)]
            block.attn = attention_as(*kinds or [OwnAttention], block.attn, shown=partial(see, index))
        yield
    finally:
        for block, attention in zip(blocks, own):
            block.attn = attention


class ValueGradient:
    """Looks at each block's values on their way (`seen`). In the backward pass, <V[b,j], dLoss/dV[b,j]> is summed over
    heads and width, and `found` gets for each block, (N): its absolute value summed over the batch (absolute "image"),
    or that of its sum ("batch").

    That equals the sum over queries i of dLoss/dA[i, j] * A[i, j] with A the softmax attention (O = A V is linear in
    A), so nothing of size N x N is kept and fused attention stays on. It holds where attention dropout is 0.
    """

    def __init__(self, model: nn.Module, absolute: str) -> None:
        self.absolute, self.heads = absolute, [attention_block(b).attn.num_heads for b in model.blocks]
        self.found: list[Any] = [None] * len(self.heads)

    def __call__(self, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        value = begun(value)
        rows = value.detach().transpose(1, 2).flatten(2)                        # (B, N, H d)

        def backward(grad: Tensor) -> None:
            gradient = at_least_float32(grad.transpose(1, 2).flatten(2))
            product = (at_least_float32(rows) * gradient).sum(dim=2)            # (B, N)
            self.found[index] = product.abs().sum(dim=0) if self.absolute == "image" else product.sum(dim=0).abs()
        value.register_hook(backward)
        return value


def _by_gradient(model: nn.Module, average: Callable[..., Averages], absolute: str) -> Scored:
    """Gradient-weighted attention   (A1)."""
    capture, each, output = ValueGradient(model, absolute), absolute == "image", output_of(model)
    draws, patches = draws_of_batches(), slice(prefix_of(model), tokens_of(model))

    def step(images: Tensor, targets: Tensor) -> tuple[Tensor]:
        # No image's gradient depends on another's, so that of the summed losses holds each image's own.
        output.loss(model, images, targets, next(draws), each=each).backward()
        scores = torch.stack([found[patches] / (heads * len(found))
                              for found, heads in zip(capture.found, capture.heads)])           # (L, n)
        return (scores / len(images) if each else scores,)
    with seen(model, capture), torch.enable_grad():
        found = average(step, what="token scores")
    return found.values[0] * (1 if each else found.batches / found.batch), found.images


def seen_attention(model: nn.Module, found: list, reduce: Callable[[Tensor], Tensor],
                   queries: int | None = None) -> contextlib.AbstractContextManager[None]:
    """Inside, found[l] becomes reduce(`token_weights` of block l (B, H, queries, N)), of the first `queries` tokens
    (None: of all of the image that ask) to every token; where the attention is left out it stays what it was."""
    queries = tokens_of(model) if queries is None else queries

    def see(index: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attn = attention_block(model.blocks[index]).attn
        found[index] = reduce(token_weights(attn, attn.logits(
            query[:, :, :queries], key, None if mask is None else mask[..., :queries, :])))
        return value
    return seen(model, see)


def _by_class_attention(model: nn.Module, average: Callable[..., Averages], absolute: str) -> Scored:
    """The class token's attention, averaged over heads and images."""
    require(class_token(model), "the criterion class_attention needs a class token; the model has none: "
            "gradient and hsic need none")
    rows: list[Any] = [None] * len(model.blocks)                                # (n) each, of the hooks

    def step(images: Tensor, targets: Tensor) -> tuple[Tensor]:
        model(images)
        return (torch.stack(rows),)                                             # (L, n)
    # The class token is the first of the prefix tokens in every supported family.
    patches = slice(prefix_of(model), tokens_of(model))
    look = seen_attention(model, rows, lambda a: at_least_float32(a[..., patches]).mean(dim=(0, 1, 2)), queries=1)
    with look, torch.no_grad():
        found = average(step, what="token scores")
    return found.values[0], found.images


def _by_hsic(model: nn.Module, average: Callable[..., Averages], absolute: str) -> Scored:
    """Dependence of the output on what enters the block at each patch   (B1)."""
    prefix, count, depth, output = prefix_of(model), tokens_of(model), len(model.blocks), output_of(model)
    kernels: list[Any] = [None] * depth                                         # (n, B, B) each, of the hooks

    def before(index: int, module: nn.Module, inputs: tuple) -> None:
        kernels[index] = gaussian_kernels(inputs[0][:, prefix:count].transpose(0, 1))       # X_j (B, D) -> (n, B, B)

    def step(images: Tensor, targets: Tensor) -> tuple[Tensor]:
        given = output.dependent(output.raw(model, images))
        return (torch.stack([dependence(k, given) for k in kernels]) / len(images)**2,)         # (L, n)
    with hooks([b.register_forward_pre_hook(partial(before, i)) for i, b in enumerate(model.blocks)]), torch.no_grad():
        found = average(step, what="token scores by hsic", at_least=2)
    return found.values[0] * found.batch**2, found.images


TOKEN_CRITERIA = {"gradient": _by_gradient, "class_attention": _by_class_attention, "hsic": _by_hsic}


def token_scores(model: nn.Module, batches: Batches, *, criterion: str = "gradient", absolute: str = "image",
                 device: str | torch.device | None = None, progress: bool = True) -> Tensor:
    """Scores s (L, n) of every patch in every block, higher is kept. model: dense, taken in eval mode. Each image
    counts alike, however the images come in batches. B: images in a batch (the mean where they differ), H heads, N
    tokens.

    criterion "gradient": gradient-weighted attention (A1). absolute "image": with Loss_b each image's own loss (of
    pixels the mean over those of the image that count),

        s_l[j] = mean over images b of | sum over h, i of dLoss_b/dA[b,h,i,j] * A[b,h,i,j] | / (H * N)

    which no batch has a part in. Without a classifier Loss_b is that of `distance.Features`, needs no labels, and is
    drawn with a fixed seed. absolute "batch": the published form, of each batch's mean loss,

        s_l[j] += | sum over b, h, i of dLoss/dA[b,h,i,j] * A[b,h,i,j] | / (B * H * N)

    summed over batches, one of b images weighing b / B (1 where all are as large). Images of a batch cancel in it, so
    it depends on the batch size and on which images share a batch, and those of a smaller last batch, of which fewer
    cancel, still count for more than others (measured on DeiT-tiny: docs/prune_and_merge.md). The other criteria have
    no use for absolute.

    criterion "class_attention": s_l[j] = mean over images and heads of A[b,h,0,j], the class token's attention, 0 to 1
    (`token_weights`: of a differential attention, whose A is a difference of maps, |A| scaled to rows of sum 1).

    criterion "hsic": s_l[j] = HSIC(X_j, softmax output), without a classifier that with unit features, X_j (B x D)
    what enters block l at patch j (B1), of each batch. HSIC grows with the square of the batch, so batches of b images
    weigh b (B / b)^2; one of a single image has nothing to say.

    Raises InputError for an unknown criterion, where the family can't be handled, there is no batch (for hsic of two
    images), for class_attention no class token, or the model's tokens are merged already.
    """
    return scored(model, batches, criterion=criterion, absolute=absolute, device=device, progress=progress)[0]


def scored(model: nn.Module, batches: Batches, *, criterion: str, absolute: str, device: str | torch.device | None,
           progress: bool) -> Scored:
    """(`token_scores`, how many images had a part in them)."""
    check_supported(model)
    check_known("criterion", criterion, TOKEN_CRITERIA)
    require(absolute in ABSOLUTE, f"absolute {absolute!r} is not known; known are {list(ABSOLUTE)}")
    require(not is_merged(model), "token scores are of the dense model; this one merges tokens already")
    for block in model.blocks:
        check_seen(block)
    gone = [i for i, block in enumerate(model.blocks) if isinstance(attention_block(block).attn, LeftOut)]
    if gone and criterion != "hsic":
        raise InputError(f"{criterion} scores tokens by the attention, which is left out of block {gone[0]}; hsic "
                         "needs none")
    average = partial(averaged, model, batches, device=device, progress=progress)
    return TOKEN_CRITERIA[criterion](model, average, absolute)


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """`token_weights` (L, B, H, N, N) of every block, for plots: images (B, channels, height, width).

    Rows (queries) sum to 1, or less where learned queries that joined have a part. Computed beside the forward, in
    which fused attention stays on. Raises InputError for a compressed model or a family that can't be handled.
    """
    count = shape_of(model).num_tokens
    found: list[Any] = [None] * len(model.blocks)
    with seen_attention(model, found, lambda a: a[..., :count].cpu()), frozen_eval(model):
        model(images.to(next(model.parameters()).device))
    return torch.stack(found)


def attention_spans(model: nn.Module, batches: Batches, *, device: str | torch.device | None = None,
                    progress: bool = True) -> tuple[Tensor, Tensor]:
    """How far and how widely each head of a dense model looks, (L, H) each, means over images and queries i:

        distance = sum_j a_ij |c_i - c_j|, a_ij = A_ij / sum_j A_ij over patches, c their centres, in pixels
        entropy = - sum_j A_ij log A_ij over all tokens, in nats: 0 of one token, log N where all count alike

    (Dosovitskiy et al. 2021, arXiv 2010.11929, figure 7; Raghu et al. 2021, arXiv 2108.08810, section 3). Raises
    InputError for a compressed model, a family that can't be handled, or without images."""
    shape, prefix = shape_of(model), prefix_of(model)
    apart = patch_distances(shape)                                              # (n, n)
    found: list[Any] = [None] * len(model.blocks)

    def spans(attention: Tensor) -> Tensor:
        a = at_least_float32(attention)
        patches = a[..., prefix:, prefix:shape.num_tokens]                      # (B, H, n, n)
        distance = (patches * apart.to(a)).sum(dim=-1) / patches.sum(dim=-1)
        return torch.stack([each.mean(dim=(0, 2)) for each in (distance, torch.special.entr(a).sum(dim=-1))])

    def step(images: Tensor, targets: Tensor) -> tuple[Tensor]:
        model(images)
        return (torch.stack(found),)                                            # (L, 2, H)
    with seen_attention(model, found, spans), torch.no_grad():
        both = averaged(model, batches, step, what="attention spans", device=device, progress=progress).values[0]
    return both[:, 0], both[:, 1]


@torch.no_grad()
def token_places(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Which token each patch went into, for plots: {block: (B, n), from 0} of every block from the first that merges by
    content on. Raises InputError for a model in which none does."""
    found = {}

    def after(index: int, block: MatchBlock, inputs: tuple, kwargs: dict, given: Merged | Tensor) -> None:
        # a last block has given the grid back
        given = given if isinstance(given, Merged) else block.merged(inputs[0], kwargs.get("rope"))
        if isinstance(given, Merged):
            found[index] = given.places.cpu()
    handles = [m.register_forward_hook(partial(after, i), with_kwargs=True) for i, block in enumerate(model.blocks)
               for m in block.modules() if isinstance(m, MatchBlock)]
    with hooks(handles), frozen_eval(model):
        model(images.to(next(model.parameters()).device))
    require(found, "no block of the model merges tokens by content; a plan with rule \"match\" does")
    return found
