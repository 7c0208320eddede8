"""Studies beside each other: what they measured, with the conditions that differ marked, and their plans."""
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from IPython.display import HTML

from vitlab.models import checkpoint
from vitlab.plan import CompressionPlan
from vitlab.runtime.caveats import caveat_of
from vitlab.runtime.files import InputError, require
from vitlab.runtime.kinds import Folder, Or
from vitlab.runtime.results import ResultRow, aligned, conditions_of, notes, shown, titles
from vitlab.workbench.report import COLUMNS, entries_of, html_table, measured, of_one_set, rows_of

# what two measurements have to share to be compared number by number; of speeds, what stands under "speed."
ALIKE = ("images", "limit", "prepared", "dtype", "device", "quick", "speed.batch_size", "speed.dtype", "speed.threads",
         "speed.runtime", "speed.device", "top1")
WINDOWS = "windows."                            # conditions of a Segmenter's, whatever they are
PLANS, COSTS = "plans", "compared"              # figures


def plans_of(run: str | Path) -> dict[str, CompressionPlan]:
    """{name: plan} of every checkpoint of a study that cuts something; of one run its own."""
    found, folders = {}, [entry["folder"] for entry in entries_of(run)]
    places = [place for folder in folders for place in (
        folder / checkpoint.FOLDER, *sorted(path.parent for path in folder.glob(f"*/{checkpoint.FOLDER}/"
                                                                                f"{checkpoint.PLAN}")))]
    for place in places:
        if (place / checkpoint.PLAN).is_file():
            plan = CompressionPlan.load(place / checkpoint.PLAN)
            if plan != CompressionPlan.empty(plan.shape):
                found[place.parent.name] = plan
    return found


def names_of(runs: Sequence[str | Path]) -> list[str]:
    """What each study is called: its folder's name, or, where two have the same, the whole path. Raises InputError for
    one that is given twice."""
    names = [Path(run).resolve().name for run in runs]
    if len(set(map(Path.resolve, map(Path, runs)))) < len(runs):
        raise InputError(f"{', '.join(map(str, runs))}: one of them is given twice; a study is compared with others")
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def differing(rows: Sequence[ResultRow]) -> list[str]:
    """Of each row, in which of ALIKE it is not as the first row that has that, and how: "dtype bfloat16"."""
    flat = [{"data": f"{row.dataset} {row.split}", **conditions_of(row)} for row in rows]
    found = []
    for given in flat:
        firsts = {key: next(other[key] for other in flat if key in other) for key in given
                  if key in ("data", *ALIKE) or key.startswith(WINDOWS)}
        found.append(", ".join(f"{key} {given[key]}" for key, first in firsts.items() if given[key] != first))
    return found


@dataclass(frozen=True)
class Beside:
    """The rows of studies in one table, each model by its study's name too."""

    runs: Sequence[str | Path]
    rows: list[ResultRow]

    @classmethod
    def of(cls, runs: Sequence[str | Path]) -> "Beside":
        """Raises InputError for a folder that is no study, or one that is given twice."""
        rows = [dataclasses.replace(row, model=f"{name}: {row.model}") for run, name in zip(runs, names_of(runs))
                for row in rows_of(run)[1]]
        require(rows, f"{', '.join(map(str, runs))}: nothing was measured in any of them")
        return cls(runs, rows)

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Those that were measured."""
        return tuple(each for each in measured(self.rows, COLUMNS)
                     if each not in ("dataset", "split", "loss", "top5_pct"))

    @functools.cached_property
    def lines(self) -> list[list[str]]:
        """Titles, then the cells of each row."""
        marks = differing(self.rows)
        lines = [titles(self.rows, self.columns),
                 *([shown(row, column) for column in self.columns] for row in self.rows)]
        return [[*line, mark] for line, mark in zip(lines, ["measured otherwise", *marks])] if any(marks) else lines

    def text(self) -> str:
        return "\n".join([aligned(self.lines), notes(self.rows, self.columns)])

    def table(self) -> HTML:
        """As a notebook shows it."""
        head, *lines = self.lines
        return html_table(head, lines, (*self.columns, "conditions"), notes(self.rows, self.columns).splitlines())

    def draw(self, out: str | Path) -> None:
        """What they cost, out/compared.png, and, of models of one shape, their plans, out/plans.png."""
        from vitlab.plots import accuracy_against_cost, compare_plans, save_figure
        quality, rows = of_one_set(self.rows)
        if rows:
            caption = f"{rows[0].dataset} {rows[0].split}\n{caveat_of(rows)}".strip()
            save_figure(accuracy_against_cost(rows, quality), out, COSTS, caption)
        plans = {f"{called}: {name}": plan for run, called in zip(self.runs, names_of(self.runs))
                 for name, plan in plans_of(run).items()}
        if plans:
            shape = next(iter(plans.values())).shape
            alike = {name: plan for name, plan in plans.items() if plan.shape == shape}
            save_figure(compare_plans(alike), out, PLANS)


def compare(runs: Annotated[Or[tuple[str, ...], Sequence[str]], Parameter(name="RUN")], *,
            out: Folder | None = None) -> str:
    """Studies, or runs of batches, in one table, with what differs in how a row was measured beside it; with `out`,
    their plans and what they cost as figures, out/compared.png and, of models of one shape, out/plans.png.

    Args:
        runs: folders of studies, or of runs of a batch
        out: folder for the figures
    """
    beside = Beside.of(runs)
    if out is not None:
        beside.draw(out)
    return beside.text()
