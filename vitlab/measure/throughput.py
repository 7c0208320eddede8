"""Throughput and latency, measured in turn in one run, so that a ratio holds where the machine's speed drifts."""
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import bdtr
from torch import nn
from tqdm import tqdm

from vitlab.runtime.cores import hold_memory
from vitlab.runtime.energy import Meter
from vitlab.runtime.files import InputError

CONFIDENCE = 0.95                               # of the range of a ratio
TIMING = ("models in turn in one process that keeps freed memory; ratio: median over the rounds of the first model's "
          "time by this one's; throughput: the first model's median, times the ratio")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Call = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Way:
    """How what is timed runs; `vitlab.exporting.running` has others than PyTorch's own."""

    name: str
    version: str
    # what runs a module on inputs like this one; both are on the device and of the dtype that are timed
    ready: Callable[[nn.Module, torch.Tensor], Call]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


EAGER = Way("torch", torch.__version__, lambda module, x: module)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model is beside the first one, whose time is taken in the same rounds.

        ratio = median over the rounds of (first model's seconds / this one's)          1 for the first
        throughput = (images of a batch / median of the first model's seconds) * ratio

    so that the quotient of two throughputs is that of their ratios, and neither goes with a machine whose speed drifts
    between rounds.
    """

    throughput_img_s: float
    latency_ms: float               # one forward of the batch: batch / throughput
    ratio: float
    # range in which the median lies (`median_range`); vitlab.runtime.results.noisy says whether 1 is in it
    ratio_min: float
    ratio_max: float
    peak_memory_mb: float | None    # on a GPU: its weights, the images, and what one forward holds at most
    energy_mj_img: float | None     # that the machine used over all rounds, for an image; None where it can't tell
    runtime: str                    # and its version


def conditions(device: torch.device, dtype: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """What a speed depends on, to be stored beside it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    return {"device": name, "dtype": dtype, "batch_size": batch_size, "threads": torch.get_num_threads(),
            "repeats": repeats, "torch": torch.__version__, "timing": TIMING,
            **({} if (meter := Meter(device).by) is None else {"energy": meter})}


def median_range(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """(low, high): the narrowest pair of order statistics x_(k), x_(n+1-k) between which the median of what the n
    values are drawn from lies with that confidence, whatever its distribution: 1 - 2 * P(Binomial(n, 1/2) < k). Of
    fewer than 6 values, at 0.95, no pair is as sure as that, and the least and the largest are given."""
    ordered, n = sorted(values), len(values)
    inner = sum(2 * bdtr(k, n, 0.5) <= 1 - confidence for k in range(1, (n + 1) // 2))      # pairs inside the outermost
    return ordered[inner], ordered[n - 1 - inner]


def _peak_memory_mb(model: nn.Module, call: Call, x: torch.Tensor) -> float:
    """MiB on a GPU of the weights, the images and what one forward holds at most; other models that lie there, and the
    workspaces of libraries, which a first forward must have made, are left out."""
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    call(x)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (*model.parameters(), *model.buffers(), x)}
    return (torch.cuda.max_memory_allocated(x.device) - before + sum(held.values())) / 2**20


def _once(call: Call, x: torch.Tensor, runs: int) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    began = time.perf_counter()
    for _ in range(runs):
        call(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - began) / runs


@torch.inference_mode()
def measure(models: Mapping[str, nn.Module], *, batch_size: int = 32, repeats: int = 10, warmup: int = 2,
            dtype: str = "float32", device: str | torch.device = "cpu", min_seconds: float = 0.2,
            progress: bool = True, ways: Sequence[Way] = (EAGER,)) -> dict[str, Speed]:
    """Speed of each model on random images, the first the baseline: warm-up, then `repeats` rounds through all models
    in turn (`Speed` says what is made of them), each in every way: "NAME", run by PyTorch, "NAME (compiled)", ...

    Each timing repeats the forward until it lasts min_seconds. Models are moved to device and dtype and stay there.
    Raises InputError for an unknown dtype, no model, or a size below 1.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; known are {sorted(DTYPES)}")
    if not models or batch_size < 1 or repeats < 1:
        raise InputError("measure needs a model, batch_size of at least 1 and repeats of at least 1")
    device = torch.device(device)
    if device.type == "cpu":
        hold_memory()
    timed: dict[str, tuple[Call, torch.Tensor, int]] = {}       # what runs, on what, how often in a row
    runs_in, peaks = dict[str, str](), dict[str, float | None]()
    for name, model in models.items():
        model.to(device=device, dtype=DTYPES[dtype]).eval()
        h, w = model.patch_embed.img_size
        x = torch.randn(batch_size, model.in_chans, h, w, generator=torch.Generator().manual_seed(0)
                        ).to(device, DTYPES[dtype])
        for way in ways:
            key, call = name if way is EAGER else f"{name} ({way.name})", way.ready(model, x)
            for _ in range(max(1, warmup)):
                seconds = _once(call, x, 1)
            timed[key], runs_in[key] = (call, x, max(1, round(min_seconds / seconds))), str(way)
            peaks[key] = _peak_memory_mb(model, call, x) if device.type == "cuda" else None
    times: dict[str, list[float]] = {key: [] for key in timed}
    meter, joules = Meter(device), dict.fromkeys(timed, 0.0)
    for _ in tqdm(range(repeats), desc=f"timing, batch {batch_size}", unit="round", disable=not progress):
        for key, each in timed.items():
            meter.joules()
            times[key].append(_once(*each))
            joules[key] += meter.joules() or 0.0
    first = times[next(iter(timed))]
    images = {key: repeats * runs * batch_size for key, (_, _, runs) in timed.items()}
    return {key: _speed(first, seconds, batch_size, peak_memory_mb=peaks[key], runtime=runs_in[key],
                        energy_mj_img=1000 * joules[key] / images[key] if meter.by else None)
            for key, seconds in times.items()}


def _speed(first: Sequence[float], seconds: Sequence[float], batch_size: int, **found: Any) -> Speed:
    """Of a model's seconds a forward, round by round, beside the first model's."""
    ratios = [a / b for a, b in zip(first, seconds)]
    ratio, (low, high) = statistics.median(ratios), median_range(ratios)
    throughput = batch_size / statistics.median(first) * ratio
    return Speed(throughput_img_s=throughput, latency_ms=1000 * batch_size / throughput, ratio=ratio, ratio_min=low,
                 ratio_max=high, **found)
