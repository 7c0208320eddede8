"""Segmenter on timm's vision transformers: an encoder, dense or compressed, and a decoder that gives every pixel a class.

*Segmenter: Transformer for Semantic Segmentation* (Strudel, Garcia, Laptev and Schmid, ICCV 2021, arXiv 2105.05633, section 3).
B images, n patches in raster order on a grid of h x w, P prefix tokens, D dim of the encoder, K classes.
"""
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitlab.files import InputError
from vitlab.models.create import architecture, create_model, rebuild
from vitlab.models.deploy import Fold
from vitlab.models.support import attention_block, check_supported

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
    """A linear classifier of each patch (section 3.2): patches (B, n, D) -> logits (B, n, K). It has no heads: head_dim is not used."""

    def __init__(self, embed_dim: int, num_classes: int, head_dim: int = 64) -> None:
        super().__init__()
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(_start)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(patches)


class MaskTransformer(nn.Module):
    """Class embeddings go through blocks together with the patches; a patch's logits are its products with them (section 3.2).

        logits = LayerNorm_K(normalise(z_patches W_patches) normalise(z_classes W_classes)^T),   normalise(v) = v / ||v||_2

    patches (B, n, D) -> logits (B, n, K). Blocks are timm's; parameters have the published names, so that published files fit.
    head_dim: width of a head of the blocks, which must divide embed_dim; drop: dropout rate in the blocks, [0, 1).
    """

    def __init__(self, embed_dim: int, num_classes: int, head_dim: int = 64, *, depth: int = 2, drop: float = DROP,
                 drop_path: float = 0.0) -> None:
        super().__init__()
        if embed_dim % head_dim or depth < 1:
            raise InputError(f"a mask transformer of {depth} blocks, {embed_dim} wide, with heads of {head_dim}: at least one block is "
                             "needed, and a width that the heads divide")
        rates = torch.linspace(0, drop_path, depth).tolist()
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
        x = torch.cat([self.proj_dec(patches), self.cls_emb.expand(len(patches), -1, -1)], dim=1)       # (B, n + K, D)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.decoder_norm(x).split((patches.shape[1], self.num_classes), dim=1)
        patches = F.normalize(patches @ self.proj_patch, dim=2)
        classes = F.normalize(classes @ self.proj_classes, dim=2)
        return self.mask_norm(patches @ classes.transpose(1, 2))

    def no_weight_decay(self) -> set[str]:
        return {"cls_emb"}


DECODERS: dict[str, Callable[..., nn.Module]] = {"linear": LinearDecoder, "mask_transformer": MaskTransformer}


def as_encoder(model: nn.Module) -> nn.Module:
    """A copy of a supported timm model, dense or compressed but not deployed, that gives out tokens: no classifier, no pooling.

    `deploy` then reconstructs the whole grid at the end, and `shape_of` and `cost` know that there is no classifier.
    Raises InputError for a family that can't be handled, and for a deployed model.
    """
    check_supported(model)
    model = copy.deepcopy(model)
    model.reset_classifier(0, "")
    model.global_pool = ""                      # a distilled DeiT's own reset leaves it
    return model


def create_encoder(name: str, *, img_size: int | tuple[int, int], weights: str | Path | None = None, pretrained: bool = False,
                   **args: Any) -> nn.Module:
    """`create_model` without classifier and pooling, for images of img_size (pixels, or height and width).

    A side that is no multiple of the patch is rounded up to one, as the images will be padded. timm resamples the position
    embeddings. num_classes (among args) must be that of the weights. Raises what create_model raises.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    with torch.device("meta"):                  # the patch's size alone, without memory
        patch = create_model(name, **args).patch_embed.patch_size
    return as_encoder(create_model(name, weights=weights, pretrained=pretrained, img_size=multiple(size, patch), **args))


def encoder_source(encoder: nn.Module) -> dict[str, Any]:
    """`architecture` of an encoder, from which `rebuild_encoder` builds the same dense one again, with random weights."""
    source = architecture(encoder)
    pool = {"global_pool": "token"} if hasattr(encoder, "dist_token") else {}   # timm builds a distilled DeiT with no other
    return {**source, "args": {**source["args"], **pool}}


def rebuild_encoder(source: dict[str, Any], most: int | None = None) -> nn.Module:
    """The dense encoder of an `encoder_source`; raises what `rebuild` raises."""
    return as_encoder(rebuild(source, most))


def multiple(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """The next multiples of the patch; heights and widths."""
    return -(-size[0] // patch[0]) * patch[0], -(-size[1] // patch[1]) * patch[1]


def pad(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros at the right and bottom, up to size (height, width): (B, C, H, W) -> (B, C, *size)."""
    return F.pad(images, (0, size[1] - images.shape[3], 0, size[0] - images.shape[2]))


class Segmenter(nn.Module):
    """Images (B, 3, H, W), normalised -> logits (B, K, H, W): padded to a multiple of the patch at the right and bottom, encoded,
    decoded patch by patch, upsampled bilinearly, cropped.

    encoder: a supported timm model in any form (dense, compressed, deployed), best made by `create_encoder` or `as_encoder`.
    decoder: a name in DECODERS; args are its own. num_classes: K, at least 2. Raises InputError for another decoder, argument or
    family, and in the forward for an image of a size that the encoder is not for, or an encoder that gives no whole grid.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, decoder: str = "mask_transformer", **args: Any) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise InputError(f"decoder {decoder!r} is not known; known are {sorted(DECODERS)}")
        if num_classes < 2:
            raise InputError(f"num_classes is {num_classes}; at least 2 are needed")
        if not any(isinstance(block, Fold) for block in getattr(encoder, "blocks", ())):        # of a deployed model, supported before
            check_supported(encoder)
        self.encoder, self.num_classes, self.decoder_name, self.decoder_args = encoder, num_classes, decoder, args
        args = {"head_dim": attention_block(encoder.blocks[0]).attn.head_dim, **args}
        try:
            self.decoder = DECODERS[decoder](encoder.embed_dim, num_classes, **args)
        except TypeError as error:
            raise InputError(f"decoder {decoder}: {error}") from None

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images that the encoder is for, multiples of the patch."""
        return tuple(self.encoder.patch_embed.img_size)

    def with_encoder(self, encoder: nn.Module) -> "Segmenter":
        """A copy with that encoder in place of its own (compressed, deployed) and the same decoder, weights too."""
        return copy.deepcopy(self, {id(self.encoder): encoder})

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The next multiples of the patch. Raises InputError where they are not the encoder's size, and it has but one."""
        size = multiple((height, width), self.encoder.patch_embed.patch_size)
        if size != self.img_size and self.encoder.patch_embed.strict_img_size:
            raise InputError(f"an image of {height} x {width} came in; the encoder is for {self.img_size[0]} x {self.img_size[1]}: "
                             "segment it by windows of that size, or create the encoder for this one")
        return size

    def patch_logits(self, images: Tensor) -> Tensor:
        """Logits of the patches: (B, 3, h p, w q), a multiple of the patch p x q -> (B, K, h, w)."""
        grid = tuple(side // p for side, p in zip(images.shape[2:], self.encoder.patch_embed.patch_size))
        prefix = self.encoder.num_prefix_tokens
        tokens = self.encoder.forward_features(images)                          # (B, P + n, D)
        if tokens.shape[1] != prefix + grid[0] * grid[1]:
            raise InputError(f"the encoder gives {tokens.shape[1]} tokens for {prefix} prefix tokens and a grid of {grid[0]} x {grid[1]}; "
                             "dense prediction needs the whole grid: a plan that neither selects nor reads out, and `as_encoder` before "
                             "`deploy`")
        patches = self.encoder.fc_norm(tokens[:, prefix:])                      # the final norm of models that pool by average
        return self.decoder(patches).transpose(1, 2).unflatten(2, grid)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        size = self.padded_size(height, width)
        logits = self.patch_logits(pad(images, size))
        return F.interpolate(logits, size=size, mode="bilinear")[:, :, :height, :width]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The encoder's blocks are computed again in the backward, for less memory."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers leave out of the weight decay, besides those of one dimension."""
        parts = {"encoder": self.encoder.no_weight_decay(), "decoder": getattr(self.decoder, "no_weight_decay", set)()}
        return {f"{part}.{name}" for part, names in parts.items() for name in names}
