"""What can I have tonight? Plans by every rule at several budgets from a few images without labels, and one of them made ready.

Each dimension of a rule is cut alone and measured once; from these curves `allocate` makes the plan of any budget.
"""
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from vitlab import cost
from vitlab.criteria.compensation import Moments
from vitlab.criteria.units import unit_criterion
from vitlab.files import InputError, append_line, atomic_write, read_lines, write_lines
from vitlab.models import deploy, shape_of
from vitlab.models.weights import read_file
from vitlab.plan import CompressionPlan
from vitlab.search import Budget, SearchSpace, Study
from vitlab.search.allocation import allocate
from vitlab.search.sampling import Problem
from vitlab.search.sensitivity import SENSITIVITY, curves_of, measure_alone
from vitlab.search.strategies import Settings
from vitlab.search.study import Evaluation
from vitlab.shape import POOL_TOKEN
from vitlab.training import checkpoint
from vitlab.training.capture import need_classifier, token_scores
from vitlab.training.checkpoint import Checkpoint
from vitlab.training.compensate import KINDS, compensate
from vitlab.training.loop import fingerprint
from vitlab.training.objective import PlanObjective
from vitlab.training.units import by_moments as scores_by_moments
from vitlab.workbench.calibrating import calibrate
from vitlab.workbench.cutting import amp_of, measured_batches, objective_on, open_dense
from vitlab.workbench.offers import OFFERS, Offer, best_offer, offers_figure, worth_of, write_offers  # noqa: F401 - its own face
from vitlab.workbench.searching import by_moments, cost_function, dense_moments, moments_from, moments_to
from vitlab.workbench.steps import Source, open_matching, pick_device

# name: (units, tokens) of its search space
RULES = {"merging by content": ((), "match_per_stage"), "shared updates": ((), "share"), "neurons": (("neurons",), "none"),
         "heads and neurons": (("heads", "neurons"), "none"), "all together": (("heads", "neurons"), "match_per_stage")}
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
MAX_RATIO, TOLERANCE = 0.75, 0.05
FINALISTS, FINALISTS_MEASURED = 3, "finalists.jsonl"
SURVEY, DEPLOYED = "survey", "deployed"


class Survey:
    """The curves of a model's rules on a data set, and the offers that follow from them; curves are kept in `folder`."""

    def __init__(self, source: Source, data: str | Path, folder: str | Path, *, images: int = 256, score_images: int = 512,
                 seed: int = 0, device: str | None = None, class_map: str | Path | None = None, workers: int | None = None,
                 progress: bool = True) -> None:
        """images: of train, to compare plans on, and as many others to report on; score_images: others, to score and refit on
        (`ImageData.parts`). Scores and moments are made when first needed, so that `check` comes before them, written into `folder`, and
        read where they were made before of the same model and images. Raises InputError for a compressed model, or one without a
        classifier."""
        self.found, self.folder, self.place, self.progress = open_dense(source), Path(folder), pick_device(device), progress
        need_classifier(self.found.model, "offers")
        self.seed = seed
        opened = open_matching(data, self.found, class_map, labels=False)
        self.parts = opened.parts(seed, score=score_images, choose=images, report=images)
        counts = {role: count for role, count in self.parts.roles.items() if role != "shared"}
        self.inputs = fingerprint([opened.files("train"), counts, seed], [self.found.model])
        self.model, self.workers = self.found.model.to(self.place).eval(), workers
        self.shape = shape_of(self.model)
        self.read_out = self.shape.pool == POOL_TOKEN and self.shape.num_prefix_tokens > 0
        self._curves: dict[str, list[dict[str, Any]]] = {}
        self._measured = self.folder / f"measured-{self.inputs}.jsonl"

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Of the images to score and refit on."""
        return list(self.parts.batches("score", self.model, workers=self.workers))

    def _shown(self, what: str) -> Iterable[tuple[Tensor, Tensor]]:
        """These batches, with a bar that says what they are gone through for."""
        return tqdm(self.batches, desc=what, unit="batch", disable=not self.progress)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Of heads, neurons and tokens."""
        found = self._kept("unit-scores", lambda: scores_by_moments(self.model, self.moments, unit_criterion("reconstruction")))
        return found | self._kept("token-scores", self._of_tokens)

    def _of_tokens(self) -> dict[str, Tensor]:
        labelled = own_labels(self.model, self._shown("the model's own classes"), self.place)
        return {"tokens": token_scores(self.model, labelled, device=self.place, progress=self.progress)}

    @cached_property
    def moments(self) -> dict[tuple[int, str], Moments]:
        """Of every layer that mixes heads or neurons: units are ranked by them, and what is measured is refitted."""
        return moments_from(self._kept("moments", lambda: moments_to(dense_moments(
            self.model, self._shown("what heads and neurons give"), KINDS, self.place))))

    @cached_property
    def objective(self) -> PlanObjective:
        """On the images to choose on, of models refitted by the dense one's moments."""
        return objective_on(self.model, self.parts, "choose", "distill_loss", self.place, self.workers, build=by_moments(self.moments))

    @cached_property
    def reporting(self) -> PlanObjective:
        """The same on the images to report on."""
        return self.objective.on(measured_batches(self.model, self.parts, "report", self.workers))

    def _kept(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, from its file where this model and these images gave it before."""
        path = self.folder / f"{what}-{self.inputs}.safetensors"
        if not path.exists():
            atomic_write(path, save({name: value.contiguous().cpu() for name, value in make().items()}))
        return {name: value.to(self.place) if what == "moments" else value for name, value in read_file(path).items()}

    def _problem(self, rule: str, limit: float | None = None) -> Problem:
        """The space of a rule, under a budget in GMACs; None: any."""
        if rule not in RULES:
            raise InputError(f"rule {rule!r} is not known; known are {list(RULES)}")
        units, tokens = RULES[rule]
        settings = {"prune_rate": 0.0} if tokens == "share" else {}
        space = SearchSpace(shape=self.shape, units=units, tokens=tokens, max_ratio=MAX_RATIO, read_out=self.read_out, settings=settings)
        price = cost_function(space, "gmacs", self.found.model)
        most = float(price(np.zeros((1, space.size)))[0])
        return Problem(space, Budget(limit=most * 0.99 if limit is None else limit, cost=price, max_ratio=space.max_ratio,
                                     size=space.size, groups=tuple(space.groups), tolerance=TOLERANCE))

    def _uncut(self, rule: str) -> float:
        """GMACs where nothing is cut."""
        space, budget = self._problem(rule)
        return float(budget.cost(np.zeros((1, space.size)))[0])

    def check(self, gmacs: float, rules: Iterable[str] = tuple(RULES)) -> None:
        """InputError, before anything is measured, where no rule costs as little as `gmacs`."""
        least = min(float(budget.cost(np.full((1, space.size), MAX_RATIO))[0]) for space, budget in map(self._problem, rules))
        if gmacs < least:
            raise InputError(f"a budget of {gmacs:.4g} GMACs can't be met: with as much cut as may be, {least:.4g} are left")

    def _name(self, rule: str) -> str:
        """Of a rule's folder: other images or another model have another."""
        return f"{rule.replace(' ', '-')}-{self.inputs}"

    def _measure(self, problem: Problem, policy: np.ndarray) -> dict[str, float]:
        plan = problem.space.plan(policy, **self.scores)                        # scores come first, and are kept
        return self.objective(plan)

    def curves(self, rule: str) -> list[dict[str, Any]]:
        """What each dimension of the rule loses when it is cut alone, measured once, for whichever rule."""
        if rule not in self._curves:
            problem, path = self._problem(rule), self.folder / self._name(rule) / SENSITIVITY
            if not path.exists():
                write_lines(path, self._known(rule))
            self._curves[rule] = measure_alone(problem, lambda policy: self._measure(problem, policy), path, label=rule,
                                               progress=self.progress)
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
        """The plan of a rule that costs at most `gmacs`; nothing is cut where reading out is enough. Raises InputError where there
        is none."""
        if gmacs >= self._uncut(rule):
            space = self._problem(rule).space
            return space.plan(np.zeros(space.size), **self.scores)
        problem = self._problem(rule, gmacs)
        policy = allocate(*problem, curves_of(problem, self.curves(rule)))
        return problem.space.plan(policy, **self.scores, made_by={"method": "allocation", "rule": rule, "gmacs": gmacs})

    def offers(self, rules: Iterable[str] = tuple(RULES), ratios: Iterable[float] = RATIOS) -> Iterator[Offer]:
        """An offer for each rule and each ratio of the dense model's GMACs, as they are measured; budgets that a rule can't meet
        are left out."""
        dense = cost.gmacs(CompressionPlan.empty(self.shape))
        for rule in rules:
            self.curves(rule)
            for ratio in ratios:
                try:
                    plan = self.plan(rule, ratio * dense)
                except InputError:
                    continue
                yield self.offer(rule, plan)

    def offer(self, rule: str, plan: CompressionPlan) -> Offer:
        """What a plan is worth. It is measured once, and written to the survey's folder."""
        key = hashlib.sha256(dataclasses.replace(plan, made_by={}).to_json().encode()).hexdigest()
        rows = [row for row in read_lines(self._measured) if row["plan"] == key]
        if not rows:
            names = ("agree_pct", "agree_se", "distill_loss", "distill_loss_se")
            found = self.reporting(plan)
            rows = [{"plan": key, "chosen_by": self.objective(plan)["distill_loss"], **{name: found.get(name) for name in names}}]
            append_line(self._measured, rows[0])
        return Offer(rule=rule, plan=plan, gmacs=cost.gmacs(plan), **{name: v for name, v in rows[0].items() if name != "plan"})

    def search(self, rule: str, gmacs: float, evaluations: int) -> CompressionPlan:
        """The plan of a rule that a search finds which starts from `plan`'s; it goes on when it was killed. Raises InputError."""
        if gmacs >= self._uncut(rule):
            return self._reported(rule, self.plan(rule, gmacs))
        space, budget = problem = self._problem(rule, gmacs)
        study = Study(self.folder / f"{self._name(rule)}-{gmacs:.6g}", space, budget, seed=self.seed, about={"inputs": self.inputs},
                      options=Settings(initial="sensitivity", evaluations=evaluations, population=min(10, max(2, evaluations // 2))))
        if not (study.folder / SENSITIVITY).exists():
            write_lines(study.folder / SENSITIVITY, self.curves(rule))
        best = study.run(lambda policy: self._measure(problem, policy), progress=self.progress)
        best = self._best_refitted(study) if space.units else best
        return self._reported(rule, space.plan(best.policy, **self.scores, made_by={"method": "search", "rule": rule, "gmacs": gmacs,
                                                                                    "evaluation": best.index}))

    def _reported(self, rule: str, plan: CompressionPlan) -> CompressionPlan:
        return dataclasses.replace(plan, made_by=plan.made_by | {"reported": worth_of(self.offer(rule, plan))})

    def _best_refitted(self, study: Study) -> Evaluation:
        """Of the first policy, which the curves gave, and the best FINALISTS: the nearest to the dense model once it is refitted as
        `calibrate` refits, block after block (the search's own refits are quicker, and of the dense model's inputs). Each is
        written to finalists.jsonl as it is measured, and not measured again."""
        path, ranked = study.folder / FINALISTS_MEASURED, sorted(study.evaluations, key=lambda e: -e.value)
        known = {row["evaluation"]: row["distill_loss"] for row in read_lines(path)}
        wanted = {e.index: e for e in (study.evaluations[0], *ranked[:FINALISTS])}
        for index in wanted.keys() - known.keys():
            small = compensate(self.found.model, study.space.plan(wanted[index].policy, **self.scores), self.batches, device=self.place,
                               amp=amp_of(self.found.model), progress=self.progress)
            known[index] = self.objective.measure(deploy(small))["distill_loss"]
            append_line(path, {"evaluation": index, "distill_loss": known[index]})
        return study.evaluations[min(sorted(known), key=known.__getitem__)]


def tonight(source: Source, data: str | Path, out: str | Path, *, gmacs: float | None = None, macs_ratio: float = 0.6,
            rules: Sequence[str] = tuple(RULES), ratios: Sequence[float] = RATIOS, evaluations: int = 40, minutes: float = 10,
            images: int = 256, calibration_images: int = 1000, seed: int = 0, device: str | None = None,
            class_map: str | Path | None = None, workers: int | None = None, progress: bool = True) -> Checkpoint:
    """From a dense model and images without labels to a smaller model that is ready: offers of every rule at `ratios` of the
    dense GMACs (out/offers.jsonl, out/offers.png), the best rule at the budget (`gmacs`, or macs_ratio of the dense model's)
    searched on for so many evaluations, calibrated for at most so many minutes (`calibrate`), and its deployed form. Returns that
    checkpoint, out/deployed. Raises InputError for a budget that no rule meets.
    """
    found, out = open_dense(source), Path(out)
    common = {"seed": seed, "device": device, "class_map": class_map, "workers": workers, "progress": progress}
    survey = Survey(found, data, out / SURVEY, images=images, **common)
    dense = cost.gmacs(CompressionPlan.empty(survey.shape))
    limit = macs_ratio * dense if gmacs is None else gmacs
    survey.check(limit, rules)
    offers = list(survey.offers(rules, sorted({*ratios, limit / dense})))
    write_offers(out, offers)
    best = best_offer(offers, limit)
    if evaluations:
        plan = survey.search(best.rule, limit, evaluations)
    else:
        plan = dataclasses.replace(best.plan, made_by=best.plan.made_by | {"reported": worth_of(best)})
    return ready(found, data, out, plan, minutes=minutes, images=calibration_images, report_images=images, **common)


def ready(source: Source, data: str | Path, out: str | Path, plan: CompressionPlan, *, minutes: float = 10, **settings: Any) -> Checkpoint:
    """Calibrate a plan's model (settings: those of `calibrate`) and write its deployed form to out/deployed; returns that."""
    found = calibrate(source, data, out, plan, minutes=minutes, **settings)
    checkpoint.save(Path(out) / DEPLOYED, deploy(found.model), found.plan, classes=found.info.get("classes"),
                    made_by=found.info["made_by"] | {"step": "tonight"})
    return checkpoint.load(Path(out) / DEPLOYED)


def own_labels(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The batches with the classes that the model itself gives, of a Segmenter a mask: labels for scores of images that have none."""
    with torch.no_grad():                       # not inference mode: a loss is computed with them
        return [(images, model(images.to(device)).argmax(dim=1).cpu()) for images, _ in batches]
