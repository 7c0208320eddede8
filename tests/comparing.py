"""What the tests of models share: logits, how far two results are apart, and matrices as training leaves them."""
import torch

from vitlab.models.compress import MergeReconstructTokens


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    assert a.shape == b.shape and bool(torch.isfinite(a).all())
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def logits(model, x):
    return model(x)


@torch.no_grad()
def disturb_matrices(model, seed: int = 0) -> None:
    """Noise in every entry, as after training: entries that start at 0, prefix rows and pruned columns too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, MergeReconstructTokens):
            for matrix in (module.merge_matrix, module.reconstruct_matrix):
                matrix.add_(0.05 * torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype))
