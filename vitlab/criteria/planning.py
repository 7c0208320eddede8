"""From scores and rates to a CompressionPlan."""
import dataclasses
from collections.abc import Sequence

from torch import Tensor

from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.rules import MergeReconstruct
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import named, require


def prune_and_merge(scores: Tensor, shape: ViTShape, *, rule: str = "center", keep_rate: float | None = None,
                    prune_rate: float = tokens.PRUNE_RATE, boundary: str = tokens.BOUNDARY,
                    weights: str = tokens.WEIGHTS, decay: float | None = None, share: bool = False,
                    spans: Sequence[Sequence[float]] | None = None) -> CompressionPlan:
    """The Prune and Merge plan (methods A2 to A4) for raw token scores (L, n).

    keep_rate in (0, 1]: fraction of patches that become centers, None: 0.6; prune_rate in [0, 1): fraction that skip
    the block. boundary="reference" with weights="reference" is the published form. decay: the number per block; None:
    the published one of the rule, for other depths than 12 the one that gives the last block the same factor
    (`tokens.decay_of`, methods D7). share: the same regions share their block's update (methods C1) instead of being
    merged and reconstructed by matrices. spans: (first block, last block, keep rate) each, ascending, both blocks
    included, instead of keep_rate: tokens are merged before the first, stay merged, and are reconstructed after the
    last; pruned ones skip the whole span. Scores are the means of the span's normalised ones, with thresholds of its
    own; in blocks outside spans all tokens stay, as in those that queries join. keep_rate=1 with prune_rate=0 gives the
    plan that cuts nothing. Raises InputError for values out of range.
    """
    require(tuple(scores.shape) == (shape.depth, shape.num_patches), f"token scores are {tuple(scores.shape)}; the "
            f"model has {shape.depth} blocks of {shape.num_patches} patches")
    depth = shape.before_queries
    decay = tokens.decay_of(rule, depth) if decay is None else decay
    normal = tokens.normalise_scores(scores[:depth], decay)                     # (A2)

    def rules_of(scores: Tensor, keep_rate: float) -> list[MergeReconstruct | None]:
        """Of blocks that share thresholds (A3, A4): scores (L, n)."""
        unpruned, centers = tokens.choose(scores, rule=rule, keep_rate=keep_rate, prune_rate=prune_rate)
        return [tokens.merge_rule(*layer, rule=rule, columns=shape.grid_size[1], boundary=boundary, weights=weights)
                for layer in zip(scores, unpruned, centers)]
    if spans is None:
        keep_rate = tokens.KEEP_RATE if keep_rate is None else keep_rate
        rules = rules_of(normal, keep_rate)
    else:
        require(keep_rate is None, f"keep_rate is {keep_rate}, but each span has its own; one of the two is needed")
        require(not share, "regions share the update of one block; spans, which stay merged, need share off")
        tokens.check_spans(spans, depth)
        rules = [None] * depth
        for first, last, rate in spans:
            with named(f"span {first}-{last}"):
                made, = rules_of(normal[first:last + 1].mean(dim=0, keepdim=True), rate)
            rules[first] = made and dataclasses.replace(made, span=last + 1 - first)
    blocks = [BlockPlan(tokens=tokens.shared(merged) if share else merged) for merged in rules]
    blocks += [BlockPlan()] * (shape.depth - depth)
    made_by = {"method": "prune_and_merge", "rule": rule,
               **({"keep_rate": keep_rate} if spans is None else {"spans": [list(span) for span in spans]}),
               "prune_rate": prune_rate, **({"boundary": boundary} if rule == "center" else {}), "weights": weights,
               "decay": decay, **({"share": True} if share else {})}
    return CompressionPlan(shape=shape, blocks=tuple(blocks), made_by=made_by)
