"""What goes from block to block while an image's tokens are held as fewer: merged by content, or in a span of blocks.

A block that knows takes what is held. To whoever else meets it on its way (a norm, a hook, timm's forward_intermediates, a model that
ends here) it is the tensor of all tokens that it stands for, computed when asked for.
"""
import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils import _pytree

from vitlab import matching
from vitlab.files import InputError

ARITHMETIC = ("add", "sub", "mul", "truediv", "matmul", "pow")
COMPARISONS = ("lt", "le", "gt", "ge")


class Held:
    """All tokens of each image, (B, N, D) to whoever does not know better."""

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
        if name.startswith("__"):                                               # what Python itself looks for: copies, pickles
            raise AttributeError(name)
        return getattr(self.whole(), name)

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


for _kind in (Merged, Spanned):     # so that what looks for tensors in a block's output (FSDP, checkpointing) finds them
    _pytree.register_pytree_node(_kind, lambda held: ([getattr(held, f.name) for f in dataclasses.fields(held)], None),
                                 lambda values, context, kind=_kind: kind(*values))


def handed_on(held: Held, gives_back: bool) -> Tensor | Held:
    """What leaves a block: all tokens, or what is held. torch.fx calls a block's output what was computed in it last, so that while it
    traces, all tokens are computed in either case (and dropped from the graph where nobody asks for them)."""
    whole = held.whole() if gives_back or isinstance(held.x, torch.fx.Proxy) else None
    return whole if gives_back else held


@torch.fx.wrap
def _no_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool, what: str) -> Tensor:
    if attn_mask is not None or is_causal:
        raise InputError(f"{what} takes no attention mask")
    return x


def unmasked(x: Tensor | Held, attn_mask: Tensor | None, is_causal: bool, what: str) -> Tensor | Held:
    """x itself. Raises InputError where there is an attention mask; what torch.fx traces does so when it runs."""
    if isinstance(x, Held):
        return dataclasses.replace(x, x=_no_mask(x.x, attn_mask, is_causal, what))
    return _no_mask(x, attn_mask, is_causal, what)


def check_reentrant(x: Tensor | Held) -> None:
    """InputError where a block that holds tokens is computed inside a re-entrant checkpoint, which gives gradients to tensors alone."""
    x = x.x if isinstance(x, Held) else x
    if isinstance(x, Tensor) and x.requires_grad and not torch.is_grad_enabled():
        raise InputError("re-entrant checkpointing loses the gradient of merged tokens between blocks; use_reentrant=False is needed "
                         "(timm.layers.set_reentrant_ckpt(False))")
