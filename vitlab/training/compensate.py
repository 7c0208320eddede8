"""Cut heads and neurons, and refit what is left so that every block's output stays: closed form, no labels, no training."""
import contextlib
import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vitlab.criteria.compensation import RIDGE, Moments, refit
from vitlab.files import InputError
from vitlab.models import attention_block, compress
from vitlab.models.shrink import keep_heads, keep_neurons
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.training.evaluate import autocast

KINDS = ("heads", "neurons")


def mixing_layer(block: nn.Module, kind: str) -> tuple[nn.Linear, int]:
    """(the linear that mixes the heads or neurons of timm's Block, how many inputs a unit has)."""
    return (block.attn.proj, block.attn.head_dim) if kind == "heads" else (block.mlp.fc2, 1)


class _Reached(Exception):
    """The layer whose inputs are wanted has seen them; what follows need not be computed."""


@torch.inference_mode()
def gather_moments(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], layers: Sequence[tuple[int, str]], *,
                   device: str | torch.device | None = None, amp: bool | None = False) -> dict[tuple[int, str], Moments]:
    """Moments of the inputs of some layers, (block, "heads" or "neurons") each, over all tokens of all images, in one pass that
    ends where the last of them is reached."""
    device = torch.device(device) if device is not None else next(model.parameters()).device
    found, handles, last = {}, [], max(layers)

    def hook(layer: tuple[int, str]):
        def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
            found[layer].add(inputs[0])
            if layer == last:
                raise _Reached
        return before
    for layer in layers:
        linear = mixing_layer(attention_block(model.blocks[layer[0]]), layer[1])[0]
        found[layer] = Moments(linear.in_features, device)
        handles.append(linear.register_forward_pre_hook(hook(layer)))
    try:
        for images, _ in batches:
            with contextlib.suppress(_Reached), autocast(device, amp):
                model(images.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def compensate(dense: nn.Module, plan: CompressionPlan, batches: Iterable[tuple[Tensor, Tensor]], *, ridge: float = RIDGE,
               moments: dict[tuple[int, str], Moments] | None = None, device: str | torch.device | None = None,
               amp: bool | None = False, progress: bool = True) -> nn.Module:
    """compress(dense, plan) with proj and fc2 refitted in every block that loses heads or neurons (criteria.compensation.refit).

    Block after block, attention before MLP: a layer's inputs are those of the model with everything before it already cut and
    refitted, tokens included, and its target is what it gave on these inputs before its own cut; so errors do not pile up
    unseen. batches are gone through once per refitted layer, as far as that layer; memory is that of the moments. With
    `moments` of the dense model (`gather_moments`) batches are not read: quicker, and a little worse. A plan that cuts no head
    and no neuron gives compress(dense, plan). Raises InputError as compress does, or without images.
    """
    device = torch.device(device) if device is not None else next(dense.parameters()).device
    merging = dataclasses.replace(plan, blocks=tuple(BlockPlan(tokens=block.tokens) for block in plan.blocks))
    model = compress(dense, merging).to(device).eval()
    todo = [(index, kind) for index, block in enumerate(plan.blocks) for kind in KINDS if getattr(block, kind) is not None]
    for index, kind in tqdm(todo, desc="compensate", unit="layer", disable=not progress):
        block, kept = attention_block(model.blocks[index]), getattr(plan.blocks[index], kind)
        linear, width = mixing_layer(block, kind)
        if linear.bias is None:
            raise InputError(f"block {index}: its {'proj' if kind == 'heads' else 'fc2'} has no bias, which compensation needs")
        known = moments or gather_moments(model, batches, [(index, kind)], device=device, amp=amp)
        try:
            weight, gained = refit(linear.weight.detach(), known[index, kind], torch.tensor(kept, device=device), width, ridge)
        except InputError as error:
            raise InputError(f"block {index}: {error}") from None
        if kind == "heads":
            keep_heads(block.attn, kept)
        else:
            keep_neurons(block.mlp, kept)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.add_(gained)
    return model
