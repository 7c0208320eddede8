"""Attention within windows of the grid (timm's SAM): what is measured of it is that of an image's patches."""
import copy
import json

import pytest
import timm
import torch
from conftest import randomise
from test_families import check_cost, near, some_units
from torch import nn

from vitlab.measure.capture import attention_maps, token_scores
from vitlab.measure.latency import grid_axes, measure_table
from vitlab.measure.moments import each_moments, fisher
from vitlab.measure.sweeps import block_macs
from vitlab.measure.units import unit_scores
from vitlab.models import compress, deploy, shape_of
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.models.windowed import attended, by_image, by_window
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.cost import counts_of
from vitlab.runtime.files import InputError
from vitlab.training.compensate import compensate

ROUNDING = 1e-5                     # relative, of sums in float32 taken in another order
ROWS, COLUMNS = 5, 7                # of patches


def sam(side: int = 3, name: str = "samvit_base_patch16", **args) -> nn.Module:
    """Of 3 blocks, of which the last attends to the whole grid; windows of 3 x 3 on 5 x 7 patches are padded."""
    sizes = {"img_size": (4 * ROWS, 4 * COLUMNS), "patch_size": 4, "embed_dim": 26, "num_heads": 2, "depth": 3,
             "num_classes": 11, "window_size": side}
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(name, **{**sizes, **args}).eval()
    randomise(model, 0)
    return model.requires_grad_(False)


def images(model: nn.Module, count: int) -> torch.Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def batches(model: nn.Module, count: int = 12):
    return [(images(model, count), torch.arange(count) % 11)]


def test_windows_are_taken_apart_into_an_images_patches_and_back():
    block, side = sam().blocks[0], 3
    numbers = torch.arange(2 * ROWS * COLUMNS * 2.0).view(2, ROWS * COLUMNS, 2, 1)          # (B, n, ...)
    windows = by_window(block, numbers, (ROWS, COLUMNS))
    down, across = -(-ROWS // side), -(-COLUMNS // side)
    assert windows.shape == (2 * down * across, side * side, 2, 1)
    for image in range(2):
        for i in range(side * down):
            for j in range(side * across):
                found = windows[(image * down + i // side) * across + j // side, i % side * side + j % side]
                inside = i < ROWS and j < COLUMNS
                assert torch.equal(found, numbers[image, i * COLUMNS + j] if inside else torch.zeros(2, 1))
    assert torch.equal(by_image(block, windows, (ROWS, COLUMNS)), numbers)
    assert by_image(sam().blocks[2], windows, (ROWS, COLUMNS)) is windows           # the whole grid is no window


@pytest.mark.parametrize("name, args", [("samvit_base_patch16", {}), ("samvit_base_patch16_224", {}),
                                        ("samvit_base_patch16", {"window_size": 4, "qk_norm": True}),
                                        ("samvit_base_patch16_224", {"use_rel_pos": False, "use_rope": True,
                                                                     "embed_dim": 24})], ids=str)
def test_cost_is_torchs_count_of_windows_their_padding_and_global_blocks(name, args):
    model = sam(name=name, **args)
    shape, x = shape_of(model), images(model, 1)
    assert shape.windows == (args.get("window_size", 3),) * 2 + (0,)
    check_cost(copy.deepcopy(model), CompressionPlan.empty(shape), x)
    plan = CompressionPlan(shape=shape, blocks=some_units(shape))
    check_cost(compress(model, plan), plan, x)
    left = CompressionPlan(shape=shape, blocks=(BlockPlan(heads=()), BlockPlan(neurons=()), BlockPlan(heads=())))
    check_cost(compress(model, left), left, x)
    assert CompressionPlan.from_json(json.loads(plan.to_json())) == plan


def test_one_window_that_is_the_whole_grid_scores_as_no_windows_do():
    """In blocks of 7 x 7 windows on 7 x 7 patches, nothing is cut out and nothing padded."""
    one, none = sam(7, img_size=28), sam(0, img_size=28)
    none.load_state_dict(one.state_dict())
    for criterion in ("hsic", "taylor", "activation", "reconstruction", "fisher"):
        a, b = (unit_scores(model, batches(model), criterion=criterion, progress=False) for model in (one, none))
        assert near(a.heads, b.heads, ROUNDING * 10) and near(a.neurons, b.neurons, ROUNDING * 10), criterion


class Slowly(nn.Module):
    """A block of windows by loops over windows and pairs of tokens, from the formula: padding is tokens whose normed
    values are 0. It gives each head's output of each patch, before the projection."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block, attn, side = self.block, self.block.attn, self.block.window_size
        normed = block.norm1(x)
        heads = torch.zeros(len(x), ROWS, COLUMNS, attn.num_heads, attn.head_dim)
        for top in range(0, ROWS, side):
            for left in range(0, COLUMNS, side):
                places = [(top + i, left + j) for i in range(side) for j in range(side)]
                rows = torch.stack([normed[:, i, j] if i < ROWS and j < COLUMNS else torch.zeros(len(x), x.shape[3])
                                    for i, j in places], dim=1)
                query, key, value = attn.qkv(rows).unflatten(2, (3, attn.num_heads, -1)).unbind(2)
                for number, (i, j) in enumerate(places):
                    if i >= ROWS or j >= COLUMNS:
                        continue
                    asked = query[:, number]                                                # (B, H, d)
                    logits = torch.stack([
                        (asked * key[:, other]).sum(dim=2) * attn.scale
                        + (asked * attn.rel_pos_h[i - k + side - 1]).sum(dim=2)
                        + (asked * attn.rel_pos_w[j - m + side - 1]).sum(dim=2)
                        for other, (k, m) in enumerate(places)], dim=2)                     # (B, H, s s)
                    heads[:, i, j] = (logits.softmax(dim=2)[..., None] * value.transpose(1, 2)).sum(dim=2)
        return heads


def test_moments_are_of_an_images_patches_none_of_the_padding():
    model = sam()
    x = images(model, 5)
    heads = Slowly(model.blocks[0])(model.patch_embed(x) + model.pos_embed).flatten(3).flatten(0, 2)
    found = dict(each_moments(model, [(x, torch.zeros(5))]))
    for index in range(3):
        assert found[index, "heads"].rows == found[index, "neurons"].rows == 5 * ROWS * COLUMNS
    assert near(found[0, "heads"].products, heads.double().T @ heads.double(), ROUNDING)
    assert near(found[0, "heads"].sum, heads.double().sum(dim=0), ROUNDING * 10)


def test_scores_of_heads_are_of_each_image_and_what_pads_windows_has_no_part():
    model, x = sam(), images(sam(), 5)
    heads = Slowly(model.blocks[0])(model.patch_embed(x) + model.pos_embed)                 # (B, h, w, H, d)
    found = unit_scores(model, [(x, torch.arange(5))], criterion="activation", progress=False)
    assert near(found.heads[0], heads.abs().mean(dim=(0, 1, 2, 4)), ROUNDING)
    # to first order what the loss changes by where a head gives less, each image by itself
    scores = unit_scores(model, [(x, torch.arange(5))], criterion="taylor", progress=False).heads[0].double()
    model, x, step = model.double(), x.double(), 1e-5
    expected = torch.zeros(2, dtype=torch.float64)
    for head in range(2):
        def loss(by: float, head: int = head) -> torch.Tensor:
            factors = torch.ones(2, 13, dtype=torch.float64)
            factors[head] += by
            handle = model.blocks[0].attn.proj.register_forward_pre_hook(
                lambda _, given: (given[0] * factors.flatten(),))
            given = nn.functional.cross_entropy(model(x), torch.arange(5), reduction="none")
            handle.remove()
            return given
        expected[head] = ((loss(step) - loss(-step)) / (2 * step)).abs().mean()
    assert near(scores, expected, 1e-4)


def test_a_refit_by_walking_or_by_moments_is_nearer_than_the_cut_and_of_nothing_cut_it_is_the_model():
    model = sam()
    shape, given = shape_of(model), batches(model, 24)
    plan = CompressionPlan(shape=shape, blocks=some_units(shape))
    x, dense = given[0][0], model(given[0][0])
    costs = fisher(model, given, progress=False)
    far = (compress(model, plan)(x) - dense).square().mean()
    moments = dict(each_moments(model, given))
    for how in ({}, {"costs": costs, "every": True}, {"moments": moments}):
        assert (compensate(model, plan, given, ridge=1e-3, progress=False, **how)(x) - dense).square().mean() < far
    # heads and neurons that give nothing are cut without a loss
    for block in model.blocks:
        block.attn.proj.weight[:, 13:] = 0
        block.mlp.fc2.weight[:, 50:] = 0
    cut = BlockPlan(heads=(0,), neurons=tuple(range(50)))
    plan = CompressionPlan(shape=shape, blocks=(cut,) * 3)
    assert near(compensate(model, plan, given, progress=False)(x), model(x), 1e-4)


def test_latency_is_of_windowed_and_of_global_attention_each_by_its_own():
    model = sam()
    shape = shape_of(model)
    axes = grid_axes(shape)
    assert axes["attention"][0].tolist() == [9, ROWS * COLUMNS]
    table = measure_table(model, batch_size=2, repeats=1, min_seconds=0.0, progress=False)
    parts = table.by_part(counts_of(CompressionPlan.empty(shape)))
    assert parts["attention"] == pytest.approx(table.scale * (2 * table.ms["attention"][0, 1]
                                                              + table.ms["attention"][1, 1]))
    x = model.patch_embed(images(model, 2)) + model.pos_embed
    half = attended(model.blocks[0], x)
    torch.testing.assert_close(half + model.blocks[0].mlp(model.blocks[0].norm2(half)), model.blocks[0](x))


def test_what_needs_all_tokens_to_see_each_other_is_refused():
    model = sam()
    shape = shape_of(model)
    for criterion in ("gradient", "hsic", "class_attention"):
        with pytest.raises(InputError, match="within windows"):
            token_scores(model, batches(model), criterion=criterion, progress=False)
    with pytest.raises(InputError, match="within windows"):
        attention_maps(model, images(model, 1))
    with pytest.raises(InputError, match="widths of this model can't be cut: queries make biases by distance"):
        CompressionPlan(shape=shape, blocks=(BlockPlan(qk_width=5),) * 3)


@pytest.mark.parametrize("name", ["samvit_base_patch16", "samvit_base_patch16_224"])
def test_a_segmenter_takes_what_the_neck_gives_and_counts_it(name):
    dense = Segmenter(as_encoder(sam(name=name)), 5, "linear").eval().requires_grad_(False)
    x, shape = images(dense, 1), shape_of(dense)
    plan = CompressionPlan(shape=shape, blocks=some_units(shape))
    model = compress(dense, plan)
    assert torch.equal(compress(dense, CompressionPlan.empty(shape))(x), dense(x))
    assert dense(x).shape == (1, 5, 4 * ROWS, 4 * COLUMNS) and near(deploy(model)(x), model(x), ROUNDING)
    features = dense.encoder.neck(dense.encoder.blocks(dense.encoder.patch_embed(x) + (
        0 if dense.encoder.pos_embed is None else dense.encoder.pos_embed)).permute(0, 3, 1, 2))
    assert near(dense.patch_logits(x), nn.functional.conv2d(features, dense.decoder.head.weight[:, :, None, None],
                                                            dense.decoder.head.bias), ROUNDING)
    check_cost(model, plan, x)
    with pytest.raises(InputError, match=r"images of 24 x 28.*20 x 28 is needed"):
        dense.at_size((24, 28))


def test_the_products_of_each_block_and_what_stands_around_them_are_all_there_is():
    shape = shape_of(sam())
    plan = CompressionPlan(shape=shape, blocks=some_units(shape))
    each, whole = block_macs(plan), cost.macs(plan)
    assert sum(each) + whole["patch_embed"] + whole["classifier"] == whole["total"] and each[0] != each[2]
