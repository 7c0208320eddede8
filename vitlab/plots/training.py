"""Figures of training runs, result rows and costs."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitlab.plan import CompressionPlan, cost
from vitlab.plan.shape import require
from vitlab.plots.base import PALETTE, new_axes
from vitlab.plots.colours import class_colours
from vitlab.plots.points import Point, draw_points, legend_beside
from vitlab.plots.units import MARKERS, legend_above, plan_bars
from vitlab.runtime.results import ResultRow
from vitlab.runtime.uncertainty import error_name

# of a result row, that costs are set against
VALUES = {"top1_pct": "top-1 (%)", "top5_pct": "top-5 (%)", "miou_pct": "mIoU (%)"}
GROWS = "attention"                             # the part that grows with the square of the tokens, drawn at the bottom


def training_curves(logs: dict[str, Sequence[dict[str, Any]]]) -> Figure:
    """Loss, top-1 on the train slice, and learning rate against epochs, one line per run; in between, where they were
    logged, the loss and the rate of single steps, pale. A band is one standard error of what was measured on the slice,
    where the log has it."""
    figure, axes = new_axes(1, 3, 3.6, 3.0)
    scenes = any("train_slice_miou_pct" in record for log in logs.values() for record in log)
    measure = ("train_slice_miou_pct",
               "mIoU on a train slice (%)") if scenes else ("train_slice_top1_pct", "top-1 on a train slice (%)")
    fields = (("loss", "training loss"), measure, ("lr", "learning rate"))
    for axis, (field, label) in zip(axes[0], fields):
        for (name, log), line in zip(logs.items(), ("-", "--", "-.", ":") * len(logs)):
            epochs, steps = ([r for r in log if key in r and field in r] for key in ("epoch", "at_epoch"))
            drawn, = axis.plot([r["epoch"] for r in epochs], [r[field] for r in epochs], linestyle=line, marker=".",
                               label=name)
            known = [r for r in epochs if r.get(error_name(field)) is not None] if field == measure[0] else []
            if known:
                low, high = ([r[field] + side * r[error_name(field)] for r in known] for side in (-1, 1))
                axis.fill_between([r["epoch"] for r in known], low, high, color=drawn.get_color(), alpha=0.2,
                                  linewidth=0)
            if steps:
                axis.plot([r["at_epoch"] for r in steps], [r[field] for r in steps], color=drawn.get_color(),
                          alpha=0.35, linewidth=1)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    return figure


def accuracy_against_cost(rows: Sequence[ResultRow], value: str = "top1_pct") -> Figure:
    """Top-1, or another of VALUES, against GMACs, and against the throughput over the baseline's in the same run where
    that was measured; each point is named, and a row looks the same in both. Bars, where they are known: one standard
    error, and the range of the ratio over its rounds. Absolute speeds of two runs don't compare, and are not drawn.
    Raises InputError for another value."""
    require(value in VALUES, f"value {value!r} is not known; known are {list(VALUES)}")
    fields = [("gmacs", "GMACs per image, deployed")]
    timed = [r.conditions.get("speed", {}) for r in rows if r.ratio is not None]
    if timed:
        sizes = list(dict.fromkeys(str(given["batch_size"]) for given in timed if "batch_size" in given))
        fields.append(("ratio",
                       "throughput over the baseline's, same run" + (f"\n(batch {', '.join(sizes)})" if sizes else "")))
    # the legend takes the room beside them
    figure, axes = new_axes(1, len(fields), 5.2 + 3.4 / len(fields), 3.8)
    drawn = []
    for axis, (field, label) in zip(axes[0], fields):
        for index, row in enumerate(rows):
            if getattr(row, field) is not None and getattr(row, value) is not None:
                span = row.conditions.get("speed", {}).get("ratio_range") if field == "ratio" else None
                drawn.append(Point(getattr(row, field), getattr(row, value), getattr(row, error_name(value), None),
                                   span))
                draw_points(axis, drawn[-1:], row.model, marker=MARKERS[index % len(MARKERS)],
                            color=PALETTE[index % len(PALETTE)], markersize=9, linestyle="none")
        axis.set(xlabel=label, ylabel=VALUES[value])
        axis.margins(0.15)
        axis.spines[["top", "right"]].set_visible(False)
    legend_beside(axes[0], drawn)
    return figure


def trade_offs(panels: Mapping[str, Mapping[str, Sequence[Sequence[Any]]]], ylabel: str,
               dense: dict[str, Sequence[Any]]) -> Figure:
    """One panel for each cost, {its label: {line: points}}; the same line has the same look in all of them. A point is
    what `Point` takes: (cost, value), and where they are known the value's standard error and the range of a cost that
    is a ratio. dense: the dense model's point in each panel."""
    # the legend takes the room beside them
    figure, axes = new_axes(1, len(panels), 5.2 + 3.4 / len(panels), 4.0)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (label, lines) in zip(axes[0], panels.items()):
        for name, points in lines.items():
            index = names.index(name)
            draw_points(axis, points, name, marker=MARKERS[index % len(MARKERS)], color=PALETTE[index % len(PALETTE)],
                        linestyle=("-", "--", "-.", ":")[index // len(PALETTE) % 4])
        draw_points(axis, [dense[label]], "dense", marker="*", markersize=13, color="black", linestyle="none")
        axis.axhline(dense[label][1], color="0.7", linewidth=0.8, zorder=0)
        axis.set(xlabel=label, ylabel=ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.spines[["top", "right"]].set_visible(False)
    legend_beside(axes[0], [point for lines in panels.values() for points in lines.values() for point in points])
    return figure


def compare_plans(plans: dict[str, CompressionPlan], note: str = "") -> Figure:
    """`plan_bars`, and below it the MACs per image by part: a stacked bar for the dense model and for each plan.

    Behind a bar stands its sum, in 10^9 or 10^6 MACs as the size asks for, and in percent of the dense model's. note:
    lines below.
    """
    figure = plan_bars(plans)
    first = next(iter(plans.values()))
    bars = {"dense": cost.macs(CompressionPlan.empty(first.shape)),
            **{name: cost.macs(plan) for name, plan in plans.items()}}
    whole = bars["dense"]["total"]
    scale, unit = (1e9, "G") if whole >= 1e9 else (1e6, "M")
    height = 0.9 + 0.34 * len(bars)                                             # inches
    rows = figure.add_gridspec(4, 1, height_ratios=(1.2, 1.2, 1.2, height))
    figure.set_size_inches(9.4, 3.6 + height + 1.6)
    for axis, row in zip(figure.axes, rows):
        axis.set_subplotspec(row)
    axis, lefts = figure.add_subplot(rows[3]), np.zeros(len(bars))
    for index, part in enumerate(cost.PARTS):
        widths = np.array([parts[part] for parts in bars.values()]) / scale     # (bars)
        if widths.any():
            axis.barh(range(len(bars)), widths, 0.7, left=lefts, color=PALETTE[index % len(PALETTE)],
                      label=part.replace("_", " "), edgecolor="white", linewidth=0.5)
            lefts += widths
    for place, parts in enumerate(bars.values()):
        axis.text(lefts[place], place, f"  {parts['total'] / scale:.4g} {unit}, {parts['total'] / whole:.1%}",
                  va="center", fontsize=9)
    axis.set(yticks=range(len(bars)), xlabel=f"MACs per image, deployed ({unit})", xlim=(0, 1.2 * lefts.max()))
    axis.set_yticklabels(bars, fontsize=10)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=8, frameon=False, fontsize=9, handlelength=1.2,
                columnspacing=1.2)
    figure.supxlabel(note, fontsize="small", color="0.3")
    return figure


def cost_by_part(bars: Mapping[str, Mapping[str, int]]) -> Figure:
    """MACs per image by part, a stacked bar for each of `bars`, such as the resolutions a model works at: on the left
    in 10^9 or 10^6, on the right in per cent of its bar's sum. What grows with the square of the tokens stands at the
    bottom.

    bars {label: {part: MACs}}, as `cost.macs` gives them; "total", if it is there, is not drawn, and parts of no bar
    are left out. Raises InputError for no bar, one that sums to 0, or a negative number.
    """
    require(len(bars) > 0, "no bar was given")
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts if part != "total" and parts[part]))
    names.sort(key=lambda part: part != GROWS)
    # (bars, parts)
    counts = np.array([[parts.get(part, 0) for part in names] for parts in bars.values()], dtype=np.float64)
    for label, row in zip(bars, counts):
        require(row.sum() > 0 and row.min() >= 0, f"{label}: MACs must be at least 0 and not all of them 0")
    sums = counts.sum(axis=1, keepdims=True)
    scale, unit = (1e9, "GMACs") if sums.max() >= 1e9 else (1e6, "10^6 MACs")
    colours = PALETTE if len(names) <= len(PALETTE) else class_colours(len(names))
    figure, (axes,) = new_axes(1, 2, 4.7, 3.8)
    for axis, values in zip(axes, (counts / scale, 100 * counts / sums)):
        for index, part in enumerate(names):
            axis.bar(range(len(bars)), values[:, index], 0.7, bottom=values[:, :index].sum(axis=1),
                     color=colours[index], label=part.replace("_", " "), edgecolor="white", linewidth=0.5)
        turned = {"rotation": 30, "ha": "right",
                  "rotation_mode": "anchor"} if max(map(len, bars)) * len(bars) > 45 else {}
        axis.set_xticks(range(len(bars)), bars, fontsize=9, **turned)
        axis.spines[["top", "right"]].set_visible(False)
    for place, whole in enumerate(sums[:, 0] / scale):
        axes[0].text(place, whole, f"{whole:.3g}", ha="center", va="bottom", fontsize=9)
    if names[0] == GROWS:
        for place, share in enumerate(100 * counts[:, 0] / sums[:, 0]):
            if share >= 5:                                                      # there is room for it
                axes[1].text(place, share / 2, f"{share:.0f}%", ha="center", va="center", fontsize=9, color="white")
    axes[0].set(ylabel=f"{unit} per image")
    axes[1].set(ylabel="share of the bar (%)", ylim=(0, 100))
    legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure
