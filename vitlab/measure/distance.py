"""What a model gives, and how far that is from what another gives: the one place where classes, pixels and features
differ.

Raw outputs are logits (B, K) of images or (B, K, h, w) of a Segmenter's patches, features (B, D), or those of patches
(B, D, n). They are compared after log-softmax, or as vectors of length 1, over dimension 1. Targets are (B), or (B, H,
W) with IGNORE where nothing counts.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.criteria.hsic import at_least_float32
from vitlab.data.layouts import IGNORE
from vitlab.measure.evaluate import autocast, check_targets, each_divergence
from vitlab.models.families import finished
from vitlab.models.segmenter import Segmenter
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import require

NONE = -100  # torch's own number of a target that counts for nothing: no image has it
ROUNDING = 1e-6                     # of cosines in float32: what is nearer by less is as near


def ignored(targets: Tensor) -> int:
    """The target that counts for nothing: IGNORE of pixels; of images, which have classes above it, none is."""
    return IGNORE if targets.dim() > 1 else NONE


def counted(targets: Tensor) -> Tensor:
    """How many images, or pixels, count ()."""
    return (targets != ignored(targets)).sum()


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0, of: Tensor | None = None) -> Tensor:
    """The sum over images, or over all pixels that count, divided by their number, or by `of`; 0 where none does.
    smoothing: of labels, [0, 1)."""
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=ignored(targets), label_smoothing=smoothing)
    return total / (counted(targets) if of is None else of).clamp(min=1)


def each_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Each image's own (B); of pixels the mean over those of the image that count. InputError as by `check_targets`."""
    check_targets(targets)
    each = F.cross_entropy(logits, targets, reduction="none", ignore_index=ignored(targets))    # (B) or (B, H, W)
    losses, counts = (v.reshape(len(v), -1).sum(dim=1) for v in (each, targets != ignored(targets)))
    return losses / counts.clamp(min=1)


class Classes:
    """Of a classifier: the distance is KL of its probabilities, the loss the cross-entropy of labels."""

    distance, unit = "KL(dense || compressed) in nats", "nats"
    agreement = "images classified as by the dense model"
    labelled = True                 # whether the loss needs labels

    def raw(self, model: nn.Module, images: Tensor, block: int = 0) -> Tensor:
        """block above 0: from what enters that block in place of the images."""
        given = finished(model, images, block) if block else model(images)
        return self.taken(given, getattr(model, "num_prefix_tokens", 0))

    def taken(self, given: Tensor, prefix: int) -> Tensor:
        """What counts of what a model gives that has so many prefix tokens."""
        return given

    def compared(self, raw: Tensor) -> Tensor:
        """Log-probabilities."""
        return raw.log_softmax(dim=1)

    def apart(self, given: Tensor, expected: Tensor) -> Tensor:
        """The distance of each image (B), of patches their mean, between outputs as they are `compared`."""
        return each_divergence(given, expected)

    def dependent(self, raw: Tensor) -> Tensor:
        """What dependence on the output (HSIC) is measured with: probabilities (B, ·)."""
        return at_least_float32(raw).softmax(dim=1).flatten(1)

    def drawn(self, given: Tensor, draws: torch.Generator) -> Tensor:
        """A random number () of a batch as it is `compared`. With g its gradient by an image's output or by what leads
        there, and an error e of that, the distance is e^T E[g g^T] e / 2 to second order (up to the number of patches).
        Here log p(y), y drawn from p, summed over images or patches."""
        rows = given.movedim(1, -1).flatten(0, -2)                              # a row an image, or a patch
        return rows.gather(1, torch.multinomial(rows.detach().exp(), 1, generator=draws)).sum()

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, draws: torch.Generator, *, each: bool) -> Tensor:
        """What scores by gradient are of: each image's own, summed, or else the batch's mean."""
        logits = model(images)
        return each_cross_entropy(logits, targets).sum() if each else cross_entropy(logits, targets)

    def own_targets(self, model: nn.Module, images: Tensor) -> Tensor:
        """In place of labels, what the model itself says: classes, of a Segmenter masks."""
        return model(images).argmax(dim=1)


class Pixels(Classes):
    """Of a Segmenter: the distance is the mean KL over patches, from whose logits those of pixels follow."""

    agreement = "pixels classified as by the dense model"

    def raw(self, model: Segmenter, images: Tensor, block: int = 0) -> Tensor:
        return model.patch_logits(images)


class Features(Classes):
    """Of a model without a classifier: the distance is 1 - cosine of what it pools.

    Of unit vectors that is |u - v|^2 / 2. Nothing needs labels: gradients are those of z^T u, z ~ N(0, I), so that E[g
    g^T] of u is I, and the mean |derivative| by anything is how far u moves with it, times sqrt(2 / pi).
    """

    distance, unit = "1 - cosine of pooled features, dense and compressed", "1 - cosine"
    agreement = "images with the same nearest neighbour as by the dense model"
    labelled = False

    def compared(self, raw: Tensor) -> Tensor:
        """Unit vectors."""
        return F.normalize(raw, dim=1)

    def apart(self, given: Tensor, expected: Tensor) -> Tensor:
        each = (given - expected).square().sum(dim=1) / 2                       # (B) or (B, n)
        return each.mean(dim=1) if each.dim() > 1 else each

    def dependent(self, raw: Tensor) -> Tensor:
        """Unit vectors (B, ·)."""
        return self.compared(at_least_float32(raw)).flatten(1)

    def drawn(self, given: Tensor, draws: torch.Generator) -> Tensor:
        return (given * torch.randn(given.shape, generator=draws, device=draws.device).to(given)).sum()

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, draws: torch.Generator, *, each: bool) -> Tensor:
        found = self.drawn(self.compared(at_least_float32(self.raw(model, images))), draws)
        return found if each else found / len(images)

    def own_targets(self, model: nn.Module, images: Tensor) -> Tensor:
        """Nothing that is read."""
        return torch.zeros(len(images), dtype=torch.int64)


class Patches(Features):
    """Of a model that pools nothing, for dense use: the distance is the mean of 1 - cosine over its patches."""

    distance = "mean 1 - cosine of patch tokens, dense and compressed"

    def taken(self, given: Tensor, prefix: int) -> Tensor:
        return given.flatten(2) if given.dim() == 4 else given[:, prefix:].mT          # (B, N, D) -> (B, D, n)


def output_of(model: nn.Module | ViTShape) -> Classes:
    """What a model, or one of that shape, gives: of what it has. One without a classifier, or with a projection in
    place of it, is compared by the features that it gives for an image; one that pools nothing (timm's global_pool=""),
    by what it gives for each patch."""
    if isinstance(model, ViTShape):
        decoder, classes, pool = bool(model.decoder), model.num_classes and not model.projection, model.pool
    else:
        decoder, pool = isinstance(model, Segmenter), getattr(model, "global_pool", None)
        classes = getattr(model, "num_classes", 1) and not isinstance(getattr(model, "head", None), nn.Identity)
    return Pixels() if decoder else Patches() if pool == "" else Classes() if classes else Features()


def outputs(model: nn.Module, images: Tensor, amp: bool | None = False, block: int = 0) -> Tensor:
    """Of a model as they are compared, float32. block above 0: from what enters that block in place of the images."""
    device, output = next(model.parameters()).device, output_of(model)
    with autocast(device, amp):
        raw = output.raw(model, images.to(device), block)
    return output.compared(raw.float())


def at_targets(model: nn.Module, given: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities where the targets are: of patches, those of the pixels (the logits of pixels lie between those
    of patches, and a number that is the same for all classes changes no softmax)."""
    return given if targets.dim() == 1 else model.upsample(given, targets.shape[1:]).log_softmax(dim=1)


def pooled(given: Tensor) -> Tensor:
    """Features as they are compared, one vector of length 1 an image (B, D): of patches the mean of theirs."""
    return given if given.dim() == 2 else F.normalize(given.mean(dim=2), dim=1)


def same_neighbours(given: Tensor, expected: Tensor) -> Tensor:
    """Of which images (N) the nearest of the others by `given`, unit vectors (N, D), is the nearest by `expected`, or
    as near but for ROUNDING (images may be alike). Raises InputError for fewer than two images."""
    require(len(given) >= 2, f"nearest neighbours of {len(given)} image; at least 2 are needed")
    near, wanted = (each @ each.T for each in (given, expected))                # (N, N)
    chosen = near.fill_diagonal_(-2).argmax(dim=1, keepdim=True)
    wanted.fill_diagonal_(-2)
    return wanted.gather(1, chosen).squeeze(1) >= wanted.max(dim=1).values - ROUNDING
