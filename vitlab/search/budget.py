"""Budget: what a policy may cost, and the way from any policy to one that meets it."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vitlab.files import InputError

TOLERANCE = 0.02                                # published
BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Policies (P, D) whose cost lies in [limit * (1 - tolerance), limit]; cost falls, or stays, as ratios grow."""

    limit: float                                # in the unit of `cost`
    cost: Callable[[np.ndarray], np.ndarray]    # policies (P, D) -> (P)
    max_ratio: float                            # of the space
    size: int                                   # D
    unit: str = "gmacs"                         # "gmacs" or "latency_ms", for people
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}; it must lie in (0, 1)")
        dense, least = self.cost(np.array([[0.0] * self.size, [self.max_ratio] * self.size])).tolist()
        if not least <= self.limit < dense:
            raise InputError(f"a budget of {self.limit:.6g} {self.unit} can't be met: this space reaches from {least:.6g} "
                             f"(everything cut by {self.max_ratio}) to {dense:.6g} (nothing cut)")

    def meets(self, policies: np.ndarray) -> np.ndarray:
        """Bool (P)."""
        cost = self.cost(np.atleast_2d(policies))
        return (cost <= self.limit) & (cost >= self.limit * (1 - self.tolerance))

    def _along(self, policies: np.ndarray, t: np.ndarray) -> np.ndarray:
        """The policy's path at t (P): from nothing cut (-1) by scaling to itself (0) and to its non-zero ratios at their most
        (1), then everything at its most (2). What a policy leaves alone is cut last."""
        t = t[:, None]
        most = np.where(policies > 0, self.max_ratio, policies)
        scaled = np.minimum(policies / np.maximum(1 - t, 1e-12), self.max_ratio)
        return np.select([t < 0, t < 1], [policies * (1 + t), scaled], most + (t - 1) * (self.max_ratio - most))

    def project(self, policies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(policies (P, D) of the same make that meet the budget, whether each does (P)).

        Bisection along the path. Where several counts fall at once, so that the last step is too long, its dimensions are
        taken one by one; a policy may still fail where a single unit is more than the tolerance.
        """
        below, above = np.full(len(policies), 2.0), np.full(len(policies), -1.0)
        for _ in range(BISECTIONS):
            middle = (below + above) / 2
            fits = self.cost(self._along(policies, middle)) <= self.limit
            below, above = np.where(fits, middle, below), np.where(fits, above, middle)
        less, more = self._along(policies, below), self._along(policies, above)     # costs at most the limit, and above it
        steps = np.arange(self.size + 1)[:, None, None]
        mixed = np.where(np.arange(self.size) < steps, more, less)                  # (D + 1, P, D): the first dimensions given back
        cost = self.cost(mixed.reshape(-1, self.size)).reshape(self.size + 1, -1)   # grows with each one
        best = (cost <= self.limit).sum(axis=0) - 1
        projected = mixed[best, np.arange(len(policies))]
        return projected, self.meets(projected)
