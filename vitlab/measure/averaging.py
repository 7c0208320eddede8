"""What a model gives for batches of images, averaged over the images of all processes; what captures of it share."""
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.criteria.hsic import at_least_float32
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, require

# images (B, channels, height, width) and class numbers (B), or masks (B, height, width)
Batches = Iterable[tuple[Tensor, Tensor]]


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradient for any parameter; both as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def hooks(handles: list) -> Iterator[None]:
    """The hooks of these handles are there inside, and gone afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def begun(x: Tensor) -> Tensor:
    """x itself, or, where no graph leads to it (in the first block: it need not begin at the image), its start."""
    return x if x.requires_grad else x.detach().requires_grad_()


def draws_of_batches(seed: int = 0) -> Iterator[torch.Generator]:
    """Random numbers for one batch of this process after the other. Those of a batch follow from its number among the
    batches of all processes, which are dealt out in turn, so that several processes draw what one does."""
    for number in itertools.count(parallel.rank(), parallel.world()):
        yield torch.Generator().manual_seed(seed + number)


class Averages(NamedTuple):
    """Means over images, (L, ...) each, and what they were taken over."""

    values: tuple[Tensor, ...]      # on the CPU
    images: int                     # that had a part in them
    batches: int                    # that these images came in

    @property
    def batch(self) -> float:
        """Images in a batch, on average."""
        return self.images / self.batches


def averaged(model: nn.Module, batches: Batches, step: Callable[[Tensor, Tensor], tuple[Tensor, ...]], *, what: str,
             device: str | torch.device | None, progress: bool, at_least: int = 1) -> Averages:
    """What step(images, targets) gives for each batch, averaged: each batch weighs as its images, in float32 at least.

    model: in eval mode and frozen meanwhile. Under torchrun each process gives its share of the batches, and all get
    the mean over all of them. at_least: images of a batch; smaller ones have no part. Raises InputError, on all
    processes, where there is no image, or no batch is large enough.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device)
    mean: tuple[Tensor, ...] = ()
    seen = count = 0
    with frozen_eval(model):
        for images, targets in checked(tqdm(batches, desc=what, unit="batch", disable=not progress), what):
            if len(images) < at_least:
                continue
            seen, count = seen + len(images), count + 1
            given = tuple(at_least_float32(g) for g in step(images.to(device), targets.to(device)))
            mean = tuple(m + (g - m) * (len(images) / seen) for m, g in zip(mean, given)) if mean else given
    images, count = parallel.total(torch.tensor([seen, count])).tolist()
    require(images, f"{what}: a batch of {at_least - 1} has no images to compare; {at_least} at least are needed in "
            "one")
    return Averages(_over_processes(tuple(m.detach().cpu() for m in mean), seen, images), images, count)


def checked(batches: Batches, what: str) -> Batches:
    """The batches of this process. Raises InputError, on all of them, where one has none."""
    rest = iter(batches)
    first = next(rest, None)
    sizes = parallel.gather(0 if first is None else len(first[0]))
    require(any(sizes), f"{what}: there is no image to score on")
    if not all(sizes):
        raise InputError(f"{what}: {sum(map(bool, sizes))} batches for {len(sizes)} processes; smaller batches, more "
                         "images or fewer processes are needed")
    return itertools.chain([first], rest)


def _over_processes(mean: tuple[Tensor, ...], seen: int, images: int) -> tuple[Tensor, ...]:
    """The mean over the images of all processes, of which this one has `seen`."""
    if parallel.world() == 1:
        return mean
    # a process may have had no batch large enough
    made = next(filter(None, parallel.gather([(m.shape, m.dtype) for m in mean])))
    sums = [m.double() * seen for m in mean] or [torch.zeros(shape, dtype=torch.float64) for shape, _ in made]
    return tuple((parallel.total(s) / images).to(dtype) for s, (_, dtype) in zip(sums, made))


def first_images(batches: Sequence[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """Of batches, the first so many images."""
    found = []
    for images, targets in batches:
        if count > 0:
            found.append((images[:count], targets[:count]))
        count -= len(images)
    return found
