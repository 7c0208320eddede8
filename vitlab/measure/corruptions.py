"""How models take images that are worse than those they learnt from."""
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from vitlab.measure.distance import output_of, outputs
from vitlab.measure.evaluate import evaluate
from vitlab.measure.pixels import evaluate_scenes
from vitlab.models.segmenter import Segmenter
from vitlab.runtime.files import InputError
from vitlab.runtime.uncertainty import standard_error

# The severities 1, 3 and 5 of ImageNet-C (Hendrycks and Dietterich, ICLR 2019): deviation of the noise, of the blur in
# pixels of 224, JPEG quality, and what is added to every channel of an image in [0, 1].
CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "noise": (0.08, 0.18, 0.38), "blur": (1, 3, 6), "JPEG": (25, 15, 7), "brightness": (0.1, 0.3, 0.5)}


def corrupted(images: Tensor, kind: str, severity: int, mean: Sequence[float], std: Sequence[float],
              seed: int = 0) -> Tensor:
    """Images (B, channels, h, w), as a model takes them, made worse by one of CORRUPTIONS, severity 0 to 2."""
    if kind not in CORRUPTIONS or not 0 <= severity < len(CORRUPTIONS[kind]):
        raise InputError(f"corruption {kind!r} of severity {severity} is not known; known are {list(CORRUPTIONS)} of 0 "
                         f"to {len(CORRUPTIONS['noise']) - 1}")
    amount, (m, s) = CORRUPTIONS[kind][severity], (images.new_tensor(v)[:, None, None] for v in (mean, std))
    x = (images * s + m).clamp(0, 1)
    if kind == "noise":
        x = x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    elif kind == "blur":
        sigma = amount * x.shape[-1] / 224
        x = gaussian_blur(x, [2 * max(1, round(3 * sigma)) + 1] * 2, [sigma] * 2)
    elif kind == "JPEG":
        x = torch.stack([_through_jpeg(each, int(amount)) for each in x]).to(x)
    else:
        x = x + amount
    return (x.clamp(0, 1) - m) / s


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    """An image (channels, h, w) in [0, 1] through a JPEG file of that quality."""
    pixels = (image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, format="JPEG", quality=quality)
    read = np.asarray(Image.open(file, formats=("JPEG",)))
    return torch.from_numpy(read / 255).reshape(pixels.shape).permute(2, 0, 1)


@torch.inference_mode()
def robustness(models: Mapping[str, nn.Module], batches: Sequence[tuple[Tensor, Tensor]], mean: Sequence[float],
               std: Sequence[float], *, labelled: bool = True, progress: bool = True) -> list[dict[str, Any]]:
    """What each model is worth on the images as they are (corruption "", severity -1) and by each of CORRUPTIONS, with
    its standard error: top-1, of a Segmenter mIoU, in per cent. Without labels, or without a classifier: how far its
    output is from what it gives for the image as it is (`distance.output_of`)."""
    kinds = [("", -1), *((kind, severity) for kind, amounts in CORRUPTIONS.items() for severity in range(len(amounts)))]
    rows = []
    clean = {name: [outputs(model, images) for images, _ in batches] for name, model in models.items()
             if not (labelled and output_of(model).labelled)}
    for kind, severity in tqdm(kinds, desc="corruptions", disable=not progress):
        shown = [(corrupted(images, kind, severity, mean, std, number) if kind else images, targets)
                 for number, (images, targets) in enumerate(batches)]
        for name, model in models.items():
            if name in clean:
                measure, value, error = _moved(model, shown, clean[name])
            elif isinstance(model, Segmenter):
                scores = evaluate_scenes(model, shown, progress=False).scores
                measure, value, error = "mIoU (%)", scores.miou_pct, scores.miou_se
            else:
                found = evaluate(model, shown, progress=False)
                measure, value, error = "top-1 (%)", found.top1_pct, found.top1_se
            rows.append({"corruption": kind, "severity": severity, "model": name, "measure": measure, "value": value,
                         "se": error})
    return rows


def _moved(model: nn.Module, shown: Sequence[tuple[Tensor, Tensor]], clean: Sequence[Tensor]
           ) -> tuple[str, float, float | None]:
    """(what it is, the mean distance between its outputs for `shown` and the clean ones, its standard error)."""
    output = output_of(model)
    apart = torch.cat([output.apart(outputs(model, images), own).cpu() for (images, _), own in zip(shown, clean)])
    return f"distance to its own output ({output.unit})", float(apart.mean()), standard_error(apart.numpy())
