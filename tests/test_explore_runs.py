"""The panel of runs: what it shows of each, what it starts and stops for real, and what is broken and does not break
it."""
import asyncio
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from test_explore_study import made_study
from test_processes import epochs, run, training, until  # noqa: F401

from vitlab.search.study import JOURNAL
from vitlab.workbench import processes
from vitlab.workbench.explore import runs as module
from vitlab.workbench.explore.runs import find_runs, last_lines, run_figure, runs_panel, training_logs
from vitlab.workbench.processes import INFO, OUTPUT, start, state

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def record(epoch: int, loss: float = 0.5) -> dict:
    return {"epoch": epoch, "loss": loss, "lr": 0.1 / epoch, "train_slice_top1_pct": 80.0 + epoch, "seconds": 1.5}


def write_log(path: Path, *lines: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def panel_parts(panel) -> dict:
    row, told, message, picture, tail, accordion = panel.children
    command, *fields, more, several, line, begin = accordion.children[0].children
    return {**dict(zip(("run", "stop", "resume", "again"), row.children)), "told": told, "message": message,
            "picture": picture, "tail": tail, "command": command, "fields": {f.description: f for f in fields},
            "more": more, "several": several, "line": line, "begin": begin}


async def until_shown(condition: Callable[[], bool], seconds: float = 300) -> None:
    """As `until`, while the panel's own watching goes on."""
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("waited in vain")


def test_runs_are_the_folders_with_a_process_a_training_or_a_journal_and_no_others(tmp_path):
    write_log(tmp_path / "a" / "training" / "log.jsonl", record(1))
    write_log(tmp_path / "a" / "training" / "step-1" / "log.jsonl", record(1))
    write_log(tmp_path / "b" / "search" / JOURNAL, {})
    write_log(tmp_path / "c" / INFO, {})
    write_log(tmp_path / ".hidden" / INFO, {})
    (tmp_path / "d" / "checkpoint").mkdir(parents=True)
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b" / "search", tmp_path / "c"]
    assert find_runs(tmp_path / "c") == [tmp_path / "c"] and find_runs(tmp_path / "none") == []


def test_a_logs_damaged_lines_are_passed_over_and_each_epochs_last_record_stands(tmp_path):
    write_log(tmp_path / "training" / "log.jsonl", record(1), record(2, 0.9), "{\"epoch\": 3, \"lo", "[1, 2]", "7",
              {"epoch": 3}, record(2, 0.4), record(4) | {"loss": None}, record(5) | {"loss": float("nan")}, record(3))
    assert training_logs(tmp_path) == {"training": [record(1), record(2, 0.4), record(3)]}
    losses = run_figure(tmp_path).axes[0].lines[0]
    assert list(losses.get_xdata()) == [1, 2, 3] and list(losses.get_ydata()) == [0.5, 0.4, 0.5]


def test_every_stage_of_a_training_is_a_line_in_the_order_of_their_numbers(tmp_path):
    for step in (1, 2, 10):
        write_log(tmp_path / "training" / f"step-{step}" / "log.jsonl", record(1, step), record(2, step / 2))
    assert list(training_logs(tmp_path)) == ["step-1", "step-2", "step-10"]
    axes = run_figure(tmp_path).axes
    assert [a.get_ylabel() for a in axes] == ["training loss", "top-1 on a train slice (%)", "learning rate"]
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[1, 0.5], [2, 1], [10, 5]]


def test_a_search_shows_its_best_so_far_and_one_that_is_damaged_says_so(tmp_path):
    study = made_study(tmp_path)
    line, = run_figure(tmp_path).axes[0].lines
    values = [e.value for e in study.evaluations]
    assert list(line.get_ydata()) == [max(values[:i + 1]) for i in range(len(values))]
    before = (tmp_path / JOURNAL).read_text()
    (tmp_path / JOURNAL).write_text(before + '{"index": 11')                # being written
    assert len(run_figure(tmp_path).axes[0].lines[0].get_ydata()) == 11
    assert (tmp_path / JOURNAL).read_text().endswith('{"index": 11')
    (tmp_path / JOURNAL).write_text("{}\n" + before)
    assert "line 1 is damaged" in run_figure(tmp_path).axes[0].texts[0].get_text()
    assert "nothing is logged" in run_figure(tmp_path / "empty").axes[0].texts[0].get_text()
    assert "no run" in run_figure(None).axes[0].texts[0].get_text()


def test_of_a_progress_bar_the_last_state_is_shown_and_of_long_output_the_end(tmp_path):
    path = tmp_path / OUTPUT
    path.write_bytes(b"begun\n\repoch 1: 10%\repoch 1: 90%\r\n\xff odd\n\n"
                     + b"".join(b"line %d\n" % i for i in range(3)))
    assert last_lines(path) == "begun\nepoch 1: 90%\n\ufffd odd\nline 0\nline 1\nline 2"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(10**4)))
    assert last_lines(path).split("\n") == [f"line {i}" for i in range(10**4 - 12, 10**4)]
    assert last_lines(tmp_path / "none") == ""


def test_opening_a_panel_starts_nothing_and_writes_nothing(tmp_path):
    made_study(tmp_path / "search")
    write_log(tmp_path / "tuned" / "training" / "log.jsonl", record(1), record(2))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / INFO).write_text("{")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    panel = runs_panel(tmp_path)
    parts = panel_parts(panel)
    assert [name for name, _ in parts["run"].options] == ["broken", "search", "tuned"]
    assert "not valid JSON" in parts["told"].value
    for _, path in parts["run"].options:
        parts["run"].value = path
        assert parts["stop"].disabled and parts["resume"].disabled and panel.figure().axes
    assert "no process was started here" in parts["told"].value
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert runs_panel(tmp_path / "none")._repr_mimebundle_()["image/png"]


def test_what_a_process_says_is_shown_as_text_not_as_markup(tmp_path):
    write_log(tmp_path / OUTPUT, "<script>alert(1)</script>")
    write_log(tmp_path / INFO,
              {"arguments": ["<b>"], "folder": "/", "pid": 2**22 + 1, "created": 1.5, "started": "<i>"})
    parts = panel_parts(runs_panel(tmp_path))
    assert "&lt;script&gt;" in parts["tail"].value and "<script>" not in parts["tail"].value
    assert "died" in parts["told"].value and "<i>" not in parts["told"].value and "<b>&#x27;" not in parts["told"].value


def test_the_form_shows_the_command_line_that_its_fields_make(tmp_path):
    parts = panel_parts(runs_panel(tmp_path))
    parts["fields"]["checkpoint"].value, parts["fields"]["out"].value = "runs/a b", "runs/c"
    parts["more"].value = "--epochs 3 --plan 'x y.json'"
    line = "vitlab finetune --checkpoint 'runs/a b' --out runs/c --epochs 3 --plan 'x y.json'"
    assert shlex.quote("runs/a b") in line and line in parts["line"].value.replace("&#x27;", "'")
    assert parts["fields"]["macs-ratio"].layout.display == "none" and parts["fields"]["teacher"].layout.display is None
    parts["command"].value = "search"
    assert parts["fields"]["teacher"].layout.display == "none" and parts["fields"]["macs-ratio"].layout.display is None
    parts["more"].value = "'open"
    assert "No closing quotation" in parts["line"].value and parts["begin"].disabled
    parts["more"].value, parts["fields"]["out"].value = "", ""
    parts["begin"].click()
    assert "out is empty" in parts["message"].value and not list(tmp_path.iterdir())


def test_a_run_started_in_the_panel_is_watched_stopped_resumed_and_found_by_a_new_panel(tmp_path, training, run, monkeypatch):  # noqa: F811, E501
    monkeypatch.setattr(module, "SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    panel = runs_panel(tmp_path)
    parts = panel_parts(panel)
    assert [name for name, _ in parts["run"].options] == ["."] or not parts["run"].options

    async def session() -> None:
        parts["fields"]["out"].value = "run"
        for name in ("checkpoint", "data", "recipe"):
            parts["fields"][name].value = training[training.index(f"--{name}") + 1]
        parts["more"].value = shlex.join(training[training.index("--epochs"):training.index("--out")])
        parts["begin"].click()
        assert parts["message"].value == "" and parts["run"].value == run
        assert "<b>running</b>" in parts["told"].value and (parts["stop"].disabled,
                                                            parts["resume"].disabled) == (False, True)
        await until_shown(lambda: len(epochs(run)) >= 3)
        picture = parts["picture"].picture
        await until_shown(lambda: parts["picture"].picture != picture)        # drawn anew by itself
        parts["begin"].click()
        assert "a process is running there since" in parts["message"].value
        parts["stop"].click()
        await until_shown(lambda: "<b>stopped</b>" in parts["told"].value)
        # the watching ended with the run
        await until_shown(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        assert (parts["stop"].disabled, parts["resume"].disabled) == (True, False)
        reached = len(epochs(run))
        parts["resume"].click()
        await until_shown(lambda: len(epochs(run)) > reached)
        panel.close()
        await until_shown(lambda: asyncio.all_tasks() == {asyncio.current_task()})         # and with the panel
    asyncio.run(session())
    assert state(run).name == "running"                                     # but the run goes on
    write_log(tmp_path / "another" / INFO, {})
    later = panel_parts(runs_panel(tmp_path))
    assert later["run"].value == run                                        # the one that is running comes first
    assert "<b>running</b>" in later["told"].value and not later["stop"].disabled
    later["stop"].click()
    until(lambda: state(run).name == "stopped")


def test_a_command_that_fails_is_seen_with_its_exit_code_and_its_own_words(tmp_path):
    start(["finetune", "--checkpoint", "nowhere"], tmp_path / "bad")
    until(lambda: state(tmp_path / "bad").name != "running")
    parts = panel_parts(runs_panel(tmp_path))
    assert "<b>finished</b> with exit code 2" in parts["told"].value and "--data" in parts["tail"].value
    assert processes.INFO in {p.name for p in (tmp_path / "bad").iterdir()}


def test_a_training_takes_a_process_for_each_gpu_and_the_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 4)
    begun = []
    form = module.start_form(lambda *given: begun.append(given))
    command, *fields, more, several, line, begin = form.children
    command.value = "search"
    assert several.value == 4 and "torchrun --nproc-per-node 4 -m vitlab search" in line.value
    several.value = 2
    begin.click()
    command.value = "tonight"
    assert several.layout.display == "none" and "torchrun" not in line.value
    begin.click()
    assert [count for _, _, count in begun] == [2, 1]


def test_steps_within_an_epoch_are_shown_while_the_first_epoch_goes_on(tmp_path):
    steps = [{"step": i, "at_epoch": i / 10, "loss": 1 / i, "lr": 0.1, "seconds": 1.0} for i in (1, 2, 3)]
    write_log(tmp_path / "training" / "log.jsonl", *steps, {"step": 4, "skipped": "nan", "files": ["a.png"]})
    axes = run_figure(tmp_path).axes
    assert [list(line.get_xdata()) for line in axes[0].lines] == [[], [0.1, 0.2, 0.3]]
    write_log(tmp_path / "training" / "log.jsonl", *steps, record(1, 0.7))
    axes = run_figure(tmp_path).axes
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[0.7], [1, 1 / 2, 1 / 3]]
    assert [list(line.get_ydata()) for line in axes[1].lines] == [[81.0]]
