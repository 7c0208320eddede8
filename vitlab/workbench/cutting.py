"""Steps on heads and neurons: score, cut by ratios, find out where cutting hurts."""
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.criteria.units import UNIT_CRITERIA, UnitScores, unit_criterion
from vitlab.data import ImageData
from vitlab.measure.capture import need_classifier
from vitlab.measure.objective import PlanObjective
from vitlab.measure.units import unit_scores
from vitlab.models import shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.weights import read_file
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import macs
from vitlab.plan.rules import PROTECT, Match, Select
from vitlab.plan.shape import ViTShape
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, append_line, atomic_write
from vitlab.runtime.uncertainty import error_name
from vitlab.search import Budget, SearchSpace
from vitlab.search.published import published_policy
from vitlab.search.token_dimensions import default_tokens
from vitlab.workbench.steps import (
    Source,
    apply_plan,
    limit_of,
    need_dense,
    open_matching,
    open_model,
    pick_device,
    what_is_shared,
)

UNIT_SCORES, SENSITIVITY = "unit_scores.safetensors", "sensitivity.jsonl"
CLOSE = 1e-3                                # of a budget: nearer to it no more is given back
# models at least this wide gain by bf16 where the hardware has it; narrower ones lose
WIDE = 192


def amp_of(model: nn.Module) -> bool | None:
    """What `amp` is where a model is only measured: None, bf16 where the hardware has it, for a wide one."""
    return None if model.embed_dim >= WIDE else False


def open_dense(source: Source) -> Checkpoint:
    return need_dense(open_model(source))


def needs_images(criterion: str) -> bool:
    """Whether scores by a criterion of units are of images. Raises InputError for one that is not known."""
    return unit_criterion(criterion).needs not in ("weights", "nothing")


def score_units(source: Source, data: str | Path, out: str | Path, *, criterion: str = "hsic", images: int = 512,
                batch_size: int | None = None, seed: int = 0, device: str | None = None,
                class_map: str | Path | None = None, workers: int | None = None, progress: bool = True) -> UnitScores:
    """Scores of heads and neurons by a criterion on the images of train that are for scores (`ImageData.parts`), at
    most `images`, written to `out` (safetensors)."""
    found = open_dense(source)
    if unit_criterion(criterion).needs in ("output", "gradients"):
        need_classifier(found.model, f"scores by {criterion}")
    opened = open_matching(data, found, class_map, labels=criterion == "taylor")
    batch_size = batch_size or opened.at_once(64)
    batches, words = (), {}
    if needs_images(criterion):
        parts = opened.parts(seed, score=images)
        batches = parts.batches("score", found.model, batch_size=batch_size, seed=seed, workers=workers, shared=True)
        words = what_is_shared(parts)
    scores = unit_scores(found.model, batches, criterion=criterion, seed=seed, device=pick_device(device),
                         progress=progress)
    made_by = {**words, **scores.made_by, "data": opened.name, "batch_size": str(batch_size), "seed": str(seed)}
    if parallel.is_first():
        write_units(out, scores, made_by)
    return dataclasses.replace(scores, made_by=made_by)


def write_units(path: str | Path, scores: UnitScores, metadata: dict[str, str]) -> None:
    """Write what `read_units` reads, atomically."""
    atomic_write(path,
                 save({"head_scores": scores.heads.contiguous(), "neuron_scores": scores.neurons.contiguous()},
                      metadata))


def read_units(path: str | Path) -> UnitScores:
    """Unit scores from a file. Raises InputError naming it."""
    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path}: not a .safetensors file; `vitlab score --of units` writes one")
    tensors = read_file(path)
    missing = sorted({"head_scores", "neuron_scores"} - set(tensors))
    if missing:
        raise InputError(f"{path}: holds no {missing[0]}; `vitlab score --of units` writes them")
    for name in ("head_scores", "neuron_scores"):
        if not tensors[name].isfinite().all():
            raise InputError(f"{path}: {name} must be finite")
    odd = [name for name in ("head_scores", "neuron_scores")
           if tensors[name].dtype not in (torch.float32, torch.float64)]
    if odd:
        raise InputError(f"{path}: {odd[0]} are {tensors[odd[0]].dtype}; float32 is needed")
    return UnitScores(heads=tensors["head_scores"], neurons=tensors["neuron_scores"],
                      made_by={"read_from": Path(path).name})


def prune_units(source: Source, scores: str | Path | UnitScores, out: str | Path, *, policy: str | None = None,
                head_ratio: float = 0.0, neuron_ratio: float = 0.0, rho: float = 0.0, gmacs: float | None = None,
                macs_ratio: float | None = None) -> Checkpoint:
    """Compress a dense model by unit scores: the same ratios in every block and rho in the selecting blocks, or a
    published policy by name (tokens then ranked by all heads, as it was), or, by a budget (`limit_of`), heads and
    neurons alike, as nearly as whole heads allow. Writes and returns the checkpoint in `out`."""
    found = open_dense(source)
    scores = scores if isinstance(scores, UnitScores) else read_units(scores)
    shape = shape_of(found.model)
    if gmacs is not None or macs_ratio is not None:
        if policy is not None or head_ratio or neuron_ratio or rho:
            raise InputError("a budget says how much is cut, and so does a policy or a ratio; one of the two is needed")
        limit, space = limit_of(shape, gmacs, macs_ratio), SearchSpace(shape=shape, tokens="none", max_ratio=0.999)
        plan = space.plan(_within(space, limit), heads=scores.heads, neurons=scores.neurons,
                          made_by={"method": "budget", "gmacs": limit, "scores": scores.made_by})
        return apply_plan(found, plan, out)
    if policy is not None:
        if head_ratio or neuron_ratio or rho:
            raise InputError("a policy says all ratios; give the policy or ratios, not both")
        vector, settings = published_policy(policy), {"ranked_by": "all"}
        if len(vector) != 2 * shape.depth + 1:
            raise InputError(f"policy {policy} is for {(len(vector) - 1) // 2} blocks; the model has {shape.depth}")
    else:
        vector, settings = np.array([neuron_ratio] * shape.depth + [head_ratio] * shape.depth + [rho] * (rho > 0)), {}
    space = SearchSpace(shape=shape, tokens="select" if policy or rho else "none", settings=settings,
                        max_ratio=max(0.5, *vector.tolist(), 1e-3))
    made_by = {"method": "policy", "policy": policy} if policy else {"method": "ratios", "head_ratio": head_ratio,
                                                                       "neuron_ratio": neuron_ratio, "rho": rho}
    plan = space.plan(vector, heads=scores.heads, neurons=scores.neurons, made_by=made_by | {"scores": scores.made_by})
    return apply_plan(found, plan, out)


def _within(space: SearchSpace, limit: float) -> np.ndarray:
    """The policy, its ratios alike as far as counts allow, that costs most of those within `limit` GMACs; nothing is
    cut where reading out is enough. Raises InputError naming the range where there is none."""
    nothing = np.zeros((1, space.size))
    if float(space.gmacs(nothing)[0]) <= limit < macs(CompressionPlan.empty(space.shape))["total"] / 1e9:
        return nothing[0]
    budget = Budget(limit=limit, cost=space.gmacs, tolerance=CLOSE, max_ratio=space.max_ratio, size=space.size,
                    groups=tuple(space.groups))
    return budget.project(np.full((1, space.size), space.max_ratio / 2))[0][0]


def prune_match(source: Source, out: str | Path, *, ratio: float | None = None, gmacs: float | None = None,
                macs_ratio: float | None = None, read_out: bool = False) -> Checkpoint:
    """Compress a dense model by merging tokens by content, the same ratio in each block of the middle half, or the
    least that meets a budget (`limit_of`); no images are needed. Writes and returns the checkpoint in `out`."""
    if sum(amount is not None for amount in (ratio, gmacs, macs_ratio)) != 1:
        raise InputError("how much is merged is a ratio of the tokens, or a budget in GMACs or as a ratio of the dense "
                         "model's; one of the "
                         "three is needed")
    found = open_dense(source)
    shape, made_by = shape_of(found.model), {"method": "match"}
    space = SearchSpace(shape=shape, units=(), tokens="match", read_out=read_out, max_ratio=max(0.5, ratio or 0))
    if ratio is None:
        limit = limit_of(shape, gmacs, macs_ratio)
        ratio, made_by = float(_within(space, limit)[0]), made_by | {"gmacs": limit}
    return apply_plan(found, space.plan([ratio], made_by=made_by | {"ratio": ratio, "read_out": read_out}), out)


def objective_on(model: nn.Module, parts: ImageData, role: str, metric: str, device: torch.device, workers: int | None,
                 **settings: Any) -> PlanObjective:
    """On the images of a role of train: "choose" to compare plans, "report" to say what the chosen one is worth. Never
    on the held-out split. settings go to PlanObjective."""
    return PlanObjective(model, measured_batches(model, parts, role, workers), metric=metric, device=device,
                         amp=amp_of(model), labelled=parts.labelled, **settings)


def measured_batches(model: nn.Module, parts: ImageData, role: str,
                     workers: int | None) -> Iterable[tuple[Tensor, Tensor]]:
    return parts.batches(role, model, batch_size=parts.at_once(128), workers=workers)


def sensitivity(source: Source, data: str | Path, out: str | Path, *, criteria: tuple[str, ...] = tuple(UNIT_CRITERIA),
                ratio: float = 0.25, images: int = 1000, score_images: int = 512, metric: str = "distill_loss",
                seed: int = 0, device: str | torch.device | None = None, class_map: str | Path | None = None,
                workers: int | None = None, progress: bool = True) -> list[dict[str, Any]]:
    """Cut one dimension of one block by `ratio`, by each criterion, and measure on the images of train to choose on, at
    most `images`, others than the score_images at most that the scores are of (`ImageData.parts`).

    Returns a row per cut: criterion, dimension ("heads", "neurons" or "tokens"), block, drop (dense value less the cut
    one's, of `metric`), drop_se (of the cut one's value), gmacs_removed and drop_per_gmac. Rows go to
    out/sensitivity.jsonl as they are measured; another call begins anew. Tokens are selected in that block alone
    (criterion "class attention"), or, where the grid is needed or there is no class token, merged there by content
    (criterion "alike keys").
    """
    found = open_dense(source)
    shape = shape_of(found.model)
    need_classifier(found.model, "losses by cuts")
    opened, device = open_matching(data, found, class_map,
                                   labels=metric != "distill_loss" or "taylor" in criteria), pick_device(device)
    parts = opened.parts(seed, score=score_images, choose=images)
    objective = objective_on(found.model, parts, "choose", metric, device, workers)
    empty = CompressionPlan.empty(shape)
    dense, whole, rows = objective(empty)["value"], macs(empty)["total"], []
    batches = list(parts.batches("score", found.model, workers=workers))
    path = Path(out) / SENSITIVITY
    path.unlink(missing_ok=True)
    bar = tqdm(total=shape.depth * (2 * len(criteria) + 1), desc="sensitivity", unit="cut", disable=not progress)

    def measure(criterion: str, dimension: str, block: int, plan: CompressionPlan) -> None:
        removed = (whole - macs(plan)["total"]) / 1e9
        if removed > 0:
            measures = objective(plan)
            drop = dense - measures["value"]
            rows.append({"criterion": criterion, "dimension": dimension, "block": block, "ratio": ratio, "drop": drop,
                         "drop_se": measures.get(error_name(metric)), "gmacs_removed": removed,
                         "drop_per_gmac": drop / removed, "metric": metric})
            append_line(path, rows[-1])
        bar.update()
    for criterion in criteria:
        bar.set_postfix(criterion=criterion)
        scores = unit_scores(found.model, batches, criterion=criterion, seed=seed, device=device, progress=False)
        for unit in ("neurons", "heads"):
            space = SearchSpace(shape=shape, units=(unit,), tokens="none", max_ratio=max(ratio, 0.5))
            # One head is the least that can be cut, so it is one where the ratio is less than that.
            cut = max(ratio, 0.5 / shape.num_heads) if unit == "heads" else ratio
            for block, policy in enumerate(np.eye(shape.depth) * cut):
                measure(criterion, unit, block, space.plan(policy, heads=scores.heads, neurons=scores.neurons))
    by, cut_tokens = ("class attention", _select_in) if default_tokens(shape) == "select" else ("alike keys", _match_in)
    for block in range(shape.depth):
        measure(by, "tokens", block, cut_tokens(shape, block, ratio))
    bar.close()
    return rows


def _select_in(shape: ViTShape, block: int, ratio: float) -> CompressionPlan:
    """The plan that selects tokens in one block."""
    kept = max(1, int(shape.num_tokens * (1 - ratio)) - shape.num_prefix_tokens)
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=Select(kept=kept) if index == block else None)
                                                     for index in range(shape.depth)))


def _match_in(shape: ViTShape, block: int, ratio: float) -> CompressionPlan:
    """The plan that merges tokens by content in one block, and gives them back at the end."""
    merged = min(int(shape.num_patches * ratio), shape.num_patches // 2)
    protect = PROTECT if shape.class_token else 0.0
    rules = [None] * block + [Match(merged=merged if index == block else 0, protect=protect)
                              for index in range(block, shape.depth)]
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=rule) for rule in rules))
