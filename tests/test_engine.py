"""How a recipe is run changes nothing of what comes out; and what a recipe asks for is what is done."""
import dataclasses
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from training_fixtures import images, one_thread, small_recipe, tiny, token_plan, write_easy_folder  # noqa: F401

from vitlab.data import Batches, Shuffled, open_data
from vitlab.data import order as order_of_images
from vitlab.data.order import TrainingOrder, drawing, seed_of
from vitlab.measure.evaluate import evaluate
from vitlab.models import compress, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, Select, SharedUpdate
from vitlab.runtime.files import InputError, read_lines
from vitlab.training import states, stepping
from vitlab.training.loop import LOG, fit
from vitlab.training.recipes import RECIPES, Engine

QUIET = {"workers": 0, "progress": False, "seed": 3}
PATCHES = 16
RULES = {"dense": lambda model: None,
         "merge": lambda model: token_plan(model),
         "share": lambda model: with_rule(model,
                                          SharedUpdate(regions=tuple(j // 2 for j in range(PATCHES)),
                                                       weights=(0.5,) * PATCHES)),
         "select": lambda model: with_rule(model, Select(kept=7)),
         "match": lambda model: with_rule(model, Match(merged=5), Match(merged=2)),
         "heads and neurons": lambda model: CompressionPlan(shape=shape_of(model), blocks=(
             BlockPlan(heads=(0, 2)), BlockPlan(neurons=tuple(range(0, shape_of(model).num_neurons, 3)))))}


def with_rule(model, *rules) -> CompressionPlan:
    blocks = [BlockPlan(tokens=rule) for rule in rules] + [BlockPlan()] * (2 - len(rules))
    return CompressionPlan(shape=shape_of(model), blocks=tuple(blocks))


def build(rule: str):
    model = tiny()
    plan = RULES[rule](model)
    return model if plan is None else compress(model, plan)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data(write_easy_folder(tmp_path_factory.mktemp("easy")))


def losses(log: list[dict]) -> list[float]:
    return [r["loss"] for r in log]


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """The losses of each rule's training as it is, by rule."""
    return {rule: losses(fit(build(rule), data, small_recipe(), tmp_path_factory.mktemp("plain"), **QUIET))
            for rule in RULES}


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("engine",
                         [Engine(accumulate=2), Engine(accumulate=4), Engine(checkpointing=True),
                          Engine(channels_last=True)],
                         ids=["accumulate 2", "accumulate 4", "checkpointing", "channels last"])
def test_how_a_recipe_is_run_changes_only_rounding(data, tmp_path, plain, rule, engine):
    model = build(rule)
    assert losses(fit(model, data, small_recipe(), tmp_path, engine=engine, **QUIET)) == pytest.approx(plain[rule],
                                                                                                       abs=1e-5)
    assert not getattr(model, "grad_checkpointing", False)                      # given back as it was


@pytest.mark.parametrize("rule", list(RULES))
def test_a_compiled_model_trains_to_the_same_losses(data, tmp_path, plain, rule, monkeypatch):
    """By the tracer and autograd of torch.compile, without its code generator, which needs a compiler on the
    machine."""
    whole = torch.compile
    graphs = []

    def tracing(model, **settings):
        graphs.append(model)
        return whole(model, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", tracing)
    model = build(rule)
    assert losses(fit(model, data, small_recipe(epochs=1), tmp_path, engine=Engine(compile=True),
                      **QUIET)) == pytest.approx(
        losses(fit(build(rule), data, small_recipe(epochs=1), tmp_path / "plain", **QUIET)), abs=1e-5)
    assert graphs and set(model.state_dict()) == set(build(rule).state_dict())


def test_compiling_without_a_compiler_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(stepping.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler"):
        fit(tiny(), data, small_recipe(epochs=1), tmp_path, engine=Engine(compile=True), **QUIET)


@pytest.mark.parametrize("rule", ["dense", "merge", "match"])
def test_lower_precision_comes_near_and_trains(data, tmp_path, plain, rule):
    for dtype, near in (("bfloat16", 0.05), ("float16", 0.01)):                # 8 and 11 bits of the mantissa
        model = build(rule)
        found = losses(fit(model, data, small_recipe(dtype=dtype), tmp_path / dtype, **QUIET))
        assert found == pytest.approx(plain[rule], rel=near) and found != plain[rule]
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())
        scaler = next(states.newest(tmp_path / dtype))[1]["scaler"]
        assert bool(scaler) == (dtype == "float16")


def test_a_loss_scale_too_large_is_lowered_and_the_run_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, enabled: whole(kind, enabled=enabled, init_scale=2.0**40))
    whole = torch.cuda.amp.GradScaler.__mro__[1]
    log = fit(tiny(), data, small_recipe(dtype="float16", epochs=12), tmp_path, **QUIET)
    scale = next(states.newest(tmp_path))[1]["scaler"]["scale"]
    # of the first epochs every step was left out
    losses = [r["loss"] for r in log if r["loss"] is not None]
    assert scale < 2.0**40 and len(losses) < 12 and losses[-1] < losses[0]
    skipped = [r for r in read_lines(tmp_path / LOG) if "skipped" in r]
    assert len(skipped) > Engine().max_skipped and all("gradient" in r["why"] for r in skipped)


# ---------------------------------------------------------------- what a recipe asks for

def test_the_moving_average_is_that_of_the_steps_and_is_what_comes_out(data, tmp_path, monkeypatch):
    decay, seen = 0.2, []                                                       # reached after the third step
    plain = stepping.Training.take_step

    def watched(self, batches):
        loss = plain(self, batches)
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return loss
    monkeypatch.setattr(stepping.Training, "take_step", watched)
    model = tiny()
    fit(model, data, small_recipe(ema_decay=decay), tmp_path, **QUIET)
    # the average begins with the first step's weights
    wanted = seen[0]
    for before, weights in enumerate(seen[1:], 1):
        # it looks back over a tenth of the steps at first
        kept = min(decay, before / (before + 10))
        wanted = {k: kept * v + (1 - kept) * weights[k] for k, v in wanted.items()}
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)
    assert not torch.equal(seen[-1]["head.weight"], model.head.weight)


def test_the_average_of_a_short_run_is_as_good_as_its_weights(data, tmp_path):
    """Of 24 steps, far less than the 10,000 that the decay looks back over."""
    model, found = tiny(), {}
    fit(model, data, small_recipe(epochs=8, ema_decay=0.9999), tmp_path, **QUIET)
    state = next(states.newest(tmp_path))[1]
    for kept in ("model", "ema"):
        model.load_state_dict(state[kept])
        found[kept] = evaluate(model, data.batches("held_out", model, workers=0), progress=False).loss
    assert found["ema"] < 1.1 * found["model"] < 0.2                            # nats; log(3) = 1.1 is chance


def test_a_state_whose_average_was_taken_in_another_way_is_refused(data, tmp_path, monkeypatch):
    fit(tiny(), data, small_recipe(epochs=1, ema_decay=0.9), tmp_path, **QUIET)
    path, state = next(states.newest(tmp_path))
    del state["marks"]["moving average"]                                        # as states were before it had a warm-up
    path.unlink()
    states.write(tmp_path, 3, state, 1)
    with pytest.raises(InputError, match=r"the state of another run \(other moving average\)"):
        fit(tiny(), data, small_recipe(epochs=1, ema_decay=0.9), tmp_path, **QUIET)


def test_layer_decay_lowers_the_rate_towards_the_image(data, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(stepping, "create_optimizer_v2", lambda *a,
                        **k: made.append(create_optimizer_v2(*a, **k)) or made[-1])
    model = tiny()
    fit(model, data, small_recipe(epochs=1, layer_decay=0.5), tmp_path, **QUIET)
    rates = {id(p): group["lr_scale"] for group in made[0].param_groups for p in group["params"]}
    by_layer = [rates[id(p)]
                for p in (model.patch_embed.proj.weight, model.blocks[0].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight,
                                       model.head.weight)]
    assert by_layer == pytest.approx([0.125, 0.25, 0.5, 1.0])


@pytest.mark.parametrize("layer_decay, block", [(None, 1.0), (0.5, 0.25)])
def test_matrices_learn_at_a_rate_of_their_own(data, tmp_path, layer_decay, block):
    """The first step of AdamW moves every weight that has a gradient by the learning rate."""
    model = compress(tiny(), token_plan(tiny()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    recipe = small_recipe(epochs=1, lr=1e-3, lr_batch=8, batch_size=8, weight_decay=0.0, matrices_lr=0.1,
                          layer_decay=layer_decay)
    fit(model, data, recipe, tmp_path, limit=8, **QUIET)
    moved = {name: float((parameter.detach() - before[name]).abs().max()) for name,
             parameter in model.named_parameters()}
    weight = next(name for name in moved if name.startswith("blocks.0") and name.endswith("mlp.fc1.weight"))
    matrices = [name for name in moved if name.startswith("blocks.0") and name.endswith("_matrix")]
    assert matrices and all(moved[name] == pytest.approx(1e-4 * block, rel=1e-2) for name in matrices)
    assert moved[weight] == pytest.approx(1e-3 * block,
                                          rel=1e-2) and moved["head.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_drawing_moves_no_generator_for_good_and_no_gpus(monkeypatch):
    before, drawn = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    for _ in range(2):
        with drawing((1, 2)):
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1] and torch.equal(torch.get_rng_state(), before)
    with drawing((1, 3)):
        assert torch.rand(1).item() != drawn[0][0]


def test_mixed_images_have_the_mixed_targets_of_the_formula(data, tmp_path, monkeypatch):
    """mixup: x = lam x_i + (1 - lam) x_j, and the loss is the cross-entropy with lam y_i + (1 - lam) y_j, smoothed."""
    seen, drawn = [], []
    monkeypatch.setattr(stepping.Training, "_forward", watched_forward(stepping.Training._forward, seen))
    fit(tiny(), data, small_recipe(epochs=1, mixup=0.8, smoothing=0.1), tmp_path, **QUIET)
    for model_state, (x, y), mixed, loss in seen:
        model, other = tiny().train(), x.flip(0)
        model.load_state_dict(model_state)
        lam = ((mixed - other) * (x - other)).sum() / (x - other).square().sum()        # by least squares
        assert torch.allclose(mixed, lam * x + (1 - lam) * other, atol=1e-5)
        smooth = F.one_hot(y, 3) * 0.9 + 0.1 / 3
        targets = lam * smooth + (1 - lam) * smooth.flip(0)
        assert loss == pytest.approx(float(-(targets * model(mixed).log_softmax(1)).sum(1).mean().detach()), abs=1e-5)
        drawn.append(float(lam))
    assert len(set(drawn)) == len(drawn) > 1 and min(drawn) < 0.9


def watched_forward(plain, seen):
    def forward(self, x, y, pixels):
        before = {k: v.clone() for k, v in self.model.state_dict().items()}, (x.clone(), y.clone())
        loss = plain(self, x, y, pixels)
        seen.append((*before, x, float(loss.detach())))         # x is mixed in place
        return loss
    return forward


def test_a_batch_that_lost_an_image_is_mixed_all_the_same(data, tmp_path, monkeypatch):
    plain = Batches.__iter__
    monkeypatch.setattr(Batches, "__iter__",
                        lambda self: ((x[1:], y[1:]) if self.training else (x, y) for x, y in plain(self)))
    log = fit(tiny(), data, small_recipe(epochs=1, mixup=0.8, cutmix=1.0), tmp_path, **QUIET)
    assert math.isfinite(log[0]["loss"])


def test_repeated_augmentation_takes_each_image_several_times_in_a_row_drawn_anew(data):
    order = TrainingOrder(range(48), 12, seed=1, repeats=3)
    epoch = [key for batch in order for key in batch]
    assert len(epoch) == 48 and len({i for i, _ in epoch}) == 16
    assert all(len({i for i, _ in epoch[k:k + 3]}) == 1
               for k in range(0, 48, 3)) and len({seed for _, seed in epoch}) == 48
    batches = data.batches("train", tiny(), batch_size=6, training=Shuffled(repeats=3), seed=1, workers=0)
    x, _ = next(iter(batches))
    assert not torch.equal(x[0], x[1]) and not torch.equal(x[1], x[2])


def test_epochs_are_shuffled_anew_and_known_by_seed_and_epoch():
    order = TrainingOrder(range(40), 8, seed=1)
    epochs = [[key for batch in order for key in batch] for _ in range(2)]
    order.epoch, order.start = 1, 3
    assert [key for batch in order for key in batch] == epochs[1][24:]
    assert [i for i, _ in epochs[0]] != [i for i, _ in epochs[1]] and [seed for _,
                                                                       seed in epochs[0]] != [seed for _,
                                                                                              seed in epochs[1]]
    other = TrainingOrder(range(40), 8, seed=2)
    assert [i for batch in other for i, _ in batch] != [i for i, _ in epochs[0]]


@pytest.mark.parametrize("count, repeats, rank, world", [(40, 1, 0, 1), (41, 3, 1, 2), (37, 2, 2, 3)])
def test_the_images_of_an_epoch_and_their_random_numbers_are_what_they_were(count, repeats, rank, world):
    """Of runs that go on: one permutation, each image `repeats` times, dealt out to the processes; a seed of run, epoch
    and place each."""
    order = TrainingOrder(range(count), 4, seed=11, repeats=repeats, rank=rank, world=world)
    order.epoch, order.start = 5, 1
    seed = int(np.random.SeedSequence((11, 5)).generate_state(1)[0]) >> 1
    dealt = [i for i in torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
             for _ in range(repeats)][rank::world]
    wanted = [(dealt[place], (11, 5, place * world + rank)) for place in range(4, 4 * len(order))]
    assert [key for batch in order for key in batch] == wanted
    with drawing(wanted[0][1]):
        drawn = torch.rand(3)
    torch.manual_seed(int(np.random.SeedSequence(wanted[0][1]).generate_state(1)[0]) >> 1)
    assert torch.equal(drawn, torch.rand(3))


def test_an_epoch_makes_no_seed_before_its_image_is_read(data, monkeypatch):
    made = []
    monkeypatch.setattr(order_of_images, "seed_of", lambda *numbers: (made.append(numbers), seed_of(*numbers))[1])
    assert len([key for batch in TrainingOrder(range(4000), 8, seed=1) for key in batch]) == 4000 and made == [(1, 0)]
    next(iter(data.batches("train", tiny(), batch_size=6, training=Shuffled(), seed=1, workers=0)))
    assert len(made) == 2 + 6


def test_the_published_pretraining_recipe_is_the_papers():
    """arXiv 2012.12877, table 9."""
    deit = RECIPES["deit"]
    assert (deit.epochs, deit.batch_size, deit.scaled_lr, deit.weight_decay,
            deit.warmup_epochs) == (300, 1024, 1e-3, 0.05, 5)
    assert (deit.smoothing, deit.drop_path, deit.repeats, deit.mixup, deit.cutmix) == (0.1, 0.1, 3, 0.8, 1.0)
    assert deit.augment["auto_augment"].startswith("rand-m9-mstd0.5") and deit.augment["re_prob"] == 0.25


def test_the_deit_recipe_trains(data, tmp_path):
    log = fit(tiny(drop_path_rate=0.1), data,
              RECIPES["deit"].replace(epochs=2, batch_size=16, warmup_epochs=1, dtype="float32"), tmp_path, **QUIET)
    assert len(log) == 2 and all(math.isfinite(r["loss"]) for r in log)


@pytest.mark.parametrize("settings, message", [
    ({"accumulate": 0}, "accumulate is 0"), ({"save_steps": 0}, "save_steps is 0"), ({"keep": 0}, "keep is 0"),
    ({"max_skipped": -1}, "max_skipped is -1")])
def test_settings_out_of_their_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Engine(**settings)


@pytest.mark.parametrize("settings",
                         [{"ema_decay": 1.0}, {"layer_decay": 0.0}, {"mixup": -0.1}, {"repeats": 0}, {"dtype": "int8"},
                                      {"matrices_lr": 0.0}])
def test_recipe_settings_out_of_their_range_are_refused(settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))} is"):
        dataclasses.replace(small_recipe(), **settings)
