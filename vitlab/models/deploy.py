"""deploy(model): the folded form of Prune and Merge, exact and faster (methods A7).

Between two blocks the reconstruct of one and the merge of the next are multiplied once, beforehand; the map of all N
tokens is built at most once, at the end, and not at all for a class-token classifier. Inside a span nothing stands
between blocks.
"""
import copy

import torch
from torch import Tensor, nn

from vitlab.models.ends import pool_of, prefix_of
from vitlab.models.families import rotates_by_head
from vitlab.models.held import turned, unmasked
from vitlab.models.merge import TokenBlock
from vitlab.models.support import attention_block, check_supported, encoder_of, replaced
from vitlab.plan import tokens
from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.files import require


class Fold(nn.Module):
    """A fixed matrix (C', C) over the tokens: (B, C, D) -> (B, C', D)."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                rope: Tensor | None = None) -> Tensor:
        return torch.matmul(self.matrix, unmasked(x, attn_mask, is_causal, "a deployed model"))


class FoldedBlock(nn.Module):
    """fold, then timm's Block on the first `num_tokens` rows; the rows after them skip it and are carried along."""

    def __init__(self, block: nn.Module, matrix: Tensor | None, num_tokens: int, num_carried: int,
                 rotation: nn.Module | None = None) -> None:
        super().__init__()
        self.fold = nn.Identity() if matrix is None else Fold(matrix)
        # the rest of the grid, after the last block: of a model whose rotations are counted by its blocks
        self.block, self.rotation, self.unfold = block, rotation, None
        self.num_tokens, self.num_carried = num_tokens, num_carried

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                rope: Tensor | None = None) -> Tensor:
        x = self.fold(unmasked(x, attn_mask, is_causal, "a deployed model"))            # (B, C + p, D)
        if not self.num_carried:
            x = self.block(x, **turned(rope, self.rotation))
        else:
            merged, carried = x.split((self.num_tokens, self.num_carried), dim=1)
            x = torch.cat([self.block(merged, **turned(rope, self.rotation)), carried], dim=1)
        return x if self.unfold is None else self.unfold(x)


def is_deployed(model: nn.Module) -> bool:
    """Whether its blocks are no longer those of the training form."""
    return any(isinstance(block, FoldedBlock) for block in getattr(model, "blocks", ()))


def deploy(model: nn.Module, *, at: str = "", inplace: bool = False) -> nn.Module:
    """A copy of a compressed model in its folded form, in eval mode: the same logits (float32: 1e-4), fewer MACs.

    inplace: the model itself is changed, where nobody else has it.

    Shapes are static. With class-token pooling only the prefix tokens are reconstructed at the end, and
    forward_features returns those alone (all tokens where the last block merges none); with any other pooling the whole
    grid is. A model without merge and reconstruct matrices comes back as it is. The folded matrices no longer train. Of
    a Segmenter the encoder is deployed, of any other module the vision transformer at a path of attributes; what uses
    its tokens needs the whole grid, which is rebuilt once, at the end. Raises InputError for a family that can't be
    handled.
    """
    if at:
        return replaced(model, at, lambda inner: _deployed(inner, whole=True)).eval()
    return _deployed(model, whole=False, inplace=inplace)


def _deployed(model: nn.Module, whole: bool, inplace: bool = False) -> nn.Module:
    """whole: the last block gives the whole grid, whatever the model pools."""
    check_supported(model)
    if encoder_of(model) is not model:
        return model.with_encoder(deploy(model.encoder)).eval()
    require(not any(isinstance(b, FoldedBlock) for b in model.blocks), "the model is already deployed")
    model = (model if inplace else copy.deepcopy(model)).eval()
    if not any(isinstance(b, TokenBlock) for b in model.blocks):
        return model
    weight = next(model.parameters())
    prefix = prefix_of(model)
    eye = torch.eye(prefix + model.patch_embed.num_patches, dtype=torch.float64, device=weight.device)
    none = torch.empty(0, dtype=torch.long, device=weight.device)
    give, carried, plain = eye, none, True
    folded: list[nn.Module] = []
    for block in model.blocks:
        matrix, merging = None, isinstance(block, TokenBlock)
        if not merging or block.tokens is not None:         # else it goes on with what the one before left
            merge = block.tokens.merge_matrix.detach().double() if merging else eye
            skipping = torch.tensor(block.tokens.skipping).to(none) if merging else none
            if merging or not plain:
                matrix = tokens.fold(give, carried, merge, skipping).to(weight.dtype)
            give = block.tokens.reconstruct_matrix.detach().double() if merging else eye
        folded.append(FoldedBlock(attention_block(block) if merging else block, matrix, len(merge), len(skipping),
                                  block.rotation if merging else None))
        carried, plain = skipping, not merging
    if not plain:
        wanted = eye[:prefix] if pool_of(model) == POOL_TOKEN and not whole else eye
        last = Fold(tokens.fold(give, carried, wanted, none).to(weight.dtype))
        if rotates_by_head(model):
            folded[-1].unfold = last
        else:
            folded.append(last)
    model.blocks = nn.Sequential(*folded) if isinstance(model.blocks, nn.Sequential) else nn.ModuleList(folded)
    return model.requires_grad_(False)
