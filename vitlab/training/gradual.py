"""A part of a plan, for pruning and fine-tuning in turns: `fraction` of what the plan cuts."""
import dataclasses
import math

from vitlab.criteria.units import UnitScores
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Select, TokenRule
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import require


def _units(kept: tuple[int, ...] | None, scores: list[float], fraction: float) -> tuple[int, ...] | None:
    """The units that stay when `fraction` of those to go have gone, the lowest scores first."""
    if kept is None:
        return None
    leaving = sorted(set(range(len(scores))) - set(kept), key=lambda unit: scores[unit])
    gone = set(leaving[:round(len(leaving) * fraction)])
    return tuple(unit for unit in range(len(scores)) if unit not in gone) if gone else None


def _width(width: int | None, whole: int, fraction: float) -> int | None:
    """Of queries and keys, after `fraction` of what they lose."""
    left = whole - round((whole - (width or whole)) * fraction)
    return left if left < whole else None


def _rules(plan: CompressionPlan, fraction: float) -> list[TokenRule | None]:
    """Selections that drop `fraction` of the share they shall drop; merging in the last `fraction` of blocks."""
    shape: ViTShape = plan.shape
    rules, entering = [], shape.num_tokens
    for index, (block, flow) in enumerate(zip(plan.blocks, plan.flows())):
        rule = block.tokens
        if isinstance(rule, Select):
            others = entering - shape.num_prefix_tokens
            share = 1 - rule.kept / (flow.attended - shape.num_prefix_tokens)       # of the tokens that come in
            rule = dataclasses.replace(rule, kept=min(max(round(others * (1 - fraction * share)), 1), others - 2))
            entering = shape.num_prefix_tokens + rule.kept + 1
        elif index < shape.before_queries - math.ceil(fraction * shape.before_queries):
            rule = None
        rules.append(rule)
    return rules


def partial_plan(plan: CompressionPlan, fraction: float, scores: UnitScores) -> CompressionPlan:
    """The plan that cuts `fraction` of what `plan` cuts: of its heads and neurons those with the lowest scores first;
    tokens by smaller selections, and merging in the last blocks first; a span is merged as a whole, once its first
    block is among them. fraction 1 gives the plan itself; a larger one's cuts include a smaller one's. Raises
    InputError for a fraction out of (0, 1]."""
    require(0 < fraction <= 1, f"fraction is {fraction}; it must lie in (0, 1]")
    if fraction == 1:
        return plan
    blocks = []
    for block, heads, neurons, rule in zip(plan.blocks, scores.heads.tolist(), scores.neurons.tolist(),
                                           _rules(plan, fraction)):
        part = BlockPlan(heads=_units(block.heads, heads, fraction), neurons=_units(block.neurons, neurons, fraction),
                         tokens=rule, qk_width=_width(block.qk_width, plan.shape.head_dim, fraction))
        blocks.append(dataclasses.replace(part, nothing=tuple(filter(part.leaves_out, block.nothing))))
    return CompressionPlan(shape=plan.shape, blocks=blocks, made_by=plan.made_by | {"fraction": fraction})
