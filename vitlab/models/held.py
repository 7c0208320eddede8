"""What goes from block to block while an image's tokens are held as fewer: merged by content, or in a span of blocks.

A block that knows takes what is held. To whoever else meets it on its way (a norm, a hook, timm's
forward_intermediates, a model that ends here) it is the tensor of all tokens that it stands for, computed when asked
for.
"""
import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree

from vitlab.models.families import ROTARY, kind_of
from vitlab.plan import matching
from vitlab.runtime.files import InputError

ARITHMETIC = ("add", "sub", "mul", "truediv", "matmul", "pow")
COMPARISONS = ("lt", "le", "gt", "ge")


class Held:
    """All tokens of each image, (B, N, D) to whoever does not know better."""

    __dataclass_fields__: ClassVar[dict[str, Any]]          # what holds tokens is a dataclass

    def whole(self) -> Tensor:
        """(B, N, D)."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def plain(value: Any) -> Any:
            return value.whole() if isinstance(value, Held) else value
        args, kwargs = _pytree.tree_map(plain, (args, kwargs or {}), is_leaf=lambda value: isinstance(value, Held))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):               # what Python itself looks for: copies, pickles
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def _each(self, act: Callable[[Tensor], Tensor]) -> "Held":
        return dataclasses.replace(self, **{name: act(v) for name, v in vars(self).items() if isinstance(v, Tensor)})

    def to(self, *args: Any, **kwargs: Any) -> "Held":
        """All that is held, moved as Tensor.to moves; numbers of patches and places stay what they are."""
        return self._each(lambda v: v.to(*args, **kwargs) if v.dtype == self.x.dtype
                          else v.to(v.to(*args, **kwargs).device))

    def clone(self) -> "Held":
        return self._each(Tensor.clone)

    def detach(self) -> "Held":
        return self._each(Tensor.detach)

    def contiguous(self) -> "Held":
        return self._each(Tensor.contiguous)

    def __getitem__(self, key: Any) -> Tensor:
        return self.whole()[key]

    def __len__(self) -> int:
        return len(self.x)


def _on_whole(name: str, swapped: bool) -> Callable[[Held, Any], Tensor]:
    act = getattr(operator, name)
    return (lambda self, other: act(other, self.whole())) if swapped else (lambda self, other: act(self.whole(), other))


for _name in (*ARITHMETIC, *COMPARISONS):
    setattr(Held, f"__{_name}__", _on_whole(_name, swapped=False))
for _name in ARITHMETIC:
    setattr(Held, f"__r{_name}__", _on_whole(_name, swapped=True))


@dataclass(frozen=True, eq=False)
class Merged(Held):
    """What matching blocks have merged."""

    x: Tensor                       # (B, P + K, D)
    sizes: Tensor                   # (B, P + K) patches that each token stands for; 1 for prefix tokens
    places: Tensor                  # (B, n) which of the K tokens each patch went into
    num_prefix_tokens: int          # P

    def whole(self) -> Tensor:
        return matching.give_back(self.x, self.places, self.num_prefix_tokens)


@dataclass(frozen=True, eq=False)
class Spanned(Held):
    """What is in a span of blocks that run on merged tokens."""

    x: Tensor                       # (B, C, D)
    aside: Tensor | None            # (B, N, D) (1 - token_mask) * x, what skips the whole span; None where nothing does
    reconstruct: Tensor             # (N, C)

    def whole(self) -> Tensor:
        """reconstruct @ x + what went aside   (A6, over several blocks)."""
        y = torch.matmul(self.reconstruct, self.x)
        return y if self.aside is None else y + self.aside


for _kind in (Merged, Spanned):  # so that what looks for tensors in a block's output (FSDP, checkpointing) finds them
    _pytree.register_pytree_node(_kind, lambda held: ([getattr(held, f.name) for f in dataclasses.fields(held)], None),
                                 lambda values, context, kind=_kind: kind(*values))


@torch.fx.wrap
def _no_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool, what: str) -> Tensor:
    if attn_mask is not None or is_causal:
        raise InputError(f"{what} takes no attention mask")
    return x


def unmasked(x: Tensor, attn_mask: Tensor | None, is_causal: bool, what: str) -> Tensor:
    """x itself. Raises InputError where there is an attention mask; what torch.fx traces does so when it runs.
    (torch.fx keeps a wrapped function as one call only by its name in the module that wraps it, so that others call
    this.)"""
    return _no_mask(x, attn_mask, is_causal, what)


class HoldingBlock(nn.Module):
    """What blocks share that take or give held tokens; `takes_held` says whether the block before gives them."""

    takes_held = False

    def received(self, x: Tensor | Held, attn_mask: Tensor | None, is_causal: bool, what: str) -> Tensor | Held:
        """What comes in. Raises InputError where there is an attention mask, or where held tokens are due and something
        on the way (a hook) has made all tokens of them: which of them are one, and for how many patches, can't be known
        any more."""
        if not isinstance(x, Held):
            if self.takes_held:
                raise InputError("merged tokens should come in, but all tokens did: a hook on the block before has "
                                 "changed what it gives; hook a part inside the block instead")
            return unmasked(x, attn_mask, is_causal, what)
        return dataclasses.replace(x, x=unmasked(x.x, attn_mask, is_causal, what))

    def handed_on(self, held: Held, gives_back: bool) -> Tensor | Held:
        """What leaves the block: all tokens, or what is held. torch.fx calls a block's output what was computed in it
        last, so that while it traces, all tokens are computed in either case (and dropped from the graph where nobody
        asks for them). Raises InputError where a backward hook would never be called."""
        if gives_back:
            return held.whole()
        if isinstance(held.x, torch.fx.Proxy):
            held.whole()
        elif self._backward_hooks or self._backward_pre_hooks:
            raise InputError("a backward hook on a block that hands on merged tokens would never be called; hook a "
                             "part inside the block instead")
        return held


def turned(rope: Tensor | None, by: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """What a block that turns queries and keys by place is given beside its tokens, of its merged tokens `by`; nothing
    for others."""
    return {} if rope is None else {"rope": rope if by is None else by(rope)}


class RegionRotation(nn.Module):
    """Rotations of regions: the means of their patches' rotations ([H, ]n, 2 d) -> ([H, ]C, 2 d), gathered, so that no
    product is to be computed."""

    def __init__(self, members: list[list[int]]) -> None:
        super().__init__()
        largest = max(map(len, members), default=0)
        padded = [patches + patches[:1] * (largest - len(patches)) for patches in members]
        shares = [[1 / len(patches)] * len(patches) + [0.0] * (largest - len(patches)) for patches in members]
        self.register_buffer("members", torch.tensor(padded, dtype=torch.long), persistent=False)
        self.register_buffer("shares", torch.tensor(shares)[:, :, None], persistent=False)

    @classmethod
    def of(cls, block: nn.Module, members: list[list[int]]) -> "RegionRotation | None":
        """None for a block that turns nothing."""
        return cls(members) if kind_of(getattr(block, "attn", block), ROTARY) else None

    def forward(self, rope: Tensor) -> Tensor:
        if not len(self.members):
            return rope[..., :0, :]
        rows = rope.index_select(-2, self.members.flatten()).unflatten(-2, self.members.shape)
        return (rows * self.shares.to(rope)).sum(dim=-2)


def rotation_of(merged: "Merged", rope: Tensor) -> Tensor:
    """Rotations of merged tokens (B, 1 or H, N - P, 2 d): the means of those of the patches ([H, ]n, 2 d) that went
    into each."""
    numbers = torch.arange(merged.x.shape[1] - merged.num_prefix_tokens, device=rope.device)
    shares = (merged.places[:, None] == numbers[:, None]).to(rope)                      # (B, N - P, n)
    shares = shares / merged.sizes[:, merged.num_prefix_tokens:, None].to(rope)
    return torch.matmul(shares[:, None], rope)


def check_reentrant(x: Tensor | Held) -> None:
    """InputError where a block that holds tokens is computed inside a re-entrant checkpoint, which gives gradients to
    tensors alone."""
    x = x.x if isinstance(x, Held) else x
    if isinstance(x, Tensor) and x.requires_grad and not torch.is_grad_enabled():
        raise InputError("re-entrant checkpointing loses the gradient of merged tokens between blocks; "
                         "use_reentrant=False is needed (timm.layers.set_reentrant_ckpt(False))")
