"""What a real model is worth right after compression: every rule and criterion in one run, without labels and without
training, and after minutes of calibration.

    python benchmarks/off_the_shelf.py --weights deit_tiny_patch16_224.safetensors --cal IMAGENET_CAL --val IMAGENET_VAL
        \\ --run RUN [--model NAME] [--seeds 0 1 2] [--parts static closed calibrated speed] [--dtype float32] [--quick]

Calibration images are drawn from CAL's train split by seed; top-1 is on VAL's held-out split, which nothing else sees.
Every image is kept apart (right or not, KL to the dense output), so that each row has standard errors over images, and
its difference to the dense model is paired. Part "static" is all that needs no search: dense, ToMe, one ratio, Prune
and Merge, shared updates; "closed" adds the searches. Rows go to benchmarks/results/off_the_shelf.jsonl (of another
model than DeiT-tiny: off_the_shelf_NAME.jsonl), one a plan with the values of each seed; a run that was stopped goes
on. --quick: one seed, one budget and 20 images, to see that it runs: its rows stay in RUN.
"""
import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tome import tome, tome_gmacs
from torch import Tensor, nn

from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.capture import token_scores
from vitlab.measure.distance import outputs
from vitlab.measure.evaluate import each_divergence, uses_bf16
from vitlab.measure.throughput import conditions, measure
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import CompressionPlan, cost
from vitlab.plots import save_figure, trade_offs
from vitlab.runtime.caveats import caveat
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, append_line, atomic_write, read_lines, write_lines
from vitlab.runtime.uncertainty import share_error, standard_error
from vitlab.search import SearchSpace
from vitlab.workbench import steps
from vitlab.workbench.calibrating import REFITTED, calibrate, in_form
from vitlab.workbench.gathered import own_labels
from vitlab.workbench.survey import Survey

NAME, CROP = "deit_tiny_patch16_224", 224 / 227         # the validation images are centre crops of 227 already
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PARTS = ("static", "closed", "calibrated", "speed")
GMACS, NEURONS = (0.75, 0.60, 0.45), (1.09, 0.98)
TOME = (4, 8, 11, 13, 16)
IMAGES, REFIT, EVALUATIONS, FINALISTS, MINUTES, QUICK_IMAGES = 160, 1000, 20, 3, 3, 20


def table_name(model: str) -> str:
    """Of the results and figures of a model: "off_the_shelf", or with another model's name up to its patch size."""
    return "off_the_shelf" if model == NAME else f"off_the_shelf_{model.split('_patch')[0]}"


def measures(right: Sequence[int], dense: Sequence[int], distances: Sequence[float]) -> dict[str, float]:
    """Top-1 in per cent, its difference to the dense model's on the same images, the mean distance, and the standard
    error of each over images: of the difference that of the images' own differences, which is less than that of either
    top-1."""
    paired = 100 * (np.array(right) - np.array(dense))
    return {"top1_pct": 100 * sum(right) / len(right), "top1_se": share_error(sum(right), len(right)),
            "images": len(right), "against_dense": float(paired.mean()), "against_dense_se": standard_error(paired),
            "distill_loss": sum(distances) / len(distances), "distill_loss_se": standard_error(distances)}


def middle(values: Sequence[float | None], errors: Sequence[float | None]) -> tuple[float, float | None]:
    """(median of the values that are known, error of the one that is it; of an even number the larger error of the two
    in the middle)."""
    known = sorted((v, e) for v, e in zip(values, (float("nan") if e is None else e for e in errors)) if v is not None)
    two = known[(len(known) - 1) // 2:len(known) // 2 + 1]
    error = max((e for _, e in two), default=float("nan")) if not any(np.isnan(e) for _, e in two) else None
    return statistics.median(v for v, _ in known), error


class Bench:
    """Rows by (name, seed), each measured once and written at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.dense = args, steps.open_model(args.weights, model=args.model)
        self.model = self.dense.model.eval()
        wanted = {"auto": None, "bfloat16": True, "float32": False}[args.dtype]
        self.shape, self.amp = shape_of(self.model), uses_bf16(torch.device("cpu"), wanted)
        self.dtype = "bfloat16" if self.amp else "float32"
        self.path = args.run / "rows.jsonl"
        self.rows = {(r["name"], r["seed"]): r for r in (read_lines(self.path) if self.path.exists() else [])}
        self.val = list(steps.open_matching(args.val, self.dense).batches("held_out", self.model, crop_pct=CROP,
                                                                          workers=1,
                                                                          limit=QUICK_IMAGES if args.quick else None))
        self.expected = [self.classes(self.model, images) for images, _ in self.val]
        here = args.model, self.dtype, sum(len(targets) for _, targets in self.val)
        for row in self.rows.values():
            if (was := (row["model"], row["dtype"], row["images"])) != here:
                raise InputError(f"{self.path}: holds rows of {was} (model, dtype, images), not of {here}; choose "
                                 f"another --run")
        self.surveys: dict[int, Survey] = {}

    @torch.inference_mode()
    def classes(self, model: nn.Module, images: Tensor) -> Tensor:
        """Log-probabilities (B, K)."""
        return outputs(model, images, self.amp)

    def each(self, model: nn.Module) -> tuple[list[int], list[float]]:
        """(right or not, KL(dense || model) in nats) of each image of VAL."""
        right, distances = [], []
        for (images, targets), expected in zip(self.val, self.expected):
            given = self.classes(model, images)
            right += (given.argmax(dim=1) == targets).int().tolist()
            distances += each_divergence(given, expected).tolist()
        return right, distances

    def survey(self, seed: int) -> Survey:
        if seed not in self.surveys:
            self.surveys = {seed: Survey(self.dense, self.args.cal, self.args.run / "survey", images=IMAGES,
                                         config=RunConfig(seed=seed, workers=1, quiet=True))}
        return self.surveys[seed]

    def add(self, name: str, family: str, seed: int,
            make: Callable[[], tuple[nn.Module, float, CompressionPlan | None]]) -> None:
        if (name, seed) in self.rows:
            return
        model, gmacs, plan = make()
        right, distances = self.each(model.eval())
        dense = self.rows["dense", 0]["right"] if self.rows else right
        row = {"name": name, "family": family, "seed": seed, "model": self.args.model, "dtype": self.dtype,
               "gmacs": gmacs, **measures(right, dense, distances), "right": right,
               "distances": [round(value, 7) for value in distances],
               "plan": None if plan is None else json.loads(plan.to_json())}
        self.rows[name, seed] = row
        append_line(self.path, row)
        print(f"{name:60s} seed {seed}  {gmacs:.3f} GMACs  top-1 {row['top1_pct']:.2f} ± {row['top1_se']:.2f}",
              flush=True)

    def plain(self, plan: CompressionPlan) -> tuple[nn.Module, float, CompressionPlan]:
        return deploy(compress(self.model, plan)), cost.gmacs(plan), plan

    def refitted(self, seed: int, plan: CompressionPlan,
                 form: str = REFITTED) -> tuple[nn.Module, float, CompressionPlan]:
        images = list(steps.open_matching(self.args.cal, self.dense).batches("train", self.model, limit=REFIT,
                                                                             seed=seed, workers=1))
        costs = self.survey(seed).costs
        return deploy(in_form(form, self.model, plan, images, costs=costs, amp=self.amp,
                              progress=False)), cost.gmacs(plan), plan

    def uncalibrated(self) -> None:
        """What needs no calibration image at all."""
        self.add("dense", "dense", 0, lambda: (self.model, cost.gmacs(CompressionPlan.empty(self.shape)), None))
        for r in TOME:
            self.add(f"ToMe, r {r}", "ToMe", 0, lambda r=r: (tome(self.model, r), tome_gmacs(self.model, r), None))
        for tokens, family in (("match", "merging by content"), ("select", "selection by class attention")):
            space = SearchSpace(shape=self.shape, units=(), tokens=tokens, max_ratio=0.5, read_out=True)
            grid = np.linspace(0.01, 0.5, 197)[:, None]
            prices = space.gmacs(grid)
            for gmacs in (1.05, 0.9, 0.8, 0.75, 0.7, 0.6):
                fits = np.flatnonzero((prices <= gmacs) & (prices > gmacs - 0.03))
                if len(fits):
                    plan = space.plan(grid[fits[0]])
                    self.add(f"{family}, one ratio, {gmacs}", family, 0, lambda plan=plan: self.plain(plan))

    def static(self, seed: int) -> None:
        batches = steps.open_matching(self.args.cal, self.dense).batches("train", self.model, workers=1, seed=seed,
                                                                               limit=QUICK_IMAGES if self.args.quick
                                                                         else 512)
        scores = token_scores(self.model, own_labels(self.model, list(batches), torch.device("cpu")), progress=False)
        for keep in (0.7, 0.6, 0.5, 0.4):
            for name, settings in (("Prune and Merge",
                                    {"boundary": "reference", "weights": "reference", "prune_rate": 0.1}),
                                   ("shared updates", {"prune_rate": 0.0, "share": True})):
                plan = prune_and_merge(scores, self.shape, keep_rate=keep, **settings)
                self.add(f"{name}, keep {keep}", name, seed, lambda plan=plan: self.plain(plan))

    def units(self, seed: int) -> None:
        """Neurons alone, the same share of each block: closed form."""
        for gmacs in NEURONS:
            ratio = (cost.gmacs(CompressionPlan.empty(self.shape)) - gmacs) * 1e9 / (
                2 * self.shape.num_tokens * self.shape.embed_dim * self.shape.num_neurons * self.shape.depth)
            space = SearchSpace(shape=self.shape, units=("neurons",), tokens="none", max_ratio=0.75)
            plan = space.plan([ratio + 1e-3] * space.size, neurons=self.survey(seed).scores["neurons"])
            self.add(f"neurons, as much in each block, {gmacs}", "neurons, closed form", seed,
                     lambda plan=plan: self.refitted(seed, plan))

    def searched(self, rule: str, seed: int, budgets: tuple[float, ...]) -> Iterator[tuple[str, CompressionPlan, str]]:
        """(name, plan, form) of the nearest of the plans that a search finds, each refitted."""
        for gmacs in budgets:
            survey = self.survey(seed)
            yield f"{rule}, searched, {gmacs}", *survey.best(survey.search(rule, gmacs, EVALUATIONS)[:FINALISTS])

    def closed(self, seed: int) -> None:
        budgets = GMACS[:1] if self.args.quick else GMACS
        if "static" not in self.args.parts:
            self.static(seed)
        if seed not in self.args.search_seeds:
            return
        self.units(seed)
        for rule, costs in (("merging by content", budgets), ("shared updates", budgets), ("neurons", NEURONS),
                            ("all together", budgets)):
            for name, plan, form in self.searched(rule, seed, costs):
                self.add(name, f"{rule}, searched", seed, lambda plan=plan, form=form: self.refitted(seed, plan, form))

    def calibrated(self, seed: int) -> None:
        """Self-distillation of the plans found with the first seed, on another draw of images for each seed."""
        for rule in ("shared updates", "merging by content"):
            for name, plan, _ in self.searched(rule, self.args.search_seeds[0], (0.75,)):
                def make(plan: CompressionPlan = plan, name: str = name) -> tuple[nn.Module, float, CompressionPlan]:
                    found = calibrate(self.dense, self.args.cal, self.args.run / f"{name} {seed}", plan,
                                      minutes=self.args.minutes, config=RunConfig(seed=seed, workers=1))
                    return deploy(found.model), cost.gmacs(plan), plan
                self.add(f"{name}, calibrated", f"{rule}, calibrated", seed, make)

    def speed(self) -> None:
        """Images/s of everything measured, in one run in turn: plans of the first seed."""
        models, seconds = {"dense": self.model}, {}
        for (name, seed), row in self.rows.items():
            if row["family"] == "ToMe":
                models[name] = tome(self.model, int(name.split()[-1]))
            elif row["plan"] is not None and seed == self.args.seeds[0] and not name.endswith("calibrated"):
                models[name] = deploy(compress(self.model, CompressionPlan.from_json(row["plan"])))
        for name, speed in measure(models, batch_size=32, repeats=self.args.repeats, device="cpu").items():
            seconds[name] = {"throughput_img_s": speed.throughput_img_s, "ratio": speed.ratio,
                             "ratio_range": [speed.ratio_min, speed.ratio_max]}
        atomic_write(self.args.run / "speed.json", json.dumps({"models": seconds, "conditions": conditions(
            torch.device("cpu"), "float32", 32, self.args.repeats)}))

    def write(self) -> None:
        """One row a name: the median over seeds, and each seed's values; what earlier runs measured in this dtype of
        other names and seeds stays."""
        path, name = self.args.run / "speed.json", table_name(self.args.model)
        results = (self.args.run if self.args.quick else RESULTS) / f"{name}.jsonl"
        speed = json.loads(path.read_text()) if path.exists() else {"models": {}, "conditions": {}}
        grouped: dict[str, list[dict]] = {}
        for row in self.rows.values():
            grouped.setdefault(row["name"], []).append(row)
        before = read_lines(results) if results.exists() else []
        earlier = {row["model"]: row for row in before if row["conditions"]["dtype"] == self.dtype}
        out = []
        for plan, rows in grouped.items():
            timed = speed["models"].get(plan.removesuffix(", calibrated"), {})
            gmacs = statistics.median(r["gmacs"] for r in rows)
            found = {"model": plan, "family": rows[0]["family"], "gmacs": gmacs,
                     "throughput_img_s": timed.get("throughput_img_s"), "ratio": timed.get("ratio"),
                     "conditions": {"seeds": [r["seed"] for r in rows],
                                    **{key: [r[field] for r in rows] for key, field in DRAWN.items()},
                                    "images": rows[0]["images"], "dtype": self.dtype, "of": self.args.model,
                                    **({"quick": True} if self.args.quick else {}),
                                    "speed": speed["conditions"]
                                    | ({"ratio_range": timed["ratio_range"]} if timed else {}),
                                    "of_mac_ratio": timed["ratio"] * gmacs / grouped["dense"][0]["gmacs"] if timed
                                    else None}}
            out.append(with_earlier(found, earlier.pop(plan, None)))
        order = [row["model"] for row in before]
        out = sorted([*out, *earlier.values()], key=lambda row: order.index(row["model"]) if row["model"] in order
                     else len(order))
        write_lines(results, out)
        draw(out, self.args.run if self.args.quick else DOCS, name)


# what the conditions hold of each seed: {name there: name of the measure}
DRAWN = {"draws": "top1_pct", "draws_se": "top1_se", "against": "against_dense", "against_se": "against_dense_se",
         "distances": "distill_loss", "distances_se": "distill_loss_se"}


def with_earlier(row: dict, earlier: dict | None) -> dict:
    """A row with the draws that an earlier run measured with other seeds, its speed where there is no newer one, and
    the medians of all draws with their errors."""
    now = row["conditions"]
    if earlier is not None:
        was = earlier["conditions"]
        count = len(was["seeds"])
        kept = [i for i, seed in enumerate(was["seeds"]) if seed not in now["seeds"]]
        dense = earlier["top1_pct"] - earlier["against_dense"]
        known = {"against": [top1 - dense for top1 in was["draws"]],
                 **({"distances": [earlier["distill_loss"]]} if count == 1 else {})}
        old = {key: was.get(key, known.get(key, [None] * count)) for key in DRAWN}             # rows of before say less
        seeds = [*(was["seeds"][i] for i in kept), *now["seeds"]]
        order = sorted(range(len(seeds)), key=seeds.__getitem__)
        for key in DRAWN:
            values = [*(old[key][i] for i in kept), *now[key]]
            now[key] = [values[i] for i in order]
        now["seeds"] = sorted(seeds)
        if row["ratio"] is None:
            row |= {key: earlier[key] for key in ("throughput_img_s", "ratio")}
            now |= {key: was[key] for key in ("speed", "of_mac_ratio")}
    for value, error in zip(*[iter(DRAWN)] * 2):
        row[DRAWN[value]], row[DRAWN[error]] = middle(now[value], now[error])
    return row


def draw(rows: list[dict], folder: Path = DOCS, name: str = "off_the_shelf") -> None:
    """NAME.png: top-1 against GMACs and against the throughput ratio; NAME_distance.png: the distance to dense."""
    images = rows[0]["conditions"]["images"]
    _draw(rows, "top1_pct", f"top-1 on {images} validation images (%)", (55, 85), "linear", folder, name)
    _draw(rows, "distill_loss", "distance to the dense model (nats)", (1.3, 8e-4), "log", folder, f"{name}_distance")


def _draw(rows: list[dict], value: str, ylabel: str, limits: tuple[float, float], scale: str, folder: Path,
          name: str) -> None:
    batch = next((r["conditions"]["speed"]["batch_size"] for r in rows if r["ratio"]), None)
    keys = {"GMACs per image": "gmacs",
            f"throughput over the dense model's, same run\n(float32, batch {batch})": "ratio"}
    dense = next(r for r in rows if r["model"] == "dense")

    def point(row: dict, key: str) -> tuple:
        span = row["conditions"]["speed"].get("ratio_range") if key == "ratio" else None
        return row[key], row[value], row.get(f"{value.removesuffix('_pct')}_se"), span
    panels: dict[str, dict[str, list[tuple]]] = {label: {} for label in keys}
    for label, key in keys.items():
        for row in rows:
            if row[key] and row is not dense:
                panels[label].setdefault(row["family"], []).append(point(row, key))
    panels = {label: lines for label, lines in panels.items() if lines}
    figure = trade_offs(panels, ylabel, {label: point(dense, keys[label]) for label in panels})
    for axis in figure.get_axes():
        axis.set_yscale(scale)
        axis.set_ylim(*limits)
    save_figure(figure, folder, name, caveat(quick=any(r["conditions"].get("quick") for r in rows)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--weights", "--cal", "--val"):
        parser.add_argument(option, required=True)
    parser.add_argument("--run", required=True, type=Path, help="folder for curves, searches and rows")
    parser.add_argument("--model", default=NAME, help="timm name of the weights' model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search-seeds", type=int, nargs="+", help="seeds with searches of their own (default: all)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS[1:]), choices=PARTS)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 where "
                                                                                                 "the CPU has it")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.seeds = args.seeds[:1] if args.quick else args.seeds
    args.search_seeds = args.search_seeds or args.seeds
    args.run.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    bench.uncalibrated()
    for seed in args.seeds:
        for part in PARTS[:-1]:
            if part in args.parts:
                getattr(bench, part)(seed)
    if "speed" in args.parts:
        bench.speed()
    bench.write()
