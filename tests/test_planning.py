"""vitlab.criteria.planning: from scores and rates to a plan."""
import dataclasses
import math

import pytest
import torch

from vitlab.criteria.planning import prune_and_merge
from vitlab.plan import CompressionPlan, tokens
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError

SHAPE = ViTShape(img_size=(80, 112), patch_size=(16, 16), embed_dim=33, depth=5, num_heads=3, head_dim=11,
                 num_neurons=41)
N, L = 35, 5        # 80 / 16 * 112 / 16 patches


def random_scores(seed: int = 0, depth: int = L) -> torch.Tensor:
    return torch.rand(depth, N, generator=torch.Generator().manual_seed(seed)) + 0.01


def centers_of(plan: CompressionPlan) -> list[int]:
    """Rows of rule center: one per center. A block with no token rule keeps every patch a center."""
    return [N if b.tokens is None else b.tokens.num_merged for b in plan.blocks]


def pruned_of(plan: CompressionPlan) -> list[int]:
    return [0 if b.tokens is None else len(b.tokens.pruned) for b in plan.blocks]


@pytest.mark.parametrize("rule", ["center", "merge"])
def test_keep_rate_one_and_prune_rate_zero_give_the_plan_that_cuts_nothing(rule):
    plan = prune_and_merge(random_scores(), SHAPE, rule=rule, keep_rate=1, prune_rate=0)
    assert plan.blocks == CompressionPlan.empty(SHAPE).blocks


@pytest.mark.parametrize("keep_rate, prune_rate", [(0.6, 0.1), (0.3, 0.0), (0.85, 0.1), (0.5, 0.45)])
@pytest.mark.parametrize("boundary", ["grid", "reference"])
def test_rule_center_spends_one_budget_over_all_blocks(keep_rate, prune_rate, boundary):
    for seed in range(7):
        plan = prune_and_merge(random_scores(seed), SHAPE, keep_rate=keep_rate, prune_rate=prune_rate,
                               boundary=boundary)
        assert sum(centers_of(plan)) == int(keep_rate * N) * L      # scores differ, so thresholds are exact
        assert sum(pruned_of(plan)) == int(prune_rate * N) * L


def test_rule_center_finds_another_count_in_each_block_and_decay_favours_the_first():
    plan = prune_and_merge(random_scores(), SHAPE, keep_rate=0.5, prune_rate=0.0, decay=0.1)
    counts = centers_of(plan)
    assert counts[0] > counts[-1] and len(set(counts)) > 1


def test_rule_merge_has_the_same_number_of_centers_and_pruned_patches_in_every_block():
    for seed in range(7):
        plan = prune_and_merge(random_scores(seed), SHAPE, rule="merge", keep_rate=0.6, prune_rate=0.1)
        assert pruned_of(plan) == [int(0.1 * N)] * L
        n_keep = int(0.6 * N)
        for scores, block in zip(random_scores(seed), plan.blocks):
            best = set(scores.topk(n_keep).indices.tolist())       # decay and norm do not reorder a block
            rows = [[j for j, r in enumerate(block.tokens.regions) if r == row]
                    for row in range(block.tokens.num_merged)]
            assert sum(len(row) == 1 and row[0] in best for row in rows) == n_keep      # each center alone
            assert not any(best & set(row) for row in rows if len(row) > 1)


@pytest.mark.parametrize("rule, published", [("center", 0.025), ("merge", 0.015)])      # methods A2
def test_decay_is_the_published_one_of_twelve_blocks_and_as_much_in_all_of_other_depths_unless_given(rule, published):
    for depth, default in ((12, published), (L, 11 / 4 * published), (24, 11 / 23 * published), (1, 0.0)):
        shape, scores = dataclasses.replace(SHAPE, depth=depth), random_scores(depth=depth)
        plan = prune_and_merge(scores, shape, rule=rule)
        assert plan == prune_and_merge(scores, shape, rule=rule, decay=plan.made_by["decay"])
        assert plan.made_by["decay"] == pytest.approx(default, rel=1e-15, abs=0)
        assert 1 - plan.made_by["decay"] * (depth - 1) == pytest.approx(1 - 11 * published if depth > 1 else 1)
    assert prune_and_merge(random_scores(), SHAPE, rule="center", decay=0.0).made_by["decay"] == 0.0


def test_the_published_decay_is_the_literal_one_of_twelve_blocks():
    assert tokens.decay_of("center", 12) == 0.025 and tokens.decay_of("merge", 12) == 0.015


@pytest.mark.parametrize("depth", [1, 2, 12, 32, 40, 48])
def test_counts_of_equal_blocks_do_not_collapse_with_depth(depth):
    shape, counts = dataclasses.replace(SHAPE, depth=depth, img_size=(224, 224)), []
    scores = torch.rand(depth, shape.num_patches, generator=torch.Generator().manual_seed(depth))
    for block in prune_and_merge(scores, shape, keep_rate=0.6).blocks:
        counts.append((block.tokens.num_merged, len(block.tokens.pruned)))
    kept, pruned = zip(*counts)
    # the budget is one for all blocks
    assert abs(sum(kept) / depth - 0.6 * 196) < 3 and abs(sum(pruned) / depth - 0.1 * 196) < 2
    # Uniform scores: 60 % of them lie above 0.4 of the largest in the first block where none decays, and the last
    # counts 0.725 of it.
    assert kept[-1] > 0.4 * 196 and pruned[-1] < 0.2 * 196 and kept[0] < 0.75 * 196


def test_made_by_records_every_choice_and_survives_the_file(tmp_path):
    choices = {"rule": "center", "keep_rate": 0.55, "prune_rate": 0.2, "boundary": "reference", "weights": "uniform",
               "decay": 0.01}
    plan = prune_and_merge(random_scores(), SHAPE, **choices)
    assert plan.made_by == {"method": "prune_and_merge", **choices}
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan
    again = {k: v for k, v in plan.made_by.items() if k != "method"}
    assert prune_and_merge(random_scores(), SHAPE, **again) == plan


def test_plan_does_not_depend_on_the_scale_of_the_scores():
    # exact in float32
    plan, scaled = (prune_and_merge(random_scores() * factor, SHAPE) for factor in (1.0, 1024.0))
    assert [b.tokens.regions for b in plan.blocks] == [b.tokens.regions for b in scaled.blocks]


@pytest.mark.parametrize("shape", [(L, N + 1), (L + 1, N), (N, L), (L * N,), (1, L, N)])
def test_scores_of_another_model_are_refused_by_their_shape(shape):
    with pytest.raises(InputError, match="5 blocks of 35 patches") as error:
        prune_and_merge(torch.ones(shape), SHAPE)
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("bad, named", [
    ({"rule": "centre"}, "rule 'centre'"), ({"boundary": "line"}, "boundary 'line'"),
    ({"weights": "sum"}, "weights 'sum'"), ({"keep_rate": 0}, "keep_rate"), ({"keep_rate": 1.1}, "keep_rate"),
    ({"keep_rate": 0.5 / N}, "keep_rate"), ({"prune_rate": 1}, "prune_rate"), ({"prune_rate": -0.1}, "prune_rate"),
    ({"decay": 0.5}, "decay"), ({"decay": -1}, "decay"),
], ids=lambda v: str(v)[:24])
def test_values_out_of_range_are_refused_by_name(bad, named):
    with pytest.raises(InputError, match=named):
        prune_and_merge(random_scores(), SHAPE, **bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_scores_that_can_not_be_ranked_are_refused_by_block(bad):
    scores = random_scores()
    scores[3, 7] = bad
    with pytest.raises(InputError, match="block 3"):
        prune_and_merge(scores, SHAPE)


# ---- Spans: blocks that stay merged together

def normalised(scores: torch.Tensor, decay: float) -> list[list[float]]:
    """A2, one number after the other."""
    rows = []
    for block, row in enumerate(scores.double().tolist()):
        norm = math.sqrt(sum(s * s for s in row))
        rows.append([s / norm * (1 - decay * block) for s in row])
    return rows


@pytest.mark.parametrize("rule", ["center", "merge"])
def test_a_span_merges_by_the_mean_of_its_blocks_normalised_scores_with_thresholds_of_its_own(rule):
    spans = [(0, 1, 0.7), (3, 4, 0.4)]
    for seed in range(5):
        scores = random_scores(seed)
        plan = prune_and_merge(scores, SHAPE, rule=rule, spans=spans, prune_rate=0.2)
        assert [b.tokens is None for b in plan.blocks] == [False, True, True, False, True]
        rows = normalised(scores, (0.025 if rule == "center" else 0.015) * 11 / (L - 1))
        for first, last, keep_rate in spans:
            mean = [sum(rows[b][j] for b in range(first, last + 1)) / (last + 1 - first) for j in range(N)]
            ranked, made = sorted(range(N), key=lambda j: mean[j]), plan.blocks[first].tokens       # noqa: B023
            assert made.span == 2 and set(made.pruned) == set(ranked[:int(0.2 * N)])
            best = set(ranked[-int(keep_rate * N):])
            groups = [[j for j in range(N) if made.regions[j] == r] for r in range(made.num_merged)]
            if rule == "center":
                assert sorted(len(best & set(group)) for group in groups) == [1] * len(best)
            else:
                assert {group[0] for group in groups if best & set(group)} == best
            for group in groups:
                total = sum(mean[j] for j in group)                             # weights "score": shares that sum to 1
                # float32 means
                assert [made.weights[j] for j in group] == pytest.approx([mean[j] / total for j in group], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"boundary": "reference", "weights": "reference"}, {"weights": "uniform"}],
                         ids=str)
@pytest.mark.parametrize("prune_rate", [0.0, 0.1, 0.4])
def test_a_span_of_one_block_equals_the_per_block_form(settings, prune_rate):
    # Rule merge has a budget in each block; so has rule center where there is one block. The mean of one row is that
    # row, bit by bit.
    merge = {k: v for k, v in settings.items() if k != "boundary"}
    each = prune_and_merge(random_scores(), SHAPE, rule="merge", keep_rate=0.6, prune_rate=prune_rate, **merge)
    spans = prune_and_merge(random_scores(), SHAPE, rule="merge", spans=[(i, i, 0.6) for i in range(L)],
                            prune_rate=prune_rate, **merge)
    assert spans.blocks == each.blocks and each.blocks[0].tokens is not None
    one = dataclasses.replace(SHAPE, depth=1)
    for scores in random_scores():
        each = prune_and_merge(scores[None], one, keep_rate=0.6, prune_rate=prune_rate, **settings)
        assert prune_and_merge(scores[None], one, spans=[(0, 0, 0.6)], prune_rate=prune_rate,
                               **settings).blocks == each.blocks


def test_spans_that_keep_every_patch_give_the_plan_that_cuts_nothing():
    plan = prune_and_merge(random_scores(), SHAPE, spans=[(0, 2, 1), (3, 4, 1.0)], prune_rate=0)
    assert plan.blocks == CompressionPlan.empty(SHAPE).blocks
    one = prune_and_merge(random_scores(), SHAPE, spans=[(0, 2, 1), (3, 4, 0.5)], prune_rate=0)
    assert [b.tokens is None for b in one.blocks] == [True, True, True, False, True]


def test_made_by_records_spans_in_the_place_of_the_keep_rate_and_survives_the_file(tmp_path):
    plan = prune_and_merge(random_scores(), SHAPE, spans=[(0, 1, 0.7), (3, 4, 0.4)])
    assert plan.made_by == {"method": "prune_and_merge", "rule": "center", "spans": [[0, 1, 0.7], [3, 4, 0.4]],
                            "prune_rate": 0.1, "boundary": "grid", "weights": "score", "decay": 0.025 * 11 / 4}
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan
    assert prune_and_merge(random_scores(), SHAPE, **{k: v for k, v in plan.made_by.items() if k != "method"}) == plan


@pytest.mark.parametrize("spans, message", [
    ([], "no span is given"), ([(0, 1)], r"span \(0, 1\) is not \(first block, last block, keep rate\)"),
    ([3], "span 3 is not"), ([(0.0, 1, 0.5)], "span .* is not"), ([(0, True, 0.5)], "span .* is not"),
    ([(0, 1, "0.5")], "span .* is not"), ([(0, 1, None)], "span .* is not"), ([(-1, 1, 0.5)], "span -1-1: its blocks "
                                                                                              "must lie from 0 to 4"),
    ([(0, 5, 0.5)], "span 0-5: its blocks must lie from 0 to 4"), ([(2, 1, 0.5)], "span 2-1: .* the first not after "
                                                                                  "the last"),
    ([(0, 2, 0.5), (2, 3, 0.5)], "span 2-3 begins before the one that ends with block 2 is over"),
    ([(3, 4, 0.5), (0, 1, 0.5)], "span 0-1 begins before the one that ends with block 4 is over; spans must ascend"),
    ([(0, 1, 0.5), (3, 4, 1.1)], r"span 3-4: keep_rate is 1.1; with 35 patches it must lie in \[0.02857, 1\]"),
    ([(0, 1, 0)], "span 0-1: keep_rate is 0"), ([(0, 1, math.nan)], "span 0-1: keep_rate is nan"),
], ids=str)
def test_spans_that_can_not_be_are_refused_by_name(spans, message):
    with pytest.raises(InputError, match=message):
        prune_and_merge(random_scores(), SHAPE, spans=spans)


@pytest.mark.parametrize("other, message", [
    ({"keep_rate": 0.6}, "keep_rate is 0.6, but each span has its own"), ({"share": True}, "share off"),
    ({"prune_rate": 1.0}, "prune_rate is 1.0"), ({"boundary": "line"}, "boundary 'line'")])
def test_what_does_not_go_with_spans_is_refused(other, message):
    with pytest.raises(InputError, match=message):
        prune_and_merge(random_scores(), SHAPE, spans=[(0, 1, 0.5)], **other)
