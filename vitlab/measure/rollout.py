"""Attention rollout through models whose tokens are cut, too.

*Quantifying Attention Flow in Transformers* (Abnar and Zuidema 2020, arXiv 2005.00928, section 3): with A the mean over
heads of a block's attention, its tokens are (A + I) / 2 of those that enter, and a model's are the product over blocks.
What a token rule does to tokens stands between, as it is done to the tokens themselves, so that the columns are the
patches of the image throughout.
"""
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.criteria.hsic import at_least_float32
from vitlab.measure.averaging import frozen_eval, hooks
from vitlab.measure.capture import seen_attention, token_places
from vitlab.models import check_supported
from vitlab.models.deploy import is_deployed
from vitlab.models.ends import pool_of, prefix_of, tokens_of
from vitlab.models.families import attention_input
from vitlab.models.match import MatchBlock
from vitlab.models.merge import TokenBlock
from vitlab.models.read_out import ReadOutBlock
from vitlab.models.select import SelectBlock
from vitlab.models.share import SharedUpdateBlock
from vitlab.plan import matching, tokens
from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.files import require


def _rows(x: Tensor) -> Tensor:
    """Non-negative rows that sum to 1; one of zeros stays."""
    return x / x.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _shared(block: SharedUpdateBlock, x: Tensor, attention: Tensor | None) -> Tensor:
    """y_j = own x_j + (1 - own) z_c + (A z)_c, z the means of regions: the block's own sum (methods C1) with A z for
    what it adds to z, its rows scaled to sum to 1. What is in no region stays."""
    prefix, patches = x[:, :block.num_prefix_tokens], x[:, block.num_prefix_tokens:]
    z = torch.cat([prefix, block.means(patches)], dim=1)                        # (B, P + C + 1, N), the last row 0
    mixed = torch.zeros_like(z) if attention is None else F.pad(attention @ z[:, :-1], (0, 0, 0, 1))
    own = 1 if block.own is None else block.own.to(x)

    def given(rows: Tensor) -> Tensor:
        return rows[:, block.num_prefix_tokens:].index_select(1, block.regions)
    stays = torch.cat([prefix, own * patches + (1 - own) * given(z)], dim=1)
    return _rows(stays + torch.cat([mixed[:, :block.num_prefix_tokens], given(mixed)], dim=1))


@torch.no_grad()
def rankings(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """{block: (B, N)}: by what each block that selects ranks its tokens, higher stays."""
    found: dict[int, Tensor] = {}

    def before(index: int, block: SelectBlock, inputs: tuple[Tensor, ...]) -> None:
        found[index] = block.attend(attention_input(block.block, inputs[0]))[1]
    handles = [block.register_forward_pre_hook(partial(before, index)) for index, block in enumerate(model.blocks)
               if isinstance(block, SelectBlock)]
    with hooks(handles), frozen_eval(model):
        if handles:
            model(images.to(next(model.parameters()).device))
    return found


@torch.no_grad()
def token_shares(model: nn.Module, images: Tensor) -> Tensor:
    """(B, K, N): what each of the K tokens that a model gives is made of, by rollout, of the N that enter its first
    block; rows sum to 1. Of matrices that are trained, the sizes of their entries count, each row's sum being 1.

    Raises InputError for a deployed model, whose tokens are folded across blocks, or a family that can't be handled.
    """
    require(not is_deployed(model), "the model is deployed, its matrices folded into its blocks; attention is rolled "
            "out of the training form (the run folder, not deployed/)")
    check_supported(model)
    prefix = prefix_of(model)
    images = images.to(next(model.parameters()).device)
    attention: list[Any] = [None] * len(model.blocks)                           # (B, Q, N_l) each, mean over heads
    ranks = rankings(model, images)
    merges = any(isinstance(block, MatchBlock) and block.rule.merged for block in model.blocks)
    places = token_places(model, images) if merges else {}
    with seen_attention(model, attention, lambda a: at_least_float32(a).mean(dim=1)), frozen_eval(model):
        model(images)
    count = tokens_of(model)
    # what queries that joined have a part in is left out
    attention = [each if each is None or each.shape[2] <= count else _rows(each[..., :count]) for each in attention]
    like = next(each for each in (*attention, images.float()) if each is not None)
    x = torch.eye(count).to(like).expand(len(images), -1, -1)                   # (B, N, N)
    own, went = None, torch.arange(count - prefix, device=x.device).expand(len(images), -1)
    for index, (block, mixed) in enumerate(zip(model.blocks, attention)):
        if isinstance(block, TokenBlock) and block.tokens is not None:          # the first of those that run by a rule
            held, aside = block.tokens, (1 - block.tokens.token_mask.to(x))[:, None] * x
            own = _rows(held.reconstruct_matrix.abs().to(x))
            x = _rows(held.merge_matrix.abs().to(x)) @ x
        if isinstance(block, SharedUpdateBlock):
            x = _shared(block, x, mixed)
            continue
        asking = x[:, :prefix] if isinstance(block, ReadOutBlock) else x
        x = asking if mixed is None else (asking + mixed @ x) / 2
        if isinstance(block, TokenBlock) and block.place + 1 == block.rule.span:
            x = _rows(own @ x + aside)
        elif isinstance(block, SelectBlock):
            x = tokens.select(x, ranks[index], block.rule.kept, prefix)
        elif index in places:
            now = places[index].to(x.device)
            onto, of = (F.one_hot(each).to(x) for each in (now, went))          # (B, n, tokens) after and before
            x, went = torch.cat([x[:, :prefix], _rows(onto.mT @ of) @ x[:, prefix:]], dim=1), now
            x = matching.give_back(x, went, prefix) if block.gives_back else x
    return x


def looked_at(model: nn.Module, images: Tensor) -> Tensor:
    """(B, n): what a model takes from each patch by rollout, its class token, or, where it pools others, the mean over
    its patches. On the CPU."""
    shares, prefix = token_shares(model, images), prefix_of(model)
    by_class = hasattr(model, "global_pool") and pool_of(model) == POOL_TOKEN
    return (shares[:, 0] if by_class else shares[:, prefix:].mean(dim=1))[:, prefix:].cpu()
