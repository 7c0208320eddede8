"""Figures of what a cut alone costs: of one block by each criterion, of one dimension by how much of it goes."""
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitlab.plots.base import INK, as_array, legend_above, look, new_axes, wrapped
from vitlab.plots.points import error_bars
from vitlab.plots.search import group_of
from vitlab.runtime.files import require

SPREAD = 5          # times that one group's largest loss may be another's before their common axis turns logarithmic


def sensitivity(drops: dict[str, dict[str, Sequence[float]]], *, label: str,
                errors: dict[str, dict[str, Sequence[float | None]]] | None = None) -> Figure:
    """What cutting in one block costs: an axis per dimension, a line per criterion over the blocks.

    drops: {"neurons": {"hsic": [drop of block 0, 1, ..], ..}, "heads": ..}; label names their unit, such as points of
    top-1 lost per GMAC removed. errors: one standard error of each, where they are known.
    """
    figure, (axes,) = new_axes(1, len(drops), 9.4 / max(len(drops), 2), 3.6)
    criteria = list(dict.fromkeys(name for lines in drops.values() for name in lines))
    handles = {}
    for axis, (dimension, lines) in zip(axes, drops.items()):
        axis.axhline(0, color="0.8", linewidth=1, zorder=0)
        for name, values in lines.items():
            index, bars = criteria.index(name), (errors or {}).get(dimension, {}).get(name)
            # beside the others, so that bars can be told apart
            places = np.arange(len(values)) + (0 if bars is None else 0.1 * (index - (len(criteria) - 1) / 2))
            handles[name], = axis.plot(places, as_array(values), markersize=5, label=name, **look(index))
            error_bars(axis, places, as_array(values), bars, ecolor=look(index)["color"])
        axis.set(xlabel="block", title=dimension, xlim=(-0.5, max(map(len, lines.values()), default=1) - 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    figure.supylabel(wrapped(label, 40), fontsize=11)
    legend_above(figure, [handles[name] for name in criteria], criteria)
    return figure


def sensitivity_curves(rows: Sequence[dict[str, Any]], *, loss_label: str, saved_label: str) -> Figure:
    """What a dimension loses when it is cut alone against what that saves: a panel per group, a line per block.

    rows: of each cut its dimension ("neurons 3"), loss and saved, in the units that the labels name, and loss_se, one
    standard error, where it is known. Every line begins at (0, 0). Later blocks are darker; a dimension of no block is
    grey. All axes share y, logarithmic above the gentlest group's largest loss where the groups lie far apart.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["dimension"]:                                                    # not the dense model's own
            lines.setdefault(row["dimension"], [(0.0, 0.0)]).append((row["saved"], row["loss"]))
    require(len(lines) > 0, "no dimension was cut")
    groups = list(dict.fromkeys(map(group_of, lines)))
    blocks = {name: int(found.group()) for name in lines if (found := re.search(r"\d+", name))}
    ramp = ScalarMappable(Normalize(0, max(1, *blocks.values()) if blocks else 1), "viridis_r")
    colours = {name: ramp.to_rgba(blocks[name]) if name in blocks else INK for name in lines}
    figure, axes = new_axes(1, len(groups), 9.4 / max(len(groups), 2), 3.6)
    places = {name: axes[0, groups.index(group_of(name))] for name in lines}
    for name, points in lines.items():
        places[name].plot(*zip(*sorted(points)), marker="o", markersize=3.5, linewidth=1.5, color=colours[name],
                          label=name)
    known = [row for row in rows if row["dimension"] and row.get("loss_se") is not None]
    for row in known:
        error_bars(places[row["dimension"]], [row["saved"]], [row["loss"]], [row["loss_se"]],
                   ecolor=colours[row["dimension"]])
    worst = {group: max(loss for name, points in lines.items() if group_of(name) == group for _, loss in points)
             for group in groups}
    highest, least = max(worst.values()) or 1.0, min(worst.values())
    wide = 0 < least < highest / SPREAD                         # the gentlest group would be a flat line
    for axis, group in zip(axes[0], groups):
        if wide:
            axis.set_yscale("symlog", linthresh=least)
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set(title=group, ylim=(-0.04 * (least if wide else highest), (1.3 if wide else 1.05) * highest))
        axis.tick_params(labelleft=group == groups[0])
        axis.xaxis.set_major_locator(MaxNLocator(nbins=4))
    loss_label += "; bars: one standard error" if known else ""
    axes[0, 0].set_ylabel(wrapped(f"{loss_label}, logarithmic above {least:.2g}" if wide else loss_label, 36))
    figure.supxlabel(saved_label, fontsize="medium")
    if blocks:
        figure.colorbar(ramp, ax=axes[0, -1], label="block", pad=0.02, ticks=MaxNLocator(integer=True))
    return figure
