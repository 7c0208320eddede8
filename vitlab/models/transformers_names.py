"""Models as Hugging Face's transformers names them: per model type, timm's architecture that computes the same, and
which of its tensors make which of timm's."""
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitlab.runtime.files import InputError, require

# A row says: tensors of timm's = tensors of transformers', those of each side joined (a|b stands for both).
# {} is the number of a block, * weight and bias.
_ATTENTION = """
cls_token = embeddings.cls_token
patch_embed.proj.* = embeddings.patch_embeddings.projection.*
blocks.{}.attn.qkv.* = encoder.layer.{}.attention.attention.query|key|value.*
blocks.{}.attn.proj.* = encoder.layer.{}.attention.output.dense.*
norm.* = layernorm.*
"""
_VIT = _ATTENTION + """
reg_token = embeddings.distillation_token
pos_embed = embeddings.position_embeddings
blocks.{}.norm1.* = encoder.layer.{}.layernorm_before.*
blocks.{}.norm2.* = encoder.layer.{}.layernorm_after.*
blocks.{}.mlp.fc1.* = encoder.layer.{}.intermediate.dense.*
blocks.{}.mlp.fc2.* = encoder.layer.{}.output.dense.*
head.* = classifier.*
"""
_TEACHER = _VIT.replace("reg_token", "dist_token").replace("= classifier", "= cls_classifier") + """
head_dist.* = distillation_classifier.*
"""
_DINO = _ATTENTION + """
pos_embed = embeddings.position_embeddings
reg_token = embeddings.register_tokens
blocks.{}.norm1.* = encoder.layer.{}.norm1.*
blocks.{}.ls1.gamma = encoder.layer.{}.layer_scale1.lambda1
blocks.{}.norm2.* = encoder.layer.{}.norm2.*
blocks.{}.mlp.fc1.* = encoder.layer.{}.mlp.fc1.*
blocks.{}.mlp.fc2.* = encoder.layer.{}.mlp.fc2.*
blocks.{}.ls2.gamma = encoder.layer.{}.layer_scale2.lambda1
"""
_DINO_GATED = _DINO.replace("= encoder.layer.{}.mlp.fc1", "= encoder.layer.{}.mlp.weights_in").replace(
    "= encoder.layer.{}.mlp.fc2", "= encoder.layer.{}.mlp.weights_out")
_DINO3 = """
cls_token = embeddings.cls_token
reg_token = embeddings.register_tokens
patch_embed.proj.* = embeddings.patch_embeddings.*
blocks.{}.norm1.* = layer.{}.norm1.*
blocks.{}.attn.qkv.weight = layer.{}.attention.q_proj|k_proj|v_proj.weight
blocks.{}.attn.q_bias = layer.{}.attention.q_proj.bias
blocks.{}.attn.v_bias = layer.{}.attention.v_proj.bias
blocks.{}.attn.proj.* = layer.{}.attention.o_proj.*
blocks.{}.gamma_1 = layer.{}.layer_scale1.lambda1
blocks.{}.norm2.* = layer.{}.norm2.*
blocks.{}.mlp.fc1.* = layer.{}.mlp.up_proj.*
blocks.{}.mlp.fc2.* = layer.{}.mlp.down_proj.*
blocks.{}.gamma_2 = layer.{}.layer_scale2.lambda1
norm.* = norm.*
"""
_DINO3_GATED = _DINO3.replace("= layer.{}.mlp.up_proj.*", "= layer.{}.mlp.gate_proj|up_proj.*") + """
blocks.{}.mlp.fc1_g.* = layer.{}.mlp.gate_proj.*
blocks.{}.mlp.fc1_x.* = layer.{}.mlp.up_proj.*
"""
_CLIP = """
cls_token = embeddings.class_embedding
patch_embed.proj.* = embeddings.patch_embedding.*
pos_embed = embeddings.position_embedding.weight
norm_pre.* = pre_layrnorm.*
blocks.{}.norm1.* = encoder.layers.{}.layer_norm1.*
blocks.{}.attn.qkv.* = encoder.layers.{}.self_attn.q_proj|k_proj|v_proj.*
blocks.{}.attn.proj.* = encoder.layers.{}.self_attn.out_proj.*
blocks.{}.norm2.* = encoder.layers.{}.layer_norm2.*
blocks.{}.mlp.fc1.* = encoder.layers.{}.mlp.fc1.*
blocks.{}.mlp.fc2.* = encoder.layers.{}.mlp.fc2.*
norm.* = post_layernorm.*
attn_pool.latent = head.probe
attn_pool.q|kv.* = head.attention.in_proj_*
attn_pool.proj.* = head.attention.out_proj.*
attn_pool.norm.* = head.layernorm.*
attn_pool.mlp.fc1.* = head.mlp.fc1.*
attn_pool.mlp.fc2.* = head.mlp.fc2.*
head.* = classifier.*
"""
_CLIP_PROJECTED = _CLIP.replace("head.* = classifier.*", "head.weight = visual_projection.weight")
FLAT = ("embeddings.class_embedding", "embeddings.position_embedding.weight")      # (D) and (N, D), timm's (1, N, D)
# of pre-training, of the other tower, or computed; whatever else no row takes makes a file unknown
LEFT = ("embeddings.mask_token", "pooler.", "text_model.", "text_projection.", "logit_scale", "logit_bias", "decoder.",
        "embeddings.position_ids", "rope_embeddings.", "head.", "post_layernorm.", "classifier.")
ACTIVATIONS = {"gelu": None, "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu",
               "relu": "relu", "silu": "silu", "swish": "silu"}                     # timm's; None: a block's own
_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
          "num_channels": 3, "hidden_act": "gelu"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model type of transformers."""

    timm: str                       # the architecture, of other sizes
    rows: str                       # which tensors make which
    defaults: dict[str, Any]        # of the configuration, where a file does not say
    args: dict[str, Any] = field(default_factory=dict)
    resamples: bool | None = None   # its position embeddings, for whatever images come: by bicubic; True: antialiased
    square: bool = True             # an image's `size` of one number is its height and width, not its shorter side


KINDS = {
    "vit": Kind(timm="vit_base_patch16_224", rows=_VIT,
                defaults={**_SIZES, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "qkv_bias": True}),
    # without the classifier of its distillation token, which is a register then
    "deit": Kind(timm="deit_base_patch16_224", rows=_VIT, args={"reg_tokens": 1},
                 defaults={**_SIZES, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "qkv_bias": True}),
    "dinov2": Kind(timm="vit_base_patch14_dinov2", rows=_DINO, resamples=False, square=False,
                   defaults={**_SIZES, "patch_size": 14, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "qkv_bias": True}),
    "dinov2_with_registers": Kind(
        timm="vit_base_patch14_reg4_dinov2", rows=_DINO, resamples=True, square=False, args={"no_embed_class": True},
        defaults={**_SIZES, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "qkv_bias": True, "num_register_tokens": 4}),
    "dinov3_vit": Kind(
        timm="vit_base_patch16_dinov3", rows=_DINO3, resamples=False,
        args={"global_pool": "token", "dynamic_img_size": False, "swiglu_align_to": 0},
        defaults={**_SIZES, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536,
                  "layer_norm_eps": 1e-5, "num_register_tokens": 0, "rope_theta": 100.0, "use_gated_mlp": False,
                  "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}),
    "clip_vision_model": Kind(timm="vit_base_patch16_clip_224", rows=_CLIP, square=False, defaults={
        **_SIZES, "patch_size": 32, "intermediate_size": 3072, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}),
    "siglip_vision_model": Kind(timm="vit_base_patch16_siglip_224", rows=_CLIP, defaults={
        **_SIZES, "intermediate_size": 3072, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": True})}
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}            # under vision_config


def timms(model_type: str, names: dict[str, Tensor], config: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """(timm's architecture, rows, timm's arguments) of a model type with these tensors, which tell its class."""
    kind = KINDS[model_type]
    timm, rows, args = kind.timm, kind.rows, dict(kind.args)
    if "cls_classifier.weight" in names:
        timm, rows, args = "deit_base_distilled_patch16_224", _TEACHER, {}
    elif model_type.startswith("dinov2") and config.get("use_swiglu_ffn"):
        timm, rows = "vit_giant_patch14_" + ("reg4_" if "reg" in model_type else "") + "dinov2", _DINO_GATED
    elif model_type == "dinov3_vit" and config.get("use_gated_mlp"):
        rows, args["swiglu_mlp"] = _DINO3_GATED, True
    elif "visual_projection.weight" in names:
        rows = _CLIP_PROJECTED
    elif model_type == "clip_vision_model" and "classifier.weight" in names:
        args |= {"global_pool": "avg", "final_norm": False}         # the mean of patches that no norm has seen
    elif model_type == "siglip_vision_model" and ("classifier.weight" in names or "head.probe" not in names):
        args |= {"global_pool": "avg", "fc_norm": False}            # the mean of normed patches
    heads = [value for name, value in names.items() if f"head.* = {name.removesuffix('weight')}*\n" in rows
             or f"head.weight = {name}\n" in rows]
    return timm, rows, {**args, "num_classes": heads[0].shape[:1].numel() if heads else 0}


def _named(side: str, block: int | str, end: str) -> list[str]:
    """The names of one side of a row."""
    name, several = side.format(block).replace("*", end), re.search(r"\w+(\|\w+)+", side)
    return [name] if several is None else [name.replace(several[0], each) for each in several[0].split("|")]


def pairs(rows: str, own: dict[str, Tensor]) -> Iterator[tuple[list[str], list[str]]]:
    """(names of timm's, names of transformers') of a row for each block, weight and bias that timm's model has."""
    depth = 1 + max((int(name.split(".")[1]) for name in own if name.startswith("blocks.")), default=-1)
    for row in filter(None, rows.splitlines()):
        for block in range(depth) if "{}" in row else [""]:
            for end in ("weight", "bias") if "*" in row else [""]:
                ours, theirs = (_named(side, block, end) for side in row.split(" = "))
                if all(name in own for name in ours):
                    yield ours, theirs


def to_timm(state: dict[str, Tensor], rows: str, own: dict[str, Tensor], where: Any) -> tuple[dict[str, Tensor],
                                                                                             list[str]]:
    """(the tensors under timm's names and in the shapes of `own`, names of those that no row takes). Raises InputError
    naming the file and the tensor that is missing or of other sizes."""
    made, taken = {}, set()
    for ours, theirs in pairs(rows, own):
        missing = next((name for name in theirs if name not in state), None)
        require(missing is None, f"{where}: {missing} is missing")
        taken |= set(theirs)
        parts = [state[name] for name in theirs]
        if len(ours) == len(parts) == 1:
            made[ours[0]] = parts[0].reshape(own[ours[0]].shape) if theirs[0] in FLAT else parts[0]
            continue
        try:
            split = torch.cat(parts).split([len(own[name]) for name in ours])
        except RuntimeError:
            raise InputError(f"{where}: {theirs[0]} is {tuple(parts[0].shape)}, which does not fit the configuration"
                             ) from None
        made |= dict(zip(ours, split))
    return made, [name for name in state if name not in taken]


def from_timm(state: dict[str, Tensor], rows: str) -> dict[str, Tensor]:
    """The tensors of a timm model under transformers' names."""
    made = {}
    for ours, theirs in pairs(rows, state):
        whole = torch.cat([state[name] for name in ours])
        made |= dict(zip(theirs, whole.chunk(len(theirs))))
    return {name: (value.squeeze() if name in FLAT else value).clone(memory_format=torch.contiguous_format)
            for name, value in made.items()}
