"""Segmenter against hand-computed cases and slow loops, on every family and plan; sliding windows cover every pixel."""
import copy
import dataclasses
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from comparing import disturb_matrices, relative
from conftest import DEPTH, NUM_CLASSES, random_rule
from timm.layers import resample_abs_pos_embed
from timm.optim import create_optimizer_v2

from vitlab.models import compress, deploy, shape_of
from vitlab.models.create import architecture, rebuild
from vitlab.models.decoders import DECODERS, MaskTransformer
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.models.windows import segment, slide, windows
from vitlab.plan import BlockPlan, CompressionPlan, cost, tokens
from vitlab.plan.rules import Match, ReadOut, Select
from vitlab.runtime.files import InputError

SAME = 1e-4             # two float32 orders of the same sums, 5 blocks deep
EXACT = 1e-10           # float64: only the order of the sums differs
PREFIX = {"deit": 1, "distilled": 2, "augreg": 1, "deit3": 1, "mae": 1, "dinov2_reg": 5, "qk_norm": 1}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disturb(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


@pytest.fixture
def segmenter(tiny_vit):
    """segmenter(family, decoder, **timm arguments): 5 classes, in eval mode, every parameter of the decoder off its
    start; 7 queries in two blocks more."""
    def make(family: str, decoder: str = "mask_transformer", **args) -> Segmenter:
        if decoder == "queries":
            model = Segmenter(as_encoder(tiny_vit(family, **{"depth": DEPTH + 2, **args})), 5, "queries", depth=2,
                              queries=7)
        else:
            model = Segmenter(as_encoder(tiny_vit(family, **args)), 5, decoder)
        disturb(model.decoder)
        return model.eval()
    return make


@torch.no_grad()
def run(model, x):
    return model(x)


# ---------------------------------------------------------------- decoders

def test_linear_decoder_by_hand():
    decoder = DECODERS["linear"](2, 3)
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 3.0]]), torch.tensor([0.5, 0.0, -1.0])
    decoder.load_state_dict({"head.weight": weight, "head.bias": bias})
    patches = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]])
    assert run(decoder, patches).tolist() == [[[1.5, 4.0, 4.0], [0.5, -2.0, -4.0]]]


def by_hand() -> MaskTransformer:
    """2 wide, 3 classes; blocks that add nothing, plain projections, and a norm that gives (a, b) -> +-(1, -1) + (1,
    0)."""
    decoder = MaskTransformer(2, 3, head_dim=1, depth=1).eval()
    state = {name: torch.zeros_like(value) for name, value in decoder.state_dict().items()}
    for name in ("proj_dec.weight", "proj_patch", "proj_classes"):
        state[name] = torch.eye(2)
    state |= {"decoder_norm.weight": torch.ones(2), "decoder_norm.bias": torch.tensor([1.0, 0.0]),
              "mask_norm.weight": torch.ones(3), "cls_emb": torch.tensor([[[0.0, 4.0], [5.0, 2.0], [7.0, 7.0]]])}
    decoder.load_state_dict(state)
    return decoder


def test_mask_transformer_by_hand():
    # Normed: patch (3, 1) -> (2, -1); classes (0, 4) -> (0, 1), (5, 2) -> (2, -1), (7, 7) -> (1, 0). Cosines of the
    # patch with them:
    # -1/sqrt 5, 1, 2/sqrt 5. Their mean is 0.48241 and deviation 0.65875. Patch (1, 3) -> (0, 1): cosines 1, -1/sqrt 5,
    # 0;
    # mean 0.18426, deviation 0.60502.
    found = run(by_hand(), torch.tensor([[[3.0, 1.0], [1.0, 3.0]]]))
    wanted = torch.tensor([[[-1.41119, 0.78573, 0.62546], [1.34829, -1.04373, -0.30455]]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)        # the norms' epsilon, 1e-5 of a variance of 0.4


def slow_decoder(decoder: MaskTransformer, patches: torch.Tensor, heads: int) -> torch.Tensor:
    """The published formula image by image, head by head, every norm written out: (n, D) -> (n, K)."""
    state = decoder.state_dict()

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    count = len(patches)
    x = torch.cat([linear(patches, "proj_dec"), state["cls_emb"][0]])
    for i in range(2):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=1)
        width, mixed = x.shape[1] // heads, []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            mixed.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1) @ v[:, part])
        x = x + linear(torch.cat(mixed, 1), f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    x = norm(x, "decoder_norm")
    cosines = torch.zeros(count, len(x) - count, dtype=x.dtype)
    for j in range(count):
        for c in range(len(x) - count):
            a, b = x[j] @ state["proj_patch"], x[count + c] @ state["proj_classes"]
            cosines[j, c] = a @ b / (a @ a).sqrt() / (b @ b).sqrt()
    return norm(cosines, "mask_norm")


def test_mask_transformer_is_the_published_formula_on_random_weights():
    decoder = disturb(MaskTransformer(21, 5, head_dim=7).double()).eval()
    patches = numbers(2, 11, 21).double()
    wanted = torch.stack([slow_decoder(decoder, each, heads=3) for each in patches])
    assert relative(run(decoder, patches), wanted) < EXACT


def test_mask_transformer_drops_in_training_alone_as_published():
    decoder = MaskTransformer(21, 5, head_dim=7)
    assert {(b.attn.attn_drop.p, b.attn.proj_drop.p, b.mlp.drop1.p) for b in decoder.blocks} == {(0.1, 0.1, 0.1)}
    assert len(decoder.blocks) == 2
    patches = numbers(1, 3, 21)
    assert not torch.equal(run(decoder.train(), patches), run(decoder, patches))
    assert torch.equal(run(decoder.eval(), patches), run(decoder, patches))


@pytest.mark.parametrize("args, says", [
    ({"decoder": "conv"}, r"decoder 'conv' is not known; known are \['linear', 'mask_transformer', 'queries'\]"),
    ({"depth": 0}, "mask transformer of 0 blocks"), ({"head_dim": 5}, "33 wide, with heads of 5"),
    ({"width": 3}, "decoder mask_transformer: .*width"), ({"num_classes": 1}, "num_classes is 1; at least 2"),
])
def test_a_decoder_that_cant_be_is_refused(tiny_vit, args, says):
    with pytest.raises(InputError, match=says):
        Segmenter(tiny_vit("deit"), **{"num_classes": 5, **args})


# ---------------------------------------------------------------- the model

@torch.no_grad()
def features_by_hand(model: Segmenter, images: torch.Tensor, family: str) -> torch.Tensor:
    """Patch tokens (B, n, D) block by block; the last norm stands in fc_norm where a model pools by average."""
    encoder = model.encoder
    x = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
    for block in encoder.blocks:
        x = block(x)
    norm = encoder.fc_norm if family == "mae" else encoder.norm
    assert isinstance(norm, torch.nn.LayerNorm)
    return norm(x)[:, PREFIX[family]:]


def upsampled_slowly(grid: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear, pixel centres at half: (h, w) -> (height, width)."""
    h, w = grid.shape
    out = torch.zeros(height, width, dtype=grid.dtype)
    for i in range(height):
        for j in range(width):
            y, x = max((i + 0.5) * h / height - 0.5, 0), max((j + 0.5) * w / width - 0.5, 0)
            top, left = min(int(y), h - 1), min(int(x), w - 1)
            down, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = y - top, x - left
            out[i, j] = ((1 - a) * ((1 - b) * grid[top, left] + b * grid[top, right])
                         + a * ((1 - b) * grid[down, left] + b * grid[down, right]))
    return out


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
def test_every_family_gives_the_decoders_logits_of_its_patches_upsampled_and_cropped(segmenter, family, decoder):
    model = segmenter(family, decoder).double()
    (height, width), patch = model.img_size, model.encoder.patch_embed.patch_size
    images = numbers(2, 3, height - 5, width - 3).double()              # no multiples of the patch
    assert (height - 5) % patch[0] and (width - 3) % patch[1]
    padded = torch.zeros(2, 3, height, width).double()
    padded[:, :, :height - 5, :width - 3] = images
    rows, columns = height // patch[0], width // patch[1]
    found = run(model, images)
    logits = run(model.decoder, features_by_hand(model, padded, family))                # (B, n, K)
    assert found.shape == (2, 5, height - 5, width - 3)
    for b, k in ((0, 0), (1, 4)):
        wanted = upsampled_slowly(logits[b, :, k].reshape(rows, columns), height, width)[:height - 5, :width - 3]
        assert relative(found[b, k], wanted) < EXACT


@pytest.mark.parametrize("decoder", ["mask_transformer", "queries"])
def test_every_family_trains_all_of_its_decoder_and_encoder(segmenter, family, decoder):
    model = segmenter(family, decoder).train()
    F.cross_entropy(model(numbers(2, 3, *model.img_size)), torch.randint(5, (2, *model.img_size))).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
               or not p.grad.any()]
    assert without == []


def test_an_image_of_another_size_is_refused_with_both_sizes_and_a_flexible_encoder_takes_it(segmenter):
    with pytest.raises(InputError, match="an image of 32 x 80 came in; the encoder is for 48 x 80"):
        run(segmenter("deit"), numbers(1, 3, 32, 80))
    flexible = segmenter("deit", dynamic_img_size=True)
    assert run(flexible, numbers(1, 3, 37, 101)).shape == (1, 5, 37, 101)


def test_as_encoder_has_no_classifier_no_pooling_and_the_same_tokens_and_leaves_the_model(tiny_vit, family, images):
    model = tiny_vit(family)
    encoder, x = as_encoder(model), images(model)
    with torch.no_grad():
        assert torch.equal(encoder.forward_features(x), model.forward_features(x))
    assert (encoder.global_pool, encoder.num_classes) == ("", 0) and model.num_classes == NUM_CLASSES
    assert not any("head" in name for name in encoder.state_dict())
    assert cost.macs(CompressionPlan.empty(shape_of(encoder)))["classifier"] == 0


def test_an_encoder_is_built_again_from_its_source(tiny_vit, family, images):
    encoder = as_encoder(tiny_vit(family))
    again = as_encoder(rebuild(architecture(encoder)))
    again.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval().forward_features(images(encoder)), encoder.forward_features(images(encoder)))
    assert again.global_pool == ""


def test_other_families_are_refused():
    with pytest.raises(InputError, match="Linear is not one of timm's plain vision transformers"):
        Segmenter(torch.nn.Linear(3, 3), 5)


def test_no_weight_decay_names_parameters_that_are_there(segmenter, family):
    model = segmenter(family)
    names = model.no_weight_decay() & {name for name, _ in model.named_parameters()}
    assert {"encoder.pos_embed", "decoder.cls_emb"} <= names
    assert "decoder.cls_emb" not in segmenter(family, "linear").no_weight_decay()


def test_checkpointed_blocks_give_the_same_gradient(segmenter):
    model = segmenter("deit")
    other, x = copy.deepcopy(model), numbers(1, 3, *model.img_size)
    other.set_grad_checkpointing()
    for each in (model.train(), other.train()):
        each.decoder.eval()                                             # no dropout
        each(x).square().mean().backward()
    torch.testing.assert_close(other.encoder.pos_embed.grad, model.encoder.pos_embed.grad)


# ---------------------------------------------------------------- compressed and deployed

def test_an_empty_plan_is_bit_equal_to_the_dense_encoder(segmenter, family):
    model = segmenter(family)
    x, encoder = numbers(2, 3, *model.img_size), compress(model.encoder, CompressionPlan.empty(shape_of(model.encoder)))
    assert torch.equal(run(model.with_encoder(encoder), x), run(model, x))
    assert torch.equal(run(model.with_encoder(deploy(encoder)), x), run(model, x))


def test_with_encoder_takes_the_encoder_itself_and_a_copy_of_the_decoder(segmenter):
    model = segmenter("deit")
    encoder = compress(model.encoder, CompressionPlan.empty(shape_of(model.encoder)))
    other = model.with_encoder(encoder)
    assert other.encoder is encoder and model.encoder is not encoder and not other.training
    before = run(model, numbers(1, 3, *model.img_size))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(run(model, numbers(1, 3, *model.img_size)), before)


@pytest.mark.parametrize("blocks", ["m0-0m", "-mm--"])
def test_merge_and_reconstruct_deployed_gives_the_whole_grid_of_the_training_form(segmenter, family, blocks,
                                                                                  random_plan):
    model = segmenter(family)
    encoder = compress(model.encoder, random_plan(shape_of(model.encoder), blocks, seed=3))
    disturb_matrices(encoder)
    x = numbers(2, 3, *model.img_size)
    found = run(model.with_encoder(encoder), x)
    assert relative(run(model.with_encoder(deploy(encoder)), x), found) < SAME
    assert relative(found, run(model, x)) > 100 * SAME                  # the plan does cut something


@pytest.mark.parametrize("kind", ["match", "share"])
def test_content_merging_and_shared_updates_keep_the_grid(segmenter, family, kind):
    model = segmenter(family)
    shape = shape_of(model.encoder)
    rules = [None, None, Match(merged=3), Match(merged=0), Match(merged=2)] if kind == "match" else \
        [tokens.shared(random_rule(shape.num_patches, random.Random(i))) for i in range(5)]
    plan = CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=rule) for rule in rules))
    encoder, x = compress(model.encoder, plan), numbers(2, 3, *model.img_size)
    found = run(model.with_encoder(encoder), x)
    assert found.shape == (2, 5, *model.img_size) and found.isfinite().all()
    assert relative(run(model.with_encoder(deploy(encoder)), x), found) < SAME
    assert relative(found, run(model, x)) > 100 * SAME


@pytest.mark.parametrize("decoder", list(DECODERS))
def test_a_segmenter_compressed_by_the_empty_plan_is_bit_equal_and_a_copy(segmenter, family, decoder):
    model = segmenter(family, decoder)
    plan, x = CompressionPlan.empty(shape_of(model)), numbers(2, 3, *model.img_size)
    wanted, small = run(model, x), compress(model, plan)
    assert isinstance(small,
                      Segmenter) and torch.equal(run(small, x), wanted) and torch.equal(run(deploy(small), x), wanted)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(run(model, x), wanted)


@pytest.mark.parametrize("blocks", ["m0-0m", "-mm--"])
def test_a_segmenter_is_compressed_and_deployed_as_its_encoder_is(segmenter, family, blocks, random_plan):
    model = segmenter(family).train()
    plan = random_plan(shape_of(model), blocks, seed=3)
    small = compress(model, plan)
    assert small.training and small.decoder.training
    disturb_matrices(small)
    x, deployed = numbers(2, 3, *model.img_size), deploy(small)
    assert not any(m.training for m in deployed.modules())
    found = run(small.eval(), x)
    assert relative(run(deployed, x), found) < SAME
    assert torch.equal(found, run(model.eval().with_encoder(small.encoder), x))
    assert relative(found, run(model, x)) > 100 * SAME                  # the plan does cut something
    with pytest.raises(InputError, match="already deployed|has a Fold at block 5"):
        deploy(deployed)


@pytest.mark.parametrize("rule, word", [(Select(kept=6), "selected"), (ReadOut(), "read out")])
def test_a_plan_that_keeps_no_grid_is_refused_for_a_segmenter_naming_the_block(segmenter, rule, word):
    model = segmenter("deit")
    shape = dataclasses.replace(shape_of(model), pool="token")          # such a plan is made for a classifier
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(heads=(0, 2)), *(BlockPlan(),) * 3, BlockPlan(tokens=rule)))
    with pytest.raises(InputError, match=f"block 4: tokens are {word}, but a class for each pixel needs the whole "
                                         f"grid; merge them"):
        compress(model, plan)


def test_a_segmenter_is_cut_further_from_the_plan_before(segmenter, random_plan):
    model = segmenter("deit")
    shape = shape_of(model)
    first = CompressionPlan(shape=shape, blocks=tuple(BlockPlan(neurons=tuple(range(100))) for _ in range(5)))
    second = CompressionPlan(shape=shape,
                             blocks=tuple(BlockPlan(heads=(1,), neurons=tuple(range(i, 100, 3))) for i in range(5)))
    x = numbers(2, 3, *model.img_size)
    assert torch.equal(run(compress(compress(model, first), second, before=first), x), run(compress(model, second), x))
    with pytest.raises(InputError, match=r"this one has num_neurons 100 \(plan: 132\)"):
        compress(compress(model, first), second)
    with pytest.raises(InputError, match="block 0 of the model is not what the plan says"):
        compress(compress(model, first), second, before=second)


def test_the_shape_of_a_segmenter_names_its_decoder_and_a_plan_keeps_it_in_json(segmenter, random_plan):
    for decoder, depth in (("linear", 0), ("mask_transformer", 2)):
        model = segmenter("distilled", decoder)
        shape = shape_of(model)
        assert (shape.decoder, shape.decoder_depth, shape.num_classes, shape.pool) == (decoder, depth, 5, "")
        encoder = shape_of(model.encoder)
        assert dataclasses.replace(shape, decoder="", decoder_depth=0, num_classes=0) == encoder
        plan = random_plan(shape, "m-mm-", seed=1)
        again = CompressionPlan.from_json(json.loads(plan.to_json()))
        assert again == plan and again.shape.decoder == decoder and again.shape.decoder_depth == depth
        assert shape_of(compress(model, CompressionPlan.empty(shape))) == shape


def test_a_plan_from_before_there_were_decoders_loads_fits_and_cuts_alike(segmenter, random_plan):
    model = segmenter("deit")
    plan = random_plan(shape_of(model), "m-mm-", seed=1)
    data = json.loads(plan.to_json())
    del data["shape"]["decoder"], data["shape"]["decoder_depth"]
    old = CompressionPlan.from_json(data)
    assert (old.shape.decoder, old.shape.decoder_depth) == ("", 0) and old.blocks == plan.blocks
    x = numbers(1, 3, *model.img_size)
    assert torch.equal(run(compress(model, old), x), run(compress(model, plan), x))


@pytest.mark.parametrize("field, value, says",
                         [("decoder", "conv", "shape.decoder is 'conv'; one of"), ("decoder", None, "shape.decoder"),
                                                ("decoder", [], "shape.decoder"),
                          ("decoder_depth", -1, "shape.decoder_depth is -1"),
                                                ("decoder_depth", 1.5, "shape.decoder_depth is 1.5"),
                                                ("decoder_depth", True, "shape.decoder_depth is True")])
def test_a_plan_with_a_decoder_that_cant_be_is_refused_naming_the_field(segmenter, field, value, says):
    data = json.loads(CompressionPlan.empty(shape_of(segmenter("deit"))).to_json())
    data["shape"][field] = value
    with pytest.raises(InputError, match=says):
        CompressionPlan.from_json(data, "p.json")


# ---------------------------------------------------------------- other sizes, layer decay

def test_another_size_resamples_the_positions_by_timms_function_and_keeps_the_rest(segmenter, family):
    model = segmenter(family)
    (height, width), (p, q) = model.img_size, model.patch_embed.patch_size
    other = model.at_size((height + p - 1, width - q))                  # rounded up to a multiple of the patch
    assert other.img_size == (height + p, width - q) and model.img_size == (height, width)
    prefix = 0 if model.encoder.no_embed_class else model.num_prefix_tokens
    wanted = resample_abs_pos_embed(model.encoder.pos_embed.detach(), [height // p + 1, width // q - 1],
                                    [height // p, width // q], num_prefix_tokens=prefix)
    assert torch.equal(other.encoder.pos_embed, wanted)
    assert all(torch.equal(value, other.state_dict()[name]) for name,
               value in model.state_dict().items() if name != "encoder.pos_embed")
    assert run(other, numbers(1, 3, *other.img_size)).shape == (1, 5, *other.img_size)
    same = model.at_size((height, width))
    assert torch.equal(run(same, numbers(1, 3, height, width)), run(model, numbers(1, 3, height, width)))
    assert shape_of(other).img_size == other.img_size


def test_a_model_whose_tokens_are_merged_goes_to_no_other_size_and_one_whose_units_are_cut_does(segmenter, random_plan):
    model = segmenter("deit")
    shape = shape_of(model)
    merged = compress(model, random_plan(shape, "-mm--", seed=3))
    matched = compress(model,
                       CompressionPlan(shape=shape, blocks=(BlockPlan(),) * 4 + (BlockPlan(tokens=Match(merged=2)),)))
    for small in (merged, deploy(merged), matched):
        with pytest.raises(InputError, match="tokens are cut for one size of images"):
            small.at_size((64, 64))
    cut = compress(model, CompressionPlan(shape=shape, blocks=tuple(BlockPlan(heads=(0, 2)) for _ in range(5))))
    assert run(cut.at_size((64, 64)), numbers(1, 3, 64, 64)).shape == (1, 5, 64, 64)


@pytest.mark.parametrize("form", ["dense", "merged"])
def test_layer_decay_lets_rates_ascend_from_the_patches_through_the_blocks_to_the_decoder(segmenter, family, form,
                                                                                          random_plan):
    model = segmenter(family)
    if form == "merged":
        model = compress(model, random_plan(shape_of(model), "mm-m-", seed=1))
    groups = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    rate = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in names.values()} == set(rate)                 # every parameter is in one group
    for name, parameter in names.items():
        part = name.split(".")
        # As timm's classifiers have it: the stem, five blocks, the last norm with the last of them, and what stands in
        # the head's place.
        layer = 6 if part[0] == "decoder" else 1 + int(part[2]) if part[1] == "blocks" else 5 if part[1] in ("norm",
                                                                                                             "fc_norm") else 0  # noqa: E501
        assert rate[id(parameter)] == 0.5 ** (6 - layer), name
        free = parameter.ndim <= 1 or name in model.no_weight_decay()
        assert decay[id(parameter)] == (0 if free else 0.1), name
    assert {"encoder.pos_embed", "decoder.cls_emb"} <= {n for n, p in names.items() if decay[id(p)] == 0}


@pytest.mark.parametrize("rule", [Select(kept=6), ReadOut()], ids=["select", "read_out"])
def test_a_plan_that_keeps_no_grid_is_refused(tiny_vit, rule):
    model = tiny_vit("deit")
    empty = CompressionPlan.empty(shape_of(model))
    plan = dataclasses.replace(empty, blocks=(*empty.blocks[:-1], BlockPlan(tokens=rule)))
    with pytest.raises(InputError, match="the encoder gives [0-9]+ tokens for 1 prefix tokens and a grid of 3 x 5; "
                                         "dense prediction"):
        run(Segmenter(compress(model, plan), 5), numbers(1, 3, 48, 80))


def test_an_encoder_deployed_for_a_class_token_is_refused(tiny_vit, random_plan):
    model = tiny_vit("deit")
    deployed = deploy(compress(model, random_plan(shape_of(model), "mmmmm")))
    with pytest.raises(InputError, match="the encoder gives 1 tokens.*as_encoder.* before `deploy`"):
        run(Segmenter(deployed, 5), numbers(1, 3, 48, 80))


def test_a_deployed_encoder_is_taken_as_it_is(segmenter, random_plan):
    model = segmenter("deit")
    deployed = deploy(compress(model.encoder, random_plan(shape_of(model.encoder), "mmmmm")))
    fresh = Segmenter(deployed, 5)
    fresh.decoder.load_state_dict(model.decoder.state_dict())
    x = numbers(1, 3, *model.img_size)
    assert torch.equal(run(fresh.eval(), x), run(model.with_encoder(deployed), x))


def test_cost_of_an_encoder_counts_the_last_reconstruct_of_the_whole_grid(segmenter, random_plan):
    shape = shape_of(segmenter("deit").encoder)
    merged = cost.macs(random_plan(shape, "--m-m", shrink=False))["fold"]
    for_token = dataclasses.replace(shape, pool="token")
    assert merged > cost.macs(random_plan(for_token, "--m-m", shrink=False))["fold"]


# ---------------------------------------------------------------- windows

@pytest.mark.parametrize("size, window, stride", [
    ((7, 11), (3, 5), (2, 3)), ((7, 11), (7, 11), (7, 11)), ((7, 11), (1, 1), (1, 1)), ((13, 17), (5, 7), (5, 7)),
    ((5, 9), (5, 4), (1, 4)),
])
def test_windows_lie_inside_and_cover_every_pixel(size, window, stride):
    counts = torch.zeros(size)
    places = windows(size, window, stride)
    for top, left in places:
        assert 0 <= top <= size[0] - window[0] and 0 <= left <= size[1] - window[1]
        counts[top:top + window[0], left:left + window[1]] += 1
    assert counts.min() >= 1 and len(set(places)) == len(places)


def test_windows_step_by_the_stride_and_end_at_the_edge():
    assert windows((4, 11), (4, 5), (4, 3)) == [(0, 0), (0, 3), (0, 6)]
    assert windows((4, 10), (4, 5), (4, 3)) == [(0, 0), (0, 3), (0, 5)]
    assert windows((9, 4), (4, 4), (4, 4)) == [(0, 0), (4, 0), (5, 0)]


@pytest.mark.parametrize("window, stride, says", [((8, 3), (2, 3), "window of 8 x 3 in an image of 7 x 11"),
                                                  ((3, 0), (2, 1), "window of 3 x 0"),
                                                  ((3, 5), (4, 5), "stride of 4 x 5.*cover every"),
                                                  ((3, 5), (3, 0), "stride of 3 x 0")])
def test_windows_that_leave_gaps_are_refused(window, stride, says):
    with pytest.raises(InputError, match=says):
        windows((7, 11), window, stride)


WINDOWS = [({"window": (3, 5)}), ({"window": (3, 5), "stride": (2, 3)}), ({"window": 4, "stride": 1}),
           ({"window": (16, 3)}), ({"window": 23, "batch_size": 1})]


def places_in(height: int, width: int, count: int = 2) -> torch.Tensor:
    """(count, 3, height, width): row, column and image number of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.stack([rows, columns, torch.full_like(rows, i)]) for i in range(count)]).float()


@pytest.mark.parametrize("settings", WINDOWS)
def test_a_model_that_gives_pixel_places_gives_them_back_and_a_constant_one_its_constant(settings):
    images = places_in(13, 17)
    assert torch.equal(slide(lambda x: x, images, **settings), images)
    constant = torch.tensor([1.25, -3.0, 7.5])[None, :, None, None]
    assert torch.equal(slide(lambda x: constant.expand(len(x), -1, *x.shape[2:]), images, **settings),
                       constant.expand_as(images))


def test_overlaps_are_the_mean_of_their_windows_counted_pixel_by_pixel():
    images = numbers(1, 1, 5, 7)

    def mean_of(x):                                                     # depends on the window
        return x.mean(dim=(2, 3), keepdim=True).expand(-1, 2, *x.shape[2:])
    found = slide(mean_of, images, window=(3, 4), stride=(2, 3), batch_size=2)
    for i in range(5):
        for j in range(7):
            means = [images[0, 0, t:t + 3, s:s + 4].mean() for t in (0, 2) for s in (0, 3) if t <= i < t + 3
                     and s <= j < s + 4]
            assert found[0, :, i, j].tolist() == pytest.approx([float(sum(means) / len(means))] * 2, abs=1e-6)


def test_one_window_of_the_images_size_is_the_model_itself_bit_for_bit(segmenter):
    model = segmenter("augreg")
    images = numbers(3, 3, 48, 112)
    assert torch.equal(slide(lambda x: run(model, x), images, window=model.img_size), run(model, images))
    # padded to the window as the model pads it to the patch
    small = images[:, :, :41, :110]
    assert torch.equal(slide(lambda x: run(model, x), small, window=model.img_size), run(model, small))


def test_larger_images_are_segmented_by_windows_of_the_encoders_size(segmenter):
    model = segmenter("deit", "linear")
    with torch.no_grad():
        found = segment(model, numbers(2, 3, 59, 131), flip=True, scales=(0.75, 1.0))
    assert found.shape == (2, 5, 59, 131)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 59, 131))


def test_views_are_turned_and_scaled_back_before_their_mean():
    images = numbers(2, 3, 8, 12)
    once = images.softmax(dim=1)
    # a model that gives the pixels: every view is the same
    for flip in (False, True):
        torch.testing.assert_close(segment(lambda x: x, images, window=(8, 12), flip=flip), once)
    # linear in place, which bilinear resizing keeps inside
    smooth = places_in(16, 24)[:, :2] / 10
    found = segment(lambda x: x, smooth, window=(8, 12), stride=(4, 4), scales=(0.5, 1.0, 2.0), flip=True)
    torch.testing.assert_close(found[:, :, 2:-2, 2:-2], smooth.softmax(dim=1)[:, :, 2:-2, 2:-2])


def test_views_average_probabilities_not_logits():
    turned = iter([torch.tensor([0.0, 4.0]), torch.tensor([0.0, -2.0])])

    def model(x):
        return next(turned)[None, :, None, None].expand(len(x), 2, *x.shape[2:])
    found = segment(model, numbers(1, 3, 4, 4), window=4, flip=True)[0, 1, 0, 0]
    assert float(found) == pytest.approx((1 / (1 + math.exp(-4)) + 1 / (1 + math.exp(2))) / 2, abs=1e-6)


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_scales_that_cant_be_are_refused(scales):
    with pytest.raises(InputError, match="scales are"):
        segment(lambda x: x, numbers(1, 3, 4, 4), window=4, scales=scales)
