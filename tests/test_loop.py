"""fit: learns, trains what the recipe says, repeats itself by seed, and goes on after a kill as if nothing had
happened."""
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_fixtures import compressed, one_thread, small_recipe, tiny, write_easy_folder, write_folder  # noqa: F401

import vitlab
from vitlab.data import Batches, Shuffled, open_data
from vitlab.measure.evaluate import evaluate
from vitlab.runtime.files import InputError, read_lines
from vitlab.training import loop, states
from vitlab.training.loop import LOG, fit
from vitlab.training.recipes import Engine
from vitlab.training.stepping import Training

QUIET = {"progress": False, "workers": 0}
# everything that draws random numbers or has a memory: warm-up, drop path, flips and colours, momentum
LIVELY = {"epochs": 4, "warmup_epochs": 1, "clip_grad": 1.0, "smoothing": 0.1,
          "augment": {"scale": (0.7, 1.0), "color_jitter": 0.3, "hflip": 0.5}}


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """48 training images of three colours, 21 held out."""
    return open_data(write_easy_folder(tmp_path_factory.mktemp("easy")))


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def newest(folder) -> Path:
    """The newest state's file."""
    return states.paths(folder)[0]


def state_of(folder) -> dict:
    return torch.load(newest(folder), weights_only=True)


def timeless(log: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "joules", "peak_memory_mb")} for record in log]


def lively_model():
    return tiny(drop_path_rate=0.2)


# ---------------------------------------------------------------- learning

def test_loss_falls_and_a_tiny_model_learns_an_easy_set(easy, tmp_path):
    model = tiny()
    before = evaluate(model, easy.batches("held_out", model, workers=0), progress=False)
    log = fit(model, easy, small_recipe(epochs=6), tmp_path, **QUIET)
    after = evaluate(model, easy.batches("held_out", model, workers=0), progress=False)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert before.top1_pct < 70 and after.top1_pct > 90         # colours tell the classes apart; chance is 33
    assert log[-1]["train_slice_top1_pct"] > 90


def test_digits_are_learnt_from_a_slice(tmp_path):
    data, model = open_data("digits"), tiny(num_classes=10)
    log = fit(model, data, small_recipe(epochs=8), tmp_path, limit=320, **QUIET)
    assert log[-1]["loss"] < log[0]["loss"] - 0.3               # from about log(10) = 2.3


def test_a_soft_distilled_student_comes_nearer_to_its_teacher(easy, tmp_path):
    teacher, student = tiny(seed=1), tiny(seed=2)
    log = fit(student, easy, small_recipe(epochs=4, distill="soft", alpha=1.0, tau=4.0), tmp_path, teacher=teacher,
              **QUIET)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


def test_the_teacher_is_not_changed_by_training_its_student(easy, tmp_path):
    teacher, student = tiny(seed=1), tiny(seed=2)
    before = weights(teacher)
    fit(student, easy, small_recipe(epochs=1, distill="hard", alpha=0.5), tmp_path, teacher=teacher, **QUIET)
    assert equal(weights(teacher), before)


def test_the_log_has_one_record_an_epoch_and_is_the_one_in_the_folder(easy, tmp_path):
    recipe = small_recipe(epochs=3)
    log = fit(tiny(), easy, recipe, tmp_path, **QUIET)
    assert [r["epoch"] for r in log] == [1, 2, 3]
    assert all(set(r) - {"joules"} == {"epoch", "step", "loss", "lr", "train_slice_top1_pct", "seconds"} for r in log)
    assert log == [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    rates = [r["lr"] for r in log]                              # cosine: falls every epoch, from below the first step's
    assert recipe.scaled_lr > rates[0] > rates[1] > rates[2] >= recipe.min_lr


def test_the_held_out_split_is_never_opened_in_training(tmp_path):
    data = open_data(write_easy_folder(tmp_path / "data"))
    data.splits["val"] = None                                   # any use of it would raise
    assert len(fit(tiny(), data, small_recipe(epochs=1), tmp_path / "run", **QUIET)) == 1


def test_fit_gives_the_model_back_in_eval_mode(easy, tmp_path):
    model = tiny()
    fit(model, easy, small_recipe(epochs=1), tmp_path, **QUIET)
    assert not any(m.training for m in model.modules())


def test_training_goes_on_without_the_broken_images(tmp_path):
    root = write_easy_folder(tmp_path / "data")
    (root / "train" / "red" / "bad.png").write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="bad.png"):
        log = fit(tiny(), open_data(root), small_recipe(), tmp_path / "run", **QUIET)
    assert len(log) == 2 and log[1]["loss"] < log[0]["loss"] and log[1]["broken"] == 1


# ---------------------------------------------------------------- what trains

@pytest.mark.parametrize("rule, trainable",
                         [(r, t) for r in ("center", "merge") for t in ("matrices", "weights", "all")])
def test_only_what_the_recipe_and_the_rule_train_changes(easy, tmp_path, rule, trainable):
    model, _ = compressed(rule=rule)
    before = weights(model)
    fit(model, easy, small_recipe(epochs=1, trainable=trainable), tmp_path, **QUIET)
    merge = {k for k in before if k.endswith("merge_matrix")}
    reconstruct = {k for k in before if k.endswith("reconstruct_matrix")}
    masks = {k for k in before if k.endswith("token_mask")}
    rest = set(before) - merge - reconstruct - masks
    assert len(merge) == len(reconstruct) == len(masks) == 2 and rest
    wanted = set()
    wanted |= rest if trainable != "matrices" else set()
    wanted |= reconstruct if trainable != "weights" else set()
    # rule `merge` trains reconstruct alone (A5)
    wanted |= merge if trainable != "weights" and rule == "center" else set()
    assert changed(model, before) == wanted


def test_a_recipe_that_trains_matrices_refuses_a_model_without(easy, tmp_path):
    with pytest.raises(InputError, match="no merge and reconstruct matrices"):
        fit(tiny(), easy, small_recipe(trainable="matrices"), tmp_path, **QUIET)


def test_a_recipe_that_distils_refuses_to_start_without_a_teacher(easy, tmp_path):
    with pytest.raises(InputError, match="a teacher is needed"):
        fit(tiny(), easy, small_recipe(distill="soft"), tmp_path, **QUIET)
    assert not states.paths(tmp_path)


# ---------------------------------------------------------------- same again

@pytest.fixture(scope="module")
def undisturbed(easy, tmp_path_factory):
    """(weights, log) of the lively run that nothing interrupts."""
    model = lively_model()
    log = fit(model, easy, small_recipe(**LIVELY), tmp_path_factory.mktemp("undisturbed"), seed=3, **QUIET)
    return weights(model), timeless(log)


def test_the_same_seed_gives_the_same_weights_and_log_bit_for_bit(easy, tmp_path, undisturbed):
    torch.rand(17)                                              # whatever was drawn before must not matter
    model = lively_model()
    log = fit(model, easy, small_recipe(**LIVELY), tmp_path, seed=3, **QUIET)
    assert equal(weights(model), undisturbed[0]) and timeless(log) == undisturbed[1]


def test_another_seed_gives_other_weights(easy, tmp_path, undisturbed):
    model = lively_model()
    fit(model, easy, small_recipe(**LIVELY), tmp_path, seed=4, **QUIET)
    assert not equal(weights(model), undisturbed[0])


class Stop(BaseException):
    """What no handler of the package catches, as a kill would not be."""


def test_a_run_stopped_inside_an_epoch_ends_with_the_weights_and_log_of_an_undisturbed_one(
        easy, tmp_path, undisturbed, monkeypatch):
    recipe, passes = small_recipe(**LIVELY), [0]
    plain = Batches.__iter__

    def stopping(self):
        training = self.training
        passes[0] += training
        for step, batch in enumerate(plain(self)):
            if training and passes[0] == 3 and step == 1:
                raise Stop
            yield batch
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__iter__", stopping)
        with pytest.raises(Stop):
            fit(lively_model(), easy, recipe, tmp_path, seed=3, **QUIET)
    assert state_of(tmp_path)["epoch"] == 2
    model = lively_model()
    torch.rand(17)
    log = fit(model, easy, recipe, tmp_path, seed=3, **QUIET)
    assert equal(weights(model), undisturbed[0])
    assert timeless(log) == undisturbed[1]


def test_a_run_stopped_between_log_and_state_repeats_the_epoch_and_returns_it_once(easy, tmp_path, undisturbed,
                                                                                   monkeypatch):
    recipe, plain = small_recipe(**LIVELY), states.write

    def stopping(folder, step, state, keep):
        if state["epoch"] == 2:
            raise Stop
        plain(folder, step, state, keep)
    with monkeypatch.context() as patch:
        patch.setattr(states, "write", stopping)
        with pytest.raises(Stop):
            fit(lively_model(), easy, recipe, tmp_path, seed=3, **QUIET)
    model = lively_model()
    log = fit(model, easy, recipe, tmp_path, seed=3, **QUIET)
    assert len((tmp_path / LOG).read_text().splitlines()) == 4
    assert equal(weights(model), undisturbed[0]) and timeless(log) == undisturbed[1]


CHILD = """
import sys, time
import torch
import vitlab.workbench.said, vitlab.workbench.training
# what takes as long to load as half of torch, and what few commands need
assert not {"sklearn", "matplotlib", "pandas"} & sys.modules.keys()
torch.set_num_threads(int(sys.argv[4]))
sys.path.insert(0, sys.argv[1])
from test_loop import LIVELY, QUIET, lively_model
from training_fixtures import small_recipe
from vitlab.data import open_data
from vitlab.training import loop
plain = loop.append_line
def slow(path, record):
    if record.get("epoch") == 2:
        time.sleep(120)                 # the parent kills it here, in the second epoch
    plain(path, record)
loop.append_line = slow
loop.fit(lively_model(), open_data(sys.argv[2]), small_recipe(**LIVELY), sys.argv[3], seed=3, **QUIET)
"""


def test_a_killed_process_called_again_ends_with_the_weights_and_log_of_an_undisturbed_one(tmp_path, undisturbed):
    root, run = write_easy_folder(tmp_path / "data"), tmp_path / "run"
    easy = open_data(root)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(root), str(run), str(torch.get_num_threads())],
        env={**os.environ, "PYTHONPATH": str(Path(vitlab.__file__).parents[1])}, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 400
        while not states.paths(run):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline, "the child wrote no state in 120 s"
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert state_of(run)["epoch"] == 1
    model = lively_model()
    log = fit(model, easy, small_recipe(**LIVELY), run, seed=3, **QUIET)
    assert equal(weights(model), undisturbed[0]) and timeless(log) == undisturbed[1]


def test_worker_processes_change_nothing(easy, tmp_path, undisturbed):
    model = lively_model()
    log = fit(model, easy, small_recipe(**LIVELY), tmp_path, **{**QUIET, "workers": 2, "seed": 3})
    assert equal(weights(model), undisturbed[0]) and timeless(log) == undisturbed[1]


def test_a_resumed_run_with_worker_processes_ends_with_the_weights_of_an_undisturbed_one(easy, tmp_path, monkeypatch,
                                                                                         capsys):
    """Folders are read by workers unless told otherwise; their random numbers must not depend on the epoch they started
    in. Where it goes on is said."""
    recipe, settings = small_recipe(**LIVELY | {"epochs": 2}), {**QUIET, "workers": 2, "seed": 3}
    whole, parts = lively_model(), lively_model()
    log = fit(whole, easy, recipe, tmp_path / "whole", **settings)
    plain = states.write

    def stopping(folder, step, state, keep):
        plain(folder, step, state, keep)
        raise Stop
    with monkeypatch.context() as patch:
        patch.setattr(states, "write", stopping)
        with pytest.raises(Stop):
            fit(lively_model(), easy, recipe, tmp_path / "parts", **settings)
    capsys.readouterr()
    again = fit(parts, easy, recipe, tmp_path / "parts", **settings | {"progress": True})
    said = [line for line in capsys.readouterr().out.splitlines() if "goes on" in line]
    assert said == [f"{tmp_path / 'parts'}: goes on after 1 of 2 epochs"]
    assert timeless(again) == timeless(log)
    assert equal(weights(parts), weights(whole))


@pytest.fixture(scope="module")
def finished(easy, tmp_path_factory):
    """(folder, weights, log) of a run of two epochs that is done."""
    folder, model = tmp_path_factory.mktemp("finished"), tiny()
    log = fit(model, easy, small_recipe(), folder, **QUIET)
    return folder, weights(model), log


def test_a_finished_run_called_again_trains_no_more_and_gives_the_same(easy, finished):
    folder, wanted, log = finished
    content, model = newest(folder).read_bytes(), tiny()
    assert fit(model, easy, small_recipe(), folder, **QUIET) == log
    assert equal(weights(model), wanted) and newest(folder).read_bytes() == content


def test_a_run_does_not_go_on_from_the_state_of_other_weights_another_teacher_or_other_files(easy, finished, tmp_path):
    folder, _, _ = finished
    with pytest.raises(InputError, match="the state of another run"):
        fit(tiny(seed=1), easy, small_recipe(), folder, **QUIET)
    other = open_data(write_easy_folder(tmp_path / easy.name))           # the same name and size, other files
    with pytest.raises(InputError, match="the state of another run"):
        fit(tiny(), other, small_recipe(), folder, **QUIET)
    settings = small_recipe(distill="soft", epochs=1)
    fit(tiny(), easy, settings, tmp_path / "run", teacher=tiny(seed=2), **QUIET)
    with pytest.raises(InputError, match="the state of another run"):
        fit(tiny(), easy, settings, tmp_path / "run", teacher=tiny(seed=3), **QUIET)


@pytest.mark.parametrize("damage", [{"epoch": "two"}, {"losses": None}, {"model": {}}, {"optimizer": {}}])
def test_a_state_that_is_whole_but_none_of_this_training_is_refused_by_name(easy, finished, tmp_path, damage):
    path = states.write(tmp_path, 6, {**state_of(finished[0]), **damage}, keep=1)
    with pytest.raises(InputError, match=f"{path}: d"):                  # damaged, or does not fit the model
        fit(tiny(), easy, small_recipe(), tmp_path, **QUIET)


def test_after_training_a_merge_matrix_of_rule_merge_still_does_not_train(easy, tmp_path):
    model, _ = compressed(rule="merge")
    fit(model, easy, small_recipe(epochs=1), tmp_path, **QUIET)
    flags = {n.rsplit(".", 1)[1]: p.requires_grad for n, p in model.named_parameters() if ".tokens." in n}
    assert flags == {"merge_matrix": False, "reconstruct_matrix": True}


def test_the_state_loads_without_pickled_code_and_says_its_epoch(finished):
    state = state_of(finished[0])
    assert state["epoch"] == 2 and {"model", "optimizer", "scheduler", "scaler", "seed", "done", "recipe", "about",
                                    "marks"} <= set(state)


@pytest.mark.parametrize("other", ["recipe", "data", "model", "seed", "limit"])
def test_the_state_of_another_run_is_refused_and_left_alone(easy, finished, tmp_path, other):
    state = newest(finished[0])
    content = state.read_bytes()
    data = open_data(write_folder(tmp_path, {"train": 5})) if other == "data" else easy
    recipe = small_recipe(lr=1e-3) if other == "recipe" else small_recipe()
    model = tiny(depth=3) if other == "model" else tiny()
    more = {"seed": 1} if other == "seed" else {"limit": 32} if other == "limit" else {}
    with pytest.raises(InputError, match=f"{state}: the state of another run"):
        fit(model, data, recipe, state.parent, **QUIET, **more)
    assert state.read_bytes() == content


# ---------------------------------------------------------------- faults

def poison(monkeypatch, bad) -> None:
    """Training batch i of the run, from 0, holds NaN where bad(i)."""
    plain, count = Batches.__iter__, itertools.count()

    def poisoned(self):
        for x, y in plain(self):
            yield (x * float("nan") if self.training and bad(next(count)) else x), y
    monkeypatch.setattr(Batches, "__iter__", poisoned)


def test_steps_without_a_finite_loss_are_left_out_and_their_files_are_in_the_log(easy, tmp_path, monkeypatch):
    poison(monkeypatch, lambda i: i in (1, 4))
    model = tiny()
    log = fit(model, easy, small_recipe(epochs=3), tmp_path, **QUIET)
    skipped = [r for r in read_lines(tmp_path / LOG) if "skipped" in r]
    assert [r["step"] for r in skipped] == [2, 5] and all(r["skipped"] == "nan" for r in skipped)
    order = data_order(easy, tmp_path / "other")
    assert [r["files"] for r in skipped] == [order[1], order[4]]
    assert len(log) == 3 and all(math.isfinite(r["loss"]) for r in log) and log[-1]["loss"] < log[0]["loss"]
    assert all(torch.isfinite(v).all() for v in weights(model).values())


def spoil_gradient(model, bad) -> None:
    """The loss of training step i of the model, from 0, is what it was where bad(i), its gradient 0 / 0."""
    count = itertools.count()

    def spoilt(module, given, out):
        return out + (out - out).abs().sqrt() if module.training and bad(next(count)) else out
    model.register_forward_hook(spoilt)


@pytest.mark.parametrize(("settings", "accumulate"),
                         [({}, 1), ({"clip_grad": 1.0, "ema_decay": 0.5}, 2), ({"dtype": "float16"}, 1),
                                                      ({"dtype": "float16", "clip_grad": 1.0}, 2)], ids=str)
def test_a_step_whose_gradient_is_not_finite_though_its_loss_is_changes_no_weight_and_its_own_files_are_named(easy,
                                                                                                              tmp_path,
                                                                                                              settings,
                                                                                                              accumulate):
    # forwards: `accumulate` of them a step
    bad = {2, 7}
    model, kept = tiny(), {}
    spoil_gradient(model, bad.__contains__)
    plain = states.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "write", lambda folder, step, state, keep: kept.update(
            {step: {k: v.clone() for k, v in state["model"].items()}}) or plain(folder, step, state, keep))
        log = fit(model, easy, small_recipe(epochs=3, **settings), tmp_path,
                  engine=Engine(accumulate=accumulate, save_steps=1), **QUIET)
    skipped = [r for r in read_lines(tmp_path / LOG) if "skipped" in r and "nan" in r["why"]]
    at = [i // accumulate for i in sorted(bad)]                                     # steps, from 0
    assert [r["step"] for r in skipped] == [i + 1 for i in at]
    assert all(math.isfinite(float(r["skipped"])) and "gradient" in r["why"] for r in skipped)
    order = data_order(easy, tmp_path / "other")
    assert [r["files"] for r in skipped] == [order[i] for i in at]
    assert all(equal(kept[i], kept[i + 1]) for i in at) and not equal(kept[4], kept[6])
    assert all(torch.isfinite(v).all() for state in [*kept.values(), weights(model)] for v in state.values())
    assert all(math.isfinite(r["loss"]) for r in log)


def test_too_many_steps_in_a_row_without_a_finite_gradient_end_the_run_in_any_type(easy, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=4.0))
    # whose loss scale is lowered to 1 before steps count
    for dtype in ("float32", "float16"):
        model = tiny()
        spoil_gradient(model, lambda i: i >= 3)
        with pytest.raises(InputError, match=r"its gradient's norm nan at epoch .*, and was not finite in 3 steps in a "
                                             r"row.*smaller lr"):
            fit(model, easy, small_recipe(epochs=4, dtype=dtype), tmp_path / dtype, engine=Engine(max_skipped=2),
                **QUIET)
        assert all(torch.isfinite(v).all() for v in state_of(tmp_path / dtype)["model"].values())


def test_an_epoch_of_which_every_step_was_left_out_has_no_loss(easy, tmp_path, monkeypatch):
    poison(monkeypatch, lambda i: 3 <= i < 6)
    log = fit(tiny(), easy, small_recipe(epochs=3), tmp_path, **{**QUIET, "progress": True})
    assert log[1]["loss"] is None and math.isfinite(log[2]["loss"])


def data_order(data, folder) -> list[list[str]]:
    """The files of each step that a run of this data reads, known by opening its batches as images."""
    batches = data.batches("train", tiny(), batch_size=16, seed=0, workers=0, shared=True,
                           training=Shuffled(augment=small_recipe().augment | {"hflip": 0.0}))
    dataset, found = batches.loader.dataset, []
    for epoch in range(3):
        batches.begin(epoch)
        for keys in batches.order:
            found.append([dataset.path(i) for i, _ in keys])
        batches.order.epoch = 0
    return found


def test_too_many_steps_in_a_row_without_a_finite_loss_end_the_run_with_the_state_before_them(easy, tmp_path,
                                                                                              monkeypatch):
    poison(monkeypatch, lambda i: i >= 3)
    with pytest.raises(InputError, match="the loss is nan at epoch 2, step 3, and was not finite in 3 steps in a "
                                         "row.*smaller lr"):
        fit(tiny(), easy, small_recipe(epochs=3), tmp_path, engine=Engine(max_skipped=2), **QUIET)
    state = state_of(tmp_path)
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_learning_rate_that_bursts_the_weights_ends_the_run(easy, tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at epoch .*smaller lr than 1e\+30"):
        fit(tiny(), easy, small_recipe(lr=1e30, epochs=5), tmp_path, **QUIET)


@pytest.mark.parametrize("save_steps", [1, 1000])
def test_no_state_holds_a_weight_that_is_not_finite(easy, tmp_path, monkeypatch, save_steps):
    plain = Training.take_step

    def bursting(self, batches):
        loss = plain(self, batches)
        if self.step == 6:                                                          # the last of the training
            self.model.head.weight.data[1, 2] = float("inf")
        return loss
    monkeypatch.setattr(Training, "take_step", bursting)
    with pytest.raises(InputError, match=r"head.weight is not finite after 6 steps, so no state of them is written; a "
                                         r"smaller lr than 0"):
        fit(tiny(), easy, small_recipe(), tmp_path, engine=Engine(save_steps=save_steps, keep=9), **QUIET)
    assert all(torch.isfinite(v).all() for _, state in states.newest(tmp_path) for v in state["model"].values())
    assert len(states.paths(tmp_path)) == (5 if save_steps == 1 else 1)


def test_a_training_set_where_no_image_can_be_read_is_refused(tmp_path):
    root = write_folder(tmp_path / "data", {"train": 2})
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no image"):
        fit(tiny(), open_data(root), small_recipe(), tmp_path / "run", **QUIET)


def test_a_state_without_the_mark_of_its_data_set_goes_on_where_that_may_differ(tmp_path, monkeypatch):
    loaded = []
    training = SimpleNamespace(load=lambda state, path: loaded.append(path), batches=SimpleNamespace(broken=["a.png"]),
                               step=1)
    monkeypatch.setattr(loop.states, "newest", lambda folder: [(tmp_path / "state.pt", {"marks": {"recipe": "r"}})])
    loop._resume(training, tmp_path, {"recipe": "r", "data set": "d"}, changed_data=True)
    assert loaded == [tmp_path / "state.pt"] and training.batches.broken == []
    with pytest.raises(InputError, match="other data set.*--changed-data"):
        loop._resume(training, tmp_path, {"recipe": "r", "data set": "d"}, changed_data=False)
