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
from vitlab.runtime.files import InputError

STAGES = 4                                      # blocks are grouped into as many stages where a ratio is per stage


def select_blocks(depth: int) -> tuple[int, ...]:
    """Blocks that select: a quarter, a half and three quarters through; 3, 6, 9 of 12 as published (methods B3)."""
    return tuple(sorted({depth * part // STAGES for part in range(1, STAGES)}))


def _whole(shape: ViTShape, policies: int) -> dict[str, np.ndarray]:
    """The counts of uncut tokens, each (P, L)."""
    size = (policies, shape.depth)
    return {"attended": np.full(size, shape.num_tokens), "in_mlp": np.full(size, shape.num_tokens),
            **{name: np.zeros(size, dtype=np.int64) for name in ("carried", "pooled", "compared")},
            **{name: np.zeros(size, dtype=bool) for name in ("merges", "reconstructs", "ranks")}}


@dataclass(frozen=True, kw_only=True)
class NoTokens:
    """All tokens stay."""

    shape: ViTShape

    @property
    def names(self) -> list[str]:
        return []

    def counts(self, ratios: np.ndarray) -> dict[str, np.ndarray]:
        """Ratios (P, 0) -> counts by name, each (P, L)."""
        return _whole(self.shape, len(ratios))

    def rules(self, ratios: np.ndarray, scores: Tensor | None) -> list[TokenRule | None]:
        """Token rule of each block for one policy's ratios (T)."""
        return [None] * self.shape.depth


@dataclass(frozen=True, kw_only=True)
class SelectTokens:
    """Selection by class attention (methods B3): K = int(N_now * (1 - rho)) tokens stay, and the mean of the others."""

    shape: ViTShape
    per_stage: bool = False
    ranked_by: str = "kept"

    def __post_init__(self) -> None:
        Select(kept=1, ranked_by=self.ranked_by)                                # refuses what no plan can have
        if not self.shape.class_token:
            raise InputError(f"tokens are selected {BY_CLASS_TOKEN}: match, share, merge or none is needed")

    @property
    def names(self) -> list[str]:
        blocks = select_blocks(self.shape.depth)
        return [f"tokens {block}" for block in blocks] if self.per_stage else ["tokens"]

    def _kept(self, ratios: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(block, tokens entering (P), tokens kept (P), prefix included) of each selection; where equal, none is:
        neither where K is all tokens, nor all but one, whose mean is itself."""
        steps, entering, prefix = [], np.full(len(ratios), self.shape.num_tokens), self.shape.num_prefix_tokens
        for index, block in enumerate(select_blocks(self.shape.depth)):
            kept = (entering * (1 - ratios[:, index if self.per_stage else 0])).astype(np.int64)
            kept = np.maximum(kept, prefix + 1)
            kept = np.where(kept >= entering - 1, entering, kept)
            steps.append((block, entering, kept))
            entering = np.where(kept < entering, kept + 1, entering)
        return steps

    def counts(self, ratios: np.ndarray) -> dict[str, np.ndarray]:
        """Ratios (P, T) -> counts by name, each (P, L)."""
        counts = _whole(self.shape, len(ratios))
        for block, entering, kept in self._kept(ratios):
            after = np.where(kept < entering, kept + 1, entering)
            counts["ranks"][:, block] = kept < entering
            counts["in_mlp"][:, block:] = after[:, None]
            counts["attended"][:, block + 1:] = after[:, None]
        return counts

    def rules(self, ratios: np.ndarray, scores: Tensor | None) -> list[TokenRule | None]:
        """Token rule of each block for one policy's ratios (T); scores are not needed, each image ranks its own
        tokens."""
        rules: list[TokenRule | None] = [None] * self.shape.depth
        for block, entering, kept in self._kept(ratios[None]):
            if kept[0] < entering[0]:
                rules[block] = Select(kept=int(kept[0]) - self.shape.num_prefix_tokens, ranked_by=self.ranked_by)
        return rules


@dataclass(frozen=True, kw_only=True)
class MergeTokens:
    """Prune and Merge with a keep rate for each block, stage or span: the int(n * (1 - ratio)) best patches are
    centers, and up to int(n * prune_rate) of the worst of the others skip the block (methods A3, rule `center`, a
    budget per block). In a span, which is merged before its first block and reconstructed after its last, the best are
    those of the mean of its normalised scores."""

    shape: ViTShape
    per: str = ""                   # "" (a block each), "stage" or "span"
    prune_rate: float = tokens.PRUNE_RATE
    boundary: str = tokens.BOUNDARY
    weights: str = tokens.WEIGHTS
    share: bool = False             # regions share the block's update (methods C1) instead of being merged by matrices
    # (first block, last block) each; () with "span": `tokens.even_spans`
    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.prune_rate < 1:
            raise InputError(f"prune_rate is {self.prune_rate}; it must lie in [0, 1)")
        for name, known in (("boundary", tokens.BOUNDARIES), ("weights", tokens.WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is not known; known are {sorted(known)}")
        depth = self.shape.depth
        if self.spans:
            tokens.check_spans(self.spans, depth, rated=False)
        spans = self.spans or tokens.even_spans(depth) if self.per == "span" else [(block, block)
                                                                                   for block in range(depth)]
        object.__setattr__(self, "spans", tuple(map(tuple, spans)))

    def _dimension(self) -> np.ndarray:
        """Which ratio each block takes (L), -1 for none."""
        depth, found = self.shape.depth, np.full(self.shape.depth, -1)
        if self.per == "stage":
            return np.arange(depth) * min(STAGES, depth) // depth
        for index, (first, last) in enumerate(self.spans):
            found[first:last + 1] = index
        return found

    @property
    def names(self) -> list[str]:
        firsts = [int(np.argmax(self._dimension() == d)) for d in range(self._dimension().max() + 1)]
        return [f"tokens {block}" for block in firsts]

    def _centers_pruned(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many patches are centers and how many are pruned, each (..., L)."""
        n, which = self.shape.num_patches, self._dimension()
        centers = np.maximum((n * (1 - np.where(which < 0, 0.0, ratios[..., which]))).astype(np.int64), 1)
        return centers, np.minimum(int(n * self.prune_rate), n - centers)

    def counts(self, ratios: np.ndarray) -> dict[str, np.ndarray]:
        """Ratios (P, T) -> counts by name, each (P, L)."""
        centers, pruned = self._centers_pruned(ratios)
        counts = _whole(self.shape, len(ratios))
        counts |= {"attended": centers + self.shape.num_prefix_tokens, "in_mlp": centers + self.shape.num_prefix_tokens}
        cut, n = centers < self.shape.num_patches, self.shape.num_patches
        if self.share:
            return counts | {"pooled": cut * (n - pruned)}
        begins, ends = (np.isin(np.arange(self.shape.depth), edges) for edges in zip(*self.spans))
        return counts | {"carried": pruned, "merges": cut & begins, "reconstructs": cut & ends}

    def rules(self, ratios: np.ndarray, scores: Tensor | None) -> list[TokenRule | None]:
        """Token rule of each block for one policy's ratios (T) by raw token scores (L, n). Raises InputError without
        them."""
        shape, n = self.shape, self.shape.num_patches
        if scores is None or tuple(scores.shape) != (shape.depth, n):
            raise InputError(f"merging needs token scores of {shape.depth} blocks of {n} patches, not "
                             f"{None if scores is None else tuple(scores.shape)}")
        rules: list[TokenRule | None] = [None] * shape.depth
        counts = [each.tolist() for each in self._centers_pruned(ratios)]
        for first, last in self.spans:
            row, (centers, pruned) = scores[first], (each[first] for each in counts)
            if last > first:
                row = tokens.normalise_scores(scores,
                                              tokens.decay_of("center", shape.depth))[first:last + 1].mean(dim=0)
            order = row.argsort(descending=True, stable=True)
            is_center, unpruned = zeros(n, dtype=bool), zeros(n, dtype=bool)
            is_center[order[:centers]] = True
            unpruned[order[:n - pruned]] = True
            rule = tokens.merge_rule(row, unpruned, is_center, columns=shape.grid_size[1], boundary=self.boundary,
                                     weights=self.weights)
            rules[first] = (tokens.shared(rule) if self.share
                            else rule and dataclasses.replace(rule, span=last + 1 - first))
        return rules


@dataclass(frozen=True, kw_only=True)
class MatchTokens:
    """Merging by content: int(n * (1 - ratio)) of a block's n tokens stay, and no less than half. One ratio for the
    middle half of the blocks, where merging costs least, or one for each stage or block."""

    shape: ViTShape
    per: str = ""                   # "", "stage" or "block"
    # of the rule `Match`; None: PROTECT where a class token can say what to protect, else 0
    protect: float | None = None

    def __post_init__(self) -> None:
        if self.protect is None:
            object.__setattr__(self, "protect", PROTECT if self.shape.class_token else 0.0)
        # refuses what no plan can have
        Match(merged=0, protect=self.protect).flow(self.shape, self.shape.num_tokens)

    def _dimension(self) -> np.ndarray:
        """Which ratio each block takes (L), -1 for none."""
        block, depth = np.arange(self.shape.depth), self.shape.depth
        if self.per == "block":
            return block
        if self.per == "stage":
            return block * min(STAGES, depth) // depth
        return np.where((block >= depth // 4) & (block < max(3 * depth // 4, 1)), 0, -1)

    @property
    def names(self) -> list[str]:
        dimension = self._dimension()
        return [f"tokens {np.argmax(dimension == d)}" if self.per else "tokens" for d in range(dimension.max() + 1)]

    def left(self, ratios: np.ndarray) -> np.ndarray:
        """Tokens (P, L + 1) that enter each block and leave the last, prefix tokens not counted."""
        left = np.empty((self.shape.depth + 1, len(ratios)), dtype=np.int64)
        left[0] = self.shape.num_patches
        for block, d in enumerate(self._dimension()):
            now = left[block]
            left[block + 1] = np.maximum((now * (1 - ratios[:, d])).astype(np.int64), now - now // 2) if d >= 0 else now
        return left.T

    def counts(self, ratios: np.ndarray) -> dict[str, np.ndarray]:
        """Ratios (P, T) -> counts by name, each (P, L)."""
        left, prefix = self.left(ratios), self.shape.num_prefix_tokens
        enter, merged = left[:, :-1], left[:, :-1] - left[:, 1:]
        targets, merges = enter // 2, merged > 0
        return _whole(self.shape, len(ratios)) | {
            "attended": enter + prefix, "in_mlp": left[:, 1:] + prefix,
            "compared": merges * ((enter - targets) * targets + enter + prefix), "pooled": merges * (merged + targets)}

    def rules(self, ratios: np.ndarray, scores: Tensor | None) -> list[TokenRule | None]:
        """Token rule of each block for one policy's ratios (T); scores are not needed, each image merges its own
        tokens."""
        merged = (-np.diff(self.left(ratios[None])[0])).tolist()
        return [Match(merged=count, protect=self.protect) if any(merged[:block + 1]) else None for block,
                count in enumerate(merged)]


_EACH = {"spans": ()}                           # blocks that are merged each for itself
_SHARED = {"share": True, "weights": "uniform", **_EACH}
TOKEN_DIMENSIONS = {                            # the class, and what a name fixes of its settings
    "none": (NoTokens, {}), "match": (MatchTokens, {}), "match_per_stage": (MatchTokens, {"per": "stage"}),
    "match_per_block": (MatchTokens, {"per": "block"}),
    "select": (SelectTokens, {}), "select_per_stage": (SelectTokens, {"per_stage": True}),
    "merge": (MergeTokens, _EACH), "merge_per_stage": (MergeTokens, {"per": "stage", **_EACH}),
    "merge_per_span": (MergeTokens, {"per": "span"}),
    "share": (MergeTokens, _SHARED), "share_per_stage": (MergeTokens, {"per": "stage", **_SHARED})}


def default_tokens(shape: ViTShape) -> str:
    """The token dimensions of a search that names none: selection where a class token ranks tokens and no decoder needs
    them all, else merging by content, which every model can have."""
    return "select" if shape.class_token and not shape.decoder else "match"


def token_dimensions(name: str, shape: ViTShape,
                     settings: dict[str, Any]) -> NoTokens | SelectTokens | MergeTokens | MatchTokens:
    """By name, with the class's own settings. Raises InputError for an unknown one."""
    if name not in TOKEN_DIMENSIONS:
        raise InputError(f"tokens {name!r} is not known; known are {sorted(TOKEN_DIMENSIONS)}")
    kind, fixed = TOKEN_DIMENSIONS[name]
    known = set(kind.__dataclass_fields__) - {"shape", "per", "per_stage", "share", *fixed}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InputError(f"tokens {name!r} takes no {unknown[0]!r}; it takes {sorted(known) or 'no setting'}")
    return kind(shape=shape, **fixed, **settings)
