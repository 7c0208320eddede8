"""The steps of a study, each from files to files: notebooks and the command line call these same functions."""
import dataclasses
import functools
import json
import math
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.utils import random_seed
from torch import Tensor, nn

from vitlab.criteria.planning import prune_and_merge
from vitlab.data import ImageData, open_data
from vitlab.data.images import image_config, in_words
from vitlab.data.masks import open_scenes
from vitlab.measure import evaluate as evaluation
from vitlab.measure import throughput as timing
from vitlab.measure.capture import need_classifier, scored
from vitlab.measure.confusion import check_appear
from vitlab.measure.pixels import Segmentation, evaluate_scenes
from vitlab.measure.units import unit_scores
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.create import create_model
from vitlab.models.opening import Source, open_model
from vitlab.models.segmenter import Segmenter
from vitlab.plan import BlockPlan, CompressionPlan, cost, tokens
from vitlab.plan.shape import ViTShape
from vitlab.runtime import parallel
from vitlab.runtime.files import NOTEBOOKS, InputError, atomic_write, first_line
from vitlab.runtime.results import ResultRow, append_row
from vitlab.training.gradual import partial_plan
from vitlab.training.loop import fit
from vitlab.training.recipes import Engine, Recipe, recipe

RESULTS, TRAINING = "results.jsonl", "training"


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, or itself; None: a GPU where there is one. Raises InputError where it can't be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and parallel.world() > 1:
            device = torch.device("cuda", torch.cuda.current_device())              # each process has its own
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} can't be used here ({first_line(error)})") from None
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise InputError(f"device {name!r} can't compute; cpu or cuda can")
    return device


def open_matching(data: str | Path, found: Checkpoint, class_map: str | Path | None = None, *,
                  labels: bool = True) -> ImageData:
    """The data set, images with masks for a Segmenter, its classes numbered as those the checkpoint was trained on.
    Where they are others, or it has no labels, it is refused; or, where `labels` are not needed, taken without."""
    if isinstance(found.model, Segmenter):
        if class_map is not None:
            raise InputError("a class map is of class folders; masks have none")
        opened = open_scenes(data)
    else:
        opened = open_data(data, class_map=class_map)
    if labels:
        opened.need_labels()
    try:
        fitting = opened.numbered_as(found.info.get("classes"))
        fitting.check_fits(found.model.num_classes)
    except InputError as error:
        if labels or isinstance(found.model, Segmenter):
            raise
        if parallel.is_first():
            warnings.warn(f"{error}; its images are taken without labels, which this step does not need", stacklevel=2)
        return opened.without_labels(str(error))
    return fitting


def study_folder(path: str | Path) -> Path:
    """A study's folder. In the notebooks' own folder, where JupyterLab starts them, a relative path is from the
    project's root."""
    inside = Path.cwd() == NOTEBOOKS and not Path(path).is_absolute()
    return NOTEBOOKS.parent / path if inside else Path(path)


def pretrain(model: str, data: str | Path, out: str | Path, *, settings: Recipe | str = "digits", seed: int = 0,
             device: str | torch.device | None = None, limit: int | None = None, class_map: str | Path | None = None,
             workers: int | None = None, engine: Engine | None = None, changed_data: bool = False,
             progress: bool = True, **model_args: Any) -> Path:
    """Train a timm model from scratch; returns the run folder (training/, checkpoint/). A killed run goes on
    (`fit`)."""
    settings, opened = recipe(settings) if isinstance(settings, str) else settings, open_data(data, class_map=class_map)
    opened.need_labels()
    device = pick_device(device)
    random_seed(seed)
    if opened.num_classes is not None:
        model_args = {"num_classes": opened.num_classes, **model_args}
    if settings.drop_path:
        model_args["drop_path_rate"] = settings.drop_path
    return train_dense("pretrain", create_model(model, **model_args), opened, out, settings, seed=seed, device=device,
                       limit=limit, engine=engine, changed_data=changed_data, workers=workers, progress=progress)


def train_dense(step: str, model: nn.Module, data: ImageData, out: str | Path, settings: Recipe, *, seed: int,
                **how: Any) -> Path:
    """Train a model that nothing is cut of (how: of `fit`) and save it as what `step` made; returns the run folder."""
    need_classifier(model, "trained models")
    log = fit(model, data, settings, Path(out) / TRAINING, seed=seed, **how)
    save_trained(out, model, CompressionPlan.empty(shape_of(model)), data,
                 made_by={"step": step, "recipe": dataclasses.asdict(settings), "data": data.name, "seed": seed,
                          "last_epoch": log[-1:]})
    return Path(out)


def save_trained(out: str | Path, model: nn.Module, plan: CompressionPlan, data: ImageData,
                 made_by: dict[str, Any]) -> None:
    """The checkpoint of a training, written by the first process."""
    if parallel.is_first():
        checkpoint.save(Path(out) / checkpoint.FOLDER, model.cpu(), plan, classes=data.classes, made_by=made_by)
    parallel.wait()


def score(source: Source, data: str | Path, out: str | Path, *, images: int = 512, batch_size: int | None = None,
          criterion: str = "gradient", absolute: str = "image", seed: int = 0, device: str | None = None,
          class_map: str | Path | None = None, workers: int | None = None, progress: bool = True) -> Tensor:
    """Token scores (L, n) by a criterion on the images of train that are for scores (`ImageData.parts`), at most
    `images`, written to `out` (safetensors). batch_size None: 64, of scenes 8."""
    found = open_model(source)
    if criterion in ("gradient", "hsic"):
        need_classifier(found.model, f"token scores by {criterion}")
    opened = open_matching(data, found, class_map, labels=criterion == "gradient")
    batch_size = batch_size or opened.at_once(64)
    parts = opened.parts(seed, score=images)
    batches = parts.batches("score", found.model, batch_size=batch_size, seed=seed, workers=workers, shared=True)
    scores, used = scored(found.model, batches, criterion=criterion, absolute=absolute, device=pick_device(device),
                          progress=progress)
    made_by = {"data": opened.name, "criterion": criterion, "batch_size": str(batch_size), "absolute": absolute,
               "seed": str(seed), "images": str(used), **what_is_shared(parts)}
    if parallel.is_first():
        atomic_write(out, save({"token_scores": scores.contiguous()}, metadata=made_by))
    return scores


def what_is_shared(parts: ImageData) -> dict[str, str]:
    """What the images of scores share with other roles, as metadata of the scores' file; empty where nothing."""
    return {"shared": "; ".join(parts.roles["shared"])} if "shared" in parts.roles else {}


def read_scores(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """(scores (L, n), what made them). Raises InputError naming the file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; `vitlab score` writes it")
    try:
        with safe_open(path, "pt") as file:
            if "token_scores" not in list(file.keys()):
                raise InputError(f"{path}: holds no token_scores; `vitlab score` writes them (scores of units are for "
                                 f"--unit-scores)")
            scores, made_by = file.get_tensor("token_scores"), file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: can't be read, it may be cut short ({error})") from None
    if scores.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{path}: token_scores are {scores.dtype}; float32 is needed")
    return scores, made_by


def prune(source: Source, scores: str | Path | None, out: str | Path, *, plan: str | Path | None = None,
          rule: str = "center", keep_rate: float | None = None, prune_rate: float = tokens.PRUNE_RATE,
          boundary: str = tokens.BOUNDARY, weights: str = tokens.WEIGHTS, decay: float | None = None,
          share: bool = False, spans: Sequence[Sequence[float]] | None = None, gmacs: float | None = None,
          macs_ratio: float | None = None) -> Checkpoint:
    """Compress a dense model by its token scores, or by a plan file; writes and returns the checkpoint in `out`. decay:
    of scores per block, None: the published one, spread over the depth. share: regions share their block's update
    (methods C1), without matrices. spans: (first block, last block, keep rate) each, instead of keep_rate, of blocks
    through which tokens stay merged (`prune_and_merge`). gmacs, macs_ratio: a budget (`limit_of`) instead of keep_rate,
    which is the largest that meets it then."""
    found = open_model(source)
    if (plan is None) == (scores is None):
        raise InputError("either token scores or a plan file is needed, not both")
    budget = gmacs is not None or macs_ratio is not None
    if budget and (plan is not None or keep_rate is not None or spans is not None):
        given = "a plan" if plan is not None else "a rate for each span" if spans is not None else "a keep rate"
        raise InputError(f"a budget finds the keep rate, but {given} is given; one of the two is needed")
    if plan is not None:
        made, made_by = CompressionPlan.load(plan, shape_of(need_dense(found).model)), {"from_plan": Path(plan).name}
    else:
        assert scores is not None                                               # as is checked above
        values, source_of_scores = read_scores(scores)
        made_by, shape = {"scores": source_of_scores}, shape_of(found.model)
        made_of = functools.partial(prune_and_merge, values, shape, rule=rule, prune_rate=prune_rate, boundary=boundary,
                                    weights=weights, decay=decay, share=share, spans=spans)
        if budget:
            limit = limit_of(shape, gmacs, macs_ratio)
            made_by = {**made_by, "gmacs": limit}
            keep_rate = _largest_keep_rate(lambda rate: cost.gmacs(made_of(keep_rate=rate)), shape, limit)
        made = made_of(keep_rate=keep_rate)
    return apply_plan(found, made, out, made_by)


def limit_of(shape: ViTShape, gmacs: float | None, macs_ratio: float | None) -> float:
    """A budget in GMACs: `gmacs`, or macs_ratio of the dense model's. Raises InputError where not one of the two is
    given."""
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
                         f"(one patch is a center) "
                         f"to below {dense:.6g} (the dense model's): ratios from {price(rates[0]) / dense:.3g} to "
                         f"below 1")
    return rates[fit - 1]


def need_dense(found: Checkpoint) -> Checkpoint:
    """The checkpoint itself. Raises InputError where something of its model was cut already."""
    if any(block != BlockPlan() for block in found.plan.blocks):
        raise InputError("the model is already compressed; the dense one is needed here")
    return found


def apply_plan(found: Checkpoint, plan: CompressionPlan, out: str | Path,
               made_by: dict[str, Any] | None = None) -> Checkpoint:
    """Compress a dense model by a plan; writes and returns the checkpoint in `out`."""
    small, info = compress(need_dense(found).model, plan), {"step": "prune", **(made_by or {}), **plan.made_by}
    checkpoint.save(Path(out) / checkpoint.FOLDER, small, plan, classes=found.info.get("classes"), made_by=info)
    return checkpoint.load(out)


def finetune(source: Source, teacher: Source | None, data: str | Path, out: str | Path, *,
             plan: str | Path | CompressionPlan | None = None, steps: int = 1, settings: Recipe | str = "digits_pm",
             seed: int = 0, device: str | None = None, limit: int | None = None, class_map: str | Path | None = None,
             workers: int | None = None, engine: Engine | None = None, changed_data: bool = False,
             progress: bool = True) -> Path:
    """Fine-tune a compressed model, or a dense one compressed by `plan` first, distilling from the dense one; returns
    the run folder. A killed run goes on (`fit`). Raises InputError for a model or a teacher without classes.

    steps: prune and fine-tune in so many turns, each cutting an equal part of the plan (`partial_plan`, by weight
    magnitude) and training for its share of the recipe's epochs, at least one. It needs `plan`.
    """
    settings = recipe(settings) if isinstance(settings, str) else settings
    found = open_model(source)
    dense = None if teacher is None else open_model(teacher)
    if checkpoint.is_deployed(found.model):
        raise InputError("a deployed model no longer trains; fine-tune the training form and deploy it afterwards")
    if steps > 1 and plan is None:
        raise InputError("pruning in several steps needs the dense model and a plan")
    for each in (found, *([] if dense is None else [dense])):
        need_classifier(each.model, "fine-tuned models and teachers")
    opened = open_matching(data, found, class_map)
    final, model, log = found.plan, found.model, []
    if plan is not None:
        need_dense(found)
        final = plan if isinstance(plan, CompressionPlan) else CompressionPlan.load(plan, shape_of(model))
        final.check_fits(shape_of(model))
        scores, before = unit_scores(model, (), criterion="weight"), None
    for step in range(1, steps + 1):
        folder, turn = Path(out) / TRAINING, settings
        if plan is not None:
            part = partial_plan(final, step / steps, scores)
            model, before = compress(model, part, before=before), part
        if steps > 1:
            folder, turn = folder / f"step-{step}", settings.replace(epochs=max(1, settings.epochs // steps))
        log = fit(model, opened, turn, folder, teacher=None if dense is None else dense.model, seed=seed,
                  device=pick_device(device), limit=limit, engine=engine, changed_data=changed_data, workers=workers,
                  about={"plan": json.loads((final if plan is None else part).to_json())}, progress=progress)
    save_trained(out, model, final, opened,
                 made_by={"step": "finetune", "recipe": dataclasses.asdict(settings), "data": opened.name, "seed": seed,
                          "steps": steps,
                   "plan": final.made_by, "last_epoch": log[-1:]})
    return Path(out)


def deployed(found: Checkpoint) -> nn.Module:
    """The fast form of a checkpoint's model."""
    return found.model if checkpoint.is_deployed(found.model) else deploy(found.model)


def evaluate(source: Source, data: str | Path, *, dense: Source | None = None, name: str | None = None,
             split: str = "held_out", out: str | Path | None = None, batch_size: int | None = None,
             device: str | torch.device | None = None, amp: bool | None = False, class_map: str | Path | None = None,
             crop_pct: float | None = None, limit: int | None = None, seed: int = 0, workers: int | None = None,
             quick: bool = False, progress: bool = True, **windows: Any) -> ResultRow:
    """Accuracy and cost of a model's deployed form; a row, appended to out/results.jsonl where `out` is given. dense:
    the model that it was made from, of the same classes, to whose output the distance is measured on the same images.
    batch_size None: 64, or of a Segmenter 1, so that images may differ in size. quick: the row says that it is of a
    quick run (`caveats`). windows: window, stride, scales and flip of `segment`, of a Segmenter alone; gmacs is of one
    window. Outputs are taken for one softmax over the classes. Raises InputError for a model without classes.
    """
    found = open_model(source)
    need_classifier(found.model, "top-1, mIoU and loss")
    opened, model, device = open_matching(data, found, class_map), deployed(found), pick_device(device)
    amp, of_pixels, original = evaluation.uses_bf16(device, amp), isinstance(model, Segmenter), None
    if dense is not None:
        original = open_model(dense).model
        if of_pixels or isinstance(original, Segmenter):
            raise InputError("the distance to a dense model is measured of classifiers, and one of these is a "
                             "Segmenter")
        if original.num_classes != model.num_classes:
            raise InputError(f"the dense model has {original.num_classes} classes, this one {model.num_classes}; the "
                             f"one it was made from "
                             "is needed")
    if not of_pixels and windows:
        raise InputError(f"{next(iter(windows))} is of segmentation; the model gives one class for an image")
    whole: dict[str, Any] = {"whole": True} if of_pixels else {}
    batches = opened.batches(split, model, batch_size=batch_size or (1 if of_pixels else 64), limit=limit, seed=seed,
                             crop_pct=crop_pct, workers=workers, shared=True, **whole)
    if of_pixels:
        found_scenes = evaluate_scenes(model, batches, device=device, amp=amp, progress=progress, **windows)
        classes = opened.classes or []
        check_appear(found_scenes.scores, classes)
        measures, more = _scene_measures(found_scenes, classes, windows)
    else:
        accuracy = evaluation.evaluate(model, batches, device=device, amp=amp, dense=original, progress=progress)
        measures = {f.name: getattr(accuracy, f.name) for f in dataclasses.fields(accuracy)
                    if f.name not in ("images", "broken")}
        more = {"images": accuracy.images, "broken": accuracy.broken}
        if accuracy.broken and parallel.is_first():
            print(f"{accuracy.broken} broken images left out", file=sys.stderr)
    config = image_config(found.model.encoder if of_pixels
                          else model) | ({} if crop_pct is None else {"crop_pct": crop_pct})
    row = ResultRow(
        model=name or str(source), dataset=opened.name, split=opened.held_out if split == "held_out" else split,
        **measures, gmacs=cost.gmacs(found.plan), params_m=cost.params(model)["total"] / 1e6,
        conditions={"device": str(device), "dtype": "bfloat16" if amp else "float32", "limit": limit, "seed": seed,
                    **more, "prepared": in_words(config, resized=not of_pixels),
                    "quick": quick, "form": "deployed", "plan": found.plan.made_by, "versions": checkpoint.versions()})
    if out is not None and parallel.is_first():
        append_row(Path(out) / RESULTS, row)
    return row


def _scene_measures(found: Segmentation, classes: Sequence[str],
                    windows: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a row says, its conditions) of a Segmenter that was measured."""
    scores = found.scores
    iou = {name: None if math.isnan(value) else value for name, value in zip(classes, scores.iou_pct)}
    return ({"miou_pct": scores.miou_pct, "miou_se": scores.miou_se, "pixel_accuracy_pct": scores.pixel_accuracy_pct,
             "loss": found.loss, "loss_se": found.loss_se},
            {"images": found.images, "pixels": scores.pixels, "mean_accuracy_pct": scores.mean_accuracy_pct,
             "iou_pct": iou, **({"windows": windows} if windows else {})})


def throughput(sources: dict[str, Source], *, batch_size: int = 32, repeats: int = 10, dtype: str = "float32",
               device: str | torch.device | None = None, progress: bool = True, out: str | Path | None = None,
               like: ResultRow | None = None, quick: bool = False) -> list[ResultRow]:
    """Speed of deployed models at `batch_size`, and their latency at batch 1; the first is the baseline, all in turn in
    this process. A timm name stands for the architecture alone, with random weights.

    Rows are appended to out/results.jsonl where `out` is given; `like` is a row that says of which dataset and split;
    quick: that they are of a quick run (`vitlab.runtime.caveats`).
    """
    device = pick_device(device)
    models = {n: deployed(open_model(s, pretrained=False)) for n, s in sources.items()}
    options: dict[str, Any] = {"repeats": repeats, "dtype": dtype, "device": device, "progress": progress}
    speeds, single = timing.measure(models, batch_size=batch_size,
                                    **options), timing.measure(models, batch_size=1, **options)
    conditions = timing.conditions(device, dtype, batch_size, repeats) | ({"quick": True} if quick else {})
    rows = [ResultRow(model=name, dataset=like.dataset if like else "", split=like.split if like else "",
                      throughput_img_s=speed.throughput_img_s, ratio=speed.ratio, latency_ms=single[name].latency_ms,
                      conditions={"speed": conditions | {"ratio_range": [speed.ratio_min, speed.ratio_max],
                                                         "peak_memory_mb": speed.peak_memory_mb}})
            for name, speed in speeds.items()]
    if out is not None:
        for row in rows:
            append_row(Path(out) / RESULTS, row)
    return rows
