"""Folders as transformers' `save_pretrained` writes them (config.json, preprocessor_config.json, safetensors): read as
data, without transformers, as models of timm's, and written."""
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.models.create import create_model
from vitlab.models.hub import CONFIG, PREPARED, HubConfig, check_settings
from vitlab.models.transformers_names import ACTIVATIONS, KINDS, LEFT, TOWERS, timms, to_timm
from vitlab.models.unfilled import sizes_alone
from vitlab.plan.shape import is_int
from vitlab.runtime.files import InputError, named, read_json, require

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")          # by Pillow's numbers
LARGEST = 2 ** 16                               # of any size that a configuration may ask for
ANCHORS = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight",
           "embeddings.patch_embedding.weight")
COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels", "intermediate_size", "mlp_ratio",
          "num_register_tokens")
BIASES = {"key_bias": False, "proj_bias": True, "mlp_bias": True}               # of DINOv3's biases, what timm can have


def config_of(weights: Path) -> dict[str, Any] | None:
    """The configuration of transformers' beside a weights file, that of the vision tower where it has two; None where
    there is none. Raises InputError for a model type that has no counterpart."""
    path = weights.parent / CONFIG
    content = read_json(path) if path.is_file() else None
    if not isinstance(content, dict) or "architecture" in content or not isinstance(content.get("model_type"), str):
        return None
    name = content["model_type"]
    tower = content.get("vision_config") or {} if name in TOWERS else content
    name = TOWERS.get(name, name)
    require(name in KINDS and isinstance(tower, dict), f"{path}: a {name} of transformers can't be opened; those that "
            f"can are {', '.join([*KINDS, *TOWERS])}")
    return {**KINDS[name].defaults, "id2label": content.get("id2label"), **tower, "model_type": name}


def dino2_neurons(config: dict[str, Any]) -> int:
    """Rows of the first layer of an MLP; of SwiGLU both halves."""
    whole = config["hidden_size"] * config["mlp_ratio"]
    return (int(whole * 2 / 3) + 7) // 8 * 8 * 2 if config.get("use_swiglu_ffn") else whole


def _size(value: Any, what: str) -> tuple[int, int]:
    """Height and width, of one number or two."""
    both = value if isinstance(value, (list, tuple)) else (value, value)
    if len(both) != 2 or not all(is_int(v) and 0 < v <= LARGEST for v in both):
        raise InputError(f"{what} is {str(value)[:80]}; one or two integers from 1 to {LARGEST} are needed")
    return tuple(both)


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """timm's, of a configuration. Raises InputError naming what is wrong, or what timm has no layer for."""
    counts = [key for key in COUNTS if key in config]
    for key in counts:
        if not is_int(config[key]) or not 0 < config[key] + ("register" in key) <= LARGEST:
            raise InputError(f"{key} is {str(config[key])[:80]}; an integer from 1 to {LARGEST} is needed")
    dim, gated = config["hidden_size"], config.get("use_swiglu_ffn") or config.get("use_gated_mlp")
    neurons = config["intermediate_size"] if "intermediate_size" in config else dino2_neurons(config)
    act, dino3 = str(config["hidden_act"]), config["model_type"] == "dinov3_vit"
    if act not in ACTIVATIONS or dino3 and ACTIVATIONS[act] != ("silu" if gated else None):
        raise InputError(f"hidden_act is {act[:80]}; timm's model has "
                         f"{('silu' if gated else 'gelu') if dino3 else ', '.join(ACTIVATIONS)}")
    args = {"img_size": _size(config["image_size"], "image_size"),
            "patch_size": _size(config["patch_size"], "patch_size"), "in_chans": config["num_channels"],
            "embed_dim": dim, "depth": config["num_hidden_layers"], "num_heads": config["num_attention_heads"],
            "norm_eps": config["layer_norm_eps"],
            "mlp_ratio": neurons / dim if int(dim * (neurons / dim)) == neurons        # as timm reckons
            else math.nextafter(neurons / dim, math.inf)}
    if dino3:
        odd = next((key for key, needed in BIASES.items() if config[key] != needed), None)
        odd = odd or ("query_bias" if config["query_bias"] != config["value_bias"] else None)
        if odd is not None:
            raise InputError(f"{odd} is {config[odd]}, with which timm has no such model")
        args |= {"qkv_bias": bool(config["query_bias"]), "rope_temperature": config["rope_theta"],
                 "num_reg_tokens": config["num_register_tokens"]}
    else:
        args |= {"qkv_bias": bool(config["qkv_bias"])} if "qkv_bias" in config else {}
        args |= {"reg_tokens": config["num_register_tokens"]} if "num_register_tokens" in config else {}
        args |= {"act_layer": ACTIVATIONS[act]} if ACTIVATIONS[act] and not gated else {}
    return args


def _prepared(folder: Path, square: bool) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """(image settings, size of the images) by the file of the image processor; nothing of either where there is none.
    square: a size of one number is of height and width."""
    path = next((folder / name for name in PREPARED if (folder / name).is_file()), None)
    content = {} if path is None else read_json(path)
    content = content.get("image_processor", content) if isinstance(content, dict) else None
    require(isinstance(content, dict), f"{path}: not an image processor of transformers'")
    with named(path):
        settings = {"mean": content.get("image_mean"), "std": content.get("image_std")}
        if content.get("do_normalize") is False:
            settings = {"mean": [0.0], "std": [1.0]}
        number = content.get("resample")
        if number is not None:
            settings["interpolation"] = RESAMPLE[number] if number in range(len(RESAMPLE)) else number
        resized, crop = (_edges(content.get(key), square) for key in ("size", "crop_size"))
        if resized is None or content.get("do_resize") is False:
            return check_settings(settings), None
        edges, keeps_shape = resized
        crop = crop[0] if crop is not None and content.get("do_center_crop") else edges
        whole, part = min(edges), min(crop)
        share = part / whole
        if int(part / share) < whole:           # as timm reckons
            share = math.nextafter(share, 0)
        return check_settings({**settings, "crop_mode": "center" if keeps_shape else "squash", "crop_pct": share}), crop


def _edges(size: Any, square: bool) -> tuple[tuple[int, int], bool] | None:
    """(height and width, whether an image keeps its shape) of a size as image processors write it."""
    if isinstance(size, dict) and "shortest_edge" in size or is_int(size) and not square:
        return _size(size["shortest_edge"] if isinstance(size, dict) else size, "size.shortest_edge"), True
    if isinstance(size, dict):
        return _size((size.get("height"), size.get("width")), "size.height and width") if size else None, False
    return None if size is None else (_size(size, "size"), False)


def _for_grid(embedded: Tensor, grid: tuple[int, int], prefix: int, antialias: bool) -> Tensor:
    """Position embeddings (1, P + n, D) for another grid, as transformers resamples them."""
    side = math.isqrt(embedded.shape[1] - prefix)
    if side ** 2 != embedded.shape[1] - prefix or (side, side) == grid:
        return embedded
    patches = embedded[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat((embedded[:, :prefix], patches.flatten(2).transpose(1, 2).to(embedded.dtype)), dim=1)


def _classes(labels: Any, count: int) -> list[str] | None:
    """Names by number; None where they are not given, or not by a person."""
    if not isinstance(labels, dict) or set(labels) != {str(number) for number in range(count)}:
        return None
    names = [labels[str(number)] for number in range(count)]
    made_up = [f"LABEL_{number}" for number in range(count)]
    return names if all(isinstance(name, str) for name in names) and names != made_up else None


def converted(weights: Path, config: dict[str, Any], state: dict[str, Tensor],
              img_size: Any = None) -> tuple[HubConfig, dict[str, Tensor], list[str]]:
    """(timm's architecture with its arguments, image settings and classes; the state under timm's names; what is to be
    said of it) of a folder's weights. img_size: in place of the folder's own."""
    where, kind = weights.parent / CONFIG, KINDS[config["model_type"]]
    prefix = next((name.removesuffix(end) for name in state for end in ANCHORS if name.endswith(end)), "")
    state = {name.removeprefix(prefix): value for name, value in state.items() if value.numel()}
    settings, images = _prepared(weights.parent, kind.square)
    name, rows, more = timms(config["model_type"], state, config)
    with named(where):
        args = {**_arguments(config), **more}
        if args["depth"] > len(state):
            raise InputError(f"num_hidden_layers is {args['depth']}, but {weights.name} has {len(state)} tensors")
        with sizes_alone():
            model = create_model(name, **args)
        if img_size or kind.resamples is not None:
            args["img_size"] = _size(img_size or images or args["img_size"], "img_size")
    state, left = to_timm(state | _class_places(state, model), rows, model.state_dict(), weights)
    odd = next((name for name in left if not name.startswith(LEFT)), None)
    if odd is not None:
        raise InputError(f"{weights}: {odd} has no place in a {config['model_type']} of transformers")
    if "pos_embed" in state:
        grid = tuple(side // patch for side, patch in zip(args["img_size"], model.patch_embed.patch_size))
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        state["pos_embed"] = _for_grid(state["pos_embed"], grid, prefix, bool(kind.resamples))
    if "head.weight" in state and "head.bias" not in state:
        state["head.bias"] = torch.zeros(len(state["head.weight"]))                 # a projection has none
    parts = dict.fromkeys(tensor.removeprefix("embeddings.").split(".")[0] for tensor in left)
    notes = [f"left out, since timm's {name} has no such part: {', '.join(parts)}"] if parts else []
    return HubConfig(name=name, args=args, settings=settings,
                     classes=_classes(config["id2label"], args["num_classes"])), state, notes


def _class_places(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What transformers adds to the class token for its place timm has in the class token itself, where it has no
    places of prefix tokens."""
    token, places = state.get("embeddings.cls_token"), state.get("embeddings.position_embeddings")
    if not model.no_embed_class or token is None or places is None:
        return {}
    return {"embeddings.cls_token": token + places[:, :1], "embeddings.position_embeddings": places[:, 1:]}
