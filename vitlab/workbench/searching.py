"""Steps on heads, neurons and policies: score, cut by ratios, find out where cutting hurts, search under a budget."""
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from vitlab.cost import macs, macs_of, mdc_macs
from vitlab.criteria.units import UNIT_CRITERIA, UnitScores
from vitlab.data import ImageData
from vitlab.files import InputError, append_line, atomic_write
from vitlab.models import shape_of
from vitlab.models.create import read_file
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.rules import Select
from vitlab.search import Budget, SearchSpace, Study
from vitlab.search.published import published_policy
from vitlab.search.space import MAX_RATIO
from vitlab.search.strategies import Settings
from vitlab.shape import ViTShape
from vitlab.training.capture import token_scores
from vitlab.training.checkpoint import Checkpoint
from vitlab.training.latency import latency_table
from vitlab.training.loop import fingerprint
from vitlab.training.objective import PlanObjective
from vitlab.training.units import unit_scores
from vitlab.workbench.steps import apply_plan, need_dense, open_matching, open_model, pick_device, read_scores

UNIT_SCORES, TOKEN_SCORES, PLAN, SENSITIVITY = "unit_scores.safetensors", "token_scores.safetensors", "plan.json", "sensitivity.jsonl"
WIDE = 192                                  # models at least this wide gain by bf16 where the hardware has it; narrower ones lose
COSTS = ("gmacs", "published_gmacs", "latency_ms")
Source = str | Path | Checkpoint


def _open(source: Source) -> Checkpoint:
    return need_dense(source if isinstance(source, Checkpoint) else open_model(source))


def score_units(source: Source, data: str | Path, out: str | Path, *, criterion: str = "hsic", images: int = 512, batch_size: int = 64,
                seed: int = 0, device: str | None = None, class_map: str | Path | None = None, workers: int | None = None,
                progress: bool = True) -> UnitScores:
    """Scores of heads and neurons by a criterion on a slice of train, written to `out` (safetensors)."""
    found = _open(source)
    opened = open_matching(data, found, class_map)
    batches = opened.batches("train", found.model, batch_size=batch_size, limit=images, seed=seed, workers=workers)
    scores = unit_scores(found.model, batches, criterion=criterion, seed=seed, device=pick_device(device), progress=progress)
    made_by = {**scores.made_by, "data": opened.name, "batch_size": str(batch_size), "seed": str(seed)}
    atomic_write(out, save({"head_scores": scores.heads.contiguous(), "neuron_scores": scores.neurons.contiguous()}, metadata=made_by))
    return dataclasses.replace(scores, made_by=made_by)


def read_units(path: str | Path) -> UnitScores:
    """Unit scores from a file. Raises InputError naming it."""
    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path}: not a .safetensors file; `vitlab score --of units` writes one")
    tensors = read_file(path)
    missing = sorted({"head_scores", "neuron_scores"} - set(tensors))
    if missing:
        raise InputError(f"{path}: holds no {missing[0]}; `vitlab score --of units` writes them")
    odd = [name for name in ("head_scores", "neuron_scores") if tensors[name].dtype not in (torch.float32, torch.float64)]
    if odd:
        raise InputError(f"{path}: {odd[0]} are {tensors[odd[0]].dtype}; float32 is needed")
    return UnitScores(heads=tensors["head_scores"], neurons=tensors["neuron_scores"], made_by={"read_from": Path(path).name})


def prune_units(source: Source, scores: str | Path | UnitScores, out: str | Path, *, policy: str | None = None,
                head_ratio: float = 0.0, neuron_ratio: float = 0.0, rho: float = 0.0) -> Checkpoint:
    """Compress a dense model by unit scores: the same ratios in every block and rho in the selecting blocks, or a published
    policy by name (tokens then ranked by all heads, as it was). Writes and returns the checkpoint in `out`."""
    found = _open(source)
    scores = scores if isinstance(scores, UnitScores) else read_units(scores)
    shape = shape_of(found.model)
    if policy is not None:
        if head_ratio or neuron_ratio or rho:
            raise InputError("a policy says all ratios; give the policy or ratios, not both")
        vector, settings = published_policy(policy), {"ranked_by": "all"}
        if len(vector) != 2 * shape.depth + 1:
            raise InputError(f"policy {policy} is for {(len(vector) - 1) // 2} blocks; the model has {shape.depth}")
    else:
        vector, settings = np.array([neuron_ratio] * shape.depth + [head_ratio] * shape.depth + [rho]), {}
    space = SearchSpace(shape=shape, tokens="select", settings=settings, max_ratio=max(0.5, *vector.tolist(), 1e-3))
    made_by = {"method": "policy", "policy": policy} if policy else {"method": "ratios", "head_ratio": head_ratio,
                                                                       "neuron_ratio": neuron_ratio, "rho": rho}
    plan = space.plan(vector, heads=scores.heads, neurons=scores.neurons, made_by=made_by | {"scores": scores.made_by})
    return apply_plan(found, plan, out)


def sensitivity(source: Source, data: str | Path, out: str | Path, *, criteria: tuple[str, ...] = tuple(UNIT_CRITERIA),
                ratio: float = 0.25, images: int = 1000, score_images: int = 512, metric: str = "top1_pct", seed: int = 0,
                device: str | None = None, class_map: str | Path | None = None, workers: int | None = None,
                progress: bool = True) -> list[dict[str, Any]]:
    """Cut one dimension of one block by `ratio`, by each criterion, and measure on a slice of train.

    Returns, and writes to out/sensitivity.jsonl, a row per cut: criterion, dimension ("heads", "neurons" or "tokens"),
    block, drop (dense value less the cut one's, of `metric`), gmacs_removed and drop_per_gmac. Tokens are selected in that
    block alone (criterion "class attention").
    """
    found = _open(source)
    opened, device = open_matching(data, found, class_map), pick_device(device)
    objective = _objective(found.model, opened, images, seed, metric, device, workers)
    shape = shape_of(found.model)
    empty = CompressionPlan.empty(shape)
    dense, whole, rows = objective(empty)["value"], macs(empty)["total"], []
    batches = list(opened.batches("train", found.model, limit=score_images, seed=seed, workers=workers))

    def measure(criterion: str, dimension: str, block: int, plan: CompressionPlan) -> None:
        removed = (whole - macs(plan)["total"]) / 1e9
        if removed > 0:
            drop = dense - objective(plan)["value"]
            rows.append({"criterion": criterion, "dimension": dimension, "block": block, "ratio": ratio, "drop": drop,
                         "gmacs_removed": removed, "drop_per_gmac": drop / removed, "metric": metric})
    for criterion in criteria:
        scores = unit_scores(found.model, batches, criterion=criterion, seed=seed, device=device, progress=progress)
        for unit in ("neurons", "heads"):
            space = SearchSpace(shape=shape, units=(unit,), tokens="none", max_ratio=max(ratio, 0.5))
            # One head is the least that can be cut, so it is one where the ratio is less than that.
            cut = max(ratio, 0.5 / shape.num_heads) if unit == "heads" else ratio
            for block, policy in enumerate(np.eye(shape.depth) * cut):
                measure(criterion, unit, block, space.plan(policy, heads=scores.heads, neurons=scores.neurons))
    for block in range(shape.depth):
        measure("class attention", "tokens", block, _select_in(shape, block, ratio))
    path = Path(out) / SENSITIVITY
    path.unlink(missing_ok=True)
    for row in rows:
        append_line(path, row)
    return rows


def _select_in(shape: ViTShape, block: int, ratio: float) -> CompressionPlan:
    """The plan that selects tokens in one block."""
    kept = max(1, int(shape.num_tokens * (1 - ratio)) - shape.num_prefix_tokens)
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=Select(kept=kept) if index == block else None)
                                                     for index in range(shape.depth)))


def _objective(model: nn.Module, data: ImageData, images: int, seed: int, metric: str, device: torch.device,
               workers: int | None) -> PlanObjective:
    """On a slice of train, chosen by seed + 1: other images than the scores are from, mostly. Never on the held-out split."""
    batches = data.batches("train", model, batch_size=128, limit=images, seed=seed + 1, workers=workers)
    return PlanObjective(model, batches, metric=metric, device=device, amp=None if model.embed_dim >= WIDE else False)


def cost_function(space: SearchSpace, unit: str, model: nn.Module, *, batch_size: int = 32, dtype: str = "float32",
                  device: torch.device | str = "cpu", progress: bool = True) -> Callable[[np.ndarray], np.ndarray]:
    """Policies (P, D) -> cost (P) in a unit of COSTS: "gmacs" deployed, everything counted; "published_gmacs" as arXiv
    2201.00043 counts (one rho); "latency_ms" of a batch, from the table measured on this machine. Raises InputError."""
    if unit == "gmacs":
        return lambda policies: macs_of(space.shape, space.counts(policies))["total"] / 1e9
    if unit == "latency_ms":
        table = latency_table(model, batch_size=batch_size, dtype=dtype, device=device, progress=progress)
        return lambda policies: table.predict(space.counts(policies))
    if unit != "published_gmacs":
        raise InputError(f"cost {unit!r} is not known; known are {list(COSTS)}")
    if space.tokens != "select":
        raise InputError(f'published_gmacs counts one selection ratio: tokens "select" is needed, not {space.tokens!r}')

    def published(policies: np.ndarray) -> np.ndarray:
        counts = space.counts(policies)
        return mdc_macs(space.shape, counts.heads, counts.neurons, np.asarray(policies)[:, -1]) / 1e9
    return published


def search(source: Source, data: str | Path, out: str | Path, *, limit: float | None = None, macs_ratio: float | None = None,
           cost: str = "gmacs", units: tuple[str, ...] = ("neurons", "heads"), tokens: str = "select",
           token_settings: dict[str, Any] | None = None, max_ratio: float = MAX_RATIO, strategy: str = "gp",
           options: Settings | None = None, metric: str = "top1_pct", criterion: str = "hsic", images: int = 1000,
           score_images: int = 512, batch_size: int = 32, dtype: str = "float32", seed: int = 0, device: str | None = None,
           class_map: str | Path | None = None, workers: int | None = None, progress: bool = True) -> Study:
    """Search a plan under a budget: `limit` in the unit `cost`, or macs_ratio of the dense model's; out/ becomes the study.

    Units are ranked by `criterion`, patches, where tokens merge, by gradient-weighted attention, both on score_images of
    train; at most max_ratio of anything is cut. Policies are measured on `images` others of train, and the best one's plan goes
    to out/plan.json. A killed search goes on when called again. batch_size and dtype are those of a latency. Raises InputError
    for a budget that can't be met.
    """
    found, out = _open(source), Path(out)
    opened, place = open_matching(data, found, class_map), pick_device(device)
    shape = shape_of(found.model)
    space = SearchSpace(shape=shape, units=tuple(units), tokens=tokens, settings=token_settings or {}, max_ratio=max_ratio)
    if (limit is None) == (macs_ratio is None):
        raise InputError("either a limit or a ratio of the dense model's cost is needed, not both")
    price = cost_function(space, cost, found.model, batch_size=batch_size, dtype=dtype, device=place, progress=progress)
    if limit is None:
        limit = macs_ratio * float(price(np.zeros((1, space.size)))[0])
    budget = Budget(limit=limit, cost=price, max_ratio=space.max_ratio, size=space.size, groups=tuple(space.groups), unit=cost)
    about = {"data": opened.name, "metric": metric, "images": images, "criterion": criterion, "score_images": score_images,
             "inputs": fingerprint([opened.files("train"), device], [found.model])}
    study = Study(out, space, budget, strategy=strategy, options=options, seed=seed, about=about)
    scores = _scores_of(study, found.model, opened, place, workers, progress)
    objective = _objective(found.model, opened, images, seed, metric, place, workers)
    best = study.run(lambda policy: objective(space.plan(policy, **scores)), progress=progress)
    made_by = {"method": "search", "strategy": strategy, "cost": cost, "limit": limit, "evaluation": best.index, "value": best.value,
               "seed": seed, "units": list(units), "tokens": tokens}
    space.plan(best.policy, **scores, made_by=made_by).save(out / PLAN)
    return study


def _scores_of(study: Study, model: nn.Module, data: ImageData, device: torch.device, workers: int | None,
               progress: bool) -> dict[str, Tensor]:
    """The scores that a plan of this study needs, from its folder where they were made before."""
    about, scores = study.info["about"], {}

    def batches():
        return data.batches("train", model, limit=about["score_images"], seed=study.seed, workers=workers)
    if study.space.units:
        path = study.folder / UNIT_SCORES
        if not path.exists():
            made = unit_scores(model, batches(), criterion=about["criterion"], seed=study.seed, device=device, progress=progress)
            atomic_write(path, save({"head_scores": made.heads.contiguous(), "neuron_scores": made.neurons.contiguous()}, made.made_by))
        units = read_units(path)
        scores |= {"heads": units.heads, "neurons": units.neurons}
    if study.space.tokens.startswith("merge"):
        path = study.folder / TOKEN_SCORES
        if not path.exists():
            atomic_write(path, save({"token_scores": token_scores(model, batches(), device=device, progress=progress).contiguous()}))
        scores["tokens"] = read_scores(path)[0]
    return scores
