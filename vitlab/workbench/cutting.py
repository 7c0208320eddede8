"""Steps that cut: by scores of tokens or of units, by content, or by a plan file."""
import functools
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from vitlab.criteria.planning import prune_and_merge
from vitlab.criteria.units import UnitScores
from vitlab.models import checkpoint, compress, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.opening import Source, open_model
from vitlab.plan import CompressionPlan, cost, tokens
from vitlab.plan.cost import macs
from vitlab.plan.shape import ViTShape
from vitlab.runtime.config import RunConfig, flags
from vitlab.runtime.files import InputError, require
from vitlab.runtime.kinds import Count, File, Gmacs, MacsRatio, Or, Rate, Ratio, Run, Spans, flag
from vitlab.search import Budget, SearchSpace
from vitlab.search.published import published_policy
from vitlab.search.space import MAX_RATIO
from vitlab.workbench.scoring import read_scores, read_units
from vitlab.workbench.steps import Plan, need_dense, open_dense

CLOSE = 1e-3                                    # of a budget: nearer to it no more is given back
Quiet = Annotated[RunConfig, flags("quiet")]


def prune_tokens(source: Source, scores: File, out: Run, *, rule: Literal["center", "merge"] = "center",
                 keep_rate: Rate | None = None, spans: Spans | None = None, prune_rate: Rate = tokens.PRUNE_RATE,
                 decay: Annotated[Rate | None, flag(metavar="D")] = None,
                 boundary: Literal["grid", "reference"] | None = None,
                 weights: Literal["score", "uniform", "reference"] = tokens.WEIGHTS, share: bool = False,
                 gmacs: Gmacs = None, macs_ratio: MacsRatio = None, config: Quiet = RunConfig()) -> Checkpoint:
    """Compress a dense model by its token scores; writes and returns the checkpoint in `out`. spans: (first block, last
    block, keep rate) each, of blocks through which tokens stay merged (`prune_and_merge`). gmacs, macs_ratio: a budget
    (`limit_of`) instead of keep_rate, which is the largest that meets it then.

    Args:
        scores: of tokens, from `vitlab score tokens`
        rule: how regions are made
        keep_rate: fraction of patches that become centers (default: 0.6)
        spans: instead of --keep-rate: blocks through which tokens stay merged, as in 3-5:0.7,6-11:0.5; all stay in the
            others
        prune_rate: fraction of patches that skip a block, or a span
        decay: that each block's scores lose of their factor to the one before, below 1 / (blocks - 1) (default: the
            published one of the rule, spread over the depth)
        boundary: regions of rule center: 2-D cells, or raster runs as published (default: grid)
        weights: entries of the merge matrix; reference: as published
        share: regions share their block's update and keep their own streams, without matrices (methods C1)
    """
    found = open_model(source)
    require(rule != "merge" or boundary is None, "boundary is of rule center; rule merge has none")
    if spans is not None and (share or keep_rate is not None):
        raise InputError(f"spans do not go with {'share' if share else 'a keep rate: each span has its own'}")
    (values, source_of_scores), shape = read_scores(scores), shape_of(found.model)
    made_by: dict[str, Any] = {"scores": source_of_scores}
    made_of = functools.partial(prune_and_merge, values, shape, rule=rule, prune_rate=prune_rate,
                                boundary=boundary or tokens.BOUNDARY, weights=weights, decay=decay, share=share,
                                spans=spans)
    if gmacs is not None or macs_ratio is not None:
        require(keep_rate is None and spans is None, "a budget finds the keep rate, but a "
                f"{'rate for each span' if spans else 'keep rate'} is given; one of the two is needed")
        limit = limit_of(shape, gmacs, macs_ratio)
        made_by["gmacs"] = limit
        keep_rate = _largest_keep_rate(lambda rate: cost.gmacs(made_of(keep_rate=rate)), shape, limit)
    return apply_plan(found, made_of(keep_rate=keep_rate), out, made_by)


def prune_plan(source: Source, plan: Plan, out: Run, *, config: Quiet = RunConfig()) -> Checkpoint:
    """Compress a dense model by a plan; writes and returns the checkpoint in `out`.

    Args:
        plan: a plan.json to apply as it is
    """
    if isinstance(plan, CompressionPlan):
        return apply_plan(open_model(source), plan, out)
    found = open_dense(source)
    return apply_plan(found, CompressionPlan.load(plan, shape_of(found.model)), out, {"from_plan": Path(plan).name})


def prune_units(source: Source,
                scores: Or[File, UnitScores], out: Run, *,
                policy: Annotated[str | None, flag(metavar="NAME")] = None, head_ratio: Ratio = 0.0,
                neuron_ratio: Ratio = 0.0, rho: Ratio = 0.0, gmacs: Gmacs = None, macs_ratio: MacsRatio = None,
                multiple: Count = 1, config: Quiet = RunConfig()) -> Checkpoint:
    """Compress a dense model by unit scores: the same ratios in every block and rho in the selecting blocks, or a
    published policy by name (tokens then ranked by all heads, as it was), or, by a budget (`limit_of`), heads and
    neurons alike, as nearly as whole heads allow. Writes and returns the checkpoint in `out`.

    Args:
        scores: of heads and neurons, from `vitlab score units`
        policy: published ratios, deit_small_60 or deit_base_60
        head_ratio: fraction of heads cut in every block
        neuron_ratio: fraction of neurons cut in every block
        rho: fraction of tokens dropped by each of three selections
        multiple: neurons that stay, and widths of heads, are so many, or a multiple: 8, 16 or 32, as kernels like
    """
    budget, ratios = gmacs is not None or macs_ratio is not None, bool(head_ratio or neuron_ratio or rho)
    require(budget or policy is not None or ratios, "nothing says how much is cut; a policy, head_ratio, neuron_ratio "
            "or rho, or a budget is needed")
    found = open_dense(source)
    scores = scores if isinstance(scores, UnitScores) else read_units(scores)
    shape = shape_of(found.model)
    if budget:
        if policy is not None or ratios:
            raise InputError("a budget says how much is cut, and so does a policy or a ratio; one of the two is needed")
        limit, space = limit_of(shape, gmacs, macs_ratio), SearchSpace(
            shape=shape, tokens="none", max_ratio=0.999, multiple=multiple)
        plan = space.plan(even_within(space, limit), heads=scores.heads, neurons=scores.neurons,
                          made_by={"method": "budget", "gmacs": limit, "scores": scores.made_by})
        return apply_plan(found, plan, out)
    asked, published = {"neurons": neuron_ratio, "heads": head_ratio, "tokens": rho}, None
    if policy is not None:
        require(not ratios, "a policy says all ratios; give the policy or ratios, not both")
        published = published_policy(policy)
        if len(published) != 2 * shape.depth + 1:
            raise InputError(f"policy {policy} is for {(len(published) - 1) // 2} blocks; the model has {shape.depth}")
    for part, ratio in asked.items():
        if ratio or policy:
            shape.check_cut(part)
    space = SearchSpace(shape=shape, tokens="select" if policy or rho else "none",
                        settings={"ranked_by": "all"} if policy else {}, multiple=multiple,
                        max_ratio=max(MAX_RATIO, *(asked.values() if published is None else published.tolist())))
    vector = np.array([asked[group] for group in space.groups]) if published is None else published
    made_by = {"method": "policy", "policy": policy} if policy else {"method": "ratios", "head_ratio": head_ratio,
                                                                       "neuron_ratio": neuron_ratio, "rho": rho}
    plan = space.plan(vector, heads=scores.heads, neurons=scores.neurons, made_by=made_by | {"scores": scores.made_by})
    return apply_plan(found, plan, out)


def prune_match(source: Source, out: Run, *, ratio: Ratio | None = None, gmacs: Gmacs = None,
                macs_ratio: MacsRatio = None, read_out: bool = False, config: Quiet = RunConfig()) -> Checkpoint:
    """Compress a dense model by merging tokens by content, the same ratio in each block of the middle half, or the
    least that meets a budget (`limit_of`); no images are needed. Writes and returns the checkpoint in `out`.

    Args:
        ratio: fraction of the tokens that are merged in each block of the middle half
        read_out: the last block computes what the classifier reads alone
    """
    require(sum(amount is not None for amount in (ratio, gmacs, macs_ratio)) == 1, "how much is merged is a ratio of "
            "the tokens, or a budget in GMACs or as a ratio of the dense model's; one of the three is needed")
    found = open_dense(source)
    shape, made_by = shape_of(found.model), {"method": "match"}
    space = SearchSpace(shape=shape, units=(), tokens="match", read_out=read_out, max_ratio=max(0.5, ratio or 0))
    if ratio is None:
        limit = limit_of(shape, gmacs, macs_ratio)
        ratio, made_by = float(even_within(space, limit)[0]), made_by | {"gmacs": limit}
    return apply_plan(found, space.plan([ratio], made_by=made_by | {"ratio": ratio, "read_out": read_out}), out)


def even_within(space: SearchSpace, limit: float) -> np.ndarray:
    """The policy, its ratios alike as far as counts allow, that costs most of those within `limit` GMACs; nothing is
    cut where reading out is enough. Raises InputError naming the range where there is none."""
    nothing = np.zeros((1, space.size))
    if float(space.gmacs(nothing)[0]) <= limit < macs(CompressionPlan.empty(space.shape))["total"] / 1e9:
        return nothing[0]
    return Budget.of(space, limit, tolerance=CLOSE).project(np.full((1, space.size), space.max_ratio / 2))[0][0]


def least_ratio(space: SearchSpace, limit: float, tried: int) -> float | None:
    """The least of so many ratios, the same in all dimensions, that costs at most `limit` GMACs, or None."""
    ratios = np.linspace(0, space.max_ratio, tried)
    within = np.flatnonzero(space.gmacs(ratios[:, None].repeat(space.size, axis=1)) <= limit)
    return float(ratios[within[0]]) if len(within) else None


def limit_of(shape: ViTShape, gmacs: float | None, macs_ratio: float | None) -> float:
    """A budget in GMACs: `gmacs`, or macs_ratio of the dense model's. InputError where not one of the two is given."""
    if gmacs is not None and macs_ratio is None:
        return gmacs
    if macs_ratio is not None and gmacs is None:
        return macs_ratio * cost.gmacs(CompressionPlan.empty(shape))
    raise InputError("a budget is either in GMACs or a ratio of the dense model's; one of the two is needed")


def _largest_keep_rate(price: Callable[[float], float], shape: ViTShape, limit: float) -> float:
    """The keep rate with the most centers whose price in GMACs, which grows with them, is at most `limit`."""
    dense, n = cost.gmacs(CompressionPlan.empty(shape)), shape.num_patches
    rates = [min((centers + 0.5) / n, 1.0) for centers in range(1, n + 1)]     # in the middle of those with as many
    fit = bisect_right(rates, limit, key=price) if limit < dense else 0
    if not fit:
        raise InputError(f"a budget of {limit:.6g} gmacs can't be met: keep rates reach from {price(rates[0]):.6g} "
                         f"(one patch is a center) to below {dense:.6g} (the dense model's): ratios from "
                         f"{price(rates[0]) / dense:.3g} to below 1")
    return rates[fit - 1]


def apply_plan(found: Checkpoint, plan: CompressionPlan, out: str | Path,
               made_by: dict[str, Any] | None = None) -> Checkpoint:
    """Compress a dense model by a plan; writes and returns the checkpoint in `out`."""
    small, info = compress(need_dense(found).model, plan), {"step": "prune", **(made_by or {}), **plan.made_by}
    checkpoint.save(Path(out) / checkpoint.FOLDER, small, plan, classes=found.info.get("classes"), made_by=info)
    return checkpoint.load(out)
