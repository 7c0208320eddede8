"""ToMe, written from its paper (Bolya et al., arXiv 2210.09461, sections 3 and 4), with fused attention, so that it is
no slower than it need be: what the benchmarks compare with."""
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.models import compress, shape_of
from vitlab.models.held import Merged
from vitlab.models.match import size_mask
from vitlab.plan import CompressionPlan, cost, matching


class ToMeBlock(nn.Module):
    """timm's Block with bipartite soft matching between attention and MLP: keys are averaged over heads, r tokens go in
    each block, attention is proportional (arXiv 2210.09461, sections 3 and 4)."""

    def __init__(self, block: nn.Module, r: int) -> None:
        super().__init__()
        self.block, self.r = block, r

    def forward(self, given: Tensor | Merged) -> Merged:
        x, sizes = (given, given.new_ones(given.shape[:2])) if isinstance(given, Tensor) else (given.x, given.sizes)
        block, attn = self.block, self.block.attn
        query, key, value = attn.qkv(block.norm1(x)).unflatten(2, (3, -1, attn.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=size_mask(sizes, query.dtype))
        x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
        order, into = matching.match(key.mean(dim=1)[:, 1:], min(self.r, (x.shape[1] - 1) // 2))
        merged, merged_sizes = matching.merge(x[:, 1:], sizes[:, 1:], order, into)
        x, sizes = torch.cat([x[:, :1], merged], dim=1), torch.cat([sizes[:, :1], merged_sizes], dim=1)
        return Merged(x + block.mlp(block.norm2(x)), sizes, sizes, 1)


class Tokens(nn.Module):
    def forward(self, given: Merged) -> Tensor:
        return given.x


def tome(dense: nn.Module, r: int) -> nn.Module:
    model = compress(dense, CompressionPlan.empty(shape_of(dense))).eval()
    model.blocks = nn.Sequential(*(ToMeBlock(block, r) for block in model.blocks), Tokens())
    return model


def tome_gmacs(dense: nn.Module, r: int) -> float:
    """Everything that is multiplied, the matching too."""
    shape = shape_of(dense)
    left, attended, after, compared, pooled = shape.num_patches, [], [], 0, 0
    for _ in range(shape.depth):
        gone = min(r, left // 2)
        attended.append(left + 1)
        compared += (left - left // 2) * (left // 2) * shape.head_dim
        pooled += (left // 2 + gone) * shape.embed_dim
        left -= gone
        after.append(left + 1)
    counts = dataclasses.replace(cost.counts_of(CompressionPlan.empty(shape)), attended=np.array(attended),
                                 in_mlp=np.array(after), queried=np.array(attended))
    return (int(cost.macs_of(shape, counts)["total"]) + compared + pooled) / 1e9
