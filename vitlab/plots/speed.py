"""Figures of speed: against batch size or resolution, and block by block beside what each block computes."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from vitlab.plots.base import bars, legend_above, look, new_axes
from vitlab.runtime.files import require

OVER = {"batch_size": "batch size", "img_size": "side of the images (pixels)"}


def speed_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Images a second, and how much faster than the first model with the range of that, against batch size or
    resolution (`measure.sweeps`), a line for each model."""
    require(len(rows) > 0, "no speed was measured")
    over = next(name for name in OVER if name in rows[0])
    figure, (axes,) = new_axes(1, 2, 4.7, 3.4)
    for index, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == model]
        places, ratios = [row[over] for row in own], np.array([row["ratio"] for row in own])
        ends = np.abs(np.array([[row["ratio_min"], row["ratio_max"]] for row in own]).T - ratios)
        axes[0].plot(places, [row["throughput_img_s"] for row in own], **look(index), markersize=5, label=model)
        axes[1].errorbar(places, ratios, ends, **look(index), markersize=5, elinewidth=1)
    ticks = sorted({row[over] for row in rows})
    for axis, label in zip(axes, ("images a second", "times as fast (bars: range)")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel=OVER[over], ylabel=label)
        axis.set_ylim(bottom=0)
    legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure


def block_shares(macs: Mapping[str, Sequence[float]], times: Mapping[str, Sequence[float]]) -> Figure:
    """{model: of each block} MACs beside measured time, each in per cent of the first model's blocks, a row for each
    model: where a bar of time is the higher one, fewer products save less time than they promise."""
    require(macs.keys() == times.keys() and len(macs) > 0, f"MACs are of {list(macs)}, times of {list(times)}")
    whole = [sum(each[next(iter(macs))]) for each in (macs, times)]
    figure, axes = new_axes(len(macs), 1, 9.4, 2.2)
    most = 0.0
    for axis, name in zip(axes[:, 0], macs):
        shares = {label: 100 * np.asarray(each[name], dtype=float)[:len(macs[name])] / total
                  for label, each, total in zip(("MACs", "measured time"), (macs, times), whole)}
        bars(axis, shares)
        most = max(most, *(each.max() for each in shares.values()))
        axis.set(title=name, ylabel="% of the first\nmodel's blocks")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:, 0]:
        axis.set_ylim(0, 1.08 * most)
    axes[-1, 0].set_xlabel("block")
    legend_above(figure, *axes[0, 0].get_legend_handles_labels())
    return figure
