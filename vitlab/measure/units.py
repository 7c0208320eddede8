"""Scores of every head and neuron of a model over a data set; the criteria themselves are in vitlab.criteria.units.

*Multi-Dimensional Vision Transformer Compression via Dependency Guided Gaussian Process Search* (Hou and Kung, CVPRW
2022, arXiv 2201.00043), methods B1 and B2.
"""
import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.criteria.hsic import CHUNK, shared_dependence
from vitlab.criteria.moments import Moments
from vitlab.criteria.units import (
    MAGNITUDE_WEIGHT,
    REDUNDANCY_WEIGHT,
    RELEVANCE_WEIGHT,
    UnitCriterion,
    UnitScores,
    head_kernels,
    unit_criterion,
)
from vitlab.measure.averaging import Batches, averaged, begun, draws_of_batches, frozen_eval, hooks
from vitlab.measure.distance import output_of
from vitlab.measure.moments import KINDS, Fisher, Layer, each_moments, fisher
from vitlab.models import shape_of
from vitlab.models.families import making_layers, mixing_layer
from vitlab.models.support import plain_linear
from vitlab.models.windowed import by_image, by_window
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, require


def _unit_hooks(model: nn.Module, see: Callable[[str, int, Tensor], None], kinds: tuple[str, ...] = KINDS) -> list:
    """Handles of hooks that call see(kind, block, units), units (B, N, U, d) on the way into the linear that mixes
    them: head outputs into attn.proj, hidden units after the activation (d = 1) into mlp.fc2; of windows an image's
    patches, as in other blocks.
    """
    def before(kind: str, index: int, count: int, module: nn.Module, inputs: tuple) -> tuple[Tensor]:
        x = begun(inputs[0]) if torch.is_grad_enabled() else inputs[0]
        units = x.unflatten(2, (count, -1))                                     # (B, N, U d) -> (B, N, U, d)
        windows = model.blocks[index] if kind == "heads" else None
        units = by_image(windows, units, grid)
        see(kind, index, units)
        return (by_window(windows, units, grid).flatten(2),)                    # so that `units` has a gradient
    handles, grid = [], model.patch_embed.grid_size
    for index, block in enumerate(model.blocks):
        for kind in kinds:
            linear, width = mixing_layer(block, kind)
            handles.append(linear.register_forward_pre_hook(partial(before, kind, index, linear.in_features // width)))
    return handles


def _unit_weights(block: nn.Module) -> dict[str, Tensor]:
    """All weights (U, K) that leave with each unit: rows of the layers that make, columns of the one that mixes it."""
    found = {}
    for kind in KINDS:
        mixing, width = mixing_layer(block, kind)
        # (parts U width, D) -> (U, parts width D)
        rows = [plain_linear(linear).weight.detach().unflatten(0, (len(parts), -1, width)).transpose(0, 1).flatten(1)
                for linear, parts in making_layers(block, kind)]
        # (D, U width) -> (U, D width)
        columns = plain_linear(mixing).weight.detach().unflatten(1, (-1, width)).transpose(0, 1).flatten(1)
        found[kind] = torch.cat([*rows, columns], dim=1)
    return found


def _over_images(model: nn.Module, batches: Batches, criterion: UnitCriterion, settings: dict[str, dict], what: str,
                 device: str | torch.device | None, progress: bool) -> tuple[Tensor, Tensor, int]:
    """(head scores (L, H), neuron scores (L, M), images that had a part in them) of a criterion that reads activations.

    HSIC of b images grows with b^2: head scores are averaged over b^2, and B^2 put back, B the mean batch. Neuron
    scores are scaled to [0, 1] in each batch.
    """
    found: dict[str, list] = {kind: [None] * len(model.blocks) for kind in KINDS}
    needs_gradient, dependent = criterion.needs == "gradients", criterion.needs == "output"
    output, draws = output_of(model), draws_of_batches()

    def see(kind: str, index: int, units: Tensor) -> None:
        function = getattr(criterion, kind)
        if needs_gradient:
            x = units.detach()
            units.register_hook(lambda gradient: found[kind].__setitem__(index, function(x, gradient)))
        else:
            found[kind][index] = function(units, **settings[kind])

    def step(images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        if dependent:
            given = output.dependent(output.raw(model, images))
            heads, neurons = (torch.stack([score(given) for score in found[kind]]) for kind in KINDS)
            return heads / len(images)**2, neurons
        if needs_gradient:
            output.loss(model, images, targets, next(draws), each=True).backward()  # each image's own loss
        else:
            model(images)
        return tuple(torch.stack(found[kind]) for kind in KINDS)
    with hooks(_unit_hooks(model, see)), torch.set_grad_enabled(needs_gradient):
        mean = averaged(model, batches, step, what=what, device=device, progress=progress,
                        at_least=2 if dependent else 1)
    heads, neurons = mean.values
    return heads * mean.batch**2 if dependent else heads, neurons, mean.images


def _by_moments(model: nn.Module, batches: Batches, criterion: UnitCriterion, seed: int,
                device: str | torch.device | None, progress: bool, made_by: dict[str, str]) -> UnitScores:
    """Scores from second moments of what each linear that mixes units takes in, over all tokens of all images."""
    images = 0

    def counted() -> Batches:
        nonlocal images
        for x, y in tqdm(batches, desc=f"unit scores by {made_by['criterion']}", unit="batch", disable=not progress):
            images += len(x)
            yield x, y
    model = model if device is None else model.to(device)
    costs = fisher(model, batches, seed=seed, progress=progress) if criterion.needs == "fisher" else None
    with frozen_eval(model):
        layers = each_moments(model, counted())
        first = next(layers)                    # all images were gone through for it
        images = int(parallel.total(torch.tensor(images)))
        if not images:
            raise InputError(f"unit scores by {made_by['criterion']}: there is no image to score on")
        scores = by_moments(model, itertools.chain([first], layers), criterion, costs)
    return UnitScores(**scores, made_by=made_by | {"images": str(images)})


def by_moments(model: nn.Module, moments: Iterable[tuple[Layer, Moments]], criterion: UnitCriterion,
               costs: Mapping[Layer, Fisher] | None = None) -> dict[str, Tensor]:
    """{"heads": (L, H), "neurons": (L, M)} scores by a criterion that needs moments, of every layer that mixes units;
    errors of its output count by what they cost (`fisher`), or all alike."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for (index, kind), own in moments:
        if kind not in found:
            continue
        linear, width = mixing_layer(model.blocks[index], kind)
        weight = plain_linear(linear).weight.detach()
        weight = costs[index, kind].root() @ weight.double() if costs else weight
        found[kind].append(getattr(criterion, kind)(weight, own, width).cpu())
    return {kind: torch.stack(scores) for kind, scores in found.items()}


def unit_scores(model: nn.Module, batches: Batches, *, criterion: str = "hsic",
                relevance_weight: float = RELEVANCE_WEIGHT, magnitude_weight: float = MAGNITUDE_WEIGHT,
                redundancy_weight: float = REDUNDANCY_WEIGHT, chunk: int = CHUNK, seed: int = 0,
                device: str | torch.device | None = None, progress: bool = True) -> UnitScores:
    """Scores of every head (L, H) and neuron (L, M) of a dense model, higher is kept. model: taken in eval mode.

    criterion, a name of vitlab.criteria.units.UNIT_CRITERIA:
    "hsic": the published scores of each batch (B2), with the three weights, averaged over images: a batch of b weighs
    b, its HSIC (B / b)^2, B the mean batch, and one of a single image has nothing to say. Of the activations only the
    kernels (B x B a unit) and magnitudes are kept until the output (softmax, or unit features) is known: L (M + H) B^2
    numbers; temporaries are those of `chunk` neurons. "reconstruction": the place in a greedy elimination, by second
    moments of what proj and fc2 take in, over all images. "fisher": the same, errors of a layer's output counted by
    what they cost at the model's own (`measure.moments.fisher`). "activation", "taylor": means over all images.
    "weight", "random" (uniform, from seed): the batches are not read.

    Raises InputError for an unknown criterion, a compressed model, a family that can't be handled, no image (for hsic
    no two in a batch), or a chunk below 1.
    """
    chosen, shape = unit_criterion(criterion), shape_of(model)
    require(chunk >= 1, f"chunk is {chunk}; at least 1 neuron at a time is needed")
    what, made_by = f"unit scores by {criterion}", {"criterion": criterion}
    if chosen.needs == "nothing":
        generator = torch.Generator().manual_seed(seed)
        heads, neurons = ([score(count, generator) for _ in range(shape.depth)]
                          for score, count in ((chosen.heads, shape.num_heads), (chosen.neurons, shape.num_neurons)))
        return UnitScores(heads=torch.stack(heads), neurons=torch.stack(neurons), made_by=made_by | {"seed": str(seed)})
    if chosen.needs == "weights":
        weights = [_unit_weights(block) for block in model.blocks]
        return UnitScores(heads=torch.stack([chosen.heads(w["heads"]) for w in weights]).cpu(),
                          neurons=torch.stack([chosen.neurons(w["neurons"]) for w in weights]).cpu(), made_by=made_by)
    if chosen.needs in ("moments", "fisher"):
        return _by_moments(model, batches, chosen, seed, device, progress, made_by)
    settings: dict[str, dict] = {"heads": {}, "neurons": {}}
    if chosen.needs == "output":
        made_by |= {"relevance_weight": str(relevance_weight), "magnitude_weight": str(magnitude_weight),
                    "redundancy_weight": str(redundancy_weight)}
        settings = {"heads": {"redundancy_weight": redundancy_weight},
                    "neurons": {"relevance_weight": relevance_weight, "magnitude_weight": magnitude_weight,
                                "chunk": chunk}}
    heads, neurons, images = _over_images(model, batches, chosen, settings, what, device, progress)
    return UnitScores(heads=heads, neurons=neurons, made_by=made_by | {"images": str(images)})


def head_redundancy(model: nn.Module, batches: Batches, *, device: str | torch.device | None = None,
                    progress: bool = True) -> Tensor:
    """HSIC (L, H, H) between the heads of each block, Gaussian kernels on both sides, symmetric and not negative (B1).

    Of F_h (B x N), the head's output averaged over its width; averaged over images as `unit_scores` does.
    Raises InputError for a compressed model, a family that can't be handled, or batches without two images.
    """
    shape = shape_of(model)
    found: list = [None] * shape.depth

    def see(kind: str, index: int, units: Tensor) -> None:
        found[index] = shared_dependence(head_kernels(units))

    def step(images: Tensor, targets: Tensor) -> tuple[Tensor]:
        model(images)
        return (torch.stack(found) / len(images)**2,)                           # (L, H, H)
    with hooks(_unit_hooks(model, see, kinds=("heads",))), torch.no_grad():
        mean = averaged(model, batches, step, what="head redundancy", device=device, progress=progress, at_least=2)
    return mean.values[0] * mean.batch**2
