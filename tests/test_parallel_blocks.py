"""timm's parallel blocks in parts: the same numbers, and tokens that go after attention and MLP."""
import copy

import pytest
import timm
import torch
from conftest import randomise
from safetensors.torch import save_file
from test_attention import differential_slowly
from test_families import check_cost
from test_match import matched_slowly
from timm.layers import RmsNorm
from torch import nn

from vitlab.models import compress, shape_of
from vitlab.models.create import create_model
from vitlab.models.parallel_blocks import ParallelBlock, in_parts, state_in_parts
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match, ReadOut, Select
from vitlab.runtime.files import InputError
from vitlab.search import SearchSpace

PLAIN, DIFFERENTIAL = "vit_pwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"
SMALL = {"img_size": (16, 20), "patch_size": 4, "embed_dim": 48, "num_heads": 2, "depth": 3, "num_classes": 7}
CLASS_TOKEN = {"class_token": True, "global_pool": "token"}
CLOSE = 1e-12                                   # relative, of float64 sums in another order


def made(name: str, **args) -> nn.Module:
    """timm's own, small, float64."""
    model = timm.create_model(name, pretrained=False, **{**SMALL, **args})
    randomise(model, 0)
    return model.double().eval()


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(given: torch.Tensor, wanted: torch.Tensor, within: float = CLOSE) -> bool:
    return bool((given - wanted).abs().max() < within * wanted.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", [PLAIN, DIFFERENTIAL])
@pytest.mark.parametrize("args", [{}, {"qkv_bias": False}, {"proj_bias": False, "qk_norm": True},
                                  {"init_values": None, "norm_layer": RmsNorm, "mlp_ratio": 3.7}], ids=str)
def test_a_model_in_parts_gives_what_timms_gives(name, args):
    model, x = made(name, **args), pictures()
    parts = in_parts(model)
    assert close(parts(x), model(x)) and type(parts) is type(model)
    assert all(type(block) is ParallelBlock for block in parts.blocks) and in_parts(parts) is parts
    with pytest.raises(InputError, match=r"no attention and MLP of its own; .*parallel_blocks\.in_parts\(model\)"):
        shape_of(model)


@torch.no_grad()
def test_one_layer_that_mixes_heads_and_neurons_is_two_in_parts():
    model = made(PLAIN)
    joined = copy.deepcopy(model)
    for block in joined.blocks:
        heads, neurons = block.attn_out_proj, block.mlp_out_proj
        block.out_proj = nn.Linear(heads.in_features + neurons.in_features, 48).double()
        block.out_proj.weight = nn.Parameter(torch.cat([heads.weight, neurons.weight], dim=1))
        block.out_proj.bias = nn.Parameter(heads.bias + neurons.bias)
        block.attn_out_proj = block.mlp_out_proj = None
    assert close(in_parts(joined)(pictures()), model(pictures()))


@torch.no_grad()
@pytest.mark.parametrize("name", [PLAIN, DIFFERENTIAL])
def test_a_weights_file_by_timms_names_opens_in_parts(name, tmp_path):
    model, x = made(name), pictures()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    args = {key: value for key, value in SMALL.items() if key != "num_classes"}
    opened = create_model(name, weights=tmp_path / "weights.safetensors", **args)
    assert close(opened.double()(x), model(x), 1e-6)                            # it is opened in float32
    state = opened.state_dict()
    assert {key: id(value) for key, value in state_in_parts(state).items()} == {k: id(v) for k, v in state.items()}


def of_timms_block(block: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what timm's own block gives for the rows (N, D) of one image, the keys of all its heads (N, W))."""
    normed = block.in_norm(rows)
    neurons, width = block.in_split[0], rows.shape[1]
    keys = normed @ block.in_proj.weight[neurons + width:neurons + 2 * width].T
    if block.in_proj.bias is not None:
        keys = keys + block.in_proj.bias[neurons + width:neurons + 2 * width]
    return block(rows[None])[0], keys


@torch.no_grad()
@pytest.mark.parametrize("name", [PLAIN, DIFFERENTIAL])
def test_tokens_merged_by_content_are_means_of_what_the_block_gives(name):
    model, x = made(name), pictures()
    parts, merged, prefix = in_parts(model), 6, 1
    shape = shape_of(parts)
    assert shape.parallel
    rule = Match(merged=merged, protect=0.0)
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(tokens=rule),) + (BlockPlan(tokens=Match(
        merged=0, protect=0.0)),) * 2)
    cut = compress(parts, plan)
    entering = model._pos_embed(model.patch_embed(x))
    given = cut.blocks[0](entering)
    for image, rows in enumerate(entering):
        out, keys = of_timms_block(model.blocks[0], rows)
        pairs = matched_slowly(keys[prefix:], [0.0] * (len(rows) - prefix), None)
        stays = [[s] for s in sorted(s for s, _ in pairs[merged:])]
        stays += [[t, *(s for s, into in pairs[:merged] if into == t)] for t in range(1, len(rows) - prefix, 2)]
        wanted = torch.stack([*out[:prefix], *(out[prefix:][inside].mean(dim=0) for inside in stays)])
        assert close(given.x[image], wanted)
    check_cost(cut, plan, x)
    space = SearchSpace(shape=shape, tokens="match_per_block")
    policy = space.policy(plan)
    assert (space.counts(policy[None]).in_mlp[0] == [21, 15, 15]).all()


@torch.no_grad()
@pytest.mark.parametrize("ranked_by", ["kept", "all"])
def test_tokens_are_selected_after_the_mlp_and_prefix_tokens_read_out_exactly(ranked_by):
    model, x = made(DIFFERENTIAL, **CLASS_TOKEN), pictures()
    parts = in_parts(model)
    shape = shape_of(parts)
    read = CompressionPlan(shape=shape, blocks=(BlockPlan(), BlockPlan(), BlockPlan(tokens=ReadOut())))
    assert close(compress(parts, read)(x), model(x))
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(tokens=Select(kept=7, ranked_by=ranked_by)), BlockPlan(),
                                                BlockPlan(tokens=ReadOut())))
    cut = compress(parts, plan)
    entering = model._pos_embed(model.patch_embed(x))
    given = cut.blocks[0](entering)
    for image, rows in enumerate(entering):
        block = parts.blocks[0]
        row = differential_slowly(block.attn, block.norm1(rows), [1.0] * len(rows))[1][2:]
        order = row.argsort(descending=True)
        out = of_timms_block(model.blocks[0], rows)[0]
        wanted = torch.stack([*out[:2], *out[2:][order[:7].sort().values], out[2:][order[7:]].mean(dim=0)])
        assert {tuple(r.tolist()) for r in given[image].float().round(decimals=4)} == {
            tuple(r.tolist()) for r in wanted.float().round(decimals=4)}
    check_cost(cut, plan, x)
