"""What each dimension of a policy costs when it is cut alone, measured once and kept on the disk."""
import contextlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.shape import ViTShape
from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, append_line, read_lines, require
from vitlab.search.allocation import Curve, allocate, levels, summed_losses
from vitlab.search.sampling import Problem, neighbours

SENSITIVITY = "sensitivity.jsonl"
DEARER = 3                      # weight of a group's losses in a start; not tuned, enough to move the cut elsewhere
NEVER = 1e6                     # the same of groups that are not to be cut: above any ratio of two losses


def _known(path: Path, wanted: list[tuple[str, float]]) -> dict[tuple[str, float], dict[str, Any]]:
    """The rows of a file by (dimension, ratio). Raises InputError where it holds others."""
    try:
        rows = {(row["dimension"], row["ratio"]): row for row in read_lines(path)
                if np.isfinite([row["value"], row["loss"], row["saved"]]).all()}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: holds something else than the cuts of this study ({error!r}); remove it") from None
    for name, ratio in sorted(rows.keys() - set(wanted), key=str):
        raise InputError(f"{path}: {name} by {ratio} is no cut of this study; remove the file")
    return rows


def measure_alone(problem: Problem, objective: Callable[[np.ndarray], dict[str, float]], path: Path, *,
                  label: str = "", progress: bool = True) -> list[dict[str, Any]]:
    """Cut each dimension alone at its levels and measure: a row each, on the disk before the next starts; rows that are
    there are not measured again.

    Row: dimension (its name; "" where nothing is cut, the first row), ratio, value, loss = max(0, value of nothing cut
    - value), saved (cost less than nothing cut's), and `measures`, whatever else the objective gave, if anything. A
    line that a kill cut short is measured again. Raises InputError for a file of other cuts, or a value that is not
    finite.
    """
    space, budget = problem
    cuts = [("", 0.0), *((name, ratio) for name, ratios in zip(space.names, levels(space)) for ratio in ratios)]
    policies = np.array([[ratio * (name == cut) for name in space.names] for cut, ratio in cuts])
    costs, known = budget.cost(policies), _known(path, cuts)

    # Block after block: what comes before a cut is the same for all cuts of a block, and an objective may keep it.
    todo = [row for row in range(1, len(cuts)) if cuts[row] not in known]
    todo.sort(key=lambda row: int(cuts[row][0].partition(" ")[2] or 0))
    together = parallel.world()
    groups = [[0]] * (cuts[0] not in known) + [todo[i:i + together] for i in range(0, len(todo), together)]
    for group in tqdm(groups, desc=f"sensitivity {label}".strip(), unit="cut", disable=not progress or not groups):
        mine, found = parallel.rank(), {}
        if mine < len(group):
            with parallel.alone():
                found = dict(objective(policies[group[mine]]))
        for row, given in zip(group, parallel.gather(found)):
            (name, ratio), value = cuts[row], float(given.pop("value", np.nan))
            require(np.isfinite(value), f"the objective gave {value} for {name or 'nothing cut'}; a finite value is "
                                        f"needed")
            loss = max(0.0, known[cuts[0]]["value"] - value) if row else 0.0
            known[name, ratio] = {"dimension": name, "ratio": ratio, "value": value, "loss": loss,
                                  "saved": float(costs[0] - costs[row]), **({"measures": given} if given else {})}
            if parallel.is_first():
                append_line(path, known[name, ratio])
    return [known[cut] for cut in cuts]


def better_nothing(measure: Callable[[CompressionPlan], dict[str, float]], shape: ViTShape,
                   units: Iterable[str]) -> Tensor:
    """(L, 2) bool: whether a block's attention, or its MLP, left out alone, is nearer to the dense model with nothing
    in its place than with its mean. measure: gives "distill_loss" of a plan. units: of which kinds all may go."""
    found = torch.zeros(shape.depth, 2, dtype=torch.bool)
    for block, (place, kind) in itertools.product(range(shape.depth), enumerate(("heads", "neurons"))):
        if kind in units:
            mean, nothing = (measure(CompressionPlan(shape=shape, blocks=tuple(
                BlockPlan(**{kind: ()}, nothing=zero) if index == block else BlockPlan()
                for index in range(shape.depth))))["distill_loss"] for zero in ((), (kind,)))
            found[block, place] = nothing < mean
    return found


def curves_of(problem: Problem, rows: list[dict[str, Any]]) -> list[Curve]:
    """(ratio, loss) of each dimension (D)."""
    return [[(row["ratio"], row["loss"]) for row in rows if row["dimension"] == name] for name in problem.space.names]


def trend_of(problem: Problem, rows: list[dict[str, Any]]) -> Callable[[np.ndarray], np.ndarray]:
    """Policies (P, D) -> (P, G), minus what each group of dimensions loses by the rows: a search's `trend`."""
    losses = summed_losses(problem.space, curves_of(problem, rows))
    return lambda policies: -losses(policies)


def start_policies(problem: Problem, rows: list[dict[str, Any]], count: int, seed: int) -> np.ndarray:
    """Up to `count` policies (K, D) to begin with: the one that `allocate` makes of the rows; those that cut one group
    alone, where that is enough, as a search should find nothing that is worse; those where one group's losses weigh
    DEARER times as much, as groups cut together lose otherwise than alone; and others near these."""
    curves, groups = curves_of(problem, rows), np.array(problem.space.groups)

    def allocated(weights: np.ndarray | int = 1) -> np.ndarray:
        weights = np.broadcast_to(weights, len(groups))
        return allocate(*problem, [[(ratio, loss * weight) for ratio, loss in curve]
                                   for curve, weight in zip(curves, weights.tolist())])
    made, several = [allocated()], list(dict.fromkeys(groups.tolist()))         # the first says why there is none
    for name in several if len(several) > 1 else ():
        with contextlib.suppress(InputError):
            alone = allocated(np.where(groups == name, 1, NEVER))
            made += [] if alone[groups != name].any() else [alone]
    for name in several if len(several) > 1 else ():
        with contextlib.suppress(InputError):
            made.append(allocated(np.where(groups == name, DEARER, 1)))
    first = np.array(made)[np.sort(np.unique(made, axis=0, return_index=True)[1])][:count]
    missing = count - len(first)
    return np.concatenate([first,
                           neighbours(problem, first, missing, np.random.default_rng([2, seed]))]) if missing else first
