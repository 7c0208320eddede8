"""vitlab.measure.capture: the identity of methods A1 against explicit attention maps, and what it leaves behind."""
import contextlib
import math
import operator

import pytest
import timm
import torch
import torch.nn.functional as F
from segmenting_fixtures import CLASSES as PIXEL_CLASSES
from segmenting_fixtures import masks, small
from segmenting_fixtures import pictures as scenes
from test_hsic import oracle_gaussian, oracle_hsic, oracle_linear
from test_segmenter import segmenter  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.capture import TOKEN_CRITERIA, attention_maps, attention_spans, scored, token_scores
from vitlab.models import compress, shape_of
from vitlab.runtime.files import InputError

NUM_CLASSES = 7


def batches_for(model, images, sizes=(3, 2)):
    """Batches of unequal size; targets by a generator."""
    generator = torch.Generator().manual_seed(5)
    return [(images(model, count, seed=i), torch.randint(NUM_CLASSES, (count,), generator=generator))
            for i, count in enumerate(sizes)]


# ---- Oracle: attention written out, one image and one head at a time; A is kept and asked for its gradient.

def explicit_attention(attn, maps: list):
    """A forward for one timm Attention; maps gets one {(image, head): A (N, N)} per call."""
    def forward(x, attn_mask=None, is_causal=False):
        batch, n, _ = x.shape
        kept, rows = {}, []
        for b in range(batch):
            heads = []
            for h in range(attn.num_heads):
                d = attn.head_dim
                lines = [x[b] @ attn.qkv.weight[s:s + d].T + attn.qkv.bias[s:s + d]
                         for s in (part * attn.num_heads * d + h * d for part in range(3))]        # q, k, v (N, d)
                q, k, v = attn.q_norm(lines[0]), attn.k_norm(lines[1]), lines[2]
                score = torch.exp(q @ k.T / d ** 0.5)
                kept[b, h] = score / score.sum(dim=1, keepdim=True)
                kept[b, h].retain_grad()
                heads.append(kept[b, h] @ v)
            rows.append(torch.cat(heads, dim=1) @ attn.proj.weight.T + attn.proj.bias)
        maps.append(kept)
        return torch.stack(rows)
    return forward


def scores_slowly(model, batches, absolute: str) -> list[list[float]]:
    """A1 in loops. "image": the mean over images, each by itself, of | sum over h, i of G * A | / (H N). "batch": of
    each batch's mean loss | sum over b, h, i of G * A | / (B H N), summed over batches, each weighing its images over
    those of the mean batch."""
    depth, prefix, patches = len(model.blocks), model.num_prefix_tokens, model.patch_embed.num_patches
    images = sum(len(x) for x, _ in batches)
    if absolute == "image":
        batches = [(x[b:b + 1], y[b:b + 1]) for x, y in batches for b in range(len(x))]
    mean_batch, total = images / len(batches), None
    for x, targets in batches:
        maps: list[dict] = []
        for block in model.blocks:
            block.attn.forward = explicit_attention(block.attn, maps)
        # of pixels that count; no image is of class 255
        F.cross_entropy(model(x), targets, ignore_index=255).backward()
        for block in model.blocks:
            del block.attn.forward
        for layer in range(depth):
            heads, n = model.blocks[layer].attn.num_heads, maps[layer][0, 0].shape[0]
            column = [0.0] * n
            for attention in maps[layer].values():
                for a_row, g_row in zip(attention.tolist(), attention.grad.tolist()):
                    for j in range(n):
                        column[j] += g_row[j] * a_row[j]
            total = [[0.0] * patches for _ in range(depth)] if total is None else total
            for j in range(prefix, prefix + patches):           # queries that joined come after these
                share = 1 / images if absolute == "image" else len(x) / mean_batch / mean_batch
                total[layer][j - prefix] += share * abs(column[j]) / (heads * n)
    model.zero_grad()
    return total


@pytest.mark.parametrize("absolute", ["batch", "image"])
@pytest.mark.parametrize("family", ["deit", "distilled", "dinov2_reg", "qk_norm", "mae"])
def test_token_scores_equal_the_sum_over_explicit_attention_maps(tiny_vit, images, family, absolute):
    model = tiny_vit(family)
    batches = batches_for(model, images)
    expected = torch.tensor(scores_slowly(model, batches, absolute))
    scores = token_scores(model, batches, absolute=absolute, progress=False)
    assert scores.shape == (len(model.blocks), shape_of(model).num_patches)
    # 1e-4 of the largest, the bound of methods A1 for float32 gradients through 5 blocks in another order.
    assert float((scores - expected).abs().max() / expected.abs().max()) < 1e-4
    # Every block by itself too, or a small one could hide behind a large one.
    worst = (scores - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
    assert float(worst.max()) < 1e-3


def test_absolute_per_image_differs_from_per_batch_and_is_never_smaller(tiny_vit, images):
    model = tiny_vit("deit")
    batches = batches_for(model, images)
    whole, each = (token_scores(model, batches, absolute=word, progress=False) for word in ("batch", "image"))
    # | a + b | <= |a| + |b|, up to rounding of float32 sums
    assert bool((each >= whole * (1 - 1e-5)).all()) and float((each / whole).max()) > 1.1


@pytest.mark.parametrize("absolute", ["batch", "image"])
def test_each_batch_counts_by_its_images(tiny_vit, images, absolute):
    model = tiny_vit("deit")
    batches = batches_for(model, images)
    # A batch alone gives | . | / 3 or / 2 of the mean loss; together they weigh 3 / 2.5 and 2 / 2.5, over a mean batch
    # of 2.5.
    shares = (3 / 5, 2 / 5) if absolute == "image" else ((3 / 2.5)**2, (2 / 2.5)**2)
    parts = [share * token_scores(model, [batch], absolute=absolute, progress=False) for batch,
             share in zip(batches, shares)]
    torch.testing.assert_close(token_scores(model, batches, absolute=absolute, progress=False), parts[0] + parts[1],
                               rtol=1e-6, atol=0)


def test_equal_batches_give_the_published_sum_over_batches(tiny_vit, images):
    model = tiny_vit("deit")
    batches = batches_for(model, images, (3, 3))
    parts = [token_scores(model, [batch], absolute="batch", progress=False) for batch in batches]
    torch.testing.assert_close(token_scores(model, batches, absolute="batch", progress=False), parts[0] + parts[1],
                               rtol=1e-6, atol=0)


def test_scores_per_image_do_not_depend_on_how_129_images_come_in_batches(tiny_vit, images):
    model = tiny_vit("deit").double()
    x, y = batches_for(model, images, (129,))[0]
    uneven, even, backwards = ([(part.double(), targets) for part, targets in zip(x.split(sizes), y.split(sizes))]
                               for sizes in ([64, 64, 1], [43, 43, 43], [1, 64, 64]))
    wanted = token_scores(model, even, progress=False)
    for given in (uneven, backwards):
        # float64: sums in another order
        assert float((token_scores(model, given, progress=False) / wanted - 1).abs().max()) < 1e-9
    # no image makes up the most of the score
    alone = token_scores(model, uneven[2:], progress=False)
    assert float(((129 * wanted - alone) > 0).double().mean()) == 1 and float((alone / (129 * wanted)).mean()) < 0.05


def test_scores_per_image_do_not_depend_on_the_order_of_images(tiny_vit, images):
    model = tiny_vit("deit")
    x, y = batches_for(model, images, (5,))[0]
    order = [3, 0, 4, 1, 2]
    first, second = (token_scores(model, [pair], absolute="image", progress=False)
                     for pair in ((x, y), (x[order], y[order])))
    # float32 sums in another order
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6 * float(first.max()))


def test_an_iterator_of_batches_is_read_once(tiny_vit, images):
    model = tiny_vit("deit")
    batches = batches_for(model, images)
    assert torch.equal(token_scores(model, iter(batches), progress=False), token_scores(model, batches, progress=False))


def test_scores_are_plain_finite_positive_numbers_on_the_cpu(tiny_vit, family, images):
    model = tiny_vit(family)
    with torch.no_grad():       # a caller's no_grad does not switch the gradient off
        scores = token_scores(model, batches_for(model, images), progress=False)
    assert scores.device.type == "cpu" and not scores.requires_grad
    assert bool(torch.isfinite(scores).all()) and bool((scores >= 0).all()) and bool((scores > 0).any(dim=1).all())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_scores_do_not_depend_on_the_state_the_model_comes_in(tiny_vit, images, training, checkpointing):
    batches = batches_for(tiny_vit("deit"), images)
    expected = token_scores(tiny_vit("deit"), batches, progress=False)
    model = tiny_vit("deit", drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.3).train(training)
    model.set_grad_checkpointing(checkpointing)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    assert torch.equal(token_scores(model, batches, progress=False), expected)


# ---- A class for each pixel

def scenes_for(model, sizes=(3, 2)):
    """Batches of unequal size with masks, a fifth of their pixels ignored."""
    return [(scenes(count, model.img_size, i), masks(count, model.img_size, i)) for i, count in enumerate(sizes)]


@pytest.mark.parametrize("absolute", ["batch", "image"])
@pytest.mark.parametrize("family, decoder",
                         [("deit", "mask_transformer"), ("dinov2_reg", "linear"), ("mae", "mask_transformer"),
                          ("deit", "queries")])
def test_token_scores_of_a_segmenter_equal_the_sum_over_explicit_attention_maps(segmenter, family, decoder, absolute):  # noqa: F811
    model = segmenter(family, decoder)
    batches = scenes_for(model)
    expected = torch.tensor(scores_slowly(model, batches, absolute))
    scores = token_scores(model, batches, absolute=absolute, progress=False)
    assert scores.shape == (len(model.blocks), shape_of(model).num_patches)
    # As for classifiers, of the largest and of each block's largest.
    assert float((scores - expected).abs().max() / expected.abs().max()) < 1e-4
    assert float(((scores - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)).max()) < 1e-3
    assert bool((scores.amax(dim=1) > 0).all())                     # also in the last block, whose patches are all read


def test_pixels_that_are_ignored_have_no_part_in_token_scores():
    model = small()
    batches = scenes_for(model)
    other = [(x, torch.where(y == 255, y, (y + 1) % PIXEL_CLASSES)) for x, y in batches]
    first, second = (token_scores(model, given, progress=False) for given in (batches, other))
    assert float((first - second).abs().max()) > 0.01 * float(first.max())       # targets matter
    # seven images, two of which add nothing to the mean
    nothing = [*batches, (scenes(2), torch.full((2, 24, 40), 255))]
    torch.testing.assert_close(token_scores(model, nothing, progress=False) * 7 / 5, first, rtol=1e-6, atol=0)


def test_token_scores_of_a_segmenter_do_not_depend_on_the_batches_though_images_have_other_numbers_of_pixels_that_count(
    ):
    model = small().double()
    batches = [(x.double(), y) for x, y in scenes_for(model)]
    batches[0][1][0, :, 8:] = 255                                               # a fifth of the first image is left
    whole = [tuple(torch.cat(parts) for parts in zip(*batches))]
    alone = [(x[b:b + 1], y[b:b + 1]) for x, y in batches for b in range(len(x))]
    wanted = token_scores(model, whole, progress=False)
    for given in (batches, alone):
        assert float((token_scores(model, given, progress=False) / wanted - 1).abs().max()) < 1e-9     # float64


def test_class_attention_and_hsic_of_a_segmenter_are_their_definitions():
    model = small().double()
    batches = [(x.double(), y) for x, y in scenes_for(model, (3, 3, 2))]
    maps = explicit_maps(model, torch.cat([x for x, _ in batches]))
    got = token_scores(model, batches, criterion="class_attention", progress=False)
    assert float((got - maps.mean(dim=(1, 2))[:, 0, 1:]).abs().max()) < 1e-12      # float64
    entering: list[torch.Tensor] = []
    handles = [b.norm1.register_forward_pre_hook(lambda m, inputs: entering.append(inputs[0])) for b in model.blocks]
    expected = 0
    for x, _ in batches:
        entering.clear()
        with torch.no_grad():
            # all patches' probabilities of an image
            linear = oracle_linear(model.patch_logits(x).softmax(dim=1).reshape(len(x), -1))
        rows = [[oracle_hsic(oracle_gaussian(e[:, j]), linear) for j in range(1, e.shape[1])] for e in entering]
        # 8 images, 3 batches
        expected = expected + len(x) / 8 * ((8 / 3) / len(x))**2 * torch.tensor(rows, dtype=torch.float64)
    for handle in handles:
        handle.remove()
    got = token_scores(model, batches, criterion="hsic", progress=False)
    # as above
    assert got.shape == (2, 15) and float((got - expected).abs().max()) < 1e-9 * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("criterion", list(TOKEN_CRITERIA))
def test_scoring_leaves_a_segmenter_as_it_was(criterion):
    model = small().train()
    model.decoder.cls_emb.requires_grad_(False)
    before = state_of(model)
    first = token_scores(model, scenes_for(model), criterion=criterion, progress=False)
    assert state_of(model) == before
    # no dropout in it
    assert torch.equal(first, token_scores(small(), scenes_for(model), criterion=criterion, progress=False))


# ---- The other criteria, and attention maps for plots

def explicit_maps(model, x) -> torch.Tensor:
    """A (L, B, H, N, N) of the oracle."""
    maps: list[dict] = []
    for block in model.blocks:
        block.attn.forward = explicit_attention(block.attn, maps)
    model(x)
    for block in model.blocks:
        del block.attn.forward
    heads = model.blocks[0].attn.num_heads
    return torch.stack([torch.stack([torch.stack([m[b, h].detach() for h in range(heads)]) for b in range(len(x))])
                        for m in maps])


def test_class_attention_is_the_mean_over_images_and_heads_of_the_class_tokens_row(tiny_vit, family, images):
    model = tiny_vit(family).double()
    batches = [(x.double(), y) for x, y in batches_for(model, images)]
    # all images at once, though the batches differ in size
    maps = explicit_maps(model, torch.cat([x for x, _ in batches]))
    got = token_scores(model, batches, criterion="class_attention", progress=False)
    expected = maps.mean(dim=(1, 2))[:, 0, model.num_prefix_tokens:]
    assert got.shape == expected.shape and float((got - expected).abs().max()) < 1e-12      # float64


def test_hsic_of_a_patch_is_that_of_what_enters_the_block_there_averaged_over_all_images(tiny_vit, family, images):
    model = tiny_vit(family).double()
    batches = [(x.double(), y) for x, y in batches_for(model, images, (3, 3, 2))]
    entering: list[torch.Tensor] = []
    handles = [b.norm1.register_forward_pre_hook(lambda m, inputs: entering.append(inputs[0])) for b in model.blocks]
    expected = 0
    for x, _ in batches:
        entering.clear()
        with torch.no_grad():
            linear = oracle_linear(model(x).softmax(dim=1))
        rows = [[oracle_hsic(oracle_gaussian(e[:, j]), linear) for j in range(model.num_prefix_tokens, e.shape[1])]
                for e in entering]
        # 8 images, 3 batches
        expected = expected + len(x) / 8 * ((8 / 3) / len(x))**2 * torch.tensor(rows, dtype=torch.float64)
    for handle in handles:
        handle.remove()
    got = token_scores(model, iter(batches), criterion="hsic", progress=False)
    # float64, sums in another order
    assert got.shape == expected.shape and float((got - expected).abs().max()) < 1e-9


def test_an_image_that_is_missing_from_the_first_batch_leaves_all_others_in_hsic(tiny_vit, images):
    model = tiny_vit("deit").double()
    batches = [(x.double(), y) for x, y in batches_for(model, images, (7, 7, 7, 7))]
    one_missing = [(batches[0][0][1:], batches[0][1][1:]), *batches[1:]]
    settings = {"criterion": "hsic", "absolute": "image", "device": None, "progress": False}
    whole, (found, used) = token_scores(model, batches, criterion="hsic",
                                        progress=False), scored(model, one_missing, **settings)
    # one alone: none
    assert used == 27 and scored(model, [*batches, (batches[0][0][:1], batches[0][1][:1])], **settings)[1] == 28
    parts = [token_scores(model, [batch], criterion="hsic", progress=False) for batch in one_missing]
    wanted = sum(len(x) / 27 * (27 / 4 / len(x))**2 * part for part, (x, _) in zip(parts, one_missing))
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.max())
    assert float(F.cosine_similarity(found, whole, dim=1).min()) > 0.99             # the first batch alone: 0.9 or less


@pytest.mark.parametrize("criterion", list(TOKEN_CRITERIA))
def test_every_criterion_gives_the_same_again_and_leaves_the_model_as_it_was(tiny_vit, images, criterion):
    model = prepared(tiny_vit, images, training=True)
    before, batches = state_of(model), batches_for(model, images)
    first, again = (token_scores(model, batches, criterion=criterion, progress=False) for _ in range(2))
    assert torch.equal(first, again) and state_of(model) == before
    assert first.shape == (len(model.blocks), shape_of(model).num_patches) and not first.requires_grad


def test_a_model_without_a_class_token_has_no_class_attention_but_the_other_scores(tiny_vit, images):
    model = tiny_vit("augreg", class_token=False, global_pool="avg")
    batches = batches_for(model, images)
    with pytest.raises(InputError, match="class token"):
        token_scores(model, batches, criterion="class_attention", progress=False)
    for criterion in ("gradient", "hsic"):
        assert token_scores(model, batches, criterion=criterion,
                            progress=False).shape == (len(model.blocks), model.patch_embed.num_patches)


def test_an_unknown_criterion_is_refused_and_the_known_ones_listed(tiny_vit, images):
    model = tiny_vit("deit")
    with pytest.raises(InputError, match="'rollout'.*class_attention.*gradient.*hsic"):
        token_scores(model, batches_for(model, images), criterion="rollout", progress=False)


def test_attention_maps_have_rows_of_sum_one_and_give_back_the_attentions_output(tiny_vit, family, images):
    model = tiny_vit(family).double()
    x = images(model, 3).double()
    outputs, values, handles = [], [], []
    for block in model.blocks:
        handles += [block.attn.register_forward_hook(lambda m, i, out: outputs.append(out)),
                    block.attn.qkv.register_forward_hook(lambda m, i,
                                                         out: values.append(out[..., 2 * m.out_features // 3:]))]
    maps = attention_maps(model, x)
    for handle in handles:
        handle.remove()
    size = shape_of(model)
    assert maps.shape == (size.depth, 3, size.num_heads, size.num_tokens, size.num_tokens) and not maps.requires_grad
    assert float((maps.sum(dim=-1) - 1).abs().max()) < 1e-12
    for attention, value, output, block in zip(maps, values, outputs, model.blocks):
        heads = [attention[:, h] @ value[..., h * size.head_dim:(h + 1) * size.head_dim] for h in range(size.num_heads)]
        with torch.no_grad():
            again = block.attn.proj(torch.cat(heads, dim=2))
        assert float((again - output).abs().max()) < 1e-11          # float64; outputs are of size 1 to 10


def test_distance_and_entropy_of_a_heads_attention_are_those_of_slow_loops(tiny_vit, images):
    model = tiny_vit("deit", depth=2).double()
    batches = [(x.double(), y) for x, y in batches_for(model, images, (2, 1))]
    shape, prefix = shape_of(model), model.num_prefix_tokens
    found = attention_spans(model, iter(batches), progress=False)
    maps = explicit_maps(model, torch.cat([x for x, _ in batches]))             # (L, 3, H, N, N)
    side, (rows, columns) = shape.patch_size[0], shape.grid_size
    for block in range(shape.depth):
        for head in range(shape.num_heads):
            far, wide = 0.0, 0.0
            for b in range(3):
                for i in range(shape.num_tokens):
                    shares = maps[block, b, head, i].tolist()
                    wide -= sum(share * math.log(share) for share in shares) / (3 * shape.num_tokens)
                    if i >= prefix:
                        y, x = divmod(i - prefix, columns)
                        steps = [side * math.hypot(y - j // columns, x - j % columns) for j in range(rows * columns)]
                        of_patches = shares[prefix:]
                        far += sum(map(operator.mul, of_patches, steps)) / sum(of_patches) / (3 * rows * columns)
            assert [float(each[block, head]) for each in found] == pytest.approx([far, wide], rel=1e-9)    # float64


def test_attention_maps_of_a_compressed_model_are_refused(tiny_vit, images):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.01
    model = compress(dense, prune_and_merge(scores, shape, rule="merge", keep_rate=0.5, prune_rate=0.1))
    with pytest.raises(InputError, match="already compressed"):
        attention_maps(model, images(model))
    with pytest.raises(InputError, match="already compressed"):
        attention_spans(model, batches_for(model, images), progress=False)


# ---- Nothing is left behind

def state_of(model):
    """Modes, flags, gradients and hooks of every part."""
    return ([(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
             for n, m in model.named_modules()],
            [(n, p.requires_grad, None if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters()])


def prepared(tiny_vit, images, training: bool):
    """A model with mixed flags and gradients from before."""
    model = tiny_vit("deit").train(training)
    model(images(model, 2, seed=9)).sum().backward()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_flags_gradients_mode_and_hooks_are_as_before_afterwards(tiny_vit, images, training):
    model = prepared(tiny_vit, images, training)
    before, weights = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    token_scores(model, batches_for(model, images), progress=False)
    assert state_of(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_flags_mode_and_hooks_are_as_before_after_an_error_in_the_middle(tiny_vit, images):
    model = prepared(tiny_vit, images, training=True)
    before = state_of(model)

    def broken():
        yield batches_for(model, images)[0]
        raise OSError("disk gone")
    with pytest.raises(OSError, match="disk gone"):
        token_scores(model, broken(), progress=False)
    assert state_of(model) == before


def test_parts_that_were_in_eval_mode_inside_a_training_model_still_are_afterwards(tiny_vit, images):
    model = tiny_vit("deit").train()
    model.blocks[1].eval()      # a frozen part, as in fine-tuning
    before = state_of(model)
    token_scores(model, batches_for(model, images), progress=False)
    assert state_of(model) == before


# ---- Nothing of size N x N is kept (fused attention on)

class SquareMaps(TorchDispatchMode):
    """Counts results of operations whose last two sizes are (N, N)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.found = n, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            self.found += isinstance(each, torch.Tensor) and tuple(each.shape[-2:]) == (self.n, self.n)
        return result


def square_maps_in_scoring(model, batches, criterion="gradient") -> tuple[int, int]:
    """(saved for the backward pass, made by any operation) while tokens are scored."""
    n, saved = shape_of(model).num_tokens, 0
    assert n not in (model.embed_dim, shape_of(model).num_neurons, shape_of(model).head_dim)    # no other axis is N

    def keep(tensor):
        nonlocal saved
        saved += tuple(tensor.shape[-2:]) == (n, n)
        return tensor
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        made = stack.enter_context(SquareMaps(n))
        token_scores(model, batches, criterion=criterion, progress=False)
    return saved, made.found


@pytest.mark.parametrize("criterion", list(TOKEN_CRITERIA))
def test_no_attention_map_is_made_or_kept_with_fused_attention(tiny_vit, family, images, criterion):
    model = tiny_vit(family)
    assert all(block.attn.fused_attn for block in model.blocks)
    assert square_maps_in_scoring(model, batches_for(model, images), criterion) == (0, 0)


def test_the_search_for_attention_maps_finds_those_of_plain_attention(tiny_vit, images):
    model = tiny_vit("deit")
    for block in model.blocks:
        block.attn.fused_attn = False
    saved, made = square_maps_in_scoring(model, batches_for(model, images, (2,)))
    assert saved >= len(model.blocks) and made >= len(model.blocks)


# ---- Refusals

def test_no_batch_is_refused_and_leaves_the_model_as_it_was(tiny_vit):
    model = tiny_vit("deit").train()
    before = state_of(model)
    with pytest.raises(InputError, match="no image"):
        token_scores(model, [], progress=False)
    assert state_of(model) == before


def test_an_unknown_absolute_is_refused_and_the_known_ones_listed(tiny_vit, images):
    model = tiny_vit("deit")
    with pytest.raises(InputError, match="batch.*image"):
        token_scores(model, batches_for(model, images), absolute="head", progress=False)


def test_a_family_that_is_not_supported_is_refused_by_name():
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, img_size=56, embed_dim=12,
                              depths=(1, 1), num_heads=(1, 2), num_classes=NUM_CLASSES)
    with pytest.raises(InputError, match="SwinTransformer"):
        token_scores(model, [(torch.zeros(1, 3, 56, 56), torch.tensor([0]))], progress=False)


def test_a_model_whose_tokens_are_merged_is_refused(tiny_vit, images):
    # Its blocks see merged tokens: a score of those is no score of patches.
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.01
    model = compress(dense, prune_and_merge(scores, shape, rule="merge", keep_rate=0.5, prune_rate=0.1))
    with pytest.raises(InputError):
        token_scores(model, batches_for(model, images), progress=False)


@pytest.mark.parametrize("targets", [torch.rand(2, 7), torch.ones(2, 7, dtype=torch.bool)], ids=["soft", "several"])
def test_targets_of_several_labels_an_image_are_refused(tiny_vit, images, targets):
    model = tiny_vit("deit")
    with pytest.raises(InputError, match="one class number an image"):
        token_scores(model, [(images(model), targets)], progress=False)
