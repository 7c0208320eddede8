"""Figures of what compression changed: pictures with both predictions and the blocks to blame, calibration, classes,
corruptions, and how alike the streams are."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitlab.plan.shape import ViTShape
from vitlab.plots.base import INK, PALETTE, as_array, legend_above, look, new_axes
from vitlab.plots.tokens import draw_borders, plain, region_means
from vitlab.runtime.files import require

SHOWN, FINE = 3, 400            # predictions of each model beside a picture; patches from which borders are thin


def _predictions(axis: Axes, told: Mapping[str, Sequence[tuple[str, float]]]) -> None:
    """{model: (class, probability), the likeliest first} as lying bars, one model below the other."""
    rows = [(index, name, p) for index, each in enumerate(told.values()) for name, p in each[:SHOWN]]
    places = np.arange(len(rows)) + np.array([row[0] for row in rows]) * 0.6
    axis.barh(places, [row[2] for row in rows], color=[look(row[0])["color"] for row in rows], linewidth=0)
    axis.set_yticks(places, [plain(row[1], 22) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)


def changed_pictures(pictures: Sequence[np.ndarray], told: Sequence[Mapping[str, Sequence[tuple[str, float]]]],
                     blamed: Any, titles: Sequence[str], tokens: Sequence[Mapping[int, Any]] = (),
                     shape: ViTShape | None = None, scored: str = "probability",
                     beside: Sequence[Mapping[str, np.ndarray]] = ()) -> Figure:
    """A row for each picture (h, w, 3): itself; with tokens, what its patches are in the block to blame most that
    merges; the pictures {title: picture} beside it, such as what both models look at; both models' predictions with
    probabilities; and by how much its output would be nearer to the dense model's were each block undone: blamed (L,
    B), in the unit of the distance. scored: what stands beside a prediction."""
    blamed, with_tokens, more = as_array(blamed), any(tokens), len(beside[0]) if beside else 0
    require(len(pictures) > 0, "no picture changed; there is nothing to show")
    figure, axes = new_axes(len(pictures), 3 + with_tokens + more, 2.6 - 0.15 * more, 2.3)
    for row, (line, picture) in enumerate(zip(axes, pictures)):
        shown, block = {plain(titles[row], 22): picture}, None
        if with_tokens:
            block = max(tokens[row], key=lambda index, row=row: blamed[index, row])
            shown[f"tokens in block {block}"] = region_means(picture, torch.as_tensor(tokens[row][block]), shape)
            thin = 0.6 if shape.num_patches < FINE else 0.2
            draw_borders(line[1], as_array(tokens[row][block]).reshape(shape.grid_size), picture.shape[:2], thin)
        for axis, (title, image) in zip(line, [*shown.items(), *(beside[row].items() if beside else ())]):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_title(title, fontsize=9)
        _predictions(line[-2], told[row])
        line[-1].bar(range(len(blamed)), blamed[:, row], color=PALETTE[3], linewidth=0)
        line[-1].axhline(0, color=INK, linewidth=0.8)
        line[-1].tick_params(labelsize=8)
        line[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1][-2].set_xlabel(scored)
    axes[-1][-1].set_xlabel("block undone")
    axes[0][-1].set_title("how much nearer", fontsize=9)
    handles = [axes[0][-2].barh(0, 0, color=look(index)["color"]) for index in range(len(told[0]))]
    legend_above(figure, handles, list(told[0]))
    return figure


def reliability(bins: Mapping[str, Sequence[tuple[float, float, int]]], errors: Mapping[str, float]) -> Figure:
    """Of each model the share of images that is right against mean confidence, a point a bin, as large as it has
    images; on the line a model is as sure as it is right. errors: the calibration error of each, in points."""
    figure, ((axis,),) = new_axes(1, 1, 4.6, 4.2)
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=0)
    most = max(n for each in bins.values() for _, _, n in each)
    for index, (name, each) in enumerate(bins.items()):
        sure, right, count = map(np.array, zip(*each))
        axis.plot(sure, right, color=look(index)["color"], linewidth=1)
        axis.scatter(sure, right, s=12 + 90 * count / most, color=look(index)["color"], marker=look(index)["marker"],
                     label=f"{name}: calibration error {errors[name]:.1f} points", clip_on=False)
    axis.set(xlabel="mean confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    legend_above(figure, *axis.get_legend_handles_labels())
    return figure


def class_changes(models: Mapping[str, Sequence[Mapping[str, Any]]], most: int = 10, *, what: str = "top-1",
                  bars: str = "one standard error") -> Figure:
    """Points of top-1, or of `what`, that classes lost or gained, of those that did, a strip for each model: at most so
    many of each end of its rows, which are ordered (`Changes.by_class`). A line from low to high, or of one standard
    error: what `bars` say."""
    strips = {name: [row for row in rows if row["difference"]] for name, rows in models.items()}
    shown = {name: moved if len(moved) <= 2 * most else [*moved[:most], *moved[-most:]]
             for name, moved in strips.items()}
    figure, (axes,) = new_axes(1, len(models), 6.4 if len(models) == 1 else 4.6,
                               1.1 + 0.26 * max(map(len, shown.values())))
    for axis, (name, rows) in zip(axes, shown.items()):
        values, ends = np.array([row["difference"] for row in rows]), np.zeros((2, len(rows)))
        for place, row in enumerate(rows):
            error = row.get("difference_se") or 0
            ends[:, place] = row["difference"] - row.get("low", row["difference"] - error), row.get(
                "high", row["difference"] + error) - row["difference"]
        axis.barh(range(len(rows)), values, xerr=np.nan_to_num(ends).clip(0), linewidth=0,
                  color=[PALETTE[0] if v >= 0 else PALETTE[3] for v in values],
                  error_kw={"elinewidth": 1, "ecolor": INK})
        axis.set_yticks(range(len(rows)), [plain(f"{row['class']} ({row['images']})") for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        told = f"{len(strips[name])} of {len(models[name])} classes changed"
        axis.set_title(told if len(models) == 1 else f"{plain(name)}: {told}")
    figure.supxlabel(f"points of {what}, compressed less dense; lines: {bars}", fontsize=10)
    return figure


def corruption_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What `robustness` measured of each model against severity, an axis for each corruption; ± one standard error."""
    kinds = list(dict.fromkeys(row["corruption"] for row in rows if row["corruption"]))
    models = list(dict.fromkeys(row["model"] for row in rows))
    top = 100 if "%" in rows[0]["measure"] else 1.1 * max(row["value"] + (row["se"] or 0) for row in rows) or 1
    figure, (axes,) = new_axes(1, len(kinds), 2.5, 2.7)
    for axis, kind in zip(axes, kinds):
        for index, model in enumerate(models):
            own = [row for row in rows if row["model"] == model and row["corruption"] in ("", kind)]
            lines = axis.errorbar([row["severity"] + 1 for row in own], [row["value"] for row in own],
                                  [row["se"] or 0 for row in own], **look(index), markersize=5, linewidth=1.4)
            if axis is axes[0]:
                lines.set_label(model)
        axis.set(xlabel="severity (0: as it is)", title=kind, xticks=range(4), ylim=(0, top))
    axes[0].set_ylabel(rows[0]["measure"])
    legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure


def stream_similarity(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """How alike the streams of the dense model and of each other are after each block, an axis for each measure:
    {measure: {model: of each block}}."""
    figure, (axes,) = new_axes(1, len(found), 4.4, 3.0)
    for axis, (measure, models) in zip(axes, found.items()):
        for index, (name, values) in enumerate(models.items(), 1):
            axis.plot(range(len(values)), values, **look(index), label=name, linewidth=1.4)
        spread = max(1 - min(map(min, models.values())), 0.01)
        axis.set(xlabel="block", title=measure, ylim=(1 - 1.1 * spread, 1 + 0.1 * spread))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("as the dense model")
    legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure
