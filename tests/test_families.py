"""Every pretrained vision transformer that timm names is handled or refused by name; of every structure among them a
small model keeps the invariants that a plan promises.

    python tests/test_families.py       # writes docs/families.md
"""
import contextlib
import functools
from pathlib import Path

import numpy as np
import pytest
import registry
import torch
from conftest import randomise
from safetensors.torch import save_file
from timm.layers import DiffAttention, RelPosBias, RelPosMlp
from timm.models import get_model_args
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlab.measure.capture import token_scores
from vitlab.measure.units import unit_scores
from vitlab.models import check_supported, checkpoint, compress, deploy, shape_of
from vitlab.models.create import create_model
from vitlab.models.families import mixing_layer
from vitlab.models.support import attention_block, refuse
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut, SharedUpdate
from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.files import InputError
from vitlab.search import SearchSpace
from vitlab.training.compensate import compensate

HANDLED = 440                       # of the weights, at least
PARTS = 8                           # of the structures, which are looked for when a test runs, not when it is collected


@functools.cache
def handled() -> dict[str, list[str]]:
    return {name: like for name, like in registry.structures().items() if refuse(registry.sketch(name)) is None}


def test_most_pretrained_weights_are_of_models_that_are_handled_and_the_rest_is_refused_by_name():
    weights, counted = registry.pretrained(), 0
    for name, like in registry.structures().items():
        model = registry.sketch(name)
        if refuse(model) is None:
            counted += sum(weights[each] for each in like)
        else:
            with pytest.raises(InputError, match=rf"can't be handled: {type(model).__name__} "):
                check_supported(model)
    assert counted >= HANDLED


HEADING = """# Families

timm names {every} pretrained weights of vision transformers that are one stage of blocks on a grid, and {handled} of
them are handled: plans, all that is measured of them, refits, searches, deployed models, checkpoints and Segmenters.
Whatever is not is refused by name, as are models of several stages (Swin, Hiera, ...). This page is written from the
test that walks timm's registry (`python tests/test_families.py`), which makes a small model of every structure that it
finds there and compares: a plan that cuts nothing gives the very same logits, cut heads and neurons are masked ones, a
deployed model is the trained one, and MACs are torch's own count. Tokens of models that turn queries and keys by place
(RoPE) are merged, not selected; a merged token is turned by the mean of its patches' rotations. A NaFlexVit, which
takes images of any size, is counted as the VisionTransformer that it is at one: it is opened as that, and
`vitlab.at_fixed_size(model, img_size)` makes it of one that is built already. So are timm's parallel blocks as blocks
with an attention and an MLP of their own (`vitlab.models.parallel_blocks.in_parts`): tokens that are merged by content,
or selected, go after both.

"""


def cut(shape) -> str:
    """What of a model can be cut."""
    parts = [part for part in ("tokens", "heads", "neurons") if shape.cuts(part)]
    return ", ".join(parts) + (" (tokens by merging)" if shape.rotary and "tokens" in parts else "")


def page() -> str:
    """docs/families.md, from timm's registry."""
    weights, rows, refused = registry.pretrained(), {}, {}
    for name, like in registry.structures().items():
        model = registry.sketch(name)
        why = refuse(model)
        if why is None:
            shape, block = shape_of(model), attention_block(model.blocks[0])
            key = (type(model).__name__, type(block.mlp).__name__ + (", gated" if shape.gated else ""),
                   "by place" if shape.rotary else "", shape.pool or "none", cut(shape), "; ".join(shape.fixed))
            rows.setdefault(key, []).extend(like)
        else:
            refused.setdefault(why.replace(" at block 0", ""), []).extend(like)
    counted = {key: sum(weights[name] for name in names) for key, names in rows.items()}
    lines = ["| model | MLP | turned | pool | cut | not cut, why | weights | such as |", "|---" * 8 + "|"]
    lines += [f"| {' | '.join(key)} | {counted[key]} | {', '.join(f'`{n}`' for n in names[:2])} |"
              for key, names in sorted(rows.items(), key=lambda row: -counted[row[0]])]
    lines += ["", "## Refused", "", "| why | weights | such as |", "|---|---|---|"] if refused else []
    lines += [f"| {why} | {sum(weights[n] for n in names)} | {', '.join(f'`{n}`' for n in names[:2])} |"
              for why, names in refused.items()]
    return HEADING.format(every=sum(weights.values()), handled=sum(counted.values())) + "\n".join(lines) + "\n"


PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def test_the_page_of_families_is_what_the_registry_gives():
    assert PAGE.read_text(encoding="utf-8") == page()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = registry.tiny(name, "cpu")
    randomise(model, 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model.requires_grad_(False)


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def near(a: torch.Tensor, b: torch.Tensor, by: float = 1e-4) -> bool:
    """Of logits computed in another order in float32."""
    return bool(((a - b).abs().max() / b.abs().max()).item() < by)


def some_units(shape) -> tuple[BlockPlan, ...]:
    """What can go of heads and neurons in each block: other ones in each."""
    blocks = []
    for index in range(shape.depth):
        heads = tuple(h for h in range(shape.num_heads) if h != index % shape.num_heads)
        neurons = tuple(n for n in range(shape.num_neurons) if n % 3 != index % 3)
        blocks.append(BlockPlan(heads=heads if shape.cuts("heads") else None,
                                neurons=neurons if shape.cuts("neurons") else None))
    return tuple(blocks)


def by_place(shape) -> list[tuple]:
    """Per block, a rule that merges by place."""
    n, columns = shape.num_patches, shape.grid_size[1]
    pairs = tuple(j // 2 for j in range(n))
    rows = tuple(j // columns for j in range(n))
    weights = tuple(1 / rows.count(r) for r in rows)
    merge = MergeReconstruct(regions=pairs, weights=tuple(1 / pairs.count(p) for p in pairs))
    return [merge, SharedUpdate(regions=rows, weights=weights), merge]


def by_content(shape) -> list:
    protect = 0.1 if shape.class_token else 0.0
    rules: list = [Match(merged=shape.num_patches // 4, protect=protect) for _ in range(shape.depth)]
    if shape.pool == POOL_TOKEN and shape.num_prefix_tokens:
        rules[-1] = ReadOut()
    return rules


class Without(nn.Module):
    """Sets what goes into a layer to 0 for units that a plan cuts."""

    def __init__(self, kept, width: int, total: int) -> None:
        super().__init__()
        gone = torch.ones(total // width, dtype=torch.bool)
        gone[list(kept)] = False
        self.gone = gone.repeat_interleave(width)

    def __call__(self, module, inputs):
        return (inputs[0].masked_fill(self.gone, 0),)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_plan_holds_what_it_promises_for_every_structure(part):
    for name in list(handled())[part::PARTS]:
        check_plans(name)


def check_plans(name: str) -> None:
    model = made(name)
    x, shape = images(model), shape_of(model)
    dense = model(x)
    empty = CompressionPlan.empty(shape)
    assert torch.equal(compress(model, empty)(x), dense)
    # Heads and neurons: cut is masked.
    plan = CompressionPlan(shape=shape, blocks=some_units(shape))
    cut, masked = compress(model, plan), compress(model, empty)
    for index, block in enumerate(plan.blocks):
        for kind in ("heads", "neurons"):
            kept = getattr(block, kind)
            if kept is not None:
                linear, width = mixing_layer(attention_block(masked.blocks[index]), kind)
                linear.register_forward_pre_hook(Without(kept, width, linear.in_features))
    assert near(cut(x), masked(x), 1e-5)
    assert plan == empty or not near(cut(x), dense, 1e-3)
    check_cost(cut, plan, x)
    # Tokens: a deployed model is the trained one.
    if not shape.cuts("tokens"):
        with pytest.raises(InputError, match="tokens of this model can't be cut"):
            CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=rule) for rule in by_place(shape)[:shape.depth]))
        return
    for rules in (by_place(shape)[:shape.depth], by_content(shape)):
        plan = CompressionPlan(shape=shape, blocks=tuple(
            BlockPlan(heads=block.heads, neurons=block.neurons, tokens=rule)
            for block, rule in zip(some_units(shape), rules)))
        trained = compress(model, plan)
        deployed = deploy(trained)
        assert near(deployed(x), trained(x)) and not near(trained(x), dense, 1e-3)
        check_cost(deployed, plan, x)


def tokens_and_units(shape) -> CompressionPlan:
    rules = by_content(shape) if shape.cuts("tokens") else [None] * shape.depth
    return CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(heads=block.heads, neurons=block.neurons, tokens=rule)
        for block, rule in zip(some_units(shape), rules)))


# one of each kind of attention, MLP, pool and stem
KINDS = ("vit_base_patch16_siglip_224", "eva02_base_patch14_224", "vit_base_patch16_dinov3", "aimv2_1b_patch14_224",
         "vit_base_patch16_rope_mixed_224", "beit_base_patch16_224", "vit_pe_core_base_patch16_224",
         "vit_relpos_base_patch16_224", "vit_base_patch16_rpn_224", "vit_small_r26_s32_224", "cait_xxs24_224",
         "vit_large_patch16_sapiens2", "vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256",
         "samvit_base_patch16")


@contextlib.contextmanager
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_and_a_weights_file_give_the_model_back(name, tmp_path):
    model = made(name)
    x, plan = images(model), tokens_and_units(shape_of(model))
    cut = compress(model, plan)
    checkpoint.save(tmp_path / "cut", cut, plan)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    args = {k: v for k, v in get_model_args(model).items() if k not in ("num_classes", "norm_layer", "act_layer")}
    with nan_in_new_memory():                   # every number is loaded, or computed as always
        back = checkpoint.load(tmp_path / "cut")
        opened = create_model(name, weights=tmp_path / "weights.safetensors", **args)
    assert back.plan.blocks == plan.blocks and near(back.model(x), cut(x), 1e-6)        # other alignment of memory
    assert near(opened(x), model(x), 1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_scores_moments_and_refits_work_and_a_refit_is_nearer_than_the_cut(name):
    model = made(name)
    shape = shape_of(model)
    batches = [(images(model, 24), torch.arange(24) % registry.CLASSES)]
    if shape.cuts("tokens"):
        assert token_scores(model, batches, progress=False).shape == (shape.depth, shape.num_patches)
    scores = unit_scores(model, batches, criterion="taylor", progress=False)
    assert scores.heads.shape == (shape.depth, shape.num_heads) and (scores.neurons >= 0).all()
    plan = CompressionPlan(shape=shape, blocks=some_units(shape))
    if plan == CompressionPlan.empty(shape):
        return
    x, dense = batches[0][0], model(batches[0][0])
    far, fitted = ((m(x) - dense).square().mean() for m in (
        compress(model, plan), compensate(model, plan, batches, ridge=1e-3, progress=False)))
    assert fitted < far


@pytest.mark.parametrize("name", KINDS)
def test_a_search_space_cuts_what_can_be_cut_and_counts_as_the_plan_does(name):
    shape = shape_of(registry.sketch(name))
    space = SearchSpace(shape=shape, tokens="match_per_block",
                        read_out=shape.pool == POOL_TOKEN and shape.num_prefix_tokens > 0)
    assert set(space.groups) == {part for part in ("neurons", "heads", "tokens") if shape.cuts(part)}
    policies = np.random.default_rng(0).uniform(0, space.max_ratio, (3, space.size))
    scores = {"heads": torch.rand(shape.depth, shape.num_heads), "neurons": torch.rand(shape.depth, shape.num_neurons)}
    for policy, gmacs in zip(policies, space.gmacs(policies)):
        plan = space.plan(policy, **scores)
        assert cost.gmacs(plan) == pytest.approx(gmacs, rel=1e-12)
        assert space.keys(space.policy(plan)[None]) == space.keys(policy[None])
    if shape.rotary:
        with pytest.raises(InputError, match="tokens 'select': selected tokens would lose the places"):
            SearchSpace(shape=shape, tokens="select")


def check_cost(model: nn.Module, plan: CompressionPlan, x: torch.Tensor) -> None:
    """MACs are torch's own count, but for what scales rows (cost counts it, torch does not), and biases by distance,
    which are made once for all images (torch counts it, cost does not)."""
    for module in model.modules():
        # torch counts no fused attention on a CPU; of timm's two maps it counts both there alone
        if hasattr(module, "fused_attn") and type(module) is not DiffAttention:
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x[:1])
    with FlopCounterMode(display=False) as once:
        for module in model.modules():
            if isinstance(module, (RelPosMlp, RelPosBias)):
                module.get_bias()
    scaled = sum(flow.pooled for flow in plan.flows()) * plan.shape.embed_dim
    assert (counter.get_total_flops() - once.get_total_flops()) // 2 == cost.macs(plan)["total"] - scaled


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
