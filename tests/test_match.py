"""Blocks that merge tokens by content (arXiv 2210.09461) against slow loops, and their deployed, exported and trained
forms."""
import copy
import dataclasses
import math
import pickle
import random

import pytest
import timm
import torch
from comparing import gradient_and_slope, logits, relative
from conftest import random_rule
from timm.layers import Attention
from torch import nn

from vitlab.criteria.units import UnitScores
from vitlab.models import attention_block, checkpoint, compress, deploy, shape_of
from vitlab.models.attention import KeyedAttention, attention_as
from vitlab.models.held import Merged
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan import matching as functions
from vitlab.plan.rules import Match, MergeReconstruct, Select, SharedUpdate
from vitlab.runtime.files import InputError
from vitlab.training.gradual import partial_plan

SAME = 1e-4         # relative, the project's bound for two float32 orders of the same sums, 5 blocks deep
# Where two ways of computing are compared that both match, all runs in float64: float32 rounding could swap two pairs
# that are
# nearly equally alike, and sums of a few hundred terms round to about 1e-14 there.
EXACT = 1e-10
MERGED = (0, 4, 0, 3, 2)        # of 15 patches or more: 11, 11, 8, 6 are left


def plan_with(shape, rules: dict, **cuts) -> CompressionPlan:
    """Token rules by block; cuts: heads and neurons by block."""
    return CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(tokens=rules.get(i), **{name: by_block.get(i) for name, by_block in cuts.items()})
        for i in range(shape.depth)))


def matching(shape, merged=MERGED, protect: float = 0.1, by_size: bool = True, **cuts) -> CompressionPlan:
    """merged: tokens that go in each block, the last blocks; those before have no rule."""
    protect = protect if shape.num_prefix_tokens else 0.0
    first = shape.depth - len(merged)
    return plan_with(shape, {first + i: Match(merged=count, protect=protect, by_size=by_size) for i, count in
                             enumerate(merged)}, **cuts)


def double(thing):
    return thing.double()


# ---- The oracle: one image, one head, one query at a time, from the formula and the dense block's weights alone.

def norm_slowly(rows: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """LayerNorm of each row."""
    if isinstance(norm, nn.Identity):
        return rows
    away = rows - rows.mean(dim=1, keepdim=True)
    return away / ((away ** 2).sum(dim=1, keepdim=True) / rows.shape[1] + norm.eps).sqrt() * norm.weight + norm.bias


def matched_slowly(keys: torch.Tensor, importance: list[float], sizes: list[int] | None) -> list[tuple[int, int]]:
    """(source, target) of all sources in the order in which they go; keys (n, W) without prefix tokens. sizes: of the
    tokens, where they count."""
    found = []
    for s in range(0, len(keys), 2):
        alike = {t: float(keys[s] @ keys[t]) / math.sqrt(float(keys[s] @ keys[s]) * float(keys[t] @ keys[t]))
                 for t in range(1, len(keys), 2)}
        if sizes:
            alike = {t: (a - 1) / math.sqrt((1 / sizes[s] + 1 / sizes[t]) / 2) for t, a in alike.items()}
        best = max(alike, key=alike.get)
        found.append((importance[s] - alike[best], s, best))
    return [(s, t) for _, s, t in sorted(found)]


def block_slowly(dense, x: torch.Tensor, sizes: list[int], cut: BlockPlan, prefix: int):
    """One image: x (N, D) of tokens that stand for `sizes` patches -> (tokens, sizes, the token that each patch token
    went into)."""
    attn, mlp, rule, n = dense.attn, dense.mlp, cut.tokens, len(x) - prefix
    d, heads = attn.head_dim, range(attn.num_heads) if cut.heads is None else cut.heads
    gamma1, gamma2 = (ls.gamma if hasattr(ls, "gamma") else torch.ones(x.shape[1], dtype=x.dtype)
                      for ls in (dense.ls1, dense.ls2))
    normed, mixed, row, keys = norm_slowly(x, dense.norm1), torch.zeros(len(x), attn.num_heads * d,
                                                                        dtype=x.dtype), 0, []
    for h in heads:
        where = [slice(part * attn.num_heads * d + h * d, part * attn.num_heads * d + (h + 1) * d) for part in range(3)]
        q, k, v = (normed @ attn.qkv.weight[w].T + (0 if attn.qkv.bias is None else attn.qkv.bias[w]) for w in where)
        q, k = norm_slowly(q, attn.q_norm), norm_slowly(k, attn.k_norm)
        for i in range(len(x)):
            plain = [math.exp(float(q[i] @ k[j]) / math.sqrt(d)) for j in range(len(x))]
            counted = [p * size for p, size in zip(plain, sizes)]               # exp(logit + log size)
            mixed[i, h * d:(h + 1) * d] = sum(c / sum(counted) * v[j] for j, c in enumerate(counted))
            if i == 0:                                                          # the class token's, sizes left out
                row = row + torch.tensor(plain) / sum(plain) / len(heads)
        keys.append(k[prefix:])
    x = x + gamma1 * (mixed @ attn.proj.weight.T + attn.proj.bias)
    importance = (row[prefix:] * len(x) * rule.protect).tolist()                # in units of an even attention, 1 / N
    counted = sizes[prefix:] if rule.by_size and max(sizes) > 1 else None
    pairs = matched_slowly(torch.cat(keys, dim=1), importance, counted)
    going = dict(pairs[:rule.merged])
    tokens = [[s] for s in sorted(s for s, _ in pairs[rule.merged:])] if rule.merged else [[j] for j in range(n)]
    if rule.merged:
        tokens += [[t, *(s for s in going if going[s] == t)] for t in range(1, n, 2)]
    new_sizes = [sum(sizes[prefix + j] for j in inside) for inside in tokens]
    means = [sum(sizes[prefix + j] * x[prefix + j] for j in inside) / total for inside, total in zip(tokens, new_sizes)]
    x = torch.stack([*x[:prefix], *means])
    hidden = norm_slowly(x, dense.norm2) @ mlp.fc1.weight.T + mlp.fc1.bias
    x = x + gamma2 * ((hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))) @ mlp.fc2.weight.T + mlp.fc2.bias)
    return x, sizes[:prefix] + new_sizes, [[j in inside for inside in tokens].index(True) for j in range(n)]


@torch.no_grad()
def model_slowly(dense, x: torch.Tensor, plan: CompressionPlan) -> tuple[list[list], torch.Tensor]:
    """(per image and block: tokens, sizes and where each patch is; logits)."""
    prefix, rows = plan.shape.num_prefix_tokens, dense.norm_pre(dense._pos_embed(dense.patch_embed(x)))
    seen, ends = [], []
    for tokens in rows:
        sizes, places, found = [1] * len(tokens), list(range(len(tokens) - prefix)), []
        for block, cut in zip(dense.blocks, plan.blocks):
            tokens, sizes, moved = block_slowly(block, tokens, sizes, cut, prefix)
            places = [moved[place] for place in places]
            found.append((tokens, sizes, places))
        seen.append(found)
        ends.append(torch.stack([*tokens[:prefix], *(tokens[prefix + place] for place in places)]))
    return seen, dense.forward_head(dense.norm(torch.stack(ends)))


@torch.no_grad()
@pytest.mark.parametrize("protect, by_size", [(0.0, True), (0.1, True), (0.1, False)])
@pytest.mark.parametrize("cut_heads", [False, True], ids=["all heads", "heads cut"])
def test_matching_blocks_follow_the_formula_written_as_loops_through_the_whole_model(tiny_vit, family, images, protect,
                                                                                     by_size, cut_heads):
    dense = double(tiny_vit(family))
    shape = shape_of(dense)
    heads = {1: tuple(range(1, shape.num_heads)), 3: tuple(range(shape.num_heads - 1)), 4: (0,)} if cut_heads else {}
    plan = matching(shape, MERGED, protect, by_size, heads=heads)
    model, x = compress(dense, plan), double(images(dense))
    wanted, ends = model_slowly(dense, x, plan)
    given = dense.norm_pre(dense._pos_embed(dense.patch_embed(x)))
    for index, block in enumerate(model.blocks):
        given = block.merged(given)
        state = given if isinstance(given, Merged) else Merged(given, None, None, 0)
        for b in range(len(x)):
            tokens, sizes, places = wanted[b][index]
            assert relative(state.x[b], tokens) < EXACT
            assert state.sizes is None or (state.sizes[b].tolist(), state.places[b].tolist()) == (sizes, places)
        assert (state.sizes is None) == (index == 0)
    assert relative(logits(model, x), ends) < EXACT


def test_the_oracle_tells_protection_and_sizes_apart(tiny_vit, images):
    # Else agreement with it would say nothing.
    dense = double(tiny_vit("deit"))
    x = double(images(dense))
    found = [model_slowly(dense, x, matching(shape_of(dense), MERGED, protect)) for protect in (0.0, 0.1)]
    assert relative(found[0][1], found[1][1]) > 100 * SAME
    tokens, sizes, _ = found[0][0][0][2]
    cut = BlockPlan(tokens=Match(merged=0))
    with torch.no_grad():
        counted, alike = (block_slowly(dense.blocks[3], tokens, each, cut, 1)[0] for each in (sizes, [1] * len(sizes)))
    assert relative(counted, alike) > 100 * SAME


# ---- Neutral

def test_merging_none_is_bit_equal_to_the_dense_model(tiny_vit, family, images):
    dense = tiny_vit(family)
    shape, x = shape_of(dense), images(dense, 3)
    for plan in (CompressionPlan.empty(shape), matching(shape, (0,) * 5), matching(shape, (0, 0))):
        model = compress(dense, plan)
        assert torch.equal(logits(model, x),
                           logits(dense, x)) and torch.equal(logits(deploy(model), x), logits(dense, x))
        for a, b in zip(model.forward_intermediates(x, intermediates_only=True),
                        dense.forward_intermediates(x, intermediates_only=True)):
            assert torch.equal(a, b)


def test_patches_that_are_alike_are_merged_without_a_trace(tiny_vit):
    # Without positions, patches of one kind are one token many times over, and proportional attention counts it as
    # often.
    dense = double(tiny_vit("deit"))
    with torch.no_grad():
        dense.pos_embed[:, 1:] = 0
    kinds = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([torch.cat([kinds[0]] * 5, dim=2), torch.cat([kinds[1]] * 5, dim=2),
                   torch.cat([kinds[2]] * 5, dim=2)], dim=1)[None]
    model = compress(dense, matching(shape_of(dense), (0, 5, 4, 2, 0)))         # 15 patches of 3 kinds: 12 can go
    assert relative(logits(model, x), logits(dense, x)) < EXACT
    changed = copy.deepcopy(model)
    for block in changed.blocks:
        block.register_forward_pre_hook(lambda m,
                                        given: (dataclasses.replace(given[0], sizes=torch.ones_like(given[0].sizes)),)
                                        if isinstance(given[0], Merged) else None)
    assert relative(logits(changed, x), logits(dense, x)) > 100 * EXACT         # the sizes are what makes it so


# ---- Properties

def states(model, x) -> list:
    """What leaves every block before the grid is given back."""
    found, handles = [], []
    for block in model.blocks:
        handles.append(block.register_forward_pre_hook(lambda m, given: found.append(m.merged(*given))))
    logits(model, x)
    for handle in handles:
        handle.remove()
    return found


def test_token_counts_are_those_of_the_plan_and_every_patch_has_its_place(tiny_vit, family, images):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    plan = matching(shape)
    model = compress(dense, plan)
    for x in (images(dense, 3), torch.zeros(1, 3, *shape.img_size), 50 * images(dense, 2, seed=1)):
        for flow, state in zip(plan.flows()[1:], states(model, x)[1:]):
            assert state.x.shape == (len(x), flow.after, shape.embed_dim) and state.sizes.shape == (len(x), flow.after)
            assert bool((state.sizes[:, :shape.num_prefix_tokens] == 1).all())
            for sizes, places in zip(state.sizes[:, shape.num_prefix_tokens:], state.places):
                assert places.bincount(minlength=len(sizes)).tolist() == sizes.tolist() and len(
                    places) == shape.num_patches


def test_each_image_alone_gives_the_same_as_in_the_batch(tiny_vit, family, images):
    dense = double(tiny_vit(family))
    model, x = compress(dense, matching(shape_of(dense))), double(images(dense, 5))
    together = logits(model, x)
    for index in range(5):
        assert relative(logits(model, x[index:index + 1]), together[index:index + 1]) < EXACT
    assert len({tuple(places.tolist()) for places in states(model, x)[-1].places}) == 5        # and each merges its own


def test_fused_attention_off_gives_the_same(tiny_vit, family, images):
    found = []
    for fused in (True, False):
        timm.layers.set_fused_attn(fused)
        try:
            dense = double(tiny_vit(family))
        finally:
            timm.layers.set_fused_attn(True)
        assert {block.attn.fused_attn for block in dense.blocks} == {fused}
        found.append(logits(compress(dense, matching(shape_of(dense), (3, 0, 2, 0, 1))), double(images(dense))))
    assert relative(*found) < EXACT


# ---- Forms: deployed, exported, saved

@pytest.mark.parametrize("pool", ["token", "avg"])
def test_deployed_form_equals_the_training_form(tiny_vit, family, images, pool):
    dense = double(tiny_vit(family, **({} if family == "distilled" else {"global_pool": pool})))
    shape = shape_of(dense)
    model, x = compress(dense, matching(shape, heads={3: (0,)}, neurons={1: (5, 7)})), double(images(dense, 3))
    deployed = deploy(model)
    assert relative(logits(model, x), logits(dense, x)) > 100 * SAME            # the plan does cut something
    assert relative(logits(deployed, x), logits(model, x)) < EXACT and not deployed.training
    assert deployed.forward_features(x).shape[1] == model.forward_features(x).shape[1] == shape.num_tokens
    assert relative(logits(deploy(deployed), x), logits(model, x)) < EXACT


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_deployed_form_in_float32_equals_the_training_form_after_blocks_that_merge_by_place(tiny_vit, images, pool):
    dense = tiny_vit("dinov2_reg", global_pool=pool)
    shape = shape_of(dense)
    chance = random.Random(3)
    rule = random_rule(shape.num_patches, chance)
    share = SharedUpdate(regions=tuple(j // 2 for j in range(15)), weights=(0.5,) * 14 + (1.0,))
    for before in ({0: rule}, {0: share}, {0: rule, 1: share}, {0: share, 1: rule, 2: Match(merged=0)}):
        rules = {2: Match(merged=4), 3: Match(merged=0), 4: Match(merged=3)} | before
        model, x = compress(dense, plan_with(shape, rules if 1 in before else rules | {1: None})), images(dense, 3)
        assert relative(logits(deploy(model), x), logits(model, x)) < SAME


@pytest.mark.parametrize("family_name, form", [("qk_norm", "compressed"), ("dinov2_reg", "deployed")])
def test_export_gives_the_same_logits_for_other_images_and_batches(tiny_vit, images, family_name, form):
    dense = tiny_vit(family_name)
    model = compress(dense, matching(shape_of(dense)))
    model = deploy(model) if form == "deployed" else model
    exported = torch.export.export(model, (images(dense, 2, seed=1),),
                                   dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)).module()
    for count in (2, 5):
        x = images(dense, count, seed=2)                        # the match is made anew, not recorded
        assert relative(logits(exported, x), logits(model, x)) < SAME


@pytest.mark.parametrize("form", ["compressed", "deployed"])
@pytest.mark.parametrize("family_name", ["deit", "mae"])
def test_a_saved_model_comes_back_bit_equal(tiny_vit, images, tmp_path, form, family_name):
    dense = tiny_vit(family_name)
    plan = matching(shape_of(dense), heads={2: (0,)})
    model = compress(dense, plan)
    model = deploy(model) if form == "deployed" else model
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan))
    x = images(dense)
    assert torch.equal(logits(found.model, x), logits(model, x)) and found.plan == plan


def test_saving_with_another_plan_is_refused(tiny_vit, tmp_path):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    for form in (compress(dense, matching(shape)), deploy(compress(dense, matching(shape)))):
        others = (CompressionPlan.empty(shape), matching(shape, (0, 4, 0, 3, 1)), matching(shape, protect=0.2),
                  matching(shape, MERGED[1:]))
        for other in others:
            with pytest.raises(InputError, match=r"block [0-4] of the model is not what the plan says"):
                checkpoint.save(tmp_path / "c", form, other)
    assert not list(tmp_path.iterdir())


def test_a_copied_and_a_pickled_model_stand_on_their_own(tiny_vit, images):
    dense = tiny_vit("deit")
    model, x = compress(dense, matching(shape_of(dense))), images(dense)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, x), logits(model, x))
        with torch.no_grad():
            other.blocks[2].block.norm1.bias.add_(1)
        a, b = (m.forward_intermediates(x, intermediates_only=True) for m in (other, model))
        assert torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2])


# ---- Cut further

@pytest.mark.parametrize("form", ["training", "deployed"])
def test_a_matching_model_is_cut_further_from_the_plan_before(tiny_vit, family, images, form):
    dense = tiny_vit(family)
    shape, x = shape_of(dense), images(dense)
    first, then = matching(shape, (3, 0, 2), heads={1: (0, 1)}), matching(shape, (2, 0, 5, 1), 0.0, heads={1: (1,)})
    model = compress(dense, first)
    model = deploy(model) if form == "deployed" else model
    further = compress(model, then, before=first)
    assert torch.equal(logits(further, x), logits(compress(dense, then), x))
    assert [f.shape[-2:] for f in further.forward_intermediates(x, intermediates_only=True)] == [shape.grid_size] * 5
    # no rule at all: plain blocks again
    back = compress(further, matching(shape, (), heads={1: (1,)}), before=then)
    assert torch.equal(logits(back, x), logits(compress(dense, matching(shape, (), heads={1: (1,)})), x))
    assert type(back) is type(dense) and all(attention_block(b) is b and type(b.attn) is Attention for b in back.blocks)
    assert not back.patch_embed._forward_pre_hooks


def test_parts_of_a_matching_plan_match_in_the_last_blocks_alone(tiny_vit, images):
    dense = tiny_vit("deit")
    shape, plan = shape_of(dense), matching(shape_of(dense), (7, 4, 0, 1, 1))
    scores = UnitScores(heads=torch.rand(5, shape.num_heads), neurons=torch.rand(5, shape.num_neurons), made_by={})
    for fraction, first in ((0.2, 4), (0.5, 2), (0.9, 0), (1.0, 0)):
        part = partial_plan(plan, fraction, scores)
        assert [block.tokens
                for block in part.blocks] == [None] * first + [block.tokens for block in plan.blocks[first:]]
        assert bool(torch.isfinite(logits(compress(dense, part), images(dense))).all())


# ---- Intermediates

def test_intermediates_are_whole_grids_and_the_last_is_what_the_classifier_sees(tiny_vit, family, images):
    dense = double(tiny_vit(family))
    shape, x = shape_of(dense), double(images(dense))
    plan = matching(shape)
    model = compress(dense, plan)
    with torch.no_grad():
        final, found = model.forward_intermediates(x, norm=True, return_prefix_tokens=True, output_fmt="NLC")
        whole = model.forward_features(x)
        wanted, _ = model_slowly(dense, x, plan)
        assert relative(final, whole) < EXACT and relative(torch.cat(found[-1][::-1], dim=1), whole) < EXACT
        for index, (patches, prefix) in enumerate(found):
            assert patches.shape == (2, shape.num_patches, shape.embed_dim)
            for b in range(2):
                tokens, _, places = wanted[b][index]
                rows = dense.norm(torch.stack([*tokens[:shape.num_prefix_tokens],
                                               *(tokens[shape.num_prefix_tokens + p] for p in places)]))
                assert relative(torch.cat([prefix[b], patches[b]]), rows) < EXACT


def test_some_intermediates_equal_those_of_all_and_nothing_is_left_behind(tiny_vit, images):
    dense = tiny_vit("deit")
    model, x = compress(dense, matching(shape_of(dense))), images(dense)
    every, before = model.forward_intermediates(x, intermediates_only=True), logits(model, x)
    for settings in ({"indices": [1, 3]}, {"indices": [1, 3], "stop_early": True}):
        some = model.forward_intermediates(x, intermediates_only=True, **settings)
        assert torch.equal(some[0], every[1]) and torch.equal(some[1], every[3]) and len(some) == 2
    assert torch.equal(model.get_intermediate_layers(x, n=1, reshape=True)[0], every[4])
    assert torch.equal(logits(model, x), before)


def test_intermediates_of_a_deployed_model_are_those_of_the_training_form(tiny_vit, images):
    for pool in ("token", "avg"):
        dense = tiny_vit("deit", global_pool=pool)
        model, x = compress(dense, matching(shape_of(dense))), images(dense)
        for a, b in zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (deploy(model), model))):
            assert torch.equal(a, b)


# ---- Training

def test_gradients_are_the_slope_of_the_output(tiny_vit, family, images):
    dense = double(tiny_vit(family))
    model, x = compress(dense, matching(shape_of(dense))), double(images(dense))
    got, slope, still = gradient_and_slope(model, x)
    assert not [n for n in still if not n.startswith("head_dist")]
    # The central difference errs by step^2 times a third derivative, and by about 1e-15 / step in rounding: below 1e-5.
    assert got == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("family_name", ["deit", "mae"])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(tiny_vit, images, family_name):
    dense, found = tiny_vit(family_name), []
    for enable in (False, True):
        model = compress(dense, matching(shape_of(dense))).train()
        model.set_grad_checkpointing(enable)
        loss = model(images(dense)).square().sum()
        loss.backward()
        found.append((loss.detach(),))
        found[-1] += ({n: p.grad.clone() for n, p in model.named_parameters()},)
        sum(grid.square().sum()
            for grid in model.forward_intermediates(images(dense), intermediates_only=True)).backward()
        # those of the intermediates added
        found[-1] += ({n: p.grad for n, p in model.named_parameters()},)
    assert torch.equal(found[0][0], found[1][0])
    for plain, again in zip(found[0][1:], found[1][1:]):
        # the same operations run twice: equal but for the order of additions
        for name, expected in plain.items():
            torch.testing.assert_close(again[name], expected, rtol=1e-5, atol=1e-7)


def test_training_mode_drops_paths_and_eval_mode_does_not(tiny_vit, images):
    dense = tiny_vit("deit3", drop_path_rate=0.5)
    model, x = compress(dense, matching(shape_of(dense))).train(), images(dense, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(logits(model, x), logits(model, x))
    assert torch.equal(logits(model.eval(), x), logits(model, x))


def test_attention_is_dropped_out_in_a_block_that_merges(tiny_vit, images):
    dense = tiny_vit("deit", attn_drop_rate=0.5)
    model, x = compress(dense, matching(shape_of(dense), (3,))).train(), images(dense)
    for block in model.blocks[:4]:
        block.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(logits(model, x), logits(model, x))
    assert torch.equal(logits(model.eval(), x), logits(compress(tiny_vit("deit"), matching(shape_of(dense), (3,))), x))


@torch.no_grad()
def test_both_residuals_of_a_matching_block_can_be_dropped(tiny_vit, images):
    # With every path dropped the block only merges: its tokens are means of those that came in.
    dense = double(tiny_vit("deit", drop_path_rate=0.5))
    block = compress(dense, matching(shape_of(dense), (5,))).train().blocks[4]
    for path in (block.block.drop_path1, block.block.drop_path2):
        path.drop_prob = 1 - 1e-12
    x = torch.randn(2, 16, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = block.merged(x)
    assert torch.equal(given.x[:, 0], x[:, 0])
    for b in range(2):
        for token in range(10):
            inside = [x[b, 1 + j] for j in range(15) if given.places[b, j] == token]
            assert relative(given.x[b, 1 + token], sum(inside) / len(inside)) < EXACT


def test_matching_builds_no_graph(tiny_vit, images, monkeypatch):
    dense, found, plain = tiny_vit("deit"), [], functions.match

    def watched(keys, gone, importance, sizes):
        given = plain(keys, gone, importance, sizes)
        found.append((keys.requires_grad, importance.requires_grad))
        return given
    monkeypatch.setattr(functions, "match", watched)
    out = compress(dense, matching(shape_of(dense), (3,)))(images(dense))
    attn = attention_as(KeyedAttention, dense.blocks[0].attn)
    row = attn(torch.randn(2, 16, 33, generator=torch.Generator().manual_seed(0)))[1]
    assert found == [(False, False)] and out.requires_grad and not row.requires_grad


@pytest.mark.parametrize("family_name", ["deit", "qk_norm"])
def test_mixed_precision_runs_forward_and_backward(tiny_vit, images, family_name):
    dense = tiny_vit(family_name)
    model, x = compress(dense, matching(shape_of(dense))), images(dense)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    state = states(compress(dense.bfloat16(), matching(shape_of(dense))), x.bfloat16())[-1]
    assert state.x.dtype == torch.bfloat16 and state.sizes.dtype == torch.float32 and state.sizes.sum(dim=1).tolist(
        ) == [16, 16]


# ---- Refusals

@pytest.mark.parametrize("rules, says", [
    ({2: Match(merged=8)}, "^block 2: 8 tokens are merged; at most half of the 15"),
    ({1: Match(merged=7), 2: Match(merged=5)}, "^block 2: 5 tokens are merged; at most half of the 8"),
    ({1: Match(merged=3)}, '^block 2: tokens were merged by content before: from there on every block needs rule '
                           '"match"'),
    ({1: Match(merged=3), 2: Match(merged=0), 3: Select(kept=3)}, "^block 3: tokens were merged by content"),
    ({1: Match(merged=3), 2: MergeReconstruct(regions=(0,) * 15, weights=(1.0,) * 15)}, "^block 2: tokens are merged "
                                                                                        "by their place"),
    ({1: Select(kept=5), 2: Match(merged=2)}, "^block 2: tokens are matched, but a block before has selected"),
    ({1: Select(kept=5), 3: Match(merged=0)}, "^block 3: tokens are matched, but a block before has selected"),
    ({1: MergeReconstruct(regions=(0,) * 15, weights=(1.0,) * 15), 2: Match(merged=2)}, "^block 2: tokens are matched "
                                                                                        "right after a block"),
])
def test_plans_that_cant_be_are_refused_by_the_name_of_the_block(tiny_vit, rules, says):
    with pytest.raises(InputError, match=says):
        plan_with(shape_of(tiny_vit("deit")), rules)


def test_a_model_without_a_class_token_protects_none(tiny_vit, images):
    dense = double(tiny_vit("mae", class_token=False))
    shape, x = shape_of(dense), double(images(dense))
    with pytest.raises(InputError, match="^block 2: .*no class token: protect 0 is needed"):
        plan_with(shape, {2: Match(merged=2), 3: Match(merged=0, protect=0.0), 4: Match(merged=0, protect=0.0)})
    plan = matching(shape)
    model = compress(dense, plan)
    _, ends = model_slowly(dense, x, plan)
    assert relative(logits(model, x), ends) < EXACT and relative(logits(deploy(model), x), ends) < EXACT


def test_an_attention_mask_and_another_image_size_are_refused(tiny_vit, images):
    dense = tiny_vit("deit", dynamic_img_size=True)
    model = compress(dense, matching(shape_of(dense)))
    for form in (model, deploy(model)):
        with pytest.raises(InputError, match="merges tokens takes no attention mask"):
            form.forward_features(images(dense), attn_mask=torch.ones(16, 16, dtype=torch.bool))
        with pytest.raises(InputError, match="merges tokens takes no attention mask"):
            form.forward_features(images(dense), is_causal=True)
        with pytest.raises(InputError, match="80 x 80 came in.*48 x 80"):
            logits(form, torch.zeros(1, 3, 80, 80))
