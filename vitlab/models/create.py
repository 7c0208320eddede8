"""Models by timm's names, and two small ones of vitlab's own for 32 x 32 images; weights are read without pickle."""
import argparse
import difflib
import inspect
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, get_model_args, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitlab.files import InputError, first_line
from vitlab.models.support import check_supported

_SMALL_CFG = {"input_size": (3, 32, 32), "num_classes": 10, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
              "interpolation": "bicubic", "fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
default_cfgs = generate_default_cfgs({"vit_nano_patch4_32": _SMALL_CFG, "vit_micro_patch4_32": _SMALL_CFG})


def _small(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    size = {"img_size": 32, "patch_size": 4, **kwargs}
    return build_model_with_cfg(VisionTransformer, name, pretrained, **size)


@register_model
def vit_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """8 x 8 patches, 64 wide, 6 blocks, 4 heads: 0.3 M parameters, 0.02 GMACs. For the digits."""
    return _small("vit_nano_patch4_32", pretrained, **{"embed_dim": 64, "depth": 6, "num_heads": 4, **kwargs})


@register_model
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """64 tokens, 96 wide, 6 blocks, 3 heads: 0.7 M parameters, 0.05 GMACs. For CIFAR-10."""
    return _small("vit_micro_patch4_32", pretrained, **{"embed_dim": 96, "depth": 6, "num_heads": 3, **kwargs})


def create_model(name: str, *, weights: str | Path | None = None, pretrained: bool = False, **args: Any) -> nn.Module:
    """A supported timm vision transformer in eval mode.

    weights: a .safetensors file, or a .pth or .pt with the state dict itself or under "model" (published DeiT, MAE,
    timm). pretrained downloads timm's own. args: timm's (num_classes, img_size, ...). Raises InputError for an unknown
    name (with the nearest ones), a family that can't be handled, or weights that don't fit.
    """
    base = name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.4)
        raise InputError(f"{name!r}: no such file or folder, and no timm model" + (f"; near are {', '.join(near)}" if near else ""))
    try:
        if pretrained:                                          # refuse a family before its weights are downloaded
            check_supported(timm.create_model(name, pretrained=False, **args))
        model = timm.create_model(name, pretrained=pretrained, **args)
    except InputError:
        raise
    except (TypeError, AssertionError, ArithmeticError, RuntimeError, ValueError, OSError) as error:     # OSError: a download
        raise InputError(f"{name}: timm could not build it ({first_line(error)})") from error
    check_supported(model)
    if not model.patch_embed.num_patches:
        raise InputError(f"{name}: an image of {model.patch_embed.img_size} holds no patch of {model.patch_embed.patch_size}")
    if weights is not None:
        state = read_state(weights)
        try:
            state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
        except Exception as error:              # whatever tensors of other sizes make timm's conversion raise
            raise InputError(f"{weights}: does not fit the model; it can't be converted ({first_line(error)})") from None
        try:
            load_state(model, state, weights)
        except InputError as error:
            raise InputError(f"{error} (the model is {name})") from None
    return model.eval()


def architecture(model: nn.Module) -> dict[str, Any]:
    """{"name", "args"} from which create_model builds the same (dense) model again."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not name:
        raise InputError("the model was not made by timm.create_model, so its name is not known; make it there")
    args = {k: list(v) if isinstance(v, tuple) else v for k, v in get_model_args(model).items()}
    return {"name": name, "args": args}


def rebuild(source: dict[str, Any], most: int | None = None) -> nn.Module:
    """The model of an `architecture`, with random weights. Only arguments of timm's VisionTransformer are taken, so a file
    can't make it read other files or download. Raises InputError naming what is wrong, and, before any memory is taken, where it
    would have more than `most` parameters."""
    if not isinstance(source, dict) or not isinstance(source.get("name"), str) or not isinstance(source.get("args"), dict):
        raise InputError('"model" must hold "name" and "args"')
    odd = sorted(set(source["args"]) - set(inspect.signature(VisionTransformer.__init__).parameters))
    if odd:
        raise InputError(f"model argument {odd[0]!r} is not one of a vision transformer's")
    if most is not None:
        with torch.device("meta"):              # sizes alone, without memory
            count = sum(p.numel() for p in create_model(source["name"], **source["args"]).parameters())
        if count > most:
            raise InputError(f"a model of {count:,} parameters; the weights beside it are those of {most:,} at most")
    return create_model(source["name"], **source["args"])


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth, .pt or .bin file, without running any code of the file's.

    A dict under "model", "state_dict", "state_dict_ema" or "model_ema" is taken from inside a training checkpoint.
    Raises InputError naming the file where it is missing, damaged, or holds anything but tensors there.
    """
    return state_of(read_file(path), path)


def read_file(path: str | Path) -> dict[str, Any]:
    """All that a checkpoint file holds; an argparse.Namespace in it is allowed (published checkpoints carry one)."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: holds more than weights, or is damaged; nothing of it was run or loaded "
                         f"({first_line(error)})") from None
    except Exception as error:                  # a damaged file makes the readers raise nearly anything
        raise InputError(f"{path}: can't be read, it may be cut short ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def state_of(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The state dict in what `read_file` gave; see `read_state`."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    wrong = [k for k, v in content.items() if not isinstance(v, Tensor) or not isinstance(k, str)]
    if wrong or not content:
        raise InputError(f"{path}: " + (f"{wrong[0]!r} is not a tensor, or not its name" if wrong else "holds no weights"))
    check_plain(content, path)
    return {k.removeprefix("module."): v for k, v in content.items()}


def check_plain(state: dict[str, Tensor], path: str | Path) -> None:
    """InputError naming the first tensor that a parameter can't be filled from."""
    for name, tensor in state.items():
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")
            raise InputError(f"{path}: {name!r} is {kind}; real numbers in a plain tensor are needed")


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load all or nothing; InputError names the file and the first keys that are missing, unknown or of another shape."""
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [f"{k} is {tuple(state[k].shape)}, the model's is {tuple(own[k].shape)}"
              for k in own if k in state and own[k].shape != state[k].shape]

    def some(words: list[str]) -> str:
        return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")

    problems = [f"{what} {some(words)}" for what, words in
                (("missing keys", missing), ("unknown keys", unknown), ("wrong shapes:", shapes)) if words]
    if problems:
        raise InputError(f"{path}: does not fit the model: " + "; ".join(problems))
    model.load_state_dict(state)
