"""Whether the model or the loader is the limit of a training: images/s of the loader alone, of training steps alone,
and of both.

    python benchmarks/loader.py --data FOLDER [--models deit_tiny_patch16_224 ...] [--workers 0 1 2] [--recipe deit]
    python benchmarks/loader.py --opening 128000 1280000

Steps are those of `fit` on one batch that stays in memory; the loader augments as the recipe says. Rows go to
benchmarks/results/loader.jsonl (replaced). With --opening, how long it takes until a folder of so many images gives its
first batch, on empty files that are made for it (benchmarks/results/opening.jsonl). Run it with nothing else running.
"""
import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vitlab.data import open_data
from vitlab.data.groups import SETTLED_NS
from vitlab.data.order import TrainingOrder
from vitlab.measure.throughput import conditions
from vitlab.models.create import create_model
from vitlab.runtime.files import write_lines
from vitlab.training.recipes import Engine, recipe
from vitlab.training.stepping import Training
from vitlab.workbench.steps import pick_device

RESULTS = Path(__file__).parent / "results" / "loader.jsonl"
OPENING = RESULTS.with_name("opening.jsonl")
CLASSES, REPEATS = 1000, 3


def rate(batches: Iterator[tuple[Tensor, Tensor]], training: Training | None, count: int,
         device: torch.device) -> float:
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


def empty_folder(root: Path, images: int) -> Path:
    """An image folder of CLASSES classes, its files empty and named as ImageNet's; a 25th as many in val/."""
    for split, count in (("train", images // CLASSES), ("val", max(1, images // CLASSES // 25))):
        for number in range(CLASSES):
            folder = root / split / f"n{1440764 + number:08d}"
            folder.mkdir(parents=True)
            for image in range(count):
                (folder / f"{folder.name}_{7 * image}.JPEG").touch()
    return root


def seconds(call: Callable[[], object]) -> float:
    """Median of REPEATS."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def opening(images: int) -> dict[str, object]:
    """Seconds until a folder is open for the first time, again, and after one class changed; of an epoch's order on one
    process, and of its first batch where the epoch goes on in its middle; of the names and sizes that a run knows its
    data set by."""
    with tempfile.TemporaryDirectory() as place:
        root, cache = empty_folder(Path(place, "data"), images), Path(place, "cache")
        os.environ["VITLAB_CACHE"] = str(cache)
        time.sleep(2 * SETTLED_NS / 1e9)

        def first() -> None:
            for kept in cache.glob("*"):
                kept.unlink()
            open_data(root)

        def changed() -> None:
            (root / "train" / f"n{1440764:08d}" / f"{time.time_ns()}.JPEG").touch()
            open_data(root)

        def resumed() -> None:
            order.start = len(order) // 2
            next(iter(order))
        found: dict[str, object] = {"images": images, "first_s": seconds(first),
                                    "again_s": seconds(lambda: open_data(root))}
        data = open_data(root)
        order = TrainingOrder(data.split("train"), 256, seed=0)
        return found | {"order_s": seconds(lambda: sum(map(len, order))), "resumed_s": seconds(resumed),
                        "known_s": seconds(lambda: data.files("train")), "changed_s": seconds(changed),
                        "conditions": conditions(torch.device("cpu"), "float32", 256, REPEATS)
                        | {"timing": "medians", "classes": CLASSES}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data")
    what.add_argument("--opening", type=int, nargs="+", metavar="IMAGES")
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="deit")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--device")
    args = parser.parse_args()
    if args.opening:
        rows = []
        for images in args.opening:
            rows.append(opening(images))
            print(rows[-1], flush=True)
        write_lines(OPENING, rows)
        parser.exit()
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
            rows.append({"model": name, "workers": workers, "loader_img_s": alone, "step_img_s": step,
                         "both_img_s": both, "limit": limit,
                         "conditions": conditions(device, args.dtype, args.batch_size, args.batches)
                         | {"recipe": args.recipe}})
            print(f"{name:26s} {workers} workers: loader {alone:7.1f}, step {step:7.1f}, both {both:7.1f} images/s; "
                  f"{limit}", flush=True)
            del stream, training
    write_lines(RESULTS, rows)
