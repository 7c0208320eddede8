"""Sliding windows at inference: every pixel in at least one window, what overlaps averaged; several scales, and flips.

*Segmenter* (arXiv 2105.05633, section 4.1), which has it from earlier work. B images, K classes.
"""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlab.models.segmenter import pad
from vitlab.runtime.files import InputError

Model = Callable[[Tensor], Tensor]              # images (B, C, h, w) -> logits (B, K, h, w)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every stride pixels, the last at the end. 1 <= stride <= window <= length."""
    return [*range(0, length - window, stride), length - window]


def windows(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> list[tuple[int, int]]:
    """(top, left) of each window of an image; together they cover every pixel. All are heights and widths in pixels.

    Raises InputError where the window is larger than the image, or the stride leaves gaps.
    """
    if any(not 1 <= w <= side for w, side in zip(window, size)):
        raise InputError(f"a window of {window[0]} x {window[1]} in an image of {size[0]} x {size[1]}; each side must "
                         f"lie in [1, {size[0]}] and [1, {size[1]}]")
    if any(not 1 <= s <= w for s, w in zip(stride, window)):
        raise InputError(f"a stride of {stride[0]} x {stride[1]} for windows of {window[0]} x {window[1]}; to cover "
                         f"every pixel it must lie in [1, {window[0]}] and [1, {window[1]}]")
    return [(top, left) for top in starts(size[0], window[0], stride[0])
            for left in starts(size[1], window[1], stride[1])]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def slide(model: Model, images: Tensor, *, window: int | tuple[int, int], stride: int | tuple[int, int] | None = None,
          batch_size: int = 8) -> Tensor:
    """Logits (B, K, H, W) of images (B, C, H, W): in each pixel the mean over the windows that hold it.

    stride None: the window, no more overlap than the last ones need. An image smaller than the window is padded with
    zeros at the right and bottom, as the model pads it. batch_size windows at a time. Raises InputError as `windows`
    does.
    """
    height, width = images.shape[2:]
    window = _pair(window)
    stride = window if stride is None else _pair(stride)
    images = pad(images, (max(window[0], height), max(window[1], width)))
    places = windows(tuple(images.shape[2:]), window, stride)
    parts = [(b, top, left) for b in range(len(images)) for top, left in places]
    total = counts = None
    for first in range(0, len(parts), batch_size):
        some = parts[first:first + batch_size]
        logits = model(torch.stack([images[b, :, top:top + window[0], left:left + window[1]] for b, top, left in some]))
        if total is None:
            exact = torch.promote_types(logits.dtype, torch.float32)  # sums of many windows, under autocast too
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:], dtype=exact)
            counts = logits.new_zeros(len(images), 1, *images.shape[2:], dtype=exact)
        for (b, top, left), given in zip(some, logits):
            inside = (b, slice(None), slice(top, top + window[0]), slice(left, left + window[1]))
            total[inside] += given
            counts[inside] += 1
    return (total / counts)[:, :, :height, :width]


def segment(model: Model, images: Tensor, *, window: int | tuple[int, int] | None = None,
            stride: int | tuple[int, int] | None = None, scales: Sequence[float] = (1.0,), flip: bool = False,
            batch_size: int = 8) -> Tensor:
    """Class probabilities (B, K, H, W) of images (B, C, H, W), the mean over views; argmax over K is the prediction.

    A view is the images at one scale of `scales` (factors > 0), as they are or, with flip, turned left to right too;
    its logits are resized and turned back before their softmax. window None: model.img_size. Raises InputError for no
    scale, one that is not positive, or as `windows` does.
    """
    if not scales or min(scales) <= 0:
        raise InputError(f"scales are {list(scales)}; at least one factor is needed, and all must be positive")
    size = tuple(images.shape[2:])
    window = model.img_size if window is None else window
    total = 0
    for scale in scales:
        scaled = tuple(max(1, round(side * scale)) for side in size)
        view = images if scaled == size else F.interpolate(images, size=scaled, mode="bilinear")
        for turned in (False, True)[:1 + flip]:
            logits = slide(model, view.flip(3) if turned else view, window=window, stride=stride, batch_size=batch_size)
            logits = logits.flip(3) if turned else logits
            logits = logits if scaled == size else F.interpolate(logits, size=size, mode="bilinear")
            total = total + logits.softmax(dim=1)
    return total / (len(scales) * (1 + flip))
