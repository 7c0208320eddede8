"""Whether the model or the loader is the limit of a training: images/s of the loader alone, of training steps alone, and of both.

    python benchmarks/loader.py --data FOLDER [--models deit_tiny_patch16_224 ...] [--workers 0 1 2] [--recipe deit]

Steps are those of `fit` on one batch that stays in memory; the loader augments as the recipe says. Rows go to
benchmarks/results/loader.jsonl (replaced). Run it with nothing else running.
"""
import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vitlab.data import open_data
from vitlab.files import write_lines
from vitlab.models.create import create_model
from vitlab.training.recipes import Engine, recipe
from vitlab.training.stepping import Training
from vitlab.training.throughput import conditions
from vitlab.workbench.steps import pick_device

RESULTS = Path(__file__).parent / "results" / "loader.jsonl"


def rate(batches: Iterator[tuple[Tensor, Tensor]], training: Training | None, count: int, device: torch.device) -> float:
    """Images/s: the median of `count` steps, or of batches alone, after two to warm up."""
    seconds = []
    for _ in range(count + 2):
        began = time.perf_counter()
        if training is None:
            size = len(next(batches)[0])
        else:
            training.take_step(batches)
            size = training.recipe.batch_size
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / size)
    return 1 / statistics.median(seconds[2:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="deit")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--device")
    args = parser.parse_args()
    data, device, rows = open_data(args.data), pick_device(args.device), []
    settings = recipe(args.recipe).replace(batch_size=args.batch_size, dtype=args.dtype, epochs=10**6)
    for name in args.models:
        for workers in args.workers:
            model = create_model(name, num_classes=data.num_classes) if data.num_classes else create_model(name)
            training = Training(model, data, settings, Engine(), None, 0, device, None, workers)
            training.task.train()
            stream = itertools.chain.from_iterable(itertools.repeat(training.batches))
            alone = rate(stream, None, args.batches, device)
            fixed = next(stream)
            step = rate(itertools.repeat((fixed[0].clone(), fixed[1].clone())), training, args.batches, device)
            both = rate(stream, training, args.batches, device)
            limit = "loader" if alone < step else "model"
            rows.append({"model": name, "workers": workers, "loader_img_s": alone, "step_img_s": step, "both_img_s": both, "limit": limit,
                         "conditions": conditions(device, args.dtype, args.batch_size, args.batches) | {"recipe": args.recipe}})
            print(f"{name:26s} {workers} workers: loader {alone:7.1f}, step {step:7.1f}, both {both:7.1f} images/s; {limit}", flush=True)
            del stream, training
    write_lines(RESULTS, rows)
