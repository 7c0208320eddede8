"""Models made without the random numbers that they begin with, most of the time that making one takes."""
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RANDOM = frozenset({"uniform_", "normal_", "erfinv_"})
FILLING = RANDOM | {"mul_", "add_", "clamp_", "zero_", "fill_"}


class _LeftOut(TorchFunctionMode):
    """Some operations in place give back the tensor as it is."""

    def __init__(self, names: frozenset[str], meta: bool) -> None:
        super().__init__()
        self.names, self.meta = names, meta

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if args and isinstance(args[0], Tensor) and getattr(function, "__name__", "") in self.names and (
                args[0].is_meta or not self.meta):
            return args[0]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def sizes_alone() -> Iterator[None]:
    """Inside, what is made has names and sizes alone, without memory: torch's meta device, on which it would go through
    what fills a tensor in Python."""
    with torch.device("meta"), _LeftOut(FILLING, meta=True):
        yield


def unfilled() -> contextlib.AbstractContextManager[Any]:
    """Inside, what would be random is whatever is in memory, to be loaded before it is used: a ViT-L is made in a tenth
    of the time. The generator is left as it is."""
    return _LeftOut(RANDOM, meta=False)
