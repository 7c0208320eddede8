"""What test_parallel does in one process and in several: each part gives plain data or tensors."""
import itertools
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from segmenting_fixtures import small
from torch import nn
from training_fixtures import compressed, small_recipe, tiny

from vitlab.data import ImageData
from vitlab.data.masks import open_scenes
from vitlab.measure.capture import token_scores
from vitlab.measure.evaluate import evaluate
from vitlab.measure.features import evaluate_features
from vitlab.measure.pixels import Segmentation, evaluate_scenes
from vitlab.measure.units import head_redundancy, unit_scores
from vitlab.runtime import parallel
from vitlab.search import Study
from vitlab.search.strategies import Settings
from vitlab.training.loop import fit
from vitlab.training.recipes import Engine

LIVELY = {"epochs": 2, "batch_size": 16, "warmup_epochs": 1, "clip_grad": 1.0, "smoothing": 0.1, "layer_decay": 0.9,
          "ema_decay": 0.5, "repeats": 2,
          "augment": {"scale": (0.7, 1.0), "color_jitter": 0.3, "hflip": 0.5, "re_prob": 0.5}}

# A scene may be smaller than its crop, and what is missing is ignored: processes have different numbers of pixels.
SCENES = {"epochs": 1, "batch_size": 4, "clip_grad": 1.0, "layer_decay": 0.9, "ema_decay": 0.5,
          "augment": {"scale": (0.5, 1.5)}}


def spoilt(model: nn.Module, step: int = 1) -> nn.Module:
    """In that step of its training, from 0, the last process's gradient is 0 / 0 of a finite loss."""
    count = itertools.count()

    def hook(module, given, out):
        spoil = module.training and next(count) == step and parallel.rank() + 1 == parallel.world()
        return out + (out - out).abs().sqrt() if spoil else out
    model.register_forward_hook(hook)
    return model


def trainings() -> dict[str, tuple]:
    """(model, teacher, settings, engine) of each training, by name."""
    pruned = compressed()[0]
    return {"dense": (tiny(), None, LIVELY, Engine()),
            "distilled": (pruned, tiny(), LIVELY | {"distill": "soft", "alpha": 0.5, "tau": 4.0}, Engine()),
            "features": (compressed(0)[0], tiny(0), LIVELY | {"distill": "soft"}, Engine()),
            "scenes": (small(num_classes=11, img_size=(32, 32), drop=0.0), None, SCENES, Engine()),
            "left out": (spoilt(tiny()), None, LIVELY | {"ema_decay": None}, Engine()),
            "accumulated": (tiny(), None, LIVELY, Engine(accumulate=2)),
            "checkpointed": (tiny(), None, LIVELY, Engine(checkpointing=True, channels_last=True))}


def train(data: ImageData, folder: Path, only: str | None = None) -> dict[str, torch.Tensor]:
    found = {}
    for name, (model, teacher, settings, engine) in trainings().items():
        if only in (None, name):
            source = open_scenes("digit_scenes") if settings is SCENES else data
            log = fit(model, source, small_recipe(**settings), folder / name, teacher=teacher, engine=engine, seed=3,
                      workers=0, limit=8 if settings is SCENES else None, progress=False)
            found[f"{name} losses"] = torch.tensor([r["loss"] for r in log], dtype=torch.float64)
            found |= {f"{name} {k}": v for k, v in model.state_dict().items()}
    return found


def measure(data: ImageData) -> dict[str, torch.Tensor]:
    """Scores and exact counts on 21 images: batches of 5 do not divide evenly among two processes, nor does the last
    among five."""
    model, found = tiny(), {}

    def batches():
        return data.batches("held_out", model, batch_size=5, workers=0, shared=True)
    for criterion in ("gradient", "class_attention", "hsic"):
        found[f"tokens {criterion}"] = token_scores(model, batches(), criterion=criterion, progress=False)
    plain, torch.multinomial = torch.multinomial, lambda weights, *_, **settings: weights.argmax(dim=1, keepdim=True)
    # draws are each process's own: the likeliest
    for criterion in ("hsic", "activation", "taylor", "reconstruction", "fisher"):
        scores = unit_scores(model, batches(), criterion=criterion, progress=False)
        found |= {f"heads {criterion}": scores.heads, f"neurons {criterion}": scores.neurons,
                  f"images {criterion}": torch.tensor(int(scores.made_by["images"]))}
    torch.multinomial = plain
    found["redundancy"] = head_redundancy(model, batches(), progress=False)
    accuracy = evaluate(model, batches(), progress=False)
    found["accuracy"] = torch.tensor([accuracy.top1_pct, accuracy.images, accuracy.broken, accuracy.loss],
                                     dtype=torch.float64)
    dense, other = tiny(0), tiny(0, seed=1)
    found["tokens features"] = token_scores(dense, batches(), progress=False)
    scores = unit_scores(dense, batches(), criterion="taylor", progress=False)
    found |= {"heads features": scores.heads, "neurons features": scores.neurons}
    likeness = evaluate_features(other, batches(), dense=dense, progress=False)
    found["likeness"] = torch.tensor([likeness.images, likeness.agree_pct, likeness.distill_loss,
                                      likeness.distill_loss_se], dtype=torch.float64)
    # one batch: a process has none
    few = data.batches("held_out", model, batch_size=64, workers=0, shared=True)
    found["one batch"] = torch.tensor(evaluate(model, few, progress=False).images)
    return found


def measure_scenes() -> dict[str, torch.Tensor]:
    """Scores and exact counts of a Segmenter on 7 scenes: one process has 4 of them, the other 3."""
    model, data, found = small(num_classes=11, img_size=(64, 96)), open_scenes("digit_scenes"), {}

    def batches(**settings):
        return data.batches("val", model, limit=7, workers=0, shared=True, **settings)

    def numbers(measured: Segmentation) -> torch.Tensor:
        scores = measured.scores
        return torch.tensor([scores.miou_pct, *scores.iou_pct, scores.pixel_accuracy_pct, scores.pixels,
                             measured.images, measured.loss],
                            dtype=torch.float64).nan_to_num(-1)                 # of an absent class
    found["scenes"] = numbers(evaluate_scenes(model, batches(batch_size=1, whole=True), flip=True, progress=False))
    # one batch: a process has none
    found["one scene"] = numbers(evaluate_scenes(model, batches(batch_size=7), progress=False))
    found["tokens scenes"] = token_scores(model, batches(batch_size=1), progress=False)
    found["heads scenes"] = unit_scores(model, batches(batch_size=1), criterion="taylor", progress=False).heads
    return found


def objective(policy: np.ndarray) -> dict[str, float]:
    value = -float(((policy - 0.2)**2).sum())
    return {"value": value, "top1_pct": 50 + value}


def search(folder: Path) -> None:
    from test_study import SPACE, budget
    for initial in ("varied", "sensitivity"):
        options = Settings(population=5, evaluations=9, candidates=12, refinements=1, batch=2, initial=initial)
        study = parallel.after_first(lambda options=options,
                                     initial=initial: Study(folder / initial, SPACE, budget(), options=options))
        study.run(objective, progress=False)
        assert len(study.evaluations) == 9, f"process {parallel.rank()} knows {len(study.evaluations)}"


def main(folder: Path, data: ImageData) -> None:
    found = train(data, folder) | measure(data) | measure_scenes()
    search(folder)
    same = parallel.gather([float(v.double().sum()) for v in found.values()])
    assert same[0] == same[-1], "the processes ended with different weights or scores"
    if parallel.is_first():
        save_file({k: v.contiguous() for k, v in found.items()}, folder / "found.safetensors")

