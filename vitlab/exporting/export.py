"""From a compressed model to a file that its runtime runs as PyTorch runs the model."""
import copy
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitlab.data.images import image_config
from vitlab.exporting.runtimes import RUNTIMES, Runtime, compiler, needed, traced
from vitlab.measure.distance import output_of
from vitlab.models import checkpoint, deploy
from vitlab.models.match import MatchBlock
from vitlab.models.merge import TokenBlock
from vitlab.models.share import SharedUpdateBlock
from vitlab.models.support import encoder_of
from vitlab.plan import CompressionPlan
from vitlab.runtime.files import InputError

BATCHES = (1, 2, 5)                             # sizes that a file is verified at
# Largest difference, as a share of the outputs' range: float32 in another order of operations stays below 1e-4 through
# 12 to 24 blocks. What merges by content may take another of two tokens that are alike to rounding: then few images
# differ more, and these must be no more than FEW of them.
SAME, FEW = 1e-3, 0.1


def exported_form(model: nn.Module) -> nn.Module:
    """A copy as it is written: deployed, on the CPU, in float32, of operations that every runtime computes right."""
    has_matrices = any(isinstance(module, TokenBlock) for module in model.modules())
    found = (deploy(model) if has_matrices else copy.deepcopy(model)).cpu().float().eval().requires_grad_(False)
    for module in found.modules():
        if isinstance(module, SharedUpdateBlock):
            module.gather_members()
        elif isinstance(module, MatchBlock):
            module.by_product = True
    return found


def runtime_of(path: str | Path, to: str | None) -> tuple[str, Runtime]:
    """(name, runtime) that a file is for: `to`, or by its ending. Raises InputError for another, one that is not
    installed, or a name that does not end as its files do."""
    endings = {name: runtime.ending for name, runtime in RUNTIMES.items()}
    if to is None:
        fits = [name for name, ending in endings.items() if os.fspath(path).endswith(ending)]
        if not fits:
            raise InputError(f"{path}: what it is for can't be told by its ending; known are "
                             + ", ".join(f"{ending} ({name})" for name, ending in endings.items()))
        to = max(fits, key=lambda name: len(endings[name]))
    if to not in RUNTIMES:
        raise InputError(f"runtime {to!r} is not known; known are {list(RUNTIMES)}")
    if not os.fspath(path).endswith(endings[to]):
        raise InputError(f"{path}: files for {to} end in {endings[to]}")
    for module in RUNTIMES[to].needs:
        needed(module)
    if to == "aoti":
        compiler()
    return to, RUNTIMES[to]


def export(model: nn.Module, out: str | Path, *, to: str | None = None, images: Tensor | None = None,
           plan: CompressionPlan | None = None, classes: list[str] | None = None,
           int8: Tensor | None = None) -> dict[str, Any]:
    """Write a model's deployed form to the file `out` for a runtime (a name of RUNTIMES; None: by the ending), run it
    there on images (B, channels, height, width), prepared for the model (None: random ones), in batches of several
    sizes, and compare with PyTorch; returns what the file says of itself, also stored in it:

    images: size, mean, std, interpolation, crop_pct, crop_mode; classes; plan; versions; verified: largest difference
    as a share of the outputs' range, and `likeness`.
    int8: images like `images`, others than these, that the ranges of activations are taken from: the file computes in
    int8 (static quantisation by the runtime's own tools), its outputs differ, and `verified` says by how much.
    Raises InputError for an unknown runtime, or one that gives other outputs: then no file is left.
    """
    name, runtime = runtime_of(out, to)
    if int8 is not None and runtime.write_int8 is None:
        raise InputError(f"{out}: files for {name} are not quantised; those for "
                         f"{', '.join(name for name, each in RUNTIMES.items() if each.write_int8)} are")
    model, config = exported_form(model), image_config(encoder_of(model))
    if images is None:
        images = torch.randn(sum(BATCHES), *config["input_size"], generator=torch.Generator().manual_seed(0))
    images, int8 = images.cpu().float(), None if int8 is None else int8.cpu().float()
    for given in (images, *([] if int8 is None else [int8])):
        if given.dim() != 4 or tuple(given.shape[1:]) != tuple(config["input_size"]) or len(given) < 2:
            raise InputError(f"images are {tuple(given.shape)}; at least 2 of {tuple(config['input_size'])} are needed")
    about: dict[str, Any] = {
        "images": {key: config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")},
        "classes": classes, "plan": None if plan is None else json.loads(plan.to_json()), "runtime": name,
        "dtype": "float32" if int8 is None else "int8",
        "versions": checkpoint.versions()}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of converters, about themselves
        file = Path(folder) / out.name
        program = traced(model, images[:2])
        if int8 is None:
            runtime.write(program, file)
        else:
            runtime.write_int8(program, file, int8)
        about["verified"] = verify(model, runtime, file, images, few=FEW if int8 is None else 1.0)
        runtime.tell(file, about)
        for ending in (*runtime.beside, runtime.ending):                        # the one that names the others last
            part = file.with_name(file.name.removesuffix(runtime.ending) + ending)
            part.replace(out.with_name(part.name))
    return about


def verify(model: nn.Module, runtime: Runtime, file: Path, images: Tensor, few: float = FEW) -> dict[str, Any]:
    """A file's outputs beside the model's, on images in batches of each of BATCHES. Raises InputError where they are
    others for more than a few of them (a share), or not finite."""
    run = runtime.open(file, None, "float32")
    with torch.inference_mode():
        expected = model(images).numpy()
    found = [np.concatenate([run(np.ascontiguousarray(part.numpy())) for part in images.split(size)])
             for size in BATCHES]
    scale = max(float(np.ptp(expected)), float(np.finfo(np.float32).tiny))
    each = np.stack([np.abs(one - expected).reshape(len(images), -1).max(axis=1) for one in found]) / scale
    largest, alike = float(each.max()), likeness(model, np.concatenate(found), np.concatenate([expected] * len(found)))
    said = {"batch_sizes": list(BATCHES), "images": len(images), "largest_difference": largest, **alike}
    if not np.isfinite(each).all() or (each > SAME).mean() > few:
        raise InputError(f"{file.name}: its outputs are not the model's: they differ by up to {largest:.3g} of their "
                         f"range, {in_words(alike)}; nothing was written")
    return said


def likeness(model: nn.Module, found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """What a runtime found beside what was expected of the model: the share of images (of a Segmenter: pixels) of the
    same class, in percent; of features, which have none, the mean cosine (`output_of`)."""
    output, both = output_of(model), (torch.from_numpy(found), torch.from_numpy(expected))
    if output.labelled:
        return {"agree_pct": 100 * float(torch.eq(*(each.argmax(dim=1) for each in both)).double().mean())}
    prefix = getattr(model, "num_prefix_tokens", 0)
    return {"cosine": 1 - float(output.apart(*(output.compared(output.taken(each, prefix)) for each in both)).mean())}


def in_words(alike: dict[str, float]) -> str:
    """What `likeness` says."""
    return f"{alike['agree_pct']:.1f} % of classes agree" if "agree_pct" in alike else \
        f"features have a cosine of {alike['cosine']:.6f}"
