"""A decoder by queries against slow loops from its formula; cut, stored and deployed as every Segmenter is."""
import copy
import dataclasses
import io
import json
import math
import pickle
import random
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from comparing import disturb_matrices, relative
from conftest import random_rule
from segmenting_fixtures import SIZE, given, masks, match_plan, opened, pictures, small, units_plan
from test_families import check_cost, made, some_units
from test_segmenter import numbers, segmenter  # noqa: F401
from timm.models._features import FeatureGetterNet
from training_fixtures import tiny

from vitlab.criteria.planning import prune_and_merge
from vitlab.criteria.units import UNIT_CRITERIA
from vitlab.measure.capture import TOKEN_CRITERIA, attention_maps, attention_spans, token_scores
from vitlab.measure.moments import each_moments
from vitlab.measure.rollout import token_shares
from vitlab.measure.units import unit_scores
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.create import set_norm_eps
from vitlab.models.families import also_taken, embedded
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.models.support import attention_block
from vitlab.plan import BlockPlan, CompressionPlan, cost, tokens
from vitlab.plan.rules import Match
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError
from vitlab.search import SearchSpace
from vitlab.search.token_dimensions import TOKEN_DIMENSIONS
from vitlab.training.compensate import compensate, layers_to_refit
from vitlab.training.gradual import partial_plan
from vitlab.workbench import comparing, segmenting

SAME = 1e-4             # two float32 orders of the same sums
EXACT = 1e-9            # float64: only the order of the sums differs
JOINED = 2              # blocks with queries, of 7, and queries, of the segmenters made here
QUERIES = 7


def layer_norm(x: torch.Tensor, state: dict, name: str, eps: float = 1e-6) -> torch.Tensor:
    """Over the last dimension."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def doubled(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    """One step of upscaling, cell by cell: (h, w, D) -> (2 h, 2 w, D)."""
    h, w, width = x.shape
    wide = torch.zeros(2 * h, 2 * w, width, dtype=x.dtype)
    for i in range(2 * h):
        for j in range(2 * w):                                  # weight (D in, D out, 2, 2), each cell of one patch
            wide[i, j] = x[i // 2, j // 2] @ state[f"{name}.0.weight"][:, :, i % 2, j % 2] + state[f"{name}.0.bias"]
    wide, mixed = gelu(wide), torch.zeros_like(wide)
    for i in range(2 * h):
        for j in range(2 * w):                                  # each channel by itself, nothing outside
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if 0 <= i + a < 2 * h and 0 <= j + b < 2 * w:
                        mixed[i, j] += wide[i + a, j + b] * state[f"{name}.2.weight"][:, 0, a + 1, b + 1]
    return layer_norm(mixed, state, f"{name}.3")


@torch.no_grad()
def slow_answers(whole: torch.nn.Module, model: Segmenter, image: torch.Tensor) -> list[list[tuple]]:
    """Of each query, as it enters each block that it is in and at the end, the logits of its classes (K + 1) and of its
    mask (4 h, 4 w): of one image (1, 3, H, W), by the blocks of the whole timm model and the formula of each query."""
    state, grid, found = model.decoder.state_dict(), whole.patch_embed.grid_size, []
    joins, = [value for name, value in model.state_dict().items() if name.endswith("join.queries")]

    def look(x: torch.Tensor) -> None:
        x = (whole.fc_norm if isinstance(whole.norm, torch.nn.Identity) else whole.norm)(x)[0]
        asked, cells = x[:QUERIES], x[-grid[0] * grid[1]:].reshape(*grid, -1)
        for step in (0, 1):
            cells = doubled(cells, state, f"upscale.{step}")
        found.append([])
        for query in asked:
            hidden = query
            for layer in (0, 2, 4):
                hidden = state[f"mask_head.{layer}.weight"] @ hidden + state[f"mask_head.{layer}.bias"]
                hidden = gelu(hidden) if layer < 4 else hidden
            found[-1].append((state["class_head.weight"] @ query + state["class_head.bias"], cells @ hidden))
    x = whole.norm_pre(whole._pos_embed(whole.patch_embed(image)))
    for number, block in enumerate(whole.blocks):
        if number == len(whole.blocks) - JOINED:
            x = torch.cat([joins, x], dim=1)                    # at the beginning: their place does not matter
        if number >= len(whole.blocks) - JOINED:
            look(x)
        x = block(x)
    look(x)
    return found


def slow_logits(answers: list[tuple]) -> torch.Tensor:
    """(K, 4 h, 4 w) of what the queries of one image say."""
    scores = torch.zeros(len(answers[0][0]) - 1, *answers[0][1].shape, dtype=answers[0][1].dtype)
    for classes, mask in answers:
        for k in range(len(scores)):
            scores[k] += classes[k].exp() / classes.exp().sum() / (1 + (-mask).exp())
    return scores.log()


def test_every_family_gives_what_its_own_blocks_say_with_queries_among_their_tokens(tiny_vit, segmenter,  # noqa: F811
                                                                                    family):
    model, whole = segmenter(family, "queries").double(), tiny_vit(family, depth=7).double()
    image = numbers(1, 3, *model.img_size).double()
    with torch.inference_mode():
        found, answers = model.patch_logits(image)[0], model(image, answers=True)
        pixels = model(image[:, :, :-5, :-3])
    wanted = slow_answers(whole, model, image)
    assert relative(found, slow_logits(wanted[-1])) < EXACT
    assert len(answers) == len(wanted) == JOINED + 1
    for (classes, cells), each in zip(answers, wanted):
        for of_all, of_each in ((classes, [query[0] for query in each]), (cells, [query[1] for query in each])):
            assert relative(of_all[0], torch.stack(of_each)) < EXACT
    assert pixels.shape == (1, 5, model.img_size[0] - 5, model.img_size[1] - 3)
    wide = F.pad(image[:, :, :-5, :-3], (0, 3, 0, 5))
    with torch.inference_mode():
        wanted = F.interpolate(model.patch_logits(wide), size=model.img_size, mode="bilinear")[:, :, :-5, :-3]
    assert relative(pixels, wanted) < SAME


def test_the_last_blocks_and_the_last_norm_are_the_models_own():
    model = tiny(depth=4)
    found = Segmenter(as_encoder(model), 5, "queries")
    assert len(found.blocks) == 4 and found.decoder_depth == 3 and found.blocks[1].join.queries.shape == (1, 100, 24)
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, found.encoder.state_dict()[name])
    assert set(found.encoder.state_dict()) - set(model.state_dict()) == {"blocks.1.join.queries"}
    # none of the model's own parameters decays, or learns, otherwise than before; queries are of the decoder
    assert "encoder.blocks.1.join.queries" in found.no_weight_decay()
    group = found.group_matcher()["blocks"][0][0]
    assert re.match(group, "encoder.blocks.1.mlp.fc1.weight") and not re.match(group, "encoder.blocks.1.join.queries")
    assert cost.params(found)["decoder"] == sum(p.numel() for p in found.decoder.parameters()) + 100 * 24


def with_tokens(shape: ViTShape, kind: str) -> CompressionPlan:
    """Units cut in every block, and tokens by a rule in those before queries join."""
    chance = random.Random(0)
    rules = {"share": [tokens.shared(random_rule(shape.num_patches, chance)) for _ in range(5)],
             "merge": [random_rule(shape.num_patches, chance) if i in (0, 3, 4) else None for i in range(5)],
             "span": [None, None, dataclasses.replace(random_rule(shape.num_patches, chance), span=3), None, None],
             "match": [Match(merged=merged) for merged in (4, 0, 2, 0, 1)], "units": [None] * 5}[kind]
    units = [BlockPlan(heads=(i % shape.num_heads,), neurons=tuple(range(i, shape.num_neurons, 3)),
                       qk_width=None if i % 2 else shape.head_dim - 1) for i in range(5 + JOINED)]
    return CompressionPlan(shape=shape, blocks=tuple(
        dataclasses.replace(block, tokens=rule) for block, rule in zip(units, rules + [None] * JOINED)))


@pytest.mark.parametrize("kind", ["merge", "span", "share", "match", "units"])
def test_units_of_every_block_and_tokens_before_the_queries_are_cut_and_deployed(segmenter, kind):  # noqa: F811
    model = segmenter("deit", "queries")
    shape = shape_of(model)
    assert (shape.depth, shape.decoder_depth, shape.queries, shape.before_queries) == (7, JOINED, QUERIES, 5)
    plan = with_tokens(shape, kind)
    made = compress(model, plan)
    disturb_matrices(made)
    x = numbers(2, 3, *model.img_size)
    with torch.inference_mode():
        found, fast, dense = made(x), deploy(made)(x), model(x)
    assert found.shape == dense.shape and relative(fast, found) < SAME and relative(found, dense) > 100 * SAME
    for name, value in model.decoder.state_dict().items():
        assert torch.equal(value, made.decoder.state_dict()[name])
    # the last answers are those that the logits are of, and a compressed model learns by all of them
    answers = made(x, answers=True)
    assert len(answers) == JOINED + 1 and answers[0][1].requires_grad
    scores = answers[-1][0].softmax(dim=2)[:, :, :-1].mT @ answers[-1][1].sigmoid().flatten(2)
    assert relative(scores.log().detach(), made.patch_logits(x).detach().flatten(2)) < SAME


def test_tokens_stay_where_queries_have_joined():
    model = small("queries")
    shape, plain = shape_of(model), shape_of(tiny(depth=3, img_size=SIZE))
    scores = torch.rand(3, shape.num_patches, generator=torch.Generator().manual_seed(0))
    free = prune_and_merge(scores, shape, keep_rate=0.5)
    assert [block.tokens is None for block in free.blocks] == [False, False, True]
    for plan in (prune_and_merge(scores, plain, keep_rate=0.5),
                 CompressionPlan(shape=plain, blocks=(BlockPlan(tokens=Match(merged=2)),) * 3)):
        with pytest.raises(InputError, match="^block 2: tokens can't be cut here: queries have joined them, and their "
                                             "masks need every patch; null is needed$"):
            compress(model, plan)
    rule = dataclasses.replace(free.blocks[1].tokens, span=2)
    with pytest.raises(InputError, match="block 1: tokens stay merged for 2 blocks from here, but 1 is left"):
        CompressionPlan(shape=shape, blocks=(BlockPlan(), BlockPlan(tokens=rule), BlockPlan()))
    with pytest.raises(InputError, match="span 1-2: its blocks must lie from 0 to 1"):
        prune_and_merge(scores, shape, spans=[(1, 2, 0.5)])
    with pytest.raises(InputError, match="shape.decoder_depth is 3; of 3 blocks the last 1 to 2 can have queries"):
        dataclasses.replace(shape, decoder_depth=3)


def test_what_makes_plans_of_tokens_leaves_the_blocks_with_queries(segmenter):  # noqa: F811
    model = segmenter("deit", "queries")
    shape = shape_of(model)
    scores = torch.rand(7, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.1
    weights = unit_scores(model, (), criterion="weight")
    made = segmenting.plans_at(scores, shape, 0.5)
    made |= {f"part of {name}": partial_plan(made[name], 0.5, weights) for name in made if "merging" not in name}
    made |= {str(block): comparing._match_in(shape, block, 0.3) for block in range(5)}
    for name, plan in made.items():
        cut = [block.tokens is not None for block in plan.blocks]
        assert any(cut[:5]) and not any(cut[5:]), name
        assert cost.gmacs(plan) < cost.gmacs(CompressionPlan.empty(shape))
        assert compress(model, plan)(numbers(1, 3, *model.img_size)).isfinite().all()
    # half of the blocks whose tokens are cut, the last ones
    assert [block.tokens is not None for block in made["part of shared updates"].blocks] == [False] * 2 + [True] * 3 + [
        False] * 2


@pytest.mark.parametrize("name", [name for name in TOKEN_DIMENSIONS if not name.startswith("select")])
def test_a_search_cuts_units_of_all_blocks_and_tokens_of_those_before(segmenter, name):  # noqa: F811
    model = segmenter("deit", "queries")
    shape = shape_of(model)
    space = SearchSpace(shape=shape, units=("neurons", "heads", "widths"), tokens=name, max_ratio=0.6)
    for unit in space.units:
        assert [f"{unit} {block}" in space.names for block in range(8)] == [True] * 7 + [False]
    chance = torch.Generator().manual_seed(0)
    scores = {"heads": torch.rand(7, shape.num_heads, generator=chance),
              "neurons": torch.rand(7, shape.num_neurons, generator=chance),
              "tokens": torch.rand(7, shape.num_patches, generator=chance) + 0.1}
    policy = torch.rand(space.size, generator=chance).numpy() * 0.6
    plan = space.plan(policy, **scores)
    assert (name == "none") == all(block.tokens is None for block in plan.blocks)
    assert space.gmacs(policy)[0] == pytest.approx(cost.gmacs(plan))
    assert compress(model, plan)(numbers(1, 3, *model.img_size)).isfinite().all()
    if name in ("none", "match_per_block", "share"):
        assert space.keys(space.policy(plan)[None]) == space.keys(policy)


def test_compensation_refits_blocks_with_queries_too(segmenter):  # noqa: F811
    model = segmenter("deit", "queries")
    plan = with_tokens(shape_of(model), "units")
    images = [(numbers(6, 3, *model.img_size, seed=i), None) for i in range(4)]
    with torch.inference_mode():
        wanted = model.patch_logits(images[0][0]).log_softmax(dim=1)
        far = [float((made.patch_logits(images[0][0]).log_softmax(dim=1) - wanted).abs().mean()) for made in (
            compress(model, plan), compensate(model, plan, images, progress=False),
            compensate(model, plan, images, progress=False, moments=dict(each_moments(model, images))))]
    assert max(far[1:]) < 0.9 * far[0]
    assert layers_to_refit(plan, every=False) == [(i, kind) for i in range(7) for kind in ("heads", "neurons")]


def test_scores_of_tokens_and_heads_are_of_the_image_alone(segmenter):  # noqa: F811
    model = segmenter("deit", "queries")
    shape, x = shape_of(model), numbers(3, 3, *model.img_size)
    labels = torch.randint(5, (3, *model.img_size), generator=torch.Generator().manual_seed(0))
    for criterion in TOKEN_CRITERIA:
        assert token_scores(model, [(x, labels)], criterion=criterion, progress=False).shape == (7, shape.num_patches)
    for criterion in UNIT_CRITERIA:
        found = unit_scores(model, [(x, labels)], criterion=criterion, progress=False)
        assert found.heads.shape == (7, shape.num_heads) and found.heads.isfinite().all()
        assert found.neurons.shape == (7, shape.num_neurons) and found.neurons.isfinite().all()
    maps = attention_maps(model, x)
    assert maps.shape == (7, 3, shape.num_heads, shape.num_tokens, shape.num_tokens)
    assert torch.allclose(maps[:5].sum(dim=-1), torch.ones(()), atol=SAME)
    assert (maps[5:].sum(dim=-1) < 1 - SAME).all()             # queries have a part
    assert all(each.shape == (7, shape.num_heads) for each in attention_spans(model, [(x, labels)], progress=False))
    # rollout: what queries have a part in is left out, and shares sum to 1
    shares = token_shares(model, x)
    assert shares.shape == (3, shape.num_tokens, shape.num_tokens)
    assert torch.allclose(shares.sum(dim=2), torch.ones(()), atol=SAME)


@pytest.mark.parametrize("block", [5, 6])
def test_masked_heads_and_neurons_of_a_block_with_queries_equal_cut_ones(segmenter, block):  # noqa: F811
    model = segmenter("deit", "queries").double()
    shape, x = shape_of(model), numbers(2, 3, *model.img_size).double()
    heads, neurons = (1,), tuple(range(0, shape.num_neurons, 3))
    blocks = [BlockPlan(heads=heads, neurons=neurons) if i == block else BlockPlan() for i in range(7)]
    masked, d = copy.deepcopy(model), shape.head_dim
    with torch.no_grad():                       # what a unit that goes gives is nothing
        gone = [h * d + i for h in range(shape.num_heads) if h not in heads for i in range(d)]
        masked.blocks[block].attn.proj.weight[:, gone] = 0
        masked.blocks[block].mlp.fc2.weight[:, [m for m in range(shape.num_neurons) if m not in neurons]] = 0
        found = compress(model, CompressionPlan(shape=shape, blocks=tuple(blocks)))(x)
        assert relative(found, masked(x)) < EXACT and relative(found, model(x)) > SAME


@pytest.mark.parametrize("make_plan", [CompressionPlan.empty, units_plan, match_plan])
def test_a_stored_one_is_rebuilt_in_both_forms_with_its_norms_epsilon(tmp_path, make_plan):
    whole = tiny(depth=3, img_size=(24, 40))
    set_norm_eps(whole, 1e-5)
    dense = Segmenter(as_encoder(whole), 5, "queries", depth=1, queries=3).eval()
    plan = make_plan(shape_of(dense)) if make_plan == CompressionPlan.empty else make_plan(dense)
    for form in (lambda model: model, deploy):
        model = form(compress(dense, plan)).eval()
        found, x = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan)), pictures(2, (21, 40))
        with torch.inference_mode():
            assert torch.equal(found.model(x), model(x))
        assert found.plan == plan and found.plan.shape.queries == 3
        norms = [norm for norm in found.model.encoder.modules() if isinstance(norm, torch.nn.LayerNorm)]
        assert len(norms) == 7 and {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize("name, value, says", [
    ("queries", 0, "args is"), ("queries", 8, r"join.queries is \(1, 7, 24\)"), ("drop", 0.1, "queries: .*drop"),
    ("depth", 10 ** 6, "args is")])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, value, says):
    model = small("queries")
    folder = checkpoint.save(tmp_path / "c", model, CompressionPlan.empty(shape_of(model)))
    path = folder / "checkpoint.json"
    info = json.loads(path.read_text())
    info["segmenter"]["args"][name] = value
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match=says):
        checkpoint.load(folder)


@torch.no_grad()
@pytest.mark.parametrize("make_plan", [CompressionPlan.empty, match_plan])
def test_the_encoder_alone_pools_an_images_own_tokens_and_gives_grids_of_blocks_before_the_queries(make_plan):
    model, x = small("queries", depth=2), pictures(2)
    model = compress(model, make_plan(shape_of(model)) if make_plan == CompressionPlan.empty else make_plan(model))
    encoder, buffer = copy.deepcopy(model.encoder), io.BytesIO()
    encoder.reset_classifier(4, "avg")
    features = encoder.forward_features(x)
    assert features.shape == (2, 16 + QUERIES, 24)
    assert relative(encoder(x), encoder.head(encoder.fc_norm(features[:, 1:16].mean(dim=1)))) < SAME
    pickle.dump(model, buffer)
    again = pickle.loads(buffer.getvalue())
    assert type(again.encoder) is type(model.encoder) and torch.equal(again(x), model(x))
    inner, prefix = encoder.forward_intermediates(x, intermediates_only=True, output_fmt="NLC", norm=True,
                                                  return_prefix_tokens=True)[-1]
    assert relative(torch.cat([prefix, inner], dim=1), features) < SAME
    for call in (lambda: encoder.forward_intermediates(x), lambda: encoder.get_intermediate_layers(x, 1, reshape=True),
                 lambda: FeatureGetterNet(copy.deepcopy(encoder), out_indices=(1, 2))(x)):
        with pytest.raises(InputError, match='^queries have joined the tokens before block 2, .*"NLC"[^\n]*$'):
            call()
    with pytest.raises(InputError, match="^torch.jit.script can't take[^\n]*$"):
        torch.jit.script(encoder)
    grid, = FeatureGetterNet(encoder, out_indices=(1,))(x)
    assert grid.shape == (2, 24, 3, 5)


@torch.no_grad()
def as_prefix(model: Segmenter, images: torch.Tensor) -> torch.Tensor:
    """Logits of the cells, the queries being prefix tokens: first, and so many more that timm's attention does not
    turn."""
    encoder, count = copy.deepcopy(model.encoder), model.decoder.num_queries
    x = embedded(encoder, images)
    for block, also in zip(encoder.blocks, also_taken(encoder)):
        own = attention_block(block)
        if hasattr(own, "join"):
            x = torch.cat([own.join.queries.expand(len(x), -1, -1), x], dim=1)
        if len(x[0]) > encoder.num_prefix_tokens + encoder.patch_embed.num_patches:
            own._forward_pre_hooks.clear()
            own.attn.num_prefix_tokens += count
        x = block(x, **also)
    x = encoder.norm(torch.cat([x[:, count:], x[:, :count]], dim=1))[:, encoder.num_prefix_tokens:]
    return model.decoder(encoder.fc_norm(x), model.patch_embed.grid_size)


# turned by halves or by pairs, by one rotation or by each head's own; a norm over heads, gated neurons; shared keys
TURNED = ("vit_base_patch16_dinov3", "eva02_base_patch14_224", "vit_base_patch16_rope_mixed_224",
          "vit_large_patch16_sapiens2", "vit_pe_core_base_patch16_224")


@pytest.mark.parametrize("name", TURNED)
def test_of_patches_that_are_turned_by_place_queries_are_not_and_everything_is_cut_before_and_among_them(name):
    whole = as_encoder(made(name))
    model = Segmenter(whole, 5, "queries", depth=2, queries=QUERIES).double().eval()
    shape, x = shape_of(model), numbers(2, 3, *model.img_size).double()
    assert (shape.depth, shape.decoder_depth, shape.queries) == (3, 2, QUERIES) and shape.rotary
    plan = CompressionPlan(shape=shape, blocks=tuple(dataclasses.replace(
        block, tokens=None if i else Match(merged=4, protect=0)) for i, block in enumerate(some_units(shape))))
    for cut in (CompressionPlan.empty(shape), plan):
        small_one = compress(model, cut)
        with torch.inference_mode():
            found, answers = small_one.patch_logits(x), small_one(x, answers=True)
        assert relative(found, as_prefix(small_one, x)) < EXACT
        scores = answers[-1][0].softmax(dim=2)[:, :, :-1].mT @ answers[-1][1].sigmoid().flatten(2)
        assert relative(scores.log(), found.flatten(2)) < EXACT
        check_cost(deploy(small_one), cut, x)
    images = [(x, torch.randint(5, (2, *model.img_size), generator=torch.Generator().manual_seed(0)))]
    assert token_scores(model, images, progress=False).shape == (3, shape.num_patches)
    assert unit_scores(model, images, criterion="taylor", progress=False).neurons.isfinite().all()
    assert compensate(model, plan, images, progress=False)(x).isfinite().all()


@pytest.mark.parametrize("dtype, far, within", [(torch.float32, -200, 1e-5), (torch.float16, -40, 0.01),
                                                (torch.bfloat16, -40, 0.02)])
def test_far_outside_of_all_masks_there_is_a_class_too(monkeypatch, dtype, far, within):
    """There a sigmoid is 0, or has no digits; within: of the softmax over classes, in that precision."""
    decoder, chance = small("queries").decoder, torch.Generator().manual_seed(0)
    classes, masks = torch.randn(1, 7, 6, generator=chance), far + 5 * torch.randn(1, 7, 12, 20, generator=chance)
    classes, masks = classes.to(dtype), masks.to(dtype)
    monkeypatch.setattr(decoder, "answers", lambda tokens, grid: (classes, masks))
    wanted = slow_logits([*zip(classes[0].double(), masks[0].double())])
    assert relative(decoder(None, (3, 5))[0].double().softmax(dim=0), wanted.softmax(dim=0)) < within
    assert relative(decoder(None, (3, 5))[0].double(), wanted) < within


@pytest.mark.parametrize("name, args", [("beit_base_patch16_224", {}), ("vit_relpos_small_patch16_224", {})])
def test_attention_with_a_bias_by_places_is_refused(name, args):
    model = timm.create_model(name, depth=3, embed_dim=24, num_heads=2, **args)
    with pytest.raises(InputError, match="queries have no place"):
        Segmenter(as_encoder(model), 5, "queries", depth=1)


def test_queries_join_a_copy_of_a_dense_encoder_and_no_other():
    encoder, x = as_encoder(tiny(depth=3, img_size=SIZE)), pictures(1)
    linear = Segmenter(encoder, 5, "linear").eval()
    before = linear(x)
    few, many = (Segmenter(encoder, 5, "queries", depth=1, queries=count) for count in (3, 7))
    assert torch.equal(linear(x), before) and few(x).shape == many(x).shape == before.shape
    for name in ("linear", "queries"):
        with pytest.raises(InputError, match="^queries of another decoder have joined the encoder's tokens"):
            Segmenter(few.encoder, 5, name)
    shape = shape_of(encoder)
    scores = torch.rand(3, shape.num_patches, generator=torch.Generator().manual_seed(0))
    cut = compress(encoder, prune_and_merge(scores, shape, keep_rate=0.5))
    for each in (cut, deploy(cut)):
        with pytest.raises(InputError, match="^queries join a dense encoder, but tokens of this one are cut"):
            Segmenter(each, 5, "queries", depth=1)


@pytest.mark.parametrize("args, says", [({"depth": 3}, "queries in the last 3 of 3 blocks"),
                                        ({"depth": 0}, "queries in the last 0 of 3 blocks"),
                                        ({"depth": 1, "queries": 0}, "0 queries in the last 1 of 3 blocks")])
def test_queries_that_cant_be_are_refused(args, says):
    with pytest.raises(InputError, match=says):
        Segmenter(as_encoder(tiny(depth=3)), 5, "queries", **args)
    with pytest.raises(InputError, match="decoder queries: .*drop"):
        Segmenter(as_encoder(tiny(depth=3)), 5, "queries", drop=0.1)


def test_they_learn_pixels_by_their_cross_entropy_and_are_made_by_their_name():
    data = given([(24, 40)])
    torch.manual_seed(0)
    model = segmenting.make_segmenter(opened(tiny(depth=3)), data, decoder="queries", depth=1, queries=7)
    assert (model.decoder_name, model.num_classes, model.decoder_depth, model.img_size) == ("queries", 5, 1, (24, 40))
    x, truth = pictures(2), masks(2)
    truth[:, :, :20], truth[:, :, 20:] = 1, 4
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(100):
        losses.append(F.cross_entropy(model(x), truth))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.3 * float(losses[0].detach())
    with torch.inference_mode():
        assert (model(x).argmax(dim=1) == truth).double().mean() > 0.9
