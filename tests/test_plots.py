"""Figures: the numbers they show, read back from the axes."""
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plots import accuracy_against_cost, kept_counts, merge_map, save_figure, score_maps, to_image, training_curves
from vitlab.plots.tokens import through_matrices
from vitlab.results import ResultRow
from vitlab.rules import MergeReconstruct
from vitlab.shape import ViTShape

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
    expected = patches([.2, .2, .4, .9, .4, .4])            # means of patches 0, 1 and of 2, 4, 5; 3 is pruned and stays
    np.testing.assert_allclose(means, expected, atol=1e-12)
    np.testing.assert_allclose(back, expected, atol=1e-12)  # uniform weights: what comes back is the mean


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


def test_accuracy_against_cost_has_a_named_point_per_row():
    rows = [ResultRow(model="a", top1_pct=70, gmacs=1.0, throughput_img_s=10.0), ResultRow(model="b", top1_pct=60, gmacs=.5)]
    figure = accuracy_against_cost(rows)
    assert [(line.get_label(), *line.get_xdata(), *line.get_ydata()) for line in figure.axes[0].lines] == [("a", 1, 70), ("b", .5, 60)]
    assert len(figure.axes[1].lines) == 1


def test_training_curves_show_the_log():
    log = [{"epoch": e, "loss": 1 / e, "train_slice_top1_pct": 10. * e, "lr": .1} for e in (1, 2)]
    figure = training_curves({"run": log})
    assert [list(axis.lines[0].get_ydata()) for axis in figure.axes] == [[1, .5], [10, 20], [.1, .1]]


def test_to_image_undoes_the_normalisation():
    x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (.4, .5, .6), (.2, .3, .4)
    normal = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    np.testing.assert_allclose(to_image(normal, mean, std), x.permute(1, 2, 0), atol=1e-6)


def test_save_figure_writes_every_format_with_the_caption(tmp_path):
    figure = kept_counts({"a": PLAN})
    save_figure(figure, tmp_path, "03_kept", "seed 0", formats=("png", "svg", "pdf"))
    assert {p.suffix for p in tmp_path.iterdir()} == {".png", ".svg", ".pdf"}
    assert (tmp_path / "03_kept.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "03_kept.svg").stat().st_size > 1000
    assert "seed 0" in [t.get_text() for t in figure.texts]
