"""Token map: what becomes of a picture's patches in a block under a token rule, and what the plan costs."""
import html
from textwrap import fill
from typing import Any

import ipywidgets
import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitlab.models import shape_of
from vitlab.plan import CompressionPlan, tokens
from vitlab.plan.rules import MergeReconstruct
from vitlab.plots import matched_map, merge_map
from vitlab.plots.tokens import bordered, through_matrices, through_means, tinted
from vitlab.workbench.explore.base import Cells, Explorer, Menu, array_png, observe, row
from vitlab.workbench.explore.choosing import WIDE, PictureChooser
from vitlab.workbench.explore.maps import BY_PLACE, GIVEN, Maps, Tokens
from vitlab.workbench.pictures import as_input
from vitlab.workbench.steps import Source, open_dense

WIDTH, DRAWN = 380, 448         # of a picture on the page, in CSS pixels, and of its drawing with borders, at least


def enlarged(image: np.ndarray) -> np.ndarray:
    """An image (h, w, 3) of DRAWN pixels at least, each repeated."""
    zoom = -(-DRAWN // max(image.shape[:2]))
    return image.repeat(zoom, 0).repeat(zoom, 1)


class RuleExplorer(Explorer):
    """Controls of a token rule, its rates and the block looked at; panels that point at its tokens; a line of text."""

    def __init__(self, maps: Maps, titles: dict[str, str], keep_rate: float, prune_rate: float,
                 **rates: bool) -> None:
        """titles: {panel: its title, as HTML}; rates: of the sliders of rates."""
        super().__init__([], self._figure)
        self.maps, shape, rates = maps, maps.shape, {"step": 0.01, "readout_format": ".2f", **WIDE, **rates}
        least = max(0.05, 1.01 / shape.num_patches)             # one patch has to stay, for all rounding
        self.rule = Menu(options=maps.rules, description="rule", **WIDE)
        self.block = ipywidgets.IntSlider(shape.depth // 2, 0, shape.depth - 1, description="block", **WIDE)
        self.keep_rate = ipywidgets.FloatSlider(keep_rate, min=least, max=1, description="keep rate, (0, 1]", **rates)
        self.prune_rate = ipywidgets.FloatSlider(prune_rate, min=0, max=0.95, description="prune rate, [0, 1)", **rates)
        self.panels = {name: Cells(grid=shape.grid_size, width=WIDTH) for name in titles}
        first, *others = self.panels.values()
        for other in others:
            traitlets.link((first, "picked"), (other, "picked"))
        boxes = [ipywidgets.VBox([ipywidgets.HTML(title), cells], layout=WIDE["layout"])
                 for title, cells in zip(titles.values(), self.panels.values())]
        self.rows = [row(*pair) for pair in zip(boxes[::2], boxes[1::2])]
        self.line = ipywidgets.HTML()

    def begin(self, widgets: list[ipywidgets.Widget], *controls: ipywidgets.Widget) -> None:
        """Show these widgets, one below the other, and look again at whatever is chosen next."""
        self.children = [*widgets, self.line]
        observe([self.rule, self.block, self.keep_rate, self.prune_rate, *controls], self._show)
        self._show()

    def key(self) -> tuple[str, float, float]:
        """What a plan is known by."""
        return self.rule.value, self.keep_rate.value, self.prune_rate.value if self.rule.value in BY_PLACE else 0.0

    def draw(self, images: dict[str, np.ndarray], alts: dict[str, str], seen: Tokens) -> None:
        """Show images in the panels, whose cells are the tokens seen."""
        self.keep_rate.disabled = self.rule.value == GIVEN
        self.prune_rate.disabled = self.rule.value not in BY_PLACE
        labels = seen.labels(self.maps.shape)
        for name, cells in self.panels.items():
            with cells.hold_sync():
                cells.picture, cells.groups, cells.labels = array_png(images[name]), seen.regions.tolist(), labels
                cells.alt = alts[name]


class TokenMap(RuleExplorer):
    """The widgets of `token_map`; their values are the state, and `figure()` draws it."""

    def __init__(self, maps: Maps, chooser: PictureChooser, keep_rate: float, prune_rate: float) -> None:
        titles = {"left": "<b>tokens of the block; orange: pruned or averaged</b>",
                  "right": "<b>what merging keeps of the picture</b>"}
        super().__init__(maps, titles, keep_rate, prune_rate)
        self.chooser, (self.left, self.right) = chooser, self.panels.values()
        chooser.observe(self._show, "chosen")
        self.begin([chooser, row(self.rule, self.block), row(self.keep_rate, self.prune_rate), *self.rows])

    def _state(self) -> tuple[CompressionPlan, int, Tokens, np.ndarray]:
        """(plan, block, its tokens, picture) of what is chosen."""
        key, block = self.key(), self.block.value
        return self.maps.plan(*key), block, self.maps.tokens(self.chooser.chosen, *key)[block], self.chooser.picture

    def _show(self, change: Any = None) -> None:
        plan, block, seen, picture = self._state()
        where = f"of the picture {self.chooser.chosen} in block {block}, {self.rule.value}"
        self.draw({"left": bordered(tinted(enlarged(picture), seen.aside, plan.shape), seen.regions, plan.shape),
                   "right": _kept(picture, plan, block, seen)},
                  {"left": f"Tokens {where}", "right": f"What is kept {where}"}, seen)
        self.line.value = html.escape(self.maps.costs(plan, block, seen))

    def _figure(self) -> Figure:
        """The state as `merge_map`, or as `matched_map` where no matrices stand around the block."""
        plan, block, seen, picture = self._state()
        if isinstance(plan.rules()[block][0], MergeReconstruct):
            figure = merge_map(picture, plan, [block])
        else:
            figure = matched_map([picture], {block: torch.from_numpy(seen.regions)[None]}, plan.shape)
            figure.set_size_inches(7.6, 4.2)                    # one picture has room
        figure.supxlabel(fill(f"{self.rule.value}. {self.maps.costs(plan, block, seen)}",
                              int(13 * figure.get_figwidth())), fontsize=9)
        return figure


def _kept(picture: np.ndarray, plan: CompressionPlan, block: int, seen: Tokens) -> np.ndarray:
    """The picture through the block's matrices, or, where it has none, with every patch as the mean of its token."""
    rule = plan.rules()[block][0]
    if isinstance(rule, MergeReconstruct):
        return through_matrices(picture, rule, plan.shape)[1]
    return through_means(picture, torch.from_numpy(seen.regions), torch.from_numpy(seen.weights), plan.shape)


def token_map(source: Source | nn.Module, pictures: dict[str, np.ndarray], scores: Tensor | None = None,
              plan: CompressionPlan | None = None, *, keep_rate: float = tokens.KEEP_RATE,
              prune_rate: float = tokens.PRUNE_RATE, boundary: str = tokens.BOUNDARY,
              weights: str = tokens.WEIGHTS) -> TokenMap:
    """Widgets that show what a token rule does to a picture in a block of a dense model, and what the plan costs.

    pictures: {name: (h, w, 3) in [0, 1]}, to which a folder's images or an upload can be added. scores: raw token
    scores (L, n); without them there are only the rules that need none. plan: shown first, beside the rules. keep_rate
    and prune_rate: where the sliders start; boundary and weights: as in `prune_and_merge`. Of the rules by content
    keep_rate is the fraction of patches that is left after the last block that cuts, each block cutting the same ratio.

    Left the picture with a border around each token's patches, right what merge and reconstruct, or the mean, leave of
    it. Raises InputError for a compressed model, a plan for another, or no picture.
    """
    model = source if isinstance(source, nn.Module) else open_dense(source).model
    chooser = PictureChooser(pictures, shape_of(model))
    maps = Maps(model, lambda name: as_input(chooser.known[name], model), scores, plan, boundary=boundary,
                weights=weights)
    return TokenMap(maps, chooser, keep_rate, prune_rate)
