"""The images of a split, one by one and in batches; broken ones are left out and named."""
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from vitlab.data.folder import read_image, reason
from vitlab.data.loading import received
from vitlab.data.order import TrainingOrder, drawing, seed_of
from vitlab.data.rgb import rgb
from vitlab.runtime.files import InputError, require

MAX_BROKEN, BROKEN_SHARE = 16, 0.01  # so many images, or that share of a split, may be broken: the larger of the two


class Images(Dataset):
    """A split, or a slice of one. An image that can't be read becomes a black one with target -1 - index: a flag that
    Batches takes out and reports, instead of a crash in a worker or another image in its place."""

    def __init__(self, reader: Any, indices: Sequence[int] | None = None) -> None:
        self.reader = reader
        self.indices = range(len(reader)) if indices is None else indices
        self.transform, self.channels = None, 3                 # set by whoever makes batches of it

    def take(self, limit: int | None, seed: int) -> "Images":
        """A slice of `limit` images, chosen and ordered by seed, so that classes mix; all, in order, where None."""
        if limit is None:
            return type(self)(self.reader, self.indices)
        require(limit >= 1, f"limit is {limit}; at least 1 image is needed")
        if limit > len(self):
            warnings.warn(f"{limit} images were asked for; the split has {len(self)}, and all of them are taken",
                          stacklevel=4)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:limit]
        return type(self)(self.reader, [self.indices[i] for i in order.tolist()])

    def path(self, i: int) -> str:
        return self.reader.filename(self.indices[i])

    def image(self, i: int) -> tuple[Image.Image, int]:
        """(RGB image (`rgb`), class), untransformed. Raises whatever Pillow does where it can't be read."""
        image, target = self.reader[self.indices[i]][:2]
        image = image if isinstance(image, Image.Image) else read_image(image)
        if target is None or int(target) < 0:
            raise ValueError(f"its class is {target}, which is none")
        return rgb(image), int(target)

    def fault(self, i: int) -> str:
        """In a few words, that an image can't be read, and why."""
        why = "it could not be at first"
        try:
            self.image(i)
        except Exception as error:              # whatever `image` raises
            why = reason(self.path(i), error)
        return f"{self.path(i)}: can't be read as an image ({why})"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, tuple[int, ...]]) -> tuple[Tensor, int]:
        """key: a number, or with the numbers that `drawing` takes."""
        i, numbers = key if isinstance(key, tuple) else (key, None)
        try:
            image, target = self.image(i)
        except Exception:                       # a damaged file makes Pillow's decoders raise nearly anything
            image, target = Image.new("RGB", (64, 64)), -1 - i
        with drawing(numbers):
            return self.transform(image if self.channels == 3 else image.convert("L")), target


def image_config(model: nn.Module) -> dict[str, Any]:
    """timm's data configuration of a model, its images (channels, height, width) as it is and not as it was made. A
    model of one channel takes grey images, and the mean of its channels' means and deviations where there are several.
    Raises InputError for other numbers of channels than 3 and 1."""
    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", config["input_size"][1:])
    channels = getattr(model, "in_chans", config["input_size"][0])
    if channels not in (1, 3):
        raise InputError(f"the model takes images of {channels} channels; 3 (colour) or 1 (grey) are what images have")
    if channels == 1:
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    return config | {"input_size": (channels, *size)}


def in_words(config: dict[str, Any], *, resized: bool = True) -> str:
    """How images are prepared by an `image_config`, in one line; `resized`: to one size, unlike scenes."""
    height, width = config["input_size"][1:]
    statistics = ", ".join(f"{name} {' '.join(f'{value:.4g}' for value in config[name])}" for name in ("mean", "std"))
    crop = f"{config['crop_mode']} crop {config['crop_pct']:.4g}"
    return f"{height} x {width}, {config['interpolation']}, {crop}, {statistics}" if resized else statistics


@dataclass(frozen=True)
class Stream:
    """A split that is read from its beginning, opened anew for each epoch: timm's readers remember by how many
    processes they were first read, and how they shuffled before."""

    open: Callable[..., IterableDataset]        # takes batch_size and seed


class Batches:
    """Iterate (images, targets) of a loader without the broken images; their paths gather in `broken`.

    order: which images each batch has. Of a stream, reopen(seed) gives the loader of an epoch, the first `limit` images
    serve, and errors name it by `name`.
    Raises InputError once more images are broken than a data set should have, and where training finds a batch with
    none that can be read.
    """

    def __init__(self, loader: Any, images: Images | None, order: list[range] | TrainingOrder | None = None,
                 limit: int | None = None, reopen: Callable[[int], Any] | None = None, seed: int = 0,
                 name: str | None = None) -> None:
        self.loader, self.images, self.order, self.name, self.broken = loader, images, order, name, []
        self.limit, self.reopen, self.seed, self.epoch, self.skip = limit, reopen, seed, 0, 0

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def training(self) -> bool:
        return isinstance(self.order, TrainingOrder)

    def begin(self, epoch: int, start: int = 0) -> None:
        """The next pass is that epoch's, without its first `start` batches. Of a stream they are read and dropped."""
        if self.training:
            self.order.epoch, self.order.start = epoch, start
            return
        self.epoch, self.skip = epoch, start

    def names(self, epoch: int, batch: int) -> list[str]:
        """The files of one batch of an epoch; none of a stream."""
        if not self.training:
            return []
        size = self.order.batch_size
        return [self.images.path(i) for i in self.order.places(epoch)[batch * size:(batch + 1) * size]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.images is None:
            yield from self._stream()
            return
        for x, y in received(self.loader):
            broken = [-1 - flag for flag in y[y < 0].tolist()]
            self._left_out(broken, len(y))
            if len(broken) < len(y):
                yield x[y >= 0], y[y >= 0]

    def _left_out(self, broken: list[int], of: int) -> None:
        """Take note of the images of a batch that could not be read, and `check_broken`."""
        for path, i in ((self.images.path(i), i) for i in broken):
            if path not in self.broken:
                self.broken.append(path)
                warnings.warn(f"{self.images.fault(i)}, left out", stacklevel=3)
                self.check_broken()
        if self.training and len(broken) == of:
            raise InputError(f"no image of a batch of {of} could be read, {self.broken[-1]} among them; repair or "
                             f"remove them")

    def _stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        seen, epoch, skipped = 0, self.epoch, self.skip
        self.epoch, self.skip = epoch + 1, 0
        with drawing((self.seed, epoch)):                                    # where loader processes begin to draw
            batches = received(self.reopen(seed_of(self.seed, epoch)), self.name)
        for number in itertools.count():
            with drawing((self.seed, epoch, number)):
                x, y = next(batches, (None, None))
            if x is None or (self.limit is not None and seen >= self.limit):
                return
            seen += len(y)
            if number >= skipped:
                yield x, y

    def check_broken(self) -> None:
        """Raises InputError where more images are broken than may be; a stream names none."""
        most = MAX_BROKEN if self.images is None else max(MAX_BROKEN, int(len(self.images) * BROKEN_SHARE))
        if len(self.broken) > most:
            raise InputError(f"{len(self.broken)} of {len(self.images)} images can't be read, "
                             f"{', '.join(self.broken[:3])} and others; "
                             f"more than {most} are too many to be left out: repair or remove them")
