"""What each dimension of a policy costs when it is cut alone, measured once and kept on the disk."""
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, append_line, read_lines
from vitlab.search.allocation import allocate, levels, summed_losses
from vitlab.search.sampling import Problem, neighbours

SENSITIVITY = "sensitivity.jsonl"
# weights of losses, in policies to begin with: of one group, of all but one
DEARER, NEVER = 3, 1e6


def _known(path: Path, wanted: list[tuple[str, float]]) -> dict[tuple[str, float], dict[str, Any]]:
    """The rows of a file by (dimension, ratio). Raises InputError where it holds others."""
    try:
        rows = {(row["dimension"], row["ratio"]): row for row in read_lines(path)
                if np.isfinite([row["value"], row["loss"], row["saved"]]).all()}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: holds something else than the cuts of this study ({error!r}); remove it") from None
    odd = sorted(rows.keys() - set(wanted), key=str)
    if odd:
        raise InputError(f"{path}: {odd[0][0]} by {odd[0][1]} is no cut of this study; remove the file")
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
    at = [(d, ratio) for d, ratios in enumerate(levels(space)) for ratio in ratios]
    policies = np.zeros((len(at) + 1, space.size))
    for row, (d, ratio) in enumerate(at, start=1):
        policies[row, d] = ratio
    wanted, costs = [("", 0.0), *((space.names[d], ratio) for d, ratio in at)], budget.cost(policies)
    known = _known(path, wanted)
    todo = [row for row, key in enumerate(wanted) if key not in known]
    together = parallel.world()
    first = [row for row in todo if row == 0]                                   # losses are differences to nothing cut
    # Block after block: what comes before a cut is the same for all cuts of a block, and an objective may keep it.
    rest = sorted((row for row in todo if row), key=lambda row: int(wanted[row][0].split(" ")[-1])
                  if " " in wanted[row][0] else 0)
    groups = [group for group in (first, *(rest[i:i + together] for i in range(0, len(rest), together))) if group]
    for group in tqdm(groups, desc=f"sensitivity {label}".strip(), unit="cut",
                      disable=not progress or not groups):
        mine, found = parallel.rank(), {}
        if mine < len(group):
            with parallel.alone():
                found = dict(objective(policies[group[mine]]))
        for row, given in zip(group, parallel.gather(found)):
            key, value = wanted[row], float(given.pop("value", np.nan))
            if not np.isfinite(value):
                raise InputError(f"the objective gave {value} for {key[0] or 'nothing cut'}; a finite value is needed")
            loss = max(0.0, known[wanted[0]]["value"] - value) if row else 0.0
            known[key] = {"dimension": key[0], "ratio": key[1], "value": value, "loss": loss,
                          "saved": float(costs[0] - costs[row]), **({"measures": given} if given else {})}
            if parallel.is_first():
                append_line(path, known[key])
    return [known[key] for key in wanted]


def curves_of(problem: Problem, rows: list[dict[str, Any]]) -> list[list[tuple[float, float]]]:
    """(ratio, loss) of each dimension (D)."""
    return [[(row["ratio"], row["loss"]) for row in rows if row["dimension"] == name] for name in problem.space.names]


def trend_of(problem: Problem, rows: list[dict[str, Any]]) -> Callable[[np.ndarray], np.ndarray]:
    """Policies (P, D) -> (P, G), minus what each group of dimensions loses by the rows: the `trend` of a search that
    measured them."""
    losses = summed_losses(curves_of(problem, rows), problem.space.groups)
    return lambda policies: -losses(policies)


def start_policies(problem: Problem, rows: list[dict[str, Any]], count: int, seed: int) -> np.ndarray:
    """Up to `count` policies (K, D) to begin with: the one that `allocate` makes of the rows; those that cut one group
    alone, where that is enough, as a search should find nothing that is worse; those where one group's losses weigh
    DEARER times as much, as groups cut together lose otherwise than alone; and others near these."""
    curves, groups = curves_of(problem, rows), problem.space.groups
    names = list(dict.fromkeys(groups))

    def allocated(weights: dict[str, float]) -> np.ndarray:
        return allocate(*problem, [[(ratio, loss * weights.get(group, 1)) for ratio, loss in curve]
                                   for curve, group in zip(curves, groups)])
    made = [allocated({})]                                                      # says why there is none
    for name in names if len(names) > 1 else ():
        with contextlib.suppress(InputError):
            alone = allocated({other: NEVER for other in names if other != name})
            made += [] if alone[[group != name for group in groups]].any() else [alone]
    for name in names if len(names) > 1 else ():
        with contextlib.suppress(InputError):
            made.append(allocated({name: DEARER}))
    first = np.array(made)[np.sort(np.unique(made, axis=0, return_index=True)[1])][:count]
    missing = count - len(first)
    return np.concatenate([first,
                           neighbours(problem, first, missing, np.random.default_rng([2, seed]))]) if missing else first
