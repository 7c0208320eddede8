"""timm's parallel blocks, whose attention and MLP read the same norm of the same tokens, in parts of their own.

*Scaling Vision Transformers to 22 Billion Parameters* (Dehghani et al., ICML 2023, arXiv 2302.05442), section 2. timm
has one linear for queries, keys, values and neurons, and may have one that mixes heads and neurons: their rows and
columns are the linears of an attention and of an MLP. D dim, M neurons.
"""
import copy
import re

import torch
from timm.layers import Attention, DiffAttention, Mlp
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor, nn

from vitlab.models.unfilled import sizes_alone

PARALLEL = (ParallelScalingBlock, DiffParallelScalingBlock)
JOINED = re.compile(r"(.*\bblocks\.\d+\.|)in_proj\.weight")     # the name of what they alone have
# where timm's other tensors stand in parts, by how their names begin
PLACES = {"ls.": ("ls1.", "ls2."), "in_norm.": ("norm1.", "norm2."), "attn_out_proj.": ("attn.proj.",),
          "mlp_out_proj.": ("mlp.fc2.",), "mlp_bias": ("mlp.fc1.bias",), "q_norm.": ("attn.q_norm.",),
          "k_norm.": ("attn.k_norm.",), "sub_norm.": ("attn.sub_norm.",), "lambda_": ("attn.lambda_",)}
# what an attention has of its block besides
OF_BLOCK = ("q_norm", "k_norm", "attn_drop", "fused_attn")
OF_DIFFERENTIAL = ("attn_drop_p", "sub_norm", "dual_lambda", "lambda_init", *(
    f"lambda_{each}" for each in ("a", "b", "q1", "k1", "q2", "k2")))


class ParallelBlock(Block):
    """timm's Block whose MLP reads what its attention reads: x + Attn(norm1(x)) + MLP(norm2(x))."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return x + self.drop_path1(self.ls1(attended)) + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def state_in_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which the tensors of timm's parallel blocks are those of an attention and an MLP; without such
    blocks the same."""
    found = dict(state)
    for prefix in [match[1] for match in map(JOINED.fullmatch, state) if match]:
        block = {name.removeprefix(prefix): found.pop(name) for name in state if name.startswith(prefix)}
        neurons = len(block["in_proj.weight"]) - 3 * block["in_proj.weight"].shape[1]
        made: dict[str, Tensor] = {}
        for name, tensor in block.items():
            kind = name.rpartition(".")[2]
            if name.startswith("in_proj."):             # (M + 3 D, D): neurons, then queries, keys, values
                made |= {f"mlp.fc1.{kind}": tensor[:neurons], f"attn.qkv.{kind}": tensor[neurons:]}
            elif name == "out_proj.weight":             # (D, D + M): heads, then neurons
                made |= {"attn.proj.weight": tensor[:, :-neurons], "mlp.fc2.weight": tensor[:, -neurons:]}
            elif name == "out_proj.bias":
                made |= {"attn.proj.bias": tensor, "mlp.fc2.bias": torch.zeros_like(tensor)}
            else:
                start = next((start for start in PLACES if name.startswith(start)), "")
                made |= {name.replace(start, place, 1): tensor for place in PLACES.get(start, ("",))}
        found |= {prefix + name: tensor.clone() for name, tensor in made.items()}
    return found


def _block_in_parts(block: nn.Module) -> nn.Module:
    dim, differs = block.in_proj.in_features, isinstance(block, DiffParallelScalingBlock)
    last = block.mlp_out_proj if block.out_proj is None else block.out_proj
    with sizes_alone():
        made = ParallelBlock(dim, block.num_heads, qkv_bias=block.in_proj.bias is not None,
                             proj_bias=last.bias is not None, attn_layer=DiffAttention if differs else Attention)
        made.mlp = Mlp(dim, block.in_split[0], bias=(True, last.bias is not None))
    made.norm1, made.ls1, made.drop_path1 = block.in_norm, block.ls, block.drop_path
    made.norm2, made.ls2, made.drop_path2 = map(copy.deepcopy, (block.in_norm, block.ls, block.drop_path))
    made.mlp.act, made.mlp.drop1 = block.mlp_act, block.mlp_drop
    for name in OF_BLOCK + (OF_DIFFERENTIAL if differs else ()):
        setattr(made.attn, name, getattr(block, name))
    made.load_state_dict(state_in_parts(block.state_dict()), assign=True)
    return made.requires_grad_(last.weight.requires_grad).train(block.training)


def in_parts(model: nn.Module) -> nn.Module:
    """A copy of a timm VisionTransformer with a `ParallelBlock` in place of each of timm's parallel blocks, which gives
    the same but for rounding; in training, stochastic depth and LayerScale are of each part. Without such blocks the
    model itself."""
    if not any(isinstance(block, PARALLEL) for block in getattr(model, "blocks", ())):
        return model
    model = copy.deepcopy(model)
    for index, block in enumerate(model.blocks):
        if isinstance(block, PARALLEL):
            model.blocks[index] = _block_in_parts(block)
    return model
