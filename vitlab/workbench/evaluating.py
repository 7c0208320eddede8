"""What `evaluate` measures of a model that gives classes, pixels or features: (what a row says, its conditions)."""
import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from torch import Tensor, nn

from vitlab.data import ImageData
from vitlab.data.images import Batches
from vitlab.measure import features
from vitlab.measure.confusion import check_appear
from vitlab.measure.distance import output_of
from vitlab.measure.evaluate import evaluate
from vitlab.measure.features import NEIGHBOURS, TEMPERATURE
from vitlab.measure.pixels import evaluate_scenes
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.ends import as_projection
from vitlab.models.segmenter import Segmenter
from vitlab.models.weights import read_file
from vitlab.runtime.files import InputError, require
from vitlab.runtime.kinds import Count, File, Pixels, Positive, flag


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Windows:
    """Of a Segmenter, whose images may be larger than its encoder's.

    Args:
        window: height and width (default: the encoder's size)
        stride: from window to window (default: the window)
        scales: the mean over several sizes (default: 1)
        flip: and over each turned left to right
    """

    window: Annotated[Pixels | None, flag(metavar="HEIGHT WIDTH")] = None
    stride: Annotated[Pixels | None, flag(metavar="HEIGHT WIDTH")] = None
    scales: Annotated[tuple[Positive, ...] | None, flag(consume_multiple=True, metavar="X...")] = None
    flip: bool = False

    def given(self) -> dict[str, Any]:
        """Those that are given, as `segment` takes them."""
        return {name: value for name, value in vars(self).items() if value}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Features:
    """By what the features of a model tell classes, where that is asked for.

    Args:
        knn: top-1 of features, by their nearest neighbours among all images of train
        neighbours: how many of them vote
        classes: top-1 zero-shot, for models that give embeddings of images: a .safetensors file of the classes'
            embeddings, [classes, width]
    """

    knn: bool = False
    neighbours: Count = NEIGHBOURS
    classes: File | None = None

    @property
    def asked(self) -> bool:
        return self.knn or self.classes is not None

    def seen(self, found: Checkpoint) -> Checkpoint:
        """A model as these take it: with `classes`, its head is a projection. Raises InputError for a Segmenter, or
        where both are given."""
        if self.asked and isinstance(found.model, Segmenter):
            raise InputError("knn and classes are of features of an image; the model gives a class for each pixel")
        require(not self.knn or self.classes is None, "knn and classes both give a top-1; one of them is needed")
        if self.classes is None or not output_of(found.model).labelled:
            return found
        return dataclasses.replace(found, model=as_projection(copy.copy(found.model)))


def beside(dense: Checkpoint) -> dict[str, Any]:
    """How `evaluate` is to measure what is made from a model: by labels, or without a classifier by distance."""
    return {} if output_of(dense.model).labelled else {"dense": dense}


Measured = tuple[dict[str, Any], dict[str, Any]]
IN_ROWS = ("images", "broken", "agree_pct", "agree_se")         # of what is measured, what stands in the conditions


def _split(found: Any, more: dict[str, Any]) -> Measured:
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    own = {name: values.pop(name) for name in IN_ROWS if name in values}
    return values, {name: value for name, value in own.items() if value is not None} | more


def of_classes(model: nn.Module, batches: Batches, dense: nn.Module | None, **settings: Any) -> Measured:
    """Of a classifier."""
    return _split(evaluate(model, batches, dense=dense, **settings),
                  {} if dense is None else {"distance": output_of(model).distance})


def of_features(model: nn.Module, batches: Batches, dense: nn.Module | None, data: ImageData, asked: Features,
                workers: int | None, **settings: Any) -> Measured:
    """Of a model without a classifier, or of what goes into one: the distance to a dense model's features, and top-1
    as is asked for."""
    more, tell = {} if dense is None else {"distance": features.kind_of(model).distance}, None
    if asked.knn:
        train = data.batches("train", model, batch_size=64, workers=workers, shared=True)
        vectors, targets, *_ = features.features_of(model, train, what="features of train", **settings)
        tell = features.nearest_neighbours(vectors, targets, asked.neighbours)
        more["top1"] = (f"{asked.neighbours} nearest neighbours among {len(vectors)} images of train, weighted by "
                        f"exp(cosine / {TEMPERATURE})")
    elif asked.classes is not None:
        path = Path(asked.classes)
        tell = features.zero_shot(read_embeddings(path, data))
        more["top1"] = f"zero-shot, cosine with the class embeddings of {path.name}"
    return _split(features.evaluate_features(model, batches, dense=dense, tell=tell, **settings), more)


def read_embeddings(path: Path, data: ImageData) -> Tensor:
    """(classes, width): the one tensor of a file. InputError where there are other numbers of tensors or classes."""
    tensors = list(read_file(path).values())
    if len(tensors) != 1 or tensors[0].dim() != 2 or not tensors[0].is_floating_point():
        raise InputError(f"{path}: holds {len(tensors)} tensors; one of floats, (classes, width), is needed")
    try:
        data.check_fits(len(tensors[0]))
    except InputError:
        raise InputError(f"{path}: embeddings of {len(tensors[0])} classes; {data.name} has "
                         f"{data.num_classes}") from None
    return tensors[0].float()


def of_scenes(model: nn.Module, batches: Batches, classes: list[str], windows: dict[str, Any],
              **settings: Any) -> Measured:
    """Of a Segmenter."""
    found = evaluate_scenes(model, batches, **settings, **windows)
    scores = found.scores
    check_appear(scores, classes)
    iou = {name: None if math.isnan(value) else value for name, value in zip(classes, scores.iou_pct)}
    return ({"miou_pct": scores.miou_pct, "miou_se": scores.miou_se, "pixel_accuracy_pct": scores.pixel_accuracy_pct,
             "loss": found.loss, "loss_se": found.loss_se},
            {"images": found.images, "pixels": scores.pixels, "mean_accuracy_pct": scores.mean_accuracy_pct,
             "iou_pct": iou, **({"windows": windows} if windows else {}),
             **({"broken": found.broken} if found.broken else {})})
