"""What a real model is worth right after compression: every rule and criterion in one run, without labels and without training,
and after minutes of calibration.

    python benchmarks/off_the_shelf.py --weights deit_tiny_patch16_224.safetensors --cal IMAGENET_CAL --val IMAGENET_VAL \\
        --run RUN [--seeds 0 1 2] [--parts closed calibrated speed] [--quick]

Calibration images are drawn from CAL's train split by seed; top-1 is on VAL's held-out split, which nothing else sees. Rows go to
benchmarks/results/off_the_shelf.jsonl, one a plan with the values of each seed; a run that was stopped goes on. --quick: one seed
and one budget. ToMe is written from its paper (arXiv 2210.09461), with fused attention, so that it is no slower than it need be.
"""
import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab import cost, matching
from vitlab.criteria.planning import prune_and_merge
from vitlab.files import append_line, atomic_write, read_lines, write_lines
from vitlab.models import compress, deploy
from vitlab.models.held import Merged
from vitlab.models.match import size_mask
from vitlab.plan import CompressionPlan
from vitlab.plots import save_figure, trade_offs
from vitlab.search import SearchSpace
from vitlab.training.capture import token_scores
from vitlab.training.compensate import compensate
from vitlab.training.evaluate import evaluate, uses_bf16
from vitlab.training.self_distillation import Divergence
from vitlab.training.throughput import conditions, measure
from vitlab.workbench import steps
from vitlab.workbench.calibrating import calibrate
from vitlab.workbench.tonight import Survey, own_labels

NAME, CROP = "deit_tiny_patch16_224", 224 / 227         # the validation images are centre crops of 227 already
RESULTS = Path(__file__).parent / "results" / "off_the_shelf.jsonl"
DOCS = Path(__file__).parents[1] / "docs"
GMACS, NEURONS = (0.75, 0.60, 0.45), (1.09, 0.98)
TOME = (4, 8, 11, 13, 16)
IMAGES, REFIT, EVALUATIONS, MINUTES = 160, 1000, 20, 3


class ToMeBlock(nn.Module):
    """timm's Block with bipartite soft matching between attention and MLP: keys are averaged over heads, r tokens go in each
    block, attention is proportional (arXiv 2210.09461, sections 3 and 4)."""

    def __init__(self, block: nn.Module, r: int) -> None:
        super().__init__()
        self.block, self.r = block, r

    def forward(self, given: Tensor | Merged) -> Merged:
        x, sizes = (given, given.new_ones(given.shape[:2])) if isinstance(given, Tensor) else (given.x, given.sizes)
        block, attn = self.block, self.block.attn
        query, key, value = attn.qkv(block.norm1(x)).unflatten(2, (3, -1, attn.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=size_mask(sizes, query.dtype))
        x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
        order, into = matching.match(key.mean(dim=1)[:, 1:], min(self.r, (x.shape[1] - 1) // 2))
        merged, merged_sizes = matching.merge(x[:, 1:], sizes[:, 1:], order, into)
        x, sizes = torch.cat([x[:, :1], merged], dim=1), torch.cat([sizes[:, :1], merged_sizes], dim=1)
        return Merged(x + block.mlp(block.norm2(x)), sizes, sizes, 1)


class Tokens(nn.Module):
    def forward(self, given: Merged) -> Tensor:
        return given.x


def tome(dense: nn.Module, r: int) -> nn.Module:
    model = compress(dense, CompressionPlan.empty(steps.shape_of(dense))).eval()
    model.blocks = nn.Sequential(*(ToMeBlock(block, r) for block in model.blocks), Tokens())
    return model


def tome_gmacs(dense: nn.Module, r: int) -> float:
    """Everything that is multiplied, the matching too."""
    shape = steps.shape_of(dense)
    left, attended, after, compared, pooled = shape.num_patches, [], [], 0, 0
    for _ in range(shape.depth):
        gone = min(r, left // 2)
        attended.append(left + 1)
        compared += (left - left // 2) * (left // 2) * shape.head_dim
        pooled += (left // 2 + gone) * shape.embed_dim
        left -= gone
        after.append(left + 1)
    counts = dataclasses.replace(cost.counts_of(CompressionPlan.empty(shape)), attended=np.array(attended), in_mlp=np.array(after),
                                 queried=np.array(attended))
    return (int(cost.macs_of(shape, counts)["total"]) + compared + pooled) / 1e9


class Bench:
    """Rows by (name, seed), each measured once and written at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.dense = args, steps.open_model(args.weights, model=NAME)
        self.model = self.dense.model.eval()
        self.shape, self.amp = steps.shape_of(self.model), uses_bf16(torch.device("cpu"), None)
        self.path = args.run / "rows.jsonl"
        self.rows = {(r["name"], r["seed"]): r for r in (read_lines(self.path) if self.path.exists() else [])}
        self.val = list(steps.open_matching(args.val, self.dense).batches("held_out", self.model, crop_pct=CROP, workers=1))
        self.surveys: dict[int, Survey] = {}
        self.distance = Divergence(self.model, self.val, self.amp)

    def survey(self, seed: int) -> Survey:
        if seed not in self.surveys:
            self.surveys = {seed: Survey(self.dense, self.args.cal, self.args.run / "survey", images=IMAGES, seed=seed, workers=1,
                                         progress=False)}
        return self.surveys[seed]

    def add(self, name: str, family: str, seed: int, make: Callable[[], tuple[nn.Module, float, CompressionPlan | None]]) -> None:
        if (name, seed) in self.rows:
            return
        model, gmacs, plan = make()
        found = evaluate(model, self.val, amp=self.amp, progress=False)
        row = {"name": name, "family": family, "seed": seed, "gmacs": gmacs, "top1_pct": found.top1_pct, "images": found.images,
               "distill_loss": self.distance(model),
               "plan": None if plan is None else json.loads(plan.to_json())}
        self.rows[name, seed] = row
        append_line(self.path, row)
        print(f"{name:60s} seed {seed}  {gmacs:.3f} GMACs  top-1 {found.top1_pct:.2f}", flush=True)

    def plain(self, plan: CompressionPlan) -> tuple[nn.Module, float, CompressionPlan]:
        return deploy(compress(self.model, plan)), cost.gmacs(plan), plan

    def refitted(self, seed: int, plan: CompressionPlan) -> tuple[nn.Module, float, CompressionPlan]:
        images = list(steps.open_matching(self.args.cal, self.dense).batches("train", self.model, limit=REFIT, seed=seed, workers=1))
        return deploy(compensate(self.model, plan, images, amp=self.amp, progress=False)), cost.gmacs(plan), plan

    def uncalibrated(self) -> None:
        """What needs no calibration image at all."""
        self.add("dense", "dense", 0, lambda: (self.model, cost.gmacs(CompressionPlan.empty(self.shape)), None))
        for r in TOME:
            self.add(f"ToMe, r {r}", "ToMe", 0, lambda r=r: (tome(self.model, r), tome_gmacs(self.model, r), None))
        for tokens, family in (("match", "merging by content"), ("select", "selection by class attention")):
            space = SearchSpace(shape=self.shape, units=(), tokens=tokens, max_ratio=0.5, read_out=True)
            grid = np.linspace(0.01, 0.5, 197)[:, None]
            prices = cost.macs_of(self.shape, space.counts(grid))["total"] / 1e9
            for gmacs in (1.05, 0.9, 0.8, 0.75, 0.7, 0.6):
                fits = np.flatnonzero((prices <= gmacs) & (prices > gmacs - 0.03))
                if len(fits):
                    plan = space.plan(grid[fits[0]])
                    self.add(f"{family}, one ratio, {gmacs}", family, 0, lambda plan=plan: self.plain(plan))

    def static(self, seed: int) -> None:
        batches = steps.open_matching(self.args.cal, self.dense).batches("train", self.model, limit=512, seed=seed, workers=1)
        scores = token_scores(self.model, own_labels(self.model, list(batches), torch.device("cpu")), progress=False)
        for keep in (0.7, 0.6, 0.5, 0.4):
            for name, settings in (("Prune and Merge", {"boundary": "reference", "weights": "reference", "prune_rate": 0.1}),
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
            self.add(f"neurons, as much in each block, {gmacs}", "neurons, closed form", seed, lambda plan=plan: self.refitted(seed, plan))

    def searched(self, rule: str, seed: int, budgets: tuple[float, ...]) -> Iterator[tuple[str, CompressionPlan]]:
        for gmacs in budgets:
            plan = self.survey(seed).search(rule, gmacs, EVALUATIONS)
            yield f"{rule}, searched, {gmacs}", plan

    def closed(self, seed: int) -> None:
        budgets = GMACS[:1] if self.args.quick else GMACS
        self.static(seed)
        if seed not in self.args.search_seeds:
            return
        self.units(seed)
        for rule, costs in (("merging by content", budgets), ("shared updates", budgets), ("neurons", NEURONS), ("all together", budgets)):
            for name, plan in self.searched(rule, seed, costs):
                cut = any(block.heads or block.neurons for block in plan.blocks)
                self.add(name, f"{rule}, searched", seed, lambda plan=plan, cut=cut: self.refitted(seed, plan) if cut else self.plain(plan))

    def calibrated(self, seed: int) -> None:
        """Self-distillation of the plans found with the first seed, on another draw of images for each seed."""
        for rule in ("shared updates", "merging by content"):
            for name, plan in self.searched(rule, self.args.search_seeds[0], (0.75,)):
                def make(plan: CompressionPlan = plan, name: str = name) -> tuple[nn.Module, float, CompressionPlan]:
                    found = calibrate(self.dense, self.args.cal, self.args.run / f"{name} {seed}", plan, minutes=self.args.minutes,
                                      seed=seed, workers=1)
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
        """One row a name: the median over seeds, and each seed's value; what earlier runs measured of other names and seeds stays."""
        path = self.args.run / "speed.json"
        speed = json.loads(path.read_text()) if path.exists() else {"models": {}, "conditions": {}}
        grouped: dict[str, list[dict]] = {}
        for row in self.rows.values():
            grouped.setdefault(row["name"], []).append(row)
        dense, earlier = grouped["dense"][0], {row["model"]: row for row in read_lines(RESULTS)}
        out = []
        for name, rows in grouped.items():
            timed = speed["models"].get(name.removesuffix(", calibrated"), {})
            gmacs = statistics.median(r["gmacs"] for r in rows)
            found = {"model": name, "family": rows[0]["family"], "top1_pct": statistics.median(r["top1_pct"] for r in rows), "gmacs": gmacs,
                     "distill_loss": statistics.median(r["distill_loss"] for r in rows),
                     "against_dense": statistics.median(r["top1_pct"] for r in rows) - dense["top1_pct"],
                     "throughput_img_s": timed.get("throughput_img_s"), "ratio": timed.get("ratio"),
                     "conditions": {"draws": [r["top1_pct"] for r in rows], "seeds": [r["seed"] for r in rows], "images": rows[0]["images"],
                                    "dtype": "bfloat16" if self.amp else "float32", "speed": speed["conditions"],
                                    "of_mac_ratio": timed["ratio"] * gmacs / dense["gmacs"] if timed else None}}
            out.append(_with_earlier(found, earlier.pop(name, None), [r["distill_loss"] for r in rows], dense["top1_pct"]))
        order = [row["model"] for row in read_lines(RESULTS)]
        out = sorted([*out, *earlier.values()], key=lambda row: order.index(row["model"]) if row["model"] in order else len(order))
        write_lines(RESULTS, out)
        draw(out)


def _with_earlier(row: dict, earlier: dict | None, distances: list[float], dense_pct: float) -> dict:
    """A row with the draws that an earlier run measured with other seeds, and its speed where there is no newer one."""
    row["conditions"]["distances"] = distances
    if earlier is None:
        return row
    was, now = earlier["conditions"], row["conditions"]
    kept = [i for i, seed in enumerate(was["seeds"]) if seed not in now["seeds"]]
    old = was.get("distances", [earlier["distill_loss"]] if len(was["seeds"]) == 1 else [None] * len(was["seeds"]))    # of some not known
    drawn = sorted([*((was["seeds"][i], was["draws"][i], old[i]) for i in kept), *zip(now["seeds"], now["draws"], distances)])
    now |= dict(zip(("seeds", "draws", "distances"), map(list, zip(*drawn))))
    row["top1_pct"] = statistics.median(now["draws"])
    row["distill_loss"] = statistics.median(d for d in now["distances"] if d is not None)
    row["against_dense"] = row["top1_pct"] - dense_pct
    if row["ratio"] is None:
        row |= {key: earlier[key] for key in ("throughput_img_s", "ratio")}
        now |= {key: was[key] for key in ("speed", "of_mac_ratio")}
    return row


def draw(rows: list[dict]) -> None:
    """docs/off_the_shelf.png: top-1 against GMACs and against images/s; docs/off_the_shelf_distance.png: the distance to dense."""
    _draw(rows, "top1_pct", "top-1 on 650 validation images (%)", (55, 82), "linear", "off_the_shelf")
    _draw(rows, "distill_loss", "distance to the dense model (nats)", (1.3, 8e-4), "log", "off_the_shelf_distance")


def _draw(rows: list[dict], value: str, ylabel: str, limits: tuple[float, float], scale: str, name: str) -> None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"GMACs per image": {}, "images per second (float32, batch 32)": {}}
    dense = next(r for r in rows if r["model"] == "dense")
    for row in rows:
        for label, key in zip(panels, ("gmacs", "throughput_img_s")):
            if row[key] and row is not dense:
                panels[label].setdefault(row["family"], []).append((row[key], row[value]))
    panels = {label: lines for label, lines in panels.items() if lines}
    keys = dict(zip(panels, ("gmacs", "throughput_img_s")))
    figure = trade_offs(panels, ylabel, {label: (dense[keys[label]], dense[value]) for label in panels})
    for axis in figure.get_axes():
        axis.set_yscale(scale)
        axis.set_ylim(*limits)
    save_figure(figure, DOCS, name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--weights", "--cal", "--val"):
        parser.add_argument(option, required=True)
    parser.add_argument("--run", required=True, type=Path, help="folder for curves, searches and rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search-seeds", type=int, nargs="+", help="seeds with searches of their own (default: all)")
    parser.add_argument("--parts", nargs="+", default=["closed", "calibrated", "speed"], choices=("closed", "calibrated", "speed"))
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
        for part in ("closed", "calibrated"):
            if part in args.parts:
                getattr(bench, part)(seed)
    if "speed" in args.parts:
        bench.speed()
    bench.write()
