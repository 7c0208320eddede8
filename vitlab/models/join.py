"""Queries that join the tokens of a vision transformer before its last blocks. B images, N tokens, n of them patches, Q
queries, D dim, H heads of width d."""
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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


def with_queries(rope: Tensor, count: int) -> Tensor:
    """Sines and cosines by which the n patches of a block are turned ([H, ]n, 2 d), and Q queries after them are not:
    ([H, ]n + Q, 2 d)."""
    sines, cosines = rope.chunk(2, dim=-1)
    return torch.cat([F.pad(sines, (0, 0, 0, count)), F.pad(cosines, (0, 0, 0, count), value=1.0)], dim=-1)


def _unturned(block: nn.Module, inputs: tuple, also: dict[str, Any], count: int) -> tuple[tuple, dict[str, Any]] | None:
    """The forward pre-hook of every block with queries: of one that turns queries and keys by place."""
    return None if also.get("rope") is None else (inputs, {**also, "rope": with_queries(also["rope"], count)})


def join(blocks: Sequence[nn.Module], count: int, dim: int) -> None:
    """Let so many queries join the tokens as they enter the first of these blocks; it is a block like any other, and
    has a part more."""
    blocks[0].join = Join(count, dim)
    blocks[0].register_forward_pre_hook(blocks[0].join)
    for block in blocks:
        block.register_forward_pre_hook(partial(_unturned, count=count), with_kwargs=True)


def queries_in(blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """(how many of these blocks, the last ones, have queries among their tokens; how many queries)."""
    at = next((index for index, block in enumerate(blocks) if hasattr(block, "join")), len(blocks))
    return len(blocks) - at, blocks[at].join.queries.shape[1] if at < len(blocks) else 0
