"""compress(model, plan): a timm model with its heads, neurons and tokens cut as the plan says (methods A6, B8)."""
import copy

import torch
from torch import Tensor, nn

from vitlab import tokens
from vitlab.files import InputError
from vitlab.models.shrink import keep_heads, keep_neurons
from vitlab.models.support import shape_of
from vitlab.plan import CompressionPlan
from vitlab.rules import MergeReconstruct

TRAINABLE = ("all", "matrices", "weights")


class MergeReconstructTokens(nn.Module):
    """merge_matrix (C, N) and reconstruct_matrix (N, C), trained; token_mask (N), 0 where a token skips the block."""

    def __init__(self, rule: MergeReconstruct, num_prefix_tokens: int) -> None:
        super().__init__()
        merge = tokens.merge_matrix(rule, num_prefix_tokens, torch.float64)
        self.merge_matrix = nn.Parameter(merge.float(), requires_grad=rule.trains == "both")
        self.reconstruct_matrix = nn.Parameter(tokens.reconstruct_matrix(merge).float())
        self.register_buffer("token_mask", tokens.token_mask(rule, num_prefix_tokens).float())
        self.trains = rule.trains
        self.has_pruned = bool(rule.pruned)

    def forward(self, x: Tensor, block: nn.Module) -> Tensor:
        """x (B, N, D) -> (B, N, D):  reconstruct @ block(merge @ x) + (1 - token_mask) * x   (A6)."""
        y = torch.matmul(self.reconstruct_matrix, block(torch.matmul(self.merge_matrix, x)))
        if self.has_pruned:
            y = y + (1 - self.token_mask)[:, None] * x
        return y


TOKEN_MODULES = {MergeReconstruct.kind: MergeReconstructTokens}


class TokenBlock(nn.Module):
    """timm's Block between a token rule's taking in and giving back; all N tokens enter and leave."""

    def __init__(self, block: nn.Module, token_rule: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.tokens = token_rule

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise InputError("a block that merges tokens takes no attention mask")
        return self.tokens(x, self.block)


def _check_size(patch_embed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Regions are places on one grid, so an image of another size (or turned) is refused."""
    size = tuple(inputs[0].shape[-2:])
    if size != tuple(patch_embed.img_size):
        raise InputError(f"an image of {size[0]} x {size[1]} came in; the plan is for {patch_embed.img_size[0]} x "
                         f"{patch_embed.img_size[1]} (another size needs its own plan)")


def compress(model: nn.Module, plan: CompressionPlan) -> nn.Module:
    """A copy of `model`, compressed; still the same timm class. The plan that cuts nothing gives bit-equal logits.

    model: a dense timm VisionTransformer. Raises InputError where the family can't be handled, the model is already
    compressed, or the plan is for other sizes.
    """
    plan.check_fits(shape_of(model))
    model = copy.deepcopy(model)
    if any(cut.tokens is not None for cut in plan.blocks):
        model.patch_embed.register_forward_pre_hook(_check_size)
    for index, (block, cut) in enumerate(zip(model.blocks, plan.blocks)):
        try:
            if cut.heads is not None:
                keep_heads(block.attn, cut.heads)
            if cut.neurons is not None:
                keep_neurons(block.mlp, cut.neurons)
        except InputError as error:
            raise InputError(f"block {index}: {error}") from None
        if cut.tokens is not None:
            rule = TOKEN_MODULES[cut.tokens.kind](cut.tokens, model.num_prefix_tokens)
            rule.to(block.norm1.weight.device, block.norm1.weight.dtype)
            model.blocks[index] = TokenBlock(block, rule).train(block.training)
    return model


def set_trainable(model: nn.Module, what: str) -> None:
    """Which parameters train (A8): "all"; "matrices" alone (merge and reconstruct); "weights", all but the matrices.

    A merge matrix of rule `merge` never trains (A5), and token masks are buffers. Raises InputError for another word,
    or for "matrices" where the model has none.
    """
    if what not in TRAINABLE:
        raise InputError(f"trainable {what!r} is not known; known are {list(TRAINABLE)}")
    rules = [m for m in model.modules() if isinstance(m, MergeReconstructTokens)]
    if what == "matrices" and not rules:
        raise InputError("the model has no merge and reconstruct matrices to train")
    for parameter in model.parameters():
        parameter.requires_grad_(what != "matrices")
    for rule in rules:
        rule.merge_matrix.requires_grad_(what != "weights" and rule.trains == "both")
        rule.reconstruct_matrix.requires_grad_(what != "weights")
