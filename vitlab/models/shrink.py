"""Heads and neurons that really leave the weights of timm's own Attention and Mlp (methods B8), in place."""
from collections.abc import Sequence

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from vitlab.models.support import plain_linear
from vitlab.runtime.files import InputError


@torch.no_grad()
def _keep(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep some output rows or input columns of a Linear."""
    plain_linear(linear)
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight[rows].clone(), requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows].clone(), requires_grad=linear.bias.requires_grad)
        linear.out_features = len(rows)
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight[:, columns].clone(), requires_grad=linear.weight.requires_grad)
        linear.in_features = len(columns)


def keep_heads(attn: Attention, kept: Sequence[int]) -> None:
    """Shrink qkv (3 H d rows) and proj (H d columns) to the kept heads; q/k norms are per d and stay as they are."""
    if not isinstance(attn.norm, nn.Identity):
        raise InputError("heads of an attention with an output norm can't be cut: it mixes the heads")
    device = attn.qkv.weight.device
    width = (torch.tensor(kept, device=device)[:, None] * attn.head_dim
             + torch.arange(attn.head_dim, device=device)).flatten()             # (H' d)
    _keep(attn.qkv, rows=torch.cat([width + part * attn.attn_dim for part in range(3)]))
    _keep(attn.proj, columns=width)
    attn.num_heads, attn.attn_dim = len(kept), len(width)


def keep_neurons(mlp: Mlp, kept: Sequence[int]) -> None:
    """Shrink fc1 (M rows) and fc2 (M columns) to the kept neurons."""
    index = torch.tensor(kept, device=mlp.fc1.weight.device)
    _keep(mlp.fc1, rows=index)
    _keep(mlp.fc2, columns=index)
