"""Weights files as others write them: read without running any code of theirs, and given timm's names."""
import argparse
import datetime
import pathlib
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitlab.models.families import MODELS, kind_of
from vitlab.runtime.files import InputError, first_line, read_json, require

INDEX = ".index.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar", ".ckpt")
# Where a training checkpoint has the weights; averages first.
INSIDE = ("state_dict_ema", "ema_state_dict", "model_ema", "teacher", "state_dict", "model")
ANCHOR = "patch_embed.proj.weight"  # every vision transformer has it; what stands before it stands before all its names
CONVERTED = "visual.trunk."                     # OpenCLIP's prefix, which timm's own conversion needs
FLEXIBLE = "embeds.proj.weight"     # a NaFlexVit has this instead
# T2T-ViT's, as published, and timm's of a NaFlexVit
RENAMED = ((r"tokens_to_token\.project\.", "patch_embed.proj."), (r"tokens_to_token\.", "patch_embed."),
           (r"(\.attention[12]\.mlp\.)0\.", r"\1fc1."), (r"(\.attention[12]\.mlp\.)2\.", r"\1fc2."),
           (r"(^|\.)embeds\.(proj|norm)\.", r"\1patch_embed.\2."),
           (r"(^|\.)embeds\.(cls_token|reg_token|pos_embed)", r"\1\2"))
# what only pre-training has a use for
PRETRAINING = ("mask_token", "decoder", "dino_head.", "ibot_head.", "projector.", "predictor.")
_NUMPY = np._core.multiarray
POINTER = b"version https://git-lfs.github.com/spec"
# Besides tensors and Python's plain data, checkpoints hold settings, paths, times, and numpy's numbers and texts.
# Building these runs
# nothing of a file's; an array of objects is not among them. A defaultdict becomes a dict: torch fills no other kind.
HARMLESS = [argparse.Namespace, datetime.date, datetime.datetime, datetime.timedelta, datetime.timezone, dict, float,
            int, list, (lambda *_: {}, "collections.defaultdict"),
            np.dtype, np.ndarray, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDUSMm"},
            *((getattr(_NUMPY, name), f"numpy.{core}.multiarray.{name}")
              for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
            *((getattr(pathlib, f"Pure{name}"), f"{module}.{name}") for module in ("pathlib", "pathlib._local")
              for name in ("PosixPath", "WindowsPath"))]


def is_weights(path: Path) -> bool:
    """Whether a file's name ends as a weights file's does."""
    return path.name.endswith(SUFFIXES)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a weights file; raises what `read_file` and `state_of` raise."""
    return state_of(read_file(path), path)


def read_file(path: str | Path) -> dict[str, Any]:
    """All that a weights file or training checkpoint holds: tensors, plain data, and what is HARMLESS. Raises
    InputError naming the file where it is missing, damaged, one of several shards, or would build anything else."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such file")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise InputError(f"{path}: one of several files that only together hold a model; save it in one file")
    return _read_one(path)


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of all files that an index names beside it, each from the file that it says."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) and Path(file).name == file and
                                               is_weights(Path(file)) for file in places.values()):
        raise InputError(f"{index}: not an index whose \"weight_map\" says in which file beside it each tensor is")
    state: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        if not (index.parent / file).is_file():
            raise InputError(f"{index.parent / file}: no such file, but {index.name} says that it has weights")
        content = _read_one(index.parent / file)
        missing = next((name for name, place in places.items() if place == file and name not in content), None)
        require(missing is None, f"{index.parent / file}: {missing} is missing")
        state |= {name: content[name] for name, place in places.items() if place == file}
    return state


def _read_one(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                  # a damaged file makes the readers raise nearly anything
        raise InputError(f"{path}: {_fault(path, error)}") from None
    require(isinstance(content, dict), f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _fault(path: Path, error: Exception) -> str:
    """Why a file was refused, in words other than torch's, which advise to run what it holds."""
    if not isinstance(error, OSError):
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                return "a Git LFS pointer in place of the weights; fetch them with `git lfs pull`"
    if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
        return f"can't be read, it may be cut short ({first_line(error)})"
    named = _named(path, str(error))
    return (f"holds more than weights, or is damaged; nothing of it was run or loaded "
            f"({named}save model.state_dict() alone)")


def _named(path: Path, said: str) -> str:
    """What a file holds besides weights, by name, where that is known; said: torch's message."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:                           # a file in torch's format of old, or damaged
        names = []
    names = names or re.findall(r"(?:GLOBAL |<class ')([\w.]+)|(TorchScript)", said)
    names = ["".join(name) for name in names]
    return ", ".join(sorted(names)[:3])[:250] + "; " if names else ""


def state_of(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The state dict in what `read_file` gave: it itself, one INSIDE, or the only other one. Raises InputError naming
    the file where there are several, or anything but tensors that a parameter can be filled from."""
    inside = next((content[key] for key in INSIDE if isinstance(content.get(key), dict)), None)
    if inside is None:
        others = {key: value for key, value in content.items() if isinstance(value, dict) and value and all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())}
        require(len(others) <= 1, f"{path}: {', '.join(map(repr, others))} each hold weights; save those that are "
                "meant in a file of their own")
        inside = next(iter(others.values()), content)
    wrong = [k for k, v in inside.items() if not isinstance(v, Tensor) or not isinstance(k, str)]
    if wrong or not inside:
        raise InputError(f"{path}: "
                         + (f"{wrong[0]!r} is not a tensor, or not its name" if wrong else "holds no weights"))
    for name, tensor in inside.items():
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")
            raise InputError(f"{path}: {name!r} is {kind}; real numbers in a plain tensor are needed")
    return inside


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with what others call their embedding under timm's names (RENAMED)."""
    for theirs, timms in RENAMED:
        state = {re.sub(theirs, timms, name): value for name, value in state.items()}
    return state


def unwrapped(state: dict[str, Tensor], own: dict[str, Tensor],
              path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors of the model alone, without what stands before their names; the names of the others) of a file by
    whatever wraps models: DDP, torch.compile, Lightning, a student beside its teacher. own: the state of such a model;
    where the file holds several, the one that has most of its names and shapes is meant, of two the average (ema).
    Raises InputError where others have as many."""
    state = renamed(state)
    prefixes = sorted({name.removesuffix(ANCHOR).removesuffix(CONVERTED) for name in state
                       if name.endswith(ANCHOR)}) or [""]
    fits = {p: sum(p + name in state and state[p + name].shape == value.shape for name, value in own.items())
            for p in prefixes}
    best, *more = (p for p in prefixes if fits[p] == max(fits.values()))
    averages = [p for p in (best, *more) if re.search(r"(^|[._])ema[._]", p)]
    best, *more = averages if len(averages) == 1 else (best, *more)
    if more:
        raise InputError(f"{path}: the weights below {best!r} and {more[0]!r} fit alike; save those that are meant in "
                         "a file of their own")
    others = tuple(p for p in prefixes if p != best and p.startswith(best))
    inner = {name: value for name, value in state.items()
             if name.startswith(best) and not (others and name.startswith(others))}
    left = [name for name in state if name not in inner]
    return {name.removeprefix(best): value for name, value in inner.items()}, left


def by_timms_names(state: dict[str, Tensor], model: nn.Module,
                   path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """(the state under the names of timm's model, the names of what is left out: parts that only
    pre-training has) of any layout that timm converts; no position embedding is resampled. model: one of that
    architecture without pos_embed, on the meta device."""
    # what timm's conversion drops
    left = [name for name in state if name == "mask_token" or "pre_logits" in name]
    # A DINOv2 training has its blocks in chunks: blocks.CHUNK.BLOCK.
    state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in state.items()}
    own = model.state_dict()
    if not set(state) - {*own, "pos_embed"} and ANCHOR in state and state[ANCHOR].shape == own[ANCHOR].shape:
        return state, left                      # timm's names already
    try:
        if isinstance(model, VisionTransformer):
            state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
        else:
            state = sys.modules[kind_of(model, MODELS).__module__].checkpoint_filter_fn(state, model)
    except Exception as error:                  # whatever tensors of other sizes make timm's conversion raise
        raise InputError(f"{path}: does not fit the model; it can't be converted ({first_line(error)})") from None
    extra = [name for name in state if name.startswith(PRETRAINING) and name not in own]
    return {name: value for name, value in state.items() if name not in extra}, left + extra


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load all or nothing; InputError names the first keys that are missing, unknown or of another shape."""
    check_fits(model, state, path)
    model.load_state_dict(state)


def check_fits(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """InputError naming the file and the first keys that are missing, unknown or of another shape."""
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [f"{k} is {tuple(state[k].shape)}, the model's is {tuple(own[k].shape)}"
              for k in own if k in state and own[k].shape != state[k].shape]

    def some(words: list[str]) -> str:
        return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")

    problems = [f"{what} {some(words)}" for what, words in
                (("missing keys", missing), ("unknown keys", unknown), ("wrong shapes:", shapes)) if words]
    require(not problems, f"{path}: does not fit the model: " + "; ".join(problems))
