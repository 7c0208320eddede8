"""What can I have tonight? From a dense model and a few images without labels to a smaller model that is ready."""
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from vitlab.data.images import image_config
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.opening import Source
from vitlab.models.support import encoder_of
from vitlab.plan import CompressionPlan, cost
from vitlab.runtime.config import RUN, RunConfig
from vitlab.runtime.files import atomic_write, read_json, require
from vitlab.runtime.kinds import ClassMap, Count, Data, Gmacs, MacsRatio, Minutes, Names, Natural, Ratios, Run
from vitlab.workbench.calibrating import warn_of_few
from vitlab.workbench.cutting import limit_of
from vitlab.workbench.forwards import FISHER_COST, TOKEN_COST, elimination_cost, moments_cost, refit_cost, solves_cost
from vitlab.workbench.gathered import FISHER_IMAGES, TOKEN_IMAGES
from vitlab.workbench.offers import OFFERS, Offer, best_offer, offers_figure, worth_of, write_offers  # noqa: F401 - its own face
from vitlab.workbench.pace import Pace, images_per_second
from vitlab.workbench.searching import PLAN
from vitlab.workbench.steps import open_dense
from vitlab.workbench.survey import DEPLOYED, RATIOS, RULES, SINGLE, TRAINED, TRIED_ON, Survey  # noqa: F401 - its own face

MACS_RATIO = 0.6                                # the budget where none is given
NEAR = 0.02                                     # offers at ratios as near to the budget as that would say the same
# shared updates keep every shape static, and are never the nearest: for who asks for them
OFFERED_RULES = tuple(rule for rule in RULES if rule != "shared updates")
EVALUATIONS, FINALISTS = 40, 2                  # of the search; how many of its plans are refitted and compared
LEAST = {"evaluations": 10, "finalists": 1, "images": 64}       # what the time may leave of them
# minutes, where none are given: of a large model the amounts shrink; where that is kept
AT_MOST, AMOUNTS = 60, "amounts.json"
SURVEY = "survey"
SCORES, CURVES, OFFERED, SEARCH, COMPARED, REFIT = (
    "scores", "curves", "offers", "search", "refits of the best plans", "refit on all images")


def stages_of(survey: Survey, rules: Sequence[str], budgets: int, evaluations: int, finalists: int,
              ratio: float) -> dict[str, float]:
    """What each stage costs, about, in forwards of one image through the dense model."""
    shape, images, report, fitted = survey.shape, *(survey.parts.roles[role] for role in ("choose", "report", "score"))
    solves = solves_cost(shape) / 24            # of a model refitted once, by the dense model's moments
    evaluation = images * ratio + solves
    return {SCORES: fitted * moments_cost(shape) + survey.first(FISHER_IMAGES) * FISHER_COST
            + survey.first(TOKEN_IMAGES) * TOKEN_COST * survey.by_place(rules) + elimination_cost(shape),
            CURVES: survey.cuts(rules) * images * 0.55,
            OFFERED: budgets * len(rules) * (images + report + solves) * 0.65,
            **({SEARCH: evaluations * evaluation} if evaluations else {}),
            COMPARED: (1 + 2 * finalists) * refit_cost(shape, survey.first(TRIED_ON)),
            REFIT: refit_cost(shape, fitted)}


def _amounts(path: Path, asked: dict[str, Any], shrink: bool) -> dict[str, int]:
    """Evaluations, finalists and images, as asked for or shrunk; once decided it stands in a file, so that the same
    call goes on with the same ones however fast the machine is then."""
    known = read_json(path) if path.exists() else {}
    if not isinstance(known, dict) or known.get("asked") != asked:
        known = {"asked": asked,
                 "amounts": {name: min(asked[name], least) if shrink else asked[name] for name, least in LEAST.items()}}
        atomic_write(path, json.dumps(known))
    return known["amounts"]


def tonight(source: Source, data: Data, out: Run, *, gmacs: Gmacs = None,
            macs_ratio: Annotated[MacsRatio, Parameter(help="budget: fraction of the dense model's multiply-adds "
                                                            f"(default: {MACS_RATIO})")] = None,
            rules: Names = OFFERED_RULES, ratios: Ratios = RATIOS, evaluations: Natural = EVALUATIONS,
            finalists: Count = FINALISTS, minutes: Minutes | None = None, images: Count = 128,
            report_images: Count = 256, score_images: Count = 1000, class_map: ClassMap = None,
            config: Annotated[RunConfig, RUN] = RunConfig()) -> Checkpoint:
    """From a dense model and images without labels to a smaller model that is ready, in out/deployed; returns that.

    Offers of every rule at the budget and at `ratios` of the dense GMACs that are not NEAR it (out/offers.jsonl and
    out/offers.png), plans compared on `images` of train and reported on `report_images` others; a search of so many
    evaluations at the budget (`gmacs`, or macs_ratio of the dense model's), over all that the rules cut together; its
    `finalists` and the best plan of one rule alone refitted on score_images others, and the nearest of them
    (`Survey.best`) made ready; the best plan so far is out/plan.json. Numbered stages, and the time that the whole will
    take, are said before it begins.

    minutes: for the whole; where the amounts would take longer, there are fewer evaluations, finalists and images
    (LEAST), and what is left of the time is self-distillation (`self_distil`). None: none of it, and fewer where they
    would take over AT_MOST minutes. All that was measured is kept, and the same call goes on. Raises InputError for a
    budget that no rule meets.

    Args:
        out: run folder; the model is in deployed/
        rules: merging by content, shared updates, neurons, heads and neurons, all together, with commas between
        ratios: fractions of the dense model's multiply-adds that each rule is offered at, beside the budget
        evaluations: plans measured in the search at the budget; 0: none
        finalists: plans of the search that are refitted and compared, beside the best of one rule alone
        minutes: for the whole: fewer evaluations and images where it would take longer, and self-distillation in what
            is left (default: as long as the amounts below take, about an hour at most, and none of it)
        images: of train, that plans are compared on, at most
        report_images: others, to report on, at most
        score_images: others, to rank units and to refit on, at most
    """
    began, found, out = time.monotonic(), open_dense(source), Path(out)
    common: dict[str, Any] = {"report_images": report_images, "score_images": score_images, "class_map": class_map,
                              "config": config}
    survey = Survey(found, data, out / SURVEY, images=images, **common)
    dense = cost.gmacs(CompressionPlan.empty(survey.shape))
    limit = limit_of(survey.shape, gmacs, MACS_RATIO if gmacs is None and macs_ratio is None else macs_ratio)
    rules = survey.possible(rules)
    survey.check(limit, rules)
    require(finalists >= 1, f"finalists is {finalists}; at least 1 plan is needed to be made ready")
    warn_of_few(survey.parts.roles["score"])
    ratios = sorted([limit / dense, *(ratio for ratio in ratios if abs(ratio - limit / dense) > NEAR)])

    def planned() -> dict[str, float]:
        return stages_of(survey, rules, len(ratios), evaluations, finalists, limit / dense)
    like = torch.zeros(32, *image_config(encoder_of(survey.model))["input_size"])  # no photograph is read for it
    rate, stages = images_per_second(survey.model, like, survey.amp), planned()
    takes, most = sum(stages.values()) / rate / 60, AT_MOST if minutes is None else minutes
    asked = {"evaluations": evaluations, "finalists": finalists, "images": images, "minutes": minutes, "limit": limit,
             "inputs": survey.inputs}
    amounts = _amounts(out / SURVEY / AMOUNTS, asked, shrink=takes > most)
    if amounts != {name: asked[name] for name in LEAST}:
        evaluations, finalists = amounts["evaluations"], amounts["finalists"]
        survey = Survey(found, data, out / SURVEY, images=amounts["images"], **common)
        stages = planned()
        needed = sum(stages.values()) / rate / 60
        less = f" take about {needed:.0f}; fewer score_images, rules or ratios would take less" if needed > most else ""
        warnings.warn(f"all that was asked for would take about {takes:.0f} minutes, and there are {most:g}: "
                      f"{evaluations} evaluations, {finalists} finalist{'s' * (finalists > 1)} and {amounts['images']} "
                      f"images to compare plans on{less}", stacklevel=2)
    end = float("inf") if minutes is None else began + 60 * minutes
    if minutes is not None:
        stages[TRAINED] = max(0.0, 60 * minutes * rate - sum(stages.values()))
    with Pace("tonight", stages, rate, config.progress) as survey.pace:
        with survey.pace.stage(SCORES):
            _ = survey.scores, survey.by_place(rules) and survey.token_scores
        with survey.pace.stage(CURVES):
            for rule in rules:
                survey.curves(rule)
        with survey.pace.stage(OFFERED):
            offers = list(survey.offers(rules, ratios))
            write_offers(out, offers)
        best, alone = best_offer(offers, limit), [offer for offer in offers if offer.rule in SINGLE]
        plans = [best_offer(alone, limit).plan] if any(offer.gmacs <= limit for offer in alone) else []
        best.plan.save(out / PLAN)              # the best so far, whatever becomes of the rest
        if evaluations:
            with survey.pace.stage(SEARCH):
                rule = "all together" if "all together" in rules else best.rule
                plans += survey.search(rule, limit, evaluations,
                                       end - survey.pace.seconds_of(COMPARED, REFIT))[:finalists]
        else:
            plans.append(best.plan)
        with survey.pace.stage(COMPARED):
            plan, form = survey.best(plans)
            plan.save(out / PLAN)
        left = max(0.0, end - time.monotonic() - survey.pace.seconds_of(REFIT)) / 60 if minutes is not None else 0.0
        with survey.pace.stage(REFIT):
            return survey.ready(out, plan, form, minutes=left)
