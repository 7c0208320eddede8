"""Blocks whose tokens are merged before and reconstructed after them by trained matrices, one block or a span of several.

*Efficient Token Compression for Vision Transformer with Spatial Information Preserved* (arXiv 2503.23455), methods A6.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitlab import tokens
from vitlab.files import InputError
from vitlab.rules import MergeReconstruct


class Spanned(NamedTuple):
    """What goes from one block of a span to the next."""

    x: Tensor                       # (B, C, D)
    aside: Tensor | None            # (B, N, D) (1 - token_mask) * x, what skips the whole span; None where nothing does


class MergeTokens(nn.Module):
    """merge_matrix (C, N), trained where the rule says so; token_mask (N), 0 where a token skips the block, or the span."""

    def __init__(self, rule: MergeReconstruct, num_prefix_tokens: int) -> None:
        super().__init__()
        merge = tokens.merge_matrix(rule, num_prefix_tokens, torch.float64)
        self.merge_matrix = nn.Parameter(merge.float(), requires_grad=rule.trains == "both")
        self.register_buffer("token_mask", tokens.token_mask(rule, num_prefix_tokens).float())
        self.trains = rule.trains
        self.has_pruned = bool(rule.pruned)

    def forward(self, x: Tensor) -> Spanned:
        """x (B, N, D) -> merge @ x and (1 - token_mask) * x."""
        return Spanned(torch.matmul(self.merge_matrix, x), (1 - self.token_mask)[:, None] * x if self.has_pruned else None)


class ReconstructTokens(nn.Module):
    """reconstruct_matrix (N, C), trained."""

    def __init__(self, rule: MergeReconstruct, num_prefix_tokens: int) -> None:
        super().__init__()
        merge = tokens.merge_matrix(rule, num_prefix_tokens, torch.float64)
        self.reconstruct_matrix = nn.Parameter(tokens.reconstruct_matrix(merge).float())

    def forward(self, given: Spanned) -> Tensor:
        """-> (B, N, D):  reconstruct @ x + what went aside."""
        y = torch.matmul(self.reconstruct_matrix, given.x)
        return y if given.aside is None else y + given.aside


class MergeReconstructTokens(MergeTokens):
    """Both matrices, of one block."""

    def __init__(self, rule: MergeReconstruct, num_prefix_tokens: int) -> None:
        super().__init__(rule, num_prefix_tokens)
        self.reconstruct_matrix = ReconstructTokens(rule, num_prefix_tokens).reconstruct_matrix

    def forward(self, x: Tensor, block: nn.Module) -> Tensor:
        """x (B, N, D) -> (B, N, D):  reconstruct @ block(merge @ x) + (1 - token_mask) * x   (A6)."""
        y = torch.matmul(self.reconstruct_matrix, block(torch.matmul(self.merge_matrix, x)))
        if self.has_pruned:
            y = y + (1 - self.token_mask)[:, None] * x
        return y


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise InputError("a block that merges tokens takes no attention mask")


class TokenBlock(nn.Module):
    """timm's Block between a token rule's taking in and giving back; all N tokens enter and leave."""

    def __init__(self, block: nn.Module, rule: MergeReconstruct, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block = block
        self.tokens = MergeReconstructTokens(rule, num_prefix_tokens)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_mask(attn_mask, is_causal)
        return self.tokens(x, self.block)


class SpanBlock(nn.Module):
    """timm's Block inside a span: `Spanned` enters and leaves. Together the blocks i to j of a span give

        reconstruct @ Block_j(... Block_i(merge @ x)) + (1 - token_mask) * x   (A6, over several blocks)
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, given: Spanned, attn_mask: Tensor | None = None, is_causal: bool = False) -> Spanned:
        _refuse_mask(attn_mask, is_causal)
        return given._replace(x=self.block(given.x))


class SpanFirst(SpanBlock):
    """The first of a span, which merges: (B, N, D) -> Spanned."""

    def __init__(self, block: nn.Module, rule: MergeReconstruct, num_prefix_tokens: int) -> None:
        super().__init__(block)
        self.tokens = MergeTokens(rule, num_prefix_tokens)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Spanned:
        return super().forward(self.tokens(x), attn_mask, is_causal)


class SpanLast(SpanBlock):
    """The last of a span, which reconstructs: Spanned -> (B, N, D)."""

    def __init__(self, block: nn.Module, rule: MergeReconstruct, num_prefix_tokens: int) -> None:
        super().__init__(block)
        self.tokens = ReconstructTokens(rule, num_prefix_tokens)

    def forward(self, given: Spanned, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.tokens(super().forward(given, attn_mask, is_causal))


def _kind(rule: MergeReconstruct, place: int) -> type[nn.Module]:
    """Of the block number `place`, from 0, of those that run by the rule."""
    if rule.span == 1:
        return TokenBlock
    return SpanFirst if place == 0 else SpanLast if place + 1 == rule.span else SpanBlock


def merging_block(block: nn.Module, rule: MergeReconstruct, num_prefix_tokens: int, place: int = 0) -> nn.Module:
    """The block as number `place`, from 0, of those that run by the rule."""
    kind = _kind(rule, place)
    return kind(block) if kind is SpanBlock else kind(block, rule, num_prefix_tokens)


def merging_agrees(block: nn.Module, rule: MergeReconstruct, num_prefix_tokens: int, place: int = 0) -> bool:
    """Whether a block is what `merging_block` makes: its kind, the number of merged tokens, and the mask, which does not train."""
    if type(block) is not _kind(rule, place) or place:
        return type(block) is _kind(rule, place)
    count, mask = num_prefix_tokens + rule.num_merged, tokens.token_mask(rule, num_prefix_tokens)
    return len(block.tokens.merge_matrix) == count and torch.equal(block.tokens.token_mask.cpu() > 0, mask)
