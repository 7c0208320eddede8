"""What an image file is, and one walk over a folder of them, for class folders, scenes, tar files and pictures."""
import os
import re
from collections.abc import Iterator
from pathlib import Path

from timm.data.readers.img_extensions import set_img_extensions

from vitlab.runtime.files import InputError

# HEIC has no decoder in Pillow's own builds: such a file is an image that can't be read, and is named instead of passed
# over
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".heic", ".heif", ".bmp", ".gif", ".tif",
           ".tiff", ".jp2", ".j2k", ".pbm", ".pgm", ".ppm", ".pnm")
set_img_extensions(ENDINGS)                     # timm's readers pass over all but three else
# what systems leave in folders
NOTES = frozenset(("__macosx", "@eadir", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"))
DIGITS, NUMBER_AT_END = re.compile(r"(\d+)"), re.compile(r"\d+$")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's or a program's note, and no part of the data."""
    return name.startswith(".") or name.lower() in NOTES


def is_image(name: str) -> bool:
    """Whether a file of that name is an image."""
    return name.lower().endswith(ENDINGS) and not is_hidden(name)


def natural(name: str) -> tuple[list[int | str], str]:
    """A key that sorts 2 before 10, as timm does; names that differ in nothing else by their letters."""
    return [int(part) if place % 2 else part for place, part in enumerate(DIGITS.split(name.lower()))], name


def in_order(names: list[str]) -> list[str]:
    """Names in natural order; what all begin with, often half of each, is compared once."""
    same = len(NUMBER_AT_END.sub("", os.path.commonprefix(names)))
    return sorted(names, key=lambda name: natural(name[same:]))


def entries(folder: str | Path) -> tuple[list[str], list[str]]:
    """(names of the images, names of the folders) in a folder; hidden ones are left out."""
    images, folders = [], []
    with os.scandir(folder) as found:
        for entry in found:
            if is_hidden(entry.name):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(ENDINGS):
                images.append(entry.name)
    return images, folders


def images_below(folder: str | Path, inside: str = "", listed: list[str] | None = None) -> Iterator[str]:
    """The images below folder/inside, however deep, as paths from `folder`, in natural order of each part of the path.

    listed: gathers the folders that were gone through, as paths from `folder`. Raises InputError naming a link that
    leads back to a folder it lies in, below which images would be found again and again.
    """
    place, above = os.path.join(folder, inside), os.path.join(inside, "")
    images, folders = entries(place)
    if listed is not None:
        listed.append(inside)
    below = set(folders)
    for name in in_order(images + folders):
        path = above + name
        if name not in below:
            yield path
            continue
        link = os.path.join(folder, path)
        if os.path.islink(link) and Path(place).resolve().is_relative_to(Path(link).resolve()):
            raise InputError(f"{link}: links back to {Path(link).resolve()}, in which it lies; remove the link")
        yield from images_below(folder, path, listed)


def images_in(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, by name."""
    return sorted(folder / name for name in entries(folder)[0])
