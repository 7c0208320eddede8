"""Models by timm's names, and those that vitlab adds; of weights files, at the sizes that these are of."""
import contextlib
import difflib
import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import timm
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import get_model_args
from timm.models._input import update_model_args
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitlab.models import small as _small  # noqa: F401 - makes its names known
from vitlab.models.ends import as_projection, is_projection, projects
from vitlab.models.families import MODELS, kind_of
from vitlab.models.hub import downloading
from vitlab.models.naflex import at_fixed_size, at_grid
from vitlab.models.parallel_blocks import in_parts, state_in_parts
from vitlab.models.support import attention_block, check_supported, classes_of
from vitlab.models.unfilled import sizes_alone, unfilled
from vitlab.models.weights import ANCHOR, FLEXIBLE, by_timms_names, check_fits, read_state, unwrapped
from vitlab.plan.shape import POOL_TOKEN, is_int, is_number
from vitlab.runtime.files import InputError, first_line, require

PREFIXES = ("cls_token", "dist_token", "reg_token")                                      # before the patches
OWN = ("norm_eps", "projection")                # arguments that are not timm's
# of patches, by the names that timm knows
KERNELS = (ANCHOR, "visual.conv1.weight", "preprocessor.patchifier.proj.weight")


def create_model(name: str, *, weights: str | Path | None = None, pretrained: bool = False, **args: Any) -> nn.Module:
    """A supported timm vision transformer in eval mode.

    weights: a file that `read_state` reads; sizes that args don't give are those of its tensors (`from_weights`).
    pretrained downloads timm's own. args: timm's (num_classes, img_size, ...), norm_eps, the epsilon of all its
    LayerNorms, and projection, whether its head gives features (default: as `ends.projects` tells). Raises
    InputError for an unknown name (with the nearest ones), a family that can't be handled, or weights that don't fit.
    """
    if weights is None:
        return _built(name, args, pretrained)
    model, notes = from_weights(name, read_state(weights), weights, args)
    for note in notes:
        warnings.warn(f"{weights}: {note}", stacklevel=2)
    return model


def set_norm_eps(model: nn.Module, eps: float) -> None:
    """Set the epsilon of all its LayerNorms: timm's models have 1e-6, others' 1e-5 or 1e-12. `architecture` knows."""
    require(is_number(eps, 0, 1), f"norm_eps is {eps!r}; a number from 0 to 1 is needed")
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = eps
    update_model_args(model, norm_eps=eps)


def _timms(name: str, args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """What timm makes of a name. Raises InputError."""
    base = name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.4)
        raise InputError(f"{name!r}: no such file or folder, and no timm model"
                         + (f"; near are {', '.join(near)}" if near else ""))
    try:
        with downloading() if pretrained else contextlib.nullcontext():
            return timm.create_model(name, pretrained=pretrained, **args)
    except (InputError, MemoryError):
        raise
    except Exception as error:                  # whatever arguments of other kinds, or a download, make timm raise
        raise InputError(f"{name}: timm could not build it ({first_line(error)})") from error


def _built(name: str, args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    args = dict(args)
    eps, projection = (args.pop(own, None) for own in OWN)
    for download in (False, True) if pretrained else (False,):  # refuse a family before its weights are downloaded
        model = _timms(name, args, download)
        model = in_parts(at_fixed_size(model) if isinstance(model, NaFlexVit) else model)
        check_supported(model)
    if eps is not None:
        set_norm_eps(model, eps)
    require(model.patch_embed.num_patches, f"{name}: an image of {model.patch_embed.img_size} holds no patch of "
            f"{model.patch_embed.patch_size}")
    if projects(model) if projection is None else projection:
        as_projection(model)
    return model.eval()


def _sizes(name: str, args: dict[str, Any]) -> nn.Module:
    """Names and sizes of a model's tensors alone, without memory."""
    with sizes_alone():
        return _built(name, args)


def from_weights(name: str, state: dict[str, Tensor], path: str | Path, args: dict[str, Any],
                 saved: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
    """(the model in eval mode, what is to be said of it) of a state dict, by `sized`. Raises InputError naming the
    file, and before memory is taken, where the weights don't fit."""
    args, state, notes = sized(name, state, path, args, saved)
    try:
        check_fits(_sizes(name, args), state, path)
    except InputError as error:
        raise InputError(f"{error} (the model is {name})") from None
    with unfilled():
        model = _built(name, args)
    model.load_state_dict(state)
    if args.get("projection", projects(model, loaded=True)):
        as_projection(model)
    return model, notes


def sized(name: str, state: dict[str, Tensor], path: str | Path, args: dict[str, Any],
          saved: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """(arguments of timm's to build the model by, the state under timm's names, what is to be said of it).

    args: what is asked for. saved: what the file's config.json says. The rest, the number of classes and the size of
    the images above all, is what the tensors are of; embeddings are resampled only for an img_size or patch_size in
    args. Raises InputError naming the file where that can't be.
    """
    saved = check_args(saved or {})
    if is_int(saved.get("depth")) and saved["depth"] > len(state):
        raise InputError(f"{path}: {len(state)} tensors are no model of {saved['depth']} blocks")
    model = _sizes(name, {**saved, **args})
    plain = isinstance(model, VisionTransformer)
    if plain:
        model.pos_embed = None                  # then timm's conversion leaves the file's as it is
    flexible = any(f".{each}".endswith(f".{FLEXIBLE}") for each in state)
    state, others = unwrapped(state_in_parts(state), model.state_dict(), path)
    if flexible:
        with sizes_alone():
            theirs = _timms(name, {key: value for key, value in {**saved, **args}.items() if key not in OWN})
        state = at_grid(state, theirs, model.patch_embed.grid_size, path)
    patch = model.patch_embed.patch_size
    kernel = next(((v.shape[-2], v.shape[-1]) for k, v in state.items() if k in KERNELS and v.dim() == 4), patch)
    if kernel != patch and "patch_size" not in args:
        raise InputError(f"{path}: does not fit the model: its patches are of {_by(kernel)} pixels, those of {name} of "
                         f"{_by(patch)}; name "
                         f"the model of such patches, or give a patch_size, {kernel[0]} to keep them")
    state, extra = by_timms_names(state, model, path)
    left = list(dict.fromkeys(part.split(".")[0] for part in others + extra))
    notes = [f"left out, since the model has no such part: {', '.join(left)}"] if left else []
    notes += [f"patch embedding resampled from {_by(kernel)} to {_by(patch)} pixels"] if kernel != patch else []
    if flexible and "img_size" not in args:
        notes.append(f"for images of {_by(model.patch_embed.img_size)} pixels, of the many that a NaFlexVit takes")
    asked, args = "img_size" in args, {**saved, **_own_sizes(state, model, args, path), **args}
    if not plain:                               # the size of images is the model's, and timm's conversion resampled
        return args, state, notes
    state, size, more = _placed(state, _sizes(name, args), kernel, asked, path)
    return {**args, **({} if size is None else {"img_size": size})}, state, notes + more


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _own_sizes(state: dict[str, Tensor], model: nn.Module, args: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Arguments of timm's that a state dict says by its tensors."""
    own: dict[str, Any] = {}
    head = next((state[name] for name in ("head.weight", "head.fc.weight") if name in state), None)
    if head is not None and head.dim() == 2:
        own["num_classes"] = len(head)
    elif not any(name.startswith("head") for name in state):
        if args.get("num_classes"):
            raise InputError(f"{path}: holds no classifier, so num_classes can't be {args['num_classes']}; without it "
                             "the model gives features")
        own["num_classes"] = 0
    if ANCHOR in state and state[ANCHOR].dim() == 4 and type(model.patch_embed) is PatchEmbed:
        own["in_chans"] = state[ANCHOR].shape[1]
    if (isinstance(model, VisionTransformer) and isinstance(model.fc_norm, nn.Identity)
            and "fc_norm.weight" in state and "norm.weight" not in state):
        own["global_pool"] = "avg"              # a fine-tuned MAE's
    return own


def _placed(state: dict[str, Tensor], model: nn.Module, kernel: tuple[int, int], asked: bool,
            path: str | Path) -> tuple[dict[str, Tensor], tuple[int, int] | None, list[str]]:
    """(the state with position embeddings of the images' size, that size where it is the weights' own and not the
    model's, what is to be said of it). kernel: the file's patches. asked: the model's size was asked for."""
    embedded, grid = state.get("pos_embed"), model.patch_embed.grid_size
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches = embedded.shape[1] - prefix if embedded is not None and embedded.dim() == 3 else grid[0] * grid[1]
    if patches == grid[0] * grid[1]:
        return state, None, []
    side = math.isqrt(max(patches, 0))
    own = model.state_dict()
    if set(own) - set(state) or any(name in state and (name not in own or state[name].shape != own[name].shape)
                                    for name in PREFIXES):
        # another model's: what differs says more than its number of patches
        return {**state, "pos_embed": own["pos_embed"]}, None, []
    require(side and side ** 2 == patches, f"{path}: does not fit the model: its position embeddings are of {patches} "
            "patches, which make no square; give the img_size, height and width, that they are of")
    size, notes = None, []
    if not asked:
        size = side * kernel[0], side * kernel[1]
        grid = tuple(s // p for s, p in zip(size, model.patch_embed.patch_size))
        notes.append(f"for images of {_by(size)} pixels, as the weights are")
    if grid != (side, side):
        notes.append(f"position embeddings resampled from {_by((side, side))} to {_by(grid)} patches")
        state = {**state,
                 "pos_embed": resample_abs_pos_embed(embedded, new_size=grid, old_size=(side, side),
                                                     num_prefix_tokens=prefix)}
    return state, size, notes


def architecture(model: nn.Module) -> dict[str, Any]:
    """{"name", "args"} from which create_model builds the same (dense) model again."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    require(name, "the model was not made by timm.create_model, so its name is not known; make it there (a class of "
            "your own under a name that timm.models.register_model gives it)")
    # What timm does not keep an account of: blocks and classifiers that were changed by hand, and where the last norm
    # stands.
    now: dict[str, Any] = {"num_classes": classes_of(model),
                           "depth": sum(hasattr(attention_block(b), "attn") for b in model.blocks)}
    known = inspect.signature(kind_of(model, MODELS) or type(model)).parameters
    now |= {name: not isinstance(model.fc_norm, nn.Identity) for name in ("fc_norm", "use_fc_norm") if name in known}
    if hasattr(model, "dist_token") and not model.global_pool:
        now["global_pool"] = POOL_TOKEN         # of an encoder; timm builds a distilled DeiT with no other
    now |= {"projection": True} if is_projection(model) else {}
    args = {k: list(v) if isinstance(v, tuple) else v for k, v in sorted({**get_model_args(model), **now}.items())}
    odd = next((k for k, v in args.items() if not isinstance(v, (str, int, float, list, dict, type(None)))), None)
    if odd is not None:
        raise InputError(f"the model was made with {odd}={args[odd]!r}, which no file can hold")
    return {"name": name, "args": args}


def check_args(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model that a file names. InputError for one that no family of timm's has, so that a file can't
    make it read other files or download."""
    known = {*OWN, "use_naflex"}.union(*(inspect.signature(kind).parameters for kind in (*MODELS, NaFlexVitCfg)))
    odd = sorted(set(args) - known)
    if odd:
        raise InputError(f"model argument {odd[0]!r} is not one of a vision transformer's")
    return args


def rebuild(source: Any, most: int | None = None) -> nn.Module:
    """The model of an `architecture`, with random weights. Raises InputError naming what is wrong, and, before any
    memory is taken, where it would have more than `most` parameters."""
    require(isinstance(source, dict) and isinstance(source.get("name"), str) and isinstance(source.get("args"), dict),
            '"model" must hold "name" and "args"')
    check_args(source["args"])
    if most is not None:
        count = sum(p.numel() for p in _sizes(source["name"], source["args"]).parameters())
        require(count <= most, f"a model of {count:,} parameters; the weights beside it are those of {most:,} at most")
    args: dict[str, Any] = {"projection": False, **source["args"]}
    return create_model(source["name"], **args)
