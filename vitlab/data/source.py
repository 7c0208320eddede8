"""open_data: one way to digits, a folder of images, or whatever timm.data.create_dataset opens; and its batches."""
import copy
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader, create_transform
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import Compose

from vitlab import parallel
from vitlab.data.digits import CLASSES, DigitsReader
from vitlab.data.folder import CLASS_MAP, HELD_OUT_NAMES, FolderReader, class_numbers, find_splits, read_image, unlabelled
from vitlab.data.images import Batches, Images, Stream, default_workers, image_config, load
from vitlab.data.parts import SHARES, STREAM, part
from vitlab.data.rgb import grey, rgb
from vitlab.data.tar import TarReader, find_tars
from vitlab.files import InputError, from_root

TIMM_PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")


def _known_by(path: str) -> str:
    """Path and size of a file; the name alone of what is none."""
    try:
        return f"{path} {os.stat(path).st_size}"
    except OSError:
        return path


class ImageData:
    """Named splits of one data set. `train` is for training, scoring and choosing; `held_out` for reporting alone. Where it is
    not `labelled`, targets are 0 and say nothing."""

    logged = 500                # images of train that a training's log is measured on; the held-out split is for reports
    mild = {"scale": (0.35, 1.0), "hflip": 0.5, "color_jitter": 0.0}               # augmentation of a short self-distillation

    def __init__(self, name: str, splits: dict[str, Any], classes: list[str] | None, num_classes: int | None,
                 mapped: bool = False, labelled: bool = True) -> None:
        self.name, self.splits, self.classes, self.num_classes, self.mapped = name, splits, classes, num_classes, mapped
        self.labelled = labelled
        self.roles: dict[str, Any] = {}                     # of `parts`: images of each role, and in words what is shared or lacks
        self.limits: dict[str, int | None] = {}             # of a stream's parts

    def at_once(self, images: int) -> int:
        """How many of so many images a batch that is only measured takes."""
        return images

    def need_labels(self) -> "ImageData":
        """The data set itself. Raises InputError where its images have no labels."""
        if not self.labelled:
            raise InputError(f"{self.name}: images without labels, which this step needs; a folder with one folder per class in "
                             "train/ and in val/, validation/ or test/ has them")
        return self

    @property
    def has_held_out(self) -> bool:
        """Whether there are labelled images to report on."""
        return self.labelled and any(name in self.splits for name in HELD_OUT_NAMES)

    @property
    def held_out(self) -> str:
        """Name of the held-out split. Raises InputError where there is none."""
        for name in HELD_OUT_NAMES:
            if name in self.splits:
                return name
        raise InputError(f"{self.name}: no held-out split to report on (val/, validation/ or test/); it has {sorted(self.splits)}")

    def split(self, name: str, limit: int | None = None, seed: int = 0) -> Images:
        """A split by name ("held_out" for whichever there is), or a slice of it chosen by seed."""
        name = self.held_out if name == "held_out" else name
        if name not in self.splits:
            raise InputError(f"{self.name}: no split {name!r}; it has {sorted(self.splits)}")
        images = self.splits[name]
        return images.take(limit, seed) if isinstance(images, Images) else images

    def parts(self, seed: int = 0, **limits: int | None) -> "ImageData":
        """`train` divided by purpose: a data set whose splits are the given roles of `parts.SHARES` ("score", "calibrate", "choose",
        "report"), for each at most so many images (None: its share; no role: all, each its share), of which no two have one in
        common (`part`). Where that can't be, one warning says so, and so does `roles`. Of a stream, its first images serve every
        role. Raises InputError for a limit below 1."""
        limits, train = limits or dict.fromkeys(SHARES), self.split("train")
        for role, limit in limits.items():
            if role not in SHARES:
                raise InputError(f"role {role!r} is not known; known are {list(SHARES)}")
            if limit is not None and limit < 1:
                raise InputError(f"{role}: limit is {limit}; at least 1 image is needed")
        found, stream = copy.copy(self), not isinstance(train, Images)
        if stream:
            found.splits, said = dict.fromkeys(limits, train), (STREAM,)
            found.roles, found.limits = dict(limits), limits
        else:
            made = part(len(train), seed, limits)
            found.splits = {role: type(train)(train.reader, [train.indices[i] for i in own]) for role, own in made.indices.items()}
            found.roles, said = {role: len(own) for role, own in made.indices.items()}, made.said
        if said:
            found.roles["shared"] = list(said)
            size = "" if stream else f" has {len(train)} images"
            if parallel.is_first():
                warnings.warn(f"{self.name}: train{size}; {'; '.join(said)}", stacklevel=2)
        return found

    def files(self, split: str) -> list[str]:
        """Name of the data set, and path and size of each image of a split, by which it is known again; the name alone of a stream."""
        images = self.split(split)
        return [self.name, *map(_known_by, map(images.path, range(len(images))))] if isinstance(images, Images) else [self.name]

    def check_fits(self, num_classes: int) -> None:
        """InputError where the class numbers can't be the classifier's."""
        if self.num_classes is None or num_classes == 0:
            return
        if self.num_classes > num_classes if self.mapped else self.num_classes != num_classes:
            raise InputError(f"{self.name}: {self.num_classes} classes, but the model's classifier has {num_classes}; "
                             "fine-tune it for these classes, or give a class_index.json that maps class folders to its numbers")

    def batches(self, split: str, model: nn.Module, *, batch_size: int = 64, training: bool = False,
                limit: int | None = None, seed: int = 0, workers: int | None = None, crop_pct: float | None = None,
                augment: dict[str, Any] | None = None, shared: bool = False, turns: int = 1, repeats: int = 1) -> Batches:
        """Batches for this model (its input size, mean, deviation, interpolation), through timm's transforms.

        training shuffles, augments (augment: options of timm's create_transform) and leaves out the last partial step of `turns`
        batches; without it the order is the split's own. shared: each process takes its share of the batches. workers None: none
        for small embedded data, else one a core, up to 8, divided among the processes of this machine.
        """
        self.check_fits(model.num_classes)
        images, limit = self.split(split, limit, seed), self.limits.get(split) if limit is None else limit
        config = image_config(model)
        if crop_pct is not None:
            config["crop_pct"] = crop_pct
        settings = {"is_training": training, **{k: config.get(k) for k in ("interpolation", "mean", "std", "crop_pct", "crop_mode")},
                    **(augment or {})}
        if not isinstance(images, Images):
            if parallel.joined() and not (shared and split in ("train", *SHARES)):
                raise InputError(f"{self.name}: a stream, whose images can't be divided exactly among processes; for this, start one "
                                 "process, or give a folder or tar files")

            def reopen(seed: int) -> DataLoader:
                # batch_size: each of the loader's processes fills whole batches
                opened = images.open(batch_size=batch_size, seed=seed)
                made = create_loader(opened, input_size=config["input_size"], batch_size=batch_size,
                                     num_workers=default_workers() if workers is None else workers, use_prefetcher=False,
                                     persistent_workers=False, pin_memory=torch.cuda.is_available(), device=torch.device("cpu"), **settings)
                opened.transform = Compose([rgb if config["input_size"][0] == 3 else grey, opened.transform])
                return made
            return Batches(reopen(seed), None, limit=limit, reopen=reopen, seed=seed)
        images.transform, images.channels = create_transform(config["input_size"], **settings), config["input_size"][0]
        loader, order = load(images, batch_size, training=training, seed=seed, workers=workers, embedded=self.name == "digits",
                             shared=shared, turns=turns, repeats=repeats)
        return Batches(loader, images, order)


def _open_digits() -> ImageData:
    return ImageData("digits", {name: Images(DigitsReader(name)) for name in ("train", "test")}, list(CLASSES), len(CLASSES))


DATA_SETS: dict[str, Callable[[], ImageData]] = {"digits": _open_digits}


def open_data(data: str | Path, *, class_map: str | Path | None = None) -> ImageData:
    """Open a data set: a name of DATA_SETS ("digits"), a folder of images, or a timm data set name such as "hfds/NAME".

    hfds/NAME (or a local folder that Hugging Face's datasets open), hfids/NAME, tfds/NAME and torch/NAME name the folder of their files
    after an @, as in torch/cifar10@FOLDER; wds/FOLDER is a folder of WebDataset shards with an _info.json. In place of each of its
    folders below a split may be a tar file of class folders.

    A folder holds train/ and val/, validation/ or test/, each with one folder per class. Class numbers follow the sorted
    names, or class_map (default: class_index.json in the folder) where it holds only some of a model's classes. A folder, or its
    train/, that holds images alone has no labels, and no other split than train.
    Raises InputError naming the folder: missing, no split, an empty class, classes that differ between splits.
    """
    if str(data) in DATA_SETS:
        if class_map is not None:
            raise InputError(f"{data} takes no class map: its classes are fixed")
        return DATA_SETS[str(data)]()
    if str(data).startswith(TIMM_PREFIXES):
        return _open_timm(str(data))
    if not str(data):
        raise InputError("no data set is named; give 'digits' or a folder of images")
    folder = from_root(data)
    tars = find_tars(folder)
    if tars:
        return _open_tars(folder, tars)
    flat = unlabelled(folder)
    if flat is not None:
        if class_map is not None:
            raise InputError(f"{flat}: images without class folders; a class map says nothing of them")
        return ImageData(folder.resolve().name, {"train": Images(FolderReader(flat, None))}, None, None, labelled=False)
    paths = find_splits(folder)
    numbers = class_numbers(folder, paths, class_map)
    mapped = class_map is not None or (folder / CLASS_MAP).exists()
    splits = {name: Images(FolderReader(path, numbers)) for name, path in paths.items()}
    count = max(numbers.values()) + 1
    return ImageData(folder.resolve().name, splits, sorted(numbers, key=numbers.get), count, mapped)


class _PairReader:
    """A torchvision-like data set of (PIL image, class) pairs as a reader."""

    def __init__(self, pairs: Any, name: str) -> None:
        self.pairs, self.name = pairs, name

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int):
        return self.pairs[i]

    def filename(self, i: int) -> str:
        return f"{self.name}/{i}"


def _open_tars(folder: Path, tars: dict[str, Path]) -> ImageData:
    readers = {name: TarReader(path) for name, path in tars.items()}
    (first, reader), *others = readers.items()
    for name, other in others:
        odd = sorted(set(other.class_name_to_idx) ^ set(reader.class_name_to_idx))
        if odd:
            raise InputError(f"{folder}: {first}.tar and {name}.tar hold different classes ({odd[0]!r} is in one of them only)")
    classes = [reader.class_idx_to_name[i] for i in range(len(reader.class_idx_to_name))]
    return ImageData(folder.resolve().name, {name: Images(r) for name, r in readers.items()}, classes, len(classes))


def _open_timm(data: str) -> ImageData:
    name, _, root = data.partition("@")
    splits, errors, root = {}, [], root or None
    plain = {} if name.startswith("tfds/") else {"input_img_mode": ""}          # pictures as they are, where they are no arrays yet
    if name.startswith("wds/"):
        root = name.removeprefix("wds/")
        if not (Path(root) / "_info.json").is_file() and not (Path(root) / "info.json").is_file():
            raise InputError(f"{root}: no folder of WebDataset shards; one with an _info.json that names the shards of each split is")
    for split in ("train", "validation", "test"):
        try:
            opened = create_dataset(name, root=root, split=split, is_training=split == "train")
        except Exception as error:                              # each backend raises its own kinds for a split it lacks
            errors.append(f"{split}: {error}")
            continue
        if isinstance(opened, IterableDataset):
            splits[split] = Stream(partial(create_dataset, name, root=root, split=split, is_training=split == "train", **plain))
        else:
            if hasattr(opened, "loader"):                       # of torchvision's folders, which would convert
                opened.loader = read_image
            splits[split] = Images(opened.reader if hasattr(opened, "reader") else _PairReader(opened, name))
    if not splits:
        raise InputError(f"{name}: timm could not open it ({'; '.join(errors)})")
    return ImageData(name, splits, None, None)
