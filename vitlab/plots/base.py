"""The house look of figures, and the one helper that saves them."""
import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.spines import Spine
from matplotlib.text import Text
from torch import Tensor

PALETTE, MARKERS = sns.color_palette("colorblind"), "osD^v<>pX*"
FORMATS = "VITLAB_FIGURES"      # environment: formats that figures are saved in, such as "png,svg,pdf"; batches set it
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}        # the same figure gives the same file
DESCRIBED = ("png", "svg")                  # formats whose metadata have a description
PICTURES = {"framed": True, "xticks": [], "yticks": []}                 # of `new_axes` that show images
OVER_ALL = (("black", 4.0), ("white", 1.6))         # a mark's colour and width, below and above: seen on any ground
INK = "0.46"                                # of text and lines: 4.6 : 1 on white, 4.1 : 1 on JupyterLab's dark page
BLACK = "0.15"                              # of the same in files, on white


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the so-manyeth line of a figure."""
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def as_array(x: Any) -> np.ndarray:
    """A tensor (of any device and float type), array or list as a float64 array."""
    return x.detach().cpu().double().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float64)


def wrapped(label: str, width: int) -> str:
    """A label in lines of at most so many letters; a unit in brackets stays whole."""
    return fill(re.sub(r"\([^()]{,14}\)", lambda unit: unit[0].replace(" ", "\N{NO-BREAK SPACE}"), label), width)


def save_figure(figure: Figure, folder: str | Path, name: str, caption: str = "",
                formats: tuple[str, ...] | None = None) -> None:
    """Write folder/NAME.FORMAT with the caption (the conditions) below the axes, and in the PNG's or SVG's own
    description. formats None: those that VITLAB_FIGURES names, PNG alone where it is not set."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if caption:
        _hold_legends(figure)
        figure.text(0.5, -0.01, caption, ha="center", va="top", fontsize="small", wrap=True)
    for kind in formats or os.environ.get(FORMATS, "png").split(","):
        about = UNDATED.get(kind, {}) | ({"Description": caption} if caption and kind in DESCRIBED else {})
        with _on_paper(figure):
            figure.savefig(folder / f"{name}.{kind}", bbox_inches="tight", facecolor="white", metadata=about or None)


@contextlib.contextmanager
def _on_paper(figure: Figure) -> Iterator[None]:
    """Inside, what is drawn in INK is nearly black: a file is for a page, what a notebook shows for any screen."""
    def swap(before: str, after: str) -> None:
        for artist in figure.findobj(lambda artist: isinstance(artist, (Text, Line2D, LineCollection, Spine))):
            for part in ("color", "markeredgecolor", "edgecolor"):              # edgecolor: as set_color, of a spine
                colour = getattr(artist, f"get_{part}", lambda: "none")()
                if len(colour) and same_color(colour, [before] * len(colour) if np.ndim(colour) == 2 else before):
                    getattr(artist, f"set_{part}")(after)
    swap(INK, BLACK)
    try:
        yield
    finally:
        swap(BLACK, INK)


def _hold_legends(figure: Figure) -> None:
    """Saved together with what lies below the figure, its own legends would move over it."""
    if figure.legends:
        figure.canvas.draw()                    # lays it out
        figure.set_layout_engine("none")
    for legend in figure.legends:
        place = legend.get_window_extent().transformed(figure.transFigure.inverted())
        legend.borderaxespad = 0
        legend.set_loc("lower left")
        legend.set_bbox_to_anchor((place.x0, place.y0), transform=figure.transFigure)


def to_image(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """A normalised (3, h, w) tensor back to an (h, w, 3) array in [0, 1]."""
    image = x.detach().cpu().permute(1, 2, 0).numpy() * np.array(std) + np.array(mean)
    return image.clip(0, 1)


def style() -> None:
    """Set seaborn's theme, the colour-blind-safe palette, and colours for a light page and a dark one."""
    inked = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    sns.set_theme(style="ticks", context="notebook", palette=PALETTE,
                  rc=inked | {"axes.facecolor": "none", "figure.dpi": 100, "savefig.dpi": 160,
                              "axes.titlesize": "medium", "svg.hashsalt": "vitlab", "pdf.fonttype": 42})


def new_axes(rows: int, columns: int, width: float, height: float, *, framed: bool = False,
             **settings: Any) -> tuple[Figure, np.ndarray]:
    """A grid of axes (rows, columns), always two-dimensional; width and height of one in inches. Unless framed, they
    have no line above and to the right. settings: of each of the axes."""
    style()
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                                layout="constrained", frameon=False, subplot_kw=settings)
    if not framed:
        sns.despine(fig=figure)
    return figure, axes


def legend_above(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """One legend for the whole figure, above its axes, so that it covers no data."""
    widths = [8 + len(name) for name in names]                                  # in letters; about 105 fit into a row
    columns = len(names) if sum(widths) <= 105 else max(1, 105 // max(widths))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False, fontsize="small")


def bars(axis: Axes, heights: Mapping[str, Any]) -> None:
    """A group of bars at each place, one for each of `heights` (places)."""
    width = 0.8 / max(len(heights), 1)
    for index, (name, each) in enumerate(heights.items()):
        places = np.arange(len(each)) + (index - (len(heights) - 1) / 2) * width
        axis.bar(places, each, width, color=look(index)["color"], label=name, linewidth=0)


def stack(axis: Axes, parts: Mapping[str, np.ndarray], colours: Sequence[Any] = PALETTE, lying: bool = False) -> None:
    """A bar at each place, of `parts` (places) one upon the other, or lying behind the other."""
    ends, draw, from_ = 0.0, (axis.barh if lying else axis.bar), ("left" if lying else "bottom")
    for (part, each), colour in zip(parts.items(), itertools.cycle(colours)):
        draw(range(len(each)), each, 0.7, color=colour, label=part.replace("_", " "), edgecolor="white",
             linewidth=0.5, **{from_: ends})
        ends = ends + each
