"""Two plans side by side, and what a policy between them would cost and give, as the Gaussian process of a search
expects."""
import html
from collections.abc import Callable
from pathlib import Path

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure

from vitlab.plan import CompressionPlan
from vitlab.plots.training import compare_plans
from vitlab.runtime.files import InputError
from vitlab.search import SearchSpace, Study
from vitlab.search.explain import Predict
from vitlab.workbench.explore.base import Explorer, show
from vitlab.workbench.explore.study import Watched, measured, watch
from vitlab.workbench.searching import cost_function

DENSE, DRAGGED = "dense", "dragged"
MEASURES = {"top1_pct": "top-1 on a slice of train (%)", "miou_pct": "mIoU on a slice of train (%)",
            "agree_pct": "classified as by the dense model (%)"}
CELL = "padding-right: 2em; white-space: nowrap; line-height: 1.5"


class Expectation:
    """What a study expects of any policy: its cost, and what the Gaussian process of its search makes of all that was
    measured."""

    def __init__(self, study: Study | str | Path) -> None:
        """Raises InputError for a folder that holds no study, one with fewer than two evaluations, or one in
        milliseconds, whose table the study alone has."""
        self.study: Watched = watch(study)
        self.space: SearchSpace = self.study.space
        evaluations = self.study.evaluations()
        if len(evaluations) < 2:
            raise InputError(f"{self.study.folder}: two evaluations are needed; there are {len(evaluations)}")
        if not isinstance(study, Study) and self.study.unit == "latency_ms":
            raise InputError(f"{study}: its budget is in latency_ms, which is measured; the Study that "
                             f"searching.search returns is needed")
        self.cost = study.budget.cost if isinstance(study, Study) else cost_function(self.space, self.study.unit, None)
        self.best = max(evaluations, key=lambda e: e.value)
        self.labels = {"value": self.study.label,
                       **{name: label for name, label in MEASURES.items() if label != self.study.label}}
        self.labels = {name: label for name,
                       label in self.labels.items() if name == "value" or self._varies(evaluations, name)}
        self.beliefs: dict[str, Predict] = {name: self.study.belief(evaluations, name) for name in self.labels}

    @staticmethod
    def _varies(evaluations: list, measure: str) -> bool:
        """Whether every evaluation has it and not all the same: without labels, top-1 is 0 throughout."""
        found = [e.measures.get(measure) for e in evaluations]
        return None not in found and len(set(found)) > 1

    def __call__(self, policy: np.ndarray) -> dict[str, tuple[float, float]]:
        """{measure: (mean, standard deviation)} for a policy (D), "value" among them; the measurement's own noise is
        left out."""
        return {name: tuple(float(v[0]) for v in belief(policy[None])) for name, belief in self.beliefs.items()}

    def plan(self, policy: np.ndarray) -> CompressionPlan:
        """A plan with the counts of a policy (D): how many stay is right, which ones is not asked."""
        shape = self.space.shape
        return self.space.plan(policy, heads=torch.ones(shape.depth, shape.num_heads),
                               neurons=torch.ones(shape.depth, shape.num_neurons),
                               tokens=torch.ones(shape.depth, shape.num_patches))


class Drag:
    """Controls that move one policy: a choice of rates, a slider, and the way back to the study's best."""

    def __init__(self, expectation: Expectation) -> None:
        space, self.expectation = expectation.space, expectation
        self.policy = np.array(expectation.best.policy)                         # (D)
        self.on_change: Callable[[], None] = lambda: None
        groups = {group: [i for i, g in enumerate(space.groups) if g == group] for group in space.groups}
        choices = [(f"{group}, all blocks", where) for group, where in groups.items() if len(where) > 1]
        choices += [(name, [i]) for i, name in enumerate(space.names)]
        wide = {"style": {"description_width": "7em"}, "layout": {"width": "24em"}}
        self.rates = ipywidgets.Dropdown(options=[label for label, _ in choices], description="drag", **wide)
        self.slider = ipywidgets.FloatSlider(0, min=0, max=space.max_ratio, step=0.01, readout_format=".1%",
                                             description="cut", **wide)
        self.back = ipywidgets.Button(description="back to the best", icon="undo")
        self._where, self._base = dict(choices), self.policy
        self.box = ipywidgets.HBox([self.rates, self.slider, self.back], layout={"flex_flow": "row wrap"})
        self.rates.observe(lambda _: self._take_hold(), "value")
        self.slider.observe(lambda _: self._move(), "value")
        self.back.on_click(lambda _: self._reset())
        self._take_hold()

    def _take_hold(self) -> None:
        """From now on the slider moves the chosen rates from where they are."""
        self._base = self.policy
        self.slider.value = float(self._base[self._where[self.rates.value]].mean())

    def _move(self) -> None:
        """The chosen rates all move by the same amount, as far as each may."""
        where, self.policy = self._where[self.rates.value], self._base.copy()
        self.policy[where] = np.clip(self._base[where] + self.slider.value - self._base[where].mean(), 0,
                                     self.slider.max)
        self.on_change()

    def _reset(self) -> None:
        self.policy = np.array(self.expectation.best.policy)
        self._take_hold()
        self.on_change()

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, measured of the best policy, expected of this one)."""
        asked, best = self.expectation, self.expectation.best
        price, limit = float(asked.cost(self.policy[None])[0]), asked.study.limit
        found = [(f"cost ({asked.study.unit}), at most {limit:.4g}", f"{best.cost:.4g}",
                  f"{price:.4g}, {price / limit:.1%} of the budget")]
        for name, (mean, deviation) in asked(self.policy).items():
            found.append((asked.labels[name], measured(asked.study, best, name), f"{mean:.4g} \u00b1 {deviation:.2g}"))
        return found

    def told(self) -> str:
        """The rows as an HTML table."""
        head = ("", f"best (number {self.expectation.best.index}), measured", f"{DRAGGED}, expected \u00b1 deviation")
        lines = ["".join(f'<td style="{CELL}">{html.escape(value)}</td>' for value in row)
                 for row in (head, *self.rows())]
        return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def plan_explorer(plans: dict[str, CompressionPlan], study: Study | str | Path | None = None) -> Explorer:
    """Two plans side by side: heads, neurons and tokens kept in each block, and MACs by part, beside the dense model's.

    With a study (or its folder) one of them can be dragged: from the best policy of the study the rate of one
    dimension, or of a group (all blocks' neurons, heads or tokens by the same amount), is moved, and its cost and the
    expected value and top-1 are told as mean +/- one standard deviation of the search's Gaussian process. Raises
    InputError for plans of different models, and for what `Expectation` refuses.
    """
    expectation = None if study is None else Expectation(study)
    shapes = [*(plan.shape for plan in plans.values()), *([expectation.space.shape] if expectation else [])]
    if not shapes:
        raise InputError("there is no plan to show; at least one, or a study, is needed")
    for plan in plans.values():
        plan.check_fits(shapes[-1])
    known = {**plans, DENSE: CompressionPlan.empty(shapes[0])}
    drag = Drag(expectation) if expectation else None
    names = [*known, *([DRAGGED] if drag else [])]
    wide = {"style": {"description_width": "7em"}, "layout": {"width": "24em"}}
    left = ipywidgets.Dropdown(options=names, value=names[0], description="plan", **wide)
    right = ipywidgets.Dropdown(options=names, value=DRAGGED if drag else names[min(1, len(names) - 1)],
                                description="beside it", **wide)
    text, picture = ipywidgets.HTML(), ipywidgets.Image(format="png", layout={"width": "100%", "max_width": "940px"})

    def chosen() -> dict[str, CompressionPlan]:
        return {name: expectation.plan(drag.policy) if name == DRAGGED else known[name]
                for name in (left.value, right.value)}

    def figure() -> Figure:
        """The picture, and below it what the table says of the dragged plan where it is in there."""
        rows = drag.rows() if drag and DRAGGED in (left.value, right.value) else []
        return compare_plans(chosen(), "\n".join(f"{DRAGGED}, {what}: {value}" for what, _, value in rows))

    def draw(*_: object) -> None:
        text.value = drag.told() if drag else ""
        show(picture, compare_plans(chosen()))
    for widget in (left, right):
        widget.observe(draw, "value")
    if drag:
        drag.on_change = draw
    draw()
    return Explorer([ipywidgets.HBox([left, right]), *([drag.box] if drag else []), text, picture], figure)
