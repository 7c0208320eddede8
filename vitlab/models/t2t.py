"""T2T-ViT: tokens of an image are split softly, with overlap, and mixed by attention, before timm's own blocks.

*Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet* (Yuan, Chen, Wang, Yu, Shi, Jiang, Tay,
Feng and Yan, ICCV 2021, arXiv 2101.11986, section 3.1 and table 1). Importing this makes timm know the names
t2t_vit_7 to t2t_vit_24 (performer) and t2t_vit_t_14 to t2t_vit_t_24 (transformer), without pretrained weights.
B images, N tokens, D dim.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp, PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SPLITS = ({"kernel_size": 7, "stride": 4, "padding": 2}, *[{"kernel_size": 3, "stride": 2, "padding": 1}] * 2)
STRIDE, WIDTH = 16, 64                          # of all splits together; of the tokens between them
RANDOM = 32                                     # random features of a performer
SIZES = {"7": (256, 7, 4, 2.0), "10": (256, 10, 4, 2.0), "12": (256, 12, 4, 2.0), "14": (384, 14, 6, 3.0),
         "19": (448, 19, 7, 3.0), "24": (512, 24, 8, 3.0)}      # dim, blocks, heads, neurons / dim
_CFG = {"input_size": (3, 224, 224), "num_classes": 1000, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.9, "interpolation": "bicubic", "fixed_input_size": True, "first_conv": (), "classifier": "head"}
default_cfgs = generate_default_cfgs({f"t2t_vit_{name}": _CFG for name in (*SIZES, "t_14", "t_19", "t_24")})


class TokenTransformer(nn.Module):
    """(B, N, dim) -> (B, N, width): one head of attention whose residual is its values, as widths differ; an MLP."""

    def __init__(self, dim: int, width: int, **dd: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, **dd), nn.LayerNorm(width, **dd)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * width, bias=False, **dd),
                                   "proj": nn.Linear(width, width, **dd)})
        self.mlp = Mlp(width, width, **dd)
        self.scale = dim ** -0.5                # as published: of the input's width, not the queries'

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)                  # each (B, N, width)
        x = v + self.attn["proj"](F.scaled_dot_product_attention(q, k, v, scale=self.scale))
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """(B, N, dim) -> (B, N, width), as TokenTransformer, in time linear in N: the softmax's kernel by positive random
    features, *Rethinking Attention with Performers* (Choromanski et al., ICLR 2021, arXiv 2009.14794, lemma 1)."""

    def __init__(self, dim: int, width: int, **dd: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, **dd), nn.LayerNorm(width, **dd)
        self.kqv, self.proj = nn.Linear(dim, 3 * width, **dd), nn.Linear(width, width, **dd)
        self.mlp = Mlp(width, width, **dd)
        rows = nn.init.orthogonal_(torch.empty(RANDOM, width, **dd)) * RANDOM ** 0.5
        self.w = nn.Parameter(rows, requires_grad=False)                            # (R, width), never trained

    def features(self, x: Tensor) -> Tensor:
        """exp(w x - |x|^2 / 2) / sqrt(R): (B, N, width) -> (B, N, R), in float32."""
        x = x.float()
        return torch.exp(x @ self.w.float().T - x.square().sum(-1, keepdim=True) / 2) / RANDOM ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)                          # each (B, N, width)
        k, q = self.features(k), self.features(q)
        mixed = q @ (k.transpose(1, 2) @ v.float())                                 # (B, N, width)
        whole = q @ k.sum(dim=1).unsqueeze(-1)                                      # (B, N, 1)
        x = v + self.proj((mixed / (whole + 1e-8)).to(v.dtype))
        return x + self.mlp(self.norm2(x))


class TokensToToken(PatchEmbed):
    """Images (B, C, H, W) -> tokens (B, H / 16 * W / 16, D): three soft splits (unfold), the first two of which are
    mixed by attention."""

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = STRIDE,
                 in_chans: int = 3, embed_dim: int = 768, *, mixes: type[nn.Module] = TokenPerformer,
                 dynamic_img_pad: bool = False, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, **dd)
        if self.patch_size != (STRIDE, STRIDE) or any(side % STRIDE for side in self.img_size) or dynamic_img_pad:
            raise ValueError(f"tokens of T2T-ViT stand {STRIDE} pixels apart, and images are multiples of that; "
                             f"img_size is {self.img_size}, patch_size {self.patch_size}")
        self.attention1 = mixes(in_chans * SPLITS[0]["kernel_size"] ** 2, WIDTH, **dd)
        self.attention2 = mixes(WIDTH * SPLITS[1]["kernel_size"] ** 2, WIDTH, **dd)
        self.proj = nn.Linear(WIDTH * SPLITS[2]["kernel_size"] ** 2, embed_dim, bias=bias, **dd)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        if patch_size not in (None, STRIDE, self.patch_size):
            raise ValueError(f"tokens of T2T-ViT stand {STRIDE} pixels apart, not {patch_size}")
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != tuple(self.img_size):
            raise ValueError(f"images are {tuple(x.shape[2:])}, the model is for {tuple(self.img_size)}")
        rows, columns = x.shape[2:]
        for split, mix in zip(SPLITS, (self.attention1, self.attention2, None)):
            x = F.unfold(x, **split).transpose(1, 2)                                # (B, N, C k^2)
            if mix is not None:
                rows, columns = -(-rows // split["stride"]), -(-columns // split["stride"])
                x = mix(x).transpose(1, 2).unflatten(2, (rows, columns))            # (B, width, rows, columns)
        return self.proj(x)


def _sinusoid(shape: torch.Size) -> Tensor:
    """Position embeddings (1, N, D) that are not trained: sin and cos of n / 10000^(2 floor(d / 2) / D), in turn."""
    pair = torch.arange(shape[2]) // 2
    angles = torch.arange(shape[1]).unsqueeze(1) / 10000 ** (2 * pair / shape[2]).double()          # (N, D)
    return torch.where(torch.arange(shape[2]) % 2 == 0, angles.sin(), angles.cos()).float().unsqueeze(0)


class T2TViT(VisionTransformer):
    """timm's VisionTransformer on these tokens."""

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if not self.pos_embed.is_meta:
            self.pos_embed.data.copy_(_sinusoid(self.pos_embed.shape))
        self.pos_embed.requires_grad_(False)


def _entry(name: str, mixes: type[nn.Module]) -> Callable[..., T2TViT]:
    """What timm registers under a name."""
    dim, depth, heads, ratio = SIZES[name.split("_")[-1]]

    def build(pretrained: bool = False, **kwargs: Any) -> T2TViT:
        sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": ratio, "qkv_bias": False}
        return build_model_with_cfg(T2TViT, build.__name__, pretrained, **{
            **sizes, "norm_layer": partial(LayerNorm, eps=1e-5), "embed_layer": partial(TokensToToken, mixes=mixes),
            **kwargs})
    build.__name__ = f"t2t_vit_{name}"
    return build


for _name in SIZES:
    register_model(_entry(_name, TokenPerformer))
for _name in ("t_14", "t_19", "t_24"):
    register_model(_entry(_name, TokenTransformer))
