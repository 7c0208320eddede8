"""deploy(model): the folded form of Prune and Merge, exact and faster (methods A7).

Between two blocks the reconstruct of one and the merge of the next are multiplied once, beforehand; the map of all N
tokens is built at most once, at the end, and not at all for a class-token classifier. Inside a span nothing stands
between blocks.
"""
import copy

import torch
from torch import Tensor, nn

from vitlab.models.fold import Fold, FoldedBlock
from vitlab.models.merge import TokenBlock
from vitlab.models.support import attention_block, check_supported, encoder_of
from vitlab.plan import tokens
from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.files import InputError


def _taken_in(block: nn.Module, eye: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(merge, carried indices, whether all tokens are taken in as they are) of a block that is not inside a span, in
    float64."""
    if isinstance(block, TokenBlock):
        skipping = torch.tensor(block.tokens.skipping, dtype=torch.long, device=eye.device)
        return block.tokens.merge_matrix.detach().double(), skipping, False
    return eye, torch.empty(0, dtype=torch.long, device=eye.device), True


def deploy(model: nn.Module) -> nn.Module:
    """A copy of a compressed model in its folded form, in eval mode: the same logits (float32: 1e-4), fewer MACs.

    Shapes are static. With class-token pooling only the prefix tokens are reconstructed at the end, and
    forward_features returns those alone (all tokens where the last block merges none); with any other pooling the whole
    grid is. A model without merge and reconstruct matrices comes back as it is. The folded matrices no longer train. Of
    a Segmenter the encoder is deployed; its decoder needs the whole grid, which is rebuilt once, before it. Raises
    InputError for a family that can't be handled.
    """
    check_supported(model)
    if encoder_of(model) is not model:
        return model.with_encoder(deploy(model.encoder)).eval()
    if any(isinstance(b, FoldedBlock) for b in model.blocks):
        raise InputError("the model is already deployed")
    model = copy.deepcopy(model).eval()
    if not any(isinstance(b, TokenBlock) for b in model.blocks):
        return model
    weight = attention_block(model.blocks[0]).norm1.weight
    eye = torch.eye(model.num_prefix_tokens + model.patch_embed.num_patches, dtype=torch.float64, device=weight.device)
    none = torch.empty(0, dtype=torch.long, device=weight.device)
    give, carried, plain = eye, none, True
    folded: list[nn.Module] = []
    for block in model.blocks:
        matrix = None
        # another goes on with what the one before left
        if not isinstance(block, TokenBlock) or block.tokens is not None:
            merge, skipping, identity = _taken_in(block, eye)
            if not (plain and identity):
                matrix = tokens.fold(give, carried, merge, skipping).to(weight.dtype)
            give = eye if identity else block.tokens.reconstruct_matrix.detach().double()
        inner = attention_block(block) if isinstance(block, TokenBlock) else block
        folded.append(FoldedBlock(inner, matrix, len(merge), len(skipping)))
        carried, plain = skipping, identity
    if not plain:
        wanted = eye[:model.num_prefix_tokens] if model.global_pool == POOL_TOKEN else eye
        folded.append(Fold(tokens.fold(give, carried, wanted, none).to(weight.dtype)))
    model.blocks = nn.Sequential(*folded)
    return model.requires_grad_(False)
