"""A timm model whose tokens are cut, or that queries have joined, still of its class; what timm's methods would get
wrong of it is refused."""
import functools
from typing import Any

import torch
import torch.fx
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitlab.models.deploy import Fold, FoldedBlock
from vitlab.models.join import queries_in
from vitlab.models.read_out import ReadOutBlock
from vitlab.models.select import SelectBlock
from vitlab.models.support import attention_block, is_merged
from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.files import InputError


class ImageSize:
    """A forward pre-hook of a patch embedding: cut tokens are places on one grid, so another size is refused."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = tuple(size)

    def __call__(self, patch_embed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(inputs[0], torch.fx.Proxy):
            return
        height, width = inputs[0].shape[-2:]
        if (height, width) != self.size:
            raise InputError(f"an image of {height} x {width} came in; the plan is for {self.size[0]} x {self.size[1]} "
                             "(another size needs its own plan)")


class QueriesJoined:
    """What goes before timm's class of a model that queries may have joined. Its blocks say where; nothing is stored
    here."""

    @property
    def _joined(self) -> tuple[int, int]:
        """(how many of its blocks, the last ones, have queries among their tokens; how many queries)."""
        return queries_in([*map(attention_block, self.blocks)])

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Of an image's own tokens."""
        queries = self._joined[1]
        return super().pool(x[:, :-queries] if queries else x, pool_type)

    def forward_intermediates(self, x: Tensor, indices: Any = None, *args: Any, **kwargs: Any) -> Any:
        count, joined = len(self.blocks), self._joined[0]
        if (joined and "NLC" not in (*args, kwargs.get("output_fmt"))
                and max(feature_take_indices(count, indices)[0]) >= count - joined):
            raise InputError(f"queries have joined the tokens before block {count - joined}, so that what it gives is "
                             'no grid; output_fmt "NLC" gives the patches, then the queries; earlier blocks give grids')
        return super().forward_intermediates(x, indices, *args, **kwargs)

    def __prepare_scriptable__(self) -> None:
        raise InputError("torch.jit.script can't take a model whose tokens are cut, or that queries have joined; "
                         "torch.export and torch.jit.trace can")

    def __reduce_ex__(self, protocol: int) -> tuple:
        first = TokensCut if isinstance(self, TokensCut) else QueriesJoined
        # the classes are made here, where pickle can't find them
        return _empty, (first, _kind_of(self)), self.__dict__


class TokensCut(QueriesJoined):
    """The same of a model whose tokens are cut."""

    @property
    def gives_prefix_alone(self) -> bool:
        """Whether no patch is left at the end: it reads tokens out, or is deployed for class-token pooling."""
        last, prefix = getattr(self.blocks[-1], "unfold", None) or self.blocks[-1], self.num_prefix_tokens
        return isinstance(last, ReadOutBlock) or isinstance(last, Fold) and len(last.matrix) == prefix

    @property
    def keeps_grid(self) -> bool:
        """Whether every patch has a place after every block."""
        return not any(isinstance(block, (FoldedBlock, SelectBlock, ReadOutBlock)) for block in self.blocks)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        pool_type = self.global_pool if pool_type is None else pool_type
        if self.gives_prefix_alone and pool_type != POOL_TOKEN:
            raise InputError(f"the model pools by {pool_type!r}, but only its prefix tokens are left at the end; "
                             f"{POOL_TOKEN!r} is needed, or the dense model compressed for this pooling")
        return super().pool(x, pool_type)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        raise InputError("tokens are cut for images of one size; set the dense model's size, and compress it by a plan "
                         "for that")

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        if not self.keeps_grid:
            raise InputError("there is no token grid between the blocks of a deployed model, or after tokens were "
                             "selected or read out; take intermediates from the training form of a plan that merges")
        return super().forward_intermediates(*args, **kwargs)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        if any(isinstance(block, FoldedBlock) for block in self.blocks):
            raise InputError("a deployed model is folded across its blocks, so none can be left out; prune the "
                             "training form's")
        return super().prune_intermediate_layers(*args, **kwargs)


@functools.cache
def _class_of(first: type[QueriesJoined], kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}{first.__name__}", (first, kind), {"__doc__": first.__doc__, "__module__": __name__})


def _kind_of(model: nn.Module) -> type[nn.Module]:
    """timm's class of a model that one of the above goes before."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, QueriesJoined))


def _empty(first: type[QueriesJoined], kind: type[nn.Module]) -> nn.Module:
    made = _class_of(first, kind)
    return made.__new__(made)


def as_tokens_cut(model: nn.Module) -> nn.Module:
    """The same model, its parts taken over, as one that queries have joined or whose tokens are cut, which is for
    images of its size; as it is where neither is so."""
    merged = is_merged(model)
    if not (merged or queries_in([*map(attention_block, model.blocks)])[1]):
        return model
    found = _empty(TokensCut if merged else QueriesJoined, type(model))
    found.__dict__.update(model.__dict__)
    if merged:
        found.patch_embed.register_forward_pre_hook(ImageSize(model.patch_embed.img_size))
    return found


def without_tokens_cut(model: nn.Module) -> nn.Module:
    """The same model, its parts taken over, of timm's own class; as it is where it is of that."""
    if not isinstance(model, QueriesJoined):
        return model
    found = _kind_of(model).__new__(_kind_of(model))
    found.__dict__.update(model.__dict__)
    hooks = found.patch_embed._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, ImageSize)]:
        del hooks[key]
    return found
