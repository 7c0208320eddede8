"""Token selection inside a block, each image its own tokens (arXiv 2201.00043, methods B3)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.models.attention import KeyedAttention, attention_as, token_weights
from vitlab.models.families import attention_added, attention_input, mlp_added
from vitlab.models.held import unmasked
from vitlab.models.support import plain_linear
from vitlab.plan import tokens
from vitlab.plan.rules import Select


def class_attention(attn: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The class token's `token_weights`, averaged over heads: x (B, N, D), normed -> (B, N).

    weight (2 H d, D), bias (2 H d): the query and key rows of the heads that rank, a copy of their own. Without q/k
    norm, q . (W_k x_j + b_k) = (W_k^T q) . x_j + a number that is the same for every j, which the softmax cancels: no
    key is computed, and the row costs B H D N multiply-adds.
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
    return token_weights(attn, row[:, :, None]).mean(dim=1)[:, 0]


class SelectBlock(nn.Module):
    """timm's Block whose tokens are selected after the attention's residual; static shapes, fused attention stays on.

    With ranked_by "kept", the block's own attention ranks. With "all", a copy of all heads' query and key weights as
    they were when the block was made stays for the ranking alone, and does not train.
    """

    def __init__(self, block: nn.Module, rule: Select, num_prefix_tokens: int) -> None:
        super().__init__()
        attn, every = block.attn, rule.ranked_by == "all"
        qkv, width = plain_linear(attn.qkv) if every else None, attn.proj.in_features
        rows, bias = (qkv.weight[:2 * width], qkv.bias) if every else (None, None)
        if every and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias])
        self.register_buffer("rank_weight", None if rows is None else rows.detach().clone())
        self.register_buffer("rank_bias", None if bias is None else bias[:2 * width].detach().clone())
        if not every:
            block.attn = attention_as(KeyedAttention, attn)
        self.block, self.rule, self.num_prefix_tokens = block, rule, num_prefix_tokens

    def attend(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(the attention's output (B, N, D), what ranks the tokens (B, N), higher stays) for x (B, N, D), normed."""
        attn = self.block.attn
        if self.rule.ranked_by == "kept":
            return attn(normed)[:2]
        with torch.no_grad():                                                   # a choice has no gradient
            ranking = class_attention(attn, normed, self.rank_weight, self.rank_bias)
        return attn(normed), ranking

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, P + kept + 1, D)."""
        x = unmasked(x, attn_mask, is_causal, "a block that selects tokens")
        block = self.block
        attended, ranking = self.attend(attention_input(block, x))
        x = attention_added(block, x, attended)
        x = tokens.select(x, ranking, self.rule.kept, self.num_prefix_tokens)
        return mlp_added(block, x)
