"""How much of what a plan saves is saved time, where a model will run: every rule at one budget, beside the dense
model, each as PyTorch runs it, compiled, and as a file of ONNX Runtime and OpenVINO, in turn in one process.

    python benchmarks/runtimes.py [--model NAME] [--macs-ratio 0.6] [--runtime torch compiled onnxruntime openvino]
        [--repeats 7] [--quick]

Random weights and scores: speed does not depend on them beyond the counts. The first row of each batch is the dense
model in PyTorch; `of_best` of the others is the dense model's time in its own fastest runtime by theirs. Rows go to
benchmarks/results/runtimes.jsonl (replaced). Run it with nothing else running.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from vitlab.exporting.running import WAYS, way_of
from vitlab.measure.throughput import conditions, measure
from vitlab.models import compress, deploy, shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.shape import ViTShape
from vitlab.runtime.results import ResultRow, format_table, write_rows
from vitlab.search import Budget, SearchSpace
from vitlab.search.sampling import Problem, uniform_policies
from vitlab.workbench.cutting import least_ratio

BATCHES = (32, 1)
# rule: (units, tokens, whether the last block is read out) of its search space
RULES = {"merging by content": ((), "match", True), "selection": ((), "select", False),
         "Prune and Merge": ((), "merge", False), "shared updates": ((), "share", False),
         "heads and neurons": (("heads", "neurons"), "none", False),
         "all together": (("heads", "neurons"), "match", True)}


def plans(shape: ViTShape, limit: float) -> dict[str, CompressionPlan]:
    """Of every rule, the same ratio wherever it cuts, within so many GMACs."""
    draw = torch.Generator().manual_seed(0)
    scores = {"heads": torch.rand(shape.depth, shape.num_heads, generator=draw),
              "neurons": torch.rand(shape.depth, shape.num_neurons, generator=draw),
              "tokens": torch.rand(shape.depth, shape.num_patches, generator=draw) + 0.1}
    found = {}
    for rule, (units, tokens, read_out) in RULES.items():
        space = SearchSpace(shape=shape, units=units, tokens=tokens, max_ratio=0.9, read_out=read_out)
        if units:
            policy = uniform_policies(Problem(space, Budget.of(space, limit, tolerance=0.05)), 1,
                                      np.random.default_rng(0))[0]
        else:
            policy = np.full(space.size, least_ratio(space, limit, 400))
        found[rule] = space.plan(policy, **scores)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--macs-ratio", type=float, default=0.6)
    parser.add_argument("--runtime", nargs="+", default=["torch", "compiled", "onnxruntime", "openvino"], choices=WAYS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small model, batch 2, one round; writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.model, args.repeats = "vit_micro_patch4_32", 1
    dense = create_model(args.model)
    whole = CompressionPlan.empty(shape_of(dense))
    made = {"dense": whole, **plans(shape_of(dense), args.macs_ratio * gmacs(whole))}
    models = {rule: deploy(compress(dense, plan)) for rule, plan in made.items()}
    ways, rows = [way_of(name) for name in args.runtime], []
    for batch in (2,) if args.quick else BATCHES:
        speeds = measure(models, batch_size=batch, repeats=args.repeats, ways=ways)
        of = {key: key.removesuffix(")").split(" (") for key in speeds}             # rule, and runtime if not PyTorch
        fastest = max(speed.throughput_img_s for key, speed in speeds.items() if of[key][0] == "dense")
        for key, speed in speeds.items():
            rule = of[key][0]
            saved = gmacs(whole) / gmacs(made[rule])
            rows.append(ResultRow(
                model=f"{args.model} {rule}", gmacs=gmacs(made[rule]), throughput_img_s=speed.throughput_img_s,
                ratio=speed.ratio, latency_ms=speed.latency_ms,
                conditions=conditions(torch.device("cpu"), "float32", batch, args.repeats)
                | {"rule": rule, "runtime": speed.runtime, "mac_ratio": saved,
                   "of_best": speed.throughput_img_s / fastest, "ratio_range": [speed.ratio_min, speed.ratio_max]}))
        print(format_table(rows[-len(speeds):], ("model", "gmacs", "throughput_img_s", "latency_ms", "ratio")))
    if not args.quick:
        write_rows(Path(__file__).parent / "results" / "runtimes.jsonl", rows)


if __name__ == "__main__":
    main()
