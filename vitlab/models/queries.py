"""A decoder by queries: they join the tokens before a vision transformer's last blocks, and each then gives a class and
a mask.

*Your ViT is Secretly an Image Segmentation Model* (EoMT; Kerssies et al., CVPR 2025, arXiv 2503.19108, section 3). B
images, n patches on a grid of h x w, P prefix tokens, Q queries, D dim of the encoder, K classes.
"""
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from vitlab.models.families import RELATIVE, kind_of
from vitlab.models.join import join
from vitlab.models.support import attention_block, is_merged
from vitlab.runtime.files import require

UPSCALED = 4                                    # cells along a patch's side, of two steps that double
DEPTH, QUERIES = 3, 100                         # blocks with queries of a ViT-S or ViT-B, and queries, as published
INIT_STD = 0.02


class Upscale(nn.Sequential):
    """(B, D, h, w) -> (B, D, 2 h, 2 w)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2), nn.GELU(),
                         nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False),
                         LayerNorm2d(width))


class QueryDecoder(nn.Module):
    """Of the patches x and the Q queries, as the encoder's blocks and its last norm give them:

        mask_q = MLP(x_q) . upscale(upscale(x_patches))                                 (B, Q, 4 h, 4 w)
        logits_k = log sum_q softmax(W x_q)_k sigmoid(mask_q)                           (B, K, 4 h, 4 w)

    The softmax is over K classes and "none", which has no logits: a softmax of these is each class's share of the sum,
    so that the cross-entropy of pixels is that of their classes, as with other decoders. The paper also hides from a
    query, less and less while it trains, what is outside its mask (mask annealing), which is left out here.

    encoder: what gives the tokens, dense; the queries join them before its last `depth` blocks, which stay its own and
    are cut by plans; their tokens stay, as masks need every patch. Where patches are turned by their places (RoPE),
    queries are not, as class tokens are not. queries: Q. Raises InputError for attention with a bias by places, which
    queries have none of, where no block is before them, or where tokens are cut.
    """

    def __init__(self, embed_dim: int, num_classes: int, head_dim: int = 64, *, encoder: nn.Module, depth: int = DEPTH,
                 queries: int = QUERIES) -> None:
        super().__init__()
        count, last = len(encoder.blocks), attention_block(encoder.blocks[-1])
        require(1 <= depth < count and queries >= 1, f"{queries} queries in the last {depth} of {count} blocks; at "
                "least 1 in 1 is needed, and a block before")
        require(not is_merged(encoder), "queries join a dense encoder, but tokens of this one are cut; make a "
                "Segmenter of the dense one, and compress that")
        require(not kind_of(last.attn, RELATIVE), "queries have no place, by which this model's attention tells tokens "
                "apart; another decoder is needed")
        self.depth, self.num_queries = depth, queries
        join([*map(attention_block, encoder.blocks[-depth:])], queries, embed_dim)
        self.class_head = nn.Linear(embed_dim, num_classes + 1)
        self.mask_head = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim),
                                       nn.GELU(), nn.Linear(embed_dim, embed_dim))
        self.upscale = nn.Sequential(Upscale(embed_dim), Upscale(embed_dim))
        for linear in (self.class_head, self.mask_head[0], self.mask_head[2], self.mask_head[4]):
            trunc_normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)

    def answers(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What each query says of patches and queries (B, n + Q, D), normed: logits of the classes and, last, of "none"
        (B, Q, K + 1), and of its mask (B, Q, 4 h, 4 w)."""
        patches, asked = tokens.split((tokens.shape[1] - self.num_queries, self.num_queries), dim=1)
        cells = self.upscale(patches.transpose(1, 2).unflatten(2, grid))                # (B, D, 4 h, 4 w)
        masks = self.mask_head(asked) @ cells.flatten(2)                        # (B, Q, 16 n)
        return self.class_head(asked), masks.unflatten(2, cells.shape[2:])

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits of the cells of patches and queries (B, n + Q, D), normed; rows, columns of the patches. In float32,
        and each cell's largest sigmoid set apart: outside of all masks they are so small that half precision, and
        onnxruntime, have no digits of them."""
        classes, masks = self.answers(tokens, grid)
        classes = classes.softmax(dim=2)[:, :, :-1].transpose(1, 2)             # (B, K, Q)
        # log s(m), (B, Q, 16 n); F.logsigmoid would be written as the log of a sigmoid
        inside = -F.softplus(-masks.flatten(2).to(torch.promote_types(masks.dtype, torch.float32)))
        most = inside.detach().amax(dim=1, keepdim=True)
        scores = (classes.to(inside.dtype) @ (inside - most).exp()).to(inside.dtype)                    # (B, K, 16 n)
        return (scores.clamp(min=torch.finfo(scores.dtype).tiny).log() + most).unflatten(2, masks.shape[2:])
