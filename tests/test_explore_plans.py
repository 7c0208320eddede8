"""Plans side by side: bars and MACs as counted, a dragged rate's cost as the budget's, its expectation as the search's
GP has it."""
import dataclasses
import threading
import time

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_explore_study import SHAPE, SPACE, made_study, objective

from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Select
from vitlab.plots.plans import compare_plans
from vitlab.runtime.files import InputError
from vitlab.search.sampling import Problem
from vitlab.search.strategies import predictor
from vitlab.search.study import INFO
from vitlab.workbench.explore.base import observe
from vitlab.workbench.explore.plans import Expectation, plan_explorer

matplotlib.use("agg")
CUT = CompressionPlan(shape=SHAPE,
                      blocks=(BlockPlan(heads=(0, 3), neurons=tuple(range(19))), BlockPlan(tokens=Select(kept=11))))
EMPTY = CompressionPlan.empty(SHAPE)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def study(tmp_path):
    return made_study(tmp_path / "study")


def drag_of(explorer) -> tuple:
    """(which rate, the slider, the way back, the text)."""
    _, box, text, _ = explorer.children
    return *box.children, text


def bar_sums(figure) -> list[float]:
    """The length of each stacked bar of MACs, top to bottom."""
    patches = figure.axes[3].patches
    places = sorted({round(p.get_y(), 6) for p in patches})
    return [sum(p.get_width() for p in patches if round(p.get_y(), 6) == place) for place in places]


def test_bars_of_macs_add_up_to_each_plans_own_and_the_dense_models_is_first():
    figure = compare_plans({"cut": CUT, "uncut": EMPTY})
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["dense", "cut", "uncut"]
    totals = [cost.gmacs(plan) for plan in (EMPTY, CUT, EMPTY)]
    np.testing.assert_allclose(bar_sums(figure), np.array(totals) * 1e3, rtol=1e-9)        # in 10^6
    parts = {p.get_label(): [r.get_width() for r in p] for p in figure.axes[3].containers}
    assert "select" in parts and "reconstruct" not in parts                                 # none of the three has any
    np.testing.assert_allclose(parts["select"], [0, cost.macs(CUT)["select"] / 1e6, 0], rtol=1e-9)
    texts = [t.get_text() for t in figure.axes[3].texts]
    assert "100.0%" in texts[0] and f"{totals[1] / totals[0]:.1%}" in texts[1]


def test_per_block_bars_are_still_those_of_the_plans():
    heads, neurons, tokens, _ = compare_plans({"cut": CUT}).axes
    assert [p.get_height() for p in heads.patches] == pytest.approx([100 * 2 / 7, 100])
    assert [p.get_height() for p in neurons.patches] == pytest.approx([100 * 19 / 53, 100])
    assert [p.get_height() for p in tokens.patches] == pytest.approx([100 * n / 36 for n in CUT.tokens_per_block()])


def test_two_plans_stand_side_by_side_as_chosen_and_the_dense_model_is_one_of_them():
    explorer = plan_explorer({"one": CUT, "two": EMPTY})
    left, right = explorer.children[0].children
    assert left.options == right.options == ("one", "two", "dense") and (left.value, right.value) == ("one", "two")
    before = explorer.children[-1].picture
    right.value = "dense"
    assert explorer.children[-1].picture != before
    # dense beside itself once
    assert [t.get_text() for t in explorer.figure().axes[3].get_yticklabels()] == ["dense", "one"]


def test_a_dragged_rate_costs_what_the_budget_says_and_its_expectation_is_the_gaussian_processs(study):
    explorer = plan_explorer({"cut": CUT}, study)
    rates, slider, _, text = drag_of(explorer)
    rates.value = "neurons 1"
    policies = np.array([e.policy for e in study.evaluations])
    models = {name: predictor(Problem(SPACE, study.budget), policies, np.array(values), study.options, None)
              for name, values in {"value": [e.value for e in study.evaluations],
                                   "top1": [e.measures["top1_pct"] for e in study.evaluations]}.items()}
    for ratio in (0.05, 0.45):
        slider.value = ratio
        policy = np.array(study.best.policy)
        policy[1] = ratio
        assert f">{float(study.budget.cost(policy[None])[0]):.4g}, " in text.value
        for name, predict in models.items():
            mean, deviation = (float(v[0]) for v in predict(policy[None]))
            assert f"{mean:.4g} \u00b1 {deviation:.2g}" in text.value, name
    assert "top-1 on a slice of train (%)" in text.value
    assert "minus the distance to the dense model (nats)" in text.value
    assert "classified as" not in text.value                        # what was not measured is not expected


def test_the_dragged_plan_has_the_counts_of_its_policy(study):
    expectation = Expectation(study)
    for policy in np.array([e.policy for e in study.evaluations]):
        wanted, found = SPACE.counts(policy[None]), cost.counts_of(expectation.plan(policy))
        for name in ("heads", "neurons", "attended", "in_mlp", "ranking"):
            assert getattr(wanted, name)[0].tolist() == getattr(found, name).tolist()


def test_a_group_moves_by_one_amount_as_far_as_each_may_and_comes_back_the_same_way(study):
    explorer = plan_explorer({"cut": CUT}, study)
    rates, slider, back, text = drag_of(explorer)
    assert rates.options[:2] == ("neurons, all blocks", "heads, all blocks")
    rates.value = "heads, all blocks"
    best, start, first = np.array(study.best.policy), slider.value, text.value
    assert start == pytest.approx(best[2:4].mean())
    for value in (0.5, 0.0, 0.31):
        slider.value = value
        moved = best.copy()
        moved[2:4] = [min(max(b + value - start, 0), 0.5) for b in best[2:4]]
        assert f"{float(study.budget.cost(moved[None])[0]):.4g}, " in text.value
    slider.value = start
    assert text.value == first
    slider.value = 0.31
    rates.value = "neurons 0"                       # goes on from the heads as they were dragged
    assert text.value != first
    back.click()
    assert text.value == first and slider.value == best[0]


def test_dragging_changes_the_picture_and_the_note_of_the_figure(study):
    explorer = plan_explorer({"cut": CUT}, study.folder)
    _, slider, _, _ = drag_of(explorer)
    before, note = explorer.children[-1].picture, explorer.figure()._supxlabel.get_text()
    slider.value = 0.0 if slider.value > 0.2 else 0.5
    assert explorer.children[-1].picture != before and explorer.figure()._supxlabel.get_text() != note
    assert note.count("\n") == 2 and "of the budget" in note


def test_top_1_without_labels_is_not_expected(tmp_path):
    def unlabelled(policy: np.ndarray) -> dict[str, float]:
        found = objective(policy)
        return {**found, "top1_pct": 0.0, "agree_pct": 80 - 9 * found["loss"]}
    study = made_study(tmp_path, measure=unlabelled)
    assert list(Expectation(study)(np.array(study.best.policy))) == ["value", "agree_pct"]


def test_a_folder_gives_the_costs_of_its_study_but_not_those_that_were_measured_on_a_machine(study):
    policy = np.full((1, SPACE.size), 0.3)
    assert Expectation(study.folder).cost(policy) == study.budget.cost(policy)
    path = study.folder / INFO
    path.write_text(path.read_text().replace('"unit": "gmacs"', '"unit": "latency_ms"'))
    with pytest.raises(InputError, match="latency_ms, which is measured"):
        plan_explorer({"cut": CUT}, study.folder)


def test_plans_of_another_model_or_none_at_all_are_refused(study):
    other = CompressionPlan.empty(dataclasses.replace(SHAPE, num_neurons=59))
    with pytest.raises(InputError, match="num_neurons"):
        plan_explorer({"one": CUT, "other": other})
    with pytest.raises(InputError, match="num_neurons"):
        plan_explorer({"other": other}, study)
    with pytest.raises(InputError, match="no plan"):
        plan_explorer({})


def test_a_study_with_one_evaluation_is_refused(tmp_path):
    with pytest.raises(InputError, match="two evaluations are needed; there are 1"):
        Expectation(made_study(tmp_path, evaluations=1))


def test_changes_in_several_threads_are_answered_one_after_the_other():
    sliders, busy, seen = [ipywidgets.IntSlider() for _ in range(3)], threading.Lock(), []

    def draw(change) -> None:
        seen.append(busy.acquire(blocking=False))
        time.sleep(0.02)
        busy.release()
    for slider in sliders:
        observe([slider], draw)
    threads = [threading.Thread(target=setattr, args=(slider, "value", 1)) for slider in sliders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 3
