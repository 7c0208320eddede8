"""The latency table of a model, measured once on this machine and kept."""
import copy
import dataclasses
import functools
import hashlib
import json
import platform
import random
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.throughput import DTYPES, EAGER, Way, _once, conditions
from vitlab.models import compress, deploy, encoder_of, shape_of
from vitlab.models.attention import PrefixAttention, attention_as
from vitlab.models.deploy import Fold
from vitlab.models.ends import ended
from vitlab.models.families import also_taken, attended, attention_input, attention_update, embedded, mlp_update
from vitlab.models.join import with_queries
from vitlab.models.match import MatchBlock
from vitlab.models.narrow import narrow_queries
from vitlab.models.segmenter import Segmenter
from vitlab.models.share import SharedUpdateBlock
from vitlab.models.shrink import keep_units
from vitlab.plan import CompressionPlan, tokens
from vitlab.plan.cost import counts_of, in_attention
from vitlab.plan.latency import AXES, LatencyTable
from vitlab.plan.rules import Match, SharedUpdate
from vitlab.plan.shape import ViTShape
from vitlab.runtime.cores import hold_memory
from vitlab.runtime.files import InputError, cache_folder, require


def grid_axes(shape: ViTShape) -> dict[str, tuple[np.ndarray, ...]]:
    """The counts at which each part is measured: evenly spread from the fewest that can be to all."""
    def spread(low: int, high: int, count: int) -> np.ndarray:
        return np.unique(np.linspace(low, high, count).round().astype(np.int64))
    everything, tokens = shape.num_tokens, shape.cuts("tokens")
    few, most = max(1, shape.num_prefix_tokens) if tokens else everything, everything + shape.queries
    count, rows = spread(few, most, 6), spread(few, everything, 4)
    heads = spread(1 if shape.cuts("heads") else shape.num_heads, shape.num_heads,
                   shape.num_heads if shape.num_heads <= 6 else 5)
    neurons = spread(1 if shape.cuts("neurons") else shape.num_neurons, shape.num_neurons, 5)
    whole = np.array([everything])
    seen = np.unique(in_attention(shape, counts_of(CompressionPlan.empty(shape)))[2]) if shape.windows else count
    axes = {"stem": (whole,), "attention": (seen, heads), "mlp": (count, neurons), "fold": (rows, rows),
            "carry": (rows,), "pool": (rows,), "head": (whole + shape.queries if shape.decoder else count,)}
    if shape.cuts("widths") and shape.head_dim > 2:                             # linear in widths, as products are
        axes["narrow"] = (spread(few, most, 3), spread(heads[0], heads[-1], 2), spread(1, shape.head_dim - 1, 2))
    if not tokens:
        return axes
    if shape.class_token and not shape.rotary and shape.num_patches > 1:        # one stays, one is left for the mean
        axes["select"] = (spread(shape.num_prefix_tokens + 2, everything, 4), heads)
    if shape.num_prefix_tokens:
        axes["read_out"] = axes["attention"]
    if shape.num_patches > 1:
        axes["match"] = (spread(shape.num_prefix_tokens + 2, everything, 4),)
    return axes


def whole_models(model: nn.Module, shape: ViTShape) -> list[tuple[CompressionPlan, nn.Module]]:
    """Four deployed models that `scale` is fitted on: heads and neurons at random, tokens merged in two of them. Random
    counts are rarely a multiple of what the processor takes at once; round ones run faster, and the scale would be too
    low."""
    plans, chance = [], random.Random(0)
    for keep_rate in (1.0, 0.8, 1.0, 0.6):
        scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.1
        plan = CompressionPlan.empty(shape) if not shape.cuts("tokens") else \
            prune_and_merge(scores, shape, keep_rate=keep_rate, prune_rate=(1 - keep_rate) / 2)
        units = [{kind: tuple(range(chance.randint(1, count))) for kind, count in (("heads", shape.num_heads),
                                                                                   ("neurons", shape.num_neurons))
                  if shape.cuts(kind)} for _ in plan.blocks]
        blocks = (dataclasses.replace(block, **kept) for block, kept in zip(plan.blocks, units))
        plans.append(dataclasses.replace(plan, blocks=tuple(blocks)))
    return [(plan, deploy(compress(model, plan))) for plan in plans]


def _even_regions(patches: int, count: int) -> SharedUpdate:
    """`count` regions of the same size, but for one patch; none: every patch skips the block."""
    regions = tuple(j * count // patches if count else -1 for j in range(patches))
    return SharedUpdate(regions=regions, weights=tuple(1 / regions.count(r) for r in regions))


class _Piece(nn.Module):
    """A function of x and of modules, as a module that can be written for any runtime."""

    def __init__(self, run: Callable, *modules: nn.Module) -> None:
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Any:
        return self.run(x, *self.parts)


def _pieces(model: nn.Module, axes: dict[str, tuple[np.ndarray, ...]],
            batch: int) -> Iterator[tuple[str, tuple, nn.Module, Tensor]]:
    """(part, place in its grid, what runs, its input) of each time; a copy of the first block that looks at as many."""
    shape = shape_of(model)
    prefix, dim, patches = shape.num_prefix_tokens, model.embed_dim, model.patch_embed
    looked = in_attention(shape, counts_of(CompressionPlan.empty(shape)))[2].tolist()
    everything, like, also = shape.num_tokens, next(model.parameters()), also_taken(encoder_of(model))[0]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, model.in_chans, *patches.img_size, generator=generator).to(like)
    numbers = torch.randn(batch * (everything + shape.queries) * dim, generator=generator).to(like)
    plain, ends = copy.deepcopy(model.blocks[0]), copy.deepcopy(model)
    encoder_of(ends).blocks = nn.Sequential()

    @functools.cache
    def cut(kind: str, count: int, index: int = 0) -> nn.Module:
        block = copy.deepcopy(model.blocks[index])
        keep_units(block, kind, range(count))
        return block

    def by_place(n: int) -> dict[str, Any]:
        return {"rope": with_queries(also["rope"], shape.queries)[..., :int(n) - prefix, :]} if "rope" in also else also

    def attention(n: int, heads: int, width: int | None = None) -> nn.Module:
        block = cut("heads", heads, looked.index(n) if n in looked else 0)
        if width is not None:
            block = copy.deepcopy(block)
            narrow_queries(block, int(width))
        return _Piece(lambda x, block: attended(block, x, **by_place(n)), block)

    def read_out(n: int, heads: int) -> nn.Module:
        block = cut("heads", heads, 0)
        return _Piece(lambda x, block, asking: x[:, :prefix] + attention_update(
            block, asking(attention_input(block, x), **by_place(n))), block,
            attention_as(PrefixAttention, block.attn, num_prefix_tokens=prefix))

    def pool(n: int) -> nn.Module:
        regions = _even_regions(patches.num_patches, int(n - prefix))
        return _Piece(lambda x, block: block(x), SharedUpdateBlock(nn.Identity(), regions, prefix).to(like))

    def match(n: int) -> nn.Module:
        """Half of what can be merged is; keys are as wide as all heads."""
        return _Piece(lambda x, block: block.merge(x, None, x[:, :, 0], x)[0],
                      MatchBlock(plain, Match(merged=max(1, int(n - prefix) // 4)), prefix))

    def select(n: int, heads: int) -> nn.Module:
        """The class token's row over the keys of so many heads, and the choice."""
        width, kept = min(int(heads) * shape.head_dim, dim), int(n - prefix) // 2

        def run(x: Tensor) -> Tensor:
            row = x[:, :1, :width] @ x[:, :, :width].transpose(1, 2)
            return tokens.select(x, row.softmax(dim=2)[:, 0], kept, prefix)
        return _Piece(run)
    made = {"narrow": attention, "stem": lambda n: _Piece(lambda x, model: embedded(encoder_of(model), x), ends),
            "attention": attention, "read_out": read_out, "select": select,
            "mlp": lambda n, neurons: _Piece(lambda x, block: x + mlp_update(block, x), cut("neurons", neurons)),
            "pool": pool, "match": match,
            "fold": lambda rows, n: Fold(torch.ones(int(rows), int(n)).to(like)),
            "carry": lambda n: _Piece(lambda x: torch.cat(x.tensor_split(2, dim=1), dim=1)),
            "head": lambda n: _Piece(lambda x, model: model.forward_head(ended(encoder_of(model), x)), ends)}
    for part, grid in axes.items():
        for place in np.ndindex(*map(len, grid)):
            counts = [axis[i] for axis, i in zip(grid, place)]
            windows = part == "attention" and shape.windows
            n = everything if part == "pool" or windows else \
                int(counts[AXES[part].index("columns") if part == "fold" else 0])
            x = numbers[:batch * n * dim].view(batch, n, dim)                               # (B, n, D)
            yield (part, place, made[part](*counts),
                   image if part == "stem" else x.unflatten(1, shape.grid_size) if windows else x)


def conditions_of(model: nn.Module, batch_size: int, dtype: str, device: str | torch.device,
                  way: Way = EAGER) -> dict[str, Any]:
    """What a table holds for, beside the ViTShape: machine, device, dtype, batch, threads, torch, the runtime, a
    block's modules, and what a decoder was given."""
    if dtype not in DTYPES or batch_size < 1:
        raise InputError(f"dtype {dtype!r}, batch_size {batch_size}; one of {sorted(DTYPES)} and at least 1 are needed")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    here = conditions(torch.device(device), dtype, batch_size, 1)
    decoder = {"decoder": model.decoder_args} if isinstance(model, Segmenter) else {}
    return {"machine": platform.node(), "cpu": cpu, "runtime": str(way), "block": str(model.blocks[0]), **decoder,
            **{k: v for k, v in here.items() if k not in ("repeats", "timing")}}


@torch.inference_mode()
def measure_table(model: nn.Module, *, batch_size: int = 32, dtype: str = "float32", device: str | torch.device = "cpu",
                  repeats: int = 5, min_seconds: float = 0.02, progress: bool = True,
                  way: Way = EAGER) -> LatencyTable:
    """Time every part of a dense model at every place of its grid, and four whole models for the scale, each as it
    runs in that way.

    Medians over `repeats` rounds through all places in turn, so that drift of the machine spreads evenly; each timing
    repeats the part until it lasts min_seconds. The model itself stays as it is. Raises InputError for a model that
    can't be handled, an unknown dtype, or a size below 1.
    """
    shape, found = shape_of(model), conditions_of(model, batch_size, dtype, device, way)
    require(repeats >= 1, f"repeats is {repeats}; at least 1 is needed")
    if torch.device(device).type == "cpu":
        hold_memory()
    model, axes = copy.deepcopy(model).to(device=device, dtype=DTYPES[dtype]).eval(), grid_axes(shape)
    pieces, whole = list(_pieces(model, axes, batch_size)), whole_models(model, shape)
    pieces += [("whole", (i,), compressed, pieces[0][3]) for i, (_, compressed) in enumerate(whole)]
    calls, runs = [], []
    for _, _, piece, x in tqdm(pieces, desc=f"parts in {way}", unit="part", disable=not progress or way is EAGER):
        calls.append(way.ready(piece, x))
        _once(calls[-1], x, 1)                                                  # warm-up
        runs.append(max(1, round(min_seconds / _once(calls[-1], x, 1))))
    seconds: list[list[float]] = [[] for _ in pieces]
    with tqdm(total=repeats * len(pieces), desc=f"latency table, batch {batch_size}", unit="timing",
              disable=not progress) as bar:
        for _ in range(repeats):
            for (_, _, _, x), call, count, times in zip(pieces, calls, runs, seconds):
                times.append(_once(call, x, count))
                bar.update()
    ms = {part: np.zeros(tuple(map(len, a))) for part, a in axes.items()} | {"whole": np.zeros(len(whole))}
    for (part, place, _, _), times in zip(pieces, seconds):
        ms[part][place] = 1000 * statistics.median(times)
    total = ms.pop("whole")
    table = LatencyTable(shape=shape, conditions=found, axes=axes, ms=ms)
    sums = [table.predict(counts_of(plan)) for plan, _ in whole]
    return dataclasses.replace(table, scale=float(np.median(total / sums)))


def latency_table(model: nn.Module, *, batch_size: int = 32, dtype: str = "float32", device: str | torch.device = "cpu",
                  cache: str | Path | None = None, way: Way = EAGER, **settings: Any) -> LatencyTable:
    """The table of `measure_table` (settings go there), read where it was measured before under the same conditions.

    cache: folder; None: $VITLAB_CACHE, or ~/.cache/vitlab. A file there that is damaged or of other conditions is
    measured anew with a warning that names it.
    """
    shape, found = shape_of(model), conditions_of(model, batch_size, dtype, device, way)
    key = hashlib.sha256(json.dumps([shape.stored(), found], sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache or cache_folder())
    path = folder / f"latency-{key}.json"
    if path.exists():
        try:
            table = LatencyTable.load(path)
            require((table.shape, table.conditions) == (shape, found), f"{path}: was measured under other conditions")
            return table
        except InputError as error:
            warnings.warn(f"{error}; it is measured anew", stacklevel=2)
    table = measure_table(model, batch_size=batch_size, dtype=dtype, device=device, way=way, **settings)
    try:
        table.save(path)
    except OSError as error:
        warnings.warn(f"{path}: the table could not be kept ({error.strerror}); it will be measured again",
                      stacklevel=2)
    return table
