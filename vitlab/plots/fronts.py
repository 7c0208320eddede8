"""Figure of what each budget buys: measured models by cost and value, and those that no other dominates."""
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitlab.plots.base import PALETTE, as_array, legend_above, look, new_axes
from vitlab.plots.points import Point, error_bars


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
                   ecolor=PALETTE[index % len(PALETTE)], alpha=0.6)
        axis.plot(place[:, 0], place[:, 1], markersize=6, alpha=0.75, linestyle="none", label=name, **look(index))
    if len(steps):
        steps = np.vstack([steps, [np.nanmax(cloud[np.isfinite(cloud).all(axis=1), 0]), steps[-1, 1]]])
        axis.plot(steps[:, 0], steps[:, 1], drawstyle="steps-post", color="0.3", linewidth=1.5, zorder=1.5,
                  label="not dominated")
    known = any(Point(*point).error is not None for some in points.values() for point in some)
    axis.set(xlabel=cost_label, ylabel=f"{value_label}\nbars: one standard error" if known else value_label)
    axis.margins(0.06)
    legend_above(figure, *axis.get_legend_handles_labels())
    return figure
