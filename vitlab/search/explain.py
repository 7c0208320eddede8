"""What a study has learned, as arrays that plots draw."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitlab.runtime.files import read_lines, require
from vitlab.search.sampling import Problem
from vitlab.search.sensitivity import SENSITIVITY, trend_of
from vitlab.search.strategies import predictor
from vitlab.search.study import Study

Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def believed(study: Any, policies: np.ndarray, values: np.ndarray) -> Predict:
    """policies (P, D) -> (mean, deviation), (P) each, by the Gaussian process of a study (its space, folder and
    options) after policies (E, D) with their values (E), two at least."""
    problem, trend = Problem(study.space, None), None
    if study.options.initial == "sensitivity":
        trend = trend_of(problem, read_lines(study.folder / SENSITIVITY))
    return predictor(problem, policies, values, study.options, trend)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slices:
    """The Gaussian process along each dimension through the best policy: (D, G) each."""

    grids: np.ndarray                           # ratios
    means: np.ndarray                           # in the unit of the objective
    deviations: np.ndarray


def slices(study: Study, points: int = 41) -> Slices:
    """Fitted to all evaluations; the other ratios stay those of the best policy, so the budget is left on the way.
    Raises InputError where fewer than two policies were measured."""
    space = study.space
    require(len(study.evaluations) > 1,
            f"{study.folder}: two evaluations are needed; there are {len(study.evaluations)}")
    predict = believed(study, np.array([e.policy for e in study.evaluations]),
                       np.array([e.value for e in study.evaluations]))
    grid = np.linspace(0, space.max_ratio, points)
    moved = np.tile(np.array(study.best.policy), (space.size, points, 1))       # (D, G, D)
    moved[np.arange(space.size), :, np.arange(space.size)] = grid
    mean, deviation = predict(moved.reshape(-1, space.size))
    return Slices(grids=np.tile(grid, (space.size, 1)), means=mean.reshape(space.size, points),
                  deviations=deviation.reshape(space.size, points))
