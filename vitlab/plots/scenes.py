"""Figures of segmented scenes: what pixels are taken for, what compression changes, which patches become one token."""
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from vitlab.plan import CompressionPlan
from vitlab.plan.rules import Match, MergeReconstruct, Select, SharedUpdate
from vitlab.plan.shape import ViTShape
from vitlab.plots.base import PALETTE, PICTURES, new_axes
from vitlab.plots.colours import GREY, IGNORE, check_mask, class_colours, coloured, overlaid
from vitlab.plots.tokens import draw_borders, region_means, tinted
from vitlab.runtime.files import InputError, require

OPACITY = 0.6                                   # of a mask over its image
RIGHT, WRONG, LOST, GAINED = range(4)
OUTCOMES = {RIGHT: ("right in both", (0.93,) * 3), WRONG: ("wrong in both", (0.25,) * 3),
            LOST: ("lost: the first alone is right", PALETTE[1]),
            GAINED: ("gained: the second alone is right", PALETTE[0])}
FINE = 400                                      # patches from which borders are drawn thinner


def outcomes(truth: Any, before: Any, after: Any, num_classes: int) -> np.ndarray:
    """(H, W) of RIGHT (before and after), WRONG (in both), LOST (right before alone), GAINED (right after alone) or
    IGNORE, of class numbers (H, W); where the truth is IGNORE, nothing counts."""
    given = {"the truth": truth, "the first prediction": before, "the second prediction": after}
    truth, before, after = (check_mask(each, num_classes, what) for what, each in given.items())
    require(truth.shape == before.shape == after.shape,
            f"the truth is {truth.shape}, the predictions {before.shape} and {after.shape}")
    was, still = before == truth, after == truth
    found = np.select([was & still, was, still], [RIGHT, LOST, GAINED], WRONG)
    return np.where(truth == IGNORE, IGNORE, found)


def difference(truth: Any, before: Any, after: Any, num_classes: int) -> np.ndarray:
    """`outcomes` in the colours of OUTCOMES, ignored pixels grey: (H, W, 3) in [0, 1]."""
    return outcomes_coloured(outcomes(truth, before, after, num_classes))


def outcomes_coloured(found: np.ndarray) -> np.ndarray:
    """(H, W, 3) of `outcomes` (H, W)."""
    return coloured(found, np.array([colour for _, colour in OUTCOMES.values()]))


def in_grey(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) without its colours, so that over it the only ones are the classes'."""
    return image.mean(axis=2, keepdims=True).repeat(3, axis=2)


def _share(hit: np.ndarray, truth: np.ndarray) -> str:
    """In per cent of the pixels that count; "-" where none does."""
    counted = truth != IGNORE
    return f"{100 * hit[counted].mean():.1f}%" if counted.any() else "-"


def _class_handles(masks: Sequence[np.ndarray], classes: Sequence[str]) -> list[Patch]:
    """A square per class that occurs in one of the masks, and for ignored pixels."""
    found, colours = sorted(set().union(*(np.unique(mask).tolist() for mask in masks))), class_colours(len(classes))
    return [Patch(color=(GREY,) * 3 if i == IGNORE else colours[i], label="ignored" if i == IGNORE else classes[i])
            for i in found]


def _outcome_handles() -> list[Patch]:
    return [Patch(facecolor=colour, edgecolor="0.6", linewidth=0.5, label=label) for label, colour in OUTCOMES.values()]


def _legend(figure: Figure, handles: Sequence[Patch], place: str, title: str = "") -> float:
    """A legend of squares above ("upper") or below ("lower") all axes; gives its height in inches."""
    widths, room = [5 + len(handle.get_label()) for handle in handles], int(13 * figure.get_figwidth())  # in letters
    columns = len(handles) if sum(widths) <= room else max(1, room // max(widths))
    figure.legend(handles=handles, loc=f"outside {place} center", ncols=columns, frameon=False, fontsize=9,
                  handlelength=1.2, columnspacing=1.5, title=title or None, title_fontsize=9)
    return 0.25 + 0.2 * (-(-len(handles) // columns) + len(title.splitlines()))


def _bare(axis: Axes, image: np.ndarray, title: str = "", below: str = "") -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(below, fontsize=9)


def _checked(truths: Sequence[Any], predicted: Mapping[str, Sequence[Any]], count: int,
             num_classes: int) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Masks of so many images as integers. Raises InputError for what does not fit."""
    require(count > 0 and len(predicted) > 0,
            f"{count} images and {len(predicted)} models; one of each at least is needed")
    found = {}
    for name, masks in {"truth": truths, **predicted}.items():
        require(len(masks) == count, f"{name}: {len(masks)} masks for {count} images")
        found[name] = [check_mask(mask, num_classes, f"{name}, image {i}") for i, mask in enumerate(masks)]
        for i, (mask, truth) in enumerate(zip(found[name], found["truth"])):
            require(mask.shape == truth.shape, f"{name}, image {i}: {mask.shape}, its truth {truth.shape}")
    return found.pop("truth"), found


def _predicted(image: np.ndarray, truth: np.ndarray, mask: np.ndarray, colours: np.ndarray,
               opacity: float) -> tuple[np.ndarray, str]:
    """A prediction over its image, and the share of it that is right."""
    return overlaid(in_grey(image), mask, colours, opacity), f"{_share(mask == truth, truth)} right"


def _changed(truth: np.ndarray, before: np.ndarray, after: np.ndarray, num_classes: int) -> tuple[np.ndarray, str]:
    """`outcomes` in colours, and the shares that are lost and gained."""
    found = outcomes(truth, before, after, num_classes)
    lost, gained = (_share(found == each, truth) for each in (LOST, GAINED))
    return outcomes_coloured(found), f"lost {lost}, gained {gained}"


def predictions(images: Sequence[np.ndarray], truths: Sequence[np.ndarray],
                predicted: Mapping[str, Sequence[np.ndarray]], classes: Sequence[str], *,
                opacity: float = OPACITY) -> Figure:
    """A row per image: the image, its truth, each model's prediction over the image, and for each model after the first
    what it lost and gained against the first; below a prediction stands the share of pixels that are right.

    images (H, W, 3) in [0, 1]; truths (H, W); predicted {model: masks (H, W) of the images}, the first model being the
    dense one; classes: the K names. opacity of the masks, [0, 1]. The legend has the classes that occur. Raises
    InputError where there is no image or model, numbers or sizes differ, or a class is out of range.
    """
    require("truth" not in predicted, "a model is named 'truth'; another name is needed")
    truths, shown = _checked(truths, predicted, len(images), len(classes))
    (first, dense), *others = shown.items()
    models, against = list(shown), [f"{name} against {first}" for name, _ in others]
    rows = [["image", "truth", *models, *against]]
    if len(models) > 2:
        rows = [["image", *models], ["truth", None, *against]]
    colours, columns = class_colours(len(classes)), len(rows[0])
    wide = min(3.2, 9.6 / columns)
    high = wide * max(image.shape[0] / image.shape[1] for image in images) + 0.3
    figure, axes = new_axes(len(images) * len(rows), columns, wide, high, **PICTURES)
    for index, (image, truth) in enumerate(zip(images, truths)):
        panels = {"image": (image, ""), "truth": (overlaid(in_grey(image), truth, colours, opacity), "")}
        for name, masks in shown.items():
            panels[name] = _predicted(image, truth, masks[index], colours, opacity)
        for title, (_, masks) in zip(against, others):
            panels[title] = _changed(truth, dense[index], masks[index], len(classes))
        for line, names in zip(axes[index * len(rows):], rows):
            for axis, name in zip(line, names):
                if name is None:
                    axis.set_visible(False)
                else:
                    titled = index == 0 or len(rows) > 1
                    _bare(axis, panels[name][0], fill(name, int(11 * wide)) if titled else "", panels[name][1])
    legends = _legend(figure, _outcome_handles(), "upper") if others else 0.0
    legends += _legend(figure, _class_handles(sum(shown.values(), truths), classes), "lower")
    titles = 0.35 * (len(images) * len(rows) if len(rows) > 1 else 1)
    figure.set_figheight(high * len(axes) + titles + legends)
    return figure


def fitted_to(image: np.ndarray, shape: ViTShape) -> np.ndarray:
    """A scene (h, w, 3) continued at the right and bottom to the size of the model's images by its last row and column,
    so that the patch grid divides it. Raises InputError for a larger one."""
    missing = [side - given for side, given in zip(shape.img_size, image.shape)]
    require(min(missing) >= 0, f"the image is {image.shape[0]} x {image.shape[1]}, the model's {shape.img_size[0]} x "
                               f"{shape.img_size[1]}; no larger one is needed")
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")


def regions_of(plan: CompressionPlan, block: int, places: Mapping[int, Any] | None = None) -> tuple[Tensor, np.ndarray]:
    """(region (n) of each patch in a block, from 0, or -1 for none; whether it is pruned (n)).

    places {block: (n)}: what `token_places` gives of one image, which rules by content need.
    """
    require(0 <= block < plan.shape.depth,
            f"block {block} is not there; the model has blocks 0 to {plan.shape.depth - 1}")
    rule, n = plan.rules()[block][0], plan.shape.num_patches               # inside a span, that of its first block
    if isinstance(rule, (MergeReconstruct, SharedUpdate)):
        return torch.tensor(rule.regions), np.isin(np.arange(n), rule.pruned)
    if places is not None and block in places:
        regions = torch.as_tensor(places[block])
        require(tuple(regions.shape) == (n,),
                f"places of block {block} are {tuple(regions.shape)}; one of each of {n} patches is needed")
        return regions, np.zeros(n, dtype=bool)
    if isinstance(rule, Select) or isinstance(rule, Match) and any(
            isinstance(each.tokens, Match) and each.tokens.merged for each in plan.blocks[:block + 1]):
        raise InputError(f"block {block} merges by content, each image its own way; its places are needed")
    return torch.arange(n), np.zeros(n, dtype=bool)


def _draw_regions(axis: Axes, image: np.ndarray, regions: Tensor, pruned: np.ndarray, shape: ViTShape,
                  block: int) -> None:
    """A scene (h, w, 3) with borders around its tokens, and its pruned patches in orange."""
    height, width = image.shape[:2]
    title = f"block {block}: {len(regions)} patches in {int(regions.max()) + 1} tokens"
    _bare(axis, tinted(fitted_to(image, shape), pruned, shape)[:height, :width], title)
    draw_borders(axis, regions.reshape(shape.grid_size).numpy(), shape.img_size, 1.0 if len(regions) < FINE else 0.6)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def scene_regions(image: np.ndarray, plan: CompressionPlan, blocks: Sequence[int],
                  places: Mapping[int, Any] | None = None) -> Figure:
    """What a block sees of a scene, a column per block: above, the image with a border around the patches of each
    token, pruned patches in orange; below (of one block: beside it), each token in its mean colour.

    image (h, w, 3) in [0, 1], at the model's own scale and no larger than its images. places {block: (n)} of the image,
    for blocks that merge by content (`token_places`).
    """
    require(len(blocks) > 0, "no block was named; one at least is needed")
    shape, (height, width) = plan.shape, image.shape[:2]
    whole, columns = fitted_to(image, shape), min(len(blocks), 3)
    wide = 9.6 / max(columns, 2)
    grid = (1, 2) if len(blocks) == 1 else (2 * -(-len(blocks) // columns), columns)
    figure, axes = new_axes(*grid, wide, wide * height / width + 0.2, **PICTURES)
    # (blocks or more, 2)
    pairs = axes if len(blocks) == 1 else axes.reshape(-1, 2, columns).transpose(0, 2, 1).reshape(-1, 2)
    for axis in pairs[len(blocks):].flat:
        axis.set_axis_off()
    seen = [regions_of(plan, block, places) for block in blocks]
    for block, (regions, pruned), (above, below) in zip(blocks, seen, pairs):
        _draw_regions(above, image, regions, pruned, shape, block)
        _bare(below, region_means(whole, regions, shape)[:height, :width])
    if any(pruned.any() for _, pruned in seen):
        _legend(figure, [Patch(color=PALETTE[1], alpha=0.55, label="pruned: goes around the block")], "upper")
        figure.set_figheight(figure.get_figheight() + 0.4)
    return figure


def scene_moment(image: np.ndarray, truth: Any, dense: Any, compressed: Any, classes: Sequence[str],
                 plan: CompressionPlan, block: int, places: Mapping[int, Any] | None = None, *,
                 opacity: float = OPACITY, note: str = "") -> Figure:
    """One scene under one plan: the image, its truth and the tokens of a block; both predictions, and what is lost and
    gained. note: lines below. The rest as in `predictions` and `scene_regions`."""
    (truth,), shown = _checked([truth], {"dense": [dense], "compressed": [compressed]}, 1, len(classes))
    (dense,), (compressed,) = shown.values()
    require(image.shape[:2] == truth.shape, f"the image is {image.shape}, its truth {truth.shape}")
    regions, pruned = regions_of(plan, block, places)
    wide, high = 3.2, 3.2 * image.shape[0] / image.shape[1] + 0.4
    figure, axes = new_axes(2, 3, wide, high, **PICTURES)
    colours = class_colours(len(classes))
    panels = {"image": (image, ""), "truth": (overlaid(in_grey(image), truth, colours, opacity), ""),
              "dense": _predicted(image, truth, dense, colours, opacity),
              "compressed": _predicted(image, truth, compressed, colours, opacity),
              "compressed against dense": _changed(truth, dense, compressed, len(classes))}
    for axis, (title, (shown, below)) in zip(axes.flat[[0, 1, 3, 4, 5]], panels.items()):
        _bare(axis, shown, title, below)
    _draw_regions(axes[0, 2], image, regions, pruned, plan.shape, block)
    legends = _legend(figure, _outcome_handles(), "upper")
    legends += _legend(figure, _class_handles([truth, dense, compressed], classes), "lower",
                       fill(note, int(13 * 3 * wide)))
    figure.set_figheight(2 * high + legends)
    return figure
