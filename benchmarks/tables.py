"""Write the tables of docs/ from benchmarks/results/, so that no number in them is typed.

    python benchmarks/tables.py
"""
import statistics
from collections.abc import Callable
from pathlib import Path

from vitlab.runtime.caveats import caveat
from vitlab.runtime.files import atomic_write, read_lines
from vitlab.runtime.results import ratio_words, with_range
from vitlab.runtime.uncertainty import error_name, plus_minus, share_error

HERE = Path(__file__).parent
PAGES = (*((HERE.parent / "docs" / f"{name}.md") for name in (
    "prune_and_merge", "search", "off_the_shelf", "results", "scale", "deploy", "segmentation", "log")),
         HERE.parent / "README.md")

PAIRED = "against the dense model: the standard error of the images' own differences"


def _table(head: list[str], rows: list[list[str]], notes: list[str] | None = None) -> str:
    """notes: said once, below the table."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    said = [note for note in notes or [] if note]
    return "\n".join([*lines, *(["", f"*{'. '.join(said)}.*"] if said else [])])


def _error(r: dict, name: str) -> float | None:
    """One standard error of a measure; a top-1 that has none stored follows from its number of images."""
    found, images = r.get(error_name(name)), r["conditions"].get("images")
    if found is None and name == "top1_pct" and images:
        return share_error(round(r[name] * images / 100), images)
    return found


def _value(r: dict, name: str, digits: int) -> str:
    return plus_minus(r[name], _error(r, name), digits)


def _against(r: dict, value: float, name: str = "against_dense") -> str:
    """A difference, with its sign and, where each image was kept, its own error."""
    error = r.get(error_name(name))
    return f"{value:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def _sampled(values: list[float], images: int) -> str:
    """How sure each of these top-1 is, where ± beside each would be too much."""
    errors = [share_error(round(value * images / 100), images) for value in values]
    return f"One standard error over the {images:,} images is {min(errors):.1f} to {max(errors):.1f} points, within a draw or seed"  # noqa: E501


def _notes(rows: list[dict], *names: str, paired: bool = False) -> list[str]:
    """What ± stands for, if any row has one."""
    known = any(r.get(name) is not None and _error(r, name) is not None for r in rows for name in names)
    return [f"±: one standard error over images{'; ' + PAIRED if paired else ''}" if known else "", _caveat(rows)]


def _caveat(rows: list[dict]) -> str:
    return caveat(quick=any(r["conditions"].get("quick") for r in rows))


def _range(r: dict) -> list[float] | None:
    """Of the throughput ratio over the rounds of timing; None where it was not kept."""
    given = r["conditions"].get("speed", {}).get("ratio_range") or r["conditions"].get("ratio_range")
    return given if given and given[0] < given[1] else None


def _ratio(r: dict) -> str:
    """ "1.60 (1.52 to 1.66)", marked where the range holds 1; "-" where no speed was measured."""
    return with_range(r["ratio"], _range(r)) if r["ratio"] else "-"


def _speed(rows: list[dict]) -> tuple[str, list[str]]:
    """(the ratio's column, notes): batch and dtype in the name, the definition once below."""
    timed = [r for r in rows if r["ratio"]]
    given = [r["conditions"].get("speed", {}) or r["conditions"] for r in timed]
    sizes = dict.fromkeys(f"batch {each['batch_size']}" for each in given if "batch_size" in each)
    name = "throughput ratio" + (f" ({', '.join(sizes)})" if sizes else "")
    spans = [each | {"ratio_range": _range(r)} for each, r in zip(given, timed)]
    return name, [f"Throughput {ratio_words(spans)}"] if timed else []


def boundaries(rows: list[dict]) -> str:
    """One line per choice, one column per keep rate: median (lowest to highest seed)."""
    keeps = list(dict.fromkeys(r["model"].rsplit(", ", 1)[1] for r in rows))
    names = list(dict.fromkeys(r["model"].rsplit(", ", 1)[0] for r in rows))
    cell = {r["model"]: r for r in rows}

    def text(r: dict) -> str:
        return f"{r['top1_pct']:.1f} ({min(r['conditions']['draws']):.1f} to {max(r['conditions']['draws']):.1f})"
    images = int(rows[0]["split"].split()[-1])
    return _table(["scores and plan", *keeps], [[n, *[text(cell[f"{n}, {k}"]) for k in keeps]] for n in names],
                  [_sampled([r["top1_pct"] for r in rows], images)])


def published_table(rows: list[dict]) -> str:
    """One line per choice, one column per keep rate: median (lowest to highest draw)."""
    dense, *rest = rows
    names = list(dict.fromkeys(r["model"].rsplit(", ", 1)[0] for r in rest))
    keeps = list(dict.fromkeys(r["model"].rsplit(" ", 1)[1] for r in rest))
    cell = {(r["model"].rsplit(", ", 1)[0], r["model"].rsplit(" ", 1)[1]): r for r in rest}

    def text(r: dict) -> str:
        draws = r["conditions"]["draws"]
        return f"{r['top1_pct']:.1f} ({min(draws):.1f} to {max(draws):.1f})"

    costs = [f"keep {k}, {cell[names[0], k]['gmacs']:.2f} GMACs "
             f"({cell[names[0], k]['conditions']['gmacs_published']:.2f} published)"
             for k in keeps]
    body = [["dense", *[f"{dense['top1_pct']:.1f}"] * len(keeps)]]
    body += [["absolute per " + n.replace("batch ", "batch of ").replace("image 64", "image"),
              *[text(cell[n, k]) for k in keeps]]
             for n in names]
    return _table(["scores and plan", *costs], body,
                  [_sampled([r["top1_pct"] for r in rows], dense["conditions"]["images"])])


def cifar10(rows: list[dict]) -> str:
    name, notes = _speed(rows)
    lines = [[r["model"], _value(r, "top1_pct", 2), f"{r['gmacs']:.4f}", _ratio(r)] for r in rows]
    return _table(["model", "top-1 %", "GMACs", name], lines, [*_notes(rows, "top1_pct"), *notes])


def token_speed(rows: list[dict]) -> str:
    """Dense and deployed rows; the training form's are in the results and the figure."""
    def line(r: dict) -> list[str]:
        c = r["conditions"]
        return [r["model"].replace("_patch16_224", ""), f"{c['dtype']}, batch {c['batch_size']}, {c['threads']} "
                                                        f"threads, {c['device']}",
                f"{r['gmacs']:.3f}", f"{r['throughput_img_s']:.1f}", _ratio(r), f"{c['of_mac_ratio']:.2f}"]
    head = ["model", "conditions", "GMACs", "images/s", "throughput ratio", "of the MAC ratio"]
    return _table(head, [line(r) for r in rows if "training" not in r["model"]], _speed(rows)[1])


def mdc_table(rows: list[dict]) -> str:
    dense = rows[0]["top1_pct"]

    def published(r: dict) -> str:
        return f"{r['conditions']['published_gmacs']:.2f}" if "published_gmacs" in r["conditions"] else "-"
    return _table(["cut", "GMACs", "published GMACs", "parameters (M)", "top-1 %", "against dense"],
                  [[r["model"], f"{r['gmacs']:.2f}", published(r), f"{r['params_m']:.2f}", _value(r, "top1_pct", 2),
                    f"{r['top1_pct'] - dense:+.2f}"] for r in rows], _notes(rows, "top1_pct"))


def joint(rows: list[dict]) -> str:
    dense = rows[0]["top1_pct"]
    name, notes = _speed(rows)
    return _table(["model", "top-1 %", "against dense", "GMACs", "parameters (M)", name],
                  [[r["model"], _value(r, "top1_pct", 2), f"{r['top1_pct'] - dense:+.2f}", f"{r['gmacs']:.4f}",
                    f"{r['params_m']:.3f}", _ratio(r)] for r in rows], [*_notes(rows, "top1_pct"), *notes])


def latency(rows: list[dict]) -> str:
    """The summary rows: the error of the prediction over all plans."""
    every = [(row["model"].replace("_patch16_224", ""), row["conditions"]) for row in rows
             if "median_error_pct" in row["conditions"]]
    return _table(["model and conditions", "median error %", "largest error %", "table measured in (s)"],
                  [[f"{model}, {c['runtime']}, {c['dtype']}, batch {c['batch_size']}, {c['threads']} threads, "
                    f"{c['device']}", f"{c['median_error_pct']:.1f}", f"{c['largest_error_pct']:.1f}",
                    f"{c['table_s']:.0f}"] for model, c in every])


def hsic_speed(rows: list[dict]) -> str:
    return _table(["what", "seconds", "times the batched dependence", "of a forward"],
                  [[r["model"].replace("deit_tiny_patch16_224 ", ""), f"{r['latency_ms'] / 1000:.2f}",
                    f"{r['ratio']:.1f}", f"{r['conditions']['of_forward']:.2f}"] for r in rows])


def search_quality(rows: list[dict]) -> str:
    """One line per budget and strategy: best so far, and the best policy's top-1 on other images, median (range) of the
    seeds."""
    def text(values: list[float | None]) -> str:
        return "-" if None in values else f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    body = []
    for fraction, name in dict.fromkeys((r["conditions"]["fraction"], r["conditions"]["strategy"]) for r in rows):
        mine = [r for r in rows if (r["conditions"]["fraction"], r["conditions"]["strategy"]) == (fraction, name)]
        best = [r["conditions"]["best_so_far"] for r in mine]
        body.append([f"{fraction:.0%}", "ours" if name == "gp" else name,
                     *[text([b[n - 1] for b in best]) for n in (20, 40, 60)], text([r["top1_pct"] for r in mine])])
    held = rows[0]["conditions"]["held_images"]
    return _table(["MACs", "search", "after 20", "after 40", "after 60", f"on {held:,} other images"], body,
                  [_sampled([r["top1_pct"] for r in rows], held) + "; these are the same for every search"])


def off_the_shelf(rows: list[dict]) -> str:
    """Median (range) over the draws of the calibration images; what needs none has one value."""
    def top1(r: dict) -> str:
        draws = r["conditions"]["draws"]
        return _value(r, "top1_pct", 2) + (f" ({min(draws):.2f} to {max(draws):.2f})" if len(draws) > 1 else "")

    name, notes = _speed(rows)
    # where none was, there are no columns of speed
    timed = any(r["ratio"] for r in rows)

    def line(r: dict) -> list[str]:
        speed = [_ratio(r), f"{r['conditions']['of_mac_ratio']:.2f}" if r["ratio"] else "-"]
        return [r["model"], f"{r['gmacs']:.2f}", top1(r), _against(r, r["against_dense"]), _value(r, "distill_loss", 3),
                *speed[:2 * timed]]
    head = ["rule", "GMACs", "top-1 %", "against dense", "distance to dense (nats)",
            *[name, "of the MAC ratio"][:2 * timed]]
    paired = any(r.get("against_dense_se") is not None for r in rows)
    measured = ", ".join(dict.fromkeys(r["conditions"]["dtype"] for r in rows))
    return _table(head, [line(r) for r in rows],
                  [f"Top-1 and distance in {measured}", *_notes(rows, "top1_pct", paired=paired), *notes])


def off_the_shelf_short(rows: list[dict]) -> str:
    """Both models side by side, without the points that only the figure needs."""
    shown = ("dense", "ToMe, r 8", "ToMe, r 13", "ToMe, r 16", "merging by content, one ratio, 0.75",
             "merging by content, one ratio, 0.6", "selection by class attention, one ratio, 0.75",
             "shared updates, keep 0.6", "Prune and Merge, keep 0.6")
    both = [{r["model"]: r for r in found}
            for found in (rows, read_lines(HERE / "results" / "off_the_shelf_vit_tiny.jsonl"))]
    name, notes = _speed(rows)

    def line(rule: str) -> list[str]:
        each = [[_against(r[rule], r[rule]["against_dense"]), _value(r[rule], "distill_loss", 3)] for r in both]
        return [rule, f"{both[0][rule]['gmacs']:.2f}", *each[0], *each[1], _ratio(both[0][rule])]
    measured = [f"{model}, {what}" for model in ("DeiT-tiny", "AugReg")
                for what in ("top-1 against dense", "distance (nats)")]
    head = ["rule", "GMACs", *measured, name]
    top1 = " and ".join(_value(r["dense"], "top1_pct", 2) for r in both)
    return _table(head, [line(rule) for rule in shown],
                  [f"Dense top-1: {top1}", *_notes(rows, "distill_loss", paired=True), *notes])


def calibration_images(rows: list[dict]) -> str:
    """The distance to the dense model's output for each budget and number of images, one ridge for all beside one
    chosen for each layer."""
    short = {"deit_tiny_patch16_224": "DeiT-tiny", "vit_tiny_patch16_224.augreg_in21k_ft_in1k": "AugReg"}
    groups = [(m, g) for m in short for g in dict.fromkeys(r["gmacs_limit"] for r in rows if r["model"] == m)]
    found = {(r["model"], r["gmacs_limit"], r["ridge"], r["refitted_on"]): r for r in rows}
    counts = sorted({r["refitted_on"] for r in rows} - {0})

    def cell(model: str, gmacs: float, count: int) -> str:
        both = [found.get((model, gmacs, ridge, count)) for ridge in ("fixed", "chosen")]
        return " / ".join("-" if r is None else plus_minus(r["distill_loss"], r["distill_loss_se"], 3) for r in both)

    def line(model: str, gmacs: float) -> list[str]:
        none = found.get((model, gmacs, "none", 0))
        return [f"{short[model]}, {gmacs:.2f}",
                "-" if none is None else plus_minus(none["distill_loss"], none["distill_loss_se"], 3),
                *(cell(model, gmacs, count) for count in counts)]
    return _table(["model, GMACs", "not refitted", *(f"{count} images" for count in counts)],
                  [line(*group) for group in groups],
                  ["One ridge for all layers / chosen for each", f"±: one standard error over {rows[0]['images']} "
                                                                 f"images"])


def families(rows: list[dict]) -> str:
    """A line per rule and budget, two columns for each model: top-1 against its dense one, and the distance."""
    kinds = {kind: {r["model"]: r for r in rows if r["conditions"]["kind"] == kind}
             for kind in dict.fromkeys(r["conditions"]["kind"] for r in rows)}
    head = ["rule, of the MACs"]
    for kind, found in kinds.items():
        c = found["dense"]["conditions"]
        head += [f"{kind}: {c['top1']} against dense", f"distance ({c['unit']})"]
    names = list(dict.fromkeys(r["model"] for r in rows if r["model"] != "dense"))
    dense = [f"{_value(found['dense'], 'top1_pct', 1)} ({found['dense']['conditions']['top1']}) of {kind}"
             for kind, found in kinds.items()]

    def cells(r: dict) -> list[str]:
        near = r["distill_loss"] + r["distill_loss_se"] < 1e-4
        return [_against(r, r["against_dense"]), "below 0.0001" if near else _value(r, "distill_loss", 4)]
    return _table(head, [[name, *(cell for found in kinds.values() for cell in cells(found[name]))] for name in names],
                  [f"Dense, in per cent: {', '.join(dense)}; {rows[0]['conditions']['images']} test images",
                   *_notes(rows, "distill_loss", paired=True)])


def per_block(rows: list[dict]) -> str:
    return _table(["merging by content", "GMACs", "top-1 %", "distance to dense (nats)"],
                  [[r["model"], f"{r['gmacs']:.2f}", _value(r, "top1_pct", 2), _value(r, "distill_loss", 3)]
                   for r in rows],
                  _notes(rows, "top1_pct"))


def camvid(rows: list[dict]) -> str:
    """mIoU on val and test, in brackets against the dense model; what was not measured is "-"."""
    def text(r: dict, stage: str, split: str) -> str:
        name = f"{stage}_{split}_miou_pct"
        value, dense = r[name], rows[0][f"closed_{split}_miou_pct"]
        return "-" if value is None else _value(r, name, 2) + (f" ({value - dense:+.2f})" if r is not rows[0] else "")

    def line(r: dict) -> list[str]:
        found = [text(r, stage, split) for split in ("val", "test") for stage in ("closed", "tuned")]
        return [r["model"], f"{r['gmacs']:.2f}", *found, _ratio(r)]
    name, notes = _speed(rows)
    measures = [f"{stage}_{split}_miou_pct" for stage in ("closed", "tuned") for split in ("val", "test")]
    return _table(["rule", "GMACs", "mIoU % on val, off the shelf", "fine-tuned", "on test, off the shelf",
                   "fine-tuned", name],
                  [line(r) for r in rows], [*_notes(rows, *measures), *notes])


def scale(rows: list[dict]) -> str:
    head = ["model", "GMACs", "memory of the model (GB)", "of an image (MB)", "images/s, one CPU core",
            "images/s, one A100 (estimated)", "30 epochs of ImageNet with a teacher (estimated)"]
    return _table(head, [[r["model"].replace("_patch16_224", ""), f"{r['gmacs']:.1f}", f"{r['state_gb']:.1f}",
                          f"{r['activations_mb']:.0f} ({r['activations_checkpointed_mb']:.0f})",
                          f"{r['cpu_img_s']:.1f}", f"{r['A100_img_s']:.0f}",
                          ", ".join(f"{hours:.1f} h on {where}" for where, hours in r["finetune_hours"].items())]
                         for r in rows])


def allocator(rows: list[dict]) -> str:
    def text(values: list[float], digits: int) -> str:
        return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
    head = ["model", "images/s, over processes", "fresh pages a forward"]
    return _table(head,
                  [[r["model"].replace("_patch16_224", ""), text(r["conditions"]["draws"], 1),
                    text(r["conditions"]["pages"], 0)]
                         for r in rows])


def loader(rows: list[dict]) -> str:
    return _table(["model, one step of 32 images", "loader processes", "loader alone (images/s)", "steps alone", "both",
                   "the limit"],
                  [[r["model"].replace("_patch16_224", ""), str(r["workers"]), f"{r['loader_img_s']:.0f}",
                    f"{r['step_img_s']:.0f}", f"{r['both_img_s']:.0f}", r["limit"]] for r in rows])


def gpu(rows: list[dict]) -> str:
    """One line per architecture, batch and mode, one column per rule; below, what else was timed. Of what was measured
    twice the last."""
    rows = list({r["model"]: r for r in rows if r["ratio"]}.values())
    models, others = ([r for r in rows if (r["conditions"]["kind"] == "model") is given] for given in (True, False))
    groups: dict[tuple, dict[str, dict]] = {}
    for r in models:
        c = r["conditions"]
        groups.setdefault((c["of"].replace("_patch16", ""), c["batch_size"], c["mode"]), {})[c["rule"]] = r
    rules = [rule for rule in dict.fromkeys(r["conditions"]["rule"] for r in models) if rule != "dense"]

    def cell(r: dict | None) -> str:
        return "-" if r is None else f"{r['ratio']:.2f} ({r['conditions']['of_mac_ratio']:.2f})"

    def line(group: tuple, found: dict[str, dict]) -> list[str]:
        published = [r["conditions"]["published_ratio"] for r in found.values()
                     if r["conditions"].get("published_ratio")]
        dense = f"{found['dense']['throughput_img_s']:,.0f}" if "dense" in found else "-"
        return [f"{group[0]}, batch {group[1]}, {group[2]}", dense, *(cell(found.get(rule)) for rule in rules),
                f"{published[0]:.2f}" if published else "-"]
    devices = " and ".join(dict.fromkeys(r["conditions"]["device"] for r in rows))
    wide = [max(r["ratio"] / _range(r)[0], _range(r)[1] / r["ratio"]) - 1 for r in rows if _range(r)]
    notes = [f"Throughput {ratio_words([])}; in brackets of the MAC ratio. Weights in bfloat16, on {devices}",
             f"The range of a ratio is within {100 * max(wide):.0f} %, half of them within "
             f"{100 * statistics.median(wide):.1f} %"
             if wide else "", _caveat(rows)]
    first = _table(["throughput ratio, by model, batch and mode", "dense images/s", *rules, "published for keep 0.6"],
                   [line(*group) for group in groups.items()], notes)
    more = [[r["conditions"]["of"], r["conditions"]["what"], r["conditions"]["dtype"], f"{r['latency_ms']:.2f}",
             f"{r['throughput_img_s']:,.0f}", _ratio(r)] for r in others]
    if not more:
        return first
    batch = others[0]["conditions"]["batch_size"]
    return f"{first}\n\n" + _table(["what", "by", "numbers", "ms", "images/s", f"throughput ratio (batch {batch})"],
                                   more)


def opening(rows: list[dict]) -> str:
    return _table(["images", "opening the folder, first", "again", "one class changed", "names and sizes, by which a "
                                                                                        "run knows it",
                   "the order of an epoch", "first batch in the middle of one"],
                  [[f"{r['images']:,}",
                    *(f"{r[f'{name}_s']:.2g} s" for name in ("first", "again", "changed", "known", "order", "resumed"))]
                   for r in rows])


def _medians(rows: list[dict], *names: str) -> list[dict]:
    """One row of all draws that share what the names say: medians, and the distance of each draw."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [dict(zip(names, key)) | {"draws": [r["distill_loss"] for r in of], "images": of[0]["images"]}
            | {name: statistics.median(r[name] for r in of) for name in ("distill_loss", "distill_loss_se",
                                                                         "against_dense", "against_dense_se")}
            for key, of in groups.items()]


def tonight_quality(rows: list[dict]) -> str:
    rows = _medians(rows, "model", "photographs", "what", "gmacs_limit")
    limits = sorted({r["gmacs_limit"] for r in rows}, reverse=True)
    found = {(r["model"], r["photographs"], r["what"], r["gmacs_limit"]): r for r in rows}
    lines = list(dict.fromkeys(key[:3] for key in found))

    def cell(r: dict | None) -> str:
        return "-" if r is None else (f"{r['distill_loss']:.3f} ± {r['distill_loss_se']:.3f}, "
                                      f"{r['against_dense']:+.1f} "
                                      f"({', '.join(f'{value:.3f}' for value in r['draws'])})")
    return _table(["model, photographs", "plan", *(f"at most {limit:.2f} GMACs" for limit in limits)],
                  [[f"{model.split('_patch')[0]}, {count:,}", what,
                    *(cell(found.get((model, count, what, limit))) for limit in limits)]
                   for model, count, what in lines],
                  [f"Distance to dense in nats ± one standard error over {rows[0]['images']} validation images, top-1 "
                   f"less the dense "
                   "model's; the median of the draws, which stand in brackets"])


def tonight_quality_short(rows: list[dict]) -> str:
    rows = _medians([r for r in rows if r["what"] == "tonight" and r["photographs"] == 1000], "model", "gmacs_limit")
    limits = sorted({r["gmacs_limit"] for r in rows}, reverse=True)
    found = {(r["model"], r["gmacs_limit"]): r for r in rows}
    lines = [[model.split("_patch")[0] + (", AugReg" if "augreg" in model else ""),
              *(f"{r['against_dense']:+.1f} ± {r['against_dense_se']:.1f} ({r['distill_loss']:.3f} nats)"
                for r in (found[model, limit] for limit in limits))]
             for model in dict.fromkeys(r["model"] for r in rows)]
    draws = sorted({str(len(r["draws"])) for r in rows})
    return _table(["model of 1.25 GMACs", *(f"at {limit:.2f}" for limit in limits)], lines,
                  [f"Points of top-1 against the dense model, and distance to it, on {rows[0]['images']} validation "
                   "images; 1,000 photographs without labels, nothing trained; medians of "
                   f"{' to '.join(dict.fromkeys((draws[0], draws[-1])))} draws"])


def by_size(rows: list[dict]) -> str:
    def pair(r: dict, name: str, digits: int) -> list[str]:
        return [f"{r[f'{name}_{what}']:.{digits}f}" for what in ("without", "by_size")] + [
            f"{r[f'{name}_difference']:+.{digits}f} ± {r[f'{name}_difference_se']:.{digits}f}"]
    return _table(["model", "GMACs", "sizes don't count", "by size", "difference", "top-1, sizes don't count",
                   "by size", "difference"],
                  [[r["model"].split("_patch")[0] + (", AugReg" if "augreg" in r["model"] else ""),
                    f"{r['gmacs']:.2f}", *pair(r, "distill_loss", 4), *pair(r, "against_dense", 1)] for r in rows],
                  [f"Distance to dense in nats and top-1 less the dense model's, {rows[0]['images']} validation "
                   "images; differences with the standard error of the images' own"])


def tonight_cost(rows: list[dict]) -> str:
    parts = list(dict.fromkeys(r["part"] for r in rows))
    found = {(r["model"], r["part"], r["code"]): r for r in rows}

    def cell(r: dict | None) -> str:
        if r is None or "error" in r:
            return "-"
        return f"over {r['over_s']:.0f} s" if "over_s" in r else f"{r['seconds']:.3g} s, {r['peak_gb']:.1f} GB"
    return _table(["model", "code", *parts],
                  [[model.replace("_patch16_224", ""), code, *(cell(found.get((model, part, code))) for part in parts)]
                   for model, code in dict.fromkeys((r["model"], r["code"]) for r in rows)],
                  [f"{rows[0]['images']} images, {rows[0]['threads']} threads, float32; memory is the peak of a "
                   f"process, with the model"])


def runtimes(rows: list[dict]) -> str:
    """A line per rule and batch, a column for each runtime: images/s, and what the best of them is worth."""
    names = list(dict.fromkeys(r["conditions"]["runtime"] for r in rows))
    found = {(r["conditions"]["rule"], r["conditions"]["batch_size"], r["conditions"]["runtime"]): r for r in rows}
    lines = []
    for rule, batch in dict.fromkeys(key[:2] for key in found):
        own = {name: found[rule, batch, name] for name in names}
        best = max(own.values(), key=lambda r: r["throughput_img_s"])
        about = best["conditions"]
        lines.append([rule, f"{batch}", f"{best['gmacs']:.2f}", *(f"{r['throughput_img_s']:.0f}" for r in own.values()),
                      f"{about['of_best']:.2f}", f"{about['of_best'] / about['mac_ratio']:.2f}"])
    about = rows[0]["conditions"]
    head = ["rule", "batch", "GMACs", *(name.split("-")[0] for name in names)]
    return _table([*head, "best over the dense model's best", "of the MAC ratio"], lines,
                  [f"Images/s, {about['dtype']}, {about['threads']} threads, in turn in one process, medians of "
                   f"{about['repeats']} rounds"])


def roofline(rows: list[dict]) -> str:
    """A line per rule, batch and number of threads."""
    dense = next(r["gmacs"] for r in rows if r["rule"] == "dense")
    head = ["rule", "batch", "threads", "operations", "products, ms (of dense)", "others, ms (of dense)",
            "MB of activations: products, others", "GMACs/s in products", "time of dense", "MACs of dense"]
    lines = [[r["rule"], str(r["batch_size"]), str(r["threads"]), str(r["operations"]),
              *(f"{r[f'{kind}_ms']:.1f} ({r[f'{kind}_of_dense']:.2f})" for kind in ("products", "others")),
              f"{r['products_mb']:.0f}, {r['others_mb']:.0f}",
              f"{r['gmacs'] * r['batch_size'] / r['products_ms'] * 1e3:.0f}", f"{r['time_of_dense']:.2f}",
              f"{r['gmacs'] / dense:.2f}"] for r in rows]
    first = rows[0]
    return _table(head, lines, [f"{first['runtime']}, float32, its own profile, medians of {first['repeats']} rounds"])


def int8(rows: list[dict]) -> str:
    """A line per model, runtime and type; top-1 and distance do not depend on the batch."""
    found = {tuple(r["model"].rsplit(", batch ", 1)): r for r in rows}
    batches = list(dict.fromkeys(batch for _, batch in found))
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        r, *_ = own = [found[name, batch] for batch in batches]
        measured = r.get("top1_pct") is not None
        lines.append([name, f"{r['gmacs']:.2f}", f"{r['conditions']['file_mb']:.1f}" if measured else "-",
                      _value(r, "top1_pct", 2) if measured else "-", _value(r, "distill_loss", 3) if measured else "-",
                      *(f"{each['throughput_img_s']:.0f} ({each['ratio']:.2f})" for each in own)])
    speed = rows[0]["conditions"]["speed"]
    return _table(["model", "GMACs", "MB", "top-1 %", "distance (nats)",
                   *(f"images/s at batch {batch} (ratio)" for batch in batches)], lines,
                  [*_notes(rows, "top1_pct"), f"Speed: {speed['threads']} threads, medians of {speed['repeats']} "
                   "rounds in turn in one process; ratio: to the dense model in PyTorch"])


def finetuned(rows: list[dict]) -> str:
    """A line per method: the draw with the median top-1, and the range over draws. Of what was measured twice the
    last, of the last model, resolution and length of training alone."""
    drawn: dict[str, dict[int, dict]] = {}
    measured = ("model", "resolution", "epochs", "train_images")
    rows = [r for r in rows if all(r[key] == rows[-1][key] for key in measured)]
    for r in rows:
        drawn.setdefault(r["method"], {})[r["seed"]] = r
    name, notes = _speed(rows)

    def line(method: str, draws: list[dict]) -> list[str]:
        r, top1 = sorted(draws, key=lambda r: r["top1_pct"])[(len(draws) - 1) // 2], [r["top1_pct"] for r in draws]
        spread = f" ({min(top1):.2f} to {max(top1):.2f})" if len(draws) > 1 else ""
        control = "-" if r["against_control"] is None else _against(r, r["against_control"], "against_control")
        return [method, f"{r['macs_ratio']:.2f}", f"{r['as_cut_top1_pct']:.1f}", _value(r, "top1_pct", 2) + spread,
                control, _ratio(r)]
    head = ["method", "of the MACs", "top-1 % as cut", "fine-tuned", "against the dense model fine-tuned alike", name]
    first = rows[0]
    epochs = f"{first['epochs']} epochs of {first['train_images']:,} images" if first["train_images"] else (
        f"{first['epochs']} epochs")
    return _table(head, [line(method, list(draws.values())) for method, draws in drawn.items()],
                  [f"{first['model'].split('_patch')[0]} at {first['resolution']}, {epochs} each, "
                   f"{first['images']:,} test images; of several draws the median (range)",
                   *_notes(rows, "top1_pct", paired=True), *notes])


TABLES: dict[str, Callable[[list[dict]], str]] = {
    "published_table": published_table, "published_form": published_table, "boundaries": boundaries, "cifar10": cifar10,
    "token_speed": token_speed, "mdc_table": mdc_table, "joint": joint, "latency": latency, "hsic_speed": hsic_speed,
    "search_quality": search_quality, "off_the_shelf": off_the_shelf,
    "off_the_shelf_short": off_the_shelf_short, "off_the_shelf_vit_tiny": off_the_shelf,
    "off_the_shelf_searched": off_the_shelf, "calibration_images": calibration_images, "per_block": per_block,
    "families": families, "finetuned": finetuned, "camvid": camvid, "allocator": allocator, "scale": scale,
    "loader": loader, "opening": opening, "gpu": gpu, "tonight_quality": tonight_quality,
    "tonight_quality_short": tonight_quality_short, "tonight_cost": tonight_cost, "runtimes": runtimes,
    "roofline": roofline, "int8": int8, "by_size": by_size}


def render(text: str) -> str:
    """A page's text with every table in it made anew."""
    for name, make in TABLES.items():
        rows = read_lines(HERE / "results" / f"{name.removesuffix('_short')}.jsonl")
        if rows and f"<!-- table: {name} -->" in text:
            before, mark, after = text.partition(f"<!-- table: {name} -->\n")
            text = before + mark + make(rows) + "\n" + after[after.index("<!-- end -->"):]
    return text


if __name__ == "__main__":
    for page in PAGES:
        atomic_write(page, render(page.read_text(encoding="utf-8")))
