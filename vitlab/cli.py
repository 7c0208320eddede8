"""The command line: a step of vitlab.workbench is a command, its signature the flags; imported when it is asked for."""
import contextlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter

import vitlab
from vitlab.runtime import launching, signals
from vitlab.runtime.files import InputError
from vitlab.runtime.launching import one_line

COMMANDS = {                                                    # module of vitlab.workbench : function, and one line
    "pretrain": ("training:pretrain", "Train a timm model from scratch."),
    "segment": ("segmenting:train_segmenter", "Train a dense Segmenter: a model's blocks as encoder, and a decoder."),
    "score": "Score tokens, or heads and neurons, on images of train.",
    "score tokens": ("scoring:score_tokens", "Score the tokens of every block on images of train."),
    "score units": ("scoring:score_units", "Score heads and neurons on images of train."),
    "prune": "Compress a dense model: by scores of tokens or units, by content, or by a plan.",
    "prune tokens": ("cutting:prune_tokens", "Prune and merge tokens by their scores."),
    "prune units": ("cutting:prune_units", "Cut heads and neurons by their scores."),
    "prune match": ("cutting:prune_match", "Merge tokens by content; needs neither scores nor images."),
    "prune plan": ("cutting:prune_plan", "Compress by a plan file, as it is."),
    "search": ("searching:search", "Search how much to cut in each block under a budget; a killed search goes on."),
    "tonight": ("tonight:tonight", "From a dense model and images without labels to a smaller model that is ready."),
    "calibrate": ("calibrating:calibrate", "Compress by a plan and refit what is left, without labels."),
    "finetune": ("training:finetune", "Fine-tune a compressed model, distilling from the dense one."),
    "evaluate": ("steps:evaluate", "Top-1 and loss, or mIoU, on the held-out split, with GMACs and parameters."),
    "predict": ("segmenting:predict", "Segment a folder of images: class numbers and an overlay of each, as PNG."),
    "export": ("exporting:export", "Write a model as a file for ONNX Runtime, OpenVINO or torch, verified there."),
    "push": ("sharing:push", "Put a run's model on the Hugging Face hub, with a page written from its results."),
    "throughput": ("steps:throughput", "Images per second of deployed models in turn, the first the baseline."),
    "recipes": ("plain:recipes", "List the named recipes with source, expected number and command."),
    "batch": ("plain:batch", "Run a batch file of notebooks; what is up to date is not repeated."),
    "report": ("report:report", "One page of a batch's run, or a study's; its table as CSV and LaTeX."),
    "compare": ("studies:compare", "Studies beside each other: rows, what differs in their conditions, plans."),
    "notebooks": ("notebooks:copy_all", "Copy the notebooks into a folder; files changed there are never replaced."),
    "demo": ("demo:demo", "Run the notebooks on the embedded digits, from the baseline to the table."),
}


def resume(run: str, /) -> int:
    """Go on with the training or search of a run folder, by the command that began it."""
    return main(launching.recorded(run), fresh=False)


def build() -> App:
    """All commands; none of their modules is imported before its command is asked for."""
    flags = Parameter(negative=(), show_default=lambda x: ",".join(map(str, x)) if isinstance(x, tuple) else x)
    app = App(name="vitlab", help="Make vision transformers smaller and faster, and see why it works.",
              version=vitlab.__version__, help_flags="--help", version_flags="--version", help_format="plaintext",
              default_parameter=flags, result_action="return_value")
    for name, entry in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if isinstance(entry, str):
            app.command(App(name=name, help=entry))
        else:
            (app[group] if group else app).command(f"vitlab.workbench.{entry[0]}", name=last, help=entry[1])
    app.command(resume)
    return app


def execute(words: Sequence[str], *, fresh: bool) -> int:
    """Do one command and say what came of it; returns its exit code. fresh: it begins a run. Raises InputError."""
    if {"--help", "--version"} & set(words):
        return build()(words) or 0
    name, values = launching.checked(words, COMMANDS)
    words = [*words, "--quiet"] if launching.join(name, values) else words
    try:
        command, bound, _ = build().parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        told = one_line(str(launching.unknown_flag(error, words) or error)).rstrip(".").replace("  ", " ")
        raise InputError(f"{told} (see vitlab {name} --help)") from None
    with launching.on_record(name, values, words) if fresh else contextlib.nullcontext():
        result = command(*bound.args, **bound.kwargs)
    if not isinstance(result, int):
        from vitlab.workbench.plain import told
        print(told(result, values.get("--out"), quiet="--quiet" in words), end="")
    launching.leave()
    return result if isinstance(result, int) else 0


def _loader_fault(error: BaseException) -> str | None:
    from vitlab.data.loading import fault
    return fault(error)


def main(argv: Sequence[str] | None = None, *, fresh: bool = True) -> int:
    """Run a command; 0 when done, 1 where an entry of a batch failed, 2 for wrong input (one line on stderr), 75 when
    asked to stop (SIGTERM), 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = launching.name_of(words, COMMANDS)
    told: Any = warnings
    before, told.formatwarning = told.formatwarning, lambda message, *_: f"vitlab {name}: {one_line(str(message))}\n"
    with contextlib.suppress(AttributeError, ValueError):       # names of files need not be text: printed all the same
        getattr(sys.stdout, "reconfigure")(errors="backslashreplace")  # noqa: B009 - a file has it, a stream need not
    try:
        with signals.on_request(signals.stop):
            return execute(words, fresh=fresh)
    except BrokenPipeError:                     # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError, RuntimeError, MemoryError, signals.Stopped, KeyboardInterrupt) as error:
        code, what = launching.ending(error, name, _loader_fault)
        print(f"vitlab {name}: {one_line(what)}".replace("vitlab :", "vitlab:"), file=sys.stderr)
        if code == 1:
            time.sleep(launching.LOST)          # torchrun reports the first that ends
        elif code == 2:
            launching.leave(error)
        return code
    finally:
        told.formatwarning = before
