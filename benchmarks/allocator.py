"""How a model's speed differs between processes of its own, with the C library's allocator as it is and with freed
memory held.

    python benchmarks/allocator.py [--processes 4]

Each process times one dense DeiT-tiny at batch 32 in float32; fresh pages are the minor page faults of a forward.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from vitlab.measure.throughput import conditions
from vitlab.models.create import create_model
from vitlab.runtime.cores import hold_memory
from vitlab.runtime.files import write_lines

RESULTS = Path(__file__).parent / "results" / "allocator.jsonl"
NAME, BATCH, REPEATS = "deit_tiny_patch16_224", 32, 8


@torch.inference_mode()
def once(held: bool) -> dict[str, float]:
    """Images/s and fresh pages a forward, in this process."""
    if held:
        hold_memory()
    model, x, seconds = create_model(NAME), torch.randn(BATCH, 3, 224, 224), []
    for _ in range(2):
        model(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(REPEATS):
        began = time.perf_counter()
        model(x)
        seconds.append(time.perf_counter() - began)
    pages = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / REPEATS
    return {"throughput_img_s": BATCH / statistics.median(seconds), "pages": pages}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--once", choices=("default", "held"), help="measure in this process and print it")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once == "held")))
        sys.exit()
    found: dict[str, list[dict[str, float]]] = {"default": [], "held": []}
    for _ in range(args.processes):
        for name, rows in found.items():                # in turn, so that the machine's drift spreads evenly
            rows.append(json.loads(subprocess.run([sys.executable, __file__, "--once", name], capture_output=True,
                                                  text=True, check=True).stdout))
    write_lines(RESULTS, [{"model": f"{NAME}, {'freed memory held' if name == 'held' else 'allocator as it is'}",
                           "throughput_img_s": statistics.median(r["throughput_img_s"] for r in rows),
                           "conditions": {**conditions(torch.device("cpu"), "float32", BATCH, REPEATS),
                                          "timing": "a process each", "draws": [r["throughput_img_s"] for r in rows],
                                          "pages": [r["pages"] for r in rows]}}
                          for name, rows in found.items()])
