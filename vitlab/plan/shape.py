"""ViTShape: the sizes of a vision transformer, as checked plain data."""
import dataclasses
from dataclasses import dataclass
from typing import Any, TypeGuard

from vitlab.runtime.files import require

POOL_TOKEN = "token"
FAMILY = ("gated", "rotary", "pool_neurons", "pool_prefix", "stem_macs", "end_macs", "features", "windows", "talking",
          "by_distance", "fixed", "projection", "queries", "key_heads", "maps", "parallel")     # of other families
PARTS = ("heads", "neurons", "tokens", "widths")
DECODERS = ("", "linear", "mask_transformer", "queries")


def is_int(value: Any) -> TypeGuard[int]:
    """An integer that is not a bool (JSON's true is no number)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any, low: float, high: float) -> bool:
    """A number from low to high, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def columns(units: Any, width: int) -> Any:
    """The places of units (U) that have so many each, a tensor: (U * width)."""
    return (units[:, None] * width + units.new_tensor(range(width))).flatten()


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """The sizes of the dense model that a plan is for. B batch, N tokens, D dim, H heads, d head width, M neurons."""

    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int = 3
    embed_dim: int
    depth: int
    num_heads: int
    head_dim: int
    num_neurons: int
    num_prefix_tokens: int = 1          # class token, distillation token, registers
    num_classes: int = 1000             # 0: no classifier
    num_classifiers: int = 1            # 2 for a distilled DeiT
    pool: str = POOL_TOKEN              # "token" needs prefix tokens alone; every other pooling needs all
    qk_norm: bool = False               # whether attention normalises queries and keys
    decoder: str = ""                   # of DECODERS: logits of each patch; "": a classifier, or nothing
    decoder_depth: int = 0              # blocks of a mask transformer, or the model's own last ones, with queries
    class_token: bool | None = None     # whether the first prefix token is one; None: where there are prefix tokens
    gated: bool = False                 # whether a neuron has a gate beside its value
    rotary: int = 0                     # rotations of queries and keys by place: 1 for all heads, H for each its own
    pool_neurons: int = 0               # of an attention pool's MLP; 0: another pooling
    pool_prefix: bool = True            # whether an attention pool looks at prefix tokens
    stem_macs: int = 0                  # of a patch embedding that is more than a convolution; 0: it is one
    end_macs: int = 0                   # between the blocks and the classifier, where that is more than a norm
    features: int = 0                   # width of what goes into the classifier; 0: as wide as the blocks
    windows: tuple[int, ...] = ()       # per block: side of those that attention is within, 0: all; (): all in each
    by_distance: bool = False           # whether queries make biases by rows and by columns apart
    talking: bool = False               # whether heads are mixed before and after the softmax
    fixed: tuple[str, ...] = ()         # what can't be cut, of PARTS, each with its reason
    projection: bool = False            # whether what is in place of a classifier gives features
    queries: int = 0                    # among the tokens of its last `decoder_depth` blocks
    maps: int = 1                       # of attention a head: 2 where values are mixed by their difference
    parallel: bool = False              # whether the MLP reads what the attention reads
    key_heads: tuple[int, ...] = ()     # heads that keys and values of each block have, shared; (): each head its own

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size"):
            value = getattr(self, name)
            require(isinstance(value, (tuple, list)) and len(value) == 2 and all(is_int(v) and v > 0 for v in value),
                    f"shape.{name} is {value!r}; two positive integers are needed")
            object.__setattr__(self, name, tuple(value))
        for name in ("fixed", "windows", "key_heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(len(self.windows) in (0, self.depth) and all(is_int(side) and side >= 0 for side in self.windows),
                f"shape.windows is {self.windows!r}; none, or the side of those of each block, is needed")
        lowest = dict.fromkeys(("num_prefix_tokens", "num_classes", "decoder_depth", "rotary", "pool_neurons",
                                "stem_macs", "end_macs", "features", "queries"), 0)
        for f in dataclasses.fields(self):
            if f.type in (int, "int"):
                value, low = getattr(self, f.name), lowest.get(f.name, 1)
                require(is_int(value) and value >= low,
                        f"shape.{f.name} is {value!r}; an integer of at least {low} is needed")
        for name in ("qk_norm", "gated", "pool_prefix", "projection", "by_distance", "talking", "parallel"):
            require(isinstance(getattr(self, name), bool),
                    f"shape.{name} is {getattr(self, name)!r}; true or false is needed")
        require(all(isinstance(part, str) and part.split(":")[0] in PARTS for part in self.fixed),
                f"shape.fixed is {self.fixed!r}; texts that begin with one of {list(PARTS)} are needed")
        require(not self.key_heads or len(self.key_heads) == self.depth
                and all(is_int(k) and 1 <= k <= self.num_heads for k in self.key_heads),
                f"shape.key_heads is {self.key_heads!r}; of each block an integer from 1 to {self.num_heads} is needed")
        require(isinstance(self.pool, str), f"shape.pool is {self.pool!r}; a string is needed")
        require(self.decoder in DECODERS, f"shape.decoder is {self.decoder!r}; one of {list(DECODERS)} is needed")
        require(not self.queries or 1 <= self.decoder_depth < self.depth, f"shape.decoder_depth is "
                f"{self.decoder_depth}; of {self.depth} blocks the last 1 to {self.depth - 1} can have queries")
        require(self.class_token in (None, True, False),
                f"shape.class_token is {self.class_token!r}; true or false is needed")
        object.__setattr__(self, "class_token", self.num_prefix_tokens > 0 and self.class_token is not False)
        require(self.num_patches > 0, f"shape: an image of {self.img_size} holds no patch of {self.patch_size}")

    def stored(self) -> dict[str, Any]:
        """As JSON holds it; what a plain vision transformer has none of is not spoken of, nor a class token where the
        number of prefix tokens says it."""
        usual = {f.name: f.default for f in dataclasses.fields(self) if f.name in FAMILY}
        usual["class_token"] = self.num_prefix_tokens > 0
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in usual or v != usual[k]}

    def why_whole(self, part: str) -> str | None:
        """A line that says why heads, neurons, tokens, or widths of queries and keys can't be cut, or None."""
        why = next((each.partition(": ")[2] for each in self.fixed if each.startswith(part)), None)
        if part == "widths" and (self.qk_norm or self.rotary):
            why = "queries and keys are " + ("normed" if self.qk_norm else "turned by place")
        return None if why is None else f"{part} of this model can't be cut: {why}"

    def cuts(self, part: str) -> bool:
        """Whether heads, neurons, tokens, or widths of queries and keys can be cut."""
        return self.why_whole(part) is None

    def check_cut(self, part: str) -> None:
        """InputError with the reason where they can't."""
        why = self.why_whole(part)
        require(why is None, why or "")

    @property
    def before_queries(self) -> int:
        """Blocks before queries join, or all where none do: their tokens can be cut."""
        return self.depth - (self.decoder_depth if self.queries else 0)

    def cut_short(self) -> "ViTShape":
        """Of these blocks alone."""
        depth = self.before_queries
        return dataclasses.replace(self, depth=depth, queries=0, windows=self.windows[:depth],
                                   key_heads=self.key_heads[:depth])

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def needs_grid(self) -> bool:
        """Whether every patch counts at the end: a decoder reads them, or nothing is pooled."""
        return bool(self.decoder) or not self.pool

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches
