"""A decoder by queries: they join the tokens before a vision transformer's last blocks, and each then gives a class and
a mask.

*Your ViT is Secretly an Image Segmentation Model* (EoMT; Kerssies et al., CVPR 2025, arXiv 2503.19108, section 3). B
images, n patches on a grid of h x w, P prefix tokens, Q queries, D dim of the encoder, K classes.
"""
import copy

import torch
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from vitlab.models.families import BLOCKS, RELATIVE, ROTARY, kind_of
from vitlab.models.support import attention_block
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
    """The last blocks of a vision transformer, on its tokens and Q learned queries:

        x = norm(Block_L(... Block_1([queries, tokens])))                               (B, Q + P + n, D)
        mask_q = MLP(x_q) . upscale(upscale(x_patches))                                 (B, Q, 4 h, 4 w)
        logits_k = log sum_q softmax(W x_q)_k sigmoid(mask_q)                           (B, K, 4 h, 4 w)

    The softmax is over K classes and "none", which has no logits: a softmax of these is each class's share of the sum,
    so that the cross-entropy of pixels trains them, as it does other decoders. The paper trains by matching queries to
    masks, and hides from a query, less and less, what is outside its mask (mask annealing); both are left out here.

    encoder: what gives the tokens, dense, without the blocks that are meant: they have its last one's sizes and begin
    as its copies (`with_queries` begins with the model's own), are no part of a plan, and stay whole. Its last norm
    moves here. depth: L; queries: Q. Raises InputError for attention that knows places, which queries have none of.
    """

    def __init__(self, embed_dim: int, num_classes: int, head_dim: int = 64, *, encoder: nn.Module, depth: int = DEPTH,
                 queries: int = QUERIES) -> None:
        super().__init__()
        last = attention_block(encoder.blocks[-1])
        require(depth >= 1 and queries >= 1, f"{queries} queries in {depth} blocks; at least one of each is needed")
        require(kind_of(last, BLOCKS), "queries join the blocks of a model that is not deployed")
        require(not kind_of(last.attn, (*ROTARY, *RELATIVE)),
                "queries have no place, by which this model's attention turns queries and keys or tells tokens apart; "
                "another decoder is needed")
        self.num_classes, self.num_queries = num_classes, queries
        self.queries = nn.Parameter(torch.randn(1, queries, embed_dim))
        self.blocks = nn.ModuleList(copy.deepcopy(last) for _ in range(depth))
        self.norm = encoder.fc_norm if isinstance(encoder.norm, nn.Identity) else encoder.norm
        encoder.norm, encoder.fc_norm = nn.Identity(), nn.Identity()
        self.class_head = nn.Linear(embed_dim, num_classes + 1)
        self.mask_head = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim),
                                       nn.GELU(), nn.Linear(embed_dim, embed_dim))
        self.upscale = nn.Sequential(Upscale(embed_dim), Upscale(embed_dim))
        for linear in (self.class_head, self.mask_head[0], self.mask_head[2], self.mask_head[4]):
            trunc_normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, P + n, D) as the encoder's last block gives them, and rows and columns of the patches."""
        x = torch.cat([self.queries.expand(tokens.shape[0], -1, -1), tokens], dim=1)        # (B, Q + P + n, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        asked, patches = x[:, :self.num_queries], x[:, -grid[0] * grid[1]:]
        cells = self.upscale(patches.transpose(1, 2).unflatten(2, grid))                # (B, D, 4 h, 4 w)
        masks = (self.mask_head(asked) @ cells.flatten(2)).sigmoid()                    # (B, Q, 16 n)
        classes = self.class_head(asked).softmax(dim=2)[:, :, :-1]                      # (B, Q, K)
        scores = classes.transpose(1, 2) @ masks                                        # (B, K, 16 n)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log().unflatten(2, cells.shape[2:])

    def no_weight_decay(self) -> set[str]:
        return {"queries"}
