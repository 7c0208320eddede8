"""Blocks whose tokens are merged by content, each image its own (vitlab.matching), with proportional attention."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from vitlab import matching
from vitlab.files import InputError
from vitlab.rules import Match


class Merged(NamedTuple):
    """What goes from one matching block to the next once tokens were merged."""

    x: Tensor                       # (B, P + K, D)
    sizes: Tensor                   # (B, P + K) patches that each token stands for; 1 for prefix tokens
    places: Tensor                  # (B, n) which of the K tokens each patch went into


def size_mask(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, 1, N) of proportional attention: softmax(q k^T / sqrt(d) + log size), arXiv 2210.09461, section 3."""
    return sizes.to(dtype).log()[:, None, None]


def mix(attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """What timm's attention makes of queries (B, H, Q, d) and keys and values (B, H, N, d), with an additive mask: (B, Q, D)."""
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=None if mask is None else mask.to(query.dtype),
                                           dropout_p=attn.attn_drop.p if attn.training else 0.0)
    return attn.proj_drop(attn.proj(attn.norm(mixed.transpose(1, 2).flatten(2))))


def attend(attn: Attention, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """timm's fused attention of x (B, N, D) with an additive mask, and what tokens are compared by, which it does not give out:
    its output (B, N, D), the class token's row of the softmax without the mask, averaged over heads (B, N), and the keys of all
    heads (B, N, H d)."""
    query, key, value = attn.qkv(x).unflatten(2, (3, -1, attn.head_dim)).permute(2, 0, 3, 1, 4)         # (B, H, N, d) each
    query, key = attn.q_norm(query), attn.k_norm(key)
    out = mix(attn, query, key, value, mask)
    with torch.no_grad():                                                       # a choice has no gradient
        row = (query[:, :, :1] * attn.scale @ key.transpose(2, 3)).softmax(dim=3).mean(dim=1)[:, 0]
        return out, row, key.transpose(1, 2).flatten(2)


class MatchBlock(nn.Module):
    """timm's Block that merges alike tokens after the attention's residual, and takes into account what tokens stand for.

    Takes and gives (B, N, D) while nothing was merged, `Merged` from then on; the last block of a model gives back all N tokens
    (`grid`), or, deployed for class-token pooling, those that are left. Static shapes; fused attention stays on.
    """

    def __init__(self, block: nn.Module, rule: Match, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block, self.rule, self.num_prefix_tokens = block, rule, num_prefix_tokens
        self.gives = "merged"                       # what leaves it: "merged", or, the last of a model, "grid" or "tokens"

    def forward(self, x: Tensor | Merged, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | Merged:
        if attn_mask is not None or is_causal:
            raise InputError("a block that merges tokens takes no attention mask")
        given = self._forward(x)
        if not isinstance(given, Merged) or self.gives == "merged":
            return given
        return given.x if self.gives == "tokens" else matching.give_back(given.x, given.places, self.num_prefix_tokens)

    def _forward(self, given: Tensor | Merged) -> Tensor | Merged:
        block, rule = self.block, self.rule
        whole = not isinstance(given, Merged)
        if whole and not rule.merged:
            return block(given)
        x = given if whole else given.x
        mask = None if whole else size_mask(given.sizes, x.dtype)
        if not rule.merged:
            return given._replace(x=block(x, attn_mask=mask))
        attended, row, keys = attend(block.attn, block.norm1(x), mask)
        x = x + block.drop_path1(block.ls1(attended))
        x, sizes, places = self._merge(x, None if whole else given.sizes, row, keys)
        places = places if whole else places.gather(1, given.places)
        return Merged(x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), sizes, places)

    def _merge(self, x: Tensor, sizes: Tensor | None, row: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x (B, N - r, D), sizes (B, N - r), where each patch token went (B, N - P))."""
        prefix, count = self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens
        sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes
        with torch.no_grad():
            importance = row[:, prefix:] * x.shape[1] * self.rule.protect if self.rule.protect else None
            order, into = matching.match(keys[:, prefix:], self.rule.merged, importance)
        merged, merged_sizes = matching.merge(x[:, prefix:], sizes[:, prefix:], order, into)
        return (torch.cat([x[:, :prefix], merged], dim=1), torch.cat([sizes[:, :prefix], merged_sizes], dim=1),
                matching.new_places(order, into, count))
