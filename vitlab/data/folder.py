"""An image folder, checked before anything runs: train/ and val/, validation/ or test/, one folder per class in each; or images
alone, without labels."""
import os
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.readers.img_extensions import add_img_extensions, get_img_extensions
from timm.utils.misc import natural_key
from torchvision.datasets.folder import make_dataset

from vitlab.files import InputError, read_json

TRAIN_NAMES, HELD_OUT_NAMES = ("train",), ("val", "validation", "test")
CLASS_MAP = "class_index.json"
add_img_extensions((".avif", ".bmp", ".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp"))      # timm's readers pass over them else
Image.init()
FORMATS = tuple(name for name in Image.ID if name != "EPS")     # PostScript is code, and Pillow would start a program that runs it


def read_image(source: Any) -> Image.Image:
    """An image from a path, or from an open file. Raises whatever Pillow does, and OSError for a pipe or a device of that name."""
    if isinstance(source, (str, Path)) and not os.path.isfile(source):
        raise OSError(f"{source}: no file")
    return Image.open(source, formats=FORMATS)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in get_img_extensions(as_set=True) and path.is_file()


def images_in(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, by name."""
    return sorted(path for path in folder.iterdir() if is_image(path) and not path.name.startswith("."))


def unlabelled(root: Path) -> Path | None:
    """The folder whose images have no labels: root/train/ where it is the only split, or else root itself, where images lie in
    it directly and no class folders; None where there is none."""
    splits = tuple(name for name in TRAIN_NAMES + HELD_OUT_NAMES if (root / name).is_dir())
    folder = {(): root, TRAIN_NAMES: root / TRAIN_NAMES[0]}.get(splits)
    found = [] if folder is None or not folder.is_dir() else [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return folder if any(map(is_image, found)) and not any(map(Path.is_dir, found)) else None


def find_splits(root: Path) -> dict[str, Path]:
    """{"train": folder, held-out name: folder}, those that exist. Raises InputError where there is none."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give 'digits', or a folder that holds train/ and val/, validation/ or test/")
    splits = {name: root / name for name in TRAIN_NAMES + HELD_OUT_NAMES if (root / name).is_dir()}
    if not splits:
        raise InputError(f"{root}: holds none of train/, val/, validation/, test/; put one folder per class in each, or give a "
                         "folder of images alone where labels are not needed")
    return splits


def class_folders(split: Path) -> list[str]:
    """Names of the class folders, sorted. Raises InputError naming a folder without images, or a split without folders."""
    names = sorted(d.name for d in split.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise InputError(f"{split}: holds no class folders; images must lie in {split.name}/CLASS/")
    for name in names:
        if not any(map(is_image, (split / name).rglob("*"))):
            raise InputError(f"{split / name}: a class folder without images ({', '.join(sorted(get_img_extensions(as_set=True)))})")
        _check_links(split / name)
    return names


def _check_links(folder: Path) -> None:
    """InputError naming a link that leads back to a folder it lies in, below which images would be found again and again."""
    for place, folders, _ in os.walk(folder, followlinks=True):
        for link in (Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))):
            if Path(place).resolve().is_relative_to(link.resolve()):
                raise InputError(f"{link}: links back to {link.resolve()}, in which it lies; remove the link")


def read_class_map(path: Path) -> dict[str, int]:
    """{class folder name: the model's class number} from a class_index.json; checked."""
    data = read_json(path)
    if not isinstance(data, dict) or not data or not all(
            isinstance(k, str) and isinstance(v, int) and not isinstance(v, bool) and v >= 0 for k, v in data.items()):
        raise InputError(f"{path}: must be an object of class folder names and class numbers from 0")
    if len(set(data.values())) != len(data):
        raise InputError(f"{path}: two classes have the same number")
    return data


def class_numbers(root: Path, splits: dict[str, Path], class_map: str | Path | None) -> dict[str, int]:
    """Class name to number, for all splits alike: from the class map (given, or root/class_index.json), else by order.

    Raises InputError where the splits hold different classes, or a folder is not in the class map.
    """
    folders = {name: class_folders(path) for name, path in splits.items()}
    path = Path(class_map) if class_map else root / CLASS_MAP
    if class_map or path.exists():
        numbers = read_class_map(path)
        for name, classes in folders.items():
            unknown = sorted(set(classes) - set(numbers))
            if unknown:
                raise InputError(f"{splits[name] / unknown[0]}: not in the class map {path}"
                                 + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""))
        return numbers
    first, *others = folders.items()
    for name, classes in others:
        odd = sorted(set(classes) ^ set(first[1]))
        if odd:
            raise InputError(f"{root}: {first[0]}/ and {name}/ hold different classes ({odd[0]!r} is in one of them only); "
                             f"a {CLASS_MAP} would say which number each has")
    return {name: number for number, name in enumerate(first[1])}


class FolderReader:
    """Indexable (path, class) pairs of one split; every image below a class folder, however deep, is of that class. Without
    class numbers, of the images in the folder itself, all of class 0."""

    def __init__(self, split: Path, numbers: dict[str, int] | None) -> None:
        if numbers is None:
            found = [(str(path), 0) for path in split.iterdir() if is_image(path)]
        else:
            found = make_dataset(str(split), numbers, extensions=tuple(get_img_extensions()), allow_empty=True)
        self.samples = sorted((sample for sample in found if not os.path.basename(sample[0]).startswith(".")),
                              key=lambda sample: natural_key(sample[0]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[str, int]:
        return self.samples[i]

    def filename(self, i: int) -> str:
        return self.samples[i][0]
