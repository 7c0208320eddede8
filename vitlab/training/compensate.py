"""Cut heads and neurons, and refit what is left so that every block's output stays: closed form, no labels, no
training."""
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.criteria.compensation import RIDGE, choose_ridge, refit
from vitlab.criteria.moments import Moments
from vitlab.measure.averaging import hooks
from vitlab.measure.evaluate import autocast
from vitlab.measure.moments import Fisher, Layer, layers_of
from vitlab.models import attention_block, compress
from vitlab.models.ends import prefix_of
from vitlab.models.families import POST_NORM, also_taken, embedded, entered_layer, layer_scale, mixing_layer
from vitlab.models.held import Held, Merged
from vitlab.models.narrow import narrow_queries
from vitlab.models.parallel_blocks import ParallelBlock
from vitlab.models.shrink import keep_units
from vitlab.models.support import check_runs_in_parts, encoder_of, plain_linear
from vitlab.models.windowed import by_image
from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.rules import Match, ReadOut, Select, SharedUpdate, TokenRule
from vitlab.plan.shape import columns
from vitlab.runtime.files import named

FOLDS = 4                                   # of the images, by which the strength of a refit is chosen
SMALL_GAMMA = 1e-3                          # of the largest: channels whose LayerScale is less keep their own target


def dense_rows(rule: TokenRule | None, dense: Tensor, rows: int, merged: Merged | None = None) -> Tensor | None:
    """The dense model's stream (B, N, D) as a block of this rule should see it in its `rows` tokens: (B, rows, D); None
    where its tokens are not those of the dense model. merged: what matching has made of them so far."""
    if merged is not None and merged.sizes.shape[1] == rows:
        prefix = dense.shape[1] - merged.places.shape[1]
        sums = dense.new_zeros(len(dense), rows - prefix, dense.shape[2]).scatter_add(
            1, merged.places[:, :, None].expand(-1, -1, dense.shape[2]), dense[:, prefix:])
        # means of the patches merged
        return torch.cat([dense[:, :prefix], sums / merged.sizes[:, prefix:, None]], dim=1)
    if isinstance(rule, SharedUpdate):
        prefix = dense.shape[1] - len(rule.regions)
        return torch.matmul(tokens.merge_matrix(rule, prefix).to(dense), dense)  # the regions' weighted means
    whole = rule is None or isinstance(rule, (Select, Match))  # their attention comes before what they do
    return dense if whole and dense.shape[1] == rows else None


def _lacks(gamma: Tensor | None, rule: TokenRule | None, stream: Tensor, given: Tensor, dense: Tensor, prefix: int,
           merged: Merged | None) -> Tensor:
    """What the layer's output `given` (B, rows, D) lacks to bring its block's stream (before the addition) to the dense
    model's (B, N, D): (d - x) / gamma - given; 0 in rows that are not the dense model's, or where LayerScale lets
    nothing through."""
    wanted = dense_rows(rule, dense, given.shape[1], merged)
    wanted = dense[:, :prefix] if wanted is None else wanted  # prefix tokens come first, whatever the rule
    gamma = torch.ones(1, device=given.device) if gamma is None else gamma
    through = gamma.abs() > SMALL_GAMMA * gamma.abs().max()
    rows, divisor = slice(wanted.shape[1]), torch.where(through, gamma, 1)
    lacks = ((wanted - stream[:, rows]) / divisor - given[:, rows]) * through
    return F.pad(lacks, (0, 0, 0, given.shape[1] - lacks.shape[1]))


@contextlib.contextmanager
def without_mlp(block: nn.Module) -> Iterator[None]:
    """Inside, the block's MLP gives what it is given: for what comes before it, a third of the block's work."""
    mlp, block.mlp = block.mlp, nn.Identity()
    try:
        yield
    finally:
        block.mlp = mlp


class Walk:
    """What all images are as they enter a block of the dense model and of a smaller one, block after block: each block
    runs on what the one before gave, so that a walk through all of them costs a few passes, however many layers are
    looked at. Memory: four times all tokens of all images."""

    @torch.inference_mode()
    def __init__(self, dense: nn.Module, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]],
                 amp: bool | None = False) -> None:
        self.dense, self.model, self.amp, self.at = encoder_of(dense), encoder_of(model), amp, 0
        self.device = next(model.parameters()).device
        check_runs_in_parts(self.dense)
        self.also = also_taken(self.dense)
        self.streams, self.after = [], []
        for images, _ in batches:
            with autocast(self.device, amp):
                self.streams.append(embedded(self.model, images.to(self.device)))
                self.after.append(embedded(self.dense, images.to(self.device)))
        self._look()

    def _run(self, block: nn.Module, streams: Iterable[Tensor | Held]) -> Iterator[Tensor | Held]:
        also = self.also[self.at]
        for x in streams:
            with autocast(self.device, self.amp):
                y = block(x, **also)
            yield y                             # out here: what is made of it is in float32

    def _look(self) -> None:
        """The dense model's stream after this block's attention, and after the block."""
        original, self.half = self.dense.blocks[self.at], []
        second = original.mlp if isinstance(original, POST_NORM) else original.norm2
        with hooks([second.register_forward_pre_hook(lambda _, given: self.half.append(given[0]))]):
            self.after = list(self._run(original, self.after))

    @torch.inference_mode()
    def step(self) -> None:
        """On to the next block, by this one as it is now."""
        self.streams = list(self._run(self.model.blocks[self.at], self.streams))
        self.at += 1
        self._look()

    @torch.inference_mode()
    def moments(self, kind: str, rule: TokenRule | None, weight: float = 1.0,
                kept: Tensor | None = None) -> list[Moments]:
        """Of the inputs of this block's layer that mixes heads or neurons, of those `kept` (None: all), with what its
        output lacks of the dense model's stream without the others, prefix tokens counted `weight` times: of FOLDS
        folds of the images."""
        wrapped, heads, prefix = self.model.blocks[self.at], kind == "heads", prefix_of(self.model)
        block, seen, images = attention_block(wrapped), {}, 0
        linear, _ = mixing_layer(block, kind)
        norm = block.norm1 if heads else block.norm2
        gone = torch.ones(linear.in_features, dtype=torch.bool, device=self.device)
        gone[slice(None) if kept is None else kept] = False
        lost = linear.weight.detach()[:, gone].float()
        folds = [Moments(linear.in_features - lost.shape[1], self.device, linear.out_features) for _ in range(FOLDS)]
        windows, grid = block if heads else None, self.model.patch_embed.grid_size
        handles = [norm.register_forward_pre_hook(lambda _, given: seen.update(own=given[0].flatten(1, -2))),
                   linear.register_forward_hook(lambda _, given, out: seen.update(
                       inputs=by_image(windows, given[0], grid), output=by_image(windows, out, grid)))]
        with hooks(handles), without_mlp(block) if heads else contextlib.nullcontext():
            for entering, leaving, dense in zip(self.streams, self._run(wrapped, self.streams),
                                                self.half if heads else self.after):
                held, inputs, output = entering if heads else leaving, seen["inputs"], seen["output"]
                lacks = _lacks(layer_scale(block, kind), rule, seen["own"], output, dense.flatten(1, -2), prefix,
                               held if isinstance(held, Merged) else None)
                if isinstance(block, (*POST_NORM, ParallelBlock)):     # its stream is not that before the addition
                    lacks = torch.zeros_like(lacks)
                if kept is not None:
                    lacks, inputs = lacks + F.linear(inputs[..., gone].float(), lost), inputs[..., kept]
                weights = output.new_ones(output.shape[:2], dtype=torch.float32)
                weights[:, :prefix] = weight
                for number, fold in enumerate(folds):                           # image i is in fold i mod FOLDS
                    mine = slice((number - images) % FOLDS, None, FOLDS)
                    fold.add(inputs[mine], lacks[mine], weights[mine])
                images += len(inputs)
        return folds

    @torch.inference_mode()
    def entering(self, kind: str) -> Moments:
        """Of the inputs of this block's `entered_layer` alone."""
        layer, size = entered_layer(attention_block(self.model.blocks[self.at]), kind)
        found = Moments(size, self.device)
        with hooks([layer.register_forward_pre_hook(lambda _, given: found.add(given[0]))]):
            for _ in self._run(self.model.blocks[self.at], self.streams):
                pass
        return found


def layers_to_refit(plan: CompressionPlan, every: bool, follow: bool = True) -> list[Layer]:
    """The layers that are refitted: those that lose units, or widths of queries before them, with follow every proj
    after the first of them; with `every`, all from the first block on in which anything is cut."""
    cut = [(index, kind) for index, kind in layers_of(plan) if getattr(plan.blocks[index], kind) is not None
           or kind == "heads" and plan.blocks[index].qk_width is not None]
    first = next((index for index, block in enumerate(plan.blocks)
                  if dataclasses.replace(block, tokens=None) != BlockPlan()
                  or not isinstance(block.tokens, (ReadOut, type(None)))), len(plan.blocks))
    return [layer for layer in layers_of(plan)
            if layer in cut
            or (layer[0] >= first if every else follow and layer[1] == "heads" and layer > (cut or [layer])[0])]


def compensate(dense: nn.Module, plan: CompressionPlan, batches: Iterable[tuple[Tensor, Tensor]], *,
               ridge: float | None = None, costs: Mapping[Layer, Fisher] | None = None, every: bool = False,
               moments: Mapping[Layer, Moments] | None = None, device: str | torch.device | None = None,
               amp: bool | None = False, progress: bool = True,
               over: Callable[[list[Layer]], Iterable[Layer]] | None = None) -> nn.Module:
    """compress(dense, plan) with proj and fc2 refitted in every block that loses heads or neurons
    (criteria.compensation.refit).

    Block after block, attention before MLP: a layer's inputs are those of the model with everything before it already
    cut and refitted, tokens included. Its target is what would bring its block's stream to the dense model's on the
    same image and token, so that errors are made good instead of piling up; where a token rule leaves no such token
    (`dense_rows`), its own output before its cut. Every proj after the first cut is refitted too, for that reason; with
    `every`, all these layers from the first block on in which anything is cut, also where only tokens are. costs
    (`fisher`) says how often prefix tokens count where others count once; None: as often. ridge draws the weights to
    what they were; None chooses it for each layer by what misses least on images left out (`choose_ridge`), so that few
    images change little.

    batches are gone through once (`Walk`). With `moments` of the dense model (`each_moments`) they are not read, what
    loses units alone is refitted, to its own output, queries are narrowed by its moments of "widths", where there are
    any, costs says nothing, and ridge None is RIDGE: quicker, and a little worse. A plan in which nothing is to be
    refitted gives compress(dense, plan). over: how the layers are gone through, where not with a bar of their own.
    Raises InputError as compress does, or without images.
    """
    device = torch.device(device) if device is not None else next(dense.parameters()).device
    merging = dataclasses.replace(plan, blocks=tuple(BlockPlan(tokens=block.tokens) for block in plan.blocks))
    model = compress(dense, merging).to(device).eval()
    by_moments = bool(moments)                  # asked once: they may lie in files
    todo, rules = layers_to_refit(plan, every, follow=not by_moments), [rule for rule, _ in plan.rules()]
    walk = Walk(copy.deepcopy(dense).to(device).eval(), model, batches, amp) if todo and not by_moments else None
    for index, kind in over(todo) if over else tqdm(todo, desc="compensate", unit="layer", disable=not progress):
        block, cut = attention_block(model.blocks[index]), plan.blocks[index]
        linear, width = mixing_layer(block, kind)
        kept = getattr(cut, kind)
        if kind in cut.nothing:
            keep_units(block, kind, kept, nothing=True)
            continue
        while walk and walk.at < index:
            walk.step()
        if kind == "heads" and cut.qk_width is not None:
            entering = (walk.entering("widths") if walk else
                        moments[index, "widths"] if (index, "widths") in list(moments) else None)
            narrow_queries(block, cut.qk_width,
                           None if entering is None else (entering.mean, entering.covariance(ridge=0)))
        if by_moments and kept is None:         # of its own inputs nothing is cut, and nothing lacks
            continue
        kept_units = range(linear.in_features // width) if kept is None else kept
        stay = torch.tensor(kept_units, dtype=torch.long, device=device)
        weight = plain_linear(linear).weight.detach()
        if by_moments:
            folds = [moments[index, kind]]
        else:                                   # what the others gave is part of what the kept ones lack
            inputs = None if kept is None else columns(stay, width)
            folds = walk.moments(kind, rules[index], costs[index, kind].prefix_weight if costs else 1.0, inputs)
            weight, stay = weight if kept is None else weight[:, inputs], torch.arange(len(stay), device=device)
        if linear.bias is None and len(stay):   # what stands for a whole sublayer always has one
            folds = [fold.uncentred() for fold in folds]
        with named(f"block {index}"):
            strength = ridge if ridge is not None else RIDGE if by_moments else choose_ridge(weight, folds, stay, width)
            weight, gained = refit(weight, functools.reduce(Moments.plus, folds), stay, width, strength)
        if kept is not None:
            keep_units(block, kind, kept)
            linear, _ = mixing_layer(block, kind)
        with torch.no_grad():
            if len(stay):
                linear.weight.copy_(weight)
            if linear.bias is not None:
                linear.bias.add_(gained)
    return model
