"""A last block that computes what a classifier on the prefix tokens reads, and no more; the same logits for fewer
MACs."""
from torch import Tensor, nn

from vitlab.models.attention import PrefixAttention, attention_as
from vitlab.models.held import HoldingBlock, Merged
from vitlab.models.match import size_mask
from vitlab.plan.rules import ReadOut


class ReadOutBlock(HoldingBlock):
    """timm's Block, last of its model: (B, N, D), or what matching blocks have merged, -> (B, P, D). All N tokens are
    attended to; the P prefix tokens ask."""

    def __init__(self, block: nn.Module, rule: ReadOut, num_prefix_tokens: int) -> None:
        super().__init__()
        block.attn = attention_as(PrefixAttention, block.attn, num_prefix_tokens=num_prefix_tokens)
        self.block, self.rule, self.num_prefix_tokens = block, rule, num_prefix_tokens

    def forward(self, x: Tensor | Merged, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self.received(x, attn_mask, is_causal, "a block that reads out")
        x, mask = (x.x, size_mask(x.sizes, x.x.dtype)) if isinstance(x, Merged) else (x, None)
        block = self.block
        x = x[:, :self.num_prefix_tokens] + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
