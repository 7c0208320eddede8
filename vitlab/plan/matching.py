"""Merging by content, as pure functions: which tokens of an image are alike, what they become, where patches went.

Bipartite soft matching of *Token Merging: Your ViT But Faster* (arXiv 2210.09461, section 3), with three additions:
tokens that matter are protected, what stands for many patches counts as farther, and every patch keeps its place, so
that the whole grid can be given back. B images, n
tokens (no prefix tokens among them), W width of what is compared, r tokens that go. Sources are the tokens 0, 2, 4,
..., targets the others.
"""
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor


@torch.fx.wrap
def match(keys: Tensor, merged: int, importance: Tensor | None = None, sizes: Tensor | None = None
          ) -> tuple[Tensor, Tensor]:
    """Which sources go, and into which targets.

    keys (B, n, W), compared by cosine; importance (B, n): a source goes the later the larger it is (cosine less
    importance ranks them). sizes (B, n) in patches: of tokens that stand for s and t of them, 1 - cosine counts times
    sqrt(2 s t / (s + t)), which is 1 of single patches; s t / (s + t) is how a merge's squared error grows (Ward, J.
    Am. Stat. Assoc. 58, 1963), and its root is what was measured to be best (docs/log.md).

    Returns order (B, sources), first those that go, the most alike first, then those that stay, in order of place: what
    stays alike is no matter of rounding then, nor are the halves of the next matching. And into (B, r), the target of
    each that goes.
    """
    alike = F.normalize(keys, dim=-1)
    likeness = alike[:, ::2] @ alike[:, 1::2].transpose(1, 2)                   # (B, sources, targets)
    if sizes is not None:
        likeness = (likeness - 1) * ((1 / sizes[:, ::2, None] + 1 / sizes[:, None, 1::2]) / 2).rsqrt()
    best, partner = likeness.max(dim=-1)
    if importance is not None:
        best = best - importance[:, ::2]
    # Ranks by comparing all pairs, equals in order of place: no runtime sorts them otherwise, and none lacks the
    # operators.
    first, place = best[:, :, None], torch.arange(best.shape[1], device=best.device)
    rank = ((best[:, None] > first) | ((best[:, None] == first) & (place < place[:, None]))).sum(dim=2)  # (B, sources)
    stays = rank >= merged
    where = torch.where(stays, merged + stays.cumsum(dim=1) - 1, rank)
    order = (where[:, None] == place[:, None]).mul(place).sum(dim=2)
    return order, partner.gather(1, order[:, :merged])


def _flat(index: Tensor, count: int) -> Tensor:
    """Indices (B, k) into the rows of each image -> (B k) into those of all images, `count` rows each."""
    return (index + count * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


@torch.fx.wrap
def merge(x: Tensor, sizes: Tensor, order: Tensor, into: Tensor, by_product: bool = False) -> tuple[Tensor, Tensor]:
    """Each source that goes is averaged into its target, weighted by how many patches both stand for.

    x (B, n, D), sizes (B, n) in patches. Returns (B, n - r, D) and (B, n - r): the sources that stay, then the targets.
    by_product: sources are added to their targets by a product with a matrix of zeros and sizes, r n / 2 D
    multiply-adds more, for runtimes that compute scattered sums wrongly (TensorRT drops the reduction).
    """
    batch, count, dim = x.shape
    gone, targets = into.shape[1], count // 2
    # (B, sources, D)
    sources = x.reshape(-1, dim).index_select(0, _flat(2 * order, count)).unflatten(0, (-1, order.shape[1]))
    weight, of_target = sizes[:, ::2].gather(1, order), x[:, 1::2] * sizes[:, 1::2, None]
    if by_product:
        arriving = into[:, None] == torch.arange(targets, device=x.device)[:, None]         # (B, targets, r)
        arriving = arriving.to(of_target.dtype) * weight[:, None, :gone]
        total = sizes[:, 1::2] + arriving.sum(dim=2)
        summed = of_target + arriving @ sources[:, :gone].to(arriving.dtype)
    else:
        where = _flat(into, targets)
        total = sizes[:, 1::2].reshape(-1).index_add(0, where, weight[:, :gone].reshape(-1)).unflatten(
            0, (batch, targets))
        summed = of_target.flatten(0, 1).index_add(0, where, (sources[:, :gone] * weight[:, :gone, None]).flatten(0, 1)
                                                   ).unflatten(0, (batch, targets))
    means = (summed / total[:, :, None]).to(x.dtype)
    return torch.cat([sources[:, gone:], means], dim=1), torch.cat([weight[:, gone:], total], dim=1)


@torch.fx.wrap
def new_places(order: Tensor, into: Tensor, count: int) -> Tensor:
    """Where each of `count` tokens is after `merge`: (B, n), from 0."""
    batch, sources = order.shape
    stay = sources - into.shape[1]
    staying = torch.arange(stay, device=order.device).expand(batch, -1)
    places = torch.cat([stay + into, staying], dim=1)
    of_sources = (order[:, None] == torch.arange(sources, device=order.device)[:, None]).mul(places[:, None]).sum(dim=2)
    of_targets = torch.arange(stay, stay + count // 2, device=order.device).expand(batch, -1)
    token = torch.arange(count, device=order.device)
    return torch.cat([of_sources, of_targets], dim=1).index_select(1, token // 2 + token % 2 * sources)


@torch.fx.wrap
def give_back(x: Tensor, places: Tensor, num_prefix_tokens: int) -> Tensor:
    """Every patch takes the value of the token it went into: x (B, P + K, D), places (B, n) -> (B, P + n, D)."""
    prefix, rest = x.split((num_prefix_tokens, x.shape[1] - num_prefix_tokens), dim=1)
    given = rest.reshape(-1,
                         x.shape[2]).index_select(0, _flat(places, rest.shape[1])).unflatten(0, (-1, places.shape[1]))
    return torch.cat([prefix, given], dim=1)
