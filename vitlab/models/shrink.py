"""Heads and neurons that really leave the weights of timm's own attention and MLP (methods B8), in place."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitlab.models.attention import OwnAttention, TokenAttention, attention_as
from vitlab.models.families import HEADS_COUNTED, POST_NORM, head_vectors, kind_of, making_layers, mixing_layer
from vitlab.models.left_out import LeftOut
from vitlab.models.support import plain_linear
from vitlab.plan.shape import columns


def _kept(parameter: Tensor, dim: int, index: Tensor) -> Tensor:
    found = parameter.detach().index_select(dim, index).clone()
    return nn.Parameter(found, requires_grad=parameter.requires_grad) if isinstance(parameter, nn.Parameter) else found


def _keep_rows(linear: nn.Linear, units: Tensor, widths: Sequence[int]) -> None:
    """Keep the output rows of some units, in each of the parts that a Linear stacks."""
    count = plain_linear(linear).out_features // sum(widths)
    rows = torch.cat([columns(units, width) + count * sum(widths[:part]) for part, width in enumerate(widths)])
    linear.weight = _kept(linear.weight, 0, rows)
    if linear.bias is not None:
        linear.bias = _kept(linear.bias, 0, rows)
    linear.out_features = len(rows)


def keep_units(block: nn.Module, kind: str, kept: Sequence[int], nothing: bool = False) -> None:
    """Shrink a block to some of its heads or neurons: the rows that make them and the columns that mix them; q/k norms
    are per d and stay as they are. To none of them: the sublayer leaves the block, with its norm where that comes
    first; nothing: without a constant in its place."""
    mixing, width = mixing_layer(block, kind)
    if not len(kept):
        name, number = ("attn", 1) if kind == "heads" else ("mlp", 2)
        setattr(block, name, LeftOut(plain_linear(mixing), width, nothing))
        if not isinstance(block, POST_NORM):
            setattr(block, f"norm{number}", nn.Identity())
        return
    units = torch.tensor(kept, device=plain_linear(mixing).weight.device)
    index = columns(units, width)                                                   # (U' width)
    for linear, widths in making_layers(block, kind):
        _keep_rows(linear, units, widths)
    mixing.weight, mixing.in_features = _kept(mixing.weight, 1, index), len(index)
    if kind == "heads":
        _count_heads(block, units, index)


def _count_heads(block: nn.Module, heads: Tensor, index: Tensor) -> None:
    """What an attention itself knows of its heads: how many there are, their biases, and, where its model has
    something for each head, which of the model's they are."""
    attn = block.attn
    for name, dim in head_vectors(attn).items():
        whole = getattr(attn, name)
        setattr(attn, name, _kept(whole, dim, columns(heads, whole.shape[dim] // attn.num_heads)))
    for name, count in (("num_heads", len(heads)), ("num_kv_heads", len(heads)), ("attn_dim", len(index)),
                        ("kv_dim", len(index))):
        if hasattr(attn, name):
            setattr(attn, name, count)
    before = getattr(attn, "kept_heads", None)
    if kind_of(attn, HEADS_COUNTED):
        if not isinstance(attn, TokenAttention):
            attn = block.attn = attention_as(OwnAttention, attn)
        attn.register_buffer("kept_heads", heads if before is None else before[heads], persistent=False)
