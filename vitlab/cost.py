"""Cost of a (shape, plan): multiply-adds (MACs) per image, by part, as exact integers; and a model's parameters by part.

One MAC is two FLOPs; the papers write FLOPs for MACs. Everything that is multiplied counts, the merge, reconstruct and
fold products too; form "published" leaves those out, as the tables of arXiv 2503.23455 do.
"""
from torch import nn

from vitlab.files import InputError
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.shape import POOL_TOKEN, ViTShape

FORMS = ("deployed", "training", "published")
PARTS = ("patch_embed", "qkv", "attention", "proj", "mlp", "merge", "reconstruct", "fold", "classifier")


def _sizes(shape: ViTShape, block: BlockPlan) -> tuple[int, int, int, int]:
    """(C, p, attention width, neurons): merged tokens, tokens carried around the block, kept heads * d, kept neurons."""
    heads = shape.num_heads if block.heads is None else len(block.heads)
    neurons = shape.num_neurons if block.neurons is None else len(block.neurons)
    merged = shape.num_patches if block.tokens is None else block.tokens.num_merged
    carried = 0 if block.tokens is None else len(block.tokens.pruned)
    return shape.num_prefix_tokens + merged, carried, heads * shape.head_dim, neurons


def macs(plan: CompressionPlan, form: str = "deployed") -> dict[str, int]:
    """MACs per image by part (PARTS), and their sum under "total". Raises InputError for an unknown form.

    Per block with C tokens, attention width w, M neurons: qkv 3 C D w, attention 2 C^2 w, proj C w D, mlp 2 C D M.
    form "training" adds C N D for each merge and each reconstruct; "deployed" adds the folded products instead:
    (C' + p') (C + p) D between two blocks, p tokens carried around them.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is not known; known are {list(FORMS)}")
    shape, dim = plan.shape, plan.shape.embed_dim
    parts = dict.fromkeys(PARTS, 0)
    parts["patch_embed"] = shape.num_patches * shape.patch_size[0] * shape.patch_size[1] * shape.in_chans * dim
    parts["classifier"] = dim * shape.num_classes * shape.num_classifiers
    state, plain = shape.num_tokens, True           # rows that leave the last block; whether they are simply all tokens
    for block in plan.blocks:
        tokens, carried, width, neurons = _sizes(shape, block)
        parts["qkv"] += 3 * tokens * dim * width
        parts["attention"] += 2 * tokens * tokens * width
        parts["proj"] += tokens * width * dim
        parts["mlp"] += 2 * tokens * dim * neurons
        if block.tokens is not None and form == "training":
            parts["merge"] += tokens * shape.num_tokens * dim
            parts["reconstruct"] += tokens * shape.num_tokens * dim
        if form == "deployed":
            if not (plain and block.tokens is None):
                parts["fold"] += (tokens + carried) * state * dim
            state, plain = tokens + carried, block.tokens is None
    if form == "deployed" and not plain:
        rows = shape.num_prefix_tokens if shape.pool == POOL_TOKEN else shape.num_tokens
        parts["fold"] += rows * state * dim
    parts["total"] = sum(parts.values())
    return parts


def gmacs(plan: CompressionPlan, form: str = "deployed") -> float:
    """10^9 MACs per image in all."""
    return macs(plan, form)["total"] / 1e9


def params(model: nn.Module) -> dict[str, int]:
    """Parameters of a timm vision transformer by part, and their sum under "total"; fold matrices count as parameters."""
    def part(name: str) -> str:
        for key, word in ((".attn.", "attention"), (".mlp.", "mlp"), (".tokens.", "merge and reconstruct"),
                          ("fold.", "fold"), ("patch_embed", "patch_embed"), ("head", "classifier")):
            if key in name:
                return word
        return "norms and embeddings"
    parts: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("token_mask"):
            parts[part(name)] = parts.get(part(name), 0) + tensor.numel()
    parts["total"] = sum(parts.values())
    return parts
