"""Data sets by a name of timm's: Hugging Face's, TensorFlow's and torchvision's, and WebDataset shards; which column or
field holds what is found in what they say of themselves."""
import json
import os
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import IterableDataset

from vitlab.data.folder import class_numbers, read_image
from vitlab.data.hugging_face import agreed, columns, open_hugging_face
from vitlab.data.image_data import ImageData, Renumbered
from vitlab.data.images import Images, Stream
from vitlab.data.listing import ENDINGS
from vitlab.runtime.files import InputError, first_line, read_json, require

SPLITS = ("train", "validation", "test")
LABELS = ("label", "labels", "fine_label", "cls", "class", "class_id", "target")  # fields that hold the class's number
IMAGES = ";".join(ending.removeprefix(".") for ending in ENDINGS)


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


def _shard_options(root: str, split: str) -> dict[str, Any]:
    """What timm's reader of WebDataset shards is to be told: every ending of images, and the field of the labels where
    they are in JSON. Read from the first sample. InputError names the shard whose sample has no image or label."""
    path = next((file for file in (Path(root) / "_info.json", Path(root) / "info.json") if file.is_file()), None)
    require(path is not None, f"{root}: no folder of WebDataset shards; one with an _info.json that names the shards "
            "of each split is")
    info = read_json(path).get("splits", {})
    if split not in info:
        raise KeyError(f"{path.name} names no such split")
    shard = Path(root) / info[split]["filenames"][0]
    first, parts = None, {}
    with tarfile.open(shard, mode="r|*") as tar:
        for member in tar:
            stem, _, ending = os.path.basename(member.name).partition(".")
            key = os.path.join(os.path.dirname(member.name), stem)
            if not member.isfile() or not stem or first not in (None, key):
                if first is None:
                    continue
                break
            first, parts[ending.lower()] = key, tar.extractfile(member).read() if ending.lower() == "json" else b""
    what, found = f"{shard}: sample {first}", ", ".join(f".{part}" for part in parts)
    require(parts.keys() & set(IMAGES.split(";")), f"{what} has no image ({', '.join(ENDINGS)}); it has {found}")
    if "cls" in parts or info[split].get("alt_label"):
        return {"input_key": IMAGES}
    require("json" in parts, f"{what} has no label, .cls or .json; it has {found}")
    fields = json.loads(parts["json"])
    numbers = [field for field in LABELS if isinstance(fields, dict) and type(fields.get(field)) is int]
    require(numbers, f"{what}: its .json has no class number under {', '.join(LABELS)}; it has {sorted(fields)}")
    return {"input_key": IMAGES, "target_key": numbers[0]}


def _names(opened: Any) -> list[str] | None:
    """The class names that a data set of timm's knows, in the order of their numbers."""
    found = getattr(opened, "classes", None) or getattr(getattr(opened, "reader", None), "class_to_idx", None)
    names = sorted(found, key=found.get) if isinstance(found, dict) else found
    return list(names) if names and all(isinstance(name, str) for name in names) else None


def open_timm(data: str, class_map: str | Path | None = None) -> ImageData:
    """A data set by a name with one of TIMM_PREFIXES. class_map: by the names of its classes. Raises InputError naming
    it where it can't be opened, splits differ in their classes, or a class map is given and they have no names."""
    name, _, root = data.partition("@")
    if name.startswith("hfds/"):
        readers, names = open_hugging_face(name, root or None)
        splits = {split: Images(reader) for split, reader in readers.items()}
        labelled = next(iter(readers.values())).label is not None
    else:
        splits, names = _open_splits(name, root or None)
        labelled = True
    if class_map is None:
        return ImageData(name, splits, names, len(names) if names else None, labelled=labelled)
    if names is None or not all(isinstance(images, Images) for images in splits.values()):
        why = "its classes have no names" if names is None else "a stream has its own numbers"
        raise InputError(f"{name}: takes no class map, as {why}")
    numbers, _ = class_numbers(Path(name), {"": names}, class_map)
    table = [numbers[each] for each in names]
    return ImageData(name, {split: Images(Renumbered(images.reader, table)) for split, images in splits.items()},
                     sorted(numbers, key=numbers.get), max(numbers.values()) + 1, mapped=True)


def _open_splits(name: str, root: str | None) -> tuple[dict[str, Images | Stream], list[str] | None]:
    splits, names, errors = {}, {}, []
    if name.startswith("wds/"):
        root = name.removeprefix("wds/")
    for split in SPLITS:
        # pictures as they are, where they are no arrays yet
        options: dict[str, Any] = {} if name.startswith("tfds/") else {"input_img_mode": ""}
        try:
            if name.startswith("wds/"):
                options |= _shard_options(root, split)
            elif name.startswith("hfids/"):
                from datasets import load_dataset_builder
                known = load_dataset_builder(name.removeprefix("hfids/"), cache_dir=root).info.features
                options |= dict(zip(("input_key", "target_key"), columns(name, known)))
            opening = partial(create_dataset, name, root=root, split=split, is_training=split == "train")
            opened = opening(**(options if not name.startswith("torch/") else {}))
        except InputError:
            raise
        except Exception as error:                              # each backend raises its own kinds for a split it lacks
            errors.append(f"{split}: {first_line(error)}")
            continue
        names[split] = _names(opened)
        if isinstance(opened, IterableDataset):
            splits[split] = Stream(partial(opening, **options))
        else:
            if hasattr(opened, "loader"):                       # of torchvision's folders, which would convert
                opened.loader = read_image
            splits[split] = Images(_PairReader(opened, name))
    require(splits, f"{name}: timm could not open it ({'; '.join(errors)})")
    return splits, agreed(name, names)
