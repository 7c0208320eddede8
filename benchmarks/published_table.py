"""Prune and Merge on a real DeiT-tiny without fine-tuning: the published settings, and what each choice is worth.

    python benchmarks/published_table.py --weights deit_tiny_patch16_224.safetensors --calibration imagenet_cal
    --validation imagenet_val

Scores from 512 calibration images, rule `center`, prune 0.1, keep 0.7, 0.6 and 0.5; top-1 on the validation images,
whose dense figure stands in the first row. Published: reference boundary and weights, absolute value after summing a
batch of 64, median over several draws of the 512 images, since those scores depend on which images share a batch.
Rows go to benchmarks/results/published_table.jsonl.
"""
import argparse
import statistics
from pathlib import Path

from vitlab.criteria.planning import prune_and_merge
from vitlab.data import open_data
from vitlab.measure.capture import token_scores
from vitlab.measure.evaluate import evaluate
from vitlab.models import compress, deploy, shape_of
from vitlab.models.checkpoint import versions
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.runtime.results import ResultRow, format_table, write_rows

KEEP_RATES = (0.7, 0.6, 0.5)
# (absolute, batch size, boundary, weights); the first is the published form
CHOICES = (("batch", 64, "reference", "reference"), ("batch", 8, "reference", "reference"),
           ("image", 64, "reference", "reference"), ("image", 64, "grid", "reference"), ("image", 64, "grid", "score"),
           ("image", 64, "grid", "uniform"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--draws", type=int, default=5, help="draws of the 512 images")
    parser.add_argument("--published", action="store_true", help="the published form alone, into "
                                                                 "results/published_form.jsonl")
    parser.add_argument("--crop-pct", type=float, default=224 / 227, help="the validation images are 227 wide")
    parser.add_argument("--bf16", action="store_true", help="evaluate in bf16: quicker, about half a point of noise")
    args = parser.parse_args()
    dense = create_model("deit_tiny_patch16_224", weights=args.weights)
    shape, calibration = shape_of(dense), open_data(args.calibration)
    held = list(open_data(args.validation).batches("val", dense, batch_size=50, crop_pct=args.crop_pct))    # read once
    accuracy = evaluate(dense, held, amp=args.bf16, progress=False)
    rows = [ResultRow(model="dense", dataset="imagenet_val", split="val", top1_pct=accuracy.top1_pct,
                      gmacs=gmacs(CompressionPlan.empty(shape)),
                      conditions={"images": accuracy.images, "versions": versions()})]
    scores = {}
    for absolute, batch, boundary, weights in CHOICES[:1] if args.published else CHOICES:
        tops: dict[float, list[float]] = {k: [] for k in KEEP_RATES}
        for draw in range(args.draws):
            key = (absolute, batch, draw)
            if key not in scores:
                images = calibration.batches("train", dense, batch_size=batch, limit=512, seed=draw)
                scores[key] = token_scores(dense, images, absolute=absolute, progress=False)
            for keep in KEEP_RATES:
                plan = prune_and_merge(scores[key], shape, keep_rate=keep, boundary=boundary, weights=weights)
                tops[keep].append(evaluate(deploy(compress(dense, plan)), held, amp=args.bf16,
                                           progress=False).top1_pct)
        for keep in KEEP_RATES:
            name = f"{absolute} {batch}, {boundary} boundary, {weights} weights, keep {keep}"
            plan = prune_and_merge(scores[key], shape, keep_rate=keep, boundary=boundary, weights=weights)
            rows.append(ResultRow(model=name, dataset="imagenet_val", split="val",
                                  top1_pct=statistics.median(tops[keep]), gmacs=gmacs(plan),
                                  conditions={"draws": tops[keep], "gmacs_published": gmacs(plan, "published"),
                                                                 "dtype": "bfloat16" if args.bf16 else "float32"}))
            print(f"{name}: median {rows[-1].top1_pct:.2f}, range {min(tops[keep]):.2f} to {max(tops[keep]):.2f}",
                  flush=True)
    print(format_table(rows, ("model", "top1_pct", "gmacs")))
    write_rows(Path(__file__).parent / "results" / ("published_form.jsonl" if args.published
                                                    else "published_table.jsonl"), rows)


if __name__ == "__main__":
    main()
