"""Compensation of cuts against numpy's least squares, and the greedy elimination against brute force."""
import dataclasses
import functools

import numpy as np
import pytest
import torch
from segmenting_fixtures import pictures, small, units_plan
from training_fixtures import full_plan, images, logits, one_thread, tiny  # noqa: F401

from vitlab.criteria.compensation import RIDGE, choose_ridge, columns, elimination_order, reconstruction, refit
from vitlab.criteria.moments import COLUMNS, Moments
from vitlab.measure.moments import Fisher, each_moments
from vitlab.models import attention_block, compress, shape_of
from vitlab.models.families import mixing_layer
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut, Select, SharedUpdate
from vitlab.plan.tokens import shared
from vitlab.runtime.files import InputError
from vitlab.training import compensate as module
from vitlab.training.compensate import SMALL_GAMMA, Walk, compensate, dense_rows
from vitlab.training.self_distillation import Divergence

ROWS, UNITS, WIDTH, OUT = 211, 7, 3, 5
# inputs are gathered in float32: products of 211 rows of correlated numbers agree to some 1e-6 of their size
FLOAT32 = 1e-4


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


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_refit_to_what_the_output_lacks_is_weighted_ridge_regression_towards_the_weights_as_they_were(ridge):
    x, weight = layer()
    generator = torch.Generator().manual_seed(1)
    lacks, rows = torch.randn(ROWS, OUT, generator=generator), 20.0 * torch.rand(ROWS, generator=generator)
    kept, moments = torch.tensor([0, 2, 3, 6]), Moments(x.shape[1], outputs=OUT)
    for part in zip(x.split(50), lacks.split(50), rows.split(50)):
        moments.add(*part)
    new, gained = refit(weight, moments, kept, WIDTH, ridge=ridge)
    inputs = columns(kept, WIDTH).numpy()
    a, w, e, r = x.double().numpy(), weight.double().numpy(), lacks.double().numpy(), rows.double().numpy()
    mean = (r[:, None] * a).sum(axis=0) / r.sum()
    variance = float(((r[:, None] * (a - mean) ** 2).sum(axis=0) / r.sum())[inputs].mean())
    # sqrt(w_r) times each row, and one row more per weight, sqrt(ridge * variance * n) * (W' - W_S) = 0; none for the
    # bias.
    pull = np.sqrt(ridge * variance * r.sum()) * np.eye(len(inputs), len(inputs) + 1)
    design = np.row_stack([np.sqrt(r)[:, None] * np.column_stack([a[:, inputs], np.ones(ROWS)]), pull])
    target = np.row_stack([np.sqrt(r)[:, None] * (a @ w.T + e), pull[:, :-1] @ w[:, inputs].T])
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    assert np.allclose(new.double().numpy(), found[:-1].T, atol=FLOAT32 * np.abs(found).max())
    assert np.allclose(gained.double().numpy(), found[-1], atol=FLOAT32 * np.abs(found).max())


def test_a_row_of_weight_three_is_three_rows():
    x, _ = layer()
    once, thrice = gathered(torch.cat([x, x[:5], x[:5]])), Moments(x.shape[1])
    thrice.add(x, weights=torch.where(torch.arange(ROWS) < 5, 3.0, 1.0))
    assert torch.allclose(once.covariance(), thrice.covariance(),
                          atol=FLOAT32) and torch.allclose(once.mean, thrice.mean, atol=FLOAT32)


def test_the_products_of_many_inputs_are_whole_and_symmetric():
    inputs = 2 * COLUMNS + 7                                        # more than are multiplied at a time
    x, weights = torch.randn(50, inputs), torch.rand(50)
    found = Moments(inputs)
    found.add(x, weights=weights)
    expected = (x.double() * weights.double()[:, None]).T @ x.double()
    torch.testing.assert_close(found.products, expected, rtol=FLOAT32, atol=FLOAT32 * float(expected.abs().max()))
    assert torch.equal(found.products[:COLUMNS, COLUMNS:], found.products[COLUMNS:, :COLUMNS].T)


def test_bf16_autocast_leaves_the_moments_in_float32():
    x, _ = layer()
    with torch.autocast("cpu", torch.bfloat16):
        moments = gathered(x)
    assert torch.equal(moments.products, gathered(x).products)


def test_refit_with_nothing_cut_changes_nothing():
    x, weight = layer()
    new, gained = refit(weight, gathered(x), torch.arange(UNITS), WIDTH)
    assert torch.equal(new, weight) and not gained.any()


def test_moments_of_batches_are_those_of_one_batch():
    # (rows, 1, K): leading dimensions are rows
    x = layer()[0].reshape(-1, 1, UNITS * WIDTH)
    once, parts = gathered(x), gathered(x, 4)
    assert once.rows == parts.rows == ROWS
    assert torch.allclose(once.mean, parts.mean, rtol=1e-6)
    assert torch.allclose(once.covariance(0), parts.covariance(0), rtol=1e-4, atol=1e-6)
    assert np.allclose(once.covariance(0).numpy(), np.cov(x[:, 0].double().numpy().T, bias=True), atol=1e-5)


def test_ridge_pulls_the_refit_towards_the_weights_as_they_were():
    x, weight = layer()
    kept = torch.tensor([0, 2, 3, 6])
    far, near = (refit(weight, gathered(x), kept, WIDTH, ridge=r)[0] - weight[:, columns(kept, WIDTH)]
                 for r in (1e-6, 10.0))
    assert near.norm() < 0.5 * far.norm()


@pytest.mark.parametrize("rows", [40, 80, 2000])
def test_the_ridge_is_the_largest_within_one_standard_error_of_what_misses_least_on_rows_left_out(rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 31, generator=generator) @ torch.randn(31, 31, generator=generator)
    weight, lacks = torch.randn(OUT, 31, generator=generator), 3 * torch.randn(rows, OUT, generator=generator)
    kept, ridges = torch.arange(0, 31, 2), (1e-4, 1e-2, 1.0, 0.1, np.inf)
    folds, missed = [], np.zeros((4, len(ridges)))
    for part in range(4):
        held, others = slice(part, None, 4), torch.arange(rows) % 4 != part
        folds.append(Moments(31, outputs=OUT))
        folds[-1].add(x[held], lacks[held])
        rest = Moments(31, outputs=OUT)
        rest.add(x[others], lacks[others])
        for number, ridge in enumerate(ridges):
            new, gained = refit(weight.double(), rest, kept, ridge=ridge)
            wrong = x[held][:, kept].double() @ new.T + gained - x[held].double() @ weight.double().T - lacks[held]
            missed[part, number] = wrong.square().sum(dim=1).mean()
    more = missed - missed[:, [missed.mean(axis=0).argmin()]]
    # root of 4 folds
    near = [ridge for ridge, own in zip(ridges, more.T) if own.mean() <= own.std(ddof=1) / 2]
    assert choose_ridge(weight, folds, kept, ridges=ridges) == max(near)
    assert (max(near) > ridges[int(missed.mean(axis=0).argmin())]) == (rows == 80)              # by this rule
    assert (choose_ridge(weight, folds, kept) > 0.02) == (rows < 2000)          # noise is not fitted
    assert choose_ridge(weight, folds[:1], kept) == np.inf                      # nothing to tell by


@pytest.mark.parametrize("constant", [10.0, 1000.0])
def test_few_rows_of_nearly_constant_inputs_are_refitted_and_ordered_though_their_covariance_is_rounding(constant):
    """Means that are far more than deviations: what float32 rounds their products to is more than the ridge raises."""
    generator = torch.Generator().manual_seed(0)
    x, kept = constant + 1e-2 * torch.randn(40, 31, generator=generator), torch.arange(0, 31, 2)
    weight, folds = torch.randn(OUT, 31, generator=generator), [gathered(part) for part in x.chunk(4)]
    whole = functools.reduce(Moments.plus, folds)
    assert torch.linalg.eigvalsh(whole.covariance(1e-4))[0] < 0
    ridge = choose_ridge(weight, folds, kept)
    for strength in (ridge, 1e-4, np.inf):
        new, gained = refit(weight, whole, kept, ridge=strength)
        assert torch.isfinite(new).all() and torch.isfinite(gained).all()
    missed = [float((x[:, kept] @ new.T + gained - x @ weight.T).square().sum())
              for new, gained in (refit(weight, whole, kept, ridge=strength) for strength in (ridge, np.inf))]
    # no worse than means alone, which few rows can tell
    assert missed[0] <= 1.1 * missed[1]
    assert sorted(elimination_order(weight, whole).tolist()) == list(range(31))


def test_a_walk_through_the_model_runs_each_block_a_few_times():
    dense, runs = tiny(depth=5), []
    plan = CompressionPlan(shape=shape_of(dense),
                           blocks=tuple(BlockPlan(neurons=tuple(range(0, 96, 3))) for _ in range(5)))
    for block in dense.blocks:                                                  # its copies count with it
        block.register_forward_pre_hook(lambda module, given: runs.append(len(given[0])))
    compensate(dense, plan, batches(), progress=False)
    # dense once, the model for each of two layers and to go on
    assert len(runs) <= 4 * 5 * len(batches())


@pytest.mark.parametrize("width", [1, WIDTH])
def test_each_eliminated_unit_is_the_one_that_least_squares_misses_least(width):
    x, weight = layer(width)
    order = elimination_order(weight, gathered(x), width, ridge=0.0).tolist()
    assert sorted(order) == list(range(UNITS))
    there = list(range(UNITS))
    # the last has no other to be compared with
    for unit in order[:-1]:
        losses = {u: error(x, weight, [v for v in there if v != u], width) for u in there}
        # float32 moments: near ties may fall either way
        assert losses[unit] <= min(losses.values()) * (1 + 1e-3)
        there.remove(unit)


@pytest.mark.parametrize("what", ["weights of the layer", "moments of its inputs"])
def test_what_is_not_finite_is_refused_in_one_line(what):
    weight, x = torch.randn(3, 5), torch.randn(11, 5)
    (weight if what.startswith("weights") else x)[1, 2] = torch.nan
    with pytest.raises(InputError, match=f"the {what} hold values that are not finite"):
        elimination_order(weight, gathered(x))


def test_a_unit_that_repeats_another_goes_early_however_large_it_is():
    x, weight = layer(1)
    x[:, 3] = x[:, 5]
    weight[:, 3] = 100.0
    scores = reconstruction(weight, gathered(x))
    assert scores[[3, 5]].min() == 0 and scores.max() == 1 and len(set(scores.tolist())) == UNITS


@pytest.mark.parametrize("width", [1, WIDTH])
def test_one_of_each_pair_goes_before_any_pair_loses_both(width):
    generator = torch.Generator().manual_seed(0)
    pairs, outputs = 11, 5
    x, weight = torch.randn(997, pairs * width,
                            generator=generator), torch.randn(outputs, pairs * width, generator=generator)
    mixed = torch.randperm(2 * pairs, generator=generator)                      # unit u is a copy of mixed[u] % pairs
    twice = columns(mixed % pairs, width)
    noise = 1e-3 * torch.randn(997, 2 * pairs * width, generator=generator)     # nearly equal
    order = elimination_order(weight[:, twice], gathered(x[:, twice] + noise), width, ridge=1e-6)
    assert sorted(order.tolist()) == list(range(2 * pairs))
    first = (mixed % pairs)[order[:pairs]]
    assert len(set(first.tolist())) == pairs


@pytest.mark.parametrize("width", [1, WIDTH])
def test_the_order_does_not_depend_on_when_the_matrices_take_a_step_over(width, monkeypatch):
    x, weight = layer(width)
    orders = []
    for step in (1, 2 * width, 1000):
        monkeypatch.setattr("vitlab.criteria.compensation.STEP", step)
        orders.append(elimination_order(weight, gathered(x), width).tolist())
    assert orders[0] == orders[1] == orders[2]


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
    # float32 moments
    assert np.allclose(own.weight.detach().numpy(), solution[:-1].T, atol=1e-3 * np.abs(solution).max())
    assert np.allclose(own.bias.detach().numpy(), solution[-1], atol=1e-3 * np.abs(solution).max())


def test_a_model_with_a_hook_on_the_whole_of_it_is_refused():
    dense = tiny()
    dense.register_forward_pre_hook(lambda module, given: (given[0] / 2,))
    with pytest.raises(InputError, match="a hook on the whole of it.*remove the hook"):
        compensate(dense, full_plan(dense), batches(), progress=False)


def test_images_that_give_no_finite_number_are_refused_by_block():
    dense, wrong = tiny(), [(torch.full_like(x, torch.nan), y) for x, y in batches()]
    for ridge in (None, 1e-3):
        with pytest.raises(InputError, match="block 0: what goes into a layer that is refitted is not finite"):
            compensate(dense, full_plan(dense), wrong, ridge=ridge, progress=False)


def test_targets_of_regions_are_in_float32_where_the_model_runs_in_bf16(monkeypatch):
    dense, seen = tiny(), []
    rule = SharedUpdate(regions=tuple(j // 2 for j in range(16)), weights=(0.5,) * 16)
    plan = CompressionPlan(shape=shape_of(dense),
                           blocks=(BlockPlan(tokens=rule, neurons=tuple(range(0, 96, 3))), BlockPlan()))
    plain = module.dense_rows
    monkeypatch.setattr(module, "dense_rows", lambda *given: seen.append(torch.is_autocast_enabled("cpu"))
                        or plain(*given))
    compensate(dense, plan, batches(), amp=True, progress=False)
    assert seen and not any(seen)


def test_compensation_without_images_is_refused():
    dense = tiny()
    with pytest.raises(InputError, match="block 0: no inputs were gathered"):
        compensate(dense, full_plan(dense), [], progress=False)


def one_cut(model, block: int = 0) -> CompressionPlan:
    """Some neurons of one block."""
    return CompressionPlan(shape=shape_of(model), blocks=tuple(
        BlockPlan(neurons=tuple(range(0, 96, 3)) if index == block else None) for index in range(2)))


def changed(model, other) -> set[str]:
    """Names of the tensors that differ, by more than the rounding of a refit that has nothing to make good."""
    return {name for name,
            value in model.state_dict().items()
            if not torch.allclose(value, other.state_dict()[name], rtol=0, atol=1e-6)}


def streams(model, seen: dict[str, list]) -> list:
    """Hooks that keep, of each block, the stream after attention ("half") and after the block ("after"), all images in
    one tensor."""
    return [hook for block in model.blocks for hook in (
        block.norm2.register_forward_pre_hook(lambda module, given: seen["half"].append(given[0].double())),
        block.register_forward_hook(lambda module, given, output: seen["after"].append(output.double())))]


def refitted_slowly(dense, plan: CompressionPlan, x: torch.Tensor, todo: list, weights: dict,
                    ridge: float) -> torch.nn.Module:
    """compress(dense, plan), its layers `todo` refitted one after another by numpy: to what brings the stream to the
    dense model's, in rows of the same token; to the layer's own output before its cut in the others. Prefix tokens
    weigh `weights` of the layer."""
    wanted: dict[str, list] = {"half": [], "after": []}
    handles = streams(dense, wanted)
    logits(dense, x)
    for handle in handles:
        handle.remove()
    given: dict[tuple, tuple] = {}
    for index, kind in todo:
        def so_far() -> torch.nn.Module:
            """The cut of the layers that were looked at, with their weights."""
            model = compress(dense, CompressionPlan(shape=plan.shape, blocks=tuple(
                BlockPlan(tokens=b.tokens, **{k: getattr(b, k) for k in ("heads", "neurons") if (i, k) in given})
                for i, b in enumerate(plan.blocks))))
            for (i, k), (weight, bias) in given.items():
                linear = mixing_layer(attention_block(model.blocks[i]), k)[0]
                linear.weight.data.copy_(weight)
                linear.bias.data.copy_(bias)
            return model.eval()
        model, seen = so_far(), {}
        block = attention_block(model.blocks[index])
        linear, width = mixing_layer(block, kind)
        (block.norm1 if kind == "heads" else block.norm2).register_forward_pre_hook(lambda m, i,
                                                                                    seen=seen: seen.update(x=i[0]))
        linear.register_forward_hook(lambda m, i, out, seen=seen: seen.update(a=i[0], own=out))
        logits(model, x)
        a, own, enters = (seen[name].double() for name in ("a", "own", "x"))
        # of fewer tokens the class token alone is the dense one's
        target, rows = own.clone(), own.shape[1] if own.shape[1] == 17 else 1
        target[:, :rows] = wanted["half" if kind == "heads" else "after"][index][:, :rows] - enters[:, :rows]
        kept = getattr(plan.blocks[index], kind)
        inputs = columns(torch.arange(linear.in_features // width) if kept is None else torch.tensor(kept), width)
        r = torch.where(torch.arange(a.shape[1]) == 0, weights.get((index, kind), 1.0),
                        1.0).double().repeat(len(a))[:, None].numpy()
        a, target, w = a.flatten(0,
                                 1).numpy(), target.flatten(0,
                                                            1).numpy(), linear.weight.detach().double().numpy()[:,
                                                                                                                inputs]
        variance = float(((r * (a - (r * a).sum(axis=0) / r.sum()) ** 2).sum(axis=0) / r.sum())[inputs].mean())
        pull = np.sqrt(ridge * variance * r.sum()) * np.eye(len(inputs), len(inputs) + 1)
        design = np.row_stack([np.sqrt(r) * np.column_stack([a[:, inputs], np.ones(len(a))]), pull])
        solution = np.linalg.lstsq(design, np.row_stack([np.sqrt(r) * target, pull[:, :-1] @ w.T]), rcond=None)[0]
        given[index, kind] = torch.from_numpy(solution[:-1].T), torch.from_numpy(solution[-1])
    return so_far()


@pytest.mark.parametrize("weight", [1.0, 5.0])
@pytest.mark.parametrize("make", [select_plan, one_cut])
def test_every_layer_is_fitted_to_the_dense_models_stream_behind_what_was_cut_and_refitted_before(make, weight):
    dense = tiny()
    plan, layers = make(dense), [(0, "heads"), (0, "neurons"), (1, "heads"), (1, "neurons")]
    costs = {layer: Fisher(metric=torch.eye(24), prefix_weight=weight + number) for number, layer in enumerate(layers)}
    for every, todo in ((False, layers if make is select_plan else layers[1:3]), (True, layers)):
        found = compensate(dense, plan, batches(), ridge=1e-2, costs=None if weight == 1 else costs, every=every,
                           progress=False)
        wanted = refitted_slowly(dense, plan, torch.cat([x for x, _ in batches()]), todo,
                                 {} if weight == 1 else {layer: cost.prefix_weight for layer, cost in costs.items()},
                                 1e-2)
        x = images(32, seed=9)
        assert torch.allclose(logits(found, x), logits(wanted, x), atol=1e-4)   # moments in float32
        assert not torch.allclose(logits(found, x), logits(compress(dense, plan), x), atol=1e-2)


def named(*layers: str) -> set[str]:
    return {f"blocks.{layer}.{name}" for layer in layers for name in ("weight", "bias")}


def test_every_proj_after_the_first_cut_is_refitted_and_nothing_before_it_or_all_from_the_first_cut_or_merging_on():
    dense = tiny(depth=3)
    shape, neurons = shape_of(dense), tuple(range(0, 96, 3))
    everything = [f"{index}.{name}" for index in range(3) for name in ("attn.proj", "mlp.fc2")]

    def refits(every: bool, *blocks: BlockPlan) -> set[str]:
        plan = CompressionPlan(shape=shape, blocks=blocks)
        found = changed(compensate(dense, plan, batches(), ridge=RIDGE, every=every, progress=False),
                        compress(dense, plan))
        return {name.replace(".block.", ".") for name in found}                 # a block of merged tokens holds timm's
    middle = BlockPlan(), BlockPlan(neurons=neurons), BlockPlan()
    assert refits(False, *middle) == named("1.mlp.fc2", "2.attn.proj")
    # the proj of block 1 has nothing to make good
    assert refits(True, *middle) == named(*everything[3:])
    last = BlockPlan(), BlockPlan(), BlockPlan(neurons=neurons)
    assert refits(False, *last) == named("2.mlp.fc2") == refits(True, *last)
    heads = BlockPlan(heads=(0, 2)), BlockPlan(), BlockPlan()
    assert refits(False, *heads) == named("0.attn.proj", "1.attn.proj", "2.attn.proj")
    assert refits(True, *heads) == named(*everything)
    merged = BlockPlan(), *(BlockPlan(tokens=Match(merged=count)) for count in (4, 0))
    assert refits(False, *merged) == set()
    assert refits(True, *merged) == named(*everything[3:])                      # merging comes after attention
    both = *merged[:2], dataclasses.replace(merged[2], neurons=neurons)
    assert refits(False, *both) == named("2.mlp.fc2") and refits(True, *both) == named(*everything[3:])
    read_out = BlockPlan(), BlockPlan(), BlockPlan(tokens=ReadOut())
    assert refits(True, *read_out) == set()                                     # exact: there is nothing to make good


def test_a_model_of_merged_tokens_alone_is_nearer_to_the_dense_one_when_all_that_follows_is_refitted():
    dense = tiny(depth=3)
    plan = CompressionPlan(shape=shape_of(dense),
                           blocks=(BlockPlan(), *(BlockPlan(tokens=Match(merged=count)) for count in (6, 0))))
    fitted_on = [(images(64, seed), None) for seed in range(3)]
    apart = Divergence(dense, [(images(64, seed=9), None)])
    assert apart(compensate(dense, plan, fitted_on, every=True, progress=False)) < 0.75 * apart(compress(dense, plan))


def test_with_moments_of_the_dense_model_no_batch_is_read_and_only_cut_layers_are_refitted():
    dense = tiny()
    plan, moments = one_cut(dense), dict(each_moments(dense.eval(), batches(), ["neurons"]))
    found = compensate(dense, plan, None, moments=moments, progress=False)
    # nothing is cut before block 0, nor is there to make good
    own = compensate(dense, plan, batches(), ridge=RIDGE, progress=False)
    assert changed(found, compress(dense, plan)) == {f"blocks.0.mlp.fc2.{name}" for name in ("weight", "bias")}
    assert torch.allclose(found.blocks[0].mlp.fc2.weight, own.blocks[0].mlp.fc2.weight, atol=1e-6)


@pytest.mark.parametrize("gamma", [None, 0.3])
def test_a_layer_brings_its_block_to_the_dense_models_stream(gamma):
    """The last fc2 of a model that is cut before, by numpy on the streams themselves."""
    dense = tiny() if gamma is None else tiny(init_values=gamma)
    plan = one_cut(dense)
    model = compress(dense, plan).eval()
    rows: dict[str, list] = {"a": [], "x": [], "d": []}
    block = model.blocks[1]
    handles = [block.mlp.fc2.register_forward_pre_hook(lambda module,
                                                       inputs: rows["a"].append(inputs[0].flatten(0, 1))),
               block.norm2.register_forward_pre_hook(lambda module, inputs: rows["x"].append(inputs[0].flatten(0, 1))),
               dense.blocks[1].register_forward_hook(lambda module, inputs,
                                                     output: rows["d"].append(output.flatten(0, 1)))]
    for x, _ in batches():
        logits(dense, x), logits(model, x)
    for handle in handles:
        handle.remove()
    a, x, d = (torch.cat(rows[name]).double().numpy() for name in ("a", "x", "d"))
    scale = 1 if gamma is None else block.ls2.gamma.detach().double().numpy()
    # 16 patches behind one class token
    root = np.sqrt(np.where(np.arange(len(a)) % 17 == 0, 5.0, 1.0))[:, None]
    design = np.column_stack([a, np.ones(len(a))])
    fc2 = block.mlp.fc2
    wanted = np.linalg.lstsq(root * design, root * ((d - x) / scale), rcond=None)[0]
    walk = Walk(dense, model, batches())
    walk.step()
    moments = functools.reduce(Moments.plus, walk.moments("neurons", None, 5.0))
    weight, gained = refit(fc2.weight.detach(), moments, torch.arange(96), ridge=1e-9)
    found = design @ np.column_stack([weight.double().numpy(), (fc2.bias + gained).detach().double().numpy()]).T
    # 96 inputs, nearly dependent
    assert np.allclose(found, design @ wanted, atol=5e-3 * np.abs((d - x) / scale).max())


def test_a_channel_that_layer_scale_lets_nothing_through_keeps_its_own_target():
    dense = tiny(init_values=0.3)
    plan = one_cut(dense)
    with torch.no_grad():
        dense.blocks[1].ls1.gamma[[0, 3]] = torch.tensor([0.0, 0.1 * SMALL_GAMMA * 0.3])
    found, cut = compensate(dense, plan, batches(), progress=False), compress(dense, plan)
    moved = (found.blocks[1].attn.proj.weight - cut.blocks[1].attn.proj.weight).abs().amax(dim=1)
    assert (moved[[0, 3]] == 0).all() and (moved > 0).sum() == 22 and torch.isfinite(logits(found)).all()


def test_rows_of_the_dense_model_are_the_regions_means_where_an_update_is_shared_and_none_where_tokens_are_others():
    # 1 prefix token, 6 patches
    dense = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    rule = SharedUpdate(regions=(0, 1, 0, -1, 1, 1), weights=(0.25, 0.5, 0.75, 0.0, 0.2, 0.3))
    wanted = torch.stack([dense[:, 0], 0.25 * dense[:, 1] + 0.75 * dense[:, 3],
                          0.5 * dense[:, 2] + 0.2 * dense[:, 5] + 0.3 * dense[:, 6]], dim=1)
    assert torch.allclose(dense_rows(rule, dense, 3), wanted)
    assert dense_rows(None, dense, 7) is dense and dense_rows(Select(kept=3), dense, 7) is dense
    merge = MergeReconstruct(regions=(0, 1, 0, 1, 1, 1), weights=(1.0,) * 6)
    assert dense_rows(None, dense, 5) is None and dense_rows(Select(kept=3), dense, 5) is None
    assert dense_rows(merge, dense, 3) is None and dense_rows(merge, dense, 7) is None


def spanned(model, regions: tuple[int, ...], **cuts) -> CompressionPlan:
    """Tokens stay merged through the blocks 1 and 2 of three; heads and neurons by block."""
    rule = MergeReconstruct(regions=regions, weights=tuple(1 / regions.count(r) if r >= 0 else 0.0 for r in regions),
                            pruned=tuple(j for j, r in enumerate(regions) if r < 0), span=2)
    return CompressionPlan(shape=shape_of(model), blocks=tuple(
        BlockPlan(tokens=rule if i == 1 else None, **{name: by_block.get(i) for name, by_block in cuts.items()})
        for i in range(3)))


@pytest.mark.parametrize("block", [1, 2])
def test_heads_and_neurons_cut_inside_a_span_are_compensated(block):
    dense, x = tiny(depth=3), images(32, seed=9)
    regions = (-1, -1) + tuple(j // 2 for j in range(14))
    plan = spanned(dense, regions, heads={block: (0, 2)}, neurons={block: tuple(range(0, 96, 3))})
    merged = logits(compress(dense, spanned(dense, regions)), x)
    for every, wanted in ((False, merged), (True, logits(dense, x))):
        refitted = compensate(dense, plan, batches(), every=every, progress=False)
        cut, found = (float((logits(model, x) - wanted).norm()) for model in (compress(dense, plan), refitted))
        assert found < 0.75 * cut, every
        state = compress(dense, plan).state_dict()
        assert all(torch.equal(value, state[name]) for name,
                   value in refitted.state_dict().items() if ".tokens." in name)
    whole = compensate(dense, spanned(dense, regions), batches(), progress=False)
    assert torch.equal(logits(whole, x), merged)


def test_tokens_inside_a_span_are_not_taken_for_the_dense_models_though_they_are_as_many():
    # Turned about by the merge matrix, and back after the span: the model is the dense one but for the cut, whose class
    # token alone
    # has a counterpart in the same row.
    dense, x = tiny(depth=3), images(32, seed=9)
    turned, straight = (spanned(dense, regions, heads={2: (0, 2)})
                        for regions in (tuple(range(15, -1, -1)), tuple(range(16))))
    # sums in another order
    assert torch.allclose(logits(compress(dense, turned), x), logits(compress(dense, straight), x), atol=1e-5)
    one, other = (logits(compensate(dense, plan, batches(), progress=False), x) for plan in (turned, straight))
    assert torch.allclose(one, other, atol=1e-4)                                # moments in float32, and a solve


@pytest.mark.parametrize("make", [full_plan, one_cut])
def test_the_stream_as_target_brings_the_output_nearer_to_the_dense_models_than_each_layers_own_output(make):
    dense = tiny()
    plan = make(dense)
    if make is full_plan:
        plan = CompressionPlan(shape=plan.shape,
                               blocks=tuple(BlockPlan(heads=b.heads, neurons=b.neurons, tokens=shared(b.tokens))
                                                              for b in plan.blocks))
    x = images(32, seed=9)
    moments = dict(each_moments(dense.eval(), batches()))
    own, both = (float((logits(compensate(dense, plan, batches(), moments=given, every=True, progress=False),
                               x) - logits(dense, x)).norm())
                 for given in (moments, None))
    assert both < own


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer", "queries"])
@pytest.mark.parametrize("every", [False, True])
def test_a_cut_segmenter_that_is_refitted_is_nearer_to_the_dense_one_and_keeps_its_decoder(decoder, every):
    dense = small(decoder)
    plan, some = units_plan(dense), [(pictures(8, seed=seed), None) for seed in (1, 2, 3)]
    apart = Divergence(dense, [(pictures(8, seed=9), None)])                    # not among those that it is fitted on
    found = compensate(dense, plan, some, every=every, progress=False)
    assert apart(found) < 0.75 * apart(compress(dense, plan))
    assert not any(name.startswith("decoder") for name in changed(found, compress(dense, plan)))
    whole = CompressionPlan.empty(shape_of(dense))
    assert torch.equal(logits(compensate(dense, whole, some, progress=False), pictures(2)), logits(dense, pictures(2)))


def test_a_layer_without_a_bias_is_refitted_by_its_weights_alone():
    dense = tiny()
    for block in dense.blocks:
        block.attn.proj.bias = None
    plan = one_cut(dense)
    found = compensate(dense, plan, batches(), every=True, progress=False)
    assert changed(found, compress(dense, plan)) == {"blocks.1.attn.proj.weight"} | {
        f"blocks.{index}.mlp.fc2.{name}" for index in (0, 1) for name in ("weight", "bias")}
    # without means: W' = W C (C + ridge)^-1 of plain second moments, not of covariances
    moments, weight = Moments(3), torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    moments.add(torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) + 2)
    plain = moments.uncentred()
    kept, (left, gained) = torch.tensor([0, 2]), refit(weight, plain, torch.tensor([0, 2]), 1, 0.0)
    products = moments.products
    wanted = weight[:, kept] + weight[:, [1]] @ products[[1]][:, kept] @ torch.linalg.inv(products[kept][:, kept])
    assert torch.allclose(left, wanted) and gained.abs().max() == 0
