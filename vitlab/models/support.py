"""Which timm models vitlab takes, and the one place where their sizes and blocks are read."""
import copy
from collections.abc import Callable
from typing import Any

from timm.layers import AttentionPoolLatent
from torch import nn

from vitlab.models import ends, families
from vitlab.models.attention import TokenAttention
from vitlab.models.families import ATTENTIONS, BLOCKS, HIDDEN, MODELS, PATCHES, kind_of, mixing_layer
from vitlab.models.join import queries_in
from vitlab.models.left_out import LeftOut
from vitlab.models.parallel_blocks import PARALLEL, ParallelBlock
from vitlab.models.windowed import side_of
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError, require

KINDS = (*BLOCKS, *ATTENTIONS, *HIDDEN)
OTHERS = {"SwinTransformer": "its windows are cut out of a grid that halves from stage to stage",  # why others stay out
          "SwinTransformerV2": "its windows are cut out of a grid that halves from stage to stage",
          "Hiera": "its tokens are pooled from stage to stage",
          "MultiScaleVit": "its tokens are pooled by its attention",
          "Twins": "its attention is within windows and on pooled tokens", "Xcit": "it attends to channels, not tokens",
          "NaFlexVit": "its images have any size; vitlab.at_fixed_size(model, img_size) gives the one for a size",
          "Levit": "its tokens are pooled by its attention, and batch norms take the place of layer norms",
          "VOLO": "its outlook attention is over neighbours on the grid"}


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


def runs_in_parts(model: nn.Module) -> bool:
    """Whether `families.embedded` and `finished` together are what the model does: timm's own forward, and no hook."""
    timms = kind_of(model, MODELS)
    own = timms is not None and all(getattr(type(model), name) is getattr(timms, name)
                                    for name in ("forward", "forward_features", "__call__"))
    return own and "forward" not in vars(model) and not model._forward_hooks and not model._forward_pre_hooks


def check_runs_in_parts(model: nn.Module) -> None:
    """InputError where it does not."""
    require(runs_in_parts(model), f"{type(model).__name__} has a forward of its own, or a hook on the whole of it; it "
            "is gone through by timm's own forward, block by block: remove the hook, or make what it does a part of "
            "the patch embedding")


def attention_block(block: nn.Module) -> nn.Module:
    """timm's own block, whether plain or inside wrappers of vitlab."""
    while hasattr(block, "block"):
        block = block.block
    return block


def plain_linear(linear: nn.Module) -> nn.Linear:
    """The layer itself, whose weights are to be read. Raises InputError for whatever else stands for a Linear: its
    weights are not all that it does."""
    require(type(linear) is nn.Linear, f"a {type(linear).__module__}.{type(linear).__name__} stands for a Linear "
            "there, whose weights are needed; merge adapters into the weights, or compress before they are added")
    return linear


def is_merged(model: nn.Module) -> bool:
    """Whether tokens are merged or selected in any block (training or deployed form)."""
    return any(attention_block(b) is not b for b in model.blocks)


def refuse(model: nn.Module) -> str | None:
    """Why this model can't be handled, or None where it can."""
    name = type(model).__name__
    if kind_of(model, MODELS) is None:
        why = next((OTHERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in OTHERS), "")
        return (f"{name} is not one of timm's plain vision transformers"
                + (f": {why}" if why else f"; {', '.join(kind.__name__ for kind in MODELS)} are"))
    if not len(model.blocks):
        return f"{name} has no blocks"
    first: dict[int, type[nn.Module] | None] = {}       # kind of block, attention and MLP that the first one has
    for index, wrapped in enumerate(model.blocks):
        block = attention_block(wrapped)
        if isinstance(block, PARALLEL):
            return (f"{name} has a {type(block).__name__} at block {index}, which has no attention and MLP of its own; "
                    "vitlab.models.parallel_blocks.in_parts(model) is the same with such")
        if type(block) not in BLOCKS:
            return f"{name} has a {type(block).__name__} at block {index}; attention, then an MLP is needed"
        if type(block.attn) not in ATTENTIONS and not isinstance(block.attn, (TokenAttention, LeftOut)):
            return f"{name} has {type(block.attn).__name__} at block {index}; one of timm's attentions is needed"
        if getattr(block.attn, "gate", None) is not None:
            return f"{name} has a gated attention at block {index}; one without a gate is needed"
        for place, part in enumerate((block, block.attn, block.mlp)):
            if not isinstance(part, LeftOut) and kind_of(part, KINDS) is not first.setdefault(place,
                                                                                              kind_of(part, KINDS)):
                return f"{name} has {type(part).__name__} at block {index}; all blocks of one kind are needed"
        if type(block.mlp) not in (*HIDDEN, LeftOut):
            return f"{name} has {type(block.mlp).__name__} at block {index}; one of timm's MLPs is needed"
    if not isinstance(model.patch_embed, PATCHES):
        return f"{name} has {type(model.patch_embed).__name__}; a patch embedding with a fixed grid is needed"
    pool = getattr(model, "attn_pool", None)
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.mlp is None
                             or isinstance(pool.q, nn.Identity)):
        return f"{name} pools by {type(pool).__name__}; timm's AttentionPoolLatent with its MLP is needed"
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        return f"{name} drops patches in training (patch_drop_rate); create it with patch_drop_rate=0"
    return None


def check_supported(model: nn.Module) -> None:
    """InputError naming the model and the reason where the family can't be handled."""
    reason = refuse(encoder_of(model))
    require(reason is None, f"this model can't be handled: {reason}")


def classes_of(model: nn.Module) -> int:
    """Classes of a timm model: as its classifier gives out, which may have been replaced without its num_classes."""
    last = ends.classifier(model)
    if isinstance(last, nn.Identity):
        return 0
    return last.out_features if isinstance(last, nn.Linear) else model.num_classes


def units_of(block: nn.Module) -> tuple[int, ...]:
    """(heads, neurons) of a block."""
    return tuple(mixing.in_features // width for mixing, width in (mixing_layer(block, "heads"),
                                                                   mixing_layer(block, "neurons")))


def sizes_of(model: nn.Module, num_heads: int, num_neurons: int) -> ViTShape:
    """Sizes of a model whose dense form has so many heads and neurons a block; of a Segmenter with its decoder's."""
    whole, model = model, encoder_of(model)
    blocks = [attention_block(block) for block in model.blocks]
    first, classifiers, embed = blocks[0], model.get_classifier(), model.patch_embed
    joined, queries = queries_in(blocks)
    decoder: dict[str, Any] = {"decoder_depth": joined, "queries": queries}
    if whole is not model:
        decoder |= {"decoder": whole.decoder_name, "decoder_depth": whole.decoder_depth}
    pool, shared = getattr(model, "attn_pool", None), tuple(map(families.sharing, blocks))
    sides = tuple(map(side_of, blocks))
    pooled = {} if pool is None else {"pool_neurons": pool.mlp.fc1.out_features,
                                      "pool_prefix": bool(getattr(model, "pool_include_prefix", True))}
    return ViTShape(**decoder, **pooled,
        img_size=tuple(embed.img_size),
        patch_size=tuple(side // count for side, count in zip(embed.img_size, embed.grid_size)),
        in_chans=getattr(model, "in_chans", 3), embed_dim=model.embed_dim, depth=len(blocks),
        num_heads=num_heads, head_dim=mixing_layer(first, "heads")[1], num_neurons=num_neurons,
        gated=sum(len(parts) for _, parts in families.making_layers(first, "neurons")) > 1,
        num_prefix_tokens=ends.prefix_of(model), class_token=ends.class_token(model),
        num_classes=classes_of(model) if whole is model else whole.num_classes,
        num_classifiers=len(classifiers) if isinstance(classifiers, tuple) else 1,
        pool=ends.pool_of(model), qk_norm=not isinstance(getattr(first.attn, "q_norm", nn.Identity()), nn.Identity),
        rotary=0 if getattr(model, "rope", None) is None else num_heads if families.rotates_by_head(model) else 1,
        fixed=tuple(dict.fromkeys(part for block in blocks for part in families.fixed_parts(block))),
        key_heads=tuple(num_heads // each for each in shared) if max(shared) > 1 else (),
        parallel=isinstance(first, ParallelBlock), maps=max(families.maps_of(block.attn) for block in blocks),
        stem_macs=ends.stem_macs(embed), end_macs=ends.end_macs(model),
        features=0 if model.num_features == model.embed_dim else model.num_features,
        windows=sides if any(sides) else (), talking=isinstance(first.attn, families.TALKING),
        by_distance=any(getattr(block.attn, "use_rel_pos", False) for block in blocks),
        projection=whole is model and ends.is_projection(model))


def shape_of(model: nn.Module) -> ViTShape:
    """Sizes of a dense supported model. Raises InputError for any other, a compressed one too."""
    check_supported(model)
    blocks = list(map(attention_block, model.blocks))
    sizes = {units_of(block) for block in blocks}
    if is_merged(model) or len(sizes) > 1 or not all(*sizes) or any(hasattr(b.attn, "qk_width") for b in blocks):
        raise InputError("the model is already compressed; the dense one is needed here")
    return sizes_of(model, *sizes.pop())
