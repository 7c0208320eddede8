"""Closed-form compensation of cuts: what is left of a linear layer takes over what was cut, by ridge regression.

Second-order pruning of whole units: *Optimal Brain Surgeon* (Hassibi and Stork, NIPS 1992) and *ZipLM* (Kurtic et al.,
2023, arXiv 2302.04089, section 3); here with a bias, so that means are taken over exactly. All from second moments of
the layer's inputs (`criteria.moments`): K inputs (units times their width d), D outputs, U units.
"""
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlab.criteria.moments import Moments
from vitlab.plan.shape import columns
from vitlab.runtime.files import InputError

RIDGE = 1e-3                                # times the mean variance of the inputs that stay
RIDGES = (1e-3, 1e-2, 0.1, 0.3, 1, 3, math.inf)     # of these a refit's is chosen; most layers take 0.1 to 1
STEP = 256          # inputs that leave an elimination before its matrices take it over; says nothing of the order


def cholesky(covariance: Tensor) -> Tensor:
    """L with L L^T = a covariance (K, K), in place raised by its rounding where that makes it indefinite: products are
    in float32, and of few rows, or of inputs that are nearly constant, a small ridge is less than their rounding."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        values = torch.linalg.eigvalsh(covariance)
        covariance.diagonal().add_(torch.finfo(covariance.dtype).eps * len(values) * values[-1] - 2 * values[0])
        factor = torch.linalg.cholesky(covariance)
    return factor


@dataclass(frozen=True, kw_only=True)
class Normal:
    """The normal equations of what the kept inputs S are to take over from the others R: sizes K', D."""

    covariance: Tensor              # C_SS (K', K')
    wanted: Tensor                  # W_R C_RS + C_eS (D, K')
    mean: Tensor                    # mu_S (K')
    shift: Tensor                   # W_R mu_R + mu_e (D)
    variance: Tensor                # mean of the diagonal of C_SS ()

    @classmethod
    def of(cls, weight: Tensor, moments: Moments, inputs: Tensor, dtype: torch.dtype = torch.float64) -> "Normal":
        """dtype: that they are solved in. Raises InputError where nothing was gathered, or what was is not finite."""
        rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        rest[inputs] = False
        if not (moments.products.isfinite().all() and moments.lack_products.isfinite().all()):
            raise InputError("what goes into a layer that is refitted is not finite; images and weights that give "
                             "numbers are needed")
        covariance, mean, w = moments.covariance(ridge=0), moments.mean, weight.double()
        wanted, shift = w[:, rest] @ covariance[rest][:, inputs], w[:, rest] @ mean[rest]
        if len(moments.lack):
            lack = moments.lack / moments.rows
            wanted = wanted + moments.lack_products[:, inputs] / moments.rows - torch.outer(lack, mean[inputs])
            shift = shift + lack
        kept = covariance[inputs][:, inputs]
        found = {"covariance": kept, "wanted": wanted, "mean": mean[inputs], "shift": shift,
                 "variance": kept.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)}
        return cls(**{name: value.to(dtype) for name, value in found.items()})

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(W' - W_S (D, K'), b' - b (D))."""
        change = torch.zeros_like(self.wanted)
        if ridge < math.inf:
            raised = self.covariance.clone()
            raised.diagonal().add_(ridge * self.variance)
            change = torch.cholesky_solve(self.wanted.T, cholesky(raised)).T
        return change, self.shift - change @ self.mean

    def error(self, change: Tensor, gained: Tensor) -> Tensor:
        """Mean squared error of a change on the rows of these equations, but for a constant."""
        spread = ((change @ self.covariance) * change).sum() - 2 * (change * self.wanted).sum()
        return spread + (gained + change @ self.mean - self.shift).square().sum()


def refit(weight: Tensor, moments: Moments, kept: Tensor, width: int = 1,
          ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """(weight of the kept inputs (D, K'), what the bias gains (D)) that give back the layer's output, and what it
    lacked, best:

        min  sum_r w_r |W' a_S + b' - (W a + b + e)|^2 + ridge * mean variance * sum_r w_r * |W' - W_S|^2
        W' = W_S + (W_R C_RS + C_eS) (C_SS + ridge * mean variance)^-1,   b' - b = W_R mu_R + mu_e - (W' - W_S) mu_S

    S the kept inputs, R the others, C the covariance. kept: units, ascending. ridge inf: the means alone are made good.
    With nothing cut and nothing lacking: W itself, and 0. Raises InputError where nothing was gathered.
    """
    inputs = columns(kept, width)
    change, gained = Normal.of(weight, moments, inputs).solve(ridge)
    return (weight[:, inputs].double() + change).to(weight.dtype), gained.to(weight.dtype)


def choose_ridge(weight: Tensor, folds: Sequence[Moments], kept: Tensor, width: int = 1,
                 ridges: Sequence[float] = RIDGES) -> float:
    """The ridge of a `refit` by what it misses on images that it was not fitted to: for each fold of the images, fitted
    to the others and measured on it; the largest that misses no more than the best one by a standard error of that
    difference over folds (Breiman et al., *Classification and Regression Trees*, 1984, section 3.4.3), as layers that
    follow are fitted to what images see that this one was fitted to. The largest of `ridges` where there are not two
    folds with images to tell by."""
    folds, inputs, ridges = [fold for fold in folds if fold.rows], columns(kept, width), sorted(ridges, reverse=True)
    if len(folds) < 2:
        return ridges[0]
    normals = []
    for fold in folds:
        others = functools.reduce(Moments.plus, (other for other in folds if other is not fold))
        # float32 is enough to choose by (the same ridges, errors to 1e-5 of their range), and takes half the time
        normals.append([Normal.of(weight, moments, inputs, torch.float32) for moments in (fold, others)])
    missed: list[Tensor] = []                                                   # (folds) for each ridge
    for ridge in ridges:
        missed.append(torch.stack([own.error(*fitted.solve(ridge)) for own, fitted in normals]).double())
        if len(missed) > 2 and missed[-1].mean() > missed[-2].mean() > missed[-3].mean():
            break                               # risen twice, it went on to rise in every layer measured (docs/log.md)
    errors = torch.stack(missed, dim=1).cpu()
    rest = errors - errors[:, errors.mean(dim=0).argmin()][:, None]
    return ridges[int((rest.mean(dim=0) <= rest.std(dim=0) / len(folds) ** 0.5).int().argmax())]


def _diagonal(matrix: Tensor, width: int) -> Tensor:
    """The blocks of units on the diagonal: (U d, U d) -> (U, d, d)."""
    blocks = matrix.unflatten(1, (-1, width)).unflatten(0, (-1, width))         # (U, d, U, d)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def _go(inverse: Tensor, gram: Tensor, width: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the `count` units that go next, H and G of those that stay), from H (U d, U d) and G = W^T W, W refitted. With h
    and g the rows of the unit u that goes, L L^T = H_uu and q = L^-1 h, those of the others become

        H - q^T q,   G - r^T q - q^T r,   r = L^-1 (g - G_uu L^-T q / 2)

    which the units of a step gather as rows of Q and R, and the matrices take over at its end in three products."""
    q, r = (inverse.new_zeros(count * width, len(inverse)) for _ in range(2))
    own, weight, order = _diagonal(inverse, width), _diagonal(gram, width), []              # (U, d, d) each
    inputs = torch.arange(len(inverse), device=inverse.device).unflatten(0, (-1, width))    # (U, d)
    there = torch.ones(len(own), dtype=torch.bool, device=own.device)
    for row in range(0, count * width, width):
        lost = (weight / own).flatten() if width == 1 else (
            torch.linalg.solve(own, weight).diagonal(dim1=1, dim2=2).sum(dim=1))
        unit = lost.masked_fill(~there, torch.inf).argmin()[None]               # (1), and never read on its way
        at = inputs.index_select(0, unit)[0]
        q_at, r_at = (gone[:row].index_select(1, at).T for gone in (q, r))
        h = inverse.index_select(0, at) - q_at @ q[:row]                                    # (d, U d)
        g = gram.index_select(0, at) - q_at @ r[:row] - r_at @ q[:row]
        root = torch.linalg.cholesky(h.index_select(1, at))
        h, g = (torch.linalg.solve_triangular(root, x, upper=False) for x in (h, g))
        g = g - torch.linalg.solve_triangular(root, g.index_select(1, at).T, upper=False).T @ h / 2
        q[row:row + width], r[row:row + width] = h, g
        h, g = (x.unflatten(1, (-1, width)).transpose(0, 1) for x in (h, g))    # (U, d, d): h_u, not its transpose
        own = own - (h * h if width == 1 else h.mT @ h)
        weight = weight - (2 * g * h if width == 1 else g.mT @ h + h.mT @ g)
        there = there.index_fill(0, unit, False)
        own = torch.where(there[:, None, None], own, torch.eye(width, dtype=own.dtype, device=own.device))
        order.append(unit)
    stay = inputs[there].flatten()
    q, r = q[:, stay], r[:, stay]
    return torch.cat(order), inverse[stay][:, stay] - q.T @ q, gram[stay][:, stay] - r.T @ q - q.T @ r


def elimination_order(weight: Tensor, moments: Moments, width: int = 1, ridge: float = RIDGE) -> Tensor:
    """Units (U) in the order in which they go, greedily: the one whose loss is least after the best refit of the rest,

        error_u = tr(W_u (H_uu)^-1 W_u^T),   H = C^-1 of the inputs still there, W refitted

    the mean squared error that it adds to the layer's output. A unit that others can stand in for goes early, however
    large it is. Time grows with K^3. Raises InputError for weights or moments that are not finite, or where nothing was
    gathered.
    """
    for name, value in (("weights of the layer", weight), ("moments of its inputs", moments.products),
                        ("sums of its inputs", moments.sum)):
        if not value.isfinite().all():
            raise InputError(f"the {name} hold values that are not finite; finite ones are needed to order its units")
    inverse = torch.cholesky_inverse(cholesky(moments.covariance(ridge)))
    w = weight.to(inverse)
    gram, left, order = w.T @ w, torch.arange(weight.shape[1] // width, device=weight.device), []
    while len(left):
        gone, inverse, gram = _go(inverse, gram, width, min(len(left), max(1, STEP // width)))
        order.append(left[gone])
        left = left[~torch.isin(left, order[-1])]
    return torch.cat(order)


def reconstruction(weight: Tensor, moments: Moments, width: int = 1) -> Tensor:
    """Scores (U), higher is kept: the place in the `elimination_order`, from 0 for the unit that goes first to 1."""
    order = elimination_order(weight, moments, width)
    scores = torch.empty(len(order), dtype=torch.float64, device=order.device)
    scores[order] = torch.linspace(0, 1, len(order), dtype=torch.float64, device=order.device)
    return scores.float()
