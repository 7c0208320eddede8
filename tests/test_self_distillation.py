"""Self-distillation: what it minimises, what it keeps, when it stops; and the step that calls it."""
import copy
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from segmenting_fixtures import CLASSES, small, units_plan
from segmenting_fixtures import pictures as scenes
from training_fixtures import full_plan, images, logits, one_thread, tiny, token_plan  # noqa: F401

from vitlab.data import ImageData, open_data
from vitlab.data.masks import open_scenes
from vitlab.measure.moments import fisher
from vitlab.models import compress, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.training.self_distillation import Divergence, self_distil
from vitlab.workbench import calibrating, scoring, steps, training

SHORT = {"workers": 0, "progress": False, "batch_size": 8, "lr": 2e-4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 images of noise around a colour, without labels."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 256, (1, 1, 3)) // 2 + generator.integers(0, 128, (32, 32, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
    return root


@pytest.fixture
def parts(pictures):
    return halves(open_data(pictures), 40)


def halves(data, count: int):
    """`count` images of train in two: train and val."""
    found, images = copy.copy(data), data.split("train", count)
    found.splits = {name: type(images)(images.reader, images.indices[at::2]) for at,
                    name in enumerate(("train", "val"))}
    return found


def outspoken():
    """A model whose probabilities are far from even, so that there is something to distil."""
    dense = tiny()
    with torch.no_grad():
        dense.head.weight.mul_(5)
    return dense


def models() -> tuple:
    """(compressed model, dense teacher)."""
    teacher = outspoken()
    return compress(teacher, full_plan(teacher)), teacher


def divergence_of(teacher, parts) -> Divergence:
    return Divergence(teacher, parts.batches("val", teacher, workers=0))


def test_divergence_is_the_mean_kullback_leibler_divergence_over_images():
    model, teacher = models()
    x = images(7)
    found = Divergence(teacher, [(x[:4], None), (x[4:], None)])(model)
    p, q = logits(teacher, x).double().softmax(dim=1), logits(model, x).double().softmax(dim=1)
    wanted = sum(float(p[i, k] * (p[i, k] / q[i, k]).log()) for i, k in itertools.product(range(7), range(3))) / 7
    assert found == pytest.approx(wanted, rel=1e-4)                             # float32 logarithms
    assert Divergence(teacher, [(x, None)])(teacher) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="no image"):
        Divergence(teacher, [])


def test_training_brings_the_model_nearer_to_the_teacher_on_images_set_apart(parts):
    model, teacher = models()
    divergence, before = divergence_of(teacher, parts), {k: v.clone() for k, v in model.state_dict().items()}
    modes = []
    teacher.train().register_forward_hook(lambda module, *_: modes.append(module.training))
    log = self_distil(model, teacher, parts, divergence, steps=24, **SHORT)
    assert len(modes) == 24 and not any(modes) and teacher.training            # asked in eval mode, and left as it was
    least = min(record["distance"] for record in log)
    assert divergence(model) == pytest.approx(least, rel=1e-5) and least < 0.8 * log[0]["distance"]
    assert [record["steps"] for record in log] == list(range(0, 25, 2))         # 20 images in batches of 8: 2 an epoch
    assert not torch.equal(model.blocks[0].tokens.merge_matrix,
                           before["blocks.0.tokens.merge_matrix"]) and not model.training
    assert all(torch.equal(v, w) for v, w in zip(teacher.state_dict().values(), outspoken().state_dict().values()))


def test_the_same_seed_and_steps_train_the_same_model_and_another_seed_another(parts):
    def trained(seed: int) -> list[tuple[float, float]]:
        model, teacher = models()
        log = self_distil(model, teacher, parts, divergence_of(teacher, parts), steps=4, seed=seed, **SHORT)
        return [(record["loss"], record["distance"]) for record in log[1:]]
    assert trained(0) == trained(0) != trained(1)


def test_the_model_is_never_worse_than_the_one_given_and_stops_early(parts, monkeypatch):
    model, teacher = models()
    before, divergence, seen = logits(model), divergence_of(teacher, parts), []
    # every state is measured worse than the last
    values = itertools.count(1.0)
    monkeypatch.setattr(Divergence, "__call__", lambda self, model: next(values))
    log = self_distil(model, teacher, parts, divergence, steps=12, on_better=lambda *given: seen.append(given), **SHORT)
    assert [record["steps"] for record in log] == [0, 2, 4, 6] and not seen     # 6 of 12 is more than a third
    assert torch.equal(logits(model), before)


def test_each_better_state_is_given_on_and_the_best_stays(parts, monkeypatch):
    model, teacher = models()
    divergence, seen = divergence_of(teacher, parts), []
    values = iter([3.0, 2.0, 5.0, 1.0, 4.0])
    monkeypatch.setattr(Divergence, "__call__", lambda self, model: next(values))
    self_distil(model, teacher, parts, divergence, steps=8, on_better=lambda model,
                kl: seen.append((kl, logits(model))), **SHORT)
    assert [kl for kl, _ in seen] == [2.0, 1.0]
    assert torch.equal(logits(model), seen[-1][1])


def test_steps_or_time_that_are_over_end_the_training(parts):
    model, teacher = models()
    log = self_distil(model, teacher, parts, divergence_of(teacher, parts), steps=3, **SHORT)
    assert [record["steps"] for record in log] == [0, 2, 3]                     # in the middle of an epoch
    log = self_distil(model, teacher, parts, divergence_of(teacher, parts), minutes=1e-9, **SHORT)
    assert len(log) == 1
    for both in ({}, {"minutes": 1, "steps": 1}):
        with pytest.raises(InputError, match="either minutes or steps"):
            self_distil(model, teacher, parts, divergence_of(teacher, parts), **both, **SHORT)


def test_a_step_whose_gradient_is_not_finite_is_left_out_and_its_files_are_said(parts):
    teacher, model, count = tiny(), tiny(seed=1), itertools.count()
    apart = Divergence(teacher, parts.batches("val", teacher, workers=0))
    model.register_forward_hook(
        lambda m, args, out: out + (out - out).abs().sqrt() if torch.is_grad_enabled() and next(count) == 2 else out)
    with pytest.warns(UserWarning, match=r"gradient's norm of self-distillation is nan at step 3 of (\S+), (\S+); the "
                                         r"step is left out"):
        log = self_distil(model, teacher, parts, apart, steps=9, **{**SHORT, "batch_size": 2})
    assert log[-1]["steps"] == 9 and all(torch.isfinite(v).all() for v in model.state_dict().values())


def test_several_steps_in_a_row_that_are_not_finite_are_refused_and_the_best_state_stays(parts):
    model, teacher = models()
    before, divergence = logits(model), divergence_of(teacher, parts)
    says = r"loss of self-distillation is nan at step \d+ of .*, and was not finite in 3 steps in a row; a smaller lr than 1e\+30"  # noqa: E501
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InputError, match=says):
        self_distil(model, teacher, parts, divergence, steps=10, **{**SHORT, "lr": 1e30})
    assert torch.equal(logits(model), before)


# ---------------------------------------------------------------- a class for each pixel

def test_divergence_of_segmenters_is_the_mean_over_images_of_the_mean_over_their_patches():
    teacher = small()
    model, x = compress(teacher, units_plan(teacher)), scenes(3)
    found = Divergence(teacher, [(x[:2], None), (x[2:], None)])(model)
    with torch.no_grad():
        p, q = (m.patch_logits(x).double().softmax(dim=1) for m in (teacher, model))
    wanted = sum(float(p[b, k, i, j] * (p[b, k, i, j] / q[b, k, i, j]).log())
                 for b, k, i, j in itertools.product(range(3), range(CLASSES), range(3), range(5))) / (3 * 15)
    assert found == pytest.approx(wanted, rel=1e-4) and wanted > 0.01           # float32 logarithms
    assert Divergence(teacher, [(x, None)])(teacher) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", [full_plan, units_plan])
def test_training_on_scenes_brings_a_cut_segmenter_nearer_to_the_dense_one(make):
    teacher = small(num_classes=11, img_size=(32, 32))
    model, data = compress(teacher, make(teacher)), halves(open_scenes("digit_scenes"), 24)
    divergence = Divergence(teacher, data.batches("val", teacher, workers=0))
    log = self_distil(model, teacher, data, divergence, steps=24, **{**SHORT, "lr": 3e-4})
    assert divergence(model) == pytest.approx(min(record["distance"] for record in log), rel=1e-5)
    assert divergence(model) < 0.8 * log[0]["distance"]
    assert not model.training and not teacher.decoder.training


def test_the_loss_is_of_the_model_without_dropout():
    teacher = small(num_classes=11, img_size=(32, 32))
    data = halves(open_scenes("digit_scenes"), 24)
    log = self_distil(compress(teacher, CompressionPlan.empty(shape_of(teacher))), teacher, data,
                      Divergence(teacher, data.batches("val", teacher, workers=0)), steps=1, **SHORT)
    # the very same model; with dropout 0.1 it is 0.4
    assert log[1]["loss"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- the step

def dense_checkpoint() -> Checkpoint:
    dense = outspoken()
    return Checkpoint(model=dense, plan=CompressionPlan.empty(shape_of(dense)), info={})


@pytest.mark.parametrize("cuts", ["tokens", "neurons"])
def test_calibration_takes_images_without_labels_and_says_what_it_gained(pictures, tmp_path, monkeypatch, cuts):
    monkeypatch.setattr(calibrating, "compensate", lambda dense, plan, *args, **settings: compress(dense, plan).eval())
    found = dense_checkpoint()
    plan = token_plan(found.model) if cuts == "tokens" else CompressionPlan(
        shape=shape_of(found.model), blocks=(BlockPlan(neurons=tuple(range(60))),) * 2)
    made = calibrating.calibrate(found, pictures, tmp_path / "out", plan, images=40, minutes=0.03,
                                 config=RunConfig(workers=0, quiet=True))
    made_by = made.info["made_by"]
    assert (made_by["images"], made_by["minutes"], made_by["kept"]) == (28, 0.03, "distilled")
    assert made_by["roles"] == {"calibrate": 28, "choose": 6, "report": 6, "shared": [
        "calibrate takes 28 images of the 40 asked for, 14 of them from the share of score",
        "choose takes 6 images of the 50 asked for", "report takes 6 images of the 256 asked for"]}
    reporting = open_data(pictures).parts(0, report=256)
    apart = Divergence(outspoken(), reporting.batches("report", outspoken(), workers=0))
    for name, model in (("distilled", made.model), ("cut", compress(found.model, plan))):
        each = apart.each(model)
        assert made_by[f"distance_{name}"] == pytest.approx(sum(each) / 6, rel=1e-4)
        spread = sum((value - sum(each) / 6) ** 2 for value in each) / 5
        assert made_by[f"distance_{name}_se"] == pytest.approx((spread / 6) ** 0.5, rel=1e-3)


def test_what_calibration_is_fitted_on_chosen_by_and_reported_on_has_no_image_in_common(pictures, tmp_path,
                                                                                        monkeypatch):
    found, seen, whole = dense_checkpoint(), {}, ImageData.batches

    def watched(self, split, model, **settings):
        made = whole(self, split, model, **settings)
        seen.setdefault(split, set()).update(made.images.path(i) for i in range(len(made.images)))
        return made
    monkeypatch.setattr(ImageData, "batches", watched)
    few = {"config": RunConfig(workers=0, quiet=True)}
    calibrating.calibrate(found, pictures, tmp_path / "out", token_plan(found.model), images=14, minutes=0.001, **few)
    scoring.score_units(found, pictures, tmp_path / "u.safetensors", images=14, **few)
    assert set(seen) == {"calibrate", "choose", "report",
                         "score"} and sum(map(len, seen.values())) == 40 == len(set.union(*seen.values()))


@pytest.mark.parametrize("better", ["cut", "refitted", "refitted throughout"])
@pytest.mark.parametrize("cuts", ["tokens", "neurons"])
def test_the_form_that_stays_is_the_nearest_on_images_to_choose_on(pictures, tmp_path, monkeypatch, better, cuts):
    found = dense_checkpoint()
    plan = token_plan(found.model) if cuts == "tokens" else CompressionPlan(
        shape=shape_of(found.model), blocks=(BlockPlan(neurons=tuple(range(60))), BlockPlan()))
    # no unit to refit
    forms = ["cut", "refitted", "refitted throughout"] if cuts == "neurons" else ["cut", "refitted throughout"]
    values = {form: 1.0 if form == better else 2.0 + number for number, form in enumerate(forms)}
    measured, given, plain, each = iter(values.values()), {}, calibrating.compensate, Divergence.each

    def noted(*args, every, costs, **settings):
        given[every] = costs
        return plain(*args, every=every, costs=costs, **settings)
    monkeypatch.setattr(calibrating, "compensate", noted)
    monkeypatch.setattr(Divergence, "each", lambda self, model: [value] * 6 if (value := next(measured, None))
                        else each(self, model))
    made = calibrating.calibrate(found, pictures, tmp_path / "out", plan, images=14,
                                 config=RunConfig(workers=0, quiet=True))
    made_by, kept = made.info["made_by"], min(values, key=values.get)
    assert made_by["kept"] == kept and f"kept: {kept}" in calibrating.distances(
        made_by) and "distance_distilled" not in made_by
    assert set(given) == {form == "refitted throughout" for form in forms[1:]}
    parts = open_data(pictures).parts(0, calibrate=14, choose=50, report=256)
    fitted_on = list(parts.batches("calibrate", outspoken(), workers=0))
    # prefix tokens weigh in a refit what errors of them cost
    costs = fisher(outspoken(), fitted_on, progress=False)
    assert all(costs[layer].prefix_weight == each[layer].prefix_weight for each in given.values() for layer in costs)
    models = {form: compress(outspoken(), plan) if form == "cut"
              else plain(outspoken(), plan, fitted_on, costs=costs, progress=False,
                                                                          every=form == "refitted throughout")
              for form in forms}
    assert torch.equal(logits(made.model), logits(models[kept]))
    apart = Divergence(outspoken(), parts.batches("report", outspoken(), workers=0))
    refitted = kept if kept != "cut" else forms[1]                              # the nearer one of those refitted
    for name, form in (("distance_cut", "cut"), ("distance_refitted", refitted)):
        assert made_by[name] == pytest.approx(float(np.mean(apart.each(models[form]))), rel=1e-6)


def test_steps_that_need_labels_refuse_images_without(pictures, tmp_path):
    found, few = dense_checkpoint(), {"config": RunConfig(workers=0, quiet=True)}
    for step in (lambda: steps.evaluate(found, pictures, **few),
                 lambda: scoring.score_tokens(found, pictures, tmp_path / "s.safetensors", **few),
                 lambda: training.finetune(found, pictures, tmp_path / "f", teacher=None, **few),
                 lambda: training.pretrain(model="vit_nano_patch4_32", data=pictures, out=tmp_path / "p", **few),
                 lambda: scoring.score_units(found, pictures, tmp_path / "u.safetensors", criterion="taylor", **few)):
        with pytest.raises(InputError, match=f"{pictures.name}: images without labels"):
            step()
    assert scoring.score_tokens(found, pictures, tmp_path / "s.safetensors", criterion="class_attention", images=8,
                                **few).shape == (2, 16)
    assert len(scoring.score_units(found, pictures, tmp_path / "u.safetensors", images=8, **few).heads) == 2
