"""What compression changed, image by image: the predictions of a dense model and of those made from it, kept in a file
each, and what follows from them; which block is to blame."""
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.measure.averaging import hooks
from vitlab.measure.distance import output_of, outputs, pooled
from vitlab.models import attention_block, compress
from vitlab.models.deploy import is_deployed
from vitlab.models.ends import class_token
from vitlab.models.held import Held
from vitlab.models.merge import TokenBlock
from vitlab.models.weights import read_file
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, ReadOut
from vitlab.runtime.files import InputError, atomic_write, require
from vitlab.runtime.uncertainty import standard_error

TOP = 5                         # predictions of each image that are kept
BINS = 15                       # of confidence, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017


class Kept:
    """What one pass found, a tensor in each field, that is kept in a file; `changed` and `distance` are of images."""

    changed: Tensor
    distance: Tensor
    fault = "changed"               # what `wrong` tells

    def save(self, path: str | Path, **about: str) -> None:
        """about: what is noted beside the tensors (`noted`)."""
        atomic_write(path, to_bytes({name: value.contiguous() for name, value in vars(self).items()}, about or None))

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """Raises InputError for a file of something else."""
        found, names = read_file(path), {field.name for field in dataclasses.fields(cls)}
        require(found.keys() == names, f"{path}: holds {sorted(found)}; predictions are {sorted(names)}")
        return cls(**found)

    def order(self) -> list[int]:
        """The images that changed, the one that moved furthest first."""
        return [i for i in self.distance.argsort(descending=True, stable=True).tolist() if self.changed[i]]

    def wrong(self) -> tuple[np.ndarray, np.ndarray]:
        """(N) each: whether the dense and the compressed model are wrong; where nothing tells that, none, and those
        that changed."""
        return np.zeros(len(self.distance), dtype=bool), self.changed.numpy()


def noted(path: str | Path) -> dict[str, str]:
    """What was noted as predictions were saved; nothing where there is no such file, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


@dataclass(frozen=True, kw_only=True)
class Changes(Kept):
    """Of N images: targets (N), -1 where there are none; distance (N) between the two outputs (`output_of`); the
    classes that the dense and the compressed model find likeliest (N, T), best first, and their probabilities. Of
    models without a classifier there are the numbers of the images nearest to each instead, and the cosines."""

    targets: Tensor
    distance: Tensor
    dense: Tensor
    dense_p: Tensor
    compressed: Tensor
    compressed_p: Tensor

    @classmethod
    @torch.inference_mode()
    def between(cls, dense: nn.Module, models: Mapping[str, nn.Module], batches: Iterable[tuple[Tensor, Tensor]], *,
                labelled: bool = True, amp: bool | None = False, progress: bool = True) -> "dict[str, Changes]":
        """One pass of the dense model and of those made from it, none of which gives pixels, over the images. Raises
        InputError without images."""
        output, targets, given = output_of(dense), [], {name: [] for name in ("", *models)}
        for images, classes in tqdm(batches, desc="what changed", unit="batch", disable=not progress):
            for name, each in {"": dense, **models}.items():
                given[name].append(outputs(each, images, amp).cpu())
            targets.append(classes.cpu() if labelled and output.labelled else torch.full((len(images),), -1))
        require(bool(targets), "there is no image to compare the models on")
        count = sum(map(len, targets))
        require(output.labelled or count > 1, "nearest neighbours of 1 image; at least 2 are needed")

        def told(raw: Tensor) -> tuple[Tensor, Tensor]:
            scores = raw.exp() if output.labelled else pooled(raw) @ pooled(raw).T
            if not output.labelled:
                scores.fill_diagonal_(-1)
            return scores.topk(min(TOP, scores.shape[1] - (not output.labelled)), dim=1)
        raw = {name: torch.cat(each) for name, each in given.items()}
        (dense_p, top), found = told(raw[""]), {}
        for name in models:
            own_p, own = told(raw[name])
            found[name] = cls(targets=torch.cat(targets), distance=output.apart(raw[name], raw[""]), dense=top,
                              dense_p=dense_p, compressed=own, compressed_p=own_p)
        return found

    @property
    def changed(self) -> Tensor:
        """(N): whether the likeliest class, or the nearest image, is another."""
        return self.dense[:, 0] != self.compressed[:, 0]

    @property
    def labelled(self) -> bool:
        """Whether every image has a true class."""
        return bool((self.targets >= 0).all())

    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """(N) each: whether the dense and the compressed model say the target. Raises InputError without targets."""
        require(self.labelled, "the images have no labels; what is right can't be told")
        dense, compressed = ((each[:, 0] == self.targets).numpy() for each in (self.dense, self.compressed))
        return dense, compressed

    @property
    def fault(self) -> str:
        return "wrong" if self.labelled else "changed"

    def wrong(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(~right for right in self.right()) if self.labelled else super().wrong()

    def by_class(self, called: Callable[[int], str] = str) -> list[dict[str, Any]]:
        """A row for each class with images, the one that lost most first: class, images, dense_pct, compressed_pct, and
        difference in points with its standard error over images (of the same images; None of one)."""
        dense, compressed = self.right()
        rows = []
        for number in sorted(set(self.targets.tolist())):
            of = (self.targets == number).numpy()
            gained = 100 * (compressed[of].astype(float) - dense[of])
            rows.append({"class": called(number), "images": int(of.sum()),
                         "dense_pct": 100 * dense[of].mean(), "compressed_pct": 100 * compressed[of].mean(),
                         "difference": gained.mean(), "difference_se": standard_error(gained)})
        return sorted(rows, key=lambda row: row["difference"])

    def appeared(self, called: Callable[[int], str] = str) -> list[dict[str, Any]]:
        """Confusion that was not there: class, taken_for and images that the dense model has right and the compressed
        one takes for that, the most frequent first."""
        dense, compressed = self.right()
        pairs = Counter((int(self.targets[i]), int(self.compressed[i, 0])) for i in np.flatnonzero(dense & ~compressed))
        return [{"class": called(a), "taken_for": called(b), "images": count} for (a, b), count in pairs.most_common()]

    def reliability(self) -> dict[str, list[tuple[float, float, int]]]:
        """Of each model (mean confidence, share that is right, images) of each of BINS bins of confidence that has
        images."""
        found = {}
        for name, p, right in zip(("dense", "compressed"), (self.dense_p, self.compressed_p), self.right()):
            sure = p[:, 0].double().numpy()
            bins = np.minimum((sure * BINS).astype(int), BINS - 1)
            found[name] = [(float(sure[bins == b].mean()), float(right[bins == b].mean()), int((bins == b).sum()))
                           for b in range(BINS) if (bins == b).any()]
        return found

    def calibration_error(self) -> dict[str, float]:
        """Of each model sum_b n_b / N |share right - mean confidence| over the bins, in points (ECE)."""
        return {name: 100 * sum(n * abs(right - sure) for sure, right, n in bins) / len(self.targets)
                for name, bins in self.reliability().items()}


def _whole(cut: BlockPlan) -> BlockPlan:
    """The block with nothing cut: matching goes on with none merged, and reading out is exact."""
    rule = cut.tokens
    if isinstance(rule, Match):
        return BlockPlan(tokens=dataclasses.replace(rule, merged=0))
    return BlockPlan(tokens=rule if isinstance(rule, ReadOut) else None)


def undone(dense: nn.Module, model: nn.Module, plan: CompressionPlan, block: int) -> nn.Module:
    """The compressed model with one block as it is in the dense one, weights too: what the plan does in it is undone,
    and all other blocks stay. Raises InputError for a model whose matrices are folded."""
    if is_deployed(model):
        raise InputError("the model is deployed, its matrices folded into its blocks; the training form (the run "
                         "folder, not deployed/) says which block is to blame")
    left = [_whole(each) if index == block else each for index, each in enumerate(plan.blocks)]
    found = compress(dense, dataclasses.replace(plan, blocks=tuple(left))).eval()
    kept = {name: value for name, value in model.state_dict().items()
            if not name.startswith(("blocks.", "encoder.blocks."))}
    found.load_state_dict(kept, strict=False)
    for index, (own, other) in enumerate(zip(found.blocks, model.blocks)):
        if index != block:
            attention_block(own).load_state_dict(attention_block(other).state_dict())
            if isinstance(own, TokenBlock) and own.tokens is not None and other.tokens is not None:
                own.tokens.load_state_dict(other.tokens.state_dict())
    return found


@torch.inference_mode()
def blame(dense: nn.Module, model: nn.Module, plan: CompressionPlan, images: Tensor) -> Tensor:
    """(L, B): by how much the output of each image would be nearer to the dense model's, were one block undone; of
    blocks in which nothing is cut 0. Raises InputError as `undone` does."""
    output, expected = output_of(dense), outputs(dense, images)
    whole, found = output.apart(outputs(model, images), expected), []
    for index, cut in enumerate(plan.blocks):
        found.append(torch.zeros_like(whole) if cut == _whole(cut) else
                     whole - output.apart(outputs(undone(dense, model, plan, index), images), expected))
    return torch.stack(found).cpu()


@torch.inference_mode()
def similarity(dense: nn.Module, models: Mapping[str, nn.Module],
               batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """How alike the dense model's stream and each other's are after each block, of the class token, or, where there is
    none, of the mean over tokens: "cosine", the mean over images, and "CKA", |Y^T X|^2 / (|X^T X| |Y^T Y|) of the
    centred features X and Y (N, D) in Frobenius norms (Kornblith et al., ICML 2019), which asks for the same relations
    among images alone. {measure: {model: of each block}}."""
    def features(of: nn.Module, images: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []

        def keep(block: nn.Module, inputs: Any, given: Tensor | Held) -> None:
            x = given.whole() if isinstance(given, Held) else given
            seen.append(x[:, 0] if class_token(of) else x.flatten(1, -2).mean(dim=1))
        with hooks([block.register_forward_hook(keep) for block in of.blocks[:len(dense.blocks)]]):
            outputs(of, images)
        return [x.double().cpu() for x in seen]
    seen = [[features(of, images) for of in (dense, *models.values())] for images, _ in batches]
    found: dict[str, dict[str, list[float]]] = {"cosine": {name: [] for name in models},
                                                "CKA": {name: [] for name in models}}
    for index in range(len(dense.blocks)):
        x, *others = (torch.cat([each[side][index] for each in seen]) for side in range(1 + len(models)))
        centred = x - x.mean(dim=0)
        for name, y in zip(models, others):
            found["cosine"][name].append(float(torch.cosine_similarity(x, y).mean()))
            y = y - y.mean(dim=0)
            found["CKA"][name].append(float((y.T @ centred).square().sum()
                                            / ((centred.T @ centred).norm() * (y.T @ y).norm())))
    return found
