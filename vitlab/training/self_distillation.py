"""A short training of a compressed model on the dense one's output, without labels: A8 without the cross-entropy."""
import copy
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from vitlab.data import ImageData, Shuffled
from vitlab.measure.capture import Batches, frozen_eval
from vitlab.measure.distance import output_of, outputs
from vitlab.models import set_trainable
from vitlab.runtime import logs
from vitlab.runtime.files import require
from vitlab.runtime.uncertainty import standard_error, with_error
from vitlab.training.stepping import gradient_norm

LR, BATCH_SIZE = 2e-5, 32
SKIPPED = 3                                 # steps in a row, not finite, that end the run
WARMUP, PATIENCE = 0.05, 1 / 3  # shares of the run: until lr is reached, and without a better state until it stops


class Divergence:
    """Mean distance of a model's output to the teacher's (`output_of`), always over the same images, which are kept in
    memory with the teacher's output."""

    def __init__(self, teacher: nn.Module, batches: Batches, amp: bool | None = False) -> None:
        """Raises InputError where there is no image."""
        self.amp, self.output, self.images = amp, output_of(teacher), [images for images, _ in batches]
        require(self.images, "there is no image to compare with the dense model on")
        with torch.inference_mode(), frozen_eval(teacher):
            self.expected = [outputs(teacher, images, amp) for images in self.images]

    @torch.inference_mode()
    def each(self, model: nn.Module) -> list[float]:
        """Of each image."""
        with frozen_eval(model):
            return [value for images, expected in zip(self.images, self.expected)
                    for value in self.output.apart(outputs(model, images, self.amp), expected).tolist()]

    def __call__(self, model: nn.Module) -> float:
        found = self.each(model)
        return sum(found) / len(found)

    def measured(self, model: nn.Module, name: str) -> dict[str, float]:
        """{name: the mean, name_se: its standard error over images}; of one image without the error."""
        found = self.each(model)
        return with_error(name, sum(found) / len(found), standard_error(found))


def self_distil(model: nn.Module, teacher: nn.Module, data: ImageData, apart: Divergence, *,
                minutes: float | None = None, steps: int | None = None, lr: float = LR, batch_size: int = BATCH_SIZE,
                seed: int = 0, amp: bool | None = False, workers: int | None = None, progress: bool = True,
                split: str = "train", log_to: logs.Log | None = None,
                on_better: Callable[[nn.Module, float], None] | None = None) -> list[dict[str, Any]]:
    """Train all of `model` in place on a split of data to give the teacher's output; labels are not read.

        loss = mean distance(teacher(x), model(x)) (`output_of`),  x an augmented image, the same for both

    for at most `minutes`, or `steps`, with which the result does not depend on the clock, at a rate that rises to lr
    over the first WARMUP of the run and falls to 0 as a cosine. After every epoch `apart`, whose images should not be
    among those trained on, is measured; the best state is what remains, the one given included, and on_better(model,
    distance) is called with each. It stops early after PATIENCE of the run without a better one. A step whose loss or
    gradient is not finite is left out, and a warning names its files where they are known. Returns a record an epoch
    (epoch, steps, loss, distance, seconds), which goes to log_to as well; the first is of the model as given. Raises
    InputError where SKIPPED steps in a row are not finite, the best state kept.
    """
    require((minutes is None) != (steps is None), "either minutes or steps are needed, not both")
    random_seed(seed)
    batches = data.batches(split, model, batch_size=batch_size, training=Shuffled(augment=data.mild), seed=seed,
                           workers=workers)
    set_trainable(model, "all")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.0)
    log = [{"epoch": 0, "steps": 0, "loss": None, "distance": apart(model), "seconds": 0.0}]
    best, found_at, done, skipped, began = copy.deepcopy(model.state_dict()), 0.0, 0, 0, time.monotonic()
    log_to = log_to or (lambda step, values: None)
    log_to(0, log[0])

    def share() -> float:
        """Of the run that is over."""
        return done / steps if steps else (time.monotonic() - began) / (60 * minutes)
    try:
        with frozen_eval(teacher), tqdm(desc="self-distil", unit="step", total=steps, disable=not progress) as bar:
            while share() < 1 and share() - found_at <= PATIENCE:
                model.eval()  # as it is measured: a decoder's dropout keeps a short training from its target
                losses = []
                for number, (images, _) in enumerate(batches):
                    over = share()
                    if over >= 1:
                        break
                    for group in optimizer.param_groups:
                        group["lr"] = lr * min(1, (over + 1e-3) / WARMUP) * (1 + math.cos(math.pi * over)) / 2
                    with torch.no_grad():
                        expected = outputs(teacher, images, amp)
                    loss = apart.output.apart(outputs(model, images, amp), expected).sum() / len(images)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    found = {"loss": float(loss.detach()), "gradient's norm": float(gradient_norm(model))}
                    fault = next((f"the {what} of self-distillation is {value} at step {done + 1}"
                                  for what, value in found.items() if not math.isfinite(value)), None)
                    skipped = 0 if fault is None else skipped + 1
                    if fault is None:
                        losses.append(found["loss"])
                        optimizer.step()
                    else:
                        _left_out(fault, batches.names(len(log) - 1, number), skipped, lr)
                    done += 1
                    bar.update()
                least = min(record["distance"] for record in log)
                log.append({"epoch": len(log), "steps": done, "loss": sum(losses) / max(1, len(losses)),
                            "distance": apart(model), "seconds": round(time.monotonic() - began, 2)})
                log_to(done, log[-1])
                if log[-1]["distance"] < least:
                    best, found_at = copy.deepcopy(model.state_dict()), share()
                    if on_better is not None:
                        on_better(model, log[-1]["distance"])
                bar.set_postfix(distance=f"{log[-1]['distance']:.4f}", best=f"{min(least, log[-1]['distance']):.4f}")
    finally:
        model.load_state_dict(best)
        model.eval()
    return log


def _left_out(fault: str, files: list[str], skipped: int, lr: float) -> None:
    """Warn of a step that is left out. Raises InputError where it is the last of SKIPPED in a row."""
    of = f" of {', '.join(files)}" if files else ""
    require(skipped < SKIPPED, f"{fault}{of}, and was not finite in {skipped} steps in a row; a smaller lr than {lr} "
            "may help. The best state so far is kept")
    warnings.warn(f"{fault}{of}; the step is left out", stacklevel=3)
