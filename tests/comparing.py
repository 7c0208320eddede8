"""What the tests of models share: logits, how far two results are apart, and matrices as training leaves them."""
import copy
from collections.abc import Callable

import torch

from vitlab.models.merge import MergeReconstructTokens


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    assert a.shape == b.shape and bool(torch.isfinite(a).all())
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def logits(model, x):
    return model(x)


def gradient_and_slope(model, x, step: float = 1e-7) -> tuple[float, float, set[str]]:
    """Of the sum of squared logits along a random direction: by backward, by a central difference, and the parameters
    without a gradient."""
    model(x).square().sum().backward()
    generator = torch.Generator().manual_seed(0)
    moved = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n,
             p in model.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(p.grad).all()) for n, p in model.named_parameters() if n in moved)
    got = sum(float((p.grad * moved[n]).sum()) for n, p in model.named_parameters() if n in moved)

    def value(sign: int) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name in moved:
                    parameter.add_(sign * step * moved[name])
        return float(logits(other, x).square().sum())
    return got, (value(1) - value(-1)) / (2 * step), {n for n, _ in model.named_parameters()} - set(moved)


def killed_after(stop: int, objective: Callable, calls: list) -> Callable:
    """The objective, interrupted at its call number `stop`; `calls` gathers what it was called with."""
    def interrupted(policy):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(tuple(policy))
        return objective(policy)
    return interrupted


@torch.no_grad()
def disturb_matrices(model, seed: int = 0) -> None:
    """Noise in every entry, as after training: entries that start at 0, prefix rows and pruned columns too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, MergeReconstructTokens):
            for matrix in module.parameters(recurse=False):
                matrix.add_(0.05 * torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype))
