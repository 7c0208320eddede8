"""vitlab.runtime.results: rows, their file, and the table."""
import dataclasses
import math

import pytest

from vitlab.runtime.files import InputError
from vitlab.runtime.results import COLUMNS, ResultRow, append_row, format_table, notes, read_rows, shown, to_latex

FULL = ResultRow(model="deit_tiny", dataset="digits", split="test", top1_pct=71.375, top5_pct=91.5, loss=1.25,
                 gmacs=1.2537, params_m=5.717, throughput_img_s=2234.5, latency_ms=3.5, ratio=1.0,
                 conditions={"batch": 64, "device": "cpu"})


def test_rows_come_back_from_the_file_as_they_went_in(tmp_path):
    rows = [FULL, ResultRow(model="other")]
    for row in rows:
        append_row(tmp_path / "results.jsonl", row)
    assert read_rows(tmp_path / "results.jsonl") == rows


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "results.jsonl") == []


@pytest.mark.parametrize("key", ["model", "dataset", "split"])
def test_the_last_row_of_each_key_wins_and_keeps_the_first_place(tmp_path, key):
    path = tmp_path / "results.jsonl"
    other = dataclasses.replace(FULL, **{key: "another"})
    better = dataclasses.replace(FULL, top1_pct=72.0)
    for row in (FULL, other, better):
        append_row(path, row)
    assert read_rows(path) == [better, other]


def test_fields_that_this_version_does_not_know_are_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"model": "m", "from_the_future": 1, "gmacs": 2.0}\n')
    assert read_rows(path) == [ResultRow(model="m", gmacs=2.0)]


@pytest.mark.parametrize("name", ["top1_pct", "top5_pct"])
@pytest.mark.parametrize("value", [-0.1, 100.1, math.nan])
def test_a_percentage_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name}.*0 to 100"):
        ResultRow(model="m", **{name: value})


def test_table_has_the_columns_that_are_asked_for():
    for columns in (COLUMNS, ("split", "model", "loss", "latency_ms")):
        header, rule, line = format_table([FULL], columns).splitlines()
        assert header.split() == list(columns)
        assert set(rule) == {"-"} and len(header) == len(rule) == len(line)


def test_table_shows_each_value_in_its_own_column():
    line = format_table([FULL]).splitlines()[2]
    assert line.split()[0] == FULL.model
    for column, given in zip(COLUMNS[1:], line.split()[1:]):
        digits = len(given.partition(".")[2])
        # rounded, no more
        assert float(given) == pytest.approx(getattr(FULL, column), abs=0.5 * 10 ** -digits + 1e-12)


def test_a_value_is_shown_with_its_standard_error_and_not_with_that_of_an_earlier_one(tmp_path):
    measured = dataclasses.replace(FULL, top1_se=1.583, loss_se=0.0412)
    assert shown(measured, "top1_pct") == "71.38 ± 1.58" and shown(measured, "gmacs") == "1.2537"
    assert "71.38 ± 1.58" in format_table([measured]) and r"71.38 $\pm$ 1.58" in to_latex(["a"], [measured], "c")
    for row in (measured, ResultRow(model="deit_tiny", dataset="digits", split="test", top1_pct=72.0)):
        append_row(tmp_path / "results.jsonl", row)
    (read,) = read_rows(tmp_path / "results.jsonl")
    assert (read.top1_pct, read.top1_se, read.loss_se) == (72.0, None, 0.0412)
    with pytest.raises(InputError, match="miou_se is -1; a standard error of at least 0"):
        ResultRow(model="m", miou_se=-1)


def test_table_shows_a_dash_for_what_was_not_measured():
    bare = ResultRow(model="m", gmacs=math.nan, params_m=0.0)
    given = dict(zip(COLUMNS, format_table([bare]).splitlines()[2].split()))
    assert given.pop("model") == "m"
    assert float(given.pop("params_m")) == 0        # zero is a measurement
    assert set(given.values()) == {"-"}


def test_table_lines_are_equally_wide_whatever_the_values():
    lines = format_table([FULL, ResultRow(model="a much longer name"),
                          ResultRow(model="x", gmacs=12345.0)]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + 3


def test_table_without_rows_is_its_header():
    assert format_table([]).split("\n")[0].split() == list(COLUMNS)


def test_columns_of_speed_say_the_batch_and_a_ratio_its_range_and_what_it_is_stands_once_below():
    def row(name, ratio, span, repeats=7, timing="ratio: new"):
        return ResultRow(model=name, throughput_img_s=9.0, ratio=ratio, top1_pct=50.0, top1_se=1.5, conditions={
            "speed": {"batch_size": 32, "ratio_range": span, "repeats": repeats, "timing": timing}})
    rows = [row("dense", 1.0, [1.0, 1.0]), row("a", 1.69, [0.84, 2.54]), row("b", 1.5, [1.44, 1.567])]
    head, _, dense, first, second = format_table(rows, ("model", "top1_pct", "throughput_img_s", "ratio")).splitlines()
    assert "throughput_img_s (batch 32)" in head and "ratio (batch 32)" in head and head.split()[:2] == ["model",
                                                                                                         "top1_pct"]
    assert dense.endswith("1.00") and first.endswith("1.69 (0.84 to 2.54), too noisy to tell") and second.endswith(
        "1.50 (1.44 to 1.57)")
    assert shown(row("a", 1.3, [1.3, 1.3]), "ratio") == "1.30, too noisy to tell"      # one round
    said = notes(rows, ("model", "top1_pct", "ratio"))
    assert said.count("one standard error") == said.count(
        "median over rounds") == 1 and "95 %" in said and "largest" not in said
    few = notes([row("dense", 1.0, [1.0, 1.0]), row("a", 1.5, [1.4, 1.6], repeats=2)], ("ratio",))
    assert "the least and the largest round" in few and "95 %" not in few and "standard error" not in few
    assert "the least and the largest round" in notes([row("a", 1.5, [1.4, 1.6], timing="median, models in turn")])
    assert notes([ResultRow(model="m", top1_pct=50.0)]) == ""
