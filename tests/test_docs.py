"""What the pages show is what benchmarks/results holds, and the code of the README runs."""
import importlib.util
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from test_floors import FLOORS

import vitlab
from vitlab import cli
from vitlab.criteria.units import UNIT_CRITERIA
from vitlab.data import DATA_SETS
from vitlab.plan.cost import gmacs
from vitlab.search.token_dimensions import TOKEN_DIMENSIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_docs_are_the_measured_ones():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    pages = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    assert all(any(f"<!-- table: {name} -->" in page for page in pages) for name in tables.TABLES)
    for page in pages:
        assert tables.render(page) == page, "run: python benchmarks/tables.py"


def test_the_commands_in_the_readme_and_step_by_step_are_ones_that_vitlab_takes():
    text = README + (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()
                if line.startswith("vitlab ")]
    assert {command[1] for command in commands} >= {"score", "prune", "search", "finetune", "evaluate", "throughput"}
    for command in commands:
        cli.build().parse_args(command[1:], exit_on_error=False,
                               print_error=False)             # raises for another option


def test_every_file_that_the_readme_names_is_there():
    check_links(ROOT / "README.md")
    notebooks = {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r"`(\d\d_\w+)`", README)) == notebooks


def check_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (page.parent / link).exists()]


def test_every_file_and_name_that_a_contributor_is_sent_to_is_there():
    check_links(ROOT / "CONTRIBUTING.md")
    check_links(ROOT / "docs" / "glossary.md")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("\n", " ")
    paths = re.findall(r"`((?:vitlab|tests|benchmarks|docs|notebooks)/[\w./]*)`", text)
    there = [path for path in paths if "NAME" not in path and "NN_" not in path]
    assert len(there) > 20 and not [path for path in there if not (ROOT / path).exists()]
    for name, path in re.findall(r"`(\w+)` of\s+`((?:vitlab|tests)/[\w/]+\.py)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{name} is not in {path}"


def test_the_table_of_floors_is_the_one_that_holds():
    table = re.search(r"<!-- floors -->(.*?)<!-- end -->", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
                      flags=re.S).group(1)
    rows = [row.split("|") for row in table.strip().splitlines()[2:]]
    assert [int(row[1]) for row in rows] == list(range(len(FLOORS)))
    assert [set(re.findall(r"`(\w+)`", row[2])) for row in rows] == FLOORS


@pytest.mark.parametrize("page", ["plan", "extending"])
def test_the_examples_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "example", types.ModuleType("example"))       # in which timm looks
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), flags=re.S)
    assert blocks and all("assert" in block for block in blocks)
    known, names = (UNIT_CRITERIA, TOKEN_DIMENSIONS, DATA_SETS), {"__name__": "example"}
    before = [dict(each) for each in known]
    try:
        for block in blocks:
            exec(compile(block, f"docs/{page}.md", "exec"), names)
    finally:
        for each, kept in zip(known, before):                   # what an example adds goes again
            each.clear()
            each.update(kept)


def test_the_lines_of_code_in_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    exec(compile(code, "README", "exec"), names)
    promised, whole = map(float, re.search(r"# ([\d.]+) GMACs in place of ([\d.]+)", code).groups())
    assert round(gmacs(names["plan"]), 1) == promised
    assert round(gmacs(vitlab.CompressionPlan.empty(names["plan"].shape)), 2) == whole
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, fast = vitlab.compress(names["model"], names["plan"])(x), names["fast"](x)
    assert float((fast - expected).abs().max() / expected.abs().max()) < 1e-4      # float32, another order of products


def test_the_reference_holds_the_whole_public_face():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    face = [getattr(vitlab, name) for name in vitlab.__all__]
    assert set(re.findall(r"^::: (\S+)$", page, flags=re.M)) == {f"{each.__module__}.{each.__name__}" for each in face}
