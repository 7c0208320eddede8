"""A dense model and one made from it, beside each other on the same images, and what is shown of that: the pictures
that changed, what both models say and look at, and classes before and after."""
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import default_collate

from vitlab.data.images import image_config
from vitlab.measure.changes import blame
from vitlab.measure.corruptions import robustness
from vitlab.measure.distance import output_of
from vitlab.measure.rollout import looked_at
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.deploy import is_deployed
from vitlab.models.support import encoder_of
from vitlab.plan.cost import gmacs
from vitlab.plots import changed_pictures, class_changes, reliability, token_sheet, token_strip
from vitlab.plots.base import to_image
from vitlab.plots.units import over_grey
from vitlab.runtime.files import InputError, require
from vitlab.runtime.uncertainty import digits_of, plus_minus, share_error, standard_error
from vitlab.workbench.explore.maps import Tokens, tokens_of

DIFFERENCE = "difference (points)"


def moved_classes(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """How many classes lost and gained, of `by_class`."""
    return {f"classes {word}": str(sum(sign * row["difference"] > 0 for row in rows))
            for word, sign in (("lost", -1), ("gained", 1))}


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """A dense and a compressed model, the images that they were compared on, and what changed (`Changes`)."""

    dense: Checkpoint
    compressed: Checkpoint
    images: Any                     # Images, or Scenes: those that could be read, in the order of `changes`
    changes: Any                    # Changes, or SceneChanges
    classes: dict[int, str]         # names that are known
    of: str                         # which images these are, in words

    at_once, told_slowly = 64, False            # whether what a model says of an image takes a forward
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

    def rows(self) -> tuple[dict[str, str], dict[str, str]]:
        """What the dense and the compressed model are worth on the images, in words: their lines of `overview`."""
        changes, n = self.changes, len(self.changes.distance)
        distance, count, error = changes.distance.tolist(), int(changes.changed.sum()), share_error
        dense, own = ({"GMACs": f"{gmacs(each.plan):.3g}"} for each in (self.dense, self.compressed))
        if changes.labelled:
            for row, right, points in zip((dense, own), changes.right(), changes.calibration_error().values()):
                row.update({"top-1 (%)": plus_minus(100 * right.mean(), error(right.sum(), n), 1),
                            "ECE (points)": f"{points:.1f}"})
            before, after = (100 * right.astype(float) for right in changes.right())
            own |= {DIFFERENCE: plus_minus((after - before).mean(), standard_error(after - before), 2),
                    "images lost": str((after < before).sum()), "images gained": str((after > before).sum()),
                    **moved_classes(changes.by_class())}
        digits = digits_of(standard_error(distance), 4)
        return dense, own | {f"{self.another} (%)": plus_minus(100 * count / n, error(count, n), 1),
                             "distance": plus_minus(sum(distance) / n, standard_error(distance), digits)}

    @property
    def another(self) -> str:
        """What an image that changed has."""
        return "another class" if output_of(self.dense.model).labelled else "another nearest image"

    def summary(self) -> str:
        """How many images changed, and by how much the outputs moved, in one line."""
        changes, (dense, own) = self.changes, self.rows()
        text = (f"{int(changes.changed.sum())} of {len(changes.distance)} images have {self.another} "
                f"({own[f'{self.another} (%)']} %); {output_of(self.dense.model).distance} {own['distance']}")
        if not changes.labelled:
            return text
        before, after = (row["top-1 (%)"].split(" ")[0] for row in (dense, own))
        return (f"{text}; top-1 {before} to {after} %: {own['images lost']} lost, {own['images gained']} gained, a "
                f"difference of {own[DIFFERENCE]} points")

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

    @staticmethod
    def of_classes(found: "Mapping[str, Compared]") -> dict[str, Figure]:
        """{name: figure} of what became of classes in each of several; {} without labels."""
        first, *_ = found.values()
        if not first.changes.labelled:
            return {}
        bins, errors = ({"dense": getattr(first.changes, name)()["dense"],
                         **{model: getattr(each.changes, name)()["compressed"] for model, each in found.items()}}
                        for name in ("reliability", "calibration_error"))
        return {"classes": class_changes({name: each.changes.by_class(each.called) for name, each in found.items()}),
                "reliability": reliability(bins, errors)}

    @staticmethod
    def robustness(found: "Mapping[str, Compared]", most: int) -> list[dict[str, Any]]:
        """`measure.corruptions.robustness` of the dense model and of each made from it, on at most so many images."""
        first, *_ = found.values()
        config = image_config(encoder_of(first.dense.model))
        models = {"dense": first.dense.model} | {name: each.compressed.model for name, each in found.items()}
        return robustness(models, first.batches(most), config["mean"], config["std"], labelled=first.changes.labelled)
