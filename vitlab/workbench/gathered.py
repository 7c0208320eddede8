"""What a model gives on a data set's images, gathered once and kept: what plans without labels are made from and
measured by."""
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.criteria.moments import Moments
from vitlab.criteria.units import unit_criterion
from vitlab.data.images import image_config
from vitlab.measure.averaging import first_images
from vitlab.measure.capture import token_scores
from vitlab.measure.distance import output_of
from vitlab.measure.moments import IMAGES as FISHER_IMAGES
from vitlab.measure.moments import Fisher, Layer, each_moments, fisher, layers_of
from vitlab.measure.objective import PlanObjective
from vitlab.measure.units import by_moments as scores_by_moments
from vitlab.models import shape_of
from vitlab.models.opening import Source
from vitlab.models.support import encoder_of
from vitlab.models.weights import read_file
from vitlab.plan import CompressionPlan
from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import atomic_write
from vitlab.search import SearchSpace
from vitlab.training.loop import fingerprint
from vitlab.training.self_distillation import Divergence
from vitlab.workbench.forwards import FISHER_COST, TOKEN_COST, elimination_cost, moments_cost
from vitlab.workbench.pace import Pace
from vitlab.workbench.searching import by_moments
from vitlab.workbench.steps import amp_of, measured_batches, objective_on, open_dense, open_matching, pick_device

T = TypeVar("T")
TOKEN_IMAGES = 128                              # that scores of tokens are of


class LayerFiles(Mapping[Layer, Moments]):
    """Moments in a file a layer, read when they are asked for: those of a ViT-L are 3.5 GB in memory. Covariances and
    means are kept, in float32, and not sums, whose differences would be lost where means are large."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def keep(self, layer: Layer, moments: Moments) -> None:
        index, kind = layer
        tensors = {"rows": moments.rows, "mean": moments.mean.float(),
                   "covariance": moments.covariance(ridge=0).float()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write(self.folder / f"{index}.{kind}.safetensors", save(tensors))

    def __getitem__(self, layer: Layer) -> Moments:
        index, kind = layer
        kept = {name: value.to(self.device, torch.float64)
                for name, value in read_file(self.folder / f"{index}.{kind}.safetensors").items()}
        found, mean = Moments(0, self.device), kept["mean"]
        found.rows, found.sum = kept["rows"], kept["rows"] * mean
        found.products = kept["rows"] * (kept["covariance"] + torch.outer(mean, mean))
        return found

    def __iter__(self) -> Iterator[Layer]:
        names = (path.name.split(".") for path in self.folder.glob("*.safetensors"))
        return iter(sorted((int(index), kind) for index, kind, _ in names))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Gathered:
    """Of a dense model and the images of train: made when first needed, so that `check` comes before, written into
    `folder`, and read from there where it was made before of the same model and images."""

    def __init__(self, source: Source, data: str | Path, folder: str | Path, *, images: int = 128,
                 report_images: int | None = None, score_images: int = 1000, class_map: str | Path | None = None,
                 config: RunConfig = RunConfig()) -> None:
        """images: of train, to compare plans on; report_images: others to report on (None: as many); score_images:
        others, to score and refit on (`ImageData.parts`). Raises InputError for a compressed model."""
        self.found, self.folder, self.place, self.config = open_dense(source), Path(folder), pick_device(
            config.device), config
        self.shape = shape_of(self.found.model)
        self.output = output_of(self.shape)
        self.pace: Pace | None = None           # the bar of a whole that this is a part of
        self.opened = open_matching(data, self.found, class_map, labels=False)
        self.parts = self.opened.parts(config.seed, score=score_images, choose=images, report=report_images or images)
        counts = {role: count for role, count in self.parts.roles.items() if role != "shared"}
        self.inputs = fingerprint([[self.parts.files(role) for role in counts], counts, config.seed,
                                   image_config(encoder_of(self.found.model)), self.shape.stored()], [self.found.model])
        self.model, self.amp = self.found.model.to(self.place).eval(), amp_of(self.found.model)
        self.read_out = self.shape.pool == POOL_TOKEN and self.shape.num_prefix_tokens > 0

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Of the images to score and refit on."""
        return list(self.parts.batches("score", self.model, workers=self.config.workers))

    def shown(self, what: str, items: Iterable[T], count: int, cost: float) -> Iterable[T]:
        """The items, so many, with a bar that says what they are gone through for, or on the bar of the whole; cost: of
        all of them, in forwards."""
        return self.pace.over(items, count, cost) if self.pace else tqdm(items, desc=what, total=count,
                                                                         disable=self.config.quiet)

    def first(self, images: int) -> int:
        """How many of so many images there are to score and refit on."""
        return min(images, self.parts.roles["score"])

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Of heads and neurons."""
        def made() -> dict[str, Tensor]:
            shown = self.shown("heads and neurons in order", self.moments.items(), len(self.moments),
                               elimination_cost(self.shape))
            return scores_by_moments(self.model, shown, unit_criterion("fisher"), self.costs)
        return self._kept("unit-scores", made)

    @cached_property
    def token_scores(self) -> Tensor:
        """Of tokens: rules that choose them by their place need them."""
        def made() -> dict[str, Tensor]:
            batches = first_images(self.batches, TOKEN_IMAGES)
            shown = self.shown("what the model itself says", batches, len(batches),
                               TOKEN_COST * self.first(TOKEN_IMAGES))
            return {"tokens": token_scores(self.model, own_labels(self.model, shown, self.place), device=self.place,
                                           progress=self.config.progress and not self.pace)}
        return self._kept("token-scores", made)["tokens"]

    def plan_of(self, space: SearchSpace, policy: np.ndarray, **made_by: Any) -> CompressionPlan:
        """Of a policy, by the scores that its space needs."""
        return space.plan(policy, **self.scores, tokens=self.token_scores if space.by_place else None, made_by=made_by)

    @cached_property
    def costs(self) -> dict[Layer, Fisher]:
        """What errors of every layer that mixes heads or neurons cost."""
        def made() -> dict[str, Tensor]:
            batches = first_images(self.batches, FISHER_IMAGES)
            shown = self.shown("what errors cost", batches, len(batches), FISHER_COST * self.first(FISHER_IMAGES))
            found = fisher(self.model, shown, seed=self.config.seed, amp=self.amp, progress=False)
            return {f"{index}.{kind}.{name}": torch.as_tensor(value) for (index, kind), own in found.items()
                    for name, value in vars(own).items()}
        found: dict[Layer, dict[str, Any]] = {}
        for key, value in self._kept("costs", made).items():
            index, kind, name = key.split(".")
            found.setdefault((int(index), kind), {})[name] = value if value.dim() else float(value)
        return {layer: Fisher(**own) for layer, own in found.items()}

    @cached_property
    def moments(self) -> Mapping[Layer, Moments]:
        """Of every layer that mixes heads or neurons: units are ranked by them, and what is measured is refitted."""
        kept = LayerFiles(self.folder / f"moments-{self.inputs}", self.place)
        if len(kept) < len(layers_of(self.model)):
            made = each_moments(self.model, self.batches, amp=self.amp)
            for layer, moments in self.shown("what heads and neurons give", made, len(layers_of(self.model)),
                                             moments_cost(self.shape) * self.parts.roles["score"]):
                kept.keep(layer, moments)
        return kept

    @cached_property
    def objective(self) -> PlanObjective:
        """On the images to choose on, of models refitted by the dense one's moments."""
        return objective_on(self.model, self.parts, "choose", "distill_loss", self.place, self.config.workers,
                            build=by_moments(self.moments))

    @cached_property
    def reporting(self) -> PlanObjective:
        """The same on the images to report on."""
        return self.objective.on(measured_batches(self.model, self.parts, "report", self.config.workers))

    @cached_property
    def choosing(self) -> Divergence:
        """Image by image, on the images to choose on."""
        return Divergence(self.model, self.objective.batches, self.amp)

    def _kept(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, from its file where this model and these images gave it before."""
        path = self.folder / f"{what}-{self.inputs}.safetensors"
        if not path.exists():
            atomic_write(path, save({name: value.contiguous().cpu() for name, value in make().items()}))
        return {name: value.to(self.place) if what == "costs" else value for name, value in read_file(path).items()}


def own_labels(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]],
               device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The batches with what the model itself says in place of labels, for scores of images that have none."""
    output = output_of(model)
    with torch.no_grad():                       # not inference mode: a loss is computed with them
        return [(images, output.own_targets(model, images.to(device)).cpu()) for images, _ in batches]
