"""Speed against batch size and resolution, and what each block takes of the products and of the time."""
import copy
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vitlab.measure.averaging import hooks
from vitlab.measure.throughput import DTYPES, measure
from vitlab.models import compress, deploy, shape_of
from vitlab.models.ends import resize
from vitlab.models.segmenter import Segmenter
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match, Select
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError, require


def resized(model: nn.Module, img_size: int) -> nn.Module:
    """A copy of a dense model for square images of another size, in pixels, which the patch has to divide."""
    if isinstance(model, Segmenter):
        return model.at_size((img_size, img_size))
    model = copy.deepcopy(model)
    resize(model, (img_size, img_size))
    return model


def plan_at(plan: CompressionPlan, shape: ViTShape) -> CompressionPlan:
    """The plan for another resolution: the same units, and tokens that go by content in the same share. Raises
    InputError where tokens go by their place."""
    share = shape.num_patches / plan.shape.num_patches

    def block(cut: BlockPlan) -> BlockPlan:
        rule = cut.tokens
        if isinstance(rule, Match):
            rule = dataclasses.replace(rule, merged=int(rule.merged * share))
        elif isinstance(rule, Select):
            rule = dataclasses.replace(rule, kept=max(1, int(rule.kept * share)))
        elif hasattr(rule, "regions"):
            raise InputError("tokens are cut by their place, for one size of images; another needs its own plan")
        return dataclasses.replace(cut, tokens=rule)
    return dataclasses.replace(plan, shape=shape, blocks=tuple(map(block, plan.blocks)))


def by_batch(models: Mapping[str, nn.Module], batch_sizes: Sequence[int], **settings: Any) -> list[dict[str, Any]]:
    """`Speed` of each model at each batch size, the models in turn (`throughput.measure`, which settings go to)."""
    return [{"batch_size": size, "model": name, **vars(speed)} for size in batch_sizes
            for name, speed in measure(models, batch_size=size, **settings).items()]


def by_resolution(dense: nn.Module, plans: Mapping[str, CompressionPlan], img_sizes: Sequence[int],
                  **settings: Any) -> list[dict[str, Any]]:
    """`Speed` of a dense model and of what the plans make of it, deployed, at each size of square images, the models in
    turn. Raises InputError as `plan_at` does."""
    rows = []
    for size in img_sizes:
        whole = resized(dense, size)
        made = {name: deploy(compress(whole, plan_at(plan, shape_of(whole)))) for name, plan in plans.items()}
        rows += [{"img_size": size, "model": name, **vars(speed)}
                 for name, speed in measure({"dense": whole, **made}, **settings).items()]
    return rows


def block_macs(plan: CompressionPlan) -> list[int]:
    """MACs per image of each block, deployed; with those before and after the blocks they sum to `cost.macs`."""
    counts = vars(cost.counts_of(plan))

    def first(blocks: int) -> int:
        parts = cost.macs_of(plan.shape, cost.Counts(**{name: each[:blocks] for name, each in counts.items()}))
        return int(parts["total"] - sum(parts[name] for name in ("patch_embed", "classifier", "decoder")))
    return np.diff([0, *(first(blocks) for blocks in range(1, plan.shape.depth + 1))]).tolist()


@torch.inference_mode()
def block_times(models: Mapping[str, nn.Module], *, batch_size: int = 32, repeats: int = 10, dtype: str = "float32",
                device: str | torch.device = "cpu") -> dict[str, list[float]]:
    """Milliseconds of each block in a forward of a batch of random images, medians over so many rounds through all
    models in turn, after one for warming up."""
    require(batch_size >= 1 and repeats >= 1, "batch_size and repeats of at least 1 are needed")
    device, times = torch.device(device), {name: [[] for _ in model.blocks] for name, model in models.items()}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
    for turn in range(repeats + 1):
        for name, model in models.items():
            model.to(device=device, dtype=DTYPES[dtype]).eval()
            x = torch.randn(batch_size, model.in_chans, *model.patch_embed.img_size,
                            generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])
            marks: list[float] = []             # begin and end of each block
            handles = [add(lambda *_, marks=marks: marks.append(now())) for block in model.blocks
                       for add in (block.register_forward_pre_hook, block.register_forward_hook)]
            with hooks(handles):
                model(x)
            for own, begin, end in zip(times[name] if turn else (), marks[::2], marks[1::2]):
                own.append(1000 * (end - begin))
    return {name: [statistics.median(own) for own in each] for name, each in times.items()}
