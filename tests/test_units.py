"""Scores of heads and neurons over a whole model, against slow forms written from methods B1 and B2 and the
definitions."""
import pytest
import torch
import torch.nn.functional as F
from segmenting_fixtures import small
from test_capture import NUM_CLASSES, batches_for, prepared, scenes_for, state_of
from test_compensation import error as least_squares_error
from test_hsic import min_max, oracle_gaussian, oracle_hsic, oracle_linear
from torch.utils._python_dispatch import TorchDispatchMode

from vitlab.criteria.compensation import reconstruction
from vitlab.criteria.moments import Moments
from vitlab.criteria.planning import prune_and_merge
from vitlab.criteria.units import UNIT_CRITERIA, UnitScores, heads_by_hsic, neurons_by_hsic
from vitlab.measure.capture import token_scores
from vitlab.measure.units import head_redundancy, unit_scores
from vitlab.models import compress, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.runtime.files import InputError

SAME = 1e-9             # float64: only the order of the sums differs, over 5 blocks
FLOAT32 = 1e-4          # the same in float32, relative to the largest score
READ_IMAGES = ("hsic", "activation", "taylor", "reconstruction", "fisher")
each_criterion = pytest.mark.parametrize("criterion", list(UNIT_CRITERIA))


def score(model, batches, criterion="hsic", **settings) -> UnitScores:
    return unit_scores(model, batches, criterion=criterion, progress=False, **settings)


def doubled(model, batches):
    """Model and images in float64."""
    return model.double(), [(images.double(), targets) for images, targets in batches]


def assert_same(got: UnitScores, expected: UnitScores, tolerance: float = SAME) -> None:
    for kind in ("heads", "neurons"):
        a, b = getattr(got, kind), getattr(expected, kind)
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), kind


def activations(model, images) -> tuple[list, list, torch.Tensor]:
    """([head outputs (B, N, H d)], [hidden units (B, N, M)], softmax output): read behind attn.norm and mlp.act."""
    heads, hidden, handles = [], [], []
    for block in model.blocks:
        handles += [block.attn.norm.register_forward_hook(lambda m, i, out: heads.append(out)),
                    block.mlp.act.register_forward_hook(lambda m, i, out: hidden.append(out))]
    with torch.no_grad():
        of_patches = hasattr(model, "decoder")                      # a Segmenter's output is every patch's
        probabilities = (model.patch_logits(images) if of_patches
                         else model(images)).softmax(dim=1).reshape(len(images), -1)
    for handle in handles:
        handle.remove()
    return heads, hidden, probabilities


def head_mean(outputs, h: int, d: int) -> torch.Tensor:
    """F_h (B, N): the mean of columns h d to (h + 1) d - 1."""
    return sum(outputs[:, :, h * d + i] for i in range(d)) / d


def hsic_slowly(model, images, r=0.1, a=0.9, shared=0.1) -> UnitScores:
    """Methods B2, one unit at a time."""
    heads, hidden, y = activations(model, images)
    linear, size = oracle_linear(y), shape_of(model)
    head_rows, neuron_rows = [], []
    for outputs, units in zip(heads, hidden):
        kernels = [oracle_gaussian(head_mean(outputs, h, size.head_dim)) for h in range(size.num_heads)]
        head_rows.append([oracle_hsic(k, linear) - shared * sum(oracle_hsic(k, o) for o in kernels
                                                                if o is not k) / (size.num_heads - 1)
                          for k in kernels])
        relevance = [oracle_hsic(oracle_gaussian(units[:, :, m]), linear) for m in range(size.num_neurons)]
        magnitude = [float(units[:, :, m].abs().sum()) for m in range(size.num_neurons)]
        neuron_rows.append([r * x + a * z for x, z in zip(min_max(relevance), min_max(magnitude))])
    return UnitScores(heads=torch.tensor(head_rows, dtype=torch.float64),
                      neurons=torch.tensor(neuron_rows, dtype=torch.float64), made_by={})


def activation_slowly(model, batches) -> UnitScores:
    """Mean of |x| of every head and neuron, over all images of all batches at once."""
    heads, hidden, _ = activations(model, torch.cat([images for images, _ in batches]))
    d = shape_of(model).head_dim
    return UnitScores(heads=torch.stack([torch.stack([part.abs().mean() for part in x.split(d, dim=2)])
                                         for x in heads]),
                      neurons=torch.stack([torch.stack([x[:, :, m].abs().mean() for m in range(x.shape[2])])
                                           for x in hidden]),
                      made_by={})


def taylor_slowly(model, batches) -> UnitScores:
    """Mean over images of |dLoss/dgate|, a gate of 1 on every head and neuron, one image at a time."""
    size, count = shape_of(model), 0
    total = [torch.zeros(size.depth, size.num_heads).double(), torch.zeros(size.depth, size.num_neurons).double()]
    for image, target in ((i, t) for images, targets in batches for i, t in zip(images, targets)):
        gates = [torch.ones_like(t).requires_grad_() for t in total]
        handles = []
        for index, block in enumerate(model.blocks):
            wide = gates[0][index].repeat_interleave(size.head_dim)
            handles += [block.attn.norm.register_forward_hook(lambda m, i, out, gate=wide: out * gate),
                        block.mlp.act.register_forward_hook(lambda m, i, out, gate=gates[1][index]: out * gate)]
        # pixels alone may be of that number
        loss = F.cross_entropy(model(image[None]), target[None], ignore_index=255)
        for one, gradient in zip(total, torch.autograd.grad(loss, gates)):
            one += gradient.abs()
        for handle in handles:
            handle.remove()
        count += 1
    return UnitScores(heads=total[0] / count, neurons=total[1] / count, made_by={})


def weight_slowly(model) -> UnitScores:
    """Square root of the sum of squares of all weights that read or write one unit, entry by entry of the state
    dict."""
    size, weights = shape_of(model), {name.removeprefix("encoder."): value for name,
                                      value in model.state_dict().items()}
    heads, neurons = torch.zeros(size.depth,
                                 size.num_heads).double(), torch.zeros(size.depth, size.num_neurons).double()
    width = size.num_heads * size.head_dim
    for index in range(size.depth):
        qkv, proj, fc1, fc2 = (weights[f"blocks.{index}.{name}.weight"]
                               for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
        for column in range(width):
            for row in (column, width + column, 2 * width + column):            # query, key, value
                heads[index, column // size.head_dim] += qkv[row].square().sum()
            heads[index, column // size.head_dim] += proj[:, column].square().sum()
        for m in range(size.num_neurons):
            neurons[index, m] = fc1[m].square().sum() + fc2[:, m].square().sum()
    return UnitScores(heads=heads.sqrt(), neurons=neurons.sqrt(), made_by={})


# ---- The criteria against their definitions

def test_hsic_scores_are_the_published_ones_in_every_family(tiny_vit, family, images):
    model, batches = doubled(tiny_vit(family), batches_for(tiny_vit(family), images, (3,)))
    assert_same(score(model, batches), hsic_slowly(model, batches[0][0]))


def test_hsic_weights_are_those_asked_for(tiny_vit, images):
    model, batches = doubled(tiny_vit("deit"), batches_for(tiny_vit("deit"), images, (3,)))
    got = score(model, batches, relevance_weight=0.7, magnitude_weight=0.2, redundancy_weight=0.5)
    assert_same(got, hsic_slowly(model, batches[0][0], 0.7, 0.2, 0.5))


def test_activation_taylor_and_weight_scores_are_their_definitions_in_every_family(tiny_vit, family, images):
    model, batches = doubled(tiny_vit(family), batches_for(tiny_vit(family), images, (3, 2)))
    assert_same(score(model, batches, "activation"), activation_slowly(model, batches))
    assert_same(score(model, batches, "taylor"), taylor_slowly(model, batches))
    assert_same(score(model, batches, "weight"), weight_slowly(model))


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer", "queries"])
def test_hsic_activation_and_weight_scores_of_a_segmenter_are_their_definitions(decoder):
    model, batches = doubled(small(decoder), scenes_for(small(), (3,)))
    assert_same(score(model, batches), hsic_slowly(model, batches[0][0]))
    assert_same(score(model, batches, "activation"), activation_slowly(model, batches))
    assert_same(score(model, batches, "weight"), weight_slowly(model))


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer", "queries"])
def test_taylor_scores_of_a_segmenter_are_of_each_images_own_mean_over_its_pixels(decoder):
    model, batches = doubled(small(decoder), scenes_for(small(), (1, 1, 1)))
    assert_same(score(model, batches, "taylor"), taylor_slowly(model, batches))


def test_taylor_scores_of_a_segmenter_do_not_depend_on_the_batches_though_images_have_other_numbers_of_pixels_that_count():  # noqa: E501
    model, batches = doubled(small(), scenes_for(small(), (3, 2)))
    batches[0][1][0, :, 8:] = 255                                               # a fifth of the first image is left
    batches[1][1][1] = 255                                                      # and nothing of the last
    assert_same(score(model, batches, "taylor"), taylor_slowly(model, batches))


def test_reconstruction_scores_of_a_segmenter_follow_from_its_own_activations():
    model, batches = small(), scenes_for(small(), (3, 2))
    found = score(model, batches, "reconstruction")
    heads, hidden, _ = activations(model, torch.cat([x for x, _ in batches]))
    for index, block in enumerate(model.blocks):
        rows, weight = heads[index].flatten(0, 1), block.attn.proj.weight.detach()
        missed = [least_squares_error(rows, weight, [v for v in range(3) if v != u], 8) for u in range(3)]
        # the first to go; float32 moments
        assert missed[int(found.heads[index].argmin())] <= min(missed) * (1 + 1e-3)
        rows, weight = hidden[index].flatten(0, 1), block.mlp.fc2.weight.detach()
        moments = Moments(rows.shape[1])
        moments.add(rows)
        again = reconstruction(weight, moments, 1)
        # Sums of batches in another order: a few of 96 neurons, nearly alike, change places.
        assert float(torch.corrcoef(torch.stack([again, found.neurons[index]]))[0, 1]) > 0.99
    assert found.made_by == {"criterion": "reconstruction", "images": "5"}


@each_criterion
def test_scoring_units_leaves_a_segmenter_as_it_was_and_has_no_dropout_in_it(criterion):
    model, batches = small().train(), scenes_for(small())
    before = state_of(model)
    got, expected = score(model, batches, criterion), score(small(), batches, criterion)
    assert state_of(model) == before and torch.equal(got.heads,
                                                     expected.heads) and torch.equal(got.neurons, expected.neurons)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_one_batch_gives_the_scores_of_the_tensors_whatever_the_chunk(tiny_vit, images, chunk):
    model = tiny_vit("deit")
    x, y = batches_for(model, images, (5,))[0]
    heads, hidden, probabilities = activations(model, x)
    d = shape_of(model).head_dim
    expected = UnitScores(heads=torch.stack([heads_by_hsic(t.unflatten(2, (-1, d)))(probabilities) for t in heads]),
                          neurons=torch.stack([neurons_by_hsic(t[..., None])(probabilities) for t in hidden]),
                          made_by={})
    assert_same(score(model, [(x, y)], chunk=chunk), expected, FLOAT32)


# ---- Several batches

@pytest.mark.parametrize("sizes", [(5, 5, 2), (4, 5, 5), (5, 1, 5)])
def test_hsic_is_averaged_over_all_images_though_a_batch_is_smaller(tiny_vit, images, sizes):
    model, batches = doubled(tiny_vit("deit"), batches_for(tiny_vit("deit"), images, sizes))
    # one image has no other
    got, batches = score(model, iter(batches)), [batch for batch in batches if len(batch[0]) > 1]
    parts, counts = [score(model, [batch]) for batch in batches], [len(x) for x, _ in batches]
    total, mean = sum(counts), sum(counts) / len(counts)
    assert_same(got, UnitScores(heads=sum(b / total * (mean / b)**2 * part.heads for b, part in zip(counts, parts)),
                                neurons=sum(b / total * part.neurons for b, part in zip(counts, parts)), made_by={}))
    assert got.made_by == {"criterion": "hsic", "relevance_weight": "0.1", "magnitude_weight": "0.9",
                           "redundancy_weight": "0.1", "images": str(total)}
    # the batches differ, so the mean says something
    assert float((parts[0].neurons - parts[1].neurons).abs().max()) > 0.01


@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_other_scores_do_not_depend_on_how_images_are_split_into_batches(tiny_vit, images, criterion):
    model, batches = doubled(tiny_vit("deit"), batches_for(tiny_vit("deit"), images, (3, 5, 1)))
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    assert_same(score(model, batches, criterion), score(model, whole, criterion))


def test_head_redundancy_is_hsic_between_heads_averaged_over_all_images(tiny_vit, images):
    model, batches = doubled(tiny_vit("deit"), batches_for(tiny_vit("deit"), images, (3, 3, 2)))
    size, expected = shape_of(model), 0
    for x, _ in batches:
        kernels = [[oracle_gaussian(head_mean(outputs, h, size.head_dim)) for h in range(size.num_heads)]
                   for outputs in activations(model, x)[0]]
        found = torch.tensor([[[oracle_hsic(a, b) for b in row] for a in row] for row in kernels]).double()
        expected = expected + len(x) / 8 * ((8 / 3) / len(x))**2 * found        # 8 images, 3 batches
    got = head_redundancy(model, batches, progress=False)
    assert float((got - expected).abs().max()) < 1e-6           # the oracle's list became float32 on the way
    assert torch.allclose(got, got.mT, atol=SAME)


# ---- Same input, same numbers; and nothing left behind

@each_criterion
def test_scores_are_the_same_again_on_the_cpu_and_one_row_a_block(tiny_vit, family, images, criterion):
    model = tiny_vit(family)
    size, batches = shape_of(model), batches_for(model, images)
    first, again = score(model, batches, criterion), score(model, batches, criterion)
    for kind, count in (("heads", size.num_heads), ("neurons", size.num_neurons)):
        given = getattr(first, kind)
        assert given.shape == (size.depth, count) and given.device.type == "cpu" and not given.requires_grad
        assert bool(torch.isfinite(given).all()) and bool((given.amax(dim=1) > given.amin(dim=1)).all())
        assert torch.equal(given, getattr(again, kind))


def test_random_scores_follow_the_seed(tiny_vit):
    model = tiny_vit("deit")
    first, again, other = (score(model, [], "random", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.neurons, again.neurons) and torch.equal(first.heads, again.heads)
    assert not torch.equal(first.neurons, other.neurons) and not torch.equal(first.heads, other.heads)
    assert len(first.heads.unique()) == first.heads.numel()         # blocks differ
    assert first.made_by == {"criterion": "random", "seed": "3"}


@each_criterion
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_do_not_depend_on_the_state_the_model_comes_in(tiny_vit, images, criterion, checkpointing):
    batches = batches_for(tiny_vit("deit"), images)
    expected = score(tiny_vit("deit"), batches, criterion)
    model = tiny_vit("deit", drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.3).train()
    model.set_grad_checkpointing(checkpointing)
    model.requires_grad_(False)
    got = score(model, batches, criterion)
    assert torch.equal(got.heads, expected.heads) and torch.equal(got.neurons, expected.neurons)


@each_criterion
def test_flags_gradients_mode_and_hooks_are_as_before_afterwards_and_after_an_error(tiny_vit, images, criterion):
    model = prepared(tiny_vit, images, training=True)
    before, batches = state_of(model), batches_for(model, images)
    score(model, batches, criterion)
    assert state_of(model) == before

    def broken():
        yield batches[0]
        raise OSError("disk gone")
    if criterion in READ_IMAGES:
        with pytest.raises(OSError, match="disk gone"):
            score(model, broken(), criterion)
    assert state_of(model) == before


class Largest(TorchDispatchMode):
    """The largest number of values in any new tensor (views of `source` aside)."""

    def __init__(self, source: torch.Tensor) -> None:
        super().__init__()
        self.source, self.values = source.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() != self.source:
                self.values = max(self.values, each.numel())
        return result


def test_hsic_makes_nothing_larger_than_a_chunk_of_units_or_all_kernels():
    images, tokens, units, chunk = 3, 101, 47, 2
    hidden = torch.randn(images, tokens, units, 1, generator=torch.Generator().manual_seed(0))
    with Largest(hidden) as made:
        neurons_by_hsic(hidden, chunk=chunk)
    assert made.values == max(chunk * images * tokens, units * images**2)       # the activations are 14,241 values


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_criterion
def test_scores_on_the_gpu_are_those_of_the_cpu(tiny_vit, images, criterion):
    batches = batches_for(tiny_vit("deit"), images)
    cpu, gpu = score(tiny_vit("deit"), batches, criterion), score(tiny_vit("deit"), batches, criterion, device="cuda")
    assert_same(gpu, cpu, 1e-3)                                     # float32 sums in another order, through 5 blocks


# ---- Refusals

def test_an_unknown_criterion_is_refused_and_the_known_ones_listed(tiny_vit):
    with pytest.raises(InputError, match="'l1'.*activation.*hsic.*random.*taylor.*weight"):
        score(tiny_vit("deit"), [], "l1")


@pytest.mark.parametrize("criterion", READ_IMAGES)
def test_no_image_is_refused(tiny_vit, criterion):
    with pytest.raises(InputError, match="no image"):
        score(tiny_vit("deit"), [], criterion)


def test_a_batch_of_one_image_has_no_dependence_and_is_refused(tiny_vit, images):
    model = tiny_vit("deit")
    with pytest.raises(InputError, match="batch of 1"):
        score(model, batches_for(model, images, (1, 1)))
    with pytest.raises(InputError, match="batch of 1"):
        token_scores(model, batches_for(model, images, (1, 1)), criterion="hsic", progress=False)
    with pytest.raises(InputError, match="batch of 1"):
        head_redundancy(model, batches_for(model, images, (1,)), progress=False)


def test_a_chunk_below_one_is_refused(tiny_vit, images):
    model = tiny_vit("deit")
    with pytest.raises(InputError, match="chunk is 0"):
        score(model, batches_for(model, images), chunk=0)


@each_criterion
def test_no_criterion_needs_a_classifier(tiny_vit, images, criterion):
    model = tiny_vit("deit", num_classes=0)
    found = score(model, batches_for(model, images), criterion)
    assert len(found.heads) == len(model.blocks) and found.neurons.isfinite().all()


@each_criterion
def test_a_compressed_model_is_refused(tiny_vit, images, criterion):
    dense = tiny_vit("deit")
    shape = shape_of(dense)
    scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.01
    merged = compress(dense, prune_and_merge(scores, shape, rule="merge", keep_rate=0.5, prune_rate=0.1))
    cut = compress(dense,
                   CompressionPlan(shape=shape, blocks=(BlockPlan(heads=(0, 2)), *(BlockPlan(),) * (shape.depth - 1))))
    for model in (merged, cut):
        with pytest.raises(InputError, match="already compressed"):
            score(model, batches_for(dense, images), criterion)
        with pytest.raises(InputError, match="already compressed"):
            head_redundancy(model, batches_for(dense, images), progress=False)


def test_scores_of_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"\(5, 3\).*\(4, 11\)"):
        UnitScores(heads=torch.zeros(5, 3), neurons=torch.zeros(4, 11), made_by={})


def test_classes_differ_from_every_batch_size_used_here():
    assert NUM_CLASSES not in (1, 2, 3, 5)
