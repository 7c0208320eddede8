"""What each part of `vitlab tonight` costs, by the size of the model: seconds and peak memory, beside the code of
before.

    python benchmarks/tonight_cost.py [--models Ti S B L] [--before CHECKOUT] [--images 16] [--limit 300] [--quick]

Random weights and images: what is measured does not depend on them. Each part runs in a process of its own, that of
CHECKOUT (an older checkout of this repository) right after it, so that both have the machine as it is; what takes
longer than --limit seconds is ended and stands as "over". Peak memory is the process's, with the model and everything
imported. Rows go to benchmarks/results/tonight_cost.jsonl as they are measured; what is there is not measured again.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

MODELS = {"Ti": "deit_tiny_patch16_224", "S": "deit_small_patch16_224", "B": "vit_base_patch16_224",
          "L": "vit_large_patch16_224"}
RESULTS = Path(__file__).parent / "results" / "tonight_cost.jsonl"
CUT = 0.7                                       # of neurons that stay in the refitted plan; one head of each block goes


def _model(name: str) -> tuple:
    import timm

    from vitlab.models import shape_of
    from vitlab.workbench.steps import pick_device
    pick_device("cpu")                          # what each code does with freed memory is its own
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    return model, shape_of(model)


def _batches(count: int) -> list:
    return [(torch.randn(min(16, count - done), 3, 224, 224), torch.zeros(min(16, count - done), dtype=torch.long))
            for done in range(0, count, 16)]


def _each_moments(model: torch.nn.Module, batches: list) -> Iterable:
    """(layer, moments) of every layer, by whichever way this code has."""
    try:
        from vitlab.measure.moments import each_moments
        return each_moments(model, batches)
    except ImportError:
        from vitlab.training.compensate import KINDS, gather_moments
        return gather_moments(model, batches,
                              [(index, kind) for index in range(len(model.blocks)) for kind in KINDS]).items()


def _plan(model: torch.nn.Module, shape):
    from vitlab.plan import BlockPlan, CompressionPlan
    kept = {"heads": tuple(range(shape.num_heads - 1)), "neurons": tuple(range(int(shape.num_neurons * CUT)))}
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(**kept) for _ in range(shape.depth)))


def forward(name: str, images: int) -> float:
    """One pass of the dense model."""
    model, _ = _model(name)
    batches = _batches(images)
    with torch.inference_mode():
        model(batches[0][0])
        began = time.perf_counter()
        for x, _ in batches:
            model(x)
    return time.perf_counter() - began


def moments(name: str, images: int) -> float:
    """What goes into all layers that mix heads or neurons, of all images."""
    import vitlab.training.compensate  # noqa: F401 - its time is not counted
    model, _ = _model(name)
    batches, began = _batches(images), time.perf_counter()
    for _ in _each_moments(model, batches):
        pass
    return time.perf_counter() - began


def elimination(name: str, images: int) -> float:
    """The order in which all heads and neurons go."""
    from vitlab.criteria.compensation import elimination_order
    model, _ = _model(name)
    found = list(_each_moments(model, _batches(min(images, 16))))
    began = time.perf_counter()
    for (index, kind), own in found:
        block = model.blocks[index]
        linear, width = (block.attn.proj, block.attn.head_dim) if kind == "heads" else (block.mlp.fc2, 1)
        elimination_order(linear.weight.detach(), own, width)
    return time.perf_counter() - began


def refit(name: str, images: int) -> float:
    """Everything cut and refitted, a head and 30 % of the neurons of each block."""
    from vitlab.training.compensate import compensate
    model, shape = _model(name)
    batches, plan, began = _batches(images), _plan(model, shape), time.perf_counter()
    compensate(model, plan, batches, progress=False)
    return time.perf_counter() - began


def proposal(name: str, images: int) -> float:
    """One proposal of a search over heads, neurons and tokens, after 30 evaluations."""
    from vitlab.search import Budget, SearchSpace
    from vitlab.search.sampling import Problem, random_policies
    from vitlab.search.strategies import Settings, propose
    _, shape = _model(name)
    space = SearchSpace(shape=shape, tokens="match_per_stage", max_ratio=0.75, read_out=True)
    budget = Budget.of(space, 0.6 * float(space.gmacs(np.zeros((1, space.size)))[0]), tolerance=0.05)
    problem, rng = Problem(space, budget), np.random.default_rng(0)
    policies = random_policies(problem, 30, rng)
    values = -(policies ** 2).sum(axis=1) + 0.1 * rng.normal(size=len(policies))
    seconds = []
    for seed in range(3):
        began = time.perf_counter()
        propose("gp", problem, policies, values, Settings(), 1, seed)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def cuts(name: str, images: int) -> float:
    """Neurons of one block cut and measured, the mean over all blocks in turn."""
    from vitlab.measure.objective import PlanObjective
    from vitlab.plan import BlockPlan, CompressionPlan
    model, shape = _model(name)
    objective = PlanObjective(model, _batches(images))
    plans = [CompressionPlan(shape=shape,
                             blocks=tuple(BlockPlan(neurons=tuple(range(shape.num_neurons // 2)) if i == block
                                                    else None)
                                                       for i in range(shape.depth))) for block in range(shape.depth)]
    began = time.perf_counter()
    for plan in plans:
        objective(plan)
    return (time.perf_counter() - began) / len(plans)


PARTS = {part.__name__: part for part in (forward, moments, elimination, refit, proposal, cuts)}


def measured(part: str, model: str, images: int, code: Path, limit: float) -> dict:
    """In a process of its own, of the code in a folder."""
    command = [sys.executable, __file__, "--one", part, model, str(images)]
    env = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryFile("w+") as out:
        try:
            done = subprocess.run(command, env=env, cwd=code, stdout=out, stderr=subprocess.PIPE, text=True,
                                  timeout=limit)
        except subprocess.TimeoutExpired:
            return {"over_s": limit}
        out.seek(0)
        text = out.read()
    return json.loads(text.splitlines()[-1]) if not done.returncode else {
        "error": done.stderr.strip().splitlines()[-1][:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--before", type=Path, help="an older checkout, measured beside")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--limit", type=float, default=300, help="seconds that a part may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="the smallest model and two images, rows nowhere")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        part, model, images = args.one
        seconds = PARTS[part](model, int(images))
        print(json.dumps({"seconds": seconds,
                          "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))
        return
    from vitlab.runtime.files import append_line, read_lines
    known = {(row["model"], row["part"], row["code"]) for row in ([] if args.quick else read_lines(args.out))}
    here = Path(__file__).resolve().parents[1]
    for size in args.models[:1] if args.quick else args.models:
        for part in args.parts:
            for code, folder in (("now", here), *((("before", args.before.resolve()),) if args.before else ())):
                if (MODELS[size], part, code) in known:
                    continue
                images = 2 if args.quick else args.images
                row = {"model": MODELS[size], "part": part, "code": code, "images": images,
                       "threads": torch.get_num_threads(), **measured(part, MODELS[size], images, folder, args.limit)}
                print(row, flush=True)
                if not args.quick:
                    append_line(args.out, row)


if __name__ == "__main__":
    main()
