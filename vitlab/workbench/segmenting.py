"""Steps of segmentation that classification has not: a dense Segmenter from an encoder, and a folder of images made
into overlays."""
import contextlib
import io
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.layers import DropPath
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm import tqdm

from vitlab.criteria.planning import prune_and_merge
from vitlab.data.folder import read_image, reason
from vitlab.data.listing import images_in
from vitlab.data.masks import open_scenes
from vitlab.data.rgb import rgb
from vitlab.data.scene_data import SceneData, Unreadable, measuring_transform
from vitlab.measure.capture import frozen_eval, token_places
from vitlab.measure.evaluate import autocast
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.opening import Source, open_model
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.models.windows import segment
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import Match
from vitlab.plan.shape import ViTShape
from vitlab.plan.tokens import PRUNE_RATE, even_spans
from vitlab.plots.base import to_image
from vitlab.plots.colours import class_colours, overlaid
from vitlab.runtime.config import RunConfig, flags
from vitlab.runtime.files import InputError, atomic_write, from_root
from vitlab.runtime.kinds import Data, Folder, Pixels, Rate, Run, flag
from vitlab.search import SearchSpace
from vitlab.training.recipes import Engine
from vitlab.workbench.cutting import least_ratio
from vitlab.workbench.evaluating import Windows
from vitlab.workbench.steps import deployed, need_dense, pick_device
from vitlab.workbench.training import DENSE, ChangedData, Changes, Images, Trained, changed, train_dense

# images of train whose sizes say the encoder's, and its sides where they differ
LOOKED_AT, LARGEST_SIDE = 16, 512
MAX_RATIO, RATIOS = 0.5, 501                    # largest ratio of merging by content, and how many are tried


def scene_size(data: SceneData) -> tuple[int, int]:
    """Height and width that the first images of train have; where they differ, LARGEST_SIDE for both."""
    train, sizes = data.split("train"), set()
    for i in range(min(LOOKED_AT, len(train))):
        with contextlib.suppress(Unreadable):
            sizes.add(train.scene(i)[1].shape)
    return sizes.pop() if len(sizes) == 1 else (LARGEST_SIDE, LARGEST_SIDE)


def make_segmenter(source: Source, data: SceneData, *, img_size: tuple[int, int] | None = None,
                   decoder: str | None = None, drop_path: float = 0.0, **args: Any) -> Segmenter:
    """A dense Segmenter for a data set: `source` itself where it is one, else its blocks as encoder and a new decoder
    (a name of DECODERS, default mask_transformer; args are its own); at img_size (height, width), default `scene_size`.
    Raises InputError for a compressed model, another number of classes, or a decoder where there is one."""
    data.need_labels()
    model = need_dense(open_model(source)).model
    if isinstance(model, Segmenter):
        data.check_fits(model.num_classes)
        if decoder is not None or args:
            raise InputError(f"the model has a decoder already ({model.decoder_name}), which goes on training; a new "
                             "one needs a model without")
    else:
        assert data.num_classes is not None                                     # as it has labels
        model = Segmenter(as_encoder(model), data.num_classes, decoder or "mask_transformer", **args)
    model = model.at_size(img_size or scene_size(data))
    for block, rate in zip(model.blocks, torch.linspace(0, drop_path, len(model.blocks)).tolist()):
        for name in ("drop_path", "drop_path1", "drop_path2"):                  # one of both halves, or one of each
            if hasattr(block, name):
                setattr(block, name, DropPath(rate) if rate else nn.Identity())
    return model


def train_segmenter(source: Annotated[Source, flags(but=("img_size",))], data: Data, out: Run, *,
                    img_size: Annotated[Pixels | None, flag(metavar="HEIGHT WIDTH")] = None,
                    decoder: Literal["mask_transformer", "linear", "queries"] | None = None,
                    recipe: Trained = "segmenter",
                    changes: Annotated[Changes, DENSE] = Changes(), images: Images = None, engine: Engine = Engine(),
                    changed_data: ChangedData = False, config: RunConfig = RunConfig()) -> Path:
    """Train a dense Segmenter on images with masks (`make_segmenter`); returns the run folder (training/, checkpoint/).
    A killed run goes on (`fit`).

    Args:
        img_size: pixels the encoder is for (default: those of the first images, 512 x 512 where they differ)
        decoder: default: mask_transformer; queries join before the last 3 blocks; where SOURCE is a Segmenter, its own
            goes on
    """
    settings, opened = changed(recipe, changes, config), open_scenes(data)
    device = pick_device(config.device)
    random_seed(config.seed)
    model = make_segmenter(source, opened, img_size=img_size, decoder=decoder, drop_path=settings.drop_path)
    return train_dense("segment", model, opened, out, settings, config, device=device, images=images, engine=engine,
                       changed_data=changed_data)


@torch.inference_mode()
def predict(source: Source, folder: Folder, out: Folder, *, opacity: Rate = 0.55, windows: Windows = Windows(),
            config: Annotated[RunConfig, flags("device", "dtype", "quiet")] = RunConfig()) -> list[Path]:
    """Segment every image of a folder, each as a whole, by the model's deployed form.
    Writes out/NAME.png, the classes' colours over the image, and out/NAME_classes.png, a palette image of the class
    numbers; returns the overlays. An image that can't be read is left out with a warning that names it. Raises
    InputError for another model, a folder without images or of which none can be read, or an output that would take the
    place of an image or of another one's.

    Args:
        folder: of images; masks are not needed
        out: folder for NAME.png (overlay) and NAME_classes.png
        opacity: of the classes' colours over the image
    """
    found, inside, at = open_model(source), from_root(folder), pick_device(config.device)
    if not isinstance(found.model, Segmenter):
        raise InputError("the model gives one class for an image; a Segmenter is needed (`vitlab segment` trains one)")
    if not inside.is_dir():
        raise InputError(f"{folder}: no such folder of images")
    paths = images_in(inside)
    if not paths:
        raise InputError(f"{folder}: holds no images")
    if Path(out).resolve() == inside.resolve():
        raise InputError(f"{folder}: the predictions would be written over the images; choose another folder")
    taken: dict[str, str] = {}
    for path in paths:
        for place in (f"{path.stem}.png", f"{path.stem}_classes.png"):
            if place in taken:
                raise InputError(f"{folder}: images named {taken[place]} and {path.stem}; both would be written to "
                                 f"{place}")
            taken[place] = path.stem
    model, colours, written = deployed(found).to(at), class_colours(found.model.num_classes), []
    transform = measuring_transform(model, whole=True)
    for path in tqdm(paths, desc="predict", unit="image", disable=config.quiet):
        try:
            image = rgb(read_image(path))
        except Exception as error:              # a damaged file makes Pillow's decoders raise nearly anything
            warnings.warn(f"{path}: can't be read as an image ({reason(path, error)}), left out", stacklevel=2)
            continue
        x, _ = transform(image, np.zeros((image.height, image.width), dtype=np.uint8))
        with autocast(at, config.dtype == "bfloat16"):
            classes = segment(model, x[None].to(at), **windows.given())[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        shown = overlaid(np.asarray(image) / 255, classes, colours, opacity)
        flat = Image.fromarray(classes)
        flat.putpalette((colours * 255).round().astype(np.uint8).tobytes())
        written.append(Path(out) / f"{path.stem}.png")
        _write_png(written[-1], Image.fromarray((shown * 255).round().astype(np.uint8)))
        _write_png(Path(out) / f"{path.stem}_classes.png", flat)
    if not written:
        raise InputError(f"{folder}: none of its {len(paths)} images can be read")
    return written


def _write_png(path: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, "PNG")
    atomic_write(path, content.getvalue())


def plans_at(scores: Tensor, shape: ViTShape, keep_rate: float, *,
             prune_rate: float = PRUNE_RATE) -> dict[str, CompressionPlan]:
    """A plan by each token rule that keeps the grid, at a keep rate of Prune and Merge: merged and reconstructed in
    each block, over spans of blocks (`even_spans`), sharing updates (nothing pruned); and merged by content, by the one
    ratio whose cost is at most that of sharing updates. scores (L, n): of tokens, raw."""
    shared = prune_and_merge(scores, shape, keep_rate=keep_rate, prune_rate=0.0, share=True)
    space = SearchSpace(shape=shape, units=(), tokens="match", max_ratio=MAX_RATIO)
    found = least_ratio(space, gmacs(shared), RATIOS)
    ratio = MAX_RATIO if found is None else found
    return {"Prune and Merge": prune_and_merge(scores, shape, keep_rate=keep_rate, prune_rate=prune_rate),
            "Prune and Merge, spans": prune_and_merge(
                scores, shape, prune_rate=prune_rate,
                spans=[(*span, keep_rate) for span in even_spans(shape.before_queries)]),
            "shared updates": shared,
            "merging by content": space.plan([ratio],
                                             made_by={"method": "match", "ratio": ratio, "keep_rate": keep_rate})}


@torch.inference_mode()
def shown(data: SceneData, models: dict[str, Checkpoint], *, count: int = 3, split: str | None = None,
          **windows: Any) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, list[np.ndarray]]]:
    """(images (H, W, 3) in [0, 1], truths (H, W), {name: predictions (H, W)}) of the first `count` scenes of a split
    (None: the one to choose on), for `plots.predictions`; each model in the form it is in."""
    scenes = data.split(split or data.choose_on)
    pairs = [scenes.scene(i) for i in range(min(count, len(scenes)))]
    predicted = {}
    for name, found in models.items():
        data.check_fits(found.model.num_classes)
        transform = measuring_transform(found.model, whole=True)
        with frozen_eval(found.model):
            predicted[name] = [segment(found.model, transform(*pair)[0][None], **windows)[0].argmax(dim=0).numpy()
                               for pair in pairs]
    return [np.asarray(image) / 255 for image, _ in pairs], [mask for _, mask in pairs], predicted


def seen(found: Checkpoint, data: SceneData, index: int = 0,
         split: str | None = None) -> tuple[np.ndarray, dict[int, Tensor]]:
    """(picture (h, w, 3) in [0, 1], {block: (n)}) for `plots.scene_regions`: a scene as the model takes it (the middle
    of a larger one), and which token each patch went into in the blocks that merge by content, where there are any
    (`token_places`)."""
    config = resolve_model_data_config(found.model.encoder)
    x, _ = measuring_transform(found.model)(*data.split(split or data.choose_on).scene(index))
    matched = any(isinstance(block.tokens, Match) for block in found.plan.blocks)
    places = token_places(found.model, x[None]) if matched else {}
    return to_image(x, config["mean"], config["std"]), {block: each[0] for block, each in places.items()}
