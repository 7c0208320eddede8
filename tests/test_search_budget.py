"""Projection to a budget: against the cost of the plans themselves, and closed forms on toy costs; policies that are
drawn."""
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from vitlab.plan.cost import gmacs, macs_of
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError
from vitlab.search import Budget, SearchSpace
from vitlab.search.sampling import Problem, neighbours, random_policies, uniform_policies, varied_policies

MODES = ("none", "select", "select_per_stage", "merge", "merge_per_stage")
SHAPES = {"12 x 3": (12, 3), "6 x 3": (6, 3), "2 x 1": (2, 1), "5 x 13": (5, 13)}       # blocks x heads
TOLERANCE = 0.02


def shape_of_size(blocks: int, heads: int, grid: tuple[int, int] = (5, 7), head_dim: int = 16) -> ViTShape:
    dim = heads * head_dim
    return ViTShape(img_size=(grid[0] * 16, grid[1] * 16), patch_size=(16, 16), embed_dim=dim, depth=blocks,
                    num_heads=heads, head_dim=head_dim, num_neurons=4 * dim, num_classes=10)


DEIT_TI = shape_of_size(12, 3, (14, 14), 64)


def budget_of(space: SearchSpace, part: float, tolerance: float = TOLERANCE) -> Budget:
    """A budget `part` of the way from everything cut (0) to nothing cut (1)."""
    def cost(policies: np.ndarray) -> np.ndarray:
        return macs_of(space.shape, space.counts(policies))["total"] / 1e9
    least, dense = cost(np.array([[space.max_ratio] * space.size, [0.0] * space.size])).tolist()
    return Budget.of(space, least + part * (dense - least), cost, tolerance=tolerance)


def toy(cost, limit: float, size: int, tolerance: float = TOLERANCE, max_ratio: float = 0.5) -> Budget:
    return Budget(limit=limit, cost=cost, max_ratio=max_ratio, size=size, tolerance=tolerance)


def plan_gmacs(space: SearchSpace, policy: np.ndarray) -> float:
    """The cost of the plan that the policy stands for."""
    shape, generator = space.shape, torch.Generator().manual_seed(1)
    scores = {name: torch.rand(shape.depth, width, generator=generator) + 0.01
              for name,
              width in (("heads", shape.num_heads), ("neurons", shape.num_neurons), ("tokens", shape.num_patches))}
    return gmacs(space.plan(policy, **scores))


def draw(space: SearchSpace, count: int, seed: int) -> np.ndarray:
    """Half uniform in the box, a quarter with many zeros, a quarter at corners."""
    rng = np.random.default_rng(seed)
    policies = rng.uniform(0, space.max_ratio, (count, space.size))
    policies[count // 2:] *= rng.integers(0, 2, (count - count // 2, space.size))
    policies[count * 3 // 4:] = np.where(policies[count * 3 // 4:] > 0, space.max_ratio, 0)
    return policies


@pytest.mark.parametrize("blocks, heads", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", MODES)
@pytest.mark.parametrize("part", [0.04, 0.3, 0.6, 0.9])
def test_a_policy_meets_the_budget_exactly_where_it_is_said_to(blocks, heads, tokens, part):
    space = SearchSpace(shape=shape_of_size(blocks, heads), tokens=tokens)
    budget = budget_of(space, part)
    drawn = draw(space, 12, seed=blocks)
    projected, meets = budget.project(drawn)
    assert projected.shape == drawn.shape and meets.shape == (12,) and meets.dtype == bool
    assert (projected >= 0).all() and (projected <= space.max_ratio).all()
    costs = np.array([plan_gmacs(space, policy) for policy in projected])
    # No tolerance: costs are sums of integers, divided by 1e9 once on both ways.
    assert (meets == ((costs <= budget.limit) & (costs >= budget.limit * (1 - TOLERANCE)))).all()
    assert (meets == budget.meets(projected)).all()
    assert (costs <= budget.limit).all()            # what fails is too cheap: a single unit was more than the tolerance


@pytest.mark.parametrize("tokens, part",
                         [("select", 0.3), ("select", 0.45), ("select", 0.7), ("merge", 0.45), ("none", 0.4),
                                          ("select_per_stage", 0.45), ("merge_per_stage", 0.45)])
def test_most_random_policies_of_deit_tiny_reach_the_budget(tokens, part):
    space = SearchSpace(shape=DEIT_TI, tokens=tokens)
    _, meets = budget_of(space, part).project(np.random.default_rng(0).uniform(0, 0.5, (150, space.size)))
    assert meets.mean() >= 0.95


@pytest.mark.parametrize("blocks, heads, dim, tokens, part", [(12, 3, 64, "none", 0.02), (6, 3, 64, "select", 0.97)] + [
    (4, 2, 16, tokens, 0.8) for tokens in ("none", "select")])
def test_most_random_policies_reach_budgets_near_the_ends_and_where_heads_are_few(blocks, heads, dim, tokens, part):
    space = SearchSpace(shape=shape_of_size(blocks, heads, (14, 14), dim), tokens=tokens)
    _, meets = budget_of(space, part).project(np.random.default_rng(0).uniform(0, 0.5, (100, space.size)))
    assert meets.mean() >= 0.9


@pytest.mark.parametrize("tokens", MODES)
def test_a_policy_that_meets_the_budget_still_does_after_projection(tokens):
    space = SearchSpace(shape=shape_of_size(6, 3), tokens=tokens)
    budget = budget_of(space, 0.5, tolerance=0.1)
    drawn = draw(space, 4000, seed=3)
    feasible = drawn[budget.meets(drawn)][:60]
    assert len(feasible) >= 20                      # found by chance, not by projection
    projected, meets = budget.project(feasible)
    assert meets.all() and (budget.cost(projected) >= budget.cost(feasible)).all()
    again, meets = budget.project(projected)
    assert meets.all() and (budget.cost(again) >= budget.cost(projected)).all()


@pytest.mark.parametrize("group", ["neurons", "heads", "tokens"])
def test_what_a_policy_leaves_alone_stays_whole_while_the_rest_can_carry_the_cut(group):
    space = SearchSpace(shape=shape_of_size(12, 13))
    mine = np.array([g == group for g in space.groups])
    rng = np.random.default_rng(5)
    drawn = np.where(mine, rng.uniform(0.05, 0.5, (30, space.size)), 0)
    drawn[:, mine.argmax()] = rng.choice([0.05, 0.5], 30)
    reach = float(budget_of(space, 0.5).cost(np.where(mine, 0.5, 0)[None])[0])
    budget = dataclasses.replace(budget_of(space, 0.5), limit=reach * 1.04)
    projected, meets = budget.project(drawn)
    assert meets.mean() > 0.9 and (projected[:, ~mine] == 0).all()
    # Below what the group can reach it is cut by the most there is, and the others begin.
    projected, meets = dataclasses.replace(budget, limit=reach * 0.9).project(drawn)
    assert meets.all() and (projected[:, ~mine] > 0).any(axis=1).all()
    assert np.allclose(projected[:, mine], 0.5, atol=1e-8)                  # bisected to 3 / 2^30


def test_ratios_keep_their_proportions_until_one_reaches_its_most():
    weights = np.array([5.0, 3.0, 2.0, 7.0])
    linear = lambda p: ((1 - p) @ weights)                                  # noqa: E731  a toy cost, smooth and exact
    policy = np.array([[0.1, 0.2, 0.0, 0.05], [0.4, 0.5, 0.0, 0.3], [0.01, 0.02, 0.0, 0.005]])
    # ratios must weigh 1.5: 0.5 + 0.6 + 0.35 = 1.45
    projected, meets = toy(linear, 17 - 1.5, 4).project(policy)
    assert meets.all()
    for row, weigh in zip(policy, (1.45, 5.6, 0.145)):
        # 3 / 2^30, grown tenfold
        assert np.allclose(projected[policy.tolist().index(row.tolist())], row * 1.5 / weigh, atol=1e-7)
    # 4 to carry: the second is at 0.5 (1.5 of it), so the first and last, twice as large and as large, share the other
    # 2.5.
    projected, _ = toy(linear, 17 - 4.0, 4).project(policy[:1])
    assert np.allclose(projected, [[0.1 * 2.5 / 0.85, 0.5, 0, 0.05 * 2.5 / 0.85]], atol=1e-7)
    # More than they have (7.5): the third takes the rest.
    projected, _ = toy(linear, 17 - 8.1, 4).project(policy[:1])
    assert np.allclose(projected, [[0.5, 0.5, 0.3, 0.5]], atol=1e-8)


def test_a_policy_that_cuts_nothing_is_cut_everywhere_alike():
    linear = lambda p: ((1 - p) @ np.array([5.0, 3.0, 2.0]))                # noqa: E731
    projected, meets = toy(linear, 8.0, 3).project(np.zeros((1, 3)))
    assert meets.all() and np.allclose(projected, 0.2, atol=1e-8)


def test_counts_that_fall_together_are_cut_one_by_one():
    steps = lambda p: np.floor(10 * (1 - p) + 1e-9).sum(axis=1)             # noqa: E731  seven dimensions of ten units
    projected, meets = toy(steps, 66.5, 7).project(np.full((1, 7), 0.3))
    # all at once it would be 63, and 66.5 * 0.98 = 65.2
    assert meets.all() and steps(projected).tolist() == [66]
    projected, meets = toy(steps, 66.5, 7, tolerance=0.001).project(np.full((1, 7), 0.3))
    assert not meets.any() and steps(projected).tolist() == [66]            # a unit is more than the tolerance


def test_projection_stays_in_the_box_for_tiny_and_largest_ratios():
    for max_ratio in (0.3, 0.7, 0.9):
        space = SearchSpace(shape=shape_of_size(2, 5), max_ratio=max_ratio)
        budget = budget_of(space, 0.4)
        policies = np.array([[1e-300] * 5, [1e-12] * 5, [max_ratio] * 5, [0.0] * 4 + [1e-9], [max_ratio] * 4 + [0.0]])
        projected, meets = budget.project(policies)
        space.check(projected)                                              # InputError outside the box
        assert meets.any()


@pytest.mark.parametrize("part", [0.0, 1e-12])
def test_the_lowest_budget_cuts_everything(part):
    space = SearchSpace(shape=shape_of_size(6, 3))
    projected, meets = budget_of(space, part).project(draw(space, 9, seed=6))
    assert meets.any() and space.keys(projected[meets]) == space.keys([[0.5] * space.size] * int(meets.sum()))


@pytest.mark.parametrize("limit", [0.2, 7.0, 10.0, 11.0, float("nan"), float("inf"), -1.0])
def test_an_unreachable_budget_is_refused_with_the_range(limit):
    linear = lambda p: 10 - 4 * p.sum(axis=1)                               # noqa: E731  from 8 (both at 0.25) to 10
    with pytest.raises(InputError, match=r"gmacs can't be met: this space reaches from 8 .*0.25\) to 10 "):
        toy(linear, limit, 2, max_ratio=0.25)
    toy(linear, 8.0, 2, max_ratio=0.25), toy(linear, 9.999, 2, max_ratio=0.25)
    with pytest.raises(InputError, match="latency_ms"):
        Budget(limit=limit, cost=linear, max_ratio=0.25, size=2, unit="latency_ms")


def test_a_budget_of_a_space_counts_its_gmacs_and_knows_its_dimensions():
    space = SearchSpace(shape=DEIT_TI, tokens="match_per_stage", max_ratio=0.75)
    budget, policies = Budget.of(space, 1.0), draw(space, 3, seed=0)
    assert (budget.limit, budget.size, budget.groups, budget.max_ratio, budget.unit, budget.tolerance) == (
        1.0, space.size, tuple(space.groups), 0.75, "gmacs", TOLERANCE)
    assert set(budget.groups) == {"heads", "neurons", "tokens"} and np.array_equal(budget.cost(policies), [
        plan_gmacs(space, policy) for policy in policies])
    other = Budget.of(space, 5.0, lambda policies: 10 * space.gmacs(policies), unit="latency_ms", tolerance=0.1)
    assert (other.unit, other.tolerance) == ("latency_ms", 0.1)
    assert np.array_equal(other.cost(policies), 10 * budget.cost(policies))


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, float("nan")])
def test_a_tolerance_outside_zero_to_one_is_refused(tolerance):
    with pytest.raises(InputError, match=r"tolerance is .*\(0, 1\)"):
        toy(lambda p: 10 - p.sum(axis=1), 9.5, 2, tolerance=tolerance)


def test_the_ends_of_a_budget_belong_to_it():
    budget = toy(lambda p: 128 - 64 * p.sum(axis=1), 96.0, 2, tolerance=0.25)            # exact in binary: 72 to 96
    given = np.array([[0.5, 0.0], [0.5, 2**-40], [0.5, 0.375], [0.5, 0.375 + 2**-40], [0.5 - 2**-40, 0.0]])
    assert budget.meets(given).tolist() == [True, True, True, False, False]
    assert budget.meets(given[0]).tolist() == [True]                        # one policy


# merging few patches adds the folds of whole blocks
@pytest.mark.parametrize("tokens", ["none", "select", "select_per_stage"])
def test_cost_falls_or_stays_as_ratios_grow(tokens):
    space = SearchSpace(shape=DEIT_TI, units=("heads", "neurons") if tokens == "none" else (), tokens=tokens)
    budget = budget_of(space, 0.5)
    cost = budget.cost(np.linspace(0, 0.5, 2000)[:, None] * np.ones(space.size))
    assert (np.diff(cost) <= 0).all()


@pytest.fixture(params=list(itertools.product(SHAPES.values(), ("select", "merge"))), ids=str)
def problem(request) -> Problem:
    (blocks, heads), tokens = request.param
    space = SearchSpace(shape=shape_of_size(blocks, heads), tokens=tokens)
    return Problem(space, budget_of(space, 0.5))


def test_policies_that_are_drawn_meet_the_budget(problem):
    space, count = problem.space, 11
    for draw_some in (random_policies, uniform_policies, varied_policies):
        policies = draw_some(problem, count, np.random.default_rng(0))
        assert 1 <= len(policies) <= count and policies.shape[1] == space.size
        assert problem.budget.meets(space.check(policies)).all()
        assert (policies == draw_some(problem, count, np.random.default_rng(0))).all()
    near = neighbours(problem, policies[:3], 40, np.random.default_rng(1))
    assert len(near) >= 1 and problem.budget.meets(space.check(near)).all()
    assert len(random_policies(problem, count, np.random.default_rng(0))) == count


def test_random_policies_use_every_dimension_and_differ(problem):
    policies = random_policies(problem, 40, np.random.default_rng(2))
    assert len({tuple(p) for p in policies.tolist()}) == 40
    assert ((policies > 0).mean(axis=0) > 0.5).all() and (policies.std(axis=0) > 0.03).all()


def test_uniform_policies_have_one_ratio_per_group_first_all_groups_then_each_alone(problem):
    space = problem.space
    groups = np.array(space.groups)
    policies = uniform_policies(problem, 12, np.random.default_rng(3))
    for policy in policies:
        for name in set(groups):
            # the last step may be taken by some blocks alone: 3 / 2^40 apart
            assert np.ptp(policy[groups == name]) < 1e-6
    first = policies[0]
    assert (first > 0).all()
    if space.shape.depth == 5:                                  # elsewhere a group alone may not reach the budget
        assert any((policy[groups != "tokens"] == 0).all() for policy in policies[1:4])


def test_varied_policies_try_one_group_alone_and_many_together():
    space = SearchSpace(shape=DEIT_TI, tokens="select")
    problem = Problem(space, budget_of(space, 0.6))
    groups = np.array(space.groups)
    policies = varied_policies(problem, 40, np.random.default_rng(4))
    tokens = policies[:, -1]
    assert len(policies) == 40 and tokens.min() < 0.05 and tokens.max() > 0.25
    assert (policies[:, groups != "tokens"].max(axis=1) == 0).any()
    trends = [np.corrcoef(range(12), p)[0, 1] for p in policies[4:, groups == "neurons"] if np.ptp(p) > 1e-6]
    # More in the last blocks, or in the first: noise alone over 12 blocks has a correlation beyond 0.9 once in 10^4.
    assert sum(t > 0.9 for t in trends) >= 2 and sum(t < -0.9 for t in trends) >= 2


def test_neighbours_are_near_and_not_all_the_same():
    space = SearchSpace(shape=DEIT_TI)
    problem = Problem(space, budget_of(space, 0.5))
    base = random_policies(problem, 1, np.random.default_rng(5))
    near = neighbours(problem, base, 100, np.random.default_rng(6))
    far = random_policies(problem, 100, np.random.default_rng(7))

    def distance(policies: np.ndarray) -> float:
        return float(np.median(np.abs(space.even(policies) - space.even(base)).mean(axis=1)))
    assert distance(near) < 0.5 * distance(far)                 # a quarter of the dimensions moved
    assert len(set(space.keys(near))) > 80
