"""Heads and neurons that leave the weights (methods B8), and cutting further what was already cut."""
import copy
import json
import random

import pytest
import timm
import torch
from comparing import logits, relative
from safetensors.torch import load_file
from timm.layers import Attention, SwiGLU
from timm.models.vision_transformer import Block

from vitlab.models import attention_block, check_supported, checkpoint, compress, deploy, shape_of
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Select
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError

# Relative. The masked model adds the cut units' zeros in other places of the same float32 sums than the shrunk one,
# which
# has no such terms; 5 blocks deep this is the project's bound for two orders of one sum.
SAME = 1e-4


def some(count: int, kept: int, chance: random.Random) -> tuple[int, ...]:
    return tuple(sorted(chance.sample(range(count), kept)))


def staircase(shape: ViTShape, seed: int = 0) -> CompressionPlan:
    """Another count in each block: all (None), one head and one neuron, one head, one neuron, some of both."""
    chance = random.Random(seed)
    h, m = shape.num_heads, shape.num_neurons
    blocks = (BlockPlan(), BlockPlan(heads=some(h, 1, chance), neurons=some(m, 1, chance)),
              BlockPlan(heads=some(h, 1, chance), neurons=some(m, m - 1, chance)),
              BlockPlan(neurons=some(m, 1, chance)),
              BlockPlan(heads=some(h, h - 1, chance), neurons=some(m, 17, chance)))
    return CompressionPlan(shape=shape, blocks=blocks)


def hooked(dense, plan: CompressionPlan):
    """The dense model whose cut heads' outputs (before proj) and cut neurons (before fc2) are set to zero as it
    runs."""
    model, shape = copy.deepcopy(dense), plan.shape

    def zero(columns: list[int]):
        def hook(module, inputs):
            x = inputs[0].clone()
            for column in columns:
                x[..., column] = 0
            return (x,)
        return hook
    for block, cut in zip(model.blocks, plan.blocks):
        heads = [h for h in range(shape.num_heads) if cut.heads is not None and h not in cut.heads]
        neurons = [m for m in range(shape.num_neurons) if cut.neurons is not None and m not in cut.neurons]
        block.attn.proj.register_forward_pre_hook(zero([h * shape.head_dim + i for h in heads
                                                        for i in range(shape.head_dim)]))
        block.mlp.fc2.register_forward_pre_hook(zero(neurons))
    return model


# ---- The same function, with smaller weights

@pytest.mark.parametrize("seed", range(3))
def test_shrunk_model_equals_the_masked_one_down_to_one_head_and_one_neuron(tiny_vit, family, images, seed):
    dense = tiny_vit(family, seed=seed)
    plan, x = staircase(shape_of(dense), seed), images(dense, 3)
    expected = logits(hooked(dense, plan), x)
    assert relative(logits(compress(dense, plan), x), expected) < SAME
    assert relative(logits(dense, x), expected) > 100 * SAME                    # the units did matter


@pytest.mark.parametrize("seed", range(2))
def test_shrunk_model_equals_the_masked_one_with_one_head_and_one_neuron_in_every_block(tiny_vit, family, images, seed):
    dense, chance = tiny_vit(family), random.Random(seed)
    shape = shape_of(dense)
    plan = CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(heads=some(shape.num_heads, 1, chance), neurons=some(shape.num_neurons, 1, chance))
        for _ in range(5)))
    model, x = compress(dense, plan), images(dense, 3)
    assert relative(logits(model, x), logits(hooked(dense, plan), x)) < SAME
    assert all((b.attn.num_heads, b.attn.attn_dim, b.mlp.fc2.in_features) == (1, shape.head_dim, 1)
               for b in model.blocks)


@pytest.mark.parametrize("biases", [{"qkv_bias": False}, {"proj_bias": False}, {"qkv_bias": False, "proj_bias": False}],
                         ids=str)
def test_shrunk_model_without_biases_equals_the_masked_one(tiny_vit, images, biases):
    dense = tiny_vit("augreg", **biases)
    plan, x = staircase(shape_of(dense)), images(dense)
    assert relative(logits(compress(dense, plan), x), logits(hooked(dense, plan), x)) < SAME


def test_shrunk_model_equals_the_masked_one_without_fused_attention(tiny_vit, images):
    dense = tiny_vit("qk_norm")
    for block in dense.blocks:
        block.attn.fused_attn = False
    plan, x = staircase(shape_of(dense)), images(dense)
    assert relative(logits(compress(dense, plan), x), logits(hooked(dense, plan), x)) < SAME


# ---- The weights are gone from the file

def header_bytes(path) -> int:
    """Size of a safetensors file's header and of its length field."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def lost(shape: ViTShape, cut: BlockPlan) -> int:
    """Parameters that leave one block. A head: d rows of each of q, k, v, with biases, and d columns of proj. A neuron:
    a row of fc1 with its bias and a column of fc2."""
    heads = shape.num_heads - (shape.num_heads if cut.heads is None else len(cut.heads))
    neurons = shape.num_neurons - (shape.num_neurons if cut.neurons is None else len(cut.neurons))
    return heads * (4 * shape.head_dim * shape.embed_dim + 3 * shape.head_dim) + neurons * (2 * shape.embed_dim + 1)


def test_saved_weights_fall_by_exactly_what_the_cut_units_held(tiny_vit, family, tmp_path):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    plan = staircase(shape)
    files = {}
    for name, each in (("dense", CompressionPlan.empty(shape)), ("shrunk", plan)):
        folder = checkpoint.save(tmp_path / name, compress(dense, each), each)
        files[name] = folder / checkpoint.WEIGHTS
    numbers = {name: sum(t.numel() for t in load_file(path).values()) for name, path in files.items()}
    expected = sum(lost(shape, cut) for cut in plan.blocks)
    assert numbers["dense"] == sum(p.numel() for p in dense.parameters())
    assert numbers["dense"] - numbers["shrunk"] == expected > 0
    assert cost.params(checkpoint.load(tmp_path / "shrunk").model)["total"] == numbers["shrunk"]
    for name, path in files.items():                            # float32, and nothing else is in the file
        assert path.stat().st_size == header_bytes(path) + 4 * numbers[name]
    assert files["shrunk"].stat().st_size < files["dense"].stat().st_size


# ---- Refusals

@pytest.mark.parametrize("kind, says", [
    ("gate", "gated attention at block 3"),
    ("output norm", "heads of this model can't be cut: a norm over all of them")])
def test_cutting_heads_of_an_attention_that_mixes_them_is_refused_by_name_and_block(tiny_vit, kind, says):
    dense = tiny_vit("deit")
    plan = CompressionPlan(shape=shape_of(dense), blocks=(BlockPlan(heads=(0, 2)),) * 5)
    dense.blocks[3].attn = Attention(33, 3, qkv_bias=True, gated=kind == "gate", scale_norm=kind == "output norm",
                                     norm_layer=torch.nn.LayerNorm)
    with pytest.raises(InputError, match=says):
        compress(dense, plan)


def test_output_norm_that_timm_makes_is_refused_when_heads_are_cut_and_not_when_neurons_are(tiny_vit, images):
    dense = tiny_vit("deit", scale_attn_norm=True)
    shape, x = shape_of(dense), images(dense)
    with pytest.raises(InputError, match="block 0: heads of this model can't be cut: a norm over all of them"):
        compress(dense, CompressionPlan(shape=shape, blocks=(BlockPlan(heads=(1,)),) * 5))
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(neurons=(1, 5, 40)),) * 5)
    assert relative(logits(compress(dense, plan), x), logits(hooked(dense, plan), x)) < SAME


def test_one_block_of_another_kind_is_refused_by_name(tiny_vit):
    model = tiny_vit("deit")
    model.blocks[2] = Block(33, 3, mlp_layer=SwiGLU)
    plan = CompressionPlan.empty(shape_of(tiny_vit("deit")))
    for call in (check_supported, shape_of, deploy, lambda m: compress(m, plan)):
        with pytest.raises(InputError, match="SwiGLU at block 2; all blocks of one kind"):
            call(model)


def test_neurons_below_a_norm_are_refused_when_they_are_cut_and_heads_are_not(tiny_vit, images):
    dense = tiny_vit("deit", scale_mlp_norm=True)
    shape, x = shape_of(dense), images(dense)
    with pytest.raises(InputError, match="block 0: neurons of this model can't be cut: a norm over all of them"):
        CompressionPlan(shape=shape, blocks=(BlockPlan(neurons=(1,)),) * 5)
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(heads=(0, 2)),) * 5)
    assert relative(logits(compress(dense, plan), x), logits(hooked(dense, plan), x)) < SAME


def test_weights_of_the_dense_model_are_neither_changed_nor_shared(tiny_vit):
    dense = tiny_vit("deit")
    before = copy.deepcopy(dense.state_dict())
    model = compress(dense, staircase(shape_of(dense)))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


# ---- Cutting further: compress(model, plan, before=...)

def nested(shape: ViTShape, what: str, random_plan) -> tuple[CompressionPlan, CompressionPlan]:
    """(first, final): the second cuts all that the first does and more of `what`."""
    chance = random.Random(shape.embed_dim)
    h, m = shape.num_heads, shape.num_neurons
    first, final = [{} for _ in range(5)], [{} for _ in range(5)]
    merging = random_plan(shape, "mm---", seed=shape.embed_dim, shrink=False).blocks
    if what in ("heads", "all"):
        for block, more in zip((0, 1, 4), (1, 0, 1)):
            kept = chance.sample(range(h), h - 1 if block else h)
            first[block]["heads"] = tuple(sorted(kept)) if block else None
            final[block]["heads"] = tuple(sorted(kept[:max(1, len(kept) - more)]))
    if what in ("neurons", "all"):
        for block, count in ((0, m), (1, 17), (3, 7), (4, 2)):
            kept = chance.sample(range(m), count)
            first[block]["neurons"] = tuple(sorted(kept)) if block else None
            final[block]["neurons"] = tuple(sorted(kept[:max(1, count // 2)]))
    if what in ("merge", "all"):
        first[0]["tokens"] = final[0]["tokens"] = merging[0].tokens             # stays the same
    # a block between it and one that selects is needed
    if what == "merge":
        final[1]["tokens"] = merging[1].tokens                                  # comes new
    if what in ("select", "all"):
        first[2]["tokens"] = Select(kept=7, ranked_by="all")
        final[2]["tokens"] = Select(kept=5, ranked_by="all")                    # fewer
        final[3]["tokens"] = Select(kept=3)                                     # new
        final[4]["tokens"] = Select(kept=2)
        first[4]["tokens"] = Select(kept=2)                                     # the same
    return tuple(CompressionPlan(shape=shape, blocks=tuple(BlockPlan(**b) for b in blocks))
                 for blocks in (first, final))


KINDS = ["heads", "neurons", "merge", "select", "all"]
kinds = pytest.mark.parametrize("what", KINDS)


@kinds
def test_cutting_in_two_steps_equals_cutting_at_once(tiny_vit, family, images, random_plan, what):
    dense = tiny_vit(family)
    first, final = nested(shape_of(dense), what, random_plan)
    assert first != final
    step, once = compress(dense, first), compress(dense, final)
    twice, x = compress(step, final, before=first), images(dense)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in twice.state_dict().items())
    assert torch.equal(logits(twice, x), logits(once, x))       # the same weights in the same operations: bit-equal
    assert not torch.equal(logits(step, x), logits(once, x))
    assert torch.equal(logits(deploy(twice), x), logits(deploy(once), x))


@kinds
def test_the_same_plan_again_changes_nothing(tiny_vit, images, random_plan, what):
    dense = tiny_vit("deit")
    for plan in nested(shape_of(dense), what, random_plan):
        step, x = compress(dense, plan), images(dense)
        assert torch.equal(logits(compress(step, plan, before=plan), x), logits(step, x))


def test_before_of_an_uncut_model_is_the_empty_plan(tiny_vit, images, random_plan):
    dense = tiny_vit("deit")
    _, final = nested(shape_of(dense), "all", random_plan)
    x = images(dense)
    said = compress(dense, final, before=CompressionPlan.empty(shape_of(dense)))
    assert torch.equal(logits(said, x), logits(compress(dense, final), x))


@torch.no_grad()
def train_a_little(model) -> None:
    """Noise in every parameter: after it no two models agree by chance."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_trained_values_stay_when_a_trained_model_is_cut_further(tiny_vit, family, random_plan):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    first, final = nested(shape, "all", random_plan)
    step = compress(dense, first)
    train_a_little(step)
    before = copy.deepcopy(step.state_dict())
    further = compress(step, final, before=first)
    # the first model is left alone
    assert all(torch.equal(value, before[key]) for key, value in step.state_dict().items())
    seen = set()
    for index, (cut, was) in enumerate(zip(final.blocks, first.blocks)):
        old, new = attention_block(step.blocks[index]), attention_block(further.blocks[index])
        d = shape.head_dim
        was_heads = list(range(shape.num_heads)) if was.heads is None else list(was.heads)
        was_neurons = list(range(shape.num_neurons)) if was.neurons is None else list(was.neurons)
        heads = was_heads if cut.heads is None else cut.heads
        neurons = was_neurons if cut.neurons is None else cut.neurons
        for part in range(3):
            for place, head in enumerate(heads):
                for name in ("weight", "bias"):
                    source = getattr(old.attn.qkv,
                                     name).unflatten(0, (3, len(was_heads), d))[part, was_heads.index(head)]
                    assert torch.equal(getattr(new.attn.qkv, name).unflatten(0, (3, len(heads), d))[part, place],
                                       source)
        for place, head in enumerate(heads):
            source = old.attn.proj.weight.unflatten(1, (len(was_heads), d))[:, was_heads.index(head)]
            assert torch.equal(new.attn.proj.weight.unflatten(1, (len(heads), d))[:, place], source)
        for place, neuron in enumerate(neurons):
            was_at = was_neurons.index(neuron)
            assert torch.equal(new.mlp.fc1.weight[place], old.mlp.fc1.weight[was_at])
            assert torch.equal(new.mlp.fc1.bias[place], old.mlp.fc1.bias[was_at])
            assert torch.equal(new.mlp.fc2.weight[:, place], old.mlp.fc2.weight[:, was_at])
        assert torch.equal(new.attn.proj.bias, old.attn.proj.bias) and torch.equal(new.mlp.fc2.bias, old.mlp.fc2.bias)
        seen |= {id(p) for p in (new.attn.qkv.weight, new.attn.qkv.bias, new.attn.proj.weight, new.attn.proj.bias,
                                 new.mlp.fc1.weight, new.mlp.fc1.bias, new.mlp.fc2.weight, new.mlp.fc2.bias)}
    trained = dict(step.named_parameters())
    # norms, LayerScale, embeddings, classifier, q and k norms
    for name, parameter in further.named_parameters():
        if id(parameter) in seen or name.startswith("blocks.1.tokens."):        # block 1's matrices are new
            continue
        source = trained.get(name, trained.get(name.replace(".block.", ".")))
        assert source is not None and torch.equal(parameter, source), name
    rule, old_rule = further.blocks[0].tokens, step.blocks[0].tokens
    assert torch.equal(rule.merge_matrix, old_rule.merge_matrix)
    assert not torch.equal(rule.merge_matrix, compress(dense, first).blocks[0].tokens.merge_matrix)
    assert torch.equal(further.blocks[2].rank_weight, before["blocks.2.rank_weight"])


def test_a_merge_that_becomes_another_starts_from_the_new_rule_and_one_that_goes_leaves_the_block(tiny_vit, images,
                                                                                                  random_plan):
    dense = tiny_vit("deit")
    shape, x = shape_of(dense), images(dense)
    first, other = (random_plan(shape, "m----", seed=seed, shrink=False) for seed in (1, 2))
    step = compress(dense, first)
    train_a_little(step)
    changed = compress(step, other, before=first)
    fresh = compress(dense, other).blocks[0].tokens
    assert torch.equal(changed.blocks[0].tokens.merge_matrix, fresh.merge_matrix)
    assert torch.equal(changed.blocks[0].block.attn.qkv.weight, step.blocks[0].block.attn.qkv.weight)
    gone = compress(compress(dense, first), CompressionPlan.empty(shape), before=first)
    assert torch.equal(logits(gone, x), logits(dense, x))


@pytest.mark.parametrize("name, was, wanted, said", [
    ("heads", (0, 2), (1, 2), "block 2: heads 1 should stay, but the model has lost it already"),
    ("heads", (0, 2), None, "block 2: all heads should stay, but the model has lost some already"),
    ("neurons", (1, 5, 40), (1, 41), "block 2: neurons 41 should stay, but the model has lost it already"),
    ("neurons", (1, 5, 40), None, "block 2: all neurons should stay, but the model has lost some already"),
])
def test_keeping_what_is_gone_is_refused_by_block_and_unit(tiny_vit, name, was, wanted, said):
    dense = tiny_vit("deit")
    first, final = (CompressionPlan(shape=shape_of(dense),
                                    blocks=(BlockPlan(),) * 2 + (BlockPlan(**{name: kept}),) + (BlockPlan(),) * 2)
                    for kept in (was, wanted))
    with pytest.raises(InputError, match=said):
        compress(compress(dense, first), final, before=first)


def one_block(shape: ViTShape, index: int, **cut) -> CompressionPlan:
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(**(cut if i == index else {})) for i in range(5)))


@pytest.mark.parametrize("is_cut, said_cut", [
    ({}, {"heads": (0, 2)}), ({"heads": (0, 2)}, {}), ({"heads": (0, 2)}, {"heads": (1,)}),
    ({}, {"neurons": (5,)}), ({"neurons": (5, 7)}, {"neurons": (5,)}),
    ({}, {"tokens": "merge"}), ({"tokens": "merge"}, {}), ({"tokens": "merge"}, {"tokens": Select(kept=7)}),
    ({"tokens": Select(kept=7)}, {}), ({"tokens": Select(kept=7)}, {"tokens": Select(kept=5)}),
    ({"tokens": Select(kept=7)}, {"tokens": Select(kept=7, ranked_by="all")}),
    ({"tokens": Select(kept=7)}, {"tokens": "merge"}),
], ids=str)
def test_a_model_that_is_not_what_before_says_is_refused_by_block(tiny_vit, random_plan, is_cut, said_cut):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    merging = random_plan(shape, "m----", seed=1, shrink=False).blocks[0].tokens
    is_plan, said = (one_block(shape, 3, **{k: merging if v == "merge" else v for k, v in cut.items()})
                     for cut in (is_cut, said_cut))
    with pytest.raises(InputError, match="block 3 of the model is not what the plan says"):
        compress(compress(dense, is_plan), said, before=said)


def test_a_deployed_model_is_not_cut_further(tiny_vit, random_plan):
    dense = tiny_vit("deit")
    plan = random_plan(shape_of(dense), "m-s--", seed=1)
    with pytest.raises(InputError, match="block 0 of the model is not what the plan says"):
        compress(deploy(compress(dense, plan)), plan, before=plan)


def test_ranking_by_all_heads_is_refused_once_heads_are_gone_and_allowed_where_it_began_before(tiny_vit, images):
    dense = tiny_vit("deit")
    shape, x = shape_of(dense), images(dense)
    cut = one_block(shape, 2, heads=(0, 2))
    with pytest.raises(InputError, match="block 2: all heads should rank tokens, but the model has lost some"):
        compress(compress(dense, cut), one_block(shape, 2, heads=(0, 2), tokens=Select(kept=7, ranked_by="all")),
                 before=cut)
    compress(compress(dense, cut), one_block(shape, 2, heads=(0, 2), tokens=Select(kept=7)), before=cut)
    compress(compress(dense, cut), CompressionPlan(shape=shape, blocks=(      # heads of another block are no matter
        BlockPlan(), BlockPlan(tokens=Select(kept=7, ranked_by="all")), cut.blocks[2], BlockPlan(), BlockPlan())),
             before=cut)
    ranked = one_block(shape, 2, tokens=Select(kept=7, ranked_by="all"))
    both = one_block(shape, 2, heads=(1,), tokens=Select(kept=7, ranked_by="all"))
    twice = compress(compress(dense, ranked), both, before=ranked)
    assert torch.equal(logits(twice, x), logits(compress(dense, both), x))


def test_ranking_by_all_heads_can_not_take_over_from_the_kept_ones_once_heads_are_gone(tiny_vit):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    first = one_block(shape, 2, heads=(0, 2), tokens=Select(kept=7))
    with pytest.raises(InputError, match="block 2: all heads should rank"):
        compress(compress(dense, first), one_block(shape, 2, heads=(0,), tokens=Select(kept=5, ranked_by="all")),
                 before=first)


def test_a_plan_for_other_sizes_than_before_is_refused(tiny_vit):
    dense = tiny_vit("deit")
    plan = CompressionPlan.empty(shape_of(dense))
    with pytest.raises(InputError, match="plan is for another model"):
        compress(dense, CompressionPlan.empty(shape_of(tiny_vit("augreg"))), before=plan)


def test_a_model_cut_in_two_steps_is_saved_by_its_last_plan_and_comes_back_bit_equal(tiny_vit, images, random_plan,
                                                                                     tmp_path):
    dense = tiny_vit("deit")
    first, final = nested(shape_of(dense), "all", random_plan)
    step, x = compress(dense, first), images(dense)
    train_a_little(step)
    model = compress(step, final, before=first)
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, final))
    assert torch.equal(logits(found.model, x), logits(model, x))
    assert json.loads(found.plan.to_json()) == json.loads(final.to_json())


# ---- A plan `before` that is not the model's

def test_before_of_another_depth_is_refused(tiny_vit):
    plan = CompressionPlan.empty(shape_of(tiny_vit("deit")))
    with pytest.raises(InputError):
        compress(tiny_vit("deit", depth=4), plan, before=plan)


def test_a_family_that_is_not_supported_is_refused_with_before_too(tiny_vit):
    plan = CompressionPlan.empty(shape_of(tiny_vit("deit")))
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(1, 2))
    with pytest.raises(InputError, match="SwinTransformer"):
        compress(swin, plan, before=plan)


@pytest.mark.parametrize("sizes", [{"img_size": (64, 80)}, {"embed_dim": 39, "mlp_ratio": 132 / 39}],
                         ids=["img_size", "embed_dim"])
def test_before_for_another_size_than_the_models_is_refused(tiny_vit, sizes):
    other = CompressionPlan.empty(shape_of(tiny_vit("deit", **sizes)))
    with pytest.raises(InputError):
        compress(tiny_vit("deit"), other, before=other)


def test_before_with_another_merge_rule_than_the_models_is_refused(tiny_vit, random_plan):
    dense = tiny_vit("deit")
    said, other = (random_plan(shape_of(dense), "m----", seed=seed, shrink=False) for seed in (1, 2))
    assert said.tokens_per_block() != other.tokens_per_block()
    with pytest.raises(InputError, match="block 0"):
        compress(compress(dense, other), said, before=said)


@pytest.mark.parametrize("further", [{}, {"heads": (0, 1, 2), "tokens": Select(kept=7, ranked_by="all")}],
                         ids=["none", "ranked by all"])
def test_before_that_lists_every_unit_has_lost_none(tiny_vit, further):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    listed = one_block(shape, 1, heads=(0, 1, 2))
    compress(compress(dense, listed), one_block(shape, 1, **further), before=listed)


def test_intermediates_come_back_when_the_selection_goes(tiny_vit, images):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    selecting = one_block(shape, 1, tokens=Select(kept=7))
    back = compress(compress(dense, selecting), CompressionPlan.empty(shape), before=selecting)
    assert len(back.forward_intermediates(images(dense))[1]) == 5
