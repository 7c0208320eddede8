"""evaluate against slow loops written from the definitions of top-k and cross-entropy."""
import math

import pytest
import torch
from torch import nn
from training_fixtures import one_thread, tiny, write_folder  # noqa: F401

from vitlab.data import open_data
from vitlab.measure.evaluate import evaluate
from vitlab.runtime.files import InputError


class Stub(nn.Module):
    """Logits = W @ the image's 3 x 2 x 2 numbers; remembers the mode it ran in."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 12, generator=torch.Generator().manual_seed(classes)))
        self.modes: set[bool] = set()

    def forward(self, x):
        self.modes.add(self.training)
        return x.flatten(1) @ self.weight.T


class ListBatches(list):
    """What evaluate needs of Batches: iteration, and the paths of broken images."""

    broken: list[str] = []


def make(classes: int, sizes=(7, 7, 3)) -> ListBatches:
    generator = torch.Generator().manual_seed(1)
    return ListBatches((torch.randn(n, 3, 2, 2, generator=generator), torch.randint(classes, (n,), generator=generator))
                       for n in sizes)


def oracle(model: Stub, batches: ListBatches) -> tuple[float, float, float, float, float]:
    """(top-1 %, top-5 %, mean cross-entropy, standard errors of the first and the last), image by image in Python's own
    floats."""
    top1 = top5 = count = 0
    losses = []
    for images, targets in batches:
        for image, target in zip(images.tolist(), targets.tolist()):
            pixels = [v for channel in image for row in channel for v in row]
            logits = [sum(w * v for w, v in zip(row, pixels)) for row in model.weight.tolist()]
            above = sum(z > logits[target] for z in logits)
            top1, top5, count = top1 + (above == 0), top5 + (above < 5), count + 1
            losses.append(math.log(sum(math.exp(z) for z in logits)) - logits[target])
    loss, p = sum(losses) / count, (top1 + 2) / (count + 4)
    return (100 * top1 / count, 100 * top5 / count, loss, 100 * math.sqrt(p * (1 - p) / (count + 4)),
            math.sqrt(sum((v - loss) ** 2 for v in losses) / (count - 1) / count))


@pytest.mark.parametrize("classes", [5, 11])
def test_top1_top5_and_loss_are_the_loops_with_an_uneven_last_batch(classes):
    model, batches = Stub(classes), make(classes)
    result = evaluate(model, batches, progress=False)
    top1, top5, loss, top1_se, loss_se = oracle(model, batches)
    assert result.top1_pct == pytest.approx(top1, abs=1e-9) and result.top5_pct == pytest.approx(top5, abs=1e-9)
    assert result.loss == pytest.approx(loss, rel=1e-5)         # float32 logits of 12 terms
    assert result.top1_se == pytest.approx(top1_se) and result.loss_se == pytest.approx(loss_se, rel=1e-5)
    assert result.images == 17 and result.broken == 0
    assert 0 < top1 < 100                                       # the set tells right from wrong


def test_the_result_does_not_depend_on_how_images_are_batched():
    model, batches = Stub(7), make(7)
    images, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    single = ListBatches((images[i:i + 1], targets[i:i + 1]) for i in range(17))
    a, b = evaluate(model, batches, progress=False), evaluate(model, single, progress=False)
    assert (a.top1_pct, a.top5_pct, a.images) == (b.top1_pct, b.top5_pct, b.images)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)            # the order of a float32 sum


@pytest.mark.parametrize("classes", [2, 4])
def test_fewer_than_five_classes_have_no_top5(classes):
    assert evaluate(Stub(classes), make(classes), progress=False).top5_pct is None


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_eval_mode_and_gets_its_own_mode_back(training):
    model = Stub(5).train(training)
    evaluate(model, make(5), progress=False)
    assert model.modes == {False} and model.training is training


def test_the_distance_is_the_mean_divergence_from_the_dense_models_output():
    model, dense, batches = Stub(5), Stub(5), make(5)
    with torch.no_grad():
        dense.weight.mul_(0.5)
    result, each = evaluate(model, batches, dense=dense.train(), progress=False), []
    for images, _ in batches:
        for image in images.flatten(1).double():
            p, q = ((net.weight.double() @ image).exp() for net in (dense, model))
            p, q = (p / p.sum()).tolist(), (q / q.sum()).tolist()
            each.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
    mean = sum(each) / len(each)
    assert result.distill_loss == pytest.approx(mean, rel=1e-4) and mean > 0.1                  # float32 logarithms
    assert result.distill_loss_se == pytest.approx(math.sqrt(sum((v - mean) ** 2
                                                                 for v in each) / (len(each) - 1) / len(each)),
                                                   rel=1e-4)
    assert evaluate(model, batches, dense=model, progress=False).distill_loss == 0
    assert evaluate(model, batches, progress=False).distill_loss is None


def test_evaluate_leaves_no_gradient_and_does_not_change_the_weights():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = ListBatches([(torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
                            torch.arange(5) % 3)])
    evaluate(model, batches, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_broken_images_are_counted_apart_and_not_as_wrong(tmp_path):
    write_folder(tmp_path, {"val": 2})
    bad = tmp_path / "val" / "bee" / "bad.png"
    model = tiny()
    clean = evaluate(model, open_data(tmp_path).batches("val", model, workers=0), progress=False)
    bad.write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="bad.png"):
        result = evaluate(model, open_data(tmp_path).batches("val", model, workers=0), progress=False)
    assert (result.images, result.broken) == (6, 1) and (clean.images, clean.broken) == (6, 0)
    assert (result.top1_pct, result.loss) == (clean.top1_pct, pytest.approx(clean.loss, rel=1e-6))


def test_a_split_where_no_image_can_be_read_is_refused_and_the_mode_is_given_back(tmp_path):
    write_folder(tmp_path, {"val": 1})
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    model = tiny().train()
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no image of the split could be read"):
        evaluate(model, open_data(tmp_path).batches("val", model, workers=0), progress=False)
    assert model.training


@pytest.mark.parametrize("targets", [torch.rand(3, 5), torch.ones(3, 5, dtype=torch.long), torch.rand(3)])
def test_targets_of_several_labels_an_image_are_refused(targets):
    with pytest.raises(InputError, match="targets are .*one class number an image.*several labels an image are not"):
        evaluate(Stub(5), ListBatches([(torch.rand(3, 3, 2, 2), targets)]), progress=False)
