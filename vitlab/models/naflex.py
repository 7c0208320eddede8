"""A NaFlexVit, which takes images of any size, at one size: timm's plain VisionTransformer with the same weights.

timm's model (SigLIP 2: Tschannen et al., arXiv 2502.14786, section 2.4.2; NaViT: Dehghani et al., arXiv 2307.06304)
goes through flattened patches by a linear layer, and samples its position embeddings, a table or one of rows plus one
of columns, at whatever grid the patches make. At one grid the layer is a convolution, and the sample is fixed.
"""
import copy
import math
from pathlib import Path

import torch
from timm.layers import to_2tuple
from timm.models._input import _init_model_traits, get_model_input_config
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitlab.models.unfilled import sizes_alone
from vitlab.models.weights import ANCHOR, renamed
from vitlab.plan.shape import is_int
from vitlab.runtime.files import InputError, first_line, require

# what both models have under the same names
PARTS = ("norm_pre", "blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head")
SAID = ("num_classes", "global_pool", "pool_include_prefix", "grad_checkpointing", "feature_info")
TIMMS = ("pretrained_cfg", "pretrained_model_args", "_model_args")
PLACES = {"learned": ("pos_embed",), "factorized": ("pos_embed_y", "pos_embed_x"), "none": ()}


def at_fixed_size(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> nn.Module:
    """A copy of a timm NaFlexVit as the VisionTransformer that gives the same of images of one size, each patch of
    them a token: what it gives of a batch of images as they are, without coordinates or a mask.

    img_size: side, or height and width, multiples of a patch's (default: what it was made for, or else its pretrained
    weights). Positions are sampled as the NaFlexVit samples them. Raises InputError for another model or size, or one
    with blocks of EVA.
    """
    if not isinstance(model, NaFlexVit):
        raise InputError(f"a {type(model).__name__} is no NaFlexVit, which alone has images of any size")
    asked = get_model_input_config(model)["input_size"][1:] if img_size is None else img_size
    size, patch = to_2tuple(asked), model.embeds.patch_size
    if len(size) != 2 or not all(is_int(side) and side > 0 and side % p == 0 for side, p in zip(size, patch)):
        raise InputError(f"img_size is {asked}; height and width in whole patches of {patch[0]} x {patch[1]} pixels "
                         "are needed")
    require(not any(isinstance(block, EvaBlock) for block in model.blocks), "this NaFlexVit has blocks of EVA, with "
            "which timm has a model of a fixed size by the same name without use_naflex")
    require(model.patch_drop is None, "this NaFlexVit drops patches in training (patch_drop_rate); create it with "
            "patch_drop_rate=0")
    model = copy.deepcopy(model)
    embeds = model.embeds
    with sizes_alone():
        fixed = VisionTransformer(
            img_size=size, patch_size=patch, in_chans=model.in_chans, num_classes=0, global_pool="", depth=1,
            embed_dim=model.embed_dim, num_heads=1, class_token=model.has_class_token, reg_tokens=model.num_reg_tokens,
            no_embed_class=True, pos_embed="none" if embeds.pos_embed_type == "none" else "learn",
            pre_norm=embeds.proj.bias is None)
    for name in (*PARTS, *SAID):
        setattr(fixed, name, getattr(model, name))
    fixed.patch_embed.norm, fixed.pos_drop = embeds.norm, embeds.pos_drop
    fixed.load_state_dict(plain_state(renamed(model.state_dict()), embeds, fixed.patch_embed.grid_size), assign=True)
    for name in TIMMS:
        if hasattr(model, name):
            setattr(fixed, name, getattr(model, name))
    if hasattr(fixed, "pretrained_cfg"):
        fixed.pretrained_cfg = fixed.default_cfg = {**fixed.pretrained_cfg, "first_conv": "patch_embed.proj"}
    _init_model_traits(fixed, {"img_size": size}, {"first_conv": "patch_embed.proj"})
    return fixed.train(model.training)


def at_grid(state: dict[str, Tensor], model: nn.Module, grid: tuple[int, int],
            path: str | Path) -> dict[str, Tensor]:
    """`plain_state` of a weights file; model: timm's of the name that is given for it. InputError naming the file where
    that is no NaFlexVit, or its patches are others."""
    if not isinstance(model, NaFlexVit):
        raise InputError(f"{path}: holds the weights of a NaFlexVit, and a {type(model).__name__} is none; give the "
                         "name of the one that they are of")
    try:
        return plain_state(state, model.embeds, grid)
    except Exception as error:                  # whatever tensors of other sizes make torch raise
        raise InputError(f"{path}: does not fit the model; it can't be converted ({first_line(error)})") from None


@torch.no_grad()
def plain_state(state: dict[str, Tensor], embeds: NaFlexEmbeds, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The state of a NaFlexVit, `renamed`, as that of a VisionTransformer with this grid of patches. embeds: its
    embedding, which says how; the state's positions take the place of its own."""
    state = dict(state)
    if embeds.is_linear:
        kernel = state[ANCHOR]                                                          # (D, rows columns channels)
        rows, columns = _patch(kernel.shape[1], embeds)
        kernel = (kernel.unflatten(1, (rows, columns, -1)).permute(0, 3, 1, 2) if embeds.channels_last else
                  kernel.unflatten(1, (-1, rows, columns)))                             # (D, channels, rows, columns)
        state[ANCHOR] = kernel.contiguous()
    names = PLACES[embeds.pos_embed_type]
    if names and all(name in state for name in names):
        for name in names:
            setattr(embeds, name, nn.Parameter(state.pop(name), requires_grad=False))
        table = getattr(embeds, names[0])                                               # (1, ..., D)
        places = table.new_zeros(1, grid[0] * grid[1], table.shape[-1])
        (embeds._apply_learned_pos_embed if names == PLACES["learned"] else
         embeds._apply_factorized_pos_embed)(places, grid_size=grid)
        state["pos_embed"] = places
    return state


def _patch(numbers: int, embeds: NaFlexEmbeds) -> tuple[int, int]:
    """Height and width of patches of so many numbers: the embedding's, or a square where these are others."""
    rows, columns = embeds.patch_size
    side = math.isqrt(numbers // embeds.in_chans)
    others = rows * columns * embeds.in_chans != numbers == side * side * embeds.in_chans
    return (side, side) if others else (rows, columns)
