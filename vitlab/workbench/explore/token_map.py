"""Token map: what becomes of a picture's patches in a block, in all blocks, or of many pictures, under a token rule;
what the dense and the compressed model say of it, and what the plan costs."""
import functools
import html
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import ipywidgets
import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitlab.measure.averaging import frozen_eval
from vitlab.measure.distance import output_of, outputs, pooled
from vitlab.models import shape_of
from vitlab.plan import CompressionPlan, tokens
from vitlab.plan.rules import MergeReconstruct
from vitlab.plots import matched_map, merge_map, token_sheet, token_strip
from vitlab.plots.tokens import bordered, plain, region_means, through_matrices, through_means, tinted
from vitlab.runtime.files import InputError
from vitlab.workbench.explore import base
from vitlab.workbench.explore.choosing import MAX_BYTES, WIDE, PictureChooser, decode
from vitlab.workbench.explore.maps import BY_PLACE, GIVEN, Maps, Tokens
from vitlab.workbench.pictures import as_input
from vitlab.workbench.steps import Source, open_dense

NOTHING, BLOCKS, PICTURES = "nothing", "all blocks of the picture", "the block of all pictures"       # shown below
MOST = 24                       # pictures of a sheet


class RuleExplorer(base.Explorer):
    """Controls of a token rule, its rates and the block looked at; panels that point at its tokens; a line of text."""

    def __init__(self, maps: Maps, titles: dict[str, str], keep_rate: float, prune_rate: float) -> None:
        """titles: {panel: its title, as HTML}."""
        super().__init__([], self._figure)
        self.maps, shape, rates = maps, maps.shape, {"step": 0.01, "readout_format": ".2f", **WIDE}
        least = max(0.05, 1.01 / shape.num_patches)             # one patch has to stay, for all rounding
        self.rule = base.Menu(options=maps.rules, description="rule", **WIDE)
        self.block = ipywidgets.IntSlider(shape.depth // 2, 0, shape.depth - 1, description="block", **WIDE)
        self.keep_rate = ipywidgets.FloatSlider(keep_rate, min=least, max=1, description="keep rate, (0, 1]", **rates)
        self.prune_rate = ipywidgets.FloatSlider(prune_rate, min=0, max=0.95, description="prune rate, [0, 1)", **rates)
        self.panels = {name: base.Cells(grid=shape.grid_size, width=base.WIDTH) for name in titles}
        first, *others = self.panels.values()
        for other in others:
            traitlets.link((first, "picked"), (other, "picked"))
        boxes = [ipywidgets.VBox([ipywidgets.HTML(title), cells], layout=WIDE["layout"])
                 for title, cells in zip(titles.values(), self.panels.values())]
        self.rows = [base.row(*pair) for pair in zip(boxes[::2], boxes[1::2])]
        self.line = ipywidgets.HTML()

    def begin(self, widgets: list[ipywidgets.Widget], *controls: ipywidgets.Widget,
              slow: Sequence[ipywidgets.Widget] = ()) -> None:
        """Show these widgets, one below the other, and look again at whatever is chosen next; slow: sliders each of
        whose values runs the model, as the rates'."""
        self.children = [*widgets, self.line]
        base.observe([self.rule, self.block, *controls], self._show)
        base.observe([self.keep_rate, self.prune_rate, *slow], self._show, settled=True)
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
                cells.picture, cells.groups, cells.labels = base.array_png(images[name]), seen.regions.tolist(), labels
                cells.alt = alts[name]


class TokenMap(RuleExplorer):
    """The widgets of `token_map`; their values are the state, and `figure()` draws it."""

    def __init__(self, maps: Maps, chooser: PictureChooser, keep_rate: float, prune_rate: float,
                 classes: Sequence[str]) -> None:
        titles = {"left": "<b>tokens of the block; orange: pruned or averaged</b>",
                  "right": "<b>what merging keeps of the picture</b>"}
        super().__init__(maps, titles, keep_rate, prune_rate)
        self.chooser, (self.left, self.right), self.classes = chooser, self.panels.values(), classes
        self.view = ipywidgets.Dropdown(options=(NOTHING, BLOCKS, PICTURES), description="also show", **WIDE)
        self.says, self.tiles = ipywidgets.HTML(), base.Cells(width=2 * base.WIDTH)
        self.outputs = functools.lru_cache(maxsize=256)(self._outputs)
        chooser.observe(self._show, "chosen")
        self.tiles.observe(self._picked, "picked")
        self.begin([chooser, base.row(self.rule, self.block), base.row(self.keep_rate, self.prune_rate), *self.rows,
                    self.says, self.view, self.tiles], self.view)

    def _outputs(self, name: str, *key: Any) -> Tensor:
        """What the dense model, or with a key the compressed one, gives for a picture, as it is compared."""
        model = self.maps.compressed(*key) if key else self.maps.model
        with frozen_eval(model), torch.inference_mode():
            return outputs(model, self.maps.taken(name)).cpu()

    def told(self) -> dict[str, list[tuple[str, float]]]:
        """{model: (class, probability), the likeliest first} of the picture; of a Segmenter the shares of its patches;
        without a classifier how far the features still are the dense model's."""
        dense, own = self.outputs(self.chooser.chosen), self.outputs(self.chooser.chosen, *self.key())
        if not output_of(self.maps.model).labelled:
            cosine = float(pooled(own)[0] @ pooled(dense)[0])
            return {"compressed": [("cosine with the dense model's features", cosine)]}
        found = {}
        for name, given in (("dense", dense[0]), ("compressed", own[0])):
            p = given.exp() if given.dim() == 1 else given.argmax(dim=0).flatten().bincount(minlength=len(given)) / (
                given[0].numel())
            best = p.topk(min(base.SAID, len(p)))
            found[name] = [(self.classes[i] if i < len(self.classes) else f"class {i}", value)
                           for value, i in zip(best.values.tolist(), best.indices.tolist())]
        return found

    def _known(self) -> dict[str, np.ndarray]:
        """The pictures of the list that can be read, at most MOST, the chosen one among them."""
        found, known = {}, self.chooser.known
        for name in [self.chooser.chosen, *(name for name in known if name != self.chooser.chosen)]:
            try:
                if isinstance(known[name], Path) and len(found) < MOST:
                    with open(name, "rb") as file:
                        known[name] = decode(Path(name).name, file.read(MAX_BYTES + 1), self.maps.shape)
            except (InputError, OSError):
                continue
            if len(found) < MOST:
                found[name] = known[name]
        return found

    def several(self) -> dict[str, tuple[np.ndarray, Tokens]]:
        """{title: (picture, its tokens)} of what is shown below: every block of the picture, or one of all pictures."""
        key, block = self.key(), self.block.value
        if self.view.value == PICTURES:
            return {name: (image, self.maps.tokens(name, *key)[block]) for name, image in self._known().items()}
        return {f"block {index}: {seen.regions.max() + 1} tokens": (self.chooser.picture, seen)
                for index, seen in enumerate(self.maps.tokens(self.chooser.chosen, *key))}

    def _below(self) -> None:
        self.tiles.layout.display = "none" if self.view.value == NOTHING else None
        if self.view.value == NOTHING:
            return
        shape, drawn = self.maps.shape, []
        for name, (image, seen) in self.several().items():
            means = region_means(image, torch.from_numpy(seen.regions), shape)
            drawn.append((Path(name).name, bordered(tinted(means, seen.aside, shape), seen.regions, shape)))
        with self.tiles.hold_sync():
            self.tiles.grid, self.tiles.picked = (-(-len(drawn) // base.COLUMNS), base.COLUMNS), -1
            self.tiles.picture, self.tiles.alt = base.array_png(base.tiled(drawn)), self.view.value

    def _picked(self, change: Any) -> None:
        """A tile that is chosen is the block, or the picture, to look at."""
        if self.view.value == BLOCKS and 0 <= change.new <= self.block.max:
            self.block.value = change.new
        elif self.view.value == PICTURES and 0 <= change.new < len(names := list(self._known())):
            self.chooser.names.value = names[change.new]

    def _state(self) -> tuple[CompressionPlan, int, Tokens, np.ndarray]:
        """(plan, block, its tokens, picture) of what is chosen."""
        key, block = self.key(), self.block.value
        return self.maps.plan(*key), block, self.maps.tokens(self.chooser.chosen, *key)[block], self.chooser.picture

    def _show(self, change: Any = None) -> None:
        plan, block, seen, picture = self._state()
        where = f"of the picture {self.chooser.chosen} in block {block}, {self.rule.value}"
        self.draw({"left": bordered(tinted(base.enlarged(picture), seen.aside, plan.shape), seen.regions, plan.shape),
                   "right": _kept(picture, plan, block, seen)},
                  {"left": f"Tokens {where}", "right": f"What is kept {where}"}, seen)
        self.line.value, self.says.value = html.escape(self.maps.costs(plan, block, seen)), base.table(self.told())
        self._below()

    def _figure(self) -> Figure:
        """The state as `merge_map`, or as `matched_map` without matrices around the block; or what is shown below."""
        plan, block, seen, picture = self._state()
        several = {} if self.view.value == NOTHING else self.several()
        if self.view.value == BLOCKS:
            figure = token_strip(picture, [(each.regions, each.aside) for _, each in several.values()], plan.shape)
        elif self.view.value == PICTURES:
            figure = token_sheet([(Path(name).name, image, each.regions, each.aside)
                                  for name, (image, each) in several.items()], plan.shape)
        elif isinstance(plan.rules()[block][0], MergeReconstruct):
            figure = merge_map(picture, plan, [block])
        else:
            figure = matched_map([picture], {block: torch.from_numpy(seen.regions)[None]}, plan.shape)
            figure.set_size_inches(7.6, 4.2)                    # one picture has room
        said = "; ".join(f"{name}: {', '.join(f'{plain(label)} {p:.2f}' for label, p in each)}"
                         for name, each in self.told().items())
        figure.supxlabel(fill(f"{self.rule.value}. {self.maps.costs(plan, block, seen)} {said}.",
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
    it; below, what both models say of it, and, where that is chosen, all blocks of it, or the block of all pictures, of
    which one that is clicked is looked at. Raises InputError for a compressed model, a plan for another, or no picture.
    """
    found = None if isinstance(source, nn.Module) else open_dense(source)
    model, classes = (source, None) if found is None else (found.model, found.info.get("classes"))
    chooser = PictureChooser(pictures, shape_of(model))
    maps = Maps(model, lambda name: as_input(chooser.known[name], model), scores, plan, boundary=boundary,
                weights=weights)
    return TokenMap(maps, chooser, keep_rate, prune_rate, classes or ())
