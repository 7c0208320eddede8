"""Run a batch file: Snakemake is the engine (its rules are in the Snakefile beside this), papermill runs each notebook.

A run folder holds entries/NAME/ (all that an entry reads and writes), inputs/NAME.json (what it depends on),
done/NAME.json (what it left), batch.json, snakemake.log and summary.json. An entry's folder is its notebook's study:
what the entries before it left there is linked in.
"""
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from vitlab.runtime.cores import available_cores
from vitlab.runtime.files import InputError, read_json, require, write_json
from vitlab.workbench import batch_file
from vitlab.workbench.batch_entry import SUMMARY, dependencies, maybe_json, only_one

STATES = ("done", "up to date", "failed", "skipped")


def run_batch(path: str | Path, out: str | Path, *, changes: dict[str, str] | None = None, cores: int = 1,
              executor: str | None = None, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run what is not up to date of a batch file into the folder `out`; returns the summary, also in out/summary.json.

    cores: entries at a time. executor, extra: Snakemake's own (an executor plugin, arguments). Raises InputError for
    whatever is wrong in the file, before anything is started.
    """
    need_engine()
    entries, out = batch_file.read(path, changes), Path(out)
    with only_one(out / ".lock", patience=5) as lock:
        wanted = dependencies(entries)
        for name, needs in wanted.items():
            place = out / "inputs" / f"{name}.json"
            if maybe_json(place) != needs:              # the content decides, not the time of a file
                write_json(place, needs)
        listed = {e.name: {"notebook": str(e.notebook), "parameters": e.parameters, "after": list(e.after)}
                  for e in entries}
        call = f"{time.time():.6f}"
        write_json(out / "batch.json", {
            "call": call, "file": str(path), "folder": str(Path.cwd()), "run": str(out),
            "threads": None if executor else max(1, available_cores() // cores), "entries": listed})
        many = ["--jobs", str(cores), "--executor", executor] if executor else ["--cores", str(cores)]
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile")),
                   "--directory", str(out), *many, "--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime",
                   "--scheduler", "greedy", "--nolock", *extra]
        try:
            code = _follow(command, out, list(wanted), call, lock)
        finally:
            summary = summarise(out)
            write_json(out / SUMMARY, summary)
        if code and not any(e["state"] == "failed" for e in summary["entries"]):
            said = (out / "snakemake.log").read_text(errors="replace").strip().splitlines()
            raise InputError(
                f"Snakemake ended with code {code}: {said[-1] if said else 'no word'} (see {out}/snakemake.log)")
    return summary


def need_engine() -> None:
    """InputError where Snakemake is not installed."""
    require(importlib.util.find_spec("snakemake") is not None, "batches need Snakemake, and that Python 3.11 or newer: "
            "python -m pip install 'snakemake>=9.15'")


def _environment(out: Path) -> dict[str, str]:
    """Ours; where no cache can be written (a home that is read-only, or none), with one in the run folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):         # tried, not asked: root is always told yes
            return dict(os.environ)
    own = str(out.resolve() / ".cache")
    return {"MPLCONFIGDIR": own, "IPYTHONDIR": own, **os.environ, "XDG_CACHE_HOME": own}


def _follow(command: list[str], out: Path, names: list[str], call: str, lock: int) -> int:
    """Run Snakemake, its words in snakemake.log, and say on stderr what becomes of each entry. Where this process is
    interrupted or told to end, so are all that it started. Returns Snakemake's code."""
    (out / "snakemake.log").unlink(missing_ok=True)
    told: dict[str, str] = {}

    def tell() -> None:
        for name in names:
            with contextlib.suppress(InputError):
                status = read_json(out / "entries" / name / "status.json")
                if status["call"] == call and told.get(name) != status["state"]:
                    told[name] = status["state"]
                    ended = sum(state != "running" for state in told.values())
                    print(f"[{ended} ended] {name}: {status['state']}{': ' if status['error'] else ''}"
                          f"{status['error'] or ''}", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(out / "snakemake.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=(lock,),
                                   env=_environment(out))
    try:
        while process.poll() is None:
            tell()
            time.sleep(0.3)
        tell()
        return process.returncode
    finally:
        _end(process)
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen) -> None:
    """End Snakemake, which takes back what it submitted elsewhere, and all that runs below it here, kernels too."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.terminate() if time.monotonic() < deadline - 20 else child.kill()
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.2)


def summarise(out: Path) -> dict[str, Any]:
    """{"file", "counts", "entries"}: of each entry its state after the last call, seconds, and why it is not done."""
    batch, found = read_json(out / "batch.json"), {}
    for name, entry in batch["entries"].items():
        folder = out / "entries" / name
        status = maybe_json(folder / "status.json") or {}
        now = status.get("call") == batch["call"]
        stopped = [other for other in entry["after"] if found[other]["state"] in ("failed", "skipped")]
        state, why = "skipped", f"{stopped[0]} {found[stopped[0]]['state']}" if stopped else "not started"
        if (out / "done" / f"{name}.json").exists() and not stopped:
            state, why = "done" if now else "up to date", None
        elif now and status["state"] == "failed":
            state, why = "failed", status["error"]
        elif now:
            state = "failed"
            why = "ended without a word: interrupted, killed or out of memory; the next call goes on with it"
        found[name] = {"name": name, "notebook": Path(entry["notebook"]).name, "state": state,
                       "seconds": status.get("seconds") if state != "skipped" else None, "why": why}
    counts = {state: sum(e["state"] == state for e in found.values()) for state in STATES}
    return {"file": batch["file"], "counts": counts, "entries": list(found.values())}


def plan_of(path: str | Path, out: str | Path, changes: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """What `run_batch` would do, nothing being written: of each entry "would run" or "up to date", and why."""
    need_engine()
    found: dict[str, dict[str, Any]] = {}
    for name, needs in dependencies(batch_file.read(path, changes)).items():
        had = maybe_json(Path(out) / "entries" / name / "inputs.json")
        first = next((other for other in needs["after"] if found[other]["state"] != "up to date"), None)
        changed = [key for key in needs if had is not None and had.get(key) != needs[key]]
        why = ("new" if had is None else f"{first} would run" if first
               else f"changed: {', '.join(changed)}" if changed else None)
        if why is None and not (Path(out) / "done" / f"{name}.json").exists():
            why = "not finished"
        found[name] = {"name": name, "state": "would run" if why else "up to date", "why": why}
    return list(found.values())


def format_summary(entries: list[dict[str, Any]]) -> str:
    """Plain-text table of a summary's entries."""
    columns = [key for key in ("name", "state", "seconds", "why") if key in entries[0]]
    cells = [columns] + [["" if e[key] is None else str(e[key]) for key in columns] for e in entries]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(v.ljust(w) for v, w in zip(line, widths)).rstrip() for line in cells)
