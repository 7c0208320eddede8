"""Attention rollout through models whose tokens are cut, against slow loops written from its formula."""
import dataclasses

import pytest
import timm
import torch
from training_fixtures import full_plan, images, one_thread, tiny, token_plan  # noqa: F401

from vitlab.measure.capture import attention_maps, token_places
from vitlab.measure.rollout import looked_at, token_shares
from vitlab.models import attention_block, compress, deploy, shape_of
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut, Select, SharedUpdate
from vitlab.plots import rollout
from vitlab.runtime.files import InputError

PATCHES, TOKENS = 16, 17


def plan_of(model, *rules, **units) -> CompressionPlan:
    return CompressionPlan(shape=shape_of(model), blocks=tuple(BlockPlan(tokens=rule, **units) for rule in rules))


def trained(model, seed: int = 1):
    """The model with every parameter moved, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().eval().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def projected(model, x) -> list[torch.Tensor]:
    """What qkv of each block gives (B, N, 3 H d)."""
    found, handles = [], []
    for block in model.blocks:
        handles.append(attention_block(block).attn.qkv.register_forward_hook(lambda m, i, out: found.append(out)))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def mean_attention(model, index: int, rows: torch.Tensor, sizes: list[int] | None = None) -> list[list[float]]:
    """[i][j]: what token i takes from token j, the mean over heads of softmax(q_i k_j / sqrt(d) + log size_j), of rows
    (N, 3 H d) of one image."""
    attn = attention_block(model.blocks[index]).attn
    query, key, _ = rows.unflatten(1, (3, attn.num_heads, -1)).unbind(1)        # (N, H, d)
    count, found = len(rows), [[0.0] * len(rows) for _ in rows]
    for h in range(attn.num_heads):
        for i in range(count):
            logits = torch.stack([query[i, h] @ key[j, h] / query.shape[2]**0.5
                                  + torch.tensor(float(sizes[j] if sizes else 1)).double().log() for j in range(count)])
            for j, share in enumerate(logits.softmax(dim=0).tolist()):
                found[i][j] += share / attn.num_heads
    return found


def one(i: int) -> torch.Tensor:
    return torch.eye(TOKENS, dtype=torch.float64)[i]


def mixed(attention: list[list[float]], rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """(A + I) / 2 of rows."""
    return [(rows[i] + sum(a * row for a, row in zip(shares, rows))) / 2 for i, shares in enumerate(attention)]


def unit(row: torch.Tensor) -> torch.Tensor:
    return row / row.sum() if row.sum() > 0 else row


def combined(matrix: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [sum(w * row for w, row in zip(unit(line.abs()), rows)) for line in matrix]


def assert_shares(model, x, wanted: list[list[torch.Tensor]]) -> None:
    found = token_shares(model, x)
    torch.testing.assert_close(found, torch.stack([torch.stack(rows) for rows in wanted]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sum(dim=2), torch.ones_like(found[..., 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [None, Match(merged=0), SharedUpdate(regions=range(16), weights=(1,) * 16),
                                  MergeReconstruct(regions=range(16), weights=(1,) * 16)],
                         ids=lambda rule: rule.kind if rule else "none")
def test_where_nothing_is_cut_it_is_the_rollout_of_the_attention_maps(rule):
    dense, x = tiny().eval(), images(3)
    model, maps = compress(dense, plan_of(dense, rule, rule)).eval(), attention_maps(dense, x)
    wanted = torch.stack([rollout(maps[:, i], 1) for i in range(3)]).float()
    torch.testing.assert_close(looked_at(model, x), wanted, rtol=1e-4, atol=1e-7)           # float32
    pooled = tiny(class_token=False, global_pool="avg").eval()
    wanted = torch.stack([rollout(attention_maps(pooled, x)[:, i], 0, average=True) for i in range(3)]).float()
    torch.testing.assert_close(looked_at(pooled, x), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("span", [1, 2])
def test_through_matrices_it_is_reconstruct_mixed_merge_and_what_goes_around(span):
    dense, x = tiny(), images(2).double()
    plan = token_plan(dense)
    if span == 2:
        first = dataclasses.replace(plan.blocks[0].tokens, span=2)
        plan = dataclasses.replace(plan, blocks=(BlockPlan(tokens=first), BlockPlan()))
    model, wanted = trained(compress(dense, plan)), []
    seen = projected(model, x)
    for b in range(2):
        rows = [one(i) for i in range(TOKENS)]
        for index, block in enumerate(model.blocks):
            if block.tokens is not None:
                own, before = block.tokens, rows
                rows = combined(own.merge_matrix, rows)
            rows = mixed(mean_attention(model, index, seen[index][b]), rows)
            if span == 1 or index == 1:
                around = (1 - own.token_mask).tolist()
                rows = [unit(row + skips * old) for row, skips, old in
                        zip(combined(own.reconstruct_matrix, rows), around, before)]
        wanted.append(rows)
    assert 1 in around and 0 in around
    assert_shares(model, x, wanted)


@pytest.mark.parametrize("queries", [0, 3])
def test_a_token_that_was_merged_by_content_takes_the_mean_of_its_patches_rows(queries):
    """Before a block with queries, too; of what its tokens take there, their own part."""
    dense, x = tiny(depth=3 if queries else 2), images(2).double()
    dense = Segmenter(as_encoder(dense), 5, "queries", depth=1, queries=queries) if queries else dense
    rules = (Match(merged=6), Match(merged=3), *[None] * (queries > 0))
    model, wanted = trained(compress(dense, plan_of(dense, *rules))), []
    seen, places = projected(model, x), token_places(model, x)
    for b in range(2):
        whole, token = [one(i) for i in range(TOKENS)], list(range(PATCHES))    # a row for each patch, also of a token
        for index in range(2):
            held = [[p for p in range(PATCHES) if token[p] == t] for t in range(max(token) + 1)]
            attention = mean_attention(model, index, seen[index][b], [1, *map(len, held)])
            rows = mixed(attention, [whole[0], *(whole[1 + patches[0]] for patches in held)])
            after = places[index][b].tolist()
            each = [rows[1 + token[p]] for p in range(PATCHES)]
            alike = [[q for q in range(PATCHES) if after[q] == after[p]] for p in range(PATCHES)]
            whole, token = [rows[0], *(sum(each[q] for q in same) / len(same) for same in alike)], after
        if queries:
            attention = [each[:TOKENS] for each in mean_attention(model, 2, seen[2][b])[:TOKENS]]
            whole = mixed([[share / sum(each) for share in each] for each in attention], whole)
        wanted.append(whole)
    assert_shares(model, x, wanted)


@pytest.mark.parametrize("own", [0.0, 0.3, 1.0])
def test_where_regions_share_an_update_each_patch_keeps_its_own_part(own):
    dense, x = tiny(), images(2).double()
    regions = (-1, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, -1, 5, 5)
    weights = tuple(0.0 if r < 0 else 1 / regions.count(r) for r in regions)
    rule = SharedUpdate(regions=regions, weights=weights, own=own)
    model, wanted = trained(compress(dense, plan_of(dense, rule, None))), []
    own, *weights = torch.tensor([own, *weights]).tolist()                      # as the block holds them, float32
    seen = projected(model, x)
    for b in range(2):
        rows = [one(i) for i in range(TOKENS)]
        z = [rows[0], *(sum(w * rows[1 + j] for j, (r, w) in enumerate(zip(regions, weights)) if r == c)
                        for c in range(6))]
        updates = [sum(a * row for a, row in zip(shares, z)) for shares in mean_attention(model, 0, seen[0][b])]
        rows = [unit(z[0] + updates[0]),                                        # weights in float32 sum to about 1
                *(rows[1 + j] if r < 0 else unit(own * rows[1 + j] + (1 - own) * z[1 + r] + updates[1 + r])
                  for j, r in enumerate(regions))]
        wanted.append(mixed(mean_attention(model, 1, seen[1][b]), rows))
    assert_shares(model, x, wanted)


def test_selected_tokens_go_on_and_the_mean_of_the_others_and_prefix_tokens_alone_are_read_out():
    dense, x = tiny(), images(2).double()
    model, wanted = trained(compress(dense, plan_of(dense, Select(kept=5), ReadOut()))), []
    seen = projected(model, x)
    for b in range(2):
        attention = mean_attention(model, 0, seen[0][b])
        rows = mixed(attention, [one(i) for i in range(TOKENS)])
        order = sorted(range(1, TOKENS), key=lambda j: -attention[0][j])
        rows = [rows[0], *(rows[j] for j in order[:5]), sum(rows[j] for j in order[5:]) / 11]
        wanted.append(mixed(mean_attention(model, 1, seen[1][b]), rows)[:1])
    assert_shares(model, x, wanted)


def test_heads_that_are_gone_say_nothing_and_an_attention_that_is_left_out_mixes_nothing():
    dense, x = tiny().eval(), images(2)
    kept = compress(dense, plan_of(dense, None, None, heads=(0, 2))).eval()
    maps = [[mean_attention(kept, i, rows[b]) for i, rows in enumerate(projected(kept, x))] for b in range(2)]
    wanted = torch.stack([torch.stack(mixed(second, mixed(first, [one(i) for i in range(TOKENS)])))
                          for first, second in maps])
    torch.testing.assert_close(token_shares(kept, x), wanted.float(), rtol=1e-4, atol=1e-6)            # float32
    none = compress(dense, plan_of(dense, None, None, heads=())).eval()
    torch.testing.assert_close(token_shares(none, x), torch.eye(TOKENS).expand(2, -1, -1))


def test_every_image_has_its_own_rollout_and_the_model_stays_as_it_was():
    dense, x = tiny().eval(), images(3)
    model = compress(dense, plan_of(dense, Match(merged=5), Match(merged=4))).eval()
    before, kinds = model(x), [type(attention_block(block).attn) for block in model.blocks]
    whole = looked_at(model, x)
    torch.testing.assert_close(torch.cat([looked_at(model, x[i:i + 1]) for i in range(3)]), whole)
    assert torch.equal(model(x), before) and kinds == [type(attention_block(block).attn) for block in model.blocks]
    with pytest.raises(InputError, match="deployed"):
        looked_at(deploy(compress(dense, full_plan(dense))), x)


@torch.no_grad()
def test_places_in_a_last_block_are_those_of_its_own_matching_where_tokens_are_turned_by_place():
    dense = trained(timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1, num_classes=3)).float()
    model = compress(dense, plan_of(dense, Match(merged=6, protect=50.0))).eval()
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for grid, places in zip(model.forward_features(x)[:, 1:], token_places(model, x)[0]):
        alike = torch.tensor([[torch.equal(a, b) for b in grid] for a in grid])
        assert torch.equal(alike, places[:, None] == places)
