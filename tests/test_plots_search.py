"""Figures of a search: what is drawn is read back from the axes; the front against a slow oracle from its
definition."""
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from vitlab.plots import acquisition, front, gp_slices, incumbents, parallel_coordinates, pareto, sensitivity_curves
from vitlab.plots.base import INK
from vitlab.runtime.files import InputError

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def band(axis) -> dict[float, tuple[float, float]]:
    """{x: (lowest, highest)} of the filled area's corners."""
    corners = axis.collections[0].get_paths()[0].vertices
    return {x: (min(ys), max(ys)) for x in set(corners[:, 0]) for ys in [[y for a, y in corners if a == x]]}


def test_a_unit_in_brackets_is_not_broken():
    axis = incumbents({"gp": [[1, 2]]}, label="- distance to dense (1 - cosine)", errors={"gp": [.1, .1]}).axes[0]
    first, second = axis.get_ylabel().replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert (first, second) == ("best so far: - distance to dense", "(1 - cosine) (band: one standard error)")
    below = acquisition([4, 5], [-6, -5], [-.1, -.2], [-.1, -.1], label="- distance to dense (1 - cosine)").axes[1]
    below.figure.canvas.draw()
    assert below.yaxis.label.get_window_extent().height < below.get_window_extent().height


def test_incumbents_show_the_median_and_range_of_the_best_so_far():
    axis = incumbents({"bayes": [[1, 3, 2], [5, 4, 6], [2, 2, 9]]}, label="top-1 (%)").axes[0]
    line, = axis.lines
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [2, 3, 6]      # best: 1 3 3, 5 5 6, 2 2 9
    assert line.get_drawstyle() == "steps-post" and list(line.get_markevery()) == [0, 1, 2]
    # Steps: at evaluation 2 the band goes from (1, 5) to (2, 5), at 3 to (3, 9).
    assert band(axis) == {1: (1, 5), 2: (1, 5), 3: (2, 9)}
    assert "top-1 (%)" in axis.get_ylabel().replace("\n", " ") and "3 seeds" in axis.get_ylabel().replace("\n", " ")


def test_incumbents_of_one_seed_have_no_band_and_a_dot_only_where_the_best_changes():
    axis = incumbents({"random": [[4, 4, 1, 7, 6]]}, label="top-1 (%)").axes[0]
    assert not axis.collections and list(axis.lines[0].get_markevery()) == [0, 3]
    assert list(axis.lines[0].get_ydata()) == [4, 4, 4, 7, 7] and axis.lines[0].get_label() == "random"


def test_incumbents_pass_over_failed_evaluations_and_hold_what_a_shorter_seed_found():
    axis = incumbents({"a": [[1, np.nan, 3], [5]], "b": [[2, 2, 2]]}, label="value").axes[0]
    assert [list(line.get_ydata()) for line in axis.lines] == [[3, 3, 4], [2, 2, 2]]        # medians of 1 1 3 and 5 5 5


NAMES = ["neurons 0", "neurons 1", "heads 0"]
GRIDS = np.array([[0, .5, 1]] * 3)
MEANS, DEVIATIONS = np.arange(9.).reshape(3, 3), np.array([[1, 2, 3]] * 3) / 2


def test_gp_slices_draw_mean_band_and_incumbent_of_each_dimension():
    figure = gp_slices(NAMES, GRIDS, torch.tensor(MEANS), DEVIATIONS, [.1, .2, .3], 4.5, "top-1 (%)")
    assert [axis.get_title() for axis in figure.axes] == NAMES
    for index, axis in enumerate(figure.axes):
        mean, place, dot = axis.lines
        assert list(mean.get_ydata()) == list(MEANS[index]) and list(mean.get_xdata()) == [0, .5, 1]
        assert set(place.get_xdata()) == {[.1, .2,
                                           .3][index]} == set(dot.get_xdata()) and list(dot.get_ydata()) == [4.5]
        assert band(axis) == {x: (m - 2 * d, m + 2 * d) for x, m,
                              d in zip(GRIDS[index], MEANS[index], DEVIATIONS[index])}
    first, second, third = (axis.lines[0].get_color() for axis in figure.axes)
    assert first == second != third
    assert len({axis.get_ylim() for axis in figure.axes}) == 1 and figure.axes[0].get_ylim()[1] > MEANS.max() + 3


@pytest.mark.parametrize("dims", [1, 5, 25, 37, 49])
def test_gp_slices_give_every_dimension_an_axis_and_every_column_its_ticks(dims):
    grids = np.tile([0., 1], (dims, 1))
    figure = gp_slices([f"heads {i}" for i in range(dims)], grids, grids, grids, np.zeros(dims), 0., "top-1 (%)")
    figure.canvas.draw()
    shown = [axis for axis in figure.axes if axis.get_visible()]
    columns = figure.axes[0].get_gridspec().ncols
    labelled = [axis for axis in shown if axis.xaxis.get_tick_params()["labelbottom"]]
    assert len(shown) == dims and len(labelled) == min(columns, dims) and figure.get_size_inches()[0] < 10
    assert {axis.get_subplotspec().colspan.start for axis in labelled} == set(range(columns))


def test_gp_slices_of_unlike_ranges_label_every_axis():
    figure = gp_slices(NAMES * 3, np.concatenate([GRIDS, 2 * GRIDS, GRIDS]), np.zeros((9, 3)), np.ones((9, 3)),
                       np.zeros(9), 0., "v")
    assert all(axis.xaxis.get_tick_params()["labelbottom"] for axis in figure.axes[:9])


def test_gp_slices_refuse_names_of_another_number():
    with pytest.raises(InputError, match="grids have 3 dimensions; there are 2 names"):
        gp_slices(NAMES[:2], GRIDS, MEANS, DEVIATIONS, [.1, .2, .3], 4.5, "v")


def test_acquisition_shows_log_ei_alone_or_with_measured_and_predicted_values_below():
    assert [list(line.get_ydata()) for line in acquisition([3, 4], [-1, -2]).axes[0].lines] == [[-1, -2]]
    figure = acquisition([3, 4], [-1, -2], [70, 71], [70, 71], means=[69, 72], deviations=[.5, .25], label="top-1 (%)")
    above, below = figure.axes
    by_name = {line.get_label(): line for line in below.lines}
    assert list(by_name["measured"].get_ydata()) == [70, 71] and list(by_name["incumbent"].get_xdata()) == [3, 4]
    predicted, _, (bars,) = below.containers[0]
    assert list(predicted.get_ydata()) == [69, 72]
    assert [s[:, 1].tolist() for s in bars.get_segments()] == [[68.5, 69.5], [71.75, 72.25]]
    assert below.get_ylabel() == "top-1 (%)" and len(above.lines) == 1
    assert [line.get_label() for line in acquisition([3, 4], [-1, -2], [70, 71]).axes[1].lines] == ["measured"]


def test_acquisition_keeps_both_axes_on_the_same_steps_where_an_evaluation_failed():
    above, below = acquisition([3, 4, 5], [-1, -2, -3], [70, np.nan, np.nan]).axes
    assert above.get_xlim() == below.get_xlim() and below.get_xlim()[1] >= 5


def test_acquisition_refuses_deviations_of_nothing():
    with pytest.raises(InputError, match="without means"):
        acquisition([3], [-1], [70], deviations=[1])


def test_parallel_coordinates_draw_each_policy_by_its_value_the_best_last_and_thick():
    policies = np.array([[.1, .2, .3], [.4, .5, .6], [.7, .8, .9], [0, 0, 0]])
    axis = parallel_coordinates(NAMES, policies, [70, 90, 80, np.nan], "top-1 (%)").axes[0]
    bundle, = axis.collections
    segments = bundle.get_segments()
    assert [s[:, 1].tolist() for s in segments] == [policies[0].tolist(), policies[2].tolist(), policies[1].tolist()]
    assert bundle.get_array().tolist() == [70, 80, 90] and segments[0][:, 0].tolist() == [0, 1, 2]
    widths = bundle.get_linewidths()
    assert widths[-1] > 2 * max(widths[:-1])
    assert list(axis.lines[0].get_ydata()) == policies[1].tolist()                          # dots on the best


def test_parallel_coordinates_part_and_name_the_groups():
    names = [f"neurons {i}" for i in range(12)] + [f"heads_{i}" for i in range(12)] + ["tokens"]
    axis = parallel_coordinates(names, np.random.default_rng(0).random((5, 25)), range(5), "v").axes[0]
    assert [line.get_xdata()[0] for line in axis.lines[1:]] == [11.5, 23.5]
    assert [(t.get_text(), t.get_position()[0]) for t in axis.texts] == [("neurons", 5.5), ("heads", 17.5),
                                                                         ("tokens", 24)]
    assert [t.get_text() for t in axis.get_xticklabels()] == [str(i) for i in range(12)] * 2 + [""]


@pytest.mark.parametrize("names", [[f"neurons {i}" for i in range(24)] + ["tokens rate", "block first", "heads all"],
                                   [f"{g} {i}" for g in ("neurons", "heads", "tokens") for i in range(12)]
                                   + ["temperature"]])
def test_parallel_coordinates_labels_do_not_overlap(names):
    figure = parallel_coordinates(names, np.random.default_rng(0).random((5, len(names))), range(5), "v")
    figure.canvas.draw()
    axis = figure.axes[0]
    for texts in (axis.texts, axis.get_xticklabels()):
        boxes = [t.get_window_extent() for t in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_parallel_coordinates_refuse_policies_without_a_finite_value_or_of_another_size():
    with pytest.raises(InputError, match="finite"):
        parallel_coordinates(NAMES, np.zeros((1, 3)), [np.nan], "v")
    with pytest.raises(InputError, match=r"\(2, 3\) is needed"):
        parallel_coordinates(NAMES, np.zeros((2, 2)), [1, 2], "v")


def slow_front(points: list[tuple[float, float]]) -> set[int]:
    """Points for which there is no other that is no worse in both and better in one."""
    found = set()
    for i, (cost, value) in enumerate(points):
        if not any(c <= cost and v >= value and (c < cost or v > value) for c, v in points):
            found.add(i)
    return found


def test_front_is_every_point_that_none_dominates_with_ties():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 31):
        for _ in range(50):
            points = rng.integers(0, 5, (count, 2)).tolist()                  # few values: many ties
            found = front(*zip(*points))
            assert len(found) == len(set(found)) and set(found) == slow_front(points)
            assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_front_keeps_equal_points_and_leaves_out_what_is_not_finite():
    assert sorted(front([1, 1, 1, 2, 2], [5, 5, 4, 5, 6])) == [0, 1, 4]
    assert front([1, np.nan, 0, np.inf, 2], [5, 99, np.nan, 99, np.inf]) == [0]
    assert front([], []) == []


def test_pareto_draws_points_per_strategy_and_the_staircase_over_all():
    points = {"bayes": [(1, 60), (2, 70), (5, 65)], "random": [(1.5, 65), (3, 69), (4, 72)]}
    axis = pareto(points, cost_label="GMACs", value_label="top-1 (%)").axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert {name: list(map(tuple, lines[name].get_xydata())) for name in points} == points
    assert len({lines[name].get_marker() for name in points}) == 2
    stairs = lines["not dominated"]
    # Held to the largest cost that was tried, 5.
    assert list(map(tuple, stairs.get_xydata())) == [(1, 60), (1.5, 65), (2, 70), (4, 72), (5, 72)]
    assert stairs.get_drawstyle() == "steps-post" and (axis.get_xlabel(), axis.get_ylabel()) == ("GMACs", "top-1 (%)")


def cuts(*dimensions: str) -> list[dict]:
    dense = {"dimension": "", "ratio": 0.0, "loss": 0.0, "saved": 0.0}
    return [dense] + [{"dimension": name, "ratio": r, "loss": (i + 1) * r * r, "saved": r / 10} for r in (0.4, 0.2)
                      for i, name in enumerate(dimensions)]


def test_sensitivity_curves_draw_a_line_per_dimension_from_nothing_cut_in_its_groups_axis():
    figure = sensitivity_curves(cuts("neurons 0", "neurons 3", "heads 3", "tokens"), loss_label="KL (nats)",
                                saved_label="GMACs saved")
    assert [axis.get_title() for axis in figure.axes[:3]] == ["neurons", "heads", "tokens"]
    lines = {line.get_label(): line for axis in figure.axes[:3] for line in axis.lines}
    assert set(lines) == {"neurons 0", "neurons 3", "heads 3", "tokens"}
    assert lines["neurons 3"].get_xydata() == pytest.approx(np.array([[0, 0], [0.02, 0.08], [0.04, 0.32]]))
    assert lines["neurons 3"].get_color() == lines["heads 3"].get_color() != lines["neurons 0"].get_color()
    assert lines["tokens"].get_color() == INK and len({axis.get_ylim() for axis in figure.axes[:3]}) == 1
    assert figure.axes[0].get_ylabel() == "KL (nats)" and figure.get_supxlabel() == "GMACs saved"
    assert figure.axes[3].get_ylabel() == "block"


def test_sensitivity_curves_of_groups_far_apart_are_logarithmic_above_the_gentlest_groups_largest_loss():
    rows = cuts("neurons 0", "tokens")
    near, far = (sensitivity_curves([{**row, "loss": row["loss"] * (times if row["dimension"] == "tokens" else 1)}
                                     for row in rows],
                                    loss_label="KL", saved_label="GMACs") for times in (1, 100))
    assert [axis.get_yscale() for axis in near.axes[:2]] == ["linear"] * 2 and near.axes[0].get_ylabel() == "KL"
    assert [axis.get_yscale()
            for axis in far.axes[:2]] == ["symlog"] * 2 and far.axes[0].get_ylabel() == "KL, logarithmic above 0.16"
    assert far.axes[0].get_ylim() == far.axes[1].get_ylim() and far.axes[0].get_ylim()[1] > 32


def test_sensitivity_curves_of_one_dimension_without_a_block_need_no_colours():
    figure = sensitivity_curves(cuts("tokens"), loss_label="KL", saved_label="GMACs")
    assert len(figure.axes) == 1
    with pytest.raises(InputError, match="no dimension was cut"):
        sensitivity_curves(cuts(), loss_label="KL", saved_label="GMACs")
