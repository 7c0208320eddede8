"""Runtimes beside PyTorch's own: how a traced model is written for each, and how such a file is run."""
import importlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive.constants import EXTRA_DIR

from vitlab.runtime.files import InputError

# a batch of images (B, channels, height, width) in float32 -> what the model gives for it
Run = Callable[[np.ndarray], np.ndarray]
INPUT, OUTPUT, ABOUT = "images", "output", "vitlab"     # names in a file: of its tensors, and of what is said about it


@dataclass(frozen=True)
class Runtime:
    """A kind of file, named by its ending, and its runtime."""

    ending: str
    needs: tuple[str, ...]                      # modules of the extra "export"
    write: Callable[[ExportedProgram, Path], None]
    # of a file, a number of threads (None: the runtime's own), and the dtype that it computes in
    open: Callable[[Path, int | None, str], Run]
    tell: Callable[[Path, dict[str, Any]], None]        # sets what a file says of itself, its graph as it is
    about: Callable[[Path], dict[str, Any]]     # what it says
    beside: tuple[str, ...] = ()                # endings of other files of it
    # the same in int8, its ranges from images (`int8`); None: it has no such files
    write_int8: Callable[[ExportedProgram, Path, Tensor], None] | None = None


class NotHere(InputError):
    """What a runtime needs is not installed."""


def needed(name: str) -> ModuleType:
    """A module of the extra. Raises NotHere where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotHere(f"{name} can't be imported ({error}); python -m pip install 'vitlab[export]'") from None


def _told(text: str | None, path: Path) -> dict[str, Any]:
    if not text:
        raise InputError(f"{path}: vitlab did not write it: it says nothing about its images and plan")
    return json.loads(text)


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    needed("onnxscript")
    torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT],
                      external_data=False).save(path)


def _as_written(dtype: str, runtime: str) -> None:
    if dtype != "float32":
        raise InputError(f"files for {runtime} compute in float32, as they are written, not in {dtype}; openvino takes "
                         "bfloat16 where the processor has it")


def _write_onnx_int8(program: ExportedProgram, path: Path, images: Tensor) -> None:
    """Weights and activations of the matrix products, by onnxruntime's static quantisation (QDQ); softmax, norms and
    products of two activations stay in float32."""
    tools, shapes = needed("onnxruntime.quantization"), needed("onnxruntime.quantization.shape_inference")
    parts = iter([{INPUT: part.numpy()} for part in images.split(1)])

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(parts, None)
    whole = path.with_name("float32.onnx")
    _write_onnx(program, whole)
    shapes.quant_pre_process(whole, whole, skip_optimization=True, skip_symbolic_shape=True)
    graph = needed("onnx").load(whole).graph
    weights = {tensor.name for tensor in graph.initializer}     # in QDQ the tool's own MatMulConstBOnly does nothing
    # 7 bits of weights: processors without VNNI add two products of 8 bits in 16, which overflows
    tools.quantize_static(whole, path, Reader(), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                          reduce_range=True, activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8,
                          nodes_to_exclude=[node.name for node in graph.node if not weights & {*node.input}])
    whole.unlink()


def _open_onnx(path: Path, threads: int | None, dtype: str = "float32") -> Run:
    _as_written(dtype, "onnxruntime")
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")        # who is timed next has the cores
    session = runtime.InferenceSession(path, options, providers=runtime.get_available_providers())
    return lambda images: session.run(None, {INPUT: images})[0]


def _tell_onnx(path: Path, about: dict[str, Any]) -> None:
    onnx = needed("onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {ABOUT: json.dumps(about)})
    onnx.save(model, path)


def _about_onnx(path: Path) -> dict[str, Any]:
    found = needed("onnx").load(path, load_external_data=False)
    return _told({entry.key: entry.value for entry in found.metadata_props}.get(ABOUT), path)


def _write_openvino(program: ExportedProgram, path: Path) -> None:
    _save_openvino(program, path)


def _write_openvino_int8(program: ExportedProgram, path: Path, images: Tensor) -> None:
    """Quantised by onnxruntime; OpenVINO reads that file and computes in int8, too."""
    whole = path.with_name("int8.onnx")
    _write_onnx_int8(program, whole, images)
    _save_openvino(whole, path)
    whole.unlink()


def _save_openvino(made: ExportedProgram | Path, path: Path) -> None:
    openvino = needed("openvino")
    model = openvino.convert_model(made)
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    openvino.save_model(model, path, compress_to_fp16=False)


def _open_openvino(path: Path, threads: int | None, dtype: str = "float32") -> Run:
    openvino = needed("openvino")
    # bfloat16, which it would choose where the machine has it, is asked for by name
    hint, has = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}[dtype]
    if has not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError(f"this processor does not compute in {dtype} in openvino; float32 is what it can")
    config = {"INFERENCE_PRECISION_HINT": hint, **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = openvino.Core().compile_model(path, "CPU", config)
    return lambda images: compiled(images)[0]


def _tell_openvino(path: Path, about: dict[str, Any]) -> None:
    openvino = needed("openvino")
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})   # the weights are read before they are written over
    model = core.read_model(path)
    model.set_rt_info(json.dumps(about), ABOUT)
    openvino.save_model(model, path, compress_to_fp16=False)


def _about_openvino(path: Path) -> dict[str, Any]:
    model = needed("openvino").Core().read_model(path)
    return _told(model.get_rt_info(ABOUT).value if model.has_rt_info(ABOUT) else None, path)


def _torch_run(call: Callable[[Tensor], Tensor], threads: int | None, dtype: str) -> Run:
    _as_written(dtype, "torch")
    if threads:
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return call(torch.from_numpy(images)).numpy()
    return run


def _open_pt2(path: Path, threads: int | None, dtype: str = "float32") -> Run:
    return _torch_run(torch.export.load(path).module(), threads, dtype)


def _write_aoti(program: ExportedProgram, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))


def _open_aoti(path: Path, threads: int | None, dtype: str = "float32") -> Run:
    return _torch_run(torch._inductor.aoti_load_package(os.fspath(path)), threads, dtype)


def _place(archive: zipfile.ZipFile) -> str:
    """Where torch.export.save puts a file that is given to it: both kinds of torch's files are such archives."""
    return f"{archive.namelist()[0].partition('/')[0]}/{EXTRA_DIR}{ABOUT}.json"


def _tell_archive(path: Path, about: dict[str, Any]) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(_place(archive), json.dumps(about))


def _about_archive(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        name = _place(archive)
        return _told(archive.read(name).decode() if name in archive.namelist() else None, path)


RUNTIMES: Mapping[str, Runtime] = {
    "onnx": Runtime(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx, _tell_onnx, _about_onnx,
                    write_int8=_write_onnx_int8),
    "openvino": Runtime(".xml", ("openvino",), _write_openvino, _open_openvino, _tell_openvino, _about_openvino,
                        (".bin",), write_int8=_write_openvino_int8),
    "pt2": Runtime(".pt2", (), torch.export.save, _open_pt2, _tell_archive, _about_archive),
    "aoti": Runtime(".aoti.pt2", (), _write_aoti, _open_aoti, _tell_archive, _about_archive)}


def compiler() -> None:
    """Raises NotHere where there is no C++ compiler for what torch compiles."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise NotHere("torch compiles by a C++ compiler, and none is found: install g++, or name one in CXX") \
            from None


def traced(model: torch.nn.Module, images: Tensor) -> ExportedProgram:
    """torch.export of a model in eval mode, for batches of any size."""
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
