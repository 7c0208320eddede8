"""A survey of a model on a data set, without labels: curves of every rule, plans and offers that follow, their models.

Each dimension of a rule is cut alone and measured once; from these curves `allocate` makes the plan of any budget, and
a search starts.
"""
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vitlab.measure.averaging import first_images
from vitlab.measure.objective import PlanObjective
from vitlab.models import checkpoint, compress, deploy
from vitlab.models.checkpoint import Checkpoint
from vitlab.plan import CompressionPlan, cost
from vitlab.runtime.files import InputError, append_line, read_lines, require, write_lines
from vitlab.search import Budget, SearchSpace, Study
from vitlab.search.allocation import allocate, levels
from vitlab.search.sampling import Problem
from vitlab.search.sensitivity import SENSITIVITY, curves_of, measure_alone
from vitlab.search.strategies import Settings
from vitlab.training.self_distillation import Divergence
from vitlab.workbench.calibrating import CUT, forms_of, in_form, nearest, write_best
from vitlab.workbench.cutting import least_ratio
from vitlab.workbench.forwards import refit_cost
from vitlab.workbench.gathered import Gathered
from vitlab.workbench.offers import Offer, worth_of

# name: (units, tokens) of its search space
RULES = {"merging by content": ((), "match_per_stage"), "shared updates": ((), "share_per_stage"),
         "neurons": (("neurons",), "none"), "heads and neurons": (("heads", "neurons"), "none"),
         "all together": (("heads", "neurons"), "match_per_stage")}
SINGLE = ("merging by content", "shared updates", "neurons")                   # rules that cut one thing alone
RATIOS, MAX_RATIO, TOLERANCE = (0.75, 0.6, 0.45), 0.75, 0.05
MULTIPLE = 8                                    # of neurons: else each takes PyTorch a sixth longer (docs/deploy.md)
TRIED_ON = 192                                  # images that a plan is refitted on to be compared
POPULATION = 8                                  # of a search, before its first proposal
DEPLOYED, TRAINED = "deployed", "self-distillation"                             # the latter a stage of `tonight`


class Survey(Gathered):
    """The curves of a model's rules on a data set, and the offers that follow; all of it is kept in `folder`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._curves: dict[str, list[dict[str, Any]]] = {}
        self._measured = self.folder / f"measured-{self.inputs}.jsonl"

    def _problem(self, rule: str, limit: float | None = None) -> Problem:
        """The space of a rule, under a budget in GMACs; None: any."""
        require(rule in RULES, f"rule {rule!r} is not known; known are {list(RULES)}")
        units, tokens = RULES[rule]
        space = SearchSpace(shape=self.shape, units=units, tokens=tokens, max_ratio=MAX_RATIO, read_out=self.read_out,
                            multiple=MULTIPLE, settings={"prune_rate": 0.0} if tokens.startswith("share") else {})
        most = float(space.gmacs(np.zeros((1, space.size)))[0])
        return Problem(space, Budget.of(space, most * 0.99 if limit is None else limit, tolerance=TOLERANCE))

    def _uncut(self, rule: str) -> float:
        """GMACs where nothing is cut."""
        space = self._problem(rule).space
        return float(space.gmacs(np.zeros((1, space.size)))[0])

    def possible(self, rules: Iterable[str]) -> tuple[str, ...]:
        """Those rules that cut nothing that the model can't lose. InputError with the reasons where none is left."""
        cut = {rule: [*units, *([] if tokens == "none" else ["tokens"])] for rule, (units, tokens) in RULES.items()}
        left = tuple(r for r in rules if r == "all together" or all(map(self.shape.cuts, cut.get(r, ()))))
        require(left, f"nothing of this model can be cut by {', '.join(rules)}: {'; '.join(self.shape.fixed)}")
        return left

    def check(self, gmacs: float, rules: Iterable[str] = tuple(RULES)) -> None:
        """InputError, before anything is measured, where no rule costs as little as `gmacs`."""
        least = min(float(budget.cost(np.full((1, space.size), MAX_RATIO))[0])
                    for space, budget in map(self._problem, rules))
        if gmacs < least:
            raise InputError(f"a budget of {gmacs:.4g} GMACs can't be met: cut as far as may be, {least:.4g} are left")

    def _name(self, rule: str) -> str:
        """Of a rule's folder: other images or another model have another."""
        return f"{rule.replace(' ', '-')}-{self.inputs}"

    def by_place(self, rules: Iterable[str]) -> bool:
        """Whether one of the rules needs scores of tokens."""
        return any(self._problem(rule).space.by_place for rule in rules)

    def _measure(self, problem: Problem, policy: np.ndarray) -> dict[str, float]:
        return self._worth(self.objective, self.plan_of(problem.space, policy))

    def _worth(self, objective: PlanObjective, plan: CompressionPlan) -> dict[str, float]:
        found = objective(plan)
        if self.pace:
            self.pace.add(objective.images * cost.gmacs(plan) / cost.gmacs(CompressionPlan.empty(self.shape)))
        return found

    def cuts(self, rules: Iterable[str]) -> int:
        """How many cuts the curves of some rules are measured at."""
        wanted = set()
        for rule in rules:
            space, tokens = self._problem(rule).space, RULES[rule][1]
            wanted |= {(tokens if name.startswith("tokens") else "", name, ratio)
                       for name, ratios in zip(space.names, levels(space)) for ratio in ratios}
        return len(wanted) + 1

    def curves(self, rule: str) -> list[dict[str, Any]]:
        """What each dimension of the rule loses when it is cut alone, measured once, for whichever rule."""
        if rule not in self._curves:
            problem, path = self._problem(rule), self.folder / self._name(rule) / SENSITIVITY
            if not path.exists():
                write_lines(path, self._known(rule))
            self._curves[rule] = measure_alone(problem, lambda policy: self._measure(problem, policy), path, label=rule,
                                               progress=self.config.progress and not self.pace)
        return self._curves[rule]

    def _known(self, rule: str) -> list[dict[str, Any]]:
        """Rows of this rule's dimensions that were measured for another rule."""
        units, tokens = RULES[rule]
        found = {}
        for other, rows in self._curves.items():
            kinds = {"", *units} & {"", *RULES[other][0]} | ({"tokens"} if RULES[other][1] == tokens else set())
            found |= {(row["dimension"], row["ratio"]): row for row in rows if row["dimension"].split(" ")[0] in kinds}
        return list(found.values())

    def plan(self, rule: str, gmacs: float) -> CompressionPlan:
        """The plan of a rule that costs at most `gmacs`, of tokens alone the nearer of what the curves say and one
        ratio in the middle blocks; nothing is cut where reading out is enough. InputError where there is none."""
        if gmacs >= self._uncut(rule):
            space = self._problem(rule).space
            return self.plan_of(space, np.zeros(space.size))
        problem, even = self._problem(rule, gmacs), self._even(gmacs) if rule == "merging by content" else None
        try:
            plan = self.plan_of(problem.space, allocate(*problem, curves_of(problem, self.curves(rule))))
            plan = plan if even is None else min((plan, even), key=self._chosen_by)
        except InputError:                      # the curves lead to no plan of this cost
            if even is None:
                raise
            plan = even
        return dataclasses.replace(plan, made_by={"method": "allocation", "rule": rule, "gmacs": gmacs})

    def _even(self, gmacs: float) -> CompressionPlan | None:
        """Merging by content with one ratio in the middle half of the blocks; None where that is not enough."""
        space = SearchSpace(shape=self.shape, units=(), tokens="match", max_ratio=MAX_RATIO, read_out=self.read_out)
        ratio = least_ratio(space, gmacs, 400)
        return None if ratio is None else space.plan([ratio])

    def offers(self, rules: Iterable[str] = tuple(RULES), ratios: Iterable[float] = RATIOS) -> Iterator[Offer]:
        """An offer for each rule and each ratio of the dense model's GMACs, as they are measured; budgets that a rule
        can't meet are left out."""
        dense = cost.gmacs(CompressionPlan.empty(self.shape))
        for rule in rules:
            self.curves(rule)
            for ratio in ratios:
                try:
                    plan = self.plan(rule, ratio * dense)
                except InputError:
                    continue
                yield self.offer(rule, plan)

    def _chosen_by(self, plan: CompressionPlan) -> float:
        """Distance to the dense model on the images to choose on, measured once."""
        return self._row(plan, "chosen_by",
                         lambda: {"chosen_by": self._worth(self.objective, plan)["distill_loss"]})["chosen_by"]

    def _row(self, plan: CompressionPlan, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` gives for a plan, among it `name`; kept in the survey's folder, and not measured again."""
        key = hashlib.sha256(dataclasses.replace(plan, made_by={}).to_json().encode()).hexdigest()
        rows = [row for row in read_lines(self._measured) if row["plan"] == key and name in row]
        if not rows:
            rows = [{"plan": key, **measure()}]
            append_line(self._measured, rows[0])
        return rows[0]

    def offer(self, rule: str, plan: CompressionPlan) -> Offer:
        """What a plan is worth. It is measured once, and written to the survey's folder."""
        names = ("agree_pct", "agree_se", "distill_loss", "distill_loss_se")
        row = self._row(plan, "agree_pct", lambda: {
            name: value for name, value in self._worth(self.reporting, plan).items() if name in names})
        return Offer(rule=rule, plan=plan, gmacs=cost.gmacs(plan), chosen_by=self._chosen_by(plan),
                     **{name: row.get(name) for name in names})

    def search(self, rule: str, gmacs: float, evaluations: int, until: float = np.inf) -> list[CompressionPlan]:
        """The plans of a rule that a search finds, the nearest first; it starts from `plan`'s and the one of merging
        alone, and goes on when it was killed. until: time.monotonic() at which it ends, whatever it has."""
        if gmacs >= self._uncut(rule):
            return [self.plan(rule, gmacs)]
        space, budget = problem = self._problem(rule, gmacs)
        study = Study(self.folder / f"{self._name(rule)}-{gmacs:.6g}", space, budget, seed=self.config.seed,
                      about={"inputs": self.inputs},
                      options=Settings(initial="sensitivity", evaluations=evaluations, population=POPULATION))
        if not (study.folder / SENSITIVITY).exists():
            write_lines(study.folder / SENSITIVITY, self.curves(rule))
        even, starts = self._even(gmacs) if space.tokens == "match_per_stage" else None, None
        with contextlib.suppress(InputError):                                   # stages may divide the blocks otherwise
            starts = None if even is None else problem.budget.project(space.policy(even)[None])[0]
        study.run(lambda policy: self._measure(problem, policy), starts=starts, until=until,
                  loggers=self.config.loggers, progress=self.config.progress and not self.pace)
        ranked = sorted(study.evaluations, key=lambda e: -e.value)
        return [self.plan_of(space, e.policy, method="search", rule=rule, gmacs=gmacs, evaluation=e.index)
                for e in ranked]

    def in_form(self, form: str, plan: CompressionPlan, images: int | None = None) -> nn.Module:
        """The plan's model, refitted on so many images (None: all that there are)."""
        if form == CUT:
            return in_form(form, self.found.model, plan, ())
        images = self.first(images or self.parts.roles["score"])
        takes = refit_cost(self.shape, images)
        return in_form(form, self.found.model, plan, first_images(self.batches, images), costs=self.costs,
                       device=self.place, amp=self.amp,
                       over=lambda layers: self.shown(f"a model {form}", layers, len(layers), takes))

    def _apart(self, plan: CompressionPlan, form: str) -> np.ndarray:
        """Distance of each image to choose on, of a plan's model in a form, refitted on TRIED_ON; measured once."""
        name = f"each, {form}"
        return np.array(self._row(plan, name, lambda: {
            name: self.choosing.each(deploy(self.in_form(form, plan, TRIED_ON), inplace=True))})[name])

    def best(self, plans: Iterable[CompressionPlan]) -> tuple[CompressionPlan, str]:
        """(the plan to go on with, its form): of each plan the form with the least mean distance, and of these the
        `nearest`, so that the first is what has to be beaten."""
        plans = list(plans)
        each = [{form: self._apart(plan, form) for form in forms_of(plan)} for plan in plans]
        forms = [min(of_plan, key=lambda form, of_plan=of_plan: of_plan[form].mean()) for of_plan in each]
        chosen = nearest({number: of_plan[form] for number, (of_plan, form) in enumerate(zip(each, forms))})
        return plans[chosen], forms[chosen]

    def ready(self, out: str | Path, plan: CompressionPlan, form: str | None = None, *,
              minutes: float = 0) -> Checkpoint:
        """Refit a plan's model on all images to refit on, in the form given or else the `best` one, train it on for so
        many minutes (`self_distil`), and write it to out/checkpoint and its deployed form to out/deployed; returns
        that. made_by says its distance as that of `calibrate`."""
        form, dense = form or self.best([plan])[1], self.found.model
        plan = dataclasses.replace(plan, made_by=plan.made_by | {"reported": worth_of(self.offer("", plan))})
        reporting = Divergence(dense, self.reporting.batches, self.amp)
        model = self.in_form(form, plan)
        made_by = {"step": "calibrate", "data": self.opened.name, "images": self.parts.roles["score"],
                   "roles": self.parts.roles, "ridge": "chosen for each layer", "minutes": minutes,
                   "seed": self.config.seed, "plan": plan.made_by, "kept": form, "distance": self.output.distance,
                   **reporting.measured(compress(dense, plan).eval(), "distance_cut"),
                   **(reporting.measured(model, "distance_refitted") if form != CUT else {})}
        with self.pace.stage(TRAINED) if self.pace and minutes else contextlib.nullcontext():
            write_best(out, self.found, model, plan, made_by, reporting, minutes, self.parts, self.choosing,
                       split="score", seed=self.config.seed, amp=self.amp, workers=self.config.workers,
                       loggers=self.config.loggers, progress=self.config.progress)
        found = checkpoint.load(out)
        checkpoint.save(Path(out) / DEPLOYED, deploy(found.model), found.plan, classes=found.info.get("classes"),
                        made_by=found.info["made_by"] | {"step": "tonight"})
        return checkpoint.load(Path(out) / DEPLOYED)
