"""The step out of the door: a model as a file for the runtime that it will run in, verified there on images."""
from typing import Annotated, Literal

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from vitlab.exporting.export import export as export_model
from vitlab.exporting.export import in_words, runtime_of
from vitlab.models.opening import Source, open_model
from vitlab.models.support import encoder_of
from vitlab.runtime.config import RunConfig, flags
from vitlab.runtime.files import InputError
from vitlab.runtime.kinds import Data, File, Several
from vitlab.workbench.pictures import as_input
from vitlab.workbench.steps import measured_batches, open_matching


def export(source: Source, out: File, *, to: Literal["onnx", "openvino", "pt2", "aoti"] | None = None,
           data: Data | None = None, images: Several = 64, int8: bool = False,
           config: Annotated[RunConfig, flags("workers", "seed", "quiet")] = RunConfig()) -> str:
    """Write a model's deployed form as a file for another runtime, and run it there as in PyTorch (`vitlab.export`);
    returns what came of it, in a line.

    Args:
        out: its ending says for what it is: .onnx, .xml (OpenVINO, weights beside it in .bin), .pt2 (torch.export) or
            .aoti.pt2 (AOTInductor)
        to: the same in a word
        data: whose images of train it is verified on (default: two photographs of scikit-learn)
        images: how many of them, at most
        int8: static quantisation by the runtime's own tools, on as many other images of train (.onnx or .xml)
    """
    runtime_of(out, to)                         # before the model is opened
    if int8 and data is None:
        raise InputError("int8 takes its ranges from images of the data that the model is for; data is needed")
    found = open_model(source)
    if data is None:
        ranges, shown = None, torch.cat([as_input(np.asarray(each) / 255, encoder_of(found.model))
                           for each in load_sample_images().images])
    else:
        parts = open_matching(data, found, labels=False).parts(config.seed, **({"score": images} if int8 else {}),
                                                               report=images)
        shown, ranges = (torch.cat([batch for batch, _ in measured_batches(found.model, parts, role, config.workers)])
                         if role in parts.roles else None for role in ("report", "score"))
    about = export_model(found.model, out, to=to, images=shown, plan=found.plan, classes=found.info.get("classes"),
                         int8=ranges)
    verified = about["verified"]
    how = "in int8, beside PyTorch" if int8 else "as in PyTorch"
    return (f"{out}: runs in {about['runtime']} {how} on {verified['images']} images, in batches of "
            f"{', '.join(map(str, verified['batch_sizes']))}: outputs differ by at most "
            f"{verified['largest_difference']:.2g} of their range, {in_words(verified)}")
