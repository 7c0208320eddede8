"""Masks, photographs and the pairs of them as they lie on the disk, checked as they are read."""
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vitlab.data.folder import read_image, reason
from vitlab.data.layouts import IGNORE, MOST_CLASSES, PASCAL_CONTEXT, PASCAL_CONTEXT_IDS
from vitlab.data.rgb import SIDEWAYS, rgb, turn_of
from vitlab.data.scene_data import Unreadable
from vitlab.runtime.files import InputError

MODES = ("L", "P", "1", "I", "I;16", "I;16B")   # Pillow's, of one number a pixel; of a palette, its index
UNKNOWN = MOST_CLASSES                          # stands for an id that the layout does not have
LARGEST_ID = 255
LOOKED_AT = 200                                 # masks by which it is told what 255 means
# Pillow's names of grey PNGs of 2 and 4 bits, whose ids it spreads over 0 to 255: by which factor
SPREAD = {"L;2": 85, "L;4": 17}
T = TypeVar("T")


def _read(path: Path, what: str, take: Callable[[Image.Image], T]) -> T:
    """take(the image). Raises Unreadable naming the file where it can't be read as what it should be."""
    try:
        return take(read_image(path))
    except Exception as error:                  # a damaged file makes Pillow's decoders raise nearly anything
        raise Unreadable(f"{path}: can't be read as {what} ({reason(path, error)})") from None


def _numbers(image: Image.Image) -> tuple[str, np.ndarray]:
    """(mode, ids) of a mask's image, turned."""
    factor = SPREAD.get(image.tile[0].args) if image.format == "PNG" else None  # Pillow forgets it when it has read
    ids = np.asarray(_turned(image))
    return image.mode, ids if factor is None else ids // factor


def _label_map(path: Path) -> np.ndarray:
    """(H, W) ids of PASCAL Context's 60 classes in a MATLAB file of its owners. Raises InputError naming it where it
    holds no such ids, Unreadable where it can't be read."""
    from scipy.io import loadmat  # takes a while, and others need none of it
    try:
        ids = loadmat(path, variable_names=("LabelMap",)).get("LabelMap")
    except Exception as error:                  # a damaged file raises whatever scipy comes to
        raise Unreadable(f"{path}: can't be read as a mask ({reason(path, error)})") from None
    if ids is None or ids.ndim != 2 or ids.dtype.kind not in "ui" or not ids.size:
        raise InputError(f"{path}: holds no LabelMap of whole numbers (height, width), as PASCAL Context's files do")
    if ids.min() < 0 or ids.max() >= PASCAL_CONTEXT_IDS:
        raise InputError(f"{path}: LabelMap holds ids from {ids.min()} to {ids.max()}; they are 0 to "
                         f"{PASCAL_CONTEXT_IDS - 1}")
    table = np.zeros(PASCAL_CONTEXT_IDS, dtype=np.uint8)
    table[list(PASCAL_CONTEXT)] = range(1, 1 + len(PASCAL_CONTEXT))
    return table[ids]


def read_mask(path: Path, table: np.ndarray) -> np.ndarray:
    """(H, W) uint8 class numbers of a mask file, turned by its own EXIF orientation where it has one. table (256): id
    -> class number, IGNORE, or UNKNOWN.

    Raises InputError naming the file where it has more than one number a pixel, or an id that is UNKNOWN, Unreadable
    where it can't be read.
    """
    mode, ids = ("L", _label_map(path)) if path.suffix == ".mat" else _read(path, "a mask", _numbers)
    if mode not in MODES:
        raise InputError(f"{path}: has {len(Image.new(mode, (1, 1)).getbands())} channels ({mode}); a mask has one "
                         f"number a pixel, the class's id")
    out = ids[(ids < 0) | (ids > LARGEST_ID)] if ids.dtype not in (np.uint8, np.bool_) else ids[:0]
    classes = table[ids.astype(np.uint8)]
    wrong = np.unique(out if len(out) else ids[classes == UNKNOWN]).astype(int).tolist()
    if wrong:
        known = np.flatnonzero(table != UNKNOWN)
        raise InputError(f"{path}: holds id {wrong[0]}"
                         + (f" and {len(wrong) - 1} more that are" if len(wrong) > 1 else ", which is")
                         + f" unknown; ids are {_ranges(known)}")
    return classes


def _ranges(ids: np.ndarray) -> str:
    """[0, 1, 2, 255] -> "0 to 2, 255"."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _turned(image: Image.Image) -> Image.Image:
    turn = turn_of(image)
    return image if turn is None else image.transpose(turn)


class MaskReader:
    """(RGB image, mask) pairs of files, both the right way up. ids: id in a mask -> class number or IGNORE. Where there
    is no mask (None) it is 0 throughout, and says nothing.

    A mask is of the photograph as it is shown, turned by its EXIF orientation; where its size is that of the photograph
    as it is stored and not of the one shown, it was drawn on that, and is turned along. Where both sizes are one (a
    square, or upside down) it is as the others of the split are.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path | None]], ids: dict[int, int]) -> None:
        self.pairs = pairs
        self.table = np.full(LARGEST_ID + 1, UNKNOWN, dtype=np.uint8)
        self.table[list(ids)] = list(ids.values())

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """Raises Unreadable naming a file that can't be read, InputError naming a mask that holds what it should not,
        or is of another size than its image."""
        image_path, mask_path = self.pairs[i]
        image, stored, turn = _read(image_path, "an image",
                                    lambda image: (rgb(image), image.size[::-1], turn_of(image)))
        if mask_path is None:
            return image, np.zeros((image.height, image.width), dtype=np.uint8)
        mask = read_mask(mask_path, self.table)
        along = turn is not None and mask.shape == stored
        if along and (stored != image.size[::-1] or self._drawn_as_stored and _header(mask_path)[1] is None):
            mask = np.array(Image.fromarray(mask).transpose(turn))
        if mask.shape != (image.height, image.width):
            raise InputError(f"{mask_path}: is {mask.shape[0]} x {mask.shape[1]}, its image {image_path} is "
                             f"{image.height} x {image.width}")
        return image, mask

    @functools.cached_property
    def _drawn_as_stored(self) -> bool:
        """Whether masks are of the photographs as stored: as the first is whose size tells; no, where none does."""
        for image_path, mask_path in self.pairs:
            try:
                (size, turn), (drawn, own) = _header(image_path), _header(mask_path)
            except Exception:                   # damaged: named when it is read in earnest
                continue
            if turn in SIDEWAYS and size[0] != size[1] and own is None:
                return drawn == size
        return False

    def filename(self, i: int) -> str:
        return str(self.pairs[i][0])


def _header(path: Path) -> tuple[tuple[int, int], Image.Transpose | None]:
    """(size as it is stored, its turn) of an image file."""
    with read_image(path) as image:
        return image.size, turn_of(image)


def is_binary(masks: list[Path]) -> bool:
    """Whether masks hold 0 and 255 alone, as black and white drawings do, both somewhere: told by LOOKED_AT of them,
    even over all; one that holds anything else says no at once."""
    seen = np.zeros(LARGEST_ID + 1, dtype=bool)
    for place in np.linspace(0, len(masks) - 1, min(LOOKED_AT, len(masks))).round().astype(int):
        try:
            _, ids = _read(masks[place], "a mask", _numbers)
        except Unreadable:                      # it is named when it is read in earnest
            continue
        if ids.dtype.kind not in "bui" or ids.ndim != 2 or ids.min() < 0 or ids.max() > LARGEST_ID:
            return False
        seen |= np.bincount(ids.astype(np.uint8).ravel(), minlength=LARGEST_ID + 1) > 0
        if seen[1:IGNORE].any():
            return False
    return bool(seen[0] and seen[IGNORE])
