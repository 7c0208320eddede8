"""Figures: the numbers they show, read back from the axes."""
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text
from matplotlib_inline.backend_inline import _fetch_figure_metadata
from PIL import Image

from vitlab.measure.capture import token_places
from vitlab.models import compress, deploy, shape_of
from vitlab.models.held import Merged
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, MergeReconstruct
from vitlab.plan.shape import ViTShape
from vitlab.plots import (
    accuracy_against_cost,
    attention_spans,
    kept_counts,
    matched_map,
    merge_map,
    save_figure,
    score_maps,
    to_image,
    trade_offs,
    training_curves,
)
from vitlab.plots.base import INK
from vitlab.plots.search import moment
from vitlab.plots.tokens import region_means, through_matrices
from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow

matplotlib.use("agg")
SHAPE = ViTShape(img_size=(20, 30), patch_size=(10, 10), embed_dim=8, depth=2, num_heads=2, head_dim=4, num_neurons=16)
RULE = MergeReconstruct(regions=(0, 0, 1, -1, 1, 1), weights=(.5, .5, 1 / 3, 0., 1 / 3, 1 / 3), pruned=(3,))
PLAN = CompressionPlan(shape=SHAPE, blocks=(BlockPlan(tokens=RULE), BlockPlan()))


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def patches(values: list[float]) -> np.ndarray:
    """(20, 30, 3) image whose patch j is all values[j]."""
    grid = np.array(values, dtype=float).reshape(2, 3, 1).repeat(3, axis=2)
    return grid.repeat(10, axis=0).repeat(10, axis=1)


def test_region_means_and_reconstruction_are_the_matrices_own():
    means, back = through_matrices(patches([.1, .3, .2, .9, .4, .6]), RULE, SHAPE)
    # means of patches 0, 1 and of 2, 4, 5; 3 is pruned and stays
    expected = patches([.2, .2, .4, .9, .4, .4])
    np.testing.assert_allclose(means, expected, atol=1e-12)
    np.testing.assert_allclose(back, expected, atol=1e-12)  # uniform weights: what comes back is the mean


def test_region_means_are_of_all_pixels_of_a_region_wherever_it_lies():
    noisy = np.random.default_rng(0).random((20, 30, 3))
    shown = region_means(noisy, torch.tensor([1, 0, -1, -1, 0, 1]), SHAPE)
    cells = [noisy[10 * (j // 3):, 10 * (j % 3):][:10, :10].reshape(-1, 3) for j in range(6)]
    expected = [np.concatenate([cells[i] for i in same]).mean(axis=0)
                for same in ((0, 5), (1, 4), (2,), (3,), (1, 4), (0, 5))]
    for j, colour in enumerate(expected):
        np.testing.assert_allclose(shown[10 * (j // 3):, 10 * (j % 3):][:10, :10], np.broadcast_to(colour, (10, 10, 3)),
                                   atol=1e-12)


def test_matched_map_has_a_row_an_image_and_each_token_one_colour_and_border():
    images = [patches([.1, .3, .2, .9, .4, .6]), patches([.8, .2, .2, .2, .2, .2])]
    places = {3: torch.tensor([[0, 0, 1, 2, 3, 1], [0, 1, 1, 1, 2, 3]]),
              5: torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]])}
    figure = matched_map(images, places, SHAPE)
    assert [axis.get_title() for axis in figure.axes] == ["image", "block 3: 4 tokens", "block 5: 2 tokens", "", "", ""]
    first, second, third, fourth = (figure.axes[i] for i in (1, 2, 4, 5))
    np.testing.assert_array_equal(figure.axes[3].images[0].get_array(), images[1])
    np.testing.assert_allclose(first.images[0].get_array(), patches([.2, .2, .4, .9, .4, .4]), atol=1e-12)
    np.testing.assert_allclose(fourth.images[0].get_array(), patches([.8, .2, .2, .2, .2, .2]), atol=1e-12)
    # Grids 0 0 1 / 2 3 1, 0 0 0 / 1 1 0, 0 1 1 / 1 2 3 and 0 1 1 / 1 1 1: neighbours that differ.
    assert [len(axis.collections[0].get_segments()) for axis in (first, second, third, fourth)] == [5, 3, 6, 2]


@torch.no_grad()
def test_places_are_those_of_the_models_own_blocks_the_last_too_in_both_forms(tiny_vit, images):
    dense = tiny_vit("deit")
    shape, x = shape_of(dense), images(dense, 3)
    counts = (None, 0, 4, 0, 5)
    model = compress(dense, CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(tokens=None if count is None else Match(merged=count)) for count in counts))).train()
    for form in (model, deploy(model)):
        found = token_places(form, x)
        assert list(found) == [2, 3, 4] and form.training == (form is model)
        assert [int(found[block].max()) + 1 for block in found] == [11, 11, 6] and torch.equal(found[2], found[3])
        for before, after in zip(found[3], found[4]):                   # what was one token stays one
            assert len(set(zip(before.tolist(), after.tolist()))) == 11
    rows = model.eval().blocks[:4](dense.norm_pre(dense._pos_embed(dense.patch_embed(x))))
    assert isinstance(rows, Merged) and torch.equal(rows.places, found[3])
    grid = model.blocks(dense.norm_pre(dense._pos_embed(dense.patch_embed(x))))[:, 1:]
    for each, places in zip(grid, found[4]):                            # patches of one token have one value
        assert all(torch.equal(each[i], each[j]) == (places[i] == places[j]) for i in range(15) for j in range(i))


def test_places_of_a_model_that_merges_none_are_refused(tiny_vit, images):
    dense = tiny_vit("deit")
    none = CompressionPlan(shape=shape_of(dense), blocks=(BlockPlan(tokens=Match(merged=0)),) * 5)
    for model in (dense, compress(dense, none)):
        with pytest.raises(InputError, match="no block of the model merges tokens by content"):
            token_places(model, images(dense))


def test_merge_map_draws_a_border_exactly_where_regions_change():
    figure = merge_map(patches([.1, .3, .2, .9, .4, .6]), PLAN, [0, 1])
    first, plain = figure.axes[0], figure.axes[3]
    # Grid 0 0 1 / -1 1 1: between columns 1 and 2 above, 0 and 1 below; between the rows in columns 0 and 1.
    assert len(first.collections[0].get_segments()) == 4
    assert not plain.collections
    assert "2 of 6 patches" in first.get_ylabel() and "6 of 6" in plain.get_ylabel()


def test_kept_counts_shows_tokens_with_prefix_per_block():
    axis = kept_counts({"a": PLAN}).axes[0]
    assert [list(line.get_ydata()) for line in axis.lines] == [[7, 7], [3, 7]]


def test_score_maps_scale_each_block_to_its_largest():
    figure = score_maps(torch.tensor([[1., 2, 3, 4, 5, 10], [1., 1, 1, 1, 1, 2]]), SHAPE, [0, 1])
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[.1, .2, .3], [.4, .5, 1]], rtol=1e-6)
    assert figure.axes[1].images[0].get_array().max() == 1


def test_how_far_heads_look_is_a_point_a_head_beside_attention_that_is_spread_evenly():
    distance, entropy = torch.tensor([[1.0, 3.0], [2.0, 6.0]]), torch.tensor([[0.5, 1.0], [1.5, 0.5]])
    axis, other = attention_spans(distance, entropy, SHAPE).axes
    assert axis.collections[0].get_offsets().tolist() == [[0, 1], [0, 3], [1, 2], [1, 6]]
    assert axis.lines[0].get_ydata().tolist() == [2, 4]
    places = [(y * SHAPE.patch_size[0], x * SHAPE.patch_size[1]) for y in range(SHAPE.grid_size[0])
              for x in range(SHAPE.grid_size[1])]
    apart = [math.dist(a, b) for a in places for b in places]
    assert axis.lines[1].get_ydata()[0] == pytest.approx(sum(apart) / len(apart))
    assert other.lines[1].get_ydata()[0] == pytest.approx(math.log(SHAPE.num_tokens))


def test_accuracy_against_cost_has_a_named_point_per_row():
    rows = [ResultRow(model="a", top1_pct=70, gmacs=1.0, throughput_img_s=10.0, ratio=1.0),
            ResultRow(model="b", top1_pct=60, gmacs=.5)]
    figure = accuracy_against_cost(rows)
    assert [(line.get_label(), *line.get_xdata(), *line.get_ydata())
            for line in figure.axes[0].lines] == [("a", 1, 70), ("b", .5, 60)]
    assert len(figure.axes[1].lines) == 1


def test_a_long_measure_of_trade_offs_stands_beside_its_axis():
    words = "images with the same nearest neighbour as by the dense model (%)"
    axis = trade_offs({"GMACs": {"rule": [(1.0, 90.0)]}}, words, {"GMACs": (2.0, 100.0)}).axes[0]
    axis.figure.canvas.draw()
    assert axis.yaxis.label.get_window_extent().height < axis.get_window_extent().height


def test_costs_of_a_small_model_do_not_run_into_each_other():
    rows = [ResultRow(model=str(cost), top1_pct=60, gmacs=cost, ratio=1.0) for cost in (0.00098, 0.00104, 0.00164)]
    figure = accuracy_against_cost(rows)
    figure.canvas.draw()
    ends = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert len(ends) > 2 and all(one.x1 < other.x0 for one, other in zip(ends, ends[1:]))


def test_a_row_looks_the_same_against_both_costs_and_every_row_is_in_the_legend():
    speeds = {"a": None, "b": 10.0, "c": None}
    rows = [ResultRow(model=name, top1_pct=60, gmacs=1.0, ratio=speed) for name, speed in speeds.items()]
    figure = accuracy_against_cost(rows)
    looks = [{line.get_label(): (line.get_marker(), line.get_color()) for line in axis.lines} for axis in figure.axes]
    assert looks[1] == {"b": looks[0]["b"]} and len(set(looks[0].values())) == 3
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    assert [(line.get_marker(), line.get_color()) for line in legend.get_lines()] == list(looks[0].values())


def test_training_curves_show_the_log():
    log = [{"epoch": e, "loss": 1 / e, "train_slice_top1_pct": 10. * e, "lr": .1} for e in (1, 2)]
    figure = training_curves({"run": log})
    assert [list(axis.lines[0].get_ydata()) for axis in figure.axes] == [[1, .5], [10, 20], [.1, .1]]


def test_curves_of_one_epoch_have_whole_epochs_and_no_label_longer_than_its_axis():
    figure = training_curves({"run": [{"epoch": 1, "loss": 1., "train_slice_distill_loss": .1, "lr": .1}]})
    figure.canvas.draw()
    assert all(float(place).is_integer() for axis in figure.axes for place in axis.get_xticks())
    tall = [axis.yaxis.label.get_window_extent().height <= axis.get_window_extent().height for axis in figure.axes]
    assert all(tall), [axis.get_ylabel() for axis in figure.axes]


def test_to_image_undoes_the_normalisation():
    x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (.4, .5, .6), (.2, .3, .4)
    normal = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    np.testing.assert_allclose(to_image(normal, mean, std), x.permute(1, 2, 0), atol=1e-6)


def test_save_figure_writes_every_format_with_the_caption(tmp_path):
    figure = kept_counts({"a": PLAN})
    save_figure(figure, tmp_path, "03_kept", "seed 0", formats=("png", "svg", "pdf"))
    assert {p.suffix for p in tmp_path.iterdir()} == {".png", ".svg", ".pdf"}
    assert (tmp_path / "03_kept.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "03_kept.svg").stat(
        ).st_size > 1000
    assert "seed 0" in [t.get_text() for t in figure.texts]


def light(grey: float) -> float:
    """Relative luminance of a grey in [0, 1]   (WCAG 2.1)."""
    return grey / 12.92 if grey <= 0.04045 else ((grey + 0.055) / 1.055)**2.4


@pytest.mark.parametrize("figure", [lambda: kept_counts({"a": PLAN}), lambda: moment([], total=3, label="value",
                                                                                     dimension="neurons 0", lines={})])
def test_a_figure_has_no_ground_and_is_read_on_a_light_page_and_a_dark_one(tmp_path, figure):
    drawn = figure()
    drawn.savefig(tmp_path / "screen.png")
    pixels = np.asarray(Image.open(tmp_path / "screen.png"))
    assert pixels.shape[2] == 4 and np.median(pixels[..., 3]) == 0 == pixels[0, 0, 3]
    save_figure(drawn, tmp_path, "paper", "seed 0")                 # a file is black on white
    pixels = np.asarray(Image.open(tmp_path / "paper.png").convert("L"))
    assert pixels[0, 0] == 255 and pixels.min() < 50
    assert _fetch_figure_metadata(drawn) is None                                # else JupyterLab lays a slab behind it
    assert {to_hex(each.get_color()) for each in drawn.findobj(Text)} == {to_hex(INK)}
    for page in (1.0, 0x11 / 0xff):                                             # JupyterLab's two
        bright, dark = sorted((light(float(INK)), light(page)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 4                              # 3 is WCAG's least of graphics
