"""A block whose tokens share its update by regions (methods C1): a segment mean before it, a gather after it."""
import torch
from torch import Tensor, nn

from vitlab.models.held import unmasked
from vitlab.models.match import size_mask
from vitlab.plan.rules import SharedUpdate


class SharedUpdateBlock(nn.Module):
    """timm's Block on the regions' means; all N tokens enter and leave, each keeping `own` of what sets it apart."""

    def __init__(self, block: nn.Module, rule: SharedUpdate, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block, self.rule, self.num_prefix_tokens, self.num_merged = block, rule, num_prefix_tokens, rule.num_merged
        regions = torch.tensor(rule.regions)
        inside = regions >= 0
        # A patch of no region takes the update of one region more, which is zero, and keeps all of its stream.
        self.register_buffer("regions", torch.where(inside, regions, rule.num_merged))
        shares = torch.tensor(rule.weights, dtype=torch.float64).masked_fill(~inside, 0)
        keeps = torch.ones(len(regions), dtype=torch.float64).masked_fill(inside, rule.own)
        self.register_buffer("weights", shares[:, None])
        self.register_buffer("own", None if rule.own == 1 else keeps[:, None])
        sizes = torch.tensor((1,) * num_prefix_tokens + rule.sizes, dtype=torch.float64)
        proportional = rule.proportional and max(rule.sizes, default=1) > 1
        self.register_buffer("mask", size_mask(sizes[None], torch.float64) if proportional else None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = unmasked(x, attn_mask, is_causal, "a block that merges tokens")
        prefix, patches = x[:, :self.num_prefix_tokens], x[:, self.num_prefix_tokens:]
        exact = torch.promote_types(x.dtype, torch.float32)                     # a region may be many patches
        means = patches.new_zeros(x.shape[0], self.num_merged + 1, x.shape[2], dtype=exact)
        means = means.index_add(1, self.regions, self.weights.to(exact) * patches).to(x.dtype)
        regions = torch.cat([prefix, means[:, :-1]], dim=1)                     # (B, P + C, D)
        given = self.block(regions) if self.mask is None else self.block(regions, attn_mask=self.mask)
        given = torch.cat([given, torch.zeros_like(given[:, :1])], dim=1)
        same = given[:, self.num_prefix_tokens:].index_select(1, self.regions)                  # (B, n, D) Block(z)_c
        # what sets a token apart; all of it outside regions
        away = patches - means.index_select(1, self.regions)
        own = away if self.own is None else self.own * away
        return torch.cat([given[:, :self.num_prefix_tokens], same + own], dim=1)
