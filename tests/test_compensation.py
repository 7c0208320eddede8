"""Compensation of cuts against numpy's least squares, and the greedy elimination against brute force."""
import numpy as np
import pytest
import torch
from training_fixtures import full_plan, images, logits, one_thread, tiny  # noqa: F401

from vitlab.criteria.compensation import Moments, columns, elimination_order, reconstruction, refit
from vitlab.files import InputError
from vitlab.models import attention_block, compress, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.rules import Select
from vitlab.training.compensate import compensate

ROWS, UNITS, WIDTH, OUT = 211, 7, 3, 5
FLOAT32 = 1e-4          # inputs are gathered in float32: products of 211 rows of correlated numbers agree to some 1e-6 of their size


def layer(width: int = WIDTH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs with means (rows, K), and a weight (D, K)."""
    generator = torch.Generator().manual_seed(seed)
    size = UNITS * width
    mixed = torch.randn(ROWS, size, generator=generator) @ torch.randn(size, size, generator=generator) / size**0.5
    return mixed + torch.randn(size, generator=generator), torch.randn(OUT, size, generator=generator)


def gathered(x: torch.Tensor, parts: int = 1) -> Moments:
    moments = Moments(x.shape[-1])
    for part in x.chunk(parts):
        moments.add(part)
    return moments


def error(x: torch.Tensor, weight: torch.Tensor, kept: list[int], width: int) -> float:
    """Mean squared error of the best linear map with a bias from the kept inputs to the layer's output, by numpy."""
    inputs = [unit * width + i for unit in kept for i in range(width)]
    design = np.column_stack([x[:, inputs].double().numpy(), np.ones(len(x))])
    target = (x.double() @ weight.double().T).numpy()
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    return float(((design @ found - target) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("kept", [[0, 2, 3, 6], [5], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("width", [1, WIDTH])
def test_refit_is_least_squares_with_a_bias(kept, width):
    x, weight = layer(width)
    new, gained = refit(weight, gathered(x), torch.tensor(kept), width, ridge=0.0)
    inputs = columns(torch.tensor(kept), width)
    design = np.column_stack([x[:, inputs].double().numpy(), np.ones(len(x))])
    found = np.linalg.lstsq(design, (x.double() @ weight.double().T).numpy(), rcond=None)[0]
    assert np.allclose(new.double().numpy(), found[:-1].T, atol=FLOAT32 * np.abs(found).max())
    assert np.allclose(gained.double().numpy(), found[-1], atol=FLOAT32 * np.abs(found).max())


def test_refit_with_nothing_cut_changes_nothing():
    x, weight = layer()
    new, gained = refit(weight, gathered(x), torch.arange(UNITS), WIDTH)
    assert torch.equal(new, weight) and not gained.any()


def test_moments_of_batches_are_those_of_one_batch():
    x = layer()[0].reshape(-1, 1, UNITS * WIDTH)                                # (rows, 1, K): leading dimensions are rows
    once, parts = gathered(x), gathered(x, 4)
    assert once.rows == parts.rows == ROWS
    assert torch.allclose(once.mean, parts.mean, rtol=1e-6)
    assert torch.allclose(once.covariance(0), parts.covariance(0), rtol=1e-4, atol=1e-6)
    assert np.allclose(once.covariance(0).numpy(), np.cov(x[:, 0].double().numpy().T, bias=True), atol=1e-5)


def test_ridge_pulls_the_refit_towards_the_weights_as_they_were():
    x, weight = layer()
    kept = torch.tensor([0, 2, 3, 6])
    far, near = (refit(weight, gathered(x), kept, WIDTH, ridge=r)[0] - weight[:, columns(kept, WIDTH)] for r in (1e-6, 10.0))
    assert near.norm() < 0.5 * far.norm()


@pytest.mark.parametrize("width", [1, WIDTH])
def test_each_eliminated_unit_is_the_one_that_least_squares_misses_least(width):
    x, weight = layer(width)
    order = elimination_order(weight, gathered(x), width, ridge=0.0, at_once=1).tolist()
    assert sorted(order) == list(range(UNITS))
    there = list(range(UNITS))
    for unit in order[:-1]:                                                     # the last has no other to be compared with
        losses = {u: error(x, weight, [v for v in there if v != u], width) for u in there}
        assert losses[unit] <= min(losses.values()) * (1 + 1e-3)                # float32 moments: near ties may fall either way
        there.remove(unit)


def test_a_unit_that_repeats_another_goes_early_however_large_it_is():
    x, weight = layer(1)
    x[:, 3] = x[:, 5]
    weight[:, 3] = 100.0
    scores = reconstruction(weight, gathered(x))
    assert scores[[3, 5]].min() == 0 and scores.max() == 1 and len(set(scores.tolist())) == UNITS


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images(16, seed), torch.zeros(16, dtype=torch.long)) for seed in range(count)]


def select_plan(model) -> CompressionPlan:
    rules = (Select(kept=9), None)
    return CompressionPlan(shape=shape_of(model), blocks=tuple(
        BlockPlan(heads=(0, 2), neurons=tuple(range(0, 96, 3)), tokens=rule) for rule in rules))


@pytest.mark.parametrize("make", [full_plan, select_plan])
def test_compensation_brings_the_output_nearer_to_the_same_model_with_all_units(make):
    dense = tiny()
    plan = make(dense)
    whole = CompressionPlan(shape=plan.shape, blocks=tuple(BlockPlan(tokens=block.tokens) for block in plan.blocks))
    wanted, x = logits(compress(dense, whole)), images()
    cut, refitted = (float((logits(model, x) - wanted).norm()) for model in
                     (compress(dense, plan), compensate(dense, plan, batches(), progress=False)))
    assert refitted < 0.75 * cut


def test_compensation_of_a_plan_that_cuts_no_unit_is_compress():
    dense = tiny()
    whole = CompressionPlan(shape=shape_of(dense), blocks=(BlockPlan(tokens=Select(kept=9)), BlockPlan()))
    assert torch.equal(logits(compensate(dense, whole, batches(), progress=False)), logits(compress(dense, whole)))


def test_the_first_refit_layer_is_least_squares_on_its_own_inputs():
    dense = tiny()
    kept = (1, 5, 40)
    plan = CompressionPlan(shape=shape_of(dense), blocks=(BlockPlan(neurons=kept), BlockPlan()))
    found, hidden = compensate(dense, plan, batches(), ridge=0.0, progress=False), []
    fc2 = attention_block(dense.blocks[0]).mlp.fc2
    handle = fc2.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0].flatten(0, 1)))
    for x, _ in batches():
        logits(dense, x)
    handle.remove()
    h = torch.cat(hidden).double()
    design = np.column_stack([h[:, kept].numpy(), np.ones(len(h))])
    wanted = (h @ fc2.weight.detach().double().T + fc2.bias.detach().double()).numpy()
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    own = found.blocks[0].mlp.fc2
    assert np.allclose(own.weight.detach().numpy(), solution[:-1].T, atol=1e-3 * np.abs(solution).max())    # float32 moments
    assert np.allclose(own.bias.detach().numpy(), solution[-1], atol=1e-3 * np.abs(solution).max())


def test_compensation_without_images_is_refused():
    dense = tiny()
    with pytest.raises(InputError, match="block 0: no inputs were gathered"):
        compensate(dense, full_plan(dense), [], progress=False)
