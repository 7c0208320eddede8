"""Attention whose heads share keys and values, or have two maps each, against loops written from its formula."""
import copy
import math

import pytest
import registry
import torch
import torch.nn.functional as F
from conftest import randomise
from test_families import check_cost
from torch import nn

from vitlab.measure.capture import token_scores
from vitlab.models import compress, shape_of
from vitlab.models.attention import KeyedAttention, OwnAttention, PrefixAttention, attention_as
from vitlab.models.families import also_taken
from vitlab.models.match import size_mask
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.models.select import SelectBlock
from vitlab.models.shrink import keep_units
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import ReadOut, Select
from vitlab.runtime.files import InputError

PREFIX = 3                                      # tokens that ask alone
CLOSE = 1e-12                                   # relative, of float64 sums in another order
CLOSE_MAPS = 1e-5                               # lambda is a float32, and a norm enlarges that


def made(name: str, **args) -> nn.Module:
    """A small model of timm's, float64, whose second block is looked at here."""
    model = registry.tiny(name, "cpu", **args)
    randomise(model, 0)
    return model.double().requires_grad_(False)


def rows_of(model: nn.Module) -> torch.Tensor:
    """What comes in, of two images, (2, N, D)."""
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return torch.randn(2, tokens, model.embed_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(given: torch.Tensor, wanted: torch.Tensor, within: float = CLOSE) -> bool:
    return bool((given - wanted).abs().max() < within * wanted.abs().max())


def linear(layer: nn.Linear, rows: slice, x: torch.Tensor) -> list[torch.Tensor]:
    """Some of a layer's outputs for each of the rows x (N, D)."""
    return [layer.weight[rows] @ row + (0 if layer.bias is None else layer.bias[rows]) for row in x]


def normed(vector: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """By the mean square, or by mean and variance; as it is where there is no norm."""
    if isinstance(norm, nn.Identity):
        return vector
    bias = getattr(norm, "bias", None)
    away = vector if bias is None else vector - sum(vector) / len(vector)
    away = away / (sum(v * v for v in away) / len(away) + norm.eps).sqrt() * norm.weight
    return away if bias is None else away + bias


def turned(vector: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """The pairs i and i + d / 2, as complex numbers times e^(i angle); rotation: sines, then cosines."""
    if rotation is None:
        return vector
    half, found = len(vector) // 2, vector.clone()
    sines, cosines = rotation[:len(vector)], rotation[len(vector):]
    for i in range(half):
        found[i] = vector[i] * cosines[i] - vector[i + half] * sines[i]
        found[i + half] = vector[i + half] * cosines[i] + vector[i] * sines[i]
    return found


def softmax_slowly(query: torch.Tensor, keys: list[torch.Tensor], sizes: list[float]) -> list[float]:
    """exp(q . k / sqrt(d) + log size), as shares of their sum."""
    parts = [size * math.exp(float(query @ key) / math.sqrt(len(query))) for key, size in zip(keys, sizes)]
    return [part / sum(parts) for part in parts]


def shared_slowly(attn: nn.Module, x: torch.Tensor, sizes: list[float], rope: torch.Tensor) -> tuple:
    """(output (N, D), the first token's row without sizes (N), keys (N, W) as they are before they are turned): query
    head h goes with head h // G of keys and values, G heads together."""
    d, together, prefix = attn.head_dim, attn.num_heads // attn.num_kv_heads, attn.num_prefix_tokens
    places = [None] * prefix + list(rope)
    places += [None] * (len(x) - len(places))           # of queries, which come after the patches
    mixed, row, compared = [[] for _ in x], [0.0] * len(x), [[] for _ in x]
    for head in range(attn.num_heads):
        own, theirs = (slice(h * d, (h + 1) * d) for h in (head, head // together))
        queries = [normed(q, attn.q_norm) for q in linear(attn.q_proj, own, x)]
        keys = [normed(k, attn.k_norm) for k in linear(attn.k_proj, theirs, x)]
        values = linear(attn.v_proj, theirs, x)
        if head % together == 0:
            compared = [[*before, key] for before, key in zip(compared, keys)]
        queries, keys = ([turned(v, place) for v, place in zip(part, places)] for part in (queries, keys))
        for i, query in enumerate(queries):
            mixed[i].append(sum(a * v for a, v in zip(softmax_slowly(query, keys, sizes), values)))
        row = [r + a / attn.num_heads for r, a in zip(row, softmax_slowly(queries[0], keys, [1.0] * len(x)))]
    out = torch.stack([attn.proj(torch.cat(parts)) for parts in mixed])
    return out, torch.tensor(row, dtype=x.dtype), torch.stack([torch.cat(parts) for parts in compared])


def map_slowly(attn: nn.Module, pairs: list[tuple], i: int, sizes: list[float]) -> list[float]:
    """softmax(q1 k1) - lambda softmax(q2 k2) of one token, lambda = exp(a . b) - exp(c . d) + its beginning."""
    by = (math.exp(sum(attn.lambda_q1 * attn.lambda_k1)) - math.exp(sum(attn.lambda_q2 * attn.lambda_k2))
          + attn.lambda_init)
    first, second = (softmax_slowly(queries[i], keys, sizes) for queries, keys in pairs)
    return [a - by * b for a, b in zip(first, second)]


def differential_slowly(attn: nn.Module, x: torch.Tensor, sizes: list[float], heads: tuple[int, ...] = ()) -> tuple:
    """As `shared_slowly`, of some heads (none: all), whose values are twice as wide as each of their two queries and
    keys; each head's output is normed, and taken times 1 - lambda's beginning. The row: what counts for a token is how
    much of either sign, as a share of all."""
    d, width, heads = attn.head_dim, attn.qkv.in_features, heads or tuple(range(attn.num_heads))
    mixed, row, compared = [[] for _ in x], [0.0] * len(x), [[] for _ in x]
    for head in range(attn.num_heads):
        places = [slice(part * width + (2 * head + half) * d, part * width + (2 * head + half + 1) * d)
                  for half in range(2) for part in range(2)]
        q1, k1, q2, k2 = (linear(attn.qkv, place, x) for place in places)
        (q1, q2), (k1, k2) = ([[normed(row, norm) for row in each] for each in pair]
                              for pair, norm in (((q1, q2), attn.q_norm), ((k1, k2), attn.k_norm)))
        values = linear(attn.qkv, slice(2 * (width + head * d), 2 * (width + (head + 1) * d)), x)
        if head not in heads:
            for parts in mixed:
                parts.append(torch.zeros(2 * d, dtype=x.dtype))
            continue
        for i in range(len(x)):
            seen = sum(a * v for a, v in zip(map_slowly(attn, [(q1, k1), (q2, k2)], i, sizes), values))
            mixed[i].append(normed(seen, attn.sub_norm) * (1 - attn.lambda_init))
        weights = [abs(a) for a in map_slowly(attn, [(q1, k1), (q2, k2)], 0, [1.0] * len(x))]
        row = [r + a / sum(weights) / len(heads) for r, a in zip(row, weights)]
        compared = [[*before, a, b] for before, a, b in zip(compared, k1, k2)]
    out = torch.stack([attn.proj(torch.cat(parts)) for parts in mixed])
    return out, torch.tensor(row, dtype=x.dtype), torch.stack([torch.cat(parts) for parts in compared])


def check_kinds(attn: nn.Module, x: torch.Tensor, fused: bool, slowly, within: float = CLOSE, **also) -> None:
    """timm's own and every kind of ours give what the loops do, of tokens that stand for one patch, or for several."""
    several = torch.randint(1, 6, x.shape[:2], generator=torch.Generator().manual_seed(2))
    for sizes in (torch.ones(x.shape[:2]), several):
        out, row, keys = (torch.stack(part) for part in zip(*(slowly(attn, each, size.tolist(), **also)
                                                              for each, size in zip(x, sizes))))
        mask = None if bool((sizes == 1).all()) else size_mask(sizes.double(), torch.float64)
        taken = {"attn_mask": mask, **also}
        attn.fused_attn = fused
        assert close(attn(x, **taken), out, within)
        assert close(attention_as(OwnAttention, attn)(x, **taken), out, within)
        given, own_row, own_keys = attention_as(KeyedAttention, attn)(x, **taken)
        assert close(given, out, within) and close(own_row, row, within) and close(own_keys, keys)
        prefix = attention_as(PrefixAttention, attn, num_prefix_tokens=attn.num_prefix_tokens if also else PREFIX)
        given = prefix(x, **taken)
        assert close(given, out[:, :given.shape[1]], within) and 0 < given.shape[1] < out.shape[1]


@pytest.mark.parametrize("fused", [True, False])
def test_heads_that_share_keys_and_values_are_those_of_loops(fused):
    model = made("vit_large_patch16_sapiens2")
    attn = model.blocks[1].attn
    assert attn.num_kv_heads < attn.num_heads and model.blocks[0].attn.num_kv_heads == attn.num_heads
    check_kinds(attn, rows_of(model), fused, shared_slowly, **also_taken(model)[1])


@pytest.mark.parametrize("fused", [True, False])
def test_queries_among_patches_that_are_turned_are_those_of_loops(fused):
    """In both blocks that they are in, which have other numbers of heads of keys."""
    model = Segmenter(as_encoder(made("vit_large_patch16_sapiens2")), 5, "queries", depth=2, queries=3).double()
    seen = {}
    for index, block in enumerate(model.blocks):
        block.attn.fused_attn = fused
        block.attn.register_forward_hook(lambda attn, given, out, index=index: seen.update({index: (given[0], out)}))
    with torch.no_grad():
        model(torch.randn(2, 3, *model.img_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        for index, also in list(enumerate(also_taken(model.encoder)))[1:]:
            for x, out in zip(*seen[index]):
                assert len(x) == model.num_prefix_tokens + model.patch_embed.num_patches + 3
                assert close(out, shared_slowly(model.blocks[index].attn, x, [1.0] * len(x), **also)[0])


DIFFERENTIAL = "vit_dwee_patch16_reg1_gap_256"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_heads_with_two_maps_are_those_of_loops(fused, qk_norm):
    model = made(DIFFERENTIAL, qk_norm=qk_norm)
    check_kinds(model.blocks[1].attn, rows_of(model), fused, differential_slowly, CLOSE_MAPS)


def test_the_loops_tell_the_maps_of_a_head_apart():
    model = made(DIFFERENTIAL)
    x, attn = rows_of(model), model.blocks[1].attn
    weights = attn.qkv.weight.unflatten(0, (3, 2, 2, -1))                       # parts, heads, of each head two
    attn.qkv.weight = nn.Parameter(torch.cat([weights[:2].flip(2), weights[2:]]).flatten(0, 3), requires_grad=False)
    swapped = attn(x)
    attn.qkv.weight = nn.Parameter(weights.flatten(0, 3), requires_grad=False)
    assert not torch.allclose(swapped, attn(x), rtol=1e-2)


@pytest.mark.parametrize("kind", [None, KeyedAttention])
def test_a_head_with_two_maps_leaves_with_both(kind):
    model = made(DIFFERENTIAL, num_heads=4)
    x, block = rows_of(model), model.blocks[1]
    wanted = torch.stack([differential_slowly(block.attn, each, [1.0] * len(each), heads=(1, 2))[0] for each in x])
    keep_units(block, "heads", (1, 2))
    assert block.attn.qkv.out_features == 3 * block.attn.proj.in_features == 3 * 24
    given = attention_as(kind, block.attn)(x)
    assert close(given if kind is None else given[0], wanted, CLOSE_MAPS)


@torch.no_grad()
@pytest.mark.parametrize("name, args", [(DIFFERENTIAL, {"qk_norm": True}), (DIFFERENTIAL, {}),
                                        ("eva_giant_patch14_clip_224", {})], ids=str)
def test_what_ranks_by_all_heads_ranks_as_the_attention_itself(name, args):
    model = made(name, **args)
    x = rows_of(model)
    kept, every = (SelectBlock(copy.deepcopy(model.blocks[1]), Select(kept=5, ranked_by=by), 1).attend(x)[1]
                   for by in ("kept", "all"))
    assert close(every, kept)


class Explicit(nn.Module):
    """An attention in a few products whose maps (B, H, N, N), before values, are kept for their gradients."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn, self.maps = attn, None

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        attn = self.attn
        if hasattr(attn, "sub_norm"):
            q, k, v = (part.unflatten(2, (2 * attn.num_heads, -1)).transpose(1, 2) for part in attn.qkv(x).chunk(3, -1))
            v = v.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)              # (B, H, N, 2 d)
            both = (q @ k.mT * attn.head_dim ** -0.5).softmax(dim=-1)
            self.maps = both[:, ::2] - attn._compute_lambda() * both[:, 1::2]
        else:
            of = [h // (attn.num_heads // attn.num_kv_heads) for h in range(attn.num_heads)]
            q, k, v = (layer(x).unflatten(2, (-1, attn.head_dim)).transpose(1, 2)
                       for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
            q, k = ((part * (part.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt() * norm.weight)
                    for part, norm in ((q, attn.q_norm), (k, attn.k_norm)))
            sines, cosines = (each[:, :attn.head_dim // 2] for each in rope.chunk(2, dim=-1))
            turn = torch.complex(cosines, sines)
            q, k = (torch.cat([part[:, :, :attn.num_prefix_tokens], self.turned(
                part[:, :, attn.num_prefix_tokens:], turn)], dim=2) for part in (q, k))
            k, v = k[:, of], v[:, of]
            self.maps = (q @ k.mT * attn.head_dim ** -0.5).softmax(dim=-1)
        if self.maps.requires_grad:
            self.maps.retain_grad()
        self.maps.requires_grad_()
        out = self.maps @ v
        if hasattr(attn, "sub_norm"):
            out = attn.sub_norm(out) * (1 - attn.lambda_init)
        return attn.proj(out.transpose(1, 2).flatten(2))

    @staticmethod
    def turned(part, turn):
        found = torch.complex(*part.chunk(2, dim=-1)) * turn
        return torch.cat([found.real, found.imag], dim=-1)


@pytest.mark.parametrize("name", ["vit_large_patch16_sapiens2", DIFFERENTIAL])
def test_token_scores_are_those_of_explicit_maps(name):
    model = made(name)
    x = torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.arange(3)
    scores = token_scores(model, [(x, y)], progress=False)
    for block in model.blocks:
        block.attn = Explicit(block.attn)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for found, block in zip(scores, model.blocks):
        maps = block.attn.maps
        each = (maps.grad * maps).sum(dim=(1, 2)).abs().mean(dim=0) / maps.shape[1] / maps.shape[2]       # (N)
        wanted = each[model.num_prefix_tokens:].detach()
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()         # scores are float32


@pytest.mark.parametrize("ranked_by", ["kept", "all"])
def test_macs_of_heads_with_two_maps_are_what_runs(ranked_by):
    model = made(DIFFERENTIAL, class_token=True, global_pool="token")
    shape, x = shape_of(model), torch.randn(1, 3, *model.patch_embed.img_size, dtype=torch.float64)
    plan = CompressionPlan(shape=shape, blocks=(
        BlockPlan(tokens=Select(kept=11, ranked_by=ranked_by)), BlockPlan(heads=(1,)), BlockPlan(tokens=ReadOut())))
    check_cost(compress(model, plan), plan, x)
    with pytest.raises(InputError, match="widths of this model can't be cut: each head has two queries and keys"):
        CompressionPlan(shape=shape, blocks=(BlockPlan(qk_width=5), BlockPlan(), BlockPlan()))
    pixels = Segmenter(as_encoder(model.float()), 5, "queries", depth=1, queries=7).eval()
    check_cost(pixels, CompressionPlan.empty(shape_of(pixels)), x.float())
