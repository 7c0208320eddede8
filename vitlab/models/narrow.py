"""Queries and keys of fewer widths than a head's values, in closed form.

A head needs the products q . k alone, and these the product of two weights alone: the best product of less rank is that
of a singular value decomposition, weighed by what goes in (reduced-rank regression: Izenman, *J. Multivariate Analysis*
5, 1975). D dim, H heads of width d, queries and keys of w now and of r < w then.
"""
import torch
from torch import Tensor, nn

from vitlab.models.attention import OwnAttention, TokenAttention, attention_as
from vitlab.models.families import POST_NORM, query_width
from vitlab.models.support import plain_linear

RIDGE = 1e-6                    # of the mean variance: what no input reaches can be divided by


def reduced_rank(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P and K, (..., w, r) each, of the second moments of queries, Q = E[q q^T], and the covariance of keys, C, (...,
    w, w) each, that make

        min E |q^T (k - E k) - (P^T q)^T K^T (k - E k)|^2,   q and k independent
        U s V^T = Q^1/2 C^1/2,   P K^T = Q^-1/2 U_r U_r^T Q^1/2

    K with orthonormal columns, so that keys are about as alike as they were. The mean of the keys is left out: what it
    adds is the same in all logits of a query, and the softmax takes it away.
    """
    values, vectors = torch.linalg.eigh(queries)
    least = RIDGE * values.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale = (values.clamp(min=0) + least).sqrt()[..., None, :]
    root, inverse = (vectors * scale) @ vectors.mT, (vectors / scale) @ vectors.mT
    values, vectors = torch.linalg.eigh(keys)
    left = torch.linalg.svd(root @ (vectors * values.clamp(min=0).sqrt()[..., None, :]))[0][..., :rank]
    columns, triangle = torch.linalg.qr(root @ left)
    return inverse @ left @ triangle.mT, columns


def _by_norm(block: nn.Module, dim: int) -> tuple[Tensor, Tensor]:
    """Mean (D) and covariance (D, D) of what goes into the attention, as far as weights say: each channel by itself, as
    the norm before it leaves it; 0 and 1 where none comes before."""
    norm = None if isinstance(block, POST_NORM) else block.norm1
    bias, weight = (getattr(norm, name, None) for name in ("bias", "weight"))
    like = torch.zeros(dim, dtype=torch.float64, device=next(block.parameters()).device)
    scale = like + 1 if weight is None else weight.double()
    return like if bias is None else bias.double(), scale.square().diag()


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """A parameter or buffer in place of another, of its dtype."""
    before = getattr(module, name)
    value = value.to(before.dtype)
    setattr(module, name, nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value)


@torch.no_grad()
def narrow_queries(block: nn.Module, width: int, moments: tuple[Tensor, Tensor] | None = None) -> None:
    """Shrink the queries and keys of every head of a block to `width`, in place. moments: mean (D) and covariance (D,
    D) of the attention's inputs; None: what its norm alone says of them."""
    attn, now = block.attn, query_width(block.attn)
    stacked = attn.qkv is not None
    layers = [plain_linear(getattr(attn, name)) for name in (("qkv",) if stacked else ("q_proj", "k_proj"))]
    weight = torch.cat([layer.weight for layer in layers]).double()             # (H w + H w (+ H d), D)
    sizes = (attn.num_heads * now,) * 2
    rest = weight[sum(sizes):]
    if getattr(attn, "q_bias", None) is not None:
        biases = [attn.q_bias, attn.k_bias]
    else:
        biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    bias = torch.cat([each.to(weight) for each in biases])
    mean, covariance = (m.to(weight) for m in moments or _by_norm(block, weight.shape[1]))
    made = [(w.unflatten(0, (-1, now)), b.unflatten(0, (-1, now))) for w, b in zip(      # (H, w, D), (H, w)
        weight[:sum(sizes)].split(sizes), bias[:sum(sizes)].split(sizes))]
    queries, keys = (w @ covariance @ w.mT for w, _ in made)                    # (H, w, w)
    average = made[0][0] @ mean + made[0][1]
    turns = reduced_rank(queries + average[:, :, None] * average[:, None], keys, width)
    weights = [(turn.mT @ w).flatten(0, 1) for turn, (w, _) in zip(turns, made)]           # (H r, D) each
    biases = [(turn.mT @ b[:, :, None]).flatten() for turn, (_, b) in zip(turns, made)]
    if stacked:
        weights, rows = [torch.cat([*weights, rest])], [torch.cat([*biases, bias[sum(sizes):]])]
    else:
        rows = biases
    for layer, w, b in zip(layers, weights, rows):
        _set(layer, "weight", w)
        layer.out_features = len(w)
        if layer.bias is not None:
            _set(layer, "bias", b)
    if getattr(attn, "q_bias", None) is not None:
        for name, b in zip(("q_bias", "k_bias"), biases):
            _set(attn, name, b)
    attn.qk_width = width
    if not isinstance(attn, TokenAttention):
        block.attn = attention_as(OwnAttention, attn)
