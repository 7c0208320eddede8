"""Queries that join the tokens of a vision transformer before its last blocks. B images, N tokens, Q queries, D dim."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Join(nn.Module):
    """Q learned queries, and the forward pre-hook of a block that puts them after its tokens: (B, N, D) -> (B, N + Q,
    D). They begin as N(0, I)."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, count, dim))

    def after(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.queries.expand(x.shape[0], -1, -1)], dim=1)

    def forward(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.after(inputs[0]), *inputs[1:]


def join(block: nn.Module, count: int, dim: int) -> None:
    """Let so many queries join the tokens as they enter a block; it is a block like any other, and has a part more."""
    block.join = Join(count, dim)
    block.register_forward_pre_hook(block.join)


def queries_in(blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """(how many of these blocks, the last ones, have queries among their tokens; how many queries)."""
    at = next((index for index, block in enumerate(blocks) if hasattr(block, "join")), len(blocks))
    return len(blocks) - at, blocks[at].join.queries.shape[1] if at < len(blocks) else 0
