"""How a command begins and ends: on record in its run folder, gone on with, one of several processes, errors a line."""
import contextlib
import difflib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path

from cyclopts import CycloptsError, Token, UnknownOptionError

from vitlab.runtime import signals
from vitlab.runtime.caveats import TOYS
from vitlab.runtime.files import LOCK, InputError, atomic_write, from_root, read_json, require
from vitlab.runtime.kinds import SPLITS, TIMM_PREFIXES

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


def name_of(words: Sequence[str], commands: Collection[str]) -> str:
    """The command that words begin with, of two words where it is one of several; "" where there is none."""
    known = [" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in [*commands, "resume"]]
    return known[0] if known else ""


def values_of(words: Sequence[str]) -> dict[str, str]:
    """{flag: the word after it, or after its =}."""
    found = {word: after for word, after in zip(words, [*words[1:], ""]) if word.startswith("--")}
    return {**found, **{word.partition("=")[0]: word.partition("=")[2] for word in found if "=" in word}}


FILES = {"score tokens": ".safetensors", "score units": ".safetensors", "export": ""}     # command: its file's ending


def checked(words: Sequence[str], commands: Collection[str]) -> tuple[str, dict[str, str]]:
    """(command, `values_of` its words). Raises InputError for what can be told before anything is imported: another
    command, a path that is not there, a place that can't be written to, a model that would be replaced."""
    name, values = name_of(words, commands), values_of(words)
    one_of = [each for each in commands if each.startswith(f"{name} ")] if name else [*commands, "resume"]
    if not name or one_of:
        last = [each.removeprefix(f"{name} ") for each in one_of if name or " " not in each]
        word = words[bool(name)] if len(words) > bool(name) else None
        near = difflib.get_close_matches(word or "", last, n=1)
        raise InputError(f"{'a COMMAND is needed' if word is None else f'{word!r} is no COMMAND'}"
                         f"{f', {near[0]} is near' if near else ''}: one of {', '.join(last)} "
                         f"(see {f'vitlab {name}'.strip()} --help)")
    for word in words:
        if not word.strip() or "\0" in word:
            raise InputError(f"{word!r}: a NUL is in no name" if word.strip() else "an empty text names nothing")
    for flag in ("--plan", "--scores", "--class-map"):
        if flag in values and not Path(values[flag]).exists():
            writer = "`vitlab score` writes it" if flag == "--scores" else "a file is needed"
            raise InputError(f"{values[flag]}: no such file; {writer} ({flag})")
    for flag in ("--checkpoint", "--teacher", "--dense"):
        check_source(values.get(flag, "dense"))
    data = values.get("--data", TOYS[0])
    if data not in TOYS and not data.startswith(TIMM_PREFIXES) and not from_root(data).exists():
        holds = ", ".join(f"{name}/" for name in SPLITS)
        raise InputError(f"{data}: no such folder; give 'digits', or a folder that holds {holds}, or a timm data set "
                         "such as hfds/NAME")
    if "--out" in values:
        check_out(values["--out"], ending=FILES.get(name))
        if name.split()[0] not in ("score", "evaluate", "predict", "throughput", "export"):
            check_apart(values)
    return name, values


def unknown_flag(error: CycloptsError, words: Sequence[str]) -> CycloptsError | None:
    """Of words that a command did not take, the first that is none of its flags: it may be a missing one, misspelt."""
    if not error.app:
        return None
    known = error.app.assemble_argument_collection()
    names = {name for argument in known for name in argument.names}
    odd = [flag for flag in values_of(words) if "=" not in flag and flag not in names]
    return UnknownOptionError(token=Token(keyword=odd[0], source="cli"), argument_collection=known,
                              verbose=False) if odd else None


def check_source(source: str) -> None:
    """InputError for a model that can only be a file or folder, and is not there."""
    path = from_root(source.removeprefix("local-dir:"))
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or source.startswith(("local-dir:", "."))):
        raise InputError(f"{source}: no such run folder or weights file; 01_baseline and `vitlab pretrain` write the "
                         f"dense one of a study")


def check_out(out: str, ending: str | None = None) -> None:
    """OSError or InputError where `out` is of the wrong kind or nothing can be written to it. ending: of a file; None:
    a run folder is written."""
    if ending is not None and Path(out).is_dir():
        raise InputError(f"{out}: is a folder; a file to write {'the scores' if ending else 'the model'} to is needed")
    if ending is not None and not out.endswith(ending):
        raise InputError(f"{out}: scores are written as {ending}; a name that ends so is needed")
    require(ending is not None or not Path(out).is_file(), f"{out}: is a file; a run folder is needed")
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    require(folder.is_dir() or folder == Path(out).absolute(), f"{out}: {folder} is a file, not a folder")
    require(os.access(folder, os.W_OK), f"{out}: {folder} can't be written to")


def check_apart(values: dict[str, str]) -> None:
    """InputError where the result would take the place of a model that the command reads."""
    out = Path(values["--out"]).resolve()
    for given in filter(None, (values.get(flag) for flag in ("--checkpoint", "--teacher", "--dense"))):
        if Path(given).is_dir() and out in (Path(given).resolve(), Path(given).resolve().parent):
            raise InputError(f"--out {values['--out']} would replace {given}, which is read; choose another folder")


def recorded(run: str) -> list[str]:
    """The words of the command that began a run; its folder becomes the current one. InputError names the file."""
    path = Path(run) / COMMAND
    require(path.is_file(), f"{path}: no such file; {', '.join(RESUMABLE)} write it into their run folder")
    record = read_json(path)
    words, folder = (record.get("arguments"), record.get("folder")) if isinstance(record, dict) else (None, None)
    if not isinstance(words, list) or not all(isinstance(a, str) for a in words) or not isinstance(folder, str):
        raise InputError(f"{path}: no record of a command")
    if not words or words[0] not in RESUMABLE:
        raise InputError(f"{path}: {words[0] if words else 'nothing'!r} can't be gone on with; "
                         f"{', '.join(RESUMABLE)} can")
    out = values_of(words).get("--out", "")
    require(Path(folder).is_dir() and (Path(folder) / out).resolve() == Path(run).resolve(),
            f"{path}: the run was begun in {folder} as {out} and has been moved since; give its command again")
    os.chdir(folder)
    return words


def join(name: str, values: dict[str, str]) -> bool:
    """Where torchrun started several processes: be one of them. The first one alone prints; True for the others."""
    if not _several():
        return False
    from vitlab.runtime import parallel
    require(name.split()[0] in TOGETHER, f"`{name}` runs in one process; start it without torchrun "
            f"({', '.join(TOGETHER)} take several)")
    parallel.begin(values.get("--device"))
    if parallel.is_first():
        return False
    sys.stdout = open(os.devnull, "w")
    return True


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
def on_record(name: str, values: dict[str, str], words: Sequence[str]) -> Generator[None]:
    """Write a command that can be gone on with into its run folder; where it is refused, the one that began the run
    stands there again, or nothing."""
    if name not in RESUMABLE or int(os.environ.get("RANK", "0")):
        yield
        return
    path = Path(values["--out"]) / COMMAND
    before, fresh = path.read_bytes() if path.is_file() else None, not path.parent.exists()
    atomic_write(path, json.dumps({"arguments": list(words), "folder": str(Path.cwd())}) + "\n")
    try:
        yield
    except (InputError, OSError):
        if before is not None:
            atomic_write(path, before)
        elif not [p for p in path.parent.rglob("*") if p.is_file() and p.name not in (COMMAND, LOCK)]:
            shutil.rmtree(path.parent) if fresh else path.unlink()
        raise


def ending(error: BaseException, name: str, loader_fault: Callable[[BaseException], str | None]) -> tuple[int, str]:
    """(exit code, what is said) of a command that an error or a request ended; raises an error that is ours.
    loader_fault: what happened to a loader process, which torch may say at any time."""
    kept = KEPT.get(name, NOTHING_KEPT)
    if isinstance(error, signals.Stopped):
        return signals.EXIT_CODE, f"stopped on request; {kept}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted; {kept}"
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, OSError):
        return 2, f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
    if isinstance(error, MemoryError) or any(words in str(error) for words in ("out of memory",
                                                                               "can't allocate memory")):
        return 2, f"out of memory; a smaller batch or model needs less ({str(error) or 'no memory'})"[:300]
    if (died := loader_fault(error)) is not None:
        return 2, died
    if _several() and any(word in str(error).lower() for word in ("gloo", "nccl", "connection closed")):
        return 1, "another process of this run ended, and so does this one; what went wrong is in its error"
    leave(error)
    raise error


def one_line(text: str) -> str:
    """A message in one line, with what can't be printed (in names of files, say) as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.splitlines()))
