"""Shared updates (methods C1) against slow loops, on every family."""
import dataclasses
import json
import math
import random

import pytest
import torch
from comparing import logits, relative

from vitlab.criteria.planning import prune_and_merge
from vitlab.models import attention_block, compress, deploy, shape_of
from vitlab.models.share import SharedUpdateBlock
from vitlab.plan import BlockPlan, CompressionPlan, cost, tokens
from vitlab.plan.rules import Select, SharedUpdate
from vitlab.runtime.files import InputError

EXACT = 1e-10           # float64: only the order of the sums differs


def random_share(n: int, seed: int, own: float = 1.0, pruned: int = 0, proportional: bool = False) -> SharedUpdate:
    """Scattered regions with random weights; the first `pruned` patches of a random order belong to none."""
    chance = random.Random(seed)
    order = chance.sample(range(n), n)
    count = max(1, (n - pruned) // 2)
    region = {j: (index if index < count else chance.randrange(count)) for index, j in enumerate(order[pruned:])}
    raw = {j: chance.uniform(0.2, 1.0) for j in region}
    sums = [sum(raw[j] for j in region if region[j] == c) for c in range(count)]
    return SharedUpdate(regions=tuple(region.get(j, -1) for j in range(n)), own=own, proportional=proportional,
                        weights=tuple(raw[j] / sums[region[j]] if j in region else 0.0 for j in range(n)))


def plan_with(shape, rules: dict[int, SharedUpdate]) -> CompressionPlan:
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=rules.get(i)) for i in range(shape.depth)))


def block_slowly(block, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """timm's Block on one image (N, D), with each token in the softmax as often as it has patches."""
    attn, mixed = block.attn, []
    # (N, H, d)
    q, k, v = (part.unflatten(1, (attn.num_heads, -1)) for part in attn.qkv(block.norm1(x)).chunk(3, dim=1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    for h in range(attn.num_heads):
        logit = q[:, h] @ k[:, h].T / math.sqrt(attn.head_dim)
        weight = torch.stack([size * logit[:, j].exp() for j, size in enumerate(sizes)], dim=1)
        mixed.append(weight / weight.sum(dim=1, keepdim=True) @ v[:, h])
    x = x + block.ls1(attn.proj(torch.cat(mixed, dim=1)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def oracle(block, x: torch.Tensor, rule: SharedUpdate, prefix: int) -> torch.Tensor:
    """y_j = z_c + u_c + own (x_j - z_c), image by image and region by region."""
    out = x.clone()
    for b in range(len(x)):
        means = []
        for c in range(rule.num_merged):
            inside = [j for j, region in enumerate(rule.regions) if region == c]
            means.append(sum(rule.weights[j] * x[b, prefix + j] for j in inside))
        z = torch.stack([*x[b, :prefix], *means])[None]
        sizes = [rule.regions.count(c) if rule.proportional else 1 for c in range(rule.num_merged)]
        given = block_slowly(block, z[0], [1] * prefix + sizes)
        out[b, :prefix] = given[:prefix]
        for j, region in enumerate(rule.regions):
            if region >= 0:
                update = given[prefix + region] - means[region]
                out[b, prefix + j] = means[region] + update + rule.own * (x[b, prefix + j] - means[region])
    return out


@pytest.mark.parametrize("own", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("pruned", [0, 4])
@pytest.mark.parametrize("proportional", [False, True])
def test_a_block_shares_the_update_of_its_regions_means(tiny_vit, family, images, own, pruned, proportional):
    dense = tiny_vit(family).double()
    shape = shape_of(dense)
    rule = random_share(shape.num_patches, 3, own, pruned, proportional)
    model = compress(dense, plan_with(shape, {2: rule}))
    x = torch.randn(3, shape.num_tokens, shape.embed_dim, generator=torch.Generator().manual_seed(0),
                    dtype=torch.float64)
    with torch.no_grad():
        wanted = oracle(attention_block(dense.blocks[2]), x, rule, shape.num_prefix_tokens)
        got = model.blocks[2](x)
    assert relative(got, wanted) < EXACT


def test_regions_of_one_token_are_the_plain_model(tiny_vit, family, images):
    dense = tiny_vit(family).double()
    n = shape_of(dense).num_patches
    x = images(dense).double()
    for proportional in (False, True):
        alone = SharedUpdate(regions=tuple(range(n)), weights=(1.0,) * n, own=0.7, proportional=proportional)
        got = logits(compress(dense, plan_with(shape_of(dense), dict.fromkeys(range(5), alone))), x)
        assert float((got - logits(dense, x)).abs().max()) < EXACT


def test_a_region_of_tokens_that_are_alike_leaves_no_trace_where_it_is_counted(tiny_vit):
    dense = tiny_vit("deit").double()
    shape = shape_of(dense)
    rule = random_share(shape.num_patches, 3, proportional=True)
    region = torch.randn(rule.num_merged, shape.embed_dim, generator=torch.Generator().manual_seed(0),
                         dtype=torch.float64)
    x = torch.cat([region[:1] + 1, region[torch.tensor(rule.regions)]])[None]
    with torch.no_grad():
        wanted = dense.blocks[2](x)
        for proportional, close in ((True, True), (False, False)):
            given = dataclasses.replace(rule, proportional=proportional)
            got = compress(dense, plan_with(shape, {2: given})).blocks[2](x)
            assert (relative(got, wanted) < EXACT) == close


def test_a_plan_that_does_not_say_counts_each_region_once_and_a_new_one_its_tokens(tiny_vit, images):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    plan = plan_with(shape, {2: random_share(shape.num_patches, 3, proportional=True)})
    data = json.loads(plan.to_json())
    assert CompressionPlan.from_json(data) == plan
    del data["blocks"][2]["tokens"]["proportional"]                             # as written before there was the field
    assert CompressionPlan.from_json(data) == plan_with(shape, {2: random_share(shape.num_patches, 3)})
    scores = torch.rand(5, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.01
    assert all(block.tokens.proportional for block in prune_and_merge(scores, shape, keep_rate=0.5, share=True).blocks)
    merged = prune_and_merge(scores, shape, keep_rate=0.5).blocks[0].tokens
    assert tokens.shared(merged).proportional and not tokens.shared(merged, proportional=False).proportional
    x = images(dense)
    both = [logits(compress(dense, p), x) for p in (plan, CompressionPlan.from_json(data))]
    assert relative(*both) > 1e-3                                               # it does make a difference


def test_the_deployed_form_is_the_same_beside_merging_and_cut_blocks(tiny_vit, images, random_plan):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    blocks = list(random_plan(shape, "m---m", seed=1).blocks)
    for index in (1, 3):
        blocks[index] = BlockPlan(heads=blocks[index].heads, neurons=blocks[index].neurons,
                                  tokens=random_share(shape.num_patches, index, own=0.5, pruned=2,
                                                      proportional=index == 3))
    plan = CompressionPlan(shape=shape, blocks=tuple(blocks))
    model, x = compress(dense, plan), images(dense, 3)
    wanted = logits(model, x)
    assert relative(logits(deploy(model), x), wanted) < 1e-4       # float32, folded matrices
    assert CompressionPlan.from_json(json.loads(plan.to_json())) == plan
    exported = torch.export.export(model, (x,)).module()
    assert relative(exported(x), wanted) < 1e-5                    # float32, other kernels


def test_intermediates_have_the_whole_grid(tiny_vit, images):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    model = compress(dense,
                     plan_with(shape, {1: random_share(shape.num_patches, 0), 4: random_share(shape.num_patches, 1)}))
    found = model.forward_intermediates(images(dense), intermediates_only=True)
    assert [tuple(f.shape[-2:]) for f in found] == [shape.grid_size] * 5


def test_shared_regions_are_those_of_prune_and_merge_with_weights_that_sum_to_1(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    scores = torch.rand(5, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.01
    for weights in ("score", "uniform", "reference"):
        merged, shared = (prune_and_merge(scores, shape, keep_rate=0.5, prune_rate=0.2, weights=weights, share=s)
                          for s in (False, True))
        for a, b in zip(merged.blocks, shared.blocks):
            assert a.tokens.regions == b.tokens.regions and a.tokens.pruned == b.tokens.pruned
            m = tokens.merge_matrix(a.tokens, 0, torch.float64)
            mine = torch.zeros_like(m)
            for j, (region, weight) in enumerate(zip(b.tokens.regions, b.tokens.weights)):
                if region >= 0:
                    mine[region, j] = weight
            # weights are stored as they were computed
            assert torch.allclose(mine, m / m.sum(dim=1, keepdim=True), atol=1e-6)


def test_cost_has_no_matrices_and_one_scaling_of_each_patch(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    scores = torch.rand(5, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.01
    merged, shared = (prune_and_merge(scores, shape, keep_rate=0.5, prune_rate=0.2, share=s) for s in (False, True))
    same = [part for part in cost.PARTS if part not in ("merge", "reconstruct", "fold")]
    a, b = cost.macs(merged), cost.macs(shared)
    assert [a[p] for p in same] == [b[p] for p in same] and b["fold"] == b["reconstruct"] == 0
    inside = sum(shape.num_patches - len(block.tokens.pruned) for block in shared.blocks)
    assert b["merge"] == inside * shape.embed_dim and cost.macs(shared, "published")["merge"] == 0
    assert cost.macs(shared, "published")["total"] == cost.macs(merged, "published")["total"]


@pytest.mark.parametrize(("change", "says"), [
    ({"weights": (0.5, 0.5, 0.4)}, "region 1 sum to 0.4"), ({"weights": (0.5, 0.5)}, "2 weights"),
    ({"own": 1.5}, "own is 1.5"), ({"proportional": 1}, "proportional is 1"),
    ({"proportional": None}, "proportional is None"), ({"own": True}, "own is True"),
    ({"regions": (0, 0, 2)}, "without a gap"), ({"weights": (1.5, -0.5, 1.0)}, "from 0 to 1"),
])
def test_wrong_rules_are_refused_by_value(change, says):
    with pytest.raises(InputError, match=says):
        SharedUpdate(**{"regions": (0, 0, 1), "weights": (0.5, 0.5, 1.0), **change})


def test_sharing_after_a_selection_is_refused_by_block(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    with pytest.raises(InputError, match="^block 2: tokens share an update by their place"):
        plan_with(shape, {1: Select(kept=3), 2: random_share(shape.num_patches, 0)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_a_large_region_is_summed_in_float32(dtype):
    n = 509
    rule = SharedUpdate(regions=(0,) * n, weights=(1 / n,) * n, own=0.0)
    x = (100 + torch.randn(1, n, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    block = SharedUpdateBlock(torch.nn.Identity(), rule, 0).to(dtype)
    wanted = x.double().mean(dim=1)
    # One rounding of the mean itself; the weights, which are of the dtype too, are all 1 / 509 but for the same factor
    # of half a place.
    assert float((block(x)[0, 0].double() - wanted).abs().max()) < 2 * 128 * torch.finfo(dtype).eps
