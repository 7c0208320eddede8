"""The loss of a decoder by queries: each class that an image has goes to the query that says it best.

*Masked-attention Mask Transformer for Universal Image Segmentation* (Mask2Former; Cheng et al., CVPR 2022, arXiv
2112.01527, section 3 and its settings), which EoMT (arXiv 2503.19108) takes over. B images, Q queries, K classes, T of
them in an image, c cells of a mask.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from timm.task import ClassificationTask
from torch import Tensor

from vitlab.data.layouts import IGNORE
from vitlab.models.segmenter import multiple
from vitlab.runtime.files import InputError

CLASS, MASK, DICE = 2.0, 5.0, 5.0               # weights of the three losses, as published
NONE = 0.1                                      # of a query that no class goes to, in its cross-entropy; others 1


def shares_of(truth: Tensor, cells: Sequence[int], patch: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(the classes that an image has (T), the share of each cell's pixels that are theirs (T, c)), of its mask (H, W)
    and the rows and columns of cells, over all its patches. Pixels to be ignored, and what pads the image, are of no
    class."""
    present = truth[truth != IGNORE].unique()
    if not len(present):
        return present, truth.new_zeros(0, cells[0] * cells[1], dtype=torch.float32)
    height, width = multiple(tuple(truth.shape), patch)
    each = F.pad((truth == present[:, None, None]).float(), (0, width - truth.shape[1], 0, height - truth.shape[0]))
    return present, F.adaptive_avg_pool2d(each, cells).flatten(1)


def apart(masks: Tensor, shares: Tensor) -> Tensor:
    """How far the masks of queries, logits (Q, c), are from those of classes, shares t (T, c): (Q, T),

        5 sum_c (w log(1 + e^m) - t m) / sum_c w + 5 (1 - (2 sum_c t s(m) + 1) / (sum_c w s(m) + sum_c t + 1))

    s the sigmoid, w the share of a cell's pixels that count. That is the binary cross-entropy of these pixels, their
    mean, and dice, each pixel having its cell's logit. The paper draws 12,544 points of an image; here each pixel
    counts.
    """
    counted, inside = shares.sum(dim=0), masks.sigmoid()
    cross = ((F.softplus(masks) @ counted)[:, None] - masks @ shares.T) / counted.sum()
    dice = 1 - (2 * inside @ shares.T + 1) / ((inside @ counted)[:, None] + shares.sum(dim=1) + 1)
    return MASK * cross + DICE * dice


def image_loss(classes: Tensor, masks: Tensor, present: Tensor, shares: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of one image's queries, logits (Q, K + 1) and (Q, c), as each class k goes to a query q(k) of its own:

        2 CE(classes; k for q(k), "none" for the others, which weigh 0.1) + sum_k apart(q(k), k) / T
        q = argmin sum_k apart(q(k), k) - 2 softmax(classes_q(k))_k

    Classes that no query is left for have no mask. smoothing: of labels, [0, 1).
    """
    far, none = apart(masks, shares), classes.shape[1] - 1
    cost = (far - CLASS * classes.softmax(dim=1)[:, present]).detach().cpu().nan_to_num()
    queries, of = (torch.as_tensor(each, device=present.device) for each in linear_sum_assignment(cost.numpy()))
    targets = torch.full((len(classes),), none, device=present.device).index_copy(0, queries, present[of])
    weights = torch.cat([classes.new_ones(none), classes.new_full((1,), NONE)])
    told = F.cross_entropy(classes, targets, weight=weights, label_smoothing=smoothing)
    return CLASS * told + far[queries, of].sum() / len(present)


def loss_of(answers: Sequence[tuple[Tensor, Tensor]], truths: Tensor, patch: tuple[int, int],
            smoothing: float = 0.0) -> Tensor:
    """The sum over what queries say in each block, logits (B, Q, K + 1) and (B, Q, rows, columns) each, of the mean
    `image_loss` (the paper's is over all masks of a batch: here images count alike, however they come in batches). An
    image without a pixel that counts adds 0. truths (B, H, W); in float32 also under autocast. Raises InputError for a
    class that the decoder has not, of which K would be "none"."""
    with torch.autocast(truths.device.type, enabled=False):
        answers = [(classes.float(), masks.float()) for classes, masks in answers]
        total = sum(part[:0].sum() for answer in answers for part in answer)    # 0, and a gradient of 0
        known = answers[0][0].shape[2] - 1
        for index, truth in enumerate(truths):
            present, shares = shares_of(truth, answers[0][1].shape[2:], patch)
            odd = [k for k in present.tolist() if not 0 <= k < known]
            if odd:
                raise InputError(f"a mask holds class {odd[0]}; the decoder has {known}, from 0 on")
            for classes, masks in answers if len(present) else ():
                total = total + image_loss(classes[index], masks[index].flatten(1), present, shares, smoothing)
        return total / len(truths)


class AnswersTask(ClassificationTask):
    """timm's task, of what queries say in each block in place of logits."""

    def forward(self, input: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """target: masks, or (masks, the pixels that count), of which images need the masks alone."""
        answers = self.trainable_module(input, answers=True)
        return {"loss": self.criterion(answers, target[0] if isinstance(target, tuple) else target)}
