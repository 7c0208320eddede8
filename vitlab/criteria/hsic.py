"""Statistical dependence (HSIC) between many units and an output, without a loop over units.

*Multi-Dimensional Vision Transformer Compression via Dependency Guided Gaussian Process Search* (Hou and Kung, CVPRW
2022, arXiv 2201.00043), methods B1. U units, B images, N features of a unit.
"""
import torch
from torch import Tensor

CHUNK = 48                                  # units at a time: CHUNK * B * (2 N + 2 B) numbers stay in the cache
WIDEST, NARROWER = 16.0, 4                  # sigma of the widest of five Gaussians; each other one is half as wide


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 where it is half precision: that is for a model, not for sums over its tokens and images."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def units_first(x: Tensor) -> Tensor:
    """Activations (B, N, U), or a slice of them along U -> (U, B, N), contiguous.

    The slice is packed first and turned then: two copies along memory are faster than one across it.
    """
    return x.flatten(0, 1).contiguous().t().contiguous().unflatten(1, x.shape[:2])


@torch.no_grad()
def gaussian_kernels(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Mean of five Gaussian kernels, sigma in {1, 2, 4, 8, 16}: x (U, B, N) -> (U, B, B), values in (0, 1], float32 at
    least   (B1).

        K[b, c] = mean over sigma of exp(-||x_b - x_c||^2 / (2 sigma^2))

    out: where to write the kernels, or None for a new tensor.
    """
    x = at_least_float32(x)
    gram = x @ x.mT                                                             # (U, B, B)
    half = gram.diagonal(dim1=1, dim2=2) / (2 * WIDEST**2)  # (U, B); a power of 2: K[b, b] is exactly 1
    power = gram.mul_(1 / WIDEST**2).sub_(half[:, :, None]).sub_(half[:, None, :])      # -||x_b - x_c||^2 / (2 * 16^2)
    kernel = power.clamp_(max=0).exp_()
    total = kernel.clone() if out is None else out.copy_(kernel)
    # exp(-d / (2 (s/2)^2)) = exp(-d / (2 s^2))^4: one exp for the widest sigma, the others are its 4th, 16th, ...
    # powers.
    for _ in range(NARROWER):
        total += kernel.square_().square_()
    return total.div_(NARROWER + 1)


def centered(kernel: Tensor) -> Tensor:
    """H K H with H = I - 1/B: rows and columns (last two dimensions) sum to 0."""
    rows = kernel - kernel.mean(dim=-1, keepdim=True)
    return rows - rows.mean(dim=-2, keepdim=True)


def dependence(kernels: Tensor, probabilities: Tensor) -> Tensor:
    """HSIC(x_u, y) = trace(Kc Lc) of every kernel (U, B, B) with the linear kernel L of the softmax output (B, classes)
    -> (U), not negative; no 1/B^2 factor   (B1)."""
    # (B * B); trace(Kc Lc) = sum of K * Lc
    output = centered(probabilities @ probabilities.T).flatten().to(kernels.dtype)
    return kernels.flatten(1) @ output


def shared_dependence(kernels: Tensor) -> Tensor:
    """trace(Kc_u Kc_v) of every pair of kernels (U, B, B) -> (U, U)   (B1)."""
    first = centered(kernels).flatten(1)
    return first @ first.T
