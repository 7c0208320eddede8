"""Measured models as points of a figure: a line through them, how sure each is, what is too noisy to tell."""
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

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
    """A line through points (what `Point` takes) in order of cost, with their bars; noisy ones are hollow. look: of the
    line."""
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
