"""A dense model and one made from it, beside each other on the same images, and what is shown of that: the pictures
that changed, what both models say and look at, and classes before and after."""
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import default_collate

from vitlab.data.images import image_config
from vitlab.data.layouts import IGNORE
from vitlab.data.scene_data import measuring_transform
from vitlab.measure.changes import blame
from vitlab.measure.distance import output_of
from vitlab.measure.rollout import looked_at
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.deploy import is_deployed
from vitlab.models.support import encoder_of
from vitlab.models.windows import segment
from vitlab.plots import (
    changed_pictures,
    class_changes,
    difference,
    overlaid,
    predictions,
    reliability,
    token_sheet,
    token_strip,
)
from vitlab.plots.base import as_array, to_image
from vitlab.plots.colours import class_colours
from vitlab.plots.scenes import OPACITY, in_grey
from vitlab.plots.units import over_grey
from vitlab.runtime.files import InputError, require
from vitlab.runtime.uncertainty import digits_of, plus_minus, share_error, standard_error
from vitlab.workbench.explore.maps import Tokens, tokens_of

KEPT = 8                        # whole scenes whose predictions are kept


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """A dense and a compressed model, the images that they were compared on, and what changed (`Changes`)."""

    dense: Checkpoint
    compressed: Checkpoint
    images: Any                     # Images, or Scenes: those that could be read, in the order of `changes`
    changes: Any                    # Changes, or SceneChanges
    classes: dict[int, str]         # names that are known
    of: str                         # which images these are, in words

    at_once = 64
    moved_by = blamed_of = "distance"           # what `changes.distance` and `blamed` are of

    def inputs(self, chosen: Sequence[int]) -> Tensor:
        """Images by number, as the models take them (B, channels, h, w)."""
        return torch.stack([self.images[i][0] for i in chosen])

    def batches(self, most: int) -> list[tuple[Tensor, Tensor]]:
        """At most so many of the images, from the first one on, with their targets, `at_once` at a time."""
        places = torch.arange(min(most, len(self.images))).split(self.at_once)
        return [tuple(default_collate([self.images[i] for i in part.tolist()])) for part in places]

    def picture(self, i: int) -> np.ndarray:
        """An image as the models see it, (h, w, 3) in [0, 1]."""
        config = image_config(encoder_of(self.dense.model))
        shown = to_image(self.inputs([i])[0], config["mean"], config["std"])
        return np.broadcast_to(shown, (*shown.shape[:2], 3))

    def called(self, number: int) -> str:
        """A class by its number; without a classifier an image's file."""
        if not output_of(self.dense.model).labelled:
            return Path(self.images.path(number)).name
        return self.classes.get(number, f"class {number}")

    @property
    def scored(self) -> str:
        """What stands beside a prediction."""
        return "probability" if output_of(self.dense.model).labelled else "cosine"

    def told(self, i: int) -> dict[str, list[tuple[str, float]]]:
        """{model: (class, probability), the likeliest first} of an image."""
        return {name: [(self.called(number), p) for number, p in zip(numbers[i].tolist(), ps[i].tolist())]
                for name, numbers, ps in (("dense", self.changes.dense, self.changes.dense_p),
                                          ("compressed", self.changes.compressed, self.changes.compressed_p))}

    def title(self, i: int) -> str:
        """What is known of an image: its class, or its file."""
        target = int(self.changes.targets[i])
        return self.called(target) if target >= 0 else Path(self.images.path(i)).name

    def summary(self) -> str:
        """How many images changed, and by how much the outputs moved, in one line."""
        changes, output = self.changes, output_of(self.dense.model)
        distance, count, n = changes.distance.tolist(), int(changes.changed.sum()), len(changes.distance)
        what = "another class" if output.labelled else "another nearest image"
        error = standard_error(distance)
        text = (f"{count} of {n} images have {what} ({plus_minus(100 * count / n, share_error(count, n), 1)} %); "
                f"{output.distance} {plus_minus(sum(distance) / n, error, digits_of(error, 4))}")
        if (changes.targets < 0).any():
            return text
        dense, compressed = changes.right()
        gained = 100 * (compressed.astype(float) - dense)
        return (f"{text}; top-1 {100 * dense.mean():.1f} to {100 * compressed.mean():.1f} %: "
                f"{(dense & ~compressed).sum()} lost, {(compressed & ~dense).sum()} gained, a difference of "
                f"{plus_minus(gained.mean(), standard_error(gained), 2)} points")

    def blamed(self, chosen: Sequence[int]) -> Tensor:
        """(L, B): by how much each image's output would be nearer, were one block undone (`blame`)."""
        return blame(self.dense.model, self.compressed.model, self.compressed.plan, self.inputs(chosen))

    def tokens(self, i: int) -> list[Tokens]:
        """The tokens in each block of an image; [] of a deployed model, whose blocks have lost their places."""
        if is_deployed(self.compressed.model):
            return []
        return tokens_of(self.compressed.plan, lambda: self.compressed.model, lambda: self.inputs([i]))

    def strip(self, i: int) -> Figure:
        """An image's tokens in every block. Raises InputError for a deployed model."""
        require(bool(seen := self.tokens(i)), "the model is deployed; the training form (the run folder, not "
                                              "deployed/) has the tokens of each block")
        return token_strip(self.picture(i), [(each.regions, each.aside) for each in seen], self.dense.plan.shape)

    def token_sheet(self, chosen: Sequence[int], block: int = -1) -> Figure:
        """Images beside their tokens in one block, the last. Raises InputError for a deployed model."""
        seen = [self.tokens(i) for i in chosen]
        require(all(seen), "the model is deployed; the training form (the run folder, not deployed/) has the tokens of "
                           "each block")
        return token_sheet([(self.title(i), self.picture(i), each[block].regions, each[block].aside)
                            for i, each in zip(chosen, seen)], self.dense.plan.shape)

    def beside(self, i: int) -> dict[str, np.ndarray]:
        """{title: picture (h, w, 3)} to be shown with an image: what each model takes from it, by attention rollout
        (none of a deployed model); without a classifier the nearest image of each, too."""
        picture, found = self.picture(i), {}
        with contextlib.suppress(InputError):                                   # both, or none
            values = {name: looked_at(each.model, self.inputs([i]))[0]
                      for name, each in (("dense", self.dense), ("compressed", self.compressed))}
            found = {f"{name}: rollout": over_grey(picture, each, self.dense.plan.shape)
                     for name, each in values.items()}
        if not output_of(self.dense.model).labelled:
            for name, numbers in (("dense", self.changes.dense), ("compressed", self.changes.compressed)):
                found[f"{name}: nearest"] = self.picture(int(numbers[i, 0]))
        return found

    def sheet(self, chosen: Sequence[int], blames: Any = None) -> Figure:
        """The images in rows, with what is known of each (`changed_pictures`); blames (L, B), of a deployed model
        zeros."""
        shown = [{block: each.regions for block, each in enumerate(self.tokens(i))
                  if each.aside.any() or len(set(each.regions.tolist())) < len(each.regions)} for i in chosen]
        return changed_pictures([self.picture(i) for i in chosen], [self.told(i) for i in chosen],
                                self.blamed(chosen) if blames is None else blames, [self.title(i) for i in chosen],
                                shown if any(shown) else (), self.dense.plan.shape, self.scored,
                                [self.beside(i) for i in chosen])

    def of_classes(self) -> dict[str, Figure]:
        """{name: figure} of what became of classes; {} without labels."""
        if not self.changes.labelled:
            return {}
        return {"classes": class_changes(self.changes.by_class(self.called)),
                "reliability": reliability(self.changes.reliability(), self.changes.calibration_error())}


class ComparedScenes(Compared):
    """As of images, with a class for each pixel: `inputs` and what follows of them are the middle of a scene, the
    predictions those of the whole."""

    scored, at_once = "share of pixels", 8
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

    def of_classes(self) -> dict[str, Figure]:
        if not self.changes.labelled:
            return {}
        return {name: class_changes(self.changes.by_class(self.called, part), what=what, bars="an interval of 95 %")
                for name, part, what in (("classes", "area", "IoU"), ("edges", "edge", "boundary IoU"))}

    def summary(self) -> str:
        """The share of pixels that changed, and mean (boundary) IoU before and after, in one line."""
        share = 100 * as_array(self.changes.distance)
        error = standard_error(share)
        text = f"{plus_minus(share.mean(), error, digits_of(error, 1))} % of pixels have another class"
        for part, name in (("area", "mIoU"), ("edge", "boundary mIoU")) if self.changes.labelled else ():
            before, after, low, high = self.changes.mean(part)
            ends = " to ".join(plus_minus(end, None, 2) for end in (low, high))
            text += f"; {name} {before:.1f} to {after:.1f} %, a difference of {ends} points"
        return text
