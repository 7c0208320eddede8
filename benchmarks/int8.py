"""Does int8 come on top of a plan? Files of a dense and a compressed model in float32, bfloat16 and int8, in each
runtime: top-1, distance to the dense model in PyTorch, images a second and size.

    python benchmarks/int8.py --weights deit_tiny_patch16_224.safetensors --cal IMAGENET_CAL --val IMAGENET_VAL
        [--model NAME] [--macs-ratio 0.6] [--runtime onnxruntime openvino] [--images 1000] [--calibration 128] [--quick]

The compressed model merges by content and reads out; nothing is refitted. Ranges of int8 come from images of CAL's
train. Speeds are taken in turn in one run, the dense model in PyTorch the first; bfloat16 where the processor has it.
Rows go to benchmarks/results/int8.jsonl (replaced). --quick: 16 images and one round; it writes nothing.
"""
import argparse
import tempfile
from pathlib import Path

import torch
from off_the_shelf import CROP, NAME, measures

from vitlab.exporting.export import export
from vitlab.exporting.running import FILES, way_of
from vitlab.exporting.runtimes import RUNTIMES, Run
from vitlab.measure.evaluate import each_divergence
from vitlab.measure.throughput import EAGER, Way, conditions, measure
from vitlab.plan.cost import gmacs
from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow, format_table, write_rows
from vitlab.workbench import cutting, steps

BATCHES, DTYPES = (32, 1), ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--weights", "--cal", "--val"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--macs-ratio", type=float, default=0.6)
    parser.add_argument("--runtime", nargs="+", default=["onnxruntime", "openvino"], choices=FILES)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    images, ranges, repeats = (16, 8, 1) if args.quick else (args.images, args.calibration, 10)
    dense = steps.open_model(args.weights, model=args.model)
    with tempfile.TemporaryDirectory() as folder:
        found = {"dense": dense, "compressed": cutting.prune_match(dense, Path(folder) / "cut", read_out=True,
                                                                   macs_ratio=args.macs_ratio)}
        models = {name: steps.deployed(each) for name, each in found.items()}
        parts = steps.open_matching(args.cal, dense, labels=False).parts(0, score=ranges)
        seen = torch.cat([x for x, _ in steps.measured_batches(dense.model, parts, "score", 1)])
        val = list(steps.open_matching(args.val, dense).batches("held_out", dense.model, crop_pct=CROP, workers=1,
                                                                limit=images, batch_size=32))

        def outputs(run: Run) -> tuple[list[int], torch.Tensor]:
            """(right or not of each image, log-probabilities)."""
            given = torch.cat([torch.from_numpy(run(x.numpy())) for x, _ in val]).log_softmax(dim=1)
            return (given.argmax(dim=1) == torch.cat([y for _, y in val])).int().tolist(), given
        with torch.inference_mode():
            right, expected = outputs(lambda x: dense.model(torch.from_numpy(x)).numpy())
        files, made, ways = {}, {}, []
        for runtime in args.runtime:
            kind = RUNTIMES[FILES[runtime]]
            for dtype in DTYPES:
                try:
                    for name, each in found.items():
                        path = Path(folder) / f"{name}-{dtype}{kind.ending}"
                        export(each.model, path, images=seen[:5], int8=seen if dtype == "int8" else None)
                        run = kind.open(path, torch.get_num_threads(), "float32" if dtype == "int8" else dtype)
                        files[models[name], (runtime, dtype)] = run
                        own, given = outputs(run)
                        size = sum(path.with_name(path.name.removesuffix(kind.ending) + end).stat().st_size
                                   for end in (kind.ending, *kind.beside))
                        made[f"{name} ({runtime} {dtype})"] = measures(
                            own, right, each_divergence(given, expected).tolist()) | {"file_mb": size / 1e6}
                except InputError as error:
                    print(f"{runtime}, {dtype}: {error}")
                    continue
                ways.append(Way(f"{runtime} {dtype}", way_of(runtime).version,
                                lambda module, x, key=(runtime, dtype): lambda x: files[module, key](x.numpy())))
        rows = []
        for batch in BATCHES:
            speeds = measure(models, batch_size=batch, repeats=repeats, device="cpu", ways=(EAGER, *ways))
            for name, speed in speeds.items():
                more = made.get(name, {})
                kept = {k: v for k, v in more.items() if k in ("top1_pct", "top1_se", "distill_loss",
                                                               "distill_loss_se")}
                dtype = name.split()[-1].strip(")") if "(" in name else "float32"
                about = conditions(torch.device("cpu"), dtype, batch, repeats)
                rows.append(ResultRow(
                    model=f"{name}, batch {batch}", gmacs=gmacs(found[name.split()[0]].plan), **kept,
                    throughput_img_s=speed.throughput_img_s, ratio=speed.ratio, latency_ms=speed.latency_ms,
                    conditions={"speed": about | {"ratio_range": [speed.ratio_min, speed.ratio_max],
                                                  "runtime": speed.runtime},
                                **{k: v for k, v in more.items() if k not in kept}, "calibration": ranges}))
    print(format_table(rows, ("model", "top1_pct", "distill_loss", "throughput_img_s", "ratio", "latency_ms")))
    print("\n".join(f"{name}: {each['file_mb']:.1f} MB" for name, each in made.items()))
    if not args.quick:
        write_rows(Path(__file__).parent / "results" / "int8.jsonl", rows)


if __name__ == "__main__":
    main()
