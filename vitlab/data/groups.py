"""The images of a split by class folder. The listing of a large split is kept, and only the class folders that changed
are gone through again: a stat of each folder says whether a file was added to it, removed or renamed."""
import contextlib
import hashlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np

from vitlab.data.listing import ENDINGS, NOTES, entries, images_below, in_order
from vitlab.runtime.files import atomic_write, cache_folder

KEPT_FROM = 10_000                              # images of a split; the listing of fewer is not kept
SETTLED_NS = 2 * 10**9  # clocks of disks go in steps of up to so much: two changes within may have one time
# class folder ("": outside of all) -> its images as paths from the split's folder, encoded
Groups = dict[str, np.ndarray]
# a class folder's images, the folders gone through, and the times of these
Listing = tuple[np.ndarray, np.ndarray, np.ndarray]


def _encoded(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


def _times(split: Path, folders: np.ndarray) -> np.ndarray:
    """(folders, 2) int64, ns: when each last changed, by the time that a program may set (all that Windows has) and the
    one that none may; -1 for none."""
    times = np.full((len(folders), 2), -1)
    for place, folder in enumerate(folders):
        with contextlib.suppress(OSError):
            found = os.stat(os.path.join(split, os.fsdecode(folder)))
            times[place] = found.st_mtime_ns, found.st_ctime_ns
    return times


def _walk(split: Path, name: str) -> Listing:
    """A folder's images, listed; one in it that changed meanwhile, or just before, has no times, for another walk."""
    listed, began = [], time.time_ns()
    images = _encoded(list(images_below(split, name, listed)))
    folders = _encoded(listed)
    times = _times(split, folders)
    times[times.max(1) > began - SETTLED_NS] = 0
    return images, folders, times


def _read(path: Path, about: str) -> dict[str, Listing]:
    """The listings that were kept; none where the file is missing, damaged, or about something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            kept = {name: file[name] for name in ("about", "groups", "counts", "images", "folders", "times")}
        ends = kept["counts"].cumsum(0)
        if kept["about"] != about or ends[-1].tolist() != [len(kept["images"]), len(kept["times"])]:
            return {}
        parts = (np.split(kept[name], ends[:-1, of]) for name, of in (("images", 0), ("folders", 1), ("times", 1)))
        return dict(zip(map(os.fsdecode, kept["groups"]), zip(*parts, strict=True), strict=True))
    except Exception:                           # whatever numpy, zipfile and zlib raise of a damaged file
        return {}


def _keep(path: Path, about: str, found: dict[str, Listing]) -> None:
    images, folders, times = map(np.concatenate, zip(*found.values(), strict=True))
    counts = np.array([(len(images), len(folders)) for images, folders, _ in found.values()])
    content = io.BytesIO()
    np.savez_compressed(content, about=about, groups=_encoded(list(found)), counts=counts, images=images,
                        folders=folders, times=times)
    atomic_write(path, content.getvalue())


def groups_of(split: Path) -> Groups:
    """The images of a split by class folder, folders and images in natural order: one walk, or, of a split that was
    listed before and has at least KEPT_FROM images, one through the folders that changed since."""
    about = json.dumps([os.path.realpath(split), ENDINGS, sorted(NOTES)])
    images, folders = entries(split)
    names = in_order(folders)
    path, kept = None, {}
    with contextlib.suppress(RuntimeError):     # no home
        path = cache_folder() / f"listing-{hashlib.sha256(os.fsencode(about)).hexdigest()[:16]}.npz"
        kept = _read(path, about)
    known = {name: kept[name] for name in names if name in kept
             and np.array_equal(kept[name][2], _times(split, kept[name][1]))}
    found = {name: known[name] if name in known else _walk(split, name) for name in names}
    if path and sum(len(listing[0])
                    for listing in found.values()) >= KEPT_FROM and not len(found) == len(known) == len(kept):
        with contextlib.suppress(OSError):      # a home that can't be written
            _keep(path, about, found)
    loose = {"": _encoded(in_order(images))} if images else {}
    return loose | {name: listing[0] for name, listing in found.items()}
