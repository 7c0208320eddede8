"""The report of a batch's run, or of a study: tables, figures, what failed; as page, notebook, CSV and LaTeX."""
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from IPython.display import HTML, Image, display
from matplotlib.figure import Figure

from vitlab.plan.shape import is_int
from vitlab.plots import accuracy_against_cost
from vitlab.plots.training import VALUES
from vitlab.runtime import results
from vitlab.runtime.caveats import caveat_of, is_quick
from vitlab.runtime.files import InputError, atomic_write, read_json, read_lines
from vitlab.runtime.results import (
    DIGITS,
    TOLD_BY,
    ResultRow,
    conditions_of,
    notes,
    read_rows,
    shown,
    titles,
    with_distance,
)
from vitlab.workbench import notebooks
from vitlab.workbench.batch_entry import ENTRY, RESULTS, SUMMARY, maybe_json
from vitlab.workbench.comparing import UNTOLD, difference

PAGE, NOTEBOOK, CSV, LATEX = "report.html", "report.ipynb", "results.csv", "results.tex"
QUALITIES = tuple(name for name in VALUES if name != "top5_pct")
# conditions of a quality
SAME_IMAGES = ("images", "limit", "prepared", "windows")
QUICK, ABSOLUTE = "quick", ("throughput_img_s", "latency_ms")
COLUMNS = ("model", "dataset", "split", "top1_pct", "top5_pct", "miou_pct", "loss", "gmacs", "params_m",
           "throughput_img_s", "latency_ms", "ratio")


def report(run: str | Path) -> Path:
    """Write run/report.ipynb, executed, run/report.html of it, and run/results.csv and .tex; returns the page. Raises
    InputError for a folder that is no run.

    Args:
        run: run folder of a batch, or a study with results.jsonl
    """
    run = Path(run)
    rows_of(run)
    with tempfile.TemporaryDirectory(dir=run, prefix=".report-") as folder:
        executed = notebooks.run(notebooks.NOTEBOOKS / "91_report.ipynb", folder, {"run": str(run.resolve())},
                                 progress=False)
        os.replace(executed, run / NOTEBOOK)
    return notebooks.report(run / NOTEBOOK, run / PAGE)


def entries_of(run: str | Path) -> list[dict[str, Any]]:
    """The entries of a batch's summary, each with its "folder"; of a study, the study itself."""
    run = Path(run)
    if (run / SUMMARY).exists():
        return [entry | {"folder": run / "entries" / entry["name"]} for entry in _entries(run / SUMMARY)]
    if (run / RESULTS).exists():
        return [{"name": run.resolve().name, "notebook": "", "state": "done", "seconds": None, "why": None,
                 "folder": run}]
    raise InputError(f"{run}: no run of a batch, which has a summary.json, and no study, which has a {RESULTS}")


def _entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a summary.json. Raises InputError where it is none, or a name leads out of the run's folder."""
    kinds = {"name": str, "notebook": str, "state": str, "seconds": (int, float, type(None)), "why": (str, type(None))}
    data = read_json(path)
    entries = data.get("entries") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not all(
            isinstance(e, dict) and all(k in e and isinstance(e[k], t) for k, t in kinds.items())
            and Path(e["notebook"]).name == e["notebook"] for e in entries):
        raise InputError(f"{path}: not the summary of a batch")
    for entry in entries:
        if not ENTRY.fullmatch(entry["name"]):
            raise InputError(f"{path}: {entry['name'][:80]!r} is no name of an entry")
    return entries


def rows_of(run: str | Path) -> tuple[list[str], list[ResultRow]]:
    """(entry, row) of every model that an entry measured, with what entries before it measured of the same model."""
    labels, rows = [], []
    for entry in entries_of(run):
        folder = entry["folder"]
        status = maybe_json(folder / "status.json")
        status = {} if status is None else status
        if not isinstance(status, dict) or not is_int(status.get("inherited", 0)):
            raise InputError(f"{folder / 'status.json'}: not the status of an entry")
        found = read_rows(folder / RESULTS)
        own = {(record.get("model"), record.get("dataset", ""), record.get("split", ""))
               for record in read_lines(folder / RESULTS)[status.get("inherited", 0):]}
        found = [row for row in found if (row.model, row.dataset, row.split) in own]
        labels += [entry["name"]] * len(found)
        rows += found
    return labels, rows


def conditions(rows: list[ResultRow]) -> tuple[str, list[str]]:
    """(what is the same in all rows that say it, what differs in each row), as text; a quick row begins with QUICK."""
    flat = [{key: value for key, value in conditions_of(row).items() if key not in ("quick", "speed.quick")}
            for row in rows]
    keys = dict.fromkeys(key for given in flat for key in given)
    values = {key: [given[key] for given in flat if key in given] for key in keys}
    shared = {key: found[0] for key, found in values.items() if all(value == found[0] for value in found)}

    def text(given: dict[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in given.items())
    own = [text({k: v for k, v in given.items() if k not in shared}) for given in flat]
    return text(shared), [f"{QUICK}, {more}".removesuffix(", ") if is_quick(row) else more
                          for row, more in zip(rows, own)]


def _cost(row: ResultRow) -> float:
    return row.gmacs or 0.0


def of_one_set(rows: Sequence[ResultRow]) -> tuple[str, list[ResultRow]]:
    """(the one of QUALITIES that most rows have, those that have it of the data set and split that most are of)."""
    quality = max(QUALITIES, key=lambda name: sum(getattr(row, name) is not None for row in rows))
    rows = [row for row in rows if getattr(row, quality) is not None]
    sets = Counter((row.dataset, row.split) for row in rows).most_common(1)
    return quality, [row for row in rows if (row.dataset, row.split) == sets[0][0]]


def _compared(run: str | Path) -> tuple[str, list[ResultRow]]:
    """(a quality, the rows that have it, of the data set that most of them are of, the dearest first, and of the others
    those that were measured as that one, on as many images)."""
    quality, found = of_one_set([row for row in rows_of(run)[1] if row.gmacs is not None])
    found, same = sorted(found, key=_cost, reverse=True), (*SAME_IMAGES, TOLD_BY.get(quality))
    return quality, [row for row in found if all(row.conditions.get(k) == found[0].conditions.get(k) for k in same)]


def headline(run: str | Path) -> str:
    """One sentence: of the models that cost less than the dearest, the cheapest whose quality can't be told from that
    one's, or, where there is none, the one that lost least: cost, quality, speed, data, version and date."""
    quality, rows = _compared(run)
    if len({row.gmacs for row in rows}) < 2:
        return "Fewer than two models were measured on the same images: nothing to compare yet."
    dense, sign = rows[0], -1 if quality == "distill_loss" else 1
    others = [row for row in rows if _cost(row) < _cost(dense)]
    level = [row for row in others if UNTOLD in difference(row, dense, quality)]
    best = min(level, key=_cost) if level else max(others, key=lambda row: sign * getattr(row, quality))
    measured_at = max(path.stat().st_mtime for path in (entry["folder"] / RESULTS for entry in entries_of(run))
                      if path.exists())
    saved = 100 * (1 - _cost(best) / _cost(dense))
    version = best.conditions.get("versions", {}).get("vitlab")
    speed = "" if best.ratio is None else f", throughput ratio {shown(best, 'ratio')}"
    lost = f"{difference(best, dense, quality)}: {shown(best, quality)} in place of {shown(dense, quality)}"
    return (f"{best.model}: {saved:.0f} % fewer GMACs than {dense.model} ({best.gmacs:.4g} of {dense.gmacs:.4g})"
            f"{speed}; {lost}. {best.dataset} {best.split}{f', vitlab {version}' if version else ''}, "
            f"{time.strftime('%Y-%m-%d', time.localtime(measured_at))}. {caveat_of(rows)}").rstrip()


def losses(run: str | Path) -> str:
    """A line for each of the rows that `headline` compares, beside the dearest one: what it lost and gained."""
    quality, rows = _compared(run)
    return "\n".join(f"{row.model}: {difference(row, dense, quality)}, {100 * (1 - _cost(row) / _cost(dense)):.1f} % "
                     f"fewer GMACs, throughput ratio {shown(row, 'ratio')}" for dense in rows[:1] for row in rows[1:])


def cost_figure(run: str | Path, published: str = "") -> Figure | None:
    """Quality against cost of the rows that `headline` compares; None where there is nothing to draw."""
    quality, rows = _compared(run)
    return accuracy_against_cost(rows, quality, published) if rows else None


def summary_table(run: str | Path) -> HTML:
    """What became of each entry, with a link to its executed notebook and its log."""
    lines = []
    for entry in entries_of(run):
        links = [_link(run, entry["folder"] / name, name) for name in (entry["notebook"], "log.txt") if name]
        seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.0f} s"
        lines.append([entry["name"], entry["state"], seconds, links, entry["why"] or ""])
    return html_table(["entry", "state", "time", "files", "why"], lines)


def results_table(run: str | Path) -> HTML:
    """Every row, with standard errors and the range of a ratio; a quick row says so. Conditions that differ between
    rows stand in the row, the others below the table, with what ±, ratio and quick stand for."""
    labels, rows = rows_of(run)
    columns = measured(rows, COLUMNS)
    shared, own = conditions(rows)
    lines = [[label, *(shown(row, c) for c in columns), more] for label, row, more in zip(labels, rows, own)]
    return html_table(["entry", *titles(rows, columns), "conditions"], lines, ("entry", *columns, "conditions"),
                      [*notes(rows, columns).splitlines(), f"The same in all rows that have it: {shared}"])


def table_of(rows: list[ResultRow], columns: tuple[str, ...] = results.COLUMNS, *below: str) -> HTML:
    """What a notebook shows of rows, whatever the width of its window: `format_table` as HTML, and below it what ±,
    ratio and quick stand for, and other lines."""
    columns = with_distance(rows, columns)
    return html_table(titles(rows, columns), [[shown(row, c) for c in columns] for row in rows], columns,
                      [*notes(rows, columns).splitlines(), *below])


def measured(rows: list[ResultRow], columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns in which a row has something, `with_distance`. Entries were timed in runs of their own, where the
    machine may have been slower: beside a ratio stands no absolute speed, which is in the CSV."""
    found = tuple(c for c in with_distance(rows, columns) if any(getattr(row, c) not in (None, "") for row in rows))
    return tuple(c for c in found if "ratio" not in found or c not in ABSOLUTE)


def show_figures(run: str | Path) -> None:
    """Display the figures of every entry, with links to the same as SVG and PDF."""
    for entry in entries_of(run):
        paths = sorted((entry["folder"] / "figures").glob("*.png"))
        if paths:
            display(HTML(f"<h3>{escape(entry['name'])}</h3>"))
        for path in paths:
            links = " ".join(_link(run, path.with_suffix(f".{kind}"), kind.upper()) for kind in ("svg", "pdf"))
            display(HTML(f"<p>{escape(path.stem)} {links}</p>"), Image(filename=str(path), width=700))


def write_tables(run: str | Path) -> list[Path]:
    """results.csv with everything; results.tex with the columns that were measured, its caption says of what."""
    labels, rows = rows_of(run)
    columns = measured(rows, tuple(c for c in COLUMNS if c not in ("dataset", "split", "top5_pct", "loss")))
    sets = ", ".join(dict.fromkeys(f"{row.dataset} {row.split}" for row in rows if row.dataset))
    atomic_write(Path(run) / CSV, results.to_csv(labels, rows))
    said = [sets, conditions(rows)[0], *notes(rows, columns).splitlines()]
    atomic_write(Path(run) / LATEX, results.to_latex(labels, rows, ". ".join(text for text in said if text), columns))
    return [Path(run) / CSV, Path(run) / LATEX]


def _link(run: str | Path, path: Path, text: str) -> str:
    """HTML: a relative link where the file is there."""
    if not path.exists():
        return ""
    return f'<a href="{escape(path.relative_to(run).as_posix())}">{escape(text)}</a>'


def html_table(head: list[str], lines: list[list[Any]], columns: Sequence[str] | None = None,
               below: Sequence[str] = ()) -> HTML:
    """Cells are escaped texts; a list is of links, which are HTML already. columns: what the titles in `head` are of,
    where they differ; below: lines of text."""
    def row(kind: str, line: list[Any]) -> str:
        cells = [f'<{kind} style="text-align: {"right" if column in DIGITS else "left"}">'
                 f"{' '.join(value) if isinstance(value, list) else escape(value)}</{kind}>"
                 for value, column in zip(line, columns or head)]
        return f"<tr>{''.join(cells)}</tr>"
    return HTML(f"<table>{row('th', head)}{''.join(row('td', line) for line in lines)}</table>"
                f"{''.join(f'<p>{escape(text)}</p>' for text in below)}")
