"""What becomes of a picture's patches in every block, under a token rule and its rates."""
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.capture import token_places
from vitlab.measure.rollout import rankings
from vitlab.models import compress, shape_of
from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import Match, MergeReconstruct, Select, SharedUpdate
from vitlab.plan.shape import ViTShape
from vitlab.search import SearchSpace
from vitlab.search.token_dimensions import default_tokens

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
        return [f"row {j // columns}, column {j % columns}: {fate(j, region)}"
                for j, region in enumerate(self.regions.tolist())]


def selected(model: nn.Module, x: Tensor, shape: ViTShape) -> dict[int, Tensor]:
    """{block: (K, n) share of each patch in each token that leaves it} of the blocks that select, for one input x."""
    prefix, found, shares = shape.num_prefix_tokens, {}, torch.eye(shape.num_tokens)[None]
    for index, ranking in rankings(model, x).items():           # what is done to tokens, done to one-hot rows
        shares = tokens.select(shares, ranking.cpu(), model.blocks[index].rule.kept, prefix)
        found[index] = shares[0, prefix:, prefix:]
    return found


def _matches(block: BlockPlan) -> bool:
    return isinstance(block.tokens, Match) and block.tokens.merged > 0


def tokens_of(plan: CompressionPlan, model: Callable[[], nn.Module], x: Callable[[], Tensor]) -> list[Tokens]:
    """The tokens in each block of an image. The model, which the plan was applied to, and its input x (1, channels, H,
    W) are asked for where each image has its own."""
    by_image, n = {}, plan.shape.num_patches
    if any(map(_matches, plan.blocks)):
        for block, places in token_places(model(), x()).items():
            regions = places[0].numpy()
            by_image[block] = Tokens(regions, 1 / np.bincount(regions)[regions], np.zeros(n, dtype=bool))
    elif any(isinstance(block.tokens, Select) for block in plan.blocks):
        for block, shares in selected(model(), x(), plan.shape).items():
            weights, regions = (each.numpy() for each in shares.max(dim=0))
            by_image[block] = Tokens(regions, weights, np.bincount(regions)[regions] > 1)
    latest, found = Tokens(np.arange(n), np.ones(n), np.zeros(n, dtype=bool)), []
    for index, (rule, _) in enumerate(plan.rules()):
        latest = seen = by_image.get(index, latest)
        if isinstance(rule, (MergeReconstruct, SharedUpdate)):
            seen = Tokens(np.array(rule.regions), np.array(rule.weights), np.isin(np.arange(n), rule.pruned))
        found.append(seen)
    return found


class Maps:
    """Plans by rule and rates, and the tokens of every block of a picture under them, each made once."""

    def __init__(self, model: nn.Module, taken: Callable[[Any], Tensor], scores: Tensor | None,
                 plan: CompressionPlan | None, **settings: Any) -> None:
        """taken: the model's input (1, channels, H, W) of a picture, by its key."""
        self.model, self.shape, self.taken = model, shape_of(model), taken
        self.scores, self.given, self.settings = scores, plan, settings
        self.shape.check_cut("tokens")
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

    def _tokens(self, picture: Any, *key: Any) -> list[Tokens]:
        """Of each block."""
        return tokens_of(self.plan(*key), lambda: self.compressed(*key), lambda: self.taken(picture))

    def costs(self, plan: CompressionPlan, block: int, seen: Tokens) -> str:
        """What a block's tokens are, and what the whole plan costs."""
        flow, whole, total = plan.flows()[block], self.shape.num_tokens, gmacs(plan)
        counts = f"{flow.attended} of {whole} tokens" if flow.attended == flow.in_mlp else (
            f"of {whole} tokens {flow.attended} in the attention, {flow.in_mlp} in the MLP")
        inside, aside = seen.regions[~seen.aside], int(seen.aside.sum())
        merged = len(inside) - len(set(inside.tolist()))
        what = "averaged into one token" if seen.weights[seen.aside].any() else "pruned"
        fates = [f"{count} {'patch' if count == 1 else 'patches'} {fate}"
                 for count, fate in ((merged, "merged into others"), (aside, what)) if count]
        text = (f"Block {block}: {'; '.join([counts, *fates])}. "
                f"Whole model: {total:.4g} of {self.dense_gmacs:.4g} GMACs, ratio {total / self.dense_gmacs:.3f}.")
        cutting = [str(index) for index, each in enumerate(plan.blocks) if isinstance(each.tokens, Select)
                   or _matches(each)]
        if cutting and isinstance(plan.made_by.get("ratio"), float):
            text += f" Each of the blocks {', '.join(cutting)} cuts {plan.made_by['ratio']:.3f} of its tokens."
        return text
