"""The embedded scenes: scikit-learn's digits scattered over textured backgrounds, with exact masks; need no download.

Class 0 is the background, class d + 1 the strokes of digit d. Everything in a scene follows from its split and number. Digits of a
split are in no other: those of the digits' training part make `train`, the held-out ones `val` and `test`.
"""
import numpy as np
from PIL import Image

from vitlab.data.digits import CLASSES as DIGITS
from vitlab.data.digits import DigitsReader
from vitlab.data.scene_data import SceneData, Scenes

NAME, SIZE = "digit_scenes", (48, 72)           # height and width in pixels
COUNTS = {"train": 400, "val": 100, "test": 100}
CLASSES = ("background", *DIGITS)
CELL, FILLED = 24, 0.9
SIDE = (20, 24)                                 # of a digit's square in pixels, least and most
TRIES = 40                                      # places that are tried for digits; one that overlaps another is left out
STROKE = 0.3                                    # least share of full ink that is stroke
GROUND, CONTRAST = (30, 120), (90, 130)         # background's mean colour, and by how much digits are brighter, in each channel, of 255
SEED = 0


def background(chance: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float: a colour with patches of other brightness, stripes and grain on it; [0, 255]."""
    height, width = SIZE
    coarse = Image.fromarray(chance.normal(size=(5, 7)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    y, x = np.mgrid[:height, :width]
    angle, period = chance.uniform(0, np.pi), chance.uniform(5, 14)             # period in pixels
    stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + chance.uniform(0, 2 * np.pi))
    texture = 14 * np.asarray(coarse) + chance.uniform(0, 12) * stripes
    return np.clip(chance.uniform(*GROUND, size=3) + texture[..., None] + chance.normal(scale=6, size=(height, width, 3)), 0, 255)


def stroke(digit: np.ndarray, side: int) -> np.ndarray:
    """(8, 8) uint8 ink -> (side, side) bool, the pixels of the digit."""
    grown = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(grown) >= STROKE * 255


def make_scene(digits: np.ndarray, labels: np.ndarray, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(image (H, W, 3) uint8, mask (H, W) uint8) with some of the digits (n, 8, 8), at least one, none over another."""
    image, mask = background(chance), np.zeros(SIZE, dtype=np.uint8)
    ground = image.mean(axis=(0, 1))
    rows, columns = SIZE[0] // CELL, SIZE[1] // CELL
    filled = chance.random(rows * columns) < FILLED
    filled[chance.integers(len(filled))] = True
    for cell in filled.nonzero()[0]:
        which, side = int(chance.integers(len(labels))), int(chance.integers(SIDE[0], SIDE[1] + 1))
        top, left = (CELL * int(at) + int(chance.integers(CELL - side + 1)) for at in divmod(cell, columns))
        place, ink = (slice(top, top + side), slice(left, left + side)), stroke(digits[which], side)
        mask[place][ink] = 1 + labels[which]
        image[place][ink] = (ground + chance.uniform(*CONTRAST, size=3) + chance.normal(scale=6, size=(side, side, 3)))[ink]
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
        image, mask = make_scene(self.digits, self.labels, np.random.default_rng([SEED, list(COUNTS).index(self.split), i]))
        return Image.fromarray(image), mask

    def filename(self, i: int) -> str:
        return f"{NAME}/{self.split}/{i}"


def digit_scenes() -> SceneData:
    """400 scenes to train on, 100 to choose on, 100 to report on; 64 x 96 pixels, 11 classes."""
    return SceneData(NAME, {split: Scenes(DigitScenesReader(split)) for split in COUNTS}, list(CLASSES), embedded=True)
