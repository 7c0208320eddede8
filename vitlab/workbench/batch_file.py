"""Batch files: a YAML file of notebooks with parameters, checked and multiplied out into entries (docs/batch.md has the
format)."""
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError

from vitlab.runtime.files import BATCHES, InputError
from vitlab.workbench import notebooks

MAX_BYTES, MAX_ENTRIES = 200_000, 5000
# of entries and of values in their names: never a way out of a folder
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
REFERENCE = re.compile(r"\{([^{}]*)\}")
KEYS = ("notebook", "parameters", "after", "after_all", "grid")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One notebook with its parameters."""

    name: str
    notebook: Path
    parameters: dict[str, Any]      # all but `run`; {NAME} in a text stands for the folder of the entry of that name
    after: tuple[str, ...]          # entries whose files it reads; of two with the same file, the later one's


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, and `<<` of a list (small files of those grow without bound)."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" and not isinstance(value, yaml.MappingNode):
                raise ConstructorError(None, None, "<< takes one mapping", key.start_mark)
        return super().construct_mapping(node, deep)


def _is_plain(value: Any, seen: set[int]) -> bool:
    """Whether a value is a text, number or truth value, or lists and mappings of these, none in there twice (small
    files of those grow without bound). seen: lists and mappings met so far."""
    if not isinstance(value, (list, dict)):
        return isinstance(value, (str, int, float, bool))
    if id(value) in seen:
        return False
    seen.add(id(value))
    return all(isinstance(key, str) for key in value if isinstance(value, dict)) and all(
        _is_plain(each, seen) for each in (value.values() if isinstance(value, dict) else value))


class _File:
    """A batch file while it is checked; every error names the file and the place in it."""

    def __init__(self, path: Path, changes: dict[str, str]) -> None:
        self.path = path
        self.content = self._load()
        given = {key: self._value(text, f"--set {key}") for key, text in changes.items()}
        for key in [key for key in given if "." in key]:
            self._replace(key, given.pop(key))
        self.changes = self.parameters(given, "--set")
        content = self.mapping(self.content, "the file", ("defaults", "entries"))
        self.defaults = self.parameters(content.get("defaults"), "defaults")
        self.entries = self.mapping(content.get("entries"), "entries")
        if not self.entries:
            self.fail("entries: none; one at least is needed")

    def fail(self, message: str) -> NoReturn:
        raise InputError(f"{self.path}: {message}")

    def _load(self) -> Any:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                self.fail(f"larger than {MAX_BYTES} bytes; a batch file is a few lines")
            # a SafeLoader: makes plain data alone
            return yaml.load(self.path.read_text(encoding="utf-8"), Loader=_Loader)
        except InputError:
            raise
        except OSError as error:
            self.fail(f"can't be read ({error.strerror})")
        except yaml.MarkedYAMLError as error:
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            self.fail(f"not valid YAML ({line}{error.problem})")
        # dates and keys that can't be, deep nesting
        except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
            self.fail(f"not valid YAML ({str(error).splitlines()[0][:200]})")

    def _value(self, text: str, where: str) -> Any:
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            self.fail(f"{where}: {text[:80]!r} is no YAML value")

    def _replace(self, key: str, value: Any) -> None:
        """--set with a dotted key: the place in the file, which must be there."""
        *way, last = key.split(".")
        place = self.content
        for part in [*way, last]:
            if not isinstance(place, dict) or part not in place:
                self.fail(f"--set {key}: there is no such place in the file" + (
                    f" ({part!r} is not among {', '.join(map(str, place))})" if isinstance(place, dict) else ""))
            inside, place = place, place[part]
        inside[last] = value

    def mapping(self, value: Any, where: str, known: tuple[str, ...] | None = None) -> dict[str, Any]:
        value = {} if value is None else value
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self.fail(f"{where}: a mapping with texts as keys is needed")
        for key in value:
            if known and key not in known:
                self.fail(f"{where}: unknown key {key[:80]!r}; known are {', '.join(known)}")
        return value

    def parameters(self, value: Any, where: str) -> dict[str, Any]:
        """Parameters: plain values, lists and mappings of them, and no `run`. None stands for one that is still to be
        given."""
        for key, given in self.mapping(value, where).items():
            if given is not None and not _is_plain(given, set()):
                self.fail(f"{where}.{key}: a {type(given).__name__}; a text, number or truth value is needed, or a "
                          f"list or mapping of "
                          "these, each written out")
            if key == "run":
                self.fail(f"{where}.run: can't be set; it is the folder of each entry")
        return value or {}

    def name(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not NAME.fullmatch(value):
            self.fail(f"{where}: {repr(value[:80]) if isinstance(value, str) else f'a {type(value).__name__}'} is no "
                      f"name; letters, "
                      "digits, '.', '_' and '-' make one, up to 100, a letter or digit first")
        return value

    def names(self, value: Any, where: str) -> tuple[str, ...]:
        found = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            self.fail(f"{where}: the name of an entry is needed, or a list of them")
        for name in found:
            if name not in self.entries:
                self.fail(f"{where}: no entry {name[:80]!r}; there are {', '.join(map(str, self.entries))}")
        return tuple(found)

    def notebook(self, value: Any, where: str) -> Path:
        """A notebook of this project by its bare name, or one in the folder of the batch file."""
        if not isinstance(value, str) or not value or "\0" in value:
            self.fail(f"{where}: the name of a notebook is needed")
        if value.endswith(".ipynb"):
            folder = self.path.resolve().parent
            path = (folder / value).resolve()
            if not path.is_relative_to(folder):
                self.fail(f"{where}: {value[:80]!r} is not in the folder of the batch file")
        else:
            path = notebooks.NOTEBOOKS / f"{self.name(value, where)}.ipynb"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in notebooks.NOTEBOOKS.glob("*.ipynb")))
            self.fail(f"{where}: no such notebook, {path}; those of the project are {known}")
        return path

    def grid(self, value: Any, where: str) -> dict[str, dict[str, dict[str, Any]]]:
        """{axis: {label: parameters}}. An axis is a list of values of the parameter of its name, or named sets of
        parameters."""
        axes = {}
        for axis, values in self.mapping(value, where).items():
            place = f"{where}.{self.name(axis, where)}"
            if isinstance(values, dict):
                axes[axis] = {self.name(label, place): self.parameters(given, f"{place}.{label}") for label,
                              given in values.items()}
            elif isinstance(values, list):
                sets = [self.parameters({axis: value}, where) for value in values]
                axes[axis] = {self.name(str(s[axis]).lower() if isinstance(s[axis], bool) else str(s[axis]), place): s
                              for s in sets}
            if not axes.get(axis) or len(axes[axis]) != len(values):
                self.fail(f"{place}: a list of different values is needed, or a mapping of names to parameters")
        return axes


def find(path: str | Path) -> Path:
    """A batch file, or by its bare name one of those that come with vitlab."""
    known = BATCHES / f"{path}.yaml"
    return known if len(Path(path).parts) == 1 and not Path(path).exists() and known.is_file() else Path(path)


def _ordered(file: _File, after: dict[str, tuple[str, ...]]) -> list[str]:
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


def _copy_name(name: str, choice: Iterable[tuple[str, str]]) -> str:
    return "-".join([name, *(f"{axis}={label}" for axis, label in choice)])


def read(path: str | Path, changes: dict[str, str] | None = None) -> list[Entry]:
    """The entries of a batch file, each behind those it comes after.

    changes: parameters (as text) that stand above the file's, for all notebooks that declare them; with a dotted key,
    one place of the file. Raises InputError naming the file, the entry and the key for whatever is wrong; nothing was
    started then.
    """
    file = _File(find(path), changes or {})
    bodies = {file.name(name, "entries"): file.mapping(body, f"entries.{name}", KEYS) for name,
              body in file.entries.items()}
    after = {n: file.names(b.get("after"), f"entries.{n}.after") for n, b in bodies.items()}
    after_all = {n: file.names(b.get("after_all"), f"entries.{n}.after_all") for n, b in bodies.items()}
    grids = {n: file.grid(b.get("grid"), f"entries.{n}.grid") for n, b in bodies.items()}
    # entry -> its axes, those of what it comes after first
    axes: dict[str, dict[str, Any]] = {}
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
        if len(found) + len(list(itertools.islice(itertools.product(*axes[name].values()),
                                                  MAX_ENTRIES + 1))) > MAX_ENTRIES:
            file.fail(f"{where}: more than {MAX_ENTRIES} entries")
        notebook = file.notebook(bodies[name].get("notebook"), f"{where}.notebook")
        declared[name] = _declared(file, notebook, where)
        copies[name] = []
        for labels in itertools.product(*axes[name].values()):
            choice = dict(zip(axes[name], labels))
            copy = _copy_name(name, choice.items())
            if len(copy) > 200:
                file.fail(f"{where}: the name {copy[:80]}... is longer than 200 characters; name the values of its "
                          f"grid")
            fitting = {other: [made for chosen,
                               made in copies[other] if all(choice.get(a, c) == c for a, c in chosen.items())]
                       for other in after[name] + after_all[name]}
            chosen = {key: value for axis, label in choice.items() for key, value in axes[name][axis][label].items()}
            parameters = _parameters(file, where, bodies[name], declared[name], chosen)
            found.append(Entry(name=copy, notebook=notebook,
                               after=tuple(dict.fromkeys(itertools.chain(*fitting.values()))),
                               parameters=_check(file, where, notebook, parameters, fitting)))
            copies[name].append((choice, copy))
    shared = [(f"{where}{key}", key, list(bodies)) for where,
              given in (("defaults.", file.defaults), ("--set ", file.changes))
              for key in given]
    shared += [(f"entries.{name}.grid.{axis}", key, [n for n in bodies if axes[n].get(axis) is sets])
               for name, own in grids.items() for axis, sets in own.items() for given in sets.values() for key in given]
    for where, key, reached in shared:
        if not any(key in declared[name] for name in reached):
            file.fail(f"{where}: no notebook that it is for declares a parameter {key[:80]!r}; {reached[0]} declares "
                      f"{', '.join(sorted(declared[reached[0]]))}")
    return found


def _declared(file: _File, notebook: Path, where: str) -> dict[str, Any]:
    try:
        return notebooks.declared(notebook)
    except InputError as error:
        file.fail(f"{where}.notebook: {error}")
    except Exception as error:                  # a file that is none makes nbformat raise nearly anything
        file.fail(f"{where}.notebook: {notebook} can't be read as a notebook ({str(error).splitlines()[0][:120]})")


def _parameters(file: _File, where: str, body: dict[str, Any], declared: dict[str, Any],
                grid: dict[str, Any]) -> dict[str, Any]:
    """Defaults, then the grid's, then the entry's own, then the changes; what several share goes to notebooks that
    declare it."""
    own = file.parameters(body.get("parameters"), f"{where}.parameters")
    for key in [key for key in file.changes if key in grid]:
        file.fail(f"--set {key}: {where} takes it from a grid")
    for key in [key for key in own if key in grid and key in (body.get("grid") or {})]:
        file.fail(f"{where}.parameters.{key}: the grid gives it too")
    shared = {key: value for key, value in (file.defaults | grid).items() if key in declared}
    return shared | own | {key: value for key, value in file.changes.items() if key in declared}


def _check(file: _File, where: str, notebook: Path, parameters: dict[str, Any],
           upstream: dict[str, list[str]]) -> dict[str, Any]:
    """The parameters with {NAME} resolved to the copy meant. InputError for one that is missing, unknown or of the
    wrong type."""
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
