"""Batch files: YAML of notebooks with parameters, checked and multiplied out into entries (docs/batch.md)."""
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlab.runtime.files import BATCHES, InputError
from vitlab.workbench import notebooks
from vitlab.workbench.batch_checks import BatchFile

MAX_ENTRIES = 5000
REFERENCE = re.compile(r"\{([^{}]*)\}")
KEYS = ("notebook", "parameters", "after", "after_all", "grid")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One notebook with its parameters."""

    name: str
    notebook: Path
    parameters: dict[str, Any]      # all but `run`; {NAME} in a text stands for the folder of the entry of that name
    after: tuple[str, ...]          # entries whose files it reads; of two with the same file, the later one's


def find(path: str | Path) -> Path:
    """A batch file, or by its bare name one of those that come with vitlab."""
    known = BATCHES / f"{path}.yaml"
    return known if len(Path(path).parts) == 1 and not Path(path).exists() and known.is_file() else Path(path)


def _ordered(file: BatchFile, after: dict[str, tuple[str, ...]]) -> list[str]:
    """Entries, each behind those it comes after."""
    order: list[str] = []

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            file.fail(f"entries.{name}.after: it comes after itself ({' -> '.join([*way[way.index(name):], name])})")
        if name not in order:
            for other in after[name]:
                visit(other, (*way, name))
            order.append(name)
    for name in after:
        visit(name, ())
    return order


def read(path: str | Path, changes: dict[str, str] | None = None) -> list[Entry]:
    """The entries of a batch file, each behind those it comes after.

    changes: parameters (as text) that stand above the file's, for all notebooks that declare them; with a dotted key,
    one place of the file. Raises InputError naming the file, the entry and the key for whatever is wrong.
    """
    file = BatchFile(find(path), changes or {})
    bodies = {file.name(name, "entries"): file.mapping(body, f"entries.{name}", KEYS)
              for name, body in file.entries.items()}
    after, after_all = ({n: file.names(b.get(key), f"entries.{n}.{key}") for n, b in bodies.items()}
                        for key in ("after", "after_all"))
    grids = {n: file.grid(b.get("grid"), f"entries.{n}.grid") for n, b in bodies.items()}
    axes: dict[str, dict[str, Any]] = {}            # entry -> its axes, those of what it comes after first
    copies: dict[str, list[tuple[dict[str, str], str]]] = {}        # entry -> (choice of labels, name) of each copy
    declared: dict[str, dict[str, Any]] = {}
    found: list[Entry] = []
    for name in _ordered(file, {n: after[n] + after_all[n] for n in bodies}):
        where, own = f"entries.{name}", grids[name]
        axes[name] = {}
        for other, given in [(other, axes[other]) for other in after[name]] + [("", own)]:
            for axis, sets in given.items():
                if axes[name].setdefault(axis, sets) is not sets:
                    file.fail(f"{where}.{f'after: {other} has' if other else 'grid:'} another axis {axis!r} than what "
                              f"it comes after")
        if len(found) + math.prod(map(len, axes[name].values())) > MAX_ENTRIES:
            file.fail(f"{where}: more than {MAX_ENTRIES} entries")
        notebook = file.notebook(bodies[name].get("notebook"), f"{where}.notebook")
        declared[name] = file.declared(notebook, f"{where}.notebook")
        copies[name] = []
        for labels in itertools.product(*axes[name].values()):
            choice = dict(zip(axes[name], labels))
            copy = "-".join([name, *(f"{axis}={label}" for axis, label in choice.items())])
            if len(copy) > 200:
                file.fail(f"{where}: the name {copy[:80]}... is longer than 200 characters; name its grid's values")
            fitting = {other: [made for chosen, made in copies[other]
                               if all(choice.get(a, c) == c for a, c in chosen.items())]
                       for other in after[name] + after_all[name]}
            chosen = {key: value for axis, label in choice.items() for key, value in axes[name][axis][label].items()}
            parameters = _parameters(file, where, bodies[name], declared[name], chosen)
            found.append(Entry(name=copy, notebook=notebook,
                               after=tuple(dict.fromkeys(itertools.chain(*fitting.values()))),
                               parameters=_check(file, where, notebook, parameters, fitting)))
            copies[name].append((choice, copy))
    shared = [(f"{where}{key}", key, list(bodies))
              for where, given in (("defaults.", file.defaults), ("--set ", file.changes)) for key in given]
    shared += [(f"entries.{name}.grid.{axis}", key, [n for n in bodies if axes[n].get(axis) is sets])
               for name, own in grids.items() for axis, sets in own.items() for given in sets.values() for key in given]
    for where, key, reached in shared:
        if not any(key in declared[name] for name in reached):
            file.fail(f"{where}: no notebook that it is for declares a parameter {key[:80]!r}; {reached[0]} declares "
                      f"{', '.join(sorted(declared[reached[0]]))}")
    return found


def _parameters(file: BatchFile, where: str, body: dict[str, Any], declared: dict[str, Any],
                grid: dict[str, Any]) -> dict[str, Any]:
    """Defaults, then the grid's, the entry's own, the changes; what several share goes to notebooks that declare it."""
    own = file.parameters(body.get("parameters"), f"{where}.parameters")
    for key in [key for key in file.changes if key in grid]:
        file.fail(f"--set {key}: {where} takes it from a grid")
    for key in [key for key in own if key in grid and key in (body.get("grid") or {})]:
        file.fail(f"{where}.parameters.{key}: the grid gives it too")
    shared = {key: value for key, value in (file.defaults | grid).items() if key in declared}
    return shared | own | {key: value for key, value in file.changes.items() if key in declared}


def _check(file: BatchFile, where: str, notebook: Path, parameters: dict[str, Any],
           upstream: dict[str, list[str]]) -> dict[str, Any]:
    """The parameters with {NAME} resolved to the copy meant; InputError for one that does not fit."""
    for key, value in parameters.items():
        if value is None:
            file.fail(f"{where}: {key} has no value; give it with --set {key}=...")

    def resolved(match: re.Match) -> str:
        made = upstream.get(match[1], [])
        if len(made) != 1:
            file.fail(f"{where}: {match[0]} is no single entry that it comes after; those are "
                      f"{', '.join(upstream) or 'none'}")
        return "{" + made[0] + "}"
    parameters = {k: REFERENCE.sub(resolved, v) if isinstance(v, str) else v for k, v in parameters.items()}
    try:
        notebooks.check_parameters(notebook, parameters)
    except InputError as error:
        file.fail(f"{where}: {error}")
    return parameters
