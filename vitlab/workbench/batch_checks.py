"""What may stand where in a batch file, a YAML file from anyone: plain data, names that lead nowhere, known keys."""
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError

from vitlab.runtime.files import InputError
from vitlab.workbench import notebooks

MAX_BYTES = 200_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")          # of entries and grid values: no way out of a folder


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
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return False
    return all(_is_plain(each, seen) for each in (value.values() if isinstance(value, dict) else value))


class BatchFile:
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
            return yaml.load(self.path.read_text(encoding="utf-8"), Loader=_Loader)     # makes plain data alone
        except InputError:
            raise
        except OSError as error:
            self.fail(f"can't be read ({error.strerror})")
        except yaml.MarkedYAMLError as error:
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            self.fail(f"not valid YAML ({line}{error.problem})")
        except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:    # dates, keys, nesting that can't be
            self.fail(f"not valid YAML ({str(error).splitlines()[0][:200]})")

    def _value(self, text: str, where: str) -> Any:
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            self.fail(f"{where}: {text[:80]!r} is no YAML value")

    def _replace(self, key: str, value: Any) -> None:
        """--set with a dotted key: the place in the file, which must be there."""
        place = self.content
        for part in key.split("."):
            if not isinstance(place, dict) or part not in place:
                self.fail(f"--set {key}: there is no such place in the file" + (
                    f" ({part!r} is not among {', '.join(map(str, place))})" if isinstance(place, dict) else ""))
            inside, place = place, place[part]
        inside[part] = value

    def mapping(self, value: Any, where: str, known: tuple[str, ...] | None = None) -> dict[str, Any]:
        value = {} if value is None else value
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self.fail(f"{where}: a mapping with texts as keys is needed")
        for key in value:
            if known and key not in known:
                self.fail(f"{where}: unknown key {key[:80]!r}; known are {', '.join(known)}")
        return value

    def parameters(self, value: Any, where: str) -> dict[str, Any]:
        """Parameters: plain values, and no `run`. None stands for one that is still to be given."""
        for key, given in self.mapping(value, where).items():
            if given is not None and not _is_plain(given, set()):
                self.fail(f"{where}.{key}: a {type(given).__name__}; a text, number or truth value is needed, or a "
                          "list or mapping of these, each written out")
            if key == "run":
                self.fail(f"{where}.run: can't be set; it is the folder of each entry")
        return value or {}

    def name(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not NAME.fullmatch(value):
            self.fail(f"{where}: {repr(value[:80]) if isinstance(value, str) else f'a {type(value).__name__}'} is no "
                      "name; letters, digits, '.', '_' and '-' make one, up to 100, a letter or digit first")
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
        """{axis: {label: parameters}}: values of the parameter of the axis' name, or named sets of parameters."""
        axes = {}
        for axis, values in self.mapping(value, where).items():
            place, sets = f"{where}.{self.name(axis, where)}", []
            if isinstance(values, dict):
                sets = [(label, self.parameters(given, f"{place}.{label}")) for label, given in values.items()]
            elif isinstance(values, list):
                sets = [(str(given).lower() if isinstance(given, bool) else str(given),
                         self.parameters({axis: given}, where)) for given in values]
            axes[axis] = {self.name(label, place): given for label, given in sets}
            if not sets or len(axes[axis]) != len(sets):
                self.fail(f"{place}: a list of different values is needed, or a mapping of names to parameters")
        return axes

    def declared(self, notebook: Path, where: str) -> dict[str, Any]:
        """The parameters of a notebook."""
        try:
            return notebooks.declared(notebook)
        except InputError as error:
            self.fail(f"{where}: {error}")
