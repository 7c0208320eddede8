"""deploy(model): the folded form of Prune and Merge, exact and faster (methods A7).

Between two blocks the reconstruct of one and the merge of the next are multiplied once, beforehand; the map of all N
tokens is built at most once, at the end, and not at all for a class-token classifier. Inside a span nothing stands between blocks.
"""
import copy

import torch
from torch import Tensor, nn

from vitlab import tokens
from vitlab.files import InputError
from vitlab.models.compress import refuse_intermediates
from vitlab.models.match import MatchBlock
from vitlab.models.merge import SpanBlock, SpanFirst, SpanLast, TokenBlock
from vitlab.models.support import attention_block, check_supported, encoder_of
from vitlab.shape import POOL_TOKEN


class Fold(nn.Module):
    """A fixed matrix (C', C) over the tokens: (B, C, D) -> (B, C', D)."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.matrix, x)


class FoldedBlock(nn.Module):
    """fold, then timm's Block on the first `num_tokens` rows; the rows after them skip it and are carried along."""

    def __init__(self, block: nn.Module, matrix: Tensor | None, num_tokens: int, num_carried: int) -> None:
        super().__init__()
        self.fold = nn.Identity() if matrix is None else Fold(matrix)
        self.block = block
        self.num_tokens, self.num_carried = num_tokens, num_carried

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise InputError("a deployed model takes no attention mask")
        x = self.fold(x)                                        # (B, C + p, D)
        if not self.num_carried:
            return self.block(x)
        merged, carried = x.split((self.num_tokens, self.num_carried), dim=1)
        return torch.cat([self.block(merged), carried], dim=1)


def _refuse_reset(*args: object, **kwargs: object) -> None:
    raise InputError("a deployed model is folded for its pooling; reset the classifier of the training form and deploy that")


def _taken_in(block: nn.Module, eye: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(merge, carried indices, whether all tokens are taken in as they are) of a block that is not inside a span, in float64."""
    if isinstance(block, (TokenBlock, SpanFirst)):
        return block.tokens.merge_matrix.detach().double(), (block.tokens.token_mask == 0).nonzero().flatten(), False
    return eye, torch.empty(0, dtype=torch.long, device=eye.device), True


def _given_back(block: nn.Module, eye: Tensor) -> Tensor:
    """The reconstruct matrix after a block, in float64; the identity where there is none."""
    return block.tokens.reconstruct_matrix.detach().double() if isinstance(block, (TokenBlock, SpanLast)) else eye


def deploy(model: nn.Module) -> nn.Module:
    """A copy of a compressed model in its folded form, in eval mode: the same logits (float32: 1e-4), fewer MACs.

    Shapes are static. With class-token pooling only the prefix tokens are reconstructed at the end, and forward_features
    returns those alone (all tokens where the last block merges none); with any other pooling the whole grid is.
    A model without merged tokens comes back as it is. The folded matrices no longer train, and the classifier can't be
    reset any more. Of a Segmenter the encoder is deployed; its decoder needs the whole grid, which is rebuilt once, before it.
    Raises InputError for a family that can't be handled.
    """
    check_supported(model)
    if encoder_of(model) is not model:
        return model.with_encoder(deploy(model.encoder)).eval()
    if any(isinstance(b, FoldedBlock) for b in model.blocks):
        raise InputError("the model is already deployed")
    model = copy.deepcopy(model).eval()
    if isinstance(model.blocks[-1], MatchBlock) and model.global_pool == POOL_TOKEN:
        model.blocks[-1].gives, model.forward_intermediates = "tokens", refuse_intermediates
    if not any(isinstance(b, (TokenBlock, SpanFirst)) for b in model.blocks):
        return model
    weight = attention_block(model.blocks[0]).norm1.weight
    eye = torch.eye(model.num_prefix_tokens + model.patch_embed.num_patches, dtype=torch.float64, device=weight.device)
    none = torch.empty(0, dtype=torch.long, device=weight.device)
    give, carried, plain = eye, none, True
    folded: list[nn.Module] = []
    for block in model.blocks:
        matrix = None
        if not isinstance(block, SpanBlock) or isinstance(block, SpanFirst):    # another goes on with what the one before left
            merge, skipping, identity = _taken_in(block, eye)
            if not (plain and identity):
                matrix = tokens.fold(give, carried, merge, skipping).to(weight.dtype)
        inner = attention_block(block) if isinstance(block, (TokenBlock, SpanBlock)) else block
        folded.append(FoldedBlock(inner, matrix, len(merge), len(skipping)))
        give, carried, plain = _given_back(block, eye), skipping, identity
    if not plain:
        wanted = eye[:model.num_prefix_tokens] if model.global_pool == POOL_TOKEN else eye
        folded.append(Fold(tokens.fold(give, carried, wanted, none).to(weight.dtype)))
    model.blocks = nn.Sequential(*folded)
    model.forward_intermediates, model.reset_classifier = refuse_intermediates, _refuse_reset
    return model.requires_grad_(False)
