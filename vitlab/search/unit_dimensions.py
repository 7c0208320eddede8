"""The unit dimensions of a policy: the counts that ratios stand for, and coordinates in which each has an even share.

A ratio is the fraction cut, and int(count * (1 - ratio)) stay, rounded up to whole steps where counts go in steps.
Where sublayers may be left out, there is one count more: none, of ratio 1, with nothing between it and the fewest that
the largest ratio leaves. U dimensions: a kind of unit after the other, each block after block.
"""
import math
from dataclasses import dataclass, field

import numpy as np

from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError

UNITS, KNOWN = ("neurons", "heads"), ("neurons", "heads", "widths")            # cut where none are named; all there are


def total_of(shape: ViTShape, unit: str) -> int:
    """Units of a kind that a block of the dense model has; widths of queries and keys: that each of its heads has."""
    return shape.head_dim if unit == "widths" else getattr(shape, f"num_{unit}")


@dataclass(frozen=True, kw_only=True)
class UnitDimensions:
    """Which units are cut, and by how much. Raises InputError for unknown ones."""

    shape: ViTShape
    units: tuple[str, ...]
    max_ratio: float                # most that a ratio may cut, short of everything
    multiple: int = 1               # what stays is a multiple of so many neurons, or widths
    sublayers: bool = False         # whether all heads, or all neurons, of a block may go
    total: np.ndarray = field(init=False, repr=False, compare=False)            # (U) units of a block
    step: np.ndarray = field(init=False, repr=False, compare=False)             # (U) that go together
    most: np.ndarray = field(init=False, repr=False, compare=False)             # (U) the largest ratio: max_ratio or 1

    def __post_init__(self) -> None:
        odd = sorted(set(self.units) - set(KNOWN))
        if odd:
            raise InputError(f"units {odd[0]!r} are not known; known are {list(KNOWN)}")
        # what the model can't lose is not searched
        object.__setattr__(self, "units", tuple(u for u in KNOWN if u in self.units and self.shape.cuts(u)))
        multiple = self.multiple
        steps = {"neurons": multiple, "heads": multiple // math.gcd(multiple, self.shape.head_dim), "widths": multiple}
        for name, of_unit in (("total", lambda unit: total_of(self.shape, unit)), ("step", steps.get),
                              ("most", lambda unit: 1.0 if self.sublayers and unit in UNITS else self.max_ratio)):
            values = np.array([of_unit(unit) for unit in self.units], dtype=float if name == "most" else np.int64)
            object.__setattr__(self, name, np.repeat(values, self.shape.depth))

    @property
    def names(self) -> list[str]:
        return [f"{unit} {block}" for unit in self.units for block in range(self.shape.depth)]

    @property
    def some(self) -> np.ndarray:
        """How many different counts there are up to max_ratio (U)."""
        return self._gone(self.stay(np.full(len(self.total), self.max_ratio))) + 1

    @property
    def levels(self) -> np.ndarray:
        """How many different counts there are (U)."""
        return self.some + (self.most > self.max_ratio)

    def stay(self, ratios: np.ndarray) -> np.ndarray:
        """Units that stay, at least one (methods B4) but where a sublayer is left out: ratios (..., U) -> (..., U)."""
        kept = np.maximum((self.total * (1 - ratios)).astype(np.int64), 1)
        return np.where(ratios > self.max_ratio, 0, np.minimum(-(-kept // self.step) * self.step, self.total))

    def _gone(self, kept: np.ndarray) -> np.ndarray:
        """How many counts above this one, not 0, there are: (..., U) -> (..., U)."""
        return -(-self.total // self.step) + -kept // self.step

    def middle(self, kept: np.ndarray) -> np.ndarray:
        """The ratios in the middle of those with which so many units stay: (..., U) -> (..., U)."""
        below = (-(-kept // self.step) - 1) * self.step                         # the next count
        ratios = np.clip(1 - (below + kept + 2) / 2 / self.total, 0, self.max_ratio)
        return np.select([kept == self.total, kept == 0], [0, 1], ratios)

    def even(self, ratios: np.ndarray) -> np.ndarray:
        """Coordinates in which every count has an even share of [0, max_ratio], each in its middle: (..., U) ->
        (..., U)."""
        kept = self.stay(ratios)
        return (np.where(kept == 0, self.some, self._gone(kept)) + 0.5) / self.levels * self.max_ratio

    def from_even(self, points: np.ndarray) -> np.ndarray:
        """The ratios of even coordinates, each in the middle of those with its count: (..., U) -> (..., U)."""
        gone = np.minimum((points / self.max_ratio * self.levels).astype(np.int64), self.levels - 1)
        kept = np.minimum((-(-self.total // self.step) - gone) * self.step, self.total)
        return self.middle(np.where(gone == self.some, 0, kept))
