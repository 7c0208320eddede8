"""Whatever Pillow opens, as 8-bit RGB and the right way up: the one place that says what a picture's numbers mean."""
import numpy as np
from PIL import ExifTags, Image

BACKGROUND = "white"                            # what is seen through a transparent pixel, as on a page
FULL_SCALES = (2**8 - 1, 2**12 - 1, 2**16 - 1, 2**24 - 1, 2**31 - 1, 2**32 - 1)         # of integers wider than 8 bits
FLOAT_SCALES = (1, *FULL_SCALES)
LONGEST = 100                                   # times its short side may a picture's long one be
SLACK = 0.1  # of the full scale, by which floats may leave it: what an interpolation overshoots by
STRETCHED = ("PPM", "JPEG2000")                 # formats whose grey values Pillow itself brings to 16 bits
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339            # tags of TIFF
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}

SIDEWAYS = tuple(TURNS[orientation] for orientation in (5, 6, 7, 8))  # by which height and width change places


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What brings a loaded image the right way up, by its EXIF orientation; None where it is so, or can't be read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    # damaged EXIF makes its reader raise nearly anything; the picture is whole
    except Exception:
        return None


def rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB, turned as its EXIF orientation says, without `info`; the given one is left as it is.

    Grey values of more than 8 bits go from [0, full scale] to [0, 255]. The full scale is what the file says (TIFF:
    fewer bits than 16; PGM and JPEG 2000: 16 bits), else the least of FULL_SCALES, of floats of FLOAT_SCALES, that
    holds the largest value: 16-bit files hold 12-bit pictures as well and do not say so. What is transparent shows
    BACKGROUND. CMYK, YCbCr, LAB and HSV are converted. Raises ValueError for values that are negative or not finite and
    for a strip (LONGEST), and whatever Pillow does where the file is damaged.
    """
    # of 30,000 x 1 a model would get the middle of 7,680,000 x 256
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels; the long side may be at most {LONGEST} times the "
                         f"short one")
    image.load()
    turn = turn_of(image)
    if image.mode == "F" or image.mode.startswith("I"):
        plain = _grey(image).convert("RGB")
    elif image.has_transparency_data:
        over = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        plain = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), over).convert("RGB")
    else:
        plain = image.convert("RGB")
    plain = plain if turn is None else plain.transpose(turn)
    plain.info = {}                             # it would be turned again else
    return plain


def grey(image: Image.Image) -> Image.Image:
    """`rgb` in mode L, for models of one channel."""
    return rgb(image).convert("L")


def _grey(image: Image.Image) -> Image.Image:
    """Mode L of an image with one number a pixel, wider than 8 bits."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(BITS_PER_SAMPLE) == (32,) and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)         # which Pillow reads as signed
    if not np.isfinite(values).all():
        raise ValueError("pixels that are no finite numbers")
    full = _full_scale(image, values, tags.get(BITS_PER_SAMPLE, (16,))[0])
    if values.min() < -SLACK * full:
        raise ValueError(f"pixels from {values.min()}; 0 is the least")
    scaled = values.astype(np.float64) * (255 / full)
    scaled = 255 - scaled if tags.get(PHOTOMETRIC) == 0 else scaled             # 0 is white
    levels = scaled.clip(0, 255).round().astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        levels[values == clear] = 255           # BACKGROUND
    return Image.fromarray(levels)


def _full_scale(image: Image.Image, values: np.ndarray, bits: int) -> int:
    if image.mode != "F" and (bits < 16 or image.format in STRETCHED):
        return 2**min(bits, 16) - 1
    scales, slack = (FLOAT_SCALES, SLACK) if image.mode == "F" else (FULL_SCALES, 0)
    return next((full for full in scales if values.max() <= full * (1 + slack)), scales[-1])
