"""Tiny models, plans and image folders that the tests of data and training share."""
import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitlab.criteria.planning import prune_and_merge
from vitlab.models import compress, shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.training.recipes import Recipe

NAME = "vit_nano_patch4_32"
SIZE = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8}      # 16 patches


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small lose by a second thread, and a machine that is busy makes them wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(num_classes: int = 3, seed: int = 0, **args) -> nn.Module:
    """A dense 2-block model of 24 wide; every parameter is moved off its initial value, so that none is 0 or 1 by
    luck."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(NAME, num_classes=num_classes, **{**SIZE, **args})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def token_plan(model: nn.Module, seed: int = 0, **settings) -> CompressionPlan:
    """A Prune and Merge plan for random scores: every block merges, and some patches skip it."""
    shape = shape_of(model)
    scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(seed)) + 0.01
    return prune_and_merge(scores, shape, **{"keep_rate": 0.5, "prune_rate": 0.2, **settings})


def full_plan(model: nn.Module, seed: int = 0) -> CompressionPlan:
    """Tokens, a head and some neurons cut at once."""
    plan = token_plan(model, seed)
    blocks = [dataclasses.replace(b, heads=(0, 2), neurons=tuple(range(i, 89, 2))) for i, b in enumerate(plan.blocks)]
    return dataclasses.replace(plan, blocks=tuple(blocks))


def compressed(num_classes: int = 3, seed: int = 0, **settings) -> tuple[nn.Module, CompressionPlan]:
    """The training form of a token plan, its matrices moved as training would move them."""
    dense = tiny(num_classes, seed)
    plan = token_plan(dense, seed, **settings)
    return compress(dense, plan), plan


def images(count: int = 5, seed: int = 0) -> torch.Tensor:
    """(count, 3, 32, 32), normal."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images() if x is None else x)


def write_grey(path: Path, value: int) -> Path:
    """A 32 x 32 image of one grey level, from which the image is known again after any resize or crop."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (value,) * 3).save(path)
    return path


def write_folder(root: Path, splits: dict[str, int], classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """root/SPLIT/CLASS/i.png, `splits` images a class; every image of a split has its own grey level, from 0 up."""
    for split, count in splits.items():
        for number, name in enumerate(classes):
            for i in range(count):
                write_grey(root / split / name / f"{i}.png", number * count + i)
    return root


def write_easy_folder(root: Path, train: int = 16, val: int = 7, seed: int = 0) -> Path:
    """Three classes that differ by their colour channel, with noise: a linear model tells them apart."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(("blue", "green", "red")):
            for i in range(count):
                pixels = generator.integers(0, 90, (32, 32, 3))
                pixels[..., 2 - number] += 120
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def small_recipe(**changes) -> Recipe:
    """Two epochs in batches of 16; no random crop, so that a set of noise stays what it is."""
    return Recipe(**{"name": "test", "source": "tests", "command": "pytest", "epochs": 2, "batch_size": 16, "lr": 3e-3,
                     "lr_batch": 16, "dtype": "float32",
                     "augment": {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "color_jitter": 0.0}, **changes})


def by_hand(model) -> dict:
    """The content of a published .pth, key by key as methods A9 name them."""
    state, channels = {}, []
    for key, value in model.state_dict().items():
        if not key.startswith("blocks."):
            state[key] = value.clone()
    for i, block in enumerate(model.blocks):
        for key, value in block.block.state_dict().items():
            state[f"blocks.{i}.{key}"] = value.clone()
        rule = block.tokens
        channels.append(rule.merge_matrix.shape[0])
        state[f"blocks.{i}.attn.merge_matrix"] = rule.merge_matrix.detach().clone()
        state[f"blocks.{i}.attn.recover_matrix"] = rule.reconstruct_matrix.detach().clone()
        state[f"blocks.{i}.attn.token_mask"] = rule.token_mask.clone()
        state[f"blocks.{i}.attn.bias"] = torch.full((channels[-1],), 7.0)       # unused in the forward, whatever it is
    return {"model": state, "channels": channels, "epoch": 29, "args": argparse.Namespace(keep_rate=0.6, lr=1e-4),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
            "scaler": {"scale": 1.0}}
