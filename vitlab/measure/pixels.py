"""What a Segmenter is worth, which gives a class for every pixel."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.data.layouts import IGNORE
from vitlab.measure.confusion import Confusion, SegmentationScores
from vitlab.measure.distance import output_of
from vitlab.measure.evaluate import autocast, check_targets, evaluate
from vitlab.measure.features import evaluate_features
from vitlab.models.segmenter import Segmenter
from vitlab.models.windows import segment
from vitlab.runtime import parallel
from vitlab.runtime.files import require
from vitlab.runtime.uncertainty import ratio_error


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """What a Segmenter is worth on `images` images, `broken` left out; loss: cross-entropy of the pixels that count."""

    scores: SegmentationScores
    loss: float
    images: int
    loss_se: float | None = None    # standard error of loss over images, nats
    broken: int = 0                 # could not be read


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
    require(sum(counts), "no pixel of the split counts: there are no images, or all that their masks hold is to be "
            "ignored")
    return Segmentation(scores=confusion.scores(), loss=sum(losses) / sum(counts), images=len(counts),
                        loss_se=ratio_error(losses, counts),
                        broken=int(parallel.total(torch.tensor(len(getattr(batches, "broken", ()))))))


def measured(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, teacher: nn.Module | None = None,
             **settings: object) -> tuple[str, float]:
    """(name, value) of the one number that a training watches: top-1 or a Segmenter's mIoU in per cent, or without a
    classifier the distance to the teacher's features."""
    if isinstance(model, Segmenter):
        return "miou_pct", evaluate_scenes(model, batches, **settings).scores.miou_pct
    if output_of(model).labelled:
        return "top1_pct", evaluate(model, batches, **settings).top1_pct
    return "distill_loss", evaluate_features(model, batches, dense=teacher, **settings).distill_loss
