"""What to cut in each dimension from curves of its own: against all policies of a coarse space and a closed form; and
the journal."""
import itertools
import json

import numpy as np
import pytest
from comparing import killed_after
from test_search_budget import DEIT_TI, MODES, budget_of, shape_of_size, toy

from vitlab.runtime.files import InputError, append_line, read_lines
from vitlab.search import SearchSpace
from vitlab.search.allocation import STEPS, allocate, levels
from vitlab.search.sampling import Problem
from vitlab.search.sensitivity import SENSITIVITY, measure_alone, start_policies

# Neurons alone, so many that the middle of a count is its ratio to 1e-3; the budget counts ratios, not neurons.
SPACE = SearchSpace(shape=shape_of_size(3, 4), units=("neurons",), tokens="none")
RATIOS = np.linspace(0, 0.5, STEPS + 1)


def convex(weights) -> list[list[tuple[float, float]]]:
    """weight * ratio^2 of each dimension, at every step."""
    return [[(float(r), float(w * r * r)) for r in RATIOS[1:]] for w in weights]


def linear(saved, limit: float, size: int):
    """A dense model costs 1, and a ratio of 1 in a dimension saves so much."""
    return toy(lambda p: 1 - np.asarray(p) @ saved, limit, size)


def test_levels_lie_in_the_box_and_hold_every_number_of_few_heads():
    space = SearchSpace(shape=DEIT_TI, max_ratio=0.8)
    found = levels(space)
    assert len(found) == space.size == 25
    for group, ratios in zip(space.groups, found):
        assert ratios == sorted(ratios) and ratios[0] > 0 and ratios[-1] <= 0.8
        # 2 or 1 of 3 heads
        assert ratios == pytest.approx([1 / 6, 0.5] if group == "heads" else [0.2, 0.4, 0.6, 0.8], abs=2e-3)
    policies = np.zeros((2, 25))
    policies[:, 12:24] = np.array(found[12])[:, None]
    assert space.counts(policies).heads.tolist() == [[2] * 12, [1] * 12]
    assert (space.from_even(space.even(policies)) == policies).all()


@pytest.mark.parametrize("heads", [2, 3, 4, 5, 6, 16])
def test_levels_are_all_numbers_of_heads_up_to_how_many_are_asked_for(heads):
    space = SearchSpace(shape=shape_of_size(1, heads), units=("heads",), tokens="none", max_ratio=0.8)
    gone = [heads - int(space.counts(np.array([[r]])).heads[0, 0]) for r in levels(space)[0]]
    most = heads - max(1, int(heads * 0.2 + 1e-9))
    assert gone == (list(range(1, most + 1)) if most <= 4
                    else sorted(set(gone))) and gone[-1] == most and len(gone) == min(4, most)


@pytest.mark.parametrize("limit", [0.62, 0.75, 0.9, 0.97])
def test_convex_losses_at_equal_costs_are_allocated_as_the_best_of_all_policies(limit):
    weights, saved = np.array([5.0, 1.0, 2.0]), np.full(3, 0.3)
    found = allocate(SPACE, linear(saved, limit, 3), convex(weights))
    every = np.array(list(itertools.product(RATIOS, repeat=3)))
    least = min(weights @ (p * p) for p in every if 1 - saved @ p <= limit)
    # A neuron's middle is not the step itself: 3 ratios off by at most 1 / 512 each, and slopes of at most 5.
    assert weights @ (found * found) <= least + 3 * 5 / 512
    assert limit * 0.98 <= 1 - saved @ found <= limit


def test_unlike_costs_give_the_closed_form_of_quadratic_losses():
    weights, saved = np.array([5.0, 1.0, 2.0]), np.array([0.5, 0.2, 0.1])
    need = 0.15
    # Lagrange: 2 w r = lambda s, s . r = need
    wanted = saved / weights * need / (saved**2 / weights).sum()
    found = allocate(SPACE, linear(saved, 1 - need, 3), convex(weights))
    # to a step, and what the budget's tolerance moves
    assert found == pytest.approx(wanted, abs=2 * RATIOS[1])


def test_what_costs_nothing_is_cut_first_and_alone_where_it_is_enough():
    curves = convex([1.0, 1.0, 1.0])
    curves[1] = [(0.25, 0.0), (0.5, 0.0)]
    found = allocate(SPACE, linear(np.full(3, 0.3), 0.9, 3), curves)
    # 0.3 r = 0.1, less 2 % of 0.9
    assert found[1] == pytest.approx(1 / 3, rel=0.07) and found[0] == found[2] == 0


def test_a_dip_in_a_curve_is_no_gain():
    dipped = [[(0.25, 0.2), (0.5, 0.01)], [(0.25, 0.07), (0.5, 0.15)], [(0.25, 0.5), (0.5, 1.0)]]
    flat = [[(0.25, 0.2), (0.5, 0.2)], *dipped[1:]]
    # one dimension is enough: the second, 0.15 < 0.2
    budget = linear(np.full(3, 0.3), 0.86, 3)
    assert allocate(SPACE, budget,
                    dipped)[0] == 0 and (allocate(SPACE, budget, dipped) == allocate(SPACE, budget, flat)).all()
    mixed = [list(reversed(curve)) for curve in dipped]
    assert (allocate(SPACE, budget, dipped) == allocate(SPACE, budget, mixed)).all()


def test_a_step_over_a_bump_is_taken_at_once():
    """A concave curve is worth its last point: on the way there it is dearer per ratio than the others, at its end
    cheaper."""
    curves = [[(0.25, 0.3), (0.5, 0.32)], [(0.25, 0.2), (0.5, 0.4)], [(0.25, 0.2), (0.5, 0.4)]]
    found = allocate(SPACE, linear(np.full(3, 0.3), 0.85, 3), curves)           # one dimension's most is just enough
    assert found[0] == pytest.approx(0.5, abs=0.01) and (found[1:] < 0.02).all()


@pytest.mark.parametrize("tokens", MODES)
@pytest.mark.parametrize("part", [0.2, 0.7])
def test_the_policy_meets_the_budget_in_every_space(tokens, part):
    space = SearchSpace(shape=DEIT_TI, tokens=tokens, max_ratio=0.8)
    weights = np.random.default_rng(0).uniform(0.1, 1, space.size)
    budget = budget_of(space, part)
    found = allocate(space, budget, [[(r, w * r**2) for r in ratios] for w, ratios in zip(weights, levels(space))])
    assert budget.meets(found).all()
    assert (found == allocate(space, budget,
                              [[(r, w * r**2) for r in ratios] for w, ratios in zip(weights, levels(space))])).all()


def test_what_can_not_be_met_or_was_not_measured_is_refused():
    budget = linear(np.full(3, 0.3), 0.7, 3)
    with pytest.raises(InputError, match="2 curves; this space has 3"):
        allocate(SPACE, budget, convex([1, 1]))
    with pytest.raises(InputError, match="budget of 0.7 gmacs can't be met by what was measured; 0.9"):
        allocate(SPACE, budget, [[(0.1, 1.0)]] * 3)                             # nothing is known beyond
    heads = SearchSpace(shape=shape_of_size(2, 2), units=("heads",), tokens="none")
    coarse = toy(lambda p: 100.0 - 10 * (heads.counts(p).heads == 1).sum(axis=1), 97, 2, tolerance=0.001)
    with pytest.raises(InputError, match="costs 90 gmacs, which can't be brought to within 0.1% below 97"):
        allocate(heads, coarse, [[(0.25, 1.0), (0.5, 1.0)]] * 2)


def objective(policy: np.ndarray) -> dict[str, float]:
    return {"value": 7 - float(policy @ [1.0, 4.0, 2.0]), "other": 3.0}


PROBLEM = Problem(SPACE, linear(np.full(3, 0.3), 0.8, 3))


def test_every_dimension_is_measured_alone_at_its_levels(tmp_path):
    rows = measure_alone(PROBLEM, objective, tmp_path / SENSITIVITY, progress=False)
    assert rows == read_lines(tmp_path / SENSITIVITY) and len(rows) == 1 + 3 * 4
    assert rows[0] == {"dimension": "", "ratio": 0.0, "value": 7.0, "loss": 0.0, "saved": 0.0,
                       "measures": {"other": 3.0}}
    for row, (d, level) in zip(rows[1:], itertools.product(range(3), range(4))):
        assert row["dimension"] == SPACE.names[d] and row["ratio"] == levels(SPACE)[d][level]
        assert row["loss"] == pytest.approx([1, 4,
                                             2][d] * row["ratio"]) and row["saved"] == pytest.approx(0.3 * row["ratio"])
    better = measure_alone(PROBLEM, lambda p: {"value": float(p.sum())}, tmp_path / "better", progress=False)
    assert {row["loss"] for row in better} == {0.0}                             # a gain is noise, or free


def test_whatever_else_a_cut_alone_gave_stands_in_its_row_and_is_read_back(tmp_path):
    def given(policy):
        return {**objective(policy), "distill_loss": 0.25, "distill_loss_se": 0.0625}
    rows = measure_alone(PROBLEM, given, tmp_path / SENSITIVITY, progress=False)
    assert all(row["measures"]["distill_loss_se"] == 0.0625 and "value" not in row["measures"] for row in rows)
    # nothing is measured again
    assert measure_alone(PROBLEM, objective, tmp_path / SENSITIVITY, progress=False) == rows


@pytest.mark.parametrize("stop", [0, 1, 6, 12])
def test_a_killed_measurement_goes_on_and_measures_each_once(tmp_path, stop):
    path, calls = tmp_path / SENSITIVITY, []
    with pytest.raises(KeyboardInterrupt):
        measure_alone(PROBLEM, killed_after(stop, objective, calls), path, progress=False)
    with open(path, "a") as file:
        file.write('{"dimension": "neurons 2", "ratio": 0.')                      # what a kill leaves of a line
    rows = measure_alone(PROBLEM, lambda p: calls.append(tuple(p)) or objective(p), path, progress=False)
    assert len(calls) == len(set(calls)) == 13 and rows == read_lines(path)
    assert rows == measure_alone(PROBLEM, objective, tmp_path / "whole", progress=False)


def test_rows_of_other_cuts_and_values_that_are_none_are_refused(tmp_path):
    for name, row in (("a", {"dimension": "heads 0", "ratio": 0.3, "value": 1.0, "loss": 0.0}),
                      ("b", {"criterion": "hsic"}), ("c", [1])):
        append_line(tmp_path / name, row)
        with pytest.raises(InputError, match=f"{name}: .* this study"):
            measure_alone(PROBLEM, objective, tmp_path / name, progress=False)
    with pytest.raises(InputError, match="objective gave nan for nothing cut"):
        measure_alone(PROBLEM, lambda p: {}, tmp_path / "d", progress=False)
    assert not (tmp_path / "d").exists()


def test_start_policies_of_one_group_are_the_allocated_one_and_others_near_it(tmp_path):
    rows = measure_alone(PROBLEM, objective, tmp_path / SENSITIVITY, progress=False)
    found = start_policies(PROBLEM, rows, 5, seed=3)
    curves = [[(r["ratio"], r["loss"]) for r in rows if r["dimension"] == name] for name in SPACE.names]
    assert (found[0] == allocate(*PROBLEM, curves)).all() and 1 < len(found) <= 5 and PROBLEM.budget.meets(found).all()
    assert (found == start_policies(PROBLEM, json.loads(json.dumps(rows)), 5, seed=3)).all()
    other = start_policies(PROBLEM, rows, 5, seed=4)
    assert (other[0] == found[0]).all() and not np.isin(other[1:], found[1:]).all()
    assert len(start_policies(PROBLEM, rows, 1, seed=3)) == 1


def test_start_policies_of_several_groups_have_one_of_each_alone_and_one_where_each_is_dearer(tmp_path):
    space = SearchSpace(shape=shape_of_size(2, 16), units=("neurons", "heads"), tokens="none")
    problem = Problem(space, linear(np.full(4, 0.3), 0.8, 4))
    rows = measure_alone(problem, lambda p: {"value": -float(p * p @ [1.0, 2.0, 1.5, 3.0])}, tmp_path / SENSITIVITY,
                         progress=False)
    found = start_policies(problem, rows, 8, seed=3)

    def allocated(weights):
        return allocate(*problem, [[(r["ratio"], weights[d] * r["loss"]) for r in rows if r["dimension"] == name]
                                   for d, name in enumerate(space.names)])
    many = 1e6                                                                  # that much dearer, nothing of it is cut
    expected = [allocated(w)
                for w in ((1, 1, 1, 1), (1, 1, many, many), (many, many, 1, 1), (3, 3, 1, 1), (1, 1, 3, 3))]
    assert (found[:5] == expected).all() and len(np.unique(found, axis=0)) == len(found) <= 8
    neurons, heads = found[:5, :2].sum(axis=1), found[:5, 2:].sum(axis=1)
    # the dearer, the less is cut of it
    assert heads[1] == neurons[2] == 0 < neurons[3] < neurons[0] < neurons[4] < neurons[1]
    assert (start_policies(problem, rows, 2, seed=3) == expected[:2]).all()
    tight = Problem(space, linear(np.full(4, 0.3), 0.6, 4))                     # one group alone saves 0.3 at most
    both = start_policies(tight, rows, 3, seed=3)
    assert tight.budget.meets(both).all() and (both[:3, :2].any(axis=1) & both[:3, 2:].any(axis=1)).all()
