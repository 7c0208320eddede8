"""What a step minimises: timm's tasks, set to the published loss (methods A8), and hard distillation."""
from functools import partial

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, LogitDistillationTask
from torch import Tensor, nn

from vitlab.measure.distance import Features, cross_entropy, output_of
from vitlab.measure.evaluate import each_divergence
from vitlab.models.queries import QueryDecoder
from vitlab.models.segmenter import Segmenter
from vitlab.models.support import classes_of
from vitlab.runtime.files import InputError, require
from vitlab.training.answers import AnswersTask, loss_of
from vitlab.training.recipes import Recipe


class DistillationTask(LogitDistillationTask):
    """timm's soft distillation, of images (B, K) or of pixels (B, K, H, W), of which the KL's mean is taken; in float32
    also under autocast, where log-probabilities at a high temperature differ by less than bf16 can say (a CPU's does
    not see to it). Or, if `hard`, with the teacher's top class (Touvron et al., arXiv 2012.12877, equation 3, on the
    student's one output):

        loss = (1 - alpha) * CE(student, label) + alpha * CE(student, teacher's top class)
    """

    hard = False

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits = self.trainable_module(input)
        with torch.no_grad():
            expected = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        task = self.criterion(logits, target)
        if self.hard:
            distill = F.cross_entropy(logits, expected.argmax(dim=1))
        else:
            given, expected = ((each.float() / self.temperature).log_softmax(dim=1) for each in (logits, expected))
            distill = each_divergence(given, expected).sum() / len(logits) * self.temperature**2
        loss = self.task_loss_weight * task + self.distill_loss_weight * distill
        return {"loss": loss, "output": logits, "task_loss": task, "kd_loss": distill}


class FeatureTask(LogitDistillationTask):
    """timm's distillation, of features: the loss is the mean distance to the teacher's (`output_of`), in float32."""

    features: Features

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        given, prefix = self.trainable_module(input), getattr(self.teacher.model, "num_prefix_tokens", 0)
        with torch.no_grad():
            expected = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        loss = self.features.apart(*(self.features.compared(self.features.taken(each, prefix).float())
                                     for each in (given, expected))).mean()
        return {"loss": loss, "output": given, "kd_loss": loss}


def of_pixels(logits: Tensor, targets: Tensor | tuple[Tensor, Tensor], smoothing: float) -> Tensor:
    """Cross-entropy of a batch of masks (B, H, W), 0 where no pixel counts. targets: the masks; or, of one batch of a
    step of several, (masks, the pixels that count in a batch, the mean over the step's ()): then the mean of these
    losses is that over all pixels of the step, however many each batch has."""
    masks, mean = targets if isinstance(targets, tuple) else (targets, None)
    return cross_entropy(logits, masks, smoothing, None if mean is None else mean.to(logits.device, torch.float32))


def make_task(model: nn.Module, teacher: nn.Module | None, recipe: Recipe, device: torch.device) -> nn.Module:
    """The training task of a recipe. Soft (A8): (1 - alpha) * CE + alpha * tau^2 * KL(teacher || student at tau) / (B *
    classes); timm's task divides by B, so its weight is alpha / classes. Of a Segmenter the loss is the mean over
    pixels, those to be ignored left out of the cross-entropy (`of_pixels`), or, by queries and without a teacher, that
    of matched queries (`answers.loss_of`). Without a classifier it is the distance to the teacher's features alone,
    whatever the recipe's alpha and tau. Raises InputError where the teacher is missing, or differs in classes, task,
    features or channels, or a recipe mixes images that have masks.
    """
    features = not output_of(model).labelled
    require(not features or recipe.distill == "soft", f"recipe {recipe.name} has distill {recipe.distill!r}; the model "
            "has no classifier and learns the teacher's features, which is \"soft\"")
    dense = isinstance(model, Segmenter)
    if dense and (recipe.mixup or recipe.cutmix):
        raise InputError(f"recipe {recipe.name} mixes images (mixup, cutmix), which masks can't follow; one without is "
                         f"needed")
    if isinstance(getattr(model, "decoder", None), QueryDecoder) and recipe.distill == "none":
        criterion = partial(loss_of, patch=tuple(model.patch_embed.patch_size), smoothing=recipe.smoothing)
        return AnswersTask(model, criterion, device=device, verbose=False)
    if dense:
        criterion = partial(of_pixels, smoothing=recipe.smoothing)
    elif recipe.mixup or recipe.cutmix:         # targets are probabilities, smoothed already
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(recipe.smoothing) if recipe.smoothing else nn.CrossEntropyLoss()
    if recipe.distill == "none":
        return ClassificationTask(model, criterion, device=device, verbose=False)
    require(teacher is not None, f"recipe {recipe.name} distils ({recipe.distill}); a teacher is needed")
    if teacher.num_classes != model.num_classes:
        raise InputError(f"the teacher has {teacher.num_classes} classes, the student {model.num_classes}")
    require(isinstance(teacher, Segmenter) is dense, "the teacher and the student are of different tasks: one gives a "
            "class for each pixel, the other for each image")
    if dense and teacher.img_size != model.img_size:
        raise InputError("the teacher is for images of {} x {}, the student for {} x {}; they see the same".format(
            *teacher.img_size, *model.img_size))
    given, learned = ((type(output_of(each)), classes_of(each) or each.num_features) if features else (None, 0)
                      for each in (teacher, model))
    if given != learned:
        raise InputError(f"the teacher gives {given[1]} features, pooled by {teacher.global_pool!r}, the student "
                         f"{learned[1]}, pooled by {model.global_pool!r}; they are compared one by one")
    require(teacher.in_chans == model.in_chans, f"the teacher takes images of {teacher.in_chans} channels, the student "
            f"of {model.in_chans}; they see the same")
    hard = recipe.distill == "hard"
    kind = FeatureTask if features else DistillationTask
    task = kind(model, teacher.to(device).requires_grad_(False), criterion, temperature=recipe.tau,
                task_loss_weight=1 - recipe.alpha, device=device, verbose=False,
                distill_loss_weight=recipe.alpha if hard else recipe.alpha / max(1, model.num_classes))
    task.hard, task.features = hard, output_of(model)
    if model.in_chans == 1:                     # grey images, as `image_config` normalises them
        for owner, names in ((task, ("student_mean", "student_std")), (task.teacher, ("mean_kd", "std_kd"))):
            for name in names:
                setattr(owner, name, getattr(owner, name).mean(dim=1, keepdim=True))
    return task
