"""Models as timm keeps them on the Hugging Face hub or in a folder: config.json (architecture, image settings, classes)
beside weights."""
import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from timm.models._hub import hf_split, load_model_config_from_path
from torch import nn

from vitlab.runtime.files import InputError, first_line, read_json, require

HUB = "hf-hub:"                                 # what stands before OWNER/NAME
CONFIG, WAIT = "config.json", 5.0               # seconds in which the hub must answer
OURS = ("weights.safetensors", "plan.json", "checkpoint.json")      # of a checkpoint, which config.json then names
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")      # as timm looks for them
INDICES = tuple(name + ".index.json" for name in WEIGHTS[:2])
PREPARED = ("preprocessor_config.json", "processor_config.json")        # how transformers prepares images
MOST = 3                                        # a mean or deviation of pixels from 0 to 1 is less
CROPS, INTERPOLATIONS = ("center", "squash", "border"), ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box",
                                                         "random")


def _numbers(value: Any) -> bool:
    return (isinstance(value, (list, tuple)) and len(value) in (1, 3)
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value))


SETTINGS = {  # how images are prepared for a model, under the names of timm's pretrained_cfg: (what fits, in words)
    "mean": (lambda v: _numbers(v) and max(map(abs, v)) <= MOST, f"1 or 3 numbers from -{MOST} to {MOST}, of pixels "
                                                                 f"from 0 to 1"),
    "std": (lambda v: _numbers(v) and min(v) > 0 and max(v) <= MOST, f"1 or 3 numbers above 0, to {MOST}, of pixels "
                                                                     f"from 0 to 1"),
    "crop_pct": (lambda v: isinstance(v, (int, float)) and 0 < v <= 1, "a fraction up to 1"),
    "crop_mode": (lambda v: v in CROPS, " or ".join(CROPS)),
    "interpolation": (lambda v: v in INTERPOLATIONS, " or ".join(INTERPOLATIONS))}


def check_settings(settings: Any) -> dict[str, Any]:
    """Those that are given (not None). InputError for one that is unknown or of the wrong kind."""
    if not isinstance(settings, dict):
        raise InputError(f"a mapping is needed, not {str(settings)[:80]}")
    for name, value in settings.items():
        require(name in SETTINGS, f"image setting {name!r} is not known; known are {', '.join(SETTINGS)}")
        if value is not None and not SETTINGS[name][0](value):
            raise InputError(f"{name} is {str(value)[:80]}; needed: {SETTINGS[name][1]}")
    return {name: value for name, value in settings.items() if value is not None}


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The image settings of a timm model, in place of which `set_settings` puts others."""
    return {name: model.pretrained_cfg.get(name) for name in SETTINGS}


def set_settings(model: nn.Module, settings: dict[str, Any]) -> None:
    """Images are prepared for this timm model by these settings from now on. One number stands for every channel."""
    channels = model.in_chans
    given = {name: tuple(value) * (channels if len(value) == 1 else 1) if name in ("mean", "std") else value
             for name, value in check_settings(settings).items()}
    model.pretrained_cfg = {**model.pretrained_cfg, **given}


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """What a config.json says: timm's name of the architecture and its arguments, image settings, class names (None
    where it has none or they are not those of all classes)."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None


def config_beside(weights: Path) -> HubConfig | None:
    """Of the config.json in a weights file's folder; None where there is none, or one that is not timm's. Raises
    InputError naming it."""
    path = weights.parent / CONFIG
    content = read_json(path) if path.is_file() else None
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return None
    try:
        config, name, args = load_model_config_from_path(path.parent)
        labels = config.get("label_names")
        if isinstance(labels, dict):            # by number
            labels = [labels.get(str(number)) for number in range(len(labels))]
        named = isinstance(labels, (list, tuple)) and all(isinstance(label, str) for label in labels)
        return HubConfig(name=name,
                         args={**({"num_classes": config["num_classes"]} if "num_classes" in config else {}), **args},
                         settings=check_settings({key: config.get(key) for key in SETTINGS}),
                         classes=list(labels) if named else None)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:                  # whatever values of other kinds make timm's reading raise
        raise InputError(f"{path}: not a config.json of timm's ({first_line(error)})") from None


def weights_in(folder: Path) -> Path:
    """The weights file of such a folder, or the index of several. Raises InputError where there is none."""
    found = next((folder / name for name in (*WEIGHTS, *INDICES) if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{folder}: no {WEIGHTS[0]} or {WEIGHTS[1]} beside {CONFIG}")
    return found


def answers() -> bool:
    """Whether the hub does, within WAIT seconds."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=WAIT)
        return not constants.HF_HUB_OFFLINE
    except Exception:                           # its client's errors, of whichever library
        return False


@contextlib.contextmanager
def downloading() -> Iterator[None]:
    """Inside, a hub that does not answer is offline after seconds, not minutes; what was downloaded before serves."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def download(name: str) -> Path:
    """The local folder of OWNER/NAME or OWNER/NAME@REVISION, with its config.json and weights, or the checkpoint that
    `vitlab push` put there. Raises InputError."""
    try:
        repository, revision = hf_split(name)
        with downloading():
            folder = Path(huggingface_hub.hf_hub_download(repository, CONFIG, revision=revision)).parent

            def first(files: Iterable[str]) -> Path | None:
                """The first of them that the repository has."""
                for file in files:
                    with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
                        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
                return None

            config = read_json(folder / CONFIG)
            if "vitlab" in config:
                for file in OURS:
                    huggingface_hub.hf_hub_download(repository, file, revision=revision)
                return folder
            if "architecture" not in config:
                first(PREPARED)
            index = first((WEIGHTS[0], INDICES[0], WEIGHTS[1], INDICES[1]))
            for shard in set(read_json(index)["weight_map"].values()) if index and index.name in INDICES else ():
                huggingface_hub.hf_hub_download(repository, shard, revision=revision)
    except Exception as error:                  # no such model, no access, no network, no disk
        raise InputError(f"hf-hub:{name}: can't be downloaded, and is not in the cache ({first_line(error)})") from None
    return folder
