"""Speed against batch size and resolution, and what each block takes of the products and of the time."""
import dataclasses
import time

import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from training_fixtures import full_plan, one_thread, tiny, token_plan  # noqa: F401

from vitlab.measure.sweeps import block_macs, block_times, by_batch, by_resolution, plan_at
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match, ReadOut, Select
from vitlab.plots import block_shares, speed_curves
from vitlab.runtime.files import InputError

ONCE = {"repeats": 1, "warmup": 1, "min_seconds": 0, "progress": False}


def matched(model, *merged: int) -> CompressionPlan:
    return CompressionPlan(shape=shape_of(model), blocks=tuple(BlockPlan(heads=(0, 2), tokens=Match(merged=count))
                                                               for count in merged))


@pytest.mark.parametrize("make", [full_plan, token_plan, lambda model: matched(model, 5, 3),
                                  lambda model: CompressionPlan.empty(shape_of(model))],
                         ids=["tokens and units", "matrices", "match", "dense"])
def test_products_of_the_blocks_and_of_what_stands_around_them_are_those_of_the_model(make):
    plan = make(tiny())
    macs = cost.macs(plan)
    assert sum(block_macs(plan)) == macs["total"] - macs["patch_embed"] - macs["classifier"]


def test_products_of_a_block_are_those_of_its_own_heads_and_neurons():
    shape = shape_of(tiny())                    # 17 tokens, 3 heads of 8
    plan = CompressionPlan(shape=shape, blocks=(BlockPlan(heads=(1,), neurons=tuple(range(7))), BlockPlan()))
    first = 17 * 24 * 3 * 8 + 2 * 17 * 17 * 8 + 17 * 8 * 24 + 2 * 17 * 24 * 7
    whole = 17 * 24 * 3 * 24 + 2 * 17 * 17 * 24 + 17 * 24 * 24 + 2 * 17 * 24 * shape.num_neurons
    assert block_macs(plan) == [first, whole]


def test_a_plan_for_another_resolution_keeps_its_units_and_the_share_of_its_tokens():
    model = tiny()
    shape = dataclasses.replace(shape_of(model), img_size=(64, 64))             # 64 patches in place of 16
    blocks = (BlockPlan(heads=(0, 2), tokens=Match(merged=5)), BlockPlan(neurons=(1, 2), tokens=ReadOut()))
    found = plan_at(CompressionPlan(shape=shape_of(model), blocks=blocks), shape)
    assert found.blocks == (BlockPlan(heads=(0, 2), tokens=Match(merged=20)), blocks[1]) and found.shape == shape
    selecting = CompressionPlan(shape=shape_of(model), blocks=(BlockPlan(tokens=Select(kept=6)), BlockPlan()))
    assert plan_at(selecting, shape).blocks[0].tokens.kept == 24
    with pytest.raises(InputError, match="by their place"):
        plan_at(token_plan(model), shape)


def test_speeds_are_of_each_model_at_each_batch_size_and_resolution():
    model = tiny()
    plan = matched(model, 5, 3)
    rows = by_batch({"dense": model, "small": deploy(compress(model, plan))}, [1, 3], **ONCE)
    assert [(row["batch_size"], row["model"]) for row in rows] == [(1, "dense"), (1, "small"), (3, "dense"),
                                                                   (3, "small")]
    sizes = by_resolution(model, {"small": plan}, [32, 64], batch_size=2, **ONCE)
    assert [(row["img_size"], row["model"]) for row in sizes] == [(32, "dense"), (32, "small"), (64, "dense"),
                                                                  (64, "small")]
    assert all(row["throughput_img_s"] > 0 for row in rows + sizes) and model.patch_embed.img_size == (32, 32)
    figure = speed_curves(sizes)
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[size, row["throughput_img_s"]] for size, row in
                                                             zip((32, 64), sizes[1::2])]
    plt.close("all")


class Slow(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, **settings) -> torch.Tensor:
        time.sleep(0.02)
        return self.block(x, **settings)


def test_time_is_told_block_by_block_of_models_in_turn():
    models = {"dense": tiny(), "slow": tiny()}
    models["slow"].blocks[1] = Slow(models["slow"].blocks[1])
    times = block_times(models, batch_size=2, repeats=3)
    assert {name: len(each) for name, each in times.items()} == {"dense": 2, "slow": 2}
    assert times["slow"][1] > 20 and all(value > 0 for each in times.values() for value in each)
    blocks = [block for model in models.values() for block in model.blocks]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)
    figure = block_shares({name: [30, 10] for name in models}, {"dense": [3, 1], "slow": [3, 5]})
    heights = [[bar.get_height() for bar in axis.patches] for axis in figure.axes]
    assert heights == [[75, 25, 75, 25], [75, 25, 75, 125]]
    plt.close("all")
