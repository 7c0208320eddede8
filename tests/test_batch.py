"""Batches: what is refused before anything starts, what runs and what is not repeated, kills, and the report."""
import contextlib
import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from warm_kernel import warm_kernels  # noqa: F401

from vitlab import cli
from vitlab.plots.base import new_axes, save_figure
from vitlab.runtime.files import InputError, atomic_write, read_json, read_lines
from vitlab.runtime.results import ResultRow, append_row, to_csv, to_latex
from vitlab.training.recipes import RECIPES
from vitlab.workbench import batch, batch_entry, batch_file, notebooks, report

pytest.importorskip("snakemake", reason="batches need Snakemake, which needs Python 3.11 or newer")
BATCHES = Path(__file__).parents[1] / "batches"
WRITE = ['run: str = ""  # folder\nvalue: int = 1\nscale: float = 1.0\nname: str = "dense"\ndata: str = ""\nwait: '
         'float = 0.0',
         "out = Path(run)\nwith open(out / 'turns.txt', 'a') as file:\n    print(os.getpid(), file=file)",
         "time.sleep(wait)",
         "assert not data or Path(data).exists(), f'no images in {data}: <script>alert(1)</script>'",
         "atomic_write(out / 'made' / 'plan.json', json.dumps(value * scale))",
         "append_row(out / 'results.jsonl', ResultRow(model=name, dataset='a', split='test', top1_pct=value * scale,"
         " conditions={'seed': 0, 'value': value}))"]
READ = ['run: str = ""  # folder\nfactor: float = 2.0\nsource: str = ""',
        "place = Path(run) / 'made' / 'plan.json'\nread = json.loads((Path(source) if source else place).read_text())",
        "place.write_text(json.dumps(read * factor))",
        "append_row(Path(run) / 'results.jsonl', ResultRow(model='dense', dataset='a', split='test', gmacs=read * "
        "factor))"]


def write_notebook(path: Path, parameters: str, *cells: str) -> None:
    imports = ("import json\nimport os\nimport time\nfrom pathlib import Path\n\nfrom vitlab.runtime.files import "
               "atomic_write\n"
               "from vitlab.runtime.results import ResultRow, append_row")
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    # and names no language
    nbformat.write(new_notebook(cells=[new_code_cell(imports), tagged, *map(new_code_cell, cells)]), path)


def write_batch(folder: Path, text: str, name: str = "batch.yaml") -> Path:
    for notebook, cells in (("write.ipynb", WRITE), ("read.ipynb", READ)):
        if not (folder / notebook).exists():
            write_notebook(folder / notebook, *cells)
    (folder / name).write_text(text)
    return folder / name


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def states(run_folder: Path) -> dict[str, str]:
    return {e["name"]: e["state"] for e in read_json(run_folder / "summary.json")["entries"]}


def times(run_folder: Path) -> dict[str, int]:
    return {str(p.relative_to(run_folder)): p.stat().st_mtime_ns for p in (run_folder / "entries").rglob("*")
            if p.is_file()}


TWO = "entries:\n  w: {notebook: write.ipynb}\n  r: {notebook: read.ipynb, after: w}\n"


# What a file means

def test_a_parameter_that_is_a_mapping_or_a_list_is_given_as_one(tmp_path):
    write_notebook(tmp_path / "settings.ipynb", 'run: str = ""\nsettings: dict = {}\nsizes: list = [1]')
    given = "{settings: {mean: [0.4, 0.4, 0.4], crop_mode: center}, sizes: [3, 5]}"
    (entry,) = batch_file.read(write_batch(tmp_path, f"entries:\n  s: "
                                                     f"{{notebook: settings.ipynb, parameters: {given}}}\n"))
    assert entry.parameters == {"settings": {"mean": [0.4, 0.4, 0.4], "crop_mode": "center"}, "sizes": [3, 5]}
    with pytest.raises(InputError, match="settings is .3.; a dict such as {} is needed"):
        batch_file.read(tmp_path / "batch.yaml", {"settings": "[3]"})


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, in which no folder can be made and root is told "
                                                            "that one can")
def test_where_no_cache_can_be_made_it_is_in_the_run_folder_also_for_root(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for home, elsewhere in (("/proc/nohome", True), (str(tmp_path), False)):
        monkeypatch.setenv("HOME", home)
        assert (
            batch._environment(tmp_path / "out").get("XDG_CACHE_HOME") == str(tmp_path / "out" / ".cache")) == elsewhere


def test_a_grid_multiplies_its_entry_and_all_after_it_and_after_all_gathers(tmp_path):
    path = write_batch(tmp_path, """
defaults: {scale: 2.0, factor: 5.0}
entries:
  all: {notebook: read.ipynb, after_all: [r, alone], parameters: {factor: 7}}
  r: {notebook: read.ipynb, after: w, parameters: {source: "{w}/made"}, grid: {factor: [1, 2]}}
  w: {notebook: write.ipynb, grid: {kind: {small: {value: 1, name: s}, large: {value: 9}}}}
  alone: {notebook: write.ipynb, parameters: {scale: 3}}
""")
    found = {e.name: e for e in batch_file.read(path, {"data": "x", "entries.w.grid.kind.large.value": "8"})}
    assert list(found) == ["w-kind=small", "w-kind=large", "r-kind=small-factor=1", "r-kind=small-factor=2",
                           "r-kind=large-factor=1", "r-kind=large-factor=2", "alone", "all"]
    assert found["w-kind=small"].parameters == {"scale": 2.0, "value": 1, "name": "s", "data": "x"}
    assert found["w-kind=large"].parameters == {"scale": 2.0, "value": 8, "data": "x"}
    assert found["r-kind=large-factor=2"].after == ("w-kind=large",)
    assert found["r-kind=large-factor=2"].parameters == {"factor": 2, "source": "{w-kind=large}/made"}
    assert found["all"].after == tuple(list(found)[2:7]) and found["all"].parameters == {"factor": 7}
    assert found["alone"].parameters["scale"] == 3


def test_the_batch_files_that_come_with_vitlab_are_whole():
    files = {path.stem: path for path in BATCHES.glob("*.yaml")}
    assert set(files) == {"digits", "cifar10", "prune_and_merge_table", "mdc_table"}
    for name, path in files.items():
        if "table" in name:
            with pytest.raises(InputError, match="data has no value; give it with --set data="):
                batch_file.read(path)
        entries = batch_file.read(path, {"data": "/images"})
        assert all(e.parameters.get("recipe_name", "digits") in RECIPES for e in entries)
    table = batch_file.read(files["prune_and_merge_table"], {"data": "/images"})
    assert {(e.name.split("=")[1].split("-")[0], e.parameters["keep_rate"]) for e in table
            if "keep_rate" in e.parameters} == {
        (model, keep) for model in ("deit_tiny", "deit_small", "mae_base") for keep in (0.7, 0.6)}


# What a result depends on

def test_what_an_entry_depends_on_is_code_notebook_parameters_files_and_what_came_before(tmp_path):
    path = write_batch(tmp_path, TWO)

    def changed(**sets: str) -> set[str]:
        needs = batch_entry.dependencies(batch_file.read(path, sets))
        return {f"{name} {key}" for name, had in before.items() for key in had if had[key] != needs[name][key]}
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_text("a")
    sets = {"data": str(tmp_path / "images")}
    before = batch_entry.dependencies(batch_file.read(path, sets))
    assert changed(**sets) == set()
    assert changed(**sets, factor="3") == {"r parameters"}
    assert changed(**sets, value="3") == {"w parameters", "r after"}
    (tmp_path / "images/b.png").write_text("b")
    assert changed(**sets) == {"w files", "r after"}
    (tmp_path / "images/b.png").unlink()
    (tmp_path / "images/again").symlink_to(tmp_path / "images")           # a folder in itself ends
    write_notebook(tmp_path / "read.ipynb", *READ, "1")
    assert changed(**sets) == {"r notebook"}
    assert batch_entry.fingerprint("nowhere") is None


def test_source_that_only_starts_and_draws_is_not_what_results_depend_on(tmp_path, monkeypatch):
    (tmp_path / "plots").mkdir()
    for name in ("__init__.py", "cost.py", "plots/base.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(batch_entry, "SOURCE", tmp_path)
    before = batch_entry._code()
    (tmp_path / "plots/base.py").write_text("x = 2\n")
    assert batch_entry._code() == before
    (tmp_path / "cost.py").write_text("x = 2\n")
    assert batch_entry._code() != before


def test_an_entrys_folder_is_kept_for_the_same_inputs_and_where_a_fault_was_mended_and_else_begins_empty(tmp_path):
    folder, needs = tmp_path / "e", {"code": "1", "notebook": "1", "parameters": {}, "files": {}, "after": {},
                                     "left": {}}

    def kept(state: str, **changes) -> bool:
        batch_entry._prepare(folder, {"anew": time.monotonic_ns()}, [])
        batch_entry._prepare(folder, needs, [])
        (folder / "state.pt").write_text("half")
        atomic_write(folder / "status.json", json.dumps({"state": state}))
        batch_entry._prepare(folder, needs | changes, [])
        return (folder / "state.pt").exists()
    assert kept("running") and kept("failed") and kept("done")
    assert kept("failed", code="2") and kept("running", notebook="2", after={"w": "2"}) and not kept("done", code="2")
    assert not kept("failed", parameters={"value": 2}) and not kept("failed", files={"data": "2"})
    assert not kept("failed", left={"w": {"plan.json": "2"}})


def test_what_is_handed_on_can_not_be_changed_by_who_gets_it(tmp_path):
    first, second = tmp_path / "entries/a", tmp_path / "entries/b"
    for name in ("dense/checkpoint/weights.safetensors", "dense/log.jsonl", "log.txt", "figures/01.png", "01.ipynb",
                 "status.json"):
        atomic_write(first / name, "old\n")
    batch_entry._pass_on(first, second)
    assert sorted(str(p.relative_to(second)) for p in second.rglob("*") if p.is_file()) == [
        "dense/checkpoint/weights.safetensors", "dense/log.jsonl"]
    assert (second / "dense/checkpoint/weights.safetensors").is_symlink()
    atomic_write(second / "dense/checkpoint/weights.safetensors", "new")
    with open(second / "dense/log.jsonl", "a") as file:
        file.write("new\n")
    assert {p.read_text() for p in first.rglob("*") if p.is_file()} == {"old\n"}


# Runs: one batch from call to call, each stage looked at by a test

STORY = """
entries:
  first: {notebook: write.ipynb}
  slow: {notebook: write.ipynb, after: first, parameters: {wait: 5}}
  bad: {notebook: write.ipynb, after: first, parameters: {data: nowhere, value: VALUE, name: "<script>alert(2)</script> 50 % & more_"}}
  behind: {notebook: read.ipynb, after: bad, parameters: {source: "{bad}/made/plan.json"}}
"""


def call(folder: Path) -> list[str]:
    return [sys.executable, "-m", "vitlab", "batch", str(folder / "batch.yaml"), "--out", str(folder / "out")]


def homeless() -> dict[str, str]:
    """An environment with a home that takes no files, also not of root."""
    return {key: value for key,
            value in os.environ.items() if not key.startswith(("XDG", "MPL"))} | {"HOME": os.devnull}


def start(folder: Path, turn: int) -> tuple[subprocess.Popen, list[int]]:
    """A call that has come to the waiting cell of `slow`, which begins it for the so-manyeth time; (process, ids of all
    below it)."""
    process = subprocess.Popen(call(folder), cwd=folder, env=homeless(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    turns, deadline = folder / "out/entries/slow/turns.txt", time.monotonic() + 400
    while not (turns.exists() and len(turns.read_text().split()) == turn):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert int(turns.read_text().split()[-1]) in family         # the kernel, which has a session of its own
    return process, family


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What was seen of one batch, in a folder of an odd name, with a home that takes no files: told to end, killed,
    finished with a failing entry, mended, called again, changed."""
    folder, seen = tmp_path_factory.mktemp("story") / "of {input} \u00e4 'b'", {}
    folder.mkdir()
    out = folder / "out"
    write_batch(folder, STORY.replace("VALUE", "3"))

    def look(name: str, code: int, said: str = "") -> None:
        rows = {p.parent.name: read_lines(p) for p in out.glob("entries/*/results.jsonl")}
        seen[name] = {"code": code, "said": said, "states": states(out), "times": times(out),
                      "summary": read_json(out / "summary.json"), "rows": rows}

    def run_on(name: str) -> None:
        done = subprocess.run(call(folder), cwd=folder, env=homeless(), capture_output=True, text=True)
        look(name, done.returncode, done.stdout + done.stderr)
    process, family = start(folder, 2)                          # the first turn in that file is of `first`, handed on
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=600)
    look("ended", code)
    seen["ended"]["left"] = [pid for pid in family if not gone(pid)]
    process, _ = start(folder, 3)
    with open(out / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen["let in"] = True
        except BlockingIOError:
            seen["let in"] = False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run_on("finished")
    assert cli.main(["report", str(out)]) == 0
    seen["page"] = (out / "report.html").read_text()
    (folder / "nowhere").mkdir()
    run_on("mended")
    for place in (out / "inputs").iterdir():
        os.utime(place)                                         # newer, but the same
    run_on("again")
    write_batch(folder, STORY.replace("VALUE", "5"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seen["plan"] = {e["name"]: e["why"] for e in batch.plan_of(folder / "batch.yaml", out)}
    look("planned", 0)
    run_on("changed")
    return folder, seen


def test_a_batch_told_to_end_takes_its_kernels_along(story):
    ended = story[1]["ended"]
    assert ended["code"] == 130 and ended["left"] == []
    assert ended["states"]["slow"] == "failed" and ended["states"]["first"] == "done"
    assert "interrupted" in next(e["why"] for e in ended["summary"]["entries"] if e["name"] == "slow")


def test_a_batch_killed_half_way_is_finished_by_a_second_call(story):
    folder, seen = story
    assert not seen["let in"]                                   # nobody else, while it lived
    assert seen["finished"]["states"]["first"] == "up to date" and seen["finished"]["states"]["slow"] == "done"
    assert of("first", seen["finished"]["times"]) == of("first", seen["ended"]["times"])
    assert len((folder / "out/entries/slow/turns.txt").read_text().split()) == 4        # its folder was kept each time


def of(entry: str, times: dict[str, int]) -> dict[str, int]:
    return {path: value for path, value in times.items() if path.split("/")[1] == entry}


def test_a_failing_entry_stops_only_what_comes_after_it_and_is_named_with_cell_and_error(story):
    finished = story[1]["finished"]
    why = {e["name"]: e["why"] for e in finished["summary"]["entries"]}
    assert finished["code"] == 1 and (finished["states"]["bad"], finished["states"]["behind"]) == ("failed", "skipped")
    assert "write.ipynb: cell 5 failed: AssertionError: no images in nowhere" in why["bad"] and why[
        "behind"] == "bad failed"
    assert why["bad"] in finished["said"] and "Traceback" not in finished["said"] and why["slow"] is None


def test_what_failed_goes_on_and_what_is_done_is_not_repeated(story):
    _, seen = story
    assert seen["mended"]["code"] == 0
    assert seen["mended"]["states"] == {"first": "up to date", "slow": "up to date", "bad": "done", "behind": "done"}
    assert seen["again"]["code"] == 0 and set(seen["again"]["states"].values()) == {"up to date"}
    assert seen["again"]["times"] == seen["mended"]["times"]


def test_a_changed_parameter_repeats_only_what_follows_from_it(story):
    folder, seen = story
    assert seen["plan"] == {"first": None, "slow": None, "bad": "changed: parameters", "behind": "bad would run"}
    assert seen["planned"]["times"] == seen["again"]["times"]
    assert seen["changed"]["states"] == {"first": "up to date", "slow": "up to date", "bad": "done", "behind": "done"}
    for entry in ("first", "slow"):
        assert of(entry, seen["changed"]["times"]) == of(entry, seen["mended"]["times"])
    assert json.loads((folder / "out/entries/bad/made/plan.json").read_text()) == 5
    assert json.loads((folder / "out/entries/behind/made/plan.json").read_text()) == 10


def test_an_entry_has_its_own_folder_with_notebook_log_and_rows_and_those_of_what_came_before(story):
    folder, seen = story
    entries = folder / "out/entries"
    for name, notebook in (("first", "write"), ("slow", "write"), ("behind", "read")):
        with open(entries / name / f"{notebook}.ipynb") as file:
            assert nbformat.read(file, 4).cells[0].execution_count == 1
        assert (entries / name / "log.txt").stat().st_size
    assert [row["top1_pct"] or row["gmacs"] for row in seen["changed"]["rows"]["behind"]] == [1.0, 5.0, 10.0]
    assert len(seen["finished"]["rows"]["first"]) == 1 and "AssertionError" not in (entries / "bad/log.txt").read_text()


def test_the_report_holds_every_row_and_failure_escaped_and_loads_nothing(story, capsys, warm_kernels):  # noqa: F811
    folder, seen = story
    out = folder / "out"
    assert "<script" not in seen["page"] and "no images in nowhere: &lt;script&gt;alert(1)" in seen[
        "page"] and "bad failed" in seen["page"]
    atomic_write(out / "entries/first/figures/01.png",
                 (Path(__file__).parents[1] / "docs/token_speed.png").read_bytes())
    atomic_write(out / "entries/first/figures/01.svg", "<svg/>")
    code, said, _ = run(capsys, "report", str(out))
    page = (out / "report.html").read_text()
    assert code == 0 and "report.html" in said
    assert "<script" not in page and "&lt;script&gt;alert(2)&lt;/script&gt; 50 % &amp; more_" in page
    assert "default-src 'none'" in page and "cdnjs" not in page and "unpkg" not in page and 'src="http' not in page
    assert 'href="entries/first/write.ipynb"' in page
    assert 'href="entries/first/figures/01.svg"' in page
    assert "01.pdf" not in page
    assert "data:image/png;base64" in page
    with open(out / "report.ipynb") as file:
        assert nbformat.read(file, 4).cells[1].execution_count == 1
    rows = list(csv.DictReader((out / "results.csv").open()))
    odd = "<script>alert(2)</script> 50 % & more_"
    assert [(r["entry"], r["model"]) for r in rows] == [("first", "dense"), ("slow", "dense"), ("bad", odd),
                                                        ("behind", "dense")]
    assert (rows[3]["top1_pct"], rows[3]["gmacs"], rows[2]["value"]) == ("1.0", "10.0", "5")
    assert r"\textless{}script\textgreater{}alert(2)\textless{}/script\textgreater{} 50 \% \& more\_" in (
        out / "results.tex").read_text()


def test_a_folder_where_another_batch_is_at_work_is_refused(tmp_path):
    with (batch_entry.only_one(tmp_path / ".lock"), pytest.raises(InputError, match="another process is at work"),
          batch_entry.only_one(tmp_path / ".lock")):
        pass
    with batch_entry.only_one(tmp_path / ".lock"):
        pass


def test_without_snakemake_the_command_says_what_is_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batch.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, "batch", str(write_batch(tmp_path, TWO)))
    assert code == 2 and "Python 3.11" in err


def test_the_digits_batch_runs_repeats_nothing_and_is_reported(tmp_path, capsys, warm_kernels):  # noqa: F811
    out = tmp_path / "out"
    common = ["batch", str(BATCHES / "digits.yaml"), "--out", str(out), "--set", "quick=true",
              "--set", "entries.pruned.grid.keep_rate=[0.6]"]
    code, said, err = run(capsys, *common)
    assert code == 0, (said, err, (out / "snakemake.log").read_text())
    assert set(states(out)) == {"dense", "scores", "pruned-keep_rate=0.6", "tuned-keep_rate=0.6", "results"}
    before = times(out)
    assert run(capsys, *common)[0] == 0
    assert set(states(out).values()) == {"up to date"} and times(out) == before
    assert {p.suffix for p in (out / "entries/scores/figures").iterdir()} == {".png", ".svg", ".pdf"}
    assert run(capsys, "report", str(out))[0] == 0
    rows = {(r["entry"], r["model"]): r for r in csv.DictReader((out / "results.csv").open())}
    tuned = rows["tuned-keep_rate=0.6", "keep 0.6, fine-tuned"]
    assert float(tuned["gmacs"]) < float(rows["dense", "dense"]["gmacs"]) and float(tuned["throughput_img_s"]) > 0
    assert tuned["plan.keep_rate"] == "0.6" and tuned["dataset"] == "digits"


# Tables, pages, figures

def test_csv_and_latex_say_what_the_rows_say():
    rows = [ResultRow(model="a, \"b\"", dataset="d", split="test", top1_pct=61.987654321, gmacs=0.1,
                      conditions={"speed": {"batch": 7}}),
            ResultRow(model="50 %_x", params_m=2.0, conditions={"seed": 3, "versions": ["1", "2"], "none": None})]
    read = list(csv.DictReader(to_csv(["e", "f"], rows).splitlines()))
    assert [r["entry"] for r in read] == ["e", "f"] and [r["model"] for r in read] == [r.model for r in rows]
    assert float(read[0]["top1_pct"]) == rows[0].top1_pct and read[1]["top1_pct"] == ""
    assert (read[0]["speed.batch"], read[1]["seed"],
            read[1]["versions"]) == ("7", "3", '["1", "2"]') and "none" not in read[0]
    tex = to_latex(["e", "f"], rows, "seed_0 & more", ("model", "top1_pct", "params_m")).splitlines()
    assert r'e & a, "b" & 61.99 & - \\' in tex and r"f & 50 \%\_x & - & 2.000 \\" in tex
    assert r"\caption{seed\_0 \& more}" in tex and r"\begin{tabular}{llrr}" in tex and r"\toprule" in tex


def test_conditions_that_all_rows_share_are_said_once():
    rows = [ResultRow(model="a", conditions={"seed": 0, "n": 1}),
            ResultRow(model="b", conditions={"seed": 0, "n": 2, "keep": 0.5})]
    assert report.conditions(rows) == ("seed 0, keep 0.5", ["n 1", "n 2"])
    assert report.conditions([]) == ("", [])


def test_a_report_shows_errors_ranges_and_what_is_quick_and_says_once_what_they_are(tmp_path):
    speed = {"batch_size": 32, "dtype": "float32", "ratio_range": [0.84, 2.54]}
    rows = [ResultRow(model="dense", dataset="photos", split="val", top1_pct=70.0, top1_se=1.5, ratio=1.0,
                      latency_ms=3.0, conditions={"quick": False, "speed": speed | {"ratio_range": [1.0, 1.0]}}),
            ResultRow(model="small", dataset="photos", split="val", top1_pct=66.0, ratio=1.69,
                      conditions={"quick": True, "speed": speed})]
    for row in rows:
        append_row(tmp_path / "results.jsonl", row)
    page = report.results_table(tmp_path).data
    assert ">70.00 ± 1.50</td>" in page and ">66.00</td>" in page and ">1.00</td>" in page
    assert ">1.69 (0.84 to 2.54), too noisy to tell</td>" in page
    assert ">ratio (batch 32)</th>" in page
    assert "latency_ms" not in page
    assert "miou_pct" not in page
    assert "top5_pct" not in page
    assert page.count("one standard error") == page.count("median over rounds") == page.count("quick: says nothing "
                                                                                              "about quality") == 1
    assert ">quick, speed.ratio_range" in page and page.count("quick") == 2 and "<b>" not in page
    page = report.table_of(rows, ("model", "top1_pct", "ratio"), "images: <any>").data
    assert page.count("<tr>") == 3 and ">small</td>" in page and ">70.00 ± 1.50</td>" in page
    below = page.split("</table>")[1]
    assert "one standard error" in below and "median over rounds" in below and below.endswith("images: &lt;any&gt;</p>")
    report.write_tables(tmp_path)
    tex = (tmp_path / "results.tex").read_text()
    assert r"small & 66.00 & 1.69 (0.84 to 2.54), too noisy to tell \\" in tex and r"70.00 $\pm$ 1.50" in tex
    caption = next(line for line in tex.splitlines() if line.startswith(r"\caption"))
    assert "quick: says nothing about quality" in caption
    assert r"$\pm$: one standard error" in caption
    assert "median over rounds" in caption
    read = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(r["quick"], r["top1_se"]) for r in read] == [("False", "1.5"),
                                                          ("True", "")] and read[0]["latency_ms"] == "3.0"


def rows_with(tmp_path, **top1: tuple[float, float, float]) -> None:
    for name, (gmacs, value, error) in top1.items():
        append_row(tmp_path / "results.jsonl", ResultRow(model=name, dataset="photos", split="val", gmacs=gmacs,
                                                         top1_pct=value, top1_se=error, ratio=2.0,
                                                         conditions={"versions": {"vitlab": "7.8"}}))


def test_a_report_begins_with_the_cheapest_model_that_is_as_good_or_the_one_that_lost_least(tmp_path):
    rows_with(tmp_path, dense=(4.0, 80, 1), small=(2.0, 78, 1), smaller=(1.0, 70, 1), mild=(3.0, 79, 1))
    os.utime(tmp_path / "results.jsonl", (0, 86400))
    said = report.headline(tmp_path)
    # 2 points less with an error of sqrt(2) can't be told from 0, 10 points can
    assert said == ("small: 50 % fewer GMACs than dense (2 of 4), throughput ratio 2.00; -2.00 ± 1.41 "
                    "points of top-1 (can't be told from 0): 78.00 ± 1.00 in place of 80.00 ± 1.00. photos val, vitlab "
                    f"7.8, {time.strftime('%Y-%m-%d', time.localtime(86400))}.")
    rows_with(tmp_path, small=(2.0, 60, 1), mild=(3.0, 62, 1))
    assert report.headline(tmp_path).startswith("smaller: 75 % fewer")          # all lost, this one least
    figure = report.cost_figure(tmp_path, "deit_tiny")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert drawn["small"] == [[2.0, 60.0]] and drawn["Prune and Merge, published (ImageNet)"] == [[0.7, 71.6], [0.8, 72.0]]
    assert not [label for label in figure.axes[1].get_legend_handles_labels()[1] if "published" in label]
    with pytest.raises(InputError, match="swin"):
        report.cost_figure(tmp_path, "swin")


def test_a_report_of_one_model_has_nothing_to_compare(tmp_path):
    rows_with(tmp_path, dense=(4.0, 80, 1))
    assert "nothing to compare" in report.headline(tmp_path)
    assert report.losses(tmp_path) == ""


def test_without_a_classifier_a_report_compares_by_the_distance_the_least_is_best(tmp_path):
    """The dense model is at 0 of itself, and alone has a top-1, by its neighbours."""
    for name, gmacs, top1, distance in (("dense", 4.0, 80.0, 0.0), ("far", 1.0, None, 0.3), ("near", 2.0, None, 0.1)):
        append_row(tmp_path / "results.jsonl", ResultRow(
            model=name, dataset="photos", split="val", gmacs=gmacs, top1_pct=top1, distill_loss=distance,
            distill_loss_se=0.01 * (top1 is None), ratio=2.0,
            conditions={"distance": "1 - cosine", **({"top1": "20 nearest neighbours"} if top1 else {})}))
    assert report.headline(tmp_path).startswith(
        "near: 50 % fewer GMACs than dense (2 of 4), throughput ratio 2.00; +0.1000 ± 0.0100 of distance: "
        "0.1000 ± 0.0100 in place of 0.0000 ± 0.0000. photos val")
    assert report.losses(tmp_path).splitlines() == [
        "near: +0.1000 ± 0.0100 of distance, 50.0 % fewer GMACs, throughput ratio 2.00",
        "far: +0.3000 ± 0.0100 of distance, 75.0 % fewer GMACs, throughput ratio 2.00"]
    axis = report.cost_figure(tmp_path).axes[0]
    assert axis.get_ylabel() == "distance to the dense output"
    assert {line.get_label(): line.get_xydata().tolist() for line in axis.lines} == {
        "dense": [[4.0, 0.0]], "near": [[2.0, 0.1]], "far": [[1.0, 0.3]]}
    report.write_tables(tmp_path)
    assert r"0.3000 $\pm$ 0.0100" in (tmp_path / "results.tex").read_text()
    assert "0.1000 ± 0.0100" in report.results_table(tmp_path).data


def test_a_page_shows_a_widget_as_its_picture(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "m", "version_major": 2, "version_minor": 0},
              "image/png": "aGFsbG8=", "text/plain": "Widget()"}
    cell = new_code_cell("x", outputs=[new_output("display_data", data=widget)])
    state = {"state": {"m": {"model_name": "M", "model_module": "m", "model_module_version": "1", "state": {}}},
             "version_major": 2,
             "version_minor": 0}                        # nbclient keeps it; only with it would the widget come first
    nbformat.write(new_notebook(cells=[cell],
                                metadata={"widgets": {"application/vnd.jupyter.widget-state+json": state}}),
                   tmp_path / "n.ipynb")
    page = notebooks.report(tmp_path / "n.ipynb", tmp_path / "n.html").read_text()
    assert "data:image/png;base64,aGFsbG8=" in page and "widget-view" not in page


def test_a_report_of_no_run_is_refused(tmp_path, capsys):
    code, _, err = run(capsys, "report", str(tmp_path))
    assert code == 2 and "no run of a batch" in err


def test_figures_come_in_the_formats_asked_for_and_the_same_figure_gives_the_same_files(tmp_path, monkeypatch):
    def draw(folder: str) -> list[Path]:
        figure, axes = new_axes(1, 1, 3, 2)
        axes[0, 0].plot([1, 2])
        save_figure(figure, tmp_path / folder, "01")
        plt.close(figure)
        return sorted((tmp_path / folder).iterdir())
    assert [p.name for p in draw("one")] == ["01.png"]
    monkeypatch.setenv("VITLAB_FIGURES", "png,svg,pdf")
    two, three = draw("two"), draw("three")
    assert [p.name for p in two] == ["01.pdf", "01.png", "01.svg"]
    assert [p.read_bytes() for p in two] == [p.read_bytes() for p in three]
