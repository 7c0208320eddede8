"""Small Segmenters and scenes that the tests of segmentation share."""
import numpy as np
import torch
from PIL import Image
from training_fixtures import tiny

from vitlab.data.layouts import IGNORE
from vitlab.data.scene_data import SceneData, Scenes
from vitlab.models import shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match

CLASSES, SIZE = 5, (24, 40)                     # of the Segmenters made here; 15 patches of 8 x 8, 16 tokens


def small(decoder: str = "mask_transformer", seed: int = 0, num_classes: int = CLASSES,
          img_size: tuple[int, int] = SIZE, **args) -> Segmenter:
    """A dense Segmenter in eval mode, 2 blocks of 24 wide, every parameter off its initial value; args are the
    decoder's; 7 queries in one block more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if decoder == "queries":
            args = {"depth": 1, "queries": 7, **args}
        depth = 2 + (args["depth"] if decoder == "queries" else 0)
        model = Segmenter(as_encoder(tiny(seed=seed, img_size=img_size, depth=depth)), num_classes, decoder, **args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pictures(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    """(count, 3, *size), normal."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def masks(count: int, size: tuple[int, int] = SIZE, seed: int = 0, classes: int = CLASSES,
          ignored: float = 0.2) -> torch.Tensor:
    """(count, *size) classes at random, a share of them ignored."""
    generator = torch.Generator().manual_seed(100 + seed)
    found = torch.randint(classes, (count, *size), generator=generator)
    return torch.where(torch.rand(count, *size, generator=generator) < ignored, IGNORE, found)


def batches(sizes: tuple[int, ...] = (3, 2), size: tuple[int, int] = SIZE,
            classes: int = CLASSES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of so many images each, with masks."""
    return [(pictures(count, size, i), masks(count, size, i, classes)) for i, count in enumerate(sizes)]


def units_plan(model: Segmenter) -> CompressionPlan:
    """A head and half of the neurons cut in each block."""
    return CompressionPlan(shape=shape_of(model), blocks=tuple(
        BlockPlan(heads=(0, 2), neurons=tuple(range(i % 2, 96, 2))) for i in range(len(model.blocks))))


def match_plan(model: Segmenter) -> CompressionPlan:
    """Tokens merged by content, in both blocks before queries."""
    shape = shape_of(model)
    return CompressionPlan(shape=shape, blocks=(BlockPlan(tokens=Match(merged=4)), BlockPlan(tokens=Match(merged=3)),
                                                *[BlockPlan()] * (shape.depth - 2)))


def opened(model: torch.nn.Module, plan: CompressionPlan | None = None, **info) -> Checkpoint:
    """A checkpoint as `open_model` gives it."""
    return Checkpoint(model=model, plan=plan or CompressionPlan.empty(shape_of(model)), info=info)


class Given:
    """Scenes that are there already: (height, width) -> an image of noise and a mask of its own size."""

    def __init__(self, sizes: list[tuple[int, int]], classes: int = CLASSES, ignored: float = 0.2) -> None:
        chance = np.random.default_rng(0)
        self.scenes = [(Image.fromarray(chance.integers(0, 256, (*size, 3), dtype=np.uint8)),
                        np.where(chance.random(size) < ignored, IGNORE,
                                 chance.integers(0, classes, size)).astype(np.uint8))
                       for size in sizes]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        return self.scenes[i]

    def filename(self, i: int) -> str:
        return f"given/{i}"


def given(sizes: list[tuple[int, int]], classes: int = CLASSES, ignored: float = 0.2) -> SceneData:
    """A data set of scenes of these sizes, the same in every split."""
    reader = Given(sizes, classes, ignored)
    return SceneData("given", {name: Scenes(reader) for name in ("train", "val", "test")},
                     [f"c{i}" for i in range(classes)], embedded=True)
