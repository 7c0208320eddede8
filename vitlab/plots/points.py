"""Measured models as points of a figure: a line through them, how sure each is, what is too noisy to tell."""
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitlab.plots.base import INK, as_array, legend_above, look, new_axes
from vitlab.runtime.results import noisy

NOISY = "hollow: too noisy to tell from 1"


class Point(NamedTuple):
    """A measured model: what it costs and what it is worth."""

    cost: float
    value: float
    error: float | None = None                      # one standard error of the value, in its unit
    span: tuple[float, float] | None = None         # of a cost that is a ratio: its range

    @property
    def noisy(self) -> bool:
        return self.span is not None and noisy(*self.span)


def error_bars(axis: Axes, xs: Any, ys: Any, errors: Sequence[float | None] | None, **look: Any) -> None:
    """Bars of +/- one standard error at the points that have one; a point without is left as it is."""
    if errors is None or all(error is None for error in errors):
        return
    bars = np.array([np.nan if error is None else error for error in errors], dtype=np.float64)
    axis.errorbar(xs, ys, yerr=bars, fmt="none", elinewidth=1, capsize=0, zorder=1.9, **look)


def draw_points(axis: Axes, points: Iterable[Sequence[Any]], label: str, **look: Any) -> None:
    """A line, of this look, through points (what `Point` takes) by cost, with their bars; noisy ones are hollow."""
    made = sorted((Point(*point) for point in points), key=lambda point: point[:2])
    xs, ys = [point.cost for point in made], [point.value for point in made]
    line, = axis.plot(xs, ys, label=label, **look)
    colour = line.get_color()
    error_bars(axis, xs, ys, [point.error for point in made], ecolor=colour)
    spans = [point for point in made if point.span is not None and point.span[0] < point.span[1]]
    for point in spans:
        axis.hlines(point.value, *point.span, colors=colour, linewidth=1, zorder=1.9)
    for point in made:
        if point.noisy:
            axis.plot(point.cost, point.value, marker=line.get_marker(), markersize=line.get_markersize(), color=colour,
                      markerfacecolor="white", linestyle="none", label="_hollow")


def legend_beside(axes: Sequence[Axes], points: Iterable[Sequence[Any]] = ()) -> None:
    """One legend to the right of a row of panels, of what is drawn in any of them; it explains the bars of points."""
    drawn = {(line.get_label(), line.get_marker(), line.get_color()): line for axis in axes
             for line in axis.get_legend_handles_labels()[0]}
    made = [Point(*point) for point in points]
    notes = (["bars: one standard error"] if any(p.error is not None for p in made) else []) + (
        ["across: range of the ratio"] if any(p.span is not None and p.span[0] < p.span[1] for p in made) else []) + (
        [NOISY] if any(p.noisy for p in made) else [])
    axes[-1].legend(handles=list(drawn.values()), frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left",
                    alignment="left", title="\n".join(notes) or None, title_fontsize="small")


def front(costs: Any, values: Any) -> list[int]:
    """Indices of the points that no other dominates, by rising cost: lower cost and higher value are better.

    costs, values (P,). Dominated is what another is no worse than in both and better in one, so equal points stand or
    fall together. A point that is not finite is left out.
    """
    costs, values = as_array(costs), as_array(values)
    kept: list[int] = []
    for i in np.lexsort((-values, costs)):                  # by cost, then by value, the highest first
        if not (np.isfinite(costs[i]) and np.isfinite(values[i])):
            continue
        if not kept or values[i] > values[kept[-1]] or (values[i] == values[kept[-1]] and costs[i] == costs[kept[-1]]):
            kept.append(int(i))
    return kept


def pareto(points: dict[str, Sequence[Sequence[Any]]], *, cost_label: str, value_label: str) -> Figure:
    """Points (cost, value), or (cost, value, its standard error), with a colour and marker per strategy, and the
    staircase of those that no other dominates, errors aside."""
    figure, axes = new_axes(1, 1, 9.0, 4.2)
    axis = axes[0, 0]
    cloud = as_array([point[:2] for some in points.values() for point in some]).reshape(-1, 2)    # (P, 2)
    steps = cloud[front(cloud[:, 0], cloud[:, 1])]
    for index, (name, some) in enumerate(points.items()):
        made = [Point(*point) for point in some]
        place = as_array([point[:2] for point in made]).reshape(-1, 2)
        error_bars(axis, place[:, 0], place[:, 1], [point.error for point in made],
                   ecolor=look(index)["color"], alpha=0.6)
        axis.plot(place[:, 0], place[:, 1], markersize=6, alpha=0.75, linestyle="none", label=name, **look(index))
    if len(steps):
        steps = np.vstack([steps, [np.nanmax(cloud[np.isfinite(cloud).all(axis=1), 0]), steps[-1, 1]]])
        axis.plot(steps[:, 0], steps[:, 1], drawstyle="steps-post", color=INK, linewidth=1.5, zorder=1.5,
                  label="not dominated")
    known = any(Point(*point).error is not None for some in points.values() for point in some)
    axis.set(xlabel=cost_label, ylabel=f"{value_label}\nbars: one standard error" if known else value_label)
    axis.margins(0.06)
    legend_above(figure, *axis.get_legend_handles_labels())
    return figure
