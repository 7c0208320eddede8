"""Figures of heads and neurons: what is drawn is read back from the axes; rollout against slow loops from the paper's
formula."""
import dataclasses

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import MergeReconstruct
from vitlab.plan.shape import ViTShape
from vitlab.plots import head_rollouts, plan_bars, redundancy_matrices, rollout, sensitivity, unit_scores
from vitlab.runtime.files import InputError

matplotlib.use("agg")
SHAPE = ViTShape(img_size=(20, 30), patch_size=(10, 10), embed_dim=12, depth=2, num_heads=3, head_dim=4, num_neurons=5)
RULE = MergeReconstruct(regions=(0, 0, 1, -1, 1, 1), weights=(.5, .5, 1 / 3, 0., 1 / 3, 1 / 3), pruned=(3,))
PLAN = CompressionPlan(shape=SHAPE, blocks=(BlockPlan(heads=(1,), neurons=(0, 4), tokens=RULE), BlockPlan()))
HEADS = [[3., 1., 2.], [5., 5., 5.]]
NEURONS = [[1., 5., 3., 2., 4.], [10., 30., 20., 50., 40.]]


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def attention(depth: int, heads: int, count: int, seed: int = 0) -> torch.Tensor:
    """(L, H, N, N), rows sum to 1, far from uniform."""
    return torch.softmax(3 * torch.randn(depth, heads, count, count,
                                         generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def test_unit_scores_colour_each_block_in_its_own_range_with_neurons_sorted():
    left, right = unit_scores(HEADS, torch.tensor(NEURONS), PLAN).axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), [[1, 0, .5], [0, 0, 0]])       # equal scores: no range, 0
    # The 99th percentile of 1..5 lies 0.96 of the way from 4 to 5: the range is 1 to 4.96, and 5 is clipped to 1.
    row = [1, 3 / 3.96, 2 / 3.96, 1 / 3.96, 0]
    np.testing.assert_allclose(right.images[0].get_array(), [row, row])


def test_unit_scores_mark_cut_heads_with_a_cross_and_the_number_of_neurons_kept_with_a_line():
    left, right = unit_scores(HEADS, NEURONS, PLAN).axes[:2]
    for marks in left.collections:
        assert sorted(map(tuple, marks.get_offsets().data.tolist())) == [(0, 0), (2, 0)]  # (head, block)
    assert len(left.collections) == 2 and len(right.collections) == 2                     # black below white
    for lines in right.collections:
        assert [s.tolist() for s in lines.get_segments()] == [[[1.5, -.5], [1.5, .5]], [[4.5, .5], [4.5, 1.5]]]


def test_unit_scores_without_cuts_have_no_cross_and_without_a_plan_no_line():
    left, right = unit_scores(HEADS, NEURONS, CompressionPlan.empty(SHAPE)).axes[:2]
    assert not left.collections and len(right.collections) == 2
    left, right = unit_scores(HEADS, NEURONS, None).axes[:2]
    assert not left.collections and not right.collections and not left.get_title()


def test_unit_scores_refuse_a_plan_for_other_sizes():
    with pytest.raises(InputError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        unit_scores(HEADS, [row[:4] for row in NEURONS], PLAN)


def test_sensitivity_draws_a_line_per_criterion_which_looks_alike_on_all_axes():
    drops = {"neurons": {"hsic": [.1, .2, .3], "weight": [.4, .5, .6]}, "heads": {"weight": [1., 2, 3]}}
    figure = sensitivity(drops, label="points per GMAC")
    assert [axis.get_title() for axis in figure.axes] == ["neurons", "heads"]
    # the first is the zero line
    lines = [{line.get_label(): line for line in axis.lines[1:]} for axis in figure.axes]
    assert {name: list(line.get_ydata()) for name, line in lines[0].items()} == drops["neurons"]
    assert list(lines[1]) == ["weight"] and list(lines[1]["weight"].get_xdata()) == [0, 1, 2]
    assert (lines[0]["weight"].get_marker(), lines[0]["weight"].get_color()) == (lines[1]["weight"].get_marker(),
                                                                                  lines[1]["weight"].get_color())
    assert lines[0]["weight"].get_marker() != lines[0]["hsic"].get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hsic", "weight"]
    assert figure.get_supylabel() == "points per GMAC"


def test_redundancy_matrices_grey_the_diagonal_and_scale_what_is_off_it():
    matrices = np.array([np.full((3, 3), 7.), [[99, 1, 3], [1, -99, 5], [3, 5, 50]], np.eye(3)])
    figure = redundancy_matrices(torch.tensor(matrices), [1, 0])
    shown = figure.axes[0].images[0].get_array()
    assert shown.mask.tolist() == np.eye(3, dtype=bool).tolist()
    assert shown.filled(-1).tolist() == [[-1, 0, .5], [0, -1, 1], [.5, 1, -1]]
    assert figure.axes[0].get_title() == "block 1: 1 to 5" and figure.axes[1].get_title() == "block 0: 7 to 7"
    assert figure.axes[1].images[0].get_array().compressed().tolist() == [0] * 6          # one value everywhere


def test_redundancy_matrices_draw_every_chosen_block_and_hide_what_is_left_of_the_grid():
    figure = redundancy_matrices(np.random.default_rng(0).random((7, 3, 3)), range(7))
    shown = [axis for axis in figure.axes if axis.get_visible() and axis.get_title().startswith("block")]
    assert len(shown) == 7 and sum(not axis.get_visible() for axis in figure.axes) == 1


def slow_rollout(maps: np.ndarray, prefix: int, kept: list[list[int]]) -> list[float]:
    """Row 0 over patches of the product over blocks of rownorm(mean over the kept heads + I), entry by entry."""
    depth, _, count, _ = maps.shape
    row = [1. if i == 0 else 0. for i in range(count)]              # from the last block to the first: e_0 A_L ... A_1
    for block in reversed(range(depth)):
        if not kept[block]:
            continue
        following = [0.] * count
        for i in range(count):
            entries = [sum(maps[block, h, i, j] for h in kept[block]) / len(kept[block]) + (1. if i == j else 0.)
                       for j in range(count)]
            for j in range(count):
                following[j] += row[i] * entries[j] / sum(entries)
        row = following
    return row[prefix:]


@pytest.mark.parametrize("kept", [[[0, 1, 2], [0, 1, 2], [0, 1, 2]], [[0], [], [1, 2]], [[2], [0, 1], []]])
def test_rollout_is_the_product_over_blocks(kept):
    maps = attention(3, 3, 7)
    # float64 on both sides: only the order of the sums differs
    np.testing.assert_allclose(rollout(maps, 2, kept), slow_rollout(maps.numpy(), 2, kept), rtol=1e-10)


def test_rollout_of_all_heads_is_the_default_and_a_whole_row_sums_to_one():
    maps = attention(3, 2, 5)
    assert torch.equal(rollout(maps, 1), rollout(maps, 1, [[0, 1]] * 3))
    # Of one block the class token keeps half of what it gives itself besides the identity's half.
    assert rollout(maps[:1], 1).sum().item() == pytest.approx(.5 * (1 - maps[0, :, 0, 0].mean().item()), rel=1e-10)
    # no prefix token: patches are the whole row
    assert rollout(maps, 0, average=True).sum().item() == pytest.approx(1, rel=1e-10)


def test_rollout_without_any_head_takes_nothing_from_the_patches():
    assert rollout(attention(2, 3, 5), 1, [[], []]).tolist() == [0, 0, 0, 0]


def test_rollout_without_a_class_token_is_refused_unless_rows_are_averaged():
    with pytest.raises(InputError, match="no prefix token"):
        rollout(attention(2, 3, 5), 0)
    maps = attention(1, 2, 5)
    mixed = (maps[0].mean(dim=0) + torch.eye(5)) / 2
    torch.testing.assert_close(rollout(maps, 1, average=True), mixed[1:, 1:].mean(dim=0))


def test_head_rollouts_show_kept_heads_then_cut_heads_over_the_picture():
    maps, picture = attention(2, 3, 7), np.random.default_rng(0).random((40, 60, 3))
    figure = head_rollouts({"cat": picture}, {"cat": maps}, PLAN, SHAPE)
    left, kept, cut = figure.axes[:3]
    np.testing.assert_array_equal(left.images[0].get_array(), picture)
    for axis, heads in ((kept, [[1], [0, 1, 2]]), (cut, [[0, 2], []])):
        expected = np.array(slow_rollout(maps.numpy(), 1, heads)).reshape(2, 3)
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        np.testing.assert_allclose(axis.images[1].get_array(), expected, atol=1e-10)
        # twice img_size: the map covers the whole picture
        assert axis.images[1].get_extent() == [-.5, 59.5, 39.5, -.5]
    assert left.get_ylabel() == "cat"


def test_head_rollouts_say_where_no_head_is_cut():
    figure = head_rollouts({"cat": np.zeros((20, 30, 3))}, {"cat": attention(2, 3, 7)}, CompressionPlan.empty(SHAPE),
                           SHAPE)
    assert not figure.axes[2].images and [text.get_text() for text in figure.axes[2].texts] == ["no head is cut"]


def test_head_rollouts_refuse_attention_of_other_sizes_or_pictures():
    with pytest.raises(InputError, match=r"attention of cat is \(2, 3, 6, 6\)"):
        head_rollouts({"cat": np.zeros((20, 30, 3))}, {"cat": attention(2, 3, 6)}, PLAN, SHAPE)
    with pytest.raises(InputError, match="the same are needed"):
        head_rollouts({"cat": np.zeros((20, 30, 3))}, {"dog": attention(2, 3, 7)}, PLAN, SHAPE)


def test_head_rollouts_of_a_model_that_pools_read_the_mean_over_patches():
    maps, pools = attention(2, 3, 7), dataclasses.replace(SHAPE, pool="avg")
    figure = head_rollouts({"cat": np.zeros((20, 30, 3))}, {"cat": maps}, CompressionPlan.empty(pools), pools)
    mixed = (maps.mean(dim=1) + torch.eye(7)) / 2
    expected = (mixed[1] @ mixed[0])[1:, 1:].mean(dim=0).reshape(2, 3)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(figure.axes[1].images[1].get_array(), expected, atol=1e-10)


def test_plan_bars_are_percent_of_the_dense_model_side_by_side():
    axes = plan_bars({"dense": CompressionPlan.empty(SHAPE), "cut": PLAN}).axes
    dense, cut = zip(*(axis.containers for axis in axes))
    assert [[bar.get_height() for bar in bars] for bars in dense] == [[100, 100]] * 3
    # 1 of 3 heads, 2 of 5 neurons, 1 prefix + 2 merged of 7 tokens
    np.testing.assert_allclose([[bar.get_height() for bar in bars] for bars in cut],
                               [[100 / 3, 100], [40, 100], [300 / 7, 100]])
    for first, second, block in zip(dense[0], cut[0], (0, 1)):
        # they touch on the tick
        assert first.get_x() + first.get_width() == pytest.approx(second.get_x()) == block
    axis = plan_bars({"a": PLAN, "b": PLAN, "c": PLAN}).axes[0]
    # the middle one on the tick
    assert [bar.get_x() + bar.get_width() / 2 for bar in axis.containers[1]] == pytest.approx([0, 1])


@pytest.mark.parametrize("depth,heads,neurons", [(2, 3, 128), (24, 16, 4096)])
def test_unit_figures_are_as_wide_as_a_notebook_at_every_size(depth, heads, neurons):
    rng = np.random.default_rng(0)
    for figure in (unit_scores(rng.random((depth, heads)), rng.random((depth, neurons))),
                   redundancy_matrices(rng.random((depth, heads, heads)), range(depth)),
                   sensitivity({"heads": {"hsic": rng.random(depth)}, "neurons": {"hsic": rng.random(depth)}},
                               label="points")):
        figure.canvas.draw()
        assert figure.get_size_inches()[0] < 10
