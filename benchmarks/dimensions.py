"""What a dimension more gives a joint plan: whole sublayers, and widths of queries and keys, beside heads, neurons and
tokens merged by content.

    python benchmarks/dimensions.py --weights FILE --model NAME --cal IMAGENET_CAL --val IMAGENET_VAL --run RUN \\
        [--seeds 0 1 2] [--gmacs 0.75 0.6] [--evaluations 40] [--device cuda] [--quick]

Each cut alone is measured once, in the widest space, and its rows serve the others. Of every space and budget there are
two plans, the one that the curves say and the nearest of that and the search's best, both in their best form, with the
distance to the dense model and top-1 less the dense one's on validation images that nothing else sees. One row a plan,
in RUN/rows.jsonl as it is measured, which a run that was stopped goes on from; `--write RUN RUN` puts them beside those
in benchmarks/results/dimensions.jsonl.
"""
import dataclasses
import itertools
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tonight_quality import EVALUATIONS, FINALISTS, QUICK, Validation, keep, parser_of
from torch import Tensor

from vitlab.measure.moments import KINDS, each_moments, layers_of
from vitlab.models import deploy
from vitlab.plan import cost
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import append_line, read_lines
from vitlab.search import Budget
from vitlab.search.allocation import levels
from vitlab.search.sampling import Problem
from vitlab.search.sensitivity import better_nothing
from vitlab.workbench.forwards import moments_cost
from vitlab.workbench.gathered import LayerFiles
from vitlab.workbench.steps import open_model
from vitlab.workbench.survey import Survey

RESULTS, RULE = Path(__file__).parent / "results" / "dimensions.jsonl", "all together"
SPACES: dict[str, dict[str, Any]] = {
    "heads, neurons, tokens": {}, "and whole sublayers": {"sublayers": True}, "and widths of queries": {"widths": True},
    "and both": {"sublayers": True, "widths": True}}
WIDEST = "and both"


class Wider(Survey):
    """A survey in which the plans of all dimensions together may have more of them."""

    def __init__(self, *args: Any, space: str, widest: "Wider | None" = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.space, self.widest = space, widest

    @cached_property
    def moments(self) -> LayerFiles:
        kept, kinds = LayerFiles(self.folder / f"moments-{self.inputs}", self.place), (*KINDS, "widths")
        if len(kept) < len(layers_of(self.model, kinds)):
            made = each_moments(self.model, self.batches, kinds, amp=self.amp)
            for layer, moments in self.shown("moments", made, len(layers_of(self.model, kinds)),
                                             moments_cost(self.shape) * self.parts.roles["score"]):
                kept.keep(layer, moments)
        return kept

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        found = super().scores
        if not SPACES[self.space].get("sublayers"):
            return found
        return found | self._kept("replacements", lambda: {"nothing": better_nothing(self.objective, self.shape,
                                                                                     KINDS)})

    def _problem(self, rule: str, limit: float | None = None) -> Problem:
        space, budget = super()._problem(rule, limit)
        more = SPACES[self.space]
        space = dataclasses.replace(space, units=(*space.units, *("widths",) * more.get("widths", False)),
                                    sublayers=more.get("sublayers", False))
        return Problem(space, Budget.of(space, budget.limit, tolerance=budget.tolerance))

    def _name(self, rule: str) -> str:
        return f"{self.space.replace(' ', '-').replace(',', '')}-{super()._name(rule)}"

    def _known(self, rule: str) -> list[dict[str, Any]]:
        if self.widest is None:
            return super()._known(rule)
        space = self._problem(rule).space
        mine = {("", 0.0), *((name, ratio) for name, of in zip(space.names, levels(space)) for ratio in of)}
        return [row for row in self.widest.curves(rule) if (row["dimension"], row["ratio"]) in mine]


def main() -> None:
    parser = parser_of(__doc__, [0.75, 0.6])
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    args = parser.parse_args()
    if args.write:
        keep(RESULTS, args.write, ("model", "gmacs_limit", "space", "what", "seed"))
        return
    args.run.mkdir(parents=True, exist_ok=True)
    found, path = open_model(args.weights, model=args.model), args.run / "rows.jsonl"
    found.model.to(args.device).eval()
    validation = Validation(found.model, args.val, found, torch.device(args.device), QUICK if args.quick else None)
    done = {(row["seed"], row["space"], row["gmacs_limit"], row["what"]) for row in read_lines(path)}
    few = {"images": 8, "score_images": 16, "report_images": 8} if args.quick else {}
    for seed in args.seeds:
        common = {**few, "config": RunConfig(seed=seed, device=args.device, workers=0, quiet=True)}
        folder = args.run / f"survey-{seed}"
        widest = Wider(found, args.cal, folder, space=WIDEST, **common)
        surveys = {name: widest if name == WIDEST else Wider(found, args.cal, folder, space=name, widest=widest,
                                                             **common) for name in SPACES}
        for limit, (name, survey) in itertools.product(args.gmacs, surveys.items()):
            plans = []
            for what in ("from the curves", "searched"):
                if (seed, name, limit, what) in done:
                    continue
                began = time.perf_counter()
                plans = plans or [survey.plan(RULE, limit)]
                if what == "searched":
                    plans += survey.search(RULE, limit, 4 if args.quick else args.evaluations)[:FINALISTS]
                plan, form = survey.best(plans)
                row = {"model": args.model, "seed": seed, "space": name, "gmacs_limit": limit, "what": what,
                       "form": form, "gmacs": cost.gmacs(plan), **validation(deploy(survey.in_form(form, plan))),
                       "left_out": {kind: [i for i, b in enumerate(plan.blocks) if b.leaves_out(kind)]
                                    for kind in KINDS},
                       "widths": [b.qk_width for b in plan.blocks], "device": args.device,
                       "seconds": round(time.perf_counter() - began, 1), "plan": json.loads(plan.to_json())}
                append_line(path, row)
                print({k: v for k, v in row.items() if k != "plan"}, flush=True)


if __name__ == "__main__":
    main()
