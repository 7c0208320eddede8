"""Which timm models vitlab takes, and the one place where their sizes and blocks are read."""
import copy
from collections.abc import Callable

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitlab.models.attention import KeyedAttention, PrefixAttention
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError


def encoder_of(model: nn.Module) -> nn.Module:
    """The vision transformer whose blocks are cut: of a Segmenter its encoder, else the model itself."""
    return getattr(model, "encoder", model)


def replaced(model: nn.Module, at: str, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of a module, with another in place of the one at a path of attributes. InputError names those that may be
    meant where there is none."""
    try:
        inner = model.get_submodule(at)
    except AttributeError:
        found = [name for name, each in model.named_modules() if name and hasattr(each, "patch_embed")]
        raise InputError(f"{type(model).__name__} has no {at!r}; vision transformers stand at "
                         f"{', '.join(found) or 'no place in it'}") from None
    made = change(inner)
    memo = {id(inner): made}                    # which the copy then has in its place, wherever it is used
    return copy.deepcopy(model, memo)


def embedded(model: nn.Module, images: Tensor) -> Tensor:
    """What goes into the first block (B, N, D), by timm's own parts."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def finished(model: nn.Module, x: Tensor, block: int) -> Tensor:
    """The logits of what goes into a block."""
    for each in model.blocks[block:]:
        x = each(x)
    return model.forward_head(model.norm(x))


def runs_in_parts(model: nn.Module) -> bool:
    """Whether `embedded` and `finished` together are what the model does: timm's own forward, and no hook on the
    whole."""
    own = all(getattr(type(model), name) is getattr(VisionTransformer, name)
              for name in ("forward", "forward_features", "__call__"))
    return own and "forward" not in vars(model) and not model._forward_hooks and not model._forward_pre_hooks


def check_runs_in_parts(model: nn.Module) -> None:
    """InputError where it does not."""
    if not runs_in_parts(model):
        raise InputError(f"{type(model).__name__} has a forward of its own, or a hook on the whole of it; it is gone "
                         f"through by timm's own "
                         "forward, block by block: remove the hook, or make what it does a part of the patch embedding")


def attention_block(block: nn.Module) -> nn.Module:
    """timm's own Block, whether plain or inside wrappers of vitlab."""
    while hasattr(block, "block"):
        block = block.block
    return block


def plain_linear(linear: nn.Module) -> nn.Linear:
    """The layer itself, whose weights are to be read. Raises InputError for whatever else stands for a Linear: its
    weights are not all that it does."""
    if type(linear) is not nn.Linear:
        raise InputError(f"a {type(linear).__module__}.{type(linear).__name__} stands for a Linear there, whose "
                         "weights are needed; merge adapters into the weights, or compress before they are added")
    return linear


def is_merged(model: nn.Module) -> bool:
    """Whether tokens are merged or selected in any block (training or deployed form)."""
    return any(attention_block(b) is not b for b in model.blocks)


def refuse(model: nn.Module) -> str | None:
    """Why this model can't be handled, or None where it can."""
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        return f"{name} is not a timm VisionTransformer; ViT, DeiT, DeiT-III, MAE and DINOv2 models are"
    if not len(model.blocks):
        return f"{name} has no blocks"
    for index, wrapped in enumerate(model.blocks):
        block = attention_block(wrapped)
        if type(block) is not Block:
            return f"{name} has a {type(block).__name__} at block {index}; timm's plain Block is needed"
        if type(block.attn) not in (Attention, KeyedAttention, PrefixAttention):
            return f"{name} has {type(block.attn).__name__} at block {index}; timm's plain Attention is needed"
        if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
            return f"{name} has {type(block.mlp).__name__} at block {index}; timm's plain Mlp is needed"
        if block.attn.gate is not None:
            return f"{name} has a gated attention at block {index}; timm's plain Attention is needed"
    if not isinstance(model.patch_embed, PatchEmbed):
        return f"{name} has {type(model.patch_embed).__name__}; timm's plain PatchEmbed is needed"
    if model.attn_pool is not None:
        return f"{name} pools by attention ({type(model.attn_pool).__name__}); class-token or average pooling is needed"
    if type(model.patch_drop) is not nn.Identity:
        return f"{name} drops patches in training (patch_drop_rate); create it with patch_drop_rate=0"
    return None


def check_supported(model: nn.Module) -> None:
    """InputError naming the model and the reason where the family can't be handled."""
    reason = refuse(encoder_of(model))
    if reason is not None:
        raise InputError(f"this model can't be handled: {reason}")


def classes_of(model: nn.Module) -> int:
    """Classes of a timm model: as many as its classifier gives out, which may have been replaced without its
    num_classes."""
    if isinstance(model.head, nn.Identity):
        return 0
    return model.head.out_features if isinstance(model.head, nn.Linear) else model.num_classes


def sizes_of(model: nn.Module, num_heads: int, num_neurons: int) -> ViTShape:
    """Sizes of a model whose dense form has so many heads and neurons in each block; of a Segmenter with its
    decoder's."""
    whole, model = model, encoder_of(model)
    first, classifiers, embed = attention_block(model.blocks[0]), model.get_classifier(), model.patch_embed
    decoder = {} if whole is model else {"decoder": whole.decoder_name, "decoder_depth": whole.decoder_depth}
    return ViTShape(**decoder,
        img_size=tuple(embed.img_size), patch_size=tuple(embed.patch_size), in_chans=model.in_chans,
        embed_dim=model.embed_dim, depth=len(model.blocks),
        num_heads=num_heads, head_dim=first.attn.head_dim, num_neurons=num_neurons,
        num_prefix_tokens=model.num_prefix_tokens, class_token=model.cls_token is not None,
        num_classes=classes_of(model) if whole is model else whole.num_classes,
        num_classifiers=len(classifiers) if isinstance(classifiers, tuple) else 1,
        pool=model.global_pool, qk_norm=not isinstance(first.attn.q_norm, nn.Identity))


def shape_of(model: nn.Module) -> ViTShape:
    """Sizes of a dense supported model. Raises InputError for any other, a compressed one too."""
    check_supported(model)
    sizes = {(b.attn.num_heads, b.mlp.fc2.in_features) for b in map(attention_block, model.blocks)}
    if is_merged(model) or len(sizes) > 1:
        raise InputError("the model is already compressed; the dense one is needed here")
    return sizes_of(model, *sizes.pop())
