"""How timm's families of vision transformers differ from each other, and nowhere else is it said: their kinds of model,
block, attention and MLP, where heads, neurons, norms and scales are in them, and what of them can't be cut.

A family is added by its classes here (CONTRIBUTING.md). B images, N tokens, P prefix tokens, D width, H heads of width
d, M neurons.
"""
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, DiffAttention, GluMlp, HybridEmbed, Mlp, PatchEmbed, SwiGLU
from timm.models import beit, cait, eva, vision_transformer, vision_transformer_relpos, vision_transformer_sam, vitamin
from torch import Tensor, nn

from vitlab.models import windowed
from vitlab.models.ends import class_token, ended
from vitlab.models.left_out import LeftOut
from vitlab.models.parallel_blocks import ParallelBlock

MODELS = (vision_transformer.VisionTransformer, eva.Eva, beit.Beit, vision_transformer_relpos.VisionTransformerRelPos,
          vision_transformer_sam.VisionTransformerSAM, cait.Cait)
POST_NORM = (vision_transformer.ResPostBlock, eva.EvaBlockPostNorm, vision_transformer_relpos.ResPostRelPosBlock)
BLOCKS = (vision_transformer.Block, eva.EvaBlock, beit.Block, vision_transformer_relpos.RelPosBlock,
          vision_transformer_sam.Block, cait.LayerScaleBlock, *POST_NORM, ParallelBlock)
ROTARY = (eva.EvaAttention, AttentionRope)      # of those, the ones that turn queries and keys by their tokens' places
RELATIVE = (beit.Attention, vision_transformer_relpos.RelPosAttention, vision_transformer_sam.Attention)
TALKING = (cait.TalkingHeadAttn,)               # of those, the ones that mix heads, and take no mask
ATTENTIONS = (Attention, DiffAttention, *ROTARY, *RELATIVE, *TALKING)
HEADS_COUNTED = (*ROTARY, beit.Attention, DiffAttention)        # whose forward needs as many heads as the model has
PATCHES = (PatchEmbed, HybridEmbed)
# per kind of MLP: the linears whose rows are neurons, with how many a neuron has in each, and the one that mixes them
HIDDEN: dict[type[nn.Module], tuple[dict[str, int], str]] = {
    Mlp: ({"fc1": 1}, "fc2"), GluMlp: ({"fc1": 2}, "fc2"), SwiGLU: ({"fc1_g": 1, "fc1_x": 1}, "fc2"),
    vitamin.GeGluMlp: ({"w0": 1, "w1": 1}, "w2")}

# ---- Model


def kind_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    """timm's class of a model, block or layer, that its own class goes back to; None where it is none of these."""
    return next((kind for kind in type(module).__mro__ if kind in kinds), None)


def embedded(model: nn.Module, images: Tensor) -> Tensor:
    """What goes into the first block (B, N, D), of SAM (B, h, w, D), by timm's own parts."""
    if isinstance(model, vision_transformer.VisionTransformer):
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    if isinstance(model, eva.Eva):
        return model.norm_pre(model._pos_embed(model.patch_embed(images))[0])
    if isinstance(model, vision_transformer_sam.VisionTransformerSAM):
        return windowed.embedded(model, images)
    x = model.patch_embed(images)
    if class_token(model):
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    position = getattr(model, "pos_embed", None)
    return getattr(model, "pos_drop", nn.Identity())(x if position is None else x + position)


def also_taken(model: nn.Module) -> list[dict[str, Any]]:
    """What each block takes beside its tokens: rotations by place, or a bias by distance that all blocks share."""
    each: dict[str, Any] = {}
    if getattr(model, "rope", None) is not None:
        grid = model.patch_embed.grid_size
        like = model.patch_embed.proj.weight.new_zeros(1, *grid, model.embed_dim)
        rope = model._pos_embed(like if model.dynamic_img_size else like.flatten(1, 2))[1]
        if rotates_by_head(model):
            return [{"rope": of_block} for of_block in rope]
        each = {"rope": rope}
    elif getattr(model, "rel_pos_bias", None) is not None:
        each = {"shared_rel_pos_bias": model.rel_pos_bias()}
    elif getattr(model, "shared_rel_pos", None) is not None:
        each = {"shared_rel_pos": model.shared_rel_pos.get_bias()}
    return [each] * len(model.blocks)


def finished(model: nn.Module, x: Tensor, block: int) -> Tensor:
    """The logits of what goes into a block."""
    for each, also in list(zip(model.blocks, also_taken(model)))[block:]:
        x = each(x, **also)
    return model.forward_head(ended(model, x))


def rotates_by_head(model: nn.Module) -> bool:
    """Whether each head has rotations of its own, in every block."""
    return bool(getattr(model, "rope_mixed", False))

# ---- Block


def run(block: nn.Module, x: Tensor, mask: Tensor | None, **also: Any) -> Tensor:
    """What a block gives for tokens (B, N, D), a mask added to the logits of its attention; where timm's own forward
    takes none, by its parts."""
    if mask is None:
        return block(x, **also)
    if not isinstance(block, cait.LayerScaleBlock):
        return block(x, attn_mask=mask, **also)
    x = x + attention_update(block, block.attn(attention_input(block, x), attn_mask=mask))
    return x + mlp_update(block, x)


def attended(block: nn.Module, x: Tensor, **also: Any) -> Tensor:
    """The stream after a block's attention."""
    if isinstance(block, vision_transformer_sam.Block):
        return windowed.attended(block, x)
    return x + attention_update(block, block.attn(attention_input(block, x), **also))


def attention_input(block: nn.Module, x: Tensor) -> Tensor:
    """What goes into the attention (B, N, D) of a block."""
    return x if isinstance(block, POST_NORM) else block.norm1(x)


def _scaled(block: nn.Module, number: int, update: Tensor) -> Tensor:
    """An update by the block's LayerScale, a module or a parameter, or its last norm; then stochastic depth."""
    gamma = getattr(block, f"gamma_{number}", None)
    if isinstance(block, POST_NORM):
        update = getattr(block, f"norm{number}")(update)
    elif gamma is not None:
        update = gamma * update
    drop = block.drop_path if isinstance(block, cait.LayerScaleBlock) else getattr(block, f"drop_path{number}")
    return drop(getattr(block, f"ls{number}", nn.Identity())(update))


def attention_update(block: nn.Module, attended: Tensor) -> Tensor:
    """What is added to the stream for the attention's output (B, Q, D)."""
    return _scaled(block, 1, attended)


def mlp_update(block: nn.Module, x: Tensor) -> Tensor:
    """What the MLP adds to the stream x (B, N, D)."""
    return _scaled(block, 2, block.mlp(x if isinstance(block, POST_NORM) else block.norm2(x)))


def attention_added(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """The stream x (B, Q, D) with what its attention adds; of a block whose MLP reads the same, with the MLP's too."""
    y = x + attention_update(block, attended)
    return y + mlp_update(block, x) if isinstance(block, ParallelBlock) else y


def mlp_added(block: nn.Module, x: Tensor) -> Tensor:
    """The stream (B, N, D) of `attention_added` with what the MLP adds."""
    return x if isinstance(block, ParallelBlock) else x + mlp_update(block, x)


def layer_scale(block: nn.Module, kind: str) -> Tensor | None:
    """Factors (D) of what the attention ("heads") or the MLP ("neurons") adds; None where there are none."""
    number = 1 if kind == "heads" else 2
    found = getattr(block, f"gamma_{number}", None)
    return getattr(getattr(block, f"ls{number}", None), "gamma", None) if found is None else found

# ---- Heads and neurons


def sublayer(block: nn.Module, kind: str) -> nn.Module:
    """The attention ("heads") or the MLP ("neurons") of a block, or what stands for it where it is left out."""
    return block.attn if kind == "heads" else block.mlp


def nothing_of(block: nn.Module) -> tuple[str, ...]:
    """The kinds of units of a block that are left out without a constant in their place."""
    parts = {kind: sublayer(block, kind) for kind in ("heads", "neurons")}
    return tuple(kind for kind, part in parts.items() if isinstance(part, LeftOut) and part.bias is None)


def mixing_layer(block: nn.Module, kind: str) -> tuple[nn.Linear | LeftOut, int]:
    """(the linear that mixes the heads or neurons of a block, or what stands for it; how many inputs a unit has)."""
    whole = sublayer(block, kind)
    if isinstance(whole, LeftOut):
        return whole, whole.width
    if kind == "heads":
        return whole.proj, whole.proj.in_features // whole.num_heads
    return getattr(whole, HIDDEN[type(whole)][1]), 1


def query_width(attn: nn.Module) -> int:
    """Of the queries and keys of each head, which may be narrower than its values."""
    width = getattr(attn, "qk_width", None)
    return attn.proj.in_features // attn.num_heads if width is None else width


def sharing(block: nn.Module) -> int:
    """How many heads share each head of keys and values."""
    return getattr(block.attn, "num_kv_groups", 1)


def making_layers(block: nn.Module, kind: str) -> list[tuple[nn.Linear, tuple[int, ...]]]:
    """The linears whose rows make the heads or neurons of a block, with the rows that a unit has in each part that is
    stacked in them: of three, queries, keys and values of all heads. Of heads that share keys and values their queries
    alone; none of a sublayer that is left out."""
    if isinstance(sublayer(block, kind), LeftOut):
        return []
    if kind == "neurons":
        return [(getattr(block.mlp, name), (1,) * parts) for name, parts in HIDDEN[type(block.mlp)][0].items()]
    attn, widths = block.attn, (*(query_width(block.attn),) * 2, mixing_layer(block, kind)[1])
    if attn.qkv is not None:
        return [(attn.qkv, widths)]
    return [(getattr(attn, f"{name}_proj"), (w,)) for name, w in zip("q" if sharing(block) > 1 else "qkv", widths)]


def entered_layer(block: nn.Module, kind: str) -> tuple[nn.Module, int]:
    """(what the inputs go into that say how a kind of cut is made good, how many they are): the linear that mixes heads
    or neurons, and for "widths" of queries the attention, as timm's with biases of their own don't call qkv."""
    if kind == "widths":
        return block.attn, making_layers(block, "heads")[0][0].in_features
    linear = mixing_layer(block, kind)[0]
    return linear, linear.in_features


def maps_of(attn: nn.Module) -> int:
    """Softmax maps of each head: 2, of queries and keys half as wide as values, whose difference mixes these."""
    return 2 if isinstance(attn, DiffAttention) else 1


def head_vectors(attn: nn.Module) -> dict[str, int]:
    """Names of an attention's own tensors that have a part for every head, and in which dimension."""
    found = dict.fromkeys(("q_bias", "k_bias", "v_bias"), 0) | {"relative_position_bias_table": 1}
    return {name: dim for name, dim in found.items() if getattr(attn, name, None) is not None}


def fixed_parts(block: nn.Module) -> tuple[str, ...]:
    """What of a block can't be cut (`ViTShape.fixed`), each with the reason."""
    attn, mlp, found = block.attn, block.mlp, []
    if not isinstance(getattr(attn, "norm", None), (nn.Identity, type(None))):
        found.append("heads: a norm over all of them follows")
    elif sharing(block) > 1:
        found.append("heads: they share keys and values")
    elif isinstance(attn, vision_transformer_relpos.RelPosAttention):
        found.append("heads: their biases by distance are made together")
    elif isinstance(attn, TALKING):
        found.append("heads: they are mixed before and after the softmax")
    if sharing(block) > 1:
        found.append("widths: heads share keys")
    if maps_of(attn) > 1:
        found.append("widths: each head has two queries and keys")
    if not isinstance(getattr(mlp, "norm", None), (nn.Identity, type(None))) and type(mlp) is not vitamin.GeGluMlp:
        found.append("neurons: a norm over all of them follows")
    if isinstance(block, vision_transformer_sam.Block):
        found += ["tokens: attention is within windows of the grid", "widths: queries make biases by distance, too"]
    elif isinstance(attn, RELATIVE):
        found.append("tokens: attention has a bias for every two places")
    return tuple(found)
