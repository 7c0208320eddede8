"""Segmentation measured from one confusion matrix of pixels: mIoU, IoU per class, pixel and mean accuracy.

Definitions of Long, Shelhamer and Darrell (CVPR 2015, arXiv 1411.4038, section 5). n_ij: pixels of class i that were
given class j, t_i = sum_j n_ij, K classes.
"""
import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlab.data.layouts import IGNORE  # truth of pixels that count for nothing, whatever was predicted there
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError
from vitlab.runtime.uncertainty import jackknife_error

GROUPS = 20                                     # an error from so many groups is itself known to about a sixth


@dataclass(frozen=True, kw_only=True)
class SegmentationScores:
    """In per cent; NaN where nothing can be said."""

    miou_pct: float  # mean of IoU over the classes in the truth or the prediction; absent in both: left out
    iou_pct: tuple[float, ...]      # n_ii / (t_i + sum_j n_ji - n_ii) per class; NaN for a class absent in both
    pixel_accuracy_pct: float       # sum_i n_ii / sum_i t_i
    mean_accuracy_pct: float        # mean of n_ii / t_i over the classes in the truth
    pixels: int                     # counted, ignored ones left out
    absent: tuple[int, ...] = ()    # classes without a pixel in the truth
    miou_se: float | None = None    # standard error of miou_pct over images, in points; None where it is not known


def confusion_matrix(predicted: Tensor, truth: Tensor, num_classes: int, ignore: int = IGNORE) -> Tensor:
    """(K, K) int64, pixels by truth (row) and prediction (column); predicted, truth: integers of one shape, from 0 to K
    - 1.

    Raises InputError where the shapes differ, or a class is out of range at a pixel that counts.
    """
    if predicted.shape != truth.shape:
        raise InputError(f"the prediction is {tuple(predicted.shape)}, its truth {tuple(truth.shape)}")
    counted = truth != ignore
    truth, predicted = truth[counted].long(), predicted[counted].long()
    for what, classes in (("truth", truth), ("prediction", predicted)):
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise InputError(f"the {what} has classes from {int(classes.min())} to {int(classes.max())}; there are 0 "
                             f"to {num_classes - 1}")
    return torch.bincount(truth * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores_of(matrix: Tensor) -> SegmentationScores:
    """What a confusion matrix (K, K) says."""
    matrix = matrix.double().cpu()              # exact up to 2^53 pixels
    hits, truth, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou, accuracy = 100 * hits / (truth + predicted - hits), 100 * hits / truth         # 0 / 0 is NaN
    return SegmentationScores(miou_pct=float(iou.nanmean()), iou_pct=tuple(iou.tolist()), pixels=int(truth.sum()),
                              absent=tuple(torch.nonzero(truth == 0).flatten().tolist()),
                              pixel_accuracy_pct=float(100 * hits.sum() / truth.sum()),
                              mean_accuracy_pct=float(accuracy.nanmean()))


def scores_of_groups(matrices: Tensor) -> SegmentationScores:
    """What the sum of confusion matrices (G, K, K) says, of a group of images each: miou_se is by the jackknife."""
    matrices = matrices[matrices.sum(dim=(1, 2)) > 0]
    whole = matrices.sum(dim=0)
    return dataclasses.replace(scores_of(whole),
                               miou_se=jackknife_error([scores_of(whole - one).miou_pct for one in matrices]))


def check_appear(scores: SegmentationScores, classes: Sequence[str]) -> None:
    """Warns of classes without a pixel in the truth. Raises InputError where there is but one with any: whatever says
    that class everywhere would be perfect."""
    absent = [classes[i] for i in scores.absent]
    found = [name for i, name in enumerate(classes) if i not in scores.absent]
    if len(found) < 2 <= len(classes):
        raise InputError(f"every pixel that counts is of class {found[0] if found else None!r}, so that mIoU would say "
                         f"nothing; check what "
                         f"the masks hold: the numbers 0 to {len(classes) - 1} are classes, and {IGNORE} is ignored")
    if absent and parallel.is_first():
        warnings.warn(f"{len(absent)} of {len(classes)} classes have no pixel in these masks ({', '.join(absent[:5])}"
                      f"{' and others' if len(absent) > 5 else ''}); mIoU is over the classes that were found or "
                      f"predicted", stacklevel=2)


class Confusion:
    """Confusion matrices that grow batch by batch, one of each of GROUPS groups of images, in turn; exact.

    Memory is that of GROUPS matrices, however many images there are."""

    def __init__(self, num_classes: int, ignore: int = IGNORE) -> None:
        self.matrices = torch.zeros(GROUPS, num_classes, num_classes, dtype=torch.int64)
        self.ignore, self.images = ignore, 0

    @property
    def matrix(self) -> Tensor:
        """Of all images of this process (K, K)."""
        return self.matrices.sum(dim=0)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Predicted and true classes (B, H, W) of a batch, on one device; see `confusion_matrix`."""
        for own, wanted in zip(predicted, truth, strict=True):
            group = (parallel.rank() + parallel.world() * self.images) % GROUPS
            self.matrices[group] += confusion_matrix(own, wanted, self.matrices.shape[1], self.ignore).cpu()
            self.images += 1

    def scores(self) -> SegmentationScores:
        """Of all that was added, in every process under torchrun: each gets the same."""
        return scores_of_groups(parallel.total(self.matrices))
