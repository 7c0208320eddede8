"""Cut the slice of the reference tensors that stands beside this file: what a clean clone checks.

    python tests/golden/cut.py REFERENCE            # the folder that holds pm_center, pm_merge and mdc.safetensors
"""
import json
import sys
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
BLOCKS = (0, 6, 11)             # whose matrices are kept
UNIT_BLOCKS = (0, 7)            # whose heads' means and neurons are kept
NEURONS = 8                     # of a block, those with the smallest and largest relevance and magnitude among them
IMAGES = 2                      # whose pruned logits are kept; token scores need all


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()       # noqa: SIM118


def dense_model(tensors: dict[str, Tensor], meta: dict[str, str], depth: int | None = None) -> nn.Module:
    """The reference's dense model, or one of its last `depth` blocks."""
    sizes = {key: int(meta[key])
             for key in ("img_size", "patch_size", "embed_dim", "num_heads", "depth", "num_classes")}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False,
                              **sizes | {"depth": depth or sizes["depth"]}).eval()
    first, named = sizes["depth"] - len(model.blocks), {k.removeprefix("dense."): v for k,
                                                        v in tensors.items() if k.startswith("dense.")}
    kept = {k.replace(f"blocks.{first + i}.", f"blocks.{i}."): v for i in range(len(model.blocks)) for k,
            v in named.items()
            if k.startswith(f"blocks.{first + i}.")}
    model.load_state_dict(kept | {k: v for k, v in named.items() if not k.startswith("blocks.")}, strict=depth is None)
    return model


def entering(model: nn.Module, images: Tensor, block: int) -> Tensor:
    """What enters a block (B, N, D)."""
    found: list[Tensor] = []
    handle = model.blocks[block].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return found[0]


def published_block(block: nn.Module, x: Tensor, merge: Tensor, recover: Tensor, mask: Tensor) -> Tensor:
    """Methods A6."""
    return recover @ block(merge @ x) + (1 - mask)[:, None] * x


def cut_center(tensors: dict[str, Tensor], meta: dict[str, str]) -> dict[str, Tensor]:
    """The last block and classifier, what enters the block in the dense model and in the pruned one, and what came of
    it."""
    dense, last, x = dense_model(tensors, meta), int(meta["depth"]) - 1, tensors["input"]
    state = dense.patch_embed(x[0, :IMAGES])
    state = torch.cat([dense.cls_token.expand(IMAGES, -1, -1), state], dim=1) + dense.pos_embed
    for index, block in enumerate(dense.blocks[:last]):
        state = published_block(block, state, *(tensors[f"pruned.blocks.{index}.attn.{name}"]
                                                for name in ("merge_matrix", "recover_matrix", "token_mask")))
    kept = {k: v for k, v in tensors.items() if k.startswith((f"dense.blocks.{last}.", "dense.norm.", "dense.head."))}
    return kept | {"entering_last_block": torch.stack([entering(dense, batch, last) for batch in x]),
                   "target": tensors["target"], "pruned_entering_last_block": state.detach(),
                   "dense_logits": tensors["dense_logits"], "pruned_logits": tensors["pruned_logits"][:IMAGES]}


def cut_merging(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Token scores and masks of all blocks, matrices of some."""
    depth = len(tensors["token_scores"])
    masks = torch.stack([tensors[f"pruned.blocks.{i}.attn.token_mask"] for i in range(depth)])
    kept = {"token_scores": tensors["token_scores"], "token_masks": masks.to(torch.uint8)}
    for index in BLOCKS:
        kept |= {f"{part}.{index}": tensors[f"pruned.blocks.{index}.attn.{part}"]
                 for part in ("merge_matrix", "recover_matrix")}
    return {f"{name}.{key}": value for key, value in kept.items()}


def cut_units(tensors: dict[str, Tensor], meta: dict[str, str]) -> dict[str, Tensor]:
    """All scores, masks, policies and costs; of some blocks the heads' means over their width and a few neurons. Scores
    are scaled within a layer, so the neurons of the extremes are among them."""
    dense, heads, hidden = dense_model(tensors, meta), {}, {}
    for index in UNIT_BLOCKS:
        dense.blocks[index].attn.norm.register_forward_hook(lambda m, i, out, at=index: heads.__setitem__(at, out))
        dense.blocks[index].mlp.act.register_forward_hook(lambda m, i, out, at=index: hidden.__setitem__(at, out))
    with torch.no_grad():
        probabilities = dense(tensors["input"]).softmax(dim=1)
    kept = {k: tensors[k] for k in tensors if k.startswith(("hsic.", "policy")) and k != "policy_logits"}
    kept |= {k: tensors[k] for k in ("head_score", "neuron_score", "dense_logits")}
    kept |= {k: tensors[k].to(torch.uint8) for k in ("head_mask", "neuron_mask")}
    for index in UNIT_BLOCKS:
        magnitude = hidden[index].abs().sum(dim=(0, 1))
        related = relevance_slowly(hidden[index], probabilities)
        chosen = {int(v) for values in (magnitude, related) for v in (values.argmin(), values.argmax())}
        chosen = torch.tensor(sorted([*chosen,
                                      *(m for m in range(5, len(magnitude), 31) if m not in chosen)][:NEURONS]))
        kept |= {f"head_means.{index}": heads[index].unflatten(2, (int(meta["num_heads"]), -1)).mean(dim=3),
                 f"neurons.{index}": hidden[index][:, :, chosen].contiguous(), f"neuron_numbers.{index}": chosen}
    return {f"mdc.{key}": value for key, value in kept.items()}


def relevance_slowly(hidden: Tensor, probabilities: Tensor) -> Tensor:
    """HSIC of each neuron with the softmax output (methods B1), one after the other: hidden (B, N, M) -> (M)."""
    count = len(hidden)
    center = torch.eye(count).double() - 1 / count
    output = center @ (probabilities @ probabilities.T).double() @ center
    found = []
    for m in range(hidden.shape[2]):
        squares = torch.cdist(hidden[:, :, m].double(), hidden[:, :, m].double())**2
        kernel = sum(torch.exp(-squares / (2 * sigma**2)) for sigma in (1, 2, 4, 8, 16)) / 5
        found.append((center @ kernel @ center * output).sum())
    return torch.stack(found)


def cut(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the slice."""
    kept, about = {}, {}
    for name in ("pm_center", "pm_merge", "mdc"):
        tensors, meta = read(folder / f"{name}.safetensors")
        about[name] = json.dumps(meta)
        kept |= cut_units(tensors, meta) if name == "mdc" else cut_merging(name, tensors)
        if name == "pm_center":
            kept |= {f"{name}.{key}": value for key, value in cut_center(tensors, meta).items()}
    return {key: value.contiguous() for key, value in kept.items()}, about


if __name__ == "__main__":
    tensors, about = cut(Path(sys.argv[1]))
    save_file(tensors, HERE / "reference.safetensors", metadata=about)
