"""What compression changed of Segmenters: counts, edges, intervals and pictures against slow loops over pixels."""
import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from segmenting_fixtures import CLASSES, batches, given, match_plan, opened, small, units_plan
from training_fixtures import one_thread  # noqa: F401

from vitlab.data.layouts import IGNORE
from vitlab.measure.changes import blame
from vitlab.measure.corruptions import corrupted, robustness
from vitlab.measure.distance import output_of, outputs
from vitlab.measure.scene_changes import SceneChanges, counts_of
from vitlab.models import compress
from vitlab.plan import BlockPlan
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.workbench import changes as workbench
from vitlab.workbench.explore.changes import changes_explorer

QUIET = RunConfig(workers=0, quiet=True, device="cpu")


def at_edge(classes: torch.Tensor, y: int, x: int, width: int) -> bool:
    """Whether another class, or what is outside the image, is in the square of 2 width + 1 pixels around one."""
    height, wide = classes.shape
    return any(not (0 <= i < height and 0 <= j < wide) or classes[i, j] != classes[y, x]
               for i in range(y - width, y + width + 1) for j in range(x - width, x + width + 1))


def slow_counts(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    width = max(1, round(0.02 * math.sqrt(truth.shape[0]**2 + truth.shape[1]**2)))
    predicted = torch.where(truth == IGNORE, IGNORE, predicted)
    found = torch.zeros(2, 3, classes, dtype=torch.int64)
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            wanted, said = int(truth[y, x]), int(predicted[y, x])
            if wanted == IGNORE:
                continue
            for part, (of_truth, of_given) in enumerate(((True, True), (at_edge(truth, y, x, width),
                                                                       at_edge(predicted, y, x, width)))):
                found[part, 0, wanted] += of_truth and of_given and wanted == said
                found[part, 1, wanted] += of_truth
                found[part, 2, said] += of_given
    return found


def blobs(seed: int, size: tuple[int, int] = (41, 59), ignored: float = 0.0) -> torch.Tensor:
    """Classes in squares of 13 pixels, so that some pixels are no edge; a share of the squares is ignored."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(3, (5, 8), generator=generator)
    coarse[torch.rand(coarse.shape, generator=generator) < ignored] = IGNORE
    return coarse.repeat_interleave(13, 0).repeat_interleave(13, 1)[:size[0], :size[1]]


def test_pixels_of_classes_and_of_their_edges_are_those_of_slow_loops():
    truth, predicted = blobs(0, ignored=0.2), blobs(1)
    found, right = counts_of([predicted, truth.where(truth != IGNORE, 0)], truth, 3)
    assert torch.equal(found, slow_counts(predicted, truth, 3))
    assert torch.equal(right[:, 0], right[:, 1]) and torch.equal(right[:, 0], right[:, 2])     # nothing is missed
    assert (found[1] < found[0]).any() and found[1, 0].sum() > 0               # some are no edge, some edges are right


@pytest.fixture(scope="module")
def pair():
    dense = small()
    return dense, compress(dense, match_plan(dense)).eval()


def test_a_pass_counts_the_pixels_that_moved_and_those_that_each_model_has_right(pair, tmp_path):
    dense, model = pair
    scenes = batches((2, 1))
    found = SceneChanges.between(dense, {"itself": dense, "it": model}, scenes, progress=False)
    assert not found["itself"].moved.any() and not found["itself"].taken.any()
    changes = found["it"]
    number = 0
    for images, masks in scenes:
        with torch.inference_mode():
            before, after = (each(images).argmax(dim=1) for each in (dense, model))
        for i in range(len(images)):
            assert int(changes.moved[number]) == int((before[i] != after[i]).sum())
            for side, said in enumerate((before[i], after[i])):
                assert torch.equal(changes.counts[side, :, number].long(), slow_counts(said, masks[i], CLASSES))
            number += 1
    assert changes.distance.tolist() == [int(n) / (24 * 40) for n in changes.moved]
    order = changes.order()
    assert order and changes.distance[order].tolist() == sorted(changes.distance[order].tolist(), reverse=True)
    changes.save(tmp_path / "changes.safetensors")
    again = SceneChanges.load(tmp_path / "changes.safetensors")
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(changes).items())
    taken = changes.appeared()
    assert sum(row["pixels"] for row in taken) == int(changes.taken.sum()) > 0
    assert [row["pixels"] for row in taken] == sorted((row["pixels"] for row in taken), reverse=True)


def counted(seed: int, images: int = 29) -> SceneChanges:
    """Of three classes, the last in neither truth nor prediction; the compressed model loses a tenth of the first."""
    chance = np.random.default_rng(seed)
    counts = np.zeros((2, 2, images, 3, 3), dtype=np.int64)
    true = chance.integers(50, 100, (images, 2))
    for side, share in enumerate(((0.9, 0.8), (0.8, 0.8))):
        right = (true * (np.array(share) + chance.normal(0, 0.03, true.shape))).astype(int)
        counts[side, :, :, 0, :2], counts[side, :, :, 1, :2] = right, true
        counts[side, :, :, 2, 0] = right[:, 0] + true[:, 1] - right[:, 1]
        counts[side, :, :, 2, 1] = right[:, 1] + true[:, 0] - right[:, 0]
    return SceneChanges(pixels=torch.full((images,), 200), moved=torch.zeros(images), counts=torch.from_numpy(counts),
                        taken=torch.zeros(3, 3, dtype=torch.int64))


def test_of_one_image_no_interval_is_known():
    changes = counted(0, images=1)
    assert all(math.isnan(row["low"]) and math.isnan(row["high"]) for row in changes.by_class())
    assert math.isnan(changes.mean()[2]) and math.isfinite(changes.mean()[1])
    some = counted(0, images=5)
    some.counts[:, :, 1:, :, 0] = 0                                 # the first class is in one of them
    rows = {row["class"]: row for row in some.by_class()}
    assert math.isnan(rows["0"]["low"]) and math.isfinite(rows["1"]["low"])


def test_iou_of_classes_is_that_of_all_pixels_and_its_interval_that_of_images_drawn_again():
    changes = counted(0)
    rows = {row["class"]: row for row in changes.by_class()}
    assert list(rows) == ["0", "1"] and rows["0"]["difference"] < rows["1"]["difference"] and rows["0"]["images"] == 29
    counts = changes.counts[:, 0].numpy()                                       # (2, N, 3, K)

    def iou(side: int, k: int, chosen: np.ndarray) -> float:
        right, true, said = counts[side, chosen, :, k].sum(axis=0)
        return 100 * right / (true + said - right)
    chance, every = np.random.default_rng(7), np.arange(29)
    for k in (0, 1):
        row, gained = rows[str(k)], []
        assert (row["dense_pct"], row["compressed_pct"]) == (pytest.approx(iou(0, k, every)),
                                                             pytest.approx(iou(1, k, every)))
        for _ in range(1000):
            chosen = chance.integers(29, size=29)
            gained.append(iou(1, k, chosen) - iou(0, k, chosen))
        # quantiles of 1000 draws are known to about a tenth of the spread
        assert (row["low"], row["high"]) == pytest.approx(np.quantile(gained, [0.025, 0.975]),
                                                          abs=0.2 * float(np.std(gained)) + 1e-9)
        assert row["low"] < row["difference"] < row["high"]
    before, after, low, high = changes.mean()
    assert before == pytest.approx((iou(0, 0, every) + iou(0, 1, every)) / 2)
    assert low < after - before < high < 0


def test_without_masks_pixels_are_compared_and_iou_is_refused(pair):
    dense, model = pair
    changes = SceneChanges.between(dense, {"it": model}, batches((2,)), labelled=False, progress=False)["it"]
    assert changes.moved.sum() > 0 and not changes.labelled
    with pytest.raises(InputError, match="no masks"):
        changes.by_class()
    with pytest.raises(InputError, match="no image"):
        SceneChanges.between(dense, {"it": model}, [], progress=False)


def test_robustness_of_a_segmenter_is_miou_of_corrupted_images(pair):
    scenes = batches((2, 1))
    rows = robustness({"it": pair[1]}, scenes, (0.5,) * 3, (0.5,) * 3, progress=False)
    said = {(row["corruption"], row["severity"]): row["value"] for row in rows}
    pixels = []                                                                 # (predicted, true) of those that count
    for number, (images, masks) in enumerate(scenes):
        with torch.inference_mode():
            seen = pair[1](corrupted(images, "noise", 2, (0.5,) * 3, (0.5,) * 3, number)).argmax(dim=1)
        pixels += [(p, t) for p, t in zip(seen.flatten().tolist(), masks.flatten().tolist()) if t != IGNORE]
    both, either = ([sum(fits([p == k, t == k]) for p, t in pixels) for k in range(CLASSES)] for fits in (all, any))
    wanted = 100 * np.mean([b / e for b, e in zip(both, either) if e])
    assert said["noise", 2] == pytest.approx(wanted) != said["", -1]
    moved = robustness({"it": pair[1]}, scenes, (0.5,) * 3, (0.5,) * 3, labelled=False, progress=False)
    assert [row["value"] for row in moved if row["severity"] < 0] == [0] and "own output" in moved[0]["measure"]


@pytest.mark.parametrize("make", [units_plan, match_plan])
def test_blame_of_a_segmenter_is_what_goes_where_a_block_is_undone(make):
    dense, (images, _) = small(), batches((3,))[0]
    plan = make(dense)
    first = plan.__class__(shape=plan.shape, blocks=(plan.blocks[0], BlockPlan())) if make is units_plan else plan
    model = compress(dense, first).eval()
    found = blame(dense, model, first, images)
    if make is units_plan:                      # all that was cut is undone
        whole = output_of(dense).apart(outputs(model, images), outputs(dense, images))
        torch.testing.assert_close(found[0], whole, rtol=1e-4, atol=1e-7)
        assert (found[1] == 0).all()
    assert found.shape == (2, 3) and found.abs().sum() > 0


@pytest.fixture
def found(pair, tmp_path, monkeypatch):
    dense, model = pair
    data = given([(24, 40), (30, 56), (24, 40)])
    monkeypatch.setattr(workbench, "open_matching", lambda *args, **settings: data)
    models = {"it": opened(model, match_plan(dense)), "itself": opened(dense)}
    return workbench.what_changed(opened(dense), models, "given", tmp_path, config=QUIET)


def test_scenes_that_changed_are_shown_with_both_predictions_and_iou_before_and_after(found, tmp_path):
    shown, every, found = workbench.overview(found), found, found["it"]
    (before, after, low, high) = found.changes.mean()
    assert shown.loc["dense", "mIoU"] == shown.loc["itself", "mIoU"] == f"{before:.1f}"
    assert shown.loc["it", "mIoU"] == f"{after:.1f}"
    assert shown.loc["it", "mIoU, difference (points)"] == f"{low:.2f} to {high:.2f}"
    assert SceneChanges.load(tmp_path / "it.safetensors").order() == found.changes.order()
    assert "mIoU" in found.summary() and "boundary mIoU" in found.summary() and "3 images of given" in found.of
    large = int(found.changes.pixels.argmax())
    image, truth, masks = found.masks(large)
    assert image.shape == (30, 56, 3) and truth.shape == masks["dense"].shape == (30, 56)
    assert int((masks["dense"] != masks["compressed"]).sum()) == int(found.changes.moved[large])
    label, share = found.told(large)["compressed"][0]
    assert share == pytest.approx(max((masks["compressed"] == k).mean() for k in range(CLASSES)))
    figures = [found.sheet([1, 0]), found.scenes([1, 0]), *found.of_classes(every).values()]
    titles = [axis.get_title() for axis in figures[0].axes]
    assert {"dense", "compressed", "lost: orange, gained: blue"} <= set(titles)
    plt.close("all")


def test_the_explorer_of_scenes_shows_each_prediction(found):
    explorer, found = changes_explorer(found), found["it"]
    assert list(explorer.panels) == ["dense", "compressed", "lost: orange, gained: blue"]
    before = explorer.panels["dense"].picture
    explorer.image.value = 1
    assert explorer.panels["dense"].picture != before and label_of(found, explorer) in explorer.line.value
    assert "image/png" in explorer._repr_mimebundle_()
    plt.close("all")


def label_of(found, explorer) -> str:
    label, share = found.told(explorer.chosen)["dense"][0]
    return f"{label} {share:.2f}"
