"""Where cutting hurts, measured, and what that says of criteria, and no more: over blocks and seeds, with intervals,
and no best one that noise could have made.

Rows are those of `sensitivity`, of one seed or several, each with its "seed".
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from tqdm import tqdm

from vitlab.criteria.units import UNIT_CRITERIA
from vitlab.measure.distance import output_of
from vitlab.measure.units import unit_scores
from vitlab.models import shape_of
from vitlab.models.opening import Source
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import macs
from vitlab.plan.rules import PROTECT, Match, Select
from vitlab.plan.shape import ViTShape
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, append_line
from vitlab.runtime.results import DIGITS, ResultRow
from vitlab.runtime.uncertainty import error_name, interval, overlap, plus_minus, standard_error
from vitlab.search import SearchSpace
from vitlab.search.token_dimensions import default_tokens
from vitlab.workbench.steps import objective_on, open_dense, open_matching, pick_device

SENSITIVITY = "sensitivity.jsonl"
Z = 1.96                                        # standard errors from a mean to the ends of its interval of 95 %
UNTOLD = " (can't be told from 0)"
WHAT = {"top1_pct": "points of top-1", "miou_pct": "points of mIoU", "distill_loss": "of distance"}
RANDOM = "random"                               # the criterion that knows nothing


def sensitivity(source: Source, data: str | Path, out: str | Path, *, criteria: Sequence[str] = tuple(UNIT_CRITERIA),
                ratio: float = 0.25, images: int = 1000, score_images: int = 512, metric: str = "distill_loss",
                class_map: str | Path | None = None, config: RunConfig = RunConfig()) -> list[dict[str, Any]]:
    """Cut one dimension of one block by `ratio`, by each criterion, and measure on the images of train to choose on, at
    most `images`, others than the score_images at most that the scores are of (`ImageData.parts`).

    Returns a row per cut: criterion, dimension ("heads", "neurons" or "tokens"), block, drop (dense value less the cut
    one's, of `metric`), drop_se (of the cut one's value), gmacs_removed and drop_per_gmac. Rows go to
    out/sensitivity.jsonl as they are measured; another call begins anew. Tokens are selected in that block alone
    (criterion "class attention"), or, where the grid is needed or there is no class token, merged there by content
    (criterion "alike keys").
    """
    found = open_dense(source)
    shape = shape_of(found.model)
    labels = metric != "distill_loss" or output_of(shape).labelled and "taylor" in criteria
    opened, device = open_matching(data, found, class_map, labels=labels), pick_device(config.device)
    parts = opened.parts(config.seed, score=score_images, choose=images)
    objective = objective_on(found.model, parts, "choose", metric, device, config.workers)
    empty = CompressionPlan.empty(shape)
    dense, whole, rows = objective(empty)["value"], macs(empty)["total"], []
    batches = list(parts.batches("score", found.model, workers=config.workers))
    path = Path(out) / SENSITIVITY
    path.unlink(missing_ok=True)
    bar = tqdm(total=2 * shape.depth * len(criteria) + shape.before_queries, desc="sensitivity", unit="cut",
               disable=config.quiet)

    def measure(criterion: str, dimension: str, block: int, plan: CompressionPlan) -> None:
        removed = (whole - macs(plan)["total"]) / 1e9
        if removed > 0:
            measures = objective(plan)
            drop = dense - measures["value"]
            rows.append({"criterion": criterion, "dimension": dimension, "block": block, "ratio": ratio, "drop": drop,
                         "drop_se": measures.get(error_name(metric)), "gmacs_removed": removed,
                         "drop_per_gmac": drop / removed, "metric": metric})
            append_line(path, rows[-1])
        bar.update()
    for criterion in criteria:
        bar.set_postfix(criterion=criterion)
        scores = unit_scores(found.model, batches, criterion=criterion, seed=config.seed, device=device, progress=False)
        for unit in filter(shape.cuts, ("neurons", "heads")):
            space = SearchSpace(shape=shape, units=(unit,), tokens="none", max_ratio=max(ratio, 0.5))
            # One head is the least that can be cut, so it is one where the ratio is less than that.
            cut = max(ratio, 0.5 / shape.num_heads) if unit == "heads" else ratio
            for block, policy in enumerate(np.eye(shape.depth) * cut):
                measure(criterion, unit, block, space.plan(policy, heads=scores.heads, neurons=scores.neurons))
    by, cut_tokens = ("class attention", _select_in) if default_tokens(shape) == "select" else ("alike keys", _match_in)
    for block in range(shape.before_queries if shape.cuts("tokens") else 0):
        measure(by, "tokens", block, cut_tokens(shape, block, ratio))
    bar.close()
    return rows


def _select_in(shape: ViTShape, block: int, ratio: float) -> CompressionPlan:
    """The plan that selects tokens in one block."""
    kept = max(1, int(shape.num_tokens * (1 - ratio)) - shape.num_prefix_tokens)
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=Select(kept=kept) if index == block else None)
                                                     for index in range(shape.depth)))


def _match_in(shape: ViTShape, block: int, ratio: float) -> CompressionPlan:
    """The plan that merges tokens by content in one block, and gives them back at the end."""
    merged = min(int(shape.num_patches * ratio), shape.num_patches // 2)
    protect = PROTECT if shape.class_token else 0.0
    rules = [Match(merged=merged if index == block else 0, protect=protect)
             if block <= index < shape.before_queries else None for index in range(shape.depth)]
    return CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=rule) for rule in rules))


def clear_lowest(values: Sequence[float], errors: Sequence[float | None]) -> int | None:
    """Which value is lowest such that its interval of 95 % overlaps no other's; None where there is none, or an error
    is not known."""
    known = [error for error in errors if error is not None]
    if len(values) < 2 or len(known) < len(errors):
        return None
    ends = [(value - Z * error, value + Z * error) for value, error in zip(values, known)]
    lowest = int(np.argmin(values))
    return None if any(overlap(ends[lowest], other) for i, other in enumerate(ends) if i != lowest) else lowest


def difference(row: ResultRow, base: ResultRow, name: str | None = None) -> str:
    """A row's value less another's: "+1.20 ± 0.70 points of top-1 (can't be told from 0)", by default of the first of
    WHAT that both have. The error is that of two draws of images, sqrt(e^2 + e'^2), as rows don't keep their images: of
    the same images the difference is surer."""
    name = name or next((each for each in WHAT if None not in (getattr(row, each), getattr(base, each))), None)
    if name is None:
        return "nothing that both have"
    value, errors = getattr(row, name) - getattr(base, name), [getattr(each, error_name(name)) for each in (row, base)]
    error = None if None in errors else float(np.hypot(*errors))
    digits = DIGITS[name]
    text = f"{value:+.{digits}f}{'' if error is None else f' ± {error:.{digits}f}'} {WHAT[name]}"
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
