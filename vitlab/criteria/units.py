"""Scores of neurons and heads from their activations, higher is kept (arXiv 2201.00043, methods B2)."""
import torch
from torch import Tensor

from vitlab.criteria.hsic import CHUNK, redundancy, relevance

RELEVANCE_WEIGHT, MAGNITUDE_WEIGHT, REDUNDANCY_WEIGHT = 0.1, 0.9, 0.1       # published


ROUNDING = 64                               # units in the last place that a sum may be off by


def _min_max(values: Tensor) -> Tensor:
    """Scaled to [0, 1]; all 0 where every value is the same but for rounding, which scaling would blow up."""
    low, high = values.min(), values.max()
    same = high - low <= ROUNDING * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.zeros_like(values) if same else (values - low) / (high - low)


def neuron_scores(hidden: Tensor, probabilities: Tensor, *, relevance_weight: float = RELEVANCE_WEIGHT,
                  magnitude_weight: float = MAGNITUDE_WEIGHT, chunk: int = CHUNK) -> Tensor:
    """Of one block: hidden units after the activation (B, N, M), softmax output (B, classes) -> (M).

        score_m = 0.1 * minmax(HSIC(X_m, y)) + 0.9 * minmax(sum of |X_m|),  X_m (B x N) the unit over all tokens
    """
    units = hidden.permute(2, 0, 1)                                             # (M, B, N)
    dependence = relevance(units, probabilities, chunk)
    return relevance_weight * _min_max(dependence) + magnitude_weight * _min_max(units.abs().sum(dim=(1, 2)))


def head_scores(outputs: Tensor, probabilities: Tensor, *, redundancy_weight: float = REDUNDANCY_WEIGHT) -> Tensor:
    """Of one block: head outputs before the projection (B, N, H, d), softmax output (B, classes) -> (H).

        score_h = HSIC(F_h, y) - 0.1 * mean over the other heads h' of HSIC(F_h, F_h'),  F_h (B x N) the mean over d
    """
    features = outputs.mean(dim=3).permute(2, 0, 1)                             # (H, B, N)
    score = relevance(features, probabilities)
    if len(features) > 1:
        shared = redundancy(features)
        score = score - redundancy_weight * (shared.sum(dim=1) - shared.diagonal()) / (len(features) - 1)
    return score
