"""What a study has learned, as arrays that plots draw."""
from collections.abc import Callable
from typing import Any

import numpy as np

from vitlab.runtime.files import read_lines, require
from vitlab.search.sampling import Problem
from vitlab.search.sensitivity import SENSITIVITY, trend_of
from vitlab.search.strategies import predictor
from vitlab.search.study import Study

POINTS = 41                     # ratios of a dimension
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def believed(study: Any, policies: np.ndarray, values: np.ndarray) -> Predict:
    """policies (P, D) -> (mean, deviation), (P) each, by the Gaussian process of a study (its space, folder and
    options) after policies (E, D) with their values (E), two at least."""
    problem, trend = Problem(study.space, None), None
    if study.options.initial == "sensitivity":
        trend = trend_of(problem, read_lines(study.folder / SENSITIVITY))
    return predictor(problem, policies, values, study.options, trend)


def slices(study: Study) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ratios, means, deviations), (D, G) each, of the Gaussian process fitted to all evaluations, along each dimension
    through the best policy, so that the budget is left on the way. InputError where fewer than two were measured."""
    space = study.space
    require(len(study.evaluations) > 1,
            f"{study.folder}: two evaluations are needed; there are {len(study.evaluations)}")
    predict = believed(study, np.array([e.policy for e in study.evaluations]),
                       np.array([e.value for e in study.evaluations]))
    grid = np.linspace(0, space.max_ratio, POINTS)
    moved = np.tile(np.array(study.best.policy), (space.size, POINTS, 1))       # (D, G, D)
    moved[np.arange(space.size), :, np.arange(space.size)] = grid
    mean, deviation = predict(moved.reshape(-1, space.size))
    return np.tile(grid, (space.size, 1)), mean.reshape(-1, POINTS), deviation.reshape(-1, POINTS)
