"""Real weights, no fine-tuning: token selection, and neurons cut by HSIC, each alone (methods B2, B3), and a searched
plan.

    python benchmarks/mdc_table.py --weights deit_tiny_patch16_224.safetensors --cal IMAGENET_CAL --val IMAGENET_VAL

Scores are from 512 images of CAL's train split, top-1 from VAL's held-out split in float32. The search has 60
evaluations on 300 images of CAL's train split, by the distance to the dense output. "published" GMACs are by the count
of arXiv 2201.00043 (cost.mdc_macs). Rows go to benchmarks/results/mdc_table.jsonl.
"""
import argparse
from pathlib import Path

from vitlab.plan import CompressionPlan
from vitlab.plan.cost import counts_of, mdc_macs
from vitlab.runtime.config import RunConfig
from vitlab.runtime.results import format_table, write_rows
from vitlab.search.strategies import Settings
from vitlab.workbench import cutting, scoring, searching, steps

NAME, CROP = "deit_tiny_patch16_224", 224 / 227         # the validation images are centre crops of 227 already
RHOS, NEURON_RATIOS, GMACS = (0.15, 0.20, 0.25, 0.30, 0.35), (0.20, 0.35), 0.75


def published_gmacs(plan: CompressionPlan, rho: float) -> float:
    counts = counts_of(plan)
    return float(mdc_macs(plan.shape, counts.heads, counts.neurons, rho)) / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--cal", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--run", required=True, type=Path, help="folder for scores and checkpoints")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    dense = steps.open_model(args.weights, model=NAME)
    scores = scoring.score_units(dense, args.cal, args.run / scoring.UNIT_SCORES,
                                 config=RunConfig(workers=args.workers))
    cuts = {f"selection, rho {rho}": {"rho": rho} for rho in RHOS}
    cuts |= {f"neurons, {ratio:.0%} cut by HSIC": {"neuron_ratio": ratio} for ratio in NEURON_RATIOS}
    rows = [steps.evaluate(dense, args.val, name="dense", crop=CROP, config=RunConfig(workers=args.workers))]
    rows[0].conditions["published_gmacs"] = published_gmacs(dense.plan, 0)
    for name, cut in cuts.items():
        small = cutting.prune_units(dense, scores, args.run / "cut", **cut)
        rows.append(steps.evaluate(small, args.val, name=name, crop=CROP, config=RunConfig(workers=args.workers)))
        rows[-1].conditions["published_gmacs"] = published_gmacs(small.plan, cut.get("rho", 0))
        print(format_table(rows, ("model", "top1_pct", "gmacs", "params_m")), flush=True)
    study = searching.search(dense, args.cal, args.run / "search", gmacs=GMACS, tokens="select_per_stage",
                             metric="distill_loss", images=300, settings=Settings(evaluations=60),
                             config=RunConfig(workers=args.workers))
    plan = CompressionPlan.load(study.folder / searching.PLAN)
    small = cutting.apply_plan(dense, plan, args.run / "cut")
    rows.append(steps.evaluate(small, args.val, name="heads, neurons and tokens, searched", crop=CROP,
                               config=RunConfig(workers=args.workers)))
    write_rows(Path(__file__).parent / "results" / "mdc_table.jsonl", rows)
