"""The training losses against the formulas of methods A8, written out number by number."""
import math

import pytest
import torch
from segmenting_fixtures import CLASSES as PIXEL_CLASSES
from segmenting_fixtures import masks, pictures, small
from training_fixtures import compressed, images, one_thread, small_recipe, tiny  # noqa: F401

from vitlab.runtime.files import InputError
from vitlab.training.distillation import make_task

CLASSES, BATCH = 7, 5
CPU = torch.device("cpu")
TARGETS = [3, 0, 6, 3, 1]


def log_softmax(logits: list[float], tau: float = 1.0) -> list[float]:
    total = math.log(sum(math.exp(z / tau) for z in logits))
    return [z / tau - total for z in logits]


def mean_ce(rows: list[list[float]], targets: list[int]) -> float:
    return -sum(log_softmax(row)[t] for row, t in zip(rows, targets)) / len(rows)


def outputs(model, x) -> list[list[float]]:
    with torch.no_grad():
        return model(x).double().tolist()


def loss_of(student, teacher, x=None, **settings) -> torch.Tensor:
    task = make_task(student, teacher, small_recipe(**settings), CPU)
    return task(images(BATCH) if x is None else x, torch.tensor(TARGETS))["loss"]


@pytest.fixture
def student():
    return tiny(num_classes=CLASSES, seed=1)


@pytest.fixture
def teacher():
    return tiny(num_classes=CLASSES, seed=2)


@pytest.mark.parametrize("alpha, tau", [(0.8, 20.0), (1.0, 20.0), (0.3, 4.0), (0.5, 1.0)])
def test_soft_loss_is_the_formula_of_a8(student, teacher, alpha, tau):
    x = images(BATCH)
    own, theirs = outputs(student, x), outputs(teacher, x)
    kl = 0.0
    for s, t in zip(own, theirs):
        for log_s, log_t in zip(log_softmax(s, tau), log_softmax(t, tau)):
            kl += math.exp(log_t) * (log_t - log_s)
    wanted = (1 - alpha) * mean_ce(own, TARGETS) + alpha * tau**2 * kl / (BATCH * CLASSES)
    assert kl > 1e-5                                            # the two models differ: the term is not 0 by luck
    # float32 log-probabilities about 2 cancel down to a KL of kl / tau^2: their 1e-7 each comes back times tau^2
    assert loss_of(student, teacher, distill="soft", alpha=alpha,
                   tau=tau).item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_hard_loss_is_cross_entropy_with_the_teachers_top_class(student, teacher, alpha):
    x = images(BATCH)
    own = outputs(student, x)
    choice = [max(range(CLASSES), key=row.__getitem__) for row in outputs(teacher, x)]
    wanted = (1 - alpha) * mean_ce(own, TARGETS) + alpha * mean_ce(own, choice)
    assert choice != TARGETS
    # float32
    assert loss_of(student, teacher, distill="hard", alpha=alpha).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_distillation_the_loss_is_cross_entropy_with_label_smoothing(student, smoothing):
    own = outputs(student, images(BATCH))
    spread = -sum(sum(log_softmax(row)) / CLASSES for row in own) / BATCH
    wanted = (1 - smoothing) * mean_ce(own, TARGETS) + smoothing * spread
    assert loss_of(student, None, distill="none", smoothing=smoothing).item() == pytest.approx(wanted, rel=1e-5)


def test_a_student_that_is_its_teacher_has_no_distillation_loss():
    model, twin = tiny(num_classes=CLASSES, seed=3), tiny(num_classes=CLASSES, seed=3)
    # rounding of float32 log-probabilities, times tau^2 = 400
    assert abs(loss_of(model, twin, distill="soft", alpha=1.0, tau=20.0).item()) < 1e-4


@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_the_teacher_sees_images_in_its_own_mean_and_deviation(student, teacher, distill):
    x, (mean, std) = images(BATCH), (0.3, 0.2)
    as_theirs = ((x * 0.5 + 0.5) - mean) / std                  # the student's normalisation undone, then the teacher's
    wanted = loss_of(student, _Fixed(teacher, as_theirs), x, distill=distill, alpha=1.0)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (mean,) * 3, "std": (std,) * 3}
    # as above
    torch.testing.assert_close(loss_of(student, teacher, x, distill=distill, alpha=1.0), wanted, rtol=1e-4, atol=1e-4)


class _Fixed(torch.nn.Module):
    """A teacher that answers as `model` does for x, whatever it is given."""

    def __init__(self, model, x) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.pretrained_cfg = model.num_classes, model.in_chans, model.pretrained_cfg
        self.answer = torch.nn.Parameter(model(x).detach())

    def forward(self, x):
        return self.answer


@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_the_teacher_gets_no_gradient_and_the_student_does(teacher, distill):
    student, _ = compressed(CLASSES)
    loss_of(student, teacher, distill=distill, alpha=0.5).backward()
    assert all(p.grad is None for p in teacher.parameters())
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_the_teacher_stays_in_eval_mode_while_the_student_trains(student, teacher, distill):
    task = make_task(student, teacher, small_recipe(distill=distill), CPU).train()
    assert student.training and not any(m.training for m in teacher.modules())
    task(images(BATCH), torch.tensor(TARGETS))
    assert not any(m.training for m in teacher.modules())


@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_a_missing_teacher_is_refused_naming_the_recipe(student, distill):
    with pytest.raises(InputError, match=rf"recipe test distils \({distill}\); a teacher is needed"):
        make_task(student, None, small_recipe(distill=distill), CPU)


@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_a_teacher_of_other_classes_is_refused_with_both_counts(student, distill):
    with pytest.raises(InputError, match="teacher has 11 classes, the student 7"):
        make_task(student, tiny(num_classes=11), small_recipe(distill=distill), CPU)


# ---------------------------------------------------------------- a class for each pixel

SMALLER = (21, 37)                                              # of images: padded by the model, and cropped again


def pixels(model, x) -> list[list[float]]:
    """The logits of every pixel of every image."""
    with torch.no_grad():
        return model(x).double().permute(0, 2, 3, 1).flatten(0, 2).tolist()


def pixel_loss(student, teacher, targets, **settings) -> torch.Tensor:
    """In eval mode: the decoder's dropout would stand between the loss and its formula."""
    task = make_task(student, teacher, small_recipe(**settings), CPU).eval()
    return task(pictures(2, SMALLER), targets)["loss"]


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer", "queries"])
@pytest.mark.parametrize("alpha, tau", [(0.8, 20.0), (1.0, 4.0), (0.5, 1.0)])
def test_soft_loss_of_pixels_is_the_formula_of_a8_with_the_mean_over_pixels(decoder, alpha, tau):
    student, teacher, targets = small(decoder, seed=1), small(decoder, seed=2), masks(2, SMALLER)
    own, theirs, truth = *(pixels(m, pictures(2, SMALLER)) for m in (student, teacher)), targets.flatten().tolist()
    kl = 0.0
    # of every pixel, also those to be ignored: the teacher knows them
    for s, t in zip(own, theirs):
        kl += sum(math.exp(log_t) * (log_t - log_s) for log_s, log_t in zip(log_softmax(s, tau), log_softmax(t, tau)))
    counted = [(row, t) for row, t in zip(own, truth) if t != 255]
    assert len(own) == 2 * 21 * 37 > len(counted) and kl > 1
    wanted = (1 - alpha) * mean_ce(*zip(*counted)) + alpha * tau**2 * kl / (len(own) * PIXEL_CLASSES)
    # float32 log-probabilities: as for images, above
    assert pixel_loss(student, teacher, targets, distill="soft", alpha=alpha,
                      tau=tau).item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_hard_loss_of_pixels_is_cross_entropy_with_the_teachers_class_of_each_pixel():
    student, teacher, targets = small(seed=1), small(seed=2), masks(2, SMALLER)
    own, theirs = (pixels(m, pictures(2, SMALLER)) for m in (student, teacher))
    choice = [max(range(PIXEL_CLASSES), key=row.__getitem__) for row in theirs]
    counted = [(row, t) for row, t in zip(own, targets.flatten().tolist()) if t != 255]
    wanted = 0.6 * mean_ce(*zip(*counted)) + 0.4 * mean_ce(own, choice)
    # float32
    assert pixel_loss(student, teacher, targets, distill="hard", alpha=0.4).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_of_pixels_leaves_out_those_to_be_ignored(smoothing):
    student, targets = small(), masks(2, SMALLER)
    counted = [(row, t) for row, t in zip(pixels(student, pictures(2, SMALLER)), targets.flatten().tolist())
               if t != 255]
    spread = -sum(sum(log_softmax(row)) / PIXEL_CLASSES for row, _ in counted) / len(counted)
    wanted = (1 - smoothing) * mean_ce(*zip(*counted)) + smoothing * spread
    # float32
    assert pixel_loss(student, None, targets, smoothing=smoothing).item() == pytest.approx(wanted, rel=1e-5)
    other = torch.where(targets == 255, 255, 0)                 # and says something
    assert pixel_loss(student, None, other, smoothing=smoothing).item() != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("settings",
                         [{}, {"smoothing": 0.1}, {"distill": "soft", "alpha": 0.8}, {"distill": "hard", "alpha": 0.8}],
                         ids=str)
def test_a_batch_whose_pixels_are_all_ignored_has_no_cross_entropy_and_finite_gradients(settings):
    student, teacher = small(seed=1), small(seed=2)
    nothing = torch.full((2, *SMALLER), 255)
    task = make_task(student, teacher, small_recipe(**settings), CPU).eval()
    found = task(pictures(2, SMALLER), nothing)
    found["loss"].backward()
    assert float(found.get("task_loss", found["loss"]).detach()) == 0
    assert (float(found["loss"].detach()) > 0) == ("distill" in settings)
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_the_teacher_of_pixels_sees_images_in_its_own_mean_and_deviation_and_gets_no_gradient():
    student, teacher, x, targets = small(seed=1), small(seed=2), pictures(2, SMALLER), masks(2, SMALLER)
    as_theirs = ((x * 0.5 + 0.5) - 0.3) / 0.2                   # the student's normalisation undone, then the teacher's
    with torch.no_grad():
        expected = (teacher(as_theirs) / 4).log_softmax(1).double()
        own = (student(x) / 4).log_softmax(1).double()
    wanted = 16 * float((expected.exp() * (expected - own)).sum()) / (2 * 21 * 37 * PIXEL_CLASSES)
    teacher.encoder.pretrained_cfg = {**teacher.encoder.pretrained_cfg, "mean": (0.3,) * 3, "std": (0.2,) * 3}
    loss = pixel_loss(student, teacher, targets, distill="soft", alpha=1.0, tau=4.0)
    assert loss.item() == pytest.approx(wanted, rel=1e-4)       # float32 log-probabilities
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("mixed", ["mixup", "cutmix"])
def test_a_recipe_that_mixes_images_is_refused_where_there_are_masks(mixed):
    with pytest.raises(InputError, match="recipe test mixes images .*which masks can't follow; one without is needed"):
        make_task(small(), None, small_recipe(**{mixed: 0.5}), CPU)


@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_a_teacher_of_another_task_or_of_other_classes_is_refused(distill):
    for student, teacher in ((small(), tiny(num_classes=PIXEL_CLASSES)), (tiny(num_classes=PIXEL_CLASSES), small())):
        with pytest.raises(InputError, match="the teacher and the student are of different tasks"):
            make_task(student, teacher, small_recipe(distill=distill), CPU)
    with pytest.raises(InputError, match="the teacher has 3 classes, the student 5"):
        make_task(small(), small(num_classes=3), small_recipe(distill=distill), CPU)


# ---------------------------------------------------------------- grey images

@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_a_teacher_of_grey_images_sees_them_in_the_mean_of_its_means_and_deviations(distill):
    student, teacher = (tiny(num_classes=CLASSES, seed=seed, in_chans=1) for seed in (1, 2))
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1, 0.2, 0.6), "std": (0.1, 0.2, 0.3)}
    x, seen = images(BATCH)[:, :1], []
    teacher.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    loss_of(student, teacher, x, distill=distill).backward()
    torch.testing.assert_close(seen[0], (x * 0.5 + 0.5 - 0.3) / 0.2)


def test_a_teacher_of_other_channels_is_refused(student):
    with pytest.raises(InputError, match="teacher takes images of 1 channels, the student of 3"):
        make_task(student, tiny(num_classes=CLASSES, in_chans=1), small_recipe(distill="soft"), CPU)
