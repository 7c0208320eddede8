"""compress(model, plan): a timm model with its heads, neurons and tokens cut as the plan says (methods A6, B8)."""
import copy
from typing import Any

from torch import nn

from vitlab.models.attention import attention_as
from vitlab.models.families import nothing_of, query_width
from vitlab.models.match import MatchBlock
from vitlab.models.merge import MergeReconstructTokens, TokenBlock
from vitlab.models.narrow import narrow_queries
from vitlab.models.read_out import ReadOutBlock
from vitlab.models.select import SelectBlock
from vitlab.models.share import SharedUpdateBlock
from vitlab.models.shrink import keep_units
from vitlab.models.support import attention_block, check_supported, encoder_of, replaced, shape_of, sizes_of, units_of
from vitlab.models.tokens_cut import as_tokens_cut, without_tokens_cut
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import TRAINABLE, Match, MergeReconstruct, ReadOut, Select, SharedUpdate, TokenRule
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError, named, require

TOKEN_BLOCKS: dict[str, Any] = {MergeReconstruct.kind: TokenBlock, SharedUpdate.kind: SharedUpdateBlock,
                                Select.kind: SelectBlock, Match.kind: MatchBlock, ReadOut.kind: ReadOutBlock}


def check_agrees(model: nn.Module, plan: CompressionPlan) -> None:
    """InputError naming the sizes, or the first block, in which a compressed model (not deployed) is not the plan's."""
    check_supported(model)
    plan.check_fits(sizes_of(model, plan.shape.num_heads, plan.shape.num_neurons))
    for index, (block, cut, (rule, place)) in enumerate(zip(model.blocks, plan.blocks, plan.rules())):
        inner = attention_block(block)
        expected = (plan.shape.num_heads if cut.heads is None else len(cut.heads),
                    plan.shape.num_neurons if cut.neurons is None else len(cut.neurons), cut.qk_width,
                    cut.nothing, type(inner) if rule is None else TOKEN_BLOCKS[rule.kind], rule, place)
        width, nothing = getattr(inner.attn, "qk_width", None), nothing_of(inner)
        if expected != (*units_of(inner), width, nothing, type(block), getattr(block, "rule", None),
                        getattr(block, "place", 0)):
            raise InputError(f"block {index} of the model is not what the plan says; the plan it was compressed by is "
                             "needed")


def _cut_tokens(block: nn.Module, now: tuple[TokenRule | None, int], was: tuple[TokenRule | None, int],
                heads_gone: bool, num_prefix_tokens: int) -> nn.Module:
    """The block by its rule and place there (CompressionPlan.rules); what trains in it stays where both do."""
    inner, (rule, place) = attention_block(block), now
    if isinstance(block, SelectBlock) and isinstance(rule, Select) and block.rule.ranked_by == rule.ranked_by:
        block.rule = rule                       # its heads that rank stay
    elif now != was:
        if heads_gone and getattr(rule, "ranked_by", None) == "all":
            raise InputError("all heads should rank tokens, but the model has lost some, or widths of them, already")
        inner.attn = attention_as(None, inner.attn, masked=rule is not None)
        where = (place,) if place else ()       # of one block alone everywhere but in a span
        block = inner if rule is None else TOKEN_BLOCKS[rule.kind](inner, rule, num_prefix_tokens, *where)
        like = next(inner.parameters())
        block = block.to(like.device, like.dtype).train(inner.training)
    return block


def _cut_units(block: nn.Module, cut: BlockPlan, was: BlockPlan, shape: ViTShape) -> None:
    """Heads, neurons, and widths of queries and keys leave timm's Block, in place; those that `was` cut left before."""
    for name, count in (("heads", shape.num_heads), ("neurons", shape.num_neurons)):
        before, after = (range(count) if kept is None else kept for kept in (getattr(was, name), getattr(cut, name)))
        gone = sorted(set(after) - set(before))
        if gone:
            raise InputError((f"all {name} should stay, but the model has lost some" if getattr(cut, name) is None else
                              f"{name} {gone[0]} should stay, but the model has lost it") + " already")
        if len(after) < len(before):
            keep_units(block, name, [before.index(unit) for unit in after], name in cut.nothing)
    if nothing_of(block) != cut.nothing:
        raise InputError(f"nothing is {list(cut.nothing)}, but of what the model has left out already it is "
                         f"{list(nothing_of(block))}")
    if cut.leaves_out("heads"):
        return
    width, now = cut.qk_width or shape.head_dim, query_width(block.attn)
    require(width <= now, f"queries and keys should be {width} wide, but the model's are {now} already")
    if width < now:
        narrow_queries(block, width)


def _check_whole_grid(plan: CompressionPlan) -> None:
    """InputError naming the first block after which patches have no place any more: a decoder needs them all."""
    for index, block in enumerate(plan.blocks):
        if isinstance(block.tokens, (Select, ReadOut)):
            raise InputError(f"block {index}: tokens are "
                             f"{'selected' if isinstance(block.tokens, Select) else 'read out'}, but a class for "
                             'each pixel needs the whole grid; merge them ("merge_reconstruct", "shared_update" or '
                             '"match")')


def compress(model: nn.Module, plan: CompressionPlan, *, before: CompressionPlan | None = None,
             at: str = "") -> nn.Module:
    """A copy of `model`, compressed; still an instance of its class. The plan that cuts nothing gives bit-equal logits.
    Of a Segmenter the encoder is compressed, the decoder stays; of any other module the vision transformer that stands
    in it at a path of attributes, as "backbone.encoder".

    model: a dense timm VisionTransformer, or, to cut further, one that was compressed by the plan `before` (training
    form, fine-tuned or not); matrices of a token rule that stays the same keep their trained values. Queries and keys
    are narrowed by what weights alone say (`narrow_queries`); `compensate` does it by images. Raises InputError
    where the family can't be handled, the model is not what was said, the plan is for other sizes, or keeps what is
    gone.
    """
    if at:
        return replaced(model, at, lambda inner: compress(inner, plan, before=before))
    if before is None:
        before = CompressionPlan.empty(shape_of(model))
    else:
        check_agrees(model, before)
    plan.check_fits(before.shape)
    if encoder_of(model) is not model:
        _check_whole_grid(plan)
        return model.with_encoder(compress(model.encoder, plan, before=before))
    model = without_tokens_cut(copy.deepcopy(model))
    for index, (cut, now, was, ruled) in enumerate(zip(plan.blocks, plan.rules(), before.blocks, before.rules())):
        gone = was.qk_width is not None or was.heads is not None and len(was.heads) < plan.shape.num_heads
        with named(f"block {index}"):
            model.blocks[index] = _cut_tokens(model.blocks[index], now, ruled, gone, plan.shape.num_prefix_tokens)
            _cut_units(attention_block(model.blocks[index]), cut, was, plan.shape)
    last = model.blocks[before.shape.before_queries - 1]                        # of those whose tokens are cut
    if isinstance(last, MatchBlock):
        last.gives_back = True
    merged = False
    for block in model.blocks:
        if isinstance(block, (MatchBlock, ReadOutBlock)):
            block.takes_held = merged
        merged = merged or isinstance(block, MatchBlock) and block.rule.merged > 0
    return as_tokens_cut(model)


def set_trainable(model: nn.Module, what: str) -> None:
    """Which parameters train (A8): "all"; "matrices" alone (merge and reconstruct); "weights", all but the matrices.

    A merge matrix of rule `merge` never trains (A5), and token masks are buffers. Raises InputError for another word,
    or for "matrices" where the model has none.
    """
    require(what in TRAINABLE, f"trainable {what!r} is not known; known are {list(TRAINABLE)}")
    merging = [m for m in model.modules() if isinstance(m, MergeReconstructTokens)]
    require(what != "matrices" or merging, "the model has no merge and reconstruct matrices to train")
    for parameter in model.parameters():
        parameter.requires_grad_(what != "matrices")
    for module in merging:
        module.merge_matrix.requires_grad_(what != "weights" and module.trains == "both")
        module.reconstruct_matrix.requires_grad_(what != "weights")
