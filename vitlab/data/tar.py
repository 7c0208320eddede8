"""Splits that are tar files of class folders, as timm reads them."""
import os
import tarfile
from pathlib import Path

from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from vitlab.data.folder import HELD_OUT_NAMES, TRAIN_NAMES
from vitlab.files import InputError


class TarReader(ReaderImageInTar):
    """(file in the tar, class) pairs. The tar is opened anew for each: loader processes would share its position otherwise."""

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(str(path), cache_tarfiles=False, cache_tarinfo=False)      # a list beside it may be of another tar
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"{path}: can't be read as a tar file ({error})") from None
        except ValueError:                      # timm has nothing to put together
            raise InputError(f"{path}: holds no images; they must lie in CLASS/ in it") from None
        shown = [not os.path.basename(sample[0].name).startswith(".") for sample in self.samples]        # another system's notes
        self.samples, self.targets = self.samples[shown], self.targets[shown]
        if "" in self.class_name_to_idx:
            raise InputError(f"{path}: holds images outside of class folders; they must lie in CLASS/ in it")

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"{self.root}/{self._filename(index)}"


def find_tars(folder: Path) -> dict[str, Path]:
    """{split: its tar file} of a folder that holds train.tar and val.tar, validation.tar or test.tar; of a tar file, {"train": itself}."""
    if folder.suffix == ".tar" and folder.is_file():
        return {"train": folder}
    return {name: folder / f"{name}.tar" for name in TRAIN_NAMES + HELD_OUT_NAMES if (folder / f"{name}.tar").is_file()}
