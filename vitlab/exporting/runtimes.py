"""Runtimes beside PyTorch's own: how a traced model is written for each, and how such a file is run."""
import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vitlab.runtime.files import InputError

# a batch of images (B, channels, height, width) in float32 -> what the model gives for it
Run = Callable[[np.ndarray], np.ndarray]
INPUT, OUTPUT, ABOUT = "images", "output", "vitlab"     # names in a file: of its tensors, and of what is said about it


@dataclass(frozen=True)
class Runtime:
    """A kind of file, named by its ending, and its runtime."""

    ending: str
    needs: tuple[str, ...]                      # modules of the extra "export"
    write: Callable[[ExportedProgram, Path, dict[str, Any]], None]
    open: Callable[[Path, int | None], Run]     # of a file and a number of threads (None: the runtime's own)
    about: Callable[[Path], dict[str, Any]]     # what `write` was given beside the model
    beside: tuple[str, ...] = ()                # endings of other files of it


def needed(name: str) -> ModuleType:
    """A module of the extra. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} can't be imported ({error}); python -m pip install 'vitlab[export]'") from None


def _told(text: str | None, path: Path) -> dict[str, Any]:
    if not text:
        raise InputError(f"{path}: vitlab did not write it: it says nothing about its images and plan")
    return json.loads(text)


def _write_onnx(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    needed("onnxscript")
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT],
                             external_data=False)
    made.model.metadata_props[ABOUT] = json.dumps(about)
    made.save(path)


def _open_onnx(path: Path, threads: int | None) -> Run:
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = runtime.InferenceSession(path, options, providers=runtime.get_available_providers())
    return lambda images: session.run(None, {INPUT: images})[0]


def _about_onnx(path: Path) -> dict[str, Any]:
    found = needed("onnx").load(path, load_external_data=False)
    return _told({entry.key: entry.value for entry in found.metadata_props}.get(ABOUT), path)


def _write_openvino(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    openvino = needed("openvino")
    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    model.set_rt_info(json.dumps(about), ABOUT)
    openvino.save_model(model, path, compress_to_fp16=False)


def _open_openvino(path: Path, threads: int | None) -> Run:
    openvino = needed("openvino")
    # weights are float32: bfloat16, which it would choose where the machine has it, is asked for by name
    config = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = openvino.Core().compile_model(path, "CPU", config)
    return lambda images: compiled(images)[0]


def _about_openvino(path: Path) -> dict[str, Any]:
    model = needed("openvino").Core().read_model(path)
    return _told(model.get_rt_info(ABOUT).value if model.has_rt_info(ABOUT) else None, path)


def _torch_run(call: Callable[[Tensor], Tensor], threads: int | None) -> Run:
    if threads:
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return call(torch.from_numpy(images)).numpy()
    return run


def _write_pt2(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    torch.export.save(program, path, extra_files={f"{ABOUT}.json": json.dumps(about)})


def _open_pt2(path: Path, threads: int | None) -> Run:
    return _torch_run(torch.export.load(path).module(), threads)


def _about_pt2(path: Path) -> dict[str, Any]:
    extra = {f"{ABOUT}.json": ""}
    torch.export.load(path, extra_files=extra)
    return _told(extra[f"{ABOUT}.json"], path)


def _write_aoti(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path),
                                             inductor_configs={"aot_inductor.metadata": {ABOUT: json.dumps(about)}})


def _open_aoti(path: Path, threads: int | None) -> Run:
    return _torch_run(torch._inductor.aoti_load_package(os.fspath(path)), threads)


def _about_aoti(path: Path) -> dict[str, Any]:
    return _told(torch._inductor.aoti_load_package(os.fspath(path)).get_metadata().get(ABOUT), path)


RUNTIMES: Mapping[str, Runtime] = {
    "onnx": Runtime(".onnx", ("onnxscript", "onnxruntime"), _write_onnx, _open_onnx, _about_onnx),
    "openvino": Runtime(".xml", ("openvino",), _write_openvino, _open_openvino, _about_openvino, (".bin",)),
    "pt2": Runtime(".pt2", (), _write_pt2, _open_pt2, _about_pt2),
    "aoti": Runtime(".aoti.pt2", (), _write_aoti, _open_aoti, _about_aoti)}


def traced(model: torch.nn.Module, images: Tensor) -> ExportedProgram:
    """torch.export of a model in eval mode, for batches of any size."""
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
