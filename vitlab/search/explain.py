"""What a study has learned, as arrays that plots draw."""
from dataclasses import dataclass

import numpy as np

from vitlab.files import InputError
from vitlab.search.study import Study
from vitlab.search.surrogate import Surrogate


@dataclass(frozen=True, kw_only=True, eq=False)
class Slices:
    """The Gaussian process along each dimension through the best policy: (D, G) each."""

    grids: np.ndarray                           # ratios
    means: np.ndarray                           # in the unit of the objective
    deviations: np.ndarray


def slices(study: Study, points: int = 41) -> Slices:
    """Fitted to all evaluations; the other ratios stay those of the best policy, so the budget is left on the way. Raises
    InputError where fewer than two policies were measured."""
    space = study.space
    if len(study.evaluations) < 2:
        raise InputError(f"{study.folder}: two evaluations are needed; there are {len(study.evaluations)}")
    policies = np.array([e.policy for e in study.evaluations])
    surrogate = Surrogate(space.features(policies), np.array([e.value for e in study.evaluations]),
                          noise=study.options.noise)
    grid = np.linspace(0, space.max_ratio, points)
    moved = np.tile(np.array(study.best.policy), (space.size, points, 1))       # (D, G, D)
    moved[np.arange(space.size), :, np.arange(space.size)] = grid
    mean, deviation = surrogate.predict(space.features(moved.reshape(-1, space.size)))
    return Slices(grids=np.tile(grid, (space.size, 1)), means=mean.reshape(space.size, points),
                  deviations=deviation.reshape(space.size, points))
