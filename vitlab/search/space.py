"""SearchSpace: the vector that a search proposes, and the counts and the plan that it stands for (methods B4, C2).

A policy is a vector of ratios in [0, max_ratio]: neurons of each block, heads of each block, then the token dimensions.
A ratio is the fraction cut, and int(count * (1 - ratio)) stay: policies that change no count are the same policy.
P policies, D dimensions, L blocks.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import Counts, counts_of, macs_of
from vitlab.plan.rules import ReadOut
from vitlab.plan.shape import ViTShape, require
from vitlab.runtime.files import InputError
from vitlab.search.token_dimensions import token_dimensions

UNITS = ("neurons", "heads")
MAX_RATIO = 0.5                                 # published
TOKEN_COUNTS = ("attended", "in_mlp", "carried", "pooled", "compared", "merges", "reconstructs", "queried")


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Which dimensions are searched, for a dense model of one shape. Raises InputError for unknown or no dimensions."""

    shape: ViTShape
    units: tuple[str, ...] = UNITS              # of "neurons", "heads"
    tokens: str = "select"                      # a name of TOKEN_DIMENSIONS
    max_ratio: float = MAX_RATIO                # most that a ratio may cut, (0, 1)
    # whether the last block computes what the classifier reads alone (rule ReadOut)
    read_out: bool = False
    settings: dict[str, Any] = field(default_factory=dict)      # of the token dimensions, such as prune_rate

    def __post_init__(self) -> None:
        odd = sorted(set(self.units) - set(UNITS))
        if odd:
            raise InputError(f"units {odd[0]!r} are not known; known are {list(UNITS)}")
        if not 0 < self.max_ratio < 1:
            raise InputError(f"max_ratio is {self.max_ratio}; it must lie in (0, 1)")
        object.__setattr__(self, "units", tuple(u for u in UNITS if u in self.units))
        object.__setattr__(self, "_tokens", token_dimensions(self.tokens, self.shape, self.settings))
        units = [f"{unit} {block}" for unit in self.units for block in range(self.shape.depth)]
        object.__setattr__(self, "_names", tuple(units + self._tokens.names))
        if self.read_out:
            ReadOut().flow(self.shape, self.shape.num_tokens)                   # refuses what no plan can have
            first, last = getattr(self._tokens, "spans", ((0, 0),))[-1]
            require(first == last or last + 1 < self.shape.depth, f"read_out: the last block stays merged in the span "
                                                                  f"{first}-{last}; "
                    "spans that end before it are needed")
        if not self.names:
            raise InputError("nothing is searched: neither heads nor neurons nor tokens")

    @property
    def names(self) -> list[str]:
        """One name per dimension: its group and the block, as in "heads 3"."""
        return list(self._names)

    @property
    def groups(self) -> list[str]:
        """The group of each dimension: "neurons", "heads" or "tokens"."""
        return [name.split(" ")[0] for name in self.names]

    @property
    def by_place(self) -> bool:
        """Whether tokens go together by their place, chosen by their scores."""
        return self.tokens.startswith(("merge", "share"))

    @property
    def size(self) -> int:
        return len(self._names)

    def check(self, policies: np.ndarray) -> np.ndarray:
        """Policies as a float array (P, D). Raises InputError naming the dimension that is out of the box."""
        policies = np.atleast_2d(np.asarray(policies, dtype=np.float64))
        if policies.ndim > 2 or policies.shape[-1] != self.size:
            raise InputError(f"a policy of {policies.shape[-1]} numbers; this space has {self.size} dimensions")
        wrong = np.argwhere(~((policies >= 0) & (policies <= self.max_ratio)))
        if len(wrong):
            raise InputError(f"{self.names[wrong[0][1]]} is {policies[tuple(wrong[0])]}; it must lie in [0, "
                             f"{self.max_ratio}]")
        return policies

    def _total(self, unit: str) -> int:
        """How many units of a kind a block of the dense model has."""
        return self.shape.num_neurons if unit == "neurons" else self.shape.num_heads

    def _where(self, unit: str) -> slice:
        """The dimensions of a searched kind of unit, one for each block."""
        start = self.units.index(unit) * self.shape.depth
        return slice(start, start + self.shape.depth)

    def _unit_counts(self, policies: np.ndarray) -> dict[str, np.ndarray]:
        """Units that stay (P, L), at least one (methods B4)."""
        counts = {unit: np.full((len(policies), self.shape.depth), self._total(unit)) for unit in UNITS}
        for unit in self.units:
            counts[unit] = np.maximum((self._total(unit) * (1 - policies[:, self._where(unit)])).astype(np.int64), 1)
        return counts

    def _middle(self, unit: str, kept: np.ndarray) -> np.ndarray:
        """The ratio in the middle of those with which `kept` units stay."""
        return np.clip(1 - (kept + 0.5) / self._total(unit), 0, self.max_ratio)

    def counts(self, policies: np.ndarray) -> Counts:
        """What stays in each block (P, L)."""
        policies = self.check(policies)
        units = self._unit_counts(policies)
        token = self._tokens.counts(policies[:, self.size - len(self._tokens.names):])
        every = getattr(self._tokens, "ranked_by", "kept") == "all"
        ranking = token.pop("ranks") * (self.shape.num_heads if every else units["heads"])
        if self.read_out:
            token["queried"] = token["attended"].copy()
            # all are given back
            token["attended"][:, -1] = self.shape.num_tokens if self.by_place else token["attended"][:, -1]
            token["queried"][:, -1] = token["in_mlp"][:, -1] = self.shape.num_prefix_tokens
            for name in ("carried", "pooled", "compared", "merges", "reconstructs"):
                token[name][:, -1] = 0
            ranking[:, -1] = 0
        return Counts(**units, **token, ranking=ranking, ranks_anew=(ranking > 0) & every)

    def gmacs(self, policies: np.ndarray) -> np.ndarray:
        """10^9 multiply-adds an image of the deployed model, everything counted (P)."""
        return macs_of(self.shape, self.counts(policies))["total"] / 1e9

    def keys(self, policies: np.ndarray) -> list[tuple[int, ...]]:
        """A tuple of counts per policy; equal for policies that are the same."""
        c = self.counts(policies)
        return [tuple(row)
                for row in np.concatenate([c.neurons, c.heads, c.attended, c.in_mlp, c.carried], axis=1).tolist()]

    def _levels(self, unit: str) -> int:
        """How many different counts of a unit the box allows."""
        return self._total(unit) - max(int(self._total(unit) * (1 - self.max_ratio)), 1) + 1

    def even(self, policies: np.ndarray) -> np.ndarray:
        """Policies in coordinates (P, D) in which every count of units has an even share of [0, max_ratio], each in its
        middle.

        In ratios, any above 0 cuts a head, so that the policies that keep all heads of a block are a corner of the box
        and a draw never hits it; here they are one part in as many as there are counts. Token ratios stay.
        """
        policies = self.check(policies).copy()
        for unit in self.units:
            gone = self._total(unit) - self._unit_counts(policies)[unit]
            policies[:, self._where(unit)] = (gone + 0.5) / self._levels(unit) * self.max_ratio
        return policies

    def from_even(self, points: np.ndarray) -> np.ndarray:
        """The policies (P, D) of even coordinates: each ratio in the middle of those with its count."""
        policies = self.check(points).copy()
        for unit in self.units:
            where, levels = self._where(unit), self._levels(unit)
            gone = np.minimum((policies[:, where] / self.max_ratio * levels).astype(np.int64), levels - 1)
            policies[:, where] = self._middle(unit, self._total(unit) - gone)
        return policies

    def snap(self, policies: np.ndarray) -> np.ndarray:
        """Each unit's ratio moved to the middle of those with the same count (P, D)."""
        return self.from_even(self.even(policies))

    def features(self, policies: np.ndarray) -> np.ndarray:
        """What a model of the objective should see (P, D): even coordinates in [0, 1]."""
        return self.even(policies) / self.max_ratio

    def plan(self, policy: Sequence[float] | np.ndarray, *, heads: Tensor | None = None, neurons: Tensor | None = None,
             tokens: Tensor | None = None, made_by: dict[str, Any] | None = None) -> CompressionPlan:
        """The plan of one policy: of heads (L, H) and neurons (L, M) those with the highest scores stay; raw token
        scores (L, n) where tokens are merged. Raises InputError where scores are missing or of another size."""
        policy = self.check(np.asarray(policy))
        if len(policy) != 1:
            raise InputError(f"a plan is of one policy; {len(policy)} were given")
        counts, kept = self._unit_counts(policy), {}
        for unit, scores in (("heads", heads), ("neurons", neurons)):
            total = self._total(unit)
            if unit not in self.units:
                kept[unit] = [None] * self.shape.depth
                continue
            if scores is None or tuple(scores.shape) != (self.shape.depth, total):
                raise InputError(f"{unit} are cut by their scores: {self.shape.depth} blocks of {total} are needed, "
                                 f"not "
                                 f"{None if scores is None else tuple(scores.shape)}")
            if not scores.isfinite().all():
                raise InputError(f"scores of {unit} are not finite in block "
                                 f"{int((~scores.isfinite()).any(dim=1).nonzero()[0])}")
            order = scores.argsort(dim=1, descending=True, stable=True).tolist()
            kept[unit] = [None if k == total else tuple(sorted(best[:k])) for best,
                          k in zip(order, counts[unit][0].tolist())]
        rules = self._tokens.rules(policy[0, self.size - len(self._tokens.names):], tokens)
        rules = [*rules[:-1], ReadOut()] if self.read_out else rules
        blocks = tuple(BlockPlan(heads=h, neurons=m, tokens=t) for h, m,
                       t in zip(kept["heads"], kept["neurons"], rules))
        return CompressionPlan(shape=self.shape, blocks=blocks, made_by=made_by or {})

    def _token_ratios(self) -> np.ndarray:
        """A ratio for every result that int(n * (1 - ratio)) can have for any n up to the number of tokens,
        ascending."""
        n = np.arange(1, self.shape.num_tokens + 1)
        steps = 1 - np.arange(self.shape.num_tokens + 1)[:, None] / n          # where the count of n becomes k
        steps = np.unique(np.append(steps[(steps >= 0) & (steps <= self.max_ratio)], [0, self.max_ratio]))
        return np.concatenate([[0.0], (steps[1:] + steps[:-1]) / 2, [self.max_ratio]])

    def policy(self, plan: CompressionPlan) -> np.ndarray:
        """A policy (D) with the counts of the plan. Raises InputError where this space has none."""
        plan.check_fits(self.shape)
        wanted, found = counts_of(plan), np.zeros(self.size)
        for unit in self.units:
            found[self._where(unit)] = self._middle(unit, getattr(wanted, unit))
        # Token ratios one after the other: the first of those with which most blocks, from the first on, agree.
        ratios = self._token_ratios()
        for d in range(self.size - len(self._tokens.names), self.size):
            tried = np.repeat(found[None], len(ratios), axis=0)
            tried[:, d] = ratios
            given = self.counts(tried)
            same = np.all([getattr(given, name) == getattr(wanted, name) for name in TOKEN_COUNTS], axis=0)
            found[d] = ratios[np.argmax(np.cumprod(same, axis=1).sum(axis=1) * (self.shape.depth + 1)
                                        + same.sum(axis=1))]
        given = self.counts(found)
        for name in ("heads", "neurons", *TOKEN_COUNTS, "ranking"):
            wrong = np.argwhere(getattr(given, name)[0] != getattr(wanted, name))
            if len(wrong):
                block = int(wrong[0, 0])
                raise InputError(f"the plan is not in this search space: block {block} has "
                                 f"{getattr(wanted, name)[block]} {name}, "
                                 f"nearest is {getattr(given, name)[0, block]}")
        return found
