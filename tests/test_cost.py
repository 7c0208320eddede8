"""vitlab.cost against what PyTorch counts while the model runs."""
import pytest
import timm
import torch
from timm.layers import Attention
from torch.utils.flop_counter import FlopCounterMode

from vitlab import cost
from vitlab.files import InputError
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import CompressionPlan


def counted_macs(model: torch.nn.Module) -> int:
    """MACs of one image by PyTorch's counter (2 FLOPs each), which sees matrix products and convolutions as they run."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *model.patch_embed.img_size))
    total = counter.get_total_flops()
    assert total % 2 == 0
    return total // 2


def test_macs_equal_what_runs_in_both_forms(tiny_vit, family, layout, random_plan):
    dense = tiny_vit(family)
    plan = random_plan(shape_of(dense), layout, seed=sum(map(ord, family + layout)))
    model = compress(dense, plan)
    assert cost.macs(plan, "training")["total"] == counted_macs(model)
    assert cost.macs(plan, "deployed")["total"] == counted_macs(deploy(model))


@pytest.mark.parametrize("rates", [(0.6, 0.1), (0.3, 0.5), (0.07, 0.0), (0.8, 0.9)])
def test_macs_equal_what_runs_for_plans_by_score(tiny_vit, family, scored_plan, rates):
    dense = tiny_vit(family)
    plan = scored_plan(dense, *rates)
    model = compress(dense, plan)
    assert cost.macs(plan, "training")["total"] == counted_macs(model)
    assert cost.macs(plan, "deployed")["total"] == counted_macs(deploy(model))


def test_every_form_of_the_empty_plan_costs_what_the_dense_model_does(tiny_vit, family):
    dense = tiny_vit(family)
    plan = CompressionPlan.empty(shape_of(dense))
    counts = [cost.macs(plan, form) for form in cost.FORMS]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["total"] == counted_macs(dense)


def test_macs_leave_out_a_classifier_that_is_not_there(tiny_vit):
    for family in ("deit", "distilled"):
        model = tiny_vit(family, num_classes=0)
        assert cost.macs(CompressionPlan.empty(shape_of(model)))["total"] == counted_macs(model)


def test_macs_without_a_class_token_equal_what_runs(tiny_vit, random_plan):
    dense = tiny_vit("mae", class_token=False)
    plan = random_plan(shape_of(dense), "m-mm-", seed=3)
    model = compress(dense, plan)
    assert cost.macs(plan, "training")["total"] == counted_macs(model)
    assert cost.macs(plan, "deployed")["total"] == counted_macs(deploy(model))


def test_deit_tiny_dense_is_the_known_number_of_flops():
    # By hand, D = 192, N = 197, 12 blocks: patches 196 * 768 D; a block 4 N D^2 + 2 N^2 D + 8 N D^2; classifier 1000 D.
    d, n = 192, 197
    by_hand = 196 * 3 * 16 * 16 * d + 12 * (4 * n * d * d + 2 * n * n * d + 8 * n * d * d) + 1000 * d
    assert 2 * by_hand == 2_507_366_400
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    counted = cost.macs(CompressionPlan.empty(shape_of(model)))
    assert counted["total"] == by_hand == counted_macs(model)
    assert cost.gmacs(CompressionPlan.empty(shape_of(model))) == pytest.approx(by_hand / 1e9)


def test_published_form_leaves_out_merge_reconstruct_and_fold_alone(tiny_vit, family, layout, random_plan):
    plan = random_plan(shape_of(tiny_vit(family)), layout, seed=2)
    published, training, deployed = (cost.macs(plan, form) for form in ("published", "training", "deployed"))
    assert published["merge"] == published["reconstruct"] == published["fold"] == 0
    assert training["merge"] > 0 and training["reconstruct"] > 0 and deployed["fold"] > 0
    for part in set(cost.PARTS) - {"merge", "reconstruct", "fold"}:
        assert published[part] == training[part] == deployed[part]


def test_parts_sum_to_the_total(tiny_vit, family, random_plan):
    plan = random_plan(shape_of(tiny_vit(family)), "m-m0m")
    for form in cost.FORMS:
        parts = cost.macs(plan, form)
        assert parts.pop("total") == sum(parts.values()) and tuple(parts) == cost.PARTS
        assert all(type(value) is int for value in parts.values())


@pytest.mark.parametrize("form", ["", "dense", "Deployed", None])
def test_unknown_form_is_refused_and_the_known_ones_listed(tiny_vit, form):
    with pytest.raises(InputError, match="deployed.*training.*published"):
        cost.macs(CompressionPlan.empty(shape_of(tiny_vit("deit"))), form)


# Models of timm's VisionTransformer class whose parts are others than cost counts: they must be counted or refused.
ODD = {
    "swiglu": ("vit_giant_patch14_dinov2", {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    "map_pool": ("vit_base_patch16_siglip_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    "clip": ("vit_base_patch16_clip_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}),
}


@pytest.mark.parametrize("name", ODD)
def test_a_model_is_either_refused_or_counted_exactly(name):
    architecture, sizes = ODD[name]
    model = timm.create_model(architecture, pretrained=False, **sizes).eval()
    try:
        shape = shape_of(model)
    except InputError:
        return
    # Gradients on: the counter's module hooks want a graph under attention pooling.
    for block in model.blocks:
        block.attn.fused_attn = False
    if model.attn_pool is not None:
        model.attn_pool.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *model.patch_embed.img_size))
    assert cost.macs(CompressionPlan.empty(shape))["total"] == counter.get_total_flops() // 2


# ---- Parameters

def test_params_total_is_the_number_of_weights(tiny_vit, family, random_plan):
    dense = tiny_vit(family)
    model = compress(dense, random_plan(shape_of(dense), "m-m0m", seed=4))
    for each in (dense, model):
        assert cost.params(each)["total"] == sum(p.numel() for p in each.parameters())
    deployed = deploy(model)
    folds = sum(b.numel() for name, b in deployed.named_buffers() if "fold" in name or name.endswith("matrix"))
    assert folds > 0 and cost.params(deployed)["total"] == folds + sum(p.numel() for p in deployed.parameters())


def test_params_by_part_follow_from_the_sizes(tiny_vit, random_plan):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    plan = random_plan(shape, "m--m-", seed=1)
    parts = cost.params(compress(dense, plan))
    d, n = shape.embed_dim, shape.num_tokens
    width = [shape.head_dim * (shape.num_heads if b.heads is None else len(b.heads)) for b in plan.blocks]
    neurons = [shape.num_neurons if b.neurons is None else len(b.neurons) for b in plan.blocks]
    merged = [c for c, b in zip(plan.tokens_per_block(), plan.blocks) if b.tokens is not None]
    expected = {
        "attention": sum(3 * w * d + 3 * w + w * d + d for w in width),         # qkv and proj, with biases
        "mlp": sum(2 * m * d + m + d for m in neurons),
        "merge and reconstruct": sum(2 * c * n for c in merged),
        "patch_embed": 3 * 16 * 16 * d + d,
        "classifier": shape.num_classes * d + shape.num_classes,
        "norms and embeddings": (2 * shape.depth + 1) * 2 * d + d + n * d,      # norms, class token, positions
    }
    total = parts.pop("total")
    assert parts == expected and total == sum(expected.values())
