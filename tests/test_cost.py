"""vitlab.plan.cost against what PyTorch counts while the model runs, hand-computed numbers, and slow loops."""
import random

import numpy as np
import pytest
import timm
import torch
from segmenting_fixtures import small
from test_segmenter import segmenter  # noqa: F401
from timm.layers import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models import compress, deploy, shape_of
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match, Select, SharedUpdate
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError


def counted_macs(model: torch.nn.Module) -> int:
    """MACs of one image by PyTorch's counter (2 FLOPs each), which sees matrix products and convolutions as they
    run."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
    # A block that matches has its fused attention always: in matrix products, which are counted.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, *model.patch_embed.img_size))
    total = counter.get_total_flops()
    assert total % 2 == 0
    return total // 2


def test_macs_equal_what_runs_in_both_forms(tiny_vit, family, layout, random_plan):
    dense = tiny_vit(family)
    plan = random_plan(shape_of(dense), layout, seed=sum(map(ord, family + layout)))
    model = compress(dense, plan)
    assert cost.macs(plan, "training")["total"] == counted_macs(model)
    assert cost.macs(plan, "deployed")["total"] == counted_macs(deploy(model))


@pytest.mark.parametrize("rates", [(0.6, 0.1), (0.3, 0.5), (0.07, 0.0), (0.8, 0.9)])
def test_macs_equal_what_runs_for_plans_by_score(tiny_vit, family, scored_plan, rates):
    dense = tiny_vit(family)
    plan = scored_plan(dense, *rates)
    model = compress(dense, plan)
    assert cost.macs(plan, "training")["total"] == counted_macs(model)
    assert cost.macs(plan, "deployed")["total"] == counted_macs(deploy(model))


def test_every_form_of_the_empty_plan_costs_what_the_dense_model_does(tiny_vit, family):
    dense = tiny_vit(family)
    plan = CompressionPlan.empty(shape_of(dense))
    counts = [cost.macs(plan, form) for form in cost.FORMS]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["total"] == counted_macs(dense)


def test_macs_leave_out_a_classifier_that_is_not_there(tiny_vit):
    for family in ("deit", "distilled"):
        model = tiny_vit(family, num_classes=0)
        assert cost.macs(CompressionPlan.empty(shape_of(model)))["total"] == counted_macs(model)


def test_macs_without_a_class_token_equal_what_runs(tiny_vit, random_plan):
    dense = tiny_vit("mae", class_token=False)
    plan = random_plan(shape_of(dense), "m-mm-", seed=3)
    model = compress(dense, plan)
    assert cost.macs(plan, "training")["total"] == counted_macs(model)
    assert cost.macs(plan, "deployed")["total"] == counted_macs(deploy(model))


def test_deit_tiny_dense_is_the_known_number_of_flops():
    # By hand, D = 192, N = 197, 12 blocks: patches 196 * 768 D; a block 4 N D^2 + 2 N^2 D + 8 N D^2; classifier 1000 D.
    d, n = 192, 197
    by_hand = 196 * 3 * 16 * 16 * d + 12 * (4 * n * d * d + 2 * n * n * d + 8 * n * d * d) + 1000 * d
    assert 2 * by_hand == 2_507_366_400
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    counted = cost.macs(CompressionPlan.empty(shape_of(model)))
    assert counted["total"] == by_hand == counted_macs(model)
    assert cost.gmacs(CompressionPlan.empty(shape_of(model))) == pytest.approx(by_hand / 1e9)


def test_published_form_leaves_out_merge_reconstruct_and_fold_alone(tiny_vit, family, layout, random_plan):
    plan = random_plan(shape_of(tiny_vit(family)), layout, seed=2)
    published, training, deployed = (cost.macs(plan, form) for form in ("published", "training", "deployed"))
    assert published["merge"] == published["reconstruct"] == published["fold"] == 0
    assert training["merge"] > 0 and training["reconstruct"] > 0 and deployed["fold"] > 0
    for part in set(cost.PARTS) - {"merge", "reconstruct", "fold"}:
        assert published[part] == training[part] == deployed[part]


def test_parts_sum_to_the_total(tiny_vit, family, random_plan):
    plan = random_plan(shape_of(tiny_vit(family)), "m-m0m")
    for form in cost.FORMS:
        parts = cost.macs(plan, form)
        assert parts.pop("total") == sum(parts.values()) and tuple(parts) == cost.PARTS
        assert all(type(value) is int for value in parts.values())


@pytest.mark.parametrize("form", ["", "dense", "Deployed", None])
def test_unknown_form_is_refused_and_the_known_ones_listed(tiny_vit, form):
    with pytest.raises(InputError, match="deployed.*training.*published"):
        cost.macs(CompressionPlan.empty(shape_of(tiny_vit("deit"))), form)


# Models of timm's VisionTransformer class whose parts are others than cost counts: they must be counted or refused.
ODD = {
    "swiglu": ("vit_giant_patch14_dinov2", {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    "map_pool": ("vit_base_patch16_siglip_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    "clip": ("vit_base_patch16_clip_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}),
}


@pytest.mark.parametrize("name", ODD)
def test_a_model_is_either_refused_or_counted_exactly(name):
    architecture, sizes = ODD[name]
    model = timm.create_model(architecture, pretrained=False, **sizes).eval()
    try:
        shape = shape_of(model)
    except InputError:
        return
    # Gradients on: the counter's module hooks want a graph under attention pooling.
    for block in model.blocks:
        block.attn.fused_attn = False
    if model.attn_pool is not None:
        model.attn_pool.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *model.patch_embed.img_size))
    assert cost.macs(CompressionPlan.empty(shape))["total"] == counter.get_total_flops() // 2


# ---- Selection

def test_macs_of_plans_that_select_equal_what_runs_in_both_forms(tiny_vit, family, select_layout, random_plan):
    dense = tiny_vit(family)
    for seed in range(2):
        plan = random_plan(shape_of(dense), select_layout, seed=seed + sum(map(ord, family + select_layout)))
        model = compress(dense, plan)
        assert cost.macs(plan, "training")["total"] == counted_macs(model)
        assert cost.macs(plan, "deployed")["total"] == counted_macs(deploy(model))


@pytest.mark.parametrize("ranked_by", ["kept", "all"])
def test_macs_of_a_selection_with_a_cut_head_equal_what_runs(tiny_vit, family, ranked_by):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    plan = CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(heads=(0,) if i == 1 else None, tokens=Select(kept=7 - i, ranked_by=ranked_by) if i in (1, 2)
                  else None)
        for i in range(5)))
    assert cost.macs(plan)["total"] == counted_macs(compress(dense, plan))


# D = 33, H = 3, d = 11, M = 41, 15 patches and 2 prefix tokens: N = 17.
SMALL = ViTShape(img_size=(48, 80), patch_size=(16, 16), embed_dim=33, depth=2, num_heads=3, head_dim=11,
                 num_neurons=41, num_prefix_tokens=2, num_classes=7)


@pytest.mark.parametrize("qk_norm, ranked_by, by_hand", [
    # Queries and keys are those of the attention: a score per head and token, over d.
    (False, "kept", 17 * 22), (True, "kept", 17 * 22),
    # Of its own weights one query of width r and its way back through W_k, D r each; then a score per head and token,
    # over D.
    (False, "all", 2 * 33 * 33 + 17 * 33 * 3),
    # With q/k norm keys are needed: one query D r, N keys D r each, N scores of r products.
    (True, "all", 33 * 33 + 17 * 33 * 33 + 17 * 33)])
def test_parts_of_a_selection_are_the_hand_computed_numbers(qk_norm, ranked_by, by_hand):
    shape = ViTShape(**{**vars(SMALL), "qk_norm": qk_norm})
    plan = CompressionPlan(shape=shape, blocks=(
        BlockPlan(heads=(0, 2), neurons=tuple(range(37)), tokens=Select(kept=5, ranked_by=ranked_by)), BlockPlan()))
    for form in cost.FORMS:
        parts = cost.macs(plan, form)
        assert parts["select"] == by_hand
        # Block 0 attends to 17 tokens with width 22, its MLP has 2 + 5 + 1 = 8; so has all of block 1, width 33.
        assert parts["qkv"] == 3 * 33 * (17 * 22 + 8 * 33) and parts["proj"] == 33 * (17 * 22 + 8 * 33)
        assert parts["attention"] == 2 * (17 * 17 * 22 + 8 * 8 * 33)
        assert parts["mlp"] == 2 * 33 * 8 * (37 + 41)
        assert parts["merge"] == parts["reconstruct"] == parts["fold"] == 0
    assert by_hand in {374, 3861, 20163}


def test_select_part_is_there_only_where_tokens_are_selected(tiny_vit, family, layout, random_plan):
    assert cost.macs(random_plan(shape_of(tiny_vit(family)), layout))["select"] == 0


def test_a_selection_costs_its_ranking_and_saves_the_mlp_of_the_tokens_that_go(tiny_vit, family):
    shape = shape_of(tiny_vit(family))
    # one token fewer in the last block's MLP
    last = BlockPlan(tokens=Select(kept=shape.num_patches - 2))
    parts = cost.macs(CompressionPlan(shape=shape, blocks=(BlockPlan(),) * 4 + (last,)))
    saved = 2 * shape.embed_dim * shape.num_neurons
    assert parts["total"] - parts["select"] == cost.macs(CompressionPlan.empty(shape))["total"] - saved


# ---- Matching

def matching(shape: ViTShape, merged: list[int | None],
             heads: dict[int, tuple[int, ...]] | None = None) -> CompressionPlan:
    """merged: tokens that go in each block, None for no rule."""
    return CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(heads=(heads or {}).get(i), tokens=None if m is None else Match(merged=m)) for i,
        m in enumerate(merged)))


def test_parts_of_a_matching_are_the_hand_computed_numbers():
    shape = ViTShape(**{**vars(SMALL), "depth": 3})
    plan = matching(shape, [4, 0, 5], {2: (1,)})
    for form in cost.FORMS:
        parts = cost.macs(plan, form)
        # Attention over 17, 13, 13 tokens, width 33, 33, 11; the MLP has 13, 13, 8.
        assert parts["qkv"] == 3 * 33 * (17 * 33 + 13 * 33
                                         + 13 * 11) and parts["proj"] == 33 * (17 * 33 + 13 * 33 + 13 * 11)
        assert parts["attention"] == 2 * (17 * 17 * 33 + 13 * 13 * 33 + 13 * 13 * 11)
        assert parts["mlp"] == 2 * 33 * 41 * (13 + 13 + 8)
        # Block 0: 8 sources and 7 targets of 15; block 2: 6 and 5 of 11; the class token's row over all. Then D for
        # each row that
        # is scaled: 4 that go and 7 targets, 5 and 5.
        by_hand = 33 * (8 * 7 + 17) + 11 * (6 * 5 + 13) + 33 * (4 + 7) + 33 * (5 + 5)
        assert parts["merge"] == (0 if form == "published" else by_hand)
        assert parts["reconstruct"] == parts["fold"] == parts["select"] == 0


def test_macs_of_plans_that_match_equal_what_runs_but_for_the_scalings(tiny_vit, family):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    for merged, heads in (([0] * 5, {}), ([None, 4, 0, 3, 2], {3: (0,), 1: (1,)}), ([7, 4, 1, 1, 0], {0: (0,)}),
                          ([None] * 4 + [7], {})):
        plan, scaled, left = matching(shape, merged, heads), 0, shape.num_patches
        for count in merged:
            # rows that go, and targets: no matrix product
            scaled += count + left // 2 if count else 0
            left -= count or 0
        model = compress(dense, plan)
        for form, runs in (("training", model), ("deployed", deploy(model))):
            assert cost.macs(plan, form)["total"] - scaled * shape.embed_dim == counted_macs(runs)


def test_macs_of_a_matching_after_a_merge_equal_what_runs_in_both_forms(tiny_vit, random_plan):
    dense = tiny_vit("dinov2_reg")
    shape = shape_of(dense)
    first = random_plan(shape, "m----", seed=5).blocks[0]
    plan = CompressionPlan(shape=shape,
                           blocks=(first, BlockPlan(), *(BlockPlan(tokens=Match(merged=m)) for m in (5, 0, 2))))
    scaled = (5 + 7) + (2 + 5)                                                  # of 15 and of 10 tokens
    model = compress(dense, plan)
    for form, runs in (("training", model), ("deployed", deploy(model))):
        assert cost.macs(plan, form)["total"] - scaled * shape.embed_dim == counted_macs(runs)


def test_matching_none_costs_what_the_dense_model_does(tiny_vit, family):
    shape = shape_of(tiny_vit(family))
    for form in cost.FORMS:
        assert cost.macs(matching(shape, [0] * 5), form) == cost.macs(CompressionPlan.empty(shape), form)


# ---- Decoders

@pytest.mark.parametrize("decoder", ["linear", "mask_transformer", "queries"])
@pytest.mark.parametrize("layout", ["-----", "m--m0", "-mm--"])
def test_macs_of_a_segmenter_equal_what_runs_in_both_forms(segmenter, family, decoder, layout, random_plan):  # noqa: F811
    dense = segmenter(family, decoder)
    plan = random_plan(shape_of(dense), layout, seed=3)
    model = compress(dense, plan)
    assert cost.macs(plan, "training")["total"] == counted_macs(model)
    assert cost.macs(plan, "deployed")["total"] == counted_macs(deploy(model))


def test_macs_of_a_segmenter_that_matches_equal_what_runs_but_for_the_scalings():
    dense = small()
    plan = CompressionPlan(shape=shape_of(dense),
                           blocks=(BlockPlan(tokens=Match(merged=4)), BlockPlan(tokens=Match(merged=3))))
    # of 15 and of 11 patches: rows that go, and targets
    scaled = (4 + 7) + (3 + 5)
    assert cost.macs(plan)["total"] - scaled * 24 == counted_macs(deploy(compress(dense, plan)))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_macs_of_a_decoder_are_the_hand_computed_numbers(depth):
    # D = 33, n = 15 patches, K = 7 classes: 22 rows in the blocks of a mask transformer.
    linear = ViTShape(**{**vars(SMALL), "decoder": "linear"})
    mask = ViTShape(**{**vars(SMALL), "decoder": "mask_transformer", "decoder_depth": depth})
    # qkv, attention, proj, mlp of 4 D neurons
    block = 3 * 22 * 33 * 33 + 2 * 22 * 22 * 33 + 22 * 33 * 33 + 2 * 22 * 33 * 132
    # in, blocks, both projections, products
    by_hand = 15 * 33 * 33 + depth * block + 15 * 33 * 33 + 7 * 33 * 33 + 15 * 7 * 33
    for form in cost.FORMS:
        for shape, wanted in ((linear, 15 * 33 * 7), (mask, by_hand)):
            parts = cost.macs(CompressionPlan.empty(shape), form)
            assert parts["decoder"] == wanted and parts["classifier"] == 0
            without = cost.macs(CompressionPlan.empty(ViTShape(**{**vars(SMALL), "num_classes": 0})), form)
            assert {k: v for k, v in parts.items() if k not in ("decoder", "total")} == {
                k: v for k, v in without.items() if k not in ("decoder", "total")}
            assert parts["total"] == without["total"] + wanted
    assert cost.macs(CompressionPlan.empty(SMALL))["decoder"] == 0


def test_many_plans_of_a_segmenter_at_once_cost_what_each_does():
    shape, noise = shape_of(small()), np.random.default_rng(0)
    plans = [CompressionPlan(shape=shape,
                             blocks=tuple(BlockPlan(neurons=tuple(range(int(noise.integers(1, 97)))))
                                          for _ in range(2)))
             for _ in range(7)]
    together = cost.Counts(**{name: np.stack([getattr(cost.counts_of(plan), name) for plan in plans])
                              for name in COUNTS})
    assert cost.macs_of(shape, together)["total"].tolist() == [cost.macs(plan)["total"] for plan in plans]


def test_params_of_a_segmenter_follow_from_the_sizes():
    # 24 wide, 5 classes, 15 patches of 8 x 8; blocks have 12 D^2 + 13 D parameters, norms and biases in it.
    d, k, block = 24, 5, 12 * 24**2 + 13 * 24
    # of two blocks and the end; class token, positions
    norms = 5 * 2 * d + d + 16 * d
    attention, mlp, patches = 2 * (4 * d * d + 4 * d), 2 * (8 * d * d + 5 * d), 3 * 64 * d + d
    decoders = {"linear": d * k + k,
                "mask_transformer": d * d + d + k * d + 2 * block + 2 * d + 2 * d * d + 2 * k}
    for decoder, count in decoders.items():
        assert cost.params(small(decoder)) == {
            "attention": attention, "mlp": mlp, "patch_embed": patches, "norms and embeddings": norms, "decoder": count,
            "total": attention + mlp + patches + norms + count}
        assert cost.params(small(decoder))["total"] == sum(p.numel() for p in small(decoder).parameters())


# ---- Many at once

COUNTS = ("heads", "neurons", "attended", "in_mlp", "carried", "merges", "reconstructs", "ranking", "pooled",
          "compared", "ranks_anew")


@pytest.mark.parametrize("form", cost.FORMS)
def test_costs_of_many_plans_at_once_equal_those_of_each(tiny_vit, family, random_plan, form):
    shape, chance = shape_of(tiny_vit(family)), random.Random(1)
    layouts = ["".join(sorted([*chance.choices("ms-0", k=4), "-"], key="m0-s".index)) for _ in range(37)]
    plans = [random_plan(shape, letters, seed) for seed, letters in enumerate(layouts)]
    pairs = tuple(j // 2 for j in range(shape.num_patches))                    # an odd number: the last is alone
    share = SharedUpdate(regions=pairs, weights=(0.5,) * (len(pairs) - 1) + (1.0,), own=0.3)
    plans[:3] = [matching(shape, [None, 4, 0, 3, 2]), matching(shape, [0, 0, 0, 7, 0], {3: (0,)}),
                 CompressionPlan(shape=shape,
                                 blocks=(BlockPlan(tokens=share),) + (BlockPlan(tokens=Match(merged=3)),) * 4)]
    each = [cost.counts_of(plan) for plan in plans]
    together = cost.Counts(**{name: np.stack([getattr(c, name) for c in each]) for name in COUNTS})
    parts = cost.macs_of(shape, together, form)
    assert set(parts) == {*cost.PARTS, "total"} and parts["total"].shape == (37,)
    for index, plan in enumerate(plans):
        assert {name: int(np.broadcast_to(values, 37)[index]) for name,
                values in parts.items()} == cost.macs(plan, form)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("form", cost.FORMS)
def test_costs_of_random_counts_at_once_equal_one_by_one_and_keep_their_leading_dimensions(form, qk_norm):
    shape = ViTShape(**{**vars(SMALL), "depth": 5, "qk_norm": qk_norm})
    noise, size = np.random.default_rng(0), (7, 11, 5)
    counts = {"heads": noise.integers(1, 4, size), "neurons": noise.integers(1, 42, size),
              "attended": noise.integers(3, 18, size), "in_mlp": noise.integers(3, 18, size),
              "carried": noise.integers(0, 16, size), "merges": noise.random(size) < 0.5,
              "reconstructs": noise.random(size) < 0.5, "ranking": noise.integers(0, 4, size),
              "pooled": noise.integers(0, 30, size), "compared": noise.integers(0, 90, size),
              "ranks_anew": noise.random(size) < 0.5}
    together = cost.macs_of(shape, cost.Counts(**counts), form)
    assert together["total"].shape == (7, 11) and together["total"].dtype == np.int64
    for place in np.ndindex(7, 11):
        alone = cost.macs_of(shape, cost.Counts(**{name: value[place] for name, value in counts.items()}), form)
        assert {k: int(np.broadcast_to(v, (7, 11))[place]) for k,
                v in together.items()} == {k: int(v) for k, v in alone.items()}


# So large that the cost is beyond 2^53, where float64 no longer holds every integer; odd sizes, so that a rounding
# shows.
HUGE = ViTShape(img_size=(16 * 701, 16 * 709), patch_size=(16, 16), embed_dim=6131, depth=3, num_heads=1, head_dim=6131,
                num_neurons=24_527, num_classes=1009)


def test_macs_are_exact_integers_beyond_what_a_float_holds():
    n, d, m = 701 * 709 + 1, 6131, 24_527
    by_hand = (n - 1) * 16 * 16 * 3 * d + 3 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m) + 1009 * d
    assert by_hand > 2**53 and int(float(by_hand)) != by_hand
    assert cost.macs(CompressionPlan.empty(HUGE))["total"] == by_hand


# ---- The count of arXiv 2201.00043 (methods B5)

def mdc_slowly(shape: ViTShape, heads: list[int], neurons: list[int], rho: float, select_in=(3, 6, 9)) -> int:
    """B5, block by block: heads_kept (4 D d N_l + 2 N_l^2 d) + 2 N'_l D M_kept."""
    total, done, entering = 0, 0, shape.num_tokens
    for block in range(shape.depth):
        if block in select_in:
            done += 1
        leaving = int(shape.num_tokens * (1 - rho) ** done)
        total += heads[block] * (4 * shape.embed_dim * shape.head_dim * entering
                                 + 2 * entering * entering * shape.head_dim)
        total += 2 * leaving * shape.embed_dim * neurons[block]
        entering = leaving
    return total


def deit(width: int, heads: int) -> ViTShape:
    return ViTShape(img_size=(224, 224), patch_size=(16, 16), embed_dim=width, depth=12, num_heads=heads, head_dim=64,
                    num_neurons=4 * width)


def kept(ratios: list[float], count: int) -> list[int]:
    """B4: int(count * (1 - ratio))."""
    return [int(count * (1 - ratio)) for ratio in ratios]


PUBLISHED_POLICIES = {      # methods B7: shape, neuron ratios, head ratios, rho, GMACs as published
    "DeiT-S": (deit(384, 6),
               [0.12237, 0.00168, 0.01201, 0.49062, 0.10388, 0.32759, 0.02007, 0.26372, 0.02465, 0.37197, 0.33796,
                0.32449],
               [0.07641, 0.05489, 0.11644, 0.21189, 0.10277, 0.04060, 0.07933, 0.08571, 0.27671, 0.16643, 0.13445,
                0.15967], 0.48807, 1.8628),
    "DeiT-B": (deit(768, 12),
               [0.49191, 0.42406, 0.35335, 0.26780, 0.12176, 0.06279, 0.46403, 0.08352, 0.07313, 0.00342, 0.02831,
                0.17264],
               [0.24463, 0.46761, 0.41323, 0.42780, 0.09500, 0.02895, 0.22443, 0.07907, 0.12046, 0.09426, 0.07848,
                0.36205], 0.40072, 6.938),
}


@pytest.mark.parametrize("name", PUBLISHED_POLICIES)
def test_mdc_macs_of_the_published_policy_are_the_published_number(name):
    shape, neuron_ratios, head_ratios, rho, published = PUBLISHED_POLICIES[name]
    heads, neurons = kept(head_ratios, shape.num_heads), kept(neuron_ratios, shape.num_neurons)
    found = int(cost.mdc_macs(shape, np.array(heads), np.array(neurons), np.array(rho)))
    assert found == mdc_slowly(shape, heads, neurons, rho)
    digits = len(str(published).split(".")[1])
    assert found / 1e9 == pytest.approx(published, abs=0.5 * 10**-digits)       # to its last printed digit


def test_mdc_macs_of_dense_deit_small_is_the_known_number():
    # By hand, D = 384, N = 197, 12 blocks: 4 N D^2 + 2 N^2 D + 8 N D^2 each.
    by_hand = 12 * (4 * 197 * 384**2 + 2 * 197**2 * 384 + 8 * 197 * 384**2)
    shape = deit(384, 6)
    assert cost.mdc_macs(shape, np.full(12, 6), np.full(12, 1536), np.array(0.0)) == by_hand
    assert by_hand / 1e9 == pytest.approx(4.5407, abs=5e-5)


def test_mdc_macs_of_many_policies_equal_a_slow_loop_exactly():
    shape, noise = deit(384, 6), np.random.default_rng(2)
    heads, neurons, rho = noise.integers(1, 7,
                                         (211, 12)), noise.integers(1, 1537, (211, 12)), noise.uniform(0, 0.5, 211)
    rho[0], rho[1] = 0, 0.5
    found = cost.mdc_macs(shape, heads, neurons, rho)
    assert found.shape == (211,) and found.dtype == np.int64
    for index in range(211):
        assert int(found[index]) == mdc_slowly(shape, heads[index].tolist(), neurons[index].tolist(), float(rho[index]))
    in_two = cost.mdc_macs(shape, heads[:210].reshape(7, 30, 12), neurons[:210].reshape(7, 30, 12),
                           rho[:210].reshape(7, 30))
    assert np.array_equal(in_two.reshape(-1), found[:210])


@pytest.mark.parametrize("select_in", [(), (0,), (11,), (0, 1, 2), (2, 5, 8, 11)], ids=str)
def test_mdc_macs_with_selections_in_other_blocks_equal_a_slow_loop(select_in):
    shape, noise = deit(384, 6), np.random.default_rng(3)
    for _ in range(17):
        heads, neurons, rho = noise.integers(1, 7, 12), noise.integers(1, 1537, 12), float(noise.uniform(0, 0.5))
        assert int(cost.mdc_macs(shape, heads, neurons, np.array(rho), select_in)) == mdc_slowly(
            shape, heads.tolist(), neurons.tolist(), rho, select_in)


def test_mdc_macs_are_exact_integers_beyond_what_a_float_holds():
    expected = mdc_slowly(HUGE, [1, 1, 1], [24_527] * 3, 0.0)
    assert expected > 2**53
    assert int(cost.mdc_macs(HUGE, np.ones(3, dtype=np.int64), np.full(3, 24_527), np.array(0.0))) == expected


# ---- Parameters

def test_params_total_is_the_number_of_weights(tiny_vit, family, random_plan):
    dense = tiny_vit(family)
    model = compress(dense, random_plan(shape_of(dense), "m-m0m", seed=4))
    for each in (dense, model):
        assert cost.params(each)["total"] == sum(p.numel() for p in each.parameters())
    deployed = deploy(model)
    folds = sum(b.numel() for name, b in deployed.named_buffers() if "fold" in name or name.endswith("matrix"))
    assert folds > 0 and cost.params(deployed)["total"] == folds + sum(p.numel() for p in deployed.parameters())


def test_params_by_part_follow_from_the_sizes(tiny_vit, random_plan):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    plan = random_plan(shape, "m--m-", seed=1)
    parts = cost.params(compress(dense, plan))
    d, n = shape.embed_dim, shape.num_tokens
    width = [shape.head_dim * (shape.num_heads if b.heads is None else len(b.heads)) for b in plan.blocks]
    neurons = [shape.num_neurons if b.neurons is None else len(b.neurons) for b in plan.blocks]
    merged = [c for c, b in zip(plan.tokens_per_block(), plan.blocks) if b.tokens is not None]
    expected = {
        "attention": sum(3 * w * d + 3 * w + w * d + d for w in width),         # qkv and proj, with biases
        "mlp": sum(2 * m * d + m + d for m in neurons),
        "merge and reconstruct": sum(2 * c * n for c in merged),
        "patch_embed": 3 * 16 * 16 * d + d,
        "classifier": shape.num_classes * d + shape.num_classes,
        "norms and embeddings": (2 * shape.depth + 1) * 2 * d + d + n * d,      # norms, class token, positions
    }
    total = parts.pop("total")
    assert parts == expected and total == sum(expected.values())


def test_params_of_a_ranking_by_all_heads_are_counted_by_themselves(tiny_vit):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    found = {}
    for ranked_by in ("kept", "all"):
        first = BlockPlan(heads=(1,), tokens=Select(kept=7, ranked_by=ranked_by))
        plan = CompressionPlan(shape=shape, blocks=(first,) + (BlockPlan(),) * 4)
        found[ranked_by] = cost.params(compress(dense, plan))
    d = shape.embed_dim
    # queries' and keys' rows, biases
    assert found["all"]["select"] == 2 * d * d + 2 * d and "select" not in found["kept"]
    assert found["all"]["total"] - found["kept"]["total"] == found["all"]["select"]
