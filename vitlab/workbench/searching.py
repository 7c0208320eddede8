"""The search under a budget, from a model and images to a study and its plan."""
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter
from torch import nn
from tqdm import tqdm

from vitlab.criteria.moments import Moments
from vitlab.data.images import image_config
from vitlab.exporting.running import way_of
from vitlab.measure.distance import output_of
from vitlab.measure.latency import latency_table
from vitlab.measure.moments import Layer, each_moments
from vitlab.measure.objective import check_metric
from vitlab.models import shape_of
from vitlab.models.opening import Source
from vitlab.models.support import encoder_of
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import mdc_macs
from vitlab.runtime import parallel as processes
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, atomic_write, read_json, require
from vitlab.runtime.kinds import ClassMap, Count, Data, Gmacs, MacsRatio, MaxRatio, Minutes, Or, Positive, Units, flag
from vitlab.search import Budget, SearchSpace, Study
from vitlab.search.allocation import levels
from vitlab.search.space import MAX_RATIO
from vitlab.search.strategies import Settings
from vitlab.search.strategies import settings as settings_of
from vitlab.search.token_dimensions import default_tokens
from vitlab.training.compensate import compensate as refitted
from vitlab.training.loop import fingerprint
from vitlab.workbench.pace import images_per_second, lasting
from vitlab.workbench.scoring import needs_images, replacements_of, scores_of
from vitlab.workbench.steps import amp_of, measured_batches, objective_on, open_dense, open_matching, pick_device

PLAN, REPORTED = "plan.json", "reported.json"
COSTS = ("gmacs", "published_gmacs", "latency_ms")


def cost_function(space: SearchSpace, unit: str, model: nn.Module, **timed: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Policies (P, D) -> cost (P) in a unit of COSTS: "gmacs" deployed; "published_gmacs" as arXiv 2201.00043 counts
    (one rho); "latency_ms" of a batch, from the `latency_table` that `timed` asks for. Raises InputError."""
    if unit == "gmacs":
        return space.gmacs
    if unit == "latency_ms":
        table = latency_table(model, **timed)
        return lambda policies: table.predict(space.counts(policies))
    require(unit == "published_gmacs", f"cost {unit!r} is not known; known are {list(COSTS)}")
    if space.tokens != "select" or space.sublayers or "widths" in space.units:
        raise InputError(f'published_gmacs is of tokens "select", heads and neurons alone, not of {space.tokens!r}, '
                         "sublayers or widths")

    def published(policies: np.ndarray) -> np.ndarray:
        counts = space.counts(policies)
        return mdc_macs(space.shape, counts.heads, counts.neurons, np.asarray(policies)[:, -1]) / 1e9
    return published


def _cost_of(gmacs: float | None, macs_ratio: float | None, latency_ms: float | None, published: bool,
             tokens: str | None, runtime: str, config: RunConfig) -> str:
    """The unit of a budget. Raises InputError where it is not one, or something that is not of it is given."""
    require(sum(amount is not None for amount in (gmacs, macs_ratio, latency_ms)) == 1, "a budget is gmacs, macs_ratio "
            "or latency_ms (--gmacs, --macs-ratio, --latency-ms); one of the three is needed")
    if published and latency_ms is not None:
        raise InputError("published_count is of multiply-adds; it goes with gmacs or macs_ratio, not latency_ms")
    if published and tokens not in (None, "select"):
        raise InputError(f"published_count is of one selection ratio; it goes with tokens select, not {tokens}")
    if latency_ms is None and (config.batch_size or config.dtype or runtime != "torch"):
        raise InputError("batch_size, dtype and runtime are those of a latency; they go with latency_ms")
    return "latency_ms" if latency_ms is not None else "published_gmacs" if published else "gmacs"


def search(source: Source, data: Data,
           out: Annotated[str | Path, flag(metavar="STUDY", help="folder of the study")], *, gmacs: Gmacs = None,
           macs_ratio: MacsRatio = None, latency_ms: Annotated[Positive | None, flag(metavar="MS")] = None,
           runtime: Literal["torch", "compiled", "onnxruntime", "openvino", "aoti"] = "torch",
           published_count: bool = False, units: Units = ("neurons", "heads"),
           tokens: Annotated[str | None, flag(metavar="NAME")] = None,
           token_settings: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
           max_ratio: MaxRatio = MAX_RATIO, sublayers: bool = False, multiple: Count = 1, read_out: bool = False,
           strategy: str = "gp", settings: Annotated[Or[str, Settings], flag(metavar="NAME")] = "default",
           evaluations: Count | None = None, population: Count | None = None,
           start: Literal["varied", "random", "sensitivity"] | None = None,
           parallel: Annotated[Count | None, flag(metavar="K")] = None, minutes: Minutes | None = None,
           metric: Literal["top1_pct", "miou_pct", "distill_loss"] = "distill_loss", criterion: str = "hsic",
           compensate: bool = False, images: Count = 1000, score_images: Count = 512, class_map: ClassMap = None,
           config: RunConfig = RunConfig()) -> Study:
    """Search a plan under a budget; out/ becomes the study.

    Units are ranked by `criterion`, patches, where tokens merge, by gradient-weighted attention, both on score_images
    of train; at most max_ratio of anything is cut. Policies are measured on `images` of train to choose on, and the
    best one once more on as many to report on, none of which it was made from or chosen on (`ImageData.parts`): that is
    what it is worth (`reported`), and stands in its plan, out/plan.json, as made_by "reported". With `compensate`, what
    is left of each cut layer is refitted before measuring (`calibrate` does it for the plan found). A killed search
    goes on when called again. None of `tokens`: `default_tokens`. config.batch_size (32) and dtype (float32) are those
    of a latency. Raises InputError for a budget that can't be met, or tokens that keep no grid where it is needed.

    Args:
        latency_ms: budget: milliseconds of one batch on this machine, from a measured table
        runtime: that the latency is of: the one that the model will run in
        published_count: count multiply-adds, and rank tokens, as arXiv 2201.00043 does
        units: neurons,heads,widths (of queries and keys), some of them or none
        tokens: none, select, merge, share or match, the last four with _per_stage for ratios of their own, or
            merge_per_span (default: select; match without a class token, with RoPE or of a Segmenter)
        max_ratio: largest ratio; int(count * (1 - ratio)) stay, so of few heads one may go (0.5: as published)
        sublayers: whether all heads, or all neurons, of a block may go: its attention or MLP is left out
        multiple: neurons that stay, and widths of heads, are so many, or a multiple: 8, 16 or 32, as kernels like
        read_out: the last block computes what a classifier on the class token reads alone: exact, and cheaper
        strategy: gp, random or uniform
        settings: default or published
        evaluations: policies measured in all (default: the settings')
        population: policies before the Gaussian process proposes (default: the settings')
        start: how the population is drawn; sensitivity: each dimension is measured alone first (default: the
            settings')
        parallel: policies proposed at a time (default: as many as there are processes)
        minutes: for the whole, at most; what was found is reported, and the same command goes on (default: no limit)
        metric: top-1, of a Segmenter mIoU, or the distance to the dense model's output
        criterion: that ranks heads and neurons
        compensate: refit what is left of each cut layer before a policy is measured
        images: of train, that policies are measured on, and as many others that the best is reported on, at most
        score_images: others, to rank units and tokens on, at most
    """
    cost, options = _cost_of(gmacs, macs_ratio, latency_ms, published_count, tokens, runtime, config), settings
    if isinstance(options, str):
        options = settings_of(options)
    together = parallel or processes.world()
    changes = {"evaluations": evaluations, "population": population, "initial": start,
               "batch": together if together > 1 else None}
    options = dataclasses.replace(options, **{name: value for name, value in changes.items() if value is not None})
    if published_count:
        token_settings = {"ranked_by": "all", **(token_settings or {})}
    seed, workers, progress = config.seed, config.workers, config.progress
    began, found, out = time.monotonic(), open_dense(source), Path(out)
    shape, place = shape_of(found.model), pick_device(config.device)
    tokens = tokens or default_tokens(shape)
    check_metric(shape, metric)                                                 # before there is a study of it
    if shape.needs_grid and (tokens.startswith("select") or read_out):
        why = "a class for each pixel" if shape.decoder else "a model that pools nothing"
        raise InputError(f"{'read_out' if read_out else f'tokens {tokens!r}'}: {why} needs the whole grid; tokens that "
                         "merge (match, share or merge, also with _per_stage; merge_per_span) keep it")
    space = SearchSpace(shape=shape, units=tuple(units), tokens=tokens, settings=token_settings or {},
                        max_ratio=max_ratio, sublayers=sublayers, read_out=read_out, multiple=multiple)
    by_loss = space.by_place or bool(units) and criterion == "taylor"
    labels = metric != "distill_loss" or by_loss and output_of(shape).labelled
    opened = open_matching(data, found, class_map, labels=labels)
    price = processes.after_first(lambda: cost_function(                        # a table is measured once, and kept
        space, cost, found.model, batch_size=config.batch_size or 32, dtype=config.dtype or "float32", device=place,
        way=way_of(runtime), progress=progress))
    uncut = float(price(np.zeros((1, space.size)))[0])
    limit = next(a for a in (gmacs, latency_ms, (macs_ratio or 0) * uncut) if a is not None)
    budget = Budget.of(space, limit, price, unit=cost)
    reads = space.by_place or compensate and space.units or space.units and needs_images(criterion)
    parts = opened.parts(seed, **({"score": score_images} if reads else {}), choose=images, report=images)
    content = [opened.files("train"), config.device, image_config(encoder_of(found.model)), shape.stored()]
    about = {"data": opened.name, "metric": metric, "images": images, "criterion": criterion,
             "score_images": score_images, "roles": parts.roles, "compensated": compensate,
             "inputs": fingerprint(content, [found.model])}
    study = processes.after_first(lambda: Study(out, space, budget, strategy=strategy, options=options, seed=seed,
                                               about=about))
    scores = processes.after_first(lambda: scores_of(study, found.model, parts, place, workers, progress))
    build = {}
    if compensate and space.units:              # which knows the mean of a sublayer, too
        scored = parts.batches("score", found.model, workers=workers)
        with processes.alone():
            build = {"build": by_moments(dict(each_moments(found.model.to(place), scored, space.units,
                                                           amp=amp_of(found.model))))}
    objective = objective_on(found.model, parts, "choose", metric, place, workers, **build)
    if sublayers and build:
        scores["nothing"] = processes.after_first(lambda: replacements_of(study, objective))
    until = np.inf
    if progress or minutes is not None:
        rate = images_per_second(objective.dense, objective.batches[0][0][:32], objective.amp)
        each = objective.images * limit / uncut / rate
        until = np.inf if minutes is None else began + 60 * minutes - 2 * each     # one under way, and the report
        _say_ahead(study, objective.images, each, minutes, progress)
    best = study.run(lambda policy: objective(space.plan(policy, **scores)), until=until, loggers=config.loggers,
                     progress=progress)
    made_by = {"method": "search", "strategy": strategy, "cost": cost, "limit": limit, "evaluation": best.index,
               "value": best.value, "seed": seed, "units": list(units), "tokens": tokens,
                "distance": output_of(shape).distance, **({} if latency_ms is None else {"runtime": runtime})}
    if processes.is_first():
        plan = space.plan(best.policy, **scores, made_by=made_by | {"roles": parts.roles})
        plan.save(out / PLAN)                   # it is there whatever becomes of the measuring
        with processes.alone():
            if (reported(out) or {}).get("evaluation") != best.index:
                measures = objective.on(measured_batches(found.model, parts, "report", workers))(plan)
                measures.pop("value")
                atomic_write(out / REPORTED,
                             json.dumps({"evaluation": best.index, "images": parts.roles["report"], **measures}) + "\n")
        dataclasses.replace(plan, made_by=plan.made_by | {"reported": reported(out)}).save(out / PLAN)
    processes.wait()
    return study


def _say_ahead(study: Study, images: int, each: float, minutes: float | None, progress: bool) -> None:
    """What a search is about to do, and how long that takes, in one line; a warning where a start takes longer than the
    time given. each: seconds that a policy takes, about."""
    alone = 1 + sum(map(len, levels(study.space))) if study.options.initial == "sensitivity" else 0
    left = study.options.evaluations + alone - study.spent
    if left <= 0 or not processes.is_first():
        return

    def taken(policies: int) -> str:
        return lasting(policies * each / processes.world())
    if progress:
        tqdm.write(f"search: {left} policies to measure on {images} images, about {taken(left)}"
                   + ("" if minutes is None else f"; it ends after {minutes:g} with what it has"), file=sys.stderr)
    if minutes is not None and (first := alone - study.spent) > 0 and first * each / processes.world() > 60 * minutes:
        warnings.warn(f"each dimension is measured alone first, which takes about {taken(first)}, more than the "
                      f"{minutes:g} minutes given; another start, or fewer images, would take less", stacklevel=3)


def reported(study: str | Path) -> dict[str, Any] | None:
    """What a study's best plan is worth on images that it was not chosen on: evaluation (its number), images, and the
    measures of `PlanObjective` with their errors. None where the search has not ended. Raises InputError for a file of
    something else."""
    path = Path(study) / REPORTED
    found = read_json(path) if path.is_file() else None
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{path}: holds no measures of a plan; remove it and they are measured anew")
    return found


def by_moments(moments: Mapping[Layer, Moments]) -> Callable[[nn.Module, CompressionPlan], nn.Module]:
    """compress with closed-form compensation, from moments of the dense model."""
    return lambda dense, plan: refitted(dense, plan, (), moments=moments, progress=False)
