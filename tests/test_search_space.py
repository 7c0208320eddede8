"""The search space against slow loops from methods B4 (units), B3 (select) and A3 (merge), and against the plans it
gives."""
import dataclasses
import random
from decimal import Decimal

import numpy as np
import pytest
import timm
import torch

from vitlab.criteria.planning import prune_and_merge
from vitlab.models import shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import Counts, counts_of, gmacs, mdc_macs
from vitlab.plan.rules import PROTECT, Match, MergeReconstruct, Select
from vitlab.plan.shape import ViTShape
from vitlab.plan.tokens import PRUNE_RATE
from vitlab.runtime.files import InputError
from vitlab.search import Budget, SearchSpace
from vitlab.search.sampling import Problem, varied_policies

MODES = ("none", "select", "select_per_stage", "merge", "merge_per_stage", "share", "share_per_stage", "match",
         "match_per_stage", "match_per_block", "merge_per_span")
FIELDS = [field.name for field in dataclasses.fields(Counts)]


def shape_with(depth: int, heads: int, neurons: int, grid: tuple[int, int], prefix: int = 1) -> ViTShape:
    return ViTShape(img_size=(grid[0] * 16, grid[1] * 16), patch_size=(16, 16), embed_dim=heads * 7, depth=depth,
                    num_heads=heads, head_dim=7, num_neurons=neurons, num_prefix_tokens=prefix)


SHAPES = {
    "five blocks": shape_with(5, 3, 31, (11, 13)), "two registers": shape_with(7, 5, 17, (5, 7), prefix=3),
    "twelve blocks": shape_with(12, 2, 23, (3, 19)), "two blocks": shape_with(2, 1, 2, (2, 3)),
    "one block": shape_with(1, 13, 11, (7, 1)),
}


@pytest.fixture(params=list(SHAPES))
def shape(request) -> ViTShape:
    return SHAPES[request.param]


def draw(space: SearchSpace, count: int, seed: int = 0) -> list[list[float]]:
    """Random policies; about a fifth of the ratios at 0 and a fifth at their most."""
    chance = random.Random(seed)
    return [[chance.choice([0.0, space.max_ratio] + [chance.uniform(0, space.max_ratio)] * 3)
             for _ in range(space.size)]
            for _ in range(count)]


def scores_for(shape: ViTShape, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape.depth, width, generator=generator) + 0.01
            for name,
            width in (("heads", shape.num_heads), ("neurons", shape.num_neurons), ("tokens", shape.num_patches))}


THIRDS = {5: [(0, 1), (2, 2), (3, 4)], 7: [(1, 2), (3, 4), (5, 6)], 12: [(2, 4), (5, 8), (9, 11)], 2: [(0, 0), (1, 1)],
          1: [(0, 0)]}


def slow_counts(shape: ViTShape, tokens: str, policy: list[float], ranked_by: str = "kept", prune_rate: float = 0.1,
                spans: list[tuple[int, int]] | None = None) -> list[dict]:
    """What stays of each block, one number after the other; the policy is neurons, heads, tokens. spans: THIRDS of the
    depth."""
    depth, n, prefix = shape.depth, shape.num_patches, shape.num_prefix_tokens
    token_ratios = policy[2 * depth:]
    entering, blocks = prefix + n, []
    quarters = sorted({depth // 4, depth // 2, depth * 3 // 4})             # blocks that select (3, 6, 9 of 12)
    for block in range(depth):
        neurons = max(int(shape.num_neurons * (1 - policy[block])), 1)
        heads = max(int(shape.num_heads * (1 - policy[depth + block])), 1)
        found = {"neurons": neurons, "heads": heads, "attended": entering, "in_mlp": entering, "carried": 0,
                 "pooled": 0, "compared": 0, "turned": 0, "widths": shape.head_dim,
                 "merges": False, "reconstructs": False, "ranking": 0, "ranks_anew": False}
        if tokens.startswith("select") and block in quarters:
            ratio = token_ratios[quarters.index(block) if tokens == "select_per_stage" else 0]
            # B3: K = int(N_now (1 - rho)), prefix tokens among them
            kept = max(int(entering * (1 - ratio)), prefix + 1)
            # the mean of a single token is that token: nothing is cut
            if kept + 1 < entering:
                entering = kept + 1                                         # and the mean of the rest
                anew = ranked_by == "all"
                found |= {"in_mlp": entering, "ranking": shape.num_heads if anew else heads, "ranks_anew": anew}
        if tokens == "merge_per_span":
            for ratio, (first, last) in zip(token_ratios, spans or THIRDS[depth], strict=True):
                if first <= block <= last and int(n * (1 - ratio)) < n:
                    centers = max(int(n * (1 - ratio)), 1)
                    found |= {"attended": prefix + centers, "in_mlp": prefix + centers,
                              "carried": min(int(n * prune_rate), n - centers), "merges": block == first,
                              "reconstructs": block == last}
        elif tokens.startswith(("merge", "share")):
            ratio = token_ratios[block * min(4, depth) // depth if tokens.endswith("per_stage") else block]
            centers = max(int(n * (1 - ratio)), 1)
            pruned = min(int(n * prune_rate), n - centers)
            found |= {"attended": prefix + centers, "in_mlp": prefix + centers}
            if tokens.startswith("merge"):
                found |= {"carried": pruned, "merges": centers < n, "reconstructs": centers < n}
            elif centers < n:
                found |= {"pooled": n - pruned}                             # each patch of a region is scaled once
        if tokens.startswith("match"):
            which = {"match": 0, "match_per_stage": block * min(4, depth) // depth, "match_per_block": block}[tokens]
            middle = tokens != "match" or depth // 4 <= block < max(3 * depth // 4, 1)        # blocks 3 to 8 of 12
            left = entering - prefix
            # every other one stays
            gone = min(left - int(left * (1 - token_ratios[which])), left // 2) if middle else 0
            if gone:
                found |= {"compared": (left - left // 2) * (left // 2) + entering, "pooled": gone + left // 2}
            entering -= gone
            found |= {"in_mlp": entering}
        blocks.append(found | {"queried": found["attended"]})
    return blocks


def same_counts(given: Counts, row: int, wanted: list[dict]) -> None:
    for name in FIELDS:
        for block, (value,
                    want) in enumerate(zip(getattr(given, name)[row].tolist(), (block[name] for block in wanted),
                                           strict=True)):
            assert value == want, (name, block)


@pytest.mark.parametrize("tokens", MODES)
def test_int_of_count_times_one_minus_ratio_stays_in_every_block(shape, tokens):
    space = SearchSpace(shape=shape, tokens=tokens)
    policies = draw(space, 29, seed=1)
    counts = space.counts(np.array(policies))
    for row, policy in enumerate(policies):
        same_counts(counts, row, slow_counts(shape, tokens, policy))


@pytest.mark.parametrize("tokens, settings", [(mode, {}) for mode in MODES] + [
    ("select", {"ranked_by": "all"}), ("select_per_stage", {"ranked_by": "all"}), ("merge", {"prune_rate": 0.37}),
    ("merge_per_span", {"prune_rate": 0.0}),
    ("merge", {"prune_rate": 0.0}), ("merge_per_stage", {"boundary": "reference", "weights": "uniform"})])
def test_counts_of_a_policy_are_the_counts_of_its_plan(shape, tokens, settings):
    space = SearchSpace(shape=shape, tokens=tokens, settings=settings)
    slow = {key: value for key, value in settings.items() if key in ("ranked_by", "prune_rate")}
    for seed, policy in enumerate(draw(space, 5, seed=2)):
        made = counts_of(space.plan(policy, **scores_for(shape, seed)))
        given = space.counts(policy)
        for name in FIELDS:
            assert getattr(given, name)[0].tolist() == getattr(made, name).tolist(), name
        same_counts(given, 0, slow_counts(shape, tokens, policy, **slow))


def test_dimensions_are_neurons_then_heads_then_tokens_named_by_block():
    twelve, units = shape_with(12, 3, 5, (2, 2)), ["neurons"] * 12 + ["heads"] * 12
    names = [f"{unit} {block}" for unit in ("neurons", "heads") for block in range(12)]
    for tokens, more in (("none", []), ("select", ["tokens"]),
                         ("select_per_stage", ["tokens 3", "tokens 6", "tokens 9"]),
                         ("merge", [f"tokens {b}" for b in range(12)]),
                         ("merge_per_stage", [f"tokens {b}" for b in (0, 3, 6, 9)]),
                         ("merge_per_span", ["tokens 2", "tokens 5", "tokens 9"]), ("match", ["tokens"]),
                         ("match_per_stage", [f"tokens {b}" for b in (0, 3, 6, 9)]),
                         ("match_per_block", [f"tokens {b}" for b in range(12)])):
        space = SearchSpace(shape=twelve, tokens=tokens)
        assert space.names == names + more and space.groups == units + ["tokens"] * len(
            more) and space.size == 24 + len(more)
    assert SearchSpace(shape=twelve).size == 25                             # 2 L + 1 (B4)
    assert SearchSpace(shape=twelve, units=("heads", "neurons", "heads"), tokens="none").names == names


@pytest.mark.parametrize("shape", ["five blocks", "twelve blocks"], indirect=True)
def test_a_ratio_per_span_is_the_plan_of_prune_and_merge_with_these_keep_rates(shape):
    """A span's best patches by the mean of its normalised scores; where a span is one block, those of that block."""
    scores, n = scores_for(shape)["tokens"], shape.num_patches
    space, ratios = SearchSpace(shape=shape, units=(), tokens="merge_per_span"), [0.31, 0.0, 0.47]
    wanted = prune_and_merge(scores, shape, prune_rate=PRUNE_RATE,
                             spans=[(*span, int(n * (1 - ratio)) / n) for span,
                                    ratio in zip(THIRDS[shape.depth], ratios) if ratio])
    assert space.plan(ratios, tokens=scores).blocks == wanted.blocks
    alone = {"spans": [[block, block] for block in range(shape.depth)]}
    single = SearchSpace(shape=shape, units=(), tokens="merge_per_span", settings=alone)
    policy = np.linspace(0, 0.5, shape.depth)
    assert single.plan(policy, tokens=scores) == SearchSpace(shape=shape, units=(),
                                                             tokens="merge").plan(policy, tokens=scores)
    given = SearchSpace(shape=shape, tokens="merge_per_span", settings={"spans": [[1, 1], [2, 4]]})
    assert given.names[2 * shape.depth:] == ["tokens 1", "tokens 2"]
    policy = draw(given, 1, seed=3)[0]
    same_counts(given.counts(policy), 0, slow_counts(shape, "merge_per_span", policy, spans=[(1, 1), (2, 4)]))
    made = counts_of(given.plan(policy, **scores_for(shape)))
    assert all(getattr(made, name).tolist() == getattr(given.counts(policy), name)[0].tolist() for name in FIELDS)


@pytest.mark.parametrize("units", [("heads",), ("neurons",), ()])
def test_units_that_are_not_searched_stay_whole(units):
    shape = SHAPES["five blocks"]
    space = SearchSpace(shape=shape, units=units)
    assert space.size == 5 * len(units) + 1
    policy = np.full(space.size, 0.5)
    plan = space.plan(policy, **{unit: scores_for(shape)[unit] for unit in units})
    for name, total, half in (("heads", 3, 1), ("neurons", 31, 15)):
        assert space.counts(policy).__dict__[name].tolist() == [[half if name in units else total] * 5]
        assert all((getattr(block, name) is None) == (name not in units) for block in plan.blocks)
    assert [block.tokens is not None for block in plan.blocks] == [False, True, True, True, False]


def test_one_head_one_neuron_one_center_and_one_patch_stay_at_the_largest_ratio():
    for tokens in MODES:
        shape = shape_with(5, 3, 7, (3, 5))
        space = SearchSpace(shape=shape, tokens=tokens, max_ratio=0.99)
        policy = [0.99] * space.size
        counts = space.counts(policy)
        assert counts.heads.min() == counts.heads.max() == counts.neurons.min() == counts.neurons.max() == 1
        plan = space.plan(policy, **scores_for(shape))
        assert all(len(block.heads) == len(block.neurons) == 1 for block in plan.blocks)
        if tokens.startswith("merge"):
            assert counts.attended.tolist() == [[2] * 5]                    # the class token and one center
        if tokens.startswith("select"):
            assert counts.in_mlp.tolist() == [[16, 3, 3, 3, 3]]             # the class token, one patch and the mean
            assert plan.blocks[0].tokens is None and plan.blocks[1].tokens == Select(kept=1)
        if tokens == "match":                                               # 15, 8, 4: half at the most
            assert counts.in_mlp.tolist() == [[16, 9, 5, 5, 5]]
            assert [block.tokens and block.tokens.merged for block in plan.blocks] == [None, 7, 4, 0, 0]
        if tokens in ("match_per_stage", "match_per_block"):
            assert counts.in_mlp.tolist() == [[9, 5, 3, 2, 2]] and plan.blocks[4].tokens == Match(merged=0)


# Published DeiT-S policy (methods B7).
DEIT_S = {"neurons": "0.12237 0.00168 0.01201 0.49062 0.10388 0.32759 0.02007 0.26372 0.02465 0.37197 0.33796 0.32449",
          "heads": "0.07641 0.05489 0.11644 0.21189 0.10277 0.04060 0.07933 0.08571 0.27671 0.16643 0.13445 0.15967",
          "rho": "0.48807"}


def test_published_deit_s_policy_keeps_the_counts_and_costs_the_macs_of_the_paper():
    shape = shape_of(timm.create_model("deit_small_patch16_224", pretrained=False))
    space = SearchSpace(shape=shape)
    counts = space.counts([float(v) for v in " ".join(DEIT_S.values()).split()])
    # exact decimals
    assert counts.neurons[0].tolist() == [int(1536 * (1 - Decimal(v))) for v in DEIT_S["neurons"].split()]
    # 6 * 0.78811 = 4.7; 6 * 0.83357 = 5.001
    assert counts.heads[0].tolist() == [5, 5, 5, 4, 5, 5, 5, 5, 4, 5, 5, 5]
    # 197 * 0.51193 = 100.9 and the mean: 101; 101 * 0.51193 = 51.7, so 52; 52 * 0.51193 = 26.6, so 27.
    assert counts.in_mlp[0].tolist() == [197] * 3 + [101] * 3 + [52] * 3 + [27] * 3
    assert counts.attended[0].tolist() == [197] * 4 + [101] * 3 + [52] * 3 + [27] * 2
    macs = mdc_macs(shape, counts.heads[0], counts.neurons[0], np.array(0.48807))
    assert macs / 1e9 == pytest.approx(1.8628, abs=5e-5)                    # half of the last digit printed


@pytest.mark.parametrize("tokens", MODES)
def test_ratios_that_change_no_count_are_the_same_policy(tokens):
    shape = SHAPES["five blocks"]
    space = SearchSpace(shape=shape, tokens=tokens, max_ratio=0.6)
    totals = {"neurons": 31, "heads": 3, "tokens": 144 if tokens.startswith("select") else 143}
    chance, scores = random.Random(3), scores_for(shape)
    for _ in range(7):
        low, high = [], []
        for group in space.groups:
            total = totals[group]
            # total - cut stay: ratios in ((cut - 1) / total, cut / total]
            cut = chance.randrange(1, max(int(total * 0.4), 2))
            low.append((cut - 0.9) / total), high.append((cut - 0.6) / total)
        # later blocks work on fewer tokens: a smaller step
        if tokens.startswith(("select", "match")):
            high[10:] = [ratio + 1e-7 for ratio in low[10:]]
        assert space.keys([low, high])[0] == space.keys([low, high])[1]
        assert space.plan(low, **scores) == space.plan(high, **scores)


@pytest.mark.parametrize("tokens", MODES)
def test_every_count_that_changes_makes_another_policy(shape, tokens):
    space = SearchSpace(shape=shape, tokens=tokens)
    policies = np.concatenate([np.zeros((1, space.size)), np.eye(space.size) * 0.5])
    counts = space.counts(policies)
    rows = [[getattr(counts, name)[row].tolist() for name in FIELDS] for row in range(len(policies))]
    keys = space.keys(policies)
    for a in range(len(rows)):
        for b in range(a):
            assert (keys[a] == keys[b]) == (rows[a] == rows[b]), (a, b)
    assert tokens != "select" or shape.num_heads == 1 or len(set(keys)) == len(keys)


@pytest.mark.parametrize("tokens", MODES)
def test_even_and_back_keeps_the_policy_and_makes_ratios_of_equal_counts_equal(shape, tokens):
    space = SearchSpace(shape=shape, tokens=tokens)
    policies = np.array(draw(space, 23, seed=4))
    snapped = space.from_even(space.even(policies))
    assert space.keys(snapped) == space.keys(policies)
    assert (snapped >= 0).all() and (snapped <= space.max_ratio).all()
    assert (space.from_even(space.even(snapped)) == snapped).all()
    units = 2 * shape.depth
    # token ratios stay: their counts hang together
    assert (snapped[:, units:] == policies[:, units:]).all()
    # Same count, same ratio; and the middle of the ratios with this count, wherever those lie inside the box.
    for d in range(units):
        total, name = (shape.num_neurons, "neurons") if d < shape.depth else (shape.num_heads, "heads")
        kept = getattr(space.counts(policies), name)[:, d % shape.depth]
        for count in set(kept.tolist()):
            ratio, = set(snapped[kept == count, d].tolist())
            low, high = 1 - (count + 1) / total, 1 - count / total
            assert ratio == (pytest.approx((low + high) / 2, abs=1e-12) if low >= 0 and (low + high) / 2 <= 0.5
                             else min(max(low, 0), 0.5))


def test_even_coordinates_give_every_count_the_same_share_and_stand_for_the_same_policies():
    for blocks, heads, most in ((3, 3, 0.5), (2, 12, 0.7), (5, 1, 0.5)):
        space = SearchSpace(shape=shape_with(blocks, heads, 5, (4, 4)), max_ratio=most)
        fine = np.repeat(np.linspace(0, most, 6001)[:-1, None], space.size, axis=1)
        kept = space.counts(space.from_even(fine)).heads[:, 0]
        counts, shares = np.unique(kept, return_counts=True)
        # every count that the box allows
        assert counts.tolist() == list(range(max(int(heads * (1 - most)), 1), heads + 1))
        # the grid falls on either side of an edge
        assert shares.max() - shares.min() <= 2
        policies = np.random.default_rng(0).uniform(0, most, (53, space.size))
        assert space.keys(space.from_even(space.even(policies))) == space.keys(policies)
        assert (space.even(space.from_even(space.even(policies))) == space.even(policies)).all()
        assert space.features(policies).min() >= 0 and space.features(policies).max() <= 1


@pytest.mark.parametrize("multiple, head_dim, heads", [(8, 64, 1), (32, 24, 4), (4, 6, 2), (1, 11, 1)])
def test_counts_in_steps_are_whole_steps_or_all_and_never_below_what_may_be_cut(multiple, head_dim, heads):
    shape = dataclasses.replace(shape_with(5, 6, 131, (5, 7)), embed_dim=6 * head_dim, head_dim=head_dim)
    space = SearchSpace(shape=shape, tokens="none", max_ratio=0.75, multiple=multiple)
    policies = np.array(draw(space, 29))
    counts, plain = space.counts(policies), SearchSpace(shape=shape, tokens="none", max_ratio=0.75).counts(policies)
    for kept, free, total, step in ((counts.neurons, plain.neurons, 131, multiple), (counts.heads, plain.heads, 6,
                                                                                     heads)):
        for now, before in zip(kept.flat, free.flat):           # the next that is a multiple, from where it was
            assert now == next(n for n in range(before, total + 1) if n % step == 0 or n == total)
    assert space.keys(space.from_even(space.even(policies))) == space.keys(policies)
    assert (space.counts(np.zeros((1, space.size))).neurons == 131).all()
    # each count has an even share of even coordinates
    for name, unit in (("neurons 0", "neurons"), ("heads 0", "heads")):
        grid = np.zeros((4001, space.size))
        grid[:, space.names.index(name)] = np.linspace(0, space.max_ratio, 4001, endpoint=False)
        found = getattr(space.counts(space.from_even(grid)), unit)[:, 0]
        shares = np.unique(found, return_counts=True)[1]
        assert np.ptp(shares) <= 1 and len(shares) == len(set(getattr(space.counts(grid), unit)[:, 0]))
    plan = space.plan(policies[0], **{k: v for k, v in scores_for(shape).items() if k != "tokens"})
    assert space.keys(space.policy(plan)[None]) == space.keys(policies[:1])


def test_a_step_below_1_is_refused():
    with pytest.raises(InputError, match="multiple is 0; at least 1"):
        SearchSpace(shape=SHAPES["five blocks"], multiple=0)


@pytest.mark.parametrize("tokens", MODES)
@pytest.mark.parametrize("max_ratio", [0.5, 0.83])
def test_a_plan_of_the_space_is_found_again(shape, tokens, max_ratio):
    space = SearchSpace(shape=shape, tokens=tokens, max_ratio=max_ratio)
    for seed, policy in enumerate(draw(space, 3, seed=5) + [[max_ratio] * space.size]):
        plan = space.plan(policy, **scores_for(shape, seed))
        found = space.policy(plan)
        assert found.shape == (space.size,) and (found >= 0).all() and (found <= max_ratio).all()
        same_counts(space.counts(found), 0, slow_counts(shape, tokens, policy))


def test_policies_of_the_same_key_are_the_same_plan_and_cost():
    space = SearchSpace(shape=SHAPES["five blocks"], units=())
    # 143 of 144 tokens and the mean of the other one
    nothing, one_out = [0.0], [0.5 / 144]
    same = space.keys(nothing) == space.keys(one_out)
    assert same == (space.plan(nothing) == space.plan(one_out))
    assert same == (gmacs(space.plan(nothing)) == gmacs(space.plan(one_out)))


@pytest.mark.parametrize("tokens", ["select", "select_per_stage"])
def test_the_policy_of_the_empty_plan_cuts_nothing(tokens):
    shape = SHAPES["five blocks"]
    space = SearchSpace(shape=shape, tokens=tokens)
    assert space.plan(space.policy(CompressionPlan.empty(shape)), **scores_for(shape)) == CompressionPlan.empty(shape)


def test_a_plan_that_few_ratios_give_is_found_again():
    space = SearchSpace(shape=shape_with(12, 3, 5, (14, 14)), units=())
    # 197, then 196 once: 1 / 197 <= rho < 1 - 195 / 196 = 1 / 196 cuts in block 3 alone, 2.6e-5 wide.
    plan = space.plan([(1 / 197 + 1 / 196) / 2])
    assert space.keys(space.policy(plan)) == space.keys([(1 / 197 + 1 / 196) / 2])


def with_block(shape: ViTShape, index: int, block: BlockPlan) -> CompressionPlan:
    return CompressionPlan(shape=shape, blocks=tuple(block if i == index else BlockPlan() for i in range(shape.depth)))


@pytest.mark.parametrize("index, block, tokens, message", [
    (3, BlockPlan(heads=(1,)), "none", "block 3 has 1 heads, nearest is 2"),
    (0, BlockPlan(neurons=tuple(range(8))), "none", "block 0 has 8 neurons, nearest is 9"),
    (2, BlockPlan(tokens=Select(kept=9)), "none", "block 3 has 11 attended, nearest is 36"),
    # selects in 1, 2, 3
    (0, BlockPlan(tokens=Select(kept=30)), "select_per_stage", "block 1 has 32 attended, nearest is 36"),
    (1, BlockPlan(tokens=MergeReconstruct(regions=tuple(j % 5 for j in range(35)), weights=(0.5,) * 35)), "merge",
     "block 1 has 6 attended, nearest is"),
    (4, BlockPlan(tokens=MergeReconstruct(regions=tuple(j % 20 for j in range(35)), weights=(0.5,) * 35)), "merge",
     "block 4 has (21 attended|0 carried), nearest is"),                     # int(0.1 * 35) are pruned where merged
])
def test_a_plan_outside_the_space_is_refused_naming_block_and_counts(index, block, tokens, message):
    shape = shape_with(5, 5, 19, (5, 7))
    space = SearchSpace(shape=shape, tokens=tokens)
    with pytest.raises(InputError, match=message):
        space.policy(with_block(shape, index, block))


def test_a_plan_for_another_model_is_refused():
    space = SearchSpace(shape=SHAPES["five blocks"])
    with pytest.raises(InputError, match="depth 5 .plan: 7"):
        space.policy(CompressionPlan.empty(SHAPES["two registers"]))


def test_the_best_scoring_units_stay_and_of_equal_ones_the_first():
    shape = SHAPES["two registers"]
    space = SearchSpace(shape=shape, tokens="none")
    generator = torch.Generator().manual_seed(7)
    scores = {"heads": torch.randint(0, 3, (7, 5), generator=generator).float(),        # many ties
              "neurons": torch.randn(7, 17, generator=generator)}                       # negative ones too
    for policy in draw(space, 11, seed=6):
        plan, counts = space.plan(policy, **scores), slow_counts(shape, "none", policy)
        for block, (given, wanted) in enumerate(zip(plan.blocks, counts)):
            for name, rows in scores.items():
                row = rows[block].tolist()
                best = sorted(sorted(range(len(row)), key=lambda j: (-row[j], j))[:wanted[name]])
                assert getattr(given, name) == (None if len(best) == len(row) else tuple(best))


def test_a_plan_of_spans_is_in_no_search_space_and_the_block_is_named():
    shape = SHAPES["five blocks"]
    plan = prune_and_merge(scores_for(shape)["tokens"], shape, spans=[(1, 2, 0.7)], prune_rate=0.0)
    for tokens in MODES:
        with pytest.raises(InputError, match="not in this search space: block [0-4] has"):
            SearchSpace(shape=shape, tokens=tokens).policy(plan)


@pytest.mark.parametrize("tokens", ["merge", "merge_per_stage"])
def test_the_best_patches_are_centers_and_the_worst_are_pruned(tokens):
    shape = SHAPES["two registers"]
    space = SearchSpace(shape=shape, tokens=tokens, settings={"prune_rate": 0.3})
    scores = scores_for(shape)
    for policy in draw(space, 7, seed=8):
        for block, rule in enumerate(b.tokens for b in space.plan(policy, **scores).blocks):
            wanted = slow_counts(shape, tokens, policy, prune_rate=0.3)[block]
            row = scores["tokens"][block].tolist()
            ranked = sorted(range(len(row)), key=lambda j: -row[j])
            assert (rule is not None) == wanted["merges"] == wanted["reconstructs"]
            if rule is not None:
                assert rule.pruned == tuple(sorted(ranked[len(row) - wanted["carried"]:])) and rule.trains == "both"
                centers = ranked[:wanted["attended"] - 3]                   # beside three prefix tokens
                assert sorted(rule.regions[j] for j in centers) == list(range(len(centers)))


def test_token_settings_reach_the_rules():
    shape, scores = SHAPES["five blocks"], scores_for(SHAPES["five blocks"])

    def first(**settings) -> MergeReconstruct:
        space = SearchSpace(shape=shape, tokens="merge", units=(), settings=settings)
        return space.plan([0.5] * 5, tokens=scores["tokens"]).blocks[0].tokens
    default = first()
    assert default == first(prune_rate=0.1, boundary="grid", weights="score")
    assert first(boundary="reference").regions != default.regions
    assert first(weights="uniform").weights != default.weights
    assert len(default.pruned) == 14 and len(first(prune_rate=0.2).pruned) == 28        # of 143


def test_protection_reaches_every_rule_from_the_first_block_that_merges_on():
    shape = SHAPES["twelve blocks"]
    for settings, protect in (({}, PROTECT), ({"protect": 0.7}, 0.7), ({"protect": 0}, 0)):
        space = SearchSpace(shape=shape, tokens="match_per_block", units=(), settings=settings)
        ratios = [0.0, 0.0, 0.0, 0.3, 0.0, 0.5] + [0.0] * 6
        rules = [block.tokens for block in space.plan(ratios).blocks]
        merged = (18, 0, 19, 0, 0, 0, 0, 0, 0)                              # 57 - int(39.9); then half of 39 at most
        assert rules[:3] == [None] * 3 and rules[3:] == [Match(merged=count, protect=protect) for count in merged]


def test_a_space_of_matching_for_a_model_without_a_class_token_protects_nothing():
    shape = dataclasses.replace(SHAPES["five blocks"], num_prefix_tokens=0, pool="avg")
    space = SearchSpace(shape=shape, tokens="match")
    policy = [0.4] * space.size
    same_counts(space.counts(policy), 0, slow_counts(shape, "match", policy))
    # 143 - int(85.8)
    assert space.plan(policy, **scores_for(shape)).blocks[1].tokens == Match(merged=58, protect=0.0)


def test_nothing_cut_is_the_empty_plan(shape):
    for tokens in MODES:
        space = SearchSpace(shape=shape, tokens=tokens)
        plan = space.plan([0.0] * space.size, **scores_for(shape))
        assert plan == CompressionPlan.empty(shape) and plan.blocks == (BlockPlan(),) * shape.depth
        assert space.keys(space.policy(plan)) == space.keys([0.0] * space.size)


def test_who_made_a_plan_is_kept():
    space = SearchSpace(shape=SHAPES["five blocks"], units=())
    assert space.plan([0.2], made_by={"search": "gp"}).made_by == {"search": "gp"}


@pytest.mark.parametrize("make, message", [
    (lambda s: SearchSpace(shape=s, units=("heads", "layers")), "units 'layers' .*neurons"),
    (lambda s: SearchSpace(shape=s, tokens="merge_per_span", read_out=True), "read_out: the last block stays merged in "
                                                                             "the span 3-4"),
    (lambda s: SearchSpace(shape=s, tokens="merge_per_span", settings={"spans": [[0, 2], [2, 3]]}),
     "span 2-3 begins before the one"),
    (lambda s: SearchSpace(shape=s, tokens="merge_per_span", settings={"spans": [[0, 9]]}), "span 0-9: its blocks must "
                                                                                            "lie from 0 to 4"),
    (lambda s: SearchSpace(shape=s, tokens="merge_per_span", settings={"spans": [3]}), "span 3 is not"),
    (lambda s: SearchSpace(shape=s, tokens="merge", settings={"spans": [[0, 1]]}), "tokens 'merge' takes no 'spans'"),
    (lambda s: SearchSpace(shape=s, tokens="mergee"), "tokens 'mergee' .*merge_per_stage"),
    (lambda s: SearchSpace(shape=s, settings={"prune_rate": 0.1}), "'select' takes no 'prune_rate'; it takes "
                                                                   ".*'ranked_by'"),
    (lambda s: SearchSpace(shape=s, tokens="none", settings={"x": 1}), "'none' takes no 'x'"),
    (lambda s: SearchSpace(shape=s, tokens="merge", settings={"prune_rate": 1.0}), "prune_rate is 1.0"),
    (lambda s: SearchSpace(shape=s, tokens="merge", settings={"prune_rate": float("nan")}), "prune_rate is nan"),
    (lambda s: SearchSpace(shape=s, max_ratio=1.0), "max_ratio is 1.0; .*0, 1"),
    (lambda s: SearchSpace(shape=s, max_ratio=0.0), "max_ratio is 0.0"),
    (lambda s: SearchSpace(shape=s, max_ratio=float("nan")), "max_ratio is nan"),
    (lambda s: SearchSpace(shape=s, units=(), tokens="none"), "nothing is searched"),
])
def test_a_space_that_can_not_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make(SHAPES["five blocks"])


@pytest.mark.parametrize("change, message", [
    (lambda p: p[:-1], "a policy of 10 numbers; this space has 11 dimensions"),
    (lambda p: np.append(p, 0.1), "a policy of 12 numbers; this space has 11"),
    (lambda p: [], "a policy of 0 numbers"),
    (lambda p: np.where(np.arange(11) == 7, -1e-9, p), "heads 2 is -1e-09; .*0, 0.5"),
    (lambda p: np.where(np.arange(11) == 0, 0.5000001, p), "neurons 0 is 0.5000001"),
    (lambda p: np.where(np.arange(11) == 10, np.nan, p), "tokens is nan"),
    (lambda p: np.where(np.arange(11) == 4, np.inf, p), "neurons 4 is inf"),
])
def test_a_policy_out_of_the_box_is_refused_naming_the_dimension(change, message):
    space = SearchSpace(shape=SHAPES["five blocks"])
    wrong = change(np.full(11, 0.25))
    for use in (space.check, space.counts, space.keys, space.even, lambda p: space.plan(p, **scores_for(space.shape))):
        with pytest.raises(InputError, match=message):
            use(wrong)


@pytest.mark.parametrize("name, width", [("heads", 3), ("neurons", 31), ("tokens", 143)])
def test_scores_that_are_missing_or_of_another_size_are_refused(name, width):
    space = SearchSpace(shape=SHAPES["five blocks"], tokens="merge")
    for wrong, given in ((None, "None"), (torch.rand(4, width), f"4, {width}"),
                         (torch.rand(5, width + 1), f"5, {width + 1}"), (torch.rand(width), f"{width},")):
        with pytest.raises(InputError, match=f"{name}|token scores") as error:
            space.plan([0.1] * space.size, **(scores_for(space.shape) | {name: wrong}))
        assert f"5 blocks of {width}" in str(error.value) and given in str(error.value)


def test_scores_are_not_needed_for_what_is_not_searched():
    shape = SHAPES["five blocks"]
    assert SearchSpace(shape=shape, units=()).plan([0.5]).blocks[1].tokens is not None
    plan = SearchSpace(shape=shape, units=("heads",), tokens="none").plan([0.5] * 5, heads=scores_for(shape)["heads"])
    assert [len(block.heads) for block in plan.blocks] == [1] * 5


@pytest.mark.parametrize("tokens, prefix, settings", [
    ("select", 1, {"ranked_by": "some"}), ("merge", 1, {"boundary": "circle"}), ("merge", 1, {"weights": "none"}),
    ("select", 1, {"shape": None}),
    ("select_per_stage", 1, {"per_stage": False}), ("select", 0, {}), ("match", 0, {"protect": 0.1}),
    ("match", 1, {"protect": -1}), ("match_per_stage", 1, {"protect": "much"}), ("match", 1, {"per": "block"}),
    ("match_per_block", 1, {"per": ""}), ("match", 1, {"merged": 3})])
def test_settings_that_no_plan_can_have_are_refused_with_the_space(tokens, prefix, settings):
    shape = dataclasses.replace(SHAPES["five blocks"], num_prefix_tokens=prefix, pool="avg")
    with pytest.raises(InputError):
        SearchSpace(shape=shape, tokens=tokens, settings=settings)


@pytest.mark.parametrize("tokens, rule", [
    ("select", Select(kept=109, ranked_by="all")),
    ("merge", MergeReconstruct(regions=tuple(range(143)), weights=(0.5,) * 143)),
    ("match", MergeReconstruct(regions=(0,) * 143, weights=(0.5,) * 143))])
def test_a_plan_that_ranks_or_merges_otherwise_is_not_in_the_space(tokens, rule):
    shape = SHAPES["five blocks"]
    space = SearchSpace(shape=shape, tokens="select_per_stage" if tokens == "select" else tokens, units=("heads",))
    plan = with_block(shape, 1, BlockPlan(heads=(0, 2), tokens=rule))
    with pytest.raises(InputError, match="not in this search space"):
        space.policy(plan)


@pytest.mark.parametrize("tokens", ["match", "select"])
def test_policies_are_drawn_where_whole_attentions_may_go(tokens):
    shape = ViTShape(img_size=(224, 224), patch_size=(16, 16), embed_dim=192, depth=12, num_heads=3, head_dim=64,
                     num_neurons=768, num_prefix_tokens=1)
    space = SearchSpace(shape=shape, units=("heads",), tokens=tokens, sublayers=True)
    budget = Budget.of(space, 0.45 * float(space.gmacs(np.zeros((1, space.size)))[0]))
    drawn = varied_policies(Problem(space, budget), 8, np.random.default_rng(0))
    assert len(drawn) == 8 and budget.meets(drawn).all()
