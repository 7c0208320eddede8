"""Segmenter on timm's vision transformers: an encoder, dense or compressed, and a decoder that gives every pixel a
class.

*Segmenter: Transformer for Semantic Segmentation* (Strudel, Garcia, Laptev and Schmid, ICCV 2021, arXiv 2105.05633,
section 3). B images, n patches in raster order on a grid of h x w, P prefix tokens, D dim of the encoder, K classes.
"""
import copy
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.models.create import rebuild, set_norm_eps
from vitlab.models.decoders import DECODERS
from vitlab.models.deploy import Fold
from vitlab.models.ends import as_tokens, resize, without_end
from vitlab.models.families import mixing_layer
from vitlab.models.join import queries_in
from vitlab.models.queries import QueryDecoder
from vitlab.models.support import attention_block, check_supported, is_merged
from vitlab.models.tokens_cut import as_tokens_cut
from vitlab.models.unfilled import sizes_alone
from vitlab.plan.shape import is_int
from vitlab.runtime.files import InputError, require

LARGEST = 2**16                                 # of any size that a file may ask for
DEEPEST = 64                                    # blocks of a decoder that it may ask for; published ones have 2
SHOWN = ("blocks", "patch_embed", "cls_token", "num_prefix_tokens", "embed_dim", "in_chans", "pretrained_cfg")


def is_size(value: Any) -> bool:
    """Whether a file may ask for it."""
    return is_int(value) and 1 <= value <= LARGEST


def is_rate(value: Any) -> bool:
    """Whether it is a number in [0, 1)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def as_encoder(model: nn.Module) -> nn.Module:
    """A copy of a supported timm model, dense or compressed but not deployed, that gives out tokens: no classifier, no
    pooling.

    `deploy` then reconstructs the whole grid at the end, and `shape_of` and `cost` know that there is no classifier.
    Raises InputError for a family that can't be handled, and for a deployed model.
    """
    check_supported(model)
    model = copy.deepcopy(model)
    model.reset_classifier(0, "")
    model.global_pool = ""                      # a distilled DeiT's own reset leaves it
    return without_end(model)


def multiple(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """The next multiples of the patch; heights and widths."""
    return -(-size[0] // patch[0]) * patch[0], -(-size[1] // patch[1]) * patch[1]


def pad(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros at the right and bottom, up to size (height, width): (B, C, H, W) -> (B, C, *size)."""
    return F.pad(images, (0, size[1] - images.shape[3], 0, size[0] - images.shape[2]))


def segmenter_source(model: "Segmenter") -> dict[str, Any]:
    """What `rebuild_segmenter` needs beside the `architecture` of the encoder."""
    return {"num_classes": model.num_classes, "decoder": model.decoder_name, "args": model.decoder_args,
            "norm_eps": getattr(getattr(model.encoder, "norm", None), "eps", None)}


def rebuild_segmenter(encoder: Any, source: Any, most: int | None = None) -> "Segmenter":
    """The dense Segmenter of an encoder's `architecture` and a `segmenter_source`, with random weights. Raises
    InputError naming what is wrong, and, before memory is taken, where it would have more than `most` parameters."""
    numbers = {"head_dim": is_size, "queries": is_size, "depth": lambda v: is_size(v) and v <= DEEPEST, "drop": is_rate,
               "drop_path": is_rate}
    known = {"num_classes": lambda v: is_size(v) and v >= 2,
             "decoder": lambda v: isinstance(v, str) and v in DECODERS,
             "norm_eps": lambda v: v is None or is_rate(v) and v > 0,
             "args": lambda v: isinstance(v, dict) and all(k in numbers and numbers[k](n) for k, n in v.items())}
    for name, fits in known.items():
        if not isinstance(source, dict) or not fits(source.get(name)):
            given = reprlib.repr(source.get(name) if isinstance(source, dict) else source)
            raise InputError(f'"segmenter": {name} is {given}, which no Segmenter can be built from')

    def build() -> Segmenter:
        made = as_encoder(rebuild(encoder, most))
        if source["norm_eps"] is not None:
            set_norm_eps(made, source["norm_eps"])
        return Segmenter(made, source["num_classes"], source["decoder"], **source["args"])
    if most is not None:
        with sizes_alone():
            count = sum(p.numel() for p in build().parameters())
        if count > most:
            raise InputError(f"a Segmenter of {count:,} parameters; the weights beside it are those of {most:,} at "
                             f"most")
    return build().eval()


class Segmenter(nn.Module):
    """Images (B, 3, H, W), normalised -> logits (B, K, H, W): padded to a multiple of the patch at the right and
    bottom, encoded, decoded patch by patch, upsampled bilinearly, cropped.

    encoder: a supported timm model in any form (dense, compressed, deployed), best made by `as_encoder`. decoder: a
    name in DECODERS; args are its own; queries join the last blocks of a copy of a dense encoder. num_classes: K, at
    least 2. Raises InputError for another decoder, argument or family, for an encoder that queries have joined, and in
    the forward for an image of a size that the encoder is not for, or one that gives no whole grid.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, decoder: str = "mask_transformer", **args: Any) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise InputError(f"decoder {decoder!r} is not known; known are {sorted(DECODERS)}")
        if num_classes < 2:
            raise InputError(f"num_classes is {num_classes}; at least 2 are needed")
        # of a deployed model, supported before
        if not any(isinstance(block, Fold) for block in getattr(encoder, "blocks", ())):
            check_supported(encoder)
        require(not queries_in([*map(attention_block, encoder.blocks)])[1], "queries of another decoder have joined "
                "the encoder's tokens; the encoder that it was made from is needed")
        encoder = copy.deepcopy(encoder) if decoder == "queries" else encoder   # whose block they join
        self.encoder, self.num_classes, self.decoder_name, self.decoder_args = encoder, num_classes, decoder, args
        args = {"head_dim": mixing_layer(attention_block(encoder.blocks[0]), "heads")[1], **args,
                **({"encoder": encoder} if decoder == "queries" else {})}
        try:
            self.decoder = DECODERS[decoder](encoder.num_features, num_classes, **args)
        except TypeError as error:
            raise InputError(f"decoder {decoder}: {error}") from None
        if decoder == "queries":
            self.encoder = as_tokens_cut(encoder)

    def __getattr__(self, name: str) -> Any:
        """A Segmenter shows its encoder's parts (SHOWN) as its own: what reads or hooks them need not know the
        difference."""
        return getattr(self.encoder, name) if name in SHOWN else super().__getattr__(name)

    @property
    def decoder_depth(self) -> int:
        """Blocks of the decoder, or those of the encoder with queries."""
        of_queries = isinstance(self.decoder, QueryDecoder)
        return self.decoder.depth if of_queries else len(getattr(self.decoder, "blocks", ()))

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images that the encoder is for, multiples of the patch."""
        return tuple(self.encoder.patch_embed.img_size)

    def with_encoder(self, encoder: nn.Module) -> "Segmenter":
        """A copy with that encoder in place of its own (compressed, deployed) and the same decoder, weights too."""
        return copy.deepcopy(self, {id(self.encoder): encoder})

    def at_size(self, img_size: tuple[int, int]) -> "Segmenter":
        """A copy for images of another size (height, width), rounded up to a multiple of the patch; timm resamples the
        position embeddings. Raises InputError where tokens are cut by their place."""
        model = copy.deepcopy(self)
        if is_merged(model):
            raise InputError("tokens are cut for one size of images; take the dense model to another size, and "
                             "compress it there")
        resize(model.encoder, multiple(img_size, model.patch_embed.patch_size))
        return model

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The next multiples of the patch. Raises InputError where they are not the encoder's size, and it has but
        one."""
        size = multiple((height, width), self.encoder.patch_embed.patch_size)
        if size != self.img_size and self.encoder.patch_embed.strict_img_size:
            raise InputError(f"an image of {height} x {width} came in; the encoder is for {self.img_size[0]} x "
                             f"{self.img_size[1]}: "
                             "segment it by windows of that size, or create the encoder for this one")
        return size

    def patch_logits(self, images: Tensor) -> Tensor:
        """Logits of the patches: (B, 3, H, W), padded to a multiple of the patch p x q -> (B, K, ceil(H / p), ceil(W /
        q)); by queries of UPSCALED times as many cells along each side."""
        images = pad(images, self.padded_size(*images.shape[2:]))
        return self._decoded(self.encoder.forward_features(images), images.shape[2:])

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the patches of an image of that padded size."""
        height, width = (side // p for side, p in zip(size, self.encoder.patch_embed.patch_size))
        return height, width

    def _decoded(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens (B, P + n, D) of an image of that padded size -> logits of its patches (B, K, h, w)."""
        tokens, grid = as_tokens(tokens), self._grid(size)
        prefix, queries = getattr(self.encoder, "num_prefix_tokens", 0), getattr(self.decoder, "num_queries", 0)
        if tokens.shape[1] != prefix + grid[0] * grid[1] + queries:
            raise InputError(f"the encoder gives {tokens.shape[1] - queries} tokens for {prefix} prefix tokens and a "
                             f"grid of {grid[0]} x {grid[1]}; dense prediction needs the whole grid: a plan that "
                             "neither selects nor reads out, and `as_encoder` before `deploy`")
        # the final norm of models that pool by average
        patches = getattr(self.encoder, "fc_norm", nn.Identity())(tokens[:, prefix:])
        if queries:
            return self.decoder(patches, grid)
        return self.decoder(patches).transpose(1, 2).unflatten(2, grid)

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Logits of the patches (B, K, h, w) -> of the pixels of an image of that size (B, K, H, W), in float32 at
        least: losses are taken of them, under autocast too."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        padded = multiple(tuple(size), self.encoder.patch_embed.patch_size)
        return F.interpolate(logits, size=padded, mode="bilinear")[:, :, :size[0], :size[1]]

    def _answers(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What queries say (`QueryDecoder.answers`) as they enter each block that they are in, and at the end."""
        images, encoder, before = pad(images, self.padded_size(*images.shape[2:])), self.encoder, -self.decoder.depth
        depth, norms = len(encoder.blocks), (encoder.norm, getattr(encoder, "fc_norm", nn.Identity()))
        found = encoder.forward_intermediates(images, indices=list(range(depth + before - 1, depth)), output_fmt="NLC",
                                              intermediates_only=True)          # (B, n, D), then (B, n + Q, D)
        found[0] = encoder.blocks[before].join.after(found[0])
        return [self.decoder.answers(norms[1](norms[0](x)), self._grid(images.shape[2:])) for x in found]

    def forward(self, images: Tensor, answers: bool = False) -> Tensor | list[tuple[Tensor, Tensor]]:
        """answers: of a decoder by queries, what these say in each block in place of logits, to be trained by."""
        return self._answers(images) if answers else self.upsample(self.patch_logits(images), images.shape[2:])

    def forward_head(self, tokens: Tensor) -> Tensor:
        """What follows the encoder's last norm: tokens (B, P + n, D) of an image of its own size -> logits of the
        pixels."""
        return self.upsample(self._decoded(tokens, self.img_size), self.img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The encoder's blocks are computed again in the backward, for less memory."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers leave out of the weight decay, besides those of one dimension."""
        parts = {"encoder": self.encoder.no_weight_decay(), "decoder": getattr(self.decoder, "no_weight_decay", set)()}
        return {f"{part}.{name}" for part, names in parts.items() for name in names} | {
            name for name, _ in self.named_parameters() if name.endswith("join.queries")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters for timm's layer decay: the encoder's blocks, the last norm with the last of them, then
        the decoder, queries too."""
        return {"stem": r"^encoder\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre|dist_token)",
                "blocks": [(r"^encoder\.blocks\.(\d+)\.(?!join)", None), (r"^encoder\.(?:norm|fc_norm)\.", (99999,))]}
