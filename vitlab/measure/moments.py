"""What goes into the layers that mix heads or neurons, and what an error in their outputs costs: both without labels.

To second order KL(p(y | x) || p'(y | x)) = e^T F e / 2 for an error e of a layer's output, with the Fisher information
F = E[g g^T], g the gradient of log p(y | x) by that output and y drawn from the model's own p (Martens and Grosse, ICML
2015, arXiv 1503.05671, section 2; there of weights). The same holds of 1 - cosine with g that of z^T u, u the unit
vector of the features and z ~ N(0, I) (`vitlab.measure.distance`). D outputs of a layer, P prefix tokens.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.criteria.moments import Moments
from vitlab.measure.averaging import begun, frozen_eval, hooks
from vitlab.measure.distance import output_of
from vitlab.measure.evaluate import autocast
from vitlab.models import attention_block
from vitlab.models.ends import prefix_of
from vitlab.models.families import also_taken, embedded, entered_layer, mixing_layer
from vitlab.models.support import check_runs_in_parts, encoder_of
from vitlab.models.windowed import by_image
from vitlab.plan import CompressionPlan
from vitlab.runtime import parallel

KINDS = ("heads", "neurons")
Layer = tuple[int, str]                         # (block, one of KINDS): its proj or fc2
IMAGES, AT_ONCE = 256, 16  # that gradients are averaged over, and that go through the model together
HEAVIEST = 50.0  # prefix tokens cost up to 1e4 times more, but are few; 50 to 1,000 are alike (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Of one layer."""

    metric: Tensor                              # F (D, D), over all tokens, up to a factor
    prefix_weight: float                        # mean |g|^2 of a prefix token over that of another, in [1, HEAVIEST]

    def root(self) -> Tensor:
        """R (D, D) with R^T R = F: |R e|^2 is what an error e costs."""
        values, vectors = torch.linalg.eigh(self.metric.double())
        return values.clamp(min=0).sqrt()[:, None] * vectors.T


def layers_of(model: nn.Module | CompressionPlan, kinds: Iterable[str] = KINDS) -> list[Layer]:
    """Every layer that mixes units of some kinds, block after block."""
    return [(index, kind) for index in range(len(model.blocks)) for kind in kinds]


def fisher(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, images: int = IMAGES, seed: int = 0,
           amp: bool | None = False, progress: bool = True) -> dict[Layer, Fisher]:
    """Of every layer of a model, averaged over the first `images`; nothing where there is no image. Memory: what
    autograd keeps of AT_ONCE images. Under torchrun each process gives its share, and draws by itself."""
    device, prefix = next(model.parameters()).device, prefix_of(encoder_of(model))
    draws = torch.Generator(device=device).manual_seed(seed + parallel.rank())
    linears = {(index, kind): mixing_layer(attention_block(model.blocks[index]), kind)[0]
               for index, kind in layers_of(model)}
    metrics = {layer: torch.zeros(linear.out_features, linear.out_features, device=device)
               for layer, linear in linears.items()}
    squares = {layer: torch.zeros(2, device=device) for layer in linears}       # of prefix tokens, of others

    def backward(layer: Layer, gradient: Tensor) -> None:
        rows = gradient.detach().float()                                        # (B, N, D)
        metrics[layer] += rows.flatten(0, 1).T @ rows.flatten(0, 1)
        each = rows.square().sum(dim=2)
        squares[layer] += torch.stack([part.mean(dim=1).sum() if part.shape[1] else part.sum()
                                       for part in (each[:, :prefix], each[:, prefix:])])

    def after(layer: Layer, _: nn.Module, given: tuple, output: Tensor) -> Tensor:
        output = begun(output)
        output.register_hook(partial(backward, layer))
        return output
    whole, seen, wanted = output_of(model), 0, -(-images // parallel.world())
    handles = [linear.register_forward_hook(partial(after, layer)) for layer, linear in linears.items()]
    with frozen_eval(model), hooks(handles), torch.enable_grad(), \
            tqdm(total=wanted, desc="what errors cost", unit="image", disable=not progress) as bar:
        for x in (part for batch, _ in batches for part in batch.split(AT_ONCE)):
            if seen >= wanted:
                break
            with autocast(device, amp):
                raw = whole.raw(model, x.to(device))
            whole.drawn(whole.compared(raw.float()), draws).backward()
            seen += len(x)
            bar.update(len(x))
    found = {}
    for layer in linears if int(parallel.total(torch.tensor(seen))) else ():
        heavy, light = parallel.total(squares[layer]).tolist()
        weight = min(max(heavy / light, 1.0), HEAVIEST) if light else HEAVIEST if heavy else 1.0
        found[layer] = Fisher(metric=parallel.total(metrics[layer]), prefix_weight=weight)
    return found


@torch.inference_mode()
def each_moments(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], kinds: Iterable[str] = KINDS, *,
                 amp: bool | None = False) -> Iterator[tuple[Layer, Moments]]:
    """Moments of the inputs of every layer that mixes units of some kinds, or, for "widths", makes queries, over all
    tokens of all images, block after block. Memory: all tokens of all images, and the moments of one block. Under
    torchrun each process gives its share of the batches. Raises InputError for a model with a forward of its own."""
    device, model = next(model.parameters()).device, encoder_of(model)
    check_runs_in_parts(model)
    streams, grid = [], model.patch_embed.grid_size
    for images, _ in batches:
        with autocast(device, amp):
            streams.append(embedded(model, images.to(device)))
    for index, (block, also) in enumerate(zip(model.blocks, also_taken(model))):
        found, handles = {}, []
        for kind in kinds:
            layer, size = entered_layer(attention_block(block), kind)
            found[index, kind] = own = Moments(size, device)
            windows = attention_block(block) if kind == "heads" else None
            handles.append(layer.register_forward_pre_hook(
                lambda _, given, own=own, at=windows: own.add(by_image(at, given[0], grid))))
        with hooks(handles):
            for place, x in enumerate(streams):
                with autocast(device, amp):
                    streams[place] = block(x, **also)
        for layer, moments in found.items():
            moments.rows, moments.sum, moments.products = map(parallel.total,
                                                              (moments.rows, moments.sum, moments.products))
            yield layer, moments
