"""The loss of a decoder by queries against loops over pixels and all ways to give classes to queries."""
import itertools
import math

import pytest
import torch
from segmenting_fixtures import SIZE, masks, pictures, small, units_plan

from vitlab.data.layouts import IGNORE
from vitlab.models import compress
from vitlab.runtime.files import InputError
from vitlab.training import answers
from vitlab.training.distillation import DistillationTask, make_task
from vitlab.training.recipes import recipe

EXACT = 1e-6                    # float32: the order of the sums
PATCH, CELL = (8, 8), 2         # a patch has 4 x 4 cells, a cell 2 x 2 pixels
CPU = torch.device("cpu")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_apart(mask: list[list[float]], truth: list[list[int]], k: int, terms: tuple[str, ...]) -> float:
    """Of one query's mask, a logit a cell, and class k: mean binary cross-entropy of the pixels that count, times 5,
    and dice of them, times 5, with sums in cells and 1 added above and below."""
    cross, both, said, is_class, count = 0.0, 0.0, 0.0, 0, 0
    for i, row in enumerate(truth):
        for j, of in enumerate(row):
            if of != IGNORE:
                p = sigmoid(mask[i // CELL][j // CELL])
                cross -= math.log(p if of == k else 1 - p)
                both, said, is_class, count = both + p * (of == k), said + p, is_class + (of == k), count + 1
    dice = 1 - (2 * both / CELL**2 + 1) / (said / CELL**2 + is_class / CELL**2 + 1)
    return 5 * cross / count * ("mask" in terms) + 5 * dice * ("dice" in terms)


def slow_loss(classes: torch.Tensor, cells: torch.Tensor, truth: torch.Tensor,
              terms: tuple[str, ...] = ("class", "mask", "dice")) -> float:
    """Of one image and one block: every way to give the classes queries of their own is tried, the cheapest taken.
    terms: those that count in the loss, not in the choice."""
    queries, none = len(classes), classes.shape[1] - 1
    p = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in classes.tolist()]
    present = sorted(set(truth.flatten().tolist()) - {IGNORE})
    far = {(q, k): slow_apart(cells[q].tolist(), truth.tolist(), k, ("mask", "dice"))
           for q in range(queries) for k in present}
    ways = itertools.permutations(range(queries), len(present)) if len(present) <= queries else [
        [order.index(k) if k in order else None for k in present] for order in itertools.permutations(present, queries)]
    best = min(ways, key=lambda way: sum(far[q, k] - 2 * p[q][k] for q, k in zip(way, present) if q is not None))
    given = {q: k for q, k in zip(best, present) if q is not None}
    weights = [1 if q in given else 0.1 for q in range(queries)]
    told = -sum(w * math.log(p[q][given.get(q, none)]) for q, w in enumerate(weights)) / sum(weights)
    mask = sum(slow_apart(cells[q].tolist(), truth.tolist(), k, terms) for q, k in given.items())
    return 2 * told * ("class" in terms) + mask / len(present)


def said(queries: int, count: int = 2, classes: int = 5, blocks: int = 2, seed: int = 0) -> list[tuple]:
    """What queries say of images of 24 x 40 in so many blocks, at random."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(count, queries, classes + 1, generator=generator, requires_grad=True),
             (2 * torch.randn(count, queries, 12, 20, generator=generator)).requires_grad_()) for _ in range(blocks)]


def wanted(given: list[tuple], truths: torch.Tensor, **terms) -> float:
    return sum(slow_loss(classes[b], cells[b], truth, **terms) for classes, cells in given
               for b, truth in enumerate(truths)) / len(truths)


@pytest.mark.parametrize("queries, classes", [(5, 3), (3, 3), (3, 5), (4, 1)])
def test_the_loss_is_the_cheapest_of_all_ways_to_give_classes_to_queries(queries, classes):
    truths = masks(2, (21, 37), classes=classes)                # padded to 24 x 40: what pads counts for nothing
    given = said(queries)
    found = answers.loss_of(given, truths, PATCH).item()
    assert found == pytest.approx(wanted(given, truths), rel=EXACT)
    # images count alike, however they come in batches
    each = [answers.loss_of([(c[b:b + 1], m[b:b + 1]) for c, m in given], truths[b:b + 1], PATCH) for b in range(2)]
    assert found == pytest.approx(sum(each).item() / 2, rel=EXACT)


@pytest.mark.parametrize("left_out, name", [("class", "CLASS"), ("mask", "MASK"), ("dice", "DICE")])
def test_each_term_counts(monkeypatch, left_out, name):
    truths, given = masks(1, classes=2), said(4, count=1, blocks=1)
    terms = tuple(term for term in ("class", "mask", "dice") if term != left_out)
    assert wanted(given, truths, terms=terms) < 0.99 * wanted(given, truths)
    monkeypatch.setattr(answers, name, 0.0)
    assert answers.loss_of(given, truths, PATCH).item() < 0.99 * wanted(given, truths)


def test_pixels_to_be_ignored_have_no_part():
    truths = masks(2)
    truths[:, :8], truths[:, :, 30:] = IGNORE, IGNORE           # whole cells, and pixels here and there
    given = said(6)
    loss = answers.loss_of(given, truths, PATCH)
    loss.backward()
    for _, cells in given:
        assert not cells.grad[:, :, :4].any() and not cells.grad[:, :, :, 15:].any() and cells.grad[:, :, 4:, :15].any()
    other = [(classes, torch.cat([cells[:, :, :4] * 3 - 1, cells[:, :, 4:]], dim=2)) for classes, cells in given]
    assert answers.loss_of(other, truths, PATCH).item() == loss.item()


def test_an_image_without_a_pixel_that_counts_trains_nothing():
    truths, given = masks(2), said(6)
    half = [(classes[:1], cells[:1]) for classes, cells in given]
    truths[1] = IGNORE
    loss = answers.loss_of(given, truths, PATCH)
    assert loss.item() == pytest.approx(answers.loss_of(half, truths[:1], PATCH).item() / 2, rel=EXACT)
    loss.backward()
    for part in (part for answer in given for part in answer):
        assert part.grad[0].any() and not part.grad[1].any()
    model = small("queries")
    task = make_task(model, None, recipe("digit_scenes"), CPU).train()
    task(pictures(2), torch.full((2, *SIZE), IGNORE))["loss"].backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("odd", [5, 6, -1])
def test_a_class_that_the_decoder_has_not_is_refused_and_not_taken_for_none(odd):
    truths = masks(2)
    truths[1, 3, 7] = odd
    with pytest.raises(InputError, match=f"^a mask holds class {odd}; the decoder has 5, from 0 on$"):
        answers.loss_of(said(6), truths, PATCH)


def test_what_is_not_finite_is_told_and_no_error():
    given = said(4, count=1)
    with torch.no_grad():
        given[0][1][0, 0, 0, 0] = math.nan
    assert not answers.loss_of(given, masks(1), PATCH).isfinite()


def test_a_segmenter_by_queries_is_trained_by_what_these_say_in_each_block_dense_and_cut():
    """Without a teacher; with one, by pixels, as the teacher's distance is of these."""
    chosen, truth = recipe("digit_scenes"), masks(2)
    truth[:, :, :20], truth[:, :, 20:] = 1, 4
    dense = small("queries", depth=2)
    for model in (dense, compress(dense, units_plan(dense))):
        task, x = make_task(model, None, chosen, CPU).train(), pictures(2)
        first = task(x, (truth, torch.tensor(0.0)))["loss"].item()
        assert first == pytest.approx(answers.loss_of(model(x, answers=True), truth, PATCH).item(), rel=EXACT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            loss = task(x, truth)["loss"]
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in model.parameters())          # as several processes need
            optimizer.step()
        assert loss.item() < 0.3 * first
        with torch.inference_mode():
            assert (model(x).argmax(dim=1) == truth).double().mean() > 0.9
    soft = make_task(dense, small("queries", seed=1, depth=2), chosen.replace(distill="soft", alpha=0.5), CPU)
    assert isinstance(soft, DistillationTask) and soft(x, truth)["loss"].isfinite()
