"""What a stranger's file can't do: run code, lead out of its folder, or put HTML into a page. tests/test_faults.py has
its refusals."""
import ast
import csv
import html.parser
import io
import json
import os
import pickle
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from jupyter_server.auth import IdentityProvider
from jupyter_server.serverapp import ServerApp
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from vitlab import cli
from vitlab.data import open_data
from vitlab.models import checkpoint, shape_of
from vitlab.models.create import create_model
from vitlab.models.weights import read_file
from vitlab.plan import CompressionPlan
from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow, append_row, to_csv, to_latex
from vitlab.search.study import read_journal
from vitlab.workbench import batch_checks, batch_file, report, scoring, steps
from vitlab.workbench.explore import choosing

ROOT = Path(__file__).parents[1]
SOURCE = sorted((ROOT / "vitlab").rglob("*.py"))


# ---- Loading runs nothing of the file's

class Trap:
    """Unpickling this writes a file in the current folder."""

    def __reduce__(self):
        return Path.write_text, (Path("owned"), "owned")


def torch_file(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    return file.getvalue()


TRAPS = {"pickle": lambda: pickle.dumps({"model": Trap()}), "torch": lambda: torch_file({"model": {"a": Trap()}}),
         "torch, of old": lambda: pickle.dumps(0) + pickle.dumps({"a": Trap()}), "numpy": numpy_file,
         "state": lambda: torch_file({"model": {"a": torch.zeros(2)}, "optimizer": {"state": {0: Trap()}}, "epoch": 1})}


@pytest.fixture
def dense(tmp_path, monkeypatch) -> CompressionPlan:
    """dense/, a checkpoint in the current folder; its plan."""
    monkeypatch.chdir(tmp_path)
    model = create_model("vit_nano_patch4_32", depth=2, embed_dim=8, num_heads=2)
    plan = CompressionPlan.empty(shape_of(model))
    checkpoint.save("dense", model, plan)
    return plan


def load_image(path: str) -> None:
    os.makedirs("train/a")
    Path(path).rename("train/a/0.png")
    image = open_data(Path.cwd()).split("train")
    image.transform = lambda picture: picture
    assert image[0][1] == -1
    raise InputError("left out")


READERS = {         # every way in for a file: its name, and what reads it
    "weights of a checkpoint": ("dense/weights.safetensors", lambda path: checkpoint.load("dense")),
    "plan of a checkpoint": ("dense/plan.json", lambda path: checkpoint.load("dense")),
    "checkpoint.json": ("dense/checkpoint.json", lambda path: checkpoint.load("dense")),
    "weights, .pth": ("w.pth", lambda path: steps.open_model(path, model="vit_nano_patch4_32")),
    "weights, .pt": ("w.pt", lambda path: steps.open_model(path, model="vit_nano_patch4_32")),
    "weights, .bin": ("w.bin", lambda path: steps.open_model(path, model="vit_nano_patch4_32")),
    "weights, .safetensors": ("w.safetensors", lambda path: steps.open_model(path, model="vit_nano_patch4_32")),
    "training state": ("state-000000001-00.pt", read_file),
    "scores of tokens": ("s.safetensors", scoring.read_scores),
    "scores of units": ("u.safetensors", scoring.read_units),
    "plan": ("plan.json", CompressionPlan.load),
    "batch file": ("batch.yaml", batch_file.read),
    "class map": ("map.json", lambda path: open_data("train", class_map=path)),
    "summary of a batch": ("summary.json", lambda path: report.rows_of(".")),
    "image": ("i.png", load_image),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("reader", READERS)
def test_a_trap_is_refused_and_does_not_go_off(reader, trap, dense):
    path, read = READERS[reader]
    Path(path).write_bytes(TRAPS[trap]())
    with pytest.raises(InputError):
        read(path)
    assert not Path("owned").exists()


def test_a_trap_in_a_journal_does_not_go_off(dense):
    Path("journal.jsonl").write_bytes(pickle.dumps(Trap()) + b"\n{}\n")
    with pytest.raises(InputError, match="line 1 is damaged"):
        read_journal(".")
    assert not Path("owned").exists()


def test_the_traps_are_real_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (lambda: pickle.loads(TRAPS["pickle"]()),
                 lambda: torch.load(io.BytesIO(TRAPS["torch"]()), weights_only=False),
                 lambda: np.load(io.BytesIO(numpy_file()), allow_pickle=True)):
        load()
        assert Path("owned").read_text() == "owned"
        Path("owned").unlink()


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch owned']", "!!python/object/new:os.system ['touch owned']",
    "!!python/name:os.system", "!!python/module:antigravity", "!!python/object/apply:pathlib.Path.write_text "
                                                              "[!!python/object/apply:pathlib.Path [owned], x]"])
def test_tags_of_yaml_run_nothing_in_a_batch_file_and_in_a_change(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("batch.yaml").write_text(f"entries: {text}\n")
    with pytest.raises(InputError, match="not valid YAML"):
        batch_file.read("batch.yaml")
    Path("batch.yaml").write_text("entries: {}\n")
    with pytest.raises(InputError, match="is no YAML value"):
        batch_file.read("batch.yaml", {"seed": text})
    assert not Path("owned").exists()


def test_reading_what_a_notebook_declares_runs_none_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [new_code_cell("open('owned', 'w')"),
             new_code_cell("a: int = open('owned', 'w')", metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=cells), "n.ipynb")
    Path("batch.yaml").write_text("entries: {n: {notebook: n.ipynb}}\n")
    with pytest.raises(InputError, match="n.ipynb can't be read as a notebook"):
        batch_file.read("batch.yaml")
    assert not Path("owned").exists()


def named(node: ast.expr) -> str:
    """os.system of os.system(...)."""
    return f"{named(node.value)}.{node.attr}" if isinstance(node,
                                                            ast.Attribute) else node.id if isinstance(node,
                                                                                                      ast.Name) else ""


def test_the_source_has_no_call_that_could_run_what_a_file_holds():
    unsafe = re.compile(r"(eval|exec|compile|__import__|os\.system|os\.popen|yaml\.(unsafe_load|full_load)"
                        r"|(pickle|cPickle|dill|joblib|cloudpickle|shelve|marshal)\.(load|loads|open|Unpickler))")
    found, loads = [], 0
    for path in SOURCE:
        for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                     if isinstance(node, ast.Call)):
            name, given = named(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            loads += name in ("torch.load", "yaml.load", "np.load")
            wrong = (unsafe.fullmatch(name) or (name == "torch.load" and given.get("weights_only") != "True")
                     or (name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
                     or (name == "yaml.load" and given.get("Loader") != "_Loader")
                     or given.get("shell", "False") != "False"
                     or given.get("allow_pickle", "False") != "False"
                     or given.get("trust_remote_code", "False") != "False")
            found += [f"{path.name}:{call.lineno} {name}"] if wrong else []
    assert not found and loads == 3                             # it sees those there are
    assert issubclass(batch_checks._Loader, yaml.SafeLoader)


# ---- Names stay in their folder

@pytest.mark.parametrize("name", [
    "..", "../w", "w/../../x", "/tmp/w", "C:\\w", "..\\w", "\\\\host\\share", "w\0", "w\n", ".w", "", "w/", "~"])
def test_a_name_that_leads_out_is_none_of_an_entry_a_grid_or_a_summary(name, tmp_path):
    cells = [new_code_cell('run: str = ""\nvalue: str = ""', metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=cells), tmp_path / "n.ipynb")
    path = tmp_path / "batch.yaml"
    for entries in ({name: {"notebook": "n.ipynb"}}, {"w": {"notebook": "n.ipynb", "grid": {"value": [name, "b"]}}},
                    {"w": {"notebook": "n.ipynb", "grid": {"kind": {name: {"value": "1"}}}}}):
        path.write_text(yaml.safe_dump({"entries": entries}))
        with pytest.raises(InputError, match="is no name"):
            batch_file.read(path)
    entry = {"name": name, "notebook": "n.ipynb", "state": "done", "seconds": 1, "why": None}
    (tmp_path / "summary.json").write_text(json.dumps({"entries": [entry]}))
    with pytest.raises(InputError, match="is no name of an entry"):
        report.entries_of(tmp_path)


@pytest.mark.parametrize("notebook", [
    "../n.ipynb", "/etc/n.ipynb", "sub/../../n.ipynb", "link.ipynb", "linked/n.ipynb", "n\0.ipynb", "..\\n.ipynb"])
def test_a_notebook_from_outside_the_folder_of_its_batch_file_is_refused(notebook, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    nbformat.write(new_notebook(cells=[new_code_cell("", metadata={"tags": ["parameters"]})]), tmp_path / "n.ipynb")
    (inside / "link.ipynb").symlink_to(tmp_path / "n.ipynb")
    (inside / "linked").symlink_to(tmp_path)
    (inside / "batch.yaml").write_text(yaml.safe_dump({"entries": {"w": {"notebook": notebook}}}))
    with pytest.raises(InputError, match=r"is not in the folder|the name of a notebook is needed|no such notebook"):
        batch_file.read(inside / "batch.yaml")


def test_a_plan_and_a_checkpoint_name_no_files(dense):
    """Every field of a plan is a number, a list of numbers or a word of a list; a model is one of timm's by name."""
    for way in ("shape", "blocks.0"):
        data = place = json.loads(dense.to_json())
        for key in way.split("."):
            place = place[int(key) if key.isdigit() else key]
        place["file"] = "../../w"
        with pytest.raises(InputError, match=r"unknown \['file'\]"):
            CompressionPlan.from_json(data)
    info = json.loads(Path("dense/checkpoint.json").read_text())
    for name in ("../dense", "/tmp", "local-dir:dense", "hf-hub:a/b", "hf_hub:a/b", "file:///tmp/w", "C:\\w",
                 "vit_nano_patch4_32\0"):
        info["model"]["name"] = name
        Path("dense/checkpoint.json").write_text(json.dumps(info))
        with pytest.raises(InputError, match="no such file or folder, and no timm model"):
            checkpoint.load("dense")


# ---- Images

def test_no_other_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for PostScript, whatever the name of the file says."""
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(program)
    with pytest.raises(OSError, match="cannot identify"):
        open_data(tmp_path).split("train").image(0)
    with pytest.raises(InputError, match="can't be read as an image"):
        choosing.decode("0.jpg", program, shape_of(create_model("vit_nano_patch4_32")))


def test_uploads_have_limits_and_pillows_own_is_not_lifted():
    assert choosing.MAX_BYTES <= 10_000_000 and Image.MAX_IMAGE_PIXELS <= 100_000_000
    assert not [p for p in SOURCE
                if re.search(r"MAX_IMAGE_PIXELS\s*=|LOAD_TRUNCATED_IMAGES", p.read_text(encoding="utf-8"))]


# ---- JupyterLab

def test_jupyterlab_is_started_with_its_own_defaults_a_token_and_loopback():
    calls = [line for line in (ROOT / "Makefile").read_text().splitlines() if re.search(r"\bjupyter\b", line)]
    assert len(calls) == 1 and "jupyter lab" in calls[0]
    flags = re.findall(r"--([\w.]+)", calls[0])
    assert set(flags) <= {"ServerApp.root_dir", "LabApp.default_url"}
    # what other packages install is theirs
    own = [p for p in ROOT.glob("**/jupyter_*config*.*") if ".venv" not in p.parts]
    assert not own and not [p for p in SOURCE if "ServerApp" in p.read_text(encoding="utf-8")]
    app = ServerApp(log_level=50)
    assert app.ip in ("localhost",
                      "127.0.0.1") and len(IdentityProvider(parent=app).token) >= 32 and not app.allow_remote_access
    assert not app.allow_root and not app.disable_check_xsrf and app.allow_origin == ""


# ---- What comes from data is text in a page, a table, and LaTeX

EVIL = '<script>alert(1)</script><img src=x onerror="alert(1)">\'"&</td></table>'


class Seen(html.parser.HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def evil_run(tmp_path) -> Path:
    row = ResultRow(model=EVIL, dataset=EVIL, split=EVIL, top1_pct=1.0, conditions={EVIL: EVIL, "form": {EVIL: [EVIL]}})
    for name in ("a", "b"):
        append_row(tmp_path / "entries" / name / "results.jsonl", row)
    append_row(tmp_path / "entries/b/results.jsonl", ResultRow(model="b", conditions={EVIL: "other"}))
    entries = [{"name": name, "notebook": "n.ipynb", "state": EVIL, "seconds": 1.0, "why": EVIL} for name in "ab"]
    (tmp_path / "entries/a/figures").mkdir()
    for kind in ("png", "svg"):
        name = tmp_path / "entries/a/figures" / (EVIL.replace("/", "") + f".{kind}")
        name.write_bytes(b"") if kind == "svg" else Image.new("RGB", (1, 1)).save(name)
    (tmp_path / "summary.json").write_text(json.dumps({"entries": entries}))
    return tmp_path


def test_a_report_shows_what_comes_from_data_as_text(evil_run, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "display",
                        lambda *parts: shown.extend(part.data for part in parts if isinstance(part, report.HTML)))
    report.show_figures(evil_run)
    for page in (report.summary_table(evil_run).data, report.results_table(evil_run).data, "".join(shown)):
        seen = Seen(page)
        assert seen.tags <= {"table", "tr", "th", "td", "p", "h3", "a"} and seen.attributes <= {"style", "href"}
        assert "alert(1)" in seen.text and "<script>" in seen.text


def test_latex_holds_what_comes_from_data_escaped():
    odd = "\\input{/etc/passwd} % $x$ #1 a_b ~ ^ & {} < >"
    text = to_latex([odd], [ResultRow(model=odd)], odd, ("model",))
    for line in (line for line in text.splitlines() if "passwd" in line):
        assert r"\textbackslash{}input\{/etc/passwd\} \% \$x\$ \#1 a\_b \textasciitilde{} \textasciicircum{} \& \{\}" in line  # noqa: E501
    assert r"\input" not in text and text.count("passwd") == 3


@pytest.mark.parametrize("formula", ["=1+1", "+cmd|' /C calc'!A0", "-1+1", "@SUM(1)", "\t=1", "\r=1"])
def test_a_spreadsheet_takes_no_text_of_the_csv_for_a_formula(formula):
    row = ResultRow(model=formula, top1_pct=5.0, loss=-0.5, conditions={formula: formula})
    cells = [cell for line in csv.reader(io.StringIO(to_csv([formula], [row]), newline="")) for cell in line]
    assert cells.count("'" + formula.replace("\r", " ")) == 4 and "-0.5" in cells
    assert not [cell for cell in cells if cell.lstrip().startswith(("=", "+", "@"))]


def test_names_that_are_no_text_and_control_characters_are_printed_as_escapes(dense, capsys):
    assert cli.main(["prune", "plan", "--checkpoint", "dense", "--plan", "a\x1b[2J\nb\udcff.json", "--out", "out"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "a\\x1b[2J b\\udcff.json: no such file" in line
