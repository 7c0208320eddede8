"""Fixed matrices over the tokens between the blocks of a deployed model (methods A7)."""
import torch
from torch import Tensor, nn

from vitlab.models.held import unmasked


class Fold(nn.Module):
    """A fixed matrix (C', C) over the tokens: (B, C, D) -> (B, C', D)."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return torch.matmul(self.matrix, unmasked(x, attn_mask, is_causal, "a deployed model"))


class FoldedBlock(nn.Module):
    """fold, then timm's Block on the first `num_tokens` rows; the rows after them skip it and are carried along."""

    def __init__(self, block: nn.Module, matrix: Tensor | None, num_tokens: int, num_carried: int) -> None:
        super().__init__()
        self.fold = nn.Identity() if matrix is None else Fold(matrix)
        self.block = block
        self.num_tokens, self.num_carried = num_tokens, num_carried

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self.fold(unmasked(x, attn_mask, is_causal, "a deployed model"))            # (B, C + p, D)
        if not self.num_carried:
            return self.block(x)
        merged, carried = x.split((self.num_tokens, self.num_carried), dim=1)
        return torch.cat([self.block(merged), carried], dim=1)
