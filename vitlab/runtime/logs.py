"""Where the numbers of a run go beside its own files: TensorBoard, trackio, Weights & Biases, each where it is asked
for (`--log`) and installed. A run's own log says more, and is what it goes on from."""
import contextlib
import importlib
import importlib.util
import math
import re
import uuid
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitlab.runtime import parallel
from vitlab.runtime.files import InputError, atomic_write, first_line, require

PROJECT, NAME = "vitlab", "logged_as"           # of trackio and W&B; file with a run's name there
Log = Callable[[int, Mapping[str, Any]], None]  # (step, whatever was measured): its numbers are logged


class TensorBoard:
    """Event files in FOLDER/tensorboard. What a killed run logged after the state it goes on from is taken back."""

    def __init__(self, folder: Path, name: str, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """trackio, or W&B, whose functions it has."""

    def __init__(self, module: str, **settings: Any) -> None:
        self.module = importlib.import_module(module)
        self.module.init(project=PROJECT, resume="allow", **settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


# by the module that each needs: made of (folder of the run, its name, steps logged before), has `log` and `close`
LOGGERS: dict[str, Callable[[Path, str, int], Any]] = {
    "tensorboard": TensorBoard,
    "trackio": lambda folder, name, done: Tracker("trackio", name=name),
    "wandb": lambda folder, name, done: Tracker("wandb", name=name, id=name, dir=str(folder)),
}


def check_loggers(names: Sequence[str]) -> None:
    """InputError for a logger that is not known, or not installed."""
    for name in names:
        require(name in LOGGERS, f"log {name!r} is not known; known are {', '.join(LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log {name}: it is not installed; `pip install {name}` does that")


def _name(folder: Path, done: int) -> str:
    """What the run is called: as its folder says; another name for each that begins anew."""
    if done and (folder / NAME).is_file():
        return (folder / NAME).read_text(encoding="utf-8").strip()
    where = re.sub(r"[^\w.-]", "-", "-".join(folder.resolve().parts[-2:]))      # W&B's ids take no / \ # ? % :
    return f"{where}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def opened(names: Sequence[str], folder: str | Path, done: int) -> Generator[Log]:
    """What logs numbers by each of LOGGERS that is named, as those of the run in a folder, of which `done` steps were
    logged before; one that fails on the way is left out with a warning. Of several processes the first alone logs.
    Raises InputError where one is not known, not installed, or can't begin."""
    check_loggers(names)
    folder, loggers = Path(folder), dict[str, Any]()
    first = names if parallel.is_first() else ()
    called = _name(folder, done) if first else ""

    def log(step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: float(value) for name, value in values.items()
                   if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)}
        for name, logger in list(loggers.items()):
            try:
                logger.log(step, numbers)
            except Exception as error:          # another's program, its server or its disk: no reason to end the run
                del loggers[name]
                warnings.warn(f"log {name}: {first_line(error)}; the run goes on without it", stacklevel=2)
    try:
        for name in first:
            try:
                loggers[name] = LOGGERS[name](folder, called, done)
            except Exception as error:
                raise InputError(f"log {name}: can't begin ({first_line(error)})") from None
        if first:
            atomic_write(folder / NAME, f"{called}\n")
        yield log
    finally:
        for name, logger in loggers.items():
            try:
                logger.close()
            except Exception as error:
                warnings.warn(f"log {name}: {first_line(error)}", stacklevel=2)
