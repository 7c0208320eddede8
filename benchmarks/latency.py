"""How well the latency table predicts: 20 random plans of DeiT-Ti, predicted against measured as whole deployed models.

    python benchmarks/latency.py [--runtime torch] [--batch-size 32] [--quick]

Random weights; heads and neurons at random in every block, and in a third of the plans each: tokens as they are,
selected in blocks 3, 6 and 9, or merged. The four whole models that the table's scale is fitted on are timed again in
turn with the twenty: as much slower as they are by then, the machine is, and the prediction with it (`drift`). One row
a model and one of the whole go to benchmarks/results/latency.jsonl, in place of those of the same runtime and batch
size. Run it with nothing else running.
"""
import argparse
import dataclasses
import random
import statistics
import time
from pathlib import Path

import torch

from vitlab.criteria.planning import prune_and_merge
from vitlab.exporting.running import WAYS, way_of
from vitlab.measure.latency import measure_table, whole_models
from vitlab.measure.throughput import conditions, measure
from vitlab.models import compress, deploy, shape_of
from vitlab.models.create import create_model
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import SELECT_IN, counts_of, gmacs
from vitlab.plan.rules import Select
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import read_lines, write_lines
from vitlab.runtime.results import ResultRow, format_table

NAME, DTYPE, MODELS = "deit_tiny_patch16_224", "float32", 20
KINDS = ("whole", "select", "merge")


def random_plan(shape: ViTShape, kind: str, seed: int) -> CompressionPlan:
    """Any number of heads, an eighth to all of the neurons, a keep rate of 0.5 to 0.9."""
    chance, entering = random.Random(seed), shape.num_patches
    plan = CompressionPlan.empty(shape)
    if kind == "merge":
        scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(seed)) + 0.1
        plan = prune_and_merge(scores, shape, keep_rate=chance.uniform(0.5, 0.9))
    blocks = []
    for index, block in enumerate(plan.blocks):
        rule = block.tokens
        if kind == "select" and index in SELECT_IN:
            rule = Select(kept=int(entering * chance.uniform(0.5, 0.9)))
            entering = rule.kept + 1
        heads = chance.sample(range(shape.num_heads), chance.randint(1, shape.num_heads))
        neurons = chance.sample(range(shape.num_neurons), chance.randint(shape.num_neurons // 8, shape.num_neurons))
        blocks.append(BlockPlan(heads=tuple(sorted(heads)), neurons=tuple(sorted(neurons)), tokens=rule))
    return dataclasses.replace(plan, blocks=tuple(blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three models, batch 2; writes nothing")
    parser.add_argument("--runtime", default="torch", choices=WAYS)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    quick, way = args.quick, way_of(args.runtime)
    device = torch.device("cuda" if torch.cuda.is_available() and way.name in ("torch", "compiled") else "cpu")
    batch, repeats, rounds, count = (2, 2, 2, 3) if quick else (args.batch_size, 5, 11, MODELS)
    dense = create_model(NAME)
    shape = shape_of(dense)
    plans = {f"{KINDS[i % 3]} {i}": random_plan(shape, KINDS[i % 3], seed=i) for i in range(count)}
    began = time.perf_counter()
    table = measure_table(dense, batch_size=batch, dtype=DTYPE, device=device, repeats=repeats, way=way)
    table_s = time.perf_counter() - began
    whole = whole_models(dense, shape)
    speeds = list(measure({f"scale {i}": model for i, (_, model) in enumerate(whole)}
                          | {name: deploy(compress(dense, plan)) for name, plan in plans.items()}, batch_size=batch,
                          dtype=DTYPE, device=device, repeats=rounds, ways=(way,)).values())
    drift = statistics.median(speed.latency_ms / float(table.predict(counts_of(plan)))
                              for speed, (plan, _) in zip(speeds, whole))
    speeds = dict(zip(plans, speeds[len(whole):]))
    predicted = {name: drift * float(table.predict(counts_of(plan))) for name, plan in plans.items()}
    # above 0: the model is faster than was said
    errors = {name: 100 * (predicted[name] / speed.latency_ms - 1) for name, speed in speeds.items()}
    found = conditions(device, DTYPE, batch, rounds) | {"cpu": table.conditions["cpu"], "runtime": str(way),
                                                         "scale": table.scale, "table_s": table_s, "drift": drift}
    rows = [ResultRow(model=f"{NAME} {name}", gmacs=gmacs(plans[name]), latency_ms=speed.latency_ms, conditions=found
                      | {"predicted_ms": predicted[name], "error_pct": errors[name]})
            for name, speed in speeds.items()]
    median, largest = statistics.median(map(abs, errors.values())), max(map(abs, errors.values()))
    print(format_table(rows, ("model", "gmacs", "latency_ms")))
    print("error of the prediction in %:", ", ".join(f"{r.conditions['error_pct']:+.1f}" for r in rows))
    rows.append(ResultRow(model=f"{NAME} {len(rows)} plans", conditions=found | {
        "median_error_pct": median, "largest_error_pct": largest}))
    print(f"median {median:.1f} %, largest {largest:.1f} %; table in {table_s:.0f} s, scale {table.scale:.3f}, "
          f"drift {drift:.3f}")
    if not quick:
        path = Path(__file__).parent / "results" / "latency.jsonl"
        others = [row for row in read_lines(path)
                  if (row["conditions"]["runtime"].split()[0], row["conditions"]["batch_size"]) != (way.name, batch)]
        write_lines(path, others + list(map(dataclasses.asdict, rows)))


if __name__ == "__main__":
    main()
