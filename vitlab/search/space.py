"""SearchSpace: the vector that a search proposes, and the counts and the plan that it stands for (methods B4, C2).

A policy is a vector of ratios in [0, max_ratio]: neurons of each block, heads of each block, widths of the queries and
keys of each block's heads, then the token dimensions.
A ratio is the fraction cut; policies that change no count are the same policy. Where sublayers may be left out, the
ratios of heads and neurons may be 1, too.
P policies, D dimensions, U of them units, L blocks.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import Counts, counts_of, macs_of
from vitlab.plan.rules import ReadOut
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError, require
from vitlab.search.token_dimensions import MergeTokens, NoTokens, token_dimensions
from vitlab.search.unit_dimensions import KNOWN, UNITS, UnitDimensions, total_of

MAX_RATIO = 0.5                                 # published


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Which dimensions are searched, for a dense model of one shape. Raises InputError for unknown or no dimensions."""

    shape: ViTShape
    units: tuple[str, ...] = UNITS              # of "neurons", "heads", "widths" (of queries and keys)
    tokens: str = "select"                      # a name of TOKEN_DIMENSIONS
    max_ratio: float = MAX_RATIO                # most that a ratio may cut, (0, 1)
    read_out: bool = False                      # whether the last block computes what the classifier reads alone
    settings: dict[str, Any] = field(default_factory=dict)      # of the token dimensions, such as prune_rate
    multiple: int = 1                           # what stays is a multiple of so many neurons, or widths of heads
    sublayers: bool = False                     # whether all heads, or all neurons, of a block may go

    def __post_init__(self) -> None:
        require(self.multiple >= 1, f"multiple is {self.multiple}; at least 1 is needed")
        require(0 < self.max_ratio < 1, f"max_ratio is {self.max_ratio}; it must lie in (0, 1)")
        cut = UnitDimensions(shape=self.shape, units=self.units, max_ratio=self.max_ratio, multiple=self.multiple,
                             sublayers=self.sublayers)
        object.__setattr__(self, "_cut", cut)
        object.__setattr__(self, "units", cut.units)
        if not self.shape.cuts("tokens"):
            object.__setattr__(self, "tokens", "none")
            object.__setattr__(self, "read_out", False)
        require(not (self.shape.rotary and self.tokens.startswith("select")),
                f"tokens {self.tokens!r}: selected tokens would lose the places that this model turns its queries and "
                "keys by; 'match' merges them")
        tokens = token_dimensions(self.tokens, self.shape.cut_short(), self.settings)
        object.__setattr__(self, "_tokens", tokens)
        if self.read_out:
            ReadOut().flow(self.shape, self.shape.num_tokens)                   # refuses what no plan can have
            first, last = tokens.spans[-1] if isinstance(tokens, MergeTokens) else (0, 0)
            require(first == last or last + 1 < self.shape.depth, "read_out: the last block stays merged in the span "
                    f"{first}-{last}; spans that end before it are needed")
        require(self.names, "nothing is searched: neither heads nor neurons nor tokens")

    @cached_property
    def names(self) -> list[str]:
        """One name per dimension: its group and the block, as in "heads 3"."""
        return self._cut.names + self._tokens.names

    @property
    def groups(self) -> list[str]:
        """The group of each dimension: "neurons", "heads", "widths" or "tokens"."""
        return [name.split(" ")[0] for name in self.names]

    @property
    def by_place(self) -> bool:
        """Whether tokens go together by their place, chosen by their scores."""
        return isinstance(self._tokens, MergeTokens)

    @property
    def size(self) -> int:
        return len(self.names)

    @cached_property
    def most(self) -> np.ndarray:
        """The largest ratio of each dimension (D): max_ratio, or 1 where a whole sublayer may go."""
        return np.concatenate([self._cut.most, np.full(len(self._tokens.names), self.max_ratio)])

    def check(self, policies: np.ndarray) -> np.ndarray:
        """Policies as a float array (P, D). Raises InputError naming the dimension that is out of the box."""
        policies = np.atleast_2d(np.asarray(policies, dtype=np.float64))
        if policies.ndim > 2 or policies.shape[-1] != self.size:
            raise InputError(f"a policy of {policies.shape[-1]} numbers; this space has {self.size} dimensions")
        wrong = np.argwhere(~((policies >= 0) & (policies <= self.most)))
        if len(wrong):
            raise InputError(f"{self.names[wrong[0][1]]} is {policies[tuple(wrong[0])]}; it must lie in [0, "
                             f"{self.most[wrong[0][1]]:g}]")
        return policies

    def _split(self, policies: np.ndarray) -> list[np.ndarray]:
        """The ratios of units (P, U), and those of tokens (P, D - U)."""
        return np.split(self.check(policies), [len(self._cut.total)], axis=1)

    def counts(self, policies: np.ndarray) -> Counts:
        """What stays in each block (P, L)."""
        units, ratios = self._split(policies)
        size = (len(units), self.shape.depth)
        kept = {unit: np.full(size, total_of(self.shape, unit)) for unit in KNOWN}
        kept |= zip(self.units, self._cut.stay(units).reshape(size[0], len(self.units), size[1]).swapaxes(0, 1))
        kept["widths"] = np.where(kept["heads"] > 0, kept["widths"], self.shape.head_dim)
        free, token = self.shape.before_queries, NoTokens(shape=self.shape).counts(ratios, kept["heads"] > 0)
        for name, counts in self._tokens.counts(ratios, kept["heads"][:, :free] > 0).items():
            token[name][:, :free] = counts
        if self.shape.parallel:                 # tokens go after the MLP
            token["in_mlp"] = token["attended"].copy()
        every = self._tokens.ranked_by == "all"
        ranking = token.pop("ranks") * (self.shape.num_heads if every else kept["heads"])
        if self.read_out:
            token["queried"] = token["attended"].copy()
            if self.by_place:
                token["attended"][:, -1] = self.shape.num_tokens                # all are given back
            token["queried"][:, -1] = token["in_mlp"][:, -1] = self.shape.num_prefix_tokens
            ranking[:, -1] = 0
            for name in ("carried", "pooled", "compared", "merges", "reconstructs"):
                token[name][:, -1] = 0
        others = token["attended"] - self.shape.num_prefix_tokens
        turns = self.shape.rotary and not self.by_place
        merged = token["attended"] < self.shape.num_tokens
        token["turned"] = merged * others * (self.shape.num_patches if turns else 0)
        return Counts(**kept, **token, ranking=ranking, ranks_anew=(ranking > 0) & every)

    def gmacs(self, policies: np.ndarray) -> np.ndarray:
        """10^9 multiply-adds an image of the deployed model, everything counted (P)."""
        return macs_of(self.shape, self.counts(policies))["total"] / 1e9

    def keys(self, policies: np.ndarray) -> list[tuple[int, ...]]:
        """A tuple of counts per policy; equal for policies that are the same."""
        c = self.counts(policies)
        rows = np.concatenate([c.neurons, c.heads, c.widths, c.attended, c.in_mlp, c.carried], axis=1)
        return list(map(tuple, rows.tolist()))

    def even(self, policies: np.ndarray) -> np.ndarray:
        """Policies in coordinates (P, D) in which every count of units has an even share of [0, max_ratio].

        In ratios, any above 0 cuts a head, so that the policies that keep all heads of a block are a corner of the box
        and a draw never hits it; here they are one part in as many as there are counts. Token ratios stay.
        """
        units, tokens = self._split(policies)
        return np.concatenate([self._cut.even(units), tokens], axis=1)

    def from_even(self, points: np.ndarray) -> np.ndarray:
        """The policies (P, D) of even coordinates: each ratio in the middle of those with its count."""
        units, tokens = self._split(points)
        return np.concatenate([self._cut.from_even(units), tokens], axis=1)

    def steps(self, count: int) -> list[np.ndarray]:
        """Up to so many ratios of each dimension (D), ascending from 0 and evenly up to the most that may be cut; of
        units no count twice, each in its middle; then 1, where all of them may go."""
        even = np.repeat(np.linspace(0, self.max_ratio, count)[:, None], self.size, axis=1)
        columns = [np.unique(column) for column in replace(self, sublayers=False).from_even(even).T]
        return [np.append(column, 1.0) if most == 1 else column for column, most in zip(columns, self.most)]

    def features(self, policies: np.ndarray) -> np.ndarray:
        """What a model of the objective should see (P, D): even coordinates in [0, 1]."""
        return self.even(policies) / self.max_ratio

    def plan(self, policy: Sequence[float] | np.ndarray, *, heads: Tensor | None = None, neurons: Tensor | None = None,
             tokens: Tensor | None = None, nothing: Tensor | None = None,
             made_by: dict[str, Any] | None = None) -> CompressionPlan:
        """The plan of one policy: of heads (L, H) and neurons (L, M) those with the highest scores stay; raw token
        scores (L, n) where tokens are merged; nothing (L, 2): whether a block's attention, and its MLP, is replaced by
        0 where it is left out (None: none). Raises InputError where scores are missing or of another size."""
        policy = self.check(np.asarray(policy))
        require(len(policy) == 1, f"a plan is of one policy; {len(policy)} were given")
        counts, depth = self.counts(policy), self.shape.depth
        kept: dict[str, list] = {unit: [None] * depth for unit in UNITS}
        for unit, scores in (("heads", heads), ("neurons", neurons)):
            if unit not in self.units:
                continue
            total = getattr(self.shape, f"num_{unit}")
            given = None if scores is None else tuple(scores.shape)
            require(given == (depth, total),
                    f"{unit} are cut by their scores: {depth} blocks of {total} are needed, not {given}")
            finite = scores.isfinite().all(dim=1)
            require(finite.all(), f"scores of {unit} are not finite in block {int(finite.int().argmin())}")
            order = scores.argsort(dim=1, descending=True, stable=True).tolist()
            kept[unit] = [None if count == total else tuple(sorted(best[:count]))
                          for best, count in zip(order, getattr(counts, unit)[0].tolist())]
        widths = [None if width == self.shape.head_dim else width for width in counts.widths[0].tolist()]
        free = self.shape.before_queries
        tokens = tokens[:free] if tokens is not None and len(tokens) == depth else tokens       # others are refused
        rules = self._tokens.rules(policy[0, len(self._cut.total):], tokens, counts.heads[:, :free] > 0)
        rules += [None] * (depth - free)
        rules = [*rules[:-1], ReadOut()] if self.read_out else rules
        zeros = [(False, False)] * depth if nothing is None else nothing.tolist()
        blocks = tuple(BlockPlan(heads=h, neurons=m, qk_width=w, tokens=t, nothing=tuple(
            kind for kind, of, gone in (("heads", h, z[0]), ("neurons", m, z[1])) if gone and of == ()))
            for h, m, w, t, z in zip(kept["heads"], kept["neurons"], widths, rules, zeros))
        return CompressionPlan(shape=self.shape, blocks=blocks, made_by=made_by or {})

    def policy(self, plan: CompressionPlan) -> np.ndarray:
        """A policy (D) with the counts of the plan. Raises InputError where this space has none.

        Units have the middle of their ratios. Token ratios follow one after the other, as later blocks work on fewer
        tokens: of one ratio for every count that any number of tokens can have, the first with which most blocks are
        as in the plan, without a gap from the first on, if need be.
        """
        plan.check_fits(self.shape)
        wanted, found = counts_of(plan), np.zeros((1, self.size))
        units = np.array([getattr(wanted, unit) for unit in self.units]).flatten()
        found[:, :len(units)] = np.minimum(self._cut.middle(units), self._cut.most)
        n, most = np.arange(1, self.shape.num_tokens + 1), self.max_ratio
        edges = 1 - np.arange(len(n) + 1)[:, None] / n                          # where k of n tokens stay
        edges = np.unique([0, most, *edges[(edges >= 0) & (edges <= most)]])
        ratios = np.array([0, *(edges[1:] + edges[:-1]) / 2, most])
        for dimension in range(len(units), self.size):
            tried = np.repeat(found, len(ratios), axis=0)
            tried[:, dimension] = ratios
            given = vars(self.counts(tried))
            same = np.all([given[name] == value for name, value in vars(wanted).items()], axis=0)       # (R, L)
            from_first, depth = np.cumprod(same, axis=1).sum(axis=1), self.shape.depth
            found[:, dimension] = ratios[np.argmax(from_first * (depth + 1) + same.sum(axis=1))]
        given = vars(self.counts(found))
        for name, value in vars(wanted).items():
            for block in np.flatnonzero(given[name][0] != value):
                raise InputError(f"the plan is not in this search space: block {block} has {value[block]} {name}, "
                                 f"nearest is {given[name][0, block]}")
        return found[0]
