"""Whatever ends a run, it goes on from the disk and ends as if nothing had happened: kills, requests to stop, damage, a
full disk."""
import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import test_study
import torch
from PIL import Image
from training_fixtures import compressed, one_thread, small_recipe, tiny, write_easy_folder, write_folder  # noqa: F401

from vitlab.cli import main
from vitlab.data import open_data
from vitlab.models import checkpoint, shape_of
from vitlab.plan import CompressionPlan
from vitlab.runtime import files, parallel, signals
from vitlab.runtime.files import InputError, read_lines
from vitlab.runtime.launching import COMMAND
from vitlab.search.study import JOURNAL
from vitlab.training import states
from vitlab.training.loop import LOG, fit
from vitlab.training.recipes import Engine

# Everything with a memory or random numbers: warm-up, drop path, augmentation, mixing, repeats, momentum, moving
# average.
SETTINGS = {"epochs": 3, "warmup_epochs": 1, "clip_grad": 1.0, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
            "repeats": 2, "ema_decay": 0.9, "batch_size": 8,
            "augment": {"scale": (0.7, 1.0), "color_jitter": 0.3, "hflip": 0.5, "re_prob": 0.5}}
ENGINE = Engine(save_steps=2, log_steps=1, keep=3)
FORK = multiprocessing.get_context("fork")              # a child that has all modules loaded already


def train(folder: Path, data, engine: Engine = ENGINE, **more) -> dict[str, torch.Tensor]:
    model = tiny(drop_path_rate=0.2)
    fit(model, data, small_recipe(**SETTINGS), folder, seed=3, engine=engine,
        **{"workers": 0, "progress": False, **more})
    return model.state_dict()


def timeless(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "joules")} for r in read_lines(folder / LOG)]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data(write_easy_folder(tmp_path_factory.mktemp("easy")))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """(folder, weights, log, seconds) of the run that nothing interrupts."""
    folder, began = tmp_path_factory.mktemp("undisturbed") / "run", time.monotonic()
    weights = train(folder, data)
    return folder, weights, timeless(folder), time.monotonic() - began


def killed(work, after: float) -> bool:
    """Do work() in a child and kill it after so many seconds; whether it was still at it."""
    child = FORK.Process(target=work)
    child.start()
    child.join(after)
    still = child.is_alive()
    child.kill()
    child.join()
    return still


def killed_often(work, seconds: float, progress, check, folder: Path, kills: int = 12) -> None:
    """Begin work() again and again, each time killed at a random moment of the `seconds` that it takes undisturbed;
    each time it came to its end after all, check() and begin anew. progress(): how far it is."""
    chance, at, longest = random.Random(0), [], seconds / 2
    while len(at) < kills or (len(set(at)) < 6 and len(at) < 3 * kills):
        before = progress()
        if killed(work, chance.uniform(0, longest)):
            at.append(progress())
            longest *= 1.25 if at[-1] == before else 1          # the machine has other work than it had
        else:
            check()
            shutil.rmtree(folder)
    check()
    assert len(set(at)) > 5, f"killed {len(at)} times, but always as far as {sorted(set(at))}"


def test_a_training_killed_at_random_moments_ends_with_the_same_weights_and_log(data, tmp_path, undisturbed):
    _, weights, log, seconds = undisturbed
    run = tmp_path / "run"

    def check():
        assert equal(train(run, data), weights) and timeless(run) == log
        assert not list(run.glob(".state*")) and len(states.paths(run)) == 3
    killed_often(lambda: train(run, data), seconds, lambda: len(timeless(run)), check, run)


def test_a_search_killed_at_random_moments_ends_with_the_same_journal(tmp_path):
    def search(folder):
        def slowly(policy):
            time.sleep(0.05)                                        # so that it is killed while measuring, too
            return test_study.objective(policy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # of the line that the last kill cut short
            found = test_study.study(folder, "random")              # proposals take long; test_study kills those
        found.run(slowly, progress=False)
        return test_study.facts(found)
    began, run = time.monotonic(), tmp_path / "run"
    whole = search(tmp_path / "whole")
    seconds = time.monotonic() - began

    def check():
        assert search(run) == whole
    killed_often(lambda: search(run), seconds, lambda: len(read_lines(run / JOURNAL)), check, run)


COMMANDLINE = ["finetune", "--checkpoint", "dense", "--data", "data", "--recipe", "digits", "--epochs", "2",
               "--batch-size", "8", "--workers", "0", "--device", "cpu", "--quiet"]


def stopping(monkeypatch, step: int) -> None:
    """Ask this process to stop in the middle of that step."""
    plain = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)
    count = itertools.count(1)
    monkeypatch.setattr(torch.Tensor, "backward", backward)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_to_stop_writes_the_state_after_the_step_under_way(data, tmp_path, undisturbed, monkeypatch, workers):
    # nothing else writes a state in the middle of an epoch
    engine = Engine(save_steps=1000, log_steps=1)
    with monkeypatch.context() as patch:
        stopping(patch, 9)
        with pytest.raises(signals.Stopped) as kept:
            train(tmp_path, data, engine, workers=workers)
    # loaders are gone while a traceback keeps the run
    assert kept.tb is not None and multiprocessing.active_children() == []
    path, state = next(states.newest(tmp_path))
    assert "state-000000009-" in path.name and (state["epoch"], state["done"]) == (1, 3)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL       # as it was before
    assert equal(train(tmp_path, data, engine, workers=workers),
                 undisturbed[1]) and timeless(tmp_path) == undisturbed[2]


def test_a_request_that_comes_while_the_processes_agree_is_heard_at_the_next_step(data, tmp_path, monkeypatch):
    def total(values, plain=parallel.total):
        found = plain(values).clone()                               # what was told, before the request
        if values.dtype == torch.float64 and next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return found
    count = itertools.count(1)
    monkeypatch.setattr(parallel, "total", total)
    with pytest.raises(signals.Stopped):
        train(tmp_path, data, Engine(save_steps=1000))
    assert states.paths(tmp_path)[0].name.startswith("state-000000003-")


def test_the_command_line_ends_with_a_code_of_its_own_when_asked_to_stop_and_resume_goes_on(tmp_path, monkeypatch,
                                                                                            capsys):
    checkpoint.save(tmp_path / "dense", tiny(), CompressionPlan.empty(shape_of(tiny())))
    write_easy_folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    command = [*COMMANDLINE, "--out"]
    assert main([*command, "whole"]) == 0
    with monkeypatch.context() as patch:
        stopping(patch, 8)
        assert main([*command, "run"]) == signals.EXIT_CODE == 75
    said = capsys.readouterr().err
    assert said.startswith("vitlab finetune: stopped on request") and "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoint").exists()
    monkeypatch.chdir("/")
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert equal(checkpoint.load(tmp_path / "run").model.state_dict(),
                 checkpoint.load(tmp_path / "whole").model.state_dict())
    assert timeless(tmp_path / "run" / "training") == timeless(tmp_path / "whole" / "training")


@pytest.mark.parametrize("content, message", [
    (None, "no such file; pretrain, segment, finetune"), ("[]", "no record of a command"),
    ('{"arguments": [1], "folder": "/"}', "no record of a command"),
    ('{"arguments": ["demo"], "folder": "/"}', "'demo' can't be gone on with"),
    ('{"arguments": [], "folder": "/"}', "'nothing' can't"), ('{"arguments": ["search", "--out", "x", "--checkpoint", '
                                                              '"a", "--data", "b", "--gmacs", "1"], "folder": "/"}',
                                                              "has been moved since")])
def test_what_can_not_be_resumed_is_refused_by_name(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / COMMAND).write_text(content)
    assert main(["resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and str(tmp_path / COMMAND) in said


# ---------------------------------------------------------------- damage

def stopped_run(folder: Path, data, monkeypatch) -> Path:
    """A run stopped after step 9, with states of 6, 8 and 9 on the disk."""
    with monkeypatch.context() as patch:
        stopping(patch, 9)
        with pytest.raises(signals.Stopped):
            train(folder, data)
    assert [int(p.name.split("-")[1]) for p in states.paths(folder)] == [9, 8, 6]
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(b"")],
                         ids=["one bit", "cut short", "empty"])
def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(data, tmp_path, undisturbed, monkeypatch,
                                                                         damage):
    run = stopped_run(tmp_path, data, monkeypatch)
    newest = states.paths(run)[0]
    damage(newest)
    with pytest.warns(UserWarning, match=f"{newest.name}: .*going on from the state before it"):
        weights = train(run, data)
    assert equal(weights, undisturbed[1]) and timeless(run) == undisturbed[2]


def test_where_all_states_are_damaged_nothing_is_begun_over_them(data, tmp_path, monkeypatch):
    run = stopped_run(tmp_path, data, monkeypatch)
    for path in states.paths(run):
        flip(path)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.warns(UserWarning), pytest.raises(InputError, match="all 3 states of the run are damaged; remove them "
                                                                    "to begin anew"):
        train(run, data)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_good_state_whole(tmp_path, monkeypatch, capsys):
    checkpoint.save(tmp_path / "dense", tiny(), CompressionPlan.empty(shape_of(tiny())))
    write_easy_folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    command = [*COMMANDLINE, "--save-steps", "2", "--out"]
    assert main([*command, "whole"]) == 0
    with monkeypatch.context() as patch:
        plain, count = os.fsync, itertools.count(1)

        def full(descriptor):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".pt." + f"{os.getpid()}.tmp") and next(count) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(descriptor)
        patch.setattr(files.os, "fsync", full)
        assert main([*command, "run"]) == 2
    assert capsys.readouterr().err.strip().endswith("No space left on device")
    run = tmp_path / "run" / "training"
    assert [int(p.name.split("-")[1]) for p in states.paths(run)] == [4, 2] and not list(run.glob(".state*"))
    assert main([*command, "run"]) == 0
    assert equal(checkpoint.load("run").model.state_dict(), checkpoint.load("whole").model.state_dict())


def test_only_the_last_states_stay(data, tmp_path):
    train(tmp_path, data, Engine(save_steps=1, keep=4))
    assert [int(p.name.split("-")[1]) for p in states.paths(tmp_path)] == [18, 17, 16, 15]


# ---------------------------------------------------------------- one at a time, and with the same data

def hold(folder: Path, ready) -> None:
    with files.locked(folder):
        ready.set()
        time.sleep(120)


@contextlib.contextmanager
def held(folder: Path):
    ready = FORK.Event()
    holder = FORK.Process(target=hold, args=(folder, ready))
    holder.start()
    try:
        assert ready.wait(60)
        yield holder
    finally:
        holder.kill()
        holder.join()


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_died(data, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.2)
    with held(tmp_path) as holder:
        with pytest.raises(InputError, match=f"{tmp_path}: another process works in this folder"):
            train(tmp_path, data)
        with pytest.raises(InputError, match=f"{tmp_path}: another process works in this folder"):
            test_study.study(tmp_path / "study").folder and test_study.study(tmp_path).run(test_study.objective,
                                                                                           progress=False)
        assert not states.paths(tmp_path) and not (tmp_path / LOG).exists() and not (tmp_path / JOURNAL).exists()
        holder.kill()
        holder.join()
        (tmp_path / "study.json").unlink()
        assert train(tmp_path, data)


def test_a_changed_data_set_is_refused_unless_asked_for(tmp_path, monkeypatch):
    root = write_easy_folder(tmp_path / "data")
    stopped_run(tmp_path / "run", open_data(root), monkeypatch)
    Image.new("RGB", (32, 32), "red").save(root / "train" / "red" / "0.png")      # the same names, another image
    with pytest.raises(InputError, match=r"another run \(other data set\); --changed-data goes on"):
        train(tmp_path / "run", open_data(root))
    assert train(tmp_path / "run", open_data(root), changed_data=True)
    stopped = stopped_run(tmp_path / "other", open_data(root), monkeypatch)
    with pytest.raises(InputError, match=r"another run \(other seed\); choose another folder"):
        fit(tiny(drop_path_rate=0.2), open_data(root), small_recipe(**SETTINGS), stopped, seed=4, changed_data=True,
            workers=0, progress=False)


def test_too_many_broken_images_are_an_error_that_names_some(tmp_path):
    root = write_folder(tmp_path / "data", {"train": 12})
    bad = sorted((root / "train").rglob("*.png"))[:17]
    for path in bad[:16]:
        path.write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="can't be read as an image"):
        log = fit(tiny(), open_data(root), small_recipe(batch_size=36, epochs=1), tmp_path / "few", workers=0,
                  progress=False)
    assert len(log) == 1                                            # 16 of 36: as many as may be
    bad[16].write_bytes(b"nonsense")
    with pytest.warns(UserWarning), pytest.raises(InputError, match=r"17 of 36 images can't be read, .*\.png.*more "
                                                                    r"than 16 are too many"):
        fit(tiny(), open_data(root), small_recipe(batch_size=36, epochs=1), tmp_path / "many", workers=0,
            progress=False)


@pytest.mark.parametrize("count", [16, 17])
def test_broken_images_are_counted_over_the_whole_training_however_often_it_was_stopped(tmp_path, monkeypatch, count):
    """One epoch of three steps, stopped after each; every step meets some of them."""
    root, run = write_folder(tmp_path / "data", {"train": 12}), tmp_path / "run"
    for path in sorted((root / "train").rglob("*.png"))[:count]:
        path.write_bytes(b"nonsense")
    settings = {"workers": 0, "progress": False, "engine": Engine(save_steps=1)}

    def training():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit(tiny(), open_data(root), small_recipe(batch_size=12, epochs=1), run, **settings)
    for step in (1, 2):
        with monkeypatch.context() as patch:
            stopping(patch, 1)
            with pytest.raises(signals.Stopped):
                training()
        assert 0 < len(next(states.newest(run))[1]["broken"]) < count and states.paths(run)[0].name.startswith(
            f"state-{step:09d}")
    if count == 16:
        assert training()[-1]["broken"] == 16
        return
    with pytest.raises(InputError, match="17 of 36 images can't be read"):
        training()


def test_images_that_were_repaired_are_broken_no_more(tmp_path, monkeypatch):
    root, run = write_folder(tmp_path / "data", {"train": 12}), tmp_path / "run"
    bad = sorted((root / "train").rglob("*.png"))[:12]
    whole = [path.read_bytes() for path in bad]
    settings = {"workers": 0, "progress": False, "engine": Engine(save_steps=1)}
    for path in bad:
        path.write_bytes(b"nonsense")
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        with pytest.warns(UserWarning), pytest.raises(signals.Stopped):
            fit(tiny(), open_data(root), small_recipe(batch_size=12, epochs=1), run, **settings)
    for path, content in zip(bad, whole):
        path.write_bytes(content)
    log = fit(tiny(), open_data(root), small_recipe(batch_size=12, epochs=1), run, changed_data=True, **settings)
    assert len(log) == 1 and "broken" not in log[0]


def test_the_state_says_the_plan_and_the_recipe_it_was_made_with(data, tmp_path):
    model, plan = compressed()
    fit(model, data, small_recipe(epochs=1), tmp_path, about={"plan": json.loads(plan.to_json())}, workers=0,
        progress=False)
    _, state = next(states.newest(tmp_path))
    assert CompressionPlan.from_json(state["about"]["plan"]).blocks == plan.blocks
    assert state["recipe"]["name"] == "test" and state["recipe"]["epochs"] == 1
