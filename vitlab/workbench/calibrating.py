"""The step that refits a compressed model on a few images without labels: in closed form, then by self-distillation."""
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from torch import nn

from vitlab.data.parts import reported_on
from vitlab.measure.averaging import Batches
from vitlab.measure.moments import fisher
from vitlab.models import checkpoint, compress, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.opening import Source
from vitlab.plan import CompressionPlan
from vitlab.runtime import logs
from vitlab.runtime.config import RUN, RunConfig
from vitlab.runtime.kinds import ClassMap, Count, Data, Minutes, Run
from vitlab.runtime.uncertainty import digits_of, plus_minus, standard_error
from vitlab.training.compensate import compensate, layers_to_refit
from vitlab.training.self_distillation import Divergence, self_distil
from vitlab.workbench.steps import Plan, amp_of, measured_batches, open_dense, open_matching, pick_device

CHOSEN_ON = 50                                  # images at least, on which a form or a state is chosen
ENOUGH = 100                                    # images to refit on, below which it is said
CUT, REFITTED, THROUGHOUT = "cut", "refitted", "refitted throughout"            # the forms that a plan's model can have


def warn_of_few(images: int) -> None:
    """Of images to refit on, in one line."""
    if images < ENOUGH:
        warnings.warn(f"{images} images to refit on: of fewer than {ENOUGH} it is uncertain which form is the nearest, "
                      "and a refit may be no nearer than the cut model; more images would tell", stacklevel=3)


def forms_of(plan: CompressionPlan) -> tuple[str, ...]:
    """As it is cut; what loses heads or neurons refitted, where anything does; all from the first cut or merging on,
    where that is more."""
    some, every = (layers_to_refit(plan, every) for every in (False, True))
    return CUT, *([REFITTED] if some else []), *([THROUGHOUT] if every != some else [])


def in_form(form: str, dense: nn.Module, plan: CompressionPlan, batches: Batches, **settings: Any) -> nn.Module:
    """The plan's model in a form. settings: of `compensate`."""
    return compress(dense, plan).eval() if form == CUT else compensate(dense, plan, batches, every=form == THROUGHOUT,
                                                                       **settings)


def nearest(each: dict[Any, Sequence[float]]) -> Any:
    """Of models by name, with each image's distance to the dense model: the first, unless a later one is nearer by more
    than the standard error of that difference over images; so that little is left for the little that luck may be."""
    chosen, *others = each
    for name in others:
        gain = np.subtract(each[chosen], each[name])
        chosen = name if gain.mean() > (standard_error(gain) or 0) else chosen
    return chosen


def calibrate(source: Source, data: Data, out: Run, plan: Plan, *, images: Count = 1000, report_images: Count = 256,
              ridge: Annotated[float | None, Parameter(parse=False)] = None, minutes: Minutes = 0,
              class_map: ClassMap = None, config: Annotated[RunConfig, RUN] = RunConfig()) -> Checkpoint:
    """Compress a dense model by a plan, and bring its output near the dense one's on `images` of train, without labels:
    what is left of heads and neurons, or all from the first cut on, is refitted in closed form (`compensate`), then
    everything is trained for at most so many minutes (`self_distil`). Writes and returns the checkpoint in `out`; it is
    there after the closed form, and replaced by better ones. Another call begins anew. ridge None: chosen for each
    layer by images left out.

    Of train there are three parts without an image in common (`ImageData.parts`): one that is fitted and trained on;
    one, a tenth as large and of CHOSEN_ON images at least, on which the nearest of `forms_of` the plan is chosen, and
    the state of the training; and one of report_images: made_by says the mean distance to the dense model's output on
    it, "distance" being which one, as distance_cut, distance_refitted (of the nearer of the refitted forms) and, where
    a state of the training was chosen, distance_distilled, each with its standard error (distance_cut_se), `kept` being
    the form that the checkpoint has.

    Args:
        plan: a plan.json by which a dense SOURCE is compressed
        images: of train, that it is fitted on, at most; others to choose and to report on
        report_images: others, to report on, at most
        minutes: self-distillation afterwards, at most so long
    """
    found, place, workers, progress = open_dense(source), pick_device(config.device), config.workers, config.progress
    dense, amp = found.model.to(place), amp_of(found.model)
    opened = open_matching(data, found, class_map, labels=False)
    parts = opened.parts(config.seed, calibrate=images, choose=max(CHOSEN_ON, images // 10), report=report_images)
    warn_of_few(parts.roles["calibrate"])
    plan = plan if isinstance(plan, CompressionPlan) else CompressionPlan.load(plan, shape_of(dense))
    choosing, reporting = (Divergence(dense, measured_batches(dense, parts, role, workers), amp)
                           for role in ("choose", "report"))
    batches = list(parts.batches("calibrate", dense, workers=workers))
    costs = fisher(dense, batches, seed=config.seed, amp=amp, progress=progress)
    models = {form: in_form(form, dense, plan, batches, ridge=ridge, costs=costs, amp=amp, progress=progress)
              for form in forms_of(plan)}
    apart = {form: choosing.each(model) for form, model in models.items()}
    best, refitted = (min(forms, key=lambda form: sum(apart[form]))
                      for forms in (forms_of(plan), forms_of(plan)[1:] or (CUT,)))
    made_by = {"step": "calibrate", "data": opened.name, "images": parts.roles["calibrate"], "roles": parts.roles,
               "ridge": "chosen for each layer" if ridge is None else ridge, "minutes": minutes, "seed": config.seed,
               "plan": plan.made_by, "kept": best,
               "distance": reporting.output.distance, **reporting.measured(models[CUT], "distance_cut"),
               **reporting.measured(models[refitted], "distance_refitted")}
    write_best(out, found, models[best], plan, made_by, reporting, minutes, parts, choosing, split="calibrate",
               seed=config.seed, amp=amp, workers=workers, loggers=config.loggers, progress=progress)
    return checkpoint.load(out)


def write_best(out: str | Path, found: Checkpoint, model: nn.Module, plan: CompressionPlan, made_by: dict[str, Any],
               reporting: Divergence, minutes: float, *args: Any, loggers: Sequence[str] = (), **how: Any) -> None:
    """Write a plan's model of the dense one that was found; then train it for so many minutes (args and how: of
    `self_distil`; loggers: of `logs.LOGGERS`), and write each that is nearer, with its distance to report."""
    def keep(model: nn.Module, more: dict[str, Any]) -> None:
        checkpoint.save(Path(out) / checkpoint.FOLDER, model, plan, classes=found.info.get("classes"),
                        made_by=made_by | more)
    keep(model, {})
    if minutes:
        with logs.opened(loggers, out, 0) as log:
            self_distil(model, found.model, *args, minutes=minutes, **how, log_to=log, on_better=lambda better, _: keep(
                better, {"kept": "distilled", **reporting.measured(better, "distance_distilled")}))


def distances(made_by: dict[str, Any]) -> str:
    """What `calibrate` says of its model in one line: each distance with its standard error."""
    def one(name: str) -> str:
        error = made_by.get(f"distance_{name}_se")
        return f"{name} {plus_minus(made_by[f'distance_{name}'], error, digits_of(error, 4))}"
    values = [one(name) for name in ("cut", "refitted", "distilled") if f"distance_{name}" in made_by]
    return (f"{made_by['distance']} {reported_on(made_by['roles'])}, ± one standard error: {', '.join(values)}; "
            f"kept: {made_by['kept']}")
