"""Data sets of Hugging Face's `datasets`, from their hub or a folder; which column holds images and which classes is
read from their features."""
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlab.runtime.files import InputError, first_line, require
from vitlab.runtime.kinds import SPLITS

IMAGE_NAMES = ("image", "img", "pixel_values", "picture", "photo", "jpg", "png", "webp")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target")


def columns(name: str, features: Any) -> tuple[str, str | None]:
    """(column of the images, column of the class numbers or None) by the features of a data set, timm's where they are
    not known: the one of its kind, or, of several, the first that has one of the usual names; classes may be plain
    integers under such a name.

    Raises InputError that lists the columns where it can't be told.
    """
    from datasets import ClassLabel, Image, Value
    if not features:
        return "image", "label"
    images = [key for key, feature in features.items() if isinstance(feature, Image)]
    # as written by other programs: bytes, alone or with a path
    images = images or [key for key in IMAGE_NAMES if key in features and _is_bytes(features[key])]
    labels = [key for key, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [key for key in LABEL_NAMES if isinstance(features.get(key), Value)
                        and "int" in features[key].dtype]
    chosen = []
    for found, usual, what in ((images, IMAGE_NAMES, "images"), (labels, LABEL_NAMES, "classes")):
        chosen.append(found[0] if len(found) == 1 else next((key for key in usual if key in found), None))
        if chosen[-1] is None and (found or what == "images" or any(key in features for key in LABEL_NAMES)):
            said = ", ".join(f"{key} ({getattr(feature, 'dtype', type(feature).__name__)})"
                             for key, feature in features.items())
            raise InputError(f"{name}: which column holds the {what} can't be told; its columns are {said}; an Image "
                             f"and a ClassLabel, or integers named {LABEL_NAMES[0]}, are known")
    return chosen[0], chosen[1]


def agreed(name: str, classes: dict[str, Sequence[str] | None]) -> Sequence[str] | None:
    """The classes of every split, in the order of their numbers. Raises InputError where two splits differ."""
    (first, known), *others = classes.items()
    for other, found in others:
        if found != known:
            odd = next((each for each in sorted(set(found or ()) ^ set(known or ()))), "their order")
            raise InputError(f"{name}: {first} and {other} number their classes differently ({odd!r})")
    return known


def _is_bytes(feature: Any) -> bool:
    fields = feature if isinstance(feature, dict) else {"bytes": feature}
    return getattr(fields.get("bytes"), "dtype", "") in ("binary", "large_binary")


class HuggingFaceReader:
    """(image file, class) pairs; class 0 where `label` is None."""

    def __init__(self, dataset: Any, name: str, image: str, label: str | None) -> None:
        from datasets import Image
        self.dataset = dataset.select_columns([image] if label is None else [image, label]).cast_column(
            image, Image(decode=False))
        self.name, self.image, self.label = name, image, label

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        item = self.dataset[i]
        found = item[self.image] or {}
        if found.get("bytes") is None and found.get("path") is None:
            raise ValueError("there is no image")
        file = found["path"] if found.get("bytes") is None else io.BytesIO(found["bytes"])
        return file, 0 if self.label is None else item[self.label]

    def filename(self, i: int) -> str:
        """The path of its file; of an embedded image the data set's name, with its own or its number."""
        found = self.dataset.with_format("arrow")[i][self.image][0]             # without a copy of its bytes
        path = found["path"].as_py() if found.is_valid else None
        return path if path and os.path.isabs(path) else f"{self.name}/{path or i}"


def open_hugging_face(name: str, root: str | None) -> tuple[dict[str, HuggingFaceReader], list[str] | None]:
    """({split: its reader}, class names in the order of their numbers) of hfds/NAME: of the hub, kept below `root`, or
    a local folder that `datasets` wrote (save_to_disk) or opens. Raises InputError naming it."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{name}: needs Hugging Face's datasets (pip install vitlab[streams])") from None
    place = name.removeprefix("hfds/")
    saved = any((Path(place) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(place) if saved else datasets.load_dataset(place, cache_dir=root)
    # it raises its own kinds, and those of what it reads with
    except Exception as error:
        raise InputError(f"{name}: can't be opened by Hugging Face's datasets ({first_line(error)})") from None
    found = found if isinstance(found, dict) else {"train": found}
    splits = {split: dataset for split, dataset in found.items() if split in SPLITS}
    require(splits, f"{name}: has none of the splits {', '.join(SPLITS)}; it has {sorted(found)}")
    image, label = columns(name, next(iter(splits.values())).features)
    names = {split: getattr(dataset.features.get(label), "names", None) for split, dataset in splits.items()}
    readers = {split: HuggingFaceReader(dataset, f"{name}/{split}", image, label) for split, dataset in splits.items()}
    return readers, agreed(name, names)
