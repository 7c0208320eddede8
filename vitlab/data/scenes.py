"""The embedded scenes: scikit-learn's digits scattered over textured backgrounds, with exact masks; need no download.

Class 0 is the background, class d + 1 the strokes of digit d. A scene is a grid of cells, each with one digit or none,
of side SIDE at any place in it; `train` has scenes of one cell, the encoder's own 32 x 32, so that weights from the
digits fit as they are, and the others are segmented by windows of a cell. Everything in a scene follows from its split
and number. Digits of a split are in no other: those of the digits' training part make `train`, the held-out ones `val`
and `test`.
"""
import numpy as np
from PIL import Image

from vitlab.data.digits import CLASSES as DIGITS
from vitlab.data.digits import DigitsReader
from vitlab.data.scene_data import SceneData, Scenes

NAME = "digit_scenes"
CELL = 32  # pixels: vit_nano's image; digits weights stretched to a larger one gain little
SIZES = {"train": (CELL, CELL), "val": (2 * CELL, 3 * CELL), "test": (2 * CELL, 3 * CELL)}  # height and width in pixels
COUNTS = {"train": 2000, "val": 100, "test": 100}  # 2,000: a cell holds one digit, where a scene held several
CLASSES = ("background", *DIGITS)
SIDE = (26, 32)  # of a digit's square in pixels, least and most: a stroke spans a patch of 4
FILLED = 0.9  # chance of a digit in a cell of `val` and `test`: several digits a scene, some cells empty
STROKE = 0.4  # least share of full ink that is stroke: at 0.3 more holes of 6, 8 and 9 close
FAINT = 0.4  # brightness of no ink, as a share of full ink's: scanned grey levels stay visible
GRAIN = 6                                       # standard deviation of each pixel's noise, of 255
# background's mean colour, and by how much full ink is brighter, in each channel, of 255
GROUND, CONTRAST = (30, 120), (110, 140)
SEED = 0


def background(chance: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(*size, 3) float: a colour with patches of other brightness, stripes and grain on it; [0, 255]."""
    height, width = size
    coarse = Image.fromarray(chance.normal(size=(5, 7)).astype(np.float32)).resize((width, height),
                                                                                   Image.Resampling.BICUBIC)
    y, x = np.mgrid[:height, :width]
    angle, period = chance.uniform(0, np.pi), chance.uniform(5, 14)             # period in pixels
    stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + chance.uniform(0, 2 * np.pi))
    texture = 14 * np.asarray(coarse) + chance.uniform(0, 12) * stripes
    return np.clip(chance.uniform(*GROUND, size=3) + texture[..., None]
                   + chance.normal(scale=GRAIN, size=(height, width, 3)), 0, 255)


def ink(digit: np.ndarray, side: int) -> np.ndarray:
    """(8, 8) uint8 -> (side, side) float, how much of full ink; [0, 1]."""
    return np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)) / 255


def make_scene(digits: np.ndarray, labels: np.ndarray, chance: np.random.Generator,
               size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(image (*size, 3) uint8, mask (*size) uint8) with some of the digits (n, 8, 8), one at least, apart."""
    image, mask = background(chance, size), np.zeros(size, dtype=np.uint8)
    ground, columns = image.mean(axis=(0, 1)), size[1] // CELL
    filled = chance.random(size[0] // CELL * columns) < FILLED
    filled[chance.integers(len(filled))] = True
    for cell in filled.nonzero()[0]:
        which, side = int(chance.integers(len(labels))), int(chance.integers(SIDE[0], SIDE[1] + 1))
        top, left = (CELL * int(at) + int(chance.integers(CELL - side + 1)) for at in divmod(cell, columns))
        place = (slice(top, top + side), slice(left, left + side))
        full = ink(digits[which], side)
        drawn = full >= STROKE
        brighter = (FAINT + (1 - FAINT) * full[..., None]) * chance.uniform(*CONTRAST, size=3)
        mask[place][drawn] = 1 + labels[which]
        image[place][drawn] = (ground + brighter + chance.normal(scale=GRAIN, size=(side, side, 3)))[drawn]
    return np.clip(image.round(), 0, 255).astype(np.uint8), mask


class DigitScenesReader:
    """Scenes of one split, each made as it is asked for."""

    def __init__(self, split: str) -> None:
        reader = DigitsReader("train" if split == "train" else "test")
        halves = {"train": slice(None), "val": slice(0, None, 2), "test": slice(1, None, 2)}
        index = reader.index[halves[split]]
        self.split, self.digits, self.labels = split, reader.images[index], reader.targets[index]

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        chance = np.random.default_rng([SEED, list(COUNTS).index(self.split), i])
        image, mask = make_scene(self.digits, self.labels, chance, SIZES[self.split])
        return Image.fromarray(image), mask

    def filename(self, i: int) -> str:
        return f"{NAME}/{self.split}/{i}"


def digit_scenes() -> SceneData:
    """2,000 scenes of 32 x 32 pixels to train on, 100 of 64 x 96 to choose on, 100 to report on; 11 classes."""
    return SceneData(NAME, {split: Scenes(DigitScenesReader(split)) for split in COUNTS}, list(CLASSES), embedded=True)
