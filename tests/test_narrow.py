"""Queries and keys that are narrower than values."""
import copy
import json

import numpy as np
import pytest
import timm
import torch
from comparing import logits, relative
from conftest import DEPTH
from test_cost import counted_macs
from torch import nn

from vitlab.measure.moments import each_moments
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.attention import OwnAttention, attention_as
from vitlab.models.families import query_width
from vitlab.models.narrow import narrow_queries, reduced_rank
from vitlab.models.transformers_saving import _check_alike
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match, ReadOut, Select
from vitlab.plots.cuts import sensitivity_curves
from vitlab.plots.plans import compare_plans
from vitlab.runtime.files import InputError
from vitlab.search import SearchSpace
from vitlab.training.compensate import compensate
from vitlab.training.gradual import partial_plan

WIDTHS = 4, None, 7, 1, 9                       # of each block; DeiT's heads here are 11 wide
NO_OTHERS = {"rope": None, "attn_mask": None, "is_causal": False, "shared_rel_pos_bias": None, "shared_rel_pos": None}
SAME = 1e-4                                     # relative, of float32 sums in another order, as in test_shrink


def narrowed(shape, **more) -> CompressionPlan:
    return CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(qk_width=width, **{name: values[i] for name, values in more.items()})
        for i, width in enumerate(WIDTHS)))


def by_hand(block, x, width: int, inputs=None) -> torch.Tensor:
    """(H, N, N) logits of the best product of rank `width`: written from the formula, with the error of a low-rank map
    in the basis in which inputs are white. x (N, D), normed; inputs (R, D) that the map is fitted on."""
    attn, count = block.attn, block.attn.num_heads
    weight, bias = attn.qkv.weight.double(), attn.qkv.bias.double()
    x, inputs = x.double(), x.double() if inputs is None else inputs.double()
    found = []
    for head in range(count):
        rows = [slice((part * count + head) * attn.head_dim, (part * count + head + 1) * attn.head_dim)
                for part in range(2)]
        (q, k), (own_q, own_k) = ([each @ weight[r].T + bias[r] for r in rows] for each in (inputs, x))
        centred = k - k.mean(dim=0)
        # all pairs at once: sum over r, s of (q_r M c_s)^2 for the error M
        u, s, vt = torch.linalg.svd(q @ centred.T)
        best = u[:, :width] * s[:width] @ vt[:width]                            # (R, R): Eckart and Young
        between = torch.linalg.pinv(q) @ best @ torch.linalg.pinv(centred.T)    # (d, d)
        found.append(own_q @ between @ own_k.T)
    return torch.stack(found)


def moments_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.double().mean(dim=0)
    return mean, (x.double() - mean).T @ (x.double() - mean) / len(x)


def logits_of(attn, x: torch.Tensor) -> torch.Tensor:
    """(H, N, N), not scaled, of an attention of ours."""
    query, key, _, _ = attn._projected(x[None], None)
    return (query @ key.mT)[0].double()


# ---- The closed form

@pytest.mark.parametrize("width", [1, 4, 10])
def test_logits_are_those_of_the_best_product_of_their_rank_but_for_what_the_softmax_takes_away(tiny_vit, width):
    block = tiny_vit("deit").blocks[2]
    x = torch.randn(149, 33, generator=torch.Generator().manual_seed(3)) @ torch.randn(33, 33) + 0.5
    wanted = by_hand(block, x, width)
    with torch.no_grad():
        narrow_queries(block, width, moments_of(x))
        given = logits_of(block.attn, x)
    assert block.attn.qkv.weight.shape == (3 * (2 * width + 11), 33) and query_width(block.attn) == width
    centred = [each - each.mean(dim=2, keepdim=True) for each in (given, wanted)]
    assert relative(*centred) < 1e-3            # float32 weights of ill-conditioned inputs, and the ridge of 1e-6


def test_no_other_map_of_the_rank_misses_less(tiny_vit):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2000, 6, generator=generator, dtype=torch.float64)
            @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 1 for _ in range(2))
    covariance = torch.cov(k.T, correction=0)
    best = reduced_rank(q.T @ q / len(q), covariance, 2)

    def error(p, c):
        wrong = torch.eye(6, dtype=torch.float64) - p @ c.T
        return float(torch.einsum("ni,ij,jk,nk->", q, wrong, covariance @ wrong.T, q))
    assert torch.allclose(best[1].T @ best[1], torch.eye(2, dtype=torch.float64))
    for _ in range(20):
        other = [each + 0.02 * torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in best]
        assert error(*other) > error(*best)


def test_at_full_width_the_logits_are_the_same(tiny_vit):
    block = tiny_vit("deit").blocks[1]
    x = torch.randn(2, 17, 33)
    with torch.no_grad():
        wanted = block.attn(x)
        narrow_queries(block, 11)
    assert isinstance(block.attn, OwnAttention)
    assert relative(block.attn(x).detach(), wanted) < 1e-5


def test_weights_alone_say_what_the_norm_before_makes_of_inputs(tiny_vit):
    with torch.no_grad():
        blocks = [copy.deepcopy(tiny_vit("deit").blocks[2]) for _ in range(4)]
        blocks[0].norm1.weight[:20] *= 0.2
        x = blocks[0].norm1(torch.randn(20000, 33, generator=torch.Generator().manual_seed(0)))
        blocks[1].norm1.weight.copy_(blocks[0].norm1.weight)
        for block, moments in zip(blocks[1:], (None, moments_of(x), None)):     # the last knows of another norm
            narrow_queries(block, 5, moments)
        blocks[0].attn = attention_as(OwnAttention, blocks[0].attn)
        whole, *others = (logits_of(block.attn, x[:500]) for block in blocks)
    error = [(each - whole - (each - whole).mean(dim=2, keepdim=True)).norm() for each in others]
    assert error[1] < 1.05 * error[0] and error[0] < 1.05 * error[1] < 0.9 * error[2]


# ---- The model

@pytest.mark.parametrize("args", [{}, {"qkv_bias": False}], ids=str)
def test_a_narrowed_model_counts_saves_exports_trains_and_is_cut_further(tiny_vit, images, args, tmp_path):
    dense = tiny_vit("deit", **args)
    shape, x = shape_of(dense), images(tiny_vit("deit"))
    plan = narrowed(shape, heads=((0, 2), None, None, (1,), None))
    model = compress(dense, plan)
    assert [b.attn.qkv.out_features for b in model.blocks] == [2 * (8 + 11), 99, 3 * (14 + 11), 2 + 11, 3 * (18 + 11)]
    folder = checkpoint.save(tmp_path / "cut", model, plan)
    found = checkpoint.load(folder)
    assert found.plan == plan and torch.equal(logits(found.model, x), logits(model, x))
    assert [b.get("qk_width") for b in json.loads((folder / "plan.json").read_text())["blocks"]] == list(WIDTHS)
    assert relative(torch.export.export(model, (x,)).module()(x), logits(model, x)) < SAME      # without zeros
    assert torch.equal(torch.fx.symbolic_trace(copy.deepcopy(model.blocks[0].attn), NO_OTHERS)(x.new_ones(1, 16, 33)),
                       model.blocks[0].attn(x.new_ones(1, 16, 33)))
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    fused = logits(model, x)
    assert counted_macs(deploy(model)) == cost.macs(plan)["total"]             # its attention is no longer fused
    assert relative(logits(model, x), fused) < SAME
    further = CompressionPlan(shape=shape, blocks=(BlockPlan(heads=(2,), qk_width=3), *plan.blocks[1:]))
    twice = compress(model, further, before=plan)
    assert twice.blocks[0].attn.qkv.out_features == 6 + 11
    assert torch.equal(logits(copy.deepcopy(twice), x), logits(twice, x))
    with pytest.raises(InputError, match="block 0: queries and keys should be 4 wide, but the model's are 3 already"):
        compress(twice, CompressionPlan(shape=shape, blocks=(
            BlockPlan(heads=(2,), qk_width=4), *plan.blocks[1:])), before=further)
    with pytest.raises(InputError, match="already compressed"):
        shape_of(compress(dense, narrowed(shape)))
    with pytest.raises(InputError, match="block 2 of the model is not what the plan says"):
        checkpoint.save(tmp_path / "other", model, CompressionPlan(shape=shape, blocks=(
            *plan.blocks[:2], BlockPlan(qk_width=6), *plan.blocks[3:])))


@pytest.mark.parametrize("rules", [(None, Match(merged=3), Match(merged=2), Match(merged=0), ReadOut()),
                                   (None, Select(kept=9), None, Select(kept=4, ranked_by="all"), None)], ids=str)
def test_tokens_are_matched_and_selected_by_narrow_keys(tiny_vit, images, rules):
    dense = tiny_vit("deit")
    shape, x = shape_of(dense), images(dense)
    plan = narrowed(shape, tokens=rules)
    model = compress(dense, plan)
    scaled = int(cost.counts_of(plan).pooled.sum()) * dense.embed_dim           # rows, by no matrix product
    ranked = int((cost.counts_of(plan).compared > 0).sum())
    assert counted_macs(deploy(model)) + scaled == cost.macs(plan)["total"], ranked
    whole = compress(dense, CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=r) for r in rules)))
    almost = CompressionPlan(shape=shape, blocks=tuple(BlockPlan(qk_width=10, tokens=r) for r in rules))
    least = CompressionPlan(shape=shape, blocks=tuple(BlockPlan(qk_width=1, tokens=r) for r in rules))
    away = [float((logits(compress(dense, p), x) - logits(whole, x)).norm()) for p in (almost, least)]
    assert away[0] < away[1]


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva_giant_patch14_224", "vit_relpos_small_patch16_224"])
def test_biases_by_distance_and_of_their_own_go_along(name):
    torch.manual_seed(0)
    sizes = {"img_size": 42 if "14" in name else 48, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    dense = timm.create_model(name, **sizes).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    shape, x = shape_of(dense), torch.randn(2, 3, *[sizes["img_size"]] * 2)
    model = copy.deepcopy(dense)
    for block in model.blocks:
        narrow_queries(block, 16)
    assert relative(logits(model, x), logits(dense, x)) < SAME
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(qk_width=5), BlockPlan()))
    cut = compress(dense, plan)
    for block in (*dense.blocks, *cut.blocks):
        block.attn.fused_attn = False
    assert (cost.macs(CompressionPlan.empty(shape))["total"] - cost.macs(plan)["total"]
            == counted_macs(dense) - counted_macs(cut))
    # what goes in is seen, whoever multiplies it
    seen = dict(each_moments(dense, [(x, None)], ("widths",)))
    assert seen[0, "widths"].rows == len(x) * shape.num_tokens
    fitted = compensate(dense, plan, [(x, None)], progress=False)
    assert logits(fitted, x).isfinite().all() and query_width(fitted.blocks[0].attn) == 5


def test_by_moments_of_widths_alone_nothing_else_is_needed(tiny_vit, images):
    dense = tiny_vit("deit")
    x, plan = images(dense, 3), narrowed(shape_of(dense))
    moments = dict(each_moments(dense, [(x, None)], ("widths",)))
    wanted = compress(dense, plan)
    for index, width in enumerate(WIDTHS):
        if width is not None:
            wanted.blocks[index] = copy.deepcopy(dense.blocks[index])
            own = moments[index, "widths"]
            narrow_queries(wanted.blocks[index], width, (own.mean, own.covariance(ridge=0)))
    given = compensate(dense, plan, (), moments=moments, progress=False)
    assert relative(logits(given, x), logits(wanted, x)) < SAME


def test_a_wrapped_proj_goes_on_working_where_nothing_is_narrow(tiny_vit, images):
    dense = tiny_vit("deit")
    x, rules = images(dense), (None, Match(merged=2), Match(merged=0), Match(merged=0), Match(merged=0))
    model = compress(dense, CompressionPlan(shape=shape_of(dense), blocks=tuple(BlockPlan(tokens=r) for r in rules)))
    before = logits(model, x)
    for block in model.blocks[1:]:
        block.block.attn.proj = nn.Sequential(block.block.attn.proj)
    assert torch.equal(logits(model, x), before)


def test_separate_projections_of_which_some_have_no_bias_are_narrowed():
    dense = timm.create_model("eva02_base_patch14_224", img_size=42, depth=2, embed_dim=48, num_heads=3, num_classes=5,
                              use_rot_pos_emb=False).eval()
    narrow_queries(dense.blocks[0], 16)
    before = logits(copy.deepcopy(dense), x := torch.randn(2, 3, 42, 42))
    narrow_queries(dense.blocks[1], 16)
    assert relative(logits(dense, x), before) < SAME


# ---- By images, and the plan

@pytest.mark.parametrize("by", ["images", "moments"])
def test_images_narrow_better_than_weights_alone_and_proj_is_refitted(tiny_vit, images, by):
    dense = tiny_vit("deit")
    x, plan = images(dense, 8), narrowed(shape_of(dense))
    kinds = ("heads", "neurons", "widths")
    moments = {} if by == "images" else {"moments": dict(each_moments(dense, [(x, None)], kinds))}
    refitted = compensate(dense, plan, [(x, None)], progress=False, **moments)
    entering = []
    dense.blocks[0].attn.register_forward_pre_hook(lambda module, given: entering.append(given[0][0]))
    block = copy.deepcopy(dense.blocks[0])
    for image in x:
        logits(dense, image[None])
    rows = torch.cat(entering)
    narrow_queries(block, 4, moments_of(rows))
    a, b = (logits_of(each.attn, rows[:40]) for each in (block, refitted.blocks[0]))
    assert relative(a, b) < 1e-3
    apart = [float((logits(model, x) - logits(dense, x)).norm()) for model in (refitted, compress(dense, plan))]
    assert apart[0] < apart[1]
    moved = not torch.equal(refitted.blocks[0].attn.proj.bias, dense.blocks[0].attn.proj.bias)
    assert moved == (by == "images")


@pytest.mark.parametrize("cut, says", [
    ({"qk_width": 0}, "block 1: qk_width is 0; an integer from 1 to 10 is needed, or null for all 11"),
    ({"qk_width": 11}, "block 1: qk_width is 11; an integer from 1"), ({"qk_width": True}, "qk_width is True"),
    ({"qk_width": 3, "heads": ()}, "block 1: qk_width is of heads, and none stays; null is needed")])
def test_a_width_that_can_not_be_is_refused(tiny_vit, cut, says):
    with pytest.raises(InputError, match=says):
        CompressionPlan(shape=shape_of(tiny_vit("deit")), blocks=(BlockPlan(), BlockPlan(**cut), *(BlockPlan(),) * 3))


@pytest.mark.parametrize("make, says", [
    (lambda tiny: tiny("qk_norm"), "queries and keys are normed"),
    (lambda tiny: timm.create_model("vit_small_patch16_rope_ape_224", img_size=32, depth=5, embed_dim=48, num_heads=3),
     "queries and keys are turned by place")], ids=["qk_norm", "rope"])
def test_what_turns_or_norms_queries_is_refused_by_name(tiny_vit, make, says):
    shape = shape_of(make(tiny_vit))
    with pytest.raises(InputError, match=f"block 0: widths of this model can't be cut: {says}"):
        narrowed(shape)
    assert SearchSpace(shape=shape, units=("neurons", "widths"), tokens="none").units == ("neurons",)


def test_version_1_has_no_words_for_widths(tiny_vit):
    data = json.loads(narrowed(shape_of(tiny_vit("deit"))).to_json())
    assert data["version"] == 2 and CompressionPlan.from_json(data).blocks[0].qk_width == 4
    with pytest.raises(InputError, match="block 0: no head or no neuron stays, or qk_width is given, which version 1"):
        CompressionPlan.from_json(data | {"version": 1})


# ---- A search

@pytest.mark.parametrize("sublayers", [False, True])
def test_widths_are_a_dimension_whose_counts_are_those_of_its_plan(tiny_vit, sublayers):
    shape, chance = shape_of(tiny_vit("deit")), np.random.default_rng(1)
    space = SearchSpace(shape=shape, units=("widths", "heads"), tokens="match", max_ratio=0.75, sublayers=sublayers)
    assert space.names == [f"{unit} {i}" for unit in ("heads", "widths") for i in range(DEPTH)] + ["tokens"]
    policies = chance.uniform(0, 0.75, (8, space.size))
    if sublayers:
        policies[::2, 2] = 1
    for policy in policies:
        plan = space.plan(policy, heads=torch.rand(DEPTH, 3))
        wanted = [None if b.leaves_out("heads") else max(int(11 * (1 - r)), 1)
                  for b, r in zip(plan.blocks, policy[DEPTH:])]
        assert [b.qk_width for b in plan.blocks] == [None if w == 11 else w for w in wanted]
        assert space.keys(space.policy(plan)[None]) == space.keys(policy[None])
        assert float(space.gmacs(policy[None])[0]) == pytest.approx(cost.gmacs(plan), rel=1e-12)
        again = space.from_even(space.even(policy[None]))
        assert space.keys(again) == space.keys(policy[None])


def test_widths_of_steps_are_multiples(tiny_vit):
    shape = shape_of(timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32))
    space = SearchSpace(shape=shape, units=("widths",), tokens="none", max_ratio=0.75, multiple=8)
    points = np.linspace(0, 0.75, 50)[:, None]
    assert set(space.counts(space.from_even(points)).widths.flatten().tolist()) == {16, 24, 32, 40, 48, 56, 64}


def test_steps_towards_a_plan_narrow_part_of_the_way(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    scores = type("Scores", (), {"heads": torch.rand(DEPTH, 3), "neurons": torch.rand(DEPTH, shape.num_neurons)})
    assert [b.qk_width for b in partial_plan(narrowed(shape), 0.5, scores).blocks] == [7, None, 9, 6, 10]


def test_a_wrapped_layer_is_refused(tiny_vit):
    dense = tiny_vit("deit")
    dense.blocks[0].attn.qkv = nn.utils.parametrizations.weight_norm(dense.blocks[0].attn.qkv)
    with pytest.raises(InputError, match="block 0: .* stands for a Linear there"):
        compress(dense, narrowed(shape_of(dense)))


def test_formats_of_others_have_no_words_for_narrow_queries(tiny_vit):
    dense = tiny_vit("deit")
    with pytest.raises(InputError, match="block 0 has queries and keys of 4; transformers' vit has none narrower"):
        _check_alike(compress(dense, narrowed(shape_of(dense))), "vit")


# ---- What is drawn

def test_explorers_draw_widths_and_what_is_left_out(tiny_vit):
    shape = shape_of(tiny_vit("deit"))
    gone = CompressionPlan(shape=shape, blocks=(BlockPlan(), BlockPlan(heads=(), neurons=(1, 2)), *(BlockPlan(),) * 3))
    figure = compare_plans({"narrow": narrowed(shape), "gone": gone})
    heads, neurons, _, widths, macs = figure.axes
    assert [axis.get_ylabel().split("\n")[0] for axis in (heads, widths)] == ["heads", "widths of"]
    assert [round(bar.get_height(), 6) for bar in widths.containers[0]] == [round(100 * (w or 11) / 11, 6)
                                                                           for w in WIDTHS]
    assert [bar.get_height() for bar in heads.containers[1]] == [100, 0, 100, 100, 100]
    assert len(compare_plans({"gone": gone}).axes) == 4
    rows = [{"dimension": name, "ratio": ratio, "loss": ratio, "saved": ratio} for ratio in (0.5, 0.75, 1.0)
            for name in ("heads 0", "widths 0")]
    curves = sensitivity_curves(rows, loss_label="loss", saved_label="saved")
    assert [axis.get_title() for axis in curves.axes[:2]] == ["heads", "widths"]
    assert len(curves.axes[0].lines[0].get_xdata()) == 4
