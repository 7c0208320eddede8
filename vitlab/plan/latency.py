"""Latency of any counts, predicted from a table of what the parts of a block take; vitlab.measure.latency measures one.

A model's latency is the sum of its parts', each interpolated in what was measured of it, as in the latency tables of
ProxylessNAS (Cai et al., 2018, arXiv 1812.00332), for the form that vitlab deploys.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from vitlab.plan.cost import Counts, in_attention, joined, previous, rows_of
from vitlab.plan.shape import POOL_TOKEN, ViTShape
from vitlab.runtime.files import InputError, atomic_write, read_json, require

FORMAT, VERSION = "vitlab.plan.latency", 3
AXES = {"stem": ("tokens",), "attention": ("tokens", "heads"), "select": ("tokens", "ranking heads"),
        "mlp": ("tokens", "neurons"), "fold": ("rows", "columns"), "carry": ("rows",), "pool": ("tokens",),
        "match": ("tokens",), "head": ("tokens",), "read_out": ("tokens", "heads"),
        "narrow": ("tokens", "heads", "widths")}
# a model without a class token selects none; one of few patches matches none; queries that are turned stay wide
OPTIONAL = {"select", "match", "read_out", "narrow"}


@dataclass(frozen=True, kw_only=True, eq=False)
class LatencyTable:
    """Milliseconds of each part of a model for one batch, by what it depends on (AXES).

    stem: embedding of patches and positions; attention, mlp: the halves of a block, with norm and residual (of
    windows, tokens are those of one: all windows together take this); select:
    ranking and choice of tokens; pool: means of regions, and what their tokens share; match: merging alike tokens;
    read_out: an attention in which the prefix tokens alone ask (narrow or not); narrow: one whose queries and keys have
    fewer widths than its values; fold: a matrix (rows, columns) over the tokens;
    carry: tokens split off before a block and joined again after it; head: norm, pooling, classifier.
    """

    shape: ViTShape                             # of the dense model
    conditions: dict[str, Any]                  # machine, device, dtype, batch_size, ...: what the times hold for
    axes: dict[str, tuple[np.ndarray, ...]]     # per part and axis: counts, integers, ascending
    ms: dict[str, np.ndarray]                   # per part: (len of axis, ...) times; without the parts there are not
    scale: float = 1.0                          # whole models' time over the sum of their parts'

    def __post_init__(self) -> None:
        require(set(AXES) - OPTIONAL <= set(self.ms) <= set(AXES) and set(self.axes) == set(self.ms),
                f"the table holds the parts {sorted(self.ms)}; {sorted(AXES)} are needed")
        for part, ms in self.ms.items():
            axes = [np.asarray(axis) for axis in self.axes[part]]
            require(len(axes) == len(AXES[part])
                    and all(a.ndim == 1 and len(a) and (np.diff(a) > 0).all() for a in axes),
                    f"{part}: an ascending axis of {' and of '.join(AXES[part])} is needed")
            require(ms.shape == tuple(map(len, axes)),
                    f"{part}: times are {ms.shape}; {tuple(map(len, axes))} is needed")
        require(all(np.isfinite(v).all() and np.all(v > 0) for v in (*self.ms.values(), self.scale)),
                "times must be positive")

    def _at(self, part: str, where: np.ndarray, *counts: np.ndarray | int) -> np.ndarray:
        """ms of `part`, linear in each axis between what was measured; 0 but `where`. InputError outside the axes."""
        wanted, *every = np.broadcast_arrays(where, *counts)
        ms, values = np.zeros(wanted.shape), [each[wanted] for each in every]
        if not wanted.any():
            return ms
        require(part in self.ms, f"the table holds no times of {part}: this model has no tokens to {part}")
        for name, axis, each in zip(AXES[part], self.axes[part], values):
            require(axis[0] <= each.min() and each.max() <= axis[-1],
                    f"{part}: {each.min()} to {each.max()} {name} wanted; the table holds {axis[0]} to {axis[-1]}")
        ms[wanted] = RegularGridInterpolator(self.axes[part], self.ms[part])(np.stack(values, axis=-1))
        return ms

    def by_part(self, counts: Counts) -> dict[str, np.ndarray]:
        """latency_ms (...) of one batch by part, for counts (..., L), in the deployed form (as in cost.macs_of).

        Before a block that merges, and after one that reconstructs, stands a fold of (C_l + p_l) x (C_k + p_k), at the
        end of a model one to the prefix tokens (class-token pooling) or to all. Raises InputError for counts that the
        table does not hold.
        """
        c = Counts(**dict(zip(vars(counts), np.broadcast_arrays(*vars(counts).values()))))
        require(c.heads.shape[-1] == self.shape.depth,
                f"counts of {c.heads.shape[-1]} blocks; the table is for {self.shape.depth}")
        everything, whole = self.shape.num_tokens, np.ones(c.heads.shape[:-1], dtype=bool)
        rows, state = rows_of(c, everything)
        wanted = self.shape.num_prefix_tokens if self.shape.pool == POOL_TOKEN else everything
        last, end = c.reconstructs[..., -1], state[..., -1]
        asked, shares, attends = c.queried == c.attended, (c.pooled > 0) & (c.compared == 0), c.heads > 0
        narrow = asked & attends & (c.widths > 0) & (c.widths < self.shape.head_dim)
        seen = in_attention(self.shape, c)[2]
        parts = {"attention": self._at("attention", asked & attends & ~narrow, seen, c.heads),
                 "narrow": self._at("narrow", narrow, seen, c.heads, c.widths),
                 "read_out": self._at("read_out", ~asked & attends, c.attended, c.heads),
                 "select": self._at("select", c.ranking > 0, c.attended, c.ranking),
                 "mlp": self._at("mlp", c.neurons > 0, c.in_mlp + joined(self.shape, c), c.neurons),
                 "fold": self._at("fold", c.merges | previous(c.reconstructs, False), rows,
                                  previous(state, everything)),
                 "carry": self._at("carry", c.carried > 0, rows),
                 "pool": self._at("pool", shares, c.attended),
                 "match": self._at("match", c.compared > 0, c.attended)}
        parts = {part: ms.sum(axis=-1) for part, ms in parts.items()}           # (...)
        parts["fold"] = parts["fold"] + self._at("fold", last, wanted, end)
        parts["stem"] = self._at("stem", whole, everything)
        # Every token is left by a block that shares an update, and given back after matching, unless it is read out.
        matched = (c.compared > 0).any(axis=-1) & asked[..., -1]
        left = np.where(matched, everything, end)
        parts["head"] = self._at("head", whole, np.where(last, wanted, left) + self.shape.queries)
        return {part: self.scale * parts[part] for part in AXES}

    def predict(self, counts: Counts) -> np.ndarray:
        """latency_ms (...) of one batch for counts (..., L): the sum of `by_part`."""
        return sum(self.by_part(counts).values(), np.zeros(()))

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        parts = {p: {"axes": [a.tolist() for a in self.axes[p]], "ms": ms.tolist()} for p, ms in self.ms.items()}
        atomic_write(path, json.dumps({"format": FORMAT, "version": VERSION, "shape": self.shape.stored(),
                                       "conditions": self.conditions, "scale": self.scale, "parts": parts}, indent=1)
                     + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read and check; InputError names the file."""
        data = read_json(path)
        try:
            require((data["format"], data["version"]) == (FORMAT, VERSION), f"{FORMAT} of version {VERSION} is needed")
            parts = data["parts"]
            return cls(shape=ViTShape(**data["shape"]), conditions=dict(data["conditions"]), scale=float(data["scale"]),
                       axes={p: tuple(np.array(a, dtype=np.int64) for a in v["axes"]) for p, v in parts.items()},
                       ms={p: np.array(v["ms"], dtype=np.float64) for p, v in parts.items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: is no table of latencies ({error})") from None
