"""Closed-form compensation of cuts: what is left of a linear layer takes over what the cut units gave, by ridge regression.

Second-order pruning of whole units: *Optimal Brain Surgeon* (Hassibi and Stork, NIPS 1992) and *ZipLM* (Kurtic et al., 2023,
arXiv 2302.04089, section 3); here with a bias, so that means are taken over exactly. All from second moments of the layer's
inputs: K inputs (units times their width d), D outputs, U units, n rows (tokens of all images).
"""
import torch
from torch import Tensor

from vitlab.files import InputError

RIDGE = 1e-3                                # times the mean variance of the inputs
STEPS = 256                                 # of an elimination, about; more units go several at once
CANDIDATES = 4                              # for each place of a step


class Moments:
    """Sums over weighted rows of a layer's inputs a (K) and, where given, of what its output lacks, e (D): of a, a a^T, e and
    e a^T, gathered in any number of batches; memory K^2 + K D, whatever n. rows is the sum of the rows' weights."""

    def __init__(self, size: int, device: torch.device | str = "cpu", outputs: int = 0) -> None:
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device=device)
        self.rows, self.sum, self.products = 0, zeros(size), zeros(size, size)
        self.lack, self.lack_products = zeros(outputs), zeros(outputs, size)

    def add(self, x: Tensor, lacks: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Inputs (..., K), what the outputs lack (..., D), and weights of the rows (...); None: nothing, and 1 each."""
        x = x.detach().flatten(0, -2).float()
        weighted = x if weights is None else x * weights.flatten()[:, None]
        self.rows += len(x) if weights is None else float(weights.sum())
        self.sum += weighted.sum(dim=0, dtype=torch.float64)
        with torch.autocast(x.device.type, enabled=False):                      # bf16 is for the model, not for its moments
            self.products += (weighted.T @ x).double()
            if lacks is not None:
                lacks = lacks.detach().flatten(0, -2).float()
                self.lack_products += (lacks.T @ weighted).double()
                self.lack += (lacks if weights is None else lacks * weights.flatten()[:, None]).sum(dim=0, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.rows

    def covariance(self, ridge: float = RIDGE) -> Tensor:
        """Covariance (K, K), its diagonal raised by ridge times its mean. Raises InputError where nothing was gathered."""
        if not self.rows:
            raise InputError("no inputs were gathered to compensate on")
        mean = self.mean
        found = self.products / self.rows - torch.outer(mean, mean)
        found.diagonal().add_(ridge * found.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
        return found


def columns(units: Tensor, width: int) -> Tensor:
    """The inputs of units (U): (U * width)."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def refit(weight: Tensor, moments: Moments, kept: Tensor, width: int = 1, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """(weight of the kept inputs (D, K'), what the bias gains (D)) that give back the layer's output, and what it lacked, best:

        min  sum_r w_r |W' a_S + b' - (W a + b + e)|^2 + ridge * mean variance * sum_r w_r * |W' - W_S|^2
        W' = W_S + (W_R C_RS + C_eS) C_SS^-1,   b' - b = W_R mu_R + mu_e - (W' - W_S) mu_S

    S the kept inputs, R the others, C the covariance, its diagonal raised. kept: units, ascending. With nothing cut and nothing
    lacking: W itself, and 0.
    """
    inputs = columns(kept, width)
    rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    rest[inputs] = False
    covariance, mean, w = moments.covariance(ridge), moments.mean, weight.double()
    wanted, shift = w[:, rest] @ covariance[rest][:, inputs], w[:, rest] @ mean[rest]           # (D, K'), (D)
    if len(moments.lack):
        lack = moments.lack / moments.rows
        wanted, shift = wanted + moments.lack_products[:, inputs] / moments.rows - torch.outer(lack, mean[inputs]), shift + lack
    change = torch.linalg.solve(covariance[inputs][:, inputs], wanted.T).T
    return (w[:, inputs] + change).to(weight.dtype), (shift - change @ mean[inputs]).to(weight.dtype)


def _losses(w: Tensor, inverse: Tensor, there: Tensor, width: int) -> Tensor:
    """error_u = tr(W_u (H_uu)^-1 W_u^T) of the units still there, infinite for others: w (D, U d), inverse H (U d, U d) -> (U)."""
    count = len(there)
    own = inverse.unflatten(1, (count, width)).unflatten(0, (count, width))     # (U, d, U, d)
    own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1)                         # H_uu (U, d, d)
    own = torch.where(there[:, None, None], own, torch.eye(width, dtype=own.dtype, device=own.device))
    units = w.unflatten(1, (count, width)).permute(1, 2, 0)                     # W_u^T (U, d, D)
    return (units * torch.linalg.solve(own, units)).sum(dim=(1, 2)).masked_fill(~there, torch.inf)


def _without(w: Tensor, inverse: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The refitted weights and H where the inputs `at` have left; 0 in their rows and columns."""
    step = torch.linalg.solve(inverse[at][:, at], inverse[at])                  # (k, K)
    w, inverse = w - w[:, at] @ step, inverse - inverse[:, at] @ step
    w[:, at], inverse[at], inverse[:, at] = 0, 0, 0
    return w, inverse


def _leaving(w: Tensor, inverse: Tensor, losses: Tensor, width: int, at_once: int) -> list[int]:
    """The units of one step, up to at_once, in their order: always the one that loses least without those before it, of the
    CANDIDATES * at_once that lose least alone. The step ends before one that loses more than units that are no candidates do."""
    ranked = losses.argsort()[:int(losses.isfinite().sum())]
    near, at_once = ranked[:CANDIDATES * at_once], min(at_once, len(ranked))
    beyond = losses[ranked[len(near)]] if len(near) < len(ranked) else torch.inf
    at = columns(near, width)
    w, inverse, losses, left = w[:, at], inverse[at][:, at], losses[near], []
    there = torch.ones(len(near), dtype=torch.bool, device=near.device)
    while True:
        left.append(int(losses.argmin()))
        if len(left) == at_once:
            break
        there[left[-1]] = False
        w, inverse = _without(w, inverse, columns(near.new_tensor(left[-1:]), width))
        losses = _losses(w, inverse, there, width)
        if losses.min() > beyond:
            break
    return near[left].tolist()


def elimination_order(weight: Tensor, moments: Moments, width: int = 1, ridge: float = RIDGE, at_once: int | None = None) -> Tensor:
    """Units (U) in the order in which they go, greedily: always the one whose loss is least after the best refit of the rest,

        error_u = tr(W_u (H_uu)^-1 W_u^T),   H = C^-1 of the inputs still there, W refitted

    the mean squared error that it adds to the layer's output. A unit that others can stand in for goes early, however large
    it is. at_once: units that may go in one step, in which those that lose much are not looked at again, so that what each loses
    without those before it costs little; None takes as many as make STEPS steps. Raises InputError for weights or moments that are
    not finite, or where nothing was gathered.
    """
    count, device = weight.shape[1] // width, weight.device
    at_once = at_once or -(-count // STEPS)
    for name, value in (("weights of the layer", weight), ("moments of its inputs", moments.products), ("sums of its inputs", moments.sum)):
        if not value.isfinite().all():
            raise InputError(f"the {name} hold values that are not finite; finite ones are needed to order its units")
    inverse = torch.linalg.inv(moments.covariance(ridge))                       # (K, K)
    w, there, order = weight.double().clone(), torch.ones(count, dtype=torch.bool, device=device), []
    while len(order) < count:
        leaving = _leaving(w, inverse, _losses(w, inverse, there, width), width, at_once)
        w, inverse = _without(w, inverse, columns(torch.tensor(leaving, device=device), width))
        there[leaving] = False
        order += leaving
    return torch.tensor(order, device=device)


def reconstruction(weight: Tensor, moments: Moments, width: int = 1) -> Tensor:
    """Scores (U), higher is kept: the place in the `elimination_order`, from 0 for the unit that goes first to 1."""
    order = elimination_order(weight, moments, width)
    scores = torch.empty(len(order), dtype=torch.float64, device=order.device)
    scores[order] = torch.linspace(0, 1, len(order), dtype=torch.float64, device=order.device)
    return scores.float()
