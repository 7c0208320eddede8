"""Where the time of a compressed model goes, operation by operation, in ONNX Runtime: products of matrices, and all
else (softmax, norms, GELU, and what merging adds).

    python benchmarks/roofline.py [--model NAME] [--macs-ratio 0.6] [--repeats 12] [--quick]

The rules and plans of benchmarks/runtimes.py, in turn. A row per rule, batch and number of threads: operations a run,
and by ONNX Runtime's own profile milliseconds and MB of activations read and written, of products and of the others;
medians over rounds, of times beside the dense model's of the same round, too.
Rows go to benchmarks/results/roofline.jsonl (replaced). Run it with nothing else running.
"""
import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from runtimes import BATCHES, plans

from vitlab.exporting.export import exported_form
from vitlab.exporting.runtimes import INPUT, RUNTIMES, traced
from vitlab.models import compress, deploy, shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.runtime.files import write_lines

KINDS = ("products", "others")
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "Conv", "FusedGemm")
SIZES = ("activation_size", "output_size")      # weights are packed beforehand and not counted by the profile


class Profiled:
    """A model's file, opened so that each run leaves a profile."""

    def __init__(self, file: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = threads, True
        options.add_session_config_entry("session.force_spinning_stop", "1")    # the next has the cores
        options.profile_file_prefix = f"{file.with_suffix('')}-{threads}"
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.runs = 0

    def run(self, images: np.ndarray) -> None:
        self.session.run(None, {INPUT: images})
        self.runs += 1

    def told(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Milliseconds of products and of others of each run but the first, which prepares (R, 2), and what a run is:
        operations, and the MB of each kind."""
        events = json.loads(Path(self.session.end_profiling()).read_text())
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        each = len(nodes) // self.runs
        ms, mb = np.zeros((self.runs, len(KINDS))), np.zeros(len(KINDS))
        for place, node in enumerate(nodes):
            kind = int(node["args"]["op_name"] not in PRODUCTS)
            ms[place // each, kind] += node["dur"] / 1e3
            mb[kind] += sum(int(node["args"][size]) for size in SIZES) / 1e6 / self.runs
        return ms[1:], {"operations": each} | {f"{kind}_mb": float(m) for kind, m in zip(KINDS, mb)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--macs-ratio", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="a small model, batch 2, one round; writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.model, args.repeats = "vit_micro_patch4_32", 1
    model, threads = create_model(args.model), sorted({1, torch.get_num_threads()})
    shape, rows = shape_of(model), []
    whole = CompressionPlan.empty(shape)
    made = {"dense": whole, **plans(shape, args.macs_ratio * gmacs(whole))}
    example = torch.zeros(2, shape.in_chans, *shape.img_size)
    with tempfile.TemporaryDirectory() as folder:
        files = {rule: Path(folder) / f"{place}.onnx" for place, rule in enumerate(made)}
        for rule, plan in made.items():
            RUNTIMES["onnx"].write(traced(exported_form(deploy(compress(model, plan))), example), files[rule])
        for batch, count in itertools.product((2,) if args.quick else BATCHES, threads):
            images = np.random.default_rng(0).standard_normal((batch, *example.shape[1:]), dtype=np.float32)
            opened = {rule: Profiled(file, count) for rule, file in files.items()}
            for _, one in itertools.product(range(args.repeats + 1), opened.values()):
                one.run(images)
            told = {rule: one.told() for rule, one in opened.items()}
            base = told["dense"][0]
            for rule, (ms, about) in told.items():
                parts = {"products": (ms / base)[:, 0], "others": (ms / base)[:, 1], "time": ms.sum(1) / base.sum(1)}
                rows.append({"model": args.model, "rule": rule, "gmacs": gmacs(made[rule]), "batch_size": batch,
                             "threads": count, "runtime": f"onnxruntime {onnxruntime.__version__}",
                             "repeats": args.repeats, **about,
                             **{f"{kind}_ms": float(m) for kind, m in zip(KINDS, np.median(ms, axis=0))},
                             **{f"{name}_of_dense": float(np.median(ratio)) for name, ratio in parts.items()}})
                print(rows[-1], flush=True)
    if not args.quick:
        write_lines(Path(__file__).parent / "results" / "roofline.jsonl", rows)


if __name__ == "__main__":
    main()
