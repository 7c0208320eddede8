"""Cut heads and neurons, and refit what is left so that every block's output stays: closed form, no labels, no training."""
import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from vitlab import parallel, tokens
from vitlab.criteria.compensation import RIDGE, Moments, refit
from vitlab.files import InputError
from vitlab.models import attention_block, compress
from vitlab.models.held import Merged
from vitlab.models.shrink import keep_heads, keep_neurons
from vitlab.models.support import plain_linear
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.rules import Match, Select, SharedUpdate, TokenRule
from vitlab.training.averaging import hooks
from vitlab.training.evaluate import autocast

KINDS = ("heads", "neurons")
STREAM, PREFIX_WEIGHT = 0.5, 1.0           # of `compensate`; on DeiT-tiny with 39 % of the neurons cut: docs/off_the_shelf.md
SMALL_GAMMA = 1e-3                          # of the largest: channels whose LayerScale is less keep their own target


def mixing_layer(block: nn.Module, kind: str) -> tuple[nn.Linear, int]:
    """(the linear that mixes the heads or neurons of timm's Block, how many inputs a unit has)."""
    return (block.attn.proj, block.attn.head_dim) if kind == "heads" else (block.mlp.fc2, 1)


class _Reached(Exception):
    """The layer whose inputs are wanted has seen them; what follows need not be computed."""


@torch.inference_mode()
def gather_moments(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], layers: Sequence[tuple[int, str]], *,
                   device: str | torch.device | None = None, amp: bool | None = False) -> dict[tuple[int, str], Moments]:
    """Moments of the inputs of some layers, (block, "heads" or "neurons") each, over all tokens of all images, in one pass that
    ends where the last of them is reached. Under torchrun each process gives its share of the batches."""
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
    with hooks(handles):
        for images, _ in batches:
            with contextlib.suppress(_Reached), autocast(device, amp):
                model(images.to(device))
    for moments in found.values():
        moments.rows = float(parallel.total(torch.tensor(float(moments.rows), dtype=torch.float64)))
        moments.sum, moments.products = parallel.total(moments.sum), parallel.total(moments.products)
    return found


def dense_rows(rule: TokenRule | None, dense: Tensor, rows: int, merged: Merged | None = None) -> Tensor | None:
    """The dense model's stream (B, N, D) as a block of this rule should see it in its `rows` tokens: (B, rows, D); None where
    its tokens are not those of the dense model. merged: what matching has made of them so far."""
    if merged is not None and merged.sizes.shape[1] == rows:
        prefix = dense.shape[1] - merged.places.shape[1]
        sums = dense.new_zeros(len(dense), rows - prefix, dense.shape[2]).scatter_add(
            1, merged.places[:, :, None].expand(-1, -1, dense.shape[2]), dense[:, prefix:])
        return torch.cat([dense[:, :prefix], sums / merged.sizes[:, prefix:, None]], dim=1)     # means of the patches merged
    if isinstance(rule, SharedUpdate):
        prefix = dense.shape[1] - len(rule.regions)
        return torch.matmul(tokens.merge_matrix(rule, prefix).to(dense), dense)                 # the regions' weighted means
    whole = rule is None or isinstance(rule, (Select, Match))                   # their attention comes before what they do
    return dense if whole and dense.shape[1] == rows else None


def _lacks(scale: nn.Module, rule: TokenRule | None, stream: Tensor, given: Tensor, dense: Tensor, prefix: int,
           merged: Merged | None) -> Tensor:
    """What the layer's output `given` (B, rows, D) lacks to bring its block's stream (before the addition) to the dense
    model's (B, N, D): (d - x) / gamma - given; 0 in rows that are not the dense model's, or where LayerScale lets nothing through."""
    wanted = dense_rows(rule, dense, given.shape[1], merged)
    wanted = dense[:, :prefix] if wanted is None else wanted                    # prefix tokens come first, whatever the rule
    gamma = getattr(scale, "gamma", torch.ones(1, device=given.device))
    through = gamma.abs() > SMALL_GAMMA * gamma.abs().max()
    lacks = ((wanted - stream[:, :wanted.shape[1]]) / torch.where(through, gamma, 1) - given[:, :wanted.shape[1]]) * through
    return F.pad(lacks, (0, 0, 0, given.shape[1] - lacks.shape[1]))


@torch.inference_mode()
def gather_towards(dense: nn.Module, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], layer: tuple[int, str],
                   rule: TokenRule | None, *, stream: float, prefix_weight: float, amp: bool | None = False) -> Moments:
    """Moments of one layer's inputs in `model`, with `stream` times what its output lacks of the dense model's stream; prefix
    tokens count prefix_weight times. Both models run as far as that layer."""
    wrapped, original, device = model.blocks[layer[0]], dense.blocks[layer[0]], next(model.parameters()).device
    block = attention_block(wrapped)
    linear, heads, seen = mixing_layer(block, layer[1])[0], layer[1] == "heads", {}
    found = Moments(linear.in_features, device, linear.out_features)

    def dense_stream(module: nn.Module, inputs: tuple[Tensor], output: Tensor | None = None) -> None:
        seen["dense"] = inputs[0] if output is None else output
        raise _Reached

    def own_stream(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen["own"] = inputs[0]

    def entering(module: nn.Module, inputs: tuple[Tensor | Merged]) -> None:
        seen["merged"] = inputs[0] if isinstance(inputs[0], Merged) else None

    def leaving(module: nn.Module, inputs: tuple[Tensor | Merged], output: Tensor | Merged) -> None:
        seen["merged"] = output if isinstance(output, Merged) else None
        raise _Reached

    def reached(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["inputs"], seen["output"] = inputs[0], output
        if heads:
            raise _Reached
    handles = [original.norm2.register_forward_pre_hook(dense_stream) if heads else original.register_forward_hook(dense_stream),
               (block.norm1 if heads else block.norm2).register_forward_pre_hook(own_stream), linear.register_forward_hook(reached),
               wrapped.register_forward_pre_hook(entering) if heads else wrapped.register_forward_hook(leaving)]
    with hooks(handles):
        for images, _ in batches:
            for net in (dense, model) if stream else (model,):
                with contextlib.suppress(_Reached), autocast(device, amp):
                    net(images.to(device))
            output = seen["output"]
            lacks = None if not stream else stream * _lacks(block.ls1 if heads else block.ls2, rule, seen["own"], output, seen["dense"],
                                                            model.num_prefix_tokens, seen["merged"])
            weights = output.new_ones(output.shape[:2], dtype=torch.float32)
            weights[:, :model.num_prefix_tokens] = prefix_weight
            found.add(seen["inputs"], lacks, weights)
    return found


def _layers(plan: CompressionPlan, follow: bool) -> list[tuple[int, str]]:
    """(block, "heads" or "neurons") of the layers that lose units, and, with follow, of every proj after the first of them."""
    cut = [(index, kind) for index, block in enumerate(plan.blocks) for kind in KINDS if getattr(block, kind) is not None]
    return sorted({*cut, *((index, "heads") for index in range(len(plan.blocks)) if follow and cut and (index, "heads") > cut[0])})


def compensate(dense: nn.Module, plan: CompressionPlan, batches: Iterable[tuple[Tensor, Tensor]], *, ridge: float = RIDGE,
               stream: float = STREAM, prefix_weight: float = PREFIX_WEIGHT, moments: dict[tuple[int, str], Moments] | None = None,
               device: str | torch.device | None = None, amp: bool | None = False, progress: bool = True) -> nn.Module:
    """compress(dense, plan) with proj and fc2 refitted in every block that loses heads or neurons (criteria.compensation.refit).

    Block after block, attention before MLP: a layer's inputs are those of the model with everything before it already cut and
    refitted, tokens included. Its target is (1 - stream) times what it gave on these inputs before its own cut, plus stream
    times what would bring its block's stream to the dense model's on the same image and token, so that errors are made good
    instead of piling up; where a token rule leaves no such token (`dense_rows`), the layer's own output alone. With stream > 0
    every proj after the first cut is refitted too, for that reason. Rows of prefix tokens weigh prefix_weight, others 1. ridge
    draws the weights to what they were. stream = 0 with prefix_weight = 1 is plain reconstruction of each layer's own output.

    batches are gone through once per refitted layer, as far as that layer; memory is that of the moments. With `moments` of the
    dense model (`gather_moments`) batches are not read, and stream and prefix_weight say nothing: quicker, and a little worse. A
    plan that cuts no head and no neuron gives compress(dense, plan). Raises InputError as compress does, or without images.
    """
    device = torch.device(device) if device is not None else next(dense.parameters()).device
    merging = dataclasses.replace(plan, blocks=tuple(BlockPlan(tokens=block.tokens) for block in plan.blocks))
    model = compress(dense, merging).to(device).eval()
    dense = dense if moments else copy.deepcopy(dense).to(device).eval()
    todo, rules = _layers(plan, follow=not moments and stream > 0), [rule for rule, _ in plan.rules()]
    for index, kind in tqdm(todo, desc="compensate", unit="layer", disable=not progress):
        block, cut = attention_block(model.blocks[index]), plan.blocks[index]
        linear, width = mixing_layer(block, kind)
        kept = getattr(cut, kind)
        if linear.bias is None:
            raise InputError(f"block {index}: its {'proj' if kind == 'heads' else 'fc2'} has no bias, which compensation needs")
        known = moments[index, kind] if moments else gather_towards(dense, model, batches, (index, kind), rules[index], stream=stream,
                                                                    prefix_weight=prefix_weight, amp=amp)
        stay = torch.arange(linear.in_features // width) if kept is None else torch.tensor(kept)
        try:
            weight, gained = refit(plain_linear(linear).weight.detach(), known, stay.to(device), width, ridge)
        except InputError as error:
            raise InputError(f"block {index}: {error}") from None
        if kind == "heads" and kept is not None:
            keep_heads(block.attn, kept)
        elif kept is not None:
            keep_neurons(block.mlp, kept)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.add_(gained)
    return model
