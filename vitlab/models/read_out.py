"""A last block that computes what a classifier on the prefix tokens reads, alone: the same logits for fewer MACs."""
from functools import partial

from torch import Tensor, nn

from vitlab.models.attention import PrefixAttention, attention_as
from vitlab.models.families import attention_added, attention_input, mlp_added
from vitlab.models.held import HoldingBlock, Merged, rotation_of, turned
from vitlab.models.match import size_mask
from vitlab.plan.rules import ReadOut


class ReadOutBlock(HoldingBlock):
    """timm's Block, last of its model: (B, N, D), or what matching blocks have merged, -> (B, P, D). All N tokens are
    attended to; the P prefix tokens ask."""

    def __init__(self, block: nn.Module, rule: ReadOut, num_prefix_tokens: int) -> None:
        super().__init__()
        block.attn = attention_as(PrefixAttention, block.attn, num_prefix_tokens=num_prefix_tokens)
        self.block, self.rule, self.num_prefix_tokens = block, rule, num_prefix_tokens

    def forward(self, x: Tensor | Merged, attn_mask: Tensor | None = None, is_causal: bool = False,
                rope: Tensor | None = None) -> Tensor:
        x = self.received(x, attn_mask, is_causal, "a block that reads out")
        by_place, mask = turned(rope), None
        if isinstance(x, Merged):
            by_place, mask, x = turned(rope, partial(rotation_of, x)), size_mask(x.sizes, x.x.dtype), x.x
        attended = self.block.attn(attention_input(self.block, x), attn_mask=mask, **by_place)
        # an attention that is left out gives all tokens what it gives
        x, attended = x[:, :self.num_prefix_tokens], attended[:, :self.num_prefix_tokens]
        return mlp_added(self.block, attention_added(self.block, x, attended))
