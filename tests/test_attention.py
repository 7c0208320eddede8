"""Attention whose heads share keys and values, against loops written from its formula."""
import math

import pytest
import registry
import torch
from conftest import randomise
from torch import nn

from vitlab.models.attention import KeyedAttention, OwnAttention, PrefixAttention, attention_as
from vitlab.models.families import also_taken
from vitlab.models.match import size_mask

PREFIX = 3                                      # tokens that ask alone
CLOSE = 1e-12                                   # relative, of float64 sums in another order


def made(name: str, **args) -> nn.Module:
    """A small model of timm's, float64, whose second block is looked at here."""
    model = registry.tiny(name, "cpu", **args)
    randomise(model, 0)
    return model.double().requires_grad_(False)


def rows_of(model: nn.Module) -> torch.Tensor:
    """What comes in, of two images, (2, N, D)."""
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return torch.randn(2, tokens, model.embed_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((given - wanted).abs().max() < CLOSE * wanted.abs().max())


def linear(layer: nn.Linear, rows: slice, x: torch.Tensor) -> list[torch.Tensor]:
    """Some of a layer's outputs for each of the rows x (N, D)."""
    return [layer.weight[rows] @ row + (0 if layer.bias is None else layer.bias[rows]) for row in x]


def normed(vector: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return vector / (sum(v * v for v in vector) / len(vector) + norm.eps).sqrt() * norm.weight


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


def check_kinds(attn: nn.Module, x: torch.Tensor, fused: bool, slowly, **also) -> None:
    """timm's own and every kind of ours give what the loops do, of tokens that stand for one patch, or for several."""
    several = torch.randint(1, 6, x.shape[:2], generator=torch.Generator().manual_seed(2))
    for sizes in (torch.ones(x.shape[:2]), several):
        out, row, keys = (torch.stack(part) for part in zip(*(slowly(attn, each, size.tolist(), **also)
                                                              for each, size in zip(x, sizes))))
        mask = None if bool((sizes == 1).all()) else size_mask(sizes.double(), torch.float64)
        taken = {"attn_mask": mask, **also}
        attn.fused_attn = fused
        assert close(attn(x, **taken), out)
        assert close(attention_as(OwnAttention, attn)(x, **taken), out)
        given, own_row, own_keys = attention_as(KeyedAttention, attn)(x, **taken)
        assert close(given, out) and close(own_row, row) and close(own_keys, keys)
        prefix = attention_as(PrefixAttention, attn, num_prefix_tokens=attn.num_prefix_tokens if also else PREFIX)
        given = prefix(x, **taken)
        assert close(given, out[:, :given.shape[1]]) and 0 < given.shape[1] < out.shape[1]


@pytest.mark.parametrize("fused", [True, False])
def test_heads_that_share_keys_and_values_are_those_of_loops(fused):
    model = made("vit_large_patch16_sapiens2")
    attn = model.blocks[1].attn
    assert attn.num_kv_heads < attn.num_heads and model.blocks[0].attn.num_kv_heads == attn.num_heads
    check_kinds(attn, rows_of(model), fused, shared_slowly, **also_taken(model)[1])
