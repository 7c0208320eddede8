"""What measured cuts say of criteria, and no more: over blocks and seeds, with intervals, and no best one that noise
could have made.

Rows are those of `cutting.sensitivity`, of one seed or several, each with its "seed".
"""
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow
from vitlab.runtime.uncertainty import error_name, interval, overlap, plus_minus, standard_error

Z = 1.96                                        # standard errors from a mean to the ends of its interval of 95 %
UNTOLD = " (can't be told from 0)"
POINTS = {"top1_pct": "top-1", "miou_pct": "mIoU"}
RANDOM = "random"                               # the criterion that knows nothing


def clear_lowest(values: Sequence[float], errors: Sequence[float | None]) -> int | None:
    """Which value is lowest such that its interval of 95 % overlaps no other's; None where there is none, or an error
    is not known."""
    known = [error for error in errors if error is not None]
    if len(values) < 2 or len(known) < len(errors):
        return None
    ends = [(value - Z * error, value + Z * error) for value, error in zip(values, known)]
    lowest = int(np.argmin(values))
    return None if any(overlap(ends[lowest], other) for i, other in enumerate(ends) if i != lowest) else lowest


def difference(row: ResultRow, base: ResultRow, name: str = "top1_pct") -> str:
    """A row's value less another's: "+1.20 ± 0.70 points of top-1 (can't be told from 0)". The error is that of two
    draws of images, sqrt(e^2 + e'^2), as rows don't keep their images: of the same images the difference is surer."""
    value, errors = getattr(row, name) - getattr(base, name), [getattr(each, error_name(name)) for each in (row, base)]
    error = None if None in errors else float(np.hypot(*errors))
    text = f"{value:+.2f}{'' if error is None else f' ± {error:.2f}'} points of {POINTS[name]}"
    return text + (UNTOLD if error is not None and abs(value) <= Z * error else "")


def over_seeds(rows: Sequence[dict[str, Any]], dimension: str) -> dict[str, dict[int, tuple[float, float | None]]]:
    """{criterion: {block: (drop per GMAC, its standard error)}} of a dimension, means over seeds.

    The error is the larger of what the images and what the seeds say: sqrt(sum_s e_s^2) / S of the rows' own, and that
    of the mean of S values; None where neither is known.
    """
    found: dict[str, dict[int, tuple[float, float | None]]] = {}
    for name in dict.fromkeys(r["criterion"] for r in rows if r["dimension"] == dimension):
        mine = [r for r in rows if (r["dimension"], r["criterion"]) == (dimension, name)]
        found[name] = {}
        for block in sorted({r["block"] for r in mine}):
            cuts = [r for r in mine if r["block"] == block]
            values = [r["drop_per_gmac"] for r in cuts]
            images = [r["drop_se"] / r["gmacs_removed"] for r in cuts if r.get("drop_se") is not None]
            known = [float(np.sqrt(np.square(images).sum()) / len(cuts))] if len(images) == len(cuts) else []
            known += [e for e in [standard_error(values)] if e is not None]
            found[name][block] = (float(np.mean(values)), max(known, default=None))
    return found


def lines(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, dict[str, list[float]]],
                                                   dict[str, dict[str, list[float | None]]]]:
    """(drops, errors) over blocks for `plots.sensitivity`."""
    drops, errors = {}, {}
    for dimension in dict.fromkeys(r["dimension"] for r in rows):
        found = over_seeds(rows, dimension)
        drops[dimension] = {name: [drop for drop, _ in blocks.values()] for name, blocks in found.items()}
        errors[dimension] = {name: [error for _, error in blocks.values()] for name, blocks in found.items()}
    return drops, errors


def table(rows: Sequence[dict[str, Any]]) -> Styler:
    """Drop per GMAC +/- one standard error by dimension, block and criterion; bold where a criterion is the lowest and
    its interval overlaps no other's (`clear_lowest`)."""
    texts, bold = {}, set()
    for dimension in dict.fromkeys(r["dimension"] for r in rows):
        found = over_seeds(rows, dimension)
        for block in sorted({block for blocks in found.values() for block in blocks}):
            cells = {name: blocks[block] for name, blocks in found.items() if block in blocks}
            texts[dimension, block] = {name: plus_minus(value, error, 2) for name, (value, error) in cells.items()}
            best = clear_lowest(*zip(*cells.values()))
            bold |= set() if best is None else {((dimension, block), list(cells)[best])}
    frame = pd.DataFrame.from_dict(texts, orient="index").rename_axis(["dimension", "block"])

    def marked(line: pd.Series) -> list[str]:
        return ["font-weight: bold" if (line.name, name) in bold else "" for name in line.index]
    shown = frame.style.apply(marked, axis=1)
    shown.format(na_rep="")
    return shown


def told_apart(found: dict[str, dict[int, tuple[float, float | None]]], one: str, other: str) -> int:
    """-1 where `one` costs less than `other` over the blocks of both, 1 where it costs more, 0 where they can't be told
    apart: whether the interval (95 %, bootstrap over blocks) of the median of the blocks' own differences holds 0."""
    blocks = found[one].keys() & found[other].keys()
    if len(blocks) < 2:
        return 0
    low, high = interval([found[one][b][0] - found[other][b][0] for b in sorted(blocks)], np.median)
    return -1 if high < 0 else 1 if low > 0 else 0


def summary(rows: Sequence[dict[str, Any]], dimension: str) -> pd.DataFrame:
    """A line per criterion: the median over blocks of the drop per GMAC, its interval (95 %, bootstrap over blocks),
    and in how many blocks it is the lowest with every seed."""
    found = over_seeds(rows, dimension)
    if not found:
        raise InputError(f"no {dimension} were cut in any block")
    blocks = sorted({block for cells in found.values() for block in cells})
    wins = dict.fromkeys(found, 0)
    for block in blocks:
        best = {min(cuts, key=lambda r: r["drop_per_gmac"])["criterion"]
                for seed in dict.fromkeys(r.get("seed") for r in rows)
                if (cuts := [r for r in rows
                             if (r["dimension"], r["block"], r.get("seed")) == (dimension, block, seed)])}
        if len(best) == 1:
            wins[best.pop()] += 1
    medians = {name: [cell[0] for cell in cells.values()] for name, cells in found.items()}
    return pd.DataFrame([{"criterion": name, "median": float(np.median(values)),
                          "95 %": "{:.2f} to {:.2f}".format(*interval(values, np.median)),
                          "lowest in blocks": f"{wins[name]} of {len(blocks)}"} for name,
                         values in medians.items()]).set_index("criterion")


def verdict(rows: Sequence[dict[str, Any]], dimension: str) -> str:
    """What the rows carry of a dimension, in a sentence: the criterion with the lowest median, those that can't be told
    apart from it, and which can't be told apart from random cuts."""
    found, medians = over_seeds(rows, dimension), summary(rows, dimension)["median"]
    best, seeds = medians.idxmin(), len({r.get("seed") for r in rows})
    level = [name for name in found if name != best and told_apart(found, best, name) == 0]
    said = f"{dimension}, {len(found[best])} blocks, {seeds} seed{'s' if seeds > 1 else ''}: "
    said += (f"{best} has the lowest median, but can't be told apart from {', '.join(level)}" if level else
             f"{best} costs least, told apart from all others" if len(found) > 1 else f"{best} alone was measured")
    if RANDOM in found and best != RANDOM:
        lost = [name for name in found if name != RANDOM and told_apart(found, name, RANDOM) >= 0]
        said += f"; not shown to be better than random cuts: {', '.join(lost) or 'none'}"
    return said + ("; one seed, so another may say otherwise" if seeds == 1 else "")
