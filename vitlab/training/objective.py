"""What a search measures: top-1, or the distance to the dense model's output, of really cut models on a fixed slice of train."""
import copy
import gc
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.files import InputError
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import CompressionPlan
from vitlab.training.evaluate import log_probabilities

METRICS = ("top1_pct", "distill_loss")


class PlanObjective:
    """plan -> {"value", "top1_pct", "distill_loss", "loss", "agree_pct"}, always on the same images, which are kept in memory.

    value, larger is better: top1_pct in [0, 100], or minus distill_loss, the mean of KL(dense || cut) in nats, which needs no
    labels and changes with every policy where top-1 moves in steps of one image. agree_pct: of the images, those to which the
    dense model gives the same class. The cut model is built and deployed: that
    takes about as long as a forward of one batch, and its own forward is faster than a masked one's.
    """

    def __init__(self, dense: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, metric: str = "top1_pct",
                 device: str | torch.device = "cpu", amp: bool | None = False,
                 build: Callable[[nn.Module, CompressionPlan], nn.Module] = compress) -> None:
        """build: makes the cut model of the dense one and a plan. Raises InputError for an unknown metric, a compressed model,
        one without a classifier, or no image."""
        if metric not in METRICS:
            raise InputError(f"metric {metric!r} is not known; known are {list(METRICS)}")
        if shape_of(dense).num_classes == 0:
            raise InputError("a search measures a classifier; the model has num_classes=0")
        self.device, self.metric, self.amp, self.build = torch.device(device), metric, amp, build
        self.dense = copy.deepcopy(dense).to(self.device).eval()
        self.batches = [(images.to(self.device), targets.to(self.device)) for images, targets in batches]
        self.images = sum(len(targets) for _, targets in self.batches)
        if not self.images:
            raise InputError("there is no image to search on")
        with torch.inference_mode():
            self.expected = [log_probabilities(self.dense, images, amp) for images, _ in self.batches]

    def __call__(self, plan: CompressionPlan) -> dict[str, float]:
        measures = self.measure(deploy(self.build(self.dense, plan)))
        gc.collect()                                                            # a compressed model may refer to itself, and is large
        return measures

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The same of a model that is built already."""
        top1, agree, loss, distance = 0, 0, 0.0, 0.0
        for (images, targets), expected in zip(self.batches, self.expected):
            with torch.inference_mode():
                given = log_probabilities(model, images, self.amp)
            top1 += int((given.argmax(dim=1) == targets).sum())
            agree += int((given.argmax(dim=1) == expected.argmax(dim=1)).sum())
            loss += float(F.nll_loss(given, targets, reduction="sum"))
            distance += float(F.kl_div(given, expected, reduction="sum", log_target=True))
        measures = {"top1_pct": 100 * top1 / self.images, "distill_loss": distance / self.images, "loss": loss / self.images,
                    "agree_pct": 100 * agree / self.images}
        return {"value": measures["top1_pct"] if self.metric == "top1_pct" else -measures["distill_loss"], **measures}
