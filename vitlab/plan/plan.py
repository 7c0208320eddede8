"""CompressionPlan: what is cut from a vision transformer, as plain data that is checked, saved and read as JSON.

One plan covers tokens (Prune and Merge, arXiv 2503.23455), heads and neurons (arXiv 2201.00043), block by block.
"""
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitlab.plan.rules import TOKEN_RULES, Flow, MergeReconstruct, TokenRule, whole
from vitlab.plan.shape import FAMILY, ViTShape, is_int
from vitlab.runtime.files import InputError, atomic_write, named, read_json, require

FORMAT, VERSIONS = "vitlab.plan", (1, 2)         # 2: sublayers left out, widths of queries


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What stays of one block; None means all of it."""

    heads: tuple[int, ...] | None = None        # heads that stay, ascending; (): the attention is left out
    neurons: tuple[int, ...] | None = None      # neurons that stay, ascending; (): the MLP is left out
    qk_width: int | None = None                 # of each head's queries and keys; None: as wide as its values
    tokens: TokenRule | None = None             # how the block's tokens are taken in and given back
    nothing: tuple[str, ...] = ()               # "heads", "neurons": left out, and replaced by 0 instead of a mean

    def leaves_out(self, kind: str) -> bool:
        """Whether the whole attention ("heads") or MLP ("neurons") goes."""
        kept = getattr(self, kind)
        return kept is not None and not len(kept)

    @property
    def version(self) -> int:
        """Of the file format that it takes: the first that has words for it."""
        return 2 if self.qk_width is not None or any(map(self.leaves_out, ("heads", "neurons"))) else 1

    def check(self, shape: ViTShape) -> None:
        """InputError where an index is out of the model's range, repeated or unordered."""
        for name, count in (("heads", shape.num_heads), ("neurons", shape.num_neurons)):
            kept = getattr(self, name)
            if kept is None:
                continue
            if len(kept) < count:
                shape.check_cut(name)
            require(all(is_int(k) and 0 <= k < count for k in kept), f"{name} must be integers from 0 to {count - 1}")
            require(list(kept) == sorted(set(kept)), f"{name} must ascend without repeats")
        if self.qk_width is not None:
            require(is_int(self.qk_width) and 1 <= self.qk_width < shape.head_dim, f"qk_width is {self.qk_width!r}; an "
                    f"integer from 1 to {shape.head_dim - 1} is needed, or null for all {shape.head_dim}")
            require(not self.leaves_out("heads"), "qk_width is of heads, and none stays; null is needed")
            shape.check_cut("widths")
        require(isinstance(self.nothing, tuple) and list(self.nothing) in ([], ["heads"], ["neurons"],
                                                                           ["heads", "neurons"])
                and all(map(self.leaves_out, self.nothing)),
                f'nothing is {self.nothing!r}; of "heads", "neurons" those of which none stays are needed')


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """What is cut, per block, for a model of one shape; enough to rebuild the compressed model."""

    shape: ViTShape
    blocks: tuple[BlockPlan, ...]
    made_by: dict[str, Any] = field(default_factory=dict)      # criteria, rates, seed: for people, not read back

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        require(len(self.blocks) == self.shape.depth,
                f"the plan has {len(self.blocks)} blocks; the model has {self.shape.depth}")
        for index, block in enumerate(self.blocks):
            with named(f"block {index}"):
                block.check(self.shape)
        self.flows()

    def __repr__(self) -> str:
        """One line: how many blocks, the least and the most that stay in one, and GMACs of the dense model's."""
        from vitlab.plan import cost  # which counts plans

        def told(counts: np.ndarray, total: int) -> str:
            low, high = int(counts.min()), int(counts.max())
            return f"{total}" if low == total else f"{low}{f' to {high}' if high > low else ''} of {total}"
        counts, shape = cost.counts_of(self), self.shape
        return (f"CompressionPlan({shape.depth} blocks: heads {told(counts.heads, shape.num_heads)}, "
                f"neurons {told(counts.neurons, shape.num_neurons)}, tokens {told(counts.in_mlp, shape.num_tokens)}; "
                f"{cost.gmacs(self):.4g} of {cost.gmacs(CompressionPlan.empty(shape)):.4g} GMACs)")

    @classmethod
    def empty(cls, shape: ViTShape) -> "CompressionPlan":
        """The plan that cuts nothing: compress with it gives the very same logits."""
        return cls(shape=shape, blocks=tuple(BlockPlan() for _ in range(shape.depth)))

    def check_fits(self, shape: ViTShape) -> None:
        """InputError naming every size in which the model and the plan differ (classifier, decoder and pooling may)."""
        free = ("num_classes", "num_classifiers", "pool", "in_chans", "qk_norm", "decoder", "decoder_depth",
                "class_token", *FAMILY)
        wrong = [f"{f.name} {getattr(shape, f.name)} (plan: {getattr(self.shape, f.name)})"
                 for f in dataclasses.fields(shape)
                 if f.name not in free and getattr(shape, f.name) != getattr(self.shape, f.name)]
        require(not wrong, "the plan is for another model; this one has " + ", ".join(wrong))
        # refuses what ranks by a class token that is not there, and cuts what can't be cut
        dataclasses.replace(self, shape=dataclasses.replace(
            self.shape, fixed=shape.fixed, rotary=shape.rotary, qk_norm=shape.qk_norm, queries=shape.queries,
            decoder_depth=shape.decoder_depth,
            class_token=self.shape.class_token and shape.class_token))

    def rules(self) -> list[tuple[TokenRule | None, int]]:
        """The token rule that each block runs by, and its place in the blocks of that rule: (None, 0) where all tokens
        stay, (rule, 0), and (rule, 1), (rule, 2) ... in the blocks of a span after its first. InputError naming the
        block of a span that runs past the last block or holds another rule, or of a rule where queries have joined."""
        rules, free = [], self.shape.before_queries
        for index, block in enumerate(self.blocks):
            rule, place = rules[-1] if rules else (None, 0)
            inside, span = place + 1 < getattr(rule, "span", 1), getattr(block.tokens, "span", 1)
            require(index < free or block.tokens is None, f"block {index}: tokens can't be cut here: queries have "
                    "joined them, and their masks need every patch; null is needed")
            require(not inside or block.tokens is None,
                    f"block {index}: it stays merged in the span that begins in block {index - place - 1}, and can "
                    "have no token rule of its own; null is needed")
            require(index + span <= max(free, index + 1),
                    f"block {index}: tokens stay merged for {span} blocks from here, but {free - index} "
                    f"{'is' if index + 1 == free else 'are'} left; a span of at most {free - index} is needed")
            rules.append((rule, place + 1) if inside else (block.tokens, 0))
        return rules

    def flows(self) -> list[Flow]:
        """Token counts of each block. InputError naming the block whose rule can't take what reaches it."""
        flows, before = [], whole(self.shape.num_tokens)
        for index, (rule, place) in enumerate(self.rules()):
            if index == self.shape.before_queries:
                before = whole(self.shape.num_tokens)                           # every patch is given back
            with named(f"block {index}"):
                if rule is not None:
                    self.shape.check_cut("tokens")
                if rule is None:
                    flow = whole(before.after)
                elif place and isinstance(rule, MergeReconstruct):              # it alone has a span
                    flow = rule.inside(self.shape, place)
                else:
                    flow = rule.flow(self.shape, before.after)
                require(not self.blocks[index].leaves_out("heads") or not (flow.compared or flow.ranked_by),
                        f"tokens are {'selected' if flow.ranked_by else 'matched'} by the attention, which is left out "
                        "of this block (heads is empty); a rule that needs none, or a head, is needed")
                self._check_follows(flow, before)
                require(flow.queried is None or index + 1 == len(self.blocks),
                        "tokens are read out, but another block follows; only the last block can read out")
            flows.append(flow)
            before = flow
        return flows

    def _check_follows(self, flow: Flow, before: Flow) -> None:
        """InputError where a block can't take what the one before it gives."""
        what = "selected" if flow.ranked_by else "matched"
        require(not (before.reconstructs and (flow.ranked_by or flow.compared)),
                f"tokens are {what} right after a block that merged: those of a region rank alike there but for "
                "rounding; a block without a token rule must stand between")
        require(flow.matched or not before.matched or flow.queried is not None,
                "tokens were merged by content before: from there on every block needs rule \"match\" (merged 0 where "
                "none are to go), the last one that or \"read_out\"")
        require(before.matched or not flow.matched or before.after == self.shape.num_tokens,
                "tokens are matched, but a block before has selected some: one of the two rules is needed, not both")

    def tokens_per_block(self) -> list[int]:
        """Tokens that enter each block's attention, prefix tokens included."""
        return [flow.attended for flow in self.flows()]

    def to_json(self) -> str:
        """One line per block and field, so that a person and a diff can read it."""
        def tokens(rule: TokenRule | None) -> dict | None:
            if rule is None:
                return None
            return {"kind": rule.kind, **{name: value for name, value in dataclasses.asdict(rule).items()
                                          if (name, value) not in rule.before.items()}}
        blocks = [{"heads": b.heads, "neurons": b.neurons,
                   **({} if b.qk_width is None else {"qk_width": b.qk_width}),
                   **({"nothing": b.nothing} if b.nothing else {}), "tokens": tokens(b.tokens)}
                  for b in self.blocks]
        lines = [f'  "format": "{FORMAT}",', f'  "version": {max(b.version for b in self.blocks)},',
                 f'  "shape": {json.dumps(self.shape.stored())},',
                 f'  "made_by": {json.dumps(self.made_by)},', '  "blocks": [']
        for index, block in enumerate(blocks):
            end = "," if index + 1 < len(blocks) else ""
            inner = ",\n     ".join(f'"{k}": {json.dumps(v)}' for k, v in block.items())
            lines.append(f"    {{{inner}}}{end}")
        return "{\n" + "\n".join(lines) + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, data: Any, where: str = "plan") -> "CompressionPlan":
        """Build from parsed JSON. Raises InputError that begins with `where` and names the block and field."""
        with named(where):
            require(isinstance(data, dict) and data.get("format") == FORMAT, f'"format" must be "{FORMAT}"')
            require(data.get("version") in VERSIONS, f"version {data.get('version')!r} is not known; this vitlab reads "
                    f"versions {' and '.join(map(str, VERSIONS))}")
            require(isinstance(data.get("blocks"), list), '"blocks" must be a list')
            require(isinstance(data.get("made_by", {}), dict), '"made_by" must be an object')
            shape = _build(ViTShape, data.get("shape"), "shape")
            blocks = tuple(_block_from_json(block, f"block {i}") for i, block in enumerate(data["blocks"]))
            for index, block in enumerate(blocks):
                require(block.version <= data["version"], f"block {index}: no head or no neuron stays, or qk_width is "
                        f"given, which version {data['version']} has no words for; version {block.version} is needed")
            return cls(shape=shape, blocks=blocks, made_by=data.get("made_by", {}))

    def save(self, path: str | Path) -> None:
        """Write atomically."""
        atomic_write(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path, shape: ViTShape | None = None) -> "CompressionPlan":
        """Read and check, also that it is for a model of `shape`, whose classifier or decoder and pooling it then has:
        its cost is that model's. InputError names the file, the block and the field."""
        plan = cls.from_json(read_json(path), str(path))
        with named(path):
            plan.check_fits(shape or plan.shape)
            return dataclasses.replace(plan, shape=shape or plan.shape)


def _build(cls: Any, data: Any, where: str) -> Any:
    require(isinstance(data, dict), f"{where} must be an object")
    known = {f.name: f for f in dataclasses.fields(cls)}
    needed = {n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING}
    require(not set(data) - set(known), f"{where}: unknown {sorted(set(data) - set(known))}; known are {sorted(known)}")
    require(not needed - set(data), f"{where}: {sorted(needed - set(data))} missing")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    except (TypeError, AttributeError, InputError) as error:
        raise InputError(f"{where}: {error}") from None


def _block_from_json(data: Any, where: str) -> BlockPlan:
    require(isinstance(data, dict), f"{where} must be an object")
    data = dict(data)
    tokens = data.get("tokens")
    if tokens is not None:
        require(isinstance(tokens, dict) and isinstance(tokens.get("kind"), str) and tokens["kind"] in TOKEN_RULES,
                f"{where}: tokens.kind must be one of {sorted(TOKEN_RULES)}")
        kind = TOKEN_RULES[tokens["kind"]]
        data["tokens"] = _build(kind, kind.before | {k: v for k, v in tokens.items() if k != "kind"},
                                f"{where}: tokens")
    for name in ("heads", "neurons"):
        require(data.get(name) is None or isinstance(data[name], list), f"{where}: {name} must be a list or null")
    return _build(BlockPlan, data, where)
