"""From scores and rates to a CompressionPlan."""
from torch import Tensor

from vitlab import tokens
from vitlab.files import InputError
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.shape import ViTShape


def prune_and_merge(scores: Tensor, shape: ViTShape, *, rule: str = "center", keep_rate: float = tokens.KEEP_RATE,
                    prune_rate: float = tokens.PRUNE_RATE, boundary: str = tokens.BOUNDARY,
                    weights: str = tokens.WEIGHTS, decay: float | None = None, share: bool = False) -> CompressionPlan:
    """The Prune and Merge plan (methods A2 to A4) for raw token scores (L, n).

    keep_rate in (0, 1]: fraction of patches that become centers; prune_rate in [0, 1): fraction that skip the block.
    boundary="reference" with weights="reference" is the published form. decay None: the published one of the rule.
    share: the same regions share their block's update (methods C1) instead of being merged and reconstructed by matrices.
    keep_rate=1 with prune_rate=0 gives the plan that cuts nothing. Raises InputError for values out of range.
    """
    if tuple(scores.shape) != (shape.depth, shape.num_patches):
        raise InputError(f"token scores are {tuple(scores.shape)}; the model has {shape.depth} blocks of {shape.num_patches} patches")
    if rule not in tokens.DECAY:
        raise InputError(f"rule {rule!r} is not known; known are {sorted(tokens.DECAY)}")
    decay = tokens.DECAY[rule] if decay is None else decay
    normal = tokens.normalise_scores(scores, decay)                             # (A2)
    unpruned, centers = tokens.choose(normal, rule=rule, keep_rate=keep_rate, prune_rate=prune_rate)    # (A3)
    rules = [tokens.merge_rule(*layer, columns=shape.grid_size[1], rule=rule, boundary=boundary, weights=weights)       # (A4)
             for layer in zip(normal, unpruned, centers)]
    blocks = [BlockPlan(tokens=tokens.shared(merged) if share else merged) for merged in rules]
    made_by = {"method": "prune_and_merge", "rule": rule, "keep_rate": keep_rate, "prune_rate": prune_rate,
               **({"boundary": boundary} if rule == "center" else {}), "weights": weights, "decay": decay,
               **({"share": True} if share else {})}
    return CompressionPlan(shape=shape, blocks=tuple(blocks), made_by=made_by)
