"""Tiny variants of timm's pretrained vision transformers: one of every structure that there is."""
import functools
import warnings

import timm
import torch
from timm.models._registry import _model_to_module
from timm.models.naflexvit import NaFlexVit
from torch import nn

from vitlab.models.naflex import at_fixed_size
from vitlab.models.parallel_blocks import in_parts
from vitlab.models.unfilled import sizes_alone

# timm's files of models that are one stage of blocks on a grid
MODULES = ("vision_transformer", "eva", "beit", "deit", "vision_transformer_hybrid", "vision_transformer_relpos",
           "vitamin", "cait", "vision_transformer_sam", "naflexvit")
CLASSES = 7
# what makes a model small, tried in this order; some have stems whose width the blocks' must be
SMALL = ({"img_size": (16, 20), "patch_size": 4, "embed_dim": 48, "num_heads": 2, "depth": 3},
         {"img_size": (16, 20), "patch_size": 4, "embed_dim": 48, "num_heads": 4, "depth": 3,
          "num_kv_heads": (4, 2, 4)},
         {"img_size": (64, 96), "embed_dim": 48, "num_heads": 2, "depth": 3},
         {"img_size": (64, 96), "depth": 2})


def pretrained() -> dict[str, int]:
    """Names of timm's architectures, with how many weights there are of each."""
    found: dict[str, int] = {}
    for name in timm.list_pretrained():
        base = name.split(".")[0]
        if _model_to_module[base] in MODULES:
            found[base] = found.get(base, 0) + 1
    return found


def tiny(name: str, device: str = "meta", **args) -> nn.Module:
    """A small model of an architecture, with its kinds of parts; of a NaFlexVit, as it is at one size, of
    parallel blocks, in parts. args: more of timm's arguments."""
    failed = None
    for small in SMALL:
        try:
            with warnings.catch_warnings(), sizes_alone() if device == "meta" else torch.device(device):
                warnings.simplefilter("ignore")
                model = timm.create_model(name, pretrained=False, **{"num_classes": CLASSES, **small, **args}).eval()
                return in_parts(at_fixed_size(model) if isinstance(model, NaFlexVit) else model)
        except Exception as error:              # whatever an architecture with other arguments makes timm raise
            failed = error
    raise failed


@functools.cache
def sketch(name: str) -> nn.Module:
    """`tiny` without memory, made once; nobody changes it."""
    return tiny(name)


@functools.cache
def structures() -> dict[str, list[str]]:
    """Architectures by structure: the first of each, with all that are like it."""
    found: dict[str, list[str]] = {}
    firsts: dict[str, str] = {}
    for name in pretrained():
        model = sketch(name)
        kind = f"{model} {[tuple(p.shape) for p in model.parameters()]} {getattr(model, 'global_pool', '')}"
        found.setdefault(firsts.setdefault(kind, name), []).append(name)
    return found
