"""What a training step costs on a CPU: fused attention or not, float32 or bf16, freed memory held or given back.

    python benchmarks/cpu_step.py [--repeats 7] [--threads 1]

A step is the forward and the backward of one batch. The steps of a model are timed in turn in one process, with held memory and without
it in processes of their own, one after the other, twice.
"""
import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.layers import Attention
from torch import nn

from vitlab.files import write_lines
from vitlab.models.create import create_model
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.training.throughput import conditions, hold_memory

RESULTS = Path(__file__).parent / "results" / "cpu_step.jsonl"
NAME = "deit_tiny_patch16_224"
SIZES = {"DeiT-tiny, 224 x 224": (16, (224, 224)), "DeiT-tiny Segmenter, 360 x 480": (4, (360, 480))}       # images, height and width
DTYPES = ("float32", "bfloat16")


def step(model: nn.Module, images: torch.Tensor, dtype: str, fused: bool) -> Callable[[], None]:
    def run() -> None:
        for module in model.modules():
            if isinstance(module, Attention):
                module.fused_attn = fused
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
    return run


def once(held: bool, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, in this process."""
    if held:
        hold_memory()
    found: dict[str, list[float]] = {}
    for name, (batch, size) in SIZES.items():
        model = create_model(NAME, img_size=size, num_classes=0 if "Segmenter" in name else 1000)
        model = Segmenter(as_encoder(model), 11) if "Segmenter" in name else model
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
        steps = {f"{name}, {dtype}, {'fused' if fused else 'plain'} attention": step(model.train(), images, dtype, fused)
                 for dtype, fused in itertools.product(DTYPES, (True, False))}
        for turn in range(repeats + 1):                                         # the first warms up
            for key, run in steps.items():
                began = time.perf_counter()
                run()
                if turn:
                    found.setdefault(key, []).append(time.perf_counter() - began)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--once", choices=("default", "held"), help="measure in this process and print it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.once:
        print(json.dumps(once(args.once == "held", args.repeats)))
        sys.exit()
    seconds: dict[str, list[float]] = {}
    for memory in ("default", "held") * 2:                                      # in turn, so that the machine's drift spreads evenly
        told = subprocess.run([sys.executable, __file__, "--once", memory, "--repeats", str(args.repeats), "--threads", str(args.threads)],
                              capture_output=True, text=True, check=True).stdout
        for key, draws in json.loads(told).items():
            seconds.setdefault(f"{key}, {'memory held' if memory == 'held' else 'allocator as it is'}", []).extend(draws)
    rows = []
    for key, draws in seconds.items():
        name, dtype = next(name for name in SIZES if key.startswith(name)), next(dtype for dtype in DTYPES if dtype in key)
        first = next(statistics.median(v) for k, v in seconds.items() if k.startswith(name))
        about = {**conditions(torch.device("cpu"), dtype, SIZES[name][0], len(draws)), "range_ms": [1000 * min(draws), 1000 * max(draws)],
                 "timing": "median, steps in turn in one process, processes in turn"}
        rows.append({"model": key, "latency_ms": 1000 * statistics.median(draws), "ratio": first / statistics.median(draws),
                     "conditions": about})
    write_lines(RESULTS, rows)
    for row in rows:
        print(f"{row['model']:95s} {row['latency_ms']:7.0f} ms  {row['ratio']:.2f}")
