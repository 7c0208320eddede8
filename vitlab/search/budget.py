"""Budget: what a policy may cost, and the way from any policy to one that meets it."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vitlab.runtime.files import InputError

TOLERANCE = 0.02                                # published
BISECTIONS = 24                                 # of a path of length 3: to 2e-7 of a ratio
FINENESS = {"heads": 0, "tokens": 1, "neurons": 2}      # by how little one unit costs


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Policies (P, D) whose cost lies in [limit * (1 - tolerance), limit].

    Cost should fall, or stay, as ratios grow; merging the very first patches may add more in matrices than it saves.
    """

    limit: float                                # in the unit of `cost`
    cost: Callable[[np.ndarray], np.ndarray]    # policies (P, D) -> (P)
    max_ratio: float                            # of the space
    size: int                                   # D
    groups: tuple[str, ...] = ()                # of each dimension; empty where all are alike
    unit: str = "gmacs"                         # "gmacs" or "latency_ms", for people
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}; it must lie in (0, 1)")
        dense, least = self.cost(np.array([[0.0] * self.size, [self.max_ratio] * self.size])).tolist()
        if not least <= self.limit < dense:
            raise InputError(f"a budget of {self.limit:.6g} {self.unit} can't be met: this space reaches from "
                             f"{least:.6g} "
                             f"(everything cut by {self.max_ratio}) to {dense:.6g} (nothing cut): ratios of the dense "
                             f"model's from "
                             f"{least / dense:.3g} to below 1")

    def meets(self, policies: np.ndarray) -> np.ndarray:
        """Bool (P)."""
        cost = self.cost(np.atleast_2d(policies))
        return (cost <= self.limit) & (cost >= self.limit * (1 - self.tolerance))

    def _along(self, policies: np.ndarray, t: np.ndarray) -> np.ndarray:
        """The policy's path at t (P): from nothing cut (-1) by scaling to itself (0) and to its non-zero ratios at
        their most (1), then everything at its most (2). What a policy leaves alone is cut last."""
        t = t[:, None]
        most = np.where(policies > 0, self.max_ratio, policies)
        scaled = np.minimum(policies / np.maximum(1 - t, 1e-12), self.max_ratio)
        return np.select([t < 0, t < 1], [policies * (1 + t), scaled], most + (t - 1) * (self.max_ratio - most))

    def _fitting(self, move: Callable[[np.ndarray], np.ndarray], low: float, high: float,
                 count: int) -> tuple[np.ndarray, np.ndarray]:
        """(the smallest t (P) with a cost within the limit, the largest without), by bisection of move(t), to
        BISECTIONS bits."""
        below, above = np.full(count, high), np.full(count, low)
        for _ in range(BISECTIONS):
            middle = (below + above) / 2
            fits = self.cost(move(middle)) <= self.limit
            below, above = np.where(fits, middle, below), np.where(fits, above, middle)
        return below, above

    def _give_back(self, policies: np.ndarray, dimensions: np.ndarray) -> np.ndarray:
        """Scale down what the policies (P, D) cut in some dimensions (D, bool) as far as the limit allows."""
        def move(t: np.ndarray) -> np.ndarray:
            return np.where(dimensions, policies * t[:, None], policies)
        return move(self._fitting(move, 0.0, 1.0, len(policies))[0])

    def _take(self, policies: np.ndarray, dimensions: np.ndarray) -> np.ndarray:
        """Cut more in some dimensions (D, bool) of policies (P, D) that cost too much, as little as the limit asks
        for."""
        def move(t: np.ndarray) -> np.ndarray:
            return np.where(dimensions, policies + t[:, None] * (self.max_ratio - policies), policies)
        return move(self._fitting(move, 0.0, 1.0, len(policies))[0])

    def project(self, policies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(policies (P, D) of the same make that meet the budget, whether each does (P)).

        Bisection along the path. Where several counts fall at once the last step is too long: its dimensions are taken
        one by one, and what is left of the budget is given back by the groups in turn, the finest first; where nothing
        finer is cut, the step is not made, and the finest groups are cut instead. A policy may still fail where nothing
        finer is searched.
        """
        count = len(policies)
        below, above = self._fitting(lambda t: self._along(policies, t), -1.0, 2.0, count)
        # costs at most the limit, and above it
        less, more = self._along(policies, below), self._along(policies, above)
        order = np.argsort([FINENESS.get(group, 0) for group in self.groups or [""] * self.size], kind="stable")
        rank = np.empty(self.size, dtype=int)
        rank[order] = np.arange(self.size)
        steps = np.arange(self.size + 1)[:, None, None]
        # (D + 1, P, D): the coarsest given back first
        mixed = np.where(rank < steps, more, less)
        cost = self.cost(mixed.reshape(-1, self.size)).reshape(self.size + 1, -1)   # grows with each one
        best = np.maximum(np.cumprod(cost <= self.limit, axis=0).sum(axis=0) - 1, 0)
        projected = mixed[best, np.arange(count)]
        for group in sorted(set(self.groups), key=lambda name: -FINENESS.get(name, 0)):
            for start, move in ((projected, self._give_back), (more, self._take)):
                short = ~self.meets(projected)
                if not short.any():
                    return projected, ~short
                moved = move(start[short], np.array(self.groups) == group)
                projected[short] = np.where(self.meets(moved)[:, None] | (start is projected), moved, projected[short])
        return projected, self.meets(projected)
