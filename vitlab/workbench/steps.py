"""What the steps of a study have in common, and the two that measure a model; each goes from files to files, and
notebooks and the command line call these same functions."""
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from torch import Tensor, nn

from vitlab.data import ImageData, open_data
from vitlab.data.images import image_config, in_words
from vitlab.data.masks import open_scenes
from vitlab.exporting.running import way_of
from vitlab.measure import evaluate as evaluation
from vitlab.measure import throughput as timing
from vitlab.measure.distance import output_of
from vitlab.measure.objective import PlanObjective
from vitlab.models import checkpoint, deploy
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.opening import Other, Source, open_model
from vitlab.models.segmenter import Segmenter
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.runtime import parallel
from vitlab.runtime.config import RunConfig, flags
from vitlab.runtime.cores import hold_memory
from vitlab.runtime.files import NOTEBOOKS, InputError, first_line, require
from vitlab.runtime.kinds import ClassMap, Count, Data, File, Names, Or, Run, flag
from vitlab.runtime.results import ResultRow, append_row
from vitlab.workbench.evaluating import Features, Windows, beside, of_classes, of_features, of_scenes  # noqa: F401

RESULTS, TRAINING = "results.jsonl", "training"
WIDE = 192                                      # models at least this wide gain by bf16 where the hardware has it
Plan = Or[File, CompressionPlan]
Rows = Annotated[Run | None, Parameter(help="append what was measured to RUN/results.jsonl")]


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, or itself; None: a GPU where there is one. On a CPU freed memory is kept from here on
    (`hold_memory`). Raises InputError where it can't be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and parallel.world() > 1:
            device = torch.device("cuda", torch.cuda.current_device())              # each process has its own
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} can't be used here ({first_line(error)})") from None
    require(device.type in ("cpu", "cuda", "mps", "xpu"), f"device {name!r} can't compute; cpu or cuda can")
    if device.type == "cpu":
        hold_memory()
    return device


def open_matching(data: str | Path, found: Checkpoint, class_map: str | Path | None = None, *,
                  labels: bool = True) -> ImageData:
    """The data set, images with masks for a Segmenter, its classes numbered as those the checkpoint was trained on.
    Where they are others, or it has no labels, it is refused; or, where `labels` are not needed, taken without."""
    if isinstance(found.model, Segmenter):
        require(class_map is None, "a class map is of class folders; masks have none")
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


def need_dense(found: Checkpoint) -> Checkpoint:
    """The checkpoint itself. Raises InputError where something of its model was cut already."""
    if any(block != BlockPlan() for block in found.plan.blocks):
        raise InputError("the model is already compressed; the dense one is needed here")
    return found


def open_dense(source: Source) -> Checkpoint:
    return need_dense(open_model(source))


def deployed(found: Checkpoint) -> nn.Module:
    """The fast form of a checkpoint's model."""
    return found.model if checkpoint.is_deployed(found.model) else deploy(found.model)


def amp_of(model: nn.Module) -> bool | None:
    """What `amp` is where a model is only measured: None, bf16 where the hardware has it, for a wide one."""
    return None if model.embed_dim >= WIDE else False


def objective_on(model: nn.Module, parts: ImageData, role: str, metric: str, device: torch.device, workers: int | None,
                 **settings: Any) -> PlanObjective:
    """On the images of a role of train: "choose" to compare plans, "report" to say what the chosen one is worth. Never
    on the held-out split. settings go to PlanObjective."""
    return PlanObjective(model, measured_batches(model, parts, role, workers), metric=metric, device=device,
                         amp=amp_of(model), labelled=parts.labelled, **settings)


def measured_batches(model: nn.Module, parts: ImageData, role: str,
                     workers: int | None) -> Iterable[tuple[Tensor, Tensor]]:
    return parts.batches(role, model, batch_size=parts.at_once(128), workers=workers)


def evaluate(source: Source, data: Data, *, dense: Annotated[Other | None, flag(metavar="SOURCE")] = None,
             split: str = "held_out", images: Count | None = None, name: str | None = None,
             features: Features = Features(), windows: Windows = Windows(), class_map: ClassMap = None,
             out: Rows = None, config: Annotated[RunConfig, flags(but=("log",))] = RunConfig(),
             crop: Annotated[float | None, Parameter(parse=False)] = None,
             quick: Annotated[bool, Parameter(parse=False)] = False) -> ResultRow:
    """Accuracy and cost of a model's deployed form; a row, appended to out/results.jsonl where `out` is given. dense:
    the model that it was made from, of the same classes, to whose output the distance (`output_of`) is measured on the
    same images. config.batch_size None: 64, or of a Segmenter 1, so that images may differ in size; dtype None:
    float32. crop: of its images, instead of the model's crop_pct. quick: the row says that it is of a quick run
    (`caveats`). gmacs is of one window. Logits are taken for one softmax over the classes. Of a model without a
    classifier, the distance, or top-1 as `features` say, is asked for.

    Args:
        dense: the model it was made from: the distance to its output, too
        split: the one that is held out, or another by its name
        images: a slice of this many images
        name: name in the result row (default: SOURCE)
    """
    found = features.seen(open_model(source))
    original = None if dense is None else features.seen(open_model(dense)).model
    classifies = output_of(found.model).labelled and not features.asked
    require(classifies or features.asked or dense is not None, "the model has no classifier; the model it was made "
            "from (dense) says how far its features are from that one's, knn and classes what classes they tell")
    if config.dtype == "float16":
        raise InputError("dtype float16 is of trainings and throughput; models are measured in float32 or bfloat16")
    opened = open_matching(data, found, class_map, labels=classifies or features.asked)
    model, device = deployed(found), pick_device(config.device)
    amp, of_pixels = evaluation.uses_bf16(device, config.dtype == "bfloat16"), isinstance(model, Segmenter)
    given = windows.given()
    if original is not None:
        require(not of_pixels and not isinstance(original, Segmenter), "the distance to a dense model is measured of "
                "classifiers, and one of these is a Segmenter")
        require(original.num_classes == model.num_classes, f"the dense model has {original.num_classes} classes, this "
                f"one {model.num_classes}; the one it was made from is needed")
    if not of_pixels and given:
        raise InputError(f"{next(iter(given))} is of segmentation; the model gives one class for an image")
    whole: dict[str, Any] = {"whole": True} if of_pixels else {}
    batches = opened.batches(split, model, batch_size=config.batch_size or (1 if of_pixels else 64), limit=images,
                             seed=config.seed, crop_pct=crop, workers=config.workers, shared=True, **whole)
    how: dict[str, Any] = {"device": device, "amp": amp, "progress": config.progress}
    if of_pixels:
        measures, more = of_scenes(model, batches, opened.classes or [], given, **how)
    elif classifies:
        measures, more = of_classes(model, batches, original, **how)
    else:
        measures, more = of_features(model, batches, original, opened, features, config.workers, **how)
    if more.get("broken") and parallel.is_first():
        print(f"{more['broken']} broken images left out", file=sys.stderr)
    prepared = image_config(found.model.encoder if of_pixels else model) | ({} if crop is None else {"crop_pct": crop})
    row = ResultRow(
        model=name or str(source), dataset=opened.name, split=opened.held_out if split == "held_out" else split,
        **measures, gmacs=cost.gmacs(found.plan), params_m=cost.params(model)["total"] / 1e6,
        conditions={"device": str(device), "dtype": "bfloat16" if amp else "float32", "limit": images,
                    "seed": config.seed, **more, "prepared": in_words(prepared, resized=not of_pixels),
                    "quick": quick, "form": "deployed", "plan": found.plan.made_by, "versions": checkpoint.versions()})
    if out is not None and parallel.is_first():
        append_row(Path(out) / RESULTS, row)
    return row


def throughput(sources: Annotated[Or[tuple[str, ...], Sequence[str], dict[str, Other]], Parameter(name="SOURCE")], *,
               runtime: Names = ("torch",), repeats: Count = 10, out: Rows = None,
               config: Annotated[RunConfig, flags("device", "batch_size", "dtype", "quiet")] = RunConfig(),
               like: Annotated[ResultRow | None, Parameter(parse=False)] = None,
               quick: Annotated[bool, Parameter(parse=False)] = False) -> list[ResultRow]:
    """Speed of deployed models at config.batch_size (32), and their latency at batch 1; the first is the baseline, all
    in turn in this process, each in every runtime. A timm name stands for the architecture alone, with random weights.
    Rows are appended to out/results.jsonl where `out` is given; `like` is a row that says of which dataset and split;
    quick: that they are of a quick run (`vitlab.runtime.caveats`).

    Args:
        sources: checkpoint or run folders, or timm names
        runtime: of torch, compiled, onnxruntime, openvino, aoti; the first is the baseline's
        repeats: rounds of all of them
    """
    device, dtype, batch_size = pick_device(config.device), config.dtype or "float32", config.batch_size or 32
    options: dict[str, Any] = {"repeats": repeats, "dtype": dtype, "device": device, "progress": config.progress,
                               "ways": [way_of(name) for name in runtime]}
    named = sources if isinstance(sources, dict) else {str(s): s for s in sources}
    models = {name: deployed(open_model(each, pretrained=False)) for name, each in named.items()}
    speeds, single = (timing.measure(models, batch_size=size, **options) for size in (batch_size, 1))
    conditions = timing.conditions(device, dtype, batch_size, repeats) | ({"quick": True} if quick else {})
    rows = [ResultRow(model=name, dataset=like.dataset if like else "", split=like.split if like else "",
                      throughput_img_s=speed.throughput_img_s, ratio=speed.ratio, latency_ms=single[name].latency_ms,
                      conditions={"speed": conditions | {"ratio_range": [speed.ratio_min, speed.ratio_max],
                                                         "peak_memory_mb": speed.peak_memory_mb,
                                                         "energy_mj_img": speed.energy_mj_img,
                                                         "runtime": speed.runtime}})
            for name, speed in speeds.items()]
    if out is not None:
        for row in rows:
            append_row(Path(out) / RESULTS, row)
    return rows
