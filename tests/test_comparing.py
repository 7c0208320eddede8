"""What a comparison of criteria carries: wins by seed, intervals over blocks, and bold only where no other's interval
reaches."""
import numpy as np
import pytest

from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow
from vitlab.workbench.comparing import clear_lowest, difference, lines, over_seeds, summary, table, told_apart, verdict


def rows(values: dict[str, list[list[float]]], error: float | None = .05, dimension: str = "neurons") -> list[dict]:
    """{criterion: drops of each seed over blocks}; 0.5 GMACs are removed each time."""
    return [{"criterion": name, "dimension": dimension, "block": block, "drop_per_gmac": value, "gmacs_removed": .5,
             "drop_se": error and error * .5, "seed": seed}
            for name, seeds in values.items() for seed, drops in enumerate(seeds) for block, value in enumerate(drops)]


# One block rules the mean of b, which is lower in all others: the case of a "best by the mean" that is none.
RULED = {"a": [[2, 2, 2, 2, 2]], "b": [[1, 1, 1, 1, 40]], "random": [[1, 3, 1, 3, 3]]}


def test_a_mean_that_one_block_rules_is_not_what_is_said():
    found = summary(rows(RULED), "neurons")
    assert list(found["median"]) == [2, 1, 3] and list(found["lowest in blocks"]) == ["1 of 5", "4 of 5", "0 of 5"]
    said = verdict(rows(RULED), "neurons")
    assert said.startswith("neurons, 5 blocks, 1 seed: b has the lowest median, but can't be told apart from a, random")
    assert "not shown to be better than random cuts: a, b" in said and "one seed" in said


def test_criteria_are_told_apart_by_the_differences_of_blocks_and_not_by_their_levels():
    steep = np.array([1., 10, 100, 1000, 10000])                        # blocks differ far more than the criteria
    found = over_seeds(rows({"a": [list(steep)], "b": [list(steep + 1)]}), "neurons")
    assert told_apart(found, "a", "b") == -1 and told_apart(found, "b", "a") == 1
    assert "a costs least, told apart from all others" in verdict(rows({"a": [list(steep)], "b": [list(steep + 1)]}),
                                                                  "neurons")
    found["b"] = {0: (1.0, None)}
    assert told_apart(found, "a", "b") == 0                             # of one block nothing can be said


def test_a_block_is_won_by_the_criterion_that_is_lowest_with_every_seed():
    found = summary(rows({"a": [[1, 1, 3], [1, 4, 3]], "b": [[2, 2, 2], [2, 2, 2]]}), "neurons")
    assert list(found["lowest in blocks"]) == ["1 of 3", "1 of 3"]      # in block 1 the seeds disagree


def test_the_error_over_seeds_is_the_larger_of_what_images_and_seeds_say():
    one = over_seeds(rows({"a": [[2.0]]}, error=.3), "neurons")["a"][0]
    assert one == pytest.approx((2, .3))
    alike = over_seeds(rows({"a": [[2.0], [2.0], [2.0], [2.0]]}, error=.3), "neurons")["a"][0]
    assert alike == pytest.approx((2, .15))                             # 0.3 / sqrt(4)
    apart = over_seeds(rows({"a": [[1.0], [3.0]]}, error=.3), "neurons")["a"][0]
    assert apart == pytest.approx((2, 1))                               # deviation sqrt(2), / sqrt(2)
    assert over_seeds(rows({"a": [[2.0]]}, error=None), "neurons")["a"][0] == (2, None)


def test_the_lowest_is_clear_only_where_its_interval_overlaps_no_other():
    assert clear_lowest([1, 2, 3], [.1, .1, .1]) == 0 and clear_lowest([3, 2, 1], [.1, .1, .1]) == 2
    assert clear_lowest([1, 2, 3], [.3, .3, .1]) is None                # 1.59 and 1.41
    assert clear_lowest([1, 2], [None, .1]) is None and clear_lowest([1], [.1]) is None


def test_the_table_is_bold_there_alone_and_shows_every_error():
    given = rows({"a": [[1, 2.0]], "b": [[3, 2.1]]}) + rows({"class attention": [[1, 1]]}, dimension="tokens")
    made = table(given)
    html = made.to_html()
    assert html.count("font-weight: bold") == 1 and "1.00 ± 0.05" in html and "nan" not in html
    context = made._compute().ctx
    assert {place: look for place, look in context.items() if look} == {(0, 0): [("font-weight", "bold")]}


def test_lines_for_the_figure_are_the_means_and_errors_over_blocks():
    drops, errors = lines(rows({"a": [[1, 2], [3, 4]]}, error=.1))
    assert drops == {"neurons": {"a": [2, 3]}} and errors["neurons"]["a"] == pytest.approx([1, 1])


def test_a_dimension_that_was_not_cut_is_named():
    with pytest.raises(InputError, match="no heads were cut"):
        summary(rows(RULED), "heads")


def test_a_difference_of_rows_says_how_sure_it_is_and_where_nothing_can_be_told():
    dense, small = ResultRow(model="a", top1_pct=80.0, top1_se=3.0), ResultRow(model="b", top1_pct=70.0, top1_se=4.0)
    assert difference(small, dense) == "-10.00 ± 5.00 points of top-1"
    assert difference(small, ResultRow(model="c", top1_pct=60.0)) == "+10.00 points of top-1"
    near = ResultRow(model="d", top1_pct=71.0, top1_se=4.0)
    # 1.96 * 5 is 9.8
    assert difference(near, dense) == "-9.00 ± 5.00 points of top-1 (can't be told from 0)"
    assert difference(ResultRow(model="e", miou_pct=3.0), ResultRow(model="f", miou_pct=1.0),
                      "miou_pct") == "+2.00 points of mIoU"
