"""Blocks whose tokens are merged before and reconstructed after them by trained matrices, one or a span of several.

*Efficient Token Compression for Vision Transformer with Spatial Information Preserved* (arXiv 2503.23455), methods A6.
"""
import torch
from torch import Tensor, nn

from vitlab.models.held import HoldingBlock, RegionRotation, Spanned, check_reentrant, turned
from vitlab.plan import tokens
from vitlab.plan.rules import MergeReconstruct


class MergeReconstructTokens(nn.Module):
    """merge_matrix (C, N), trained where the rule says so, and reconstruct_matrix (N, C), trained; token_mask (N), 0
    where a token skips the block, or the span."""

    def __init__(self, rule: MergeReconstruct, num_prefix_tokens: int) -> None:
        super().__init__()
        merge = tokens.merge_matrix(rule, num_prefix_tokens, torch.float64)
        self.merge_matrix = nn.Parameter(merge.float(), requires_grad=rule.trains == "both")
        self.reconstruct_matrix = nn.Parameter(tokens.reconstruct_matrix(merge).float().contiguous())
        self.register_buffer("token_mask", tokens.token_mask(rule, num_prefix_tokens).float())
        self.trains = rule.trains
        self.skipping = tuple(num_prefix_tokens + patch for patch in rule.pruned)

    def forward(self, x: Tensor) -> Spanned:
        """x (B, N, D) -> merge @ x, and beside it (1 - token_mask) * x."""
        aside = (1 - self.token_mask)[:, None] * x if self.skipping else None
        return Spanned(torch.matmul(self.merge_matrix, x), aside, self.reconstruct_matrix)


class TokenBlock(HoldingBlock):
    """timm's Block number `place`, from 0, of those that run by the rule. The first merges, the last reconstructs;
    between them goes `Spanned`. Together the blocks i to j of a span give

        reconstruct @ Block_j(... Block_i(merge @ x)) + (1 - token_mask) * x   (A6, over several blocks)
    """

    def __init__(self, block: nn.Module, rule: MergeReconstruct, num_prefix_tokens: int, place: int = 0) -> None:
        super().__init__()
        self.block, self.rule, self.place, self.takes_held = block, rule, place, place > 0
        self.tokens = None if place else MergeReconstructTokens(rule, num_prefix_tokens)
        self.rotation = RegionRotation.of(block, rule.members)

    def forward(self, x: Tensor | Spanned, attn_mask: Tensor | None = None, is_causal: bool = False,
                rope: Tensor | None = None) -> Tensor | Spanned:
        x = self.received(x, attn_mask, is_causal, "a block that merges tokens")
        if self.rule.span > 1:
            check_reentrant(x)
        given = x if self.tokens is None else self.tokens(x)
        given = Spanned(self.block(given.x, **turned(rope, self.rotation)), given.aside, given.reconstruct)
        return self.handed_on(given, gives_back=self.place + 1 == self.rule.span)
