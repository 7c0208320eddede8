"""The embedded data set: scikit-learn's 1,797 scanned digits, 8 x 8, grown to 32 x 32 RGB; needs no download.

Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits" test set, shipped with scikit-learn.
"""
import functools

import numpy as np
from PIL import Image

SIZE, HELD_OUT, SPLIT_SEED = 32, 360, 0
CLASSES = tuple(str(d) for d in range(10))


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(images, classes, numbers of those in each split)."""
    from sklearn.datasets import load_digits  # here, as it takes a fifth of the time in which a command begins
    from sklearn.model_selection import train_test_split
    bunch = load_digits()
    train, test = train_test_split(np.arange(len(bunch.target)), test_size=HELD_OUT, random_state=SPLIT_SEED,
                                   stratify=bunch.target)
    # pixel values are 0 to 16
    return (bunch.images * 255 / 16).round().astype(np.uint8), bunch.target, {"train": train, "test": test}


class DigitsReader:
    """Indexable (PIL image, class) pairs of one split; the split is fixed and stratified by class."""

    def __init__(self, split: str) -> None:
        self.images, self.targets, numbers = _digits()
        self.index = numbers[split]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[self.index[i]]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return image.convert("RGB"), int(self.targets[self.index[i]])

    def filename(self, i: int) -> str:
        return f"digits/{self.index[i]}"
