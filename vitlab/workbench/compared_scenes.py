"""A dense Segmenter and one made from it, beside each other on the same scenes."""
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from vitlab.data.layouts import IGNORE
from vitlab.data.scene_data import measuring_transform
from vitlab.models.windows import segment
from vitlab.plan.cost import gmacs
from vitlab.plots import class_changes, difference, overlaid, predictions
from vitlab.plots.base import as_array
from vitlab.plots.colours import class_colours
from vitlab.plots.scenes import OPACITY, in_grey
from vitlab.runtime.uncertainty import digits_of, plus_minus, standard_error
from vitlab.workbench.compared import DIFFERENCE, Compared, moved_classes

KEPT = 8                        # whole scenes whose predictions are kept
IOUS = (("area", "mIoU"), ("edge", "boundary mIoU"))


class ComparedScenes(Compared):
    """As of images, with a class for each pixel: `inputs` and what follows of them are the middle of a scene, the
    predictions those of the whole."""

    scored, at_once, told_slowly = "share of pixels", 8, True
    moved_by, blamed_of = "share of pixels of another class", "KL of the middle's patches"

    @functools.cached_property
    def _masks(self) -> Callable[[int], tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """`masks`, of the last few scenes kept: a whole one is some MB."""
        return functools.lru_cache(maxsize=KEPT)(self._predicted)

    def called(self, number: int) -> str:
        return self.classes.get(number, f"class {number}")

    def title(self, i: int) -> str:
        return Path(self.images.path(i)).name

    def masks(self, i: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """(image (H, W, 3) in [0, 1], its truth (H, W), {model: classes (H, W)}) of a whole scene."""
        image, truth, found = self._masks(i)
        return image / 255, truth, found

    def _predicted(self, i: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        image, truth = self.images.scene(i)
        if not self.changes.labelled:
            truth = np.full_like(truth, IGNORE)
        x, _ = measuring_transform(self.dense.model, whole=True)(image, truth)
        with torch.inference_mode():
            x = x[None].to(next(self.dense.model.parameters()).device)
            found = {name: segment(each.model, x)[0].argmax(dim=0).cpu().numpy().astype(np.int16)
                     for name, each in (("dense", self.dense), ("compressed", self.compressed))}
        return np.asarray(image), truth, found

    def told(self, i: int) -> dict[str, list[tuple[str, float]]]:
        """{model: (class, its share of the pixels), the largest first} of a scene."""
        found = {}
        for name, mask in self.masks(i)[2].items():
            counts = np.bincount(mask.ravel())
            found[name] = [(self.called(int(k)), counts[k] / mask.size) for k in np.argsort(-counts) if counts[k]]
        return found

    def beside(self, i: int) -> dict[str, np.ndarray]:
        """{title: picture} of both predictions, and of what was lost and gained where there is a truth."""
        image, truth, found = self.masks(i)
        colours = class_colours(self.dense.model.num_classes)
        shown = {name: overlaid(in_grey(image), mask, colours, OPACITY) for name, mask in found.items()}
        if self.changes.labelled:
            moved = difference(truth, found["dense"], found["compressed"], len(colours))
            shown["lost: orange, gained: blue"] = moved
        return shown

    def scenes(self, chosen: Sequence[int]) -> Figure:
        """The scenes in rows: image, truth, both predictions, and what was lost and gained (`plots.predictions`)."""
        images, truths, found = zip(*(self.masks(i) for i in chosen))
        names = [self.called(k) for k in range(self.dense.model.num_classes)]
        return predictions(images, truths, {name: [each[name] for each in found] for name in found[0]}, names)

    @staticmethod
    def of_classes(found: Mapping[str, Compared]) -> dict[str, Figure]:
        if not next(iter(found.values())).changes.labelled:
            return {}
        return {figure: class_changes({name: each.changes.by_class(each.called, part) for name, each in found.items()},
                                      what=what, bars="an interval of 95 %")
                for figure, part, what in (("classes", "area", "IoU"), ("edges", "edge", "boundary IoU"))}

    another = "pixels of another class"

    def rows(self) -> tuple[dict[str, str], dict[str, str]]:
        share = 100 * as_array(self.changes.distance)
        dense, own = ({"GMACs": f"{gmacs(each.plan):.3g}"} for each in (self.dense, self.compressed))
        for part, name in IOUS if self.changes.labelled else ():
            before, after, low, high = self.changes.mean(part)
            dense[name], own[name] = f"{before:.1f}", f"{after:.1f}"
            own[f"{name}, {DIFFERENCE}"] = " to ".join(plus_minus(end, None, 2) for end in (low, high))
        own |= moved_classes(self.changes.by_class()) if self.changes.labelled else {}
        digits = digits_of(standard_error(share), 1)
        return dense, own | {f"{self.another} (%)": plus_minus(share.mean(), standard_error(share), digits)}

    def summary(self) -> str:
        """The share of pixels that changed, and mean (boundary) IoU before and after, in one line."""
        dense, own = self.rows()
        parts = [f"{name} {dense[name]} to {own[name]} %, a difference of {own[f'{name}, {DIFFERENCE}']} points"
                 for _, name in IOUS if name in dense]
        return "; ".join([f"{own[f'{self.another} (%)']} % of pixels have another class", *parts])
