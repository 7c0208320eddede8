"""How much to cut in each dimension of a policy, from what each costs when it is cut alone: the greedy solution of the
separable resource allocation problem (Fox 1966; convex curves make it optimal, up to its last step). D dimensions."""
from collections.abc import Callable, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from vitlab.runtime.files import require
from vitlab.search.budget import Budget
from vitlab.search.sampling import members
from vitlab.search.space import SearchSpace

STEPS = 40                      # ratios of a dimension that are tried, evenly from 0: 1.25 % of a block at MAX_RATIO
LEVELS = 4                      # ratios at which a dimension is measured: each is an evaluation (docs/search.md)

Curve = Sequence[tuple[float, float]]           # (ratio > 0, loss >= 0) of a dimension that is cut alone


def levels(space: SearchSpace, count: int = LEVELS) -> list[list[float]]:
    """Up to `count` ratios at which each dimension (D) is measured alone: evenly from above 0 to the most it may cut;
    of few heads, every number that may go; and 1, where all may."""
    def of(steps: np.ndarray) -> list[float]:
        some = int((steps < 1).sum())
        places = -(-np.arange(count + 1) * (some - 1) // count)                 # rounded up
        return steps[np.unique([*places, len(steps) - 1])[1:]].tolist()
    return [of(steps) for steps in space.steps(STEPS + 1)]


def _loss(curve: Curve) -> Callable[[np.ndarray], np.ndarray]:
    """Ratios -> losses between those measured (Fritsch and Carlson's monotone cubics); never falling, so that noise
    makes no cut a gain; NaN beyond the last. 0 in a dimension that can't be cut. Of ratio 1 the loss is its own: a
    sublayer that is replaced by its mean may lose less than one of which little is left."""
    if not len(curve):
        return np.zeros_like
    ratios, losses = np.array([(0.0, 0.0), *sorted(point for point in curve if point[0] < 1)]).T
    whole = dict(curve).get(1, np.nan)
    some = (PchipInterpolator(ratios, np.maximum.accumulate(losses), extrapolate=False) if len(ratios) > 1
            else lambda asked: np.where(asked > 0, np.nan, 0.0))
    return lambda asked: np.where(asked < 1, some(asked), whole)


def summed_losses(space: SearchSpace, curves: Sequence[Curve]) -> Callable[[np.ndarray], np.ndarray]:
    """What the dimensions of each group, in order of first appearance, lose together by their curves: policies (P, D)
    -> (P, G); beyond a curve's end, what it loses there."""
    losses, whole = [_loss(curve) for curve in curves], [1 in dict(curve) for curve in curves]
    ends = [max((ratio for ratio, _ in curve if ratio < 1), default=0.0) for curve in curves]
    member = members(space).T.copy()                                            # (D, G)

    def summed(policies: np.ndarray) -> np.ndarray:
        known = np.where((policies == 1) & whole, 1, np.minimum(policies, ends))
        return np.stack([loss(ratios) for loss, ratios in zip(losses, known.T)], axis=1) @ member
    return summed


def allocate(space: SearchSpace, budget: Budget, curves: Sequence[Curve]) -> np.ndarray:
    """The policy (D) that meets the budget with about the least sum of losses.

    From nothing cut, the step with the least added loss per cost saved is taken again and again; all steps ahead in a
    dimension are compared, which walks along the lower convex hull of its curve. Costs are those of whole policies, as
    what a head costs depends on the tokens. Raises InputError where the budget can't be met.
    """
    require(len(curves) == space.size, f"there are {len(curves)} curves; this space has {space.size} dimensions")
    steps = space.steps(STEPS + 1)
    where, ratios = np.repeat(np.arange(space.size), list(map(len, steps))), np.concatenate(steps)      # (S) each
    losses = np.concatenate([_loss(curve)(ratios) for curve, ratios in zip(curves, steps)])
    policy, lost = np.zeros(space.size), np.zeros(space.size)
    cost = float(budget.cost(policy[None])[0])
    while cost > budget.limit:
        tried = np.repeat(policy[None], len(ratios), axis=0)                    # (S, D)
        tried[np.arange(len(ratios)), where] = ratios
        costs, added = budget.cost(tried), losses - lost[where]
        usable = (ratios > policy[where]) & (costs < cost) & np.isfinite(added)
        require(usable.any(), f"a budget of {budget.limit:.6g} {budget.unit} can't be met by what was measured; "
                              f"{cost:.6g} is the least")
        chosen = int(np.argmin(np.divide(added, cost - costs, out=np.full(len(ratios), np.inf), where=usable)))
        if costs[chosen] <= budget.limit:                                       # the last step: any that loses least
            fits = np.where(usable & (costs <= budget.limit), added, np.inf)
            chosen = int(np.lexsort((-costs, fits, ~(usable & budget.meets(tried))))[0])
        policy, cost = tried[chosen], float(costs[chosen])
        lost[where[chosen]] = losses[chosen]
    projected, meets = budget.project(policy[None])
    require(meets[0], f"the policy from what was measured costs {cost:.6g} {budget.unit}, which can't be brought to "
                      f"within {budget.tolerance:.1%} below {budget.limit:.6g}; a larger tolerance, or more "
                      "dimensions, would do")
    return projected[0]
