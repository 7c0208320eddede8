"""A module of vitlab imports from lower floors only (see the table); read from the source, nothing is imported."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [                                              # lowest first
    {"runtime"},
    {"plan"},
    {"models", "criteria", "search", "data", "plots"},
    {"measure"},
    {"training", "exporting"},
    {"workbench"},
    {"cli"},                                            # the commands call the workbench's steps
    {"__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported_parts(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, part of vitlab) of every import in the source, those inside functions too; "" is the public face.

    module: dotted name of the source, which relative imports start from.
    """
    found: list[tuple[int, str]] = []

    def add(line: int, dotted: str) -> None:
        pieces = dotted.split(".")
        if pieces[0] == "vitlab":
            found.append((line, pieces[1] if len(pieces) > 1 else ""))

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name != "vitlab":              # `import vitlab` is judged by what is taken from it
                    add(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                up = here[:len(here) - node.level + is_package]
                base = ".".join(up + ([node.module] if node.module else []))
            for alias in node.names:
                if base != "vitlab":
                    add(node.lineno, base)
                elif alias.name != "__version__":
                    add(node.lineno, f"vitlab.{alias.name}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vitlab":
            if node.attr != "__version__":
                add(node.lineno, f"vitlab.{node.attr}")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                add(node.lineno, node.args[0].value)
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Why this source breaks the rule, one line each; empty where it does not."""
    own = module.split(".")[1]
    if own not in FLOOR_OF:
        return [f"{module}: {own} stands on no floor; give it one in FLOORS"]
    wrong = []
    for line, part in imported_parts(source, module, is_package):
        if part not in FLOOR_OF:
            wrong.append(f"{module}:{line}: imports vitlab.{part}, which stands on no floor (a name of the public "
                         f"face?)")
        elif FLOOR_OF[part] >= FLOOR_OF[own] and part != own:
            wrong.append(f"{module}:{line}: imports {part} (floor {FLOOR_OF[part]}) from {own} (floor {FLOOR_OF[own]})")
    return wrong


def sources() -> list[tuple[str, Path]]:
    """(dotted name, path) of every module but the public face."""
    found = []
    for path in sorted((ROOT / "vitlab").rglob("*.py")):
        pieces = path.relative_to(ROOT).with_suffix("").parts
        dotted = ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)
        if dotted != "vitlab":
            found.append((dotted, path))
    return found


def test_every_module_imports_from_lower_floors_only():
    assert len(sources()) >= len({"runtime", "plan", "measure", "models"})       # the folder was really found
    wrong = [line for module, path in sources()
             for line in violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module, source", [
    ("vitlab.runtime.files", "from vitlab.plan import CompressionPlan"),
    ("vitlab.plan", "import vitlab.models"),
    ("vitlab.runtime.results", "from vitlab.plan import cost"),
    ("vitlab.models.compress", "from vitlab.criteria.planning import prune_and_merge"),
    ("vitlab.models.compress", "from ..search import policy"),
    ("vitlab.models.compress", "from .. import search"),
    ("vitlab.criteria.planning", "def f():\n    from vitlab.models import compress"),
    ("vitlab.data.source", "import torch, vitlab.training.loop as loop"),
    ("vitlab.plan.cost", "try:\n    import vitlab.models\nexcept ImportError:\n    pass"),
    ("vitlab.training.loop", "from vitlab.cli import main"),
    # the public face, from below
    ("vitlab.models.compress", "from vitlab import compress"),
    ("vitlab.models.compress", "import vitlab\nx = vitlab.load"),
    ("vitlab.models.compress", "import vitlab\nx = vitlab.measure.capture"),
    ("vitlab.models.compress", "import importlib\nimportlib.import_module('vitlab.measure.capture')"),
    ("vitlab.workbench.steps", "import vitlab.cli"),
    ("vitlab.nowhere", "import json"),
])
def test_the_checker_catches_a_planted_violation(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize("module, source", [
    ("vitlab.runtime.files", "import json\nfrom pathlib import Path"),
    ("vitlab.models.deploy", "from vitlab.plan import tokens\nfrom vitlab.models.compress import compress\nfrom "
                             ".support import f"),
    ("vitlab.models.checkpoint", "import vitlab\nx = vitlab.__version__\nfrom vitlab import __version__"),
    ("vitlab.training.loop", "from vitlab.measure import capture\nfrom vitlab.data import ImageData\nfrom ..models "
                             "import compress\nfrom . import evaluate"),
    ("vitlab.cli", "from vitlab.training.loop import train"),
    ("vitlab.plan.cost", "import vitlabs.training\nfrom vitlab_other import cli"),
])
def test_the_checker_lets_lower_floors_and_the_own_package_pass(module, source):
    assert violations(source, module) == []


def test_a_relative_import_in_a_package_file_starts_from_the_package():
    assert violations("from .loop import train", "vitlab.training", is_package=True) == []
    assert len(violations("from ..cli import main", "vitlab.training", is_package=True)) == 1


def test_type_checkers_see_the_public_face_that_is_there():
    import vitlab
    told = {alias.asname: node.module
            for node in ast.walk(ast.parse((ROOT / "vitlab" / "__init__.py").read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module.startswith("vitlab.")
            for alias in node.names if alias.asname}
    assert told == vitlab._PUBLIC
