"""Feasible policies at random, alone and around others. D dimensions, P policies, G groups.

The numbers of the draws are those of the tables of docs/search.md (benchmarks/search_quality.py), which compare the
search as a whole; no table tells what each is worth.
"""
import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vitlab.search.budget import Budget
from vitlab.search.space import SearchSpace

ATTEMPTS = 10                                   # rounds of drawing before a space counts as having no feasible policy
STEP_SIZES = (0.02, 0.5)                        # of a local step, fractions of max_ratio
MOVED = 6                                       # dimensions that a local step moves on average
EXTREME = 0.15                                  # chance that a moved ratio goes to 0 or to its most instead
CONCENTRATION = 0.6                             # of the groups' shares (Dirichlet): below 1 few groups carry the most
TREND, NOISE, POWER = 0.8, (0.5, 1.5), 3        # of the shares over blocks: slope, and noise to a power below 3


class Problem(NamedTuple):
    """What is searched, and under which budget."""

    space: SearchSpace
    budget: Budget


def _feasible(problem: Problem, drawn: np.ndarray) -> np.ndarray:
    projected, meets = problem.budget.project(drawn)
    return projected[meets]


def _feasible_even(problem: Problem, points: np.ndarray) -> np.ndarray:
    """Feasible policies from points in the space's even coordinates, projected in these."""
    space, budget = problem
    in_even = copy.copy(budget)                 # not made anew: its corner may be another policy than all at their most
    vars(in_even).update(cost=lambda points: budget.cost(space.from_even(points)), whole=())   # among the counts here
    return space.from_even(_feasible(Problem(space, in_even), points))


def _until(problem: Problem, count: int, draw: Callable[[int], np.ndarray],
           feasible: Callable = _feasible) -> np.ndarray:
    """Up to `count` feasible policies from repeated draws."""
    found = np.empty((0, problem.space.size))
    for _ in range(ATTEMPTS):
        found = np.concatenate([found, feasible(problem, draw(count))])[:count]
        if len(found) == count:
            break
    return found


def members(space: SearchSpace) -> np.ndarray:
    """1 where a dimension is of a group, in order of first appearance, else 0: (G, D)."""
    return np.array([[float(group == name) for group in space.groups] for name in dict.fromkeys(space.groups)])


def random_policies(problem: Problem, count: int, rng: np.random.Generator) -> np.ndarray:
    """Every ratio uniform in its box, then projected: the published population (methods B6), up to (count, D)."""
    space = problem.space
    return _until(problem, count, lambda n: rng.uniform(0, space.max_ratio, (n, space.size)))


def uniform_policies(problem: Problem, count: int, rng: np.random.Generator) -> np.ndarray:
    """One ratio per group (neurons, heads, tokens), the same in every block: all groups alike first, then each group
    alone, then at random."""
    member, most = members(problem.space), problem.space.max_ratio
    number = len(member)
    first = _feasible(problem, np.concatenate([np.ones((1, number)), np.eye(number)]) @ member * most)
    more = _until(problem, count, lambda n: rng.uniform(0, 1, (n, number)) @ member * most)
    return np.concatenate([first, more])[:count]


def varied_policies(problem: Problem, count: int, rng: np.random.Generator) -> np.ndarray:
    """Policies that differ in which group carries the cut and in which blocks: uniform ones first (`uniform_policies`),
    then a share of the budget for each group times a trend over the blocks times noise, in even coordinates.

    Ratios that are uniform in the box all lie near the middle of every group and never try tokens, say, alone; and with
    few heads they cut some in nearly every block (SearchSpace.even).
    """
    space, groups = problem.space, members(problem.space).astype(bool)

    def draw(n: int) -> np.ndarray:
        shares = rng.dirichlet(np.full(len(groups), CONCENTRATION), n)          # (n, G)
        policies = np.empty((n, space.size))
        for mine, share in zip(groups, shares.T):
            blocks = np.linspace(-1, 1, mine.sum())                             # first to last
            trend = 1 + rng.uniform(-TREND, TREND, (n, 1)) * blocks
            noise = rng.uniform(*NOISE, (n, len(blocks))) ** rng.integers(0, POWER, (n, 1))
            policies[:, mine] = share[:, None] * trend * noise
        return np.clip(policies * space.max_ratio, 0, space.max_ratio)
    uniform = uniform_policies(problem, min(max(1, count // 2), len(groups) + 1), rng)
    return np.concatenate([uniform, _until(problem, max(count - len(uniform), 0), draw, _feasible_even)])


def neighbours(problem: Problem, around: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Feasible policies near given ones (K, D): some even coordinates moved, the others meet the budget again."""
    space = problem.space
    base = space.even(around)[rng.integers(0, len(around), count)]
    moved = rng.uniform(size=base.shape) < min(1.0, MOVED / space.size)
    moved[np.arange(count), rng.integers(0, space.size, count)] = True
    size = space.max_ratio * np.exp(rng.uniform(*np.log(STEP_SIZES), (count, 1)))
    steps = base + moved * rng.normal(0, 1, base.shape) * size
    extreme = moved & (rng.uniform(size=base.shape) < EXTREME)
    steps = np.where(extreme, space.max_ratio * rng.integers(0, 2, base.shape), steps)
    return _feasible_even(problem, np.clip(steps, 0, space.max_ratio))
