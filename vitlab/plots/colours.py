"""A colour for each class of a segmentation, told apart by people with any colour vision; and masks in these colours.

Each colour is the one farthest from all before it (farthest-point sampling) in CIELAB (CIE 1976). How far is the
geometric mean of the distance seen with normal colour vision and of the least among that and those seen with protanopia
and deuteranopia, simulated as by Vienot, Brettel and Mollon (Color Research & Application 24(4), 1999). The least alone
would make all colours blue or yellow.
"""
import functools
from typing import Any

import numpy as np

from vitlab.plan.shape import is_int
from vitlab.runtime.files import InputError, require

IGNORE = 255  # class of pixels that count for nothing; the data sets' own, on a floor of equal height
GREY = 0.62                                     # of ignored pixels
MOST = 255                                      # classes that a mask of bytes can hold beside the ignored one
LIGHTNESS, CHROMA = (30, 90), (28, 80)          # CIELAB's L* and chroma that colours have: none is black, white or grey
STEPS = 24                                      # values of each of red, green and blue that are candidates

TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],  # IEC 61966
                   [0.0193339, 0.1191920, 0.9503041]])
# Linear red, green and blue of what is seen without the long (protanopia) or the medium cones (deuteranopia): the
# matrices of
# Vienot et al. to cones, of what cones are missing, and back, multiplied.
WITHOUT = (np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
           np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]))


def linear(colours: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in [0, 1] as light, in [0, 1] too."""
    return np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB (..., 3) of linear red, green and blue (..., 3), white being D65."""
    xyz = light @ TO_XYZ.T / TO_XYZ.sum(axis=1)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(np.maximum(xyz, 0)), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])],
                    axis=-1)


def seen(colours: np.ndarray) -> np.ndarray:
    """(3, K, 3) CIELAB of sRGB colours (K, 3), as they look with normal vision, protanopia and deuteranopia."""
    light = linear(colours)
    return np.stack([lab(light), *(lab((light @ each.T).clip(0, 1)) for each in WITHOUT)])


@functools.lru_cache(maxsize=1)
def _all_colours() -> np.ndarray:
    """(MOST, 3), the first K of which are those of K classes."""
    side = np.linspace(0, 1, STEPS)
    colours = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, *ab = lab(linear(colours)).T
    chroma = np.hypot(*ab)
    colours = colours[(lightness >= LIGHTNESS[0]) & (lightness <= LIGHTNESS[1]) & (chroma >= CHROMA[0])
                      & (chroma <= CHROMA[1])]
    places, found = seen(colours), []                           # (3, candidates, 3)

    def far(colour: np.ndarray) -> np.ndarray:
        """Of each candidate from a colour (3)."""
        distances = np.linalg.norm(places - seen(colour[None]), axis=-1)
        return np.sqrt(distances[0] * distances.min(axis=0))
    least = far(np.full(3, GREY))                               # from ignored pixels
    for _ in range(MOST):
        found.append(int(least.argmax()))
        least = np.minimum(least, far(colours[found[-1]]))
    return colours[found]


def class_colours(num_classes: int) -> np.ndarray:
    """(K, 3) sRGB in [0, 1], one a class, of 1 to 255; the same in every run, whatever classes come after them."""
    require(is_int(num_classes) and 1 <= num_classes <= MOST, f"num_classes is {num_classes!r}; an integer from 1 to "
                                                              f"{MOST} is needed")
    return _all_colours()[:num_classes].copy()


def check_mask(mask: Any, num_classes: int, what: str) -> np.ndarray:
    """A mask as integers (H, W). InputError that begins with `what` for another kind, or a class out of range."""
    mask = np.asarray(mask)
    require(mask.ndim == 2 and mask.dtype.kind in "iu", f"{what}: {mask.dtype} of {mask.shape}; integers (H, W) are "
                                                        f"needed")
    wrong = (mask != IGNORE) & ((mask < 0) | (mask >= num_classes))
    if wrong.any():
        raise InputError(f"{what}: holds class {int(mask[wrong][0])}; 0 to {num_classes - 1} and {IGNORE} are known")
    return mask.astype(np.int64)


def coloured(mask: Any, colours: np.ndarray) -> np.ndarray:
    """(H, W, 3) in [0, 1] of a mask (H, W): each class in its colour (K, 3), ignored pixels grey."""
    mask = check_mask(mask, len(colours), "a mask")
    table = np.concatenate([colours, [[GREY] * 3]])
    return table[np.where(mask == IGNORE, len(colours), mask)]


def overlaid(image: np.ndarray, mask: Any, colours: np.ndarray, opacity: float) -> np.ndarray:
    """An image (H, W, 3) in [0, 1] under a mask (H, W): (1 - opacity) image + opacity `coloured`, opacity in [0, 1]."""
    require(0 <= opacity <= 1, f"opacity is {opacity}; it must lie in [0, 1]")
    cover = coloured(mask, colours)
    require(image.shape == cover.shape, f"the image is {image.shape}, its mask {cover.shape[:2]}")
    return (1 - opacity) * image + opacity * cover
