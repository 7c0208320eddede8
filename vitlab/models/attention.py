"""timm's Attention for blocks that cut tokens: with what tokens are compared by, or asked by the prefix tokens alone.

Each is the same module with the same parts, all of them called: what wraps, hooks, quantises or adapts a part goes on
working.
"""
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor


class TokenAttention(Attention):
    """What the kinds below share."""

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, d) of x (B, N, D), normed."""
        query, key, value = self.qkv(x).unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(query), self.k_norm(key), value

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention of queries (B, H, Q, d) over keys and values (B, H, N, d), with an additive mask: (B, Q,
        D)."""
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask,
                                                   dropout_p=self.attn_drop.p if self.training else 0.0)
        # whoever wants to see the maps turns fusing off
        else:
            logits = query * self.scale @ key.transpose(2, 3)
            mixed = self.attn_drop((logits if mask is None else logits + mask).softmax(dim=-1)) @ value
        return self.proj_drop(self.proj(self.norm(mixed.transpose(1, 2).flatten(2))))


class KeyedAttention(TokenAttention):
    """Attention that also gives what tokens are compared and ranked by."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(output (B, N, D), the class token's row of the softmax without the mask, averaged over heads (B, N), keys
        (B, N, H d))."""
        query, key, value = self._projected(x)
        out = self._mixed(query, key, value, attn_mask)
        query, key = query.detach(), key.detach()                               # a choice has no gradient
        row = (query[:, :, :1] * self.scale @ key.transpose(2, 3)).softmax(dim=-1).mean(dim=1)[:, 0]
        return out, row, key.transpose(1, 2).flatten(2)


class PrefixAttention(TokenAttention):
    """Attention in which prefix tokens ask alone: (B, N, D) -> (B, P, D)."""

    num_prefix_tokens: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        query, key, value = self._projected(x)
        return self._mixed(query[:, :, :self.num_prefix_tokens], key, value, attn_mask)


def attention_as(kind: type[Attention], attention: Attention, **more: int) -> Attention:
    """The same attention, parts and settings, as another kind of it."""
    found = kind.__new__(kind)
    found.__dict__.update({**attention.__dict__, **more})
    return found
