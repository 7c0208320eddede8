"""Figures of training runs and result rows."""
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitlab.plots.base import PALETTE, new_axes
from vitlab.results import ResultRow


def training_curves(logs: dict[str, Sequence[dict[str, Any]]]) -> Figure:
    """Loss, top-1 on the train slice, and learning rate against epochs, one line per run."""
    figure, axes = new_axes(1, 3, 3.6, 3.0)
    fields = (("loss", "training loss"), ("train_slice_top1_pct", "top-1 on a train slice (%)"), ("lr", "learning rate"))
    for axis, (field, label) in zip(axes[0], fields):
        for (name, log), line in zip(logs.items(), ("-", "--", "-.", ":") * len(logs)):
            axis.plot([r["epoch"] for r in log], [r[field] for r in log], linestyle=line, marker=".", label=name)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    return figure


def accuracy_against_cost(rows: Sequence[ResultRow]) -> Figure:
    """Top-1 against GMACs, and against measured images per second where that was measured; each point is named."""
    fields = [("gmacs", "GMACs per image, deployed")]
    if any(r.throughput_img_s for r in rows):
        fields.append(("throughput_img_s", "images per second"))
    figure, axes = new_axes(1, len(fields), 5.2, 3.8)
    for axis, (field, label) in zip(axes[0], fields):
        points = [r for r in rows if getattr(r, field) is not None and r.top1_pct is not None]
        for index, row in enumerate(points):
            axis.plot(getattr(row, field), row.top1_pct, marker="osD^v<>pX*"[index % 10], color=PALETTE[index % len(PALETTE)],
                      markersize=9, linestyle="none", label=row.model)
        axis.set(xlabel=label, ylabel="top-1 (%)")
        axis.margins(0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def trade_offs(panels: dict[str, dict[str, Sequence[tuple[float, float]]]], ylabel: str, dense: dict[str, tuple[float, float]]) -> Figure:
    """One panel for each cost, {its label: {line: points (cost, value)}}; the same line has the same look in all of them. dense:
    the dense model's point in each panel."""
    figure, axes = new_axes(1, len(panels), 5.2, 4.0)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (label, lines) in zip(axes[0], panels.items()):
        for name, points in lines.items():
            index = names.index(name)
            xs, ys = zip(*sorted(points))
            axis.plot(xs, ys, marker="osD^v<>pX*"[index % 10], color=PALETTE[index % len(PALETTE)], label=name,
                      linestyle=("-", "--", "-.", ":")[index // len(PALETTE) % 4])
        axis.plot(*dense[label], marker="*", markersize=13, color="black", linestyle="none", label="dense")
        axis.axhline(dense[label][1], color="0.7", linewidth=0.8, zorder=0)
        axis.set(xlabel=label, ylabel=ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure
