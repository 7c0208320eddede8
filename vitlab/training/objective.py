"""What a search measures: top-1 or mIoU, or the distance to the dense model's output, of really cut models on a fixed slice of train."""
import copy
import gc
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.files import InputError
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import CompressionPlan
from vitlab.shape import ViTShape
from vitlab.training.confusion import Confusion, scores_of
from vitlab.training.pixels import at_targets, divergence, ignored, log_probabilities

METRICS = ("top1_pct", "miou_pct", "distill_loss")


def own_metric(shape: ViTShape) -> str:
    """What a model is worth by its labels: "miou_pct" with a decoder, else "top1_pct"."""
    return "miou_pct" if shape.decoder else "top1_pct"


def check_metric(shape: ViTShape, metric: str) -> None:
    """InputError for a metric that is not known, or another task's."""
    own = own_metric(shape)
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is not known; known are {list(METRICS)}")
    if metric not in (own, "distill_loss"):
        raise InputError(f"metric {metric!r} is of another task; for this model {own!r} and 'distill_loss' are")


class PlanObjective:
    """plan -> {"value", "top1_pct" or "miou_pct", "distill_loss", "loss", "agree_pct"}, always on the same images, kept in memory.

    value, larger is better: top1_pct, or of a Segmenter miou_pct, in [0, 100], or minus distill_loss, the mean of KL(dense || cut) in
    nats (of a Segmenter over its patches), which needs no labels and changes with every policy where top-1 moves in steps of one
    image. agree_pct: of the images (pixels), those to which the dense model gives the same class. The cut model is built and deployed:
    that takes about as long as a forward of one batch, and its own forward is faster than a masked one's.
    """

    def __init__(self, dense: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, metric: str | None = None,
                 device: str | torch.device = "cpu", amp: bool | None = False,
                 build: Callable[[nn.Module, CompressionPlan], nn.Module] = compress) -> None:
        """metric None: top1_pct or miou_pct, as the model is. build: makes the cut model of the dense one and a plan. Raises InputError
        for an unknown metric or another task's, a compressed model, one without a classifier, or no image."""
        shape = shape_of(dense)
        own = own_metric(shape)
        metric = own if metric is None else metric
        check_metric(shape, metric)
        if shape.num_classes == 0:
            raise InputError("a search measures a classifier; the model has num_classes=0")
        self.device, self.own, self.metric, self.amp, self.build = torch.device(device), own, metric, amp, build
        self.dense = copy.deepcopy(dense).to(self.device).eval()
        self.batches = [(images.to(self.device), targets.to(self.device)) for images, targets in batches]
        self.images = sum(len(targets) for _, targets in self.batches)
        if not self.images:
            raise InputError("there is no image to search on")
        if not any((targets != ignored(targets)).any() for _, targets in self.batches):
            raise InputError("no pixel of the images to search on counts: all that their masks hold is to be ignored")
        with torch.inference_mode():
            self.expected = [log_probabilities(self.dense, images, amp) for images, _ in self.batches]

    def __call__(self, plan: CompressionPlan) -> dict[str, float]:
        measures = self.measure(deploy(self.build(self.dense, plan)))
        gc.collect()                                                            # a compressed model may refer to itself, and is large
        return measures

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The same of a model that is built already."""
        agree, loss, distance, counted = 0, 0.0, 0.0, 0
        confusion = None
        for (images, targets), expected in zip(self.batches, self.expected):
            with torch.inference_mode():
                given = log_probabilities(model, images, self.amp)
                distance += float(divergence(given, expected))
                given, expected = at_targets(model, given, targets), at_targets(model, expected, targets)
            chosen = given.argmax(dim=1)
            confusion = confusion or Confusion(given.shape[1], ignored(targets))
            confusion.add(chosen, targets)
            agree += int((chosen == expected.argmax(dim=1)).sum())
            loss += float(F.nll_loss(given, targets, reduction="sum", ignore_index=ignored(targets)))
            counted += targets.numel()
        scores = scores_of(confusion.matrix)
        value = scores.pixel_accuracy_pct if self.own == "top1_pct" else scores.miou_pct
        measures = {self.own: value, "distill_loss": distance / self.images, "loss": loss / scores.pixels,
                    "agree_pct": 100 * agree / counted}
        return {"value": -measures["distill_loss"] if self.metric == "distill_loss" else value, **measures}
