"""One entry of a batch: what its result depends on, and its run in a folder of its own, in a process of Snakemake's."""
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from vitlab.runtime.files import InputError, read_json, read_lines, write_json, write_lines
from vitlab.workbench import notebooks
from vitlab.workbench.batch_file import REFERENCE, Entry

RESULTS, SUMMARY = "results.jsonl", "summary.json"
ENTRY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")      # a name of batch_file's with the choices of its grids
OWN = ("inputs.json", "status.json", "log.txt", "figures", RESULTS)         # of an entry alone, not passed on
SOURCE = Path(__file__).resolve().parents[1]
SHOWING = ("plots", "cli.py", "workbench/said.py", "workbench/plain.py", "runtime/launching.py", "workbench/batch",
           "workbench/report.py", "workbench/explore", "workbench/processes.py")
# ... source that starts and draws, and changes no result
WEIGHTS = (".safetensors", ".pt", ".pth")
FIGURES = "png,svg,pdf"


@contextlib.contextmanager
def only_one(path: Path, patience: float = 0) -> Generator[int]:
    """Hold the lock of a file, waiting for it at most `patience` seconds; gives its descriptor, which child processes
    may share: the last of them lets go of it, however it ends. Raises InputError where another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        os.set_inheritable(file.fileno(), True)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise InputError(
                        f"{path.parent}: another process is at work there; wait for it, or end it") from None
                time.sleep(0.2)
        yield file.fileno()


def maybe_json(path: Path) -> Any:
    """`read_json`; None where there is no such file."""
    return read_json(path) if path.exists() else None


def dependencies(entries: list[Entry]) -> dict[str, dict[str, Any]]:
    """{entry: what its result depends on}: code, notebook, parameters, files they name, all that came before."""
    code, print_of, found = _code(), functools.lru_cache(maxsize=None)(fingerprint), {}
    for entry in entries:
        named = {key: value for key, value in entry.parameters.items()
                 if isinstance(value, str) and value not in ("", "digits") and not REFERENCE.search(value)}
        found[entry.name] = {"code": code, "notebook": _digest(notebooks.code_of(entry.notebook)),
                             "parameters": entry.parameters,
                             "files": {key: print_of(value) for key, value in named.items() if print_of(value)},
                             "after": {name: _digest(found[name]) for name in entry.after}}
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _code() -> str:
    """Of vitlab's source, but what only starts and draws."""
    paths = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
    return _digest({name: path.read_text() for name, path in paths.items() if not name.startswith(SHOWING)})


def fingerprint(place: str) -> str | None:
    """Of a file its content; of a folder the names, sizes and times of its files; None where there is neither."""
    path = Path(place)
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]     # ty: ignore[missing-attribute]  # a batch needs 3.11
        if path.is_dir():
            return _digest(sorted(_files_in(path)))
    except OSError:                 # a text that can be no path, or one that can't be read: the notebook says so
        pass
    return None


def _files_in(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(name, size, time) of every file; a folder that links lead to again counts once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        for name in names:
            path = os.path.join(place, name)
            state = os.lstat(path) if os.path.islink(path) and not os.path.exists(path) else os.stat(path)
            yield os.path.relpath(path, folder), state.st_size, state.st_mtime_ns


def run_entry(run: Path, name: str) -> int:
    """Run one entry of the batch in a run folder; 0 when done. What it prints goes to its log.txt."""
    batch = read_json(run / "batch.json")
    entry, needs = batch["entries"][name], read_json(run / "inputs" / f"{name}.json")
    needs["left"] = {other: read_json(run / "done" / f"{other}.json") for other in entry["after"]}
    os.chdir(batch["folder"])
    run = Path(batch["run"])                    # as it was given, so that the notebook shows no more than that
    folder, began = run / "entries" / name, time.time()
    with only_one(run / "locks" / name, patience=20):       # a kernel of a killed batch needs a moment to notice
        lines = _prepare(folder, needs, [run / "entries" / other for other in entry["after"]])

        def say(state: str, error: str | None = None) -> None:
            write_json(folder / "status.json", {"state": state, "call": batch["call"], "error": error,
                                                "seconds": round(time.time() - began, 1), "inherited": lines})
        say("running")
        with open(folder / "log.txt", "ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if batch["threads"]:
            os.environ.setdefault("OMP_NUM_THREADS", str(batch["threads"]))
        os.environ.setdefault("VITLAB_FIGURES", FIGURES)
        given = {key: REFERENCE.sub(lambda match: str(run / "entries" / match[1]), value) if isinstance(value, str)
                 else value for key, value in entry["parameters"].items()}
        if "run" in notebooks.declared(entry["notebook"]):
            given["run"] = str(folder)
        try:
            notebooks.run(entry["notebook"], folder, given)
        except Exception as error:              # whatever it is, the summary says it
            traceback.print_exc()
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            say("failed", kind + " ".join(str(error).split())[:600])
            return 1
        say("done")
        own = [path for path in sorted(folder.rglob("*")) if not path.is_symlink()
               and (path.suffix == ".safetensors" or path.name == "plan.json")]
        write_json(run / "done" / f"{name}.json",
                   {path.relative_to(folder).as_posix(): fingerprint(str(path)) for path in own})
    return 0


def _prepare(folder: Path, needs: dict[str, Any], before: list[Path]) -> int:
    """Make the folder ready; returns how many lines of its results are from the entries before it.

    One that was made for the same inputs is kept, so that its trainings and searches go on; so is an unfinished one
    where only the code changed, for that is how a fault is mended. Any other gets what the entries before it left.
    """
    status, had = maybe_json(folder / "status.json") or {}, maybe_json(folder / "inputs.json")
    ignored = ("code", "notebook", "after") if status.get("state") in ("running", "failed") else ()
    lines = status.get("inherited", 0)
    if had is None or any(had.get(key) != value for key, value in needs.items() if key not in ignored):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for other in before:
            _pass_on(other, folder)
        rows = {json.dumps(row): row for other in before for row in read_lines(other / RESULTS)}
        lines = len(rows)
        if rows:
            write_lines(folder / RESULTS, rows.values())
    write_json(folder / "inputs.json", needs)
    return lines


def _pass_on(source: Path, target: Path) -> None:
    """Give what an entry left to the folder of one after it: weights are linked, for vitlab replaces such files and
    never writes into them; all else is copied, so that nothing done there changes what was left."""
    for item in sorted(source.rglob("*")):
        place = item.relative_to(source)
        executed = len(place.parts) == 1 and place.suffix == ".ipynb"
        if item.is_dir() or executed or place.parts[0] in OWN or item.name.startswith("."):
            continue
        made = target / place
        made.parent.mkdir(parents=True, exist_ok=True)
        made.unlink(missing_ok=True)
        if item.suffix in WEIGHTS:
            made.symlink_to(os.path.relpath(item.resolve(), made.parent.resolve()))
        else:
            shutil.copyfile(item, made)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not ENTRY.fullmatch(sys.argv[1]):
        sys.exit("usage, in a run folder: python -m vitlab.workbench.batch_entry ENTRY")
    sys.exit(run_entry(Path.cwd(), sys.argv[1]))
