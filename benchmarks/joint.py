"""CIFAR-10 at 40 % fewer MACs: one search for each single dimension and for the joint plans, then the same fine-tuning
for all.

    vitlab pretrain --model vit_micro_patch4_32 --data CIFAR10 --recipe cifar10 --out RUN/dense
    python benchmarks/joint.py --data CIFAR10 --run RUN

Every plan is found by the same search (60 evaluations on 1,000 images of train, the distance to the dense model's
output), fine-tuned by recipe cifar10_pm, two epochs of 25,000 images, and measured on the test split. Rows go to
benchmarks/results/joint.jsonl. A killed run goes on.
"""
import argparse
from pathlib import Path

from vitlab.runtime.config import RunConfig
from vitlab.runtime.results import format_table, read_rows, write_rows
from vitlab.search.strategies import Settings
from vitlab.training.recipes import recipe
from vitlab.workbench import cutting, searching, steps, training

MACS_RATIO, EVALUATIONS, EPOCHS, IMAGES = 0.6, 60, 2, 25_000
SPACES = {                                              # name: (units, tokens)
    "tokens alone, Prune and Merge": ((), "merge"),
    "tokens alone, selection": ((), "select_per_stage"),
    "heads and neurons alone": (("neurons", "heads"), "none"),
    "joint, selection": (("neurons", "heads"), "select_per_stage"),
    "joint, Prune and Merge": (("neurons", "heads"), "merge"),
}


def folder(run: Path, name: str) -> Path:
    return run / name.replace(", ", "-").replace(" ", "_")


def one(run: Path, name: str, data: str, workers: int) -> None:
    """Search, cut, fine-tune."""
    units, tokens = SPACES[name]
    dense, place = steps.open_model(run / "dense"), folder(run, name)
    study = searching.search(dense, data, place / "study", macs_ratio=MACS_RATIO, units=units, tokens=tokens,
                             metric="distill_loss", settings=Settings(evaluations=EVALUATIONS),
                             config=RunConfig(workers=0))
    print(name, study.best.index, study.best.value, study.best.measures, flush=True)
    plan = place / "study" / searching.PLAN
    cutting.prune_plan(dense, plan, place / "pruned")
    training.finetune(dense, data, place / "finetuned", teacher=dense, plan=plan,
                      recipe=recipe("cifar10_pm").replace(epochs=EPOCHS), images=IMAGES,
                      config=RunConfig(workers=workers))


def table(run: Path, data: str, workers: int, no_speed: bool) -> None:
    dense = steps.open_model(run / "dense")
    results = run / "joint"
    (results / steps.RESULTS).unlink(missing_ok=True)
    options = {"out": results, "config": RunConfig(workers=workers, batch_size=250, quiet=True)}
    first, models = steps.evaluate(dense, data, name="dense", **options), {"dense": dense}
    for name in SPACES:
        for stage, words in (("pruned", "off the shelf"), ("finetuned", "fine-tuned")):
            models[f"{name}, {words}"] = steps.open_model(folder(run, name) / stage)
            steps.evaluate(models[f"{name}, {words}"], data, name=f"{name}, {words}", **options)
    if not no_speed:
        steps.throughput(models, repeats=15, out=results, like=first, config=RunConfig(batch_size=128))
    rows = read_rows(results / steps.RESULTS)
    print(format_table(rows))
    write_rows(Path(__file__).parent / "results" / "joint.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=list(SPACES), action="append", help="these plans alone, and no table")
    parser.add_argument("--no-speed", action="store_true", help="leave the timing for a quiet machine")
    parsed = parser.parse_args()
    for chosen in parsed.only or SPACES:
        one(parsed.run, chosen, parsed.data, parsed.workers)
    if not parsed.only:
        table(parsed.run, parsed.data, parsed.workers, parsed.no_speed)
