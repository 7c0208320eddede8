"""Heads and neurons to look at: what the widgets show against the attention, the scores and the plan that they stand
for."""
import base64
import io
import re

import numpy as np
import pytest
import registry
import torch
from conftest import FAMILIES
from matplotlib import colormaps
from matplotlib.colors import to_rgb, to_rgba
from PIL import Image

from vitlab.criteria.units import UnitScores
from vitlab.measure.capture import attention_maps
from vitlab.models import compress, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plots.base import INK, PALETTE
from vitlab.plots.units import looked_at, over_grey
from vitlab.runtime.files import InputError
from vitlab.workbench.explore.units import head_grid, neuron_strip, units_map
from vitlab.workbench.pictures import as_input

ROUNDING = 0.5 / 255 + 1e-9                     # of a PNG
BLUE, ORANGE = map(to_rgb, PALETTE[:2])


def shown(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))) / 255


def made(dense, cut: dict[int, BlockPlan] | None = None):
    """(random scores, a plan that cuts what is said, a random symmetric redundancy) for a model."""
    shape, generator = shape_of(dense), torch.Generator().manual_seed(0)
    scores = UnitScores(heads=torch.rand(shape.depth, shape.num_heads, generator=generator),
                        neurons=torch.rand(shape.depth, shape.num_neurons, generator=generator), made_by={})
    plan = CompressionPlan(shape=shape, blocks=tuple((cut or {}).get(i, BlockPlan()) for i in range(shape.depth)))
    shared = torch.rand(shape.depth, shape.num_heads, shape.num_heads, generator=generator)
    return scores, plan, shared + shared.mT


def cell(explorer, block: int, head: int) -> int:
    """Of the grid with a row and a column of numbers."""
    return (block + 1) * explorer.heads.grid[1] + head + 1


@pytest.fixture
def pictures():
    chance = np.random.default_rng(0)
    return {name: chance.integers(0, 256, (192, 320, 3)) / 255 for name in ("noise", "other")}


@pytest.fixture
def dense(tiny_vit):
    return tiny_vit("deit")                     # 5 blocks of 3 heads and 132 neurons, 3 x 5 patches


CUT = {1: BlockPlan(heads=(0, 2), neurons=tuple(range(0, 132, 3))), 3: BlockPlan(heads=(1,))}


@pytest.fixture
def explorer(dense, pictures):
    scores, plan, shared = made(dense, CUT)
    return units_map(dense, scores, plan, pictures, shared)


@pytest.mark.parametrize("family_name", ["deit", "mae", "dinov2_reg", "vit_small_plus_patch16_dinov3",
                                         "vit_base_patch16_siglip_224", "vit_relpos_base_patch16_224"])
def test_a_click_on_a_head_shows_its_attention_on_the_picture(tiny_vit, pictures, family_name):
    dense = tiny_vit(family_name) if family_name in FAMILIES else registry.tiny(family_name, "cpu")
    shape, (scores, plan, shared) = shape_of(dense), made(dense)
    explorer = units_map(dense, scores, plan, pictures, shared)
    seen = set()
    for block, head in ((0, 1), (shape.depth - 1, 0), (shape.depth - 1, 1)):
        explorer.heads.picked = cell(explorer, block, head)
        for name in pictures:
            explorer.chooser.names.value = name
            maps = attention_maps(dense, as_input(explorer.chooser.picture, dense))[block, 0, head]      # (N, N)
            first = shape.num_prefix_tokens
            row = maps[first:, first:].mean(dim=0) if shape.pool != "token" else maps[0, first:]
            np.testing.assert_allclose(shown(explorer.looks.picture), over_grey(explorer.chooser.picture, row, shape),
                                       atol=ROUNDING)
            said = [float(re.search(r"attention ([\d.]+), ", label)[1]) for label in explorer.looks.labels]
            np.testing.assert_allclose(said, row, atol=6e-5)                    # 4 digits
            assert f"block {block}, head {head}" in explorer.looks.alt
            assert f"at most {row.max():.4f}" in explorer.line.value
            seen.add(explorer.looks.picture)
    assert len(seen) == 6


def test_the_numbers_beside_the_grid_and_what_lies_outside_choose_nothing(explorer):
    explorer.heads.picked = cell(explorer, 2, 1)
    before = explorer.looks.picture
    # the first row, the first column, nowhere
    for other in (0, 2, 4, 12, -1):
        explorer.heads.picked = other
        assert explorer.heads.picked == cell(explorer, 2, 1) and explorer.looks.picture == before
    explorer.heads.picked = cell(explorer, 2, 2)
    assert explorer.looks.picture != before


def test_the_line_says_score_place_and_what_the_plan_does(dense, explorer):
    scores, _, _ = made(dense)
    for block, head, fate in ((1, 0, "kept"), (1, 1, "cut"), (3, 1, "kept"), (3, 2, "cut"), (4, 2, "kept")):
        explorer.heads.picked = cell(explorer, block, head)
        row = scores.heads[block].tolist()
        place = sorted(row, reverse=True).index(row[head]) + 1
        assert explorer.line.value.startswith(f"Block {block}, head {head} is {fate}: score {row[head]:.4g}, place "
                                              f"{place} of 3")
        assert explorer.heads.labels[
            explorer.heads.picked] == f"block {block}, head {head}: score {row[head]:.4g}, {fate}"


def test_bars_are_the_redundancy_with_each_other_head_and_the_cut_are_orange(dense, explorer):
    shared = made(dense)[2]
    for block, head in ((1, 0), (3, 1), (4, 2)):
        explorer.heads.picked = cell(explorer, block, head)
        matrix = shared[block].numpy()
        most = max(matrix[i, j] for i in range(3) for j in range(3) if i != j)
        rows = re.findall(r"head (\d), (\w+)</div><div><div style=\"background: (#\w+);.*?width: "
                          r"([\d.]+)%.*?<div>([\d.e-]+)</div>",
                          explorer.shares.value)
        assert [int(row[0]) for row in rows] == [other for other in range(3) if other != head]
        for other, fate, colour, width, value in rows:
            stays = CUT.get(block, BlockPlan()).heads
            assert fate == ("kept" if stays is None or int(other) in stays else "cut")
            np.testing.assert_allclose(to_rgb(colour), BLUE if fate == "kept" else ORANGE, atol=ROUNDING)
            assert float(value) == pytest.approx(matrix[head, int(other)], rel=6e-3)               # 3 digits
            assert float(width) == pytest.approx(100 * matrix[head, int(other)] / most, abs=0.06)


def test_without_a_redundancy_it_is_said_and_the_rest_is_there(dense, pictures):
    explorer = units_map(dense, *made(dense)[:2], pictures)
    assert explorer.shares.value == "No redundancy was given."
    assert "image/png" in explorer._repr_mimebundle_()


def test_neurons_are_those_of_the_chosen_block_and_as_many_are_kept_as_the_plan_keeps(dense, explorer):
    scores, _, _ = made(dense)
    explorer.heads.picked = cell(explorer, 1, 0)
    assert "44 kept" in explorer.titles["neurons"].value and "88 cut" in explorer.titles["neurons"].value
    assert f"down to {scores.neurons[1][::3].min():.3g}" in explorer.titles["neurons"].value
    assert sum(int(re.search(r"(\d+) kept", label)[1]) for label in explorer.neurons.labels) == 44
    assert explorer.neurons.grid == (1, 64) and len(explorer.neurons.labels) == 64
    before = explorer.neurons.picture
    explorer.heads.picked = cell(explorer, 2, 0)
    assert "132 kept" in explorer.titles["neurons"].value and explorer.neurons.picture != before
    best = scores.neurons[2].max()
    assert explorer.neurons.labels[0].startswith(f"places 1 to 2: score {best:.3g} to ")


def test_the_strip_has_a_column_a_neuron_as_tall_as_its_score_and_a_line_at_the_number_kept():
    strip = neuron_strip(np.array([4.0, 3.0, 2.0, 0.0, 0.0]), np.array([True, True, False, True, False]), (35, 40))
    for neuron, (height, colour) in enumerate(((40, BLUE), (30, BLUE), (20, ORANGE), (1, BLUE), (1, ORANGE))):
        column = strip[:, neuron * 7 + 3]                                       # the middle of its 7
        np.testing.assert_allclose(column[40 - height:], np.tile((*colour, 1), (height, 1)))
        assert (column[:40 - height] == 0).all()                                # no ground: the page's is seen
    line = (strip == to_rgba(INK)).all(axis=(0, 2))
    assert line.nonzero()[0].tolist() == [20, 21]                               # 3 of 5 kept
    # none is cut: no line
    assert not (neuron_strip(np.ones(5), np.ones(5, dtype=bool), (35, 40)) == to_rgba(INK)).all(axis=(0, 2)).any()


def test_the_grid_is_coloured_in_each_blocks_range_and_the_cut_are_crossed(dense):
    plan = made(dense, {0: BlockPlan(heads=(0, 2)), 2: BlockPlan(heads=(1,))})[1]
    heads = np.array([[3.0, 1, 2], [5, 5, 5], [0, 10, 5], [1, 2, 3], [3, 2, 1]])
    grid = head_grid(heads, plan, (60, 40))
    assert grid.shape == (240, 240, 4)
    for numbers in (grid[:, :60], grid[:40, 60:]):                              # in grey, on no ground
        seen = numbers[..., 3] == 1
        assert seen.any() and not numbers[..., 3].all()
        np.testing.assert_allclose(numbers[seen, :3], float(INK), atol=ROUNDING)
    ranges = np.array([[1, 0, 0.5], [0, 0, 0], [0, 1, 0.5], [0, 0.5, 1], [1, 0.5, 0]])
    for block, head in np.ndindex(5, 3):
        inside = grid[40 * (block + 1):, 60 * (head + 1):][:40, :60]
        np.testing.assert_allclose(inside[20, 6], colormaps["viridis"](ranges[block, head]), atol=ROUNDING)
        crossed = (block, head) in {(0, 1), (2, 0), (2, 2)}
        # the middle of a cross is white
        np.testing.assert_allclose(inside[20, 30], 1 if crossed else inside[20, 6])


def test_over_grey_is_lowest_where_the_value_is_lowest_and_leaves_the_picture_to_be_seen(dense):
    shape, picture = shape_of(dense), np.full((192, 320, 3), 0.5)
    values = np.zeros(15)
    values[7] = 2.0                                                             # the middle patch of 3 x 5
    drawn, viridis = over_grey(picture, values, shape), colormaps["viridis"]
    np.testing.assert_allclose(drawn[5, 5], 0.4 * 0.5 + 0.6 * np.array(viridis(0.0)[:3]), atol=1e-9)
    # between pixels
    np.testing.assert_allclose(drawn[96, 160], 0.4 * 0.5 + 0.6 * np.array(viridis(1.0)[:3]), atol=0.02)
    picture[:, :160] = 0.0
    assert (over_grey(picture, np.ones(15), shape)[:, :160] < over_grey(picture, np.ones(15), shape)[:, 160:]).all()


def test_what_is_looked_at_is_the_class_tokens_row_or_the_mean_over_patches():
    attention = torch.arange(49.0).reshape(7, 7)
    assert looked_at(attention, 2).tolist() == [2, 3, 4, 5, 6]
    # the middle one of the rows 2 to 6 is 4
    assert looked_at(attention, 2, average=True).tolist() == [30, 31, 32, 33, 34]


def test_the_representation_holds_the_widget_and_a_figure_of_the_chosen_head(dense, explorer):
    explorer.heads.picked = cell(explorer, 1, 2)
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.model_id
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 500
    scores, looks, bars, ranks = explorer.figure().axes
    frame, = scores.patches
    # head 2 of block 1; crosses, black below white
    assert frame.get_xy() == (1.5, 0.5) and len(scores.collections) == 2
    np.testing.assert_allclose(looks.images[0].get_array(), shown(explorer.looks.picture), atol=ROUNDING)
    shared = made(dense)[2][1, 2]
    assert [bar.get_height() for bar in bars.patches] == pytest.approx(shared[:2].tolist())
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["0", "1"]
    np.testing.assert_allclose([bar.get_facecolor()[:3] for bar in bars.patches], [BLUE, ORANGE])
    assert ranks.get_title() == "44 of 132 neurons kept" and looks.get_title() == "attention of block 1, head 2"


def test_what_does_not_fit_the_model_is_refused(tiny_vit, dense, pictures):
    scores, plan, shared = made(dense, CUT)
    other = tiny_vit("augreg")
    with pytest.raises(InputError, match="already compressed"):
        units_map(compress(dense, plan), scores, plan, pictures)
    with pytest.raises(InputError, match="for another model"):
        units_map(dense, scores, made(other)[1], pictures)
    with pytest.raises(InputError, match=r"head scores: \(5, 2\); the model needs \(5, 3\)"):
        units_map(dense, made(other)[0], plan, pictures)
    with pytest.raises(InputError, match=r"redundancy: \(5, 3\); the model needs \(5, 3, 3\)"):
        units_map(dense, scores, plan, pictures, shared[0].expand(5, 3, 3)[:, 0])
