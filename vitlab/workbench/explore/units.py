"""Heads and neurons: what each head scores, looks at and shares with the others, and which neurons stay."""
import functools
from typing import Any

import ipywidgets
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vitlab.criteria.units import UnitScores
from vitlab.measure.capture import attention_maps
from vitlab.models import shape_of
from vitlab.plan import CompressionPlan
from vitlab.plan.shape import POOL_TOKEN
from vitlab.plots.base import INK, PALETTE
from vitlab.plots.units import as_array, cut_heads, head_view, looked_at, over_grey, ranked_neurons, to_own_range
from vitlab.runtime.files import require
from vitlab.workbench.explore.base import PAGE, Cells, Explorer, array_png, row
from vitlab.workbench.explore.choosing import WIDE, PictureChooser
from vitlab.workbench.pictures import as_input
from vitlab.workbench.steps import Source, open_dense

WIDTH, STRIP = 380, 90                          # of a panel, and height of the neurons' one, in CSS pixels
SHARP = 2                                       # drawn pixels for each of them
BINS = 64                                       # parts of the neurons' panel that can be pointed at


def head_grid(heads: Any, plan: CompressionPlan, cell: tuple[int, int]) -> np.ndarray:
    """Scores (L, H) as a picture of (L + 1) x (H + 1) cells of (width, height) pixels: numbers of heads and blocks,
    then colours in the block's range, with a cross where the plan cuts; RGBA, on no ground. Drawn in some ms."""
    colours = (255 * colormaps["viridis"](to_own_range(as_array(heads)))).round().astype(int)
    (depth, count), (w, h), cut = colours.shape[:2], cell, set(cut_heads(plan))
    image = Image.new("RGBA", ((count + 1) * w, (depth + 1) * h))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=0.55 * min(w, h))
    for number in range(max(depth, count)):
        for x, y, shown in ((number + 1.5, 0.5, number < count), (0.5, number + 1.5, number < depth)):
            if shown:
                draw.text((x * w, y * h), str(number), fill=to_hex(INK), font=font, anchor="mm")
    for block, head in np.ndindex(depth, count):
        x, y = (head + 1) * w, (block + 1) * h
        draw.rectangle((x, y, x + w - 1, y + h - 1), fill=tuple(colours[block, head]), outline=(0, 0, 0, 0))
        if (block, head) in cut:
            arm = 0.28 * min(w, h)
            for colour, width in (("black", h // 6), ("white", h // 14)):       # seen on bright and on dark ground
                for sign in (-1, 1):
                    draw.line((x + w / 2 - arm, y + h / 2 - sign * arm, x + w / 2 + arm, y + h / 2 + sign * arm),
                              colour, width)
    return np.asarray(image) / 255


def neuron_strip(scores: np.ndarray, kept: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Ranked scores (M) as columns of a picture of (width, height) pixels, blue where `kept` and orange where cut, a
    grey line at the number kept; RGBA, on no ground. Drawn in some ms."""
    width, height = size
    index = np.arange(width) * len(scores) // width                             # the neuron of each column of pixels
    low, high = min(0.0, scores.min()), scores.max()
    tall = (scores[index] - low) / (high - low if high > low else 1)
    colours = np.where(kept[index, None], to_rgba(PALETTE[0]), to_rgba(PALETTE[1]))
    filled = np.arange(height)[::-1, None] < np.maximum(tall * height, 1)       # (height, width)
    image = np.where(filled[..., None], colours, 0.0)
    if not kept.all():
        line = round(kept.mean() * width)
        image[:, max(line - 1, 0):line + 1] = to_rgba(INK)
    return image


class UnitsMap(Explorer):
    """The widgets of `units_map`. `heads.picked` is the cell of (L + 1) x (H + 1) that was chosen, numbers included."""

    def __init__(self, model: nn.Module, scores: UnitScores, plan: CompressionPlan, chooser: PictureChooser,
                 redundancy: Tensor | None):
        self.model, self.scores, self.plan, self.chooser, self.redundancy = model, scores, plan, chooser, redundancy
        depth, count = plan.shape.depth, plan.shape.num_heads
        self.cut = set(cut_heads(plan))
        cell = (min(80, WIDTH // (count + 1)), min(30, WIDTH // (depth + 1)))
        grid = head_grid(scores.heads, plan, (SHARP * cell[0], SHARP * cell[1]))
        self.heads = Cells(picture=array_png(grid), grid=(depth + 1, count + 1), width=cell[0] * (count + 1),
                           labels=self._labels(), picked=count + 2, alt="Scores of blocks (down) by heads (across)")
        self.looks = Cells(grid=plan.shape.grid_size, width=WIDTH)
        self.neurons = Cells(width=WIDTH)
        self.titles = {name: ipywidgets.HTML() for name in ("looks", "neurons")}
        self.shares, self.line = ipywidgets.HTML(layout={"width": f"min({WIDTH}px, {PAGE})"}), ipywidgets.HTML()
        self.block, self.head = 0, 0
        self.attention = functools.lru_cache(maxsize=64)(self._attention)
        left = [ipywidgets.HTML("<b>blocks by heads</b>: bright scores high, a cross is cut"), self.heads,
                ipywidgets.HTML("<b>dependence on the block's other heads</b> (HSIC)"), self.shares]
        right = [self.titles["looks"], self.looks, self.titles["neurons"], self.neurons]
        columns = [ipywidgets.VBox(column, layout=WIDE["layout"]) for column in (left, right)]
        super().__init__([chooser, self.line, row(*columns)], self._figure)
        self.heads.observe(self._pick, "picked")
        chooser.observe(self._show, "chosen")
        self._show()

    def _labels(self) -> list[str]:
        """What to say of each cell of the grid; of the numbers nothing."""
        values, columns = as_array(self.scores.heads), self.plan.shape.num_heads + 1
        labels = [""] * columns
        for block, scores in enumerate(values):
            labels += [""] + [f"block {block}, head {head}: score {value:.4g}, {self._fate(block, head)}"
                              for head, value in enumerate(scores)]
        return labels

    def _fate(self, block: int, head: int) -> str:
        return "cut" if (block, head) in self.cut else "kept"

    def _pick(self, change: Any) -> None:
        """The head of the chosen cell; a cell that is none leaves it as it was."""
        columns = self.plan.shape.num_heads + 1
        line, column = divmod(change.new, columns)
        if line < 1 or column < 1:
            self.heads.picked = (self.block + 1) * columns + self.head + 1
        else:
            self.block, self.head = line - 1, column - 1
            self._show()

    def _attention(self, picture: str) -> Tensor:
        """(L, H, n) what the class token of each head, or the mean over patches, takes from each patch."""
        shape = self.plan.shape
        maps = attention_maps(self.model, as_input(self.chooser.known[picture], self.model))[:, 0]      # (L, H, N, N)
        rows = [looked_at(each, shape.num_prefix_tokens, average=shape.pool != POOL_TOKEN)
                for each in maps.flatten(0, 1)]
        return torch.stack(rows).unflatten(0, maps.shape[:2])

    def _show(self, change: Any = None) -> None:
        block, head, shape = self.block, self.head, self.plan.shape
        looks = self.attention(self.chooser.chosen)[block, head].numpy()
        values = as_array(self.scores.heads[block])
        rank = 1 + int((values > values[head]).sum())
        name = f"block {block}, head {head}"
        self.line.value = (f"{name.capitalize()} is {self._fate(block, head)}: score {values[head]:.4g}, place {rank} "
                           f"of {len(values)} in its block. Its attention to a patch is at most {looks.max():.4f}, "
                           f"{looks.max() / looks.mean():.1f} x the mean.")
        self.titles["looks"].value = f"<b>attention of {name}</b>: bright is much"
        with self.looks.hold_sync():
            self.looks.picture = array_png(over_grey(self.chooser.picture, looks, shape))
            self.looks.labels = [f"row {j // shape.grid_size[1]}, column {j % shape.grid_size[1]}: attention "
                                 f"{value:.4f}, {value / looks.mean():.1f} x the mean" for j, value in enumerate(looks)]
            self.looks.alt = f"Attention of {name} on the picture {self.chooser.chosen}"
        self.shares.value = self._bars()
        self._show_neurons()

    def _bars(self) -> str:
        """The chosen head's row of the redundancy as bars; their scale is the block's."""
        others = [other for other in range(self.plan.shape.num_heads) if other != self.head]
        if self.redundancy is None or not others:
            return "There is no other head." if self.redundancy is not None else "No redundancy was given."
        matrix = as_array(self.redundancy[self.block])
        most = matrix[~np.eye(len(matrix), dtype=bool)].max() or 1
        rows = []
        for other in others:
            fate, value = self._fate(self.block, other), matrix[self.head, other]
            bar = f"background: {to_hex(PALETTE[fate == 'cut'])}; height: 12px; width: {100 * value / most:.1f}%"
            rows.append(f'<div style="width: 90px">head {other}, {fate}</div><div><div style="{bar}"></div></div>'
                        f'<div>{value:.3g}</div>')
        return ('<div style="display: grid; grid-template-columns: auto 1fr 70px; column-gap: 8px; align-items: '
                f'center; line-height: 20px">{"".join(rows)}</div>')

    def _show_neurons(self) -> None:
        values, kept = ranked_neurons(self.scores.neurons, self.plan, self.block)
        blue, orange = (f'<span style="color: {to_hex(colour)}">■</span>' for colour in PALETTE[:2])
        self.titles["neurons"].value = (f"<b>neurons of block {self.block}</b>: {blue} {kept.sum()} kept, down to "
                                        f"{values[kept].min():.3g}, {orange} {(~kept).sum()} cut")
        edges = np.linspace(0, len(values), min(BINS, len(values)) + 1).astype(int)
        with self.neurons.hold_sync():
            self.neurons.picture = array_png(neuron_strip(values, kept, (SHARP * WIDTH, SHARP * STRIP)))
            self.neurons.grid = (1, len(edges) - 1)
            self.neurons.labels = [f"places {a + 1} to {b}: score {values[a]:.3g} to {values[b - 1]:.3g}, "
                                   f"{kept[a:b].sum()} kept" for a, b in zip(edges, edges[1:])]
            self.neurons.alt = (f"Neurons of block {self.block}, highest score first; "
                                f"{kept.sum()} of {len(kept)} are kept")

    def _figure(self) -> Figure:
        looks = self.attention(self.chooser.chosen)[self.block, self.head]
        shared = None if self.redundancy is None else self.redundancy[self.block, self.head]
        return head_view(self.scores.heads, self.scores.neurons, self.plan, self.chooser.picture, looks, shared,
                         self.block, self.head)


def units_map(source: Source | nn.Module, scores: UnitScores, plan: CompressionPlan, pictures: dict[str, np.ndarray],
              redundancy: Tensor | None = None) -> UnitsMap:
    """Widgets that show what the heads of a dense model score, look at and share, and which neurons a plan keeps.

    pictures: {name: (h, w, 3) in [0, 1]}, to which a folder's images or an upload can be added; redundancy: the HSIC
    between heads (L, H, H), as `head_redundancy` gives it. The attention shown is the class token's, or the mean over
    patches where the model pools them. Raises InputError for a compressed model, a plan or scores for another, or no
    picture.
    """
    model = source if isinstance(source, nn.Module) else open_dense(source).model
    shape = shape_of(model)
    plan.check_fits(shape)
    needed = {"head scores": (scores.heads, (shape.depth, shape.num_heads)),
              "neuron scores": (scores.neurons, (shape.depth, shape.num_neurons))}
    if redundancy is not None:
        needed["redundancy"] = (redundancy, (shape.depth, shape.num_heads, shape.num_heads))
    for name, (given, size) in needed.items():
        require(tuple(given.shape) == size, f"{name}: {tuple(given.shape)}; the model needs {size}")
    return UnitsMap(model, scores, plan, PictureChooser(pictures, shape), redundancy)
