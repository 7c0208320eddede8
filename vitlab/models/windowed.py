"""Attention within windows of the grid, as timm's SAM has it: what goes through it, in the order of the patches.

*Segment Anything* (arXiv 2304.02643), with the blocks of *Exploring Plain Vision Transformer Backbones for Object
Detection* (arXiv 2203.16527): a stream (B, h, w, D), cut into windows of s x s, padded at the right and bottom, or, in
some blocks, attended to as a whole. B images, n = h w patches.
"""
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer_sam import Block, VisionTransformerSAM, window_partition, window_unpartition
from torch import Tensor, nn

from vitlab.runtime.files import require


def side_of(block: nn.Module | None) -> int:
    """Of the windows that a block's attention is within; 0: it is over all tokens."""
    return block.window_size if isinstance(block, Block) else 0


def by_image(block: nn.Module | None, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What is inside the attention of a block, (B windows, s s, ...) -> (B, n, ...), without what pads the windows; as
    it is where there are none."""
    side = side_of(block)
    if not side:
        return x
    padded = tuple(-(-length // side) * side for length in grid)
    found = window_unpartition(x.flatten(2).contiguous(), side, grid, padded)           # (B, h, w, ...)
    return found.flatten(1, 2).unflatten(2, x.shape[2:])


def by_window(block: nn.Module | None, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The way back from `by_image`, with zeros where windows are padded: (B, n, ...) -> (B windows, s s, ...)."""
    side = side_of(block)
    if not side:
        return x
    return window_partition(x.flatten(2).unflatten(1, grid), side)[0].flatten(1, 2).unflatten(2, x.shape[2:])


def attended(block: Block, x: Tensor) -> Tensor:
    """The stream (B, h, w, D) after a block's attention."""
    given = block.norm1(x)
    if side_of(block):
        given, padded = window_partition(given, block.window_size)
    given = block.drop_path1(block.ls1(block.attn(given)))
    return x + (window_unpartition(given, block.window_size, x.shape[1:3], padded) if side_of(block) else given)


def embedded(model: VisionTransformerSAM, images: Tensor) -> Tensor:
    """What goes into the first block (B, h, w, D)."""
    x = model.patch_embed(images)
    if model.pos_embed is not None:
        x = x + resample_abs_pos_embed_nhwc(model.pos_embed, x.shape[1:3])
    return model.norm_pre(model.patch_drop(model.pos_drop(x)))


def check_seen(block: nn.Module) -> None:
    """InputError where no token sees all others, so that there is no map of attention."""
    require(not isinstance(block, Block), "attention of this model is within windows of the "
            "grid, and has no map over all tokens")
