"""Figures of heads and neurons: what they score, which are cut, and where the model looks without them."""
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import seaborn as sns
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from vitlab.plan import CompressionPlan
from vitlab.plan.shape import POOL_TOKEN, ViTShape
from vitlab.plots.base import OVER_ALL, PALETTE, PICTURES, as_array, new_axes
from vitlab.runtime.files import require


def to_own_range(rows: np.ndarray, highest: float = 1.0) -> np.ndarray:
    """(L, K), the range of each row from its least to its quantile `highest` moved to [0, 1]; equal values become 0."""
    low, high = rows.min(axis=1, keepdims=True), np.quantile(rows, highest, axis=1, keepdims=True)
    return ((rows - low) / np.where(high > low, high - low, 1)).clip(0, 1)


def _score_map(axis: Axes, values: np.ndarray, label: str) -> AxesImage:
    """A heat map of values (L, K) in [0, 1]."""
    axis.set(xlabel=label)
    image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return image


def cut_heads(plan: CompressionPlan) -> list[tuple[int, int]]:
    """(block, head) of every head that the plan cuts."""
    return [(row, head) for row, block in enumerate(plan.blocks) if block.heads is not None
            for head in range(plan.shape.num_heads) if head not in block.heads]


def _cross_cut(axis: Axes, plan: CompressionPlan) -> None:
    """A cross on each head that the plan cuts, on a heat map of blocks by heads."""
    cut = cut_heads(plan)
    for colour, width in OVER_ALL if cut else ():
        axis.scatter(*zip(*((head, row) for row, head in cut)), marker="x", s=36, color=colour, linewidths=width)


def unit_scores(heads: Any, neurons: Any, plan: CompressionPlan | None = None) -> Figure:
    """Two heat maps: scores of heads (L, H), and of neurons (L, M) sorted within each block; higher is kept.

    Colour is the score within its block's own range; of neurons up to their 99th percentile, as a few outliers would
    leave the rest dark. With a plan, its cut heads carry a cross, and a line stands at the number of neurons kept (a
    count: a plan made from other scores may keep others than the leftmost).
    """
    heads, neurons = as_array(heads), as_array(neurons)
    require(len(heads) == len(neurons),
            f"heads have {len(heads)} blocks, neurons {len(neurons)}; the same number is needed")
    if plan is not None:
        shape, given = plan.shape, (*heads.shape, neurons.shape[1])
        needed = (shape.depth, shape.num_heads, shape.num_neurons)
        require(given == needed, f"scores are for {given} (blocks, heads, neurons); the plan is for {needed}")
    figure, (axes,) = new_axes(1, 2, 4.8, min(max(1.7 + 0.22 * len(heads), 2.7), 6.5), framed=True)
    ranked = -np.sort(-neurons, axis=1)                                         # (L, M), highest first
    shown = (to_own_range(heads), to_own_range(ranked, 0.99))
    for axis, values, label in zip(axes, shown, ("head", "neurons, highest score first")):
        image = _score_map(axis, values, label)
    axes[0].set(ylabel="block")
    figure.colorbar(image, ax=list(axes), label="score in block's range", aspect=30, pad=0.01)
    if plan is not None:
        _cross_cut(axes[0], plan)
        kept = [neurons.shape[1] if block.neurons is None else len(block.neurons) for block in plan.blocks]
        lines = [((count - 0.5, row - 0.5), (count - 0.5, row + 0.5)) for row, count in enumerate(kept)]
        for colour, width in OVER_ALL:
            axes[1].add_collection(LineCollection(lines, colors=colour, linewidths=width, clip_on=False), autolim=False)
        axes[0].set_title("cross: cut" if cut_heads(plan) else "none is cut")
        axes[1].set_title("line: number kept")
    return figure


def redundancy_matrices(matrices: Any, blocks: Sequence[int]) -> Figure:
    """One heat map per chosen block of the HSIC between its heads, from matrices (L, H, H); the diagonal is grey, the
    others are coloured within the block's own range, which stands in the title."""
    columns = min(len(blocks), 4)
    figure, axes = new_axes(-(-len(blocks) // columns), columns, 2.3, 2.3, framed=True)
    for axis in axes.flat[len(blocks):]:
        axis.set_visible(False)
    for axis, block in zip(axes.flat, blocks):
        matrix = as_array(matrices[block])
        apart = ~np.eye(len(matrix), dtype=bool)                                # (H, H): True off the diagonal
        low, high = (matrix[apart].min(), matrix[apart].max()) if apart.any() else (0, 0)
        shown = np.ma.masked_where(~apart, (matrix - low) / (high - low if high > low else 1))
        axis.set_facecolor("0.75")                                              # what a masked cell shows
        image = axis.imshow(shown, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"block {block}: {low:.2g} to {high:.2g}", fontsize=9)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.tick_params(labelsize=9)
    figure.supxlabel("head", fontsize=11)
    figure.supylabel("head", fontsize=11)
    bar = figure.colorbar(image, ax=list(axes.flat), aspect=25 * len(axes), pad=0.01)
    bar.set_label("HSIC in block's range", fontsize=10)
    return figure


def rollout(attention: Tensor, num_prefix_tokens: int, kept: Sequence[Sequence[int]] | None = None, *,
            average: bool = False) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928, section 3): what the class token takes from patches.

    attention (L, H, N, N), rows sum to 1; kept: the heads to use, per block (None: all). Per block A is the mean over
    these heads, 0 without any; the rollout is the product over blocks of A + I with rows normalised, the last leftmost.
    Returns (n,): row 0 (the class token), or the mean over the patches' rows (average), over the N - num_prefix_tokens
    patches, float64; with the prefix tokens it sums to 1.
    """
    depth, _, count, _ = attention.shape
    require(average or num_prefix_tokens > 0,
            "rollout reads the class token's row, and there is no prefix token; average=True reads all")
    require(kept is None or len(kept) == depth, f"kept has {len(kept or ())} blocks; the attention has {depth}")
    result = identity = torch.eye(count, dtype=torch.float64, device=attention.device)
    for index, block in enumerate(attention):                                   # (H, N, N)
        chosen = block if kept is None else block[list(kept[index])]
        if len(chosen):
            mixed = chosen.double().mean(dim=0) + identity              # the paper's 0.5 goes with the normalisation
            result = (mixed / mixed.sum(dim=1, keepdim=True)) @ result
    return looked_at(result, num_prefix_tokens, average=average)


def looked_at(attention: Tensor, num_prefix_tokens: int, *, average: bool = False) -> Tensor:
    """(n) What the class token (row 0) takes from each patch, of attention (N, N); average: the mean of their rows."""
    row = attention[num_prefix_tokens:].mean(dim=0) if average else attention[0]
    return row[num_prefix_tokens:]


def head_rollouts(pictures: dict[str, np.ndarray], attention: dict[str, Tensor], plan: CompressionPlan,
                  shape: ViTShape) -> Figure:
    """A row per picture: the picture, and over it in grey the rollout of the heads that the plan keeps and of those it
    cuts, coloured within the map's own range; below, its largest value over its mean (1: it is flat).

    pictures {name: (h, w, 3) in [0, 1]}; attention {name: (L, H, N, N)} of the dense model.
    """
    require(pictures.keys() == attention.keys(),
            f"pictures are of {list(pictures)}, attention of {list(attention)}; the same are needed")
    plan.check_fits(shape)
    every = range(shape.num_heads)
    kept = [list(every) if block.heads is None else list(block.heads) for block in plan.blocks]
    cut = [[head for head in every if head not in heads] for heads in kept]
    figure, axes = new_axes(len(pictures), 3, 3.0, 2.9, **PICTURES)
    needed = (shape.depth, shape.num_heads, shape.num_tokens, shape.num_tokens)
    for row, (name, picture) in zip(axes, pictures.items()):
        size = tuple(attention[name].shape)
        require(size == needed, f"attention of {name} is {size}; {needed} is needed")
        covered = [side * g * p / i for side, g, p,
                   i in zip(picture.shape, shape.grid_size, shape.patch_size, shape.img_size)]
        row[0].imshow(picture)
        for axis, heads in zip(row[1:], (kept, cut)):
            if not any(heads):
                axis.text(0.5, 0.5, "no head is cut", transform=axis.transAxes, ha="center", va="center")
                axis.set_aspect("equal")
                continue
            axis.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1)      # grey: the only colours are the map's
            given = rollout(attention[name], shape.num_prefix_tokens, heads,
                            average=shape.pool != POOL_TOKEN).cpu().numpy()
            shown = to_own_range(given[None]).reshape(shape.grid_size)
            image = axis.imshow(shown, cmap="viridis", vmin=0, vmax=1, alpha=0.6, interpolation="bilinear",
                                extent=(-0.5, covered[1] - 0.5, covered[0] - 0.5, -0.5))
            axis.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(picture.shape[0] - 0.5, -0.5))
            axis.set_xlabel(f"largest is {given.max() / given.mean():.1f} x the mean", fontsize=9)
        row[0].set_ylabel(fill(name, 28), fontsize=10)
    for axis, title in zip(axes[0], ("picture", "heads kept", "heads cut")):
        axis.set_title(title)
    figure.colorbar(image, ax=list(axes.flat), label="rollout in map's range", aspect=25 * len(axes), pad=0.01)
    return figure


def over_grey(picture: np.ndarray, values: Any, shape: ViTShape) -> np.ndarray:
    """A picture (h, w, 3) in grey under the values (n) of its patches, coloured within their own range."""
    shown = Image.fromarray(to_own_range(as_array(values)[None]).reshape(shape.grid_size).astype(np.float32))
    smooth = np.asarray(shown.resize(picture.shape[1::-1], Image.Resampling.BILINEAR))
    return 0.4 * picture.mean(axis=2, keepdims=True) + 0.6 * colormaps["viridis"](smooth)[..., :3]


def ranked_neurons(neurons: Any, plan: CompressionPlan, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores (M), highest first, and which of them the plan keeps (M))."""
    scores, kept = as_array(neurons[block]), plan.blocks[block].neurons
    order = np.argsort(-scores, kind="stable")
    return scores[order], np.isin(order, range(len(scores)) if kept is None else kept)


def head_view(heads: Any, neurons: Any, plan: CompressionPlan, picture: np.ndarray, attention: Any, shared: Any,
              block: int, head: int) -> Figure:
    """One head in four panels: where it stands among the scores (L, H), what it looks at, what it shares with the other
    heads of its block, and the scores of the block's neurons (L, M), highest first.

    picture (h, w, 3) in [0, 1]; attention (n) of the head to the patches; shared (H), the HSIC with each head of the
    block, or None. Blue is kept, orange is cut.
    """
    figure, axes = new_axes(2, 2, 4.7, 3.3, framed=True)
    (scores, looks), (bars, ranks) = axes
    _score_map(scores, to_own_range(as_array(heads)), "head").axes.set(
        ylabel="block", title="score in block's range; cross: cut")
    _cross_cut(scores, plan)
    scores.add_patch(Rectangle((head - 0.5, block - 0.5), 1, 1, fill=False, edgecolor=PALETTE[1], linewidth=3))
    looks.imshow(over_grey(picture, attention, plan.shape))
    looks.set(xticks=[], yticks=[], title=f"attention of block {block}, head {head}")
    cut = {other for row, other in cut_heads(plan) if row == block}
    others = [other for other in range(plan.shape.num_heads) if other != head]
    if shared is None or not others:
        bars.set_visible(False)
    else:
        bars.bar([str(other) for other in others], as_array(shared)[others],
                 color=[PALETTE[other in cut] for other in others])
        bars.set(xlabel="head", ylabel="HSIC", title=f"dependence of head {head} on the others")
    values, kept = ranked_neurons(neurons, plan, block)
    ranks.vlines(np.arange(len(values)), min(0.0, values.min()), values,
                 colors=np.where(kept[:, None], PALETTE[0], PALETTE[1]))
    ranks.set(xlabel="neuron, highest score first", ylabel="score", title=f"{kept.sum()} of {len(kept)} neurons kept")
    sns.despine(ax=bars)
    sns.despine(ax=ranks)
    return figure
