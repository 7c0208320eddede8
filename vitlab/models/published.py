"""Published Prune and Merge checkpoints (methods A9), read without running pickled code."""
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from vitlab.models import compress, shape_of
from vitlab.models.published_segmenter import published_parts
from vitlab.models.segmenter import Segmenter
from vitlab.models.weights import load_state, read_file, state_of, unwrapped
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import MergeReconstruct
from vitlab.runtime.files import InputError, require

NAMES = {"merge_matrix": "merge_matrix", "reconstruct_matrix": "recover_matrix", "token_mask": "token_mask"}


def is_published(content: dict[str, Any]) -> bool:
    """Whether a read file has the published layout."""
    return isinstance(content.get("model"), dict) and any(k.endswith(".attn.merge_matrix") for k in content["model"])


def _rule(merge: Tensor, mask: Tensor, prefix: int, index: int, path: str | Path) -> MergeReconstruct:
    """The token rule of a trained merge matrix: each patch is in the row where its entry is largest."""
    patches, pruned = merge[prefix:, prefix:], mask[prefix:] == 0               # (C - P, n), (n)
    if len(patches) > patches.shape[1]:
        raise InputError(f"{path}: block {index}: merge_matrix has {len(patches)} rows for {patches.shape[1]} patches")
    regions = torch.full((patches.shape[1],), -1)
    if len(patches):
        regions = torch.where(pruned, -1, patches.abs().argmax(dim=0))
        # Every row is a token and needs a patch to stand for it; a trained row may be no patch's largest entry, and a
        # row of zeros has pruned patches alone. The assignment gives each row a patch of its own, large entries first.
        rows, own = linear_sum_assignment(patches.abs().numpy(), maximize=True)
        missing = set(range(len(patches))) - set(regions.tolist())
        if missing:
            regions[torch.from_numpy(own)] = torch.from_numpy(rows)
    weights = torch.where(pruned, 0, patches[regions.clamp(min=0), torch.arange(len(regions))] if len(patches) else 0)
    return MergeReconstruct(regions=tuple(regions.tolist()), weights=tuple(weights.tolist()),
                            pruned=tuple(pruned.nonzero().flatten().tolist()))


def load_published(path: str | Path, dense: nn.Module) -> tuple[nn.Module, CompressionPlan]:
    """(compressed model, plan) of a published .pth for the dense model of that size; weights are taken from the file.

    Raises InputError naming the file and key where it has another layout, holds more than weights, or doesn't fit.
    """
    content = read_file(path)
    require(is_published(content), f"{path}: not a Prune and Merge checkpoint; it holds no blocks.i.attn.merge_matrix "
            "under \"model\"")
    return _compressed(unwrapped(state_of(content, path), dense.state_dict(), path)[0], dense, path)


def load_segmenter(path: str | Path) -> tuple[Segmenter, CompressionPlan]:
    """(Segmenter, plan) of a published checkpoint.pth with variant.yml beside it: dense, or with merge and reconstruct
    matrices in the blocks of its encoder, some or all. Raises InputError naming the file and key."""
    model, state, path = published_parts(path)
    if any(key.endswith(".attn.merge_matrix") for key in state):
        return _compressed(state, model, path, "encoder.")
    load_state(model, state, path)
    return model.eval(), CompressionPlan.empty(shape_of(model))


def _compressed(state: dict[str, Tensor], dense: nn.Module, path: Path | str,
                where: str = "") -> tuple[nn.Module, CompressionPlan]:
    """(compressed model, plan) of a published state dict, whose blocks' names begin with `where`; of an encoder's
    blocks some may have no matrices."""
    state, shape = dict(state), shape_of(dense)
    blocks, renamed = [], {}
    for index in range(shape.depth):
        prefix = f"{where}blocks.{index}."
        matrices = {own: state.pop(f"{prefix}attn.{theirs}", None) for own, theirs in NAMES.items()}
        state.pop(f"{prefix}attn.bias", None)                                   # unused in the forward
        if where and all(matrix is None for matrix in matrices.values()):
            blocks.append(BlockPlan())
            continue
        missing = [NAMES[k] for k, v in matrices.items() if v is None]
        if missing:
            raise InputError(f"{path}: {prefix}attn.{missing[0]} is missing")
        merge, reconstruct, mask = (matrices[k].float() for k in NAMES)
        tokens, rows = shape.num_tokens, reconstruct.shape[-1] if reconstruct.dim() else 0
        if merge.shape != (rows, tokens) or reconstruct.shape != (tokens, rows) or mask.flatten().shape != (tokens,):
            raise InputError(f"{path}: {prefix}attn.merge_matrix {tuple(merge.shape)}, recover_matrix "
                             f"{tuple(reconstruct.shape)} and token_mask {tuple(mask.shape)} don't fit {tokens} tokens")
        blocks.append(BlockPlan(tokens=_rule(merge, mask.flatten(), shape.num_prefix_tokens, index, path)))
        renamed |= {f"{prefix}tokens.{k}": v.flatten() if k == "token_mask" else v for k, v in matrices.items()}
    plan = CompressionPlan(shape=shape, blocks=tuple(blocks),
                           made_by={"method": "prune_and_merge", "read_from": Path(path).name})
    model = compress(dense, plan)
    merging = {f"{where}blocks.{index}." for index, block in enumerate(blocks) if block.tokens is not None}
    for key, value in state.items():
        prefix = next((each for each in merging if key.startswith(each)), None)
        renamed[key if prefix is None else f"{prefix}block.{key.removeprefix(prefix)}"] = value
    load_state(model, renamed, path)
    return model.eval(), plan
