"""Where the numbers of a run go: by a logger that writes down what it is told, and by TensorBoard where there is
one."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from training_fixtures import full_plan, one_thread, small_recipe, tiny, write_easy_folder  # noqa: F401

from vitlab import cli
from vitlab.data import open_data
from vitlab.models import compress
from vitlab.runtime import logs
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, read_lines
from vitlab.search import Study
from vitlab.search.strategies import Settings
from vitlab.search.study import read_journal
from vitlab.training.loop import LOG, fit
from vitlab.training.recipes import Engine
from vitlab.training.self_distillation import Divergence, self_distil
from vitlab.training.stepping import Training

FAKE = """
import json
from pathlib import Path
TOLD = Path(__file__).with_suffix(".jsonl")

def note(*told):
    with TOLD.open("a") as file:
        file.write(json.dumps(told) + "\\n")

def init(project, name, resume, **more):
    if "refused" in name:
        raise OSError("no key is known\\nhere")
    note("init", project, name, resume, sorted(more))

def log(values, step):
    if TOLD.with_name("full").exists():
        raise OSError("the disk is full")
    note("log", step, values)

def finish():
    note("finish")
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What trackio and wandb were told, in turn: fakes take their place."""
    (tmp_path / "fake").mkdir()
    for name in ("trackio", "wandb"):
        (tmp_path / "fake" / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    yield lambda name: read_told(tmp_path / "fake" / f"{name}.jsonl")
    for name in ("trackio", "wandb"):
        sys.modules.pop(name, None)


def read_told(path: Path) -> list[list]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(told: list[list]) -> list[tuple[int, dict]]:
    return [(step, values) for kind, step, values in (each for each in told if each[0] == "log")]


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    return open_data(write_easy_folder(tmp_path_factory.mktemp("easy")))


def interrupted(easy, folder: Path, loggers: tuple[str, ...]) -> list[dict]:
    """A training of 2 epochs of 3 steps that dies in its fifth step, and goes on from the state of the third."""
    recipe, engine = small_recipe(epochs=2, batch_size=16), Engine(log_steps=1)
    taken = Training.take_step

    def dies(self, batches):
        if self.step == 4:
            raise MemoryError
        return taken(self, batches)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Training, "take_step", dies)
        fit(tiny(), easy, recipe, folder, engine=engine, loggers=loggers, workers=0, progress=False)
    return fit(tiny(), easy, recipe, folder, engine=engine, loggers=loggers, workers=0, progress=False)


def test_a_training_logs_the_numbers_of_its_own_log_and_goes_on_in_the_same_one(easy, tmp_path, told):
    interrupted(easy, tmp_path / "run", ("trackio", "wandb"))
    records = read_lines(tmp_path / "run" / LOG)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for name, settings in (("trackio", []), ("wandb", ["dir", "id"])):
        found = told(name)
        begun = [each for each in found if each[0] == "init"]
        assert [each[1] for each in begun] == ["vitlab"] * 2 and begun[0] == begun[1]
        assert begun[0][3:] == ["allow", settings]
        assert found[-1] == ["finish"] and len([each for each in found if each == ["finish"]]) == 2
        # the fourth step was taken twice; what it gave stands in the log once
        assert [step for step, _ in logged(found)] == [1, 2, 3, 4, 4, 5, 6]
        assert [{"step": step, **values} for step, values in logged(found)][-3:] == records[-3:]
        assert not any("step" in values for _, values in logged(found))     # which both keep for themselves


def test_a_run_that_begins_anew_has_another_name(easy, tmp_path, told):
    for _ in range(2):
        with logs.opened(("trackio",), tmp_path / "run", 0) as log:
            log(1, {"loss": 0.5})
    with logs.opened(("trackio",), tmp_path / "run", 1) as log:
        log(2, {"loss": 0.4})
    names = [each[2] for each in told("trackio") if each[0] == "init"]
    assert len(set(names)) == 2 and names[1] == names[2] and "run" in names[0]


def test_a_folder_may_be_named_as_no_run_of_a_tracker_may(tmp_path, told):
    for name in ("keep=70%, lr #2?", "a:b\\c\n", "größer_2.0"):
        with logs.opened(("wandb",), tmp_path / name, 0):
            pass
    names = [each[2] for each in told("wandb") if each[0] == "init"]
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert ["keep-70---lr--2-" in names[0], "-a-b-c--" in names[1], "-größer_2.0-" in names[2]] == [True] * 3


def test_a_search_logs_every_policy_and_goes_on_in_the_same_log(tmp_path, told):
    from test_study import QUICK, SPACE, budget, objective
    for evaluations in (3, 5):
        options = Settings(**{**vars(QUICK), "evaluations": evaluations})
        Study(tmp_path / "study", SPACE, budget(), options=options).run(objective, loggers=("trackio",), progress=False)
    journal, found = read_journal(tmp_path / "study"), logged(told("trackio"))
    assert [step for step, _ in found] == [1, 2, 3, 4, 5]
    assert [values["value"] for _, values in found] == [each.value for each in journal]
    assert [values["best"] for _, values in found] == np.maximum.accumulate([each.value for each in journal]).tolist()
    assert found[0][1].keys() == {"value", "best", "cost", "seconds", "top1_pct"}
    assert len({each[2] for each in told("trackio") if each[0] == "init"}) == 1


def test_self_distillation_gives_each_record_to_a_log(easy):
    teacher, found = tiny().eval(), []
    apart = Divergence(teacher, list(easy.batches("held_out", teacher, workers=0)))
    student = compress(teacher, full_plan(teacher))
    records = self_distil(student, teacher, easy, apart, steps=4, batch_size=16, workers=0, progress=False,
                          log_to=lambda step, values: found.append((step, values)))
    assert found == [(record["steps"], record) for record in records] and len(found) > 1


def test_numbers_alone_are_logged_and_those_that_are_finite(tmp_path, told):
    with logs.opened(("trackio",), tmp_path, 0) as log:
        log(3, {"loss": float("nan"), "why": "inf", "good": True, "top1_pct": 50, "files": ["a"], "nothing": None})
    assert logged(told("trackio")) == [(3, {"top1_pct": 50.0})]


def test_a_logger_that_fails_on_the_way_does_not_end_the_run(tmp_path, told):
    with logs.opened(("trackio", "wandb"), tmp_path, 0) as log:
        log(1, {"loss": 1.0})
        (tmp_path / "fake" / "full").touch()
        with pytest.warns(UserWarning, match="log trackio: the disk is full; the run goes on without it"):
            log(2, {"loss": 0.9})
        log(3, {"loss": 0.8})
    assert [step for step, _ in logged(told("trackio"))] == [1]


def test_a_logger_that_can_not_begin_is_named_in_one_line(tmp_path, told):
    with pytest.raises(InputError, match=r"^log trackio: can't begin \(no key is known\)$"), \
            logs.opened(("trackio",), tmp_path / "refused", 0):
        pass


def test_one_that_is_not_known_or_not_installed_is_refused_in_one_line_before_anything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logs, "LOGGERS", {**logs.LOGGERS, "no_such_logger": None})
    for name, says in (("clearml", "log 'clearml' is not known; known are tensorboard, trackio, wandb"),
                       ("no_such_logger", "log no_such_logger: it is not installed; `pip install no_such_logger`")):
        with pytest.raises(InputError, match=says):
            RunConfig(log=(name,))
        words = f"pretrain --model vit_nano_patch4_32 --data digits --log {name} --out {tmp_path / 'run'}".split()
        assert cli.main(words) == 2
        line, = capsys.readouterr().err.splitlines()
        assert says in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["pretrain", "segment", "finetune", "search", "calibrate", "tonight"])
def test_every_command_that_trains_or_searches_takes_a_log(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert "--log" in capsys.readouterr().out


def test_tensorboard_shows_each_step_of_a_resumed_training_once(easy, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    interrupted(easy, tmp_path, ("tensorboard",))
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    records = read_lines(tmp_path / LOG)
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [
        (record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in records]       # it keeps float32
    assert [event.step for event in shown.Scalars("train_slice_top1_pct")] == [3, 6]
