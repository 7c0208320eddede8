"""What the explorers share: a widget that is a figure where there are none, and a picture of cells to point at."""
import asyncio
import base64
import html
import io
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import traitlets
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vitlab.plots.base import INK

WIDTH, DRAWN = 380, 448         # of a picture on the page, in CSS pixels, and of its drawing with borders, at least
PAUSE = 0.4                                     # seconds that what takes a while to show has to stay
COLUMNS, SAID = 6, 3            # pictures of a sheet that stand side by side, and predictions of each model
PAGE = "calc(100% - 4px)"                       # of its width, what a widget's margins leave
_DRAWING = threading.RLock()                    # JupyterLab may have widgets answered in threads; pyplot knows of none
_TASKS: set[asyncio.Task] = set()               # a loop holds its tasks weakly


def sized(label: str, width: str) -> dict[str, dict[str, str]]:
    """Settings of a control: the width of its label, and its own, which a narrow page makes less."""
    return {"style": {"description_width": label}, "layout": {"width": f"min({width}, {PAGE})"}}


class Menu(ipywidgets.Dropdown):
    """A list to choose from, wider than it was made where an entry asks for it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.layout = {"min_width": self.layout.width, "width": "max-content", "max_width": PAGE}


def row(*widgets: ipywidgets.Widget) -> ipywidgets.HBox:
    """Side by side, and below each other in a narrow window."""
    return ipywidgets.HBox(widgets, layout={"flex_flow": "row wrap"})


def observe(widgets: Iterable[ipywidgets.Widget], function: Callable[..., object], name: str = "value",
            settled: bool = False) -> None:
    """Call the function whenever one of them changes, while no other called so is at work, or `once_settled`."""
    def alone(change: Any) -> None:
        with _DRAWING:
            function(change)
    called = once_settled(alone) if settled else alone
    for widget in widgets:
        widget.observe(called, name)


def once_settled(function: Callable[..., object]) -> Callable[..., None]:
    """What calls the function when it was itself not called again for PAUSE seconds, so that a slider goes on moving;
    at once where no page waits."""
    waiting: list[asyncio.TimerHandle] = []

    def soon(*args: Any) -> None:
        for handle in waiting:
            handle.cancel()
        try:
            waiting[:] = [asyncio.get_running_loop().call_later(PAUSE, function, *args)]
        except RuntimeError:
            function(*args)
    return soon


class Explorer(ipywidgets.VBox):
    """Widgets in a column. JupyterLab shows them; a page, a printer or a notebook run by papermill shows `figure()`,
    which is what they show at that moment; where that is the figure of a canvas, it is not drawn once more."""

    def __init__(self, children: Sequence[ipywidgets.Widget], figure: Callable[[], Figure],
                 canvas: "Canvas | None" = None) -> None:
        super().__init__(list(children))
        self.canvas = canvas
        self.add_class("vitlab-explorer")                       # by which cells.js knows it
        self.figure = figure

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        with _DRAWING:
            picture = self.canvas.picture if self.canvas else figure_png(self.figure())
        return {**super()._repr_mimebundle_(**kwargs), "image/png": base64.b64encode(picture).decode()}


class Cells(anywidget.AnyWidget):
    """A picture under a grid of cells. One that is pointed at outlines its group and shows its label; a click, or the
    arrow keys, choose it. A grid of (0, 0) has none. Wherever one is in an `Explorer`, keys that are pressed there are
    the explorer's."""

    _esm = Path(__file__).parent / "cells.js"
    picture = traitlets.Bytes().tag(sync=True)              # PNG
    width = traitlets.Int(320).tag(sync=True)               # CSS pixels; the height follows from the picture
    alt = traitlets.Unicode().tag(sync=True)                # what the picture shows, in words
    grid = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=(1, 1)).tag(sync=True)    # (rows, columns)
    groups = traitlets.List(traitlets.Int()).tag(sync=True)             # of each cell, row by row; [] : each by itself
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)         # of each cell; [] : none
    picked = traitlets.Int(-1).tag(sync=True)               # the chosen cell, -1: none


class Canvas(Cells):
    """A figure as wide as the page."""

    def __init__(self) -> None:
        super().__init__(width=940, grid=(0, 0))

    def show(self, figure: Figure) -> None:
        """Show a figure, and let go of it."""
        self.picture = figure_png(figure)


def figure_png(figure: Figure) -> bytes:
    """A figure as PNG; it is let go of."""
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format="png", bbox_inches="tight")
    finally:
        plt.close(figure)
    return buffer.getvalue()


def array_png(image: np.ndarray) -> bytes:
    """An image (h, w, 3 or 4) in [0, 1] as PNG, some ms where a figure takes a quarter of a second."""
    buffer = io.BytesIO()
    Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def repeat(look: Callable[[], bool], seconds: float) -> asyncio.Task:
    """Call `look` in the kernel's event loop, at once and then every so many seconds, until it gives False."""
    async def again() -> None:
        while look():
            await asyncio.sleep(seconds)
    task = asyncio.get_running_loop().create_task(again())
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)
    return task


def tiled(pictures: Sequence[tuple[str, np.ndarray]], side: int = 224) -> np.ndarray:
    """Pictures in rows of COLUMNS, each under its name, as one (h, w, 4) on no ground: drawn in some ms."""
    height = 22 + max(side * image.shape[0] // image.shape[1] for _, image in pictures)
    whole = Image.new("RGBA", (COLUMNS * (side + 6), -(-len(pictures) // COLUMNS) * (height + 6)))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=15)
    for place, (name, image) in enumerate(pictures):
        x, y = place % COLUMNS * (side + 6), place // COLUMNS * (height + 6)
        draw.text((x + 2, y + 2), name[-26:], fill=to_hex(INK), font=font)
        small = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
        whole.paste(small.resize((side, side * image.shape[0] // image.shape[1])), (x, y + 22))
    return np.asarray(whole) / 255


def table(told: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """{model: (class, probability), the likeliest first} in HTML, a row for each model."""
    lines = [[name, *(f"{label} {p:.2f}" for label, p in each[:SAID])] for name, each in told.items()]
    rows = "".join(f"<tr><td>{'</td><td>'.join(map(html.escape, line))}</td></tr>" for line in lines)
    return f'<table style="border-collapse: separate; border-spacing: 1em 0">{rows}</table>'


def enlarged(image: np.ndarray) -> np.ndarray:
    """An image (h, w, 3) of DRAWN pixels at least, each repeated."""
    zoom = -(-DRAWN // max(image.shape[:2]))
    return image.repeat(zoom, 0).repeat(zoom, 1)
