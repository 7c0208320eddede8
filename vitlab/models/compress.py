"""compress(model, plan): a timm model with its heads, neurons and tokens cut as the plan says (methods A6, B8)."""
import copy
from collections.abc import Sequence
from typing import Any

from timm.layers import Attention
from torch import nn

from vitlab.models.attention import attention_as
from vitlab.models.match import MatchBlock
from vitlab.models.merge import MergeReconstructTokens, TokenBlock
from vitlab.models.read_out import ReadOutBlock
from vitlab.models.select import SelectBlock
from vitlab.models.share import SharedUpdateBlock
from vitlab.models.shrink import keep_heads, keep_neurons
from vitlab.models.support import attention_block, encoder_of, shape_before_cutting, shape_of
from vitlab.models.tokens_cut import as_tokens_cut, without_tokens_cut
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut, Select, SharedUpdate, TokenRule
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError

TRAINABLE = ("all", "matrices", "weights")


TOKEN_BLOCKS: dict[str, Any] = {SharedUpdate.kind: SharedUpdateBlock, Select.kind: SelectBlock, Match.kind: MatchBlock,
                                ReadOut.kind: ReadOutBlock}


def _token_rule_agrees(block: nn.Module, rule: TokenRule | None, place: int, num_prefix_tokens: int) -> bool:
    """Whether a block of a training form is wrapped as the rule says: its kind, and what does not train."""
    if rule is None:
        return attention_block(block) is block
    if isinstance(rule, MergeReconstruct):
        return isinstance(block, TokenBlock) and block.agrees(rule, num_prefix_tokens, place)
    if not isinstance(block, TOKEN_BLOCKS[rule.kind]):
        return False
    if isinstance(rule, Select):
        return (block.kept, block.ranked_by) == (rule.kept, rule.ranked_by)
    return block.rule == rule


def check_agrees(model: nn.Module, plan: CompressionPlan) -> None:
    """InputError naming the sizes, or the first block, in which a compressed model (training form) differs from the
    plan."""
    plan.check_fits(shape_before_cutting(model, plan.shape))
    for index, (block, cut, (rule, place)) in enumerate(zip(model.blocks, plan.blocks, plan.rules())):
        inner = attention_block(block)
        units = (inner.attn.num_heads, inner.mlp.fc2.in_features) == (
            plan.shape.num_heads if cut.heads is None else len(cut.heads),
            plan.shape.num_neurons if cut.neurons is None else len(cut.neurons))
        if not units or not _token_rule_agrees(block, rule, place, plan.shape.num_prefix_tokens):
            raise InputError(f"block {index} of the model is not what the plan says; the plan it was compressed by is "
                             f"needed")


def _relative(kept: tuple[int, ...] | None, before: tuple[int, ...], what: str) -> list[int] | None:
    """Where the units that stay (None: all) stand among those still there; None where nothing more is cut."""
    missing = sorted(set(kept or ()) - set(before))
    if missing:
        raise InputError(f"{what} {missing[0]} should stay, but the model has lost it already")
    return None if kept is None or kept == before else [before.index(unit) for unit in kept]


def _wrapped(block: nn.Module, now: tuple[TokenRule | None, int], was: tuple[TokenRule | None, int], heads_gone: bool,
             num_prefix_tokens: int) -> nn.Module:
    """The block as its token rule and place there (CompressionPlan.rules) say; as it is where they stay the same."""
    inner, rule = attention_block(block), now[0]
    if isinstance(block, SelectBlock) and isinstance(rule, Select) and block.ranked_by == rule.ranked_by:
        block.kept = rule.kept
        return block
    if now == was:
        return block
    inner.attn = attention_as(Attention, inner.attn)
    if rule is None:
        return inner
    if heads_gone and getattr(rule, "ranked_by", None) == "all":
        raise InputError("all heads should rank tokens, but the model has lost some already")
    if isinstance(rule, MergeReconstruct):
        block = TokenBlock(inner, rule, num_prefix_tokens, now[1])
    else:
        block = TOKEN_BLOCKS[rule.kind](inner, rule, num_prefix_tokens)
    return block.to(inner.norm1.weight.device, inner.norm1.weight.dtype).train(inner.training)


def _cut(block: nn.Module, cut: BlockPlan, was: BlockPlan, rules: Sequence[tuple[TokenRule | None, int]],
         shape: ViTShape) -> nn.Module:
    """One block, in place; returned because a token rule wraps it. rules: by which it shall run, and by which it
    did."""
    inner, every = attention_block(block), {"heads": tuple(range(shape.num_heads)),
                                            "neurons": tuple(range(shape.num_neurons))}
    there = {name: all_of if getattr(was, name) is None else getattr(was, name) for name, all_of in every.items()}
    for name, all_of in every.items():
        if getattr(cut, name) is None and there[name] != all_of:
            raise InputError(f"all {name} should stay, but the model has lost some already")
    block = _wrapped(block, *rules, there["heads"] != every["heads"], shape.num_prefix_tokens)
    heads, neurons = (_relative(getattr(cut, name), there[name], name) for name in ("heads", "neurons"))
    if heads is not None:
        keep_heads(inner.attn, heads)
    if neurons is not None:
        keep_neurons(inner.mlp, neurons)
    return block


def _check_whole_grid(plan: CompressionPlan) -> None:
    """InputError naming the first block after which patches have no place any more: a decoder needs them all."""
    for index, block in enumerate(plan.blocks):
        if isinstance(block.tokens, (Select, ReadOut)):
            raise InputError(f"block {index}: tokens are "
                             f"{'selected' if isinstance(block.tokens, Select) else 'read out'}, but a class for "
                             'each pixel needs the whole grid; merge them ("merge_reconstruct", "shared_update" or '
                             '"match")')


def compress(model: nn.Module, plan: CompressionPlan, *, before: CompressionPlan | None = None) -> nn.Module:
    """A copy of `model`, compressed; still an instance of its class. The plan that cuts nothing gives bit-equal logits.
    Of a Segmenter the encoder is compressed, the decoder stays.

    model: a dense timm VisionTransformer, or, to cut further, one that was compressed by the plan `before` (training
    form, fine-tuned or not); matrices of a token rule that stays the same keep their trained values. Raises InputError
    where the family can't be handled, the model is not what was said, the plan is for other sizes, or keeps what is
    gone.
    """
    if before is None:
        before = CompressionPlan.empty(shape_of(model))
    else:
        check_agrees(model, before)
    plan.check_fits(before.shape)
    if encoder_of(model) is not model:
        _check_whole_grid(plan)
        return model.with_encoder(compress(model.encoder, plan, before=before))
    model = without_tokens_cut(copy.deepcopy(model))
    for index, (block, cut, was,
                *rules) in enumerate(zip(model.blocks, plan.blocks, before.blocks, plan.rules(), before.rules())):
        try:
            model.blocks[index] = _cut(block, cut, was, rules, plan.shape)
        except InputError as error:
            raise InputError(f"block {index}: {error}") from None
    if isinstance(model.blocks[-1], MatchBlock):
        model.blocks[-1].gives_back = True
    merged = False
    for block in model.blocks:
        if isinstance(block, (MatchBlock, ReadOutBlock)):
            block.takes_held = merged
        merged = merged or isinstance(block, MatchBlock) and block.rule.merged > 0
    return model if all(cut.tokens is None for cut in plan.blocks) else as_tokens_cut(model)


def set_trainable(model: nn.Module, what: str) -> None:
    """Which parameters train (A8): "all"; "matrices" alone (merge and reconstruct); "weights", all but the matrices.

    A merge matrix of rule `merge` never trains (A5), and token masks are buffers. Raises InputError for another word,
    or for "matrices" where the model has none.
    """
    if what not in TRAINABLE:
        raise InputError(f"trainable {what!r} is not known; known are {list(TRAINABLE)}")
    merging = [m for m in model.modules() if isinstance(m, MergeReconstructTokens)]
    if what == "matrices" and not merging:
        raise InputError("the model has no merge and reconstruct matrices to train")
    for parameter in model.parameters():
        parameter.requires_grad_(what != "matrices")
    for module in merging:
        module.merge_matrix.requires_grad_(what != "weights" and module.trains == "both")
        module.reconstruct_matrix.requires_grad_(what != "weights")
