"""How a command is begun and ended: on record in its run folder, gone on with, as one of several processes, its errors
in one line."""
import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

from vitlab.runtime.files import LOCK, InputError, atomic_write, read_json

TOGETHER = ("pretrain", "segment", "finetune", "score", "evaluate", "search")              # take several processes
RESUMABLE, COMMAND = ("pretrain", "segment", "finetune", "search", "tonight"), "command.json"
GOES_ON = "the states written so far are kept, and the same command goes on from the last"
KEPT = {                                        # what is on the disk of a command that was stopped
    "pretrain": GOES_ON, "segment": GOES_ON, "finetune": GOES_ON,
    "search": "the scores, and each policy that was measured, are kept, and the same command goes on",
    "tonight": "the scores, curves, offers and policies finished so far are kept, and the same command goes on; a "
               "calibration begins anew",
    "calibrate": "the best model so far, where there is one, is in the run folder; the same command begins anew",
    "predict": "the overlays written so far are kept; the same command begins anew",
    "batch": "the entries that were finished are kept, and the same command goes on",
    "demo": "the same command begins anew; its trainings and searches go on",
}
NOTHING_KEPT = "nothing of it is kept, and the same command begins anew"
LOST = 15.0                                     # seconds that a process waits to be ended after another one was


def _several() -> bool:
    """Whether torchrun started this process as one of several; asked without loading torch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def recorded(run: str, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command that began a run; its folder becomes the current one. Raises InputError naming the file."""
    path = Path(run) / COMMAND
    if not path.is_file():
        raise InputError(f"{path}: no such file; {', '.join(RESUMABLE)} write it into their run folder")
    record = read_json(path)
    arguments, folder = (record.get("arguments"), record.get("folder")) if isinstance(record, dict) else (None, None)
    if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments) or not isinstance(folder, str):
        raise InputError(f"{path}: no record of a command")
    if not arguments or arguments[0] not in RESUMABLE:
        raise InputError(f"{path}: {arguments[0] if arguments else 'nothing'!r} can't be gone on with; "
                         f"{', '.join(RESUMABLE)} can")
    args = parser.parse_args(arguments)
    if not Path(folder).is_dir() or (Path(folder) / args.out).resolve() != Path(run).resolve():
        raise InputError(f"{path}: the run was begun in {folder} as {args.out} and has been moved since; give its "
                         f"command again")
    os.chdir(folder)
    return args


def join(args: argparse.Namespace) -> None:
    """Where torchrun started several processes: be one of them. The first one alone prints."""
    if not _several():
        return
    from vitlab.runtime import parallel
    if args.command not in TOGETHER:
        raise InputError(f"`{args.command}` runs in one process; start it without torchrun ({', '.join(TOGETHER)} take "
                         f"several)")
    parallel.begin(args.device)
    if not parallel.is_first():
        sys.stdout, args.quiet = open(os.devnull, "w"), True


def leave(error: BaseException | None = None) -> None:
    """Where torchrun started several processes: leave the others, with the error for its report."""
    if not _several():
        return
    if error is None:
        from vitlab.runtime import parallel
        parallel.end()
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler
        get_error_handler().record_exception(error)


@contextlib.contextmanager
def on_record(path: Path, given: Sequence[str]) -> Generator[None]:
    """Write the command into its run folder; where it is refused, the one that began the run stands there again, or
    nothing."""
    before, fresh = path.read_bytes() if path.is_file() else None, not path.parent.exists()
    atomic_write(path, json.dumps({"arguments": list(given), "folder": str(Path.cwd())}) + "\n")
    try:
        yield
    except (InputError, OSError):
        if before is not None:
            atomic_write(path, before)
        elif not [p for p in path.parent.rglob("*") if p.is_file() and p.name not in (COMMAND, LOCK)]:
            shutil.rmtree(path.parent) if fresh else path.unlink()
        raise


def kept_of(command: str) -> str:
    """What a command that was stopped leaves, and what the same command does with it."""
    return KEPT.get(command, NOTHING_KEPT)


def one_line(text: str) -> str:
    """A message in one line, with what can't be printed (control characters in names of files, say) written as
    escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.splitlines()))


def lost(error: RuntimeError) -> bool:
    """Whether it says no more than that another process is gone."""
    return _several() and any(word in str(error).lower() for word in ("gloo", "nccl", "connection closed"))
