"""Models of timm's as folders that transformers' `from_pretrained` opens."""
import copy
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import GELU, GELUTanh, GluMlp, QuickGELU, SwiGLU
from torch import Tensor, nn

from vitlab.models.create import from_weights
from vitlab.models.families import mixing_layer, query_width
from vitlab.models.hub import CONFIG, PREPARED, WEIGHTS, settings_of
from vitlab.models.support import classes_of, is_merged, units_of
from vitlab.models.transformers_folder import RESAMPLE, config_of, converted, dino2_neurons
from vitlab.models.transformers_names import from_timm, pairs, timms
from vitlab.models.weights import read_state
from vitlab.runtime.files import InputError, atomic_folder, require

CLASSES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters",
           "dinov3_vit": "DINOv3ViT", "clip_vision_model": "CLIPVision", "siglip_vision_model": "SiglipVision"}
ACTIVATIONS = {nn.GELU: "gelu", GELU: "gelu", GELUTanh: "gelu_pytorch_tanh", QuickGELU: "quick_gelu", nn.ReLU: "relu",
               nn.SiLU: "silu"}
PROJECTION = "visual_projection.weight"
PREFIXES = {"clip_vision_model": "vision_model.", "siglip_vision_model": "vision_model."}
OUTSIDE = ("classifier.", "cls_classifier.", "distillation_classifier.", "visual_projection.")
NESTED = {"CLIPForImageClassification": "clip", "SiglipForImageClassification": "siglip"}       # in vision_config
CLOSE = 1e-5                                    # of an output's largest number: other orders of the same sums


def save_transformers(folder: str | Path, model: nn.Module, *, classes: list[str] | None = None) -> Path:
    """Write a timm model as transformers' `save_pretrained` writes its counterpart (ViT, DeiT, DINOv2 with and without
    registers, DINOv3 ViT, CLIP and SigLIP vision towers), with image settings and classes. The folder is opened again
    and must give the same output.

    model: dense, or with as many neurons cut from each block. Raises InputError naming the block or tensor where the
    configuration of transformers has no word for it: merged tokens, heads, other numbers in each block.
    """
    folder, state = Path(folder), model.state_dict()
    model_type = _model_type(state)
    _check_alike(model, model_type)
    class_name, named = _class(model_type, state)
    config = _configuration(model, model_type, state)
    whole = {"model_type": NESTED[class_name], "vision_config": config} if class_name in NESTED else config
    whole = {"architectures": [class_name], **whole, **_labels(model, classes)}
    rows = timms(model_type, {named: state["head.weight"]} if named else {"head.probe": torch.empty(0)}, config)[1]
    covered = {name for ours, _ in pairs(rows, state) for name in ours}
    odd = next((name for name in state if name not in covered and (name, named) != ("head.bias", PROJECTION)), None)
    require(odd is None, f"{folder}: not written, since {odd} has no place in transformers' {class_name}")
    if model_type == "dinov2_with_registers":       # timm's class token has its place in itself
        state = {**state, "pos_embed": torch.cat((torch.zeros_like(model.cls_token), model.pos_embed), dim=1)}
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        (temporary / PREPARED[0]).write_text(json.dumps(_preparing(model), indent=2) + "\n", encoding="utf-8")
        prefix = PREFIXES.get(model_type, f"{model_type}.") if named else ""
        theirs = {(name if name.startswith(OUTSIDE) else prefix + name): value
                  for name, value in from_timm(state, rows).items()}
        save_file(theirs, temporary / WEIGHTS[0], metadata={"format": "pt"})
        _check_same(temporary / WEIGHTS[0], model, f"{folder}: not written, since transformers' {class_name}")
    return folder


def _model_type(names: Collection[str]) -> str:
    """By the names of timm's tensors."""
    if "blocks.0.gamma_1" in names:
        return "dinov3_vit"
    if "attn_pool.latent" in names or "cls_token" not in names:
        return "siglip_vision_model"
    if "norm_pre.weight" in names:
        return "clip_vision_model"
    if "blocks.0.ls1.gamma" in names:
        return "dinov2_with_registers" if "reg_token" in names else "dinov2"
    return "deit" if "reg_token" in names or "dist_token" in names else "vit"


def _class(model_type: str, state: dict[str, Tensor]) -> tuple[str, str | None]:
    """(transformers' class, the tensor of its classifier) of a timm model with these tensors."""
    name = CLASSES[model_type]
    if "head_dist.weight" in state:
        return f"{name}ForImageClassificationWithTeacher", "cls_classifier.weight"
    if model_type == "clip_vision_model" and "head.bias" in state and not state["head.bias"].any():
        return f"{name}ModelWithProjection", PROJECTION
    if "head.weight" in state:
        return f"{name.removesuffix('Vision')}ForImageClassification", "classifier.weight"
    return f"{name}Model", None


def _check_alike(model: nn.Module, model_type: str) -> None:
    """InputError naming the first block that the configuration, one for all blocks, has no words for."""
    if is_merged(model):
        raise InputError(f"tokens are merged or selected in blocks; transformers' {model_type} has no words for that")
    first = units_of(model.blocks[0])[1]
    for index, block in enumerate(model.blocks):
        (heads, neurons), width = units_of(block), mixing_layer(block, "heads")[1]
        require(heads * width == model.embed_dim, f"block {index} has {heads} heads of {width}; in transformers' "
                f"{model_type} all heads together are as wide as the model, {model.embed_dim}")
        if query_width(block.attn) < width:
            raise InputError(f"block {index} has queries and keys of {query_width(block.attn)}; transformers' "
                             f"{model_type} has none narrower than values, {width}")
        require(neurons == first and neurons, f"block {index} has {neurons} neurons, block 0 has {first}; "
                f"transformers' {model_type} has one number for all blocks, of at least 1")


def _configuration(model: nn.Module, model_type: str, names: Collection[str]) -> dict[str, Any]:
    """What config.json says of the model, as its first block is."""
    block, embed = model.blocks[0], model.patch_embed
    size, patch = (each[0] if each[0] == each[1] else list(each) for each in (embed.img_size, embed.patch_size))
    act, neurons, gated = type(block.mlp.act), block.mlp.fc2.in_features, isinstance(block.mlp, (GluMlp, SwiGLU))
    if act not in ACTIVATIONS:
        raise InputError(f"the activation is {act.__name__}; those that transformers' configuration names are "
                         f"{', '.join(dict.fromkeys(ACTIVATIONS.values()))}")
    config = {"model_type": model_type, "hidden_size": model.embed_dim, "num_hidden_layers": len(model.blocks),
              "num_attention_heads": block.attn.num_heads, "intermediate_size": neurons, "hidden_act": ACTIVATIONS[act],
              "layer_norm_eps": block.norm1.eps, "image_size": size, "patch_size": patch,
              "num_channels": model.in_chans, "dtype": "float32"}
    if "reg_token" in names:
        config["num_register_tokens"] = model.reg_token.shape[1]
    if model_type == "dinov3_vit":
        biased = "blocks.0.attn.q_bias" in names
        config |= {"query_bias": biased, "key_bias": False, "value_bias": biased, "proj_bias": True, "mlp_bias": True,
                   "use_gated_mlp": gated, "rope_theta": getattr(model.rope, "temperature", None)}
    elif model_type == "siglip_vision_model":
        config["vision_use_head"] = "attn_pool.latent" in names
    elif model_type == "clip_vision_model":
        config["projection_dim"] = classes_of(model) or model.embed_dim
    else:
        config["qkv_bias"] = "blocks.0.attn.qkv.bias" in names
    if model_type.startswith("dinov2"):
        del config["intermediate_size"]
        config |= {"use_swiglu_ffn": gated, "use_mask_token": False}
        config["mlp_ratio"] = next((ratio for ratio in range(1, 65) if neurons * (1 + gated) == dino2_neurons(
            {**config, "mlp_ratio": ratio})), None)
        require(config["mlp_ratio"] is not None, f"a block has {neurons} neurons; transformers' {model_type} has a "
                f"whole multiple of its width, {model.embed_dim}")
    return config


def _labels(model: nn.Module, classes: list[str] | None) -> dict[str, Any]:
    names = dict(enumerate(classes or [f"LABEL_{number}" for number in range(model.num_classes)]))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}


def _preparing(model: nn.Module) -> dict[str, Any]:
    """What preprocessor_config.json says: the image settings, in the words of a processor that resizes, then crops."""
    settings, (height, width) = settings_of(model), model.patch_embed.img_size
    share = settings["crop_pct"] or 1.0
    whole = [math.floor(side / share) for side in (height, width)]
    squash = settings["crop_mode"] == "squash"
    return {"image_processor_type": "DeiTImageProcessor" if squash else "CLIPImageProcessor", "do_resize": True,
            "size": {"height": whole[0], "width": whole[1]} if squash else {"shortest_edge": min(whole)},
            "do_center_crop": True, "crop_size": {"height": height, "width": width}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(settings["mean"]),
            "image_std": list(settings["std"]), "resample": RESAMPLE.index(settings["interpolation"])}


def _check_same(weights: Path, model: nn.Module, what: str) -> None:
    """InputError where the folder gives another output (features where there is no classifier) than the model."""
    try:
        config, state, _ = converted(weights, config_of(weights) or {}, read_state(weights))
        again, _ = from_weights(config.name, state, weights, {}, config.args)
    except InputError as error:
        raise InputError(f"{what} can't be that model ({error})") from None
    images = torch.rand(1, model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = (each(images) if classes_of(model) or model.attn_pool else each.forward_features(images)
                         for each in (copy.deepcopy(model).float().cpu().eval(), again))
    if (before - after).abs().max() > CLOSE * before.abs().max():
        raise InputError(f"{what} computes something else: it pools tokens in another way, or has other layers")
