"""Published Segmenter checkpoints: checkpoint.pth with variant.yml beside it, as the authors' training wrote them
(arXiv 2105.05633).

The state dict under "model" has timm's names below "encoder." (with an ImageNet classifier that segmentation leaves
unused) and this package's below "decoder.". Sizes, decoder and normalisation stand under net_kwargs in variant.yml. No
code of either file runs.
"""
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from timm.data import constants
from torch import Tensor

from vitlab.models.create import rebuild
from vitlab.models.decoders import NORM_EPS
from vitlab.models.segmenter import Segmenter, as_encoder, is_rate, is_size
from vitlab.models.weights import read_file, state_of
from vitlab.runtime.files import InputError, require

VARIANT = "variant.yml"
STATISTICS = {"deit": (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD),
              "vit": (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)}
# timm's, by net_kwargs.distilled
NAMES = {False: "vit_base_patch16_224", True: "deit_base_distilled_patch16_224"}
UNUSED = ("encoder.head.", "encoder.head_dist.")
HEAD_DIM = 64                                   # of the decoder's heads, whatever the encoder's: d_model // 64 of them


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain data, and Python's tuples, as lists: image_size is one in the published files."""


_PlainLoader.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)


def read_variant(path: str | Path) -> dict[str, Any]:
    """The parsed variant.yml. InputError where it is missing, damaged, holds more than plain data or no net_kwargs."""
    path = Path(path)
    try:
        content = _PlainLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a published Segmenter has it beside its checkpoint") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not plain YAML; nothing of it was run ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("net_kwargs"), dict):
        raise InputError(f"{path}: holds no net_kwargs; the sizes of a Segmenter are needed there")
    return content


def _taken(settings: dict[str, Any], where: str, checks: dict[str, Callable[[Any], bool]]) -> None:
    """InputError naming the first setting that is missing or of the wrong kind."""
    for name, fits in checks.items():
        if not fits(settings.get(name)):
            raise InputError(f"{where}.{name} is {reprlib.repr(settings.get(name))}, which a Segmenter can't be built "
                             f"from")


def _check(net: dict[str, Any], path: Path) -> None:
    where = f"{path}: net_kwargs"
    _taken(net, where, {
        "image_size": lambda v: isinstance(v, list) and len(v) == 2 and all(map(is_size, v)),
        "decoder": lambda v: isinstance(v, dict), "normalization": lambda v: v in list(STATISTICS),
        "distilled": lambda v: v in (None, True, False),
        **dict.fromkeys(("patch_size", "d_model", "n_layers", "n_heads", "n_cls"), is_size),
        **{name: lambda v: v is None or is_rate(v) for name in ("drop_path_rate", "dropout")}})
    kinds = {"linear": {}, "mask_transformer": {"n_layers": is_size, "dropout": is_rate, "drop_path_rate": is_rate}}
    _taken(net["decoder"], f"{where}.decoder", {"name": lambda v: v in list(kinds)})
    _taken(net["decoder"], f"{where}.decoder", kinds[net["decoder"]["name"]])


def published_parts(path: str | Path) -> tuple[Segmenter, dict[str, Tensor], Path]:
    """(the dense Segmenter with random weights, the state dict, its file) of a published checkpoint.pth, or of the
    folder that holds it.

    The encoder is at the size of its training crops (larger images go through windows), its LayerNorms have the
    published 1e-5 (timm's 1e-6 elsewhere), its pretrained_cfg the published mean and deviation of images in [0, 1]. Its
    dropout rates are 0. Raises InputError naming the file and key: missing, damaged, more than weights, sizes that do
    not fit each other.
    """
    path = Path(path)
    path = path / "checkpoint.pth" if path.is_dir() else path
    state = {name.removeprefix("module."): tensor for name, tensor in state_of(read_file(path), path).items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}
    where = path.parent / VARIANT
    net = read_variant(where)["net_kwargs"]
    _check(net, where)
    decoder, most = net["decoder"], sum(tensor.numel() for tensor in state.values())
    for part, count in (("encoder", net["n_layers"]), ("decoder", decoder.get("n_layers", 0))):
        blocks = {name.split(".")[2] for name in state if name.startswith(f"{part}.blocks.")}
        require(len(blocks) == count, f"{path}: {len(blocks)} blocks in the {part}; {where} says {count}")
    if net["n_cls"] > most:
        raise InputError(f"{where}: net_kwargs.n_cls is {net['n_cls']}; {path} has {most} numbers in all")
    args = {"img_size": net["image_size"], "patch_size": net["patch_size"], "embed_dim": net["d_model"],
            "depth": net["n_layers"], "num_heads": net["n_heads"], "num_classes": 0, "norm_eps": NORM_EPS}
    own = {"head_dim": net["d_model"] // max(1, net["d_model"] // HEAD_DIM)}
    if decoder["name"] == "mask_transformer":
        own |= {"depth": decoder["n_layers"], "drop": decoder["dropout"], "drop_path": decoder["drop_path_rate"]}
    try:
        encoder = as_encoder(rebuild({"name": NAMES[bool(net.get("distilled"))], "args": args}, most))
        model = Segmenter(encoder, net["n_cls"], decoder["name"], **own)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    mean, std = STATISTICS[net["normalization"]]
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": mean, "std": std}
    return model, state, path
