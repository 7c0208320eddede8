"""Token map: what becomes of a picture's patches in a block under a token rule, and what the plan costs."""
import functools
import html
from collections import Counter
from collections.abc import Callable
from textwrap import fill
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.averaging import frozen_eval, hooks
from vitlab.measure.capture import token_places
from vitlab.models import compress, shape_of
from vitlab.models.select import SelectBlock
from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import Match, MergeReconstruct, Select, SharedUpdate
from vitlab.plan.shape import ViTShape
from vitlab.plots import matched_map, merge_map
from vitlab.plots.tokens import bordered, through_matrices, through_means, tinted
from vitlab.search import SearchSpace
from vitlab.search.token_dimensions import default_tokens
from vitlab.workbench.explore.base import Cells, Explorer, array_png
from vitlab.workbench.explore.choosing import WIDE, WRAPPED, PictureChooser
from vitlab.workbench.pictures import as_input
from vitlab.workbench.steps import Source, open_dense

# of a picture on the page, in CSS pixels, and of its drawing with borders, at least
WIDTH, DRAWN = 380, 448
GIVEN = "the given plan"
BY_PLACE = {"Prune and Merge, one budget for all": {"rule": "center"},
            "Prune and Merge, a budget per block": {"rule": "merge"},
            "shared updates": {"rule": "center", "share": True}}
BY_CONTENT = {"merging by content": "match", "selection": "select"}         # names of their token dimensions


class Tokens(NamedTuple):
    """The tokens in a block: what each of the n patches is part of."""

    regions: np.ndarray             # (n) number of its token, from 0; -1: none
    weights: np.ndarray             # (n) its share in its token
    aside: np.ndarray               # (n) True: pruned, or averaged into the one token of what was not selected

    def labels(self, shape: ViTShape) -> list[str]:
        """What to say of each patch."""
        sizes, columns = Counter(self.regions.tolist()), shape.grid_size[1]

        def fate(j: int, region: int) -> str:
            if self.aside[j] and not self.weights[j]:
                return "pruned, it skips the block"
            return "a token by itself" if sizes[region] == 1 else f"one token of {sizes[region]} patches"
        return [f"row {j // columns}, column {j % columns}: {fate(j, region)}" for j,
                region in enumerate(self.regions.tolist())]


@torch.no_grad()
def selected(model: nn.Module, x: Tensor, shape: ViTShape) -> dict[int, Tensor]:
    """{block: (K, n) share of each patch in each token that leaves it} of the blocks that select, for one image x (1,
    channels, H, W)."""
    prefix, found, shares = shape.num_prefix_tokens, {}, torch.eye(shape.num_tokens)[None]

    def hook(index: int):
        def before(block: SelectBlock, inputs: tuple[Tensor]) -> None:
            nonlocal shares
            ranking = block.attend(block.block.norm1(inputs[0]))[1].cpu()
            # what is done to tokens, done to one-hot rows
            shares = tokens.select(shares, ranking, block.kept, prefix)
            found[index] = shares[0, prefix:, prefix:]
        return before
    selecting = [(i, block) for i, block in enumerate(model.blocks) if isinstance(block, SelectBlock)]
    with hooks([block.register_forward_pre_hook(hook(i)) for i, block in selecting]), frozen_eval(model):
        model(x.to(next(model.parameters()).device))
    return found


def _matches(block: BlockPlan) -> bool:
    return isinstance(block.tokens, Match) and block.tokens.merged > 0


class Maps:
    """Plans by rule and rates, and the tokens of every block of a picture under them, each made once."""

    def __init__(self, model: nn.Module, taken: Callable[[Any], Tensor], scores: Tensor | None,
                 plan: CompressionPlan | None, **settings: Any) -> None:
        """taken: the model's input (1, channels, H, W) of a picture, by its key."""
        self.model, self.shape, self.taken, self.scores, self.given, self.settings = model, shape_of(
            model), taken, scores, plan, settings
        self.dense_gmacs = gmacs(CompressionPlan.empty(self.shape))
        if plan is not None:
            plan.check_fits(self.shape)
        by_content = list(BY_CONTENT)[:2 if default_tokens(self.shape) == "select" else 1]
        self.rules = [GIVEN] * (plan is not None) + list(BY_PLACE) * (scores is not None) + by_content
        self.plan = functools.lru_cache(maxsize=256)(self._plan)
        self.compressed = functools.lru_cache(maxsize=1)(lambda *key: compress(self.model, self.plan(*key)))
        self.tokens = functools.lru_cache(maxsize=256)(self._tokens)
        for rule in self.rules:
            self.plan(rule, 1.0, 0.0)                           # refuses here and not in a slider's callback

    def _plan(self, rule: str, keep_rate: float, prune_rate: float) -> CompressionPlan:
        """Of rules by content keep_rate is what is left after the last block that cuts, each cutting the same ratio."""
        if rule == GIVEN:
            return self.given
        if rule in BY_PLACE:
            return prune_and_merge(self.scores, self.shape, keep_rate=keep_rate, prune_rate=prune_rate,
                                   **BY_PLACE[rule], **self.settings)
        space = SearchSpace(shape=self.shape, units=(), tokens=BY_CONTENT[rule], max_ratio=0.99)
        tried = space.counts(np.array([0.5]))
        ratio = 1 - keep_rate ** (1 / int((tried.compared + tried.ranking > 0).sum()))
        return space.plan([ratio], made_by={"method": BY_CONTENT[rule], "ratio": ratio})

    def _by_image(self, picture: Any, *key: Any) -> dict[int, Tokens]:
        """Of the blocks that match or select, for which the model is run."""
        plan = self.plan(*key)
        matches = any(map(_matches, plan.blocks))
        if not matches and not any(isinstance(block.tokens, Select) for block in plan.blocks):
            return {}
        x, small, found = self.taken(picture), self.compressed(*key), {}
        if matches:
            for block, places in token_places(small, x).items():
                regions = places[0].numpy()
                found[block] = Tokens(regions, 1 / np.bincount(regions)[regions], np.zeros(len(regions), dtype=bool))
            return found
        for block, shares in selected(small, x, self.shape).items():
            weights, regions = (each.numpy() for each in shares.max(dim=0))
            found[block] = Tokens(regions, weights, np.bincount(regions)[regions] > 1)
        return found

    def _tokens(self, picture: Any, *key: Any) -> list[Tokens]:
        """Of each block."""
        plan, n = self.plan(*key), self.shape.num_patches
        by_image = self._by_image(picture, *key)
        latest, found = Tokens(np.arange(n), np.ones(n), np.zeros(n, dtype=bool)), []
        for index, (rule, _) in enumerate(plan.rules()):
            latest = by_image.get(index, latest)
            by_place = isinstance(rule, (MergeReconstruct, SharedUpdate))
            found.append(Tokens(np.array(rule.regions), np.array(rule.weights), np.isin(np.arange(n), rule.pruned))
                         if by_place else latest)
        return found

    def costs(self, plan: CompressionPlan, block: int, seen: Tokens) -> str:
        """What a block's tokens are, and what the whole plan costs."""
        flow, whole, total = plan.flows()[block], self.shape.num_tokens, gmacs(plan)
        counts = f"{flow.attended} of {whole} tokens" if flow.attended == flow.in_mlp else (
            f"of {whole} tokens {flow.attended} in the attention, {flow.in_mlp} in the MLP")
        inside, aside = seen.regions[~seen.aside], int(seen.aside.sum())
        merged, what = len(inside) - len(set(inside.tolist())), "averaged into one token" if seen.weights[
            seen.aside].any() else "pruned"
        fates = [f"{count} {'patch' if count == 1 else 'patches'} {fate}"
                 for count, fate in ((merged, "merged into others"), (aside, what)) if count]
        text = (f"Block {block}: {'; '.join([counts, *fates])}. "
                f"Whole model: {total:.4g} of {self.dense_gmacs:.4g} GMACs, ratio {total / self.dense_gmacs:.3f}.")
        cutting = [str(index) for index, each in enumerate(plan.blocks) if isinstance(each.tokens, Select)
                   or _matches(each)]
        if cutting and isinstance(plan.made_by.get("ratio"), float):
            text += f" Each of the blocks {', '.join(cutting)} cuts {plan.made_by['ratio']:.3f} of its tokens."
        return text


class TokenMap(Explorer):
    """The widgets of `token_map`; their values are the state, and `figure()` draws it."""

    def __init__(self, maps: Maps, chooser: PictureChooser, keep_rate: float, prune_rate: float) -> None:
        rate = {"step": 0.01, "readout_format": ".2f", **WIDE}
        self.maps, self.chooser, shape = maps, chooser, maps.shape
        least = max(0.05, 1.01 / shape.num_patches)             # one patch has to stay, for all rounding
        self.rule = ipywidgets.Dropdown(options=maps.rules, description="rule", **WIDE)
        self.block = ipywidgets.IntSlider(shape.depth // 2, 0, shape.depth - 1, description="block", **WIDE)
        self.keep_rate = ipywidgets.FloatSlider(keep_rate, min=least, max=1, description="keep rate, (0, 1]", **rate)
        self.prune_rate = ipywidgets.FloatSlider(prune_rate, min=0, max=0.95, description="prune rate, [0, 1)", **rate)
        self.left, self.right = (Cells(grid=shape.grid_size, width=WIDTH) for _ in range(2))
        traitlets.link((self.left, "picked"), (self.right, "picked"))
        self.line = ipywidgets.HTML()
        titles = ("tokens of the block; orange: pruned or averaged", "what merging keeps of the picture")
        panels = [ipywidgets.VBox([ipywidgets.HTML(f"<b>{title}</b>"), cells], layout=WIDE["layout"])
                  for title, cells in zip(titles, (self.left, self.right))]
        rows = [ipywidgets.HBox(row, layout=WRAPPED)
                for row in ([self.rule, self.block], [self.keep_rate, self.prune_rate], panels)]
        super().__init__([chooser, *rows, self.line], self._figure)
        for widget in (self.rule, self.block, self.keep_rate, self.prune_rate):
            widget.observe(self._show, "value")
        chooser.observe(self._show, "chosen")
        self._show()

    def _state(self) -> tuple[CompressionPlan, int, Tokens, np.ndarray]:
        """(plan, block, its tokens, picture) of what is chosen."""
        key = (self.rule.value, self.keep_rate.value, self.prune_rate.value if self.rule.value in BY_PLACE else 0.0)
        plan, block = self.maps.plan(*key), self.block.value
        return plan, block, self.maps.tokens(self.chooser.chosen, *key)[block], self.chooser.picture

    def _show(self, change: Any = None) -> None:
        self.keep_rate.disabled = self.rule.value == GIVEN
        self.prune_rate.disabled = self.rule.value not in BY_PLACE
        plan, block, seen, picture = self._state()
        zoom, labels = -(-DRAWN // max(picture.shape[:2])), seen.labels(self.maps.shape)
        drawn = bordered(tinted(picture.repeat(zoom, 0).repeat(zoom, 1), seen.aside, self.maps.shape), seen.regions,
                         self.maps.shape)
        for cells, image, what in ((self.left, drawn, "Tokens"),
                                   (self.right, _kept(picture, plan, block, seen), "What is kept")):
            with cells.hold_sync():
                cells.picture, cells.groups, cells.labels = array_png(image), seen.regions.tolist(), labels
                cells.alt = f"{what} of the picture {self.chooser.chosen} in block {block}, {self.rule.value}"
        self.line.value = html.escape(self.maps.costs(plan, block, seen))

    def _figure(self) -> Figure:
        """The state as `merge_map`, or as `matched_map` where no matrices stand around the block, with the line of
        costs."""
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

    The left picture has a border around each token's patches; the right one is the left one's through merge and
    reconstruct, or each patch as the mean of its token. A click or the pointer shows the patches that one token stands
    for. Raises InputError for a compressed model, a plan for another, or no picture.
    """
    model = source if isinstance(source, nn.Module) else open_dense(source).model
    chooser = PictureChooser(pictures, shape_of(model))
    maps = Maps(model, lambda name: as_input(chooser.known[name], model), scores, plan, boundary=boundary,
                weights=weights)
    return TokenMap(maps, chooser, keep_rate, prune_rate)
