"""The states of a run on the disk: each whole or not there, the last few of them, with its digest in its name."""
import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vitlab.models.weights import read_file
from vitlab.runtime.files import InputError, atomic_write, require

PATTERN = "state-*.pt"                          # state-STEP-DIGEST.pt


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def paths(folder: str | Path) -> list[Path]:
    """The states in a folder, newest first."""
    return sorted(Path(folder).glob(PATTERN), reverse=True)


def write(folder: str | Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after that step, and remove all but the newest `keep`. Raises OSError where the disk is full,
    with the older ones whole."""
    folder, content = Path(folder), io.BytesIO()
    torch.save(state, content)
    path = folder / f"state-{step:09d}-{_digest(content.getbuffer())}.pt"
    atomic_write(path, content.getbuffer())
    for old in paths(folder)[keep:]:
        old.unlink()
    return path


def tidy(folder: str | Path) -> None:
    """Remove what a kill left half written. Only for the one who holds the folder's lock."""
    for path in Path(folder).glob(".state-*.tmp"):
        path.unlink(missing_ok=True)


def newest(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The whole states of a folder, newest first; each damaged one is passed over with a warning that names it. Raises
    InputError where there are some and all are damaged."""
    found, good = paths(folder), 0
    for path in found:
        try:
            if _digest(path.read_bytes()) != path.stem.rpartition("-")[2]:
                raise InputError(f"{path}: damaged: its content is not what was written")
            state = read_file(path)
        except (InputError, OSError) as error:
            warnings.warn(f"{error}; going on from the state before it", stacklevel=3)
            continue
        good += 1
        yield path, state
    require(not found or good, f"{folder}: all {len(found)} states of the run are damaged; remove them to begin anew")
