"""What compression changed of a Segmenter, image by image: which pixels have another class, and how well each class and
its edge are found before and after."""
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import maximum_filter1d, minimum_filter1d
from torch import Tensor
from tqdm import tqdm

from vitlab.data.layouts import IGNORE
from vitlab.measure.changes import Kept
from vitlab.measure.evaluate import autocast
from vitlab.models.segmenter import Segmenter
from vitlab.models.windows import segment
from vitlab.runtime.files import require

# of an image's diagonal: how far an edge reaches (Cheng et al., "Boundary IoU", CVPR 2021, arXiv 2103.16562, section 4)
EDGE = 0.02
PARTS = ("area", "edge")
DRAWS, LEVEL = 1000, 0.95       # of the bootstrap over images


def edge(classes: Tensor, width: int) -> Tensor:
    """(H, W): whether another class, or the end of the image, is at most so many pixels away along both sides."""
    x, size = np.pad(classes.numpy().astype(np.int16), width, constant_values=-1), 2 * width + 1
    largest, least = (each(each(x, size, axis=0), size, axis=1) for each in (maximum_filter1d, minimum_filter1d))
    return torch.from_numpy((largest != least)[width:-width, width:-width])


def counts_of(predicted: Sequence[Tensor], truth: Tensor, num_classes: int) -> Tensor:
    """(P, 2, 3, K) of predictions (H, W) of a truth (H, W), of each of PARTS: pixels of a class that are right, that
    the truth has, and that the prediction has; at an edge counts what is at the edge of both, of the truth, and of the
    prediction. What is ignored is so in both: its border is an edge of both."""
    width, counted = max(1, round(EDGE * math.hypot(*truth.shape))), truth != IGNORE

    def count(classes: Tensor, where: Tensor) -> Tensor:
        return torch.bincount(classes[where & counted].long(), minlength=num_classes)
    ends, found = edge(truth, width), []
    for each in predicted:
        own = edge(torch.where(counted, each, IGNORE), width)
        found.append(torch.stack([
            torch.stack([count(truth, true & given & (truth == each)), count(truth, true), count(each, given)])
            for true, given in ((counted, counted), (ends, own))]))
    return torch.stack(found)


def iou_pct(counts: Any) -> np.ndarray:
    """(..., K) in per cent of counts (..., 3, K); NaN of a class that is in neither truth nor prediction."""
    right, true, given = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    with np.errstate(invalid="ignore"):
        return 100 * right / (true + given - right)


@dataclass(frozen=True, kw_only=True)
class SceneChanges(Kept):
    """Of N images and K classes: which pixels moved, and what IoU (area) and boundary IoU (edge) follow from."""

    pixels: Tensor                  # (N)
    moved: Tensor                   # (N) of them that have another class
    counts: Tensor                  # (2, 2, N, 3, K) of the dense and the compressed model, `counts_of` each image
    taken: Tensor                   # (K, K) pixels that the dense model has right, by what the compressed one says

    @classmethod
    @torch.inference_mode()
    def between(cls, dense: Segmenter, models: Mapping[str, Segmenter], batches: Iterable[tuple[Tensor, Tensor]], *,
                labelled: bool = True, amp: bool | None = False, progress: bool = True) -> "dict[str, SceneChanges]":
        """One pass of the dense model and of those made from it over the images, each as a whole, by windows
        (`segment`). Raises InputError without images."""
        device, classes = next(dense.parameters()).device, dense.num_classes
        pixels, counts, moved = [], [], {name: [] for name in models}
        taken = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in models}
        for images, masks in tqdm(batches, desc="what changed", unit="batch", disable=not progress):
            with autocast(device, amp):
                given = [segment(each, images.to(device), batch_size=max(8, len(images))).argmax(dim=1).cpu()
                         for each in (dense, *models.values())]
            for truth, before, *others in zip(masks if labelled else torch.full_like(masks, IGNORE), *given):
                pixels.append(truth.numel())
                counts.append(counts_of((before, *others), truth, classes))
                for name, after in zip(models, others):
                    moved[name].append(int((before != after).sum()))
                    lost = (before == truth) & (after != truth)
                    taken[name] += torch.bincount(truth[lost] * classes + after[lost],
                                                  minlength=classes**2).view(classes, -1)
        require(bool(counts), "there is no image to compare the models on")
        every = torch.stack(counts, dim=2).int()                        # (1 + models, 2, N, 3, K)
        return {name: cls(pixels=torch.tensor(pixels), moved=torch.tensor(moved[name]), counts=every[[0, number]],
                          taken=taken[name]) for number, name in enumerate(models, 1)}

    @property
    def distance(self) -> Tensor:
        """(N): the share of pixels that have another class."""
        return self.moved.double() / self.pixels

    @property
    def changed(self) -> Tensor:
        """(N): whether any pixel has."""
        return self.moved > 0

    @property
    def labelled(self) -> bool:
        """Whether any pixel has a true class."""
        return bool(self.counts.any())

    def _ious(self, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In per cent of all images, dense and compressed (2, K + 1), the last their mean over classes; and of the
        difference the ends of an interval of LEVEL (K + 1), by a bootstrap over images; NaN where fewer than two have
        the class, as nothing tells how it differs between images."""
        require(self.labelled, "the images have no masks; how well classes are found can't be told")
        counts = self.counts[:, PARTS.index(part)].double().numpy()                         # (2, N, 3, K)
        counts = counts[:, counts.any(axis=(0, 2, 3))]          # of images with a pixel that counts
        count = counts.shape[1]
        drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)      # (DRAWS, N)

        def with_mean(sums: np.ndarray) -> np.ndarray:
            iou = iou_pct(sums)
            return np.concatenate([iou, np.nanmean(iou, axis=-1, keepdims=True)], axis=-1)
        before, after = (with_mean(np.tensordot(drawn, each, axes=1)) for each in counts)               # (DRAWS, K + 1)
        gained = after - before
        gained[:, np.isnan(gained).all(axis=0)] = 0             # of a class that is nowhere; it has no row
        ends = np.nanquantile(gained, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        ends[:, np.append((counts[0, :, 1] > 0).sum(axis=0), count) < 2] = np.nan
        return with_mean(counts.sum(axis=1)), *ends

    def by_class(self, called: Callable[[int], str] = str, part: str = "area") -> list[dict[str, Any]]:
        """A row for each class that is found in the images, the one that lost most first: class, images that have it,
        dense_pct, compressed_pct (IoU, or boundary IoU of part "edge"), the difference in points, and the low and high
        end of its interval of 95 %, NaN of a class that one image has. Raises InputError without masks."""
        (before, after), low, high = self._ious(part)
        images = (self.counts[0, 0, :, 1] > 0).sum(dim=0).tolist()
        rows = [{"class": called(k), "images": n, "dense_pct": before[k], "compressed_pct": after[k],
                 "difference": after[k] - before[k], "low": low[k], "high": high[k]} for k, n in enumerate(images)
                if np.isfinite(after[k] - before[k])]
        return sorted(rows, key=lambda row: row["difference"])

    def mean(self, part: str = "area") -> tuple[float, float, float, float]:
        """(dense, compressed, low, high): mean over classes of (boundary) IoU in per cent, and the interval of the
        difference."""
        (before, after), low, high = self._ious(part)
        return float(before[-1]), float(after[-1]), float(low[-1]), float(high[-1])

    def appeared(self, called: Callable[[int], str] = str) -> list[dict[str, Any]]:
        """Confusion that was not there: class, taken_for and pixels that the dense model has right and the compressed
        one takes for that, the most first."""
        order = np.argsort(-self.taken.numpy(), axis=None, kind="stable")
        pairs = [divmod(int(i), len(self.taken)) for i in order if self.taken.view(-1)[i]]
        return [{"class": called(a), "taken_for": called(b), "pixels": int(self.taken[a, b])} for a, b in pairs]
