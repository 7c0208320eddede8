"""Figures of training runs, and of measured models against what they cost."""
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitlab.plots.base import INK, MARKERS, PALETTE, look, new_axes, wrapped
from vitlab.plots.points import Point, draw_points, legend_beside
from vitlab.runtime.files import require
from vitlab.runtime.results import ResultRow, speed_of
from vitlab.runtime.uncertainty import error_name

# that costs are set against
VALUES = {"top1_pct": "top-1 (%)", "top5_pct": "top-5 (%)", "miou_pct": "mIoU (%)",
          "distill_loss": "distance to the dense output"}
# what a training's log is measured by, on a slice of train
SLICE = {"train_slice_top1_pct": "top-1 on a train slice (%)", "train_slice_miou_pct": "mIoU on a train slice (%)",
         "train_slice_distill_loss": "distance to the teacher\non a train slice"}
LINES = ("-", "--", "-.", ":")
# (GMACs, top-1 %) after training, as the papers say them: Prune and Merge arXiv 2503.23455, EViT arXiv 2202.07800,
# DynamicViT arXiv 2106.02034, ToMe arXiv 2210.09461, DeiT arXiv 2012.12877
PUBLISHED: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {
    "deit_tiny": {"DeiT": ((1.3, 72.2),), "Prune and Merge": ((0.8, 72.0), (0.7, 71.6))},
    "deit_small": {"DeiT": ((4.6, 79.8),), "Prune and Merge": ((3.0, 79.6),), "EViT": ((3.0, 79.5), (2.3, 78.5)),
                   "DynamicViT": ((2.9, 79.3),), "ToMe": ((2.7, 79.4),)}}


def training_curves(logs: dict[str, Sequence[dict[str, Any]]]) -> Figure:
    """Loss, what was measured on the train slice, and learning rate against epochs, one line per run; pale in between,
    what single steps logged. A band is one standard error of what was measured on the slice."""
    figure, axes = new_axes(1, 3, 3.6, 3.0)
    there = {name for log in logs.values() for record in log for name in record}
    measure = next((name for name in SLICE if name in there), next(iter(SLICE)))
    fields = {"loss": "training loss", measure: SLICE[measure], "lr": "learning rate"}
    for axis, (field, label) in zip(axes[0], fields.items()):
        for (name, log), line in zip(logs.items(), LINES * len(logs)):
            epochs, steps = ([r for r in log if key in r and field in r] for key in ("epoch", "at_epoch"))
            drawn, = axis.plot([r["epoch"] for r in epochs], [r[field] for r in epochs], linestyle=line, marker=".",
                               label=name)
            known = [r for r in epochs if r.get(error_name(field)) is not None] if field == measure else []
            if known:
                low, high = ([r[field] + side * r[error_name(field)] for r in known] for side in (-1, 1))
                axis.fill_between([r["epoch"] for r in known], low, high, color=drawn.get_color(), alpha=0.2,
                                  linewidth=0)
            if steps:
                axis.plot([r["at_epoch"] for r in steps], [r[field] for r in steps], color=drawn.get_color(),
                          alpha=0.35, linewidth=1)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))                  # of one epoch, too
    axes[0, 0].legend(frameon=False)
    return figure


def accuracy_against_cost(rows: Sequence[ResultRow], value: str = "top1_pct", published: str = "") -> Figure:
    """Top-1, or another of VALUES, against GMACs, and where it was measured against the throughput over the baseline's
    in the same run (absolute speeds of two runs don't compare); a named point a row. Bars: one standard error, and the
    range of the ratio. published: a model of PUBLISHED, whose points stand beside ours, in grey. Raises InputError for
    another value or model."""
    require(value in VALUES, f"value {value!r} is not known; known are {list(VALUES)}")
    require(not published or published in PUBLISHED, f"published {published!r} is not known; known are "
                                                     f"{list(PUBLISHED)}")
    fields = {"gmacs": "GMACs per image, deployed"}
    timed = [speed_of(row) for row in rows if row.ratio is not None]
    if timed:
        sizes = dict.fromkeys(str(given["batch_size"]) for given in timed if "batch_size" in given)
        fields["ratio"] = ("throughput over the baseline's, same run" + f"\n(batch {', '.join(sizes)})" * bool(sizes))
    figure, axes = new_axes(1, len(fields), 5.2 + 3.4 / len(fields), 3.8)       # the legend takes the room beside them
    drawn = []
    for axis, (field, label) in zip(axes[0], fields.items()):
        for index, row in enumerate(rows):
            if getattr(row, field) is not None and getattr(row, value) is not None:
                span = speed_of(row).get("ratio_range") if field == "ratio" else None
                drawn.append(Point(getattr(row, field), getattr(row, value), getattr(row, error_name(value), None),
                                   span))
                draw_points(axis, drawn[-1:], row.model, markersize=9, linestyle="none", **look(index))
        theirs = PUBLISHED.get(published, {}) if (field, value) == ("gmacs", "top1_pct") else {}
        for (name, points), mark in zip(theirs.items(), MARKERS):
            draw_points(axis, points, f"{name}, published (ImageNet)", color="0.55", markerfacecolor="none",
                        marker=mark, linestyle=":")
        axis.set(xlabel=label, ylabel=VALUES[value])
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.margins(0.15)
    legend_beside(axes[0], drawn)
    return figure


def trade_offs(panels: Mapping[str, Mapping[str, Sequence[Sequence[Any]]]], ylabel: str,
               dense: dict[str, Sequence[Any]]) -> Figure:
    """One panel for each cost, {its label: {line: points}}; the same line has the same look in all of them. A point is
    what `Point` takes: (cost, value), and where they are known the value's standard error and the range of a cost that
    is a ratio. dense: the dense model's point in each panel."""
    figure, axes = new_axes(1, len(panels), 5.2 + 3.4 / len(panels), 4.0)       # the legend takes the room beside them
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (label, lines) in zip(axes[0], panels.items()):
        for name, points in lines.items():
            index = names.index(name)
            draw_points(axis, points, name, linestyle=LINES[index // len(PALETTE) % 4], **look(index))
        draw_points(axis, [dense[label]], "dense", marker="*", markersize=13, color=INK, linestyle="none")
        axis.axhline(dense[label][1], color="0.7", linewidth=0.8, zorder=0)
        axis.set(xlabel=label, ylabel=wrapped(ylabel, 36))
        axis.xaxis.set_major_locator(MaxNLocator(5))
    legend_beside(axes[0], [point for lines in panels.values() for points in lines.values() for point in points])
    return figure
