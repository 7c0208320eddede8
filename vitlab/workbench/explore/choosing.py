"""Choosing a picture in a notebook: from a list, a folder or an upload, decoded with care for strangers' files."""
import html
import io
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import traitlets
from PIL import Image

from vitlab.data.listing import images_below, is_image
from vitlab.data.rgb import rgb
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError, require
from vitlab.workbench.explore.base import Menu, row, sized
from vitlab.workbench.pictures import fitted

MAX_BYTES = 10_000_000                          # of an image file; Jupyter's server takes no larger message
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")        # none that Pillow needs another program for
MAX_LISTED = 1000                               # images of a folder
WIDE = sized("125px", "400px")                  # of a control, two in a row


def decode(name: str, content: bytes, shape: ViTShape) -> np.ndarray:
    """`fitted` of an image file's content. Raises InputError that begins with `name` for more than MAX_BYTES, more
    pixels (seen before anything is unpacked) than Pillow allows, or what is no image of FORMATS."""
    require(len(content) <= MAX_BYTES, f"{name}: a file of more than {MAX_BYTES / 1e6:.0f} MB, which is not read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return fitted(rgb(image), shape)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(
            f"{name}: more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels, which are not unpacked") from None
    except Exception:                           # a damaged file makes Pillow's decoders raise nearly anything
        raise InputError(f"{name}: can't be read as an image ({', '.join(FORMATS)})") from None


class PictureChooser(ipywidgets.VBox):
    """A picture out of a list, to which a folder's images or an upload are added. What can't be read is said."""

    chosen = traitlets.Unicode()                # key of the picture

    def __init__(self, pictures: dict[str, np.ndarray], shape: ViTShape) -> None:
        require(bool(pictures), "no picture was given; one at least is needed to begin with")
        self.shape = shape
        self.known: dict[str, np.ndarray | Path] = {            # a Path is read once it is chosen
            name: fitted(Image.fromarray((picture * 255).round().astype(np.uint8)), shape)
            for name, picture in pictures.items()}
        self.names = Menu(options=list(self.known), description="picture", **WIDE)
        self.folder = ipywidgets.Text(description="folder", placeholder="path, Enter", continuous_update=False,
                                      **sized("60px", "200px"))
        self.upload = ipywidgets.FileUpload(accept="image/*", description=f"upload ≤ {MAX_BYTES / 1e6:.0f} MB",
                                            layout={"width": "185px"})
        self.message = ipywidgets.HTML()
        super().__init__([row(self.names, self.folder, self.upload), self.message], chosen=self.names.value)
        self.names.observe(self._named, "value")
        self.folder.observe(lambda change: change.new and self._try(self._list, Path(os.path.expanduser(change.new))),
                            "value")
        self.upload.observe(lambda change: change.new and self._try(self._take, change.new[0]), "value")

    @property
    def picture(self) -> np.ndarray:
        """(h, w, 3) in [0, 1]."""
        return self.known[self.chosen]

    def _try(self, function: Callable[[Any], None], given: Any) -> None:
        self.message.value = ""
        try:
            function(given)
        except InputError as error:
            self.message.value = html.escape(str(error))
        except OSError as error:
            self.message.value = html.escape(f"{error.filename}: can't be read ({error.strerror})")

    def _named(self, change: Any) -> None:
        self._try(self._choose, change.new)

    def _choose(self, key: str) -> None:
        try:
            if isinstance(self.known[key], Path):
                with open(key, "rb") as file:
                    self.known[key] = decode(Path(key).name, file.read(MAX_BYTES + 1), self.shape)
        except (InputError, OSError):
            self._offer(self.chosen)
            raise
        self.chosen = key

    def _list(self, folder: Path) -> None:
        """Offer the images of a folder and of the folders in it, or the one image that it is."""
        folder = folder.absolute()                              # a message says where a relative path was looked for
        inside = (str(folder / name)
                  for name in images_below(folder)) if folder.is_dir() else [str(folder)] * is_image(folder.name)
        found = list(itertools.islice(inside, MAX_LISTED))
        require(found, f"{folder}: no such folder, or no image in it or in its folders")
        self.known = {path: Path(path) for path in found} | self.known
        self._offer(self.chosen)
        self.names.value = found[0]

    def _take(self, upload: dict[str, Any]) -> None:
        key = f"{upload['name']} (upload {sum(' (upload ' in key for key in self.known) + 1})"
        self.known[key] = decode(upload["name"], bytes(upload["content"]), self.shape)
        self._offer(key)
        self.chosen = key

    def _offer(self, key: str) -> None:
        """The list as it is now, with `key` chosen in it; new options would else choose the first."""
        self.names.unobserve(self._named, "value")
        self.names.options = [("/".join(Path(name).parts[-2:]), name) for name in self.known]
        self.names.value = key
        self.names.observe(self._named, "value")
