"""A last block that reads out: the same logits on every family with a class token, for fewer multiply-adds."""
import dataclasses
import json

import pytest
import torch
from comparing import logits, relative

from vitlab.models import compress, deploy, shape_of
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match, ReadOut, Select
from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.files import InputError
from vitlab.search import SearchSpace

EXACT = 1e-12           # float64: only the order of the sums differs
BEFORE = {"nothing": None, "matching": Match(merged=2), "selection": Select(kept=3)}


def plan_of(shape, before: str = "nothing", last: object = None, **units) -> CompressionPlan:
    """A rule in the second block (and what must follow it), `last` in the last one, units cut in all."""
    rule = BEFORE[before]
    after = Match(merged=0) if isinstance(rule, Match) else None
    rules = [None, rule, *[after] * (shape.depth - 3), last or after]
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=rule, **units) for rule in rules))


@pytest.mark.parametrize("before", list(BEFORE))
def test_the_logits_are_those_of_the_whole_last_block(tiny_vit, family, images, before):
    model = tiny_vit(family).double()
    shape = shape_of(model)
    if shape.pool != POOL_TOKEN:                        # all tokens are pooled
        with pytest.raises(InputError, match="only prefix tokens are read out"):
            plan_of(shape, before, ReadOut())
        return
    x, units = images(model, 3).double(), {"heads": (0,), "neurons": tuple(range(0, shape.num_neurons, 2))}
    whole = compress(model, plan_of(shape, before, **units))
    plan = plan_of(shape, before, ReadOut(), **units)
    small = compress(model, plan)
    assert relative(logits(small, x), logits(whole, x)) < EXACT
    assert relative(logits(deploy(small), x), logits(whole, x)) < EXACT
    with torch.no_grad():
        assert small.forward_features(x).shape == (3, shape.num_prefix_tokens, shape.embed_dim)
    assert cost.macs(plan)["total"] < cost.macs(plan_of(shape, before, **units))["total"]


def test_multiply_adds_of_the_last_block_are_counted_by_hand(tiny_vit):
    shape = shape_of(tiny_vit("dinov2_reg"))
    parts, n, p, dim = cost.macs(plan_of(shape,
                                         last=ReadOut())), shape.num_tokens, shape.num_prefix_tokens, shape.embed_dim
    width, before = shape.num_heads * shape.head_dim, shape.depth - 1
    assert parts["qkv"] == (before + 1) * 3 * n * dim * width
    assert parts["attention"] == before * 2 * n * n * width + 2 * p * n * width
    assert parts["proj"] == before * n * width * dim + p * width * dim
    assert parts["mlp"] == (before * n + p) * 2 * dim * shape.num_neurons


def test_gradients_and_export(tiny_vit, images):
    model = tiny_vit("qk_norm")
    plan = plan_of(shape_of(model), "matching", ReadOut())
    small, whole = compress(model, plan), compress(model, plan_of(shape_of(model), "matching"))
    x = images(model, 2)
    for net in (small, whole):
        net(x).square().sum().backward()
    # a bias of keys has a gradient of 0 but for rounding
    largest = max(float(p.grad.abs().max()) for p in whole.parameters())
    for (name, mine), other in zip(small.named_parameters(), whole.parameters(), strict=True):
        assert float((mine.grad - other.grad).abs().max()) < 1e-5 * largest, name
    exported = torch.export.export(deploy(small), (x,)).module()
    assert relative(exported(x).detach(), logits(small, x)) < 1e-5


def test_what_cannot_read_out_is_refused(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    with pytest.raises(InputError, match="block 2: tokens are read out, but another block follows"):
        CompressionPlan(shape=shape,
                        blocks=tuple(BlockPlan(tokens=ReadOut() if i == 2 else None) for i in range(shape.depth)))
    for pooling in (dataclasses.replace(shape, pool="avg"), dataclasses.replace(shape, num_prefix_tokens=0)):
        with pytest.raises(InputError, match="block 4: only prefix tokens are read out"):
            plan_of(pooling, last=ReadOut())
        with pytest.raises(InputError, match="only prefix tokens are read out"):
            SearchSpace(shape=pooling, tokens="none", read_out=True)
    small = compress(tiny_vit("deit"), plan_of(shape, last=ReadOut()))
    with pytest.raises(InputError, match="selected or read out"):
        small.forward_intermediates(torch.zeros(1, 3, 48, 80))


@pytest.mark.parametrize("tokens", ["none", "match", "match_per_stage", "select", "merge", "share"])
def test_a_search_space_that_reads_out_counts_what_its_plans_do(tiny_vit, tokens):
    shape = shape_of(tiny_vit("deit"))
    space = SearchSpace(shape=shape, tokens=tokens, read_out=True)
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(shape.depth, width, generator=generator) + 0.01
              for name,
              width in (("heads", shape.num_heads), ("neurons", shape.num_neurons), ("tokens", shape.num_patches))}
    for policy in torch.rand(5, space.size, generator=generator).numpy() * space.max_ratio:
        plan = space.plan(policy, **scores)
        assert plan.blocks[-1].tokens == ReadOut()
        given, made = space.counts(policy), cost.counts_of(plan)
        for name in vars(made):
            assert getattr(given, name)[0].tolist() == getattr(made, name).tolist(), name
        assert (space.counts(space.policy(plan)).queried == given.queried).all()
    assert CompressionPlan.from_json(json.loads(plan.to_json())).blocks == plan.blocks
