"""The training losses against the formulas of methods A8, written out number by number."""
import math

import pytest
import torch
from training_fixtures import compressed, images, one_thread, small_recipe, tiny  # noqa: F401

from vitlab.files import InputError
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
    assert loss_of(student, teacher, distill="soft", alpha=alpha, tau=tau).item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_hard_loss_is_cross_entropy_with_the_teachers_top_class(student, teacher, alpha):
    x = images(BATCH)
    own = outputs(student, x)
    choice = [max(range(CLASSES), key=row.__getitem__) for row in outputs(teacher, x)]
    wanted = (1 - alpha) * mean_ce(own, TARGETS) + alpha * mean_ce(own, choice)
    assert choice != TARGETS
    assert loss_of(student, teacher, distill="hard", alpha=alpha).item() == pytest.approx(wanted, rel=1e-5)     # float32


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
    torch.testing.assert_close(loss_of(student, teacher, x, distill=distill, alpha=1.0), wanted, rtol=1e-4, atol=1e-4)  # as above


class _Fixed(torch.nn.Module):
    """A teacher that answers as `model` does for x, whatever it is given."""

    def __init__(self, model, x) -> None:
        super().__init__()
        self.num_classes, self.pretrained_cfg = model.num_classes, model.pretrained_cfg
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
