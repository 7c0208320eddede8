"""Losses and distances with a class for each pixel against slow loops; a Segmenter measured against an oracle pixel by
pixel."""
import copy
import dataclasses
import math

import pytest
import torch
from segmenting_fixtures import CLASSES, batches, given, masks, pictures, small
from test_segmenter import upsampled_slowly
from training_fixtures import images, one_thread, tiny  # noqa: F401

from vitlab.measure.distance import at_targets, cross_entropy, each_cross_entropy, outputs
from vitlab.measure.evaluate import each_divergence
from vitlab.measure.pixels import evaluate_scenes, measured
from vitlab.runtime.files import InputError

EXACT = 1e-12           # float64, sums in another order
FLOAT32 = 1e-5          # of losses near 1


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """In float64."""
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(math.exp(z) for z in logits))
    return [z - total for z in logits]


def pixels_of(logits: torch.Tensor) -> list[list[float]]:
    """(B, K, H, W) -> the logits of each pixel, image by image, row by row."""
    return [logits[b, :, i, j].tolist() for b in range(len(logits)) for i in range(logits.shape[2])
            for j in range(logits.shape[3])]


# ---------------------------------------------------------------- losses and distances

@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_cross_entropy_is_the_mean_of_the_pixels_that_count_in_the_batch_or_in_each_image(ignored):
    logits, targets = numbers(2, 5, 3, 7), masks(2, (3, 7), ignored=ignored)
    each = [[-log_softmax(z)[t] for z, t in zip(pixels_of(logits[b:b + 1]), targets[b].flatten().tolist()) if t != 255]
            for b in (0, 1)]
    assert (len(each[0]) == len(each[1]) == 21) == (ignored == 0)
    assert float(cross_entropy(logits, targets)) == pytest.approx(sum(map(sum, each)) / sum(map(len, each)), rel=EXACT)
    assert each_cross_entropy(logits, targets).tolist() == pytest.approx([sum(image) / len(image) for image in each],
                                                                         rel=EXACT)


def test_cross_entropy_of_images_counts_every_class_also_the_one_with_the_number_of_ignored_pixels():
    logits, targets = numbers(4, 300), torch.tensor([255, 7, 255, 299])
    wanted = [-log_softmax(z)[t] for z, t in zip(logits.tolist(), targets.tolist())]
    assert float(cross_entropy(logits, targets)) == pytest.approx(sum(wanted) / 4, rel=EXACT)
    assert each_cross_entropy(logits, targets).tolist() == pytest.approx(wanted, rel=EXACT)


def test_where_no_pixel_counts_the_loss_is_zero_and_so_is_every_gradient():
    logits = numbers(2, 5, 3, 7).requires_grad_()
    loss = cross_entropy(logits, torch.full((2, 3, 7), 255))
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
    logits.grad, targets = None, torch.stack([torch.full((3, 7), 255), torch.zeros(3, 7, dtype=torch.int64)])
    each = each_cross_entropy(logits, targets)
    each.sum().backward()
    assert float(each[0].detach()) == 0 and not logits.grad[0].any() and logits.grad[1].isfinite().all(
        ) and logits.grad[1].any()


def test_a_loss_that_is_not_finite_is_not_hidden_where_pixels_count():
    assert torch.isnan(cross_entropy(numbers(1, 5, 3, 7) * math.nan, masks(1, (3, 7))))


def kl(given: list[float], expected: list[float]) -> float:
    return sum(math.exp(e) * (e - g) for g, e in zip(given, expected))


def test_divergence_is_the_sum_over_images_of_kl_and_of_patches_their_mean():
    given, expected = (numbers(3, 5, seed=s).log_softmax(1) for s in (0, 1))
    wanted = sum(kl(g, e) for g, e in zip(given.tolist(), expected.tolist()))
    assert float(each_divergence(given, expected).sum()) == pytest.approx(wanted, rel=EXACT)
    given, expected = (numbers(3, 5, 2, 7, seed=s).log_softmax(1) for s in (0, 1))
    wanted = sum(kl(g, e) for g, e in zip(pixels_of(given), pixels_of(expected))) / 14
    assert float(each_divergence(given, expected).sum()) == pytest.approx(wanted, rel=EXACT)
    assert float(each_divergence(given, given).sum()) == 0
    # which is which matters
    other = float(each_divergence(expected, given).sum())
    assert float(each_divergence(given, expected).sum()) != pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("size", [(24, 40), (19, 37)])
@torch.no_grad()
def test_log_probabilities_are_of_patches_and_at_targets_those_of_the_models_own_pixels(size):
    model, x = small(), pictures(2, size)
    found = outputs(model, x)
    assert found.shape == (2, CLASSES, 3, 5) and found.dtype == torch.float32
    torch.testing.assert_close(found, model.patch_logits(x).log_softmax(1))
    torch.testing.assert_close(at_targets(model, found, masks(2, size)), model(x).log_softmax(1), atol=FLOAT32,
                               rtol=FLOAT32)


@torch.no_grad()
def test_of_a_classifier_both_are_the_log_softmax_of_its_logits():
    model, x = tiny(), images(3)
    found = outputs(model, x)
    torch.testing.assert_close(found, model(x).log_softmax(1))
    assert at_targets(model, found, torch.tensor([0, 1, 2])) is found


# ---------------------------------------------------------------- evaluation

def places(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side that is at least as long: every stride, the last at the end."""
    found = [p for p in range(length) if p % stride == 0 and p + window < length]
    return [*found, length - window]


@torch.no_grad()
def probabilities_slowly(model, image, window, stride, scales, flip) -> list[list[list[float]]]:
    """[row][column][class] of one image (3, H, W), view by view, window by window, pixel by pixel."""
    _, height, width = image.shape
    total = torch.zeros(CLASSES, height, width, dtype=torch.float64)
    views = [(scale, turned) for scale in scales for turned in ((False, True) if flip else (False,))]
    for scale, turned in views:
        h, w = (max(1, round(side * scale)) for side in (height, width))
        x = image if scale == 1 else torch.stack([upsampled_slowly(channel, h, w) for channel in image])
        x = torch.flip(x, (2,)) if turned else x
        padded = torch.zeros(3, max(h, window[0]), max(w, window[1]), dtype=x.dtype)
        padded[:, :h, :w] = x
        sums, counts = torch.zeros(CLASSES, *padded.shape[1:], dtype=torch.float64), torch.zeros(padded.shape[1:])
        for top in places(padded.shape[1], window[0], stride[0]):
            for left in places(padded.shape[2], window[1], stride[1]):
                sums[:, top:top + window[0],
                     left:left + window[1]] += model(padded[None, :, top:top + window[0], left:left + window[1]])[0]
                counts[top:top + window[0], left:left + window[1]] += 1
        logits = (sums / counts)[:, :h, :w]
        logits = torch.flip(logits, (2,)) if turned else logits
        logits = logits if scale == 1 else torch.stack([upsampled_slowly(each, height, width) for each in logits])
        for i in range(height):
            for j in range(width):
                total[:, i, j] += torch.tensor([math.exp(v) for v in log_softmax(logits[:, i, j].tolist())],
                                               dtype=torch.float64)
    return (total / len(views)).permute(1, 2, 0).tolist()


def measured_slowly(model, scenes, **windows) -> dict:
    """Counts and sums in plain Python, over all pixels of all scenes (1, 3, H, W), (1, H, W)."""
    settings = {"window": (24, 40), "stride": (24, 40), "scales": (1.0,), "flip": False, **windows}
    counts, loss = [[0] * CLASSES for _ in range(CLASSES)], 0.0
    for x, y in scenes:
        found = probabilities_slowly(model, x[0], **settings)
        for i, row in enumerate(y[0].tolist()):
            for j, truth in enumerate(row):
                if truth != 255:
                    chosen = max(range(CLASSES), key=found[i][j].__getitem__)
                    counts[truth][chosen] += 1
                    loss -= math.log(found[i][j][truth])
    pixels = sum(map(sum, counts))
    unions = [sum(counts[c]) + sum(row[c] for row in counts) - counts[c][c] for c in range(CLASSES)]
    iou = [100 * counts[c][c] / unions[c] for c in range(CLASSES)]
    return {"miou_pct": sum(iou) / CLASSES, "iou_pct": iou, "pixels": pixels, "loss": loss / pixels,
            "pixel_accuracy_pct": 100 * sum(counts[c][c] for c in range(CLASSES)) / pixels}


def assert_measured(found, wanted: dict, images: int) -> None:
    assert found.images == images and found.scores.pixels == wanted["pixels"]
    # a float32 logarithm of each probability
    assert found.loss == pytest.approx(wanted["loss"], rel=FLOAT32)
    for name in ("miou_pct", "pixel_accuracy_pct"):
        assert getattr(found.scores, name) == pytest.approx(wanted[name], rel=EXACT)        # counts are exact
    assert list(found.scores.iou_pct) == pytest.approx(wanted["iou_pct"], rel=EXACT)


SIZES = [(24, 40), (17, 29), (31, 53)]          # the encoder's, smaller, larger


@pytest.fixture
def scenes():
    """Images of different sizes, one a batch, in float64: which class is chosen then hangs on no rounding."""
    data = given(SIZES)
    return [(x.double(), y) for x, y in data.batches("val", small(), batch_size=1, whole=True, workers=0)]


@pytest.mark.parametrize("windows", [{}, {"stride": (11, 24)}, {"flip": True}, {"scales": (0.5, 1.0)}], ids=str)
def test_scenes_of_different_sizes_are_measured_as_pixel_by_pixel(scenes, windows):
    model = small().double()
    found = evaluate_scenes(model, scenes, progress=False, **windows)
    assert_measured(found, measured_slowly(model, scenes, **windows), 3)
    assert 1 < found.scores.miou_pct < 99


def test_batches_of_several_images_are_measured_as_one_by_one():
    model, found = small(), batches((3, 2))
    wanted = measured_slowly(model.double(),
                             [(x[i:i + 1].double(), y[i:i + 1]) for x, y in found for i in range(len(x))])
    assert_measured(evaluate_scenes(model, [(x.double(), y) for x, y in found], progress=False), wanted, 5)


def test_a_model_in_training_is_measured_without_dropout_and_left_in_training():
    model = small().train()
    first, again = (evaluate_scenes(model, batches(), progress=False) for _ in range(2))
    assert first == again == evaluate_scenes(small(), batches(), progress=False)
    assert model.training and model.decoder.blocks[0].training


def test_an_image_whose_pixels_are_all_ignored_changes_nothing_but_the_number_of_images():
    model, found = small(), batches((2,))
    more = [*found, (pictures(1), torch.full((1, 24, 40), 255))]
    assert dataclasses.replace(evaluate_scenes(model, more, progress=False),
                               images=2) == evaluate_scenes(model, found, progress=False)


@pytest.mark.parametrize("given", [[], [(pictures(1), torch.full((1, 24, 40), 255))]], ids=["no images", "all ignored"])
def test_a_split_of_which_no_pixel_counts_is_refused(given):
    with pytest.raises(InputError, match="no pixel of the split counts"):
        evaluate_scenes(small(), given, progress=False)


def test_a_probability_of_nothing_costs_much_but_is_finite():
    model = small("linear")
    with torch.no_grad():
        model.decoder.head.bias[0] = 1e5
    found = evaluate_scenes(model, [(pictures(1), torch.ones(1, 24, 40, dtype=torch.int64))], progress=False)
    assert found.loss == pytest.approx(-math.log(torch.finfo(torch.float32).tiny),
                                       rel=FLOAT32) and found.scores.iou_pct[1] == 0


def test_a_training_watches_the_mean_iou_of_a_segmenter_and_the_top1_of_a_classifier():
    model, found = small(), batches()
    assert measured(model, found,
                    progress=False) == ("miou_pct", evaluate_scenes(model, found, progress=False).scores.miou_pct)
    classifier, x = tiny(), images(5)
    with torch.no_grad():
        said = classifier(x).argmax(1)
    targets = copy.copy(said)
    targets[0] = (said[0] + 1) % 3
    assert measured(classifier, [(x, targets)], progress=False) == ("top1_pct", 80.0)
