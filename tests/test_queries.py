"""A decoder by queries against slow loops from its formula; cut, stored and deployed as every Segmenter is."""
import json
import math
import random

import pytest
import timm
import torch
import torch.nn.functional as F
from comparing import disturb_matrices, relative
from conftest import random_rule
from segmenting_fixtures import given, masks, match_plan, opened, pictures, small, units_plan
from test_segmenter import numbers, segmenter  # noqa: F401
from training_fixtures import tiny

from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.create import set_norm_eps
from vitlab.models.segmenter import Segmenter, as_encoder, with_queries
from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.rules import Match
from vitlab.runtime.files import InputError
from vitlab.workbench import segmenting

SAME = 1e-4             # two float32 orders of the same sums
EXACT = 1e-9            # float64: only the order of the sums differs
JOINED = 2              # blocks with queries, and queries, of the segmenters made here
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
def slow_logits(whole: torch.nn.Module, model: Segmenter, image: torch.Tensor) -> torch.Tensor:
    """(K, 4 h, 4 w) of one image (1, 3, H, W), by the blocks of the whole timm model and the formula of each query."""
    state, grid = model.decoder.state_dict(), whole.patch_embed.grid_size
    x = whole.norm_pre(whole._pos_embed(whole.patch_embed(image)))
    for number, block in enumerate(whole.blocks):
        if number == len(whole.blocks) - JOINED:
            x = torch.cat([x, state["queries"]], dim=1)         # at the end: their place does not matter
        x = block(x)
    x = layer_norm(x[0], {**state}, "norm")
    asked, cells = x[-QUERIES:], x[:-QUERIES][-grid[0] * grid[1]:].reshape(*grid, -1)
    for step in (0, 1):
        cells = doubled(cells, state, f"upscale.{step}")
    scores = torch.zeros(model.num_classes, *cells.shape[:2], dtype=x.dtype)
    for query in asked:
        classes = (state["class_head.weight"] @ query + state["class_head.bias"]).exp()
        hidden = query
        for layer in (0, 2, 4):
            hidden = state[f"mask_head.{layer}.weight"] @ hidden + state[f"mask_head.{layer}.bias"]
            hidden = gelu(hidden) if layer < 4 else hidden
        mask = 1 / (1 + (-(cells @ hidden)).exp())
        for k in range(model.num_classes):
            scores[k] += classes[k] / classes.sum() * mask
    return scores.log()


def test_every_family_gives_what_its_own_blocks_say_with_queries_among_their_tokens(tiny_vit, segmenter,  # noqa: F811
                                                                                    family):
    model, whole = segmenter(family, "queries").double(), tiny_vit(family, depth=7).double()
    for number in range(JOINED):                                # the fixture disturbs the decoder, its blocks, too
        whole.blocks[5 + number].load_state_dict(model.decoder.blocks[number].state_dict())
    image = numbers(1, 3, *model.img_size).double()
    with torch.inference_mode():
        found = model.patch_logits(image)[0]
        pixels = model(image[:, :, :-5, :-3])
    assert relative(found, slow_logits(whole, model, image)) < EXACT
    assert pixels.shape == (1, 5, model.img_size[0] - 5, model.img_size[1] - 3)
    wide = F.pad(image[:, :, :-5, :-3], (0, 3, 0, 5))
    with torch.inference_mode():
        wanted = F.interpolate(model.patch_logits(wide), size=model.img_size, mode="bilinear")[:, :, :-5, :-3]
    assert relative(pixels, wanted) < SAME


def test_the_last_blocks_and_the_last_norm_are_the_models_own():
    model = tiny(depth=4)
    found = with_queries(model, 5, depth=3)
    assert len(found.blocks) == 1 and found.decoder_depth == 3 and found.decoder.queries.shape == (1, 100, 24)
    for own, block in zip(found.decoder.blocks, model.blocks[1:]):
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in block.state_dict().items())
    assert torch.equal(found.decoder.norm.weight, model.norm.weight)
    assert isinstance(found.encoder.norm, torch.nn.Identity)
    assert len(model.blocks) == 4 and isinstance(model.norm, torch.nn.LayerNorm)        # which stays as it was


@pytest.mark.parametrize("kind", ["merge", "share", "match", "units"])
def test_what_comes_before_the_queries_is_cut_and_deployed_as_ever(segmenter, kind, random_plan):  # noqa: F811
    model = segmenter("deit", "queries")
    shape = shape_of(model)
    assert shape.depth == 5 and shape.decoder_depth == 2 and shape.queries == 7
    if kind == "merge":
        plan = random_plan(shape, "m0-mm", seed=3)
    else:
        blocks = {"share": [BlockPlan(tokens=tokens.shared(random_rule(shape.num_patches, random.Random(i))))
                            for i in range(5)],
                  "match": [BlockPlan(tokens=Match(merged=merged)) for merged in (4, 0, 2, 0, 1)],
                  "units": [BlockPlan(heads=(1,), neurons=(0, 2, 3))] * 2 + [BlockPlan()] * 3}
        plan = CompressionPlan(shape=shape, blocks=tuple(blocks[kind]))
    made = compress(model, plan)
    disturb_matrices(made)
    x = numbers(2, 3, *model.img_size)
    with torch.inference_mode():
        found, fast, dense = made(x), deploy(made)(x), model(x)
    assert found.shape == dense.shape and relative(fast, found) < SAME and relative(found, dense) > 100 * SAME
    for name, value in model.decoder.state_dict().items():
        assert torch.equal(value, made.decoder.state_dict()[name])


def test_a_plan_for_all_blocks_of_the_model_is_refused():
    whole = tiny(depth=3)
    with pytest.raises(InputError, match=r"depth 2 .plan: 3."):
        compress(small("queries"), CompressionPlan.empty(shape_of(whole)))


@pytest.mark.parametrize("make_plan", [CompressionPlan.empty, units_plan, match_plan])
def test_a_stored_one_is_rebuilt_in_both_forms_with_its_norms_epsilon(tmp_path, make_plan):
    whole = tiny(depth=3, img_size=(24, 40))
    set_norm_eps(whole, 1e-5)
    dense = with_queries(whole, 5, depth=1, queries=3).eval()
    plan = make_plan(shape_of(dense)) if make_plan == CompressionPlan.empty else make_plan(dense)
    for form in (lambda model: model, deploy):
        model = form(compress(dense, plan)).eval()
        found, x = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan)), pictures(2, (21, 40))
        with torch.inference_mode():
            assert torch.equal(found.model(x), model(x))
        assert found.plan == plan and found.plan.shape.queries == 3
        norms = [*found.model.encoder.modules(), *found.model.decoder.blocks.modules(), found.model.decoder.norm]
        assert {norm.eps for norm in norms if isinstance(norm, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize("name, value, says", [
    ("queries", 0, "args is"), ("queries", 8, r"decoder.queries is \(1, 7, 24\)"), ("drop", 0.1, "queries: .*drop"),
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


@pytest.mark.parametrize("name, args", [("eva02_tiny_patch14_224", {"img_size": 28}), ("beit_base_patch16_224", {}),
                                        ("vit_relpos_small_patch16_224", {})])
def test_attention_that_knows_places_is_refused(name, args):
    model = timm.create_model(name, depth=3, embed_dim=24, num_heads=2, **args)
    with pytest.raises(InputError, match="queries have no place"):
        with_queries(model, 5, depth=1)


@pytest.mark.parametrize("args, says", [({"depth": 3}, "queries in the last 3 of 3 blocks"),
                                        ({"depth": 0}, "queries in the last 0 of 3 blocks"),
                                        ({"depth": 1, "queries": 0}, "0 queries in 1 blocks")])
def test_queries_that_cant_be_are_refused(args, says):
    with pytest.raises(InputError, match=says):
        with_queries(tiny(depth=3), 5, **args)
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
