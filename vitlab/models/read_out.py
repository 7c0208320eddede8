"""A last block that computes what a classifier on the prefix tokens reads, and no more; the same logits for fewer MACs."""
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.files import InputError
from vitlab.models.match import Merged, mix, size_mask
from vitlab.rules import ReadOut


def read_out(block: nn.Module, x: Tensor, mask: Tensor | None, num_prefix_tokens: int) -> Tensor:
    """The prefix tokens after the attention of timm's Block and its residual: x (B, N, D) -> (B, P, D). All N tokens are attended
    to, with an additive mask; P ask."""
    attn, normed = block.attn, block.norm1(x)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    rows = (slice(attn.attn_dim), slice(attn.attn_dim, None))                   # of the queries; of the keys and values

    def projected(x: Tensor, rows: slice) -> Tensor:
        """(B, N, D) -> (parts, B, H, N, d)."""
        flat = F.linear(x, weight[rows], None if bias is None else bias[rows])
        return flat.unflatten(2, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    query, (key, value) = projected(normed[:, :num_prefix_tokens], rows[0])[0], projected(normed, rows[1])
    out = mix(attn, attn.q_norm(query), attn.k_norm(key), value, mask)
    return x[:, :num_prefix_tokens] + block.drop_path1(block.ls1(out))


class ReadOutBlock(nn.Module):
    """timm's Block, last of its model: (B, N, D), or what matching blocks have merged, -> (B, P, D)."""

    def __init__(self, block: nn.Module, rule: ReadOut, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block, self.rule, self.num_prefix_tokens = block, rule, num_prefix_tokens

    def forward(self, x: Tensor | Merged, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise InputError("a block that reads out takes no attention mask")
        x, mask = (x.x, size_mask(x.sizes, x.x.dtype)) if isinstance(x, Merged) else (x, None)
        x, block = read_out(self.block, x, mask, self.num_prefix_tokens), self.block
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
