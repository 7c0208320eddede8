"""Which images are in which batch of which process, and the random numbers of each: known from seed, epoch and place
alone, so that training goes on in the middle of an epoch, and is the same on one process as on several."""
import contextlib
import random
import signal
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """How training draws its images: in an order of each epoch's own, augmented; the last partial step is left out."""

    augment: dict[str, Any] = field(default_factory=dict)      # options of timm's create_transform; of scenes `AUGMENT`
    turns: int = 1                              # batches of a step, in each process
    repeats: int = 1                            # times in a row that an image drawn is taken (arXiv 1901.09335)


def seed_of(*numbers: int) -> int:
    """A seed below 2^31 in which every one of these numbers counts."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


@contextlib.contextmanager
def drawing(numbers: tuple[int, ...] | None) -> Iterator[None]:
    """Inside, numpy, random and, on the CPU, torch draw from the seed of these numbers (`seed_of`); afterwards they go
    on as if nothing had been drawn. None: they just go on."""
    if numbers is None:
        yield
        return
    before, seed = (torch.get_rng_state(), np.random.get_state(), random.getstate()), seed_of(*numbers)
    torch.default_generator.manual_seed(seed)          # torch.manual_seed seeds GPUs too, with a traceback formatted
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def ignore_requests(worker: int) -> None:
    """In a loader's process: a request to stop is the training process's to answer, which still needs its batches until
    then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def plain_order(images: Sized, batch_size: int, rank: int = 0, world: int = 1) -> list[range]:
    """The images of each batch of one process: all once, in their order; whole batches go round the processes."""
    places = range(len(images))
    return [places[first:first + batch_size] for first in places[::batch_size][rank::world]]


class TrainingOrder(Sampler):
    """Batches of one process in an epoch, as `Shuffled` says. (image, (seed, epoch, place in the epoch)) each: the
    three give its random numbers, where it is read (`drawing`).

    epoch and start (batches left out at the front) are set before each epoch; going through it once moves on to the
    next. With `repeats` an epoch stays as long as it was.
    """

    def __init__(self, images: Sized, batch_size: int, *, seed: int, turns: int = 1, repeats: int = 1, rank: int = 0,
                 world: int = 1) -> None:
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.epoch, self.start = 0, 0
        self.sampler = RepeatAugSampler(images, world, rank, num_repeats=repeats, selected_round=0)
        self.count = len(images) // (batch_size * turns * world) * turns

    def __len__(self) -> int:
        return self.count

    def places(self, epoch: int) -> np.ndarray:
        """The images of this process in that epoch, in their order."""
        self.sampler.set_epoch(seed_of(self.seed, epoch))
        return np.fromiter(self.sampler, np.int64, len(self.sampler))

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        epoch, start, size = self.epoch, self.start, self.batch_size
        self.epoch, self.start = epoch + 1, 0
        images = self.places(epoch)
        for batch in range(start, self.count):
            first = batch * size
            yield [(image, (self.seed, epoch, place * self.world + self.rank))
                   for place, image in enumerate(images[first:first + size].tolist(), first)]
