"""How long explorers take in the kernel: a slider's move in the token map, from the new keep rate to both pictures as
PNG, and the first paint of each that runs a model, with the figure that stands for it where there are no widgets.

    python benchmarks/explore_speed.py [--weights deit_tiny_patch16_224.safetensors]

Moves: DeiT-Ti on the CPU, random token scores: the time does not depend on them beyond the counts. Each move is to a
keep rate not seen before, so that nothing is taken from a cache. First paints: of DeiT-Ti and ViT-B, random weights and
scores, a plan that cuts nothing. Rows go to benchmarks/results/explore_speed.jsonl (replaced). Run it with nothing else
running.
"""
import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import nn

from vitlab.criteria.units import UnitScores
from vitlab.measure.throughput import conditions
from vitlab.models import shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.runtime.results import ResultRow, write_rows
from vitlab.workbench.explore import plans, token_map, units
from vitlab.workbench.explore.base import Explorer

MODEL, LARGE, MOVES, PAINTS = "deit_tiny_patch16_224", "vit_base_patch16_224", 30, 5


def paints(model: nn.Module) -> dict[str, Callable[[], Explorer]]:
    """What opens each explorer of a model."""
    shape, draw = shape_of(model), torch.Generator().manual_seed(0)
    pictures = {"china": load_sample_images().images[0] / 255}
    scores = torch.rand(shape.depth, shape.num_patches, generator=draw) + 0.1
    of_units = UnitScores(heads=torch.rand(shape.depth, shape.num_heads, generator=draw),
                          neurons=torch.rand(shape.depth, shape.num_neurons, generator=draw), made_by={})
    plan = CompressionPlan.empty(shape)
    return {"token map": lambda: token_map.token_map(model, pictures, scores),
            "heads and neurons": lambda: units.units_map(model, of_units, plan, pictures),
            "plans": lambda: plans.plan_explorer({"nothing is cut": plan})}


def row(name: str, times: list[float]) -> ResultRow:
    """The median of times in ms."""
    print(f"{name}: {statistics.median(times):.0f} ms, slowest {max(times):.0f} ms", flush=True)
    return ResultRow(model=name, latency_ms=statistics.median(times), conditions=conditions(
        torch.device("cpu"), "float32", 1, len(times)) | {"timing": "median", "slowest_ms": max(times)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights")
    models = {MODEL: create_model(MODEL, weights=parser.parse_args().weights), LARGE: create_model(LARGE)}
    rows = []
    for name, model in models.items():
        for what, opened in paints(model).items():
            times = []
            for _ in range(PAINTS):
                began = time.perf_counter()
                explorer = opened()
                explorer._repr_mimebundle_()
                times.append(1000 * (time.perf_counter() - began))
            rows.append(row(f"{name} {what}, first paint", times))
    explorer = paints(models[MODEL])["token map"]()
    for rule in explorer.rule.options:
        explorer.rule.value = rule
        times = []
        for move in range(MOVES):
            began = time.perf_counter()
            explorer.keep_rate.value = 0.3 + 0.01 * move
            times.append(1000 * (time.perf_counter() - began))
        rows.append(row(f"{MODEL} {rule}, slider's move", times))
    write_rows(Path(__file__).parent / "results" / "explore_speed.jsonl", rows)


if __name__ == "__main__":
    main()
