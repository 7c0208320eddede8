"""What gives every patch the logits of the classes: a linear classifier, or a mask transformer with an embedding of
each class.

*Segmenter: Transformer for Semantic Segmentation* (Strudel, Garcia, Laptev and Schmid, ICCV 2021, arXiv 2105.05633,
section 3.2). B images, n patches, D dim of the encoder, K classes.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitlab.models.queries import QueryDecoder
from vitlab.runtime.files import InputError

NORM_EPS = 1e-5                                 # of the decoder's LayerNorms, as published; timm's own are 1e-6
INIT_STD = 0.02                                 # of linear layers and class embeddings at first
DROP = 0.1                                      # dropout in the decoder's blocks, as published


def _start(module: nn.Module) -> None:
    """Initial values of a decoder's linear layers."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)


def _norm(width: int, **kwargs: Any) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS, **kwargs)


class LinearDecoder(nn.Module):
    """A linear classifier of each patch (section 3.2): patches (B, n, D) -> logits (B, n, K). It has no heads: head_dim
    is not used."""

    def __init__(self, embed_dim: int, num_classes: int, head_dim: int = 64) -> None:
        super().__init__()
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(_start)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(patches)


class MaskTransformer(nn.Module):
    """Class embeddings go through blocks together with the patches; a patch's logits are its products with them
    (section 3.2).

        logits = LayerNorm_K(normalise(z_patches W_patches) normalise(z_classes W_classes)^T),   normalise(v) = v /
        ||v||_2

    patches (B, n, D) -> logits (B, n, K). Blocks are timm's; parameters have the published names, so that published
    files fit. head_dim: width of a head of the blocks, which must divide embed_dim; drop: dropout rate in the blocks,
    [0, 1).
    """

    def __init__(self, embed_dim: int, num_classes: int, head_dim: int = 64, *, depth: int = 2, drop: float = DROP,
                 drop_path: float = 0.0) -> None:
        super().__init__()
        if embed_dim % head_dim or depth < 1:
            raise InputError(f"a mask transformer of {depth} blocks, {embed_dim} wide, with heads of {head_dim}: at "
                             "least one block is needed, and a width that the heads divide")
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()      # also where it is built without memory
        self.num_classes = num_classes
        self.proj_dec = nn.Linear(embed_dim, embed_dim)
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, embed_dim // head_dim, qkv_bias=True, proj_drop=drop, attn_drop=drop, drop_path=rate,
                  norm_layer=_norm) for rate in rates)
        self.decoder_norm = _norm(embed_dim)
        self.proj_patch = nn.Parameter(torch.randn(embed_dim, embed_dim) * embed_dim ** -0.5)
        self.proj_classes = nn.Parameter(torch.randn(embed_dim, embed_dim) * embed_dim ** -0.5)
        self.mask_norm = _norm(num_classes)
        self.apply(_start)
        trunc_normal_(self.cls_emb, std=INIT_STD)

    def forward(self, patches: Tensor) -> Tensor:
        x = torch.cat([self.proj_dec(patches), self.cls_emb.expand(patches.shape[0], -1, -1)], dim=1)   # (B, n + K, D)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.decoder_norm(x).split((patches.shape[1], self.num_classes), dim=1)
        patches = F.normalize(patches @ self.proj_patch, dim=2)
        classes = F.normalize(classes @ self.proj_classes, dim=2)
        return self.mask_norm(patches @ classes.transpose(1, 2))

    def no_weight_decay(self) -> set[str]:
        return {"cls_emb"}


# a module that takes a model's width and K; by queries the encoder, too
DECODERS: dict[str, Callable[..., nn.Module]] = {"linear": LinearDecoder, "mask_transformer": MaskTransformer,
                                                 "queries": QueryDecoder}
