"""Two processes do what one does: the same losses, scores, counts and journal; and none is left hanging, under torchrun
too."""
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import parallel_work
import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import one_thread, small_recipe, tiny, write_easy_folder  # noqa: F401

import vitlab
from vitlab.cli import main
from vitlab.data import open_data
from vitlab.data.order import TrainingOrder
from vitlab.models import checkpoint, shape_of
from vitlab.plan import CompressionPlan
from vitlab.runtime import parallel, signals
from vitlab.runtime.files import InputError, read_lines
from vitlab.training import states
from vitlab.training.loop import LOG, fit
from vitlab.training.recipes import Engine

HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(vitlab.__file__).parents[1]}{os.pathsep}{HERE}"}
FORK = multiprocessing.get_context("fork")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, *map(str, arguments)], env=ENV, cwd=cwd, capture_output=True, text=True,
                          timeout=300)


class Pair:
    """Two forks of this process, which has all modules loaded, with the environment that torchrun gives; each does
    work(), in `folder`, and what it says is in a file."""

    def __init__(self, folder: Path, work: Callable[[], int | None]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.said = [folder / f"said-{rank}" for rank in (0, 1)]
        self.processes = [FORK.Process(target=self._begin, args=(rank, port, folder, work)) for rank in (0, 1)]
        for process in self.processes:
            process.start()

    def _begin(self, rank: int, port: int, folder: Path, work: Callable[[], int | None]) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for number in (1, 2):
            os.dup2(os.open(self.said[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.chdir(folder)
        sys.exit(work())

    def ended(self, seconds: float = 300) -> tuple[list[int | None], list[str]]:
        """(exit codes, what each said)."""
        for process in self.processes:
            process.join(seconds)
            process.kill()
        return [process.exitcode for process in self.processes], [path.read_text() for path in self.said]


def work_of_one(folder: Path) -> None:
    """As parallel_work does as a program."""
    torch.set_num_threads(1)
    parallel.begin("cpu")
    parallel_work.main(folder, open_data(folder / "data"))
    parallel.end()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder of one process, its tensors; folder of two, their tensors)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for folder in (one, two):
        write_easy_folder(folder / "same" / "data")
    codes, said = Pair(two, lambda: work_of_one(two / "same")).ended(600)
    assert codes == [0, 0], said
    os.chdir(HERE)
    parallel_work.main(one / "same", open_data(one / "same" / "data"))
    return one / "same", load_file(one / "same" / "found.safetensors"), two / "same", load_file(
        two / "same" / "found.safetensors")


@pytest.mark.parametrize("name", ["dense", "distilled", "features", "left out", "accumulated", "checkpointed",
                                  "scenes"])
def test_the_same_global_batch_gives_the_same_losses_and_weights(both, name):
    _, one, _, two = both
    assert (one[f"{name} losses"] - two[f"{name} losses"]).abs().max() < 1e-5
    keys = [k for k in one if k.startswith(f"{name} ") and not k.endswith("losses")]
    # Adam divides by the root of small squares: rounding grows to a part of the step, which is 3e-3.
    assert len(keys) > 20 and max(float((one[k] - two[k]).abs().max()) for k in keys) < 1e-3


def test_a_step_that_one_process_can_not_take_is_left_out_by_all_with_the_files_of_all(both):
    one, _, two, _ = both
    skipped = [[r for r in read_lines(folder / "left out" / LOG) if "skipped" in r] for folder in (one, two)]
    assert [[r["step"] for r in records] for records in skipped] == [[2], [2]]
    files = [sorted(Path(path).relative_to(folder) for path in records[0]["files"]) for folder,
             records in zip((one, two), skipped)]
    assert files[0] == files[1] and len(files[0]) == 16


def test_a_step_in_turns_is_the_same_step(both):
    _, one, _, _ = both
    assert (one["dense losses"] - one["accumulated losses"]).abs().max() < 1e-5
    assert (one["dense losses"] - one["checkpointed losses"]).abs().max() < 1e-5


def test_scores_are_the_same_and_every_image_counts_once(both):
    _, one, _, two = both
    names = [k for k in one if k.split()[0] in ("tokens", "heads", "neurons", "redundancy")]
    assert len(names) == 19
    for name in names:
        # Sums in another order: a few units in the last place of float32.
        atol = 1e-6 * float(one[name].abs().max())
        torch.testing.assert_close(two[name], one[name], rtol=2e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("activation", "taylor", "reconstruction", "fisher"):
        assert int(one[f"images {name}"]) == int(two[f"images {name}"]) == 21
    # the last batch is one image, which has no other
    assert int(one["images hsic"]) == int(two["images hsic"]) == 20
    assert torch.equal(one["accuracy"][:3], two["accuracy"][:3]) and int(two["accuracy"][1]) == 21
    assert abs(float(one["accuracy"][3] - two["accuracy"][3])) < 1e-12
    assert int(two["one batch"]) == 21
    assert torch.equal(one["likeness"][:2], two["likeness"][:2]) and int(two["likeness"][0]) == 21
    assert (one["likeness"][2:] - two["likeness"][2:]).abs().max() < 1e-7      # distances are in float32


@pytest.mark.parametrize("name", ["scenes", "one scene"])
def test_two_processes_count_every_pixel_of_every_scene_once(both, name):
    _, one, _, two = both
    assert torch.equal(one[name][:-1], two[name][:-1])                                      # counts are exact
    # float64 sums
    assert one[name][-3:-1].tolist() == [7 * 64 * 96, 7] and abs(float(one[name][-1] - two[name][-1])) < 1e-9


@pytest.mark.parametrize("initial", ["varied", "sensitivity"])
def test_the_journal_is_that_of_one_process(both, initial):
    one, _, two, _ = both
    for name in ("journal.jsonl", "sensitivity.jsonl") if initial == "sensitivity" else ("journal.jsonl",):
        lines = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(folder / initial / name)]
                 for folder in (one, two)]
        assert lines[0] == lines[1] and len(lines[0]) >= 9


def test_processes_share_an_epoch_without_an_image_twice_or_left_out():
    for count, repeats in ((48, 1), (37, 1), (48, 3), (37, 2)):
        whole = [key for batch in TrainingOrder(range(count), 8, seed=5, repeats=repeats) for key in batch]
        parts = [list(TrainingOrder(range(count), 4, seed=5, repeats=repeats, rank=rank, world=2)) for rank in (0, 1)]
        assert sorted(key for part in parts for batch in part for key in batch) == sorted(whole)
        for step, batches in enumerate(zip(*parts)):
            assert sorted(key for batch in batches for key in batch) == sorted(whole[step * 8:(step + 1) * 8])
        if repeats == 1:
            assert len({i for i, _ in whole}) == len(whole) == count // 8 * 8
        assert len({seed for _, seed in whole}) == len(whole)                   # repeats of an image are drawn anew


# ---------------------------------------------------------------- commands, and their end

@pytest.fixture
def place(tmp_path):
    checkpoint.save(tmp_path / "dense", tiny(), CompressionPlan.empty(shape_of(tiny())))
    write_easy_folder(tmp_path / "data")
    return tmp_path


FINETUNE = ("finetune", "--checkpoint", "dense", "--data", "data", "--recipe", "digits", "--batch-size",
            "8", "--workers", "0", "--device", "cpu", "--out", "run")


def test_the_command_line_trains_in_two_processes_and_prints_once(place):
    codes, said = Pair(place, lambda: main([*FINETUNE, "--epochs", "1"])).ended()
    assert codes == [0, 0], said
    assert "".join(said).count("checkpoint: run/checkpoint") == 1
    assert len(read_lines(place / "run" / "training" / LOG)) == 1 and checkpoint.load(place / "run")


def test_a_command_for_one_process_is_refused_by_name(place, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place / "error.json"))
    arguments = ["calibrate", "--checkpoint", str(place / "dense"), "--plan", str(place / "p.json"), "--data",
                 "digits", "--out", str(place / "run")]
    (place / "p.json").write_text("{}")
    assert main(arguments) == 2
    assert "`calibrate` runs in one process; start it without torchrun" in capsys.readouterr().err
    assert "`calibrate` runs in one process" in (place / "error.json").read_text()


def test_a_process_that_dies_ends_the_job_with_its_own_error_on_top(place):
    """One process of two meets an error in the middle of training while the other waits for it."""
    script = place / "dies.py"
    script.write_text("""
import os, sys
from vitlab.runtime import parallel
from vitlab.cli import main
from vitlab.runtime.files import InputError
from vitlab.training import stepping
plain = stepping.Training.take_step
def step(self, batches):
    if parallel.rank() == 1 and self.step == 2:
        raise InputError("data/red/7.png: the disk gave up")
    return plain(self, batches)
stepping.Training.take_step = step
sys.exit(main(sys.argv[1:]))
""")
    began = time.monotonic()
    ran = torchrun(script, *FINETUNE, cwd=place)
    assert ran.returncode != 0 and time.monotonic() - began < 240
    assert "vitlab finetune: data/red/7.png: the disk gave up" in ran.stderr
    root = ran.stderr[ran.stderr.index("Root Cause"):]
    assert "rank      : 1" in root and "the disk gave up" in root
    assert "Traceback" not in ran.stderr[:ran.stderr.index("Root Cause")].split("ChildFailedError")[0].split(
        "torch/distributed")[0]


def test_a_request_to_stop_is_agreed_on_and_wrong_input_is_one_line_and_leaves_its_states(place):
    pair, end = Pair(place, lambda: main([*FINETUNE, "--epochs", "100000"])), time.monotonic() + 400
    while not states.paths(place / "run" / "training") and time.monotonic() < end:
        time.sleep(0.05)
    pair.processes[1].terminate()                               # the first hears of it from the second
    codes, said = pair.ended()
    assert codes == [signals.EXIT_CODE] * 2, said
    assert all("vitlab finetune: stopped on request" in each and "another process" not in each for each in said)
    path, state = next(states.newest(place / "run" / "training"))
    assert f"{state['epoch'] * 6 + state['done']:09d}" in path.name             # 48 images
    before = {p.name: p.read_bytes() for p in states.paths(place / "run" / "training")}
    codes, said = Pair(place, lambda: main([*FINETUNE, "--accumulate", "3"])).ended()   # one line, the end of all
    assert codes == [2, 2], said
    wrong = "vitlab finetune: recipe digits: a step of 8 images does not divide by 2 processes times 3 batches"
    assert all(wrong in each for each in said)
    assert "Traceback" not in "".join(said)
    assert {p.name: p.read_bytes() for p in states.paths(place / "run" / "training")} == before


def test_a_batch_that_does_not_divide_is_refused(place, monkeypatch):
    with pytest.raises(InputError, match="16 images does not divide by 1 processes times 5 batches"):
        fit(tiny(), open_data(place / "data"), small_recipe(), place / "x", engine=Engine(accumulate=5), workers=0,
            progress=False)
