"""fit: the one training loop, for pretraining and fine-tuning, on one process or several, that goes on where it was stopped.

Every random number follows from the seed and the step (vitlab.data.order), and the state on the disk says which step is next.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad, random_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from vitlab import parallel, signals
from vitlab.data import ImageData
from vitlab.data.order import seed_of
from vitlab.files import InputError, append_line, locked, read_lines, write_lines
from vitlab.models import set_trainable
from vitlab.models.create import first_line, load_state
from vitlab.training import states
from vitlab.training.distillation import make_task
from vitlab.training.evaluate import evaluate, uses_bf16
from vitlab.training.recipes import Engine, Recipe

LOG = "log.jsonl"
SLICE = 500                 # images of train that the log's train_slice_top1_pct is measured on; the held-out split is for reports


def fingerprint(content: Any, models: list[nn.Module]) -> str:
    """16 hexadecimal digits of what a run depends on: JSON-able content, and the weights of models."""
    digest = hashlib.sha256(json.dumps(content).encode())
    for model in models:
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class _Training:
    """What is trained and by what, and how far it is: `step` steps are done, `epoch` of them complete."""

    def __init__(self, model: nn.Module, data: ImageData, recipe: Recipe, engine: Engine, teacher: nn.Module | None, seed: int,
                 device: torch.device, limit: int | None, workers: int | None) -> None:
        self.model, self.recipe, self.engine, self.seed, self.device = model, recipe, engine, seed, device
        self.batches = data.batches("train", model, batch_size=self._batch_size(), training=True, limit=limit, seed=seed, workers=workers,
                                    augment={"hflip": 0.5, **recipe.augment}, shared=True, turns=engine.accumulate, repeats=recipe.repeats)
        train = data.split("train")
        size = min(SLICE, len(train)) if hasattr(train, "__len__") else SLICE       # a stream has no length
        self.slice = data.batches("train", model, limit=size, seed=seed, workers=0, shared=True)
        self.steps = len(self.batches) // engine.accumulate                         # of an epoch
        if not self.steps:
            raise InputError(f"{data.name}: too few images for one step of {parallel.world()} processes with {engine.accumulate} batches "
                             "each")
        self.dtype = recipe.dtype or ("bfloat16" if uses_bf16(device, None) else "float32")
        set_trainable(model, recipe.trainable)
        task = make_task(model.to(device), teacher, recipe, device)
        if engine.channels_last:
            model.to(memory_format=torch.channels_last)
        if recipe.ema_decay:
            task.setup_ema(recipe.ema_decay)
        self.optimizer = create_optimizer_v2(model, opt=recipe.optimizer, lr=recipe.scaled_lr, weight_decay=recipe.weight_decay,
                                             layer_decay=recipe.layer_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=recipe.schedule, num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs,
            min_lr=min(recipe.min_lr, recipe.scaled_lr), warmup_lr=recipe.scaled_lr / 100, step_on_epochs=False,
            updates_per_epoch=self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == "float16")
        self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=model.num_classes) \
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
        self.epoch, self.done, self.skipped, self.asked = 0, 0, 0, False            # done: steps of the epoch under way
        self.losses: list[float] = []                                               # of these steps, those skipped left out
        self.seconds = 0.0                                                          # that they took

    def _batch_size(self) -> int:
        """Images a batch of one process. Raises InputError where the recipe's do not divide."""
        parts = parallel.world() * self.engine.accumulate
        if self.recipe.batch_size % parts:
            raise InputError(f"recipe {self.recipe.name}: a step of {self.recipe.batch_size} images does not divide by {parallel.world()} "
                             f"processes times {self.engine.accumulate} batches; --batch-size takes a multiple of {parts}")
        return self.recipe.batch_size // parts

    @property
    def step(self) -> int:
        return self.epoch * self.steps + self.done

    @property
    def average(self) -> nn.Module:
        """What is measured and given back: the model, or its moving average."""
        ema = self.task.get_trainable_module(ema=True)
        return self.model if ema is None else ema.module

    def state(self) -> dict[str, Any]:
        ema = {"ema": self.average.state_dict()} if self.recipe.ema_decay else {}
        return {"epoch": self.epoch, "done": self.done, "skipped": self.skipped, "losses": torch.tensor(self.losses, dtype=torch.float64),
                "seconds": self.seconds, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(), **ema}

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
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: damaged ({first_line(error)}); remove it to begin anew") from None

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of one batch."""
        images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        if self.engine.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            if len(images) % 2:                                                     # it mixes pairs; a broken image leaves one alone
                images, targets = (torch.cat([v, v[-1:]]) for v in (images, targets))
            images, targets = self.mixup(images, targets)
        with torch.autocast(self.device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
            return self.task(images, targets)["loss"]

    def _next(self, batches: Any) -> tuple[Tensor, Tensor]:
        try:
            return next(batches)
        except StopIteration:
            raise InputError(f"the data ended after {self.done} of the {self.steps} steps of epoch {self.epoch + 1}; its number of images "
                             "is not what it says") from None

    def _agree(self, value: float) -> float:
        """The sum of `value` over all processes; to be asked to stop is passed on along with it."""
        found, asked = parallel.total(torch.tensor([value, float(self.asked)], dtype=torch.float64)).tolist()
        self.asked = asked > 0
        return found

    def must_stop(self) -> bool:
        """Whether one of the processes was asked to stop; all are told the same."""
        self._agree(0.0)
        return self.asked

    def take_step(self, batches: Any) -> float:
        """One step on the next `accumulate` batches; returns its loss, the mean over all processes. One that is not finite changes
        nothing but the count of those skipped in a row."""
        self.scheduler.step_update(self.step)
        turns, found = self.engine.accumulate, 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for turn in range(turns):
            images, targets = self._next(batches)
            random_seed(seed_of(self.seed, self.step, turn), parallel.rank())       # loaders draw as well, or not: after them
            with contextlib.nullcontext() if turn + 1 == turns else self.task.no_sync():
                loss = self._forward(images, targets) / turns
                self.scaler.scale(loss).backward()
            found += float(loss.detach())
        loss = self._agree(found / parallel.world())
        if math.isfinite(loss):
            if self.recipe.clip_grad:
                self.scaler.unscale_(self.optimizer)
                dispatch_clip_grad(self.model.parameters(), self.recipe.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.task.update_ema(self.step + 1)
            self.losses.append(loss)
            self.skipped = 0
        else:
            self.skipped += 1
        self.done += 1
        return loss


def _marks(data: ImageData, recipe: Recipe, models: list[nn.Module], about: dict[str, Any]) -> dict[str, str]:
    """What a state must have been made from to be gone on from, by name."""
    settings = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("source", "expected", "command")}
    return {"recipe": fingerprint(settings, []), "data set": fingerprint(data.files("train"), []), "weights": fingerprint([], models),
            **{name: str(value) for name, value in about.items()}}


def _resume(training: _Training, folder: Path, marks: dict[str, str], changed_data: bool) -> None:
    """Load the newest whole state of the folder, where there is one, and cut the log there."""
    for path, state in states.newest(folder):
        known = state.get("marks")
        known = known if isinstance(known, dict) else {}
        differ = [name for name in marks if known.get(name) != marks[name] and not (changed_data and name == "data set")]
        if differ:
            only = differ == ["data set"]
            raise InputError(f"{path}: the state of another run (other {' and '.join(differ)}); "
                             + ("--changed-data goes on with the images as they are now, or choose another folder" if only else
                                "choose another folder or remove it"))
        training.load(state, path)
        break
    if parallel.is_first():
        log = folder / LOG
        kept = [r for r in read_lines(log) if isinstance(r, dict) and isinstance(r.get("step"), int) and r["step"] <= training.step]
        if log.exists():
            write_lines(log, kept)


def fit(model: nn.Module, data: ImageData, recipe: Recipe, folder: str | Path, *, teacher: nn.Module | None = None,
        seed: int = 0, device: str | torch.device | None = None, limit: int | None = None, workers: int | None = None,
        engine: Engine | None = None, about: dict[str, Any] | None = None, changed_data: bool = False,
        progress: bool = True) -> list[dict[str, Any]]:
    """Train `model` in place by `recipe`; returns the log, one record an epoch (epoch, step, loss, lr, train_slice_top1_pct, seconds).

    States go to folder/state-STEP-DIGEST.pt every engine.save_steps and after every epoch, the last engine.keep of them, and lines
    to folder/log.jsonl; a run that was killed, called again with the same arguments, goes on from the newest whole state and ends
    with the same weights, on a CPU bit for bit. Under torchrun every process calls it, and the batches of a step are divided
    among them. limit: train on a slice of that many images. about: JSON-able, stored with each state. changed_data: go on though
    the data set is another than it was. A step whose loss is not finite is left out, and its files are in the log.

    Raises InputError for a folder that holds another run's state or that another process works in, a missing teacher, or more
    than engine.max_skipped steps in a row without a finite loss; signals.Stopped, with the state written, when asked to stop.
    """
    folder, device, engine = Path(folder), torch.device(device or next(model.parameters()).device), engine or Engine()
    with locked(folder) if parallel.is_first() else contextlib.nullcontext():
        if parallel.is_first():
            states.tidy(folder)
        marks = _marks(data, recipe, [model] if teacher is None else [model, teacher], {"seed": seed, "limit": limit})
        random_seed(seed)
        training = _Training(model, data, recipe, engine, teacher, seed, device, limit, workers)
        try:
            _resume(training, folder, marks, changed_data)
            parallel.wait()                                                         # nobody writes before all have read
            with signals.on_request(lambda: setattr(training, "asked", True)):
                while training.epoch < recipe.epochs:
                    _epoch(training, folder, {"marks": marks, "about": about or {}, "recipe": dataclasses.asdict(recipe), "seed": seed},
                           progress)
        finally:
            if engine.checkpointing:
                model.set_grad_checkpointing(False)
        if recipe.ema_decay:
            model.load_state_dict(training.average.state_dict())
        parallel.wait()
    set_trainable(model.eval(), "all")
    return [r for r in read_lines(folder / LOG) if "epoch" in r and r["epoch"] <= recipe.epochs]


def _epoch(training: _Training, folder: Path, fixed: dict[str, Any], progress: bool) -> None:
    """The rest of the epoch under way, to its line in the log and its state."""
    recipe, engine, number = training.recipe, training.engine, training.epoch + 1
    began = time.perf_counter() - training.seconds

    def save() -> None:
        training.seconds = time.perf_counter() - began
        if parallel.is_first():
            states.write(folder, training.step, {**training.state(), **fixed}, engine.keep)

    def log(record: dict[str, Any]) -> None:
        if parallel.is_first():
            append_line(folder / LOG, {"step": training.step, **record, "seconds": round(time.perf_counter() - began, 2)})

    training.task.train()
    training.batches.begin(training.epoch, training.done * engine.accumulate)
    batches = iter(training.batches)
    with contextlib.closing(batches), tqdm(total=training.steps, initial=training.done, desc=f"epoch {number}/{recipe.epochs}",
                                           unit="step", disable=not progress, leave=False) as bar:
        while training.done < training.steps:
            loss = training.take_step(batches)
            if not math.isfinite(loss):
                _not_finite(training, loss, log)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            over = training.done == training.steps
            if not over and training.done % engine.log_steps == 0:
                log({"at_epoch": round(training.step / training.steps, 4), "loss": loss, "lr": training.optimizer.param_groups[0]["lr"]})
            if not over and (training.asked or training.done % engine.save_steps == 0):
                save()
                if training.asked:
                    raise signals.Stopped
    accuracy = evaluate(training.average, training.slice, device=training.device, amp=training.dtype != "float32", progress=False)
    losses = training.losses
    training.epoch, training.done, training.losses = number, 0, []
    record = {"epoch": number, "loss": sum(losses) / max(1, len(losses)), "lr": training.optimizer.param_groups[0]["lr"],
              "train_slice_top1_pct": accuracy.top1_pct}
    log(record)
    if progress:
        tqdm.write(f"epoch {number:3d}/{recipe.epochs}  loss {record['loss']:.4f}  top-1 on a train slice {accuracy.top1_pct:.2f} %  "
                   f"{time.perf_counter() - began:.0f} s")
    began = time.perf_counter()
    save()
    if training.must_stop() and number < recipe.epochs:
        raise signals.Stopped


def _not_finite(training: _Training, loss: float, log: Any) -> None:
    """Note a skipped step with the files of its batches. Raises InputError where there were too many in a row."""
    turns, at = training.engine.accumulate, training.done - 1
    files = [name for turn in range(turns) for name in training.batches.names(training.epoch, at * turns + turn)]
    files = [name for names in parallel.gather(files) for name in names]
    log({"skipped": str(loss), "files": files})
    if training.skipped > training.engine.max_skipped:
        raise InputError(f"the loss is {loss} at epoch {training.epoch + 1}, step {training.done}, and was not finite in "
                         f"{training.skipped} steps in a row; their files are in {LOG}. A smaller lr than {training.recipe.lr} or "
                         "clip_grad may help")
