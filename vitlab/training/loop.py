"""fit: the one training loop, for pretraining and fine-tuning, on one process or several, that goes on after a stop.

Every random number follows from the seed and the step (vitlab.data.order), and the state on the disk says which step is
next.
"""
import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from vitlab.data import ImageData
from vitlab.measure.pixels import measured
from vitlab.models import set_trainable
from vitlab.runtime import logs, parallel, signals
from vitlab.runtime.energy import Meter
from vitlab.runtime.files import InputError, append_line, locked, read_lines, require, write_lines
from vitlab.training import states
from vitlab.training.recipes import Engine, Recipe
from vitlab.training.stepping import AVERAGE, Training

LOG = "log.jsonl"


def fingerprint(content: Any, models: list[nn.Module]) -> str:
    """16 hexadecimal digits of what a run depends on: JSON-able content, and the weights of models."""
    digest = hashlib.sha256(json.dumps(content).encode())
    for model in models:
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _marks(data: ImageData, recipe: Recipe, models: list[nn.Module], about: dict[str, Any]) -> dict[str, str]:
    """What a state must have been made from to be gone on from, by name."""
    settings = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("source", "expected", "command")}
    if recipe.matrices_lr == 1:                 # as states were before there was such a factor
        del settings["matrices_lr"]
    return {"recipe": fingerprint(settings, []), "data set": fingerprint(data.files("train"), []),
            "weights": fingerprint([], models),
            **({"moving average": fingerprint(AVERAGE, [])} if recipe.ema_decay else {}),
            **{name: str(value) for name, value in about.items()}}


def _resume(training: Training, folder: Path, marks: dict[str, str], changed_data: bool) -> None:
    """Load the newest whole state of the folder, where there is one, and cut the log there."""
    for path, state in states.newest(folder):
        known = state.get("marks")
        known = known if isinstance(known, dict) else {}
        differ = [name for name in marks if known.get(name) != marks[name]
                  and not (changed_data and name == "data set")]
        if differ:
            only = differ == ["data set"]
            raise InputError(f"{path}: the state of another run (other {' and '.join(differ)}); "
                             + ("--changed-data goes on with the images as they are now, or choose another folder"
                                if only else
                                "choose another folder or remove it"))
        training.load(state, path)
        if known.get("data set") != marks["data set"]:                          # what was broken may have been repaired
            training.batches.broken = []
        break
    if parallel.is_first():
        log = folder / LOG
        kept = [r for r in read_lines(log) if isinstance(r, dict) and isinstance(r.get("step"), int)
                and r["step"] <= training.step]
        if log.exists():
            write_lines(log, kept)


def fit(model: nn.Module, data: ImageData, recipe: Recipe, folder: str | Path, *, teacher: nn.Module | None = None,
        seed: int = 0, device: str | torch.device | None = None, limit: int | None = None, workers: int | None = None,
        engine: Engine | None = None, about: dict[str, Any] | None = None, changed_data: bool = False,
        loggers: Sequence[str] = (), progress: bool = True) -> list[dict[str, Any]]:
    """Train `model` in place by `recipe`; returns the log, one record an epoch (epoch, step, loss, lr,
    train_slice_top1_pct, of a Segmenter train_slice_miou_pct, without a classifier train_slice_distill_loss, seconds,
    peak_memory_mb of a GPU, joules where the machine can tell: `Meter`).

    States go to folder/state-STEP-DIGEST.pt every engine.save_steps and after every epoch, the last engine.keep of
    them, and lines to folder/log.jsonl; a run that was killed, called again with the same arguments, goes on from the
    newest whole state and ends with the same weights, on a CPU bit for bit. Under torchrun every process calls it, and
    the batches of a step are divided among them. limit: train on a slice of that many images. about: JSON-able, stored
    with each state. changed_data: go on though the data set is another than it was. A step whose loss or gradient is
    not finite is left out, and its files are in the log; of weights that are not, no state is written. loggers: of
    `logs.LOGGERS`, where the log's numbers go too.

    Raises InputError for a folder that holds another run's state or that another process works in, a missing teacher,
    or more than engine.max_skipped such steps in a row, or weights that are not finite; signals.Stopped, with the state
    written, when asked to stop.
    """
    folder, device, engine = Path(folder), torch.device(device or next(model.parameters()).device), engine or Engine()
    with locked(folder) if parallel.is_first() else contextlib.nullcontext():
        if parallel.is_first():
            states.tidy(folder)
        marks = _marks(data, recipe, [model] if teacher is None else [model, teacher], {"seed": seed, "limit": limit})
        random_seed(seed)
        training = Training(model, data, recipe, engine, teacher, seed, device, limit, workers)
        try:
            _resume(training, folder, marks, changed_data)
            if progress and training.step and parallel.is_first():
                within = f" and {training.done} of {training.steps} steps" if training.done else ""
                tqdm.write(f"{folder}: goes on after {training.epoch} of {recipe.epochs} epochs{within}")
            parallel.wait()                                                         # nobody writes before all have read
            with (signals.on_request(lambda: setattr(training, "asked", True)),
                  logs.opened(loggers, folder, training.step) as passed_on):
                while training.epoch < recipe.epochs:
                    _epoch(training, folder,
                           {"marks": marks, "about": about or {}, "recipe": dataclasses.asdict(recipe), "seed": seed},
                           passed_on, progress)
        finally:
            training.close()
            if engine.checkpointing:
                model.set_grad_checkpointing(False)
        if recipe.ema_decay:
            model.load_state_dict(training.average.state_dict())
        parallel.wait()
    set_trainable(model.eval(), "all")
    return [r for r in read_lines(folder / LOG) if "epoch" in r and r["epoch"] <= recipe.epochs]


def _epoch(training: Training, folder: Path, fixed: dict[str, Any], passed_on: logs.Log, progress: bool) -> None:
    """The rest of the epoch under way, to its line in the log and its state."""
    recipe, engine, number = training.recipe, training.engine, training.epoch + 1
    began, meter = time.perf_counter() - training.seconds, Meter(training.device)
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.device)

    def save() -> None:
        training.check_weights()
        training.share_broken()
        training.seconds, training.joules = time.perf_counter() - began, training.joules + (meter.joules() or 0)
        if parallel.is_first():
            states.write(folder, training.step, {**training.state(), **fixed}, engine.keep)

    def log(record: dict[str, Any]) -> None:
        if parallel.is_first():
            record = {**record, "seconds": round(time.perf_counter() - began, 2)}
            append_line(folder / LOG, {"step": training.step, **record})
            passed_on(training.step, record)

    training.task.train()
    training.batches.begin(training.epoch, training.done * engine.accumulate)
    batches = iter(training.batches)
    with contextlib.closing(batches), tqdm(total=training.steps, initial=training.done,
                                           desc=f"epoch {number}/{recipe.epochs}", unit="step", disable=not progress,
                                           leave=False) as bar:
        while training.done < training.steps:
            loss = training.take_step(batches)
            meter.keep_up()
            if training.fault is not None:
                _left_out(training, loss, log)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            over = training.done == training.steps
            if not over and training.done % engine.log_steps == 0 and training.fault is None:
                log({"at_epoch": round(training.step / training.steps, 4), "loss": loss,
                     "lr": training.optimizer.param_groups[0]["lr"]})
            if not over and (training.stops or training.done % engine.save_steps == 0):
                save()
                if training.stops:
                    raise signals.Stopped
    name, value = measured(training.average, training.slice, teacher=training.teacher, device=training.device,
                           amp=training.dtype != "float32", progress=False)
    losses = training.losses
    training.epoch, training.done, training.losses = number, 0, []
    record = {"epoch": number, "loss": sum(losses) / len(losses) if losses else None,
              "lr": training.optimizer.param_groups[0]["lr"], f"train_slice_{name}": value}
    broken = len(training.share_broken())
    record |= {"broken": broken} if broken else {}                                  # images left out so far
    if training.device.type == "cuda":
        record["peak_memory_mb"] = torch.cuda.max_memory_allocated(training.device) / 2**20
    if meter.by:
        record["joules"] = round(training.joules + (meter.joules() or 0), 1)
    log(record)
    if progress:
        shown = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        said = f"{name.removesuffix('_pct')} on a train slice " + (
            f"{value:.2f} %" if name.endswith("_pct") else f"{value:.4f}")
        tqdm.write(f"epoch {number:3d}/{recipe.epochs}  loss {shown}  {said}  {time.perf_counter() - began:.0f} s")
    began, training.joules = time.perf_counter(), 0.0
    save()
    if training.must_stop() and number < recipe.epochs:
        raise signals.Stopped


def _left_out(training: Training, loss: float, log: Any) -> None:
    """Note a skipped step with the files of its batches. Raises InputError where there were too many in a row."""
    turns, at = training.engine.accumulate, training.done - 1
    files = [name for turn in range(turns) for name in training.batches.names(training.epoch, at * turns + turn)]
    files = [name for names in parallel.gather(files) for name in names]
    log({"skipped": str(loss), "why": training.fault, "files": files})
    require(training.skipped <= training.engine.max_skipped, f"{training.fault} at epoch {training.epoch + 1}, step "
            f"{training.done}, and was not finite in {training.skipped} steps in a row; their files are in {LOG}. A "
            f"smaller lr than {training.recipe.lr} or clip_grad may help")
