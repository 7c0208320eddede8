"""Standard errors and intervals against slow sums and simulated draws."""
import math
import random

import numpy as np
import pytest

from vitlab.runtime.files import InputError
from vitlab.runtime.uncertainty import (
    digits_of,
    error_name,
    interval,
    jackknife_error,
    overlap,
    plus_minus,
    ratio_error,
    share_error,
    standard_error,
    with_error,
)


def test_the_error_of_a_mean_is_its_formula():
    values = [random.Random(3).gauss(2.0, 5.0) for _ in range(37)]
    mean = sum(values) / 37
    assert standard_error(values) == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in values) / 36 / 37), rel=1e-12)


def test_of_one_image_no_error_is_known_and_of_none_it_is_refused():
    assert standard_error([3.0]) is None
    for call in (lambda: standard_error([]), lambda: interval([]), lambda: share_error(0, 0), lambda: share_error(8, 7),
                 lambda: share_error(-1, 7), lambda: interval([1.0], level=1.0)):
        with pytest.raises(InputError):
            call()


def test_a_share_of_all_or_none_has_an_error_and_a_large_one_that_of_the_binomial():
    assert share_error(0, 650) == pytest.approx(share_error(650, 650)) and share_error(0, 650) > 0
    assert share_error(0, 13) == pytest.approx(100 * math.sqrt(2 / 17 * 15 / 17 / 17))
    assert share_error(79540, 100000) == pytest.approx(100 * math.sqrt(0.7954 * 0.2046 / 100000), rel=1e-3)


def test_an_interval_of_a_mean_covers_about_two_errors():
    values = np.random.default_rng(5).normal(size=311)
    low, high = interval(values, draws=2000, seed=1)
    assert low < values.mean() < high
    # 2000 draws: about 3 % of noise
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error(values), rel=0.08)
    assert interval(values, draws=50, seed=1) == interval(values, draws=50, seed=1)


def test_an_interval_takes_any_statistic_of_rows():
    rows = np.stack([np.arange(17.0), np.ones(17)], axis=1)
    assert interval(rows, statistic=lambda drawn: drawn[:, 1].sum(), draws=11) == (17.0, 17.0)


def test_intervals_that_share_a_point_overlap():
    assert overlap((0.0, 1.0), (1.0, 2.0)) and overlap((0.0, 9.0), (2.0, 3.0))
    assert not overlap((0.0, 1.0), (1.1, 2.0)) and not overlap((3.0, 4.0), (1.0, 2.0))


def test_a_value_is_written_with_its_error_where_one_is_known():
    assert plus_minus(79.54, 1.583, 1) == "79.5 ± 1.6"
    assert plus_minus(79.54, None, 2) == "79.54" and plus_minus(-1e-9, None, 4) == "0.0000"
    assert [digits_of(error, 4) for error in (None, 0.0, 0.3, 0.00042, 0.000099, 1.9e-16)] == [4, 4, 4, 5, 6, 8]


def test_a_ratio_of_equal_images_has_the_error_of_their_mean_and_empty_ones_say_nothing():
    rng = np.random.default_rng(7)
    tops = rng.normal(3, 1, size=31)
    assert ratio_error(tops, np.full(31, 5.0)) == pytest.approx(standard_error(tops / 5), rel=1e-12)
    bottoms = rng.integers(1, 9, size=31).astype(float)
    ratio = tops.sum() / bottoms.sum()
    wanted = math.sqrt(31 / 30 * sum((t - ratio * b) ** 2 for t, b in zip(tops, bottoms))) / bottoms.sum()
    assert ratio_error(tops, bottoms) == pytest.approx(wanted, rel=1e-12)
    assert ratio_error([*tops, 0.0], [*bottoms, 0.0]) == pytest.approx(wanted, rel=1e-12)
    assert ratio_error([1.0], [2.0]) is None
    with pytest.raises(InputError):
        ratio_error([0.0], [0.0])


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).normal(size=29)
    assert jackknife_error([np.delete(values, i).mean() for i in range(29)]) == pytest.approx(standard_error(values),
                                                                                              rel=1e-12)
    assert jackknife_error([1.0]) is None and jackknife_error([1.0, math.nan]) is None


def test_an_error_stands_beside_its_measure_under_one_name():
    assert with_error("top1_pct", 79.0,
                      1.5) == {"top1_pct": 79.0, "top1_se": 1.5} and with_error("loss", 0.1, None) == {"loss": 0.1}
    assert [error_name(name) for name in ("miou_pct", "distill_loss")] == ["miou_se", "distill_loss_se"]
