"""Attentions and MLPs that are left out of their blocks."""
import copy
import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from comparing import logits, relative
from conftest import DEPTH
from test_cost import counted_macs
from test_shrink import SAME, hooked
from torch import nn

from vitlab.criteria.units import UnitScores
from vitlab.measure.capture import token_scores
from vitlab.measure.moments import each_moments
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.left_out import LeftOut
from vitlab.models.transformers_saving import _check_alike
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut, Select, SharedUpdate
from vitlab.runtime.files import InputError
from vitlab.search import Budget, SearchSpace
from vitlab.search.allocation import allocate, levels, summed_losses
from vitlab.search.sampling import Problem, neighbours, random_policies, uniform_policies, varied_policies
from vitlab.search.sensitivity import better_nothing
from vitlab.training.compensate import compensate
from vitlab.training.gradual import partial_plan

GONE = ((), None), (None, ()), (None, None), ((), ()), ((0,), ())               # heads and neurons of each block


def leaving(shape, tokens=(None,) * DEPTH) -> CompressionPlan:
    return CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(heads=heads, neurons=neurons, tokens=rule) for (heads, neurons), rule in zip(GONE, tokens)))


# ---- The same function as of units that are all 0, and nothing is multiplied

def test_a_left_out_sublayer_gives_what_one_of_masked_units_gives_and_its_parameters_are_gone(tiny_vit, family, images):
    dense = tiny_vit(family)
    plan, x = leaving(shape_of(dense)), images(dense, 3)
    model = compress(dense, plan)
    assert relative(logits(model, x), logits(hooked(dense, plan), x)) < SAME
    left = set(model.state_dict())
    assert {n for n in left if n.startswith("blocks.0.attn")} == {"blocks.0.attn.bias"}
    assert not any(n.startswith(("blocks.0.norm1", "blocks.1.norm2", "blocks.1.mlp.fc")) for n in left)
    assert cost.macs(plan)["total"] == counted_macs(deploy(model)) == counted_macs(model)


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_ape_224", "eva02_tiny_patch14_224", "beit_base_patch16_224",
                                  "vit_relpos_small_patch16_rpn_224", "vit_relpos_small_patch16_224"])
def test_sublayers_of_other_families_are_left_out_norms_that_come_last_stay(name):
    torch.manual_seed(0)
    sizes = {"img_size": 42 if "14" in name else 48, "depth": DEPTH, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    dense = timm.create_model(name, **sizes).eval()
    shape = shape_of(dense)
    plan = leaving(shape) if shape.cuts("heads") else CompressionPlan(
        shape=shape, blocks=tuple(BlockPlan(neurons=neurons) for _, neurons in GONE))
    x = torch.randn(2, 3, *shape.img_size)
    model = compress(dense, plan)
    assert relative(logits(model, x), logits(hooked(dense, plan), x)) < SAME
    # biases by distance are computed, and not counted, in either
    assert (cost.macs(CompressionPlan.empty(shape))["total"] - cost.macs(plan)["total"]
            == counted_macs(dense) - counted_macs(model))
    assert isinstance(model.blocks[1].norm2, nn.Identity) == ("rpn" not in name)


def test_layers_without_a_bias_leave_nothing(tiny_vit, images):
    dense = tiny_vit("augreg", proj_bias=False)
    plan, x = leaving(shape_of(dense)), images(dense)
    model = compress(dense, plan)
    assert relative(logits(model, x), logits(hooked(dense, plan), x)) < SAME
    assert not model.blocks[0].attn.bias.any()


@pytest.mark.parametrize("rules", [
    (MergeReconstruct(regions=(0, 0, 1, 1, 2, -1), weights=(0.5, 0.5, 0.3, 0.7, 1, 0), pruned=(5,), span=3), None, None,
     SharedUpdate(regions=(0, 0, 1, 1, 2, 2), weights=(0.5,) * 6, own=0.5, proportional=True), ReadOut()),
    (None, Match(merged=2), Match(merged=1), Match(merged=0), ReadOut()),
    (None, None, Select(kept=3), None, None)], ids=["merge_reconstruct", "match", "select"])
def test_every_token_rule_runs_without_the_sublayers_that_it_does_not_need(tiny_vit, images, rules):
    dense = tiny_vit("augreg", img_size=(48, 32))
    plan, x = leaving(shape_of(dense), rules), images(dense)
    model = compress(dense, plan)
    ruled = compress(dense, dataclasses.replace(plan, blocks=tuple(BlockPlan(tokens=r) for r in rules)))
    blocks = [getattr(b, "block", b) for b in ruled.blocks]
    masked = hooked(nn.ModuleDict({"blocks": nn.ModuleList(blocks)}), plan)
    for wrapped, block in zip(ruled.blocks, masked.blocks):
        if hasattr(wrapped, "block"):
            wrapped.block = block
    ruled.blocks = nn.Sequential(*(w if hasattr(w, "block") else b for w, b in zip(ruled.blocks, masked.blocks)))
    assert relative(logits(model, x), logits(ruled, x)) < SAME
    assert relative(logits(deploy(model), x), logits(ruled, x)) < SAME
    scaled = int(cost.counts_of(plan).pooled.sum()) * dense.embed_dim           # rows, by no matrix product
    assert cost.macs(plan)["total"] == counted_macs(deploy(model)) + scaled


def test_without_any_attention_the_last_block_reads_out_prefix_tokens_alone(tiny_vit, images):
    dense = tiny_vit("deit")
    shape, x = shape_of(dense), images(dense)
    plans = [CompressionPlan(shape=shape, blocks=(BlockPlan(heads=()),) * (DEPTH - 1)
                             + (BlockPlan(heads=(), tokens=rule),)) for rule in (None, ReadOut())]
    whole, read = (compress(dense, plan) for plan in plans)
    assert relative(logits(read, x), logits(whole, x)) < SAME
    assert [cost.macs(plan)["total"] == counted_macs(m) for plan, m in zip(plans, (whole, read))] == [True, True]
    assert read.forward_features(x).shape[1] == shape.num_prefix_tokens


# ---- timm's habits

def test_a_left_out_sublayer_trains_saves_exports_copies_and_is_hooked(tiny_vit, images, tmp_path):
    dense = tiny_vit("deit3", drop_path_rate=0.1)
    plan, x = leaving(shape_of(dense)), images(dense)
    model = compress(dense, plan)
    with torch.no_grad():
        for block in model.blocks:              # as after training
            for each in (block.attn, block.mlp):
                if isinstance(each, LeftOut):
                    each.bias += 0.1
    for name, form in (("training", model), ("deployed", deploy(model))):
        folder = checkpoint.save(tmp_path / name, form, plan)
        found = checkpoint.load(folder)
        assert found.plan == plan and json.loads((folder / "plan.json").read_text())["version"] == 2
        assert torch.equal(logits(found.model, x), logits(form, x))
        assert torch.equal(torch.export.export(form, (x,)).module()(x), logits(form, x))
    assert torch.equal(logits(copy.deepcopy(model), x), logits(model, x))
    assert torch.equal(logits(torch.jit.script(compress(dense, leaving(shape_of(dense)))), x),
                       logits(compress(dense, plan), x))
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    model.train()(x).sum().backward()
    assert seen == [(2, shape_of(dense).num_tokens, dense.embed_dim)]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_cut_model_loses_the_rest_of_a_sublayer_later_and_never_gets_it_back(tiny_vit, images):
    dense = tiny_vit("deit")
    shape, x = shape_of(dense), images(dense)
    some = CompressionPlan(shape=shape, blocks=(BlockPlan(heads=(0, 2)),) * DEPTH)
    plan = leaving(shape)
    further = CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(heads=(0, 2) if b.heads is None else b.heads, neurons=b.neurons) for b in plan.blocks))
    twice = compress(compress(dense, some), further, before=some)
    assert torch.equal(logits(twice, x), logits(compress(dense, further), x))
    with pytest.raises(InputError, match="block 0: heads 0 should stay, but the model has lost it already"):
        compress(twice, some, before=further)
    with pytest.raises(InputError, match="already compressed"):
        shape_of(compress(dense, CompressionPlan(shape=shape, blocks=(BlockPlan(heads=()),) * DEPTH)))


# ---- A refit

@pytest.mark.parametrize("by", ["images", "moments"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_refit_replaces_a_sublayer_by_its_mean(tiny_vit, images, by, bias):
    dense, x = tiny_vit("deit", proj_bias=bias), images(tiny_vit("deit"), 6)
    plan = CompressionPlan(shape=shape_of(dense), blocks=tuple(
        BlockPlan(heads=() if i == 2 else None) for i in range(DEPTH)))
    seen = []
    with torch.no_grad():
        handle = dense.blocks[2].attn.register_forward_hook(lambda module, given, out: seen.append(out))
        dense(x)
        handle.remove()
    moments = {} if by == "images" else {"moments": dict(each_moments(dense, [(x, None)]))}
    refitted = compensate(dense, plan, [(x, None)], progress=False, **moments)
    mean = seen[0].double().mean(dim=(0, 1))
    assert torch.allclose(refitted.blocks[2].attn.bias.double(), mean, atol=1e-5)      # float32 sums of 6 images
    reference = logits(dense, x)
    assert (logits(refitted, x) - reference).norm() < (logits(compress(dense, plan), x) - reference).norm()


def test_an_mlp_that_is_left_out_behind_cuts_is_what_the_dense_stream_lacks_on_average(tiny_vit, images):
    dense = tiny_vit("deit")
    x, plan = images(dense, 6), leaving(shape_of(dense))
    refitted = compensate(dense, plan, [(x, None)], progress=False)
    streams = []
    with torch.no_grad():
        for model, part in ((dense, dense.blocks[3]), (refitted, refitted.blocks[3])):
            handle = part.register_forward_hook(lambda module, given, out: streams.append(out))
            model(x)
            handle.remove()
    assert torch.allclose(*(s.double().mean(dim=(0, 1)) for s in streams), atol=1e-5)


# ---- Nothing in its place

def nothing_of(plan: CompressionPlan) -> CompressionPlan:
    """The same with 0 in place of every other sublayer that is left out."""
    kinds = ("heads",), ("neurons",), (), ("heads", "neurons"), ()
    return dataclasses.replace(plan, blocks=tuple(dataclasses.replace(block, nothing=kind)
                                                  for block, kind in zip(plan.blocks, kinds)))


def test_a_sublayer_replaced_by_nothing_adds_nothing_when_saved_refitted_and_exported(tiny_vit, images, tmp_path):
    dense = tiny_vit("deit3")
    plan, x = nothing_of(leaving(shape_of(dense))), images(dense, 3)
    model, expected = compress(dense, plan), copy.deepcopy(hooked(dense, leaving(plan.shape)))
    for block, kind in zip(expected.blocks, plan.blocks):
        for name in kind.nothing:
            (block.attn if name == "heads" else block.mlp).register_forward_hook(lambda module, given, out: 0 * out)
    assert relative(logits(model, x), logits(expected, x)) < SAME
    assert not any(name.startswith(("blocks.0.attn", "blocks.1.mlp", "blocks.3.")) and "norm" not in name
                   and ".ls" not in name for name in model.state_dict())
    assert cost.macs(plan) == cost.macs(leaving(plan.shape))
    for name, form in (("training", model), ("deployed", deploy(model))):
        found = checkpoint.load(checkpoint.save(tmp_path / name, form, plan))
        assert found.plan == plan and torch.equal(logits(found.model, x), logits(form, x))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), logits(model, x))
    assert torch.equal(logits(torch.jit.script(model), x), logits(model, x))
    for moments in ({}, {"moments": dict(each_moments(dense, [(x, None)]))}):
        refitted = compensate(dense, plan, [(x, None)], progress=False, **moments)
        assert [b.attn.bias is None for b in (refitted.blocks[0], refitted.blocks[3])] == [True, True]
        assert refitted.blocks[4].mlp.bias is not None
        checkpoint.save(tmp_path / "refitted", refitted, plan)                  # it is what the plan says
    with pytest.raises(InputError, match="block 0 of the model is not what the plan says"):
        checkpoint.save(tmp_path / "other", model, leaving(plan.shape))
    with pytest.raises(InputError, match=r"block 0: nothing is \[\], but of what the model has left out already it is "
                                         r"\['heads'\]"):
        compress(model, leaving(plan.shape), before=plan)


def test_the_nearer_of_nothing_and_a_mean_stands_for_each_sublayer(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    nearer = {(1, "neurons"), (3, "heads")}

    def measure(plan: CompressionPlan) -> dict[str, float]:
        (block, cut), = [(i, b) for i, b in enumerate(plan.blocks) if b != BlockPlan()]
        kind = "heads" if cut.leaves_out("heads") else "neurons"
        assert not cut.leaves_out("neurons" if kind == "heads" else "heads")
        return {"distill_loss": 2.0 - ((block, kind) in nearer) if cut.nothing else 1.5}
    found = better_nothing(measure, shape, ("heads", "neurons"))
    assert {(int(b), ("heads", "neurons")[k]) for b, k in found.nonzero()} == nearer
    assert found[:, 0].tolist() == better_nothing(measure, shape, ("heads",))[:, 0].tolist()
    assert not better_nothing(measure, shape, ("heads",))[:, 1].any()
    space = space_of(shape)
    scores = {name: torch.rand(DEPTH, count) for name, count in (("heads", 3), ("neurons", shape.num_neurons))}
    policy = np.where(np.arange(space.size) % DEPTH < 3, 1.0, 0.0)              # the first three blocks go
    plan = space.plan(policy, nothing=found, **scores)
    assert [b.nothing for b in plan.blocks] == [(), ("neurons",), (), (), ()]
    assert space.keys(space.policy(plan)[None]) == space.keys(policy[None])


# ---- The plan

def test_what_replaces_a_sublayer_is_in_the_plan_and_files_without_it_mean_the_mean(tiny_vit):
    plan = leaving(shape_of(tiny_vit("deit")))
    data = json.loads(nothing_of(plan).to_json())
    assert data["version"] == 2 and data["blocks"][3]["nothing"] == ["heads", "neurons"]
    assert "nothing" not in data["blocks"][2] and CompressionPlan.from_json(data) == nothing_of(plan) != plan
    assert partial_plan(nothing_of(plan), 0.5, UnitScores(heads=torch.rand(DEPTH, 3), neurons=torch.rand(
        DEPTH, plan.shape.num_neurons), made_by={})).blocks[0].nothing == ()
    for wrong in (["neurons"], ["tokens"], "heads", None, ["heads", "heads"], [["heads"]]):
        data["blocks"][0]["nothing"] = wrong
        with pytest.raises(InputError, match='block 0: nothing is .*; of "heads", "neurons" those of which none stays'):
            CompressionPlan.from_json(data)


def test_a_plan_that_leaves_sublayers_out_is_of_version_2_and_others_are_of_version_1(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    plan, data = leaving(shape), json.loads(leaving(shape).to_json())
    assert data["version"] == 2 and data["blocks"][0]["heads"] == [] and CompressionPlan.from_json(data) == plan
    assert json.loads(CompressionPlan.empty(shape).to_json())["version"] == 1
    with pytest.raises(InputError, match="plan: block 0: no head or no neuron stays, or qk_width is given"):
        CompressionPlan.from_json(data | {"version": 1})
    with pytest.raises(InputError, match="version 3 is not known; this vitlab reads versions 1 and 2"):
        CompressionPlan.from_json(data | {"version": 3})
    assert "heads 0 to 3 of 3, neurons 0 to" in repr(plan)


@pytest.mark.parametrize("rule, what", [(Match(merged=1), "matched"), (Select(kept=3), "selected"),
                                        (Select(kept=3, ranked_by="all"), "selected")], ids=str)
def test_a_rule_that_needs_the_attention_is_refused_where_it_is_left_out(tiny_vit, rule, what):
    shape = shape_of(tiny_vit("deit"))
    with pytest.raises(InputError, match=rf"block 1: tokens are {what} by the attention, which is left out of this "
                                         r"block \(heads is empty\); a rule that needs none, or a head, is needed"):
        CompressionPlan(shape=shape, blocks=(BlockPlan(), BlockPlan(heads=(), tokens=rule),
                                             *(BlockPlan(tokens=dataclasses.replace(rule, merged=0)
                                                         if isinstance(rule, Match) else None),) * 3))


def test_tokens_are_scored_by_no_attention_that_is_left_out(tiny_vit, images):
    dense = tiny_vit("deit")
    model = compress(dense, leaving(shape_of(dense)))
    batches = [(images(dense, 3), torch.tensor([0, 1, 2]))]
    with pytest.raises(InputError, match="gradient scores tokens by the attention, which is left out of block 0"):
        token_scores(model, batches, progress=False)
    assert token_scores(model, batches, criterion="hsic", progress=False).shape[0] == DEPTH


def test_transformers_has_no_words_for_a_block_without_attention_or_mlp(tiny_vit):
    dense = tiny_vit("deit")
    for cut, says in ((BlockPlan(heads=()), "block 0 has 0 heads of 11"), (BlockPlan(neurons=()), "has 0 neurons")):
        plan = CompressionPlan(shape=shape_of(dense), blocks=(cut,) * DEPTH)
        with pytest.raises(InputError, match=says):
            _check_alike(compress(dense, plan), "vit")


# ---- A search

TOKENS = "none", "match", "match_per_stage", "match_per_block", "select", "select_per_stage", "merge", "share"


def space_of(shape, tokens: str = "none", **settings) -> SearchSpace:
    return SearchSpace(shape=shape, tokens=tokens, max_ratio=0.75, sublayers=True, **settings)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_ratio_of_1_leaves_a_sublayer_out_and_its_counts_are_those_of_its_plan(tiny_vit, tokens):
    shape, chance = shape_of(tiny_vit("deit")), np.random.default_rng(3)
    for read_out in (False, True):
        space = space_of(shape, tokens, read_out=read_out)
        policies = chance.uniform(0, 0.75, (8, space.size))
        policies[:, :2 * DEPTH] = np.where(chance.uniform(size=(8, 2 * DEPTH)) < 0.4, 1, policies[:, :2 * DEPTH])
        scores = {name: torch.rand(DEPTH, count) for name, count in (
            ("heads", shape.num_heads), ("neurons", shape.num_neurons), ("tokens", shape.num_patches))}
        for policy, counts in zip(policies, (space.counts(p) for p in policies)):
            plan = space.plan(policy, **scores)
            given = cost.counts_of(plan)
            for name in ("heads", "neurons", "attended", "in_mlp", "compared", "pooled", "ranking", "queried"):
                assert getattr(given, name).tolist() == getattr(counts, name)[0].tolist(), name
            assert [b.leaves_out("neurons") for b in plan.blocks] == (policy[:DEPTH] == 1).tolist()
            assert [b.leaves_out("heads") for b in plan.blocks] == (policy[DEPTH:2 * DEPTH] == 1).tolist()
            if tokens not in ("merge", "share"):
                assert space.keys(space.policy(plan)[None]) == space.keys(policy[None])


def test_even_coordinates_have_one_share_more_for_a_sublayer_that_is_left_out(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    space, plain = space_of(shape), SearchSpace(shape=shape, tokens="none", max_ratio=0.75)
    points = np.repeat((np.arange(4) + 0.5)[:, None] / 4 * 0.75, space.size, axis=1)
    assert space.counts(space.from_even(points)).heads[:, 0].tolist() == [3, 2, 1, 0]
    for policy in (np.full(space.size, 1.0), np.full(space.size, 0.75), np.zeros(space.size)):
        again = space.from_even(space.even(policy[None]))
        assert space.keys(again) == space.keys(policy[None])
    assert [of[-1] for of in levels(space)] == [1.0] * space.size
    assert [of[:-1] for of in levels(space)] == levels(plain)                   # so that they are measured once
    with pytest.raises(InputError, match=r"heads 4 is 1.0; it must lie in \[0, 0.75\]"):
        plain.check(np.eye(2 * DEPTH)[[-1]])


def test_a_search_takes_a_sublayer_where_that_is_cheapest_and_its_proposals_meet_the_budget(tiny_vit):
    space = space_of(shape_of(tiny_vit("deit")))
    dense = float(space.gmacs(np.zeros((1, space.size)))[0])
    budget = Budget.of(space, 0.7 * dense)
    cheap = "neurons 1"                         # costs nothing, however much of it goes
    curves = [[(ratio, 0.0 if name == cheap else ratio) for ratio in ratios]
              for name, ratios in zip(space.names, levels(space))]
    policy = allocate(space, budget, curves)
    assert policy[space.names.index(cheap)] == 1 and budget.meets(policy[None])[0]
    drawn = varied_policies(Problem(space, budget), 20, np.random.default_rng(0))
    near = neighbours(Problem(space, budget), policy[None], 20, np.random.default_rng(0))
    assert budget.meets(drawn).all() and budget.meets(near).all()
    assert (near[:, space.names.index(cheap)] == 1).mean() > 0.5                # most neighbours go on without it
    projected, meets = budget.project(np.where(np.arange(space.size) == 1, 1.0, 0.3)[None])
    assert meets[0] and projected[0, 1] == 1


@pytest.mark.parametrize("tokens", ["none", "match_per_stage"])
def test_a_budget_that_only_whole_sublayers_can_meet_is_met_by_policies_of_every_kind(tiny_vit, tokens):
    space, chance = space_of(shape_of(tiny_vit("deit")), tokens), np.random.default_rng(0)
    some, all_gone = space.gmacs(np.stack([np.full(space.size, 0.75), space.most])).tolist()
    with pytest.raises(InputError, match=rf"reaches from {all_gone:.6g} \(everything cut by 0.75, whole sublay"):
        Budget.of(space, 0.99 * all_gone)
    for part in (0.3, 0.8) if tokens == "none" else (0.8,):       # tokens that no attention is left to merge are dear
        problem = Problem(space, Budget.of(space, all_gone + part * (some - all_gone), tolerance=0.05))
        drawn = random_policies(problem, 20, chance)
        assert len(set(space.keys(drawn))) > 5
        for policies in (drawn, uniform_policies(problem, 3, chance), varied_policies(problem, 20, chance),
                         neighbours(problem, drawn[:3], 20, chance)):
            assert len(policies) and problem.budget.meets(space.check(policies)).all()
            assert (policies == 1).any(axis=1).all()
        curves = [[(ratio, ratio**2 * (2 + place % 3)) for ratio in of] for place, of in enumerate(levels(space))]
        assert problem.budget.meets(allocate(space, problem.budget, curves)[None])[0]
    met, meets = problem.budget.project(np.where(space.most == 1, np.linspace(0.1, 0.6, space.size), 0)[None])
    gone = np.flatnonzero(met[0] == 1)
    assert meets[0] and (gone == np.arange(DEPTH)[-len(gone):]).all()           # MLPs of which it cut most


def test_a_whole_sublayer_may_lose_less_than_most_of_it_and_is_taken_at_once(tiny_vit):
    space = space_of(shape_of(tiny_vit("deit")))
    budget = Budget.of(space, 0.9 * float(space.gmacs(np.zeros((1, space.size)))[0]))
    curves = [[(ratio, {1: 0.1}.get(ratio, ratio)) for ratio in ratios] for ratios in levels(space)]
    policy = allocate(space, budget, curves)
    assert budget.meets(policy[None])[0] and (policy == 1).any()
    assert summed_losses(space, curves)(np.full((2, space.size), [[1.0], [0.75]])).tolist() == [
        [pytest.approx(0.1 * DEPTH)] * 2, [pytest.approx(sum(curve[-2][1] for curve in part))
                                           for part in (curves[:DEPTH], curves[DEPTH:])]]
    few = [[(1.0, 0.1)] for _ in curves]        # nothing else was measured
    assert dataclasses.replace(budget, tolerance=0.5).meets(allocate(
        space, dataclasses.replace(budget, tolerance=0.5), few)[None])[0]
