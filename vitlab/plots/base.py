"""The house look of figures, and the one helper that saves them."""
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

PALETTE = sns.color_palette("colorblind")
# environment: formats that figures are saved in, such as "png,svg,pdf"; batches set it
FORMATS = "VITLAB_FIGURES"
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}        # the same figure gives the same file
DESCRIBED = ("png", "svg")                  # formats whose metadata have a description


def style() -> None:
    """Set seaborn's theme and the colour-blind-safe palette; called by every plot."""
    sns.set_theme(style="ticks", context="notebook", palette=PALETTE, rc={"figure.dpi": 100, "savefig.dpi": 160,
                                                                          "axes.titlesize": "medium",
                                                                          "svg.hashsalt": "vitlab", "pdf.fonttype": 42})


def save_figure(figure: Figure, folder: str | Path, name: str, caption: str = "",
                formats: tuple[str, ...] | None = None) -> None:
    """Write folder/NAME.FORMAT with the caption (the conditions) below the axes, and in the PNG's or SVG's own
    description. formats None: those that VITLAB_FIGURES names, PNG alone where it is not set."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if caption:
        _hold_legends(figure)
        figure.text(0.5, -0.01, caption, ha="center", va="top", fontsize="small", color="0.3", wrap=True)
    for kind in formats or os.environ.get(FORMATS, "png").split(","):
        about = UNDATED.get(kind, {}) | ({"Description": caption} if caption and kind in DESCRIBED else {})
        figure.savefig(folder / f"{name}.{kind}", bbox_inches="tight", facecolor="white", metadata=about or None)


def _hold_legends(figure: Figure) -> None:
    """Fix where the figure's own legends stand: saved together with what lies below the figure, they would move over
    it."""
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


def new_axes(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A grid of axes (rows, columns), always two-dimensional; width and height of one in inches."""
    style()
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                                layout="constrained")
    return figure, axes
