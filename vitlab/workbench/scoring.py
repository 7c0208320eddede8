"""Steps that score: tokens, or heads and neurons, on images of train; and their files."""
import dataclasses
from pathlib import Path
from typing import Annotated, Literal

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
from vitlab.models.weights import read_file
from vitlab.runtime import parallel
from vitlab.runtime.config import MEASURE, RunConfig
from vitlab.runtime.files import InputError, atomic_write, require
from vitlab.runtime.kinds import ClassMap, Count, Data, flag
from vitlab.search import Study
from vitlab.search.sensitivity import better_nothing
from vitlab.workbench.steps import open_dense, open_matching, pick_device

UNIT_SCORES, TOKEN_SCORES = "unit_scores.safetensors", "token_scores.safetensors"
REPLACEMENTS, REPLACED_ON = "replacements.safetensors", 128     # images that say what stands for a sublayer left out
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
    opened = open_matching(data, found, class_map,
                           labels=criterion == "gradient" and output_of(found.model).labelled)
    batch_size, parts = config.batch_size or opened.at_once(64), opened.parts(config.seed, score=images)
    batches = parts.batches("score", found.model, batch_size=batch_size, seed=config.seed, workers=config.workers,
                            shared=True)
    scores, used = scored(found.model, batches, criterion=criterion, absolute=absolute,
                          device=pick_device(config.device), progress=config.progress)
    made_by = {"data": opened.name, "criterion": criterion, "batch_size": str(batch_size), "absolute": absolute,
               "seed": str(config.seed), "images": str(used), **what_is_shared(parts)}
    if parallel.is_first():
        atomic_write(out, save({"token_scores": scores.contiguous()}, metadata=made_by))
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
        write_units(out, scores, made_by)
    return dataclasses.replace(scores, made_by=made_by)


def needs_images(criterion: str) -> bool:
    """Whether scores by a criterion of units are of images. Raises InputError for one that is not known."""
    return unit_criterion(criterion).needs not in ("weights", "nothing")


def what_is_shared(parts: ImageData) -> dict[str, str]:
    """What the images of scores share with other roles, as metadata of the scores' file; empty where nothing."""
    return {"shared": "; ".join(parts.roles["shared"])} if "shared" in parts.roles else {}


def read_scores(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """(scores (L, n), what made them). Raises InputError naming the file."""
    require(Path(path).is_file(), f"{path}: no such file; `vitlab score tokens` writes it")
    try:
        with safe_open(path, "pt") as file:
            require("token_scores" in list(file.keys()), f"{path}: holds no token_scores; `vitlab score tokens` writes "
                    "them (scores of units are for `vitlab prune units`)")
            scores, made_by = file.get_tensor("token_scores"), file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: can't be read, it may be cut short ({error})") from None
    if scores.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{path}: token_scores are {scores.dtype}; float32 is needed")
    return scores, made_by


def write_units(path: str | Path, scores: UnitScores, metadata: dict[str, str]) -> None:
    """Write what `read_units` reads, atomically."""
    atomic_write(path,
                 save({"head_scores": scores.heads.contiguous(), "neuron_scores": scores.neurons.contiguous()},
                      metadata))


def read_units(path: str | Path) -> UnitScores:
    """Unit scores from a file. Raises InputError naming it."""
    require(Path(path).suffix == ".safetensors", f"{path}: not a .safetensors file; `vitlab score units` writes one")
    tensors = read_file(path)
    missing = sorted({"head_scores", "neuron_scores"} - set(tensors))
    if missing:
        raise InputError(f"{path}: holds no {missing[0]}; `vitlab score units` writes them")
    for name in ("head_scores", "neuron_scores"):
        require(tensors[name].isfinite().all(), f"{path}: {name} must be finite")
    odd = [name for name in ("head_scores", "neuron_scores")
           if tensors[name].dtype not in (torch.float32, torch.float64)]
    if odd:
        raise InputError(f"{path}: {odd[0]} are {tensors[odd[0]].dtype}; float32 is needed")
    return UnitScores(heads=tensors["head_scores"], neurons=tensors["neuron_scores"],
                      made_by={"read_from": Path(path).name})


def _check_mark(path: Path, mark: dict[str, str]) -> None:
    with safe_open(path, "pt") as file:
        require((file.metadata() or {}).get("made_for") == mark["made_for"], f"{path}: scores of something else than "
                "this study; remove the file and they are made anew")


def scores_of(study: Study, model: nn.Module, parts: ImageData, device: torch.device, workers: int | None,
              progress: bool) -> dict[str, Tensor]:
    """The scores that a plan of this study needs, from its folder where they were made before, for this study."""
    about, scores = study.info["about"], {}
    mark = {"made_for": " ".join(str(about[k]) for k in ("inputs", "criterion", "score_images"))
            + f" seed {study.seed}"}
    mark["made_for"] += f" images {parts.roles.get('score', 0)}"

    def batches():
        return parts.batches("score", model, workers=workers) if "score" in parts.roles else ()

    if study.space.units:
        path = study.folder / UNIT_SCORES
        if not path.exists():
            made = unit_scores(model, batches(), criterion=about["criterion"], seed=study.seed, device=device,
                               progress=progress)
            write_units(path, made, mark)
        units = read_units(path)
        _check_mark(path, mark)
        scores |= {"heads": units.heads, "neurons": units.neurons}
    if study.space.by_place:
        path = study.folder / TOKEN_SCORES
        if not path.exists():
            atomic_write(path,
                         save({"token_scores": token_scores(model, batches(), device=device,
                                                            progress=progress).contiguous()}, mark))
        scores["tokens"] = read_scores(path)[0]
        _check_mark(path, mark)
    return scores


def replacements_of(study: Study, objective: PlanObjective) -> Tensor:
    """`better_nothing` of the study's space, on the first of the images to choose on, of which a refit knows the mean;
    kept in its folder."""
    path, about = study.folder / REPLACEMENTS, study.info["about"]
    mark = {"made_for": f"{about['inputs']} seed {study.seed} images {about['roles']} metric {about['metric']}"}
    if not path.exists():
        few = objective.on(first_images(objective.batches, REPLACED_ON))
        atomic_write(path, save({"nothing": better_nothing(few, study.space.shape, study.space.units)}, mark))
    _check_mark(path, mark)
    return read_file(path)["nothing"]
