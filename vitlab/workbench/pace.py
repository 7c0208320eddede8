"""How far a long work is: numbered stages on one bar, counted in what takes about as long everywhere."""
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.measure.distance import outputs

T = TypeVar("T")


def lasting(seconds: float) -> str:
    """A time in words: "40 seconds", "3.2 minutes"."""
    return f"{seconds:.0f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes"


def images_per_second(model: nn.Module, images: Tensor, amp: bool | None = False) -> float:
    """Forwards of one image through the model in a second, of these images, once the machine is warm."""
    with torch.inference_mode():
        for _ in range(2):
            began = time.perf_counter()
            outputs(model, images, amp).flatten()[0].item()                     # there when the device has got to it
    return len(images) / (time.perf_counter() - began)


class Pace:
    """A bar over all stages, in forwards of one image through the dense model: what is left of them says how long the
    whole will take."""

    def __init__(self, what: str, stages: dict[str, float], rate: float, progress: bool = True) -> None:
        """stages: how many forwards each is worth, about; rate: forwards a second."""
        self.what, self.stages, self.rate, self.began = what, stages, rate, time.monotonic()
        self.at, self.done, self.taken_over, self.named = 0, 0.0, 0.0, None
        self.bar = tqdm(total=round(self.total), desc=what, unit="forward", disable=not progress, smoothing=0.05,
                        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left")
        if progress:
            shares = ", ".join(f"{name} {100 * each / self.total:.0f} %" for name, each in stages.items())
            self.bar.write(f"{what}: {len(stages)} stages, about {lasting(self.seconds)} at {rate:.0f} images a second "
                           f"({shares})", file=sys.stderr)

    @property
    def total(self) -> float:
        return sum(self.stages.values())

    @property
    def seconds(self) -> float:
        """That the whole takes, as far as is known."""
        return self.total / self.rate

    def seconds_of(self, *stages: str) -> float:
        """That some stages take, by what the ones before took; what was there already says nothing."""
        passed, own = time.monotonic() - self.began, self.done - self.taken_over
        rate = own / passed if own > self.total / 10 else self.rate
        return sum(self.stages.get(name, 0) for name in stages) / rate

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, this stage is under way; what it was thought to be worth is done after it, but for one inside."""
        outer, self.at, self.named = self.named, self.at + 1, 0.0
        self.bar.set_description_str(f"{self.what} {self.at}/{len(self.stages)}, {name}")
        yield
        rest = max(0.0, self.stages.get(name, 0) - self.named)
        self.taken_over += rest
        self.add(rest)
        self.named = outer

    def add(self, forwards: float) -> None:
        """So many forwards are done."""
        if self.named is not None:
            self.named += forwards
        self.done += forwards
        # a stage may be worth more than was thought
        self.bar.update(min(round(self.done), self.bar.total) - self.bar.n)

    def over(self, items: Iterable[T], count: int, forwards: float) -> Iterator[T]:
        """The items, so many, all of which together are worth so many forwards."""
        for item in items:
            yield item
            self.add(forwards / count)

    def __enter__(self) -> "Pace":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
