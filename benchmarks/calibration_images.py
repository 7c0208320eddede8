"""How many images does a refit take? The distance to the dense model on images apart, against the number of images
refitted on.

    python benchmarks/calibration_images.py --weights FILE --model NAME --cal IMAGENET_CAL --val IMAGENET_VAL --run RUN
    [--gmacs X ...] [--quick]

One plan a budget, the same share of heads, neurons and tokens cut in every block (units by elimination on 512 images),
as no search is what is measured here. Each is refitted with a fixed ridge and with one chosen for each layer, on the
first n images of a draw, by which class tokens are weighed too, and measured on VAL, which nothing else sees. Rows go
to benchmarks/results/calibration_images.jsonl as they are made; a run that was stopped goes on. At its end all rows are
drawn to docs/calibration_images.png.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from off_the_shelf import CROP

from vitlab.criteria.compensation import RIDGE
from vitlab.measure.distance import outputs
from vitlab.measure.evaluate import each_divergence
from vitlab.measure.moments import fisher
from vitlab.measure.units import unit_scores
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import cost
from vitlab.plots.base import legend_above, look, new_axes, save_figure
from vitlab.runtime.files import InputError, append_line, read_lines
from vitlab.runtime.uncertainty import standard_error
from vitlab.search import Budget, SearchSpace
from vitlab.search.sampling import Problem, uniform_policies
from vitlab.training.compensate import compensate
from vitlab.workbench import steps

GMACS, IMAGES, SCORED = (0.75, 0.60, 0.45), (0, 50, 100, 200, 480), 512
RIDGES = {"fixed": RIDGE, "chosen": None}
RESULTS = Path(__file__).parent / "results" / "calibration_images.jsonl"
DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "model", "cal", "val"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--gmacs", type=float, nargs="+", default=GMACS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=325, help="of VAL (default: 325)")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    gmacs, counts, scored, images = args.gmacs, IMAGES, SCORED, args.images
    if args.quick:
        gmacs, counts, scored, images = (0.75,), (0, 8), 16, 8
    path = args.run / "rows.jsonl" if args.quick else RESULTS
    args.run.mkdir(parents=True, exist_ok=True)
    dense = steps.open_model(args.weights, model=args.model)
    model = dense.model.eval()
    known = {(r["model"], r["gmacs_limit"], r["ridge"], r["refitted_on"], r["seed"]) for r in read_lines(path)}
    data = steps.open_matching(args.cal, dense, labels=False)
    drawn = list(data.batches("train", model, limit=scored + max(counts), seed=args.seed, workers=1, batch_size=50))
    all_images = torch.cat([x for x, _ in drawn])
    if len(all_images) < scored + max(counts):
        raise InputError(f"{args.cal}: {len(all_images)} images; {scored} to rank units and {max(counts)} to refit on "
                         f"are needed")
    fit = [(x, None) for x in all_images[scored:].split(50)]
    units = unit_scores(model, [(x, None) for x in all_images[:scored].split(50)], criterion="reconstruction",
                        progress=False)
    val = [x for x,
           _ in steps.open_matching(args.val, dense).batches("held_out", model, crop_pct=CROP, workers=1, limit=images)]
    with torch.inference_mode():
        expected = [outputs(model, x, False) for x in val]
    space = SearchSpace(shape=shape_of(model), units=("heads", "neurons"), tokens="match_per_stage",
                        max_ratio=0.75, read_out=True)
    for limit in gmacs:
        policy = uniform_policies(Problem(space, Budget.of(space, limit)), 1, np.random.default_rng(0))[0]
        plan = space.plan(policy, heads=units.heads, neurons=units.neurons)
        for count in counts:
            for name, ridge in RIDGES.items():
                name = name if count else "none"
                if (args.model, limit, name, count, args.seed) in known:
                    continue
                batches = [(x[:max(0, count - 50 * i)], None) for i, (x, _) in enumerate(fit) if 50 * i < count]
                settings = {"ridge": ridge, "costs": fisher(model, batches, seed=args.seed, progress=False),
                            "progress": False}
                small = deploy(compensate(model, plan, batches, **settings) if count else compress(model, plan))
                with torch.inference_mode():
                    distances = torch.cat([each_divergence(outputs(small, x, False), e) for x,
                                           e in zip(val, expected)]).tolist()
                row = {"model": args.model, "gmacs_limit": limit, "gmacs": cost.gmacs(plan), "ridge": name,
                       "refitted_on": count, "seed": args.seed, "distill_loss": float(np.mean(distances)),
                       "distill_loss_se": standard_error(distances), "images": len(distances)}
                known.add((args.model, limit, name, count, args.seed))
                append_line(path, row)
                print(row, flush=True)
    if not args.quick:
        draw([row for row in read_lines(path) if row["seed"] == args.seed])


def draw(rows: list[dict], folder: Path = DOCS) -> None:
    """calibration_images.png: a panel a model, a line a budget and way to choose the ridge, with standard errors."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = new_axes(1, len(models), 4.5, 3.6)
    budgets, lines = sorted({row["gmacs_limit"] for row in rows}, reverse=True), {}
    for axis, model in zip(axes[0], models):
        own = [row for row in rows if row["model"] == model]
        counts = sorted({row["refitted_on"] for row in own})
        for number, gmacs in enumerate(budgets):
            for ridge, style in zip(RIDGES, (":", "-")):
                line = sorted((r["refitted_on"], r["distill_loss"], r["distill_loss_se"]) for r in own
                              if r["gmacs_limit"] == gmacs and r["ridge"] in (ridge, "none"))
                if not line:
                    continue
                images, distances, errors = zip(*line)
                lines[f"{gmacs:g} GMACs, ridge {ridge}"] = axis.errorbar(
                    [counts.index(n) for n in images], distances, errors, capsize=2, linestyle=style, **look(number))
        axis.set_xticks(range(len(counts)), map(str, counts))
        axis.set(title=model, xlabel="images refitted on", ylabel="distance to dense (nats)", yscale="log")
    legend_above(figure, list(lines.values()), list(lines))
    save_figure(figure, folder, "calibration_images",
                f"Mean KL and its standard error over {rows[0]['images']} validation images; 0: as it is cut")


if __name__ == "__main__":
    main()
