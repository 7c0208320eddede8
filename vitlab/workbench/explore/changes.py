"""What compression changed, picture by picture: both models' predictions, what they look at, the tokens of a block, and
the blocks to blame."""
import functools
import html
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from vitlab.plots.base import as_array
from vitlab.plots.tokens import bordered
from vitlab.runtime.files import InputError
from vitlab.workbench.compared import Compared
from vitlab.workbench.explore.base import WIDTH, Cells, Explorer, Menu, array_png, enlarged, observe, row, table
from vitlab.workbench.explore.choosing import WIDE


class ChangesExplorer(Explorer):
    """A slider over the pictures whose class is another, the one that moved furthest first, or over all of them."""

    def __init__(self, found: Compared) -> None:
        super().__init__([], self._figure)
        self.found, self.plan = found, found.compressed.plan
        every = found.changes.distance.argsort(descending=True).tolist()
        changed = found.changes.order()
        self.lists = ({"changed": changed} if changed else {}) | {"all images": every}
        self.which = Menu(options=list(self.lists), description="pictures", **WIDE)
        self.image = ipywidgets.IntSlider(0, 0, 0, description="image", **WIDE)
        self.block = ipywidgets.IntSlider(0, 0, self.plan.shape.depth - 1, description="block", **WIDE)
        self.cells, self.line = Cells(grid=self.plan.shape.grid_size, width=WIDTH), ipywidgets.HTML()
        self.blames: dict[int, np.ndarray | None] = {}
        self.soon = self.settled(self._blame)
        # some forwards each
        self.tokens, self.beside = (functools.lru_cache(maxsize=64)(each) for each in (found.tokens, self._beside))
        self.panels = {title: Cells(width=WIDTH // 2, grid=(0, 0)) for title in self.beside(every[0])}
        boxes = [ipywidgets.VBox([ipywidgets.HTML(f"<b>{title}</b>"), cells]) for title, cells in self.panels.items()]
        self.children = [row(self.which, self.image), self.block, row(self.cells, self.line), row(*boxes)]
        observe([self.which], self._list)
        observe([self.image], self._show)
        observe([self.block], self._tokens)
        self._list()

    @property
    def chosen(self) -> int:
        """Number of the image."""
        return self.lists[self.which.value][self.image.value]

    def _list(self, change: Any = None) -> None:
        self.image.value, self.image.max = 0, len(self.lists[self.which.value]) - 1
        self._show()

    def blamed(self) -> np.ndarray | None:
        """(L) of the image, computed once; None of a deployed model, whose blocks can't be undone."""
        if self.chosen not in self.blames:
            try:
                self.blames[self.chosen] = as_array(self.found.blamed([self.chosen]))[:, 0]
            except InputError:
                self.blames[self.chosen] = None
        return self.blames[self.chosen]

    def _regions(self) -> np.ndarray:
        """Of each patch, the token that it is part of in the block."""
        found = self.tokens(self.chosen)
        return found[self.block.value].regions if found else np.arange(self.plan.shape.num_patches)

    def _beside(self, number: int) -> dict[str, bytes]:
        """What stands beside the image as PNGs, no larger than they are shown."""
        shown = {}
        for title, image in self.found.beside(number).items():
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
        for title, picture in self.beside(self.chosen).items():
            self.panels[title].picture = picture
            self.panels[title].alt = f"{title}, {self.found.title(self.chosen)}"
        self._say()
        if self.chosen not in self.blames:      # a model for each block: later
            self.soon()

    def _blame(self) -> None:
        """Say which block is to blame."""
        self.blamed()
        self._say()

    def _say(self) -> None:
        number, blames = self.chosen, self.blames.get(self.chosen)
        worst = "" if blames is None or blames.max() <= 0 else (
            f"; block {blames.argmax()} undone, {self.found.blamed_of} falls by {blames.max():.4f}")
        self.line.value = (f"<b>{html.escape(self.found.title(number))}</b>{table(self.found.told(number))}"
                           f"{self.found.moved_by} {self.found.changes.distance[number]:.4f}{worst}")

    def _figure(self) -> Figure:
        blames = self.blamed()
        return self.found.sheet([self.chosen], (np.zeros(self.plan.shape.depth) if blames is None else blames)[:, None])


def changes_explorer(found: Compared) -> ChangesExplorer:
    """An explorer of what `what_changed` found."""
    return ChangesExplorer(found)
