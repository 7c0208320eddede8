"""ImageData: named splits of one data set, its classes, and batches of them for a model."""
import copy
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import create_loader, create_transform
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose

from vitlab.data.images import Batches, Images, image_config
from vitlab.data.loading import default_workers, ending_with_this_process, load
from vitlab.data.order import Shuffled
from vitlab.data.parts import SHARES, STREAM, part
from vitlab.data.rgb import grey, rgb
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, require
from vitlab.runtime.kinds import HELD_OUT_NAMES

SIZED = 10_000  # images of a split whose sizes tell it from another: a stat of each of a million takes long


class Renumbered:
    """A reader whose class i is number numbers[i]."""

    def __init__(self, reader: Any, numbers: Sequence[int]) -> None:
        self.reader, self.numbers = reader, numbers

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image, target = self.reader[i][:2]
        return image, self.numbers[int(target)]

    def filename(self, i: int) -> str:
        return self.reader.filename(i)


class ImageData:
    """Named splits of one data set. `train` is for training, scoring and choosing; `held_out` for reporting alone.
    Where it is not `labelled`, targets are 0 and say nothing."""

    logged = 500  # images of train that a training's log is measured on; the held-out split is for reports
    mild = {"scale": (0.35, 1.0), "hflip": 0.5, "color_jitter": 0.0}  # augmentation of a short self-distillation
    report_on = HELD_OUT_NAMES                  # of these the first that there is

    def __init__(self, name: str, splits: dict[str, Any], classes: list[str] | None, num_classes: int | None,
                 mapped: bool = False, labelled: bool = True, hint: str | None = None) -> None:
        self.name, self.splits, self.classes, self.num_classes, self.mapped = name, splits, classes, num_classes, mapped
        self.labelled, self.hint = labelled, hint           # hint: why there are no labels, or where they are
        self.roles: dict[str, Any] = {}         # of `parts`: images of each role, and in words what is shared or lacks
        self.limits: dict[str, int | None] = {}             # of a stream's parts

    def at_once(self, images: int) -> int:
        """How many of so many images a batch that is only measured takes."""
        return images

    def need_labels(self) -> "ImageData":
        """The data set itself. Raises InputError where its images have no labels."""
        require(self.labelled, f"{self.name}: images without labels, which this step needs; "
                f"{f'{self.hint}; ' if self.hint else ''}a folder with one folder per class in train/ and in val/, "
                "validation/ or test/ has them")
        return self

    def without_labels(self, hint: str) -> "ImageData":
        """`train` alone, its classes forgotten."""
        return ImageData(self.name, {"train": self.split("train")}, None, None, labelled=False, hint=hint)

    def numbered_as(self, known: Sequence[str] | None) -> "ImageData":
        """The same images with the class numbers of a model that knows its classes by name, in whatever order; itself
        where either has no names. Raises InputError for other classes, where a class map says otherwise, and for a
        stream or scenes, whose targets are not renumbered."""
        if not known or not self.classes or list(known) == list(self.classes):
            return self
        odd, what = sorted(set(known) ^ set(self.classes)), f"{self.name}: its classes are not the model's"
        if self.mapped and (odd or self.num_classes != len(self.classes)):
            return self                                     # some of a model's classes, by its numbers
        if odd:
            raise InputError(f"{what} ({odd[0]!r} is in one of them only)")
        number = next(i for i, name in enumerate(known) if name != self.classes[i])
        if self.mapped or not all(type(images) is Images for images in self.splits.values()):
            raise InputError(f"{what}: their order differs, number {number} is {self.classes[number]!r} here and "
                             f"{known[number]!r} there")
        numbers, found = [list(known).index(name) for name in self.classes], copy.copy(self)
        found.splits = {name: Images(Renumbered(images.reader, numbers), images.indices)
                        for name, images in self.splits.items()}
        found.classes = list(known)
        return found

    @property
    def has_held_out(self) -> bool:
        """Whether there are labelled images to report on."""
        return self.labelled and any(name in self.splits for name in HELD_OUT_NAMES)

    @property
    def held_out(self) -> str:
        """Name of the held-out split. Raises InputError where there is none."""
        return self._first(self.report_on, "held-out split to report on")

    def _first(self, names: tuple[str, ...], what: str) -> str:
        found = next((name for name in names if name in self.splits), "")
        require(found, f"{self.name}: no {what} ({', '.join(names)}); it has {sorted(self.splits)}")
        return found

    def split(self, name: str, limit: int | None = None, seed: int = 0) -> Images:
        """A split by name ("held_out" for whichever there is), or a slice of it chosen by seed."""
        name = self.held_out if name == "held_out" else name
        require(name in self.splits, f"{self.name}: no split {name!r}; it has {sorted(self.splits)}")
        images = self.splits[name]
        return images.take(limit, seed) if isinstance(images, Images) else images

    def parts(self, seed: int = 0, **limits: int | None) -> "ImageData":
        """`train` divided by purpose: a data set whose splits are the given roles of `parts.SHARES` ("score",
        "calibrate", "choose", "report"), for each at most so many images (None: its share; no role: all, each its
        share), of which no two have one in common (`part`). Where that can't be, one warning says so, and so does
        `roles`. Of a stream, its first images serve every role. Raises InputError for a limit below 1."""
        limits, train = limits or dict.fromkeys(SHARES), self.split("train")
        for role, limit in limits.items():
            require(role in SHARES, f"role {role!r} is not known; known are {list(SHARES)}")
            require(limit is None or limit >= 1, f"{role}: limit is {limit}; at least 1 image is needed")
        found, stream = copy.copy(self), not isinstance(train, Images)
        if stream:
            found.splits, said = dict.fromkeys(limits, train), (STREAM,)
            found.roles, found.limits = dict(limits), limits
        else:
            made = part(len(train), seed, limits)
            found.splits = {role: type(train)(train.reader, [train.indices[i] for i in own])
                            for role, own in made.indices.items()}
            found.roles, said = {role: len(own) for role, own in made.indices.items()}, made.said
        if said:
            found.roles = {**found.roles, "shared": list(said)}
            size = "" if stream else f" has {len(train)} images"
            if parallel.is_first():
                warnings.warn(f"{self.name}: train{size}; {'; '.join(said)}", stacklevel=2)
        return found

    def files(self, split: str) -> list[str]:
        """Name of the data set, path of each image of a split, and size of up to SIZED, evenly spread, by which it is
        known again; the name alone of a stream. Classes of images too, where their numbers are not the order of their
        names' letters."""
        images, classes = self.split(split), self.classes or []
        named = [self.name, *(classes if type(images) is Images and classes != sorted(classes) else [])]
        if not isinstance(images, Images):
            return named
        step, paths = -(-len(images) // SIZED), [images.path(i) for i in range(len(images))]
        sized = (f"{path} {os.stat(path).st_size}" if not i % step and os.path.exists(path) else path
                 for i, path in enumerate(paths))
        return [*named, *sized]

    def check_fits(self, num_classes: int) -> None:
        """InputError where the class numbers can't be the classifier's."""
        if self.num_classes is None or num_classes == 0:
            return
        if self.num_classes > num_classes if self.mapped else self.num_classes != num_classes:
            raise InputError(f"{self.name}: {self.num_classes} classes, but the model's classifier has {num_classes}; "
                             "fine-tune it for these classes, or give a class_index.json that maps class folders to "
                             "its numbers")

    def batches(self, split: str, model: nn.Module, *, batch_size: int = 64, training: Shuffled | None = None,
                limit: int | None = None, seed: int = 0, workers: int | None = None, crop_pct: float | None = None,
                shared: bool = False) -> Batches:
        """Batches for this model (its input size, mean, deviation, interpolation), through timm's transforms.

        training: how images are drawn; None: in the split's own order. limit, seed: of a slice (`split`). shared: each
        process takes its share of the batches. workers None: none for small embedded data, else one a core, up to 8,
        divided among the processes of this machine.
        """
        self.check_fits(model.num_classes)
        images, config = self.split(split, limit, seed), image_config(model)
        size = config["input_size"]
        settings = {name: config.get(name) for name in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
        settings |= {} if crop_pct is None else {"crop_pct": crop_pct}
        settings |= {"is_training": False} if training is None else {"is_training": True, **training.augment}
        if isinstance(images, Images):
            images.transform, images.channels = create_transform(size, **settings), size[0]
            loader, order = load(images, batch_size, training=training, seed=seed, workers=workers, shared=shared,
                                 embedded=self.name == "digits")
            return Batches(loader, images, order)
        if parallel.joined() and not (shared and split in ("train", *SHARES)):
            raise InputError(f"{self.name}: a stream, whose images can't be divided exactly among processes; for this, "
                             "start one process, or give a folder or tar files")

        def reopen(seed: int) -> DataLoader:
            ending_with_this_process()
            opened = images.open(batch_size=batch_size, seed=seed)      # each loader process fills whole batches
            made = create_loader(opened, input_size=size, batch_size=batch_size, use_prefetcher=False,
                                 num_workers=default_workers() if workers is None else workers,
                                 persistent_workers=False, pin_memory=torch.cuda.is_available(),
                                 device=torch.device("cpu"), **settings)
            opened.transform = Compose([rgb if size[0] == 3 else grey, opened.transform])
            return made
        return Batches(reopen(seed), None, limit=self.limits.get(split) if limit is None else limit, reopen=reopen,
                       seed=seed, name=self.name)
