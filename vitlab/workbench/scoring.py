"""Steps that score: tokens, or heads and neurons, on images of train; and their files."""
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vitlab.criteria.units import UnitScores, unit_criterion
from vitlab.data import ImageData
from vitlab.measure.averaging import first_images
from vitlab.measure.capture import scored, token_scores
from vitlab.measure.distance import output_of
from vitlab.measure.objective import PlanObjective
from vitlab.measure.units import unit_scores
from vitlab.models.opening import Source, open_model
from vitlab.runtime import parallel
from vitlab.runtime.config import MEASURE, RunConfig
from vitlab.runtime.files import InputError, atomic_write, require
from vitlab.runtime.kinds import ClassMap, Count, Data, flag
from vitlab.search import Study
from vitlab.search.sensitivity import better_nothing
from vitlab.workbench.steps import open_dense, open_matching, pick_device

UNIT_SCORES, TOKEN_SCORES = "unit_scores.safetensors", "token_scores.safetensors"
REPLACEMENTS, REPLACED_ON = "replacements.safetensors", 128     # images that say what stands for a sublayer left out
OF_UNITS, OF_TOKENS = ("head_scores", "neuron_scores"), ("token_scores",)       # tensors in these files
ScoresFile = Annotated[str | Path, flag(metavar="FILE", help="scores file, .safetensors")]


def score_tokens(source: Source, data: Data, out: ScoresFile, *, criterion: str = "gradient",
                 absolute: Literal["image", "batch"] = "image", images: Count = 512, class_map: ClassMap = None,
                 config: Annotated[RunConfig, MEASURE] = RunConfig()) -> Tensor:
    """Score tokens on images of train: (L, n), written to `out`.

    The images are those that are for scores (`ImageData.parts`). config.batch_size None: 64, of scenes 8.

    Args:
        criterion: gradient, class_attention or hsic
        absolute: of criterion gradient: absolute value per image, or after the batch as published
        images: of train, at most
    """
    found = open_model(source)
    opened = open_matching(data, found, class_map, labels=criterion == "gradient" and output_of(found.model).labelled)
    batch_size, parts = config.batch_size or opened.at_once(64), opened.parts(config.seed, score=images)
    batches = parts.batches("score", found.model, batch_size=batch_size, seed=config.seed, workers=config.workers,
                            shared=True)
    scores, used = scored(found.model, batches, criterion=criterion, absolute=absolute,
                          device=pick_device(config.device), progress=config.progress)
    made_by = {"data": opened.name, "criterion": criterion, "batch_size": str(batch_size), "absolute": absolute,
               "seed": str(config.seed), "images": str(used), **what_is_shared(parts)}
    if parallel.is_first():
        atomic_write(out, save({OF_TOKENS[0]: scores.contiguous()}, metadata=made_by))
    return scores


def score_units(source: Source, data: Data, out: ScoresFile, *, criterion: str = "hsic", images: Count = 512,
                class_map: ClassMap = None, config: Annotated[RunConfig, MEASURE] = RunConfig()) -> UnitScores:
    """Score heads and neurons on images of train, written to `out`.

    The images are those that are for scores (`ImageData.parts`). config.batch_size None: 64, of scenes 8.

    Args:
        criterion: hsic, weight, activation, taylor, reconstruction, fisher or random
        images: of train, at most
    """
    found = open_dense(source)
    reads = needs_images(criterion)
    opened = open_matching(data, found, class_map, labels=criterion == "taylor" and output_of(found.model).labelled)
    batch_size, batches, words = config.batch_size or opened.at_once(64), (), {}
    if reads:
        parts = opened.parts(config.seed, score=images)
        batches = parts.batches("score", found.model, batch_size=batch_size, seed=config.seed, workers=config.workers,
                                shared=True)
        words = what_is_shared(parts)
    scores = unit_scores(found.model, batches, criterion=criterion, seed=config.seed, device=pick_device(config.device),
                         progress=config.progress)
    made_by = {**words, **scores.made_by, "data": opened.name, "batch_size": str(batch_size), "seed": str(config.seed)}
    if parallel.is_first():
        atomic_write(out, save(dict(zip(OF_UNITS, (scores.heads.contiguous(), scores.neurons.contiguous()))), made_by))
    return dataclasses.replace(scores, made_by=made_by)


def needs_images(criterion: str) -> bool:
    """Whether scores by a criterion of units are of images. Raises InputError for one that is not known."""
    return unit_criterion(criterion).needs not in ("weights", "nothing")


def what_is_shared(parts: ImageData) -> dict[str, str]:
    """What the images of scores share with other roles, as metadata of the scores' file; empty where nothing."""
    return {"shared": "; ".join(parts.roles["shared"])} if "shared" in parts.roles else {}


def _read(path: str | Path, names: Sequence[str], step: str) -> tuple[list[Tensor], dict[str, str]]:
    """(tensors of a file by name, its metadata). Raises InputError naming the file and the step that writes it."""
    require(Path(path).is_file(), f"{path}: no such file; `vitlab score {step}` writes it")
    require(Path(path).suffix == ".safetensors", f"{path}: not a .safetensors file; `vitlab score {step}` writes one")
    try:
        with safe_open(path, "pt") as file:
            missing = sorted(set(names) - set(file.keys()))
            if missing:
                raise InputError(f"{path}: holds no {missing[0]}; `vitlab score {step}` writes them")
            tensors, metadata = [file.get_tensor(name) for name in names], file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: can't be read, it may be cut short ({error})") from None
    for name, tensor in zip(names, tensors):
        require(tensor.dtype in (torch.float32, torch.float64) or name not in (*OF_UNITS, *OF_TOKENS),
                f"{path}: {name} are {tensor.dtype}; float32 is needed")
    return tensors, metadata


def read_scores(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """(scores (L, n), what made them). Raises InputError naming the file."""
    (scores,), made_by = _read(path, OF_TOKENS, "tokens")
    return scores, made_by


def read_units(path: str | Path) -> UnitScores:
    """Unit scores from a file. Raises InputError naming it."""
    tensors = _read(path, OF_UNITS, "units")[0]
    for name, tensor in zip(OF_UNITS, tensors):
        require(tensor.isfinite().all(), f"{path}: {name} must be finite")
    return UnitScores(heads=tensors[0], neurons=tensors[1], made_by={"read_from": Path(path).name})


def _kept(path: Path, names: Sequence[str], made_for: str, make: Callable[[], Iterable[Tensor]]) -> list[Tensor]:
    """What `make` gives, from its file where it was made before. Raises InputError where that was for another study."""
    if not path.exists():
        atomic_write(path, save({name: tensor.contiguous() for name, tensor in zip(names, make())},
                                {"made_for": made_for}))
    tensors, metadata = _read(path, names, names[0].partition("_")[0])
    require(metadata.get("made_for") == made_for, f"{path}: scores of something else than this study; remove the file "
            "and they are made anew")
    return tensors


def scores_of(study: Study, model: nn.Module, parts: ImageData, device: torch.device, workers: int | None,
              progress: bool) -> dict[str, Tensor]:
    """The scores that a plan of this study needs, from its folder where they were made before, for this study."""
    about, scores = study.info["about"], {}
    how: dict[str, Any] = {"device": device, "progress": progress}
    made_for = (f"{' '.join(str(about[k]) for k in ('inputs', 'criterion', 'score_images'))} seed {study.seed} images "
                f"{parts.roles.get('score', 0)}")

    def batches():
        return parts.batches("score", model, workers=workers) if "score" in parts.roles else ()

    def of_units() -> tuple[Tensor, Tensor]:
        made = unit_scores(model, batches(), criterion=about["criterion"], seed=study.seed, **how)
        return made.heads, made.neurons
    if study.space.units:
        scores["heads"], scores["neurons"] = _kept(study.folder / UNIT_SCORES, OF_UNITS, made_for, of_units)
    if study.space.by_place:
        scores["tokens"], = _kept(study.folder / TOKEN_SCORES, OF_TOKENS, made_for,
                                  lambda: [token_scores(model, batches(), **how)])
    return scores


def replacements_of(study: Study, objective: PlanObjective) -> Tensor:
    """`better_nothing` of the study's space, on the first of the images to choose on, of which a refit knows the mean;
    kept in its folder."""
    about = study.info["about"]
    made_for = f"{about['inputs']} seed {study.seed} images {about['roles']} metric {about['metric']}"
    return _kept(study.folder / REPLACEMENTS, ("nothing",), made_for, lambda: [better_nothing(
        objective.on(first_images(objective.batches, REPLACED_ON)), study.space.shape, study.space.units)])[0]
