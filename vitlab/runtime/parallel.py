"""Several processes under torchrun: who this one is, and what all of them know together. Of one, nothing changes.

    torchrun --nproc-per-node 2 -m vitlab finetune ...

Who computes the same on each process needs nothing from here; who takes a share adds the shares up with `total`.
"""
import contextlib
import os
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vitlab.runtime.files import require

T = TypeVar("T")
TIMEOUT = timedelta(minutes=60)                 # of waiting for the others: one may be measuring a large model
_alone = 0                                      # how many `alone` are open


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def begin(device: str | None = None) -> None:
    """Join the other processes: NCCL where each has a GPU of its own, else gloo. InputError where a GPU is missing."""
    if not launched() or dist.is_initialized():
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(local < count, f"process {local} of this machine has no GPU, there are {count}; start at most {count} "
                "(--nproc-per-node), or give --device cpu")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)


def end() -> None:
    """Leave the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def joined() -> bool:
    """Whether this process is one of several, whatever it does alone."""
    return dist.is_initialized()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def local_world() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


@contextlib.contextmanager
def alone() -> Generator[None]:
    """Inside, this process acts as if it were the only one: what it does the others need not do at the same time."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, on its device; of floats in float64, so that the order says nothing."""
    if world() == 1:
        return values
    exact = values.detach().to(torch.float64 if values.is_floating_point() else torch.int64, copy=True)
    exact = exact.cuda() if dist.get_backend() == "nccl" else exact.cpu()
    dist.all_reduce(exact)
    return exact.to(values.device, values.dtype)


def gather(value: T) -> list[T]:
    """What each process gives, in their order. Values are plain data."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()


def after_first(make: Callable[[], T]) -> T:
    """make(), on the first process before the others: what it leaves on the disk they find there."""
    if world() == 1:
        return make()
    found: Any = None
    for turn in (True, False):
        if is_first() is turn:
            with alone():
                found = make()
        wait()
    return found
