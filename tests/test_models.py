"""vitlab.models: compress and deploy on every supported family, against the dense model and against each other."""
import copy
import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from comparing import disturb_matrices, logits, relative

from vitlab.models import attention_block, check_supported, compress, deploy, set_trainable, shape_of
from vitlab.models.merge import MergeReconstructTokens
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.runtime.files import InputError

# The bound that methods and reference set for two float32 orders of the same sums, 5 blocks deep.
SAME = 1e-4


# ---- The neutral plan is the exact identity

def test_empty_plan_gives_bit_equal_logits(tiny_vit, family, images):
    dense = tiny_vit(family)
    x = images(dense)
    model = compress(dense, CompressionPlan.empty(shape_of(dense)))
    assert torch.equal(logits(model, x), logits(dense, x))
    assert torch.equal(logits(deploy(model), x), logits(dense, x))
    assert type(model) is type(dense)


def test_keep_rate_one_and_prune_rate_zero_give_bit_equal_logits(tiny_vit, family, images, scored_plan):
    dense = tiny_vit(family)
    x = images(dense)
    model = compress(dense, scored_plan(dense, keep_rate=1, prune_rate=0))
    assert torch.equal(logits(model, x), logits(dense, x))


def test_a_plan_that_lists_every_head_and_neuron_gives_bit_equal_logits(tiny_vit, family, images):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    all_of_it = BlockPlan(heads=tuple(range(shape.num_heads)), neurons=tuple(range(shape.num_neurons)))
    model = compress(dense, CompressionPlan(shape=shape, blocks=(all_of_it,) * shape.depth))
    x = images(dense)
    assert torch.equal(logits(model, x), logits(dense, x))


def test_dense_model_is_not_changed_by_compress_and_deploy(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    dense.blocks[1].attn.qkv.weight.requires_grad_(False)
    x = images(dense)
    before, modules = copy.deepcopy(dense.state_dict()), [type(m) for m in dense.modules()]
    flags, expected = [p.requires_grad for p in dense.parameters()], logits(dense, x)
    model = compress(dense, random_plan(shape_of(dense), "m-m0m", seed=1))
    set_trainable(model, "matrices")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    deploy(model)
    after = dense.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert [type(m) for m in dense.modules()] == modules
    assert [p.requires_grad for p in dense.parameters()] == flags
    assert torch.equal(logits(dense, x), expected)


def test_deploy_does_not_change_the_compressed_model(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    model = compress(dense, random_plan(shape_of(dense), "m-m0m", seed=1)).train()
    x, before = images(dense), copy.deepcopy(model.state_dict())
    deployed = deploy(model)
    assert model.training and not deployed.training
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.endswith("merge_matrix"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(model.eval().forward_intermediates(x)[1]) == len(model.blocks)


# ---- Merge and reconstruct (A6), deployed form (A7)

@torch.no_grad()
def forward_by_hand(model, dense, x):
    """The formula of A6 with explicit loops over images, on the dense model's own blocks."""
    tokens = dense.norm_pre(dense._pos_embed(dense.patch_embed(x)))
    for block, original in zip(model.blocks, dense.blocks):
        if attention_block(block) is block:
            tokens = original(tokens)
            continue
        rule = block.tokens
        out = []
        for each in tokens:                                         # (N, D)
            merged = original((rule.merge_matrix @ each)[None])[0]
            given = rule.reconstruct_matrix @ merged
            for j, mask in enumerate(rule.token_mask.tolist()):
                given[j] += (1 - mask) * each[j]
            out.append(given)
        tokens = torch.stack(out)
    return dense.forward_head(dense.norm(tokens))


def test_merging_block_follows_the_formula(tiny_vit, family, layout, images, random_plan):
    dense = tiny_vit(family)
    model = compress(dense, random_plan(shape_of(dense), layout, seed=5, shrink=False))
    disturb_matrices(model)
    x = images(dense, 3)
    assert relative(logits(model, x), forward_by_hand(model, dense, x)) < SAME


def test_deployed_form_equals_the_training_form(tiny_vit, family, layout, images, random_plan):
    dense = tiny_vit(family)
    x = images(dense, 3)
    model = compress(dense, random_plan(shape_of(dense), layout, seed=sum(map(ord, family + layout))))
    expected = logits(model, x)
    assert relative(logits(deploy(model), x), expected) < SAME
    assert relative(expected, logits(dense, x)) > 100 * SAME        # the plan does cut something
    disturb_matrices(model)
    assert relative(logits(deploy(model), x), logits(model, x)) < SAME


def test_deployed_form_equals_the_training_form_without_a_class_token(tiny_vit, images, random_plan):
    dense = tiny_vit("mae", class_token=False)
    assert shape_of(dense).num_prefix_tokens == 0
    model = compress(dense, random_plan(shape_of(dense), "m-mm-", seed=2))
    disturb_matrices(model)
    x = images(dense)
    assert relative(logits(deploy(model), x), logits(model, x)) < SAME


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "token", ""])
def test_deployed_form_keeps_what_each_pooling_needs(tiny_vit, images, random_plan, pool):
    dense = tiny_vit("dinov2_reg", global_pool=pool)
    model = compress(dense, random_plan(shape_of(dense), "-mm0m", seed=3))
    x = images(dense)
    assert relative(logits(deploy(model), x), logits(model, x)) < SAME


def test_deployed_model_ends_in_the_prefix_tokens_of_the_training_form(tiny_vit, images, random_plan):
    for family in ("deit", "distilled", "dinov2_reg"):
        dense = tiny_vit(family)
        model = compress(dense, random_plan(shape_of(dense), "m-mmm", seed=3))
        x = images(dense)
        with torch.no_grad():
            features, whole = deploy(model).forward_features(x), model.forward_features(x)
        assert relative(features, whole[:, :dense.num_prefix_tokens]) < SAME


def test_deployed_model_has_no_merge_left_and_nothing_that_trains(tiny_vit, random_plan):
    dense = tiny_vit("deit")
    deployed = deploy(compress(dense, random_plan(shape_of(dense), "m-mm-")))
    assert not [m for m in deployed.modules() if isinstance(m, MergeReconstructTokens)]
    assert not any(p.requires_grad for p in deployed.parameters())


def test_deploy_of_a_model_without_merged_tokens_is_that_model(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    model = compress(dense, random_plan(shape_of(dense), "-----", seed=6))
    x = images(dense)
    assert torch.equal(logits(deploy(model), x), logits(model, x))


def test_only_the_matrix_that_the_rule_trains_gets_a_gradient(tiny_vit, images, random_plan):
    dense = tiny_vit("deit")
    plan = random_plan(shape_of(dense), "mmmmm", seed=0)
    trains = [b.tokens.trains for b in plan.blocks]
    assert set(trains) == {"both", "reconstruct"}       # the seed gives both kinds
    model = compress(dense, plan)
    model(images(dense)).square().sum().backward()
    for kind, block in zip(trains, model.blocks):
        assert bool(block.tokens.reconstruct_matrix.grad.abs().sum() > 0)
        assert (block.tokens.merge_matrix.grad is not None) == (kind == "both")


# ---- Heads and neurons (B8)

@torch.no_grad()
def masked(dense, plan):
    """The dense model with the cut heads' columns of proj and the cut neurons' columns of fc2 set to zero."""
    model = copy.deepcopy(dense)
    for block, cut in zip(model.blocks, plan.blocks):
        d = block.attn.head_dim
        for head in set(range(plan.shape.num_heads)) - set(cut.heads or range(plan.shape.num_heads)):
            block.attn.proj.weight[:, head * d:(head + 1) * d] = 0
        for neuron in set(range(plan.shape.num_neurons)) - set(cut.neurons or range(plan.shape.num_neurons)):
            block.mlp.fc2.weight[:, neuron] = 0
    return model


def test_shrunk_model_equals_the_masked_model(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    x = images(dense)
    for seed in range(3):
        plan = random_plan(shape_of(dense), "-----", seed=seed)
        assert relative(logits(compress(dense, plan), x), logits(masked(dense, plan), x)) < SAME


def test_masked_and_merged_model_equals_the_shrunk_and_merged_one(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    plan = random_plan(shape_of(dense), "m-m0m", seed=7)
    tokens_alone = dataclasses.replace(plan, blocks=tuple(BlockPlan(tokens=b.tokens) for b in plan.blocks))
    x = images(dense)
    assert relative(logits(compress(dense, plan), x), logits(compress(masked(dense, plan), tokens_alone), x)) < SAME


def test_cut_heads_and_neurons_leave_the_weights(tiny_vit, family, random_plan):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    plan = random_plan(shape, "-m---", seed=8)
    model = compress(dense, plan)
    for block, cut in zip(model.blocks, plan.blocks):
        block = attention_block(block)
        width = shape.head_dim * (shape.num_heads if cut.heads is None else len(cut.heads))
        neurons = shape.num_neurons if cut.neurons is None else len(cut.neurons)
        d = shape.embed_dim
        assert block.attn.qkv.weight.shape == (3 * width, d) and block.attn.proj.weight.shape == (d, width)
        assert block.mlp.fc1.weight.shape == (neurons, d) and block.mlp.fc2.weight.shape == (d, neurons)
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)


# ---- It stays a timm model

def test_compressed_model_gives_whole_feature_maps_at_every_block(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    model = compress(dense, random_plan(shape, "m-m0m", seed=9))
    x = images(dense)
    outputs = []
    handles = [b.register_forward_hook(lambda m, i, o: outputs.append(o)) for b in model.blocks]
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
    for handle in handles:
        handle.remove()
    assert features.shape == (2, shape.num_tokens, shape.embed_dim)
    assert len(maps) == shape.depth
    for each, out in zip(maps, outputs):
        assert each.shape == (2, shape.embed_dim, *shape.grid_size)
        patches = out[:, shape.num_prefix_tokens:]
        for row in range(shape.grid_size[0]):
            for column in range(shape.grid_size[1]):
                assert torch.equal(each[:, :, row, column], patches[:, row * shape.grid_size[1] + column])
    with torch.no_grad():
        assert torch.equal(features, model.forward_features(x))


def test_classifier_of_a_compressed_model_can_be_reset_and_the_result_deployed(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    model = compress(dense, random_plan(shape_of(dense), "m-mm-", seed=1))
    x = images(dense)
    model.reset_classifier(11)
    assert logits(model, x).shape == (2, 11)
    assert relative(logits(deploy(model), x), logits(model, x)) < SAME      # both read the class count anew


def test_a_deployed_model_takes_another_classifier_but_no_other_pooling(tiny_vit, images, random_plan):
    dense = tiny_vit("deit")
    model = compress(dense, random_plan(shape_of(dense), "m-mmm", seed=1))
    deployed, x = deploy(model), images(dense)
    deployed.reset_classifier(11)
    model.head = deployed.head
    assert relative(logits(deployed, x), logits(model, x)) < SAME
    deployed.reset_classifier(11, "avg")            # average of patches, none of which are left
    with pytest.raises(InputError, match="pools by 'avg', but only its prefix tokens are left"):
        deployed(x)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    x, gradients = images(dense), []
    for enable in (False, True):
        model = compress(dense, random_plan(shape_of(dense), "m-m0m", seed=2)).train()
        model.set_grad_checkpointing(enable)
        F.cross_entropy(model(x), torch.tensor([1, 5])).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    missing = [n for n, g in gradients[0].items() if g is None and not n.endswith(("merge_matrix", "head_dist.weight"))]
    assert not missing
    for name, expected in gradients[0].items():
        got = gradients[1][name]
        # The same operations run twice: equal but for the order in which gradients are added up.
        assert (got is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_deployed_model_refuses_intermediates_and_says_where_they_are(tiny_vit, images, random_plan):
    dense = tiny_vit("deit")
    deployed = deploy(compress(dense, random_plan(shape_of(dense), "m----")))
    for call in (deployed.forward_intermediates, deployed.get_intermediate_layers):
        with pytest.raises(InputError, match="training form"):
            call(images(dense))


def test_compressed_and_deployed_models_survive_a_deep_copy(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    model = compress(dense, random_plan(shape_of(dense), "m-m0m", seed=3))
    x = images(dense)
    for each in (model, deploy(model)):
        twin = copy.deepcopy(each)
        expected = logits(each, x)
        assert torch.equal(logits(twin, x), expected)
        with torch.no_grad():
            for tensor in each.state_dict().values():
                tensor.zero_()
        assert torch.equal(logits(twin, x), expected)       # nothing is shared
    with pytest.raises(InputError):
        twin.forward_intermediates(x)


@pytest.mark.parametrize("name, form", [("distilled", "compressed"), ("dinov2_reg", "deployed")])
def test_model_survives_export_with_static_shapes(tiny_vit, images, random_plan, name, form):
    dense = tiny_vit(name, depth=3)
    model = compress(dense, random_plan(shape_of(dense), "m-m", seed=4))
    model = deploy(model) if form == "deployed" else model
    exported = torch.export.export(model, (images(dense, 2, seed=1),)).module()
    x = images(dense, 2, seed=2)
    assert relative(logits(exported, x), logits(model, x)) < SAME


def test_compressed_weights_go_through_a_state_dict(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    plan = random_plan(shape_of(dense), "m-m0m", seed=5)
    model = compress(dense, plan)
    disturb_matrices(model)
    other = compress(tiny_vit(family, seed=1), plan)
    x = images(dense)
    assert not torch.equal(logits(other, x), logits(model, x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, x), logits(model, x))


def test_compress_keeps_mode_dtype_and_the_flags_of_shrunk_weights(tiny_vit, random_plan):
    dense = tiny_vit("deit").double().train()
    for parameter in dense.blocks[1].parameters():
        parameter.requires_grad_(False)
    plan = random_plan(shape_of(dense), "mmm--", seed=6)
    model = compress(dense, plan)
    assert all(m.training for m in model.modules())
    assert {v.dtype for v in model.state_dict().values()} == {torch.float64}
    block = attention_block(model.blocks[1])
    assert not any(p.requires_grad for p in block.parameters())
    assert all(p.requires_grad for p in attention_block(model.blocks[0]).parameters())


# ---- What trains (A8)

def test_set_trainable_words_choose_matrices_and_weights(tiny_vit, random_plan):
    dense = tiny_vit("deit")
    plan = random_plan(shape_of(dense), "mm-mm", seed=0)
    trains = {i: b.tokens.trains for i, b in enumerate(plan.blocks) if b.tokens is not None}
    assert set(trains.values()) == {"both", "reconstruct"}
    model = compress(dense, plan)
    expected = {"all": (True, True), "matrices": (False, True), "weights": (True, False)}      # (weights, matrices)
    for word in ("matrices", "weights", "all", "weights", "matrices", "all"):                  # each from each
        set_trainable(model, word)
        for name, parameter in model.named_parameters():
            weights, matrices = expected[word]
            wanted = matrices if ".tokens." in name else weights
            if name.endswith("merge_matrix") and trains[int(name.split(".")[1])] == "reconstruct":
                wanted = False          # A5: rule merge never trains it
            assert parameter.requires_grad == wanted, f"{word}: {name}"


def test_token_masks_are_no_parameters(tiny_vit, random_plan):
    model = compress(tiny_vit("deit"), random_plan(shape_of(tiny_vit("deit")), "mmmmm"))
    assert sum("token_mask" in n for n, _ in model.named_buffers()) == 5
    assert not [n for n, _ in model.named_parameters() if "token_mask" in n]


@pytest.mark.parametrize("word", ["", "none", "matrix", None])
def test_set_trainable_refuses_other_words_and_changes_nothing(tiny_vit, random_plan, word):
    dense = tiny_vit("deit")
    model = compress(dense, random_plan(shape_of(dense), "m----"))
    set_trainable(model, "matrices")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match="all.*matrices.*weights"):
        set_trainable(model, word)
    assert [p.requires_grad for p in model.parameters()] == before


def test_set_trainable_matrices_refuses_a_model_without_them_and_changes_nothing(tiny_vit):
    dense = tiny_vit("deit")
    with pytest.raises(InputError, match="no merge and reconstruct matrices"):
        set_trainable(dense, "matrices")
    assert all(p.requires_grad for p in dense.parameters())


# ---- Refusals

@pytest.mark.parametrize("name, sizes, said", [
    ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
     "SwinTransformer"),
    ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}, "Xcit.*to channels"),
    ("vit_small_patch16_18x2_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2},
     "ParallelThingsBlock"),
    ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "patch_drop_rate": 0.5},
     "patch_drop_rate"),
], ids=["swin", "xcit", "parallel", "patch_drop"])
def test_a_family_that_is_not_supported_is_refused_by_name(name, sizes, said, tiny_vit):
    model = timm.create_model(name, pretrained=False, **sizes)
    plan = CompressionPlan.empty(shape_of(tiny_vit("deit")))
    for call in (check_supported, shape_of, deploy, lambda m: compress(m, plan)):
        with pytest.raises(InputError, match=said):
            call(model)


def test_a_plan_for_another_model_is_refused(tiny_vit):
    plan = CompressionPlan.empty(shape_of(tiny_vit("augreg")))
    with pytest.raises(InputError, match="plan is for another model"):
        compress(tiny_vit("deit"), plan)


@pytest.mark.parametrize("layout_letters, shrink", [("m----", False), ("-----", True), ("m-m--", True)])
def test_a_compressed_model_is_not_compressed_again_by_a_plan_for_the_dense_one(tiny_vit, random_plan, layout_letters,
                                                                                shrink):
    dense = tiny_vit("deit")
    plan = random_plan(shape_of(dense), layout_letters, seed=1, shrink=shrink)
    assert any(b.heads or b.neurons or b.tokens for b in plan.blocks)
    with pytest.raises(InputError, match="already compressed|another model"):
        compress(compress(dense, plan), plan)


def test_a_deployed_model_is_neither_deployed_nor_compressed_again(tiny_vit, random_plan):
    dense = tiny_vit("deit")
    plan = random_plan(shape_of(dense), "m-m--")
    deployed = deploy(compress(dense, plan))
    with pytest.raises(InputError, match="already deployed"):
        deploy(deployed)
    with pytest.raises(InputError):
        compress(deployed, plan)


def test_an_attention_mask_is_refused_by_a_block_that_merges(tiny_vit, images, random_plan):
    dense = tiny_vit("deit")
    model = compress(dense, random_plan(shape_of(dense), "m-m--"))
    n = shape_of(dense).num_tokens
    for each in (model, deploy(model)):
        with pytest.raises(InputError, match="attention mask"):
            each.forward_features(images(dense), attn_mask=torch.ones(n, n, dtype=torch.bool))
        with pytest.raises(InputError, match="attention mask"):
            each.forward_features(images(dense), is_causal=True)


@pytest.mark.parametrize("form", ["compressed", "deployed"])
@pytest.mark.parametrize("size", [(80, 80), (48, 48)])
def test_another_image_size_is_refused_with_both_sizes(tiny_vit, random_plan, form, size):
    dense = tiny_vit("deit", dynamic_img_size=True)
    model = compress(dense, random_plan(shape_of(dense), "-mm--"))
    model = deploy(model) if form == "deployed" else model
    height, width = dense.patch_embed.img_size
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]} came in.*{height} x {width}"):
        logits(model, torch.zeros(1, 3, *size))


def test_a_turned_image_with_as_many_patches_is_refused(tiny_vit, random_plan):
    # Regions are drawn on the grid of 3 x 5 patches; on 5 x 3 they would join patches of different lines.
    dense = tiny_vit("deit", dynamic_img_size=True)
    model = compress(dense, random_plan(shape_of(dense), "-mm--"))
    height, width = dense.patch_embed.img_size
    with pytest.raises(InputError):
        logits(model, torch.zeros(1, 3, width, height))


# ---- Shapes

def test_shape_of_reads_the_sizes_of_the_model(tiny_vit, family):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    assert shape.img_size == tuple(dense.patch_embed.img_size) and shape.grid_size == tuple(dense.patch_embed.grid_size)
    assert shape.num_heads * shape.head_dim == shape.embed_dim == dense.head.in_features
    assert shape.num_neurons == dense.blocks[0].mlp.fc1.out_features and shape.num_classes == dense.head.out_features
    assert shape.num_prefix_tokens == {"distilled": 2, "dinov2_reg": 5}.get(family, 1)
    assert shape.num_classifiers == (2 if family == "distilled" else 1)
    with torch.no_grad():
        assert dense.forward_features(torch.zeros(1, 3, *shape.img_size)).shape[1:] == (shape.num_tokens,
                                                                                        shape.embed_dim)


@pytest.mark.parametrize("cut", ["neurons", "tokens"])
def test_shape_of_a_compressed_model_is_refused(tiny_vit, random_plan, cut):
    # Its blocks differ from each other, and a shape holds one number for all of them.
    dense = tiny_vit("deit")
    plan = random_plan(shape_of(dense), "m-m--", shrink=False)
    if cut == "neurons":
        plan = dataclasses.replace(plan, blocks=tuple(BlockPlan(neurons=tuple(range(7 + i))) for i in range(5)))
    model = compress(dense, plan)
    with pytest.raises(InputError):
        shape_of(model)
