"""Commands as processes of their own: they outlive who started them, and what became of them is known to whoever comes
later."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from training_fixtures import tiny, write_easy_folder

from vitlab.models import checkpoint, shape_of
from vitlab.plan import CompressionPlan
from vitlab.runtime.files import InputError, read_json
from vitlab.runtime.signals import EXIT_CODE
from vitlab.workbench import processes
from vitlab.workbench.processes import INFO, OUTPUT, resume, start, state, stop

ENDLESS = ["--epochs", "100000", "--images", "8", "--batch-size", "8"]      # a training that only a test ends


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for something that other processes bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path):
    """A run folder in which nothing is left running."""
    yield tmp_path / "run"
    with contextlib.suppress(InputError):               # nothing was started, or it has ended
        stop(tmp_path / "run", grace=0)


@pytest.fixture
def training(tmp_path, run) -> list[str]:
    """A command that goes on training until it is ended."""
    checkpoint.save(tmp_path / "dense", tiny(), CompressionPlan.empty(shape_of(tiny())))
    write_easy_folder(tmp_path / "data")
    return ["finetune", "--checkpoint", str(tmp_path / "dense"), "--data", str(tmp_path / "data"), "--recipe", "digits",
            *ENDLESS, "--workers", "0", "--device", "cpu", "--out", str(run)]


TICKING = """
import sys, time
if "vitlab" in sys.orig_argv:           # the command, not its runner
    while True:
        with open("ticks", "a") as file:
            file.write(".")
        time.sleep(0.05)
"""


@pytest.fixture
def ticking(tmp_path, run, monkeypatch) -> list[str]:
    """A command that writes a dot into ./ticks again and again until it is ended, and loads nothing before."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(TICKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return ["recipes"]


def ticks(folder: Path) -> int:
    return (folder / "ticks").stat().st_size if (folder / "ticks").exists() else 0


def epochs(run: Path) -> list[int]:
    log = run / "training" / "log.jsonl"
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()] if log.exists() else []


def test_a_process_runs_then_is_finished_with_the_exit_code_and_output_of_its_command(run):
    assert start(["recipes"], run).name == "running"
    until(lambda: state(run).name != "running")
    assert (state(run).name, state(run).exit_code, state(run).arguments) == ("finished", 0, ("recipes",))
    assert "deit_tiny_pm" in (run / OUTPUT).read_text()
    start(["evaluate", "--checkpoint", "no/such/model", "--data", "digits"], run)     # told before torch is imported
    until(lambda: state(run).name != "running")
    assert (state(run).name, state(run).exit_code) == ("finished", 2)
    # appended
    assert "no/such/model" in (run / OUTPUT).read_text() and "deit_tiny_pm" in (run / OUTPUT).read_text()


def test_a_process_outlives_the_death_of_its_parent_and_its_state_is_read_from_the_folder_alone(tmp_path, run, ticking):
    kernel = ("import sys, time; from vitlab.workbench.processes import start; start(sys.argv[2:], sys.argv[1]); "
              "print('started', flush=True); time.sleep(600)")
    parent = subprocess.Popen([sys.executable, "-c", kernel, str(run), *ticking], stdout=subprocess.PIPE,
                              start_new_session=True, cwd=tmp_path)
    parent.stdout.readline()
    os.killpg(parent.pid, signal.SIGKILL)               # the kernel with all that is in its group
    parent.communicate()
    reached = ticks(tmp_path)
    until(lambda: ticks(tmp_path) > reached + 2)
    assert state(run).name == "running"
    assert stop(run).name == "stopped"


def test_stop_ends_the_command_and_resume_goes_on_where_it_was(run, training):
    start(training, run)
    until(lambda: len(epochs(run)) >= 3)
    pids = processes._group(read_json(run / INFO))
    assert len(pids) == 2                               # the runner and its command
    assert stop(run).name == "stopped" and state(run).exit_code == EXIT_CODE
    assert not any(processes._alive(pid) for pid in pids)
    reached = epochs(run)
    assert resume(run).name == "running" and state(run).exit_code is None
    until(lambda: len(epochs(run)) > len(reached))
    assert epochs(run)[:len(reached)] == reached
    assert epochs(run)[len(reached)] == reached[-1] + 1
    stop(run)


def test_a_stop_that_sees_the_end_late_does_not_stop_what_was_started_there_meanwhile(run, monkeypatch):
    wait = "import sys, time\nif 'vitlab' in sys.orig_argv:\n    time.sleep(600)\n"
    run.mkdir()
    (run / "sitecustomize.py").write_text(wait)
    monkeypatch.setenv("PYTHONPATH", str(run))
    start(["recipes"], run)
    until(lambda: len(processes._group(read_json(run / INFO))) == 2)
    first, looked = read_json(run / INFO)["pid"], processes._group

    def late(record: dict) -> list[int]:
        living = looked(record)
        if not living and record["pid"] == first and read_json(run / INFO)["pid"] == first:
            start(["recipes"], run)
        return living
    monkeypatch.setattr(processes, "_group", late)
    stop(run)
    assert read_json(run / INFO)["pid"] != first and "stopped" not in read_json(run / INFO)
    monkeypatch.setattr(processes, "_group", looked)
    assert state(run).name == "running" and stop(run).name == "stopped"


def test_a_second_start_is_refused_while_one_is_running_and_leaves_it_alone(run, ticking):
    start(ticking, run)
    before = (run / INFO).read_text()
    with pytest.raises(InputError, match="a process is running there since"):
        start(["recipes"], run)
    with pytest.raises(InputError, match="a process is running there since"):
        resume(run)
    assert (run / INFO).read_text() == before and state(run).name == "running"
    stop(run)


def test_a_command_that_ignores_the_request_to_stop_is_killed_after_the_grace_time(run, monkeypatch):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"  # noqa: E501
    (run / "vitlab").mkdir(parents=True)
    (run / "sitecustomize.py").write_text(f"import sys\nif 'vitlab' in sys.orig_argv:\n    {stubborn}\n")
    monkeypatch.setenv("PYTHONPATH", str(run))          # the command, not the runner, never hears of it
    start(["recipes"], run)
    until(lambda: "deaf" in (run / OUTPUT).read_text())
    pids = processes._group(read_json(run / INFO))
    assert stop(run, grace=0.3).name == "stopped" and not any(processes._alive(pid) for pid in pids)


def test_a_run_whose_runner_was_killed_has_died_once_its_command_is_gone_too(run, ticking):
    start(ticking, run, folder=run.parent)
    until(lambda: len(processes._group(read_json(run / INFO))) == 2 and ticks(run.parent))
    runner = read_json(run / INFO)["pid"]
    command, = set(processes._group(read_json(run / INFO))) - {runner}
    os.kill(runner, signal.SIGKILL)
    until(lambda: processes._group(read_json(run / INFO)) == [command])
    assert state(run).name == "running"                 # else a second one would be started beside it
    os.kill(command, signal.SIGKILL)
    until(lambda: state(run).name != "running")
    assert (state(run).name, state(run).exit_code) == ("died", None)


def test_a_command_killed_by_another_has_died_by_that_signal(run, ticking):
    start(ticking, run)
    until(lambda: len(processes._group(read_json(run / INFO))) == 2)
    command, = set(processes._group(read_json(run / INFO))) - {read_json(run / INFO)["pid"]}
    os.kill(command, signal.SIGKILL)
    until(lambda: state(run).name != "running")
    assert (state(run).name, state(run).exit_code) == ("died", -signal.SIGKILL)


def test_another_process_that_was_given_the_number_is_not_taken_for_the_run_nor_ended(run):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        record = {"arguments": ["recipes"], "folder": str(run.parent), "pid": other.pid,
                  "started": "2026-01-01 00:00:00"}
        run.mkdir()
        (run / INFO).write_text(json.dumps(record | {"created": psutil.Process(other.pid).create_time() - 60}))
        assert state(run).name == "died"
        with pytest.raises(InputError, match="no process is running there; the last one died"):
            stop(run)
        assert other.poll() is None
        (run / INFO).write_text(json.dumps(record | {"created": psutil.Process(other.pid).create_time()}))
        assert state(run).name == "running"             # so it was the time of its start that told them apart
    finally:
        other.kill()
        other.wait()


def test_relative_paths_begin_where_the_run_was_first_started(run, ticking, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    start(ticking, run, folder=project)
    until(lambda: ticks(project))
    stop(run)
    (project / "ticks").unlink()
    resume(run)
    until(lambda: ticks(project))
    stop(run)


def test_a_runner_whose_starter_died_before_writing_it_down_starts_nothing(run):
    run.mkdir()
    done = subprocess.run([sys.executable, "-m", "vitlab.workbench.processes", str(run)], stdin=subprocess.DEVNULL,
                          capture_output=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr and not list(run.iterdir())


@pytest.mark.parametrize(("content", "says"), [
    (None, "process.json: no such file"), ("{", "process.json: not valid JSON"), ("[]", "no record of a process"),
    ('{"arguments": ["recipes"], "folder": "/", "pid": "12", "created": 1.5, "started": ""}', "pid is missing or no "
                                                                                              "int"),
])
def test_a_missing_or_damaged_record_is_an_error_that_names_it(run, content, says):
    run.mkdir()
    if content is not None:
        (run / INFO).write_text(content)
    for ask in (state, stop, resume):
        with pytest.raises(InputError, match=says):
            ask(run)


def test_no_command_is_refused(run):
    with pytest.raises(InputError, match="no command"):
        start([], run)
    assert not run.exists()


def test_several_processes_run_under_torchrun_and_all_of_them_end_when_asked(run, training):
    """Torchrun puts what it starts into groups of its own: they are found, asked to stop in time for a state, and none
    is left."""
    arguments = [*training[:-2], "--save-steps", "1000000", *training[-2:]]
    assert start(arguments, run, processes=2).processes == 2
    until(lambda: epochs(run))
    found = processes._group(processes._record(run))
    workers = [pid for pid in found if "RANK" in psutil.Process(pid).environ() and psutil.Process(pid).children() == []]
    assert len(workers) == 2 and {psutil.Process(pid).environ()["RANK"] for pid in workers} == {"0", "1"}
    assert stop(run, grace=60).name == "stopped"
    assert not any(processes._alive(pid) for pid in found)
    assert "stopped on request" in (run / OUTPUT).read_text()
    again = resume(run)
    assert again.name == "running" and again.processes == 2
