"""What a search measures: top-1, mIoU, or the distance to the dense model's output, of really cut models on train."""
import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.measure.confusion import Confusion, scores_of_groups
from vitlab.measure.distance import at_targets, ignored, output_of, outputs, pooled, same_neighbours
from vitlab.measure.evaluate import autocast, check_targets
from vitlab.models import compress, deploy, shape_of
from vitlab.models.families import also_taken, embedded
from vitlab.models.support import runs_in_parts
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError, require
from vitlab.runtime.uncertainty import ratio_error, share_error, standard_error, with_error

METRICS = ("top1_pct", "miou_pct", "distill_loss")


def own_metric(shape: ViTShape) -> str:
    """What a model is worth by labels: "miou_pct" with a decoder, "top1_pct" with a classifier; "distill_loss" without,
    as there is nothing else."""
    return "miou_pct" if shape.decoder else "top1_pct" if output_of(shape).labelled else "distill_loss"


def check_metric(shape: ViTShape, metric: str) -> None:
    """InputError for a metric that is not known, or another task's."""
    own = own_metric(shape)
    require(metric in METRICS, f"metric {metric!r} is not known; known are {list(METRICS)}")
    if metric not in (own, "distill_loss"):
        known = f"{own!r} and 'distill_loss' are" if own != "distill_loss" else "'distill_loss' is"
        raise InputError(f"metric {metric!r} is of another task; for this model {known}")


class PlanObjective:
    """plan -> {"value", "top1_pct" or "miou_pct", "distill_loss", "loss", "agree_pct"}, always on the same images, kept
    in memory, and the standard error of each over images as "top1_se", "miou_se", "distill_loss_se", "loss_se",
    "agree_se", where one is known.

    value, larger is better: minus distill_loss, the mean distance to the dense model's output (`output_of`: KL in nats,
    of a Segmenter over its patches; without a classifier 1 - cosine), which needs no labels and changes with every
    policy where top-1 moves in steps of one image and is saturated on images that the model was trained on; or
    top1_pct, or of a Segmenter miou_pct, in [0, 100]. agree_pct: of the images (pixels), those to which the dense model
    gives the same class, or without a classifier those with the same nearest neighbour among the images. Logits are
    taken for one softmax over the classes. The cut model is built and deployed: that takes about as long as a forward
    of one batch, and its own forward is faster than a masked one's.
    """

    def __init__(self, dense: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, metric: str = "distill_loss",
                 device: str | torch.device = "cpu", amp: bool | None = False, labelled: bool = True,
                 build: Callable[[nn.Module, CompressionPlan], nn.Module] = compress) -> None:
        """build: makes the cut model of the dense one and a plan, with the blocks before the first that is cut as they
        are. labelled: whether targets say anything; where not, nothing that is measured by them is among the measures.
        Raises InputError for an unknown metric, one by labels where there are none, or another task's, a compressed
        model, targets that are no class numbers, or no image; without a classifier fewer than two."""
        shape = shape_of(dense)
        check_metric(shape, metric)
        if not labelled and metric != "distill_loss":
            raise InputError(f"metric {metric!r} needs labels, which these images have not; 'distill_loss' needs none")
        self.output = output_of(shape)
        self.labelled = labelled and self.output.labelled
        self.device, self.own, self.metric = torch.device(device), own_metric(shape), metric
        self.amp, self.build = amp, build
        self.dense = copy.deepcopy(dense).to(self.device).eval()
        self._read(batches)

    def on(self, batches: Iterable[tuple[Tensor, Tensor]]) -> "PlanObjective":
        """The same on other images."""
        other = copy.copy(self)
        other._read(batches)
        return other

    def _read(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Keep the images, and what the dense model says of them."""
        self.batches = [(images.to(self.device), targets.to(self.device)) for images, targets in batches]
        self.images = sum(len(targets) for _, targets in self.batches)
        require(self.images, "there is no image to search on")
        for _, targets in self.batches if self.output.labelled else ():
            check_targets(targets)
        if not any((targets != ignored(targets)).any() for _, targets in self.batches):
            raise InputError("no pixel of the images to search on counts: all that their masks hold is to be ignored")
        with torch.inference_mode():
            self.expected = [outputs(self.dense, images, self.amp) for images, _ in self.batches]
        self._entering: tuple[int, list[Tensor]] | None = None

    def _begun(self, block: int) -> list[Tensor]:
        """The images as they enter a block of the dense model. They are kept there, and go on from there to later
        blocks: cuts that are measured block after block are computed from where they are."""
        at, streams = self._entering or (0, [])
        with torch.inference_mode(), autocast(self.device, self.amp):
            if self._entering is None or block < at:
                at, streams = 0, [embedded(self.dense, images) for images, _ in self.batches]
            for each, also in list(zip(self.dense.blocks, also_taken(self.dense)))[at:block]:
                streams = [each(x, **also) for x in streams]
        self._entering = block, streams
        return streams

    def __call__(self, plan: CompressionPlan) -> dict[str, float]:
        first = next((index for index, block in enumerate(plan.blocks) if block != BlockPlan()), 0)
        model = deploy(self.build(self.dense, plan), inplace=True)
        return self.measure(model, first if runs_in_parts(self.dense) else 0)

    def measure(self, model: nn.Module, first: int = 0) -> dict[str, float]:
        """The same of a model that is built already, whose blocks before `first` are those of the dense model."""
        # an image each
        found: dict[str, list[float]] = {"distance": [], "same": [], "right": [], "loss": [], "counted": [], "of": []}
        vectors: list[tuple[Tensor, Tensor]] = []       # of the model and the dense one, where neighbours are compared
        confusion, begun = None, self._begun(first) if first else [images for images, _ in self.batches]
        for (_, targets), expected, entering in zip(self.batches, self.expected, begun):
            with torch.inference_mode():
                given = outputs(model, entering, self.amp, first)
                found["distance"] += self.output.apart(given, expected).tolist()
                if not self.output.labelled:
                    vectors.append((pooled(given), pooled(expected)))
                    continue
                given, expected = at_targets(model, given, targets), at_targets(model, expected, targets)
            chosen, size = given.argmax(dim=1), len(targets)
            if self.labelled and self.own == "miou_pct":
                confusion = confusion or Confusion(given.shape[1], ignored(targets))
                confusion.add(chosen, targets)
            loss = F.nll_loss(given, targets, reduction="none", ignore_index=ignored(targets)).double()
            for name, values in (("same", chosen == expected.argmax(dim=1)), ("right", chosen == targets),
                                 ("loss", loss), ("counted", targets != ignored(targets)),
                                 ("of", torch.ones_like(targets))):
                found[name] += values.reshape(size, -1).sum(dim=1).tolist()
        if vectors:
            found["same"] = same_neighbours(*map(torch.cat, zip(*vectors))).tolist()
        measures = self._with_errors(found)
        if confusion is not None:
            scores = scores_of_groups(confusion.matrices)
            measures |= with_error("miou_pct", scores.miou_pct, scores.miou_se)
        return {"value": -measures["distill_loss"] if self.metric == "distill_loss" else measures[self.own], **measures}

    def _with_errors(self, found: dict[str, list[float]]) -> dict[str, float]:
        """The measures of all images from what each of them gave, but for mIoU."""
        count, total = len(found["distance"]), {name: sum(values) for name, values in found.items()}
        measures = with_error("distill_loss", total["distance"] / count, standard_error(found["distance"]))
        if self.labelled:
            measures |= with_error("loss", total["loss"] / total["counted"],
                                   ratio_error(found["loss"], found["counted"]))
        if self.own != "miou_pct":
            if self.labelled:
                measures |= with_error("top1_pct", 100 * total["right"] / count, share_error(total["right"], count))
            return measures | with_error("agree_pct", 100 * total["same"] / count, share_error(total["same"], count))
        error = ratio_error(found["same"], found["of"])
        return measures | with_error("agree_pct", 100 * total["same"] / total["of"],
                                     None if error is None else 100 * error)
