"""The scene view: what it shows against the model itself, the cost module and slow loops over pixels."""
import base64
import copy
import io
import re

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image

from vitlab.criteria.planning import prune_and_merge
from vitlab.data.layouts import IGNORE
from vitlab.data.scene_data import SceneData, Scenes
from vitlab.measure.capture import token_places
from vitlab.models import compress, shape_of
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import Match
from vitlab.plots.colours import class_colours, overlaid
from vitlab.plots.scenes import OPACITY, difference
from vitlab.runtime.files import InputError
from vitlab.workbench.explore.scene_view import scene_view

CENTER, MERGE, SHARE = "Prune and Merge, one budget for all", "Prune and Merge, a budget per block", "shared updates"
MATCH, GIVEN = "merging by content", "the given plan"
BY_PLACE = {CENTER: {"rule": "center"}, MERGE: {"rule": "merge"}, SHARE: {"rule": "center", "share": True}}
ROUNDING = 0.5 / 255 + 1e-9                     # of a PNG
CLASSES = ["sky", "road", "tree", "car", "pole"]
# as the model's images, smaller (padded), larger (their middle is taken)
SIZES = ((48, 80), (41, 67), (61, 93))


class Reader:
    """Scenes of noise, one of each of SIZES, some pixels ignored."""

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        chance = np.random.default_rng(i)
        mask = chance.integers(0, 5, SIZES[i]).astype(np.uint8)
        mask[::7] = IGNORE
        return Image.fromarray(chance.integers(0, 256, (*SIZES[i], 3), dtype=np.uint8)), mask

    def filename(self, i: int) -> str:
        return f"noise/{i}"


@pytest.fixture
def data():
    return SceneData("noise", {"train": Scenes(Reader()), "val": Scenes(Reader(), [0, 1, 2])}, CLASSES)


@pytest.fixture
def model(tiny_vit):
    made = Segmenter(as_encoder(tiny_vit("deit")), 5, "linear")                 # 3 x 5 patches of 16
    randomise(made.decoder, 1)
    return made.eval()


@pytest.fixture
def view(model, data):
    return scene_view(model, data, scores_of(model), keep_rate=0.6)


def scores_of(model) -> torch.Tensor:
    shape = shape_of(model)
    return torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.1


def drawn(view, name: str) -> np.ndarray:
    """A panel at the scene's own pixels: every sixth of the picture, which is 6 times as large."""
    image = np.asarray(Image.open(io.BytesIO(view.panels[name].picture))) / 255
    assert image.shape == (48 * 6, 80 * 6, 3)
    return image[3::6, 3::6]


def seen(i: int) -> tuple[np.ndarray, np.ndarray]:
    """(image, mask) of what the view shows of a scene: at most 48 x 80 of its middle."""
    image, mask = Reader()[i]
    image, (top, left) = np.asarray(image) / 255, [max(0, (side - most) // 2) for side,
                                                   most in zip(mask.shape, (48, 80))]
    return image[top:top + 48, left:left + 80], mask[top:top + 48, left:left + 80]


@torch.no_grad()
def predicted(model, i: int) -> np.ndarray:
    """By the model itself: normalised by hand, padded by hand."""
    image, _ = seen(i)
    x = torch.zeros(1, 3, 48, 80)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x[0, :, :image.shape[0], :image.shape[1]] = torch.from_numpy((image - mean) / std).permute(2, 0, 1)
    return model(x)[0].argmax(dim=0).numpy()[:image.shape[0], :image.shape[1]]


def slow_miou(predicted: np.ndarray, truth: np.ndarray) -> float:
    ious = []
    for k in range(5):
        both = either = 0
        for p, t in zip(predicted.flat, truth.flat):
            if t != IGNORE:
                both, either = both + (p == k == t), either + (p == k or t == k)
        ious += [both / either] if either else []
    return 100 * sum(ious) / len(ious)


def numbers(line: str) -> tuple[float, ...]:
    """(GMACs, of the dense model, mIoU dense, compressed) that the line says."""
    cost, worth = r"Whole model: ([\d.e-]+) of ([\d.e-]+) GMACs", r"mIoU of this image: dense ([\d.]+)%, compressed ([\d.]+)%"  # noqa: E501
    return tuple(map(float, re.search(f"{cost}.*{worth}", line).groups()))


def small(model, rule: str, keep_rate: float, prune_rate: float = 0.0) -> tuple[CompressionPlan, Segmenter]:
    shape = shape_of(model)
    # an equal ratio in the middle half of five blocks, which is the blocks 1 and 2
    if rule == MATCH:
        left, blocks = 15, [BlockPlan()]
        for _ in range(2):
            merged = min(left - int(left * keep_rate ** 0.5), left // 2)
            blocks, left = [*blocks, BlockPlan(tokens=Match(merged=merged))], left - merged
        plan = CompressionPlan(shape=shape, blocks=(*blocks, *[BlockPlan(tokens=Match(merged=0))] * 2))
    else:
        plan = prune_and_merge(scores_of(model), shape, keep_rate=keep_rate, prune_rate=prune_rate, **BY_PLACE[rule])
    return plan, compress(model, plan)


def panel(mask: np.ndarray, image: np.ndarray, opacity: float) -> np.ndarray:
    """A mask over its image in grey."""
    return overlaid(image.mean(axis=2)[..., None].repeat(3, 2), mask, class_colours(5), opacity)


@pytest.mark.parametrize("rule", [CENTER, MERGE, SHARE, MATCH])
@pytest.mark.parametrize("i", range(3))
def test_the_panels_are_the_predictions_of_the_two_models_and_their_difference(model, view, rule, i):
    view.rule.value, view.image.value, view.keep_rate.value, view.opacity.value = rule, i, 0.4, 0.7
    plan, compressed = small(model, rule, 0.4)
    (image, truth), dense, after = seen(i), predicted(model, i), predicted(compressed, i)
    inside = np.s_[:image.shape[0], :image.shape[1]]
    assert (dense != after).any()
    np.testing.assert_allclose(drawn(view, "dense")[inside], panel(dense, image, 0.7), atol=ROUNDING)
    np.testing.assert_allclose(drawn(view, "compressed")[inside], panel(after, image, 0.7), atol=ROUNDING)
    np.testing.assert_allclose(drawn(view, "difference")[inside], difference(truth, dense, after, 5), atol=ROUNDING)
    # the padding is ignored: one grey on all three
    if i == 1:
        for name in ("dense", "compressed", "difference"):
            outside = np.concatenate([drawn(view, name)[41:].reshape(-1, 3), drawn(view, name)[:, 67:].reshape(-1, 3)])
            assert len(np.unique(outside, axis=0)) == 1 and np.ptp(outside[0]) < 0.1
    given = numbers(view.line.value)
    # 4 digits
    assert given[:2] == pytest.approx((gmacs(plan), gmacs(CompressionPlan.empty(plan.shape))), rel=6e-4)
    # one decimal
    assert given[2:] == pytest.approx((slow_miou(dense, truth), slow_miou(after, truth)), abs=0.051)


@pytest.mark.parametrize("rule", [CENTER, MERGE, SHARE, MATCH])
def test_keeping_every_token_shows_the_dense_picture_at_the_dense_cost(view, rule):
    view.rule.value, view.keep_rate.value = rule, 1.0
    for i in range(3):
        view.image.value = i
        np.testing.assert_array_equal(drawn(view, "compressed"), drawn(view, "dense"))
        given = numbers(view.line.value)
        assert given[0] == given[1] and given[2] == given[3]
        assert view.panels["regions"].groups == list(range(15))


@pytest.mark.parametrize("rule", [CENTER, SHARE, MATCH])
def test_every_slider_changes_what_is_shown(view, rule):
    view.rule.value = rule

    def now() -> tuple[bytes, ...]:
        return tuple(view.panels[name].picture for name in ("compressed", "dense", "difference", "regions"))
    for widget, value, changed in ((view.keep_rate, 0.2, (True, False, True, True)),
                                   (view.opacity, 0.1, (True, True, False, False)), (view.image, 1, (True,) * 4)):
        before = now()
        widget.value = value
        assert tuple(a != b for a, b in zip(before, now())) == changed
    if rule != MATCH:
        before, cost = now(), numbers(view.line.value)[0]
        view.prune_rate.value = 0.5
        # which may rise: what is carried is folded
        assert now()[3] != before[3] and numbers(view.line.value)[0] != cost


@pytest.mark.parametrize("rule", [CENTER, SHARE])
def test_regions_are_those_of_the_block_and_point_at_the_same_patches_on_all_panels(model, view, rule):
    view.rule.value, view.prune_rate.value = rule, 0.3
    plan, _ = small(model, rule, 0.6, 0.3)
    for block, cut in enumerate(plan.blocks):
        view.block.value = block
        assert {tuple(cells.groups) for cells in view.panels.values()} == {cut.tokens.regions}
        labels = view.panels["dense"].labels
        assert [j for j in range(15) if "pruned" in labels[j]] == list(cut.tokens.pruned) and len(cut.tokens.pruned) > 0
    view.panels["regions"].picked = 7
    assert all(cells.picked == 7 for cells in view.panels.values())
    assert len({cells.alt for cells in view.panels.values()}) == 4


def test_regions_of_merging_by_content_are_the_images_own(model, view):
    view.rule.value, view.keep_rate.value, view.block.value = MATCH, 0.4, 3
    found = set()
    for i in range(3):
        view.image.value = i
        _, compressed = small(model, MATCH, 0.4)
        places = token_places(compressed.encoder, view.views.scene(i).x)[3][0]
        assert view.panels["regions"].groups == places.tolist()
        found.add(tuple(places.tolist()))
    assert len(found) == 3


def test_a_larger_scene_is_seen_by_its_middle_and_a_smaller_one_at_the_top_left(view):
    view.opacity.value, view.keep_rate.value = 0.0, 1.0
    for i in range(3):
        view.image.value = i
        image, _ = seen(i)
        grey = image.mean(axis=2)[..., None].repeat(3, 2)
        np.testing.assert_allclose(drawn(view, "dense")[:image.shape[0], :image.shape[1]], grey, atol=ROUNDING)


def test_the_rules_are_those_that_keep_every_patch_and_a_given_plan_comes_first(model, data):
    assert scene_view(model, data).rule.options == (MATCH,)                     # no selection: every patch has a class
    plan, compressed = small(model, SHARE, 0.3)
    view = scene_view(model, data, scores_of(model), plan)
    assert view.rule.options == (GIVEN, CENTER, MERGE, SHARE, MATCH)
    assert view.keep_rate.disabled and view.prune_rate.disabled
    np.testing.assert_allclose(drawn(view, "compressed"),
                               panel(predicted(compressed, 0), seen(0)[0], view.opacity.value), atol=ROUNDING)
    view.rule.value = MATCH
    assert not view.keep_rate.disabled and view.prune_rate.disabled


def test_a_model_without_a_class_token_is_taken_too(tiny_vit, data):
    model = Segmenter(as_encoder(tiny_vit("deit", class_token=False, global_pool="avg")), 5, "linear").eval()
    view = scene_view(model, data, keep_rate=0.4)
    assert len(set(view.panels["regions"].groups)) < 15


def test_the_split_to_choose_on_is_shown_unless_another_is_named(model, data):
    assert scene_view(model, data).image.max == 2
    data.splits["test"] = Scenes(Reader(), [2])
    assert scene_view(model, data, split="test").image.max == 0
    with pytest.raises(InputError, match="no split 'other'"):
        scene_view(model, data, split="other")


def test_a_model_that_trains_is_shown_without_its_dropout_and_goes_on_training(model, data):
    model = Segmenter(model.encoder, 5, "mask_transformer", drop=0.5).train()
    view = scene_view(model, data)
    view.keep_rate.value = 0.3
    np.testing.assert_allclose(drawn(view, "dense"),
                               panel(predicted(copy.deepcopy(model).eval(), 0), seen(0)[0], OPACITY), atol=ROUNDING)
    assert all(module.training for module in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_what_does_not_fit_is_refused_before_a_widget_is_shown(tiny_vit, model, data):
    with pytest.raises(InputError, match="a VisionTransformer came in; a Segmenter is needed"):
        scene_view(tiny_vit("deit"), data)
    with pytest.raises(InputError, match="already compressed"):
        scene_view(small(model, CENTER, 0.5)[1], data)
    with pytest.raises(InputError, match="5 classes, but the model's decoder has 4"):
        scene_view(Segmenter(model.encoder, 4, "linear"), data)
    with pytest.raises(InputError, match=r"token scores are \(5, 14\)"):
        scene_view(model, data, scores_of(model)[:, 1:])
    with pytest.raises(InputError, match="for another model"):
        scene_view(model, data, plan=CompressionPlan.empty(shape_of(as_encoder(tiny_vit("augreg")))))
    with pytest.raises(InputError, match="opacity is 1.5"):
        scene_view(model, data, opacity=1.5)


def test_the_representation_holds_the_widget_and_a_figure_of_its_state(model, view):
    view.rule.value, view.block.value, view.image.value = SHARE, 3, 1
    bundle = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 800
    figure = view.figure()
    notes = " ".join(legend.get_title().get_text() for legend in figure.legends).replace("\n", " ")
    assert view.line.value in notes and SHARE in notes and "Image 1" in notes
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:2] == ["image",
                          "truth"] and titles[2].startswith("block 3") and titles[3:5] == ["dense", "compressed"]
    _, compressed = small(model, SHARE, 0.6)
    wanted = panel(predicted(compressed, 1), seen(1)[0], view.opacity.value)
    # the image came back from a float32
    np.testing.assert_allclose(figure.axes[4].images[0].get_array(), wanted, atol=1e-6)


def test_the_legend_names_the_classes_that_are_predicted(model, view):
    found = set(np.unique(predicted(model, 0))) | set(np.unique(predicted(small(model, CENTER, 0.6)[1], 0)))
    for k, name in enumerate(CLASSES):
        assert (name in view.legend.value) == (k in found)
