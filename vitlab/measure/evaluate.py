"""Top-1, top-5 and loss of a model on a named split."""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from vitlab.runtime import parallel
from vitlab.runtime.files import require
from vitlab.runtime.uncertainty import share_error, standard_error


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of `images` images; top5_pct is None with fewer than five classes; `broken` images could not be read."""

    top1_pct: float
    top5_pct: float | None
    loss: float
    images: int
    broken: int
    top1_se: float | None = None        # standard errors over images: of top1_pct in points, of loss in nats
    loss_se: float | None = None
    # where there is a dense model: mean KL(dense || model), nats, and its standard error
    distill_loss: float | None = None
    distill_loss_se: float | None = None


def uses_bf16(device: torch.device, amp: bool | None) -> bool:
    """amp itself; where it is None, whether the hardware computes in bf16 (a CPU with avx512_bf16 or amx, or a GPU)."""
    if amp is None:
        return torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    return amp


def autocast(device: torch.device, amp: bool | None) -> torch.autocast:
    """bf16 autocast where `uses_bf16` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, amp))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16; elsewhere bf16 on a CPU is emulated and slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_targets(targets: torch.Tensor) -> None:
    """InputError where targets are not one class number an image (B) or a pixel (B, H, W). Outputs are measured as one
    softmax: of a model that gives several labels an image (trained by binary cross-entropy on targets (B, K)), its
    top-1, cross-entropy and distance to the dense model would mean nothing."""
    numbers = targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    require(not numbers and targets.dim() in (1, 3), f"targets are {targets.dtype} {tuple(targets.shape)}; one class "
            "number an image (B), or a pixel (B, H, W), is needed: outputs are measured as one softmax, and several "
            "labels an image are not")


def each_divergence(given: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL(expected || given) of log-probabilities in nats, of each image (B); of patches their mean."""
    each = F.kl_div(given, expected, reduction="none", log_target=True).sum(dim=1)          # (B) or (B, h, w)
    return each.flatten(1).mean(dim=1) if each.dim() > 1 else each


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *,
             device: str | torch.device | None = None, amp: bool | None = False, dense: nn.Module | None = None,
             progress: bool = True) -> Accuracy:
    """Exact counts over all readable images, in eval mode, float32 unless amp. dense: a model whose output the distance
    is measured to. Raises InputError where there is no image, or for targets that are not class numbers.

    Under torchrun each process gives its share of the batches, and all get the counts of all of them.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    training = model.training
    model.to(device).eval()
    dense = None if dense is None else dense.to(device).eval()
    top1, top5, losses, distances, classes = 0, 0, [], [], 0
    for images, targets in tqdm(batches, desc="evaluate", unit="batch", disable=not progress):
        check_targets(targets)
        images, targets = images.to(device), targets.to(device)
        with autocast(device, amp):
            logits, expected = model(images), None if dense is None else dense(images)
        logits, classes = logits.float(), logits.shape[1]
        ranked = logits.topk(min(5, classes), dim=1).indices == targets[:, None]
        top1, top5 = top1 + int(ranked[:, 0].sum()), top5 + int(ranked.sum())
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
        if expected is not None:
            distances += each_divergence(logits.log_softmax(dim=1), expected.float().log_softmax(dim=1)).tolist()
    model.train(training)
    counts = torch.tensor([top1, top5, len(getattr(batches, "broken", ()))], dtype=torch.int64)
    top1, top5, broken = parallel.total(counts).tolist()
    losses, distances = ([value for each in parallel.gather(values) for value in each]
                         for values in (losses, distances))
    require(losses, "no image of the split could be read")
    count, classes = len(losses), max(parallel.gather(classes))
    return Accuracy(top1_pct=100 * top1 / count, top5_pct=100 * top5 / count if classes >= 5 else None,
                    loss=sum(losses) / count, images=count, broken=broken, top1_se=share_error(top1, count),
                    loss_se=standard_error(losses), distill_loss=sum(distances) / count if distances else None,
                    distill_loss_se=standard_error(distances) if distances else None)
