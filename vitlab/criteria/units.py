"""Scores of heads and neurons of one block, from tensors alone; higher is kept.

HSIC: *Multi-Dimensional Vision Transformer Compression via Dependency Guided Gaussian Process Search* (Hou and Kung,
CVPRW 2022, arXiv 2201.00043), methods B2. Beside it the baselines that it is compared with; Taylor: *Pruning
Convolutional Neural Networks for Resource Efficient Inference* (Molchanov et al., ICLR 2017, arXiv 1611.06440), section
2.2. U units (heads or neurons), B images, N tokens, H heads of width d, M neurons.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlab.criteria.compensation import reconstruction
from vitlab.criteria.hsic import CHUNK, at_least_float32, dependence, gaussian_kernels, shared_dependence, units_first
from vitlab.runtime.files import InputError, check_known

RELEVANCE_WEIGHT, MAGNITUDE_WEIGHT, REDUNDANCY_WEIGHT = 0.1, 0.9, 0.1       # published
ROUNDING = 64                               # units in the last place that a sum may be off by

Score = Callable[[Tensor], Tensor]          # the softmax output (B, classes) -> scores (U)


@dataclass(frozen=True, kw_only=True)
class UnitScores:
    """Scores of a whole model, higher is kept."""

    heads: Tensor               # (L, H)
    neurons: Tensor             # (L, M)
    made_by: dict[str, str]     # criterion, its settings, the number of images

    def __post_init__(self) -> None:
        if self.heads.dim() != 2 or self.neurons.dim() != 2 or len(self.heads) != len(self.neurons):
            raise InputError(f"head scores are {tuple(self.heads.shape)} and neuron scores "
                             f"{tuple(self.neurons.shape)}; (L, H) and (L, M) are needed")


def _min_max(values: Tensor) -> Tensor:
    """Scaled to [0, 1]; all 0 where every value is the same but for rounding, which scaling would blow up."""
    low, high = values.min(), values.max()
    same = high - low <= ROUNDING * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.zeros_like(values) if same else (values - low) / (high - low)


@torch.no_grad()
def neurons_by_hsic(hidden: Tensor, *, relevance_weight: float = RELEVANCE_WEIGHT,
                    magnitude_weight: float = MAGNITUDE_WEIGHT, chunk: int = CHUNK) -> Score:
    """Hidden units after the activation (B, N, M, 1) -> the function that scores them once the softmax output is known:

        score_m = 0.1 * minmax(HSIC(X_m, y)) + 0.9 * minmax(sum of |X_m|),  X_m (B x N) the unit over all tokens

    It holds the kernels (M, B, B) and the magnitudes (M), not the activations; what is made on the way is bounded by
    chunk.
    """
    images, _, count, _ = hidden.shape
    kernels = at_least_float32(hidden.new_empty(0)).new_empty(count, images, images)
    magnitude = kernels.new_empty(count)
    for part, kernel, total in zip(hidden[..., 0].split(chunk, dim=2), kernels.split(chunk), magnitude.split(chunk)):
        units = at_least_float32(units_first(part))                                               # (chunk, B, N)
        gaussian_kernels(units, out=kernel)
        total.copy_(units.abs().sum(dim=(1, 2)))

    def score(probabilities: Tensor) -> Tensor:
        return relevance_weight * _min_max(dependence(kernels, probabilities)) + magnitude_weight * _min_max(magnitude)
    return score


@torch.no_grad()
def heads_by_hsic(outputs: Tensor, *, redundancy_weight: float = REDUNDANCY_WEIGHT) -> Score:
    """Head outputs before the projection (B, N, H, d) -> the function that scores them once the output is known:

        score_h = HSIC(F_h, y) - 0.1 * mean over the other heads h' of HSIC(F_h, F_h'),  F_h (B x N) the mean over d
    """
    kernels = head_kernels(outputs)

    def score(probabilities: Tensor) -> Tensor:
        relevance = dependence(kernels, probabilities)
        if len(kernels) == 1:
            return relevance
        shared = shared_dependence(kernels)
        return relevance - redundancy_weight * (shared.sum(dim=1) - shared.diagonal()) / (len(kernels) - 1)
    return score


def head_kernels(outputs: Tensor) -> Tensor:
    """Gaussian kernels (H, B, B) of F_h (B x N), the output of head h averaged over its width: outputs (B, N, H, d)."""
    return gaussian_kernels(units_first(at_least_float32(outputs).mean(dim=3)))


def weight_magnitude(weights: Tensor) -> Tensor:
    """Euclidean norm of the weights that leave with a unit (biases aside): (U, all of one unit) -> (U)."""
    return at_least_float32(weights).norm(dim=1)


def activation_magnitude(x: Tensor) -> Tensor:
    """Mean of |x| over images, tokens and width: (B, N, U, d) -> (U)."""
    return at_least_float32(x).abs().mean(dim=(0, 1, 3))


def taylor(x: Tensor, gradient: Tensor) -> Tensor:
    """Mean over images of | sum over tokens and width of x * dLoss/dx |: both (B, N, U, d) -> (U).

    The loss is each image's own cross-entropy: to first order, how much it changes where the unit gives 0.
    """
    return (at_least_float32(x) * at_least_float32(gradient)).sum(dim=(1, 3)).abs().mean(dim=0)


def random_scores(count: int, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1): (count)."""
    return torch.rand(count, generator=generator)


@dataclass(frozen=True, kw_only=True)
class UnitCriterion:
    """How the units of one block are scored.

    needs           what both functions take -> what they give
    "nothing"       number of units, generator -> scores (U)
    "weights"       weights (U, all that leave with the unit) -> scores (U)
    "activations"   activations (B, N, U, d), for neurons d = 1 -> scores (U)
    "gradients"     activations and gradients of the summed loss, each (B, N, U, d) -> scores (U)
    "moments"       weight (D, U d) of the linear that mixes the units, Moments of its inputs, d -> scores (U)
    "fisher"        the same, the weight turned so that the square of an output's error is what it costs
    "output"        activations (B, N, U, d), settings by name -> a function of the softmax output that gives scores (U)
    """

    needs: str
    heads: Callable[..., Tensor | Score]
    neurons: Callable[..., Tensor | Score]


UNIT_CRITERIA = {
    "hsic": UnitCriterion(needs="output", heads=heads_by_hsic, neurons=neurons_by_hsic),
    "weight": UnitCriterion(needs="weights", heads=weight_magnitude, neurons=weight_magnitude),
    "activation": UnitCriterion(needs="activations", heads=activation_magnitude, neurons=activation_magnitude),
    "taylor": UnitCriterion(needs="gradients", heads=taylor, neurons=taylor),
    "reconstruction": UnitCriterion(needs="moments", heads=reconstruction, neurons=reconstruction),
    "fisher": UnitCriterion(needs="fisher", heads=reconstruction, neurons=reconstruction),
    "random": UnitCriterion(needs="nothing", heads=random_scores, neurons=random_scores),
}


def unit_criterion(name: str) -> UnitCriterion:
    """The criterion of that name. Raises InputError, listing the known ones, for any other."""
    check_known("criterion", name, UNIT_CRITERIA)
    return UNIT_CRITERIA[name]
