"""A model from wherever it is: a checkpoint, a run folder, others' weights, the Hugging Face hub, timm's names."""
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vitlab.models import checkpoint, encoder_of, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.create import create_model, from_weights, sized
from vitlab.models.hub import CONFIG, HUB, HubConfig, check_settings, config_beside, download, set_settings, weights_in
from vitlab.models.published import is_published, load_published, load_segmenter
from vitlab.models.published_segmenter import VARIANT
from vitlab.models.segmenter import Segmenter
from vitlab.models.transformers_folder import config_of, converted
from vitlab.models.weights import SUFFIXES, is_weights, read_file, state_of
from vitlab.plan import CompressionPlan
from vitlab.runtime.files import InputError, from_root, require
from vitlab.runtime.kinds import Count, Crop, Or, flag
from vitlab.runtime.launching import check_source

LOCAL = "local-dir:"                        # as HUB, what stands before a source of timm's
_Floats = Annotated[tuple[float, ...] | None, flag(consume_multiple=True, metavar="X...")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What `open_model` takes, as one: the flags of a model on the command line.

    Args:
        checkpoint: checkpoint or run folder, a weights file such as .pth or .safetensors (with --model), a folder of
            such with its config.json, hf-hub:OWNER/NAME, or a timm name
        model: timm name of the model that a weights file is for
        num_classes: classes of the classifier (default: the weights' own)
        img_size: side of the images; position embeddings of another are resampled (default: the weights' own)
        mean: of the channels, in pixels from 0 to 1 (default: as config.json beside the weights says, or else timm)
        std: deviation of the channels
        crop_pct: crop size over resize size
        crop_mode: center, squash or border
        interpolation: bicubic, bilinear, ...
    """

    checkpoint: Annotated[str, flag(metavar="SOURCE")]
    model: Annotated[str | None, flag(metavar="NAME")] = None
    num_classes: Count | None = None
    img_size: Annotated[Count | None, flag(metavar="PIXELS")] = None
    mean: _Floats = None
    std: _Floats = None
    crop_pct: Crop | None = None
    crop_mode: Annotated[str | None, flag(metavar="NAME")] = None
    interpolation: Annotated[str | None, flag(metavar="NAME")] = None

    def __str__(self) -> str:
        return self.checkpoint

    def open(self) -> Checkpoint:
        require(not (Path(self.checkpoint).is_dir() and self.model), f"{self.checkpoint} is a folder and says itself "
                "which model it holds; --model is for weights files")
        settings = {name: getattr(self, name) for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
        return open_model(self.checkpoint, model=self.model, num_classes=self.num_classes, img_size=self.img_size,
                          settings=settings)


Source = Or[ModelSource, str, Path, Checkpoint]         # where a model comes from, or one that is open already
Other = Or[str, Path, Checkpoint]                       # a second model


def open_model(source: Source, *, model: str | None = None, num_classes: int | None = None,
               img_size: int | tuple[int, int] | None = None, settings: dict[str, Any] | None = None,
               pretrained: bool = True, **args: Any) -> Checkpoint:
    """A model from a checkpoint or run folder; a weights file together with the timm name `model`; a folder with
    config.json and weights as timm writes them, also as local-dir:FOLDER; hf-hub:OWNER/NAME; or a timm name. One that
    is open already comes back as it is.

    num_classes, img_size and args (timm's) are of a model that is built here; where they are not given, they are the
    weights' own. settings: mean, std, crop_pct, crop_mode, interpolation of images, in place of those that config.json
    or else timm has (`SETTINGS`). A published Prune and Merge .pth is recognised, and a published Segmenter's with its
    variant.yml beside it. Raises InputError for anything else.
    """
    given = {**{k: v for k, v in {"num_classes": num_classes, "img_size": img_size}.items() if v is not None}, **args}
    if isinstance(source, ModelSource):
        return source.open()
    found = _opened(source, model, given, pretrained)
    settings = check_settings(settings or {})
    odd = next((name for name in settings if name not in ("mean", "std") and isinstance(found.model, Segmenter)), None)
    if odd is not None:
        raise InputError(f"{odd} is {settings[odd]}, but scenes are taken as they are, not resized and cropped")
    if settings:
        set_settings(encoder_of(found.model), settings)
    return found


def _opened(source: Other, model: str | None, args: dict[str, Any], pretrained: bool) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return _as_it_is(source, "the checkpoint", args)
    source = str(source)
    require(source, "no model is named; a run folder, a weights file or a timm name is needed")
    if source.startswith(HUB):
        path = download(source.removeprefix(HUB))
        return (_as_it_is(checkpoint.load(path), source, args) if (path / checkpoint.INFO).is_file() else
                _of_weights(weights_in(path), None, args))
    path = from_root(source.removeprefix(LOCAL))
    ours = any((path / place / checkpoint.INFO).is_file() for place in ("", checkpoint.FOLDER))
    if source.startswith(LOCAL) or (path / CONFIG).is_file() and not ours:
        return _of_weights(weights_in(path), None, args)
    if path.is_dir():
        return _as_it_is(checkpoint.load(path), path, args)
    if is_weights(path) and model is None and (path.parent / VARIANT).is_file():
        built, plan = load_segmenter(path)
        return _as_it_is(Checkpoint(model=built, plan=plan, info={"made_by": {"read_from": path.name}}), path, args)
    if is_weights(path):
        return _of_weights(path, model, args)
    if path.is_file():
        raise InputError(f"{path}: not a weights file; one that ends in {', '.join(SUFFIXES)} is, or a run folder")
    check_source(source)                        # timm's names have one part, or two
    built = create_model(source, pretrained=pretrained, **args)
    return Checkpoint(model=built, plan=CompressionPlan.empty(shape_of(built)), info={"made_by": {"timm": source}})


def _as_it_is(found: Checkpoint, where: str | Path, args: dict[str, Any]) -> Checkpoint:
    """The checkpoint itself. InputError where it should be built otherwise."""
    if args:
        raise InputError(f"{where} holds a model of its own sizes; {next(iter(args))} is for weights of others")
    return found


def _of_weights(path: Path, model: str | None, args: dict[str, Any]) -> Checkpoint:
    """The model of a weights file, by what a config.json beside it says, and what it leaves open."""
    theirs = config_of(path) if model is None else None
    config = None if theirs else config_beside(path)
    if model is None and config is None and theirs is None:
        raise InputError(f"{path}: a weights file needs the timm name of its model (--model NAME, or `model` in a "
                         f"notebook), or a {CONFIG} of timm or transformers beside it")
    content = read_file(path)
    state, notes = state_of(content, path), []
    if theirs:
        config, state, notes = converted(path, theirs, state, args.get("img_size"))
    config = config or HubConfig(name=model)
    name, saved = model or config.name, config.args if model in (None, config.name) else {}
    if is_published(content):
        args, _, more = sized(name, state, path, args, saved)
        built, plan = load_published(path, create_model(name, **args))
    else:
        built, more = from_weights(name, state, path, args, saved)
        plan = CompressionPlan.empty(shape_of(built))
    set_settings(built, config.settings)
    notes = notes + more
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    classes = config.classes if config.classes is not None and len(config.classes) == built.num_classes else None
    made_by = {"read_from": path.name, **({"notes": notes} if notes else {})}
    return Checkpoint(model=built, plan=plan, info={"classes": classes, "made_by": made_by})
