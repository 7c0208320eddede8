"""Shared fixtures: tiny timm models of every supported family, and random plans for them."""
import dataclasses
import os
import random

import pytest
import timm
import torch
from timm.layers import LayerScale
from torch import nn

from vitlab.models import shape_of
from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.rules import MergeReconstruct, Select
from vitlab.plan.shape import ViTShape
from vitlab.workbench.notebooks import import_nbformat

torch.set_num_threads(1)        # the models are tiny: with more threads they mostly wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")                   # in what tests start, too: several run at a time
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)                 # nor does each of these compile vitlab anew
import_nbformat()

# Depth 5, so that a plan can hold plain blocks side by side between merging ones. Grids are not square, and no two of
# tokens, width, head width and neurons are equal in one model.
FAMILIES: dict[str, tuple[str, dict]] = {
    "deit": ("deit_tiny_patch16_224", {"img_size": (48, 80), "embed_dim": 33, "num_heads": 3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": (80, 48), "embed_dim": 26, "num_heads": 2}),
    "augreg": ("vit_tiny_patch16_224", {"img_size": (48, 112), "embed_dim": 26, "num_heads": 2}),
    "deit3": ("deit3_small_patch16_224", {"img_size": (48, 80), "embed_dim": 39, "num_heads": 3, "init_values": 1e-4}),
    "mae": ("vit_base_patch16_224.mae", {"img_size": (48, 80), "embed_dim": 34, "num_heads": 2, "global_pool": "avg"}),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2",
                   {"img_size": (42, 70), "embed_dim": 38, "num_heads": 2, "init_values": 1e-4}),
    "qk_norm": ("vit_tiny_patch16_224", {"img_size": (40, 48), "patch_size": (8, 16), "embed_dim": 39, "num_heads": 3,
                                         "qk_norm": True}),
}
NUM_CLASSES, DEPTH = 7, 5
# A minute or more each, much of it in processes that they start: begun first, so that no core waits for the last
# (`--no-loadscope-reorder`, which the Makefile gives: else those with few tests come last).
LONG = ("notebooks", "families", "batch", "export", "timm_client", "study", "faults", "parallel", "survive",
        "processes", "packaging", "segmenting")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def unsynced():
    """No machine loses its power between two lines of a test: what is written need not reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def randomise(model: nn.Module, seed: int) -> None:
    """Weights of unit gain; LayerScale, biases, norms, class and position tokens away from their 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    scales = {id(m.gamma) for m in model.modules() if isinstance(m, LayerScale)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in scales:
                parameter.copy_(0.8 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif parameter.shape[0] == 1:       # class, distillation, register and position tokens
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    """Each supported family in turn."""
    return request.param


@pytest.fixture
def tiny_vit():
    """tiny_vit(family, seed=0, **timm arguments): a small random model in eval mode."""
    def make(family: str, seed: int = 0, **args) -> nn.Module:
        name, sizes = FAMILIES[family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(name, pretrained=False,
                                      **{"depth": DEPTH, "num_classes": NUM_CLASSES, **sizes, **args})
        randomise(model, seed)
        return model.eval()
    return make


@pytest.fixture
def images():
    """images(model, count, seed): random images of the model's size."""
    def make(model: nn.Module, count: int = 2, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(count, model.in_chans, *model.patch_embed.img_size, generator=generator)
    return make


def random_rule(n: int, chance: random.Random) -> MergeReconstruct:
    """Any legal rule, not only those that scores lead to: scattered regions, some patches pruned."""
    pruned = sorted(chance.sample(range(n), chance.randint(0, n // 2)))
    count = chance.randint(1, n - len(pruned))
    kept = [j for j in range(n) if j not in pruned]
    labels = list(range(count)) + [chance.randrange(count) for _ in kept[count:]]
    chance.shuffle(labels)
    region = dict(zip(kept, labels))
    weights = [chance.uniform(0.2, 1.0) if j in region else 0.0 for j in range(n)]
    return MergeReconstruct(regions=tuple(region.get(j, -1) for j in range(n)), weights=tuple(weights),
                            pruned=tuple(pruned), trains=chance.choice(["both", "reconstruct"]))


def all_pruned(n: int) -> MergeReconstruct:
    """Every patch skips the block; the prefix tokens go through it alone."""
    return MergeReconstruct(regions=(-1,) * n, weights=(0.0,) * n, pruned=tuple(range(n)))


TOKEN_LAYOUTS = {       # per block: m merges, - is plain, 0 prunes all patches
    "all_merge": "mmmmm", "ends_plain": "-mm--", "plain_between": "m--m0", "all_pruned_between": "m0-0m",
    "one": "--m--",
}


@pytest.fixture(params=list(TOKEN_LAYOUTS))
def layout(request) -> str:
    """Which blocks merge, prune everything, or are plain."""
    return TOKEN_LAYOUTS[request.param]


SPAN_LAYOUTS = {         # M begins a span that merges, 0 prunes all patches, and each dot is a block more
    "whole_model": "M....", "side_by_side": "M.M..", "between_plain": "-M..-", "between_one_block_rules": "mM..m",
    "ends": "--M..", "all_pruned": "M.0..", "then_one": "0..m-",
}


@pytest.fixture(params=list(SPAN_LAYOUTS))
def span_layout(request) -> str:
    """Which blocks stay merged together."""
    return SPAN_LAYOUTS[request.param]


SELECT_LAYOUTS = {      # s selects; what merges comes before it
    "alone": "--s--", "every_block": "sssss", "merge_then_select": "mm-s-", "side_by_side": "-m-ss",
    "carried_then_select": "m0-ss",
}


@pytest.fixture(params=list(SELECT_LAYOUTS))
def select_layout(request) -> str:
    """Which blocks select, after which that merge."""
    return SELECT_LAYOUTS[request.param]


@pytest.fixture
def random_plan():
    """random_plan(shape, layout, seed, shrink=True): token rules by layout, none in the blocks after it; heads and
    neurons at random."""
    def make(shape: ViTShape, layout: str, seed: int = 0, shrink: bool = True) -> CompressionPlan:
        chance = random.Random(seed)
        others = [shape.num_patches]        # that enter the next block, prefix tokens not counted

        def random_selection() -> Select:
            kept = chance.randint(min(2 * others[0] // 3, others[0] - 2), others[0] - 2)
            others[0] = kept + 1            # and the mean of the rest
            return Select(kept=kept, ranked_by=chance.choice(["kept", "all"]))
        make_rule = {"m": lambda: random_rule(shape.num_patches, chance),
                     "M": lambda: random_rule(shape.num_patches, chance), "-": lambda: None, ".": lambda: None,
                     "0": lambda: all_pruned(shape.num_patches), "s": random_selection}

        def kept(count: int) -> tuple[int, ...] | None:
            if not shrink or chance.random() < 0.3:
                return None
            return tuple(sorted(chance.sample(range(count), chance.randint(1, count))))
        blocks = [BlockPlan(heads=kept(shape.num_heads), neurons=kept(shape.num_neurons), tokens=make_rule[letter]())
                  for letter in layout.ljust(shape.depth, "-")]
        for index in range(len(blocks)):
            more = len(layout[index + 1:]) - len(layout[index + 1:].lstrip("."))
            if more and layout[index] != ".":
                blocks[index] = dataclasses.replace(blocks[index],
                                                    tokens=dataclasses.replace(blocks[index].tokens, span=1 + more))
        return CompressionPlan(shape=shape, blocks=tuple(blocks))
    return make


@pytest.fixture
def scored_plan():
    """scored_plan(model, keep_rate, prune_rate, seed): a plan by vitlab's own selection from random scores."""
    def make(model: nn.Module, keep_rate: float, prune_rate: float, seed: int = 0) -> CompressionPlan:
        shape = shape_of(model)
        scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(seed)) + 0.01
        unpruned, centers = tokens.choose(scores, keep_rate=keep_rate, prune_rate=prune_rate)
        rules = [tokens.merge_rule(s, u, c, columns=shape.grid_size[1]) for s, u, c in zip(scores, unpruned, centers)]
        return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=rule) for rule in rules))
    return make
