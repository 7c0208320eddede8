"""What a command says of its result."""
from pathlib import Path
from typing import Any

from vitlab.data.parts import reported_on
from vitlab.models import checkpoint
from vitlab.models.checkpoint import Checkpoint
from vitlab.plan import CompressionPlan, cost
from vitlab.runtime.results import TOLD_BY, ResultRow, format_speeds, format_table, in_words
from vitlab.search import Study
from vitlab.workbench import calibrating, searching
from vitlab.workbench.survey import DEPLOYED

NAMES = {"attended": "tokens", "widths": "widths of queries"}                 # of counts, for people


def said(result: Any, out: str | None, *, quiet: bool = False) -> str:
    """The lines on a step's result, written to `out`; quiet: none on a model that is written."""
    return "" if quiet and isinstance(result, Checkpoint) else f"{_said(result, out)}\n"


def _said(result: Any, out: str | None) -> str:
    if isinstance(result, Checkpoint):
        made_by = result.info.get("made_by", {})
        place = DEPLOYED if made_by.get("step") == "tonight" else checkpoint.FOLDER
        return "\n".join([*_of_calibration(made_by), _of_plan(result.plan), f"checkpoint: {out}/{place}"])
    if isinstance(result, Study):
        return _of_study(result, out)
    if isinstance(result, ResultRow):
        return _of_row(result)
    if isinstance(result, Path):
        return f"checkpoint: {result / checkpoint.FOLDER}"
    if isinstance(result, list):
        return _of_speeds(result)
    return f"scores: {out}"


def _of_plan(plan: CompressionPlan) -> str:
    lines = [f"{cost.gmacs(plan):.4f} GMACs deployed ({cost.gmacs(plan, 'published'):.4f} without matrices, as the "
             f"papers count; dense {cost.gmacs(CompressionPlan.empty(plan.shape)):.4f})"]
    counts = cost.counts_of(plan)
    for name, total in (("attended", plan.shape.num_tokens), ("heads", plan.shape.num_heads),
                        ("neurons", plan.shape.num_neurons), ("widths", plan.shape.head_dim)):
        values = getattr(counts, name).tolist()
        if min(values) < total:
            lines.append(f"{NAMES.get(name, name)} per block {values}, of {total}")
    return "\n".join(lines)


def _of_calibration(made_by: dict[str, Any]) -> list[str]:
    """Of a model that was refitted, how far it is from the dense one; before, where that was reported."""
    if "distance_cut" not in made_by:
        return []
    before = made_by.get("plan", {}).get("reported") if made_by["step"] == "tonight" else None
    first = [] if before is None else [f"before calibration, {reported_on(made_by['roles'])}: {in_words(before)}"]
    return [*first, calibrating.distances(made_by)]


def _of_study(study: Study, out: str | None) -> str:
    best, worth = study.best, searching.reported(study.folder) or {}
    return (f"best of {len(study.evaluations)}: number {best.index}, {best.cost:.6g} {study.budget.unit} of "
            f"{study.budget.limit:.6g}\non images it was chosen on: {in_words(best.measures)}\n"
            f"{reported_on(study.info['about']['roles'])}, ± one standard error: {in_words(worth)}\n"
            f"plan: {out}/{searching.PLAN}")


def _of_row(row: ResultRow) -> str:
    measured = ("top1_pct", "top5_pct") if row.miou_pct is None else ("miou_pct", "pixel_accuracy_pct")
    measured += ("loss",) if row.distill_loss is None else ("distill_loss", "loss")
    lines = [format_table([row], ("model", "dataset", "split", *measured, "gmacs", "params_m")),
             f"± one standard error over {row.conditions['images']} images, {row.conditions['prepared']}"]
    more = row.conditions
    lines += [f"{name}: {more[key]}" for name, key in TOLD_BY.items() if key in more]
    lines += [in_words({name: more[name] for name in ("agree_pct", "agree_se")})] if "agree_pct" in more else []
    if row.miou_pct is not None:
        iou = row.conditions["iou_pct"].items()
        lines.append("IoU: " + ", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in iou))
    return "\n".join(lines)


def _of_speeds(rows: list[ResultRow]) -> str:
    peaks = {r.model: r.conditions["speed"]["peak_memory_mb"] for r in rows}
    energy = {r.model: r.conditions["speed"]["energy_mj_img"] for r in rows}
    own = ("ratio_range", "peak_memory_mb", "energy_mj_img", "timing")
    return "\n".join([format_speeds(rows),
                      ", ".join(f"{k} {v}" for k, v in rows[0].conditions["speed"].items() if k not in own),
                      "peak memory: " + (", ".join(f"{n} {v:.0f} MiB" for n, v in peaks.items() if v)
                                         or "measured on a GPU only"),
                      "energy an image: " + (", ".join(f"{n} {v:.3g} mJ" for n, v in energy.items() if v)
                                             or "-")])
