"""A search, evaluation by evaluation: what it had measured, what it believed, and what it measured next."""
import html
import warnings
from dataclasses import dataclass
from pathlib import Path

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from vitlab.measure.distance import output_of
from vitlab.plan.shape import ViTShape
from vitlab.plots.search import moment
from vitlab.runtime.files import InputError, read_json
from vitlab.runtime.uncertainty import error_name
from vitlab.search import SearchSpace, Study
from vitlab.search.acquisition import log_expected_improvement
from vitlab.search.explain import Predict, believed
from vitlab.search.strategies import Settings, incumbent
from vitlab.search.study import INFO, Evaluation, read_journal
from vitlab.workbench.explore.base import Canvas, Explorer, Menu, observe, repeat, row, sized

METRICS = {"distill_loss": "minus the distance to the dense model ({unit})",
           "top1_pct": "top-1 on a slice of train (%)", "miou_pct": "mIoU on a slice of train (%)"}
POINTS = 61                                     # of the curves along a dimension
SECONDS = 1.0                                   # between two looks at the journal of a search that is followed


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A study as its folder tells it; nothing is ever written there."""

    folder: Path
    space: SearchSpace
    options: Settings
    strategy: str
    limit: float                                # of the budget, in its unit
    unit: str
    label: str                                  # names the value that is maximised
    metric: str = ""                            # what it is by the objective's own name

    def error(self, evaluation: Evaluation, measure: str = "value") -> float | None:
        """Standard error of what was measured; None where it is not known."""
        return evaluation.measures.get(error_name(self.metric if measure == "value" else measure))

    def evaluations(self) -> list[Evaluation]:
        """All that is measured by now, without a line that is being written. Raises InputError for a damaged one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read_journal(self.folder)

    def belief(self, evaluations: list[Evaluation], measure: str = "value") -> Predict:
        """policies (P, D) -> (mean, deviation), (P) each, by the Gaussian process that the search would ask after these
        evaluations, two at least; of what it maximises, or of another measure. In a batch, proposals that were not
        measured when the next one was made count with what was expected of them."""
        def known(e: Evaluation) -> float:
            if measure != "value":
                return e.measures[measure]
            pending = e.index >= len(evaluations) - len(evaluations) % self.options.batch
            return e.expected.get("mean", e.value) if pending else e.value
        return believed(self, np.array([e.policy for e in evaluations]), np.array([known(e) for e in evaluations]))


def watch(study: Study | str | Path) -> Watched:
    """A study, or its folder, to be looked at. Raises InputError naming the file where it is none."""
    path = (study.folder if isinstance(study, Study) else Path(study)) / INFO
    info = read_json(path)
    try:
        shape = ViTShape(**info["space"]["shape"])
        label = METRICS.get(info["about"].get("metric"), "value").format(unit=output_of(shape).unit)
        space = info["space"] | {"shape": shape, "units": tuple(info["space"]["units"])}
        return Watched(folder=path.parent, space=SearchSpace(**space), options=Settings(**info["settings"]),
                       strategy=info["strategy"], limit=float(info["budget"]["limit"]), unit=info["budget"]["unit"],
                       label=label, metric=str(info["about"].get("metric", "")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: no study ({error})") from None


def study_explorer(study: Study | str | Path) -> Explorer:
    """Scrub through a study, evaluation by evaluation: the best so far, the Gaussian process (mean +/- 2 deviations)
    and log EI along one dimension, the others held at the best policy so far and at the next, and what came next.

    "follow" looks at the journal every second and moves to its end, for a search that is running. Nothing is written.
    Raises InputError for a folder that holds no study.
    """
    found = watch(study)
    seen: list[Evaluation] = found.evaluations()
    beliefs: dict[int, Predict] = {}
    wide = sized("7em", "30em")
    place = ipywidgets.IntSlider(len(seen), 0, max(len(seen), 1), description="evaluations", **wide)
    play = ipywidgets.Play(value=len(seen), min=0, max=max(len(seen), 1), interval=600, description="play")
    dimension = Menu(options=found.space.names, description="along", **wide)
    follow = ipywidgets.Checkbox(False, description="follow the running search", indent=False)
    text, picture = ipywidgets.HTML(), Canvas()
    ipywidgets.jslink((play, "value"), (place, "value"))

    def figure() -> Figure:
        done, following = seen[:place.value], seen[place.value] if place.value < len(seen) else None
        index, grid = dimension.index, np.linspace(0, found.space.max_ratio, POINTS)
        lines, expected = {}, None
        if len(done) > 1:
            if len(done) not in beliefs:
                beliefs[len(done)] = found.belief(done)
            predict = beliefs[len(done)]
            best = max(done, key=lambda e: e.value)
            level = incumbent(predict, np.array([e.policy for e in done]), np.array([e.value for e in done]),
                              found.options)
            held = {"others as in the best": best, **({"others as in the next": following} if following else {})}
            for name, evaluation in held.items():
                moved = np.tile(np.array(evaluation.policy), (POINTS, 1))       # (G, D)
                moved[:, index] = grid
                mean, deviation = predict(moved)
                lines[name] = (mean, deviation, log_expected_improvement(mean, deviation, level),
                               evaluation.policy[index])
            if following:
                expected = tuple(float(v[0]) for v in predict(np.array(following.policy)[None]))
        return moment([e.value for e in done], total=found.options.evaluations, label=found.label,
                      dimension=dimension.value, grid=grid, lines=lines, expected=expected,
                      then=following.value if following else None, errors=[found.error(e) for e in done])

    def draw(*_: object) -> None:
        text.value = told(found, seen, place.value)
        picture.show(figure())

    def look() -> bool:
        """Read on, move to the end, and say whether to look again."""
        try:
            fresh = found.evaluations()
        except InputError as error:
            text.value = html.escape(str(error))
            follow.value = False
            return False
        if fresh != seen:
            if fresh[:len(seen)] != seen:                                       # begun anew
                beliefs.clear()
            seen[:] = fresh
            place.max = play.max = max(len(seen), 1)
            place.value = len(seen)
        return follow.value and explorer.comm is not None

    observe([place, dimension], draw)
    follow.observe(lambda change: change.new and repeat(look, SECONDS), "value")
    draw()
    explorer = Explorer([row(place, play, follow), dimension, text, picture], figure, picture)
    return explorer


def measured(found: Watched, evaluation: Evaluation, measure: str = "value") -> str:
    """What was measured, with its standard error where one is known."""
    value = evaluation.value if measure == "value" else evaluation.measures[measure]
    error = found.error(evaluation, measure)
    return f"{value:.4g}" + ("" if error is None else f" \u00b1 {error:.2g}")


def told(found: Watched, seen: list[Evaluation], count: int) -> str:
    """What the picture shows of the first `count` evaluations, as HTML."""
    if not seen[:count]:
        return f"nothing was measured yet; {len(seen)} evaluations are in the journal"
    best = max(seen[:count], key=lambda e: e.value)
    lines = [f"<b>{len(seen[:count])} of {found.options.evaluations}</b> evaluations by {html.escape(found.strategy)}; "
             f"best so far <b>{measured(found, best)}</b> (number {best.index}, {best.cost:.4g} of {found.limit:.4g} "
             f"{html.escape(found.unit)})"]
    for following in seen[count:count + 1]:
        hoped = following.expected
        lines.append(f"next: number {following.index} by {html.escape(following.by)}, "
                     + (f"expected {hoped['mean']:.4g} &plusmn; {hoped['deviation']:.2g}, log EI "
                        f"{hoped['log_ei']:.2f}, " if hoped else "")
                     + f"then measured {measured(found, following)}")
    return f'<div style="line-height: 1.5">{"<br>".join(lines)}</div>'
