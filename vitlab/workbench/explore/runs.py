"""Runs as they go on: which there are, how far each is, and starting, stopping and resuming one."""
import asyncio
import contextlib
import html
import math
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import torch
from matplotlib.figure import Figure

from vitlab.plots.base import new_axes
from vitlab.plots.search import incumbents
from vitlab.plots.training import SLICE, training_curves
from vitlab.runtime.files import InputError, read_lines, require
from vitlab.runtime.launching import TOGETHER
from vitlab.search.study import JOURNAL
from vitlab.training.loop import LOG
from vitlab.workbench import processes
from vitlab.workbench.explore.base import Canvas, Explorer, Menu, observe, repeat, row, sized
from vitlab.workbench.explore.study import watch
from vitlab.workbench.steps import TRAINING, study_folder

SECONDS = 2.0                                   # between two looks at a run that goes on
TAIL = 12                                       # lines of output shown
RECENT = 20_000                                 # bytes of output that they are taken from
# Of an epoch, by what it is measured on, and of a step in one.
LOGGED = (*(("epoch", "loss", "lr", measure) for measure in SLICE), ("at_epoch", "loss", "lr"))
# The fields of the form, by command; each is a flag of it.
COMMANDS = {"finetune": ("checkpoint", "teacher", "data", "recipe", "out"),
            "search": ("checkpoint", "data", "macs-ratio", "out"), "pretrain": ("model", "data", "recipe", "out"),
            "segment": ("checkpoint", "data", "recipe", "out"), "tonight": ("checkpoint", "data", "out")}
EXAMPLES = {"checkpoint": "runs/demo/pruned", "teacher": "runs/demo/dense", "data": "digits, or a folder of images",
            "recipe": "digits_pm", "macs-ratio": "0.6", "model": "vit_nano_patch4_32",
            "out": "runs/mine (a new folder)"}


def find_runs(root: str | Path) -> list[Path]:
    """The folders at and below `root` in which a process was started, a model trained or a search made, by name."""
    found = []
    for folder, below, files in os.walk(root):
        if processes.INFO in files or JOURNAL in files or TRAINING in below:
            found.append(Path(folder))
        below[:] = [name for name in below if name != TRAINING and not name.startswith(".")]
    return sorted(found)


def training_logs(run: str | Path) -> dict[str, list[dict[str, Any]]]:
    """{stage: records} of what is trained in a run: each epoch's last, and those of steps; no damaged line."""
    folder, logs = Path(run) / TRAINING, {}
    for path in sorted([*folder.glob(LOG), *folder.glob(f"*/{LOG}")], key=lambda p: (len(p.parent.name), p)):
        last = {}
        for record in read_lines(path):
            for logged in LOGGED:
                if isinstance(record, dict) and all(isinstance(number := record.get(name), (int, float))
                                                    and math.isfinite(number) for name in logged):
                    last[logged[0], record[logged[0]]] = record
        if last:
            logs["training" if path.parent == folder else path.parent.name] = [last[key] for key in sorted(last)]
    return logs


def run_figure(run: str | Path | None) -> Figure:
    """A run's training curves, or the best so far of its search; None: no run. What can't be read is said instead."""
    text = "no run was found" if run is None else "nothing is logged yet"
    try:
        logs = {} if run is None else training_logs(run)
        if logs:
            return training_curves(logs)
        if run is not None and (Path(run) / JOURNAL).exists():
            found = watch(run)
            seen = found.evaluations()
            if seen:
                return incumbents({found.strategy: [[e.value for e in seen]]}, label=found.label,
                                  errors={found.strategy: [found.error(e) for e in seen]})
    except InputError as error:
        text = str(error)
    figure, axes = new_axes(1, 1, 9.0, 1.0)
    axes[0, 0].text(0.5, 0.5, text, ha="center", va="center", wrap=True)
    axes[0, 0].set_axis_off()
    return figure


def last_lines(path: str | Path) -> str:
    """The last lines of a process's output; of a progress bar, which overwrites itself, its last state."""
    if not Path(path).exists():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - RECENT))
        text = file.read().decode(errors="replace")
    lines = [[part for part in line.split("\r") if part.strip()] for line in text.split("\n")]
    return "\n".join([parts[-1] for parts in lines if parts][-TAIL:])


def runs_panel(root: str | Path = "runs") -> Explorer:
    """The runs at and below `root`: see one's state, output, and training curves or a search's best so far, every two
    seconds while it goes on; stop it, resume it where it was, or start another.

    A run is a process of its own: it outlives the notebook and the kernel, and a new panel finds it. In the notebooks'
    own folder relative paths are from the project's root.
    """
    folder = study_folder(".").absolute()
    root, started = folder / root, []
    chosen = Menu(description="run", **sized("3em", "28em"))
    stop = ipywidgets.Button(description="stop", icon="stop", layout={"width": "7em"})
    resume = ipywidgets.Button(description="resume", icon="play", layout={"width": "7em"})
    again = ipywidgets.Button(description="look again", icon="refresh", layout={"width": "9em"})
    told, tail, message, picture = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML(), Canvas()
    shown: list[Any] = []                       # what the picture was drawn from
    watching: list[asyncio.Task] = []

    def look() -> bool:
        """Show the chosen run as it is now, and say whether it goes on."""
        run, state, logs = chosen.value, None, []
        if run is not None:
            told.value, state = _told(run)
            tail.value = _as_text(last_lines(run / processes.OUTPUT))
            logs = [*(run / TRAINING).glob(f"**/{LOG}"), *run.glob(JOURNAL)]
        drawn_from = [run, *((path, path.stat().st_mtime_ns) for path in logs)]
        if drawn_from != shown:
            shown[:] = drawn_from
            picture.show(run_figure(run))
        stop.disabled, resume.disabled = state != "running", state in (None, "running")
        return state == "running" and panel.comm is not None

    def watch_on(*_: object) -> None:
        """Look now, and again and again while the run goes on; a script, unlike a kernel, has no loop to do so in."""
        if look() and all(task.done() for task in watching):
            with contextlib.suppress(RuntimeError):
                watching[:] = [repeat(look, SECONDS)]

    def find(wanted: Path | None) -> None:
        """Look for runs again; the wanted one is shown, else the first that is running, else the first."""
        found = sorted({*find_runs(root), *started})
        order = [wanted, *(run for run in found if _told(run)[1] == "running"), *found]
        chosen.options = [(os.path.relpath(run, root), run) for run in found]
        chosen.value = next((run for run in order if run in found), None)
        watch_on()

    def attempt(action: Callable[[], object]) -> None:
        """Do it, and say what was wrong."""
        try:
            action()
            message.value = ""
        except (InputError, OSError) as error:
            message.value = f"<b>{html.escape(str(error))}</b>"
        watch_on()

    def begin(arguments: list[str], out: str, count: int) -> None:
        def action() -> None:
            require(out, "out is empty; the name of a folder for the run is needed")
            processes.start(arguments, folder / out, folder=folder, processes=count)
            started.append(folder / out)
            find(folder / out)
        attempt(action)

    def end(_: object) -> None:
        """In a thread: a process may take its time to end, and the kernel has other work."""
        threading.Thread(target=_stop, args=(chosen.value,), daemon=True).start()
    panel = Explorer([row(chosen, stop, resume, again), told, message, picture, tail,
                      ipywidgets.Accordion([start_form(begin)], titles=["start a run"])],
                     lambda: run_figure(chosen.value), picture)
    chosen.observe(watch_on, "value")
    stop.on_click(end)
    resume.on_click(lambda _: attempt(lambda: processes.resume(chosen.value)))
    again.on_click(lambda _: find(chosen.value))
    find(None)
    return panel


def start_form(begin: Callable[[list[str], str, int], None]) -> ipywidgets.VBox:
    """Fields for a command, the line they make, and a button that calls begin(arguments, run folder, processes)."""
    wide = sized("7em", "36em")
    command = Menu(options=list(COMMANDS), description="command", **wide)
    fields = {name: ipywidgets.Text(placeholder=f"such as {example}", description=name, **wide)
              for name, example in EXAMPLES.items()}
    more = ipywidgets.Text(placeholder="any other arguments, such as --epochs 3", description="more", **wide)
    several = ipywidgets.BoundedIntText(max(1, torch.cuda.device_count()), min=1, max=64, description="processes",
                                        **wide)
    line, button = ipywidgets.HTML(), ipywidgets.Button(description="start", icon="rocket", button_style="primary")

    def count() -> int:
        return several.value if command.value in TOGETHER else 1

    def arguments() -> list[str]:
        """Raises ValueError for a quotation mark that is not closed."""
        given = [(name, fields[name].value.strip()) for name in COMMANDS[command.value]]
        return [command.value, *(part for name, value in given if value for part in (f"--{name}", value)),
                *shlex.split(more.value)]

    def write(*_: object) -> None:
        for name, field in fields.items():
            field.layout.display = None if name in COMMANDS[command.value] else "none"
        try:
            line.value, button.disabled = _as_text(_line(arguments(), count())), False
        except ValueError as error:
            line.value, button.disabled = f"<b>more: {html.escape(str(error))}</b>", True
        several.layout.display = None if command.value in TOGETHER else "none"
    observe([command, more, several, *fields.values()], write)
    button.on_click(lambda _: begin(arguments(), fields["out"].value.strip(), count()))
    write()
    return ipywidgets.VBox([command, *fields.values(), more, several, line, button])


def _line(arguments: Sequence[str], count: int) -> str:
    """The command as it is typed."""
    return shlex.join([*(["torchrun", "--nproc-per-node", str(count), "-m"] if count > 1 else []), "vitlab",
                       *arguments])


def _stop(run: Path) -> None:
    with contextlib.suppress(InputError):       # it ended by itself just now
        processes.stop(run)


def _told(run: Path) -> tuple[str, str | None]:
    """(what there is to say of a run's process, as HTML; its state's name, None where there is no process)."""
    if not (run / processes.INFO).exists():
        return "no process was started here; what it has logged is below", None
    try:
        state = processes.state(run)
    except InputError as error:
        return html.escape(str(error)), None
    code = "" if state.exit_code is None else f" with exit code {state.exit_code}"
    line = _as_text(_line(state.arguments, state.processes))
    return f"<b>{state.name}</b>{code}, started {html.escape(state.started)}{line}", state.name


def _as_text(text: str) -> str:
    """Text as it is, in HTML."""
    look = "white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere; " \
           "line-height: 1.35; font-size: 12px; margin: 0"
    return f'<pre style="{look}">{html.escape(text)}</pre>'
