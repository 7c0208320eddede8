"""Splits that are tar files of class folders, or of a tar file a class, as timm's ReaderImageInTar reads them."""
import contextlib
import tarfile
from pathlib import Path
from typing import IO, Any

from vitlab.data.listing import is_hidden, is_image, natural
from vitlab.runtime.files import InputError, require
from vitlab.runtime.kinds import SPLITS

UNPACKED_BY = {"gz": "gunzip", "bz2": "bunzip2", "xz": "unxz"}
Member = tuple[tarfile.TarInfo | None, tarfile.TarInfo]  # the tar in the tar that an image lies in, and the image


def _members(tar: tarfile.TarFile, outer: tarfile.TarInfo | None = None) -> list[tuple[tuple[str, ...], Member]]:
    """(folders and name, where it is) of each image; a tar inside counts as a folder of its name."""
    found = []
    above = () if outer is None else (*Path(outer.name).parent.parts, Path(outer.name).stem)
    for info in tar:
        parts = Path(info.name).parts
        if not info.isfile() or any(map(is_hidden, parts)):
            continue
        if is_image(parts[-1]):
            found.append(((*above, *parts), (outer, info)))
        elif outer is None and parts[-1].lower().endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(info), mode="r|") as inner:
                found += _members(inner, info)
    return found


def read_tar(path: Path) -> dict[str, list[tuple[str, Member]]]:
    """{class: its images, by name} of a tar file. What all images lie in, above their classes, says nothing: a tar of a
    folder train/ and one of what is in it are read alike. Raises InputError naming the tar."""
    try:
        with tarfile.open(path, mode="r|") as tar:              # in one pass
            found = _members(tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        for kind, tool in UNPACKED_BY.items():
            with contextlib.suppress(tarfile.TarError, OSError, EOFError), tarfile.open(path, mode=f"r:{kind}"):
                raise InputError(f"{path}: compressed ({kind}), so that its images can't be read one by one; give a "
                                 f"plain tar file: {tool} < {path.name} > plain.tar") from None
        raise InputError(f"{path}: can't be read as a tar file ({error})") from None
    require(found, f"{path}: holds no images; they must lie in CLASS/ in it")
    found.sort(key=lambda each: [natural(part) for part in each[0]])
    level = 0
    while all(len(parts) > level + 2 for parts, _ in found) and len({parts[level] for parts, _ in found}) == 1:
        level += 1
    classes: dict[str, list[tuple[str, Member]]] = {}
    for parts, member in found:
        require(len(parts) >= level + 2, f"{path}: holds images outside of class folders, {'/'.join(parts)} among "
                "them; they must lie in CLASS/ in it")
        classes.setdefault(parts[level], []).append(("/".join(parts), member))
    return classes


class TarReader:
    """(file in the tar, class) pairs. The tar is opened anew for each: loader processes would share its position."""

    def __init__(self, path: Path, classes: dict[str, list[tuple[str, Member]]], numbers: dict[str, int]) -> None:
        self.path = path
        self.samples = [(name, member, numbers[label]) for label, members in classes.items()
                        for name, member in members]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[IO[bytes] | Any, int]:
        _, (outer, info), target = self.samples[i]
        tar = tarfile.open(self.path)
        if outer is not None:
            tar = tarfile.open(fileobj=tar.extractfile(outer))
        return tar.extractfile(info), target

    def filename(self, i: int) -> str:
        return f"{self.path}/{self.samples[i][0]}"


def find_tars(folder: Path) -> dict[str, Path]:
    """{split: its tar file} of a folder that holds train.tar and val.tar, validation.tar or test.tar; of a tar file,
    {"train": itself}."""
    if folder.suffix == ".tar" and folder.is_file():
        return {"train": folder}
    return {name: folder / f"{name}.tar" for name in SPLITS if (folder / f"{name}.tar").is_file()}
