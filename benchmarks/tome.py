"""ToMe, written from its paper (Bolya et al., arXiv 2210.09461, sections 3 and 4), with fused attention, so that it is
no slower than it need be: what the benchmarks compare with. Adapted to what its paper does not know, by its own ideas:
a merged token turns by the mean of its patches' rotations (RoPE), and a pool of patches counts each as often as it
stands for patches."""
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitlab.models import compress, shape_of
from vitlab.models.attention import TokenAttention, attention_as
from vitlab.models.families import attention_input, attention_update, mlp_update
from vitlab.models.held import Merged, rotation_of, turned
from vitlab.models.match import size_mask
from vitlab.plan import CompressionPlan, cost, matching
from vitlab.plan.shape import POOL_TOKEN

Counts = int | Sequence[int]                    # tokens that go in every block, or in each


class KeysAttention(TokenAttention):
    """Attention that also gives its keys averaged over heads (B, N, d)."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        query, key, value, plain = self._projected(x, rope)
        return self._mixed(query, key, value, attn_mask), plain.mean(dim=1)


class ToMeBlock(nn.Module):
    """timm's Block with bipartite soft matching between attention and MLP: keys are averaged over heads, r tokens go,
    attention is proportional (arXiv 2210.09461, sections 3 and 4). placed: whether it is kept where each patch went."""

    def __init__(self, block: nn.Module, r: int, prefix: int, placed: bool) -> None:
        super().__init__()
        block.attn = attention_as(KeysAttention, block.attn)
        self.block, self.r, self.prefix, self.placed = block, r, prefix, placed

    def forward(self, given: Tensor | Merged, rope: Tensor | None = None, **also: None) -> Merged:
        if isinstance(given, Tensor):
            places = torch.arange(given.shape[1] - self.prefix, device=given.device).expand(len(given), -1)
            given = Merged(given, given.new_ones(given.shape[:2]), places, self.prefix)
            by_place = turned(rope)
        else:
            by_place = turned(rope, partial(rotation_of, given))
        block, x, sizes, prefix = self.block, given.x, given.sizes, self.prefix
        attended, keys = block.attn(attention_input(block, x), attn_mask=size_mask(sizes, x.dtype), **by_place)
        x, count = x + attention_update(block, attended), x.shape[1] - prefix
        order, into = matching.match(keys[:, prefix:], min(self.r, count // 2))
        places = matching.new_places(order, into, count).gather(1, given.places) if self.placed else given.places
        merged, merged_sizes = matching.merge(x[:, prefix:], sizes[:, prefix:], order, into)
        x, sizes = torch.cat([x[:, :prefix], merged], dim=1), torch.cat([sizes[:, :prefix], merged_sizes], dim=1)
        return Merged(x + mlp_update(block, x), sizes, places, prefix)


class Tokens(nn.Module):
    """What is merged as a tensor: all tokens again where all are pooled."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, given: Merged, **also: Any) -> Tensor:
        return given.whole() if self.whole else given.x


def each_of(counts: Counts, depth: int) -> list[int]:
    return [counts] * depth if isinstance(counts, int) else list(counts)


def tome(dense: nn.Module, r: Counts) -> nn.Module:
    shape = shape_of(dense)
    model, whole = compress(dense, CompressionPlan.empty(shape)).eval(), shape.pool != POOL_TOKEN
    blocks = [ToMeBlock(block, gone, shape.num_prefix_tokens, placed=whole or shape.rotary > 0)
              for block, gone in zip(model.blocks, each_of(r, shape.depth))]
    model.blocks = nn.Sequential(*blocks, Tokens(whole))
    return model


def tome_gmacs(dense: nn.Module, r: Counts) -> float:
    """Everything that is multiplied, the matching too."""
    shape = shape_of(dense)
    left, prefix, compared, pooled = shape.num_patches, shape.num_prefix_tokens, 0, 0
    attended, after, turning = [], [], []
    for most in each_of(r, shape.depth):
        gone = min(most, left // 2)
        attended.append(left + prefix)
        turning.append(left * shape.num_patches if shape.rotary and left < shape.num_patches else 0)
        compared += (left - left // 2) * (left // 2) * shape.head_dim
        pooled += (left // 2 + gone) * shape.embed_dim
        left -= gone
        after.append(left + prefix)
    counts = dataclasses.replace(cost.counts_of(CompressionPlan.empty(shape)), attended=np.array(attended),
                                 in_mlp=np.array(after), queried=np.array(attended), turned=np.array(turning))
    return (int(cost.macs_of(shape, counts)["total"]) + compared + pooled) / 1e9


def tome_within(dense: nn.Module, gmacs: float) -> list[int]:
    """The fewest tokens that go in each block so that it costs no more: r in all, one more in the first so many."""
    shape = shape_of(dense)
    for gone in range(shape.depth * shape.num_patches // 2):
        counts = [gone // shape.depth + (block < gone % shape.depth) for block in range(shape.depth)]
        if tome_gmacs(dense, counts) <= gmacs:
            return counts
    raise ValueError(f"ToMe costs more than {gmacs:.4g} GMACs whatever is merged")
