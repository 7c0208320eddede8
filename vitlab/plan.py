"""CompressionPlan: what is cut from a vision transformer, as plain data that is checked, saved and read as JSON.

One plan covers tokens (Prune and Merge, arXiv 2503.23455), heads and neurons (arXiv 2201.00043), block by block.
"""
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitlab.files import InputError, atomic_write, read_json

FORMAT, VERSION = "vitlab.plan", 1
POOL_TOKEN = "token"
LARGEST = 3e38                              # of a float32


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size"):
            value = getattr(self, name)
            _require(isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_int(v) and v > 0 for v in value),
                     f"shape.{name} is {value!r}; two positive integers are needed")
            object.__setattr__(self, name, tuple(value))
        lowest = {"num_prefix_tokens": 0, "num_classes": 0}
        for f in dataclasses.fields(self):
            if f.type in (int, "int"):
                value, low = getattr(self, f.name), lowest.get(f.name, 1)
                _require(_is_int(value) and value >= low, f"shape.{f.name} is {value!r}; an integer of at least {low} is needed")
        _require(isinstance(self.pool, str), f"shape.pool is {self.pool!r}; a string is needed")
        _require(self.num_patches > 0, f"shape: an image of {self.img_size} holds no patch of {self.patch_size}")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches


@dataclass(frozen=True, kw_only=True)
class MergeReconstruct:
    """Token rule of Prune and Merge: merge before the block, reconstruct after it (methods A4 to A6).

    The numbers are the matrices' starting values; trained matrices are weights and live in the checkpoint.
    """

    regions: tuple[int, ...]            # per patch: which merged token it goes into, from 0; -1: none (pruned patches only)
    weights: tuple[float, ...]          # per patch: its entry in the merge matrix; 0 where pruned
    pruned: tuple[int, ...] = ()        # patches that skip the block, ascending
    trains: str = "both"                # "both" matrices or "reconstruct" alone

    kind = "merge_reconstruct"

    def __post_init__(self) -> None:
        n, pruned = len(self.regions), set(self.pruned)
        _require(n == len(self.weights), f"{n} regions but {len(self.weights)} weights; one of each per patch is needed")
        _require(all(_is_int(r) and r >= -1 for r in self.regions), "regions must be integers of at least -1")
        _require(all(isinstance(w, (int, float)) and not isinstance(w, bool) and abs(w) < LARGEST
                     for w in self.weights), "weights must be finite numbers")
        _require(all(_is_int(j) and 0 <= j < n for j in self.pruned) and list(self.pruned) == sorted(pruned),
                 f"pruned must be patches from 0 to {n - 1}, ascending without repeats")
        _require(set(self.regions) - {-1} == set(range(self.num_merged)),
                 f"regions must be numbered 0 to {self.num_merged - 1} without a gap")
        for j, (region, weight) in enumerate(zip(self.regions, self.weights)):
            _require(j in pruned or region >= 0, f"patch {j} is in no region and not pruned")
            _require(j not in pruned or weight == 0, f"patch {j} is pruned; its weight must be 0, not {weight}")
        _require(self.trains in ("both", "reconstruct"), f"trains is {self.trains!r}; 'both' or 'reconstruct' is needed")
        for name in ("regions", "pruned"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))

    @property
    def num_merged(self) -> int:
        """How many tokens the patches become (prefix tokens not counted)."""
        return max(self.regions, default=-1) + 1

    def check(self, shape: ViTShape) -> None:
        """InputError where the rule is for another number of patches."""
        _require(len(self.regions) == shape.num_patches,
                 f"tokens.regions has {len(self.regions)} entries; the model has {shape.num_patches} patches")


TOKEN_RULES = {MergeReconstruct.kind: MergeReconstruct}
TokenRule = MergeReconstruct


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What stays of one block; None means all of it."""

    heads: tuple[int, ...] | None = None        # heads that stay, ascending
    neurons: tuple[int, ...] | None = None      # neurons that stay, ascending
    tokens: TokenRule | None = None             # how the block's tokens are taken in and given back

    def check(self, shape: ViTShape) -> None:
        """InputError where an index is out of the model's range, repeated or unordered, or nothing stays."""
        for name, count in (("heads", shape.num_heads), ("neurons", shape.num_neurons)):
            kept = getattr(self, name)
            if kept is None:
                continue
            _require(len(kept) > 0, f"{name} is empty; at least one must stay")
            _require(all(_is_int(k) and 0 <= k < count for k in kept), f"{name} must be integers from 0 to {count - 1}")
            _require(list(kept) == sorted(set(kept)), f"{name} must ascend without repeats")
        if self.tokens is not None:
            self.tokens.check(shape)


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """What is cut, per block, for a model of one shape; enough to rebuild the compressed model."""

    shape: ViTShape
    blocks: tuple[BlockPlan, ...]
    made_by: dict[str, Any] = field(default_factory=dict)      # criteria, rates, seed: for people, not read back

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _require(len(self.blocks) == self.shape.depth,
                 f"the plan has {len(self.blocks)} blocks; the model has {self.shape.depth}")
        for index, block in enumerate(self.blocks):
            try:
                block.check(self.shape)
            except InputError as error:
                raise InputError(f"block {index}: {error}") from None

    @classmethod
    def empty(cls, shape: ViTShape) -> "CompressionPlan":
        """The plan that cuts nothing: compress with it gives the very same logits."""
        return cls(shape=shape, blocks=tuple(BlockPlan() for _ in range(shape.depth)))

    def check_fits(self, shape: ViTShape) -> None:
        """InputError naming every size in which the model and the plan differ (classifier and pooling may)."""
        free = ("num_classes", "num_classifiers", "pool", "in_chans")
        wrong = [f"{f.name} {getattr(shape, f.name)} (plan: {getattr(self.shape, f.name)})"
                 for f in dataclasses.fields(shape)
                 if f.name not in free and getattr(shape, f.name) != getattr(self.shape, f.name)]
        _require(not wrong, "the plan is for another model; this one has " + ", ".join(wrong))

    def tokens_per_block(self) -> list[int]:
        """Tokens that enter each block's attention, prefix tokens included."""
        return [self.shape.num_tokens if b.tokens is None else self.shape.num_prefix_tokens + b.tokens.num_merged
                for b in self.blocks]

    def to_json(self) -> str:
        """One line per block and field, so that a person and a diff can read it."""
        def tokens(rule: TokenRule | None) -> dict | None:
            return None if rule is None else {"kind": rule.kind, **dataclasses.asdict(rule)}
        blocks = [{"heads": b.heads, "neurons": b.neurons, "tokens": tokens(b.tokens)} for b in self.blocks]
        lines = [f'  "format": "{FORMAT}",', f'  "version": {VERSION},',
                 f'  "shape": {json.dumps(dataclasses.asdict(self.shape))},',
                 f'  "made_by": {json.dumps(self.made_by)},', '  "blocks": [']
        for index, block in enumerate(blocks):
            end = "," if index + 1 < len(blocks) else ""
            inner = ",\n     ".join(f'"{k}": {json.dumps(v)}' for k, v in block.items())
            lines.append(f"    {{{inner}}}{end}")
        return "{\n" + "\n".join(lines) + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, data: Any, where: str = "plan") -> "CompressionPlan":
        """Build from parsed JSON. Raises InputError that begins with `where` and names the block and field."""
        try:
            _require(isinstance(data, dict) and data.get("format") == FORMAT, f'"format" must be "{FORMAT}"')
            _require(data.get("version") == VERSION,
                     f"version {data.get('version')!r} is not known; this vitlab reads version {VERSION}")
            _require(isinstance(data.get("blocks"), list), '"blocks" must be a list')
            _require(isinstance(data.get("made_by", {}), dict), '"made_by" must be an object')
            shape = _build(ViTShape, data.get("shape"), "shape")
            blocks = tuple(_block_from_json(block, f"block {i}") for i, block in enumerate(data["blocks"]))
            return cls(shape=shape, blocks=blocks, made_by=data.get("made_by", {}))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write atomically."""
        atomic_write(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "CompressionPlan":
        """Read and check; InputError names the file, the block and the field."""
        return cls.from_json(read_json(path), str(path))


def _build(cls: type, data: Any, where: str) -> Any:
    _require(isinstance(data, dict), f"{where} must be an object")
    known = {f.name: f for f in dataclasses.fields(cls)}
    needed = {n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    _require(not set(data) - set(known), f"{where}: unknown {sorted(set(data) - set(known))}; known are {sorted(known)}")
    _require(not needed - set(data), f"{where}: {sorted(needed - set(data))} missing")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    except (TypeError, AttributeError) as error:
        raise InputError(f"{where}: {error}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _block_from_json(data: Any, where: str) -> BlockPlan:
    _require(isinstance(data, dict), f"{where} must be an object")
    data = dict(data)
    tokens = data.get("tokens")
    if tokens is not None:
        _require(isinstance(tokens, dict) and isinstance(tokens.get("kind"), str) and tokens["kind"] in TOKEN_RULES,
                 f"{where}: tokens.kind must be one of {sorted(TOKEN_RULES)}")
        kind = TOKEN_RULES[tokens["kind"]]
        data["tokens"] = _build(kind, {k: v for k, v in tokens.items() if k != "kind"}, f"{where}: tokens")
    for name in ("heads", "neurons"):
        _require(data.get(name) is None or isinstance(data[name], list), f"{where}: {name} must be a list or null")
    return _build(BlockPlan, data, where)
