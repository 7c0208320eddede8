"""What stands before and after the blocks of timm's families, as far as it is more than a class token first and a norm
last. B images, N tokens, P prefix tokens, n = h w patches, D width, M neurons.
"""
import re

import torch
from timm.layers import PatchEmbed
from timm.models.cait import Cait
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.files import require

PAIRS = re.compile("clip|pe_core")              # in timm's names of models and weights of images with texts

def stem_macs(embed: nn.Module) -> int:
    """MACs per image of a patch embedding that is more than one convolution; 0 for a plain one."""
    if type(embed) is PatchEmbed:
        return 0
    moved = {name: tensor.to("meta") for name, tensor in embed.state_dict().items()}
    images = torch.empty(1, getattr(embed, "in_chans", 3), *embed.img_size, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        torch.func.functional_call(embed, moved, images)
    return counter.get_total_flops() // 2


def prefix_of(model: nn.Module) -> int:
    """Tokens before the patches in its blocks; class tokens that come in after them are none."""
    return 0 if isinstance(model, Cait) else getattr(model, "num_prefix_tokens", 0)


def tokens_of(model: nn.Module) -> int:
    """Of an image, N: prefix tokens and patches, after which queries come that have joined."""
    return prefix_of(model) + model.patch_embed.num_patches


def class_token(model: nn.Module) -> bool:
    """Whether the first token in its blocks is one."""
    return prefix_of(model) > 0 and model.cls_token is not None


def pool_of(model: nn.Module) -> str:
    """How one vector is made of what the last block gives: timm's word, but where class tokens look at all of it."""
    return "class_attention" if isinstance(model, Cait) and model.global_pool == POOL_TOKEN else model.global_pool


def ended(model: nn.Module, x: Tensor) -> Tensor:
    """What timm's forward_features makes of what the last block gives, (B, N, D) or, of SAM, (B, h, w, D)."""
    if isinstance(model, VisionTransformerSAM):
        return model.neck((x.unflatten(1, model.patch_embed.grid_size) if x.dim() == 3 else x).permute(0, 3, 1, 2))
    return model.norm(model.forward_cls(x) if getattr(model, "blocks_token_only", None) is not None else x)


def end_macs(model: nn.Module) -> int:
    """MACs per image of what stands between the blocks and the classifier, and is more than a norm: SAM's convolutions
    (h w for each weight), or Cait's blocks, in which a class token asks n patches and itself, 2 D^2 (n + 2) + 2 (n + 1)
    D + 2 D M each."""
    n, dim = model.patch_embed.num_patches, model.embed_dim
    neck, asking = getattr(model, "neck", None) or nn.Module(), getattr(model, "blocks_token_only", None) or ()
    return n * sum(each.weight.numel() for each in neck.modules() if isinstance(each, nn.Conv2d)) + sum(
        2 * dim * (dim * (n + 2) + n + 1 + block.mlp.fc1.out_features) for block in asking)


def without_end(model: nn.Module) -> nn.Module:
    """The model itself, which gives tokens as its last block leaves them, normed; what looked at them (Cait's class
    tokens) leaves it, as timm's prune_intermediate_layers does."""
    if getattr(model, "blocks_token_only", None) is not None:
        model.blocks_token_only, model.cls_token, model.num_prefix_tokens = None, None, 0
    return model


def as_tokens(given: Tensor) -> Tensor:
    """What timm's forward_features gives, (B, P + n, D) or, of SAM, (B, D, h, w), as (B, P + n, D)."""
    return given.flatten(2).mT if given.dim() == 4 else given


def resize(model: nn.Module, size: tuple[int, int]) -> None:
    """Make a model one for images of another size (height, width). Raises InputError where timm can't."""
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    else:
        own = tuple(model.patch_embed.img_size)
        require(own == tuple(size), f"images of {size[0]} x {size[1]}, but {type(model).__name__} keeps the size that "
                f"it was made for; {own[0]} x {own[1]} is needed")


def classifier(model: nn.Module) -> nn.Module:
    """The linear that gives logits, or what stands in its place."""
    return getattr(model.head, "fc", model.head)


def as_projection(model: nn.Module) -> nn.Module:
    """The model itself, which has no classes from now on: its head gives features. timm's reset_classifier gives it
    another head and classes again."""
    model.num_classes = 0
    return model


def is_projection(model: nn.Module) -> bool:
    """Whether there is a head, but no classes."""
    return not model.num_classes and not isinstance(classifier(model), nn.Identity)


def projects(model: nn.Module, loaded: bool = False) -> bool:
    """Whether the head of a model that timm made is a projection: of one trained on images with texts, by its name and
    the tag of its weights (PAIRS), that was not fine-tuned for classes since and gives as many numbers; or, of weights
    that are loaded, one without a bias, which timm then fills with zeros."""
    told = model.pretrained_cfg
    name, tag = (str(told.get(key) or "") for key in ("architecture", "tag"))
    if not PAIRS.search(f"{name}.{tag}") or not isinstance(model.head, nn.Linear):
        return False
    own = "_ft_" not in tag and model.head.out_features == told.get("num_classes")
    return own or loaded and not model.head.bias.any()
