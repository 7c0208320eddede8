"""Figures of token scores and merged tokens: what a block sees of an image, and what it gives back."""
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import maximum_filter
from torch import Tensor

from vitlab.plan import CompressionPlan, tokens
from vitlab.plan.rules import MergeReconstruct
from vitlab.plan.shape import ViTShape
from vitlab.plots.base import PALETTE, PICTURES, as_array, legend_above, new_axes


def plain(text: str, most: int = 1000) -> str:
    """At most so many letters of a name, as they are: matplotlib takes what is between dollars for a formula."""
    return (text if len(text) <= most else text[:most - 1] + "…").replace("$", r"\$")


def score_maps(scores: Tensor, shape: ViTShape, blocks: Sequence[int]) -> Figure:
    """One heat map per block of the scores (L, n) on the patch grid, each block scaled to its own maximum."""
    figure, axes = new_axes(1, len(blocks), 2.3, 2.6, **PICTURES)
    for axis, block in zip(axes[0], blocks):
        values = scores[block].reshape(shape.grid_size).numpy()
        image = axis.imshow(values / values.max(), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"block {block}")
    figure.colorbar(image, ax=list(axes[0]), label="score / block's largest", shrink=0.8)
    return figure


def _upscaled(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(rows, columns, ...) repeated to the image's pixels."""
    rows, columns = patches.shape[:2]
    return patches.repeat(size[0] // rows, axis=0).repeat(size[1] // columns, axis=1)


def draw_borders(axis: Axes, regions: np.ndarray, size: tuple[int, int], thickness: float = 1.0) -> None:
    """Lines where neighbouring patches belong to different regions (rows, columns); thickness 1: two points."""
    patch = np.array(size[::-1]) / regions.shape[::-1]                          # its width and height
    ends = [((x + 1, y), (x + 1, y + 1)) for y, x in np.argwhere(regions[:, 1:] != regions[:, :-1])]
    ends += [((x, y + 1), (x + 1, y + 1)) for y, x in np.argwhere(regions[1:] != regions[:-1])]
    lines = np.reshape(ends, (-1, 2, 2)) * patch - 0.5
    for colour, width in (("black", 2.0), ("white", 0.9)):                      # seen on bright and on dark ground
        axis.add_collection(LineCollection(lines, colors=colour, linewidths=thickness * width))


def _as_patches(image: np.ndarray, shape: ViTShape) -> tuple[Tensor, tuple[int, int, int, int]]:
    """An image (h, w, 3) as patches (n, ph pw 3), and (rows, height, columns, width) of the grid and its patches."""
    gh, gw = shape.grid_size
    ph, pw = image.shape[0] // gh, image.shape[1] // gw
    patches = image[:gh * ph, :gw * pw].reshape(gh, ph, gw, pw, 3).transpose(0, 2, 1, 3, 4).reshape(gh * gw, -1)
    return torch.from_numpy(patches.copy()).double(), (gh, ph, gw, pw)


def region_means(image: np.ndarray, regions: Tensor, shape: ViTShape) -> np.ndarray:
    """The image with its patches in the mean colour of their region: regions (n) from 0; -1 for a patch by itself."""
    x, (gh, ph, gw, pw) = _as_patches(image, shape)
    colours = x.reshape(len(x), -1, 3).mean(dim=1)                              # (n, 3)
    means = colours.clone()
    for region in regions[regions >= 0].unique():
        means[regions == region] = colours[regions == region].mean(dim=0)
    return _upscaled(means.reshape(gh, gw, 3).numpy(), (gh * ph, gw * pw)).clip(0, 1)


def _as_image(x: Tensor, grid: tuple[int, int, int, int]) -> np.ndarray:
    """Patches (n, ph pw 3) back as an image: what `_as_patches` took apart."""
    gh, ph, gw, pw = grid
    return x.reshape(gh, gw, ph, pw, 3).permute(0, 2, 1, 3, 4).reshape(gh * ph, gw * pw, 3).numpy().clip(0, 1)


def through_matrices(image: np.ndarray, rule: MergeReconstruct, shape: ViTShape) -> tuple[np.ndarray, np.ndarray]:
    """(region means, what reconstruct @ merge gives back) of the image's patches, their pixels taken as the token's
    features, as images; pruned patches as they are."""
    x, grid = _as_patches(image, shape)
    merge = tokens.merge_matrix(rule, 0, torch.float64)                         # (C, n), no prefix rows
    mask = tokens.token_mask(rule, 0)[:, None]
    given = torch.where(mask, tokens.reconstruct_matrix(merge) @ (merge @ x), x)
    return region_means(image, torch.tensor(rule.regions), shape), _as_image(given, grid)


def through_means(image: np.ndarray, regions: Tensor, weights: Tensor, shape: ViTShape) -> np.ndarray:
    """The image with every patch replaced by the mean patch of its region, pixel by pixel: regions (n) from 0 without a
    gap, -1 for a patch by itself; weights (n), which sum to 1 in each region."""
    x, grid = _as_patches(image, shape)
    inside = (regions >= 0).nonzero().flatten()
    share = x.new_zeros(int(regions.max()) + 1, len(x))                         # (C, n)
    share[regions[inside], inside] = weights[inside].double()
    x[inside] = (share @ x)[regions[inside]]
    return _as_image(x, grid)


def tinted(image: np.ndarray, patches: np.ndarray, shape: ViTShape) -> np.ndarray:
    """The image with the patches where `patches` (n) is True in the palette's orange."""
    cover = _upscaled(patches.reshape(shape.grid_size), image.shape[:2])[..., None]
    return np.where(cover, 0.45 * image[:cover.shape[0], :cover.shape[1]] + 0.55 * np.array(to_rgb(PALETTE[1])), image)


def bordered(image: np.ndarray, regions: np.ndarray, shape: ViTShape) -> np.ndarray:
    """The image (h, w, 3) with a line, a pixel of white between two of black, where regions (n) change: in some ms."""
    labels = _upscaled(regions.reshape(shape.grid_size), image.shape[:2])
    line = np.zeros(labels.shape, dtype=bool)
    line[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    line[1:] |= labels[1:] != labels[:-1]
    shown = np.where(maximum_filter(line, 3)[..., None], 0.0, image)
    shown[line] = 1.0
    return shown


def merge_map(image: np.ndarray, plan: CompressionPlan, blocks: Sequence[int]) -> Figure:
    """Per block, a row: the image with region borders and pruned patches in orange, region means, and the
    reconstruction. image (h, w, 3) in [0, 1], h and w multiples of the grid.

    The pseudo-inverse scales a patch by its weight over the squared norm of its region's weights, so the reconstruction
    of pixels is darker or brighter than the image where the weights of a region differ.
    """
    figure, axes = new_axes(len(blocks), 3, 2.7, 2.75, **PICTURES)
    shape = plan.shape
    for axis, title in zip(axes[0], ("regions (orange: pruned)", "region means", "reconstruct @ merge")):
        axis.set_title(title)
    for line, block in zip(axes, blocks):
        rule, shown = plan.rules()[block][0], [image] * 3
        if rule is not None:
            pruned = np.isin(np.arange(shape.num_patches), rule.pruned)
            shown = [tinted(image, pruned, shape), *through_matrices(image, rule, shape)]
        for axis, each in zip(line, shown):
            axis.imshow(each)
        if rule is not None:
            draw_borders(line[0], np.array(rule.regions).reshape(shape.grid_size), image.shape[:2])
        count = shape.num_patches if rule is None else rule.num_merged
        line[0].set_ylabel(f"block {block}\n{count} of {shape.num_patches} patches")
    return figure


def matched_map(images: Sequence[np.ndarray], places: dict[int, Tensor], shape: ViTShape) -> Figure:
    """Per image (h, w, 3), a row: the image, then for each block of `places` (B, n) what its patches are once tokens
    were merged by content: those that became one token have its mean colour, and a border wherever they lie."""
    figure, axes = new_axes(len(images), 1 + len(places), 1.75, 1.8, **PICTURES)
    titles = ["image"] + [f"block {block}: {int(each[0].max()) + 1} tokens" for block, each in places.items()]
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    for row, (image, line) in enumerate(zip(images, axes)):
        line[0].imshow(image)
        for axis, each in zip(line[1:], places.values()):
            axis.imshow(region_means(image, each[row], shape))
            draw_borders(axis, each[row].reshape(shape.grid_size).numpy(), image.shape[:2])
    return figure


def _panels(count: int, columns: int) -> tuple[Figure, np.ndarray]:
    """(figure, its first `count` axes) in rows of so many."""
    figure, axes = new_axes(-(-count // columns), columns, 1.75, 1.95, **PICTURES)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes.flat[:count]


def _draw_tokens(axis: Axes, image: np.ndarray, regions: np.ndarray, aside: np.ndarray, shape: ViTShape,
                 title: str = "") -> None:
    """An image (h, w, 3) as its tokens: each in its mean colour, what goes aside in orange, borders between them."""
    axis.imshow(tinted(region_means(image, torch.from_numpy(regions), shape), aside, shape))
    draw_borders(axis, regions.reshape(shape.grid_size), image.shape[:2], 0.5)
    axis.set_title(title, fontsize=9)


def token_strip(image: np.ndarray, seen: Sequence[tuple[np.ndarray, np.ndarray]], shape: ViTShape,
                columns: int = 7) -> Figure:
    """A picture (h, w, 3), and its tokens in every block: seen, of each, the regions (n), from 0 or -1 for none, and
    which patches (n) go aside (pruned, or averaged into one token), in orange."""
    figure, axes = _panels(1 + len(seen), min(columns, 1 + len(seen)))
    axes[0].imshow(image)
    axes[0].set_title("picture", fontsize=9)
    for block, (regions, aside) in enumerate(seen):
        _draw_tokens(axes[1 + block], image, regions, aside, shape, f"block {block}: {regions.max() + 1} tokens")
    return figure


def token_sheet(pictures: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], shape: ViTShape,
                pairs: int = 4) -> Figure:
    """Pictures (title, (h, w, 3), regions, aside), each beside its tokens in one block, as in `token_strip`; so many of
    them in a row."""
    figure, axes = _panels(2 * len(pictures), 2 * min(pairs, len(pictures)))
    for (title, image, regions, aside), own, beside in zip(pictures, axes[::2], axes[1::2]):
        own.imshow(image)
        own.set_title(plain(title, 20), fontsize=9)
        _draw_tokens(beside, image, regions, aside, shape, f"{regions.max() + 1} tokens")
    return figure


def attention_spans(distance: Tensor, entropy: Tensor, shape: ViTShape) -> Figure:
    """How far (pixels) and how widely (nats) the heads (L, H) of each block look, a point a head; dashed: attention
    that is spread evenly."""
    figure, (axes,) = new_axes(1, 2, 4.7, 3.4)
    evenly = float(tokens.patch_distances(shape).mean())
    for axis, values, even, label in ((axes[0], distance, evenly, "distance looked at (pixels)"),
                                      (axes[1], entropy, np.log(shape.num_tokens), "entropy of attention (nats)")):
        each = as_array(values)
        blocks = np.arange(len(each))
        axis.scatter(blocks.repeat(each.shape[1]), each, s=18, color=PALETTE[0], alpha=0.7, linewidth=0, label="a head")
        axis.plot(blocks, each.mean(axis=1), color=PALETTE[1], label="mean over heads")
        axis.axhline(even, color="0.4", linestyle="--", linewidth=1, label="spread evenly")
        axis.set(xlabel="block", ylabel=label, ylim=(0, 1.05 * max(even, each.max())))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure
