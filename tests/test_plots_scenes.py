"""Figures of scenes: colours that can be told apart, maps against slow loops, and the numbers read back from the
axes."""
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from vitlab.data import layouts
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, MergeReconstruct, Select, SharedUpdate
from vitlab.plan.shape import ViTShape
from vitlab.plots import (
    accuracy_against_cost,
    class_colours,
    class_iou_bars,
    coloured,
    cost_by_part,
    difference,
    outcomes,
    overlaid,
    predictions,
    save_figure,
    scene_moment,
    scene_regions,
)
from vitlab.plots.colours import GREY, IGNORE, lab, linear, seen
from vitlab.plots.scenes import GAINED, LOST, OUTCOMES, RIGHT, WRONG
from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow

matplotlib.use("agg")
SHAPE = ViTShape(img_size=(20, 30), patch_size=(10, 10), embed_dim=8, depth=3, num_heads=2, head_dim=4, num_neurons=16)
MERGE = MergeReconstruct(regions=(0, 0, 1, -1, 1, 1), weights=(.5, .5, 1 / 3, 0., 1 / 3, 1 / 3), pruned=(3,))
SHARE = SharedUpdate(regions=(0, 1, 1, 0, 2, 2), weights=(.5,) * 6)
PLAN = CompressionPlan(shape=SHAPE, blocks=(BlockPlan(tokens=MERGE), BlockPlan(), BlockPlan(tokens=SHARE)))
CLASSES = ("sky", "road", "tree", "car")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def masks(count: int, height: int = 7, width: int = 11, classes: int = 4, seed: int = 0) -> list[np.ndarray]:
    chance = np.random.default_rng(seed)
    return [chance.integers(0, classes, (height, width)).astype(np.uint8) for _ in range(count)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, 3))


def shown(axis) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


def by_title(figure) -> dict[str, list]:
    found = {}
    for axis in figure.axes:
        found.setdefault(axis.get_title().replace("\n", " "), []).append(axis)
    return found


def legends(figure) -> list[list[str]]:
    return [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]


# ---- Colours

def test_lab_is_that_of_the_standard():
    # Published values of sRGB's white, red and blue under D65 (e.g. Lindbloom's calculator), to two decimals.
    np.testing.assert_allclose(lab(linear(np.array([[1., 1, 1], [1, 0, 0], [0, 0, 1]]))),
                               [[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]], atol=0.02)


def test_the_two_simulated_visions_keep_greys_and_blues_apart_from_yellow_but_make_red_and_green_alike():
    greys = seen(np.linspace(0, 1, 5)[:, None].repeat(3, axis=1))
    np.testing.assert_allclose(greys, greys[:1].repeat(3, axis=0), atol=0.05)   # the matrices have five decimals
    red_green, blue_yellow = seen(np.array([[.7, .4, 0], [.4, .55, 0]])), seen(np.array([[.2, .2, .8], [.8, .8, 0]]))
    apart = [np.linalg.norm(pair[:, 0] - pair[:, 1], axis=1) for pair in (red_green, blue_yellow)]
    assert apart[0][2] < apart[0][0] / 3 and (apart[1][1:] > apart[1][0] / 2).all()


# In CIELAB; a just noticeable difference is about 2.3. The sizes of the embedded scenes and CamVid, Cityscapes, PASCAL
# Context, ADE20K.
@pytest.mark.parametrize("count, normal, colour_blind",
                         [(2, 50, 50), (11, 30, 14), (19, 25, 9), (60, 15, 2.3), (150, 10, 1.5)])
def test_colours_of_classes_are_apart_from_each_other_and_from_ignored_pixels(count, normal, colour_blind):
    for view, least in zip(seen(np.concatenate([class_colours(count), [[GREY] * 3]])),
                           (normal, colour_blind, colour_blind)):
        assert min(np.linalg.norm(view[i] - view[j]) for i in range(count + 1) for j in range(i)) > least


def test_colours_are_the_same_for_the_first_classes_and_can_not_be_changed_from_outside():
    few, many = class_colours(11), class_colours(255)
    assert many.shape == (255, 3) and many.min() >= 0 and many.max() <= 1
    np.testing.assert_array_equal(few, many[:11])
    few[:] = 0
    assert class_colours(11).min(axis=1).max() > 0 and len({tuple(colour) for colour in many.tolist()}) == 255


@pytest.mark.parametrize("count", [0, -1, 256, 2.0, True, None])
def test_a_number_of_classes_that_no_mask_has_is_refused(count):
    with pytest.raises(InputError, match="1 to 255"):
        class_colours(count)


def test_ignored_pixels_are_grey_and_the_others_have_their_classes_colour():
    assert IGNORE == layouts.IGNORE
    colours, mask = class_colours(4), np.array([[0, 3, 255], [2, 255, 1]], dtype=np.uint8)
    drawn = coloured(mask, colours)
    for y in range(2):
        for x in range(3):
            assert drawn[y, x].tolist() == ([GREY] * 3 if mask[y, x] == 255 else colours[mask[y, x]].tolist())


def test_an_overlay_is_between_the_image_and_the_mask():
    image, mask, colours = picture(7, 11), masks(1)[0], class_colours(4)
    np.testing.assert_array_equal(overlaid(image, mask, colours, 0.0), image)
    np.testing.assert_array_equal(overlaid(image, mask, colours, 1.0), coloured(mask, colours))
    np.testing.assert_allclose(overlaid(image, mask, colours, 0.25), 0.75 * image + 0.25 * coloured(mask, colours),
                               atol=1e-12)


def test_masks_and_overlays_that_do_not_fit_are_refused():
    mask, colours = masks(1)[0], class_colours(4)
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="opacity"):
            overlaid(picture(7, 11), mask, colours, opacity)
    with pytest.raises(InputError, match=r"the image is \(11, 7, 3\), its mask \(7, 11\)"):
        overlaid(picture(11, 7), mask, colours, 0.5)
    with pytest.raises(InputError, match="holds class 3; 0 to 2 and 255"):
        coloured(np.array([[0, 3]]), colours[:3])
    with pytest.raises(InputError, match="class -1"):
        coloured(np.array([[0, -1]]), colours)
    for wrong in (mask / 2, mask[None]):
        with pytest.raises(InputError, match=r"integers \(H, W\)"):
            coloured(wrong, colours)


# ---- What compression changes

def slow_outcomes(truth, before, after) -> list[list[int]]:
    table = {(True, True): 0, (False, False): 1, (True, False): 2, (False, True): 3}
    return [[255 if truth[y, x] == 255 else table[before[y, x] == truth[y, x], after[y, x] == truth[y, x]]
             for x in range(truth.shape[1])] for y in range(truth.shape[0])]


def test_outcomes_and_their_colours_are_those_of_slow_loops():
    truth, before, after = masks(3, classes=3)
    truth[::2, ::3] = 255
    expected = slow_outcomes(truth, before, after)
    assert outcomes(truth, before, after,
                    3).tolist() == expected and {RIGHT, WRONG, LOST, GAINED} < set(np.unique(expected).tolist())
    drawn = difference(truth, before, after, 3)
    for y, row in enumerate(expected):
        for x, what in enumerate(row):
            assert drawn[y, x].tolist() == ([GREY] * 3 if what == 255 else list(OUTCOMES[what][1]))
    np.testing.assert_array_equal(outcomes(*map(torch.from_numpy, (truth, before, after)), 3), expected)


def test_a_prediction_that_says_ignore_is_wrong_and_not_ignored():
    assert outcomes(np.array([[1, 255]]), np.array([[255, 1]]), np.array([[1, 1]]), 2).tolist() == [[GAINED, 255]]


def test_outcomes_of_masks_that_do_not_fit_are_refused():
    truth, before, after = masks(3)
    with pytest.raises(InputError, match=r"the truth is \(7, 11\), the predictions \(7, 11\) and \(7, 10\)"):
        outcomes(truth, before, after[:, 1:], 4)
    with pytest.raises(InputError, match="the second prediction: holds class 3"):
        outcomes(truth % 3, before % 3, after, 3)


def test_predictions_have_a_row_an_image_with_every_mask_and_its_shares():
    truths, dense, small, images = masks(2), masks(2, seed=1), masks(2, seed=2), [picture(7, 11),
                                                                                  picture(7, 11, seed=1)]
    truths[1][:3] = 255
    figure = predictions(images, truths, {"dense": dense, "small": small}, CLASSES, opacity=0.5)
    colours, rows = class_colours(4), np.array(figure.axes).reshape(2, 5)
    assert [axis.get_title().replace("\n", " ") for axis in rows[0]] == ["image", "truth", "dense", "small",
                                                                         "small against dense"]
    for row, image, truth, before, after in zip(rows, images, truths, dense, small):
        grey = image.mean(axis=2)[..., None].repeat(3, 2)
        for axis, wanted in zip(row, (image, *(overlaid(grey, mask, colours, 0.5) for mask in (truth, before, after)),
                                      difference(truth, before, after, 4))):
            np.testing.assert_allclose(shown(axis), wanted, atol=1e-12)
        flat = sum(slow_outcomes(truth, before, after), [])
        share = {what: 100 * flat.count(what) / (len(flat) - flat.count(255)) for what in range(4)}
        assert row[2].get_xlabel() == f"{share[RIGHT] + share[LOST]:.1f}% right"
        assert row[3].get_xlabel() == f"{share[RIGHT] + share[GAINED]:.1f}% right"
        assert row[4].get_xlabel() == f"lost {share[LOST]:.1f}%, gained {share[GAINED]:.1f}%"


def test_the_legend_has_the_classes_that_occur_in_their_colours_and_no_others():
    truth, mask = np.array([[0, 0, 255]]), np.array([[0, 3, 3]])
    figure = predictions([picture(1, 3)], [truth], {"dense": [mask]}, CLASSES)
    # one model: no differences, no legend of them
    legend, = figure.legends
    assert legends(figure) == [["sky", "car", "ignored"]] and len(figure.axes) == 3
    assert [square.get_facecolor()[:3] for square in legend.get_patches()] == [*map(tuple, class_colours(4)[[0, 3]]),
                                                                               (GREY,) * 3]


def test_of_three_models_each_difference_stands_below_its_prediction():
    truth, *three = masks(4)
    figure = predictions([picture(7, 11)], [truth], {name: [mask] for name, mask in zip("abc", three)}, CLASSES)
    titles = by_title(figure)
    for name, mask in zip("bc", three[1:]):
        above, below = titles[name][0], titles[f"{name} against a"][0]
        np.testing.assert_array_equal(shown(below), difference(truth, three[0], mask, 4))
        assert above.get_subplotspec().colspan == below.get_subplotspec().colspan
        assert above.get_subplotspec().rowspan.start + 1 == below.get_subplotspec().rowspan.start
    assert figure.get_size_inches()[0] < 10


def test_an_image_without_a_pixel_that_counts_has_no_share():
    figure = predictions([picture(7, 11)], [np.full((7, 11), 255)], {"dense": masks(1)}, CLASSES)
    assert figure.axes[2].get_xlabel() == "- right"


@pytest.mark.parametrize("change, said", [
    ({"images": []}, "0 images and 1 models"), ({"predicted": {}}, "1 images and 0 models"),
    ({"predicted": {"small": masks(2)}}, "small: 2 masks for 1 images"), ({"truths": masks(3)}, "truth: 3 masks for 1 "
                                                                                                "images"),
    ({"predicted": {"small": masks(1, width=10)}}, r"small, image 0: \(7, 10\), its truth \(7, 11\)"),
    ({"predicted": {"small": masks(1, classes=40)}}, "small, image 0: holds class"),
    ({"predicted": {"truth": masks(1)}}, "another name"), ({"images": [picture(11, 7)]}, r"the image is \(11, 7, 3\)"),
    ({"opacity": 2}, "opacity is 2")])
def test_predictions_that_do_not_fit_are_refused(change, said):
    given = {"images": [picture(7, 11)], "truths": masks(1), "predicted": {"small": masks(1)}, "classes": CLASSES,
             **change}
    with pytest.raises(InputError, match=said):
        predictions(**given)


# ---- Regions

def test_regions_over_a_scene_are_those_of_rules_by_place_and_of_given_places():
    image = picture(20, 30)
    figure = scene_regions(image, PLAN, [0, 1, 2])
    above, below = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_title() for axis in above] == [f"block {i}: 6 patches in {n} tokens" for i,
                                                    n in enumerate((2, 6, 3))]
    # Grids 0 0 1 / -1 1 1, 0 1 2 / 3 4 5 and 0 1 1 / 0 2 2: neighbours that differ.
    assert [len(axis.collections[0].get_segments()) for axis in above] == [4, 7, 4]
    cells = [image[10 * (j // 3):, 10 * (j % 3):][:10, :10].reshape(-1, 3).mean(axis=0) for j in range(6)]
    for axis, regions in zip(below, (MERGE.regions, range(6), SHARE.regions)):
        for j in range(6):
            mean = cells[j] if regions[j] < 0 else np.mean([cells[i] for i in range(6) if regions[i] == regions[j]],
                                                           axis=0)
            np.testing.assert_allclose(shown(axis)[10 * (j // 3) + 5, 10 * (j % 3) + 5], mean, atol=1e-12)
    changed = (shown(above[0]) != image).any(axis=2)
    assert changed[10:, :10].all() and changed.sum() == 100                     # patch 3 is pruned
    assert legends(figure) == [["pruned: goes around the block"]] and not legends(scene_regions(image, PLAN, [2]))


def test_merging_by_content_is_shown_by_the_places_of_the_image():
    plan = CompressionPlan(shape=SHAPE,
                           blocks=(BlockPlan(), BlockPlan(tokens=Match(merged=2)), BlockPlan(tokens=Match(merged=0))))
    places = {1: torch.tensor([0, 0, 1, 2, 3, 1]), 2: np.array([0, 0, 0, 1, 1, 0])}
    figure = scene_regions(picture(20, 30), plan, [0, 1, 2], places)
    assert [len(axis.collections[0].get_segments()) for axis in figure.axes[:3]] == [7, 5, 3]
    for block in (1, 2):
        with pytest.raises(InputError, match=f"block {block} merges by content"):
            scene_regions(picture(20, 30), plan, [block])
    with pytest.raises(InputError, match=r"places of block 1 are \(5,\)"):
        scene_regions(picture(20, 30), plan, [1], {1: torch.arange(5)})
    idle = CompressionPlan(shape=SHAPE, blocks=(BlockPlan(tokens=Match(merged=0)),) * 3)
    assert scene_regions(picture(20, 30), idle, [1]).axes[0].get_title() == "block 1: 6 patches in 6 tokens"


def test_selection_needs_places_too():
    plan = CompressionPlan(shape=SHAPE, blocks=(BlockPlan(tokens=Select(kept=3)), BlockPlan(), BlockPlan()))
    with pytest.raises(InputError, match="its places are needed"):
        scene_regions(picture(20, 30), plan, [0])


def test_a_scene_smaller_than_the_models_images_is_shown_at_its_own_size_and_continued_at_its_edge():
    image = picture(17, 23)
    above, below = scene_regions(image, PLAN, [1]).axes
    np.testing.assert_array_equal(shown(above), image)
    assert above.get_xlim() == (-0.5, 22.5) and above.get_ylim() == (16.5, -0.5) and shown(below).shape == (17, 23, 3)
    last = [image[min(y, 16), min(x, 22)] for y in range(10, 20) for x in range(20, 30)]
    np.testing.assert_allclose(shown(below)[16, 22], np.mean(last, axis=0), atol=1e-12)
    # three columns of pairs, and one pair to spare
    assert len(scene_regions(image, PLAN, [0, 1, 2, 0, 1]).axes) == 12


@pytest.mark.parametrize("size, blocks, said",
                         [((21, 30), [0], "image is 21 x 30, the model's 20 x 30"), ((20, 30), [], "no block"),
                                                ((20, 30), [3], "block 3 is not there"),
                          ((20, 30), [-1], "block -1 is not there")])
def test_regions_that_are_not_there_are_refused(size, blocks, said):
    with pytest.raises(InputError, match=said):
        scene_regions(picture(*size), PLAN, blocks)


def test_a_moment_shows_the_scene_both_predictions_and_the_tokens_of_a_block():
    truth, dense, small = masks(3, 20, 30)
    image = picture(20, 30)
    figure = scene_moment(image, truth, dense, small, CLASSES, PLAN, 2, note="rule x, 1 GMAC", opacity=0.3)
    titles = {title: axis for title, (axis, *_) in by_title(figure).items()}
    grey, colours = image.mean(axis=2)[..., None].repeat(3, 2), class_colours(4)
    for name, mask in (("truth", truth), ("dense", dense), ("compressed", small)):
        np.testing.assert_allclose(shown(titles[name]), overlaid(grey, mask, colours, 0.3), atol=1e-12)
    np.testing.assert_array_equal(shown(titles["compressed against dense"]), difference(truth, dense, small, 4))
    assert len(titles["block 2: 6 patches in 3 tokens"].collections[0].get_segments()) == 4
    assert "rule x, 1 GMAC" in [legend.get_title().get_text() for legend in figure.legends]
    with pytest.raises(InputError, match="compressed, image 0: "):
        scene_moment(image, truth, dense, small[1:], CLASSES, PLAN, 2)


# ---- Classes and costs

def bars(axis) -> dict[str, list[float]]:
    return {container.get_label(): [bar.get_height() for bar in container] for container in axis.containers}


def test_bars_are_the_ious_of_the_classes_and_what_has_none_is_left_out_and_said():
    nan = float("nan")
    figure = class_iou_bars({"dense": [90, nan, 30, nan], "small": torch.tensor([80, nan, 50, 10])}, CLASSES)
    axis, = figure.axes
    dense, small = bars(axis).values()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["sky", "tree", "car"]
    np.testing.assert_array_equal(dense, [90, 30, nan])
    assert small == [80, 50, 10] and list(bars(axis)) == ["dense: mIoU 60.0%", "small: mIoU 46.7%"]
    assert figure.get_supxlabel() == "in neither truth nor prediction, left out: road; no bar of dense: car"
    assert not class_iou_bars({"dense": [1, 2, 3, 4]}, CLASSES).get_supxlabel()


def test_classes_are_sorted_by_the_ious_of_the_model_named():
    given = {"dense": [20, 90, 40, 60], "small": [10, 5, float("nan"), 7]}
    names = {by: [tick.get_text() for tick in class_iou_bars(given, CLASSES, by=by).axes[0].get_xticklabels()]
             for by in ("dense", "small")}
    assert names == {"dense": ["road", "car", "tree", "sky"], "small": ["sky", "car", "road", "tree"]}
    dense, small = bars(class_iou_bars(given, CLASSES, by="dense").axes[0]).values()
    assert dense == [90, 60, 40, 20]
    np.testing.assert_array_equal(small, [5, 7, float("nan"), 10])


@pytest.mark.parametrize("count", [2, 11, 60, 150])
def test_no_class_name_touches_another_and_every_class_has_its_bar(count):
    names = [f"longer name {i}" for i in range(count)]
    figure = class_iou_bars({"a": np.linspace(1, 100, count), "b": np.full(count, 50.)}, names)
    figure.canvas.draw()
    heights = [height for axis in figure.axes for height in bars(axis)["a: mIoU 50.5%"]]
    np.testing.assert_allclose(heights, np.linspace(1, 100, count))
    for axis in figure.axes:
        ticks = axis.get_xticklabels()
        step = (axis.transData.transform([(1, 0)]) - axis.transData.transform([(0, 0)]))[0, 0]
        # a turned line of text is as wide as its font is high
        assert step > 1.05 * ticks[0].get_fontsize() * figure.dpi / 72
    assert figure.get_size_inches()[0] < 10


@pytest.mark.parametrize("ious, by, said", [
    ({}, None, "no model"), ({"a": [1, 2, 3]}, None, r"IoU of \(3,\); one of each of 4"),
    ({"a": [1, 2, 3, 101]}, None, r"not in \[0, 100\]"), ({"a": [-1, 2, 3, 4]}, None, r"not in \[0, 100\]"),
    ({"a": [float("nan")] * 4}, None, "no class has an IoU"),
    ({"a": [1, 2, 3, 4]}, "b", "by is 'b'; known are")])
def test_ious_that_can_not_be_are_refused(ious, by, said):
    with pytest.raises(InputError, match=said):
        class_iou_bars(ious, CLASSES, by=by)


def test_cost_by_part_stacks_each_parts_macs_and_shares_with_attention_at_the_bottom():
    parts = {"small": {"qkv": 30, "attention": 10, "decoder": 60, "fold": 0, "total": 100},
             "large": {"qkv": 120, "attention": 160, "decoder": 240, "fold": 0, "total": 520}}
    figure = cost_by_part({name: {part: count * 10**7 for part, count in each.items()} for name, each in parts.items()})
    left, right = figure.axes
    for axis, wanted in ((left, [(.1, 1.6), (.3, 1.2), (.6, 2.4)]),
                         (right, [(10, 100 * 160 / 520), (30, 100 * 120 / 520), (60, 100 * 240 / 520)])):
        assert list(bars(axis)) == ["attention", "qkv", "decoder"]
        np.testing.assert_allclose(list(bars(axis).values()), wanted)
    assert [bar.get_y()
            for bar in left.containers[0]] == [0,
                                               0] and [bar.get_y()
                                                       for bar in left.containers[2]] == pytest.approx([.4, 2.8])
    assert left.get_ylabel() == "GMACs per image" and [text.get_text() for text in left.texts] == ["1", "5.2"]
    assert [text.get_text() for text in right.texts] == ["10%", "31%"]
    colours = [container[0].get_facecolor() for container in left.containers]
    assert len(set(colours)) == 3 and legends(figure) == [["attention", "qkv", "decoder"]]


def test_more_parts_than_the_palette_has_colours_still_differ():
    axis = cost_by_part({"one": {f"part {i}": 1 + i for i in range(13)}}).axes[0]
    assert len({to_rgb(container[0].get_facecolor())
                for container in axis.containers}) == 13 and axis.get_ylabel() == "10^6 MACs per image"


@pytest.mark.parametrize("given, said",
                         [({}, "no bar"), ({"a": {"mlp": 0}}, "a: MACs"), ({"a": {"mlp": 3, "qkv": -1}}, "a: MACs")])
def test_costs_that_can_not_be_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        cost_by_part(given)


def test_another_rate_is_set_against_costs_by_its_name():
    rows = [ResultRow(model="a", top1_pct=70, top5_pct=90, gmacs=1.0), ResultRow(model="b", top1_pct=60, gmacs=.5)]
    axis, = accuracy_against_cost(rows, "top5_pct").axes
    assert [(*line.get_xdata(), *line.get_ydata())
            for line in axis.lines] == [(1, 90)] and axis.get_ylabel() == "top-5 (%)"
    with pytest.raises(InputError, match="'gmacs' is not known"):
        accuracy_against_cost(rows, "gmacs")


def test_a_caption_goes_below_the_legends_and_moves_none(tmp_path):
    images, given = [np.full((9, 14, 3), 0.5)], [np.arange(126).reshape(9, 14) % 5]
    for name, caption in (("plain", ""), ("captioned", "seed 0, keep rate 0.7")):
        figure = predictions(images, given, {"dense": given, "small": given}, list("abcde"))
        save_figure(figure, tmp_path, name, caption)
    plain, captioned = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) < 250
                        for name in ("plain", "captioned"))
    before, after = (np.split(rows, np.flatnonzero(np.diff(rows) > 3) + 1) for rows in (
        # runs of rows with ink, from above; the caption's is last
        each.any(axis=1).nonzero()[0] for each in (plain, captioned)))
    assert len(after) == len(before) + 1 and after[-1][0] > after[-2][-1]


def test_blocks_inside_a_span_are_drawn_with_the_tokens_of_its_first():
    shape, rest = PLAN.shape, PLAN.shape.num_patches - 1
    rule = MergeReconstruct(regions=(-1, *[0] * rest), weights=(0.0, *[0.5] * rest), pruned=(0,), span=2)
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(tokens=rule), *[BlockPlan()] * (shape.depth - 1)))
    for block, tokens in ((0, 1), (1, 1), (2, shape.num_patches)):
        title = scene_regions(picture(*shape.img_size), plan, [block]).axes[0].get_title()
        assert title == f"block {block}: {shape.num_patches} patches in {tokens} tokens"
