"""Commands as processes of their own, which outlive the notebook that started them and are found in their run folder.

RUN/process.json says what runs there, RUN/process.log holds its output. Between the notebook and the command stands a
small runner (this module as a program): it waits for the command and writes down how it ended, whoever may be gone by
then.
"""
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vitlab.runtime.files import InputError, read_json, require, write_json

INFO, OUTPUT = "process.json", "process.log"
GRACE = 20.0                    # seconds from the request to stop until the process is killed
CLOCK = 2.0                     # seconds by which the start of a process may seem to move as the clock is set
FIELDS = {"arguments": list, "folder": str, "pid": int, "created": float, "started": str}


@dataclass(frozen=True, kw_only=True)
class State:
    """How a process is getting on."""

    name: str                           # "running", "finished" (by itself), "stopped" (on request) or "died"
    arguments: tuple[str, ...]          # of vitlab
    started: str                        # local time
    processes: int = 1                  # more than one: under torchrun
    exit_code: int | None = None        # None while it runs, or is not known; -9: killed by signal 9


def _record(run: str | Path) -> dict[str, Any]:
    """What process.json says. Raises InputError naming it where it is missing or something else."""
    path = Path(run) / INFO
    record = read_json(path)
    wrong = [k for k, kind in FIELDS.items() if not isinstance(record, dict) or not isinstance(record.get(k), kind)]
    if wrong:
        raise InputError(f"{path}: no record of a process ({wrong[0]} is missing or no {FIELDS[wrong[0]].__name__})")
    return record


def _alive(pid: int) -> bool:
    """Whether the process is there, and not merely waits for its parent to ask how it ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _group(record: dict[str, Any]) -> list[int]:
    """The living processes of a run: the runner, which leads a group of its number, all of that group, and what came of
    them in other groups, as under torchrun. Another process that was given the number began at another time."""
    leader, found = record["pid"], set[int]()
    with contextlib.suppress(psutil.NoSuchProcess):     # the runner alone was killed: what it started may be there
        if abs(psutil.Process(leader).create_time() - record["created"]) > CLOCK:
            return []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == leader:
                found |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    return list(filter(_alive, found))


def state(run: str | Path) -> State:
    """How the process of a run folder is getting on. Raises InputError where none was started there."""
    record = _record(run)
    running = record.get("exit_code") is None and not record.get("stopped") and bool(_group(record))
    if not running:
        record = _record(run)           # it may have been written down and ended while we looked
    code = record.get("exit_code")
    ended = "stopped" if record.get("stopped") else "died" if code is None or code < 0 else "finished"
    return State(name="running" if running else ended, arguments=tuple(record["arguments"]), started=record["started"],
                 exit_code=None if running else code, processes=_count(record))


def _count(record: dict[str, Any]) -> int:
    count = record.get("processes", 1)
    return count if isinstance(count, int) and count > 0 else 1


def start(arguments: Sequence[str], run: str | Path, *, folder: str | Path | None = None, processes: int = 1) -> State:
    """Start `vitlab ARGUMENTS` as a process of its own, with its output appended to run/process.log.

    It goes on when the notebook is closed and the kernel restarted or killed. folder: where relative paths of the
    arguments begin; None: the current one. processes: more than one are started by torchrun. Raises InputError where a
    process of this run is still running.
    """
    run, folder = Path(run).absolute(), Path(folder or Path.cwd()).absolute()
    require(arguments, "there is no command to start; arguments such as finetune --checkpoint ... are needed")
    require(processes >= 1, f"{processes} processes; at least 1 is needed")
    if (run / INFO).exists() and state(run).name == "running":
        raise InputError(
            f"{run}: a process is running there since {state(run).started}; stop it first, or choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    with open(run / OUTPUT, "ab") as output:
        runner = subprocess.Popen([sys.executable, "-m", __name__, str(run)], cwd=folder, stdin=subprocess.PIPE,
                                  stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                  env={**os.environ, "PYTHONUNBUFFERED": "1"})
    write_json(run / INFO, {
        "arguments": list(arguments), "folder": str(folder), "processes": processes, "pid": runner.pid,
        "created": psutil.Process(runner.pid).create_time(), "started": time.strftime("%Y-%m-%d %H:%M:%S")})
    assert runner.stdin is not None                                             # it is a pipe
    with contextlib.suppress(BrokenPipeError), runner.stdin as pipe:            # on record now: the runner may begin
        pipe.write(b"\n")
    return state(run)


def resume(run: str | Path) -> State:
    """Give the same command again, in the same folder, where it goes on. InputError where it runs, or none was."""
    record = _record(run)
    return start(record["arguments"], run, folder=record["folder"], processes=_count(record))


def stop(run: str | Path, *, grace: float = GRACE) -> State:
    """End the process and all that it started: SIGTERM, and SIGKILL to what is left after `grace` seconds. Returns when
    all are gone. Raises InputError where none is running."""
    if state(run).name != "running":
        raise InputError(f"{run}: no process is running there; the last one {state(run).name}")
    record, end = _record(run), time.monotonic() + grace
    request = signal.SIGTERM
    while living := _group(record):
        # The runner passes the request on, once: a second one would end torchrun before what it started.
        asked = living if request == signal.SIGKILL or record["pid"] not in living else [record["pid"]]
        if request is not None:
            for pid in asked:
                with contextlib.suppress(ProcessLookupError):                   # it ended by itself just now
                    os.kill(pid, request)
        request = signal.SIGKILL if time.monotonic() > end else None
        time.sleep(0.05)
    after = _record(run)
    # the runner was killed, or had not begun; unless the next one was started there meanwhile
    if after["pid"] == record["pid"] and not after.get("stopped"):
        write_json(Path(run) / INFO, after | {"stopped": True})
    return state(run)


def main(run: str) -> None:
    """The runner: waits for the command that process.json names, and adds how it ended."""
    if not sys.stdin.readline():
        return                          # who started us was gone before it could write us down
    record, child = _record(run), None

    def on_request(*_: Any) -> None:
        record["stopped"] = True
        if child is not None:
            child.terminate()
    signal.signal(signal.SIGTERM, on_request)
    count = _count(record)
    together = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"] if count > 1 else []
    child = subprocess.Popen([sys.executable, "-m", *together, "vitlab", *record["arguments"]],
                             stdin=subprocess.DEVNULL)
    if record.get("stopped"):           # asked before there was a child to tell
        child.terminate()
    record["exit_code"] = child.wait()
    write_json(Path(run) / INFO, record)


if __name__ == "__main__":
    main(sys.argv[1])
