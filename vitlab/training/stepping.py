"""Training: a model with all that a step of its training needs, on one process or several, and the step itself."""
import contextlib
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn

from vitlab.data import ImageData, Shuffled
from vitlab.data.order import seed_of
from vitlab.measure.distance import counted
from vitlab.measure.evaluate import uses_bf16
from vitlab.models import set_trainable
from vitlab.models.checkpoint import not_finite
from vitlab.models.segmenter import Segmenter
from vitlab.models.weights import load_state
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, first_line, require
from vitlab.training.distillation import make_task
from vitlab.training.recipes import Engine, Recipe

# The moving average looks back over a tenth of the steps so far until decay's own window is shorter, as TensorFlow's
# with num_updates:
# with the whole decay from the first step on, a run of less than 1 / (1 - decay) steps would end with nearly its first
# weights.
# decay of step t = min(decay, (t - 1) / (t + 9))
AVERAGE = {"use_warmup": True, "warmup_gamma": 10.0, "warmup_power": 1.0}


def _scale_matrices(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Merge and reconstruct matrices in groups of their own, at `factor` times the learning rate: a token is a sum over
    as many patches as the image has, each of whose weights AdamW moves by the whole rate in a step."""
    matrices = {id(parameter) for name, parameter in model.named_parameters() if name.endswith("_matrix")}
    for group in list(optimizer.param_groups):
        of_rule = [parameter for parameter in group["params"] if id(parameter) in matrices]
        if of_rule:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in matrices]
            optimizer.add_param_group({**group, "params": of_rule, "lr_scale": group.get("lr_scale", 1.0) * factor})


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm () over all gradients of a model; not finite where one of them is not."""
    return nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])


class Training:
    """What is trained and by what, and how far it is: `step` steps are done, `epoch` of them complete."""

    def __init__(self, model: nn.Module, data: ImageData, recipe: Recipe, engine: Engine, teacher: nn.Module | None,
                 seed: int, device: torch.device, limit: int | None, workers: int | None) -> None:
        self.model, self.recipe, self.engine, self.seed, self.device = model, recipe, engine, seed, device
        drawn = Shuffled(augment={"hflip": 0.5, **recipe.augment}, turns=engine.accumulate, repeats=recipe.repeats)
        self.batches = data.batches("train", model, batch_size=self._batch_size(), training=drawn, limit=limit,
                                    seed=seed, workers=workers, shared=True)
        train = data.split("train")
        size = min(data.logged, len(train)) if hasattr(train, "__len__") else data.logged      # a stream has no length
        self.slice = data.batches("train", model, limit=size, seed=seed, workers=0, shared=True)
        self.steps = len(self.batches) // engine.accumulate                         # of an epoch
        if not self.steps:
            raise InputError(f"{data.name}: too few images for one step of {parallel.world()} processes with "
                             f"{engine.accumulate} batches each")
        self.dtype = recipe.dtype or ("bfloat16" if uses_bf16(device, None) else "float32")
        set_trainable(model, recipe.trainable)
        self.teacher, task = teacher, make_task(model.to(device), teacher, recipe, device)
        if engine.channels_last:
            model.to(memory_format=torch.channels_last)
        if recipe.ema_decay:
            task.setup_ema(recipe.ema_decay, **AVERAGE)
        self.optimizer = create_optimizer_v2(model, opt=recipe.optimizer, lr=recipe.scaled_lr,
                                             weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
        if recipe.matrices_lr != 1:
            _scale_matrices(self.optimizer, model, recipe.matrices_lr)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=recipe.schedule, num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs,
            min_lr=min(recipe.min_lr, recipe.scaled_lr), warmup_lr=recipe.scaled_lr / 100, step_on_epochs=False,
            updates_per_epoch=self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == "float16")
        self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing,
                           num_classes=model.num_classes or data.num_classes or 1) \
            if recipe.mixup or recipe.cutmix else None
        if engine.checkpointing:
            model.set_grad_checkpointing(True)
        if engine.compile:
            if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
                raise InputError("compiling for a CPU needs a C++ compiler, and there is none here (g++ or clang++)")
            task.compile()
        if parallel.world() > 1:
            task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)
        self.task = task
        self.epoch, self.done, self.skipped = 0, 0, 0                               # done: steps of the epoch under way
        # asked to stop is this process, at any moment; stops is what all of them agreed on last
        self.asked, self.stops = False, False
        self.fault: str | None = None                                               # why the last step was left out
        self.losses: list[float] = []                                           # of these steps, those skipped left out
        self.seconds, self.joules = 0.0, 0.0                                        # that they took

    def _batch_size(self) -> int:
        """Images a batch of one process. Raises InputError where the recipe's do not divide."""
        parts = parallel.world() * self.engine.accumulate
        if self.recipe.batch_size % parts:
            raise InputError(f"recipe {self.recipe.name}: a step of {self.recipe.batch_size} images does not divide by "
                             f"{parallel.world()} processes times {self.engine.accumulate} batches; --batch-size takes "
                             f"a multiple of {parts}")
        return self.recipe.batch_size // parts

    @property
    def step(self) -> int:
        return self.epoch * self.steps + self.done

    @property
    def average(self) -> nn.Module:
        """What is measured and given back: the model, or its moving average."""
        ema = self.task.get_trainable_module(ema=True)
        return self.model if ema is None else ema.module

    def close(self) -> None:
        """Let go of the loaders, so that their processes end: they ignore requests to stop, and a traceback may keep
        all else."""
        self.batches = self.slice = None

    def check_weights(self) -> None:
        """Raises InputError where a weight is not finite: nothing is to be kept then, and no step brings it back."""
        wrong = not_finite(self.model) or not_finite(self.average)
        require(wrong is None, f"{wrong} is not finite after {self.step} steps, so no state of them is written; a "
                f"smaller lr than {self.recipe.lr} or clip_grad may help, from the state before")

    def share_broken(self) -> list[str]:
        """The images that could not be read so far, of all processes together. Raises InputError for too many."""
        self.batches.broken = list(dict.fromkeys(path for paths in parallel.gather(self.batches.broken)
                                                 for path in paths))
        self.batches.check_broken()
        return self.batches.broken

    def state(self) -> dict[str, Any]:
        ema = {"ema": self.average.state_dict()} if self.recipe.ema_decay else {}
        return {"epoch": self.epoch, "done": self.done, "skipped": self.skipped,
                "losses": torch.tensor(self.losses, dtype=torch.float64), "seconds": self.seconds,
                "joules": self.joules,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(),
                "broken": self.batches.broken, **ema}

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Raises InputError naming the file where it is no state of this training."""
        try:
            load_state(self.model, state["model"], path)
            if self.recipe.ema_decay:
                load_state(self.average, state["ema"], path)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.done, self.skipped = int(state["epoch"]), int(state["done"]), int(state["skipped"])
            self.losses, self.seconds = state["losses"].tolist(), float(state["seconds"])
            self.joules = float(state.get("joules", 0.0))                       # the first states had neither
            self.batches.broken = [str(path) for path in state.get("broken", [])]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: damaged ({first_line(error)}); remove it to begin anew") from None

    def _forward(self, images: Tensor, targets: Tensor, pixels: Tensor | None) -> Tensor:
        """The loss of one batch. pixels: those that count in a batch of its step, the mean (`_taken`)."""
        images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        if self.engine.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            if len(images) % 2:                 # it mixes pairs; a broken image leaves one alone
                images, targets = (torch.cat([v, v[-1:]]) for v in (images, targets))
            images, targets = self.mixup(images, targets)
        with torch.autocast(self.device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
            return self.task(images, targets if pixels is None else (targets, pixels))["loss"]

    def _next(self, batches: Any) -> tuple[Tensor, Tensor]:
        try:
            return next(batches)
        except StopIteration:
            raise InputError(f"the data ended after {self.done} of the {self.steps} steps of epoch {self.epoch + 1}; "
                             "its number of images is not what it says") from None

    def _taken(self, batches: Any) -> tuple[Iterable[tuple[Tensor, Tensor]], Tensor | None]:
        """(the batches of a step, the pixels that count in one of them, the mean over those of all processes ()). Of
        class numbers None: batches have the same number of images, and need not be there at once."""
        turns = self.engine.accumulate
        taken = (self._next(batches) for _ in range(turns))
        if not isinstance(self.model, Segmenter):
            return taken, None
        taken = list(taken)
        counts = torch.stack([counted(masks) for _, masks in taken])
        return taken, parallel.total(counts.sum()) / (turns * parallel.world())

    def _agree(self, *values: float) -> list[float]:
        """The mean of each value over all processes; to be asked to stop is passed on along with them."""
        *found, asked = parallel.total(torch.tensor([*values, float(self.asked)], dtype=torch.float64)).tolist()
        self.stops = asked > 0
        return [value / parallel.world() for value in found]

    def must_stop(self) -> bool:
        """Whether one of the processes was asked to stop; all are told the same."""
        self._agree()
        return self.stops

    def take_step(self, batches: Any) -> float:
        """One step on the next `accumulate` batches; returns its loss, the mean over all processes.

        Where the loss or the norm of the gradient is not finite, `fault` says so, and nothing changes but the count of
        those skipped in a row, of which a gradient that a lower loss scale may save (float16) is none, and that scale.
        """
        self.scheduler.step_update(self.step)
        turns, found = self.engine.accumulate, 0.0
        self.optimizer.zero_grad(set_to_none=True)
        taken, pixels = self._taken(batches)
        for turn, (images, targets) in enumerate(taken):
            # loaders draw as well, or not: after them
            random_seed(seed_of(self.seed, self.step, turn), parallel.rank())
            with contextlib.nullcontext() if turn + 1 == turns else self.task.no_sync():
                loss = self._forward(images, targets, pixels) / turns
                self.scaler.scale(loss).backward()
            found += float(loss.detach())
        self.scaler.unscale_(self.optimizer)
        own = gradient_norm(self.model)
        loss, norm = self._agree(found, float(own))
        self.fault = (f"the loss is {loss}" if not math.isfinite(loss) else
                      f"the loss is {loss:.3f}, but its gradient's norm {norm}" if not math.isfinite(norm) else None)
        if self.fault is None:
            if self.recipe.clip_grad:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self.recipe.clip_grad, own)
            self.scaler.step(self.optimizer)
            self.task.update_ema(self.step + 1)
            self.losses.append(loss)
            self.skipped = 0
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.fault is not None and not (math.isfinite(loss) and scale > 1 and self.scaler.get_scale() < scale):
            self.skipped += 1
        self.done += 1
        return loss
