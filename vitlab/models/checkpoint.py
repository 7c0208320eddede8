"""Checkpoints: a folder with weights.safetensors, plan.json and checkpoint.json, which alone rebuild the model."""
import contextlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as to_bytes
from timm.layers import DropPath
from torch import Tensor, nn

import vitlab
from vitlab.models import compress, deploy, encoder_of
from vitlab.models.compress import check_agrees
from vitlab.models.create import architecture, rebuild
from vitlab.models.deploy import is_deployed
from vitlab.models.hub import HUB, OURS, SETTINGS, check_settings, download, set_settings, settings_of
from vitlab.models.segmenter import Segmenter, rebuild_segmenter, segmenter_source
from vitlab.models.unfilled import sizes_alone, unfilled
from vitlab.models.weights import check_fits, load_state, read_state
from vitlab.plan import CompressionPlan
from vitlab.plan.shape import is_int
from vitlab.runtime.files import InputError, atomic_folder, existing_folder, named, read_json, require

WEIGHTS, PLAN, INFO = OURS
FOLDER = "checkpoint"
FORMAT, VERSION = "vitlab.checkpoint", 1
LARGEST_CUT = 1000                              # no plan makes a model smaller than by this
UNSEEN = (nn.Dropout, DropPath, nn.Identity)    # of no weight in eval mode


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in eval mode, the plan it was compressed by, and what produced it."""

    model: nn.Module
    plan: CompressionPlan
    info: dict[str, Any]


def not_finite(model: nn.Module) -> str | None:
    """Name of the first weight that holds a NaN or an infinity; None where there is none."""
    return next((name for name, tensor in model.state_dict().items() if tensor.is_floating_point()
                 and not tensor.isfinite().all()), None)


def versions() -> dict[str, str]:
    """What a result depends on besides data and seed."""
    return {"vitlab": vitlab.__version__, "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version()}


def save(folder: str | Path, model: nn.Module, plan: CompressionPlan, *, classes: list[str] | None = None,
         made_by: dict[str, Any] | None = None) -> Path:
    """Write folder/ in one step: weights (safetensors), plan.json, checkpoint.json (model name, versions, made_by).

    model: any form of compress(dense, plan), the deployed too. An older checkpoint there is replaced as a whole.
    Raises InputError where the model was not made by timm.create_model or was changed to one that it does not make, the
    plan is not the one it was compressed by, or a weight is not finite.
    """
    folder = Path(folder)
    if not is_deployed(model):
        check_agrees(model, plan)
    decoder = {"segmenter": segmenter_source(model)} if isinstance(model, Segmenter) else {}
    info = {"format": FORMAT, "version": VERSION, "model": architecture(encoder_of(model)), **decoder,
            "deployed": is_deployed(model), "config": settings_of(encoder_of(model)), "classes": classes,
            "made_by": made_by or {}, "versions": versions()}
    wrong = not_finite(model)
    require(wrong is None, f"{folder}: not written, since {wrong} is not finite")
    _check_rebuilt(info, plan, model, folder)
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(to_bytes({k: v.contiguous() for k, v in model.state_dict().items()}))
        plan.save(temporary / PLAN)
        (temporary / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return folder


def _layers(model: nn.Module) -> dict[str, Any]:
    """What is set of its layers besides weights: each innermost one in words, and the numbers of all (attn.scale)."""
    seen = {name: each for name, each in model.named_modules() if not isinstance(each, UNSEEN)}
    numbers = {f"{name}.{key}": value for name, each in seen.items() for key, value in vars(each).items()
               if isinstance(value, float)}
    return {name: repr(each) for name, each in seen.items() if next(each.children(), None) is None} | numbers


def _check_rebuilt(info: dict[str, Any], plan: CompressionPlan, model: nn.Module, folder: Path) -> None:
    """InputError where what a checkpoint says of a model does not build it: some layer was replaced by another."""
    # A deployed form is computed from numbers, which the meta device has not.
    with torch.random.fork_rng(devices=[]), (
            contextlib.nullcontext() if info["deployed"] else sizes_alone()):
        dense = _dense(info)
    made = _in_form(dense, plan, info["deployed"])
    layers, now = _layers(made), _layers(model)
    odd = next((f"{name} is {now.get(name)} in place of {layers.get(name)}" for name in {**layers, **now}
                if layers.get(name) != now.get(name)), None)
    try:
        check_fits(made, model.state_dict(), folder)
    except InputError as error:
        odd = odd or str(error)
    if odd is not None:
        raise InputError(f"{folder}: not written, since {info['model']['name']} can't be built with what the model was "
                         f"changed to ({odd})")


def _dense(info: dict[str, Any], most: int | None = None) -> nn.Module:
    """The dense model that a checkpoint.json names, of at most so many parameters, with random weights."""
    source, of_pixels = info.get("model"), info.get("segmenter")
    return rebuild(source, most) if of_pixels is None else rebuild_segmenter(source, of_pixels, most)


def _in_form(dense: nn.Module, plan: CompressionPlan, deployed: bool) -> nn.Module:
    return deploy(compress(dense, plan)) if deployed else compress(dense, plan)


def _check_size(info: dict[str, Any], plan: CompressionPlan, weights: Path) -> int:
    """The most parameters that a model cut to these weights can have had. Raises InputError, before much memory or time
    is taken, where a damaged file asks for a model that its plan can't be of."""
    source = info.get("model")
    depth = source["args"].get("depth") if isinstance(source, dict) and isinstance(source.get("args"), dict) else None
    if is_int(depth) and depth > plan.shape.depth:
        raise InputError(f"a model of {depth} blocks, but the plan has {plan.shape.depth}")
    return LARGEST_CUT * (weights.stat().st_size if weights.is_file() else 0) // 4 + 10 ** 6


def _by_todays_names(state: dict[str, Tensor], model: nn.Module, plan: CompressionPlan) -> dict[str, Tensor]:
    """The state with its tensors where they stand today: a span's reconstruct matrix once stood in its last block, and
    what the plan says of shared updates in no file."""
    blocks = ("" if encoder_of(model) is model else "encoder.") + "blocks"
    moved = {f"{blocks}.{i}.tokens.reconstruct_matrix": f"{blocks}.{i - place}.tokens.reconstruct_matrix"
             for i, (_, place) in enumerate(plan.rules()) if place}
    planned = {name: value for name, value in model.state_dict().items()
               if name.endswith((".regions", ".weights", ".own", ".mask"))}
    return planned | {moved.get(name, name): value for name, value in state.items()}


def _check_info(info: dict[str, Any], config: Any) -> None:
    """InputError where what a checkpoint.json says besides the model is of the wrong kind."""
    try:
        check_settings(config)
    except InputError as error:
        raise InputError(f'"config" must hold {", ".join(SETTINGS)} of images: {error}') from None
    classes = info.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise InputError('"classes" must be a list of names or null')
    require(isinstance(info.get("deployed", False), bool), '"deployed" must be true or false')


def find(path: str | Path) -> Path:
    """The checkpoint folder at `path`: itself, checkpoint/ inside a run folder, or what hf-hub:OWNER/NAME downloads.
    InputError where there is none."""
    if str(path).startswith(HUB):
        path = download(str(path).removeprefix(HUB))
    for folder in (existing_folder(path), existing_folder(Path(path) / FOLDER)):
        if (folder / INFO).is_file():
            return folder
    raise InputError(f"{path}: not a checkpoint; a folder with {INFO}, {PLAN} and {WEIGHTS} is needed, or a run that "
                     f"holds one")


def load(path: str | Path) -> Checkpoint:
    """Rebuild the model of a checkpoint or run folder, or of hf-hub:OWNER/NAME by `vitlab push`; all or nothing.

    Raises InputError naming the file and key: missing, cut short, a plan for another model, wrong shapes.
    """
    folder = find(path)
    info, where = read_json(folder / INFO), folder / INFO
    if not isinstance(info, dict) or info.get("format") != FORMAT or info.get("version") != VERSION:
        raise InputError(f"{where}: not a {FORMAT} of version {VERSION}")
    config, plan = info.get("config") or {}, CompressionPlan.load(folder / PLAN)
    with named(where):
        _check_info(info, config)
        # narrower queries and keys are computed from numbers
        narrow = any(block.qk_width is not None for block in plan.blocks)
        with contextlib.nullcontext() if narrow else unfilled():
            dense = _dense(info, _check_size(info, plan, folder / WEIGHTS))
    with named(folder / PLAN):
        model = _in_form(dense, plan, info.get("deployed", False))
    load_state(model, _by_todays_names(read_state(folder / WEIGHTS), model, plan), folder / WEIGHTS)
    set_settings(encoder_of(model), config)
    return Checkpoint(model=model.eval(), plan=plan, info=info)
