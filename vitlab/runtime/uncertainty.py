"""How sure a number is that was measured on a few images: one standard error beside it, or an interval.

The images are taken as a random draw of those that the number stands for. A share of images: Agresti and Coull (The
American Statistician 52, 1998), whose interval is Wilson's in a simpler form. Other numbers: the bootstrap over images
(Efron, Annals of Statistics 7, 1979).
"""
from collections.abc import Callable, Sequence

import numpy as np

from vitlab.runtime.files import require

MOST = 8                        # digits after the point of a measure
ADDED = 2                       # hits and misses each that Agresti and Coull add, for an interval of 95 %


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Of the mean of `values`, one an image, in their unit: sqrt(sum_i (x_i - mean)^2 / (n - 1) / n). None of one
    image, of which nothing can be said. Raises InputError without any."""
    values = np.asarray(values, dtype=np.float64).ravel()
    require(len(values), "the error of a mean over 0 images; 1 at least is needed")
    return None if len(values) == 1 else float(values.std(ddof=1) / np.sqrt(len(values)))


def ratio_error(tops: Sequence[float] | np.ndarray, bottoms: Sequence[float] | np.ndarray) -> float | None:
    """Of r = sum_i t_i / sum_i b_i, where image i gives t_i out of b_i (pixels that are right, of those that count):
    sqrt(n / (n - 1) sum_i (t_i - r b_i)^2) / sum_i b_i, by linearisation; of equal b_i that is `standard_error`. Images
    whose b_i is 0 say nothing and are left out. None of one image. Raises InputError without any."""
    tops, bottoms = (np.asarray(values, dtype=np.float64).ravel() for values in (tops, bottoms))
    tops, bottoms = tops[bottoms > 0], bottoms[bottoms > 0]
    n = len(bottoms)
    require(n, "the error of a ratio over 0 images; 1 at least is needed")
    rest = tops - tops.sum() / bottoms.sum() * bottoms
    return None if n == 1 else float(np.sqrt(n / (n - 1) * (rest**2).sum()) / bottoms.sum())


def jackknife_error(without: Sequence[float] | np.ndarray) -> float | None:
    """Of a statistic, from its value without each of G groups of images: sqrt((G - 1) / G sum_g (s_g - mean)^2). What
    is NaN is left out; None of fewer than two groups."""
    values = np.asarray(without, dtype=np.float64)
    values = values[np.isfinite(values)]
    return None if len(values) < 2 else float(np.sqrt((len(values) - 1) * values.var()))


def share_error(count: float, n: float) -> float:
    """Standard error, in percentage points, of `count` images out of n: 100 sqrt(p (1 - p) / (n + 4)), p = (count + 2)
    / (n + 4); more than 0 where all or none count. Raises InputError for n below 1, or a count outside [0, n]."""
    require(n >= 1 and 0 <= count <= n, f"a share of {count:g} out of {n:g} images; 0 to n out of n >= 1 are needed")
    p = (count + ADDED) / (n + 2 * ADDED)
    return float(100 * np.sqrt(p * (1 - p) / (n + 2 * ADDED)))


def interval(values: Sequence[float] | np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean,
             level: float = 0.95, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(low, high) between which `level` of the statistics lie of `draws` samples of n images, with repeats, out of the
    n of `values` (n, ...), one an image. Raises InputError without any image, or for a level outside (0, 1)."""
    values = np.asarray(values)
    require(len(values), "an interval over 0 images; 1 at least is needed")
    require(0 < level < 1, f"level {level}; more than 0 and less than 1 is needed")
    rng = np.random.default_rng(seed)
    drawn = [float(statistic(values[rng.integers(len(values), size=len(values))])) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals (low, high) have a point in common: then they are not ranked."""
    return max(a[0], b[0]) <= min(a[1], b[1])


def plus_minus(value: float, error: float | None, digits: int) -> str:
    """"79.5 ± 1.6" with so many digits; "79.5" where no error is known."""
    shown = round(value, digits) + 0.0                                          # never -0.0
    return f"{shown:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def digits_of(error: float | None, least: int) -> int:
    """Digits after the point that show two figures of an error, at least so many: of 0.00042 that is 5. No more than
    MOST: what is smaller is float32's rounding."""
    return least if not error else max(least, min(MOST, 1 - int(np.floor(np.log10(error)))))


def with_error(name: str, value: float, error: float | None) -> dict[str, float]:
    """{name: value, name_se: error} of one measure, the second where it is known."""
    return {name: value} | ({} if error is None else {error_name(name): error})


def error_name(name: str) -> str:
    """What the standard error of a measure is called: top1_pct and top1_se, loss and loss_se."""
    return f"{name.removesuffix('_pct')}_se"
