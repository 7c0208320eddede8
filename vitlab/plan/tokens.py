"""Choosing, merging and reconstructing tokens, as pure functions.

*Efficient Token Compression for Vision Transformer with Spatial Information Preserved* (arXiv 2503.23455),
written as methods A2 to A5 and A7 number them. n patches in raster order on a grid, P prefix tokens before them,
N = P + n tokens, C tokens after merging (prefix included).
"""
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.fx
from torch import Tensor

from vitlab.plan.rules import MergeReconstruct, SharedUpdate
from vitlab.plan.shape import ViTShape, is_int
from vitlab.runtime.files import InputError, check_known, require

DECAY, DECAY_DEPTH = {"center": 0.025, "merge": 0.015}, 12      # published, per block (A2), in as many blocks
PRUNE_RATE, KEEP_RATE = 0.1, 0.6                # published settings
BOUNDARY, WEIGHTS = "grid", "score"             # the better ones on measured accuracy: docs/prune_and_merge.md
SPANS = 3                                       # of blocks that run on the same merged tokens


def patch_distances(shape: ViTShape) -> Tensor:
    """(n, n) float64 in pixels, between the centres of the patches."""
    centres = torch.cartesian_prod(*(torch.arange(count) * side for count, side in
                                     zip(shape.grid_size, shape.patch_size))).double()
    return torch.cdist(centres, centres)


def even_spans(depth: int) -> list[tuple[int, int]]:
    """(first, last) blocks of SPANS spans of as equal a length as can be, after the first sixth of the blocks, which
    stay whole: what is alike is not known there yet."""
    edges = np.linspace(depth // 6, depth, min(SPANS, depth - depth // 6) + 1).round().astype(int).tolist()
    return [(first, after - 1) for first, after in zip(edges, edges[1:])]


def check_spans(spans: Sequence[Sequence[float]], depth: int, rated: bool = True) -> None:
    """InputError naming the span that is no (first block, last block, keep rate), or without the rate where not
    `rated`, out of the model, or not after the one before."""
    form = "(first block, last block, keep rate)" if rated else "(first block, last block)"
    require(len(spans) > 0, f"no span is given; {form} of one at least is needed")
    end = -1
    for span in spans:
        require(isinstance(span, (tuple, list)) and len(span) == 2 + rated and is_int(span[0]) and is_int(span[1])
                and isinstance(span[-1], (int, float)) and not isinstance(span[-1], bool),
                f"span {span!r} is not {form}")
        first, last = span[:2]
        require(0 <= first <= last < depth,
                f"span {first}-{last}: its blocks must lie from 0 to {depth - 1}, the first not after the last")
        require(first > end, f"span {first}-{last} begins before the one that ends with block {end} is over; spans "
                             "must ascend and have no block in common")
        end = last


def decay_of(rule: str, depth: int) -> float:
    """The published decay per block of a rule; where there are other than 12 blocks, the one with which the last
    block's factor is theirs, 1 - 11 * 0.025 = 0.725 (center): decay * 11 / (depth - 1). One block has none. Raises
    InputError for an unknown rule."""
    check_known("rule", rule, DECAY)
    return DECAY[rule] * ((DECAY_DEPTH - 1) / (depth - 1)) if depth > 1 else 0.0


def normalise_scores(scores: Tensor, decay: float) -> Tensor:
    """s_l <- s_l / ||s_l||_2 * (1 - decay * l)   (A2). scores (L, n), not negative; returns (L, n).

    Raises InputError naming the block where scores are not finite, negative or all zero.
    """
    for block, row in enumerate(scores):
        if not torch.isfinite(row).all() or (row < 0).any() or not row.any():
            raise InputError(f"token scores of block {block} must be finite, not negative and not all zero")
    layers = torch.arange(len(scores), dtype=scores.dtype, device=scores.device)[:, None]
    require(decay >= 0 and decay * (len(scores) - 1) < 1,
            f"decay is {decay}; with {len(scores)} blocks it must lie in [0, {1 / max(1, len(scores) - 1):.4g})")
    return scores / scores.norm(dim=1, keepdim=True) * (1 - decay * layers)


def choose(scores: Tensor, *, rule: str = "center", keep_rate: float = KEEP_RATE, prune_rate: float = PRUNE_RATE,
           ) -> tuple[Tensor, Tensor]:
    """Which patches take part in each block, and which of them are centers (A3).

    scores (L, n), normalised; keep_rate in (0, 1], prune_rate in [0, 1), fractions of n. Rule "center" has one budget
    for all blocks, so each finds its own count; rule "merge" has one per block.
    Returns unpruned (L, n) and centers (L, n), bool; centers are unpruned. A block that would be left with unpruned
    patches but no center gets its best-scoring one, since every unpruned patch needs a row to go into.
    """
    depth, n = scores.shape
    check_known("rule", rule, DECAY)
    require(0 <= prune_rate < 1, f"prune_rate is {prune_rate}; it must lie in [0, 1)")
    n_prune, n_keep = int(n * prune_rate), int(n * keep_rate) if 0 < keep_rate <= 1 else 0
    require(n_keep >= 1, f"keep_rate is {keep_rate}; with {n} patches it must lie in [{1 / n:.4g}, 1]")
    if rule == "center":
        ordered = scores.flatten().sort().values
        prune_threshold, keep_threshold = ordered[n_prune * depth], ordered[-n_keep * depth]
    else:
        ordered = scores.sort(dim=1).values                                     # (L, n)
        prune_threshold, keep_threshold = ordered[:, n_prune, None], ordered[:, -n_keep, None]
    unpruned = scores >= prune_threshold
    centers = unpruned & (scores >= keep_threshold)
    lonely = unpruned.any(dim=1) & ~centers.any(dim=1)
    centers[lonely, (scores * unpruned).argmax(dim=1)[lonely]] = True           # the best-scoring one
    return unpruned, centers


def _regions_reference(centers: Tensor, n: int, columns: int) -> Tensor:
    """Raster runs from center to center, the published boundary (A4). The line of a center is taken from its token
    index (c + 1), class token first: that off-by-one is the published code's, and kept because results rest on it."""
    begins = torch.zeros(n, dtype=torch.long)
    for center, following in pairwise(centers.tolist()):
        middle, next_line = (center + following + 1) // 2, ((center + 1) // columns + 1) * columns      # rounded up
        begins[min(middle, next_line)] = 1
    return begins.cumsum(dim=0)


def _regions_grid(centers: Tensor, n: int, columns: int) -> Tensor:
    """Every patch to the center nearest on the grid (Voronoi cells); a tie goes to the first in raster."""
    patch = torch.arange(n)
    dy = patch[:, None] // columns - centers // columns                         # (n, C)
    dx = patch[:, None] % columns - centers % columns
    return (dy * dy + dx * dx).argmin(dim=1)


def _regions_runs(centers: Tensor, unpruned: Tensor, keep_empty: bool) -> Tensor:
    """Rule `merge`: each center alone, and each run of patches between centers together (A4). A run in which every
    patch is pruned is a row of zeros in the published code (keep_empty), which attention still sees as a token."""
    begins = torch.zeros(len(unpruned) + 1, dtype=torch.long)
    begins[centers] = begins[centers + 1] = 1                                   # a center, and what follows one
    runs = begins[:-1].cumsum(dim=0) - begins[0]
    there = torch.zeros(int(runs.max()) + 1, dtype=torch.bool)
    there[runs if keep_empty else runs[unpruned]] = True
    return torch.where(there[runs], (there.cumsum(dim=0) - 1)[runs], -1)


BOUNDARIES = {"reference": _regions_reference, "grid": _regions_grid}
WEIGHTINGS = ("reference", "score", "uniform")


def _weights(scores: Tensor, unpruned: Tensor, centers: Tensor, regions: Tensor, rule: str, weights: str) -> Tensor:
    """The entry of each patch in the row of its region (n), 0 where pruned; where all scores of a region are 0, the
    plain mean's."""
    slot = regions.clamp(min=0)

    def per_region(values: Tensor) -> Tensor:
        """Sum over each region's unpruned patches, given back to all its patches: (n) -> (n)."""
        sums = torch.zeros(int(regions.max()) + 1, dtype=torch.double)
        return sums.index_add_(0, slot[unpruned], values[unpruned].double())[slot]
    t = torch.where(unpruned, scores, 0).double()
    total, entry = per_region(t), 1 / per_region(torch.ones(len(t)))
    if weights != "uniform":
        divisor = total
        if weights == "reference":                                              # regions are numbered by their center
            divisor = t[centers][slot] if rule == "center" else total / per_region(t > 0)
        entry = torch.where(total > 0, t / torch.where(total > 0, divisor, 1), entry)
    return torch.where(unpruned, entry, 0)


def merge_rule(scores: Tensor, unpruned: Tensor, centers: Tensor, *, columns: int, rule: str = "center",
               boundary: str = BOUNDARY, weights: str = WEIGHTS) -> MergeReconstruct | None:
    """The token rule of one block (A4); None where it would be the identity.

    scores, unpruned, centers (n); columns of the patch grid. boundary (rule "center" alone): "reference" raster runs
    or "grid" 2-D cells. weights: "reference" t / s[center] (rule "center") or t / mean of the run's positive t
    (rule "merge"), with t the scores of unpruned patches; "score" the same made to sum to 1 in each region; "uniform"
    1 / size, the only one with which a constant region stays constant through reconstruct @ merge, too.
    """
    check_known("weights", weights, WEIGHTINGS)
    if rule == "center":
        check_known("boundary", boundary, BOUNDARIES)
    if bool(centers.all()):
        return None
    n, index, empty = len(scores), centers.nonzero().flatten(), rule == "merge" and weights == "reference"
    regions, entry = torch.full((n,), -1), torch.zeros(n)
    if len(index):
        regions = (BOUNDARIES[boundary](index, n, columns) if rule == "center"
                   else _regions_runs(index, unpruned, keep_empty=empty))
        entry = _weights(scores, unpruned, index, regions, rule, weights)
        regions = regions if empty else torch.where(unpruned, regions, -1)
    return MergeReconstruct(regions=tuple(regions.tolist()), weights=tuple(entry.tolist()),
                            pruned=tuple((~unpruned).nonzero().flatten().tolist()),
                            trains="both" if rule == "center" else "reconstruct")


def shared(rule: MergeReconstruct | None, own: float = 1.0, proportional: bool = True) -> SharedUpdate | None:
    """The same regions, sharing the block's update (methods C1); weights are made to sum to 1 in each region."""
    if rule is None:
        return None
    regions, weights = torch.tensor(rule.regions), torch.tensor(rule.weights, dtype=torch.double)
    sums = torch.zeros(rule.num_merged + 1, dtype=torch.double).index_add_(0, regions + 1, weights)     # pruned first
    weights = torch.where(regions >= 0, weights / sums[regions + 1], 0)
    return SharedUpdate(regions=rule.regions, weights=tuple(weights.tolist()), own=own, proportional=proportional)


def merge_matrix(rule: MergeReconstruct, num_prefix_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(C, N): a prefix token is a row of its own, then one row per region, entries the patches' weights (A4)."""
    p, merged = num_prefix_tokens, [patch for patch, region in enumerate(rule.regions) if region >= 0]
    matrix = torch.zeros(p + rule.num_merged, p + len(rule.regions), dtype=dtype)
    matrix[:p, :p] = torch.eye(p, dtype=dtype)
    matrix[[p + rule.regions[patch] for patch in merged], [p + patch for patch in merged]] = torch.tensor(
        [rule.weights[patch] for patch in merged], dtype=dtype)
    return matrix


def reconstruct_matrix(merge: Tensor) -> Tensor:
    """Pseudo-inverse (N, C) of a merge matrix (C, N) (A5). Its rows have disjoint supports, so they are orthogonal and
    the pseudo-inverse is the transpose with column c divided by ||row c||^2 (zeros give zeros)."""
    norm = merge.square().sum(dim=1)
    return merge.T / torch.where(norm > 0, norm, 1)


def token_mask(rule: MergeReconstruct, num_prefix_tokens: int) -> Tensor:
    """(N) bool, True where a token takes part in the block; prefix tokens always do."""
    mask = torch.ones(num_prefix_tokens + len(rule.regions), dtype=torch.bool)
    mask[[num_prefix_tokens + j for j in rule.pruned]] = False
    return mask


def fold(reconstruct: Tensor, carried: Tensor, merge: Tensor, carry_next: Tensor) -> Tensor:
    """The one matrix between two blocks (A7).

    After block l the state is [b; s]: its output b (C tokens) and the tokens s = x[carried] that skipped it.
    The next block needs merge @ x and x[carry_next], with x = reconstruct @ b, plus s put back in place, so

        state' = [merge; I[carry_next]] @ [reconstruct, I[:, carried]] @ [b; s]

    reconstruct (N, C), carried and carry_next index tensors, merge (C', N); returns (C' + p', C + p).
    """
    eye = torch.eye(len(reconstruct), dtype=reconstruct.dtype, device=reconstruct.device)
    return torch.cat([merge, eye[carry_next]]) @ torch.cat([reconstruct, eye[:, carried]], dim=1)


@torch.fx.wrap
def select(x: Tensor, ranking: Tensor, kept: int, num_prefix_tokens: int) -> Tensor:
    """The `kept` best tokens of each image and the plain mean of the others (methods B3).

    x (B, N, D), ranking (B, N), higher stays; prefix tokens always stay, first and in order. Returns (B, P + kept + 1,
    D), the mean last; it is summed in float32 at least.
    """
    prefix, others = x.split((num_prefix_tokens, x.shape[1] - num_prefix_tokens), dim=1)
    order = ranking[:, num_prefix_tokens:].topk(others.shape[1], dim=1).indices            # (B, n)
    ordered = others.gather(1, order[:, :, None].expand_as(others))             # (B, n, D)
    rest = ordered[:, kept:].mean(dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.cat([prefix, ordered[:, :kept], rest.to(x.dtype)], dim=1)
