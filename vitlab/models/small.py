"""Two small vision transformers of vitlab's own for 32 x 32 images; importing this makes timm know their names."""
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

_SMALL_CFG = {"input_size": (3, 32, 32), "num_classes": 10, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
              "interpolation": "bicubic", "fixed_input_size": True, "first_conv": "patch_embed.proj",
              "classifier": "head"}
default_cfgs = generate_default_cfgs({"vit_nano_patch4_32": _SMALL_CFG, "vit_micro_patch4_32": _SMALL_CFG})


def _small(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    size = {"img_size": 32, "patch_size": 4, **kwargs}
    return build_model_with_cfg(VisionTransformer, name, pretrained, **size)


@register_model
def vit_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """8 x 8 patches, 64 wide, 6 blocks, 4 heads: 0.3 M parameters, 0.02 GMACs. For the digits."""
    return _small("vit_nano_patch4_32", pretrained, **{"embed_dim": 64, "depth": 6, "num_heads": 4, **kwargs})


@register_model
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """64 tokens, 96 wide, 6 blocks, 3 heads: 0.7 M parameters, 0.05 GMACs. For CIFAR-10."""
    return _small("vit_micro_patch4_32", pretrained, **{"embed_dim": 96, "depth": 6, "num_heads": 3, **kwargs})
