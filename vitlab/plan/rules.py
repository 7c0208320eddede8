"""Token rules: how a block's tokens are taken in and given back, as checked plain data. One small class a rule.

`flow(shape, entering)` says what a rule makes of the tokens that reach its block, or why it can't. `before`: what a
file means that has no word of a field, as files were before there was one.
"""
from dataclasses import dataclass

import numpy as np

from vitlab.plan.shape import POOL_TOKEN, ViTShape, is_int, is_number
from vitlab.runtime.files import InputError, require

LARGEST = 3e38                              # about that of a float32
ROUNDING = 1e-4                             # of weights that sum to 1, in float32 over a thousand patches
TRAINABLE = ("all", "matrices", "weights")  # of a model with such rules, what a training may change
PROTECT = 0.1                               # measured: docs/off_the_shelf.md
BY_CLASS_TOKEN = "by the class token's attention; the model has no class token"


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Token counts of one block, prefix tokens included."""

    attended: int                   # in the attention
    in_mlp: int                     # in the MLP
    carried: int                    # that go around the block
    after: int                      # that reach the next block
    queried: int | None = None      # of those in the attention, the ones that ask; None: all
    pooled: int = 0                 # rows scaled for a weighted mean, and for what tokens keep of their own stream
    merges: bool = False            # whether a merge matrix stands before the block
    reconstructs: bool = False      # whether a reconstruct matrix stands after it
    matched: bool = False           # whether tokens may stand for several patches from here on
    compared: int = 0               # pairs of tokens whose keys are multiplied, to find those that are alike
    turned: int = 0                 # pairs of a patch and the merged token that takes its rotation over
    ranked_by: str = ""             # heads whose attention ranks tokens before the MLP: "kept", "all"; "": no ranking


def whole(entering: int) -> Flow:
    """The flow of a block without a token rule."""
    return Flow(attended=entering, in_mlp=entering, carried=0, after=entering)


@dataclass(frozen=True, kw_only=True)
class _Regions:
    """What rules share whose patches go into regions by their place."""

    regions: tuple[int, ...]        # per patch: which token it goes into, from 0 without a gap; -1: none, it is pruned
    weights: tuple[float, ...]      # per patch: its weight in that token

    before = {}

    @property
    def num_merged(self) -> int:
        """How many tokens the patches become (prefix tokens not counted)."""
        return max(self.regions, default=-1) + 1

    @property
    def members(self) -> list[list[int]]:
        """The patches of each region."""
        found: list[list[int]] = [[] for _ in range(self.num_merged)]
        for patch, region in enumerate(self.regions):
            if region >= 0:
                found[region].append(patch)
        return found

    def _check_regions(self, low: float, high: float, what: str) -> None:
        """InputError where regions and weights, from low to high, are not one of each per patch, or regions are not
        numbered without a gap."""
        n = len(self.regions)
        require(n == len(self.weights), f"{n} regions but {len(self.weights)} weights; one of each per patch is needed")
        require(all(is_int(r) and r >= -1 for r in self.regions), "regions must be integers of at least -1")
        require(self.num_merged <= n and set(self.regions) - {-1} == set(range(self.num_merged)),
                f"regions must be numbered 0 to {self.num_merged - 1} without a gap")
        require(all(is_number(w, low, high) for w in self.weights), f"weights must be {what}")
        object.__setattr__(self, "regions", tuple(self.regions))
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))

    def _tokens(self, shape: ViTShape, entering: int, what: str) -> int:
        """Tokens in the block. InputError where the rule is for other patches, or a block before has selected."""
        require(len(self.regions) == shape.num_patches,
                f"tokens.regions has {len(self.regions)} entries; the model has {shape.num_patches} patches")
        require(entering == shape.num_tokens,
                f"tokens {what} by their place, but only {entering} of {shape.num_tokens} come in: a block before has "
                "selected")
        return shape.num_prefix_tokens + self.num_merged


@dataclass(frozen=True, kw_only=True)
class MergeReconstruct(_Regions):
    """Token rule of Prune and Merge: merge before the block, reconstruct after it (methods A4 to A6), or, with a
    `span`, after the last of so many blocks: those between run on the merged tokens, and have no rule of their own.

    Weights are the merge matrix's starting values, 0 where pruned; trained matrices live in the checkpoint.
    """

    pruned: tuple[int, ...] = ()        # patches that skip the block, or the whole span, ascending
    trains: str = "both"                # "both" matrices or "reconstruct" alone
    span: int = 1                       # blocks that run on the merged tokens, this one the first

    kind = "merge_reconstruct"
    before = {"span": 1}

    def __post_init__(self) -> None:
        self._check_regions(-LARGEST, LARGEST, "finite numbers")
        n, pruned = len(self.regions), set(self.pruned)
        require(all(is_int(j) and 0 <= j < n for j in self.pruned) and list(self.pruned) == sorted(pruned),
                f"pruned must be patches from 0 to {n - 1}, ascending without repeats")
        for j, (region, weight) in enumerate(zip(self.regions, self.weights)):
            require(j in pruned or region >= 0, f"patch {j} is in no region and not pruned")
            require(j not in pruned or weight == 0, f"patch {j} is pruned; its weight must be 0, not {weight}")
        require(self.trains in ("both", "reconstruct"), f"trains is {self.trains!r}; 'both' or 'reconstruct' is needed")
        require(is_int(self.span) and self.span >= 1, f"span is {self.span!r}; an integer of at least 1 is needed")
        object.__setattr__(self, "pruned", tuple(self.pruned))

    def flow(self, shape: ViTShape, entering: int) -> Flow:
        """InputError where the rule is for another number of patches, or a block before has selected tokens."""
        self._tokens(shape, entering, "are merged")
        return self.inside(shape, 0)

    def inside(self, shape: ViTShape, place: int) -> Flow:
        """The flow of the span's block number `place`, from 0."""
        tokens, last = shape.num_prefix_tokens + self.num_merged, place + 1 == self.span
        return Flow(attended=tokens, in_mlp=tokens, carried=len(self.pruned),
                    after=shape.num_tokens if last else tokens, merges=not place, reconstructs=last)


@dataclass(frozen=True, kw_only=True)
class SharedUpdate(_Regions):
    """Token rule of methods C1: the tokens of a region go through the block as their mean, and share its update.

    y_j = z_c + u_c + own * (x_j - z_c), z_c the weighted mean of region c and u_c = Block(z)_c - z_c: with own = 1
    every token keeps its own stream, with 0 all of a region become one. Weights sum to 1 in each region. No matrices; a
    region of one token is the plain block.
    """

    own: float = 1.0                    # how much of its own stream a token keeps, [0, 1]
    proportional: bool = False          # whether a region counts in the attention as often as it has tokens

    kind = "shared_update"

    def __post_init__(self) -> None:
        self._check_regions(0, 1, "numbers from 0 to 1")
        sums = np.bincount(np.array(self.regions, dtype=int) + 1, self.weights, self.num_merged + 1)[1:]
        for region in np.flatnonzero(abs(sums - 1) > ROUNDING):
            raise InputError(f"the weights of region {region} sum to {sums[region]:.6g}; 1 is needed")
        require(is_number(self.own, 0, 1), f"own is {self.own!r}; a number from 0 to 1 is needed")
        require(isinstance(self.proportional, bool), f"proportional is {self.proportional!r}; true or false is needed")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each region."""
        return tuple(self.regions.count(region) for region in range(self.num_merged))

    @property
    def pruned(self) -> tuple[int, ...]:
        """Patches that skip the block."""
        return tuple(j for j, region in enumerate(self.regions) if region < 0)

    def flow(self, shape: ViTShape, entering: int) -> Flow:
        """InputError where the rule is for another number of patches, or a block before has selected tokens."""
        tokens = self._tokens(shape, entering, "share an update")
        return Flow(attended=tokens, in_mlp=tokens, carried=0, after=entering,
                    pooled=(shape.num_patches - len(self.pruned)) * (1 if self.own in (0, 1) else 2))


@dataclass(frozen=True, kw_only=True)
class Select:
    """Token rule of methods B3: between attention and MLP the tokens that the class token attends to most stay, each
    image its own, and one token that is the plain mean of the others is appended."""

    kept: int                       # tokens that stay by rank, prefix tokens not counted
    ranked_by: str = "kept"         # heads whose attention is averaged; "all": cut ones too, as published, where heads
                                    # are masked

    kind = "select"
    before = {}

    def __post_init__(self) -> None:
        require(self.ranked_by in ("kept", "all"), f"ranked_by is {self.ranked_by!r}; 'kept' or 'all' is needed")
        require(is_int(self.kept) and self.kept >= 1, f"kept is {self.kept!r}; an integer of at least 1 is needed")

    def flow(self, shape: ViTShape, entering: int) -> Flow:
        """InputError where not even two tokens would go (the mean of one is that one), or there is no class token."""
        require(shape.class_token,
                f"tokens are selected {BY_CLASS_TOKEN}: a rule that merges, such as match, is needed")
        require(not shape.rotary, "selected tokens would lose the places by which this model turns queries and keys: a "
                "rule that merges, such as match, is needed")
        others = entering - shape.num_prefix_tokens
        require(self.kept <= others - 2, f"{self.kept} tokens are kept; at most {others - 2} of the {others} that come "
                "in beside the prefix tokens is needed: two at least must go, as one takes their place")
        after = shape.num_prefix_tokens + self.kept + 1
        return Flow(attended=entering, in_mlp=entering if shape.parallel else after, carried=0, after=after,
                    ranked_by=self.ranked_by)


@dataclass(frozen=True, kw_only=True)
class Match:
    """Token rule that merges by content, each image its own tokens (arXiv 2210.09461): between attention and MLP,
    tokens with alike keys become one, weighted by how many patches they stand for. From its first block on, every block
    has this rule (the last may read out)."""

    merged: int                     # tokens that go, 0 where the block only takes over what those before have merged
    protect: float = PROTECT        # what the class token's attention, 1 where even, counts against being merged
    by_size: bool = True            # whether tokens that stand for many patches count as less alike

    kind = "match"
    before = {"by_size": False}

    def __post_init__(self) -> None:
        require(is_int(self.merged) and self.merged >= 0,
                f"merged is {self.merged!r}; an integer of at least 0 is needed")
        require(is_number(self.protect, 0, LARGEST), f"protect is {self.protect!r}; a number of at least 0 is needed")
        require(isinstance(self.by_size, bool), f"by_size is {self.by_size!r}; true or false is needed")

    def flow(self, shape: ViTShape, entering: int) -> Flow:
        """InputError where more than half of the tokens would go: every other one is there to be merged into."""
        count = entering - shape.num_prefix_tokens
        require(self.merged <= count // 2,
                f"{self.merged} tokens are merged; at most half of the {count} beside the prefix tokens can be")
        require(not self.protect or shape.class_token, f"tokens are protected {BY_CLASS_TOKEN}: protect 0 is needed")
        after, sources, targets = entering - self.merged, count - count // 2, count // 2
        turned = shape.num_patches * count if shape.rotary and entering < shape.num_tokens else 0
        return Flow(attended=entering, in_mlp=entering if shape.parallel else after, carried=0, after=after,
                    matched=True, turned=turned,
                    compared=sources * targets + entering if self.merged else 0,
                    pooled=self.merged + targets if self.merged else 0)


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """Token rule of a last block that computes what the classifier reads, and no more: all tokens are attended to, but
    the prefix tokens alone ask and go on. Exact for class-token pooling: what it leaves out, nothing looks at."""

    kind = "read_out"
    before = {}

    def flow(self, shape: ViTShape, entering: int) -> Flow:
        """InputError for a model that pools other tokens too."""
        require(shape.pool == POOL_TOKEN and shape.num_prefix_tokens > 0,
                f"only prefix tokens are read out, but the model pools by {shape.pool!r}; {POOL_TOKEN!r} is needed")
        prefix, merged = shape.num_prefix_tokens, entering < shape.num_tokens
        return Flow(attended=entering, queried=prefix, in_mlp=prefix, carried=0, after=prefix,
                    turned=shape.num_patches * (entering - prefix) if shape.rotary and merged else 0)


TOKEN_RULES = {rule.kind: rule for rule in (MergeReconstruct, SharedUpdate, Select, Match, ReadOut)}
TokenRule = MergeReconstruct | SharedUpdate | Select | Match | ReadOut
