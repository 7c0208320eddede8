"""Scene view: what a compressed model takes each pixel of a scene for, where it differs from the dense one, and which
patches a block's tokens stand for."""
import functools
import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from timm.data import resolve_model_data_config
from torch import Tensor

from vitlab.data.layouts import IGNORE
from vitlab.data.scene_data import SceneData, Scenes, measuring_transform
from vitlab.measure.averaging import frozen_eval
from vitlab.measure.confusion import confusion_matrix, scores_of
from vitlab.models.segmenter import Segmenter, pad
from vitlab.plan import CompressionPlan, tokens
from vitlab.plots.base import to_image
from vitlab.plots.colours import GREY, class_colours, overlaid
from vitlab.plots.scenes import OPACITY, OUTCOMES, difference, in_grey, scene_moment
from vitlab.plots.tokens import bordered, tinted
from vitlab.runtime.files import require
from vitlab.workbench.explore.base import enlarged, row
from vitlab.workbench.explore.choosing import WIDE
from vitlab.workbench.explore.maps import Maps
from vitlab.workbench.explore.token_map import RuleExplorer


class Scene(NamedTuple):
    """A scene as a model sees it: at the encoder's size, cut to its middle or padded right and below."""

    x: Tensor                       # (1, 3, H, W), normalised
    truth: np.ndarray               # (H, W), IGNORE in the padding
    picture: np.ndarray             # (H, W, 3) in [0, 1]
    inside: tuple[slice, slice]     # rows and columns that are no padding


class Views:
    """Scenes of a split and a model's predictions of them, dense and under plans, each made once."""

    def __init__(self, model: Segmenter, scenes: Scenes, scores: Tensor | None, plan: CompressionPlan | None,
                 **settings: Any) -> None:
        self.model, self.scenes = model, scenes
        self.maps = Maps(model, lambda i: self.scene(i).x, scores, plan, **settings)
        config = resolve_model_data_config(model.encoder)
        self.mean, self.std = config["mean"], config["std"]
        self.scene = functools.lru_cache(maxsize=16)(self._scene)
        self.dense = functools.lru_cache(maxsize=64)(lambda i: self._predicted(self.model, i))
        self.compressed = functools.lru_cache(maxsize=64)(self._compressed)

    def _scene(self, i: int) -> Scene:
        image, mask = measuring_transform(self.model, whole=True)(*self.scenes.scene(i))
        size = self.model.img_size
        starts = [max(0, (have - want) // 2) for have, want in zip(mask.shape, size)]
        middle = tuple(slice(start, start + want) for start, want in zip(starts, size))
        image, mask = image[(slice(None), *middle)], mask[middle].numpy()
        inside = (slice(mask.shape[0]), slice(mask.shape[1]))
        truth = np.full(size, IGNORE, dtype=np.uint8)
        truth[inside] = mask
        x = pad(image[None], size)
        return Scene(x, truth, to_image(x[0], self.mean, self.std), inside)

    @torch.no_grad()
    def _predicted(self, model: Segmenter, i: int) -> np.ndarray:
        """(H, W) uint8, IGNORE in the padding."""
        scene = self.scene(i)
        with frozen_eval(model):
            given = model(scene.x.to(next(model.parameters()).device)).argmax(dim=1)[0].cpu().numpy()
        shown = np.full(given.shape, IGNORE, dtype=np.uint8)
        shown[scene.inside] = given[scene.inside]
        return shown

    def _compressed(self, i: int, *key: Any) -> np.ndarray:
        return self._predicted(self.maps.compressed(*key), i)

    def miou_pct(self, i: int, predicted: np.ndarray) -> float:
        """Of one scene alone."""
        predicted, truth = torch.from_numpy(predicted), torch.from_numpy(self.scene(i).truth)
        return scores_of(confusion_matrix(predicted, truth, self.model.num_classes)).miou_pct


def _squares(entries: Sequence[tuple[str, Any]]) -> str:
    """A legend in HTML: (label, colour) each."""
    return " &nbsp; ".join(f'<span style="color: {to_hex(colour)}">■</span>&nbsp;{html.escape(label)}'
                           for label, colour in entries)


class SceneView(RuleExplorer):
    """The widgets of `scene_view`; their values are the state, and `figure()` draws it."""

    def __init__(self, views: Views, classes: Sequence[str], keep_rate: float, prune_rate: float,
                 opacity: float) -> None:
        titles = {"compressed": "<b>compressed</b>", "dense": "<b>dense</b>",
                  "difference": _squares(list(OUTCOMES.values())),
                  "regions": "<b>tokens of the block; orange: pruned</b>"}
        super().__init__(views.maps, titles, keep_rate, prune_rate)
        self.views, self.classes, self.legend = views, list(classes), ipywidgets.HTML()
        self.image = ipywidgets.IntSlider(0, 0, len(views.scenes) - 1, description="image", **WIDE)
        self.opacity = ipywidgets.FloatSlider(opacity, min=0, max=1, description="opacity, [0, 1]", step=0.01,
                                              readout_format=".2f", **WIDE)
        controls = [row(self.image, self.rule), row(self.keep_rate, self.prune_rate), row(self.block, self.opacity)]
        self.begin([*controls, *self.rows, self.legend], self.opacity, slow=[self.image])

    def _show(self, change: Any = None) -> None:
        i, key, shape, block = self.image.value, self.key(), self.maps.shape, self.block.value
        scene, dense, compressed = self.views.scene(i), self.views.dense(i), self.views.compressed(i, *key)
        seen, colours, grey = self.maps.tokens(i, *key)[block], class_colours(len(self.classes)), in_grey(scene.picture)
        drawn = {"compressed": enlarged(overlaid(grey, compressed, colours, self.opacity.value)),
                 "dense": enlarged(overlaid(grey, dense, colours, self.opacity.value)),
                 "difference": enlarged(difference(scene.truth, dense, compressed, len(self.classes))),
                 "regions": bordered(tinted(enlarged(scene.picture), seen.aside, shape), seen.regions, shape)}
        alts = {"compressed": "Prediction of the compressed model", "dense": "Prediction of the dense model",
                "difference": "What the compressed model loses and gains", "regions": f"Tokens of block {block}"}
        self.draw(drawn, {name: f"{alt}, image {i}, {self.rule.value}" for name, alt in alts.items()}, seen)
        found = sorted(set(np.unique(dense).tolist()) | set(np.unique(compressed).tolist()))
        self.legend.value = _squares([("none", (GREY,) * 3) if k == IGNORE else (self.classes[k], colours[k])
                                      for k in found])
        self.line.value = html.escape(self._costs())

    def _costs(self) -> str:
        i, key, block = self.image.value, self.key(), self.block.value
        before, after = (self.views.miou_pct(i, mask) for mask in (self.views.dense(i), self.views.compressed(i, *key)))
        return (f"{self.maps.costs(self.maps.plan(*key), block, self.maps.tokens(i, *key)[block])} "
                f"mIoU of this image: dense {before:.1f}%, compressed {after:.1f}%.")

    def _figure(self) -> Figure:
        i, key, block = self.image.value, self.key(), self.block.value
        scene, seen = self.views.scene(i), self.maps.tokens(i, *key)[block]
        shown = [each[scene.inside]
                 for each in (scene.picture, scene.truth, self.views.dense(i), self.views.compressed(i, *key))]
        return scene_moment(*shown, self.classes, self.maps.plan(*key), block, {block: torch.from_numpy(seen.regions)},
                            opacity=self.opacity.value, note=f"Image {i}. {self.rule.value}. {self._costs()}")


def scene_view(model: Segmenter, data: SceneData, scores: Tensor | None = None, plan: CompressionPlan | None = None, *,
               split: str | None = None, keep_rate: float = tokens.KEEP_RATE, prune_rate: float = 0.0,
               opacity: float = OPACITY, boundary: str = tokens.BOUNDARY, weights: str = tokens.WEIGHTS) -> SceneView:
    """Widgets that show what a token rule in the encoder of a dense Segmenter does to its prediction of a scene, and
    what it saves.

    The images are those of a split of the data (None: the one to choose on), of larger ones the middle. The difference
    is against the truth: right in both, wrong in both, lost and gained. opacity: of the masks, where its slider starts;
    the other arguments are `token_map`'s. Raises InputError for what doesn't fit the model, or one that is compressed.
    """
    require(isinstance(model, Segmenter), f"a {type(model).__name__} came in; a Segmenter is needed")
    data.check_fits(model.num_classes)
    require(0 <= opacity <= 1, f"opacity is {opacity}; it must lie in [0, 1]")
    views = Views(model, data.split(split or data.choose_on), scores, plan, boundary=boundary, weights=weights)
    return SceneView(views, data.classes, keep_rate, prune_rate, opacity)
