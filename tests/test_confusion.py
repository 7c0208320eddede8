"""The confusion matrix and what it says, against slow loops over pixels and by hand."""
import dataclasses
import math
import warnings

import pytest
import torch

from vitlab.data.layouts import IGNORE as IGNORED_BY_DATA
from vitlab.measure.confusion import GROUPS, IGNORE, Confusion, check_appear, confusion_matrix, scores_of
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError


def slow_scores(predicted: list[int], truth: list[int], classes: int) -> tuple[float, list[float], float, float]:
    """(mIoU, IoU per class, pixel accuracy, mean accuracy) by sets of pixels, in per cent."""
    counted = [i for i, t in enumerate(truth) if t != 255]
    iou, accuracy = [], []
    for c in range(classes):
        true, found = {i for i in counted if truth[i] == c}, {i for i in counted if predicted[i] == c}
        iou.append(100 * len(true & found) / len(true | found) if true | found else math.nan)
        accuracy.append(100 * len(true & found) / len(true) if true else math.nan)
    there = [v for v in iou if not math.isnan(v)]
    right = [v for v in accuracy if not math.isnan(v)]
    return (sum(there) / len(there), iou, 100 * sum(predicted[i] == truth[i] for i in counted) / len(counted),
            sum(right) / len(right))


def test_scores_by_hand():
    # Truth 0 0 0 1 1 and an ignored pixel; class 2 is predicted once and nowhere true; class 3 is in neither.
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 255]), torch.tensor([0, 0, 1, 1, 2, 3])
    assert confusion_matrix(predicted, truth, 4).tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    scores = scores_of(confusion_matrix(predicted, truth, 4))
    assert scores.iou_pct[:3] == pytest.approx((200 / 3, 100 / 3, 0)) and math.isnan(scores.iou_pct[3])
    assert scores.miou_pct == pytest.approx(100 / 3)                    # of three classes: 2/3, 1/3 and 0
    assert scores.pixel_accuracy_pct == pytest.approx(60)
    assert scores.mean_accuracy_pct == pytest.approx((200 / 3 + 50) / 2)        # of the two that are true anywhere
    assert scores.pixels == 5


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_slow_loops_over_pixels(seed):
    generator = torch.Generator().manual_seed(seed)
    classes, shape = 7, (3, 5, 11)
    confusion, seen = Confusion(classes), ([], [])
    for _ in range(3):
        # the last two classes are never true
        truth = torch.randint(classes - 2, shape, generator=generator)
        truth[torch.rand(shape, generator=generator) < 0.2] = 255
        predicted = torch.randint(classes - 1, shape, generator=generator)              # and the last never predicted
        confusion.add(predicted, truth)
        seen[0].extend(predicted.flatten().tolist())
        seen[1].extend(truth.flatten().tolist())
    found, (miou, iou, pixel, mean) = confusion.scores(), slow_scores(*seen, classes)
    assert found.miou_pct == pytest.approx(miou) and found.pixel_accuracy_pct == pytest.approx(pixel)
    assert found.mean_accuracy_pct == pytest.approx(mean) and found.iou_pct == pytest.approx(iou, nan_ok=True)
    assert found.pixels == sum(t != 255 for t in seen[1])


def test_rows_are_the_truth_and_the_matrix_is_int64():
    matrix = confusion_matrix(torch.tensor([1]), torch.tensor([0]), 2)
    assert matrix.tolist() == [[0, 1], [0, 0]] and matrix.dtype == torch.int64


def test_a_perfect_prediction_is_a_hundred_and_what_stands_at_ignored_pixels_says_nothing():
    truth = torch.tensor([[0, 1], [2, 255]])
    for beside in (0, 2, 255, -7):
        predicted = truth.clone()
        predicted[1, 1] = beside
        scores = scores_of(confusion_matrix(predicted, truth, 3))
        assert (scores.miou_pct, scores.pixel_accuracy_pct, scores.mean_accuracy_pct) == (100, 100, 100)


def test_nothing_counted_is_nan():
    scores = scores_of(confusion_matrix(torch.zeros(4, dtype=torch.long), torch.full((4,), 255), 3))
    assert all(map(math.isnan,
                   (scores.miou_pct, scores.pixel_accuracy_pct, scores.mean_accuracy_pct))) and scores.pixels == 0


def test_counts_stay_exact_beyond_what_float32_holds():
    confusion = Confusion(2)
    confusion.matrices[0] = torch.tensor([[2**40 + 1, 0], [1, 2**40]])
    confusion.add(torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert confusion.matrix.tolist() == [[2**40 + 2, 0], [2, 2**40]]
    assert confusion.scores().pixels == 2**41 + 4


def test_uint8_masks_are_counted_without_overflow():
    truth = torch.full((1000,), 149, dtype=torch.uint8)
    assert int(confusion_matrix(truth, truth, 150)[149, 149]) == 1000


@pytest.mark.parametrize("predicted, truth, says", [
    (torch.zeros(2, 3), torch.zeros(2, 4), r"the prediction is \(2, 3\), its truth \(2, 4\)"),
    (torch.tensor([0, 1]), torch.tensor([0, 3]), "the truth has classes from 0 to 3; there are 0 to 2"),
    (torch.tensor([0, 3]), torch.tensor([0, 1]), "the prediction has classes from 0 to 3"),
    (torch.tensor([0, 1]), torch.tensor([-1, 1]), "the truth has classes from -1 to 1"),
])
def test_wrong_classes_and_shapes_are_refused(predicted, truth, says):
    with pytest.raises(InputError, match=says):
        confusion_matrix(predicted, truth, 3)


def test_scores_are_of_the_matrices_of_all_processes(monkeypatch):
    confusion, other = Confusion(2), torch.zeros(GROUPS, 2, 2, dtype=torch.int64)
    other[1] = torch.tensor([[5, 0], [3, 2]])
    monkeypatch.setattr(parallel, "total", lambda matrices: matrices + other)
    confusion.add(torch.tensor([0, 1]), torch.tensor([0, 0]))
    found = confusion.scores()
    assert dataclasses.replace(found, miou_se=None) == scores_of(torch.tensor([[6, 1], [3, 2]])) and found.miou_se > 0
    assert confusion.matrix.tolist() == [[1, 1], [0, 0]]                # and stay this process's own


def test_the_ignored_class_is_the_one_that_the_data_sets_give():
    assert IGNORE == IGNORED_BY_DATA


def test_the_error_of_miou_is_about_what_other_images_would_change_and_takes_no_more_memory():
    generator = torch.Generator().manual_seed(3)

    def scenes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of which a share, each its own, is predicted right."""
        truth = torch.randint(3, (count, 7, 11), generator=generator)
        right = torch.rand(truth.shape, generator=generator) < torch.rand(count, 1, 1, generator=generator)
        return torch.where(right, truth, torch.randint(3, truth.shape, generator=generator)), truth

    def measured(count: int):
        confusion = Confusion(3)
        confusion.add(*scenes(count))
        assert confusion.matrices.shape == (GROUPS, 3, 3)
        return confusion.scores()
    found = [measured(53) for _ in range(60)]
    values, errors = torch.tensor([f.miou_pct for f in found]), torch.tensor([f.miou_se for f in found])
    # 60 draws: a deviation is known to a tenth
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.25)
    assert measured(1).miou_se is None


def test_a_class_without_a_pixel_is_said_to_have_none_and_one_class_alone_is_no_measure():
    matrix = torch.tensor([[5, 0, 1], [0, 3, 0], [0, 0, 0]])
    scores = scores_of(matrix)
    assert scores.absent == (2,)
    with pytest.warns(UserWarning, match=r"1 of 3 classes have no pixel in these masks \(sky\); mIoU is over"):
        check_appear(scores, ["sand", "sea", "sky"])
    with pytest.raises(InputError, match="every pixel that counts is of class 'sand', so that mIoU would say nothing"):
        check_appear(scores_of(torch.tensor([[9, 0], [0, 0]])), ["sand", "sea"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_appear(scores_of(torch.tensor([[9, 0], [1, 2]])), ["sand", "sea"])
