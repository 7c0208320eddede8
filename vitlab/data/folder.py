"""An image folder, checked before anything runs: train/ and val/, validation/ or test/, one folder per class in each;
or images alone, without labels, however deep they lie."""
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitlab.data.groups import Groups
from vitlab.data.listing import ENDINGS, entries, natural
from vitlab.runtime.files import InputError, first_line, read_json, require
from vitlab.runtime.kinds import SPLITS

CLASS_MAP = "class_index.json"
Image.init()
# PostScript is code, and Pillow would start a program that runs it
FORMATS = tuple(name for name in Image.ID if name != "EPS")


def read_image(source: Any) -> Image.Image:
    """An image from a path, or from an open file. Raises what Pillow does, and OSError for a pipe or a device."""
    if isinstance(source, (str, Path)) and not os.path.isfile(source):
        raise OSError(f"{source}: no file")
    return Image.open(source, formats=FORMATS)


def reason(path: str | Path, error: Exception) -> str:
    """Why a file can't be read as an image, in a few words, without its own name."""
    ending = os.path.splitext(path)[1].lower()
    if isinstance(error, UnidentifiedImageError):
        known = ending not in ENDINGS or ending in Image.registered_extensions()
        return "it is none that Pillow knows" if known else (
            f"no decoder of {ending} is installed; as JPEG it could be read")
    return first_line(error).removeprefix(f"{path}: ")


def find_splits(root: Path) -> dict[str, Path]:
    """{"train": folder, held-out name: folder}, those that exist; {} where root holds images alone.

    Raises InputError where there is no such folder, and where the splits are one folder further down.
    """
    require(root.is_dir(), f"{root}: no such folder; give 'digits', or a folder that holds train/ and val/, "
            "validation/ or test/")
    splits = {name: root / name for name in SPLITS if (root / name).is_dir()}
    for name in [] if splits else entries(root)[1]:
        inside = splits_in(root / name)
        if inside and (inside[0].startswith("train") and len(inside) > 1 or len(entries(root)[1]) == 1):
            raise InputError(f"{root}: one folder too high; {name}/ in it holds {' and '.join(inside)}: give "
                             f"{root / name}")
    return splits


def splits_in(folder: Path) -> list[str]:
    """The splits that a folder holds, as "train/" or "train.tar"."""
    return [f"{split}{end}" for split in SPLITS for end, is_there in (("/", Path.is_dir), (".tar", Path.is_file))
            if is_there(folder / f"{split}{end}")]


def check_classes(split: Path, groups: Groups) -> None:
    """Raises InputError naming a class folder without images, or a split without any; warns of images outside."""
    require(any(groups), f"{split}: holds no class folders; images must lie in {split.name}/CLASS/")
    empty = next((name for name, images in groups.items() if name and not len(images)), None)
    if empty is not None:
        raise InputError(f"{split / empty}: a class folder without images ({', '.join(ENDINGS)})")
    if "" in groups:
        loose = groups[""]
        warnings.warn(f"{split}: {len(loose)} images lie outside of its class folders, {os.fsdecode(loose[0])} among "
                      f"them; left out",
                      stacklevel=2)


def read_class_map(path: Path) -> dict[str, int]:
    """{class folder name: the model's class number} from a file; checked.

    JSON: {"NAME": number}, or the other way about {"number": "NAME"} or {"number": ["NAME", words ...]}, as ImageNet's
    imagenet_class_index.json; or a list of names. Text: a name a line, that of class 0 first, as timm's.
    """
    if path.suffix == ".txt":
        data = _lines(path)
    elif path.suffix in (".pkl", ".pickle"):
        raise InputError(f"{path}: a pickle, which can run code and is not read; give JSON or a text of one name a "
                         f"line")
    else:
        data = _by_name(read_json(path))
    if not isinstance(data, dict) or not data or not all(
            isinstance(k, str) and isinstance(v, int) and not isinstance(v, bool) and v >= 0 for k, v in data.items()):
        raise InputError(f"{path}: must be an object of class folder names and class numbers from 0")
    require(len(set(data.values())) == len(data), f"{path}: two classes have the same number")
    return data


def _lines(path: Path) -> dict[str, int]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None or "" in names:
        raise InputError(f"{path}: " + (f"names {twice!r} twice" if twice else "an empty line names no class"))
    return {name: number for number, name in enumerate(names)}


def _by_name(data: Any) -> Any:
    """{name: number} of an object that is the other way about, or of a list of names; anything else as it is."""
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        data = {str(number): name for number, name in enumerate(data)}
    names = [value[0] if isinstance(value, list) and value else value
             for value in data.values()] if isinstance(data, dict) else []
    if not names or len(set(map(str, names))) < len(names) or not all(isinstance(name, str) for name in names):
        return data
    return {name: int(key) for key, name in zip(data, names)} if all(key.isdecimal() for key in data) else data


def _of_first_words(numbers: dict[str, int], names: set[str]) -> dict[str, int]:
    """A class map whose names are lines "NAME words ...", as those of ImageNet's synset_words.txt: by their first
    words, where these and no line are among names; else as it is."""
    words = {name.split()[0]: number for name, number in numbers.items() if name.strip()}
    return words if len(words) == len(numbers) and names & words.keys() and not names & numbers.keys() else numbers


def class_numbers(root: Path, folders: dict[str, Iterable[str]],
                  class_map: str | Path | None) -> tuple[dict[str, int], bool]:
    """(class name to number, for all splits alike, whether a class map says so): from the map (given, or
    root/class_index.json), else in natural order, as timm numbers them. folders: names of each split's class folders,
    by how a message names the split.

    Raises InputError where the splits hold different classes, or a folder is not in the class map.
    """
    path = Path(class_map) if class_map else root / CLASS_MAP
    if class_map or path.exists():
        numbers = _of_first_words(read_class_map(path), set().union(*folders.values()))
        for split, classes in folders.items():
            unknown = sorted(set(classes) - set(numbers), key=natural)
            if unknown and len(unknown) == len(set(classes)):
                raise InputError(f"{path}: a class map of none of the classes of {root / split}; it names "
                                 f"{next(iter(numbers))!r}, they are {unknown[0]!r}"
                                 + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""))
            if unknown:
                raise InputError(f"{root / split / unknown[0]}: not in the class map {path}"
                                 + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""))
        return numbers, True
    first, *others = folders
    for other in others:
        odd = sorted(set(folders[other]) ^ set(folders[first]))
        if odd:
            raise InputError(f"{root}: {first} and {other} hold different classes ({odd[0]!r} is in one of them only); "
                             f"a {CLASS_MAP} would say which number each has")
    return {name: number for number, name in enumerate(sorted(folders[first], key=natural))}, False


class FolderReader:
    """Indexable (path, class) pairs of one split; every image below a class folder, however deep, is of that class.
    Without class numbers, of all images, of class 0. Names are kept in one array, which loader processes share."""

    def __init__(self, split: Path, groups: Groups, numbers: dict[str, int] | None) -> None:
        chosen = groups if numbers is None else {name: images for name, images in groups.items() if name in numbers}
        self.folder = os.path.join(split, "")
        self.names = np.concatenate(list(chosen.values()))
        self.targets = np.repeat([0 if numbers is None else numbers[name] for name in chosen],
                                 [len(images) for images in chosen.values()])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[str, int]:
        return self.filename(i), int(self.targets[i])

    def filename(self, i: int) -> str:
        return self.folder + os.fsdecode(self.names[i])
