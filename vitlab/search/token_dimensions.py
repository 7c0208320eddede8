"""The token dimensions of a policy: how many ratios, what each does to the counts, and the token rules they stand for.

A ratio is the fraction cut, as for heads and neurons; 0 changes nothing. P policies, T ratios, L blocks, n patches.
"""
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, zeros

from vitlab.plan import tokens
from vitlab.plan.rules import BY_CLASS_TOKEN, PROTECT, Match, Select, TokenRule
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError, check_known, require

STAGES = 4                      # of as equal a length as can be, where a ratio is per stage; it ends selection's too


def select_blocks(depth: int) -> list[int]:
    """Blocks that select: a quarter, a half and three quarters through; 3, 6, 9 of 12 as published (methods B3)."""
    return sorted({depth * part // STAGES for part in range(1, STAGES)})


@dataclass(frozen=True, kw_only=True)
class NoTokens:
    """All tokens stay. What the others share: a ratio for all blocks they cut, or one per stage, block or span."""

    shape: ViTShape
    per: str = ""                   # "", "stage", "block" or "span", as TOKEN_DIMENSIONS says

    ranked_by = "kept"              # of the rule `Select`

    def dimension(self) -> np.ndarray:
        """Which ratio each block takes (L), -1 for none."""
        block, depth = np.arange(self.shape.depth), self.shape.depth
        if self.per == "block":
            return block
        return block * min(STAGES, depth) // depth if self.per == "stage" else np.full(depth, -1)

    @property
    def names(self) -> list[str]:
        """Of the ratios: "tokens", or "tokens" and the first block that takes it."""
        which = self.dimension()
        return [f"tokens {np.argmax(which == d)}" if self.per else "tokens" for d in range(which.max() + 1)]

    def counts(self, ratios: np.ndarray, attends: np.ndarray) -> dict[str, np.ndarray]:
        """Ratios (P, T) -> counts by name, each (P, L). attends (P, L): whether a block has an attention; where it has
        none, nothing is selected or matched."""
        size = (len(ratios), self.shape.depth)
        return {"attended": np.full(size, self.shape.num_tokens), "in_mlp": np.full(size, self.shape.num_tokens),
                **{name: np.zeros(size, dtype=np.int64) for name in ("carried", "pooled", "compared")},
                **{name: np.zeros(size, dtype=bool) for name in ("merges", "reconstructs", "ranks")}}

    def rules(self, ratios: np.ndarray, scores: Tensor | None, attends: np.ndarray) -> list[TokenRule | None]:
        """Token rule of each block for one policy's ratios (T); raw token scores (L, n) where tokens go by their
        place; attends (1, L) as above. Raises InputError where these are needed and missing."""
        return [None] * self.shape.depth


@dataclass(frozen=True, kw_only=True)
class SelectTokens(NoTokens):
    """Selection by class attention (methods B3): K = int(N_now * (1 - rho)) tokens stay, and the mean of the others."""

    ranked_by: str = "kept"

    def __post_init__(self) -> None:
        Select(kept=1, ranked_by=self.ranked_by)                                # refuses what no plan can have
        require(self.shape.class_token, f"tokens are selected {BY_CLASS_TOKEN}: match, share, merge or none is needed")

    def dimension(self) -> np.ndarray:
        which, blocks = np.full(self.shape.depth, -1), select_blocks(self.shape.depth)
        which[blocks] = range(len(blocks)) if self.per else 0
        return which

    def _kept(self, ratios: np.ndarray, attends: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(block, tokens entering (P), tokens kept (P), prefix included) of each selection; where equal, none is:
        neither where K is all tokens, nor all but one, whose mean is itself."""
        steps, entering, which = [], np.full(len(ratios), self.shape.num_tokens), self.dimension()
        for block in select_blocks(self.shape.depth):
            kept = (entering * (1 - ratios[:, which[block]])).astype(np.int64)
            kept = np.maximum(kept, self.shape.num_prefix_tokens + 1)
            kept = np.where((kept >= entering - 1) | ~attends[:, block], entering, kept)
            steps.append((block, entering, kept))
            entering = np.where(kept < entering, kept + 1, entering)
        return steps

    def counts(self, ratios: np.ndarray, attends: np.ndarray) -> dict[str, np.ndarray]:
        counts = super().counts(ratios, attends)
        for block, entering, kept in self._kept(ratios, attends):
            counts["ranks"][:, block] = kept < entering
            counts["in_mlp"][:, block:] = np.where(kept < entering, kept + 1, entering)[:, None]
            counts["attended"][:, block + 1:] = counts["in_mlp"][:, [block]]
        return counts

    def rules(self, ratios: np.ndarray, scores: Tensor | None, attends: np.ndarray) -> list[TokenRule | None]:
        rules: list[TokenRule | None] = [None] * self.shape.depth
        for block, (entering,), (kept,) in self._kept(ratios[None], attends):
            if kept < entering:
                rules[block] = Select(kept=int(kept) - self.shape.num_prefix_tokens, ranked_by=self.ranked_by)
        return rules


@dataclass(frozen=True, kw_only=True)
class MergeTokens(NoTokens):
    """Prune and Merge with a keep rate for each block, stage or span: the int(n * (1 - ratio)) best patches are
    centers, and up to int(n * prune_rate) of the worst of the others skip the block (methods A3, rule `center`, a
    budget per block). In a span, which is merged before its first block and reconstructed after its last, the best are
    those of the mean of its normalised scores."""

    per: str = "block"
    prune_rate: float = tokens.PRUNE_RATE
    boundary: str = tokens.BOUNDARY
    weights: str = tokens.WEIGHTS
    share: bool = False             # regions share the block's update (methods C1) instead of being merged by matrices
    spans: tuple[tuple[int, int], ...] = ()     # (first block, last block) each; () with "span": `tokens.even_spans`

    def __post_init__(self) -> None:
        depth = self.shape.depth
        require(0 <= self.prune_rate < 1, f"prune_rate is {self.prune_rate}; it must lie in [0, 1)")
        check_known("boundary", self.boundary, tokens.BOUNDARIES)
        check_known("weights", self.weights, tokens.WEIGHTINGS)
        if self.spans:
            tokens.check_spans(self.spans, depth, rated=False)
        spans = self.spans or tokens.even_spans(depth) if self.per == "span" else zip(range(depth), range(depth))
        object.__setattr__(self, "spans", tuple(map(tuple, spans)))

    def dimension(self) -> np.ndarray:
        which = super().dimension()
        for index, (first, last) in enumerate(self.spans if self.per == "span" else ()):
            which[first:last + 1] = index
        return which

    def _centers_pruned(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many patches are centers and how many are pruned, each (..., L)."""
        n, which = self.shape.num_patches, self.dimension()
        centers = np.maximum((n * (1 - np.where(which < 0, 0.0, ratios[..., which]))).astype(np.int64), 1)
        return centers, np.minimum(int(n * self.prune_rate), n - centers)

    def counts(self, ratios: np.ndarray, attends: np.ndarray) -> dict[str, np.ndarray]:
        (centers, pruned), n = self._centers_pruned(ratios), self.shape.num_patches
        inside, cut = centers + self.shape.num_prefix_tokens, centers < n
        counts = super().counts(ratios, attends) | {"attended": inside, "in_mlp": inside.copy()}
        if self.share:
            return counts | {"pooled": cut * (n - pruned)}
        begins, ends = (np.isin(np.arange(self.shape.depth), edges) for edges in zip(*self.spans))
        return counts | {"carried": pruned, "merges": cut & begins, "reconstructs": cut & ends}

    def rules(self, ratios: np.ndarray, scores: Tensor | None, attends: np.ndarray) -> list[TokenRule | None]:
        depth, n = self.shape.depth, self.shape.num_patches
        given = None if scores is None else tuple(scores.shape)
        if scores is None or given != (depth, n):
            raise InputError(f"merging needs token scores of {depth} blocks of {n} patches, not {given}")
        rules: list[TokenRule | None] = [None] * depth
        centers, pruned = (each.tolist() for each in self._centers_pruned(ratios))
        for first, last in self.spans:
            row = scores[first]
            if last > first:
                normal = tokens.normalise_scores(scores, tokens.decay_of("center", depth))
                row = normal[first:last + 1].mean(dim=0)
            order = row.argsort(descending=True, stable=True)
            is_center, unpruned = zeros(n, dtype=bool), zeros(n, dtype=bool)
            is_center[order[:centers[first]]] = True
            unpruned[order[:n - pruned[first]]] = True
            rule = tokens.merge_rule(row, unpruned, is_center, columns=self.shape.grid_size[1], boundary=self.boundary,
                                     weights=self.weights)
            rules[first] = (tokens.shared(rule) if self.share
                            else rule and dataclasses.replace(rule, span=last + 1 - first))
        return rules


@dataclass(frozen=True, kw_only=True)
class MatchTokens(NoTokens):
    """Merging by content: int(n * (1 - ratio)) of a block's n tokens stay, and no less than half. One ratio for the
    middle half of the blocks, where merging costs least, or one for each stage or block."""

    protect: float | None = None    # of the rule `Match`; None: PROTECT where a class token can say so, else 0

    def __post_init__(self) -> None:
        if self.protect is None:
            object.__setattr__(self, "protect", PROTECT if self.shape.class_token else 0.0)
        Match(merged=0, protect=self.protect).flow(self.shape, self.shape.num_tokens)  # refuses what no plan can have

    def dimension(self) -> np.ndarray:
        which, depth = super().dimension(), self.shape.depth
        which[depth // 4:max(3 * depth // 4, 1)] += not self.per                # -1 becomes 0
        return which

    def left(self, ratios: np.ndarray, attends: np.ndarray) -> np.ndarray:
        """Tokens (P, L + 1) that enter each block and leave the last, prefix tokens not counted."""
        left = [np.full(len(ratios), self.shape.num_patches)]
        for block, d in enumerate(self.dimension()):
            now = left[-1]
            fewer = np.maximum((now * (1 - ratios[:, d])).astype(np.int64), now - now // 2) if d >= 0 else now
            left.append(np.where(attends[:, block], fewer, now))
        return np.stack(left, axis=1)

    def counts(self, ratios: np.ndarray, attends: np.ndarray) -> dict[str, np.ndarray]:
        left, prefix = self.left(ratios, attends), self.shape.num_prefix_tokens
        enter, merged = left[:, :-1], left[:, :-1] - left[:, 1:]
        targets, merges = enter // 2, merged > 0
        return super().counts(ratios, attends) | {
            "attended": enter + prefix, "in_mlp": left[:, 1:] + prefix,
            "compared": merges * ((enter - targets) * targets + enter + prefix), "pooled": merges * (merged + targets)}

    def rules(self, ratios: np.ndarray, scores: Tensor | None, attends: np.ndarray) -> list[TokenRule | None]:
        merged = (-np.diff(self.left(ratios[None], attends)[0])).tolist()
        return [Match(merged=count, protect=self.protect) if any(merged[:block + 1]) else None
                for block, count in enumerate(merged)]


_STAGE, _SHARED = {"per": "stage"}, {"share": True, "weights": "uniform"}
_EACH = {"spans": ()}                           # blocks that are merged each for itself
TOKEN_DIMENSIONS = {                            # the class, and what a name fixes of its settings
    "none": (NoTokens, {}), "match": (MatchTokens, {}), "match_per_stage": (MatchTokens, _STAGE),
    "match_per_block": (MatchTokens, {"per": "block"}),
    "select": (SelectTokens, {}), "select_per_stage": (SelectTokens, _STAGE),
    "merge": (MergeTokens, _EACH), "merge_per_stage": (MergeTokens, _STAGE | _EACH),
    "merge_per_span": (MergeTokens, {"per": "span"}),
    "share": (MergeTokens, _SHARED | _EACH), "share_per_stage": (MergeTokens, _STAGE | _SHARED | _EACH)}


def default_tokens(shape: ViTShape) -> str:
    """The token dimensions of a search that names none: selection where a class token ranks tokens and they need not
    all be there at the end, nor keep their places, else merging by content, which every model can have."""
    return "select" if shape.class_token and not shape.needs_grid and not shape.rotary else "match"


def token_dimensions(name: str, shape: ViTShape, settings: dict[str, Any]) -> NoTokens:
    """By name, with the class's own settings. Raises InputError for an unknown one."""
    check_known("tokens", name, TOKEN_DIMENSIONS)
    kind, fixed = TOKEN_DIMENSIONS[name]
    known = sorted(set(kind.__dataclass_fields__) - {"shape", "per", "share", *fixed})
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InputError(f"tokens {name!r} takes no {unknown[0]!r}; it takes {known or 'no setting'}")
    return kind(shape=shape, **fixed, **settings)
