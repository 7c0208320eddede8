"""forward_intermediates of models whose blocks hand on merged tokens: every patch in its place after every block."""
import copy
from typing import Any

from torch import Tensor, nn

from vitlab import matching
from vitlab.models.match import Merged
from vitlab.models.merge import ReconstructTokens, SpanLast, Spanned


class _Shown(nn.Module):
    """Gives out a block's tokens as a whole grid, and hands on what really left it; inside a span, the grid that its last block's
    reconstruct matrix would give here."""

    def __init__(self, block: nn.Module, back: ReconstructTokens | None, handed: dict[str, Any]) -> None:
        super().__init__()
        self.block, self.back, self.handed = block, back, handed

    def forward(self, x: Tensor) -> Tensor:
        given = self.block(self.handed.pop("state", x))
        if not isinstance(given, (Merged, Spanned)):
            return given
        self.handed["state"] = given
        return self.back(given) if isinstance(given, Spanned) else matching.give_back(given.x, given.places, self.block.num_prefix_tokens)


def forward_intermediates(model: nn.Module, *args: Any, **settings: Any) -> Any:
    """timm's forward_intermediates, with every patch in its place after every block."""
    view, handed, shown, back = copy.copy(model), {}, [], None
    view.grad_checkpointing = False                     # a block that is computed again would be handed the wrong state
    for block in list(model.blocks)[::-1]:
        back = block.tokens if isinstance(block, SpanLast) else back
        shown.append(_Shown(block, back, handed))
    view._modules = {**model._modules, "blocks": nn.Sequential(*shown[::-1])}
    return type(model).forward_intermediates(view, *args, **settings)
