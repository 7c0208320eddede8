"""CIFAR-10 through the whole path: boundaries at equal MACs, then keep 0.7 and 0.6 off the shelf and fine-tuned.

    vitlab pretrain --model vit_micro_patch4_32 --data CIFAR10 --recipe cifar10 --out RUN/dense
    python benchmarks/cifar10.py --data CIFAR10 --run RUN

Boundaries are compared on a slice of train, by scores of another slice; the table is measured on the test split. Rows
go to benchmarks/results/boundaries.jsonl and cifar10.jsonl. Fine-tuning that was killed goes on where it stopped.
"""
import argparse
import statistics
from pathlib import Path

from vitlab.criteria.planning import prune_and_merge
from vitlab.data import open_data
from vitlab.measure.evaluate import evaluate
from vitlab.models import compress, deploy, shape_of
from vitlab.plan.cost import gmacs
from vitlab.runtime.config import RunConfig
from vitlab.runtime.results import ResultRow, format_table, read_rows, write_rows
from vitlab.workbench import cutting, scoring, steps, training

KEEP_RATES, SEEDS, SLICE = (0.7, 0.6, 0.5), (0, 1, 2), 2500
CHOICES = (("reference", "reference"), ("reference", "score"), ("grid", "reference"), ("grid", "score"),
           ("grid", "uniform"))


def write(name: str, rows: list[ResultRow]) -> None:
    write_rows(Path(__file__).parent / "results" / f"{name}.jsonl", rows)


def boundaries(args: argparse.Namespace) -> None:
    """Every choice of boundary and weights off the shelf, at equal MACs: the centers, and so the counts, are the
    same."""
    dense = steps.open_model(args.run / "dense")
    data, shape = open_data(args.data), shape_of(dense.model)
    held = list(data.batches("train", dense.model, limit=SLICE, seed=100, batch_size=250, workers=args.workers))
    rows, tops = [], {}
    for absolute in ("image", "batch"):
        for seed in SEEDS:
            scores = scoring.score_tokens(dense, args.data, args.run / f"scores-{absolute}-{seed}.safetensors",
                                          absolute=absolute,
                                          config=RunConfig(seed=seed, workers=args.workers, quiet=True))
            for choice in CHOICES:
                for keep in KEEP_RATES:
                    plan = prune_and_merge(scores, shape, keep_rate=keep, boundary=choice[0], weights=choice[1])
                    top = evaluate(deploy(compress(dense.model, plan)), held, progress=False).top1_pct
                    tops.setdefault((absolute, *choice, keep), []).append(top)
                    cost = gmacs(plan)
        for choice in CHOICES:
            for keep in KEEP_RATES:
                draws = tops[(absolute, *choice, keep)]
                rows.append(ResultRow(model=f"absolute per {absolute}, {choice[0]} boundary, {choice[1]} weights, keep "
                                            f"{keep}",
                                      dataset="cifar10", split=f"train slice of {SLICE}",
                                      top1_pct=statistics.median(draws), gmacs=cost,
                                      conditions={"draws": draws, "fine-tuned": False}))
                print(rows[-1].model, draws, flush=True)
    write("boundaries", rows)


def table(args: argparse.Namespace) -> None:
    """Dense, keep 0.7 and 0.6, off the shelf and fine-tuned, with the default boundary; speeds in one run."""
    dense, run = steps.open_model(args.run / "dense"), args.run
    (run / steps.RESULTS).unlink(missing_ok=True)
    options = {"out": run, "config": RunConfig(workers=args.workers, batch_size=250, quiet=True)}
    first = steps.evaluate(dense, args.data, name="dense", **options)
    scoring.score_tokens(dense, args.data, run / "scores.safetensors", config=RunConfig(workers=args.workers))
    models = {"dense": dense}
    for keep in KEEP_RATES[:2]:
        small = cutting.prune_tokens(dense, run / "scores.safetensors", run / f"pruned-{keep}", keep_rate=keep)
        models[f"keep {keep}, off the shelf"] = small
        steps.evaluate(small, args.data, name=f"keep {keep}, off the shelf", **options)
        training.finetune(run / f"pruned-{keep}", args.data, run / f"finetuned-{keep}", teacher=dense,
                          recipe="cifar10_pm", config=RunConfig(workers=args.workers))
        models[f"keep {keep}, fine-tuned"] = steps.open_model(run / f"finetuned-{keep}")
        steps.evaluate(models[f"keep {keep}, fine-tuned"], args.data, name=f"keep {keep}, fine-tuned", **options)
    if not args.no_speed:
        steps.throughput(models, repeats=15, out=run, like=first, config=RunConfig(batch_size=128))
    rows = read_rows(run / steps.RESULTS)
    print(format_table(rows))
    write("cifar10", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part", choices=("boundaries", "table"), help="one of the two (default: both)")
    parser.add_argument("--no-speed", action="store_true", help="leave the timing for a quiet machine")
    parsed = parser.parse_args()
    for part in (boundaries, table):
        if parsed.part in (None, part.__name__):
            part(parsed)
