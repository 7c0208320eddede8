"""Loader processes: how many, what order they read in, how they end, and what went wrong in one as one line."""
import functools
import multiprocessing
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sized
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from vitlab.data.order import Shuffled, TrainingOrder, ignore_requests, plain_order
from vitlab.runtime import parallel
from vitlab.runtime.cores import available_cores
from vitlab.runtime.files import InputError, first_line

MAX_WORKERS = 8
RAISED = re.compile(r"Caught (\w+) in DataLoader worker process")                # torch's words
KILLED = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (.*)")


def load(images: Sized, batch_size: int, *, training: Shuffled | None = None, seed: int = 0, workers: int | None = None,
         embedded: bool = False, shared: bool = False,
         collate: Callable[[list], Any] | None = None) -> tuple[DataLoader, list[range] | TrainingOrder]:
    """(loader, its order) of images that have their transform; the settings are those of `ImageData.batches`. embedded:
    small, and read by this process where workers is None."""
    if workers is None:
        workers = 0 if embedded else default_workers()
    rank, world = (parallel.rank(), parallel.world()) if shared else (0, 1)
    if training is None:
        order = plain_order(images, batch_size, rank, world)
    else:
        batch_size = min(batch_size, max(1, len(images) // (world * training.turns)))
        order = TrainingOrder(images, batch_size, seed=seed, turns=training.turns, repeats=training.repeats, rank=rank,
                              world=world)
    if workers:
        ending_with_this_process()
    return DataLoader(images, batch_sampler=order, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      persistent_workers=training is not None and workers > 0, collate_fn=collate,
                      worker_init_fn=ignore_requests), order


@functools.cache
def _registered(process: int) -> Finalize:
    return Finalize(None, _end_processes, exitpriority=0)       # before multiprocessing ends what is left


def ending_with_this_process() -> None:
    """See to it that loader processes which are left when this process ends are ended."""
    _registered(os.getpid())


def _end_processes() -> None:
    """Of a program that ends by an error multiprocessing asks the loader processes to stop, which they ignore, and
    waits for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # torch would report each
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def default_workers() -> int:
    """Loader processes: one a core, divided among the processes of this machine."""
    return min(MAX_WORKERS, max(1, available_cores() // parallel.local_world()))


def _wrapped(name: str, fields: dict[str, Any]) -> ExceptionWrapper:
    found = ExceptionWrapper.__new__(ExceptionWrapper)
    vars(found).update({"exc_type": type(name, (RuntimeError,), {}), **fields})
    return found


def _reduced(wrapper: ExceptionWrapper) -> tuple:
    """How torch's note of an error leaves a loader process: without the error's class where that can't be pickled, for
    which the parent would wait without end; a RuntimeError of its name stands for it."""
    fields = dict(vars(wrapper))
    try:
        pickle.dumps(wrapper.exc_type)
    except Exception:                           # pickle raises several kinds
        del fields["exc_type"]
    return _wrapped, (wrapper.exc_type.__name__, fields)


ForkingPickler.register(ExceptionWrapper, _reduced)


def fault(error: BaseException) -> str | None:
    """What went wrong in a loader process, in one line; None where the error is another."""
    text = str(error)
    killed, raised = KILLED.match(text), RAISED.match(text)
    if killed:
        how = killed[1].split(". ")[0].rstrip(".")
        return (f"a loader process {how}, most likely because the memory was used up; "
                "fewer --workers, or a smaller batch, need less")
    if raised:
        own = [line for line in text.splitlines() if re.match(rf"([\w<>]+\.)*{raised[1]}\b", line)]
        return f"an error in a loader process: {own[-1] if own else raised[1]}"
    return None


def received(batches: Iterable[Any], stream: str | None = None) -> Iterator[Any]:
    """What a loader gives. Raises InputError in place of an error in one of its processes, or of its death; the others
    end. stream: name of the data set where its libraries alone read it; and of whatever they raise."""
    found = None
    try:
        found = iter(batches)
        yield from found
    except Exception as error:
        said = fault(error)
        if said is None and (stream is None or isinstance(error, InputError)):
            raise
        getattr(found, "_shutdown_workers", lambda: None)()     # a traceback may keep the loader, and it its processes
        said = said or f"can't be read ({type(error).__name__}: {first_line(error)})"
        raise InputError(said if stream is None else f"{stream}: {said}") from None
