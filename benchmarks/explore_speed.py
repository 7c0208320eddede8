"""How long a slider's move takes in the token map, in the kernel: from the new keep rate to both pictures as PNG.

    python benchmarks/explore_speed.py --weights deit_tiny_patch16_224.safetensors

DeiT-Ti on the CPU, random token scores: the time does not depend on them beyond the counts. Each move is to a keep rate
not seen before, so that nothing is taken from a cache. Rows, a rule each, go to benchmarks/results/explore_speed.jsonl
(replaced).
"""
import argparse
import statistics
import time
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images

from vitlab.measure.throughput import conditions
from vitlab.models import shape_of
from vitlab.models.create import create_model
from vitlab.runtime.results import ResultRow, write_rows
from vitlab.workbench.explore.token_map import token_map

MODEL, MOVES = "deit_tiny_patch16_224", 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    model = create_model(MODEL, weights=parser.parse_args().weights)
    shape = shape_of(model)
    scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.1
    explorer = token_map(model, {"china": load_sample_images().images[0] / 255}, scores)
    rows = []
    for rule in explorer.rule.options:
        explorer.rule.value = rule
        times = []
        for move in range(MOVES):
            began = time.perf_counter()
            explorer.keep_rate.value = 0.3 + 0.01 * move
            times.append(1000 * (time.perf_counter() - began))
        rows.append(ResultRow(model=f"{MODEL} {rule}", latency_ms=statistics.median(times),
                              conditions=conditions(torch.device("cpu"), "float32", 1, MOVES)
                              | {"timing": "median of slider moves", "slowest_ms": max(times)}))
        print(f"{rule}: {statistics.median(times):.0f} ms, slowest {max(times):.0f} ms")
    write_rows(Path(__file__).parent / "results" / "explore_speed.jsonl", rows)


if __name__ == "__main__":
    main()
