"""Figures say how sure their points are: bars read back from the axes, ratios of one run, and what is too noisy or too
quick to say."""
import matplotlib
import matplotlib.pyplot as plt
import pytest
from PIL import Image

from vitlab.plan import CompressionPlan
from vitlab.plan.shape import ViTShape
from vitlab.plots import (
    accuracy_against_cost,
    acquisition,
    class_iou_bars,
    incumbents,
    pareto,
    save_figure,
    sensitivity,
    sensitivity_curves,
    trade_offs,
    training_curves,
)
from vitlab.plots.points import NOISY
from vitlab.runtime.caveats import caveat, caveat_of, with_caveat
from vitlab.runtime.results import ResultRow
from vitlab.workbench.offers import Offer, offers_figure

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def segments(axis) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """((x, x), (y, y)) of every bar on an axis, sorted."""
    found = [part for each in axis.collections if hasattr(each, "get_segments") for part in each.get_segments()
             if len(part)]
    return sorted((tuple(float(x) for x in part[:, 0].round(9)), tuple(float(y) for y in part[:, 1].round(9)))
                  for part in found)


def hollow(axis) -> list[tuple[float, float]]:
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_markerfacecolor() == "white"]


def row(name: str, top1: float, gmacs: float, ratio: float, span: list[float], images_s: float, **more) -> ResultRow:
    return ResultRow(model=name, top1_pct=top1, gmacs=gmacs, ratio=ratio, throughput_img_s=images_s,
                     conditions={"speed": {"batch_size": 32, "ratio_range": span}}, **more)


def test_a_row_that_its_ratio_calls_faster_stands_right_of_dense_whatever_the_machine_did_between_the_runs():
    # The second run was on a slower machine: 80 images/s there are 1.6 times its own dense model's, and less than the
    # first one's 100.
    rows = [row("dense", 70, 2.0, 1.0, [1, 1], 100.0), row("small", 65, 1.0, 1.6, [1.5, 1.75], 80.0)]
    axis = accuracy_against_cost(rows).axes[1]
    places = {line.get_label(): line.get_xdata()[0] for line in axis.lines}
    assert places == {"dense": 1.0,
                      "small": 1.6} and "(batch 32)" in axis.get_xlabel() and "same run" in axis.get_xlabel()
    assert segments(axis) == [((1.5, 1.75), (65, 65))] and hollow(axis) == []


def test_a_ratio_whose_range_holds_one_is_hollow_and_the_legend_says_why_but_a_baseline_is_not():
    rows = [row("dense", 70, 2.0, 1.0, [1, 1], 100.0), row("odd", 66, 1.5, 1.69, [.84, 2.54], 110.0)]
    figure = accuracy_against_cost(rows)
    assert hollow(figure.axes[1]) == [(1.69, 66)] and hollow(figure.axes[0]) == []
    legend = figure.axes[1].get_legend()
    assert NOISY in legend.get_title().get_text() and [t.get_text() for t in legend.get_texts()] == ["dense", "odd"]
    assert NOISY not in accuracy_against_cost(rows[:1]).axes[1].get_legend().get_title().get_text()


def test_trade_offs_draw_one_standard_error_at_points_that_have_one_and_the_range_of_a_ratio():
    panels = {"GMACs": {"a": [(2, 60, 1.5), (1, 50, None)], "b": [(1, 40)]},
              "ratio": {"a": [(1.4, 60, 1.5, (1.3, 1.7))]}}
    figure = trade_offs(panels, "top-1 (%)", {"GMACs": (3, 70, 2.0), "ratio": (1, 70, 2.0, (1.0, 1.0))})
    first, second = figure.axes
    assert [list(line.get_xdata()) for line in first.lines[:2]] == [[1, 2], [1]]            # in order of cost
    assert segments(first) == [((2, 2), (58.5, 61.5)), ((3, 3), (68, 72))]
    assert segments(second) == [((1, 1), (68, 72)), ((1.3, 1.7), (60, 60)), ((1.4, 1.4), (58.5, 61.5))]
    assert "one standard error" in second.get_legend().get_title().get_text()
    plain = trade_offs({"GMACs": {"a": [(2, 60), (1, 50)]}}, "top-1 (%)", {"GMACs": (3, 70)})
    assert segments(plain.axes[0]) == [] and plain.axes[0].get_legend().get_title().get_text() == ""


def test_the_best_so_far_of_one_seed_has_the_error_of_the_evaluation_that_gave_it():
    axis = incumbents({"gp": [[4, 4, 1, 7]]}, label="top-1 (%)", errors={"gp": [.5, 9, 9, .25]}).axes[0]
    corners = axis.collections[0].get_paths()[0].vertices
    at = {x: (min(ys), max(ys)) for x in set(corners[:, 0]) for ys in [[y for a, y in corners if a == x]]}
    # The band steps after its point: what holds at 3 is the first evaluation's 4 +/- 0.5, at 4 the last one's too.
    assert at[1] == (3.5, 4.5) and at[2] == at[3] == (3.5, 4.5) and at[4] == (3.5, 7.25)
    assert "one standard error" in axis.get_ylabel().replace("\n", " ")


def test_measured_values_of_a_search_and_of_its_front_have_bars():
    lower = acquisition([0, 1], [-1, -2], [3, 5], errors=[.5, None]).axes[1]
    assert segments(lower) == [((0, 0), (2.5, 3.5))]
    axis = pareto({"gp": [(1, 50, 2.0), (2, 60)]}, cost_label="GMACs", value_label="top-1 (%)").axes[0]
    assert segments(axis) == [((1, 1), (48, 52))] and "one standard error" in axis.get_ylabel()


def test_cuts_alone_have_bars_and_criteria_stand_beside_each_other():
    drops, errors = {"heads": {"hsic": [1, 2], "random": [3, 4]}}, {"heads": {"hsic": [.5, .25], "random": [1, None]}}
    axis = sensitivity(drops, label="nats", errors=errors).axes[0]
    assert [ys for _, ys in segments(axis)] == [(.5, 1.5), (2, 4), (1.75, 2.25)]
    assert len({x for xs, _ in segments(axis) for x in xs}) == 3
    rows = [{"dimension": "", "loss": 0.0, "saved": 0.0, "loss_se": .5},
            {"dimension": "heads 0", "loss": .4, "saved": .1, "loss_se": .05},
            {"dimension": "heads 1", "loss": .3, "saved": .1}]
    axis = sensitivity_curves(rows, loss_label="nats", saved_label="GMACs").axes[0]
    assert segments(axis) == [((.1, .1), (.35, .45))] and "one standard error" in axis.get_ylabel().replace("\n", " ")


def test_a_training_log_with_errors_has_a_band_and_miou_its_error_in_the_legend():
    log = [{"epoch": e, "loss": 1.0, "lr": .1, "train_slice_top1_pct": 50. + e, "train_slice_top1_se": 2.0}
           for e in (1, 2)]
    loss, top1, rate = training_curves({"run": log}).axes
    assert not loss.collections and not rate.collections and len(top1.collections) == 1
    assert top1.collections[0].get_paths()[0].vertices[:,
                                                       1].min() == 49 and top1.collections[0].get_paths()[0].vertices[:,
                                                                                                                      1].max() == 54  # noqa: E501
    legend = class_iou_bars({"dense": [50, 70], "small": [40, 60]}, ["a", "b"], errors={"dense": 1.25}).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["dense: mIoU 60.0 ± 1.2%", "small: mIoU 50.0%"]


def test_quick_runs_and_toy_data_say_so_in_the_figure_and_in_its_file(tmp_path):
    assert caveat("photos") == "" and "quick" not in caveat("digits") and "toy" in caveat("digits")
    assert caveat("photos",
                  quick=True) == "quick: says nothing about quality" and "toy" in caveat("digit_scenes", quick=True)
    caption = with_caveat("seed 0", "photos", quick=True)
    save_figure(trade_offs({"GMACs": {"a": [(2, 60)]}}, "top-1 (%)", {"GMACs": (3, 70)}), tmp_path, "f", caption)
    assert Image.open(tmp_path / "f.png").text["Description"] == "seed 0\nquick: says nothing about quality"
    assert with_caveat("seed 0", "photos") == "seed 0"


def test_one_quick_row_is_enough_for_a_table():
    rows = [ResultRow(model="a", dataset="photos"), ResultRow(model="b", dataset="photos", conditions={"quick": True})]
    assert caveat_of(rows[:1]) == "" and caveat_of(rows) == "quick: says nothing about quality"
    assert caveat_of([ResultRow(model="a", dataset="photos", conditions={"speed": {"quick": True}})]) == caveat_of(rows)
    assert caveat_of([ResultRow(model="a", dataset="digits")]) == caveat("digits") and caveat_of([]) == ""


def test_offers_have_bars_and_none_leads_above_all_images():
    shape = ViTShape(img_size=(20, 30), patch_size=(10, 10), embed_dim=8, depth=2, num_heads=2, head_dim=4,
                     num_neurons=16)
    offers = [Offer(rule="a", plan=CompressionPlan.empty(shape), gmacs=g, agree_pct=a, distill_loss=.1, chosen_by=.1,
                    agree_se=2.0)
              for g, a in ((1e-6, 100.0), (5e-7, 90.0))]
    axis = offers_figure(offers).axes[0]
    assert [ys for _, ys in segments(axis)] == [(88, 92), (98, 102)] and 100 < axis.get_ylim()[1] < 101
