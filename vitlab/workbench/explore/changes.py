"""What compression changed, picture by picture: the models' predictions, what they look at, the tokens of a block, and
the blocks to blame."""
import functools
import html
from collections.abc import Mapping
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from vitlab.plan import CompressionPlan
from vitlab.plots.base import as_array
from vitlab.plots.tokens import bordered
from vitlab.runtime.files import InputError
from vitlab.workbench.changes import pictures
from vitlab.workbench.compared import Compared
from vitlab.workbench.explore.base import (
    WIDTH,
    Cells,
    Explorer,
    Menu,
    array_png,
    enlarged,
    observe,
    once_settled,
    row,
    table,
)
from vitlab.workbench.explore.choosing import WIDE


class ChangesExplorer(Explorer):
    """A slider over the pictures whose class is another in the model of the menu, the one that moved furthest there
    first; over all of them; or over those that all models, or this one alone, have wrong."""

    def __init__(self, every: Mapping[str, Compared]) -> None:
        super().__init__([], self._figure)
        self.every, self.numbers = every, []
        self.model = Menu(options=list(every), description="model", **WIDE)
        lists = [pictures(every, name) for name in every]
        self.which = Menu(options=[which for which in lists[0] if any(each[which] for each in lists)],
                          description="pictures", **WIDE)
        self.image = ipywidgets.IntSlider(0, 0, 0, description="image", **WIDE)
        self.block = ipywidgets.IntSlider(0, 0, self.plan.shape.depth - 1, description="block", **WIDE)
        self.cells, self.line = Cells(grid=self.plan.shape.grid_size, width=WIDTH), ipywidgets.HTML()
        self.blames: dict[tuple[str, int], np.ndarray | None] = {}
        self.soon = once_settled(self._blame)
        # some forwards each
        self.tokens = functools.lru_cache(maxsize=64)(lambda name, number: every[name].tokens(number))
        self.beside = functools.lru_cache(maxsize=64)(self._beside)
        titles = dict.fromkeys(title for name in every for title in self.beside(name, 0))
        self.panels = {title: Cells(width=WIDTH // 2, grid=(0, 0)) for title in titles}
        boxes = [ipywidgets.VBox([ipywidgets.HTML(f"<b>{title}</b>"), cells]) for title, cells in self.panels.items()]
        self.children = [*([row(self.model)] if len(every) > 1 else []), row(self.which, self.image), self.block,
                         row(self.cells, self.line), row(*boxes)]
        observe([self.model], self._model)
        observe([self.which], self._list)
        observe([self.image], self._show)
        observe([self.block], self._tokens)
        self._list()

    @property
    def found(self) -> Compared:
        """What became of the chosen model."""
        return self.every[self.model.value]

    @property
    def plan(self) -> CompressionPlan:
        return self.found.compressed.plan

    @property
    def chosen(self) -> int:
        """Number of the image."""
        return self.numbers[self.image.value]

    @property
    def _at(self) -> tuple[str, int]:
        return self.model.value, self.chosen

    def _model(self, change: Any) -> None:
        """The picture stays, where it is among those of the list in this model, too."""
        self._list(number=self.chosen)

    def _list(self, change: Any = None, number: int | None = None) -> None:
        numbers = pictures(self.every, self.model.value)[self.which.value]
        if not numbers:                         # none of this model
            self.which.value = "all images"
            return
        place = numbers.index(number) if number in numbers else 0
        self.image.max = max(self.image.max, place)
        self.numbers, stays = numbers, self.image.value == place
        self.image.value, self.image.max = place, len(numbers) - 1
        if stays:
            self._show()

    def blamed(self) -> np.ndarray | None:
        """(L) of the image, computed once; None of a deployed model, whose blocks can't be undone."""
        if self._at not in self.blames:
            try:
                self.blames[self._at] = as_array(self.found.blamed([self.chosen]))[:, 0]
            except InputError:
                self.blames[self._at] = None
        return self.blames[self._at]

    def _regions(self) -> np.ndarray:
        """Of each patch, the token that it is part of in the block."""
        found = self.tokens(*self._at)
        return found[self.block.value].regions if found else np.arange(self.plan.shape.num_patches)

    def _beside(self, name: str, number: int) -> dict[str, bytes]:
        """What stands beside the image as PNGs, no larger than they are shown."""
        shown = {}
        for title, image in self.every[name].beside(number).items():
            every = -(-max(image.shape[:2]) // WIDTH)
            shown[title] = array_png(enlarged(image[::every, ::every]))
        return shown

    def _tokens(self, change: Any = None) -> None:
        number, regions = self.chosen, self._regions()
        with self.cells.hold_sync():
            self.cells.picture = array_png(bordered(enlarged(self.found.picture(number)), regions, self.plan.shape))
            self.cells.groups = regions.tolist()
            self.cells.alt = f"tokens of the picture {self.found.title(number)} in block {self.block.value}"

    def _show(self, change: Any = None) -> None:
        self._tokens()
        shown = self.beside(*self._at)
        for title, panel in self.panels.items():                # a deployed model has no rollout
            panel.picture = shown.get(title, b"")
            panel.alt = f"{title}, {self.found.title(self.chosen)}"
        self._say()
        if self._at not in self.blames:         # a model for each block: later
            self.soon()

    def _blame(self) -> None:
        """Say which block is to blame."""
        self.blamed()
        self._say()

    def _told(self) -> dict[str, list[tuple[str, float]]]:
        """What the models say of the image: all of them, but of a scene, of which it takes a while, the chosen one."""
        told = self.found.told(self.chosen)
        if len(self.every) == 1 or self.found.told_slowly:
            return told
        return {"dense": told["dense"],
                **{name: each.told(self.chosen)["compressed"] for name, each in self.every.items()}}

    def _say(self) -> None:
        blames = self.blames.get(self._at)
        worst = "" if blames is None or blames.max() <= 0 else (
            f"; block {blames.argmax()} undone, {self.found.blamed_of} falls by {blames.max():.4f}")
        self.line.value = (f"<b>{html.escape(self.found.title(self.chosen))}</b>{table(self._told())}"
                           f"{self.found.moved_by} {self.found.changes.distance[self.chosen]:.4f}{worst}")

    def _figure(self) -> Figure:
        blames = self.blamed()
        return self.found.sheet([self.chosen], (np.zeros(self.plan.shape.depth) if blames is None else blames)[:, None])


def changes_explorer(found: Mapping[str, Compared]) -> ChangesExplorer:
    """An explorer of what `what_changed` found."""
    return ChangesExplorer(found)
