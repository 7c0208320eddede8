"""Transforms of an image and its mask together, through torchvision's v2: what moves a pixel moves its class."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from vitlab.data.layouts import IGNORE

# of Segmenter (arXiv 2105.05633, section 4.1), which has them from mmsegmentation
SCALE, HFLIP, COLOR = (0.5, 2.0), 0.5, 0.5


def _fill(mean: Sequence[float]) -> dict[type, Any]:
    """What stands where there is no image: zero once it is normalised."""
    return {tv_tensors.Image: [255 * m for m in mean], tv_tensors.Mask: IGNORE}


class JointTransform:
    """(RGB image, mask (H, W) uint8 of class numbers) -> (image (3, h, w) float32, normalised, mask (h, w) int64).

    mean, std: per channel, of values in [0, 1]. steps: of torchvision's v2, on uint8 images, before the normalisation.
    scale: both sides are multiplied by one factor drawn from it first, the mask's pixels being the nearest; None: they
    stay. centre: height and width of what is cut out of the middle then, after the mean colour and ignored pixels have
    filled what is missing at the right and bottom; None: all.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], steps: Sequence[Any] = (), *,
                 scale: tuple[float, float] | None = None, centre: tuple[int, int] | None = None) -> None:
        self.scale, self.centre, self.fill = scale, centre, _fill(mean)
        kinds = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
        self.steps = v2.Compose([*steps, v2.ToDtype(kinds, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()])

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        pair = [v2.functional.to_image(image), tv_tensors.Mask(torch.from_numpy(mask))]
        if self.scale is not None:
            factor = float(torch.empty(()).uniform_(*self.scale))
            size = [max(1, round(side * factor)) for side in mask.shape]
            pair = [v2.functional.resize(each, size) for each in pair]
        if self.centre is not None:
            missing = [max(0, wanted - side) for wanted, side in zip(self.centre, mask.shape)]
            pair = [v2.functional.pad(each, [0, 0, missing[1], missing[0]], fill=self.fill[type(each)])
                    for each in pair]
            pair = [v2.functional.center_crop(each, list(self.centre)) for each in pair]
        return self.steps(*pair)


def evaluation_transform(mean: Sequence[float], std: Sequence[float],
                         size: tuple[int, int] | None = None) -> JointTransform:
    """Normalisation alone: every image and mask stays at its own size, or, of one size for all, the middle of each."""
    return JointTransform(mean, std, centre=size)


def training_transform(size: tuple[int, int], mean: Sequence[float], std: Sequence[float], *,
                       scale: tuple[float, float] = SCALE, hflip: float = HFLIP,
                       color_jitter: float = COLOR) -> JointTransform:
    """Random resize, crop, flip and colour, drawn from torch's generator.

    size: height and width of the crop in pixels; around an image that is smaller, the mean colour and ignored pixels
    fill it. scale: range of the factor. hflip: chance of a flip, [0, 1]. color_jitter: strength of contrast and
    saturation, a quarter of it of brightness, a tenth of hue, [0, 1]; 0 is none.
    """
    jitter = [v2.ColorJitter(color_jitter / 4, color_jitter, color_jitter, color_jitter / 10)] if color_jitter else []
    crop = v2.RandomCrop(size, pad_if_needed=True, fill=_fill(mean))
    return JointTransform(mean, std, [crop, v2.RandomHorizontalFlip(hflip), *jitter], scale=scale)
