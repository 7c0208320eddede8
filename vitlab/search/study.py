"""Study: a search in a folder, with a journal to which every evaluation is appended, so that a killed one goes on."""
import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vitlab.runtime import logs, parallel
from vitlab.runtime.files import InputError, append_line, atomic_write, locked, read_json, read_lines, require
from vitlab.search.budget import Budget
from vitlab.search.sampling import Problem
from vitlab.search.sensitivity import SENSITIVITY, measure_alone, start_policies, trend_of
from vitlab.search.space import SearchSpace
from vitlab.search.strategies import STRATEGIES, Proposal, Settings, propose

INFO, JOURNAL = "study.json", "journal.jsonl"
FORMAT, VERSION = "vitlab.study", 1

Objective = Callable[[np.ndarray], dict[str, float]]    # a policy (D) -> {"value": larger is better, ...other measures}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One line of a journal."""

    index: int
    policy: tuple[float, ...]
    value: float                                # what is maximised
    cost: float                                 # in the budget's unit
    by: str                                     # "sensitivity", "population", "gp", "random" or "uniform"
    measures: dict[str, float] = field(default_factory=dict)        # whatever else the objective gave
    expected: dict[str, float] = field(default_factory=dict)        # log_ei, mean, deviation before measuring
    seconds: float = 0.0


def _evaluation(record: Any, index: int) -> Evaluation:
    """A checked line. Raises TypeError, ValueError or KeyError where it is none."""
    found = Evaluation(**{**record, "policy": tuple(float(v) for v in record["policy"])})
    numbers = [found.value, found.cost, *found.policy, *found.measures.values(), *found.expected.values()]
    if found.index != index or not np.isfinite(numbers).all() or not isinstance(found.by, str):
        raise ValueError(f"index {found.index}, value {found.value}")
    return found


def read_journal(folder: str | Path, *, repair: bool = False) -> list[Evaluation]:
    """The evaluations of a study. A last line that a kill cut short is dropped with a warning; with repair, for the one
    who writes on, from the file too.

    Raises InputError naming the line where any other is damaged.
    """
    path = Path(folder) / JOURNAL
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines() if path.exists() else []
    evaluations: list[Evaluation] = []
    for number, line in enumerate(lines):
        try:
            evaluations.append(_evaluation(json.loads(line), number))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            if number + 1 < len(lines):
                raise InputError(f"{path}: line {number + 1} is damaged ({error}); remove it and those after it, and "
                                 "the search goes on from there") from None
            warnings.warn(f"{path}: the last line was cut short and is measured again", stacklevel=2)
            if repair:
                atomic_write(path, "".join(kept + "\n" for kept in lines[:-1]))
    return evaluations


class Study:
    """A search of `space` under `budget` in `folder`.

    objective: a policy (D) -> {"value": larger is better, ...other measures}. Every evaluation is on the disk before
    the next one starts; the same settings and seed give the same evaluations, however often the run was killed in
    between. Raises InputError where the folder holds another study.
    """

    def __init__(self, folder: str | Path, space: SearchSpace, budget: Budget, *, strategy: str = "gp",
                 options: Settings | None = None, seed: int = 0, about: dict[str, Any] | None = None) -> None:
        """about: what the objective measures, stored and compared when the study is opened again."""
        require(strategy in STRATEGIES, f"strategy {strategy!r} is not known; known are {sorted(STRATEGIES)}")
        require(seed >= 0, f"seed is {seed}; at least 0 is needed")
        self.folder, self.space, self.budget, self.strategy, self.seed = Path(folder), space, budget, strategy, seed
        self.options = options or Settings()
        require(self.options.initial != "sensitivity" or strategy == "gp",
                f'initial "sensitivity" is a start of strategy "gp", not {strategy!r}')
        info = {"format": FORMAT, "version": VERSION, "strategy": strategy, "seed": seed,
                "budget": {"limit": budget.limit, "unit": budget.unit, "tolerance": budget.tolerance},
                "space": dataclasses.asdict(space) | {"shape": space.shape.stored()},
                "settings": dataclasses.asdict(self.options), "about": about or {}}
        self.info = json.loads(json.dumps(info, default=str))
        self._check_same()
        self.evaluations = read_journal(self.folder, repair=True)
        for found in self.evaluations:
            try:
                space.check(found.policy)
            except InputError as error:
                raise InputError(f"{self.folder / JOURNAL}: line {found.index + 1}: {error}") from None

    def _check_same(self) -> None:
        """Writes what is searched; InputError where the folder says otherwise, or does not say it."""
        path = self.folder / INFO
        if path.exists():
            differ = self._differences(read_json(path))
            require(not differ, f"{path}: another study ({'; '.join(differ)}); choose another folder, or remove "
                                f"{self.folder}")
        for name in (JOURNAL, SENSITIVITY):
            require(path.exists() or not (self.folder / name).exists(),
                    f"{self.folder / name}: a journal without {INFO}, which says what was searched; choose another "
                    f"folder, or remove {self.folder}")
        atomic_write(path, json.dumps(self.info, indent=2) + "\n")

    def _differences(self, known: Any) -> list[str]:
        """What this study has otherwise than a read study.json, but for its length: "budget.limit 0.5, now 0.6"."""
        if not isinstance(known, dict) or (known.get("format"), known.get("version")) != (FORMAT, VERSION):
            return [f"no {FORMAT} of version {VERSION}"]
        found = []
        for key, now in self.info.items():
            was = known.get(key)
            if isinstance(now, dict) and isinstance(was, dict):
                found += [f"{key}.{k} {was.get(k)}, now {now.get(k)}" for k in sorted({*now, *was})
                          # what is off, older files do not speak of
                          if (was.get(k) or None) != (now.get(k) or None) and (key, k) != ("settings", "evaluations")]
            elif was != now:
                found.append(f"{key} {was}, now {now}")
        return found

    @property
    def best(self) -> Evaluation:
        """The first evaluation with the largest value. Raises InputError where nothing was measured."""
        require(self.evaluations, f"{self.folder}: nothing was measured yet")
        return max(self.evaluations, key=lambda e: e.value)

    @property
    def spent(self) -> int:
        """How many times the objective was measured: for the journal, and for the start, which `settings.evaluations`
        does not count."""
        alone = read_lines(self.folder / SENSITIVITY) if self.options.initial == "sensitivity" else []
        return len(self.evaluations) + len(alone)

    def run(self, objective: Objective, *, starts: np.ndarray | None = None, until: float = np.inf,
            loggers: Sequence[str] = (), progress: bool = True) -> Evaluation:
        """Measure until there are settings.evaluations of them, or time.monotonic() is `until`, but one at least;
        returns the best. With initial "sensitivity" each dimension is measured alone before the first
        (`measure_alone`), and the population begins with what follows from it, and with `starts` (K, D). Under torchrun
        the settings.batch proposals of a turn are measured side by side, and the journal is that of one process.
        loggers: of `logs.LOGGERS`, where the journal's numbers go too.

        Raises InputError where another process searches in this folder."""
        with locked(self.folder) if parallel.is_first() else contextlib.nullcontext():
            require(len(read_journal(self.folder)) == len(self.evaluations),
                    f"{self.folder / JOURNAL}: another process has searched here meanwhile; open the study again")
            parallel.wait()
            with logs.opened(loggers, self.folder, len(self.evaluations)) as log:
                return self._run(objective, starts, until, log, progress)

    def _run(self, objective: Objective, start: np.ndarray | None, until: float, log: logs.Log,
             progress: bool) -> Evaluation:
        problem, total, batch = Problem(self.space, self.budget), self.options.evaluations, self.options.batch
        trend = None
        if self.options.initial == "sensitivity" and len(self.evaluations) < total:
            rows = measure_alone(problem, objective, self.folder / SENSITIVITY, progress=progress)
            trend, made = trend_of(problem, rows), start_policies(problem, rows, self.options.population // 2,
                                                                  self.seed)
            start = made if start is None else np.concatenate([made[:1], start, made[1:]])
        known = dict(zip(self.space.keys([e.policy for e in self.evaluations]) if self.evaluations else (),
                         self.evaluations))

        def goes_on() -> bool:
            return len(self.evaluations) < total and (parallel.gather(time.monotonic() < until)[0]
                                                      or not self.evaluations)
        with tqdm(total=total, initial=len(self.evaluations), desc=f"search ({self.strategy})", unit="policy",
                  disable=not progress) as bar:
            while goes_on():
                done = len(self.evaluations) % batch            # of a batch that a kill may have left half done
                seen = self.evaluations[:len(self.evaluations) - done]
                policies = np.array([e.policy for e in seen]).reshape(-1, self.space.size)
                pending = propose(self.strategy, problem, policies, np.array([e.value for e in seen]), self.options,
                                  min(batch, total - len(seen)), self.seed, start, trend)[done:]
                if not pending:
                    self._nothing_left()
                    break
                for at in range(0, len(pending), parallel.world()):
                    if not goes_on():
                        break
                    for found in self._measure(pending[at:at + parallel.world()], objective, known):
                        if parallel.is_first():
                            append_line(self.folder / JOURNAL, dataclasses.asdict(found))
                        self.evaluations.append(found)
                        log(len(self.evaluations), {"value": found.value, "best": self.best.value, "cost": found.cost,
                                                    "seconds": found.seconds, **found.measures})
                        bar.update()
                        bar.set_postfix(best=f"{self.best.value:.4g}", refresh=False)
        return self.best

    def _measure(self, proposals: list[Proposal], objective: Objective,
                 known: dict[tuple[int, ...], Evaluation]) -> Iterator[Evaluation]:
        """Measure up to as many proposals as there are processes, one each; those known take what was found then."""
        began, keys, measures = time.perf_counter(), self.space.keys([p.policy for p in proposals]), None
        mine = parallel.rank()
        if mine < len(proposals) and keys[mine] not in known:
            with parallel.alone():
                measures = {k: float(v) for k, v in objective(proposals[mine].policy).items()}
        for proposal, key, (given, seconds) in zip(proposals, keys,
                                                   parallel.gather((measures, time.perf_counter() - began))):
            index = len(self.evaluations)
            given = {"value": known[key].value, **known[key].measures} if key in known else dict(given)
            value = given.pop("value", float("nan"))
            require(np.isfinite(value), f"the objective gave {value} for policy {index}; a finite value is needed")
            known[key] = Evaluation(index=index, policy=tuple(proposal.policy.tolist()), value=value,
                                    cost=float(self.budget.cost(proposal.policy[None])[0]), by=proposal.by,
                                    measures=given, expected=proposal.expected, seconds=round(seconds, 3))
            yield known[key]

    def _nothing_left(self) -> None:
        why = (f"no other policy was found within {self.budget.tolerance:.1%} below {self.budget.limit:.6g} "
               f"{self.budget.unit}; a larger tolerance, or more dimensions, would give more")
        require(self.evaluations, why)
        warnings.warn(f"the search ends after {len(self.evaluations)} evaluations: {why}", stacklevel=3)
