"""Training recipes: settings with their source, the number to expect, and the command that runs them."""
import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter

from vitlab.plan.rules import TRAINABLE
from vitlab.runtime.files import InputError, check_known
from vitlab.runtime.kinds import Count, Natural

DISTILL, DTYPES = ("none", "soft", "hard"), ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, through timm's optimizers and schedulers."""

    name: str
    source: str                                 # where the settings come from
    command: str                                # how to run it
    expected: str = ""                          # what should come out, and whose number it is
    epochs: int = 30
    batch_size: int = 128                       # images a step, on all devices together
    lr: float = 1e-4                            # at `lr_batch` images a step; scaled linearly with the batch
    lr_batch: int = 512
    weight_decay: float = 1e-3
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup_epochs: float = 0
    min_lr: float = 1e-6
    clip_grad: float | None = None
    layer_decay: float | None = None  # factor of the learning rate from each block to the one before it, (0, 1]
    matrices_lr: float = 1.0                    # factor of the learning rate for merge and reconstruct matrices, > 0
    # weights become their moving average over the steps, (0, 1), at most (stepping.AVERAGE)
    ema_decay: float | None = None
    smoothing: float = 0.0                      # label smoothing, [0, 1)
    mixup: float = 0.0                          # alpha of mixup; with cutmix, each batch has one of the two
    cutmix: float = 0.0                         # alpha of cutmix
    repeats: int = 1  # repeated augmentation: each image drawn is in so many places of an epoch
    distill: str = "none"                       # "none", "soft" (A8) or "hard"
    alpha: float = 1.0                          # weight of the distillation loss, [0, 1]
    tau: float = 20.0                           # temperature of soft distillation
    trainable: str = "all"                      # "all", "matrices" or "weights"
    drop_path: float = 0.0
    dtype: str | None = None  # a name of DTYPES; None: bfloat16 where the hardware has it (narrow models lose by it)
    augment: dict[str, Any] = field(default_factory=dict)      # options of timm's create_transform

    def __post_init__(self) -> None:
        checks = {"epochs": self.epochs >= 1, "batch_size": self.batch_size >= 1, "lr": self.lr > 0,
                  "weight_decay": self.weight_decay >= 0, "alpha": 0 <= self.alpha <= 1, "tau": self.tau > 0,
                  "lr_batch": self.lr_batch >= 1, "warmup_epochs": self.warmup_epochs >= 0, "min_lr": self.min_lr >= 0,
                  "clip_grad": self.clip_grad is None or self.clip_grad > 0, "drop_path": 0 <= self.drop_path < 1,
                  "layer_decay": self.layer_decay is None or 0 < self.layer_decay <= 1, "repeats": self.repeats >= 1,
                  "matrices_lr": self.matrices_lr > 0,
                  "ema_decay": self.ema_decay is None or 0 < self.ema_decay < 1, "mixup": self.mixup >= 0,
                  "cutmix": self.cutmix >= 0, "dtype": self.dtype is None or self.dtype in DTYPES,
                  "trainable": self.trainable in TRAINABLE, "smoothing": 0 <= self.smoothing < 1,
                  "distill": self.distill in DISTILL}
        for name, good in checks.items():
            if not good:
                raise InputError(f"recipe {self.name}: {name} is {getattr(self, name)!r}, out of its range")

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with the settings that are not None changed."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})

    @property
    def scaled_lr(self) -> float:
        """lr * batch_size / lr_batch."""
        return self.lr * self.batch_size / self.lr_batch


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a recipe is run. But for rounding, none of it changes what comes out.

    Args:
        accumulate: batches of a step that follow each other, where one would need too much memory
        compile: compile the model (torch.compile)
        checkpointing: keep no activations inside blocks: less memory, a third more time
        channels_last: memory format of the images and of the patch embedding
        save_steps: a state on the disk so often within an epoch, and at its end
        keep: states that stay on the disk
        log_steps: a line in the log so often within an epoch
        max_skipped: steps in a row whose loss may be not finite: they are left out
    """

    accumulate: Count = 1
    compile: bool = False
    checkpointing: Annotated[bool, Parameter(name="--grad-checkpointing")] = False
    channels_last: bool = False
    save_steps: Count = 1000
    keep: Count = 2
    log_steps: Count = 100
    max_skipped: Natural = 10

    def __post_init__(self) -> None:
        lowest = {"accumulate": 1, "save_steps": 1, "keep": 1, "log_steps": 1, "max_skipped": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; at least {low} is needed")


_PAPER = "arXiv 2503.23455, experiments on ImageNet-1k"
_PRETRAIN = "vitlab pretrain --model {} --data {} --recipe {} --out RUN/dense"
_FINETUNE = "vitlab finetune --checkpoint RUN/pruned --teacher {} --data {} --recipe {} --out RUN/finetuned"
_SCENE_AUGMENT = {"scale": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
_SEGMENT = "vitlab segment --checkpoint {} --data {} --recipe {} --out RUN/dense"
_SEGMENTER: dict[str, Any] = {"epochs": 64, "batch_size": 8, "lr": 2e-4, "lr_batch": 8, "weight_decay": 0.01,
                              "warmup_epochs": 1, "drop_path": 0.1, "clip_grad": 1.0}          # 160,000 steps of ADE20K
_DIGIT_AUGMENT = {"scale": (0.85, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": 0.0}


def _published(name: str, teacher: str, alpha: float, expected: str) -> Recipe:
    """Methods A8: AdamW, lr 1e-4 * batch / 512, cosine, weight decay 1e-3, no auto-augment, 30 epochs, tau 20."""
    return Recipe(name=name, source=_PAPER, expected=expected + " (the paper's numbers)",
                  command=_FINETUNE.format(teacher, "IMAGENET", name), distill="soft", alpha=alpha, tau=20.0,
                  augment={"color_jitter": 0.0})


RECIPES = {recipe.name: recipe for recipe in (
    _published("deit_tiny_pm", "deit_tiny_patch16_224", 0.8,
               "top-1 72.0 % at keep 0.7 (0.8 GMACs), 71.6 % at keep 0.6 (0.7); dense 72.2 % (1.3)"),
    _published("deit_small_pm", "deit_small_patch16_224", 1.0, "top-1 79.6 % at keep 0.6 (3.0 GMACs); dense 79.8 % "
                                                               "(4.6)"),
    _published("mae_base_pm", "vit_base_patch16_224.mae", 1.0, "top-1 83.6 % at keep 0.6 (10.4 GMACs)"),
    Recipe(name="deit", source="arXiv 2012.12877, table 9",
           expected="top-1 72.2 % of deit_tiny_patch16_224, 79.8 % of deit_small, 81.8 % of deit_base (the paper's "
                    "numbers)",
           command=_PRETRAIN.format("deit_tiny_patch16_224", "IMAGENET", "deit"),
           epochs=300, batch_size=1024, lr=5e-4, lr_batch=512, weight_decay=0.05, warmup_epochs=5, min_lr=1e-5,
           smoothing=0.1, mixup=0.8, cutmix=1.0, repeats=3, drop_path=0.1, ema_decay=0.99996,
           augment={"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel", "color_jitter": 0.3}),
    Recipe(name="digits", source="vitlab, chosen on a slice of train", expected="top-1 over 95 % on the digits' test "
                                                                                "split",
           command=_PRETRAIN.format("vit_nano_patch4_32", "digits", "digits"),
           epochs=40, batch_size=32, lr=1.5e-3, lr_batch=32, weight_decay=0.05, warmup_epochs=2, smoothing=0.05,
           clip_grad=1.0, dtype="float32", augment=_DIGIT_AUGMENT),
    Recipe(name="digits_short", source="vitlab: digits, in under a third of the time",
           expected="top-1 85 % on the digits' test split",
           command=_PRETRAIN.format("vit_nano_patch4_32", "digits", "digits_short"),
           epochs=12, batch_size=32, lr=1.5e-3, lr_batch=32, weight_decay=0.05, warmup_epochs=2, smoothing=0.05,
           clip_grad=1.0, dtype="float32", augment=_DIGIT_AUGMENT),
    Recipe(name="digits_pm", source="vitlab: methods A8, larger steps for 1,437 images",
           expected="within 1 point of the dense model",
           command=_FINETUNE.format("RUN/dense", "digits", "digits_pm"),
           epochs=12, batch_size=32, lr=3e-4, lr_batch=32, distill="soft", alpha=0.8, tau=4.0, clip_grad=1.0,
           dtype="float32", augment=_DIGIT_AUGMENT),
    Recipe(name="segmenter", source="arXiv 2105.05633, section 4.1, with AdamW at small batches in place of SGD",
           expected="mIoU 38 % of a tiny and 46 % of a small Segmenter on ADE20K's val (the paper's numbers)",
           command=_SEGMENT.format("deit_tiny_patch16_224", "ADE20K", "segmenter"), **_SEGMENTER),
    Recipe(name="segmenter_match",
           source="ALGM (CVPR 2024, arXiv 2406.09936): trained with merging by content as a Segmenter is without, no "
                  "teacher; here from the dense one, and merged by a ratio, not by a threshold",
           expected="mIoU 46.4 % of a small Segmenter with 26.3 GFLOPs on ADE20K's val, 45.3 % dense with 38.6 (the "
                    "paper's numbers, by its own rule); not measured by this one",
           command="vitlab finetune --checkpoint RUN/matched --data ADE20K --recipe segmenter_match --out RUN/tuned",
           **_SEGMENTER),
    Recipe(name="camvid", source="vitlab, chosen on CamVid's val", expected="benchmarks/results/camvid.jsonl",
           command=_SEGMENT.format("deit_tiny_patch16_224", "CAMVID", "camvid"),
           epochs=20, batch_size=8, lr=3e-4, lr_batch=8, weight_decay=0.01, warmup_epochs=1, drop_path=0.1,
           clip_grad=1.0),
    Recipe(name="segmenter_pm", source="methods A8 for a class per pixel: tau 20, alpha 1 (arXiv 2503.23455, semantic "
                                       "segmentation)",
           expected="mIoU 51.7 % of a large Segmenter at keep 0.7 on ADE20K's val, 51.8 % dense (the paper's numbers)",
           command=_FINETUNE.format("RUN/dense", "ADE20K", "segmenter_pm"),
           epochs=16, batch_size=8, lr=1e-4, lr_batch=8, distill="soft", alpha=1.0, tau=20.0, clip_grad=1.0),
    Recipe(name="camvid_pm", source="vitlab, chosen on CamVid's val: methods A8 per pixel at tau 1, matrices at a "
                                    "tenth of the rate",
           expected="benchmarks/results/camvid.jsonl", command=_FINETUNE.format("RUN/dense", "CAMVID", "camvid_pm"),
           epochs=3, batch_size=4, lr=1e-4, lr_batch=4, warmup_epochs=0.2, matrices_lr=0.1, distill="soft", alpha=0.5,
           tau=1.0, clip_grad=1.0),
    Recipe(name="digit_scenes", source="vitlab, chosen on the scenes' val",
           expected="mIoU over 70 % on the scenes' val, from the digits",
           command=_SEGMENT.format("RUN/dense", "digit_scenes", "digit_scenes"),
           epochs=12, batch_size=4, lr=1.5e-3, lr_batch=4, weight_decay=0.05, warmup_epochs=0.4, clip_grad=1.0,
           dtype="float32", augment=_SCENE_AUGMENT),
    Recipe(name="digit_scenes_pm", source="vitlab: methods A8 per pixel, larger steps for small scenes",
           expected="within 5 points of the dense Segmenter",
           command=_FINETUNE.format("RUN/dense", "digit_scenes", "digit_scenes_pm"), epochs=2, batch_size=4, lr=5e-4,
           lr_batch=4, distill="soft", alpha=0.8, tau=4.0, clip_grad=1.0, dtype="float32", augment=_SCENE_AUGMENT),
    Recipe(name="cifar10", source="vitlab", expected="benchmarks/results/cifar10.jsonl",
           command=_PRETRAIN.format("vit_micro_patch4_32", "CIFAR10", "cifar10"),
           epochs=16, batch_size=128, lr=1e-3, lr_batch=128, weight_decay=0.05, warmup_epochs=1, smoothing=0.1,
           clip_grad=1.0, augment={"scale": (0.6, 1.0), "color_jitter": 0.0}),
    Recipe(name="cifar10_pm", source="vitlab: methods A8, fewer epochs", expected="benchmarks/results/cifar10.jsonl",
           command=_FINETUNE.format("RUN/dense", "CIFAR10", "cifar10_pm"),
           epochs=3, batch_size=128, lr=3e-4, lr_batch=128, distill="soft", alpha=0.8, tau=4.0, clip_grad=1.0,
           augment={"scale": (0.7, 1.0), "color_jitter": 0.0}),
)}


def recipe(name: str) -> Recipe:
    """A recipe by name. Raises InputError that lists the known ones."""
    check_known("recipe", name, RECIPES)
    return RECIPES[name]
