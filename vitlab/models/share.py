"""A block whose tokens share its update by regions (methods C1): a segment mean before it, a gather after it."""
import torch
from torch import Tensor, nn

from vitlab.models.families import run
from vitlab.models.held import RegionRotation, turned, unmasked
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
        self.register_buffer("members", None, persistent=False)
        self.rotation = RegionRotation.of(block, rule.members)

    def gather_members(self) -> None:
        """From now on a region's mean is taken over its gathered patches, as the runtimes that files are for do right:
        TensorRT drops the reduction of a scattered sum. members (C, largest region), as the patch after the last where
        a region has fewer."""
        of_region, count = self.rule.members, len(self.rule.regions)
        largest = max(map(len, of_region), default=0)
        self.members = torch.tensor([patches + [count] * (largest - len(patches)) for patches in of_region],
                                    dtype=torch.long, device=self.regions.device).view(self.num_merged, largest)

    def means(self, patches: Tensor) -> Tensor:
        """Of each region, and 0 for the one that is none: (B, n, D) -> (B, C + 1, D)."""
        exact = torch.promote_types(patches.dtype, torch.float32)               # a region may be many patches
        weighed = self.weights.to(exact) * patches
        if self.members is None:
            means = weighed.new_zeros(patches.shape[0], self.num_merged + 1, patches.shape[2])
            return means.index_add(1, self.regions, weighed).to(patches.dtype)
        zero = torch.zeros_like(weighed[:, :1])
        parts = torch.cat([weighed, zero], dim=1).index_select(1, self.members.flatten())
        return torch.cat([parts.unflatten(1, self.members.shape).sum(dim=2), zero], dim=1).to(patches.dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                rope: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = unmasked(x, attn_mask, is_causal, "a block that merges tokens")
        prefix, patches = x[:, :self.num_prefix_tokens], x[:, self.num_prefix_tokens:]
        means = self.means(patches)
        regions = torch.cat([prefix, means[:, :-1]], dim=1)                     # (B, P + C, D)
        given = run(self.block, regions, self.mask, **turned(rope, self.rotation))
        given = torch.cat([given, torch.zeros_like(given[:, :1])], dim=1)
        same = given[:, self.num_prefix_tokens:].index_select(1, self.regions)                  # (B, n, D) Block(z)_c
        away = patches - means.index_select(1, self.regions)  # what sets a token apart; all of it outside regions
        own = away if self.own is None else self.own * away
        return torch.cat([given[:, :self.num_prefix_tokens], same + own], dim=1)
