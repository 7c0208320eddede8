"""open_data: one way to digits, a folder of images, tar files, or whatever timm.data.create_dataset opens."""
from collections.abc import Callable
from pathlib import Path

from vitlab.data.digits import CLASSES, DigitsReader
from vitlab.data.folder import FolderReader, check_classes, class_numbers, find_splits, splits_in
from vitlab.data.groups import Groups, groups_of
from vitlab.data.image_data import ImageData
from vitlab.data.images import Images
from vitlab.data.listing import entries
from vitlab.data.streams import open_timm
from vitlab.data.tar import TarReader, find_tars, read_tar
from vitlab.runtime.files import from_root, require
from vitlab.runtime.kinds import SPLITS, TIMM_PREFIXES

DATA_SETS: dict[str, Callable[[], ImageData]] = {
    "digits": lambda: ImageData("digits", {name: Images(DigitsReader(name)) for name in ("train", "test")},
                                list(CLASSES), len(CLASSES))}


def open_data(data: str | Path, *, class_map: str | Path | None = None) -> ImageData:
    """Open a data set: a name of DATA_SETS ("digits"), a folder of images, or a timm data set name such as "hfds/NAME".

    hfds/NAME (or a local folder that Hugging Face's datasets wrote or open), hfids/NAME, tfds/NAME and torch/NAME name
    the folder of their files after an @, as in torch/cifar10@FOLDER; wds/FOLDER is a folder of WebDataset shards with
    an _info.json. In place of each of its folders below a split may be a tar file of class folders.

    A folder holds train/ and val/, validation/ or test/, each with one folder per class. Class numbers follow the
    natural order of the names (2 before 10), as in timm, or class_map (`read_class_map`; default: class_index.json in
    the folder) where it holds only some of a model's classes. A folder without splits is a tree of images without
    labels, and so is a train/ alone that holds images and no folders: it has no other split than train.
    Raises InputError naming the folder: missing, no split, an empty class, classes that differ between splits.
    """
    if str(data) in DATA_SETS:
        require(class_map is None, f"{data} takes no class map: its classes are fixed")
        return DATA_SETS[str(data)]()
    if str(data).startswith(("torch/image_folder@", "torch/folder@")):
        data = str(data).partition("@")[2]                      # numbered as any folder
    if str(data).startswith(TIMM_PREFIXES):
        return open_timm(str(data), class_map)
    require(str(data), "no data set is named; give 'digits' or a folder of images")
    folder = from_root(data)
    tars = find_tars(folder)
    if tars:
        members = {name: read_tar(path) for name, path in tars.items()}
        beside = folder.parent if folder.is_file() else folder
        numbers, mapped = class_numbers(beside, {f"{name}.tar": found for name, found in members.items()}, class_map)
        readers = {name: TarReader(path, members[name], numbers) for name, path in tars.items()}
        return _labelled(folder, readers, numbers, mapped)
    paths = find_splits(folder)
    groups = {name: groups_of(path) for name, path in (paths or {"train": folder}).items()}
    if set(paths) <= {"train"} and (not paths or list(groups["train"]) == [""]):
        return _unlabelled(folder, paths.get("train", folder), groups["train"], class_map)
    for name, path in paths.items():
        check_classes(path, groups[name])
        groups[name].pop("", None)
    numbers, mapped = class_numbers(folder, {f"{name}/": found for name, found in groups.items()}, class_map)
    return _labelled(folder, {name: FolderReader(path, groups[name], numbers) for name, path in paths.items()}, numbers,
                     mapped)


def _labelled(folder: Path, readers: dict, numbers: dict[str, int], mapped: bool) -> ImageData:
    splits = {name: Images(reader) for name, reader in readers.items()}
    return ImageData(folder.resolve().name, splits, sorted(numbers, key=numbers.__getitem__), max(numbers.values()) + 1,
                     mapped)


def _unlabelled(folder: Path, split: Path, groups: Groups, class_map: str | Path | None) -> ImageData:
    """Images without labels. Raises InputError where there is none, or for a class map."""
    require(any(map(len, groups.values())), f"{folder}: holds none of {', '.join(f'{name}/' for name in SPLITS)}; put "
            "one folder per class in each, or give a folder of images alone where labels are not needed")
    require(class_map is None, f"{split}: images without class folders; a class map says nothing of them")
    others = folder.parent, *(folder / name for name in entries(folder)[1] if split == folder)
    right = next(filter(splits_in, others), None)
    hint = (f"{right} holds {' and '.join(splits_in(right))}: give that folder" if right else
            f"it holds none of {', '.join(f'{name}/' for name in SPLITS)}" if split == folder else None)
    return ImageData(folder.resolve().name, {"train": Images(FolderReader(split, groups, None))}, None, None,
                     labelled=False, hint=hint)
