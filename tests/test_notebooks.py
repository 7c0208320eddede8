"""The notebooks: a fast lint of their form, and a quick run of each in order: by papermill or, where it has
widgets, in a browser."""
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lab
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from warm_kernel import warm_kernels  # noqa: F401

from vitlab.runtime.files import InputError
from vitlab.runtime.results import read_rows
from vitlab.workbench import notebooks
from vitlab.workbench.demo import EVERYTHING as DEMO
from vitlab.workbench.demo import STORY, made
from vitlab.workbench.demo import demo as run_demo

run_notebook = notebooks.run
PATHS = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
# with widgets, which a browser alone shows, or not run by the demo
IN_A_BROWSER = [path.name for path in PATHS
                if "vitlab.workbench.explore" in path.read_text(encoding="utf-8") or path.stem not in DEMO]
MAX_CELL, MAX_NOTEBOOK = 15, 90            # lines, from the notebook rules
# per cent: what the quick run learns of the scenes (all background is 8), and may lose
QUICK_MIOU, LOST_MIOU = 30, 8
# Of each notebook with widgets: sliders whose picture has to change on a key, pressed so often.
SLIDERS = {"03_prune_and_merge.ipynb": [("keep rate", "ArrowLeft", 10), ("block", "ArrowRight", 1)],
           "09_segmentation.ipynb": [("keep rate", "ArrowLeft", 10), ("image", "ArrowRight", 1)],
           "06_search.ipynb": [("evaluation", "ArrowLeft", 1), ("cut", "ArrowRight", 10)]}


def code_cells(path: Path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def told(executed: Path) -> str:
    """What an executed notebook prints, and its tables."""
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/html", "") for output in outputs)


def lines(cell) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_there_are_notebooks_and_the_demo_runs_them_in_order():
    names = [p.stem for p in PATHS]
    assert list(DEMO) == sorted(DEMO)
    assert set(DEMO) <= set(names) and names[0].startswith("00_")
    assert [name for name in DEMO if name in STORY] == list(STORY)
    for name, parameters in [*STORY.items(), *DEMO.items()]:
        notebooks.check_parameters(notebooks.NOTEBOOKS / f"{name}.ipynb", parameters)


def test_no_notebook_of_the_short_demo_needs_one_that_is_not_in_it():
    left: set[str] = {"results.jsonl"}
    for name in STORY:
        source = "".join(c.source for c in code_cells(notebooks.NOTEBOOKS / f"{name}.ipynb"))
        makers = set(re.findall(r'by="(\w+)"', source))
        assert makers <= left | {"results.jsonl"}, name
        left.add(name)


def test_what_a_notebook_needs_is_made_by_the_notebook_that_it_names(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(notebooks, "run", lambda path, out, parameters, progress: ran.append((path.stem, parameters)))
    for name, by in (("dense", "01_baseline"), ("scores.safetensors", "02_token_scores")):
        assert made(tmp_path, name, by=by, data="digits", quick=True) == tmp_path / name
        assert ran.pop() == (by, {"run": str(tmp_path), "quick": True})
        assert f"{tmp_path / name} is not there yet: running {by}, which makes it" in capsys.readouterr().out
        with pytest.raises(InputError, match=f"{name}: not there yet; {by} makes it"):      # of images of one's own
            made(tmp_path, name, by=by, data="IMAGES")
    (tmp_path / "dense" / "training").mkdir(parents=True)                   # of a training that was killed
    made(tmp_path, "dense", by="01_baseline", data="digits")
    assert ran.pop()[0] == "01_baseline"
    (tmp_path / "dense" / "checkpoint").mkdir()
    for path in (tmp_path / "dense" / "checkpoint" / "checkpoint.json", tmp_path / "scores.safetensors"):
        path.write_text("{}")
    made(tmp_path, "dense", by="01_baseline", data="digits")
    made(tmp_path, "scores.safetensors", by="02_token_scores", data="IMAGES")
    assert ran == []
    for mine, given in (("", {}), ("mine.pth", {"checkpoint": "mine.pth", "model": "deit"})):       # of the same model
        made(tmp_path, "pruned", by="03_prune_and_merge", data="digits", checkpoint=mine, model="deit")
        assert ran.pop() == ("03_prune_and_merge", {"run": str(tmp_path), **given})


def test_what_a_notebook_lacks_is_made_of_the_dense_model_that_it_was_given():
    for path in PATHS:
        of = "dense_checkpoint" if "dense_checkpoint: str" in path.read_text(encoding="utf-8") else "checkpoint"
        for call in re.findall(r"demo\.made\(.*?\)", "\n".join(cell.source for cell in code_cells(path))):
            assert '"dense"' in call or f"checkpoint={of}, model=model" in call, (path.name, call)


BARS = "from tqdm import tqdm\nfor _ in tqdm(range(6)):\n    pass"


def test_a_bar_of_an_executed_notebook_stands_where_it_ended(tmp_path):
    parameters = nbformat.v4.new_code_cell("x: int = 1", metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(BARS)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "bar.ipynb")
    executed = nbformat.read(notebooks.run(tmp_path / "bar.ipynb", tmp_path / "out", progress=False), as_version=4)
    shown, = executed.cells[-1].outputs
    assert shown.output_type == "stream" and "6/6" in shown.text and "0/6" not in shown.text
    modules = Path(notebooks.__file__).parents[1].rglob("*.py")         # a widget is kept as it was first shown
    assert not [path for path in modules if re.search(r"tqdm\.(auto|notebook)", path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_notebook_has_the_form_of_the_house(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert re.match(r"# .+\?\n", notebook.cells[0].source), "the title must be a question"
    cells = code_cells(path)
    assert not any(c.outputs or c.execution_count for c in cells), "stored with outputs"
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    assert max(len(lines(c)) for c in cells) <= MAX_CELL
    assert sum(len(lines(c)) for c in cells) <= MAX_NOTEBOOK


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_notebook_code_holds_no_definition_try_magic_or_install(path):
    for number, cell in enumerate(code_cells(path)):
        tree = ast.parse(cell.source)       # a magic or an install line is a syntax error
        bad = [n for n in ast.walk(tree)
               if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Try, ast.While, ast.AsyncFunctionDef))]
        assert not bad, f"code cell {number}: {type(bad[0]).__name__}"
        if number:
            assert not any(isinstance(n, (ast.Import, ast.ImportFrom))
                           for n in tree.body), "imports belong in the first code cell"
    assert all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(code_cells(path)[0].source).body)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_parameters_are_annotated_literals_with_a_default(path):
    cell = next(c for c in code_cells(path) if "parameters" in c.metadata.get("tags", []))
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        value = ast.literal_eval(node.value)
        assert isinstance(value,
                          {"str": str, "int": int, "float": float, "bool": bool, "dict": dict,
                           "list": list}[node.annotation.id])


def test_a_parameter_that_a_notebook_does_not_declare_is_refused_before_it_runs(tmp_path):
    with pytest.raises(InputError, match=r"keep_ratio.*keep_rate"):
        notebooks.run(notebooks.NOTEBOOKS / "03_prune_and_merge.ipynb", tmp_path, {"keep_ratio": 0.5})
    with pytest.raises(InputError, match="keep_rate is 'half'"):
        notebooks.run(notebooks.NOTEBOOKS / "03_prune_and_merge.ipynb", tmp_path, {"keep_rate": "half"})
    assert not list(tmp_path.iterdir())


def test_a_parameter_that_is_a_list_takes_one_text_too():
    for given in ("runs/demo/small", ["runs/demo/small", "runs/demo/other"]):
        notebooks.check_parameters(notebooks.NOTEBOOKS / "11_what_changed.ipynb", {"checkpoint": given})
    with pytest.raises(InputError, match="checkpoint is 7; a list"):
        notebooks.check_parameters(notebooks.NOTEBOOKS / "11_what_changed.ipynb", {"checkpoint": 7})


def test_a_failing_cell_is_named_with_its_error(tmp_path, warm_kernels):  # noqa: F811
    with pytest.raises(InputError, match=r"90_results.ipynb: cell \d+ failed: AssertionError: no results in"):
        notebooks.run(notebooks.NOTEBOOKS / "90_results.ipynb", tmp_path, {"run": str(tmp_path / "empty")},
                      progress=False)


def test_of_an_interrupted_notebook_the_kernel_tells_nothing(tmp_path):
    """Its sockets are closed while a cell is at work: of that it wrote a traceback. Nor was jsonschema's grammar of
    IRIs built, which takes seconds."""
    cells = ['started: str = ""  # path', "import time\nopen(started, 'w').close()\ntime.sleep(600)"]
    made = [new_code_cell(cells[0], metadata={"tags": ["parameters"]}), new_code_cell(cells[1])]
    nbformat.write(new_notebook(cells=made), tmp_path / "wait.ipynb")
    code = ("import sys\nfrom vitlab.workbench import notebooks\ntry:\n"
            "    notebooks.run('wait.ipynb', 'out', {'started': sys.argv[1]}, progress=False)\n"
            "except KeyboardInterrupt:\n    print('interrupted', 'rfc3987_syntax' in sys.modules, file=sys.stderr)")
    started = tmp_path / "started"
    process = subprocess.Popen([sys.executable, "-c", code, str(started)], cwd=tmp_path, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]),
                                                       "JUPYTER_PATH": ""})
    deadline = time.monotonic() + 300
    while not started.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[1] == "interrupted False\n"


@pytest.fixture(scope="module")
def opened(tmp_path_factory, warm_kernels):  # noqa: F811
    """JupyterLab in a browser on copies of all notebooks, whose study is its folder `run`; None without a browser."""
    root = tmp_path_factory.mktemp("lab")
    lab.copies(root, root / "run", quick=True, more=DEMO)
    with contextlib.nullcontext() if lab.missing() else lab.lab(root) as found:
        yield found


def apart(*arguments, **settings):
    """notebooks.run in a thread of its own: the browser's loop runs in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run_notebook, *arguments, **settings).result()


@pytest.fixture(scope="module")
def looked_at(opened, tmp_path_factory):
    """(folder of the demo, {notebook: what was seen of it in the browser, or the error that ended it}). Each notebook
    runs once: one with widgets in the browser where there is one, any other by papermill."""
    out, seen = opened.root / "run" if opened else tmp_path_factory.mktemp("demo"), {}

    def run(path, folder, parameters=None, **settings):
        if not opened or path.name not in IN_A_BROWSER:
            return apart(path, folder, parameters, **settings)
        try:
            seen[path.name] = look(opened, path.name)
        except Exception as error:              # the test of that notebook raises it
            seen[path.name] = error
        return shutil.copy(opened.root / path.name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "run", run)
        run_demo(out=out, everything=True, quick=True)
        for name in IN_A_BROWSER if opened else ():
            if name not in seen:
                run(notebooks.NOTEBOOKS / name, out / "notebooks")
    return out, seen


@pytest.fixture(scope="module")
def demo(looked_at):
    return looked_at[0]


def look(opened: lab.Lab, name: str) -> dict:
    """A notebook run to its end in JupyterLab, and its widgets answering to keys."""
    opened.open(name)
    cells = opened.run_all()
    moved = {label: opened.press(opened.slider(label), key, times) for label, key, times in SLIDERS.get(name, [])}
    menus = [opened.chosen_by_keys(menu) for menu in opened.menus()]
    return {"cells": cells, "moved": moved, "menus": menus, "slabs": opened.slabs(), "errors": list(opened.errors),
            "text": opened.page.locator(".jp-Notebook").inner_text()}


def test_all_notebooks_run_and_leave_their_artefacts(demo):
    for name in ("dense/checkpoint/plan.json", "scores.safetensors", "pruned/checkpoint/weights.safetensors",
                 "finetuned/checkpoint/checkpoint.json", "deployed/weights.safetensors", "unit_scores.safetensors",
                 "units/checkpoint/weights.safetensors", "sensitivity/seed-0/sensitivity.jsonl",
                 "search/gp/journal.jsonl", "search/random/plan.json",
                 "joint_finetuned/checkpoint/checkpoint.json", "tonight/offers.jsonl",
                 "tonight/deployed/weights.safetensors", "segmenter/dense/checkpoint/plan.json",
                 "segmenter/scores.safetensors", "segmenter/tuned/checkpoint/weights.safetensors",
                 "export/results.jsonl", "changes/finetuned.safetensors", "changes/joint_finetuned.safetensors",
                 "report.html"):
        assert (demo / name).stat().st_size > 0, name
    drawn = {p.stem for p in (demo / "figures").glob("*.png")}
    assert {"01_training", "02_scores", "03_kept_counts", "03_merge_map_china", "04_training", "05_unit_scores",
            "05_rollouts", "05_redundancy", "05_sensitivity", "06_incumbents", "06_gp_slices", "06_acquisition",
            "06_parallel", "06_plan", "06_pareto_gmacs", "06_pareto_latency_ms", "07_training", "08_curves",
            "08_offers", "08_plan", "09_training", "09_cost_by_part", "09_miou_against_cost", "09_predictions",
            "09_regions", "09_class_iou", "11_changed_finetuned", "11_changed_joint_finetuned", "11_classes",
            "11_reliability", "11_corruptions", "11_similarity", "11_speed", "90_accuracy_cost"} <= drawn
    executed = [json.loads((demo / "notebooks" / f"{n}.ipynb").read_text()) for n in DEMO]
    assert all(c["execution_count"] for nb in executed for c in nb["cells"] if c["cell_type"] == "code" and c["source"])


def test_the_demo_table_has_every_figure_that_it_promises(demo):
    rows = read_rows(demo / "results.jsonl")
    assert [r.model for r in rows] == ["dense", "keep 0.6, off the shelf", "keep 0.6, fine-tuned", "heads and neurons, "
                                                                                                   "off the shelf",
                                       "joint plan, off the shelf", "joint plan, fine-tuned", rows[-1].model]
    assert rows[-1].model.startswith("tonight, ") and rows[-1].gmacs <= 0.6 * rows[0].gmacs
    for row in rows:
        assert None not in (row.top1_pct, row.gmacs, row.params_m, row.throughput_img_s,
                            row.ratio) and row.split == "test"
    assert rows[0].ratio == 1 and rows[1].gmacs == rows[2].gmacs < rows[0].gmacs
    # the search's budget
    assert 0.98 * 0.6 * rows[0].gmacs <= rows[4].gmacs == rows[5].gmacs <= 0.6 * rows[0].gmacs
    assert rows[3].params_m < rows[0].params_m and rows[5].params_m <= rows[0].params_m


def test_every_figure_and_row_of_a_quick_run_says_so(demo):
    said = {path.stem: Image.open(path).text.get("Description", "") for path in (demo / "figures").glob("*.png")}
    assert said and not [name for name,
                         text in said.items() if "quick, toy data: says nothing about quality" not in text]
    rows = read_rows(demo / "results.jsonl") + read_rows(demo / "segmenter" / "results.jsonl")
    assert rows and all(row.conditions["quick"] for row in rows)
    for name in list(DEMO)[1:]:
        text = told(demo / "notebooks" / f"{name}.ipynb")
        assert "±" not in text or "quick, toy data" in text, name


def test_what_the_demo_says_of_models_has_its_error_beside_it(demo):
    for row in read_rows(demo / "results.jsonl"):
        assert row.top1_se > 0 and row.loss_se > 0
    for name in ("06_search", "08_tonight", "90_results"):
        assert re.search(r"\d ± \d", told(demo / "notebooks" / f"{name}.ipynb")), name


def test_the_quick_run_learns_the_embedded_scenes_and_keeps_them_while_tokens_are_merged(demo):
    rows = {(r.model, r.split): r for r in read_rows(demo / "segmenter" / "results.jsonl")}
    dense, tuned = (rows[name, "test"] for name in ("Segmenter, dense", "merging by content, fine-tuned"))
    assert dense.miou_pct > QUICK_MIOU
    assert tuned.miou_pct > dense.miou_pct - LOST_MIOU
    assert tuned.gmacs < 0.9 * dense.gmacs
    off = [row for (name, split), row in rows.items() if "off the shelf" in name and split == "val"]
    assert len(off) == 4 and all(row.gmacs < dense.gmacs and row.conditions["iou_pct"] for row in off)


def test_a_changed_parameter_changes_the_result(demo, tmp_path):
    (tmp_path / "dense").symlink_to(demo / "dense")
    (tmp_path / "scores.safetensors").symlink_to(demo / "scores.safetensors")
    apart(notebooks.NOTEBOOKS / "03_prune_and_merge.ipynb", tmp_path / "nb",
          {"run": str(tmp_path), "keep_rate": 0.3}, progress=False)
    changed, = read_rows(tmp_path / "results.jsonl")
    assert changed.model == "keep 0.3, off the shelf"
    assert changed.gmacs < read_rows(demo / "results.jsonl")[1].gmacs


@pytest.mark.skipif(bool(lab.missing()), reason=lab.missing() or "-")
@pytest.mark.parametrize("name", IN_A_BROWSER)
def test_notebook_runs_to_the_end_in_jupyterlab_and_its_widgets_answer_to_keys(looked_at, name):
    seen = looked_at[1][name]
    if isinstance(seen, Exception):
        raise seen
    assert [f"{o.ename}: {o.evalue}" for cell in seen["cells"] for o in cell.outputs if o.output_type == "error"] == []
    assert [cell.source for cell in seen["cells"] if not cell.execution_count] == []
    assert [label for label, moved in seen["moved"].items() if not moved] == [], "no other picture after a key"
    assert all(seen["menus"]), f"keys choose nothing in a menu, or change the notebook: {seen['menus']}"
    assert seen["slabs"] == 0
    assert [said for said in ("Error displaying widget", "Error creating widget", "Traceback") if said in seen["text"]
            ] == []
    assert seen["errors"] == []
