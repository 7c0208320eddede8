"""What `vitlab tonight` gives on models that nothing was tuned to: its own choice against the best plan of one rule, by
budget, number of photographs and draw, measured on validation images that nothing else sees.

    python benchmarks/tonight_quality.py --weights FILE --model NAME --cal IMAGENET_CAL --val IMAGENET_VAL --run RUN \\
        [--photographs 1000 200] [--seeds 0 1 2] [--gmacs 0.75 0.6 0.45] [--device cuda] [--quick]

Photographs are drawn by seed, and divided as `tonight` divides them (70 % to fit on, 15 % to choose on). One row a
plan, in RUN/rows.jsonl as it is measured, which a run that was stopped goes on from; `--write RUN RUN` puts them beside
those in benchmarks/results/tonight_quality.jsonl. Of every plan there are the distance to the dense model and top-1
less the dense one's, with standard errors over images.
"""
import argparse
import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vitlab.measure.distance import outputs
from vitlab.measure.evaluate import each_divergence
from vitlab.models import deploy
from vitlab.plan import CompressionPlan, cost
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, append_line, read_lines, write_lines
from vitlab.runtime.uncertainty import standard_error
from vitlab.workbench.calibrating import CUT
from vitlab.workbench.offers import best_offer
from vitlab.workbench.steps import open_matching, open_model
from vitlab.workbench.survey import SINGLE, Survey

RESULTS = Path(__file__).parent / "results" / "tonight_quality.jsonl"
EVALUATIONS, FINALISTS, QUICK = 40, 2, 40


class Validation:
    """Distance to the dense model and right or not, of each validation image."""

    def __init__(self, model: nn.Module, folder: str, found, device: torch.device, limit: int | None) -> None:
        self.batches = [(x.to(device), y.to(device)) for x, y in
                        open_matching(folder, found).batches("held_out", model, batch_size=130, workers=0, limit=limit)]
        self.expected = [self.given(model, x) for x, _ in self.batches]
        self.dense = self.right(self.expected)

    @torch.inference_mode()
    def given(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return outputs(model, images, False)

    def right(self, given: list[torch.Tensor]) -> np.ndarray:
        return torch.cat([(g.argmax(dim=1) == y).double() for g, (_, y) in zip(given, self.batches)]).cpu().numpy()

    def __call__(self, model: nn.Module) -> dict[str, float]:
        given = [self.given(model, x) for x, _ in self.batches]
        each = torch.cat([each_divergence(g, e) for g, e in zip(given, self.expected)]).double().cpu().numpy()
        against = 100 * (self.right(given) - self.dense)
        return {"distill_loss": float(each.mean()), "distill_loss_se": standard_error(each),
                "against_dense": float(against.mean()), "against_dense_se": standard_error(against),
                "images": len(each)}


def drawn(folder: Path, count: int, seed: int, run: Path) -> Path:
    """A folder of links to so many of the photographs, drawn by seed."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if count >= len(files):
        return folder
    chosen = run / f"photographs-{count}-{seed}"
    chosen.mkdir(parents=True, exist_ok=True)
    for place in np.random.default_rng(seed).permutation(len(files))[:count]:
        link = chosen / files[place].name
        if not link.exists():
            os.symlink(files[place].resolve(), link)
    return chosen


def parser_of(doc: str, gmacs: list[float]) -> argparse.ArgumentParser:
    """What benchmarks take that compare plans of a model on photographs, by seed and budget."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for option in ("--weights", "--model", "--cal", "--val"):
        parser.add_argument(option)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--write", nargs="+", type=Path, metavar="RUN",
                        help="only keep the rows of these runs with the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gmacs", type=float, nargs="+", default=gmacs)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few images and evaluations, to see that it runs")
    return parser


def main() -> None:
    parser = parser_of(__doc__, [0.75, 0.6, 0.45])
    parser.add_argument("--photographs", type=int, nargs="+", default=[1000, 200])
    args = parser.parse_args()
    if args.write:
        keep(RESULTS, args.write, ("model", "photographs", "gmacs_limit", "what", "seed"))
        return
    args.run.mkdir(parents=True, exist_ok=True)
    found, device, path = open_model(args.weights, model=args.model), torch.device(args.device), args.run / "rows.jsonl"
    found.model.to(device).eval()
    validation = Validation(found.model, args.val, found, device, QUICK if args.quick else None)
    done = {(row["photographs"], row["seed"], row["gmacs_limit"], row["what"]) for row in read_lines(path)}
    for count, seed in itertools.product(args.photographs, args.seeds):
        limits = [limit for limit in args.gmacs if (count, seed, limit, "tonight") not in done]
        if not limits:
            continue
        few, data = {"images": 8, "score_images": 16} if args.quick else {}, drawn(Path(args.cal), count, seed,
                                                                                   args.run)
        survey = Survey(found, data, args.run / f"survey-{count}-{seed}", report_images=256, **few,
                        config=RunConfig(seed=seed, device=args.device, workers=0, quiet=True))
        for limit in limits:
            began = time.perf_counter()
            for what, (plan, form) in compared(survey, limit, 4 if args.quick else EVALUATIONS):
                row = {"model": args.model, "photographs": count, "seed": seed, "gmacs_limit": limit, "what": what,
                       "form": form, "gmacs": cost.gmacs(plan), **validation(deploy(survey.in_form(form, plan))),
                       "device": args.device, "seconds": round(time.perf_counter() - began, 1),
                       "rule": plan.made_by.get("rule"), "evaluation": plan.made_by.get("evaluation"),
                       "plan": json.loads(plan.to_json())}
                append_line(path, row)
                print({k: v for k, v in row.items() if k != "plan"}, flush=True)


def compared(survey: Survey, limit: float, evaluations: int) -> Iterator[tuple[str, tuple[CompressionPlan, str]]]:
    """(what it is, (plan, form)): the best plan of one rule, as it is cut and in its best form, and what `tonight`
    takes."""
    offers = []
    for rule in SINGLE:
        with contextlib.suppress(InputError):
            offers.append(survey.offer(rule, survey.plan(rule, limit)))
    plans = [best_offer(offers, limit).plan] if offers else []
    if plans:
        yield "best single rule, as cut", (plans[0], CUT)
        yield "best single rule, in its best form", survey.best(plans)
    yield "tonight", survey.best([*plans, *survey.search("all together", limit, evaluations)[:FINALISTS]])


def keep(results: Path, runs: list[Path], names: tuple[str, ...]) -> None:
    """The rows of some runs, less their plans, in the place of those that these names say are the same."""
    kept = {tuple(row[name] for name in names): row for path in (results, *(run / "rows.jsonl" for run in runs))
            for row in read_lines(path)}
    write_lines(results, [{name: value for name, value in row.items() if name != "plan"}
                          for _, row in sorted(kept.items())])


if __name__ == "__main__":
    main()
