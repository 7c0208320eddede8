"""fit: the one training loop, for pretraining and fine-tuning, that goes on where a killed run stopped."""
import dataclasses
import hashlib
import io
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad, random_seed
from torch import nn
from tqdm.auto import tqdm

from vitlab.data import ImageData
from vitlab.files import InputError, append_line, atomic_write, read_lines
from vitlab.models import set_trainable
from vitlab.models.create import first_line, load_state, read_file
from vitlab.training.distillation import make_task
from vitlab.training.evaluate import autocast, evaluate
from vitlab.training.recipes import Recipe

STATE, LOG = "state.pt", "log.jsonl"
SLICE = 500                 # images of train that the log's train_slice_top1_pct is measured on; the held-out split is for reports


def fingerprint(content: Any, models: list[nn.Module]) -> str:
    """16 hexadecimal digits of what a run depends on: JSON-able content, and the weights of models."""
    digest = hashlib.sha256(json.dumps(content).encode())
    for model in models:
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _random_states() -> dict[str, Any]:
    version, keys, position, gauss, cached = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": json.dumps(random.getstate()),
            "numpy": [version, torch.from_numpy(keys.astype(np.int64)), position, gauss, cached]}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    version, internal, gauss = json.loads(states["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def fit(model: nn.Module, data: ImageData, recipe: Recipe, folder: str | Path, *, teacher: nn.Module | None = None,
        seed: int = 0, device: str | torch.device | None = None, limit: int | None = None,
        workers: int | None = None, progress: bool = True) -> list[dict[str, Any]]:
    """Train `model` in place by `recipe`; returns the log, one record an epoch (epoch, loss, lr, train_slice_top1_pct, seconds).

    After every epoch the whole state goes to folder/state.pt (atomically) and a line to folder/log.jsonl, so a killed
    run called again with the same arguments goes on with the next epoch. limit: train on a slice of that many images.
    Raises InputError for a folder that holds another run's state, a missing teacher, or a loss that is not finite.
    """
    folder, device = Path(folder), torch.device(device or next(model.parameters()).device)
    random_seed(seed)
    set_trainable(model, recipe.trainable)
    task = make_task(model.to(device), teacher, recipe, device)
    batches = data.batches("train", model, batch_size=recipe.batch_size, training=True, limit=limit, seed=seed,
                           workers=workers, augment={"hflip": 0.5, **recipe.augment})
    train = data.split("train")
    size = min(SLICE, len(train)) if hasattr(train, "__len__") else SLICE       # a stream has no length
    chosen = data.batches("train", model, limit=size, seed=seed, workers=0)
    optimizer = create_optimizer_v2(model, opt=recipe.optimizer, lr=recipe.scaled_lr, weight_decay=recipe.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=recipe.schedule, num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs,
        min_lr=min(recipe.min_lr, recipe.scaled_lr), warmup_lr=recipe.scaled_lr / 100, step_on_epochs=False,
        updates_per_epoch=len(batches))
    settings = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("source", "expected", "command")}
    mark = fingerprint([settings, data.files("train"), seed, limit], [model] if teacher is None else [model, teacher])
    first = _resume(folder, mark, model, optimizer)
    for epoch in range(first, recipe.epochs):
        began, losses = time.perf_counter(), []
        task.train()
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{recipe.epochs}", unit="batch", disable=not progress, leave=False)
        for step, (images, targets) in enumerate(bar):
            scheduler.step_update(epoch * len(batches) + step)
            with autocast(device, recipe.amp):
                loss = task(images.to(device), targets.to(device))["loss"]
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError(f"the loss is {losses[-1]} at epoch {epoch + 1}, step {step + 1}; a smaller lr than "
                                 f"{recipe.lr} or clip_grad may help"
                                 + (f". The state after epoch {epoch} is in {folder / STATE}" if epoch else ""))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip_grad:
                dispatch_clip_grad(model.parameters(), recipe.clip_grad)
            optimizer.step()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        kept = _random_states()
        accuracy = evaluate(model, chosen, device=device, amp=recipe.amp, progress=False)
        record = {"epoch": epoch + 1, "loss": sum(losses) / max(1, len(losses)), "lr": optimizer.param_groups[0]["lr"],
                  "train_slice_top1_pct": accuracy.top1_pct, "seconds": round(time.perf_counter() - began, 2)}
        if progress:
            tqdm.write(f"epoch {epoch + 1:3d}/{recipe.epochs}  loss {record['loss']:.4f}  "
                       f"top-1 on a train slice {accuracy.top1_pct:.2f} %  {record['seconds']:.0f} s")
        append_line(folder / LOG, record)
        content = io.BytesIO()
        torch.save({"mark": mark, "epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "random": kept}, content)
        atomic_write(folder / STATE, content.getvalue())
        _set_random_states(kept)
    set_trainable(model.eval(), "all")
    # The last record of each epoch: a kill between log and state repeats one.
    last = {r["epoch"]: r for r in read_lines(folder / LOG) if isinstance(r, dict) and "epoch" in r}
    return [last[e] for e in sorted(last) if e <= recipe.epochs]


def _resume(folder: Path, mark: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load folder/state.pt where there is one; returns the epochs already done."""
    path = folder / STATE
    if not path.exists():
        return 0
    state = read_file(path)
    if state.get("mark") != mark:
        raise InputError(f"{path}: the state of another run (other recipe, data, plan, weights or seed); "
                         "choose another folder or remove it")
    try:
        load_state(model, state["model"], path)
        optimizer.load_state_dict(state["optimizer"])
        _set_random_states(state["random"])
        return int(state["epoch"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); remove it to begin anew") from None
