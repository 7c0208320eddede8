"""Throughput and latency, measured in turn in one run, so that a ratio holds where the machine's speed drifts."""
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from vitlab.files import InputError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4           # of mallopt(3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over the repeats of one model; ratio is against the first model, repeat by repeat."""

    throughput_img_s: float
    latency_ms: float               # one forward of the batch
    ratio: float                    # median of (first model's time / this one's), 1 for the first
    ratio_min: float
    ratio_max: float
    peak_memory_mb: float | None    # on a GPU, of one forward


def hold_memory() -> bool:
    """Keep freed memory in this process, where the C library is glibc; says whether it could.

    Else large blocks go back to the system and come again as fresh pages, tens of thousands a forward; how many depends on what the
    process allocated before, and with it a model's speed, by a fifth and more from process to process (docs/results.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def conditions(device: torch.device, dtype: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """What a speed depends on, to be stored beside it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    return {"device": name, "dtype": dtype, "batch_size": batch_size, "threads": torch.get_num_threads(),
            "repeats": repeats, "torch": torch.__version__, "timing": "median, models in turn in one process that keeps freed memory"}


def _once(model: Callable, x: torch.Tensor, runs: int) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    began = time.perf_counter()
    for _ in range(runs):
        model(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - began) / runs


@torch.inference_mode()
def measure(models: dict[str, nn.Module], *, batch_size: int = 32, repeats: int = 10, warmup: int = 2, dtype: str = "float32",
            device: str | torch.device = "cpu", min_seconds: float = 0.2, progress: bool = True) -> dict[str, Speed]:
    """Speed of each model on random images, the first the baseline: warm-up, then `repeats` rounds through all models in turn.

    Each timing repeats the forward until it lasts min_seconds. Models are moved to device and dtype and stay there.
    Raises InputError for an unknown dtype, no model, or a size below 1.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; known are {sorted(DTYPES)}")
    if not models or batch_size < 1 or repeats < 1:
        raise InputError("measure needs a model, batch_size of at least 1 and repeats of at least 1")
    device, inputs, runs, peaks = torch.device(device), {}, {}, {}
    if device.type == "cpu":
        hold_memory()
    for name, model in models.items():
        model.to(device=device, dtype=DTYPES[dtype]).eval()
        h, w = model.patch_embed.img_size
        inputs[name] = torch.randn(batch_size, model.in_chans, h, w, generator=torch.Generator().manual_seed(0)
                                   ).to(device, DTYPES[dtype])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(max(1, warmup)):
            seconds = _once(model, inputs[name], 1)
        peaks[name] = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        runs[name] = max(1, round(min_seconds / seconds))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(repeats), desc=f"timing, batch {batch_size}", unit="round", disable=not progress):
        for name, model in models.items():
            times[name].append(_once(model, inputs[name], runs[name]))
    first = times[next(iter(models))]
    speeds = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(first, seconds)]
        middle = statistics.median(seconds)
        speeds[name] = Speed(throughput_img_s=batch_size / middle, latency_ms=1000 * middle, ratio=statistics.median(ratios),
                             ratio_min=min(ratios), ratio_max=max(ratios), peak_memory_mb=peaks[name])
    return speeds
