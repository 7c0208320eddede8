"""The kinds of values that a step takes: ranges, lists and paths, checked and explained by the command line."""
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import CoercionError, Parameter

if TYPE_CHECKING:
    from typing import Union as Or
else:
    class Or:
        """Or[File, CompressionPlan]: one or the other in Python, the first on the command line."""

        def __class_getitem__(cls, kinds: tuple) -> Any:
            return kinds[0]


def flag(metavar: str, **options: Any) -> Parameter:
    """A flag, its value shown as `metavar`; cyclopts 4, the last for Python 3.10, shows the type."""
    return Parameter(**options, **({"metavar": metavar} if hasattr(Parameter, "metavar") else {}))


def _read(value: Callable[[str], Any], metavar: str, **options: Any) -> Parameter:
    """Of a value that is read from one word; a ValueError says what is wrong with it."""
    def convert(kind: Any, tokens: Sequence[Any]) -> Any:
        try:
            return value(tokens[0].value)
        except ValueError as error:
            raise CoercionError(msg=str(error), token=tokens[0], target_type=str) from None
    return flag(converter=convert, metavar=metavar, **options)


def _within(kind: type, low: float, high: float, what: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise ValueError(f"{text!r} is not {what}")
        return value
    return read


_rate = _within(float, 0, 1, "a fraction from 0 to 1")
Count = Annotated[int, _read(_within(int, 1, 10**9, "an integer of at least 1"), "N")]
Natural = Annotated[int, _read(_within(int, 0, 10**6, "an integer from 0"), "N")]
Several = Annotated[int, _read(_within(int, 2, 10**6, "an integer of at least 2"), "N")]
Seed = Annotated[int, _read(_within(int, 0, 2**31 - 1, "an integer from 0 to 2147483647"), "N")]
Workers = Annotated[int, _read(_within(int, 0, 256, "an integer from 0 to 256"), "N")]
Rate = Annotated[float, _read(_rate, "R")]                                      # what is kept, or drawn over an image
Ratio = Annotated[float, _read(_within(float, 0, 0.999, "a fraction from 0 to 0.999"), "R")]        # what is cut
MaxRatio = Annotated[float, _read(_within(float, 1e-3, 0.999, "a fraction from 0.001 to 0.999"), "R")]
Crop = Annotated[float, _read(_within(float, 0.1, 1, "a fraction from 0.1 to 1"), "R")]
Positive = Annotated[float, _read(_within(float, 1e-12, 1e9, "a positive number"), "X")]
Factor = Annotated[float, _read(_within(float, 1e-6, 1e3, "a number from 1e-6"), "F")]
Minutes = Annotated[float, _read(_within(float, 0, 1e6, "a number of minutes from 0"), "M")]
Pixels = tuple[Count, Count]                                                    # height and width
Dtype = Literal["float32", "bfloat16", "float16"]

TIMM_PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")                  # data that timm opens by name
HELD_OUT_NAMES = ("val", "validation", "test")                                  # of a folder's splits, beside train
SPLITS = ("train", *HELD_OUT_NAMES)
_Path = str | Path
File = Annotated[_Path, flag(metavar="FILE")]
Folder = Annotated[_Path, flag(metavar="FOLDER")]
Run = Annotated[_Path, flag(metavar="RUN", help="run folder; where it says so, a killed run goes on there")]
Data = Annotated[_Path, flag(metavar="DATA", help=(
    "'digits' (embedded), a folder with train/ and val/, validation/ or test/, or hfds/NAME, wds/NAME, ...; where "
    "labels are not needed, also a folder of images alone; a split may be a tar file. Of a Segmenter: 'digit_scenes' "
    "(embedded), or the folder of ADE20K, Cityscapes, PASCAL VOC or Context, CamVid, or of images and masks"))]
ClassMap = Annotated[_Path | None, flag(metavar="FILE", help=(
    "JSON of class folder: class number, or a text of one name a line [default: DATA/class_index.json]"))]
Gmacs = Annotated[Positive | None, Parameter(help="budget: 10^9 multiply-adds per image")]
MacsRatio = Annotated[Ratio | None, Parameter(help="budget: fraction of the dense model's multiply-adds")]


def _span(text: str) -> tuple[int, int, float]:
    match = re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6}):([0-9.e-]+)", text)
    if match is None:
        raise ValueError(f"{text!r} is not FIRST-LAST:RATE, as in 3-5:0.7,6-11:0.5")
    return int(match[1]), int(match[2]), _rate(match[3])


def _name(text: str) -> str:
    if not text:
        raise ValueError("an empty text names nothing")
    return text


def _list(value: Callable[[str], Any]) -> Callable[[str], tuple]:
    """Values with commas between them."""
    return lambda text: tuple(value(part.strip()) for part in text.split(","))


def _setting(text: str) -> str:
    if not text.partition("=")[0].strip() or "=" not in text:
        raise ValueError(f"{text!r} is not KEY=VALUE")
    return text


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


Spans = Annotated[Sequence[Sequence[float]], _read(_list(_span), "FIRST-LAST:RATE,...", accepts_keys=False)]
Names = Annotated[Sequence[str], _read(_list(_name), "LIST")]
Ratios = Annotated[Sequence[float], _read(_list(_within(float, 1e-3, 1, "a fraction from 0.001 to 1")), "LIST")]
Units = Annotated[Sequence[str], _read(lambda text: tuple(filter(lambda unit: unit not in ("", "none"),
                                                                 _list(str)(text))), "LIST")]
Setting = Annotated[str, _read(_setting, "KEY=VALUE")]
Words = Annotated[Sequence[str], _read(_words, "ARGS", allow_leading_hyphen=True)]
