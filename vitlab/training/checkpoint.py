"""Checkpoints: a folder with weights.safetensors, plan.json and checkpoint.json, from which alone the model is rebuilt."""
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import vitlab
from vitlab.files import InputError, atomic_folder, existing_folder, read_json
from vitlab.models import compress, deploy, encoder_of
from vitlab.models.compress import check_agrees
from vitlab.models.create import architecture, load_state, read_state, rebuild
from vitlab.models.fold import FoldedBlock
from vitlab.models.segmenter import Segmenter, encoder_source, rebuild_segmenter, segmenter_source
from vitlab.plan import CompressionPlan
from vitlab.shape import is_int

WEIGHTS, PLAN, INFO, FOLDER = "weights.safetensors", "plan.json", "checkpoint.json", "checkpoint"
FORMAT, VERSION = "vitlab.checkpoint", 1
LARGEST_CUT = 1000                              # no plan makes a model smaller than by this
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in eval mode, the plan it was compressed by, and what produced it."""

    model: nn.Module
    plan: CompressionPlan
    info: dict[str, Any]


def not_finite(model: nn.Module) -> str | None:
    """Name of the first weight that holds a NaN or an infinity; None where there is none."""
    return next((name for name, tensor in model.state_dict().items() if tensor.is_floating_point() and not tensor.isfinite().all()), None)


def versions() -> dict[str, str]:
    """What a result depends on besides data and seed."""
    return {"vitlab": vitlab.__version__, "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version()}


def is_deployed(model: nn.Module) -> bool:
    """Whether its blocks are no longer those of the training form."""
    return any(isinstance(b, FoldedBlock) for b in model.blocks)


def save(folder: str | Path, model: nn.Module, plan: CompressionPlan, *, classes: list[str] | None = None,
         made_by: dict[str, Any] | None = None) -> Path:
    """Write folder/ in one step: weights (safetensors), plan.json, checkpoint.json (model name, versions, made_by).

    model: any form of compress(dense, plan), the deployed too. An older checkpoint there is replaced as a whole.
    Raises InputError where the model was not made by timm.create_model, the plan is not the one it was compressed by, or a weight is not
    finite.
    """
    folder = Path(folder)
    if not is_deployed(model):
        check_agrees(model, plan)
    of_pixels = isinstance(model, Segmenter)
    source = encoder_source(model.encoder) if of_pixels else architecture(model)
    decoder = {"segmenter": segmenter_source(model)} if of_pixels else {}
    info = {"format": FORMAT, "version": VERSION, "model": source, **decoder, "deployed": is_deployed(model),
            "config": {k: model.pretrained_cfg.get(k) for k in ("mean", "std", "interpolation", "crop_pct")},
            "classes": classes, "made_by": made_by or {}, "versions": versions()}
    wrong = not_finite(model)
    if wrong is not None:
        raise InputError(f"{folder}: not written, since {wrong} is not finite")
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(to_bytes({k: v.contiguous() for k, v in model.state_dict().items()}))
        plan.save(temporary / PLAN)
        (temporary / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return folder


def _check_config(config: Any, classes: Any) -> None:
    """InputError where the image settings or class names of a checkpoint.json are of the wrong kind."""
    def numbers(value: Any) -> bool:
        return isinstance(value, list) and len(value) in (1, 3) and all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in value)
    kinds = {"mean": numbers, "std": lambda value: numbers(value) and min(value) > 0,
             "crop_pct": lambda v: isinstance(v, (int, float)) and 0 < v <= 1,
             "interpolation": lambda v: v in INTERPOLATIONS}
    if not isinstance(config, dict) or not all(k in kinds and (v is None or kinds[k](v)) for k, v in config.items()):
        raise InputError(f'"config" must hold mean, std, crop_pct and interpolation of images, not {str(config)[:120]}')
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise InputError('"classes" must be a list of names or null')


def _dense(info: dict[str, Any], plan: CompressionPlan, weights: Path) -> nn.Module:
    """The dense model that a checkpoint.json names, with random weights. Raises InputError, and before much memory or time is
    taken where a damaged file asks for a model that its plan and weights can't be of."""
    source, of_pixels = info.get("model"), info.get("segmenter")
    depth = source["args"].get("depth") if isinstance(source, dict) and isinstance(source.get("args"), dict) else None
    if is_int(depth) and depth > plan.shape.depth:
        raise InputError(f"a model of {depth} blocks, but the plan has {plan.shape.depth}")
    most = LARGEST_CUT * (weights.stat().st_size if weights.is_file() else 0) // 4 + 10 ** 6
    return rebuild(source, most) if of_pixels is None else rebuild_segmenter(source, of_pixels, most)


def _by_todays_names(state: dict[str, Tensor], model: nn.Module, plan: CompressionPlan) -> dict[str, Tensor]:
    """The state with its tensors where they stand today: a span's reconstruct matrix once stood in its last block, and what the plan
    says of shared updates in no file."""
    blocks = ("" if encoder_of(model) is model else "encoder.") + "blocks"
    moved = {f"{blocks}.{i}.tokens.reconstruct_matrix": f"{blocks}.{i - place}.tokens.reconstruct_matrix"
             for i, (_, place) in enumerate(plan.rules()) if place}
    planned = {name: value for name, value in model.state_dict().items() if name.endswith((".regions", ".weights", ".own", ".mask"))}
    return planned | {moved.get(name, name): value for name, value in state.items()}


def find(path: str | Path) -> Path:
    """The checkpoint folder at `path`: itself, or checkpoint/ inside a run folder. InputError where there is none."""
    for folder in (existing_folder(path), existing_folder(Path(path) / FOLDER)):
        if (folder / INFO).is_file():
            return folder
    raise InputError(f"{path}: not a checkpoint; a folder with {INFO}, {PLAN} and {WEIGHTS} is needed, or a run that holds one")


def load(path: str | Path) -> Checkpoint:
    """Rebuild the model of a checkpoint or run folder; all or nothing.

    Raises InputError naming the file and key: missing, cut short, a plan for another model, wrong shapes.
    """
    folder = find(path)
    info, where = read_json(folder / INFO), folder / INFO
    if not isinstance(info, dict) or info.get("format") != FORMAT or info.get("version") != VERSION:
        raise InputError(f"{where}: not a {FORMAT} of version {VERSION}")
    config, plan = info.get("config") or {}, CompressionPlan.load(folder / PLAN)
    try:
        _check_config(config, info.get("classes"))
        if not isinstance(info.get("deployed", False), bool):
            raise InputError('"deployed" must be true or false')
        dense = _dense(info, plan, folder / WEIGHTS)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    try:
        model = compress(dense, plan)
    except InputError as error:
        raise InputError(f"{folder / PLAN}: {error}") from None
    if info.get("deployed"):
        model = deploy(model)
    load_state(model, _by_todays_names(read_state(folder / WEIGHTS), model, plan), folder / WEIGHTS)
    encoder_of(model).pretrained_cfg = {**model.pretrained_cfg, **{k: v for k, v in config.items() if v is not None}}
    return Checkpoint(model=model.eval(), plan=plan, info=info)
