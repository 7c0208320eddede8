"""What features are worth: how far they are from another model's, and which classes they tell by their nearest
neighbours or by embeddings of classes. N images, D dim, K classes."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.measure.averaging import Batches
from vitlab.measure.distance import Features, output_of, pooled, same_neighbours
from vitlab.measure.evaluate import autocast
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, require
from vitlab.runtime.uncertainty import share_error, standard_error

NEIGHBOURS, TEMPERATURE = 20, 0.07              # of DINO (Caron et al., ICCV 2021, arXiv 2104.14294, appendix F)
Tell = Callable[[Tensor], Tensor]               # unit vectors (N, D) -> classes (N)


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Of `images` images; `broken` could not be read. Each with its standard error over images."""

    images: int
    broken: int
    top1_pct: float | None = None               # where classes were told
    top1_se: float | None = None
    # where there is a dense model: mean distance to its output (`distance.output_of`), and of how many images the
    # nearest neighbour is the same
    distill_loss: float | None = None
    distill_loss_se: float | None = None
    agree_pct: float | None = None
    agree_se: float | None = None


def nearest_neighbours(features: Tensor, targets: Tensor, k: int = NEIGHBOURS) -> Tell:
    """Classes by the k nearest images out of those with features (N, D) and targets (N), each of which votes with
    exp(cosine / TEMPERATURE). Raises InputError where there are fewer."""
    require(k <= len(features), f"{k} nearest neighbours of {len(features)} images; so many at most can be asked for")
    from sklearn.neighbors import KNeighborsClassifier  # slow to load, and few commands need it
    found = KNeighborsClassifier(k, metric="cosine", weights=lambda apart: np.exp(-apart / TEMPERATURE))
    found.fit(features.numpy(), targets.numpy())
    return lambda given: torch.from_numpy(found.predict(given.numpy()))


def zero_shot(embeddings: Tensor) -> Tell:
    """The class whose embedding, of (K, D), is nearest by cosine. Raises InputError for features of another width."""
    def tell(given: Tensor) -> Tensor:
        if given.shape[1] != embeddings.shape[1]:
            raise InputError(f"the classes' embeddings are {embeddings.shape[1]} wide, the model's {given.shape[1]}")
        return (given @ F.normalize(embeddings.to(given), dim=1).T).argmax(dim=1)
    return tell


def kind_of(model: nn.Module) -> Features:
    """As what a model's features are compared, with a classifier as those that it pools."""
    found = output_of(model)
    return Features() if found.labelled else found


@torch.inference_mode()
def features_of(model: nn.Module, batches: Batches, *, dense: nn.Module | None = None,
                device: str | torch.device | None = None, amp: bool | None = False, what: str = "features",
                progress: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(unit vectors (N, D), targets (N), distances to the dense model's features (N), its unit vectors (N, D)) of all
    images, in eval mode, float32 unless amp, on the CPU; the last two are empty without a dense model. Vectors are
    `pooled` outputs of a model without a classifier; of one with, what goes into it. Under torchrun each process gives
    its share of the batches, and all get all of them. Raises InputError where there is no image."""
    device = torch.device(device) if device is not None else next(model.parameters()).device
    models = [each.to(device).eval() for each in (model, dense) if each is not None]
    kind, rows = kind_of(model), []
    for images, targets in tqdm(batches, desc=what, unit="batch", disable=not progress):
        given = []
        for each in models:
            with autocast(device, amp):
                raw = each.forward_head(each.forward_features(images.to(device)), pre_logits=True) \
                    if output_of(each).labelled else kind.raw(each, images.to(device))
            given.append(kind.compared(raw.float()))
        apart = kind.apart(*given) if dense is not None else torch.empty(0)
        vectors = [pooled(each).cpu() for each in given]
        rows.append([vectors[0], targets, apart.cpu(), *vectors[1:]])
    rows = [row for each in parallel.gather(rows) for row in each]
    require(rows, "no image of the split could be read")
    found = [torch.cat(column) for column in zip(*rows)]
    return tuple([*found, torch.empty(0)][:4])


def evaluate_features(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, tell: Tell | None = None,
                      dense: nn.Module | None = None, **settings: object) -> Likeness:
    """Top-1 of the classes that `tell` says, and the distance and agreement with a dense model, where they are given;
    of one image no agreement. settings: of `features_of`. Raises InputError where there is no image."""
    training = model.training
    vectors, targets, apart, expected = features_of(model, batches, dense=dense, what="evaluate", **settings)
    model.train(training)
    count, broken = len(vectors), int(parallel.total(torch.tensor(len(getattr(batches, "broken", ())))))
    measures = {}
    if tell is not None:
        right = int((tell(vectors) == targets).sum())
        measures |= {"top1_pct": 100 * right / count, "top1_se": share_error(right, count)}
    if dense is not None:
        measures |= {"distill_loss": float(apart.double().mean()), "distill_loss_se": standard_error(apart.numpy())}
    if dense is not None and count > 1:
        same = int(same_neighbours(vectors, expected).sum())
        measures |= {"agree_pct": 100 * same / count, "agree_se": share_error(same, count)}
    return Likeness(images=count, broken=broken, **measures)
