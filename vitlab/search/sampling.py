"""Feasible policies at random, alone and around others. D dimensions, P policies."""
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vitlab.search.budget import Budget
from vitlab.search.space import SearchSpace

ATTEMPTS = 10                                   # rounds of drawing before a space counts as having no feasible policy
STEP_SIZES = (0.02, 0.5)                        # of a local step, fractions of max_ratio
MOVED = 6                                       # dimensions that a local step moves on average
EXTREME = 0.15                                  # chance that a moved ratio goes to 0 or to its most instead


class Problem(NamedTuple):
    """What is searched, and under which budget."""

    space: SearchSpace
    budget: Budget


def _feasible(problem: Problem, drawn: np.ndarray) -> np.ndarray:
    projected, meets = problem.budget.project(drawn)
    return projected[meets]


def _feasible_even(problem: Problem, points: np.ndarray) -> np.ndarray:
    """Feasible policies from points in the space's even coordinates, projected in these."""
    space, budget = problem.space, problem.budget
    in_even = dataclasses.replace(budget, cost=lambda points: budget.cost(space.from_even(points)))
    projected, meets = in_even.project(points)
    return space.from_even(projected[meets])


def _until(problem: Problem, count: int, draw: Callable[[int], np.ndarray],
           feasible: Callable = _feasible) -> np.ndarray:
    """Up to `count` feasible policies from repeated draws."""
    found = np.empty((0, problem.space.size))
    for _ in range(ATTEMPTS):
        found = np.concatenate([found, feasible(problem, draw(count))])[:count]
        if len(found) == count:
            break
    return found


def random_policies(problem: Problem, count: int, rng: np.random.Generator) -> np.ndarray:
    """Every ratio uniform in its box, then projected: the published population (methods B6), up to (count, D)."""
    size = (count, problem.space.size)
    return _until(problem, count, lambda n: rng.uniform(0, problem.space.max_ratio, (n, size[1])))


def uniform_policies(problem: Problem, count: int, rng: np.random.Generator) -> np.ndarray:
    """One ratio per group (neurons, heads, tokens), the same in every block: all groups alike first, then each group
    alone, then at random."""
    groups = np.array(problem.space.groups)
    names = list(dict.fromkeys(groups))
    member = np.array([groups == name for name in names], dtype=float)          # (groups, D)

    def draw(weights: np.ndarray) -> np.ndarray:
        return weights @ member * problem.space.max_ratio
    first = _feasible(problem, draw(np.concatenate([np.ones((1, len(names))), np.eye(len(names))])))
    more = _until(problem, count, lambda n: draw(rng.uniform(0, 1, (n, len(names)))))
    return np.concatenate([first, more])[:count]


def varied_policies(problem: Problem, count: int, rng: np.random.Generator) -> np.ndarray:
    """Policies that differ in which group carries the cut and in which blocks: uniform ones first (`uniform_policies`),
    then a share of the budget for each group times a trend over the blocks times noise, in even coordinates.

    Ratios that are uniform in the box all lie near the middle of every group and never try tokens, say, alone; and with
    few heads they cut some in nearly every block (SearchSpace.even).
    """
    space = problem.space
    groups, names = np.array(space.groups), list(dict.fromkeys(space.groups))
    depth_of = np.concatenate([np.linspace(-1, 1, (groups == name).sum()) for name in names])   # first block to last

    def draw(n: int) -> np.ndarray:
        share = rng.dirichlet(np.full(len(names), 0.6), n)                      # (n, groups)
        policies = np.empty((n, space.size))
        for g, name in enumerate(names):
            mine = groups == name
            trend = 1 + rng.uniform(-0.8, 0.8, (n, 1)) * depth_of[mine]
            noise = rng.uniform(0.5, 1.5, (n, mine.sum())) ** rng.integers(0, 3, (n, 1))
            policies[:, mine] = share[:, [g]] * trend * noise
        return np.clip(policies * space.max_ratio, 0, space.max_ratio)
    uniform = uniform_policies(problem, min(max(1, count // 2), len(names) + 1), rng)
    return np.concatenate([uniform, _until(problem, max(count - len(uniform), 0), draw, _feasible_even)])


def neighbours(problem: Problem, around: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Feasible policies near given ones (K, D): some even coordinates moved, the others following to meet the budget
    again."""
    space = problem.space
    base = space.even(around)[rng.integers(0, len(around), count)]
    moved = rng.uniform(size=base.shape) < min(1.0, MOVED / space.size)
    moved[np.arange(count), rng.integers(0, space.size, count)] = True
    size = space.max_ratio * np.exp(rng.uniform(*np.log(STEP_SIZES), (count, 1)))
    steps = base + moved * rng.normal(0, 1, base.shape) * size
    extreme = moved & (rng.uniform(size=base.shape) < EXTREME)
    steps = np.where(extreme, space.max_ratio * rng.integers(0, 2, base.shape), steps)
    return _feasible_even(problem, np.clip(steps, 0, space.max_ratio))
