"""Statistical dependence (HSIC) between many units and an output, without a loop over units.

*Multi-Dimensional Vision Transformer Compression via Dependency Guided Gaussian Process Search* (Hou and Kung, CVPRW 2022,
arXiv 2201.00043), methods B1. U units, B images, N features of a unit.
"""
import torch
from torch import Tensor

from vitlab.files import InputError

CHUNK = 512                                 # units at a time: memory is CHUNK * B * (B + N) numbers
WIDEST, NARROWER = 16.0, 4                  # sigma of the widest of five Gaussians; each other one is half as wide


def gaussian_kernels(x: Tensor) -> Tensor:
    """Mean of five Gaussian kernels, sigma in {1, 2, 4, 8, 16}: x (U, B, N) -> (U, B, B), values in (0, 1]   (B1).

        K[b, c] = mean over sigma of exp(-||x_b - x_c||^2 / (2 sigma^2))
    """
    norm = x.square().sum(dim=2)                                                # (U, B)
    distance = (norm[:, :, None] + norm[:, None, :] - 2 * x @ x.mT).clamp(min=0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    # exp(-d / (2 (s/2)^2)) = exp(-d / (2 s^2))^4: one exp for the widest sigma, the others are its 4th, 16th, ... powers.
    kernel = torch.exp(distance / (-2 * WIDEST**2))
    total = kernel.clone()
    for _ in range(NARROWER):
        kernel = kernel.square().square()
        total += kernel
    return total / (NARROWER + 1)


def centered(kernel: Tensor) -> Tensor:
    """H K H with H = I - 1/B: rows and columns (last two dimensions) sum to 0."""
    rows = kernel - kernel.mean(dim=-1, keepdim=True)
    return rows - rows.mean(dim=-2, keepdim=True)


def relevance(x: Tensor, probabilities: Tensor, chunk: int = CHUNK) -> Tensor:
    """HSIC(x_u, y) = trace(Kc Lc) of every unit u: Gaussian kernels on x (U, B, N), a linear one on the softmax output y
    (B, classes). Returns (U), not negative; no 1/B^2 factor (B1). Raises InputError for other shapes.
    """
    if x.dim() != 3 or probabilities.dim() != 2 or x.shape[1] != len(probabilities):
        raise InputError(f"units are {tuple(x.shape)} and outputs {tuple(probabilities.shape)}; (U, B, N) and (B, classes) are needed")
    output = centered(probabilities @ probabilities.T).flatten().to(x.dtype)    # (B * B); trace(Kc Lc) = sum of K * Lc
    return torch.cat([gaussian_kernels(part).flatten(1) @ output for part in x.split(chunk)])


def redundancy(x: Tensor, y: Tensor | None = None) -> Tensor:
    """HSIC(x_u, y_v) with Gaussian kernels on both sides, of every pair: x (U, B, N), y (V, B, N') -> (U, V)   (B1)."""
    first = centered(gaussian_kernels(x)).flatten(1)
    return first @ (first if y is None else centered(gaussian_kernels(y)).flatten(1)).T
