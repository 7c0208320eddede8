"""Cait: heads that are mixed before and after the softmax, and class tokens that come in after the blocks."""
import copy

import pytest
import timm
import torch
from conftest import randomise
from test_families import by_content, check_cost, near, some_units
from torch import nn

from vitlab.measure.capture import attention_maps, token_scores
from vitlab.measure.latency import measure_table
from vitlab.models import compress, deploy, shape_of
from vitlab.models.attention import OwnAttention, attention_as
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import counts_of
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut, Select, SharedUpdate
from vitlab.runtime.files import InputError

ROUNDING = 1e-5                     # relative, of sums in float32 taken in another order
N, HEADS, DIM = 15, 3, 33           # 3 x 5 patches


def cait(**args) -> nn.Module:
    sizes = {"img_size": (12, 20), "patch_size": 4, "embed_dim": DIM, "num_heads": HEADS, "depth": 4, "num_classes": 7}
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("cait_xxs24_224", **{**sizes, **args}).eval()
    randomise(model, 0)
    return model.requires_grad_(False)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 12, 20, generator=torch.Generator().manual_seed(1))


def slowly(attn: nn.Module, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Talking heads by loops over heads, where token j stands for counts[j] tokens: x (N, D) -> (N, D)."""
    query, key, value = attn.qkv(x).unflatten(1, (3, HEADS, -1)).permute(1, 2, 0, 3)       # (H, N, d) each
    logits = [query[h] @ key[h].T / query.shape[2]**0.5 for h in range(HEADS)]
    mixed = [sum(attn.proj_l.weight[g, h] * logits[h] for h in range(HEADS)) + attn.proj_l.bias[g]
             for g in range(HEADS)]
    each = [m.exp() * counts for m in mixed]
    maps = [e / e.sum(dim=1, keepdim=True) for e in each]
    mixed = [sum(attn.proj_w.weight[g, h] * maps[h] for h in range(HEADS)) + attn.proj_w.bias[g] * counts
             for g in range(HEADS)]
    return attn.proj(torch.cat([m @ v for m, v in zip(mixed, value)], dim=1))


def test_a_token_that_stands_for_several_counts_as_often_in_the_softmax_between_the_two_mixings():
    attn, x = cait().blocks[0].attn, torch.randn(N, DIM, generator=torch.Generator().manual_seed(2))
    counts = torch.arange(1, N + 1)
    found = attention_as(None, attn, masked=True)(x[None], attn_mask=counts.log()[None, None, None])
    assert isinstance(attention_as(None, attn, masked=True), OwnAttention) and attention_as(None, attn) is not attn
    assert near(found[0], slowly(attn, x, counts), ROUNDING)
    assert near(attn(x[None])[0], slowly(attn, x, torch.ones(N)), ROUNDING)


@pytest.mark.parametrize("kind", ["regions", "matched"])
def test_merging_tokens_that_are_the_same_changes_nothing(kind):
    """Of an image of two kinds of patches, in a model that knows no places; the regions are of several sizes."""
    model = cait()
    model.pos_embed.zero_()
    kinds = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [1, 0, 1, 0, 0]])
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))[kinds]          # (3, 5, 3, 4, 4)
    x = x.permute(2, 0, 3, 1, 4).reshape(1, 3, 12, 20)
    rule = Match(merged=7, protect=0.0)
    if kind == "regions":
        sizes, regions = {}, []
        for number, patch in enumerate(kinds.flatten().tolist()):
            regions.append(patch if number < 11 else 2 + patch)
            sizes[regions[-1]] = sizes.get(regions[-1], 0) + 1
        rule = SharedUpdate(regions=tuple(regions), weights=tuple(1 / sizes[r] for r in regions), proportional=True)
    plan = CompressionPlan(shape=shape_of(model), blocks=tuple(
        BlockPlan(tokens=rule if kind == "regions" or index == 1 else Match(merged=0, protect=0.0))
        for index in range(4)))
    found = compress(model, plan)
    assert near(found(x), model(x), ROUNDING)
    check_cost(deploy(found), plan, x)


def test_cost_is_torchs_count_with_the_class_tokens_blocks_and_the_mixing_of_heads():
    for args in ({}, {"depth_token_only": 3, "mlp_ratio_token_only": 2.0}, {"global_pool": "avg"}):
        model = cait(**args)
        shape = shape_of(model)
        assert (shape.num_prefix_tokens, shape.class_token, shape.num_tokens) == (0, False, N)
        check_cost(copy.deepcopy(model), CompressionPlan.empty(shape), images(1))
        plan = CompressionPlan(shape=shape, blocks=(BlockPlan(qk_width=5), *some_units(shape)[1:]))
        check_cost(compress(model, plan), plan, images(1))


def test_nothing_of_the_class_tokens_blocks_is_cut():
    model = cait()
    shape = shape_of(model)
    plan = CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(neurons=block.neurons, tokens=rule) for block, rule in zip(some_units(shape), by_content(shape))))
    cut = compress(model, plan)
    assert str(cut.blocks_token_only) == str(model.blocks_token_only) and shape.depth == 4
    for name, value in model.blocks_token_only.state_dict().items():
        assert torch.equal(cut.blocks_token_only.state_dict()[name], value)


def test_rules_that_need_a_class_token_and_cuts_of_heads_are_refused():
    shape = shape_of(cait())
    for block, why in ((BlockPlan(heads=(0,)), "heads of this model can't be cut: they are mixed before and after"),
                       (BlockPlan(heads=()), "heads of this model can't be cut: they are mixed before and after"),
                       (BlockPlan(tokens=Select(kept=5)), "no class token"),
                       (BlockPlan(tokens=ReadOut()), "pools by 'class_attention'"),
                       (BlockPlan(tokens=Match(merged=3)), "no class token")):
        with pytest.raises(InputError, match=why):
            CompressionPlan(shape=shape, blocks=(BlockPlan(),) * 3 + (block,))
    with pytest.raises(InputError, match="needs a class token; the model has none"):
        token_scores(cait(), [(images(2), torch.arange(2))], criterion="class_attention", progress=False)


def test_maps_are_the_softmax_of_the_mixed_heads_and_scores_of_tokens_what_their_values_are_worth():
    model, x = cait(), images(3)
    maps = attention_maps(model, x)
    assert maps.shape == (4, 3, HEADS, N, N) and near(maps.sum(dim=4), torch.ones(4, 3, HEADS, N), ROUNDING)
    attn, inside = model.blocks[0].attn, model.blocks[0].norm1(model.patch_embed(x) + model.pos_embed)[0]
    query, key, _ = attn.qkv(inside).unflatten(1, (3, HEADS, -1)).permute(1, 2, 0, 3)
    logits = attn.proj_l((query @ key.mT * attn.scale).permute(1, 2, 0)).permute(2, 0, 1)
    assert near(maps[0, 0], logits.softmax(dim=2), ROUNDING)
    # what each image's loss changes by, to first order, where the values of a patch are less
    found = token_scores(model, [(x, torch.arange(3))], progress=False)[0].double()
    model, x, step = model.double(), x.double(), 1e-5
    expected = torch.zeros(N, dtype=torch.float64)
    for patch in range(N):
        def loss(by: float, patch: int = patch) -> torch.Tensor:
            def scaled(_, given, out):
                out = out.clone()
                out[:, patch, 2 * DIM:] *= 1 + by
                return out
            handle = model.blocks[0].attn.qkv.register_forward_hook(scaled)
            given = nn.functional.cross_entropy(model(x), torch.arange(3), reduction="none")
            handle.remove()
            return given
        expected[patch] = ((loss(step) - loss(-step)) / (2 * step)).abs().mean() / (HEADS * N)
    assert near(found, expected, 1e-4)


def test_latency_of_all_its_parts_is_measured():
    model = cait()
    table = measure_table(model, batch_size=2, repeats=1, min_seconds=0.0, progress=False)
    assert table.predict(counts_of(CompressionPlan.empty(shape_of(model)))) > 0
    assert table.axes["attention"][1].tolist() == [HEADS]


def test_a_segmenter_has_no_class_tokens_and_gives_every_patch_a_class():
    dense = Segmenter(as_encoder(cait()), 5, "linear").eval().requires_grad_(False)
    shape, x = shape_of(dense), images(1)
    assert dense.encoder.blocks_token_only is None and shape.end_macs == 0
    merge = MergeReconstruct(regions=tuple(j // 2 for j in range(N)), weights=(0.5,) * (N - 1) + (1.0,))
    plan = CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(neurons=block.neurons, tokens=rule)
        for block, rule in zip(some_units(shape), (merge, None, Match(merged=3, protect=0.0),
                                                   Match(merged=2, protect=0.0)))))
    model = compress(dense, plan)
    assert near(deploy(model)(x), model(x), ROUNDING * 10)
    check_cost(deploy(model), plan, x)
    features = dense.encoder.norm(dense.encoder.blocks(dense.encoder.patch_embed(x) + dense.encoder.pos_embed))
    assert near(dense.patch_logits(x).flatten(2).mT, dense.decoder(features), ROUNDING)
    asked = Segmenter(as_encoder(cait()), 5, "queries", queries=3).eval()
    check_cost(asked, CompressionPlan.empty(shape_of(asked)), x)
