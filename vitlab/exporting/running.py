"""How fast a model is where it will run: the ways in which `vitlab.measure` times a model, or a part of one."""
import contextlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlab.exporting.export import exported_form
from vitlab.exporting.runtimes import RUNTIMES, NotHere, compiler, needed, traced
from vitlab.measure.throughput import EAGER, Call, Way
from vitlab.runtime.files import InputError, check_known

FILES = {"onnxruntime": "onnx", "openvino": "openvino", "aoti": "aoti"}         # a way : the runtime of its files
WAYS = ("torch", "compiled", *FILES)


def way_of(name: str) -> Way:
    """The way of that name. Raises InputError for an unknown one, and where what it needs is not installed."""
    check_known("runtime", name, WAYS)
    if name == "torch":
        return EAGER
    if name in ("compiled", "aoti"):
        compiler()
    if name not in FILES:
        return Way(name, torch.__version__, _compiled)
    modules = [needed(module) for module in RUNTIMES[FILES[name]].needs]
    return Way(name, (modules or [torch])[-1].__version__, _InFiles(name))


def usable(names: Iterable[str]) -> list[str]:
    """Those whose runtime is installed here."""
    found = []
    for name in names:
        with contextlib.suppress(NotHere):
            found.append(way_of(name).name)
    return found


def _compiled(module: nn.Module, x: Tensor) -> Call:
    compiled, config = torch.compile(module, dynamic=False), torch._dynamo.config
    # whatever is compiled of one class counts together; beyond the limit of 8 a model would run as it is, unsaid
    with config.patch(recompile_limit=config.accumulated_recompile_limit):
        compiled(x)
    return compiled


class _InFiles:
    """Modules as files of a runtime, each written once and opened for as many threads as torch has."""

    def __init__(self, name: str) -> None:
        self.name, self.runtime = name, RUNTIMES[FILES[name]]
        self.folder, self.written = tempfile.TemporaryDirectory(), dict[nn.Module, Path]()

    def __call__(self, module: nn.Module, x: Tensor) -> Call:
        if x.device.type != "cpu":
            raise InputError(f"runtime {self.name} is timed on the CPU, not on {x.device}; torch and compiled go there")
        if module not in self.written:
            path = Path(self.folder.name) / f"{len(self.written)}{self.runtime.ending}"
            self.runtime.write(traced(exported_form(module), x.float().expand(max(2, len(x)), *x.shape[1:])), path)
            self.written[module] = path
        run = self.runtime.open(self.written[module], torch.get_num_threads(), str(x.dtype).removeprefix("torch."))
        return lambda images: run(images.float().numpy())
