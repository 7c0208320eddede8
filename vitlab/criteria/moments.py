"""Second moments of what goes into a linear layer: K inputs (units times width), D outputs, n rows (tokens)."""
import copy

import torch
from torch import Tensor

from vitlab.runtime.files import require

# of a product with itself, at a time; the other half is its mirror image: 768 inputs take 0.65 of the time
COLUMNS = 256


def _with_itself(x: Tensor, weighted: Tensor) -> Tensor:
    """sum_n w_n x_n x_n^T (K, K) of rows x (n, K) and w x: above the diagonal by a product, the rest copied."""
    found = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, x.shape[1], COLUMNS):
        own, after = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
        found[own, start:] = weighted[:, own].T @ x[:, start:]
        found[after, own] = found[own, after].T
    return found


class Moments:
    """Sums over weighted rows of a layer's inputs a (K) and, where given, of what its output lacks, e (D): of a, a a^T,
    e and e a^T, gathered in any number of batches; memory K^2 + K D, whatever n. rows: the sum of weights."""

    def __init__(self, size: int, device: torch.device | str = "cpu", outputs: int = 0) -> None:
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device=device)
        self.rows, self.sum, self.products = zeros(), zeros(size), zeros(size, size)
        self.lack, self.lack_products = zeros(outputs), zeros(outputs, size)

    def add(self, x: Tensor, lacks: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Inputs (..., K), what the outputs lack (..., D), and weights of the rows (...); None: nothing, and 1 each."""
        x = x.detach().flatten(0, -2).float()
        weighted = x if weights is None else x * weights.flatten()[:, None]
        self.rows += len(x) if weights is None else weights.sum()
        self.sum += weighted.sum(dim=0, dtype=torch.float64)
        with torch.autocast(x.device.type, enabled=False):  # bf16 is for the model, not for its moments
            self.products += _with_itself(x, weighted).double()
            if lacks is not None:
                lacks = lacks.detach().flatten(0, -2).float()
                self.lack_products += (lacks.T @ weighted).double()
                weighed = lacks if weights is None else lacks * weights.flatten()[:, None]
                self.lack += weighed.sum(dim=0, dtype=torch.float64)

    def plus(self, other: "Moments") -> "Moments":
        """Of the rows of both."""
        found = copy.copy(self)
        for name, value in vars(self).items():
            setattr(found, name, value + getattr(other, name))
        return found

    def uncentred(self) -> "Moments":
        """As if all means were 0: for a layer without a bias, which can't make them good."""
        found = copy.copy(self)
        found.sum, found.lack = torch.zeros_like(self.sum), torch.zeros_like(self.lack)
        return found

    @property
    def mean(self) -> Tensor:
        return self.sum / self.rows

    def covariance(self, ridge: float = 0) -> Tensor:
        """Covariance (K, K), its diagonal raised by ridge times its mean. InputError where nothing was gathered."""
        require(self.rows, "no inputs were gathered to compensate on")
        mean = self.mean
        found = self.products / self.rows - torch.outer(mean, mean)
        found.diagonal().add_(ridge * found.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
        return found
