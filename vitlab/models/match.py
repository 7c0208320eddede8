"""Blocks whose tokens are merged by content, each image its own (vitlab.plan.matching), with proportional attention."""
from functools import partial

import torch
from torch import Tensor, nn

from vitlab.models.attention import KeyedAttention, attention_as
from vitlab.models.families import attention_added, attention_input, mlp_added, run
from vitlab.models.held import HoldingBlock, Merged, check_reentrant, rotation_of, turned
from vitlab.plan import matching
from vitlab.plan.rules import Match


def size_mask(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, 1, N) of proportional attention: softmax(q k^T / sqrt(d) + log size), arXiv 2210.09461."""
    # bfloat16 can't tell 256 from 257
    return sizes.to(torch.promote_types(dtype, torch.float32)).log()[:, None, None].to(dtype)


class MatchBlock(HoldingBlock):
    """timm's Block that merges alike tokens after the attention's residual, and counts what tokens stand for.

    Takes and gives (B, N, D) while nothing was merged, `Merged` from then on; the last block of a model (gives_back)
    gives all N tokens. Static shapes; fused attention stays on.
    """

    by_product = False  # how sources are added to their targets (`matching.merge`); files for other runtimes set it

    def __init__(self, block: nn.Module, rule: Match, num_prefix_tokens: int, gives_back: bool = False) -> None:
        super().__init__()
        if rule.merged:
            block.attn = attention_as(KeyedAttention, block.attn)
        self.block, self.rule, self.num_prefix_tokens, self.gives_back = block, rule, num_prefix_tokens, gives_back

    def forward(self, x: Tensor | Merged, attn_mask: Tensor | None = None, is_causal: bool = False,
                rope: Tensor | None = None) -> Tensor | Merged:
        given = self.merged(self.received(x, attn_mask, is_causal, "a block that merges tokens"), rope)
        return self.handed_on(given, self.gives_back) if isinstance(given, Merged) else given

    def merged(self, given: Tensor | Merged, rope: Tensor | None = None) -> Tensor | Merged:
        """What leaves the block before tokens are given back."""
        block, rule = self.block, self.rule
        whole = not isinstance(given, Merged)
        x, sizes = (given, None) if whole else (given.x, given.sizes)
        check_reentrant(x)
        mask = None if whole else size_mask(sizes, x.dtype)
        by_place = turned(rope, None if whole else partial(rotation_of, given))
        if not rule.merged:
            x = run(block, x, mask, **by_place)
            return x if whole else Merged(x, sizes, given.places, self.num_prefix_tokens)
        attended, row, keys = block.attn(attention_input(block, x), attn_mask=mask, **by_place)
        x = attention_added(block, x, attended)
        x, sizes, places = self.merge(x, sizes, row, keys)
        places = places if whole else places.gather(1, given.places)
        return Merged(mlp_added(block, x), sizes, places, self.num_prefix_tokens)

    def merge(self, x: Tensor, sizes: Tensor | None, row: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x (B, N - r, D), sizes (B, N - r), where each patch token went (B, N - P)), for x (B, N, D), the class
        token's attention row (B, N) and keys (B, N, W) that tokens are compared by."""
        prefix, count = self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens
        importance = row[:, prefix:] * x.shape[1] * self.rule.protect if self.rule.protect else None
        counted = sizes[:, prefix:] if self.rule.by_size and sizes is not None else None
        order, into = matching.match(keys[:, prefix:], self.rule.merged, importance, counted)
        sizes = torch.ones_like(row, dtype=torch.float32) if sizes is None else sizes
        merged, merged_sizes = matching.merge(x[:, prefix:], sizes[:, prefix:], order, into, self.by_product)
        return (torch.cat([x[:, :prefix], merged], dim=1), torch.cat([sizes[:, :prefix], merged_sizes], dim=1),
                matching.new_places(order, into, count))
