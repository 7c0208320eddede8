"""Budget: what a policy may cost, and the way from any policy to one that meets it."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitlab.runtime.files import require
from vitlab.search.space import SearchSpace

TOLERANCE = 0.02                                # published
BISECTIONS = 24                                 # of a path of length 3 or 4: to 2e-7 of a ratio
FINENESS = {"heads": 0, "tokens": 1, "widths": 2, "neurons": 3}      # by how little one unit costs


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
    whole: tuple[bool, ...] = ()                # of each dimension, whether its ratio may be 1; empty: none's
    unit: str = "gmacs"                         # "gmacs" or "latency_ms", for people
    tolerance: float = TOLERANCE

    @classmethod
    def of(cls, space: SearchSpace, limit: float, cost: Callable[[np.ndarray], np.ndarray] | None = None,
           **settings: Any) -> "Budget":
        """A budget of a space's policies. cost None: its GMACs; settings: unit and tolerance."""
        return cls(limit=limit, cost=cost or space.gmacs, max_ratio=space.max_ratio, size=space.size,
                   groups=tuple(space.groups), whole=tuple(space.most == 1), **settings)

    def __post_init__(self) -> None:
        require(0 < self.tolerance < 1, f"tolerance is {self.tolerance}; it must lie in (0, 1)")
        nothing, most = np.zeros(self.size), np.full(self.size, self.max_ratio)
        dense, *ends = self.cost(np.stack([nothing, most, np.where(self.whole or False, 1, most)])).tolist()
        least = min(ends)                       # without its attention a block may merge no tokens, and cost more
        require(least <= self.limit < dense,
                f"a budget of {self.limit:.6g} {self.unit} can't be met: this space reaches from {least:.6g} "
                f"(everything cut by {self.max_ratio}{', whole sublayers left out' if least < ends[0] else ''}) to "
                f"{dense:.6g} (nothing cut): ratios of the dense model's from {least / dense:.3g} to below 1")

    def meets(self, policies: np.ndarray) -> np.ndarray:
        """Bool (P)."""
        cost = self.cost(np.atleast_2d(policies))
        return (cost <= self.limit) & (cost >= self.limit * (1 - self.tolerance))

    def _fitting(self, path: Callable[[np.ndarray], np.ndarray], low: float, high: float,
                 count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` policies on the paths t (P) -> (P, D), cheaper as t grows: the dearest within the limit, and the
        cheapest beyond it, to BISECTIONS bits."""
        within, beyond = np.full(count, high), np.full(count, low)
        for _ in range(BISECTIONS):
            middle = (within + beyond) / 2
            fits = self.cost(path(middle)) <= self.limit
            within, beyond = np.where(fits, middle, within), np.where(fits, beyond, middle)
        return path(within), path(beyond)

    def _between(self, dear: np.ndarray, cheap: np.ndarray) -> np.ndarray:
        """The dearest policies (P, D) within the limit on the straight way from some to others."""
        return self._fitting(lambda t: dear + t[:, None] * (cheap - dear), 0.0, 1.0, len(dear))[0]

    def project(self, policies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(policies (P, D) of the same make that meet the budget, whether each does (P)).

        Each moves along its path: from nothing cut (t = -1) by scaling to itself (0), on to its non-zero ratios at
        their most (1), then to everything at its most (2), so that what it leaves alone is cut last; then whole
        sublayers are left out one after the other, up to all that may be (3), those first of which it cuts most: MLPs
        before attentions, which take the tokens that they merge or select along, or, where that leads nowhere, either
        first, or attentions. Where several counts fall at once the last step is too long: its dimensions are taken one
        by one, the coarsest first, and what is left of the budget is given back by the groups in turn, the finest
        first; where nothing finer is cut, the step is not made, and the finest groups are cut instead. A policy may
        still fail where nothing finer is searched.
        """
        fineness = np.array([FINENESS.get(group, 0) for group in self.groups or [""] * self.size])
        projected = self._along(policies, fineness, first=fineness)
        for first in (np.zeros(self.size), -fineness) if any(self.whole) else ():
            short = ~self.meets(projected)
            if short.any():
                projected[short] = self._along(policies[short], fineness, first=first)
        return projected, self.meets(projected)

    def _along(self, policies: np.ndarray, fineness: np.ndarray, first: np.ndarray) -> np.ndarray:
        """`project`. first (D): of dimensions of which all may go, those where it is larger do so before others."""
        def path(t: np.ndarray) -> np.ndarray:
            t = t[:, None]
            most = np.where(policies > 0, highest, policies)
            scaled = np.minimum(policies / np.maximum(1 - t, 1e-12), highest)
            some = np.select([t < 0, t < 1], [policies * (1 + t), scaled],
                             most + (np.minimum(t, 2) - 1) * (highest - most))
            return np.where(t >= leaves, 1, some)

        count, highest = len(policies), np.maximum(policies, self.max_ratio)    # above it: a sublayer is left out
        turn = np.argsort(np.lexsort((-policies, np.broadcast_to(-first, policies.shape))), axis=1)
        leaves = np.where(self.whole or False, 2 + (turn + 1) / self.size, np.inf)          # the t at which (P, D)
        within, beyond = self._fitting(path, -1.0, 3.0 if any(self.whole) else 2.0, count)
        place = np.argsort(np.argsort(fineness, kind="stable"))
        # (D + 1, P, D): the first so many places, the coarsest, not cut in the last step; dearer with each
        mixed = np.where(place < np.arange(self.size + 1)[:, None, None], beyond, within)
        cost = self.cost(mixed.reshape(-1, self.size)).reshape(self.size + 1, count)
        best = np.maximum(np.cumprod(cost <= self.limit, axis=0).sum(axis=0) - 1, 0)
        projected = mixed[best, np.arange(count)]
        for group in sorted(set(self.groups), key=lambda name: -FINENESS.get(name, 0)):
            mine = np.array(self.groups) == group
            short = ~self.meets(projected)
            if short.any():
                given_back = np.where(mine & (projected[short] <= self.max_ratio), 0, projected[short])
                projected[short] = self._between(given_back, projected[short])
            short = ~self.meets(projected)
            if short.any():
                taken = self._between(beyond[short], np.where(mine, highest[short], beyond[short]))
                projected[short] = np.where(self.meets(taken)[:, None], taken, projected[short])
        return np.where(projected > self.max_ratio, 1, projected)               # there is nothing between the two
