"""What did compression break? One pass of a dense and a compressed model over images, kept in a file, and the pictures
that changed."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from torch import Tensor

from vitlab.data import Images
from vitlab.data.images import image_config
from vitlab.measure.capture import token_places
from vitlab.measure.changes import Changes, blame
from vitlab.measure.distance import output_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.opening import Source
from vitlab.plots.base import to_image
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.runtime.uncertainty import digits_of, plus_minus, share_error, standard_error
from vitlab.workbench.steps import amp_of, open_dense, open_matching, open_model, pick_device

CHANGES = "changes.safetensors"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A dense and a compressed model, the images that they were compared on, and what changed (`Changes`)."""

    dense: Checkpoint
    compressed: Checkpoint
    images: Images                  # those that could be read, in the order of `changes`
    changes: Changes
    classes: dict[int, str]         # names that are known
    of: str                         # which images these are, in words

    def inputs(self, chosen: Sequence[int]) -> Tensor:
        """Images by number, as the models take them (B, channels, h, w)."""
        return torch.stack([self.images[i][0] for i in chosen])

    def batches(self, most: int) -> list[tuple[Tensor, Tensor]]:
        """At most so many of the images, from the first one on, with their targets, 64 at a time."""
        places = torch.arange(min(most, len(self.images))).split(64)
        return [(self.inputs(part.tolist()), self.changes.targets[part]) for part in places]

    def picture(self, i: int) -> np.ndarray:
        """An image as the models see it, (h, w, 3) in [0, 1]."""
        config = image_config(self.dense.model)
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

    def tokens(self, i: int) -> dict[int, Tensor]:
        """{block: which token each patch of the image went into} of a model that merges by content; {} of others."""
        try:
            return {block: places[0] for block, places in token_places(self.compressed.model, self.inputs([i])).items()}
        except InputError:
            return {}


def what_changed(dense: Source, compressed: Source, data: str | Path, out: str | Path, *, images: int = 1000,
                 class_map: str | Path | None = None,
                 config: Annotated[RunConfig, Parameter(parse=False)] = RunConfig()) -> Compared:
    """Compare two models on so many images of the held-out split, or, of a folder without labels, of train's share to
    report on; the predictions are in out/changes.safetensors. Raises InputError for a model that was not made from one
    of the dense one's shape, a Segmenter, a stream, or a model with other classes."""
    whole, found = open_dense(dense), open_model(compressed)
    if found.plan.shape != whole.plan.shape:
        raise InputError(f"the compressed model was made from one of another shape: {found.plan.shape}, and the dense "
                         f"one is {whole.plan.shape}")
    known = [names for each in (whole, found) if (names := each.info.get("classes"))]
    if len(known) == 2 and known[0] != known[1]:
        odd = next(pair for pair in zip(*known) if pair[0] != pair[1]) if len(known[0]) == len(known[1]) else "number"
        raise InputError(f"the two models have other classes ({odd}); one that was made from the other has its own")
    opened, device = open_matching(data, whole, class_map, labels=False), pick_device(config.device)
    split = opened.held_out if opened.has_held_out else "report"
    parts: Any = opened if opened.has_held_out else opened.parts(config.seed, report=images)
    if not isinstance(parts.split(split), Images):
        raise InputError(f"{opened.name}: a stream, whose images can't be looked at again; a folder's can")
    for each in (whole, found):
        each.model.to(device).eval()
    batches = parts.batches(split, whole.model, limit=min(images, len(parts.split(split))), seed=config.seed,
                            workers=config.workers)
    changes = Changes.between(whole.model, found.model, batches, labelled=opened.has_held_out, amp=amp_of(whole.model),
                              progress=config.progress)
    changes.save(Path(out) / CHANGES)
    seen, broken = batches.images, set(batches.broken)
    readable = Images(seen.reader, [seen.indices[i] for i in range(len(seen)) if seen.path(i) not in broken])
    readable.transform, readable.channels = seen.transform, seen.channels
    return Compared(dense=whole, compressed=found, images=readable, changes=changes,
                    classes=_names(opened, whole.info.get("classes"), readable, changes),
                    of=f"{len(readable)} images of {opened.name}, {split.replace('report', 'train, to report on')}")


def _names(opened: Any, known: list[str] | None, images: Images, changes: Changes) -> dict[int, str]:
    """Class names by number: the model's, or the data set's; where its folders are mapped to numbers, those of the
    images that are there."""
    if known or opened.classes and not opened.mapped:
        return dict(enumerate(known or opened.classes))
    return {number: Path(images.path(i)).parent.name for i, number in enumerate(changes.targets.tolist())
            if number >= 0 and opened.mapped}
