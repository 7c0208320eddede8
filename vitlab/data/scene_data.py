"""Splits of images with masks, and their batches: what Images, Batches and ImageData are for classes."""
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from vitlab.data.image_data import ImageData
from vitlab.data.images import Batches, Images, image_config
from vitlab.data.joint import JointTransform, evaluation_transform, training_transform
from vitlab.data.loading import load, received
from vitlab.data.order import Shuffled, drawing
from vitlab.runtime.files import InputError, require

AT_ONCE = 8                                     # images of a batch that is only measured
MILD = {"scale": (0.75, 1.5), "color_jitter": 0.0}
# what can be done to an image and its mask together, of a recipe's `augment`
AUGMENT = ("scale", "hflip", "color_jitter")
CHOOSE_ON = ("val", "validation")


class Unreadable(InputError):
    """A file that can't be read: one among many may be left out."""


class Scenes(Images):
    """A split, or a slice of one, of a reader that gives (RGB image, mask (H, W) uint8 of class numbers and 255); a key
    may carry what its random numbers follow from, as that of Images."""

    def scene(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """(RGB image, mask (H, W) uint8), untransformed. Raises InputError naming a file that is wrong, Unreadable one
        that can't be read."""
        return self.reader[self.indices[i]]

    def fault(self, i: int) -> str:
        """As of any images; it may be the mask."""
        try:
            self.scene(i)
        except Unreadable as error:
            return str(error)
        return f"{self.path(i)}: could not be read at first"

    def __getitem__(self, key: int | tuple[int, tuple[int, ...]]) -> tuple[Tensor, Tensor] | int | InputError:
        """(image, mask), transformed; or the scene's number where a file of it can't be read. What is wrong is given,
        not raised: it has to leave a loader's process as it is."""
        i, numbers = key if isinstance(key, tuple) else (key, None)
        try:
            image, mask = self.scene(i)
        except Unreadable:
            return i
        except InputError as error:
            return error
        with drawing(numbers):
            return self.transform(image, mask)


def _collate(samples: list[Any]) -> tuple[Any, list[int]] | InputError:
    """(batch (None where it is empty), numbers of the scenes that could not be read); or the first thing that was wrong
    in it."""
    wrong = next((sample for sample in samples if isinstance(sample, InputError)), None)
    if wrong is not None:
        return wrong
    whole = [sample for sample in samples if not isinstance(sample, int)]
    sizes = sorted({tuple(mask.shape) for _, mask in whole})
    if len(sizes) > 1:
        return InputError(f"images of {' and '.join(f'{h} x {w}' for h, w in sizes[:2])} in one batch; images that "
                          "differ in size are evaluated in batches of 1")
    return default_collate(whole) if whole else None, [sample for sample in samples if isinstance(sample, int)]


class SceneBatches(Batches):
    """Iterate (images (B, 3, H, W), masks (B, H, W) int64), without scenes of which a file can't be read, as `Batches`
    does without broken images. Raises InputError naming the first file that holds what it should not: it is of another
    data set, or in another form, than was said."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for found in received(self.loader):
            if isinstance(found, InputError):
                raise found
            batch, broken = found
            self._left_out(broken, len(broken) + (0 if batch is None else len(batch[1])))
            if batch is not None:
                yield batch[0], batch[1]


def _config(model: nn.Module) -> dict[str, Any]:
    """`image_config` of a Segmenter's encoder. Raises InputError where it does not take colours."""
    config = image_config(model.encoder)
    if config["input_size"][0] != 3:
        raise InputError(f"the Segmenter takes images of {config['input_size'][0]} channel; scenes have 3")
    return config


def measuring_transform(model: nn.Module, whole: bool = False) -> JointTransform:
    """Normalisation alone, with a Segmenter's mean and deviation: the middle at its encoder's size, or, with `whole`,
    each at its own."""
    config = _config(model)
    return evaluation_transform(config["mean"], config["std"], None if whole else model.img_size)


class SceneData(ImageData):
    """Named splits of images with masks: `train`, one to choose on (`val`) and one to report on (`test`, or else
    `val`). Where it is not `labelled`, masks are 0 and say nothing, and it has no classes."""

    logged, mild, report_on = 50, MILD, ("test", "val", "validation")

    def __init__(self, name: str, splits: dict[str, Scenes], classes: list[str] | None, embedded: bool = False,
                 labelled: bool = True) -> None:
        super().__init__(name, splits, classes, len(classes) if classes else None, labelled=labelled)
        self.embedded = embedded

    def split(self, name: str, limit: int | None = None, seed: int = 0) -> Scenes:
        """As of any data set, and of scenes."""
        return cast(Scenes, super().split(name, limit, seed))

    def need_labels(self) -> "SceneData":
        """The data set itself. Raises InputError where its images have no masks."""
        require(self.labelled, f"{self.name}: images without masks, which this step needs; train/images/ and "
                "train/masks/, the same of val and test, and classes.txt have them")
        return self

    @property
    def choose_on(self) -> str:
        """Name of the split to choose on. Raises InputError where there is none."""
        return self._first(CHOOSE_ON, "split to choose on")

    def at_once(self, images: int) -> int:
        """A few: logits of all their pixels are large."""
        return min(images, AT_ONCE)

    def check_fits(self, num_classes: int) -> None:
        """InputError where the decoder has another number of classes."""
        if self.num_classes not in (None, num_classes):
            raise InputError(f"{self.name}: {self.num_classes} classes, but the model's decoder has {num_classes}")

    def batches(self, split: str, model: nn.Module, *, batch_size: int = AT_ONCE, training: Shuffled | None = None,
                limit: int | None = None, seed: int = 0, workers: int | None = None, whole: bool = False,
                crop_pct: float | None = None, shared: bool = False) -> SceneBatches:
        """As of any data set, for a Segmenter (its encoder's mean and deviation, and its size of images).

        training crops and augments (`training_transform`, with AUGMENT alone). Without it images are normalised alone:
        the middle of each, or, with `whole`, each at its own size, and a batch takes only images of one size. Raises
        InputError for a crop_pct, as scenes are not resized.
        """
        require(crop_pct is None, f"{self.name}: crop_pct is {crop_pct}, but scenes are taken as they are, not resized "
                "and cropped")
        self.check_fits(model.num_classes)
        images = self.split(split, limit, seed)
        if training is None:
            images.transform = measuring_transform(model, whole)
        else:
            odd, config = sorted(set(training.augment) - set(AUGMENT)), _config(model)
            if odd:
                raise InputError(f"{self.name}: augmentation {odd[0]!r} can't be done to an image and its mask; "
                                 f"{', '.join(AUGMENT)} can")
            images.transform = training_transform(model.img_size, config["mean"], config["std"], **training.augment)
        loader, order = load(images, batch_size, training=training, seed=seed, workers=workers, shared=shared,
                             embedded=self.embedded, collate=_collate)
        return SceneBatches(loader, images, order)
