"""Cost of a (shape, plan): multiply-adds (MACs) per image, by part, as exact integers; and a model's parameters.

One MAC is two FLOPs; the papers write FLOPs for MACs. Everything that is multiplied counts, the merge, reconstruct and
fold products too; form "published" leaves those out, as the tables of arXiv 2503.23455 do. Counts may have leading
dimensions: the cost of ten thousand policies is one call.
"""
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from vitlab.plan import CompressionPlan
from vitlab.plan.shape import POOL_TOKEN, ViTShape
from vitlab.runtime.files import require

FORMS = ("deployed", "training", "published")
PARTS = ("patch_embed", "qkv", "attention", "proj", "mlp", "select", "merge", "reconstruct", "fold", "classifier",
         "decoder")
SELECT_IN = (3, 6, 9)                           # blocks that select tokens in arXiv 2201.00043, from 0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What stays in each block: integer arrays (..., L), bool where said; tokens include the prefix tokens."""

    heads: np.ndarray
    neurons: np.ndarray
    attended: np.ndarray            # tokens in the attention
    in_mlp: np.ndarray              # tokens in the MLP
    carried: np.ndarray             # tokens that go around the block
    merges: np.ndarray              # bool: a merge matrix stands before the block
    reconstructs: np.ndarray        # bool: a reconstruct matrix stands after it
    ranking: np.ndarray             # heads whose attention ranks tokens before the MLP; 0 where none are selected
    # Rows scaled for a mean of tokens, and for what a token keeps of its own; pairs of tokens whose keys are
    # multiplied.
    pooled: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    compared: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    # pairs of a patch and a merged token whose rotation is the mean of its patches'
    turned: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    # tokens that ask in the attention; empty: all in it
    queried: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    # bool: the ranking has weights of its own
    ranks_anew: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=bool))
    # of each head's queries and keys; 0: as wide as its values
    widths: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def __post_init__(self) -> None:
        if not self.queried.size:
            object.__setattr__(self, "queried", self.attended)


def counts_of(plan: CompressionPlan) -> Counts:
    """The counts (L) of a plan."""
    shape, flows = plan.shape, plan.flows()
    heads = [shape.num_heads if b.heads is None else len(b.heads) for b in plan.blocks]
    rank = [{"": 0, "kept": kept, "all": shape.num_heads}[f.ranked_by] for f, kept in zip(flows, heads)]
    return Counts(heads=np.array(heads), ranking=np.array(rank),
                  widths=np.array([b.qk_width or shape.head_dim for b in plan.blocks]),
                  ranks_anew=np.array([f.ranked_by == "all" for f in flows]),
                  queried=np.array([f.attended if f.queried is None else f.queried for f in flows]),
                  neurons=np.array([shape.num_neurons if b.neurons is None else len(b.neurons) for b in plan.blocks]),
                  **{name: np.array([getattr(f, name) for f in flows])
                     for name in ("attended", "in_mlp", "carried", "pooled", "compared", "turned", "merges",
                                  "reconstructs")})


def previous(values: np.ndarray, first: int) -> np.ndarray:
    """Each block's value of the block before it; `first` for block 0."""
    return np.concatenate([np.full_like(values[..., :1], first), values[..., :-1]], axis=-1)


def rows_of(counts: Counts, everything: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that enter and that leave each block: all tokens where they only share an update."""
    shares = (counts.pooled > 0) & (counts.compared == 0)
    return (np.where(shares, everything, counts.attended + counts.carried),
            np.where(shares, everything, counts.in_mlp + counts.carried))


def _head_macs(shape: ViTShape) -> int:
    """MACs of what follows the encoder: a classifier D K for each there is, or for each token where none is pooled;
    a linear decoder n D K; a mask transformer of L blocks on the n patches and K classes, n D^2 + L (n + K) (12 D^2 + 2
    (n + K) D) + (n + K) D^2 + n D K (arXiv 2105.05633); of Q queries classes Q D (K + 1), masks 3 Q D^2, two steps of
    upscaling (4 + 16) n D (D + 9), and 16 n Q (D + K) (arXiv 2503.19108). Before a classifier, an attention pool of m
    tokens with an MLP of M neurons: 2 m D (D + 1) + 2 D^2 + 2 D M."""
    n, dim, classes = shape.num_patches, shape.features or shape.embed_dim, shape.num_classes
    if shape.decoder == "linear":
        return n * dim * classes
    if shape.decoder == "queries":
        return (shape.queries * (dim * (classes + 1 + 3 * dim) + 16 * n * (dim + classes))
                + 20 * n * dim * (dim + 9))
    if shape.decoder:
        rows = n + classes
        return n * dim**2 + shape.decoder_depth * rows * (12 * dim**2
                                                          + 2 * rows * dim) + rows * dim**2 + n * dim * classes
    pooled = n + (shape.num_prefix_tokens if shape.pool_prefix else 0)
    pool = 2 * dim * (pooled * (dim + 1) + dim + shape.pool_neurons) if shape.pool_neurons else 0
    return dim * classes * shape.num_classifiers * (1 if shape.pool else shape.num_tokens) + pool


def _sides(shape: ViTShape, counts: Counts) -> np.ndarray:
    """Of the windows in each block, the first ones where counts are of fewer; 0: the whole grid."""
    blocks = counts.attended.shape[-1]
    return np.array((shape.windows or (0,) * blocks)[:blocks])


def joined(shape: ViTShape, counts: Counts) -> np.ndarray:
    """Queries beside the tokens of each block (L)."""
    return np.where(np.arange(counts.attended.shape[-1]) < shape.before_queries, 0, shape.queries)


def in_attention(shape: ViTShape, counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens in each block's attention, those of them that ask, those that each of these looks at), (..., L): queries
    among them, and of windows their padding."""
    if not shape.windows:
        more = joined(shape, counts)
        return counts.attended + more, counts.queried + more, counts.attended + more
    side = _sides(shape, counts)
    rows, columns = (-(-length // np.maximum(side, 1)) * side for length in shape.grid_size)
    inside = np.broadcast_to(np.where(side, rows * columns, shape.num_patches), counts.attended.shape)
    return inside, inside, np.broadcast_to(np.where(side, side**2, shape.num_patches), inside.shape)


def macs_of(shape: ViTShape, counts: Counts, form: str = "deployed") -> dict[str, np.ndarray]:
    """MACs per image (...) by part (PARTS), and their sum under "total". Raises InputError for an unknown form.

    Per block with C tokens in the attention, Q of them asking (all, but for a block that reads out), C' in the MLP,
    queries that joined counted in each, attention width w = heads * d, and w' = heads * d' of queries and keys where
    these are narrower, M neurons: qkv C D (2 w' + w), less where heads share keys and values, attention Q C (w' + w),
    or Q C (w' + 2 w) where a head has two maps, proj Q w D, mlp 2 C' D M (3 where neurons are gated); of windows of s x
    s, C is all that are in one, padding too, and each of these asks s^2; where queries make biases by distance, Q w' (2
    s) or, over the whole grid, Q w' (rows + columns) are added to attention, where heads are mixed 2 Q C heads^2; a
    ranking by heads of width r C r, or, with weights of its own, 2 D r + C heads D (q/k norm: D r + C D r + C r);
    regions that share an update scale each of their n patches, n D; matching r of n tokens compares (n / 2)^2 keys and
    the class token's with all, w' each, and scales r + n / 2 rows; where tokens are turned by place, a product of
    patches and merged tokens 2 d wide. form
    "training" adds C N D for each merge and each reconstruct; "deployed" adds the folded products instead: (C_l + p_l)
    (C_k + p_k) D between two blocks, p tokens carried around them. Inside a span no matrix stands between two blocks.
    """
    require(form in FORMS, f"form {form!r} is not known; known are {list(FORMS)}")
    dim, everything, c = shape.embed_dim, shape.num_tokens, counts
    width, each = c.heads * shape.head_dim, np.where(c.widths, c.widths, shape.head_dim)       # (..., L)
    queries = c.heads * each
    shared = np.array(shape.key_heads) if shape.key_heads else c.heads
    keys = shared * each
    wide = c.ranking * shape.head_dim
    maps = shape.maps * c.ranking
    anew = wide * (dim + c.attended * (dim + 1)) if shape.qk_norm else dim * (2 * wide + c.attended * maps)
    ranking = np.where(c.ranks_anew, anew, c.attended * c.ranking * each)
    inside, asking, seen = in_attention(shape, c)
    mixed = asking * seen * (queries + shape.maps * width + (2 * c.heads**2 if shape.talking else 0))
    if shape.by_distance:
        side = _sides(shape, c)
        mixed = mixed + asking * queries * np.where(side, 2 * side, sum(shape.grid_size))
    blocks = {"qkv": inside * dim * (queries + keys + shared * shape.head_dim), "attention": mixed,
              "proj": asking * width * dim,
              "mlp": (3 if shape.gated else 2) * (c.in_mlp + joined(shape, c)) * dim * c.neurons, "select": ranking}
    parts = {name: blocks[name].sum(axis=-1) if name in blocks else np.zeros(width.shape[:-1], dtype=np.int64)
             for name in PARTS}
    pixels = shape.patch_size[0] * shape.patch_size[1] * shape.in_chans
    parts["patch_embed"] += shape.stem_macs or shape.num_patches * pixels * dim
    parts["decoder" if shape.decoder else "classifier"] += _head_macs(shape) + shape.end_macs
    if form != "published":
        turning = 2 * shape.head_dim * shape.rotary
        ranks = np.where(c.compared > 0, c.attended, 0)                         # the class token's row, of all heads
        parts["merge"] = (c.pooled.sum(axis=-1) * dim + (c.compared * keys + ranks * (queries - keys)).sum(axis=-1)
                          + c.turned.sum(axis=-1) * turning)
    if form == "training":
        parts["reconstruct"] = (c.reconstructs * c.attended).sum(axis=-1) * everything * dim
        parts["merge"] = parts["merge"] + (c.merges * c.attended).sum(axis=-1) * everything * dim
    if form == "deployed":
        entering, state = rows_of(c, everything)
        folds = (c.merges | previous(c.reconstructs, False)) * entering * previous(state, everything)
        rows = shape.num_prefix_tokens if shape.pool == POOL_TOKEN else everything
        parts["fold"] = (folds.sum(axis=-1) + c.reconstructs[..., -1] * rows * state[..., -1]) * dim
    parts["total"] = sum(parts.values())
    return parts


def macs(plan: CompressionPlan, form: str = "deployed") -> dict[str, int]:
    """`macs_of` a plan, as integers."""
    return {part: int(value) for part, value in macs_of(plan.shape, counts_of(plan), form).items()}


def gmacs(plan: CompressionPlan, form: str = "deployed") -> float:
    """10^9 MACs per image in all."""
    return macs(plan, form)["total"] / 1e9


def mdc_macs(shape: ViTShape, heads: np.ndarray, neurons: np.ndarray, rho: np.ndarray,
             select_in: tuple[int, ...] = SELECT_IN) -> np.ndarray:
    """MACs (...) as arXiv 2201.00043 counts them (methods B5): heads, neurons (..., L) kept, rho (...) in [0, 1).

    heads * (4 D d N_l + 2 N_l^2 d) + 2 N'_l D M per block, N_l and N'_l tokens before and after the block's own
    selection, int(N (1 - rho)^k) after k of them. Patch embedding, classifier, ranking and the appended mean are left
    out.
    """
    ratios = 1 - np.asarray(rho, dtype=np.float64)[..., None]
    done = np.cumsum([block in select_in for block in range(shape.depth)])      # selections up to and with each block
    after = (shape.num_tokens * ratios**done).astype(np.int64)                  # (..., L)
    entering = previous(after, shape.num_tokens)
    dim, d = shape.embed_dim, shape.head_dim
    return (heads * (4 * dim * d * entering + 2 * entering**2 * d) + 2 * after * dim * neurons).sum(axis=-1)


def params(model: nn.Module) -> dict[str, int]:
    """Parameters of a timm vision transformer by part, and their "total"; fold matrices count as parameters."""
    def part(name: str) -> str:
        for key, word in (("decoder.", "decoder"), ("join.", "decoder"), ("token_only", "classifier"),
                          ("neck.", "classifier"), (".rank", "select"), (".attn.", "attention"), (".mlp.", "mlp"),
                          (".tokens.", "merge and reconstruct"), ("fold.", "fold"), ("patch_embed", "patch_embed"),
                          ("head", "classifier")):
            if key in name:
                return word
        return "norms and embeddings"
    parts: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("token_mask"):
            parts[part(name)] = parts.get(part(name), 0) + tensor.numel()
    parts["total"] = sum(parts.values())
    return parts
