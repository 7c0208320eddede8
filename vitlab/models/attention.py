"""timm's attentions for blocks that cut tokens, or heads that timm's own forward can't miss: what tokens are compared
by, prefix tokens that ask alone, what is seen inside.

Each is the same module with the same parts, all of them called: what wraps, hooks, quantises or adapts a part goes on
working.
"""
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from vitlab.models.families import ATTENTIONS, TALKING, kind_of, maps_of
from vitlab.models.left_out import LeftOut

LEAST = 1e-7                                    # that rows are divided by; half precision has it


def token_weights(attn: nn.Module, logits: Tensor) -> Tensor:
    """What each token counts for those that ask, (B, H, Q, N), rows of sum 1, by an attention's logits: their softmax.
    Of a differential attention, whose heads have two logits each, (B, 2 H, Q, N), with A = softmax_1 - lambda
    softmax_2, whose entries may be negative and whose rows sum to anything (a norm follows):

        |A| / sum |A|
    """
    weights = logits.softmax(dim=-1)
    if maps_of(attn) == 1:
        return weights
    first, second = weights[:, ::2], weights[:, 1::2]
    return F.normalize((first - attn._compute_lambda().type_as(first) * second).abs(), p=1, dim=-1, eps=LEAST)


def _across(linear: nn.Linear | None, maps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Maps (B, H, Q, N), mixed by a linear over heads, where there is one. mask: logs of how many tokens each key
    stands for (B, 1, 1, N), as often the linear's bias counts."""
    if linear is None:
        return maps
    mixed = linear(maps.movedim(1, -1)).movedim(-1, 1)
    return mixed if mask is None else mixed + linear.bias[:, None, None] * (mask.exp() - 1)


class TokenAttention(nn.Module):
    """What the kinds below share; each stands before one of timm's attentions (`attention_as`). Of a differential one
    queries and keys are of 2 H heads, half as wide, the two of each head side by side."""

    # is shown queries, keys and values (B, H, N, d) and what is added to the logits, and gives the values to go on with
    shown: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None

    def _projected(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, d) of x (B, N, D), normed and turned by rope ([B, ][H or 1, ]n, 2 d), and
        the keys as they are before they are turned, and before heads that share them have them each."""
        if getattr(self, "q_proj", None) is not None:
            query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            stacked = self.qkv(x)
            if getattr(self, "q_bias", None) is not None:
                stacked = stacked + torch.cat([self.q_bias, self.k_bias, self.v_bias])
            wide, narrow = (maps_of(self) * self.num_heads * width for width in (self.head_dim, self._narrow))
            query, key, value = stacked.split((narrow, narrow, wide), dim=2)
        shared = getattr(self, "num_kv_groups", 1)      # heads that have keys and values together
        heads = (maps_of(self) * self.num_heads, maps_of(self) * self.num_heads // shared, self.num_heads // shared)
        query, key, value = (part.unflatten(2, (count, -1)).transpose(1, 2)
                             for part, count in zip((query, key, value), heads))
        query, key = (getattr(self, name, nn.Identity())(part) for name, part in (("q_norm", query), ("k_norm", key)))
        plain, prefix = key, 0 if rope is None else self.num_prefix_tokens
        if rope is not None:
            rope = self._of_kept(rope)
            query, key = (torch.cat([part[:, :, :prefix], apply_rot_embed_cat(
                part[:, :, prefix:], rope, half=self.rotate_half)], dim=2).type_as(value) for part in (query, key))
        if shared > 1:
            key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
        return query, key, value, plain

    @property
    def _narrow(self) -> int:
        """Width of queries and keys; what wraps proj needs not say how many inputs it has."""
        return getattr(self, "qk_width", self.head_dim)

    def _of_kept(self, by_head: Tensor) -> Tensor:
        """Of what there is for every head, (..., H, N, W), the part of those that are left; of one for all, all."""
        kept = getattr(self, "kept_heads", None)
        for_all = kept is None or by_head.dim() < 3 or by_head.shape[-3] == 1
        return by_head if for_all else by_head.index_select(-3, kept)

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
               is_causal: bool = False) -> Tensor:
        """Attention of queries (B, H, Q, d) over keys and values (B, H, N, d), mask added: (B, Q, D). A differential
        one, Attention_1 - lambda Attention_2, adds it to both, and norms each head."""
        if self.shown is not None:
            value = self.shown(query, key, value, mask)
        if maps_of(self) == 1:
            mixed = self._by_softmax(query, key, value, mask, is_causal)
        else:
            first, second = (self._by_softmax(query[:, each::2], key[:, each::2], value, mask, is_causal)
                             for each in range(2))
            mixed = self.sub_norm(first - self._compute_lambda().type_as(first) * second) * (1 - self.lambda_init)
        mixed = getattr(self, "norm", nn.Identity())(mixed.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(mixed))

    def _by_softmax(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """softmax(query key^T scale + mask) value: (B, H, Q, d)."""
        if getattr(self, "fused_attn", False) or is_causal:
            fewer = maps_of(self) * self.head_dim - self._narrow
            if fewer and not torch.compiler.is_exporting():
                # the fused kernels of processors take one width alone, and others are twice as slow
                query, key = F.pad(query, (0, fewer)), F.pad(key, (0, fewer))
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal,
                                                  dropout_p=self.attn_drop.p if self.training else 0.0,
                                                  scale=self.scale if fewer else None)
        # whoever wants to see the maps turns fusing off
        maps = _across(getattr(self, "proj_w", None), self.logits(query, key, mask).softmax(dim=-1), mask)
        return self.attn_drop(maps) @ value

    def logits(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Of queries (B, H, Q, d) over keys (B, H, N, d), mask added: (B, H, Q, N)."""
        logits = _across(getattr(self, "proj_l", None), query * self.scale @ key.transpose(2, 3))
        return logits if mask is None else logits + mask

    def __reduce_ex__(self, protocol: int) -> tuple:
        # the classes are made here, where pickle can't find them
        return _empty, (type(self).__mro__[1], kind_of(self, ATTENTIONS)), self.__dict__


class OwnAttention(TokenAttention):
    """timm's attention for any number of heads."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False,
                shared_rel_pos_bias: Tensor | None = None, shared_rel_pos: Tensor | None = None) -> Tensor:
        query, key, value, _ = self._projected(x, rope)
        shared = shared_rel_pos if shared_rel_pos_bias is None else shared_rel_pos_bias
        for bias in (self._own_bias(), None if shared is None else self._of_kept(shared)):
            if bias is not None:
                attn_mask = bias if attn_mask is None else attn_mask + bias
        return self._mixed(query, key, value, attn_mask, is_causal)

    def _own_bias(self) -> Tensor | None:
        """What this block alone adds to the logits for every two places, (1, H', N, N) of the heads it has."""
        if getattr(self, "rel_pos", None) is not None:
            return self.rel_pos.get_bias()
        return None if getattr(self, "relative_position_bias_table", None) is None else self._get_rel_pos_bias()


class KeyedAttention(TokenAttention):
    """Attention that also gives what tokens are compared and ranked by."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(output (B, N, D), the class token's `token_weights` without the mask, averaged over heads (B, N), keys
        (B, N, W) of all heads, each once)."""
        query, key, value, plain = self._projected(x, rope)
        out = self._mixed(query, key, value, attn_mask)
        query, key, plain = query.detach(), key.detach(), plain.detach()        # a choice has no gradient
        row = token_weights(self, query[:, :, :1] * self.scale @ key.transpose(2, 3)).mean(dim=1)[:, 0]
        return out, row, plain.transpose(1, 2).flatten(2)


class PrefixAttention(TokenAttention):
    """Attention in which prefix tokens ask alone: (B, N, D) -> (B, P, D)."""

    num_prefix_tokens: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                rope: Tensor | None = None) -> Tensor:
        query, key, value, _ = self._projected(x, rope)
        return self._mixed(query[:, :, :self.num_prefix_tokens], key, value, attn_mask)


@functools.cache
def _class_of(kind: type[TokenAttention], timms: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind, timms), {"__doc__": kind.__doc__, "__module__": __name__})


def _empty(kind: type[TokenAttention], timms: type[nn.Module]) -> Any:
    made = _class_of(kind, timms)
    return made.__new__(made)


def attention_as(kind: type[TokenAttention] | None, attention: nn.Module, masked: bool = False, **more: Any) -> Any:
    """The same attention, parts and settings, as another kind of it. kind None: timm's own, or OwnAttention where heads
    or widths have left that its forward can't miss, or it should be masked and can't. One that is left out stays left
    out."""
    if isinstance(attention, LeftOut):
        return attention
    timms = kind_of(attention, ATTENTIONS)
    if kind is None and (masked and timms in TALKING or any(getattr(attention, name, None) is not None
                                                            for name in ("kept_heads", "qk_width"))):
        kind = OwnAttention
    found = timms.__new__(timms) if kind is None else _empty(kind, timms)
    width = attention.proj.in_features // attention.num_heads
    found.__dict__.update({"head_dim": width, **attention.__dict__, **more})
    return found
