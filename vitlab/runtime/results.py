"""Result rows: one measured model a row, with its conditions, appended to results.jsonl and read back as a table."""
import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitlab.runtime.caveats import caveat_of
from vitlab.runtime.files import InputError, append_line, named, read_lines, require, write_lines
from vitlab.runtime.uncertainty import digits_of, error_name, plus_minus

ERRORS = {name: error_name(name) for name in ("top1_pct", "miou_pct", "loss", "distill_loss")}      # their fields
PLUS_MINUS = "±: one standard error over images"
RATIO = "ratio: the baseline's time divided by the model's, in turn in one process, the median over rounds"
SURE = 5                        # more rounds have a range of 95 % (`vitlab.measure.throughput.median_range`)
COLUMNS = ("model", "top1_pct", "gmacs", "params_m", "ratio")   # absolute speeds of several runs don't compare
NOISY = "too noisy to tell"
TOLD_BY = {"top1_pct": "top1", "distill_loss": "distance"}      # column: the condition that says what it is


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """What was measured of one model. Fields not measured are None."""

    model: str
    dataset: str = ""
    split: str = ""                         # the named split that these are on
    top1_pct: float | None = None           # 0 to 100
    top5_pct: float | None = None           # 0 to 100
    miou_pct: float | None = None           # 0 to 100; of a Segmenter, IoU per class stands in the conditions
    pixel_accuracy_pct: float | None = None     # 0 to 100
    loss: float | None = None               # mean cross-entropy
    gmacs: float | None = None              # per image, everything that is multiplied
    params_m: float | None = None
    throughput_img_s: float | None = None
    latency_ms: float | None = None         # one forward, batch 1 unless the conditions name another
    ratio: float | None = None              # throughput over the baseline's, measured in turn
    top1_se: float | None = None  # standard errors over images: of top1_pct and miou_pct in points, of loss in nats
    miou_se: float | None = None
    loss_se: float | None = None
    distill_loss: float | None = None       # mean distance to the dense model's output; which one, the conditions say
    distill_loss_se: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)   # device, dtype, batch, threads, seed, versions

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(("model", "dataset", "split"), (str, "text")) | {"conditions": (dict, "mapping")}
        for name, value in vars(self).items():
            kind, what = kinds.get(name, ((int, float, type(None)), "number"))
            if isinstance(value, bool) or not isinstance(value, kind):
                raise InputError(f"{name} is {str(value)[:80]!r}; a {what} is needed")
        for name in ("top1_pct", "top5_pct", "miou_pct", "pixel_accuracy_pct"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 100, f"{name} is {value}; a percentage from 0 to 100 is needed")
        for name in ERRORS.values():
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} is {value}; a standard error of at least 0 is needed")


def append_row(path: str | Path, row: ResultRow) -> None:
    """Append to a results.jsonl; flushed before this returns."""
    append_line(path, dataclasses.asdict(row))


def write_rows(path: str | Path, rows: list[ResultRow]) -> None:
    """Replace a results file by these rows, atomically."""
    write_lines(path, map(dataclasses.asdict, rows))


def read_rows(path: str | Path) -> list[ResultRow]:
    """The rows of a results.jsonl, in order; of one (model, dataset, split) what was measured later stands."""
    merged: dict[tuple, dict[str, Any]] = {}
    known = {f.name for f in dataclasses.fields(ResultRow)}
    for record in read_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get("model"), str):
            raise InputError(f"{path}: holds a line that is no result row: {str(record)[:80]}")
        record = {k: v for k, v in record.items() if k in known and v is not None}
        with named(path):
            ResultRow(**record)
        row = merged.setdefault((record["model"], record.get("dataset", ""), record.get("split", "")), {})
        conditions = {**row.get("conditions", {}), **record.get("conditions", {})}
        for name in ERRORS.keys() & record.keys():
            row.pop(ERRORS[name], None)                         # that of an earlier measurement
        row.update(record, conditions=conditions)
    return [ResultRow(**row) for row in merged.values()]


DIGITS = {"top1_pct": 2, "top5_pct": 2, "miou_pct": 2, "pixel_accuracy_pct": 2, "gmacs": 4, "params_m": 3,
          "throughput_img_s": 1, "ratio": 2, "latency_ms": 2, "loss": 4, "agree_pct": 2, "distill_loss": 4}


def format_cell(value: Any, column: str) -> str:
    """A value as tables show it; '-' where nothing was measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.{DIGITS[column]}f}" if column in DIGITS else str(value)


def with_range(ratio: float, span: Sequence[float] | None) -> str:
    """A throughput ratio with its range over the rounds of timing, marked where that holds 1: "1.60 (1.52 to 1.66)". A
    ratio of one round has no range but the mark; a baseline, and a ratio whose range is not known, stand alone."""
    low, high = span or (1, 1)
    return f"{ratio:.2f}" + f" ({low:.2f} to {high:.2f})" * (low < high) + f", {NOISY}" * noisy(low, high)


def ratio_words(speeds: Sequence[dict[str, Any]]) -> str:
    """What the ratio is, and the range in brackets behind it, of speeds measured under these conditions; rows from
    before that range was one of the median have the least and the largest round."""
    sure = [given.get("repeats", 0) > SURE and "ratio:" in given.get("timing", "") for given in speeds
            if given.get("ratio_range") and given["ratio_range"][0] < given["ratio_range"][1]]
    words = ["where that median lies (95 %)"] * any(sure) + ["the least and the largest round"] * (not all(sure))
    return RATIO + (f"; in brackets {', or '.join(words)}" if words else "")


def speed_of(row: ResultRow) -> dict[str, Any]:
    """What a row's speed was measured under; {} where none was."""
    return row.conditions.get("speed", {})


def shown(row: ResultRow, column: str) -> str:
    """A row's value as tables show it, with its standard error or a ratio's range where known: "79.54 ± 1.58"."""
    value, error = getattr(row, column), getattr(row, ERRORS[column]) if column in ERRORS else None
    if column == "ratio" and value is not None:
        return with_range(value, speed_of(row).get("ratio_range"))
    return format_cell(value, column) if value is None or error is None else plus_minus(value, error, DIGITS[column])


def in_words(measures: dict[str, Any]) -> str:
    """Measures that are in DIGITS, by name, each with its standard error where one stands beside it."""
    def one(name: str, value: float) -> str:
        error = measures.get(error_name(name))
        return f"{name} {plus_minus(value, error, digits_of(error, DIGITS[name]))}"
    return ", ".join(one(name, value) for name, value in measures.items() if name in DIGITS)


def with_distance(rows: list[ResultRow], columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns, the distance behind top-1 where a row has only that (models without a classifier); alone where no
    row has a top-1."""
    if "top1_pct" not in columns or all(row.top1_pct is not None or row.distill_loss is None for row in rows):
        return columns
    left_out = () if any(row.top1_pct is not None for row in rows) else ("top1_pct", "top5_pct", "loss")
    both = (each for name in columns for each in ((name, "distill_loss") if name == "top1_pct" else (name,)))
    return tuple(name for name in dict.fromkeys(both) if name not in left_out)


def format_table(rows: list[ResultRow], columns: tuple[str, ...] = COLUMNS) -> str:
    """Plain-text table, numbers right-aligned; '-' where nothing was measured; `with_distance`."""
    columns = with_distance(rows, columns)
    return aligned([titles(rows, columns), *([shown(r, c) for c in columns] for r in rows)])


def titles(rows: list[ResultRow], columns: tuple[str, ...]) -> list[str]:
    """Names of the columns; those of speed say of which batch: "ratio (batch 32)"."""
    sizes = list(dict.fromkeys(speed_of(row)["batch_size"] for row in rows if "batch_size" in speed_of(row)))
    batches = {"throughput_img_s": sizes, "ratio": sizes, "latency_ms": [1] if sizes else []}
    return [f"{name} (batch {', '.join(map(str, batches[name]))})" if batches.get(name) else name for name in columns]


def notes(rows: list[ResultRow], columns: tuple[str, ...] = COLUMNS) -> str:
    """What is said once below a table of rows: what ±, a ratio, a distance and a top-1 by neighbours are; a caveat."""
    columns = with_distance(rows, columns)
    known = any(getattr(row, ERRORS[name]) is not None for row in rows for name in columns if name in ERRORS)
    timed = "ratio" in columns and any(row.ratio is not None for row in rows)
    said = {name: dict.fromkeys(str(row.conditions[key]) for row in rows if key in row.conditions)
            for name, key in TOLD_BY.items() if name in columns}
    lines = [PLUS_MINUS if known else "", ratio_words([speed_of(row) for row in rows]) if timed else "",
             *(f"{name}: {', or '.join(each)}" for name, each in said.items() if each), caveat_of(rows)]
    return "\n".join(line for line in lines if line)


def conditions_of(row: ResultRow) -> dict[str, Any]:
    """The conditions as one flat mapping: what is nested under names joined by dots; what is None left out."""
    def flat(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in flat(f"{prefix}{key}.", inner).items()}
        plain = isinstance(value, (str, int, float, bool))
        return {} if value is None else {prefix[:-1]: value if plain else json.dumps(value)}
    return flat("", row.conditions)


def to_csv(labels: list[str], rows: list[ResultRow]) -> str:
    """CSV of the rows, each behind its label: all that was measured, unrounded, and a column a condition."""
    names = [f.name for f in dataclasses.fields(ResultRow) if f.name != "conditions"]
    conditions = [conditions_of(row) for row in rows]
    keys = list(dict.fromkeys(key for given in conditions for key in given))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")

    def plain(value: Any) -> Any:
        """A text that a spreadsheet would take for a formula, with the sign that makes it a text."""
        if not isinstance(value, str):
            return value
        value = value.replace("\r", " ")                        # which Python's csv does not quote
        return f"'{value}" if value.lstrip().startswith(("=", "+", "-", "@")) else value
    writer.writerow(map(plain, ["entry", *names, *keys]))
    for label, row, given in zip(labels, rows, conditions):
        writer.writerow(map(plain, [label, *(getattr(row, name) for name in names), *(given.get(key) for key in keys)]))
    return text.getvalue()


def noisy(ratio_min: float, ratio_max: float) -> bool:
    """Whether a ratio of that range may as well be 1: it holds 1, or one round made it. 1 to 1 is a baseline's."""
    return (ratio_min <= 1 <= ratio_max or ratio_min == ratio_max) and not ratio_min == ratio_max == 1


def format_speeds(rows: list[ResultRow]) -> str:
    """Plain-text table of measured speeds, the baseline first, with ranges of the ratios; below, what these are."""
    measured = rows[0].conditions["speed"]
    cells = [["model", f"images/s (batch {measured['batch_size']})", "ratio", "range", "ms (batch 1)", ""]]
    for row in rows:
        low, high = row.conditions["speed"]["ratio_range"]
        cells.append([row.model, format_cell(row.throughput_img_s, "throughput_img_s"), format_cell(row.ratio, "ratio"),
                      f"{low:.2f} to {high:.2f}", format_cell(row.latency_ms, "latency_ms"),
                      NOISY if noisy(low, high) else ""])
    what = "where that median lies (95 %)" if measured["repeats"] > 5 else "the least and the largest of so few rounds"
    return aligned(cells) + (
        f"\nratio: median over {measured['repeats']} rounds of the first model's time by this one's, in turn; range: "
        f"{what};\nimages/s: the first model's median, times the ratio; ms: the same at batch 1")


def aligned(cells: list[list[str]]) -> str:
    """Plain text of a heading and rows, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
         ">": r"\textgreater{}", "±": r"$\pm$", **{c: f"\\{c}" for c in "&%$#_{}"}}


def to_latex(labels: list[str], rows: list[ResultRow], caption: str, columns: tuple[str, ...] = COLUMNS) -> str:
    """A LaTeX table of the rows, each behind its label, for the package booktabs; everything in it is escaped."""
    def escaped(text: str) -> str:
        return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))
    lines = [["entry", *titles(rows, columns)],
             *([label, *(shown(r, c) for c in columns)] for label, r in zip(labels, rows))]
    head, *body = [" & ".join(map(escaped, line)) + r" \\" for line in lines]
    shape = "l" + "".join("r" if c in DIGITS else "l" for c in columns)
    return "\n".join([r"% needs \usepackage{booktabs}", r"\begin{table}", rf"\caption{{{escaped(caption)}}}",
                      rf"\begin{{tabular}}{{{shape}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
                      r"\end{tabular}", r"\end{table}", ""])
