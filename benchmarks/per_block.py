"""Merging by content as Prune and Merge places it: tokens merged before each block and given back after it, with a
shortcut for what sets a token apart, fixed or learned; beside rule `match`, where merged tokens stay merged, at equal
multiply-adds.

    python benchmarks/per_block.py --weights deit_tiny_patch16_224.safetensors --cal IMAGENET_CAL --val IMAGENET_VAL
    [--minutes 5]

    z = merge(x), y = given(Block(z)) + own (x - given(z))

own (D) of each block: 0 writes one value over a region, 1 is the shared update (methods C1); learned: Adam on the KL to
the dense model's output on 800 calibration images, the best state on 200 others. Regions are made anew in each block
from its input, attention is proportional.
"""
import argparse
import copy
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.measure.distance import outputs
from vitlab.measure.evaluate import evaluate, uses_bf16
from vitlab.models import compress, deploy, shape_of
from vitlab.models.match import size_mask
from vitlab.plan import CompressionPlan, cost, matching
from vitlab.runtime.files import write_lines
from vitlab.search import SearchSpace
from vitlab.training.self_distillation import Divergence
from vitlab.workbench import steps

NAME, CROP = "deit_tiny_patch16_224", 224 / 227
RESULTS = Path(__file__).parent / "results" / "per_block.jsonl"
GMACS, LR, BATCH = 0.75, 0.02, 32


class PerBlock(nn.Module):
    """timm's Block on tokens that `merged` others went into."""

    def __init__(self, block: nn.Module, merged: int, dim: int, own: float) -> None:
        super().__init__()
        self.block, self.merged, self.own = block, merged, nn.Parameter(torch.full((dim,), own))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            order, into = matching.match(x[:, 1:], self.merged)
            places = matching.new_places(order, into, x.shape[1] - 1)
        means, sizes = matching.merge(x[:, 1:], x.new_ones(x.shape[0], x.shape[1] - 1), order, into)
        z, sizes = torch.cat([x[:, :1], means], dim=1), torch.cat([sizes.new_ones(len(x), 1), sizes], dim=1)
        spread = matching.give_back(torch.cat([self.block(z, attn_mask=size_mask(sizes, x.dtype)), z], dim=2), places,
                                    1)
        after, before = spread.chunk(2, dim=2)
        return after + self.own * (x - before)


def per_block(dense: nn.Module, first: int, merged: int, own: float) -> nn.Module:
    model = copy.deepcopy(dense)
    model.blocks = nn.Sequential(*(PerBlock(block, merged, dense.embed_dim, own) if index >= first else block
                                   for index, block in enumerate(model.blocks)))
    return model


def gmacs(shape, first: int, merged: int) -> float:
    """Everything that is multiplied, comparing and pooling too."""
    tokens = np.where(np.arange(shape.depth) < first, shape.num_tokens, shape.num_tokens - merged)
    counts = dataclasses.replace(cost.counts_of(CompressionPlan.empty(shape)), attended=tokens, in_mlp=tokens,
                                 queried=tokens)
    n = shape.num_patches
    extra = (shape.depth - first) * (n // 2 * (n - n // 2) + n // 2 + merged) * shape.embed_dim
    return (int(cost.macs_of(shape, counts)["total"]) + extra) / 1e9


def learn(model: nn.Module, dense: nn.Module, images: list[Tensor], apart: list[Tensor], minutes: float,
          amp: bool) -> nn.Module:
    """The model with its shortcuts learned; the state with the least distance on the images set apart."""
    own = [p for name, p in model.named_parameters() if name.endswith(".own")]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in own))
    distance, optimizer, began = Divergence(dense, [(x, x) for x in apart],
                                            amp), torch.optim.Adam(own, lr=LR), time.monotonic()
    best, state = distance(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = [outputs(dense, x, amp) for x in images]
    while time.monotonic() - began < 60 * minutes:
        for x, target in zip(images, expected):
            loss = F.kl_div(outputs(model, x, amp), target, reduction="batchmean", log_target=True)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if (found := distance(model)) < best:
            best, state = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--weights", "--cal", "--val"):
        parser.add_argument(option, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="of learning, for each")
    args = parser.parse_args()
    found = steps.open_model(args.weights, model=NAME)
    dense, amp = found.model.eval(), uses_bf16(torch.device("cpu"), None)
    shape = shape_of(dense)
    cal = [x for x,
           _ in steps.open_matching(args.cal, found).batches("train", dense, limit=1000, batch_size=BATCH, workers=1)]
    val = list(steps.open_matching(args.val, found).batches("held_out", dense, crop_pct=CROP, workers=1))
    distance, rows = Divergence(dense, val, amp), []

    def add(name: str, model: nn.Module, cost_gmacs: float) -> None:
        measured = evaluate(model, val, amp=amp, progress=False)
        rows.append({"model": name, "top1_pct": measured.top1_pct, "top1_se": measured.top1_se, "gmacs": cost_gmacs,
                     **distance.measured(model, "distill_loss"),
                     "conditions": {"images": measured.images, "dtype": "bfloat16" if amp else "float32",
                                    "minutes": args.minutes}})
        print(f"{name:60s} {cost_gmacs:.3f} GMACs  top-1 {measured.top1_pct:.2f}  {rows[-1]['distill_loss']:.3f} nats",
              flush=True)
        write_lines(RESULTS, rows)
    add("dense", dense, cost.gmacs(CompressionPlan.empty(shape)))
    space = SearchSpace(shape=shape, units=(), tokens="match", max_ratio=0.5)
    grid = np.linspace(0.01, 0.5, 197)[:, None]
    prices = cost.macs_of(shape, space.counts(grid))["total"] / 1e9
    plan = space.plan(grid[np.flatnonzero(prices <= GMACS)[0]])
    add("match, merged tokens stay merged", deploy(compress(dense, plan)), cost.gmacs(plan))
    for first in (0, 3):
        most = (shape.num_patches + 1) // 2
        merged = next((m for m in range(most + 1) if gmacs(shape, first, m) <= GMACS), most)
        for own in (0.0, 0.5, 1.0):
            model = per_block(dense, first, merged, own)
            where = f"{merged} given back after each block from {first}"
            add(f"{where}, own {own:g}", model, gmacs(shape, first, merged))
            if own != 0.5:
                split = len(cal) * 4 // 5
                add(f"{where}, own learned from {own:g}",
                    learn(model, dense, cal[:split], cal[split:], args.minutes, amp), gmacs(shape, first, merged))
