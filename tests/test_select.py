"""Token selection inside a block (methods B3) against slow loops, and its deployed, exported and trained forms."""
import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from comparing import disturb_matrices, gradient_and_slope, logits, relative
from timm.layers import DropPath
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitlab.models import attention_block, checkpoint, compress, deploy, shape_of
from vitlab.models.select import SelectBlock
from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.rules import Select
from vitlab.runtime.files import InputError

SAME = 1e-4         # relative, the project's bound for two float32 orders of the same sums, 5 blocks deep
# Where two ways of computing are compared that both rank, all runs in float64: float32 rounding could swap two tokens
# of
# nearly equal rank, and sums of a few hundred terms round to about 1e-14 there.
EXACT = 1e-10


def plan_with(shape, rules: dict, **cuts) -> CompressionPlan:
    """Token rules by block; cuts: heads and neurons by block."""
    return CompressionPlan(shape=shape, blocks=tuple(
        BlockPlan(tokens=rules.get(i), **{name: by_block.get(i) for name, by_block in cuts.items()})
        for i in range(shape.depth)))


@torch.no_grad()
def seen(model, x) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens in, tokens out) of every block."""
    pairs = []
    handles = [b.register_forward_hook(lambda m, i, o: pairs.append((i[0], o))) for b in model.blocks]
    model(x)
    for handle in handles:
        handle.remove()
    return pairs


# ---- The oracle: one image, one head, one query at a time, from the text of B3 and the dense block's weights alone.

def norm_slowly(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """LayerNorm of one vector."""
    if isinstance(norm, nn.Identity):
        return x
    mean = sum(float(v) for v in x) / len(x)
    variance = sum((float(v) - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + norm.eps) * norm.weight + norm.bias


def block_slowly(dense, x: torch.Tensor, cut: BlockPlan, prefix: int) -> torch.Tensor:
    """B3 on one image: x (N, D) -> (P + kept + 1, D), the tokens that stay in the order of their rank."""
    attn, mlp, rule = dense.attn, dense.mlp, cut.tokens
    d, dim, heads = attn.head_dim, x.shape[1], attn.num_heads
    kept_heads = range(heads) if cut.heads is None else cut.heads
    gamma1, gamma2 = (ls.gamma if hasattr(ls, "gamma") else torch.ones(dim) for ls in (dense.ls1, dense.ls2))
    normed = [norm_slowly(row, dense.norm1) for row in x]
    joined = torch.zeros(len(x), heads * d, dtype=x.dtype)                      # a cut head's output is zero
    rank, voters = [0.0] * len(x), kept_heads if rule.ranked_by == "kept" else range(heads)
    for h in range(heads):
        rows = [torch.arange(h * d, (h + 1) * d) + part * heads * d for part in range(3)]
        q, k, v = ([attn.qkv.weight[r] @ y + (0 if attn.qkv.bias is None else attn.qkv.bias[r]) for y in normed]
                   for r in rows)
        q, k = [norm_slowly(y, attn.q_norm) for y in q], [norm_slowly(y, attn.k_norm) for y in k]
        for i in range(len(x)):
            score = [math.exp(float(q[i] @ k[j]) / math.sqrt(d)) for j in range(len(x))]
            attention = [s / math.fsum(score) for s in score]
            if h in kept_heads:
                joined[i, h * d:(h + 1) * d] = sum(a * value for a, value in zip(attention, v))
            if i == 0 and h in voters:                                          # the class token's row
                rank = [r + a / len(voters) for r, a in zip(rank, attention)]
    x = [row + gamma1 * (attn.proj.weight @ out + attn.proj.bias) for row, out in zip(x, joined)]
    order = sorted(range(prefix, len(x)), key=lambda j: -rank[j])
    rest = order[rule.kept:]
    x = x[:prefix] + [x[j] for j in order[:rule.kept]] + [sum(x[j] for j in rest) / len(rest)]
    kept_neurons = range(mlp.fc2.in_features) if cut.neurons is None else cut.neurons
    out = []
    for row in x:
        y, update = norm_slowly(row, dense.norm2), mlp.fc2.bias.clone()
        for m in kept_neurons:
            z = float(mlp.fc1.weight[m] @ y + mlp.fc1.bias[m])
            update += mlp.fc2.weight[:, m] * (z * 0.5 * (1 + math.erf(z / math.sqrt(2))))      # GELU
        out.append(row + gamma2 * update)
    return torch.stack(out)


def sorted_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows by their first entry: two sets of tokens compare without their order."""
    return x[x[:, 0].argsort()]


@torch.no_grad()
@pytest.mark.parametrize("ranked_by", ["kept", "all"])
@pytest.mark.parametrize("cut_heads", [False, True], ids=["all heads", "one head cut"])
def test_selecting_block_follows_the_formula_written_as_loops(tiny_vit, family, images, ranked_by, cut_heads):
    dense = tiny_vit(family).double()
    shape = shape_of(dense)
    prefix = shape.num_prefix_tokens
    assert prefix > 0
    heads = {1: tuple(range(1, shape.num_heads)), 3: tuple(range(shape.num_heads - 1))} if cut_heads else {}
    plan = plan_with(shape, {1: Select(kept=7, ranked_by=ranked_by), 3: Select(kept=5, ranked_by=ranked_by)},
                     heads=heads, neurons={1: tuple(range(0, shape.num_neurons, 3)), 2: (5,)})
    model = compress(dense, plan)
    pairs = seen(model, images(dense).double())
    for index in (1, 3):
        for before, after in zip(*pairs[index]):
            expected = block_slowly(dense.blocks[index], before, plan.blocks[index], prefix)
            assert relative(after[:prefix], expected[:prefix]) < EXACT
            assert relative(sorted_rows(after[prefix:-1]), sorted_rows(expected[prefix:-1])) < EXACT
            assert relative(after[-1], expected[-1]) < EXACT


@torch.no_grad()
def test_selections_in_a_row_followed_through_the_whole_model_give_the_oracles_logits(tiny_vit, images):
    dense = tiny_vit("dinov2_reg").double()
    plan = plan_with(shape_of(dense),
                     {0: Select(kept=11), 1: Select(kept=7), 2: Select(kept=6), 3: Select(kept=3), 4: Select(kept=2)})
    x = images(dense).double()
    rows = dense.norm_pre(dense._pos_embed(dense.patch_embed(x)))
    for block, cut in zip(dense.blocks, plan.blocks):
        rows = torch.stack([block_slowly(block, each, cut, 5) for each in rows])
    assert relative(logits(compress(dense, plan), x), dense.forward_head(dense.norm(rows))) < EXACT


def test_the_oracle_tells_the_two_rankings_apart(tiny_vit, images):
    # Else agreement with it under both names would say nothing.
    dense = tiny_vit("deit").double()
    shape = shape_of(dense)
    found = [logits(compress(dense, plan_with(shape, {2: Select(kept=4, ranked_by=by)}, heads={2: (1,)})),
                    images(dense).double())
             for by in ("kept", "all")]
    assert relative(*found) > 100 * SAME


# ---- Properties

def test_prefix_tokens_stay_first_and_in_order_and_each_other_token_comes_from_one_of_the_block(tiny_vit, family,
                                                                                                images):
    dense = tiny_vit(family).double()
    prefix = shape_of(dense).num_prefix_tokens
    model = compress(dense, plan_with(shape_of(dense), {1: Select(kept=7), 2: Select(kept=5)}))
    pairs = seen(model, images(dense, 3).double())
    for index, kept in ((1, 7), (2, 5)):
        before, after = pairs[index]
        with torch.no_grad():
            whole = dense.blocks[index](before)                 # after the attention each token goes its own way
        assert relative(after[:, :prefix], whole[:, :prefix]) < EXACT
        for got, all_of_it in zip(after[:, prefix:-1], whole[:, prefix:]):
            distance = (got[:, None] - all_of_it).abs().amax(dim=2)             # (kept, others)
            assert float(distance.min(dim=1).values.max()) < EXACT * float(all_of_it.abs().max())
            assert len(set(distance.argmin(dim=1).tolist())) == kept            # none twice


def test_token_counts_are_those_of_the_plan_for_every_input(tiny_vit, family, images, select_layout, random_plan):
    dense = tiny_vit(family)
    plan = random_plan(shape_of(dense), select_layout, seed=sum(map(ord, family + select_layout)))
    for form in (compress(dense, plan), deploy(compress(dense, plan))):
        for x in (images(dense, 3), torch.zeros(1, 3, *dense.patch_embed.img_size), 50 * images(dense, 2, seed=1)):
            attended: list[int] = []
            handles = [attention_block(b).attn.register_forward_pre_hook(lambda m, i,
                                                                         to=attended: to.append(i[0].shape[1]))
                       for b in form.blocks if hasattr(attention_block(b), "attn")]
            logits(form, x)
            for handle in handles:
                handle.remove()
            assert attended == plan.tokens_per_block()


def test_each_image_alone_gives_the_same_as_in_the_batch(tiny_vit, family, images):
    dense = tiny_vit(family).double()
    prefix = shape_of(dense).num_prefix_tokens
    model = compress(dense, plan_with(shape_of(dense), {0: Select(kept=7), 2: Select(kept=3), 3: Select(kept=2)}))
    x = images(dense, 5).double()
    together = logits(model, x)
    for index in range(5):
        assert relative(logits(model, x[index:index + 1]), together[index:index + 1]) < EXACT
    (before, after), *_ = seen(model, x)                        # and the images do keep tokens of different places
    with torch.no_grad():
        whole = dense.blocks[0](before)
    places = {tuple(sorted((a[:, None] - w).abs().amax(dim=2).argmin(dim=1).tolist()))
              for a, w in zip(after[:, prefix:-1], whole[:, prefix:])}
    assert len(places) > 1


def test_selection_with_cut_heads_equals_selection_in_the_masked_model(tiny_vit, family, images):
    # Ranked by all heads, cutting is what the published code does by masking.
    dense = tiny_vit(family).double()
    shape = shape_of(dense)
    rules = {1: Select(kept=7, ranked_by="all"), 3: Select(kept=4, ranked_by="all")}
    heads = {0: (1,), 1: (0,), 3: (shape.num_heads - 1,)}
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for index, kept in heads.items():
            for head in set(range(shape.num_heads)) - set(kept):
                masked.blocks[index].attn.proj.weight[:, head * shape.head_dim:(head + 1) * shape.head_dim] = 0
    x = images(dense).double()
    expected = logits(compress(masked, plan_with(shape, rules)), x)
    assert relative(logits(compress(dense, plan_with(shape, rules, heads=heads)), x), expected) < EXACT


def test_ranking_weights_of_all_heads_are_kept_as_buffers_only_where_all_rank(tiny_vit, family):
    dense = tiny_vit(family)
    shape = shape_of(dense)
    for ranked_by in ("kept", "all"):
        model = compress(dense, plan_with(shape, {2: Select(kept=5, ranked_by=ranked_by)}, heads={2: (1,)}))
        block = model.blocks[2]
        assert isinstance(block, SelectBlock) and block.block.attn.num_heads == 1
        assert not [n for n, _ in model.named_parameters() if "rank" in n]
        ranks = [tuple(b.shape) for n, b in model.named_buffers() if "rank_weight" in n]
        assert ranks == ([(2 * shape.embed_dim, shape.embed_dim)] if ranked_by == "all" else [])


# ---- Speed is not lost

class Shapes(TorchDispatchMode):
    """The shape of every tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.shapes.add(tuple(each.shape))
        return out


@torch.no_grad()
@pytest.mark.parametrize("ranked_by", ["kept", "all"])
def test_fused_attention_stays_on_and_nothing_of_size_tokens_by_tokens_is_stored(tiny_vit, family, images, monkeypatch,
                                                                                 ranked_by):
    dense = tiny_vit(family)
    model = compress(dense,
                     plan_with(shape_of(dense),
                               {1: Select(kept=7, ranked_by=ranked_by), 3: Select(kept=3, ranked_by=ranked_by)},
                                      heads={3: (0,)}))
    assert all(attention_block(b).attn.fused_attn for b in model.blocks)
    calls, fused = [], F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape[2])
        return fused(*args, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    with Shapes() as stored:
        model(images(dense))
    assert len(calls) == 5                                      # once per block
    maps = [s for s in stored.shapes for n in set(calls) if sum(size == n for size in s) > 1]
    assert not maps
    for block in model.blocks:                                  # the check sees such a map where there is one
        attention_block(block).attn.fused_attn = False
    with Shapes() as stored:
        model(images(dense))
    assert {s for s in stored.shapes for n in set(calls) if s[-2:] == (n, n)}


# ---- Forms: deployed, exported, saved

def test_deployed_form_of_merging_then_selecting_equals_the_training_form(tiny_vit, family, images, select_layout,
                                                                          random_plan):
    dense = tiny_vit(family).double()
    model = compress(dense, random_plan(shape_of(dense), select_layout, seed=sum(map(ord, family + select_layout))))
    x = images(dense, 3).double()
    assert relative(logits(model, x), logits(dense, x)) > 100 * SAME            # the plan does cut something
    assert relative(logits(deploy(model), x), logits(model, x)) < EXACT
    disturb_matrices(model)
    assert relative(logits(deploy(model), x), logits(model, x)) < EXACT


@pytest.mark.parametrize("layout_letters", ["mm-s-", "m0-ss"])
def test_deployed_form_in_float32_equals_the_training_form(tiny_vit, images, random_plan, layout_letters):
    dense = tiny_vit("deit")
    model = compress(dense, random_plan(shape_of(dense), layout_letters, seed=3))
    x = images(dense, 3)
    assert relative(logits(deploy(model), x), logits(model, x)) < SAME


def test_selecting_right_after_a_block_that_merged_is_refused(tiny_vit, scored_plan):
    """Tokens of one region differ there in scale alone: after the norm they rank alike but for rounding."""
    dense = tiny_vit("deit")
    merging = scored_plan(dense, 0.6, 0.1, 0).blocks
    with pytest.raises(InputError, match="block 2: tokens are selected right after a block that merged"):
        plan_with(shape_of(dense), {1: merging[1].tokens, 2: Select(kept=10)})


@pytest.mark.parametrize("pool", ["avg", "max", "token"])
def test_deployed_form_keeps_what_each_pooling_needs_after_a_selection(tiny_vit, images, random_plan, pool):
    dense = tiny_vit("dinov2_reg", global_pool=pool).double()
    model = compress(dense, random_plan(shape_of(dense), "m0-ss", seed=3))
    x = images(dense).double()
    assert relative(logits(deploy(model), x), logits(model, x)) < EXACT


def test_deploy_of_a_plan_that_only_selects_is_bit_equal(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family)
    model = compress(dense, random_plan(shape_of(dense), "s-s--", seed=1))
    x = images(dense)
    deployed = deploy(model)
    assert torch.equal(logits(deployed, x), logits(model, x)) and not deployed.training
    assert [type(b) for b in deployed.blocks] == [type(b) for b in model.blocks]        # it comes back as it is


@pytest.mark.parametrize("family_name, layout_letters, form", [
    ("distilled", "-s-s-", "compressed"), ("qk_norm", "s---s", "compressed"), ("dinov2_reg", "m-s--", "deployed")])
def test_export_of_a_model_that_selects_gives_the_same_logits(tiny_vit, images, random_plan, family_name,
                                                              layout_letters, form):
    dense = tiny_vit(family_name)
    model = compress(dense, random_plan(shape_of(dense), layout_letters, seed=4))
    model = deploy(model) if form == "deployed" else model
    exported = torch.export.export(model, (images(dense, 2, seed=1),)).module()
    x = images(dense, 2, seed=2)                                # the choice is made anew, not recorded
    assert relative(logits(exported, x), logits(model, x)) < SAME


@pytest.mark.parametrize("form", ["compressed", "deployed"])
@pytest.mark.parametrize("ranked_by", ["kept", "all"])
def test_a_saved_model_that_selects_comes_back_bit_equal(tiny_vit, images, random_plan, tmp_path, form, ranked_by):
    dense = tiny_vit("deit")
    merging = random_plan(shape_of(dense), "m----", seed=2, shrink=False).blocks[0].tokens
    plan = plan_with(shape_of(dense), {0: merging, 2: Select(kept=7, ranked_by=ranked_by)}, heads={2: (0, 2)})
    model = compress(dense, plan)
    # ranking weights are read back, not taken from a new model
    if ranked_by == "all":
        model.blocks[2].rank_weight.mul_(1.1)
    model = deploy(model) if form == "deployed" else model
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan))
    x = images(dense)
    assert torch.equal(logits(found.model, x), logits(model, x)) and found.plan == plan


def test_saving_with_a_plan_of_another_selection_is_refused(tiny_vit, tmp_path):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    model = compress(dense, plan_with(shape, {2: Select(kept=7)}))
    for other in ({}, {2: Select(kept=8)}, {2: Select(kept=7, ranked_by="all")}, {1: Select(kept=7)}):
        with pytest.raises(InputError, match=r"block [12] of the model is not what the plan says"):
            checkpoint.save(tmp_path / "c", model, plan_with(shape, other))
    assert not list(tmp_path.iterdir())


# ---- Training

def test_gradients_of_a_model_that_selects_are_the_slope_of_its_output(tiny_vit, family, images, random_plan):
    dense = tiny_vit(family).double()
    # Not selected right after merging: tokens of one region differ in scale alone, so after LayerNorm they rank as
    # equal,
    # and the slightest step would swap them.
    model = compress(dense, random_plan(shape_of(dense), "m-s-s", seed=5))
    x = images(dense).double()
    got, slope, still = gradient_and_slope(model, x)
    assert not [n for n in still if not n.endswith(("merge_matrix", "head_dist.weight", "head_dist.bias"))]
    # The central difference errs by step^2 times a third derivative, and by about 1e-15 / step in rounding: below 1e-5.
    assert got == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("ranked_by", ["kept", "all"])
def test_ranking_builds_no_graph(tiny_vit, images, monkeypatch, ranked_by):
    dense, rankings, plain = tiny_vit("deit"), [], tokens.select

    def watched(x, ranking, *args):
        rankings.append((x.requires_grad, ranking.requires_grad))
        return plain(x, ranking, *args)
    monkeypatch.setattr(tokens, "select", watched)
    compress(dense, plan_with(shape_of(dense), {2: Select(kept=7, ranked_by=ranked_by)}))(images(dense))
    assert rankings == [(True, False)]


def test_gradient_checkpointing_of_a_model_that_selects_gives_the_same_gradients(tiny_vit, images, random_plan):
    dense, gradients = tiny_vit("deit"), []
    for enable in (False, True):
        model = compress(dense, random_plan(shape_of(dense), "-s-s-", seed=2)).train()
        model.set_grad_checkpointing(enable)
        model(images(dense)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    # the same operations run twice: equal but for the order of additions
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)


def test_training_mode_drops_paths_and_a_few_steps_lower_the_loss(tiny_vit, images, random_plan):
    dense = tiny_vit("deit3", drop_path_rate=0.5)
    model = compress(dense, random_plan(shape_of(dense), "-s-s-", seed=6)).train()
    assert all(m.training for m in model.modules())
    assert sum(isinstance(m, DropPath) for b in model.blocks if isinstance(b, SelectBlock) for m in b.modules()) == 4
    x, target = images(dense, 5), torch.tensor([0, 3, 1, 6, 2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(logits(model, x), logits(model, x))
        before = float(F.cross_entropy(logits(model.eval(), x), target))
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    model.eval()
    assert torch.equal(logits(model, x), logits(model, x))
    assert float(F.cross_entropy(logits(model, x), target)) < 0.7 * before


def test_both_residuals_of_a_selecting_block_can_be_dropped(tiny_vit, images):
    # With every path dropped the block only selects: each token of the output is one that came in, or their mean.
    dense = tiny_vit("deit", drop_path_rate=0.5).double()
    model = compress(dense, plan_with(shape_of(dense), {4: Select(kept=7)})).train()
    for path in (model.blocks[4].block.drop_path1, model.blocks[4].block.drop_path2):
        path.drop_prob = 1 - 1e-12
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before, after = seen(model, images(dense).double())[4]
    for rows, out in zip(before, after):
        assert torch.equal(out[0], rows[0])
        places = [[torch.equal(each, row) for row in rows].index(True) for each in out[1:-1]]
        rest = [row for j, row in enumerate(rows) if j not in (0, *places)]
        assert len(set(places)) == 7 and relative(out[-1], sum(rest) / len(rest)) < EXACT


# ---- Refusals

@pytest.mark.parametrize("layout_letters", ["--s--", "m-s--"])
def test_intermediates_are_refused_after_a_selection_in_both_forms(tiny_vit, images, random_plan, layout_letters):
    dense = tiny_vit("deit")
    model = compress(dense, random_plan(shape_of(dense), layout_letters))
    for form in (model, deploy(model), copy.deepcopy(model)):
        for call in (form.forward_intermediates, form.get_intermediate_layers):
            with pytest.raises(InputError, match="no token grid.*after tokens were selected"):
                call(images(dense))
    assert len(dense.forward_intermediates(images(dense))[1]) == 5              # the dense model is untouched


def test_an_attention_mask_is_refused_by_a_block_that_selects(tiny_vit, images):
    dense = tiny_vit("deit")
    model = compress(dense, plan_with(shape_of(dense), {0: Select(kept=7)}))
    with pytest.raises(InputError, match="selects tokens takes no attention mask"):
        model.forward_features(images(dense), attn_mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(InputError, match="selects tokens takes no attention mask"):
        model.forward_features(images(dense), is_causal=True)


def test_another_image_size_is_refused_with_both_sizes(tiny_vit):
    dense = tiny_vit("deit", dynamic_img_size=True)
    model = compress(dense, plan_with(shape_of(dense), {1: Select(kept=7)}))
    with pytest.raises(InputError, match="80 x 80 came in.*48 x 80"):
        logits(model, torch.zeros(1, 3, 80, 80))


def test_a_model_without_a_class_token_is_refused_by_the_plan(tiny_vit):
    shape = shape_of(tiny_vit("mae", class_token=False, global_pool="avg"))
    assert shape.num_prefix_tokens == 0
    with pytest.raises(InputError, match="block 2: .*no class token"):
        plan_with(shape, {2: Select(kept=7)})


def test_compress_keeps_dtype_mode_and_flags_of_a_selecting_block(tiny_vit):
    dense = tiny_vit("deit").double().train()
    dense.blocks[1].attn.qkv.weight.requires_grad_(False)
    model = compress(dense, plan_with(shape_of(dense), {1: Select(kept=7, ranked_by="all")}, heads={1: (0,)}))
    assert all(m.training
               for m in model.modules()) and {v.dtype for v in model.state_dict().values()} == {torch.float64}
    assert not model.blocks[1].block.attn.qkv.weight.requires_grad and model.blocks[
        1].block.attn.proj.weight.requires_grad
    assert {v.data_ptr()
            for v in model.state_dict().values()}.isdisjoint(v.data_ptr() for v in dense.state_dict().values())


def test_random_plans_that_select_compress_and_run(tiny_vit, images, random_plan):
    chance = random.Random(0)
    for seed in range(11):
        family = chance.choice(["deit", "distilled", "mae", "qk_norm"])
        dense = tiny_vit(family)
        plan = random_plan(shape_of(dense), "".join(sorted(chance.choices("ms-", k=4) + ["-"], key="m-s".index)),
                           seed=seed)
        assert bool(torch.isfinite(logits(compress(dense, plan), images(dense))).all())
