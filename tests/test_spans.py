"""Blocks that stay merged together (Prune and Merge over spans) against slow loops, and their deployed, exported and
trained forms."""
import copy
import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from comparing import disturb_matrices, gradient_and_slope, logits, relative
from conftest import random_rule
from safetensors.torch import load_file, save_file
from test_cost import counted_macs

from vitlab.models import attention_block, checkpoint, compress, deploy, set_trainable, shape_of
from vitlab.models.merge import TokenBlock
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import MergeReconstruct, SharedUpdate
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError

SAME = 1e-4         # relative, the project's bound for two float32 orders of the same sums, 5 blocks deep
EXACT = 1e-10       # float64: only the order of the sums differs


def spanning(shape: ViTShape, spans: dict[int, int], seed: int = 0, **cuts) -> CompressionPlan:
    """{first block: blocks that stay merged}, regions at random, some patches pruned; cuts: heads and neurons by
    block."""
    chance = random.Random(seed)
    rules = {}
    for first, span in spans.items():
        rule = random_rule(shape.num_patches, chance)
        while not rule.pruned or rule.num_merged < 3:
            rule = random_rule(shape.num_patches, chance)
        rules[first] = dataclasses.replace(rule, span=span, trains="both")
    return CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(tokens=rules.get(i), **{name: by_block.get(i) for name, by_block in cuts.items()})
        for i in range(shape.depth)))


# ---- The oracle: y = reconstruct @ Block_j(... Block_i(merge @ x)) + (1 - token_mask) * x, one image and one row at a
# time.

def starting_matrices(plan: CompressionPlan) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """{first block: (merge, reconstruct)} from the rules' numbers."""
    found, prefix = {}, plan.shape.num_prefix_tokens
    for index, block in enumerate(plan.blocks):
        if block.tokens is not None:
            rule = block.tokens
            merge = torch.zeros(prefix + max(rule.regions) + 1, prefix + len(rule.regions), dtype=torch.float64)
            for j in range(prefix):
                merge[j, j] = 1
            for j, (region, weight) in enumerate(zip(rule.regions, rule.weights)):
                if region >= 0:
                    merge[prefix + region, prefix + j] = weight
            found[index] = merge, torch.linalg.pinv(merge)
    return found


def trained_matrices(model, plan: CompressionPlan) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """{first block: (merge, reconstruct)} by the names under which a checkpoint has them."""
    state = model.state_dict()
    return {i: (state[f"blocks.{i}.tokens.merge_matrix"], state[f"blocks.{i}.tokens.reconstruct_matrix"])
            for i, block in enumerate(plan.blocks) if block.tokens is not None}


@torch.no_grad()
def streams_slowly(dense, x: torch.Tensor, plan: CompressionPlan, matrices: dict) -> list[torch.Tensor]:
    """The tokens (B, N, D) after each block; inside a span those that would be given back there."""
    prefix, streams = plan.shape.num_prefix_tokens, [[] for _ in dense.blocks]
    for tokens in dense.norm_pre(dense._pos_embed(dense.patch_embed(x))):          # (N, D)
        index = 0
        while index < len(dense.blocks):
            rule = plan.blocks[index].tokens
            if rule is None:
                tokens = dense.blocks[index](tokens[None])[0]
                streams[index].append(tokens)
                index += 1
                continue
            merge, reconstruct = (matrix.to(tokens) for matrix in matrices[index])
            rows = torch.stack([sum(float(weight) * token for weight, token in zip(row, tokens)) for row in merge])
            entering = tokens
            for block in range(index, index + rule.span):
                rows = dense.blocks[block](rows[None])[0]
                tokens = torch.stack([sum(float(weight) * row for weight, row in zip(weights, rows))
                                      for weights in reconstruct])
                for j in rule.pruned:
                    tokens[prefix + j] += entering[prefix + j]
                streams[block].append(tokens)
            index += rule.span
    return [torch.stack(stream) for stream in streams]


def logits_slowly(dense, x: torch.Tensor, plan: CompressionPlan, matrices: dict) -> torch.Tensor:
    with torch.no_grad():
        return dense.forward_head(dense.norm(streams_slowly(dense, x, plan, matrices)[-1]))


def test_a_span_follows_the_formula_from_the_plans_numbers(tiny_vit, family, span_layout, images, random_plan):
    dense = tiny_vit(family)
    plan, x = random_plan(shape_of(dense), span_layout, seed=5, shrink=False), images(dense, 2)
    expected = logits_slowly(dense, x, plan, starting_matrices(plan))
    assert relative(logits(compress(dense, plan), x), expected) < SAME
    assert relative(expected, logits(dense, x)) > 100 * SAME                        # the plan does cut something


def test_a_span_follows_the_formula_with_trained_matrices(tiny_vit, family, span_layout, images, random_plan):
    dense = tiny_vit(family).double()
    plan, x = random_plan(shape_of(dense), span_layout, seed=6, shrink=False), images(dense, 2).double()
    model = compress(dense, plan)
    disturb_matrices(model)
    assert relative(logits(model, x), logits_slowly(dense, x, plan, trained_matrices(model, plan))) < EXACT


def test_the_matrices_stand_on_the_first_block_of_a_span(tiny_vit):
    dense = tiny_vit("deit")
    plan = spanning(shape_of(dense), {0: 1, 1: 3})
    state = compress(dense, plan).state_dict()
    own = {name: tuple(value.shape) for name, value in state.items() if ".tokens." in name}
    n, (one, three) = plan.shape.num_tokens, (1 + plan.blocks[i].tokens.num_merged for i in (0, 1))
    assert own == {
        "blocks.0.tokens.merge_matrix": (one, n), "blocks.0.tokens.reconstruct_matrix": (n, one),
        "blocks.0.tokens.token_mask": (n,), "blocks.1.tokens.merge_matrix": (three, n),
        "blocks.1.tokens.token_mask": (n,), "blocks.1.tokens.reconstruct_matrix": (n, three)}
    renamed = set(dense.state_dict())
    for i in range(4):
        renamed = {name.replace(f"blocks.{i}.", f"blocks.{i}.block.") for name in renamed}
    assert set(state) - set(own) == renamed


def test_a_pruned_patch_skips_the_whole_span_and_nothing_in_it_sees_it(tiny_vit, family, images):
    dense = tiny_vit(family)
    plan = spanning(shape_of(dense), {1: 3})
    model, pruned = compress(dense, plan), [plan.shape.num_prefix_tokens + j for j in plan.blocks[1].tokens.pruned]
    others = [j for j in range(plan.shape.num_tokens) if j not in pruned]
    x = torch.randn(2, plan.shape.num_tokens, plan.shape.embed_dim, generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    changed[:, pruned] += 1
    with torch.no_grad():
        given, again = (model.blocks[3](model.blocks[2](model.blocks[1](each))) for each in (x, changed))
    assert torch.equal(given[:, pruned], x[:, pruned]) and torch.equal(again[:, pruned], changed[:, pruned])
    assert torch.equal(given[:, others], again[:, others]) and not torch.equal(given[:, others], x[:, others])


# ---- Deployed form (A7)

@pytest.mark.parametrize("pool", ["token", "avg"])
def test_deployed_form_equals_the_training_form(tiny_vit, family, span_layout, images, random_plan, pool):
    dense = tiny_vit(family, **({} if family == "distilled" else {"global_pool": pool})).double()
    x = images(dense, 3).double()
    model = compress(dense, random_plan(shape_of(dense), span_layout, seed=sum(map(ord, family + span_layout))))
    disturb_matrices(model)
    assert relative(logits(deploy(model), x), logits(model, x)) < EXACT


def test_nothing_stands_between_the_blocks_of_a_deployed_span(tiny_vit):
    dense = tiny_vit("mae")
    deployed = deploy(compress(dense, spanning(shape_of(dense), {0: 2, 2: 1, 3: 2})))
    assert [hasattr(block.fold, "matrix") for block in list(deployed.blocks)[:-1]] == [True, False, True, True, False]


@pytest.mark.parametrize("form", ["training", "deployed"])
def test_macs_equal_what_runs(tiny_vit, family, span_layout, random_plan, form):
    dense = tiny_vit(family)
    plan = random_plan(shape_of(dense), span_layout, seed=sum(map(ord, family + span_layout)))
    model = compress(dense, plan)
    assert cost.macs(plan, form)["total"] == counted_macs(model if form == "training" else deploy(model))


def test_parts_of_a_span_are_the_hand_computed_numbers():
    # D = 33, width 33 (block 1: 22), M = 41, 15 patches and 2 prefix tokens. Blocks 1 and 2 stay merged: 4 regions, 2
    # patches pruned.
    shape = ViTShape(img_size=(48, 80), patch_size=(16, 16), embed_dim=33, depth=4, num_heads=3, head_dim=11,
                     num_neurons=41, num_prefix_tokens=2, num_classes=7)
    rule = MergeReconstruct(regions=(-1, -1) + tuple(j % 4 for j in range(13)), weights=(0.0, 0.0) + (0.3,) * 13,
                            pruned=(0, 1), span=2)
    plan = CompressionPlan(shape=shape,
                           blocks=(BlockPlan(), BlockPlan(tokens=rule, heads=(0, 2)), BlockPlan(), BlockPlan()))
    for form, own in (("training", {"merge": 6 * 17 * 33, "reconstruct": 6 * 17 * 33, "fold": 0}),
                      ("published", {"merge": 0, "reconstruct": 0, "fold": 0}),
                      # 6 merged and 2 carried rows of 17 before the span; all 17 of 8 after it; nothing in it or at the
                      # end.
                      ("deployed", {"merge": 0, "reconstruct": 0, "fold": (8 * 17 + 17 * 8) * 33})):
        parts = cost.macs(plan, form)
        assert parts["qkv"] == 3 * 33 * (17 * 33 + 6 * 22 + 6 * 33 + 17 * 33)
        assert parts["attention"] == 2 * (17 * 17 * 33 + 6 * 6 * 22 + 6 * 6 * 33 + 17 * 17 * 33)
        assert parts["mlp"] == 2 * 33 * 41 * (17 + 6 + 6 + 17)
        assert {name: parts[name] for name in own} == own
    end = CompressionPlan(shape=shape, blocks=(BlockPlan(), BlockPlan(), plan.blocks[1], BlockPlan()))
    # the prefix tokens' rows alone at the end
    assert cost.macs(end)["fold"] == (8 * 17 + 2 * 8) * 33


# ---- Cutting further, checking, files

def test_a_span_cut_further_keeps_its_trained_matrices(tiny_vit, images):
    dense = tiny_vit("deit")
    before, after = (spanning(shape_of(dense), {1: 3}, **cuts)
                     for cuts in ({}, {"heads": {2: (0, 2)}, "neurons": {3: (1, 5, 7)}}))
    model, x = compress(dense, before), images(dense)
    disturb_matrices(model)
    further = compress(model, after, before=before)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in further.state_dict().items() if ".tokens." in k)
    assert attention_block(further.blocks[2]).attn.num_heads == 2 and attention_block(
        further.blocks[3]).mlp.fc2.in_features == 3
    assert relative(logits(deploy(further), x), logits(further, x)) < SAME


@pytest.mark.parametrize("now", [{}, {0: 3}, {2: 3}, {1: 2}, {1: 4}, {2: 2}, {1: 1, 2: 1}, {0: 5}], ids=str)
def test_another_span_takes_the_place_of_the_one_before_in_every_block(tiny_vit, images, now):
    dense = tiny_vit("deit")
    shape, x = shape_of(dense), images(dense)
    rule = spanning(shape, {1: 3}).blocks[1].tokens

    def with_spans(spans: dict[int, int]) -> CompressionPlan:
        return CompressionPlan(shape=shape, blocks=tuple(
            BlockPlan(tokens=dataclasses.replace(rule, span=spans[i]) if i in spans else None) for i in range(5)))
    model = compress(compress(dense, with_spans({1: 3})), with_spans(now), before=with_spans({1: 3}))
    at_once = compress(dense, with_spans(now))
    assert [type(b) for b in model.blocks] == [type(b) for b in at_once.blocks]
    assert torch.equal(logits(model, x), logits(at_once, x))
    kinds = [type(dense.blocks[0])] * 5
    for first, span in now.items():
        kinds[first:first + span] = [TokenBlock] * span
    assert [type(b) for b in model.blocks] == kinds
    assert [b.place for b in model.blocks
            if type(b) is TokenBlock] == [place for span in now.values() for place in range(span)]


def test_saving_a_span_with_another_plan_is_refused_by_block(tiny_vit, tmp_path):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    plan = spanning(shape, {1: 3})
    rule = plan.blocks[1].tokens
    model = compress(dense, plan)

    def other(**blocks) -> CompressionPlan:
        return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=blocks.get(f"b{i}")) for i in range(5)))
    fewer = dataclasses.replace(rule, regions=tuple(min(r, 1) for r in rule.regions))
    moved = spanning(shape, {1: 3}, seed=1).blocks[1].tokens
    for wrong, block in ((other(), 1), (other(b1=dataclasses.replace(rule, span=2)), 1),
                         (other(b1=dataclasses.replace(rule, span=4)), 1),
                         (other(b1=dataclasses.replace(rule, span=1)), 1), (other(b2=rule), 1), (other(b1=fewer), 1),
                         (other(b1=moved), 1)):
        with pytest.raises(InputError, match=f"block {block} of the model is not what the plan says"):
            checkpoint.save(tmp_path / "c", model, wrong)
    two = compress(dense, other(b0=dataclasses.replace(rule, span=2), b2=dataclasses.replace(rule, span=2)))
    with pytest.raises(InputError, match="block 0 of the model is not what the plan says"):
        checkpoint.save(tmp_path / "c", two, other(b0=dataclasses.replace(rule, span=4)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["compressed", "deployed"])
@pytest.mark.parametrize("family_name", ["deit", "mae"])
def test_a_saved_model_comes_back_bit_equal(tiny_vit, images, tmp_path, form, family_name):
    dense = tiny_vit(family_name)
    plan, x = spanning(shape_of(dense), {0: 2, 3: 2}, heads={1: (0,)}), images(dense)
    model = compress(dense, plan)
    disturb_matrices(model)
    model = deploy(model) if form == "deployed" else model
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan))
    assert found.plan == plan and torch.equal(logits(found.model, x), logits(model, x))


# ---- It stays a timm model that trains

def test_intermediates_are_whole_grids_and_inside_a_span_those_that_would_be_given_back(tiny_vit, family, images,
                                                                                        span_layout, random_plan):
    dense = tiny_vit(family).double()
    plan, x = random_plan(shape_of(dense), span_layout, seed=9, shrink=False), images(dense).double()
    model, prefix = compress(dense, plan), plan.shape.num_prefix_tokens
    disturb_matrices(model)
    expected = streams_slowly(dense, x, plan, trained_matrices(model, plan))
    with torch.no_grad():
        final, found = model.forward_intermediates(x, return_prefix_tokens=True, output_fmt="NLC")
        assert torch.equal(final, model.forward_features(x))
    for (patches, first), whole in zip(found, expected, strict=True):
        assert relative(patches, whole[:, prefix:]) < EXACT and relative(first, whole[:, :prefix]) < EXACT


def test_some_intermediates_equal_those_of_all_and_nothing_is_left_behind(tiny_vit, images):
    dense = tiny_vit("deit")
    model, x = compress(dense, spanning(shape_of(dense), {1: 3})), images(dense)
    every, before = model.forward_intermediates(x, intermediates_only=True), logits(model, x)
    some = model.forward_intermediates(x, intermediates_only=True, indices=[0, 2], stop_early=True)
    assert torch.equal(some[0], every[0]) and torch.equal(some[1], every[2]) and len(some) == 2
    assert torch.equal(logits(model, x), before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[2].block.norm1.bias.add_(1)
    a, b = (m.forward_intermediates(x, intermediates_only=True) for m in (twin, model))
    assert torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2]) and torch.equal(b[2], every[2])
    with pytest.raises(InputError, match="no token grid between the blocks of a deployed model"):
        deploy(model).forward_intermediates(x)


def test_gradients_are_the_slope_of_the_output_and_reach_both_matrices(tiny_vit, family, images):
    dense = tiny_vit(family).double()
    # a last reconstruct is read in part
    model, x = compress(dense, spanning(shape_of(dense), {0: 2, 2: 2})), images(dense).double()
    disturb_matrices(model)
    got, slope, still = gradient_and_slope(model, x)
    assert not [n for n in still if not n.startswith("head_dist")]
    # The central difference errs by step^2 times a third derivative, and by about 1e-15 / step in rounding: below 1e-5.
    assert got == pytest.approx(slope, rel=1e-5)
    for name, block in (("merge_matrix", 0), ("reconstruct_matrix", 0), ("merge_matrix", 2), ("reconstruct_matrix", 2)):
        # of every row
        assert bool((getattr(model.blocks[block].tokens, name).grad != 0).any(dim=1).all()), (name, block)


@pytest.mark.parametrize("family_name", ["deit", "mae"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_vit, images, family_name):
    dense = tiny_vit(family_name)
    x, gradients = images(dense), []
    for enable in (False, True):
        model = compress(dense, spanning(shape_of(dense), {0: 2, 2: 3})).train()
        model.set_grad_checkpointing(enable)
        F.cross_entropy(model(x), torch.tensor([1, 5])).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    # the same operations run twice: equal but for the order of additions
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what, merges", [("all", True), ("matrices", True), ("weights", False)])
@pytest.mark.parametrize("trains", ["both", "reconstruct"])
def test_what_trains_of_a_span(tiny_vit, what, merges, trains):
    dense = tiny_vit("deit")
    plan = spanning(shape_of(dense), {1: 3})
    plan = dataclasses.replace(plan, blocks=tuple(
        b if b.tokens is None else BlockPlan(tokens=dataclasses.replace(b.tokens, trains=trains)) for b in plan.blocks))
    model = compress(dense, plan)
    set_trainable(model, what)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert flags.pop("blocks.1.tokens.merge_matrix") == (merges and trains == "both")
    assert flags.pop("blocks.1.tokens.reconstruct_matrix") == merges
    assert set(flags.values()) == {what != "matrices"}


@pytest.mark.parametrize("form", ["compressed", "deployed"])
def test_export_gives_the_same_logits_for_other_images_and_batches(tiny_vit, images, form):
    dense = tiny_vit("dinov2_reg")
    model = compress(dense, spanning(shape_of(dense), {0: 2, 3: 2}))
    model = deploy(model) if form == "deployed" else model
    exported = torch.export.export(model, (images(dense, 2, seed=1),),
                                   dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)).module()
    for count in (2, 5):
        x = images(dense, count, seed=2)
        assert relative(logits(exported, x), logits(model, x)) < SAME


def test_a_traced_compiler_gives_the_same_logits(tiny_vit, images):
    """By the tracer of torch.compile, without its code generator, which needs a compiler on the machine."""
    dense = tiny_vit("deit")
    model, x = compress(dense, spanning(shape_of(dense), {1: 3})), images(dense)
    assert relative(logits(torch.compile(model, backend="eager", fullgraph=True), x), logits(model, x)) < SAME


@pytest.mark.parametrize("block", [1, 2, 3])
def test_an_attention_mask_is_refused_in_every_block_of_a_span(tiny_vit, images, block):
    dense = tiny_vit("deit")
    model = compress(dense, spanning(shape_of(dense), {1: 3}))
    model.blocks[block].register_forward_pre_hook(lambda m, args, kwargs: (args, {"is_causal": True}), with_kwargs=True)
    with pytest.raises(InputError, match="takes no attention mask"):
        logits(model, images(dense))


def test_a_file_with_the_names_of_before_loads(tiny_vit, images, tmp_path):
    dense = tiny_vit("deit")
    shape, n = shape_of(dense), shape_of(dense).num_patches
    half = tuple(j // 2 for j in range(n))
    weights = tuple(1 / half.count(r) for r in half)
    blocks = (BlockPlan(tokens=SharedUpdate(regions=half, weights=weights, own=0.5, proportional=True)),
              BlockPlan(tokens=MergeReconstruct(regions=half, weights=weights, span=3)), *[BlockPlan()] * 3)
    plan = CompressionPlan(shape=shape, blocks=blocks)
    model = compress(dense, plan)
    disturb_matrices(model)
    folder = checkpoint.save(tmp_path / "c", model, plan)
    state = load_file(folder / checkpoint.WEIGHTS)
    state["blocks.3.tokens.reconstruct_matrix"] = state.pop("blocks.1.tokens.reconstruct_matrix")
    for name in ("regions", "weights", "own", "mask"):
        del state[f"blocks.0.{name}"]
    save_file(state, folder / checkpoint.WEIGHTS)
    assert torch.equal(logits(checkpoint.load(folder).model, images(dense)), logits(model, images(dense)))
