"""Files that survive a kill: write beside the target, flush, rename; and the one error a user's input can cause."""
import contextlib
import glob
import json
import os
import shutil
from collections.abc import Collection, Generator, Iterable
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

LOCK, WAIT = ".lock", 8.0                       # seconds that a folder may still be held


def _shipped(name: str) -> Path:
    """A folder that comes with vitlab: inside the package where that was installed, beside it in a checkout."""
    inside = Path(__file__).resolve().parents[1] / name
    return inside if inside.is_dir() else inside.parents[1] / name


NOTEBOOKS, BATCHES = _shipped("notebooks"), _shipped("batches")


def from_root(path: str | Path) -> Path:
    """`path` with ~ as the home folder; in the notebooks' own folder, where JupyterLab starts their kernels, a relative
    path that is not there is from the project's root."""
    path = Path(path).expanduser()
    return NOTEBOOKS.parent / path if not path.is_absolute() and not path.exists() and Path.cwd() == NOTEBOOKS else path


def cache_folder() -> Path:
    """Where what can be made again is kept: $VITLAB_CACHE, or ~/.cache/vitlab. RuntimeError where there is no home."""
    return Path(os.environ.get("VITLAB_CACHE") or Path.home() / ".cache" / "vitlab")


class InputError(ValueError):
    """Something the user gave is wrong; the message names what, where, and what would be right."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback."""
        return [f"InputError: {self}"]


def require(condition: object, message: str) -> None:
    """InputError with the message where the condition does not hold."""
    if not condition:
        raise InputError(message)


def check_known(what: str, name: str, known: Collection[str]) -> None:
    """InputError that lists the known names where this is none of them."""
    require(name in known, f"{what} {name!r} is not known; known are {sorted(known)}")


@contextlib.contextmanager
def named(what: object) -> Generator[None]:
    """Inside, an InputError begins with what it is of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from None


def _beside(path: Path) -> Path:
    """Where this process writes what is to take the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def atomic_write(path: str | Path, content: str | bytes | memoryview) -> None:
    """Replace the file at `path` in one step, so that a reader sees the old content or the new, never a part.

    Raises OSError (disk full, no permission) with the old content still whole.
    """
    temporary = _beside(Path(path))
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replaced(path: Path) -> Path:
    """Where `atomic_folder` parks the old folder for the instant between its two renames."""
    return path.with_name(f".{path.name}.replaced")


def existing_folder(path: str | Path) -> Path:
    """`path`, after bringing back an old folder that a kill between the two renames of `atomic_folder` left parked."""
    path = Path(path)
    if not path.exists() and replaced(path).exists():
        replaced(path).rename(path)
    return path


def first_line(error: Exception) -> str:
    """What an error says, short enough for one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def locked(folder: str | Path) -> Generator[None]:
    """Hold `folder` for this process, which lets go of it however it ends. Raises InputError where another holds it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # The loader's processes of a run that was killed live on for some seconds, and hold its lock.
        with FileLock(folder / LOCK, timeout=WAIT, thread_local=False):
            yield
    except Timeout:
        raise InputError(
            f"{folder}: another process works in this folder; wait for it, stop it, or choose another folder") from None


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Generator[Path]:
    """Give a temporary folder to fill; on a clean exit it takes the place of `path`, on an error it is removed, and
    after a kill by the next one who writes there."""
    path = existing_folder(path)
    temporary = _beside(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = left.name.split(".")[-2]
        if left == temporary or owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(replaced(path), ignore_errors=True)
            path.rename(replaced(path))
        temporary.rename(path)
        shutil.rmtree(replaced(path), ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: str | Path) -> Any:
    """The parsed file; InputError naming it where it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:               # also numbers or nesting beyond Python's limits
        raise InputError(f"{path}: not valid JSON ({error})") from None


def write_json(path: str | Path, content: Any) -> None:
    """Replace a JSON file, atomically."""
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def append_line(path: str | Path, record: dict[str, Any]) -> None:
    """Append one JSON line and flush it to the disk; a kill can damage at most the line being written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")           # a kill left half a line: keep the new record out of it
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file by these records, atomically."""
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; lines that a kill cut short are left out."""
    path = Path(path)
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):    # also numbers or nesting beyond Python's limits
            records.append(json.loads(line))
    return records
