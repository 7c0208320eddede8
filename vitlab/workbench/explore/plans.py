"""Two plans side by side, and what a policy would cost and give, as the Gaussian process of a search expects."""
import html
from pathlib import Path

import ipywidgets
import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure

from vitlab.measure.distance import output_of
from vitlab.plan import CompressionPlan
from vitlab.plots.plans import compare_plans
from vitlab.runtime.files import require
from vitlab.search import SearchSpace, Study
from vitlab.search.explain import Predict
from vitlab.workbench.explore.base import Canvas, Explorer, Menu, observe, row, sized
from vitlab.workbench.explore.study import Watched, measured, watch
from vitlab.workbench.searching import cost_function

DENSE, DRAGGED = "dense", "dragged"
MEASURES = {"top1_pct": "top-1 on a slice of train (%)", "miou_pct": "mIoU on a slice of train (%)",
            "agree_pct": "{agreement} (%)"}
CELL = "padding-right: 2em; line-height: 1.5"
WIDE = sized("7em", "24em")


class Expectation:
    """What a study expects of any policy: its cost, and what its Gaussian process makes of all that was measured."""

    def __init__(self, study: Study | str | Path) -> None:
        """Raises InputError for a folder without two evaluations of a study, or of one in milliseconds."""
        self.study: Watched = watch(study)
        self.space: SearchSpace = self.study.space
        evaluations = self.study.evaluations()
        require(len(evaluations) >= 2, f"{self.study.folder}: two evaluations are needed; there are {len(evaluations)}")
        require(isinstance(study, Study) or self.study.unit != "latency_ms", f"{study}: its budget is in latency_ms, "
                "which is measured; the Study that searching.search returns is needed")
        self.cost = study.budget.cost if isinstance(study, Study) else cost_function(self.space, self.study.unit, None)
        self.best = max(evaluations, key=lambda e: e.value)
        self.labels = {"value": self.study.label}
        for name, label in MEASURES.items():
            found = [e.measures.get(name) for e in evaluations]                 # without labels, top-1 is 0 throughout
            label = label.format(agreement=output_of(self.space.shape).agreement)
            if label != self.study.label and None not in found and len(set(found)) > 1:
                self.labels[name] = label
        self.beliefs: dict[str, Predict] = {name: self.study.belief(evaluations, name) for name in self.labels}

    def __call__(self, policy: np.ndarray) -> dict[str, tuple[float, float]]:
        """{measure: (mean, standard deviation)} for a policy (D), "value" among them, without its noise."""
        return {name: tuple(float(v[0]) for v in belief(policy[None])) for name, belief in self.beliefs.items()}

    def plan(self, policy: np.ndarray) -> CompressionPlan:
        """A plan with the counts of a policy (D): how many stay is right, which ones is not asked."""
        shape = self.space.shape
        return self.space.plan(policy, heads=torch.ones(shape.depth, shape.num_heads),
                               neurons=torch.ones(shape.depth, shape.num_neurons),
                               tokens=torch.ones(shape.depth, shape.num_patches))


class Drag(ipywidgets.HBox):
    """Controls that move one policy: a choice of rates, a slider, and the way back to the study's best."""

    policy = traitlets.Any()                    # (D)

    def __init__(self, expectation: Expectation) -> None:
        space, self.expectation = expectation.space, expectation
        groups = {group: [i for i, g in enumerate(space.groups) if g == group] for group in space.groups}
        choices = [(f"{group}, all blocks", where) for group, where in groups.items() if len(where) > 1]
        choices += [(name, [i]) for i, name in enumerate(space.names)]
        self.rates = Menu(options=[label for label, _ in choices], description="drag", **WIDE)
        self.slider = ipywidgets.FloatSlider(0, min=0, max=space.max_ratio, step=0.01, readout_format=".1%",
                                             description="cut", **WIDE)
        back = ipywidgets.Button(description="back to the best", icon="undo")
        super().__init__([self.rates, self.slider, back], layout={"flex_flow": "row wrap"})
        self._where = dict(choices)
        self.rates.observe(self._take_hold, "value")
        self.slider.observe(self._move, "value")
        back.on_click(self._reset)
        self._reset()

    def _take_hold(self, *_: object) -> None:
        """From now on the slider moves the chosen rates from where they are."""
        self._base = self.policy
        self.slider.value = float(self._base[self._where[self.rates.value]].mean())

    def _move(self, *_: object) -> None:
        """The chosen rates all move by the same amount, as far as each may."""
        where, moved = self._where[self.rates.value], self._base.copy()
        moved[where] = np.clip(moved[where] + self.slider.value - moved[where].mean(), 0, self.slider.max)
        self.policy = moved

    def _reset(self, *_: object) -> None:
        self.policy = np.array(self.expectation.best.policy)
        self._take_hold()

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
        lines = ["".join(f'<td style="{CELL}">{html.escape(value)}</td>' for value in line)
                 for line in (head, *self.rows())]
        return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def plan_explorer(plans: dict[str, CompressionPlan], study: Study | str | Path | None = None) -> Explorer:
    """Two plans side by side: heads, neurons and tokens kept in each block, and MACs by part, beside the dense model's.

    With a study (or its folder) one of them can be dragged: from the study's best policy the rate of one dimension, or
    of a group (all blocks' by the same amount), is moved, and its cost and expected value and top-1 are told as mean
    +/- one standard deviation. Raises InputError for plans of different models, and for what `Expectation` refuses.
    """
    expectation = None if study is None else Expectation(study)
    shapes = [*(plan.shape for plan in plans.values()), *([expectation.space.shape] if expectation else [])]
    require(shapes, "there is no plan to show; at least one, or a study, is needed")
    for plan in plans.values():
        plan.check_fits(shapes[-1])
    known = {**plans, DENSE: CompressionPlan.empty(shapes[0])}
    drag = Drag(expectation) if expectation else None
    names = [*known, *([DRAGGED] if drag else [])]
    left = Menu(options=names, value=names[0], description="plan", **WIDE)
    right = Menu(options=names, value=DRAGGED if drag else names[min(1, len(names) - 1)],
                 description="beside it", **WIDE)
    text, picture = ipywidgets.HTML(), Canvas()

    def chosen() -> dict[str, CompressionPlan]:
        return {name: expectation.plan(drag.policy) if name == DRAGGED else known[name]
                for name in (left.value, right.value)}

    def figure() -> Figure:
        """The picture, and below it what the table says of the dragged plan where it is in there."""
        rows = drag.rows() if drag and DRAGGED in (left.value, right.value) else []
        return compare_plans(chosen(), "\n".join(f"{DRAGGED}, {what}: {value}" for what, _, value in rows))

    def draw(*_: object) -> None:
        text.value = drag.told() if drag else ""
        picture.show(compare_plans(chosen()))
    observe([left, right], draw)
    if drag:
        observe([drag], draw, "policy")
    draw()
    return Explorer([row(left, right), *([drag] if drag else []), text, picture], figure)
