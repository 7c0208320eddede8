"""Result rows: one measured model a row, with its conditions, appended to results.jsonl and read back as a table."""
import csv
import dataclasses
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitlab.files import InputError, append_line, read_lines, write_lines
from vitlab.uncertainty import digits_of, error_name, plus_minus

ERRORS = {name: error_name(name) for name in ("top1_pct", "miou_pct", "loss")}      # what each one's standard error is called
COLUMNS = ("model", "top1_pct", "gmacs", "params_m", "throughput_img_s", "ratio")


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
    top1_se: float | None = None            # standard errors over images: of top1_pct and miou_pct in points, of loss in nats
    miou_se: float | None = None
    loss_se: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)   # device, dtype, batch, threads, seed, versions

    def __post_init__(self) -> None:
        kinds = {"model": (str, "text"), "dataset": (str, "text"), "split": (str, "text"), "conditions": (dict, "mapping")}
        for name, value in vars(self).items():
            kind, what = kinds.get(name, ((int, float, type(None)), "number"))
            if isinstance(value, bool) or not isinstance(value, kind):
                raise InputError(f"{name} is {str(value)[:80]!r}; a {what} is needed")
        for name in ("top1_pct", "top5_pct", "miou_pct", "pixel_accuracy_pct"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise InputError(f"{name} is {value}; a percentage from 0 to 100 is needed")
        for name in ERRORS.values():
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name} is {value}; a standard error of at least 0 is needed")


def append_row(path: str | Path, row: ResultRow) -> None:
    """Append to a results.jsonl; flushed before this returns."""
    append_line(path, dataclasses.asdict(row))


def write_rows(path: str | Path, rows: list[ResultRow]) -> None:
    """Replace a results file by these rows, atomically."""
    write_lines(path, map(dataclasses.asdict, rows))


def read_rows(path: str | Path) -> list[ResultRow]:
    """The rows of a results.jsonl, in order of first appearance. Rows of the same (model, dataset, split) become one:
    what was measured later stands (a row may hold accuracy alone, a later one speed alone)."""
    merged: dict[tuple, dict[str, Any]] = {}
    known = {f.name for f in dataclasses.fields(ResultRow)}
    for record in read_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get("model"), str):
            raise InputError(f"{path}: holds a line that is no result row: {str(record)[:80]}")
        record = {k: v for k, v in record.items() if k in known and v is not None}
        try:
            ResultRow(**record)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        row = merged.setdefault((record["model"], record.get("dataset", ""), record.get("split", "")), {})
        conditions = {**row.get("conditions", {}), **record.get("conditions", {})}
        for name in ERRORS.keys() & record.keys():
            row.pop(ERRORS[name], None)                         # that of an earlier measurement
        row.update(record, conditions=conditions)
    return [ResultRow(**row) for row in merged.values()]


DIGITS = {"top1_pct": 2, "top5_pct": 2, "miou_pct": 2, "pixel_accuracy_pct": 2, "gmacs": 4, "params_m": 3, "throughput_img_s": 1,
          "ratio": 2, "latency_ms": 2, "loss": 4, "agree_pct": 2, "distill_loss": 4}


def format_cell(value: Any, column: str) -> str:
    """A value as tables show it; '-' where nothing was measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.{DIGITS[column]}f}" if column in DIGITS else str(value)


def shown(row: ResultRow, column: str) -> str:
    """A row's value as tables show it, with its standard error where one is known: "79.54 ± 1.58"."""
    value, error = getattr(row, column), getattr(row, ERRORS[column]) if column in ERRORS else None
    return format_cell(value, column) if value is None or error is None else plus_minus(value, error, DIGITS[column])


def in_words(measures: dict[str, Any]) -> str:
    """Measures that are in DIGITS, by name, each with its standard error where one stands beside it."""
    def one(name: str, value: float) -> str:
        error = measures.get(error_name(name))
        return f"{name} {plus_minus(value, error, digits_of(error, DIGITS[name]))}"
    return ", ".join(one(name, value) for name, value in measures.items() if name in DIGITS)


def format_table(rows: list[ResultRow], columns: tuple[str, ...] = COLUMNS) -> str:
    """Plain-text table, numbers right-aligned; '-' where nothing was measured."""
    cells = [list(columns)] + [[shown(r, c) for c in columns] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths)))
             for line in cells]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def conditions_of(row: ResultRow) -> dict[str, Any]:
    """The conditions as one flat mapping: what is nested under names joined by dots; what is None left out."""
    def flat(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in flat(f"{prefix}.{key}" if prefix else str(key), inner).items()}
        return {} if value is None else {prefix: value if isinstance(value, (str, int, float, bool)) else json.dumps(value)}
    return flat("", row.conditions)


def to_csv(labels: list[str], rows: list[ResultRow]) -> str:
    """CSV of the rows, each behind its label (the entry it is from): all that was measured, unrounded, and a column a condition."""
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


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
         "±": r"$\pm$",
         **{c: f"\\{c}" for c in "&%$#_{}"}}


def to_latex(labels: list[str], rows: list[ResultRow], caption: str, columns: tuple[str, ...] = COLUMNS) -> str:
    """A LaTeX table of the rows, each behind its label, for the package booktabs; everything in it is escaped."""
    def escaped(text: str) -> str:
        return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))
    lines = [["entry", *columns], *([label, *(shown(r, c) for c in columns)] for label, r in zip(labels, rows))]
    head, *body = [" & ".join(map(escaped, line)) + r" \\" for line in lines]
    shape = "l" + "".join("r" if c in DIGITS else "l" for c in columns)
    return "\n".join([r"% needs \usepackage{booktabs}", r"\begin{table}", rf"\caption{{{escaped(caption)}}}",
                      rf"\begin{{tabular}}{{{shape}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
                      r"\end{table}", ""])
