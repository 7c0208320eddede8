"""Where every pixel has a class: losses and distances of both tasks in one form, and the measuring of a Segmenter.

Logits are (B, K) of images, (B, K, h, w) of patches or (B, K, H, W) of pixels; targets (B), or (B, H, W) with IGNORE
where nothing counts.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.data.layouts import IGNORE
from vitlab.measure.confusion import Confusion, SegmentationScores
from vitlab.measure.evaluate import Accuracy, autocast, check_targets, evaluate
from vitlab.models.families import finished
from vitlab.models.segmenter import Segmenter
from vitlab.models.windows import segment
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError
from vitlab.runtime.uncertainty import ratio_error

# torch's own number of a target that counts for nothing: no image has it
NONE = -100


def ignored(targets: Tensor) -> int:
    """The target that counts for nothing: IGNORE of pixels; of images, which have classes above it, none is."""
    return IGNORE if targets.dim() > 1 else NONE


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over images, or over all pixels that count; 0 where none does. smoothing: of labels, [0, 1)."""
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=ignored(targets), label_smoothing=smoothing)
    return total / (targets != ignored(targets)).sum().clamp(min=1)


def each_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Each image's own (B); of pixels the mean over those of the image that count. Raises InputError as `check_targets`
    does."""
    check_targets(targets)
    each = F.cross_entropy(logits, targets, reduction="none", ignore_index=ignored(targets))    # (B) or (B, H, W)
    losses, counted = (v.reshape(len(v), -1).sum(dim=1) for v in (each, targets != ignored(targets)))
    return losses / counted.clamp(min=1)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Of the classes: (B, K) of a classifier, (B, K, h, w) of a Segmenter's patches, from which its pixels' follow."""
    return (model.patch_logits if isinstance(model, Segmenter) else model)(images)


def log_probabilities(model: nn.Module, images: Tensor, amp: bool | None = False, block: int = 0) -> Tensor:
    """Of `logits_of`, float32. block above 0: of a classifier, from what enters that block in place of the images."""
    device = next(model.parameters()).device
    with autocast(device, amp):
        logits = finished(model, images.to(device), block) if block else logits_of(model, images.to(device))
    return logits.float().log_softmax(dim=1)


def at_targets(model: nn.Module, given: Tensor, targets: Tensor) -> Tensor:
    """`log_probabilities` where the targets are: of patches, those of the pixels (the logits of pixels lie between
    those of patches, and a number that is the same for all classes changes no softmax)."""
    return given if targets.dim() == 1 else model.upsample(given, targets.shape[1:]).log_softmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """What a Segmenter is worth on `images` images; loss: mean cross-entropy of the pixels that count."""

    scores: SegmentationScores
    loss: float
    images: int
    loss_se: float | None = None    # standard error of loss over images, nats


@torch.inference_mode()
def evaluate_scenes(model: Segmenter, batches: Iterable[tuple[Tensor, Tensor]], *,
                    device: str | torch.device | None = None, amp: bool | None = False,
                    window: int | tuple[int, int] | None = None, stride: int | tuple[int, int] | None = None,
                    scales: Sequence[float] = (1.0,), flip: bool = False, progress: bool = True) -> Segmentation:
    """One confusion matrix of all pixels, in eval mode, each image as a whole through `segment` (windows, scales and
    flips), float32 unless amp. Under torchrun each process gives its share of the batches, and all get the sum. Raises
    InputError where no pixel counts, or as `segment` does.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    training = model.training
    model.to(device).eval()
    # of each image: summed over its pixels, and how many
    confusion, losses, counts = Confusion(model.num_classes), [], []
    for x, masks in tqdm(batches, desc="evaluate", unit="batch", disable=not progress):
        check_targets(masks)
        masks = masks.to(device)
        with autocast(device, amp):
            probabilities = segment(model, x.to(device), window=window, stride=stride, scales=scales, flip=flip,
                                    batch_size=max(8, len(x)))
        log = probabilities.float().clamp(min=torch.finfo(torch.float32).tiny).log()
        losses += F.nll_loss(log, masks, reduction="none", ignore_index=IGNORE).flatten(1).double().sum(dim=1).tolist()
        confusion.add(log.argmax(dim=1), masks)
        counts += (masks != IGNORE).flatten(1).sum(dim=1).tolist()
    model.train(training)
    losses, counts = ([value for each in parallel.gather(values) for value in each] for values in (losses, counts))
    if not sum(counts):
        raise InputError("no pixel of the split counts: there are no images, or all that their masks hold is to be "
                         "ignored")
    return Segmentation(scores=confusion.scores(), loss=sum(losses) / sum(counts), images=len(counts),
                        loss_se=ratio_error(losses, counts))


def measured(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], **settings: object) -> tuple[str, float]:
    """(name, value in per cent) of the one number that a training watches: top-1, or a Segmenter's mIoU."""
    if isinstance(model, Segmenter):
        return "miou_pct", evaluate_scenes(model, batches, **settings).scores.miou_pct
    accuracy: Accuracy = evaluate(model, batches, **settings)
    return "top1_pct", accuracy.top1_pct
