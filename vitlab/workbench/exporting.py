"""The step out of the door: a model as a file for the runtime that it will run in, verified there on images."""
from typing import Annotated, Literal

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from vitlab.exporting.export import export as export_model
from vitlab.exporting.export import runtime_of
from vitlab.models.opening import Source, open_model
from vitlab.models.support import encoder_of
from vitlab.runtime.config import RunConfig, flags
from vitlab.runtime.kinds import Data, File, Several
from vitlab.workbench.pictures import as_input
from vitlab.workbench.steps import measured_batches, open_matching


def export(source: Source, out: File, *, to: Literal["onnx", "openvino", "pt2", "aoti"] | None = None,
           data: Data | None = None, images: Several = 64,
           config: Annotated[RunConfig, flags("workers", "seed", "quiet")] = RunConfig()) -> str:
    """Write a model's deployed form as a file for another runtime, and run it there as in PyTorch (`vitlab.export`);
    returns what came of it, in a line.

    Args:
        out: its ending says for what it is: .onnx, .xml (OpenVINO, weights beside it in .bin), .pt2 (torch.export) or
            .aoti.pt2 (AOTInductor)
        to: the same in a word
        data: whose images of train it is verified on (default: two photographs of scikit-learn)
        images: how many of them, at most
    """
    runtime_of(out, to)                         # before the model is opened
    found = open_model(source)
    if data is None:
        shown = torch.cat([as_input(np.asarray(each) / 255, encoder_of(found.model))
                           for each in load_sample_images().images])
    else:
        parts = open_matching(data, found, labels=False).parts(config.seed, report=images)
        shown = torch.cat([batch for batch, _ in measured_batches(found.model, parts, "report", config.workers)])
    about = export_model(found.model, out, to=to, images=shown, plan=found.plan, classes=found.info.get("classes"))
    verified = about["verified"]
    return (f"{out}: runs in {about['runtime']} as in PyTorch on {verified['images']} images, in batches of "
            f"{', '.join(map(str, verified['batch_sizes']))}: outputs differ by at most "
            f"{verified['largest_difference']:.2g} of their range, {verified['agree_pct']:.1f} % of classes agree")
