"""Steps that train: a dense model from scratch, and a compressed one that is distilled from it."""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from timm.utils import random_seed
from torch import nn

from vitlab.data import ImageData, open_data
from vitlab.measure.distance import output_of
from vitlab.measure.units import unit_scores
from vitlab.models import checkpoint, compress, shape_of
from vitlab.models.create import create_model
from vitlab.models.opening import ModelSource, Other, Source, open_model
from vitlab.plan import CompressionPlan
from vitlab.runtime import parallel
from vitlab.runtime.config import RunConfig, flags
from vitlab.runtime.files import InputError, require
from vitlab.runtime.kinds import ClassMap, Count, Data, Factor, Or, Positive, Run, flag
from vitlab.training import recipes
from vitlab.training.gradual import partial_plan
from vitlab.training.loop import fit
from vitlab.training.recipes import Engine, Recipe
from vitlab.workbench.steps import TRAINING, Plan, need_dense, open_matching, pick_device

Trained = Annotated[Or[str, Recipe], flag(metavar="NAME", help="named recipe; `vitlab recipes` lists them")]
Images = Annotated[Count | None, Parameter(help="train on a slice of this many images")]
ChangedData = Annotated[bool, Parameter(help="go on though the data set is another than it was")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Changes:
    """Of a recipe: what is given comes in place of its own.

    Args:
        epochs: instead of the recipe's
        lr: instead of the recipe's
        distill: instead of the recipe's
        trainable: what trains: all, the matrices alone, or all but them
        matrices_lr: factor of the learning rate for merge and reconstruct matrices, instead of the recipe's; where an
            image has many patches, below 1
    """

    epochs: Count | None = None
    lr: Positive | None = None
    distill: Literal["none", "soft", "hard"] | None = None
    trainable: Literal["all", "matrices", "weights"] | None = None
    matrices_lr: Factor | None = None


DENSE = flags("epochs", "lr")


def changed(recipe: Recipe | str, changes: Changes, config: RunConfig) -> Recipe:
    """The recipe with its changes; batch_size and dtype are those of config."""
    found = recipes.recipe(recipe) if isinstance(recipe, str) else recipe
    return found.replace(**vars(changes), batch_size=config.batch_size, dtype=config.dtype)


def pretrain(*, model: Annotated[str, flag(metavar="NAME")], data: Data, out: Run, recipe: Trained = "digits",
             changes: Annotated[Changes, DENSE] = Changes(), images: Images = None,
             img_size: Annotated[Count | None, flag(metavar="PIXELS")] = None, class_map: ClassMap = None,
             engine: Engine = Engine(), changed_data: ChangedData = False, config: RunConfig = RunConfig(),
             model_args: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None) -> Path:
    """Train a timm model from scratch; returns the run folder (training/, checkpoint/). A killed run goes on (`fit`).

    Args:
        model: timm name, such as vit_micro_patch4_32 or deit_tiny_patch16_224
        img_size: instead of the model's own
    """
    settings, opened = changed(recipe, changes, config), open_data(data, class_map=class_map)
    opened.need_labels()
    device = pick_device(config.device)
    random_seed(config.seed)
    args = {"img_size": img_size, "num_classes": opened.num_classes, "drop_path_rate": settings.drop_path or None}
    given: dict[str, Any] = {name: value for name, value in args.items() if value is not None}
    built = create_model(model, **(given | (model_args or {})))
    return train_dense("pretrain", built, opened, out, settings, config, device=device, images=images, engine=engine,
                       changed_data=changed_data)


def train_dense(step: str, model: nn.Module, data: ImageData, out: str | Path, settings: Recipe, config: RunConfig, *,
                images: int | None, **how: Any) -> Path:
    """Train a model that nothing is cut of (how: of `fit`) and save it as what `step` made; returns the run folder."""
    if not output_of(model).labelled:
        raise InputError("a model without a classifier is trained by a teacher's features; `vitlab finetune` does so")
    log = fit(model, data, settings, Path(out) / TRAINING, seed=config.seed, limit=images, workers=config.workers,
              loggers=config.loggers, progress=config.progress, **how)
    save_trained(out, model, CompressionPlan.empty(shape_of(model)), data,
                 made_by={"step": step, "recipe": dataclasses.asdict(settings), "data": data.name, "seed": config.seed,
                          "last_epoch": log[-1:]})
    return Path(out)


def save_trained(out: str | Path, model: nn.Module, plan: CompressionPlan, data: ImageData,
                 made_by: dict[str, Any]) -> None:
    """The checkpoint of a training, written by the first process."""
    if parallel.is_first():
        checkpoint.save(Path(out) / checkpoint.FOLDER, model.cpu(), plan, made_by=made_by,
                        classes=data.classes if output_of(model).labelled else None)
    parallel.wait()


def finetune(source: Source, data: Data, out: Run, *,
             teacher: Annotated[Other | None, flag(metavar="SOURCE")] = None,
             teacher_model: Annotated[str | None, flag(metavar="NAME")] = None, plan: Plan | None = None,
             steps: Annotated[Count, flag(metavar="K")] = 1, recipe: Trained = "deit_tiny_pm",
             changes: Changes = Changes(), images: Images = None, class_map: ClassMap = None, engine: Engine = Engine(),
             changed_data: ChangedData = False, config: RunConfig = RunConfig()) -> Path:
    """Fine-tune a compressed model, or a dense one compressed by `plan` first, distilling from the dense one; returns
    the run folder. A killed run goes on (`fit`). A model without a classifier learns the features of its teacher, which
    it needs, and no labels.

    steps: prune and fine-tune in so many turns, each cutting an equal part of the plan (`partial_plan`, by weight
    magnitude) and training for its share of the recipe's epochs, at least one. It needs `plan`.

    Args:
        teacher: the dense model, like --checkpoint
        teacher_model: timm name of the model that the teacher's weights file is for
        plan: a plan.json by which a dense SOURCE is compressed first
        steps: with --plan: cut and fine-tune in K turns, each for its share of the epochs, at least one
    """
    settings, device = changed(recipe, changes, config), pick_device(config.device)
    found = open_model(source)
    dense = None if teacher is None else _teacher(teacher, teacher_model, source).model
    if checkpoint.is_deployed(found.model):
        raise InputError("a deployed model no longer trains; fine-tune the training form and deploy it afterwards")
    require(steps <= 1 or plan is not None, "pruning in several steps needs the dense model and a plan")
    labels = output_of(found.model).labelled
    require(dense is not None or labels, "a model without a classifier learns a teacher's features; the dense model is "
            "needed as teacher")
    opened = open_matching(data, found, class_map, labels=labels)
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
        log = fit(model, opened, turn, folder, teacher=dense, seed=config.seed, device=device, limit=images,
                  engine=engine, changed_data=changed_data, workers=config.workers,
                  about={"plan": json.loads((final if plan is None else part).to_json())}, loggers=config.loggers,
                  progress=config.progress)
    save_trained(out, model, final, opened,
                 made_by={"step": "finetune", "recipe": dataclasses.asdict(settings), "data": opened.name,
                          "seed": config.seed, "steps": steps, "plan": final.made_by, "last_epoch": log[-1:]})
    return Path(out)


def _teacher(teacher: Other, model: str | None, source: Source) -> checkpoint.Checkpoint:
    """Like `source`, where flags say of which sizes that is."""
    folder = isinstance(teacher, str | Path) and Path(teacher).is_dir()
    require(not (folder and model), f"{teacher} is a folder and says itself which model it holds; --teacher-model is "
            "for weights files")
    if folder or not isinstance(source, ModelSource):
        return open_model(teacher, model=model)
    return open_model(teacher, model=model, num_classes=source.num_classes, img_size=source.img_size)
