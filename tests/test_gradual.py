"""partial_plan: part of a plan's cuts, so that pruning and fine-tuning can take turns."""
import random

import pytest
import torch
from training_fixtures import full_plan, images, logits, one_thread, tiny  # noqa: F401

from vitlab.criteria.planning import prune_and_merge
from vitlab.criteria.units import UnitScores
from vitlab.models import compress, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Select
from vitlab.runtime.files import InputError
from vitlab.training.gradual import partial_plan

FRACTIONS = (0.1, 0.25, 0.5, 0.8, 1.0)


def scores_for(plan: CompressionPlan, seed: int = 0) -> UnitScores:
    generator = torch.Generator().manual_seed(seed)
    shape = plan.shape
    return UnitScores(heads=torch.rand(shape.depth, shape.num_heads, generator=generator),
                      neurons=torch.rand(shape.depth, shape.num_neurons, generator=generator), made_by={})


def select_plan(model) -> CompressionPlan:
    shape = shape_of(model)
    chance = random.Random(3)
    blocks = [BlockPlan(heads=tuple(sorted(chance.sample(range(shape.num_heads), 1))),
                        neurons=tuple(sorted(chance.sample(range(shape.num_neurons), 31))), tokens=Select(kept=kept))
              for kept in (11, 5)]
    return CompressionPlan(shape=shape, blocks=tuple(blocks))


def test_the_whole_fraction_is_the_plan_itself():
    plan = full_plan(tiny())
    assert partial_plan(plan, 1.0, scores_for(plan)) is plan


def test_cuts_grow_with_the_fraction_and_the_lowest_scores_go_first():
    for plan in (full_plan(tiny()), select_plan(tiny())):
        scores = scores_for(plan)
        for index, block in enumerate(plan.blocks):
            for name, kept, values in (("heads", block.heads, scores.heads[index]),
                                       ("neurons", block.neurons, scores.neurons[index])):
                everything, last = set(range(len(values))), None
                leaving = sorted(everything - set(kept), key=lambda unit: float(values[unit]))         # noqa: B023
                for fraction in FRACTIONS:
                    now = getattr(partial_plan(plan, fraction, scores).blocks[index], name)
                    gone = everything - (everything if now is None else set(now))
                    assert gone == set(leaving[:round(fraction * len(leaving))]), (name, index, fraction)
                    assert last is None or last <= gone
                    last = gone


def test_selections_keep_fewer_tokens_step_by_step_and_end_at_the_plans():
    plan = select_plan(tiny())
    kept = [[block.tokens.kept for block in partial_plan(plan, f, scores_for(plan)).blocks] for f in FRACTIONS]
    assert kept[-1] == [11, 5]
    assert all(a >= b for before, after in zip(kept, kept[1:]) for a, b in zip(before, after))
    # 16 patches come in; 11 of them stay at last, so at a half 16 - 2.5; then 14 and the mean come in, of which 5 of 12
    # stay at last.
    assert kept[FRACTIONS.index(0.5)] == [round(16 * (1 - 0.5 * 5 / 16)), round(15 * (1 - 0.5 * 7 / 12))]


def test_merging_starts_in_the_last_blocks():
    plan = full_plan(tiny())
    assert [b.tokens is not None for b in partial_plan(plan, 0.5, scores_for(plan)).blocks] == [False, True]
    assert [b.tokens is not None for b in partial_plan(plan, 0.51, scores_for(plan)).blocks] == [True, True]


def test_cutting_in_turns_gives_the_model_that_cutting_at_once_gives():
    for make in (full_plan, select_plan):
        dense = tiny()
        plan, model, before = make(dense), dense, None
        for fraction in (0.3, 0.7, 1.0):
            part = partial_plan(plan, fraction, scores_for(plan))
            model, before = compress(model, part, before=before), part
        assert torch.equal(logits(model), logits(compress(dense, plan)))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    plan = full_plan(tiny())
    with pytest.raises(InputError, match=r"must lie in \(0, 1\]"):
        partial_plan(plan, fraction, scores_for(plan))


def test_a_span_is_merged_as_a_whole_once_its_first_block_is_among_the_last():
    dense = tiny(depth=5)
    scores = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) + 0.01
    plan = prune_and_merge(scores, shape_of(dense), spans=[(0, 1, 0.5), (2, 4, 0.5)])
    for fraction, wanted in ((0.2, []), (0.4, []), (0.59, [2]), (0.6, [2]), (0.8, [2]), (0.9, [0, 2]), (1.0, [0, 2])):
        rules = [b.tokens for b in partial_plan(plan, fraction, scores_for(plan)).blocks]
        assert rules == [plan.blocks[i].tokens if i in wanted else None for i in range(5)], fraction
    model, before = dense, None
    for fraction in (0.3, 0.7, 1.0):
        part = partial_plan(plan, fraction, scores_for(plan))
        model, before = compress(model, part, before=before), part
    assert torch.equal(logits(model), logits(compress(dense, plan)))
