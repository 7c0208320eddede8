"""What stands for an attention or an MLP that is left out of its block."""
import torch
from torch import Tensor, nn


class LeftOut(nn.Module):
    """An attention or an MLP of which no unit is left: a constant, (B, N, D) -> (B, N, D). As cut it is the bias of the
    layer that mixed its units, which is what the layer gives of units that are all 0; a refit makes it the mean of what
    was there; or it is nothing, 0. Nothing is multiplied."""

    in_features = 0                             # as of the layer that mixed its units

    def __init__(self, mixing: nn.Linear, width: int, nothing: bool = False) -> None:
        """width: inputs that a unit had."""
        super().__init__()
        with torch.no_grad():
            bias = mixing.weight.new_zeros(mixing.out_features) if mixing.bias is None else mixing.bias.clone()
        self.bias = None if nothing else nn.Parameter(bias, requires_grad=mixing.weight.requires_grad)
        self.width, self.out_features = width, mixing.out_features
        self.train(mixing.training)

    def extra_repr(self) -> str:
        return "nothing" if self.bias is None else f"{self.out_features}"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None,
                shared_rel_pos_bias: Tensor | None = None, shared_rel_pos: Tensor | None = None) -> Tensor:
        zeros = torch.zeros_like(x)             # no view of the bias: what comes next may write into it
        return zeros if self.bias is None else zeros + self.bias
