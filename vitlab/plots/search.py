"""Figures of a search over policies: how fast it finds, what its surrogate, a Gaussian process (GP), believes."""
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from vitlab.plots.base import INK, MARKERS, PALETTE, as_array, legend_above, new_axes, style, wrapped
from vitlab.plots.points import error_bars
from vitlab.runtime.files import require

DEPTH = 15  # natural logarithms below the highest that an axis of log EI reaches; the measured are far below


def group_of(name: str) -> str:
    """The letters a dimension's name begins with: "neurons" of "neurons 3", "neurons_3" or "neurons[3]"."""
    return re.match(r"[^\W\d_]*", name).group()


def best_so_far(seeds: Sequence[Sequence[float]]) -> np.ndarray:
    """(S, T) the largest value up to each evaluation, of S lists of values; NaN (a failed one) is passed over.

    T is the longest list's length; a seed that stopped earlier keeps its best to the end.
    """
    length = max(len(values) for values in seeds)
    padded = [np.concatenate([as_array(values), np.full(length - len(values), np.nan)]) for values in seeds]
    return np.fmax.accumulate(np.stack(padded), axis=1)


def incumbents(curves: dict[str, Sequence[Sequence[float]]], *, label: str,
               errors: Mapping[str, Sequence[float | None]] | None = None) -> Figure:
    """The best value so far (higher is better) against evaluations, a line per strategy, with a dot where it changes.

    curves {strategy: a list of values per seed, one value per evaluation}; label names the value. The line is the
    median over seeds, the band their least to largest. One seed is a line alone, or where `errors` {strategy: one per
    evaluation} are known a line in a band of one standard error of the best.
    """
    figure, axes = new_axes(1, 1, 9.0, 4.4)
    axis, banded = axes[0, 0], False
    for index, (name, seeds) in enumerate(curves.items()):
        best, colour = best_so_far(seeds), PALETTE[index % len(PALETTE)]        # (S, T)
        line, steps = np.median(best, axis=0), np.arange(1, best.shape[1] + 1)
        changes = [t for t in range(len(line)) if np.isfinite(line[t]) and (t == 0 or line[t] != line[t - 1])]
        axis.plot(steps, line, drawstyle="steps-post", color=colour, marker=MARKERS[index % len(MARKERS)], markersize=5,
                  markevery=changes, label=name)
        low, high, given = best.min(axis=0), best.max(axis=0), (errors or {}).get(name)
        given = None if given is None or all(error is None for error in given) else given
        if len(seeds) == 1 and given is not None:
            # A best value's error is that of the evaluation which gave it: the first with this value.
            where = [next((t for t, value in enumerate(seeds[0]) if value == found), None) for found in line]
            bars = np.array([np.nan if t is None or given[t] is None else given[t] for t in where], dtype=np.float64)
            low, high, banded = line - bars, line + bars, banded or bool(np.isfinite(bars).any())
        if len(seeds) > 1 or given is not None:
            axis.fill_between(steps, low, high, step="post", color=colour, alpha=0.2, linewidth=0)
    most = max(map(len, curves.values()))
    over = f" (median and range of {most} seeds)" if most > 1 else " (band: one standard error)" if banded else ""
    axis.set(xlabel="evaluations", ylabel=wrapped(f"best so far: {label}{over}", 40))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, *axis.get_legend_handles_labels())
    return figure


def gp_slices(names: Sequence[str], grids: Any, means: Any, deviations: Any, incumbent: Any, value: float,
              label: str) -> Figure:
    """One small axis per dimension of the policy: the GP along that dimension, all others held at the incumbent.

    grids, means, deviations (D, G): places, and there the GP's mean and standard deviation; incumbent (D,) is the best
    policy and value its measured value, drawn as a dot on a vertical line. The band is the mean +/- 2 deviations. label
    names the value. All axes share y; a colour is a group of dimensions, told by the letters its names begin with.
    """
    grids, means, deviations, incumbent = (as_array(x) for x in (grids, means, deviations, incumbent))
    for what, given in (("grids", grids), ("means", means), ("deviations", deviations), ("incumbent", incumbent)):
        require(len(given) == len(names), f"{what} have {len(given)} dimensions; there are {len(names)} names")
    columns = min(len(names), 4 if len(names) <= 12 else 6 if len(names) <= 36 else 7)
    rows = -(-len(names) // columns)
    figure, axes = new_axes(rows, columns, 9.4 / max(columns, 3), 1.25 if columns > 4 else 1.7 if rows > 1 else 2.6)
    groups = list(dict.fromkeys(map(group_of, names)))
    colours = {group: PALETTE[index % len(PALETTE)] for index, group in enumerate(groups)}
    low, high = min((means - 2 * deviations).min(), value), max((means + 2 * deviations).max(), value)
    margin = 0.06 * (high - low) or 1.0
    same = bool((grids[:, [0, -1]] == grids[0, [0, -1]]).all())  # one range: its ticks stand below each column only
    for index, (axis, name) in enumerate(zip(axes.flat, names)):
        colour = colours[group_of(name)]
        axis.fill_between(grids[index], means[index] - 2 * deviations[index], means[index] + 2 * deviations[index],
                          color=colour, alpha=0.25, linewidth=0)
        axis.plot(grids[index], means[index], color=colour, linewidth=1.5)
        axis.axvline(incumbent[index], color="0.5", linewidth=0.8, linestyle=":")
        axis.plot(incumbent[index], value, marker="o", color=INK, markersize=4, linestyle="none")
        axis.set_title(name, fontsize=8, color=colour, pad=3)
        axis.tick_params(labelsize=8, length=2, pad=2, labelleft=index % columns == 0,
                         labelbottom=not same or index + columns >= len(names))
        axis.set_ylim(low - margin, high + margin)
        axis.set_xticks(grids[index, [0, -1]], [f"{end:.3g}" for end in grids[index, [0, -1]]])
        axis.yaxis.set_major_locator(MaxNLocator(nbins=3))
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    figure.supylabel(label, fontsize=10)
    figure.supxlabel("policy's value along the dimension, others at the incumbent", fontsize=10)
    handles = [Line2D([], [], color=colours[group], label=group or "dimension") for group in groups]
    handles += [Patch(color="0.8", label="mean +/- 2 deviations"),
                Line2D([], [], marker="o", color=INK, linestyle="none", label="incumbent, measured")]
    legend_above(figure, handles, [handle.get_label() for handle in handles])
    return figure


def acquisition(steps: Any, log_ei: Any, values: Any = None, incumbents: Any = None, *, means: Any = None,
                deviations: Any = None, errors: Sequence[float | None] | None = None, label: str = "value") -> Figure:
    """The log expected improvement (EI) of each proposed policy at its step; below, if given, what was measured.

    All are (T,). values: measured, as dots, with bars of their standard errors where `errors` are known; incumbents:
    the best before or at the step, as a stepped line; means and deviations: what the GP predicted of the policy, as
    marks with bars of +/- one deviation. label names the measured value.
    """
    require(deviations is None or means is not None, "deviations are given without means")
    known = errors is not None and any(error is not None for error in errors)
    measured = [(values, "measured +/- standard error" if known else "measured"),
                (means, "predicted" if deviations is None else "predicted +/- deviation"), (incumbents, "incumbent")]
    below = any(given is not None for given, _ in measured)
    figure, axes = new_axes(1 + below, 1, 9.0, 2.7)
    steps, axis = as_array(steps), axes[0, 0]
    axis.plot(steps, as_array(log_ei), marker="o", markersize=4, linewidth=1, color=PALETTE[0])
    axis.set_ylabel("log EI of the proposal")
    if below:
        axis = axes[1, 0]
        axis.sharex(axes[0, 0])
        if incumbents is not None:
            axis.plot(steps, as_array(incumbents), drawstyle="steps-post", color="0.5", label=measured[2][1])
        if means is not None:
            axis.errorbar(steps, as_array(means), None if deviations is None else as_array(deviations),
                          color=PALETTE[1], marker="s", markersize=4, linestyle="none", elinewidth=1.2,
                          label=measured[1][1])
        if values is not None:
            axis.plot(steps, as_array(values), marker="o", markersize=5, color=PALETTE[0], linestyle="none",
                      label=measured[0][1])
            error_bars(axis, steps, as_array(values), errors, ecolor=PALETTE[0])
        axis.set_ylabel(wrapped(label, 28))
        legend_above(figure, *axis.get_legend_handles_labels())
    axis.set_xlabel("step of the search")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def parallel_coordinates(names: Sequence[str], policies: Any, values: Any, label: str) -> Figure:
    """Each policy a line over its dimensions, coloured by its value (higher is better, darker); the best is thick.

    names (D), policies (P, D), values (P,); label names the value. A policy whose value is not finite is left out.
    Vertical lines part the groups of dimensions, told by the letters their names begin with.
    """
    policies, values = as_array(policies), as_array(values)
    require(policies.shape == (len(values), len(names)), f"policies are {policies.shape}; {(len(values), len(names))} "
                                                         f"is needed")
    order = [int(i) for i in np.argsort(values, kind="stable") if np.isfinite(values[i])]       # the best last
    require(len(order) > 0, "no policy has a finite value")
    figure, axes = new_axes(1, 1, 9.4, 4.0)
    axis, places = axes[0, 0], np.arange(len(names))
    lines = [np.column_stack([places, policies[i]]) for i in order]                             # (D, 2) each
    widths = [1.0] * (len(order) - 1) + [3.5]
    bundle = LineCollection(lines, cmap="viridis_r", array=values[order], linewidths=widths,
                            alpha=[0.6] * (len(order) - 1) + [1.0])
    axis.add_collection(bundle)
    axis.plot(places, policies[order[-1]], marker="o", markersize=4, linestyle="none", color="white",
              markeredgecolor="black", zorder=3)
    axis.autoscale_view()
    start, previous_end, raised = 0, -np.inf, False
    for group, members in groupby(names, key=group_of):
        size = len(list(members))
        if start:
            axis.axvline(start - 0.5, color=INK, linewidth=1)
        # About 0.32 dimensions' width per letter at D = 25: a label that would touch the one before it goes a line
        # higher.
        middle, half = start + (size - 1) / 2, 0.5 * len(group) * len(names) * 0.0125
        raised = middle - half < previous_end and not raised
        axis.text(middle, 1.08 if raised else 1.02, group, transform=axis.get_xaxis_transform(), ha="center",
                  va="bottom", fontsize=10)
        previous_end, start = middle + half, start + size
    ticks = [name[len(group_of(name)):].strip(" _.[]") for name in names]
    long = max(map(len, ticks)) * len(names) > 100
    axis.set_xticks(places, ticks, fontsize=8, rotation=90 if long else 0)
    axis.set(xlabel="dimension of the policy", ylabel="policy's value", xlim=(-0.5, len(names) - 0.5))
    figure.colorbar(bundle, ax=axis, label=label, pad=0.01)
    return figure


def moment(values: Any, *, total: int, label: str, dimension: str, grid: Any = (),
           lines: dict[str, tuple[Any, Any, Any, float]], expected: tuple[float, float] | None = None,
           then: float | None = None, errors: Sequence[float | None] | None = None) -> Figure:
    """A search at one moment: what it has measured, and what its GP believes along one dimension of the policy.

    values (K,): measured so far, label names them; errors: their standard errors, where they are known; total:
    evaluations on the axis. expected: the GP's (mean, deviation) of the next policy; then: what was measured of it.
    grid (G,): fractions cut of `dimension`; lines {what the other dimensions are held at: (means (G,), deviations (G,),
    log EI (G,), the fraction at which that policy stands)}. Bands are +/- 2 deviations.
    """
    style()
    figure, axes = plt.subplot_mosaic([["values", "values"], ["belief", "acquisition"]], figsize=(9.4, 5.8),
                                      layout="constrained", frameon=False)
    values, grid = as_array(values), as_array(grid)
    axis, steps = axes["values"], np.arange(len(values))
    axis.plot(steps, values, marker="o", markersize=4, linestyle="none", color=PALETTE[0], label="measured")
    error_bars(axis, steps, values, errors, ecolor=PALETTE[0])
    axis.plot(steps, np.fmax.accumulate(values), drawstyle="steps-post", color=INK, label="best so far")
    if expected is not None:
        axis.errorbar(len(values), expected[0], 2 * expected[1], marker="s", markersize=5, linestyle="none",
                      color=PALETTE[1], elinewidth=1.5, label="next, expected +/- 2 deviations")
    if then is not None:
        axis.plot(len(values), then, marker="D", markersize=5, markerfacecolor="white", color=PALETTE[0],
                  linestyle="none", label="next, then measured")
    axis.set(xlabel="number of the evaluation", ylabel=wrapped(label, 28),
             xlim=(-0.5, max(total, len(values) + 1) - 0.5))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for colour, dash, (name, (means, deviations, log_ei, place)) in zip((PALETTE[2], PALETTE[3]), ("-", "--"),
                                                                        lines.items()):
        means, deviations, log_ei = as_array(means), as_array(deviations), as_array(log_ei)
        axes["belief"].fill_between(grid, means - 2 * deviations, means + 2 * deviations, color=colour, alpha=0.2,
                                    linewidth=0)
        for axis, curve in ((axes["belief"], means), (axes["acquisition"], log_ei)):
            axis.plot(grid, curve, color=colour, linestyle=dash, label=name)
            axis.plot(place, np.interp(place, grid, curve), marker="o", color=colour, markersize=6, linestyle="none")
    for name, what in (("belief", label), ("acquisition", "log EI")):
        axes[name].set(xlabel=f"fraction cut of {dimension}", ylabel=wrapped(what, 28))
        if not lines:
            axes[name].text(0.5, 0.5, "two evaluations are needed", transform=axes[name].transAxes, ha="center",
                            va="center")
    if lines:
        highest = max(as_array(log_ei).max() for _, _, log_ei, _ in lines.values())
        axes["acquisition"].set_ylim(bottom=max(axes["acquisition"].get_ylim()[0], highest - DEPTH), top=highest + 1)
    handles = [pair for axis in (axes["values"], axes["belief"]) for pair in zip(*axis.get_legend_handles_labels())]
    legend_above(figure, *zip(*handles))
    sns.despine(fig=figure)
    return figure
