"""Token selection inside a block, each image its own tokens (arXiv 2201.00043, methods B3)."""
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from vitlab import tokens
from vitlab.files import InputError
from vitlab.rules import Select


def class_attention(attn: Attention, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The class token's row of the softmax attention, averaged over heads: x (B, N, D), normed -> (B, N).

    weight (2 H d, D), bias (2 H d): the query and key rows of the heads that rank. Without q/k norm,
    q . (W_k x_j + b_k) = (W_k^T q) . x_j + a number that is the same for every j, which the softmax cancels: no key is
    computed, and the row costs B H D N multiply-adds.
    """
    query_weight, key_weight = weight.unflatten(0, (2, -1, attn.head_dim))      # (H, d, D) each
    query_bias, key_bias = (None, None) if bias is None else bias.chunk(2)

    def projected(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, H, N, d)."""
        return F.linear(rows, weight.flatten(0, 1), bias).unflatten(2, (-1, attn.head_dim)).transpose(1, 2)
    query = attn.q_norm(projected(x[:, :1], query_weight, query_bias)) * attn.scale         # (B, H, 1, d)
    if isinstance(attn.k_norm, nn.Identity):
        row = (query @ key_weight).squeeze(2) @ x.transpose(1, 2)                           # (B, H, D) @ (B, D, N)
    else:
        row = (query @ attn.k_norm(projected(x, key_weight, key_bias)).transpose(2, 3)).squeeze(2)
    return row.softmax(dim=2).mean(dim=1)


class SelectBlock(nn.Module):
    """timm's Block whose tokens are selected after the attention's residual; static shapes, fused attention stays on.

    With ranked_by "all", a copy of all heads' query and key weights stays for the ranking alone, and does not train.
    """

    def __init__(self, block: nn.Module, rule: Select, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block, self.kept, self.ranked_by, self.num_prefix_tokens = block, rule.kept, rule.ranked_by, num_prefix_tokens
        weight, bias = self._of_kept_heads()
        own = rule.ranked_by == "all"
        self.register_buffer("rank_weight", weight.detach().clone() if own else None)
        self.register_buffer("rank_bias", bias.detach().clone() if own and bias is not None else None)

    def _of_kept_heads(self) -> tuple[Tensor, Tensor | None]:
        """The query and key rows of the block's own qkv."""
        attn = self.block.attn
        bias = attn.qkv.bias
        return attn.qkv.weight[:2 * attn.attn_dim], None if bias is None else bias[:2 * attn.attn_dim]

    def ranking_rows(self) -> tuple[Tensor, Tensor | None]:
        """The query and key rows (weight, bias) whose class attention ranks the tokens."""
        return (self.rank_weight, self.rank_bias) if self.ranked_by == "all" else self._of_kept_heads()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, P + kept + 1, D)."""
        if attn_mask is not None or is_causal:
            raise InputError("a block that selects tokens takes no attention mask")
        block = self.block
        normed = block.norm1(x)
        with torch.no_grad():                                                   # a choice has no gradient
            ranking = class_attention(block.attn, normed, *self.ranking_rows())
        x = x + block.drop_path1(block.ls1(block.attn(normed)))
        x = tokens.select(x, ranking, self.kept, self.num_prefix_tokens)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
