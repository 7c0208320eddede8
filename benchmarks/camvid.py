"""What compression costs a Segmenter on CamVid: every token rule at three keep rates, before and after fine-tuning, in
one table.

    vitlab segment --checkpoint deit_tiny_patch16_224.safetensors --model deit_tiny_patch16_224 --data CAMVID --recipe
    camvid --out DENSE python benchmarks/camvid.py --dense DENSE --data CAMVID --run RUN [--parts closed tuned test
    speed] [--keeps 0.8 0.7 0.5] [--quick]

Plans are made from train, looked at on val, and `test` is measured once, of every model that is reported. "keep" is
Prune and Merge's keep rate; `plans_at` says what it is for each rule.
Rows go to benchmarks/results/camvid.jsonl; a run that was stopped goes on, model by model.
"""
import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlab.data.masks import open_scenes
from vitlab.measure.evaluate import uses_bf16
from vitlab.measure.pixels import evaluate_scenes
from vitlab.measure.throughput import conditions, measure
from vitlab.models import compress, deploy, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.plan import CompressionPlan, cost
from vitlab.plots import predictions, save_figure, scene_regions, trade_offs
from vitlab.runtime.caveats import caveat
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import append_line, atomic_write, read_lines, write_lines
from vitlab.training.recipes import recipe
from vitlab.workbench import scoring, steps, training
from vitlab.workbench.segmenting import plans_at, seen, shown

RESULTS = Path(__file__).parent / "results" / "camvid.jsonl"
DOCS = Path(__file__).parents[1] / "docs"
KEEPS = (0.8, 0.7, 0.5)
SCORED, BATCH = 128, 4
PARTS = ("closed", "tuned", "test", "speed", "figures")
FAMILIES = ("Prune and Merge", "Prune and Merge, spans", "shared updates", "merging by content")


class Bench:
    """Rows by (model, stage), each measured once and written at once. Stages: "closed" off the shelf, "tuned" after
    fine-tuning."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.data = args, open_scenes(args.data)
        self.dense: Checkpoint = steps.open_model(args.dense)
        self.model, self.shape = self.dense.model.eval(), shape_of(self.dense.model)
        self.amp = uses_bf16(torch.device("cpu"), None)
        self.path = args.run / "rows.jsonl"
        self.rows = {(r["model"], r["stage"], r["split"]): r
                     for r in (read_lines(self.path) if self.path.exists() else [])}
        self._scores: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """Gradient-weighted attention from the segmentation loss, on images of train."""
        path = self.args.run / "scores.safetensors"
        if self._scores is None:
            if not path.exists():
                scoring.score_tokens(self.dense, self.args.data, path, images=SCORED,
                                     config=RunConfig(batch_size=BATCH, workers=1))
            self._scores = scoring.read_scores(path)[0]
        return self._scores

    def models(self) -> Iterator[tuple[str, str, CompressionPlan | None]]:
        """(name, family, plan)."""
        yield "dense", "dense", None
        for keep in self.args.keeps:
            for family, plan in plans_at(self.scores, self.shape, keep).items():
                if family in self.args.families:
                    yield f"{family}, keep {keep}", family, plan

    def add(self, name: str, family: str, stage: str, split: str, model: nn.Module,
            plan: CompressionPlan | None) -> None:
        if (name, stage, split) in self.rows:
            return
        batches = self.data.batches(split, model, batch_size=BATCH, whole=True, workers=1, limit=self.args.limit)
        found = evaluate_scenes(deploy(model) if plan else model, batches, amp=self.amp, progress=False)
        row = {"model": name, "family": family, "stage": stage, "split": split,
               "miou_pct": found.scores.miou_pct, "miou_se": found.scores.miou_se,
               "pixel_accuracy_pct": found.scores.pixel_accuracy_pct, "iou_pct": list(found.scores.iou_pct),
               "images": found.images, "gmacs": cost.gmacs(plan or CompressionPlan.empty(self.shape)),
               "plan": json.loads(plan.to_json()) if plan else None}
        self.rows[name, stage, split] = row
        append_line(self.path, row)
        print(f"{name:34s} {stage:7s} {split:5s} {row['gmacs']:.3f} GMACs  mIoU {row['miou_pct']:.2f}", flush=True)

    def closed(self, split: str) -> None:
        for name, family, plan in self.models():
            self.add(name, family, "closed", split, compress(self.model, plan) if plan else self.model, plan)

    def tuned(self, split: str) -> None:
        """Distilled from the dense model per pixel (recipe camvid_pm), the same number of epochs for each rule."""
        settings = recipe("camvid_pm").replace(epochs=self.args.epochs, dtype="bfloat16" if self.amp else "float32")
        for name, family, plan in self.models():
            run = self.args.run / name.replace(" ", "-").replace(",", "")
            if plan is not None and (name, "tuned",
                                     split) not in self.rows and (split == "val" or (run / "checkpoint").exists()):
                if not (run / "checkpoint").exists():
                    training.finetune(self.dense, self.args.data, run, teacher=self.dense, plan=plan, recipe=settings,
                                      images=self.args.limit, config=RunConfig(workers=1, quiet=True))
                self.add(name, family, "tuned", split, steps.open_model(run).model, plan)

    def speed(self) -> None:
        """Images/s of the deployed models, in turn in this process."""
        models = {name: deploy(compress(self.model, plan)) if plan else self.model for name, _, plan in self.models()}
        found = measure(models, batch_size=BATCH, repeats=self.args.repeats, device="cpu")
        atomic_write(self.args.run / "speed.json", json.dumps({
            "models": {name: {"throughput_img_s": s.throughput_img_s, "ratio": s.ratio,
                              "ratio_range": [s.ratio_min, s.ratio_max]}
                       for name, s in found.items()},
            "conditions": conditions(torch.device("cpu"), "float32", BATCH, self.args.repeats)}))

    def figures(self) -> None:
        """docs/camvid_predictions.png and camvid_regions.png: two scenes of val under the rule by content, as they come
        off the shelf."""
        keep, rule = 0.7, "merging by content"
        plan = plans_at(self.scores, self.shape, keep)[rule]
        small = Checkpoint(model=compress(self.model, plan), plan=plan, info={})
        folder = self.args.run if self.args.quick else DOCS
        found = shown(self.data, {"dense": self.dense, f"{rule}, keep {keep}": small}, count=2)
        note = f"CamVid, val; {rule} at the cost of keep rate {keep}, without fine-tuning"
        save_figure(predictions(*found, self.data.classes), folder, "camvid_predictions", note)
        picture, places = seen(small, self.data)
        save_figure(scene_regions(picture, plan, (self.shape.depth // 2, self.shape.depth - 1), places), folder,
                    "camvid_regions", note)

    def write(self) -> None:
        """One row a model: off the shelf and tuned, on val and on test."""
        path = self.args.run / "speed.json"
        speed = json.loads(path.read_text()) if path.exists() else {"models": {}, "conditions": {}}
        out = []
        for name, family, plan in self.models():
            mine = {(stage, split): row for (model, stage, split), row in self.rows.items() if model == name}
            if not mine:
                continue
            timed, first = speed["models"].get(name, {}), next(iter(mine.values()))
            out.append({"model": name, "family": family, "gmacs": first["gmacs"],
                        **{f"{stage}_{split}_{key}": mine.get((stage, split), {}).get(key)
                           for stage in ("closed", "tuned") for split in ("val", "test")
                           for key in ("miou_pct", "miou_se")},
                        "throughput_img_s": timed.get("throughput_img_s"), "ratio": timed.get("ratio"),
                        "conditions": {"dtype": "bfloat16" if self.amp else "float32", "epochs": self.args.epochs,
                                       "images": {split: row["images"] for (_, split), row in mine.items()},
                                       "iou_pct": {f"{stage} {split}": row["iou_pct"] for (stage, split),
                                                   row in mine.items()},
                                       "classes": self.data.classes,
                                       "speed": speed["conditions"]
                                       | ({"ratio_range": timed["ratio_range"]} if timed else {}),
                                       **({"quick": True} if self.args.quick else {}),
                                       "tokens": None if plan is None else plan.tokens_per_block()}})
        write_lines(self.args.run / RESULTS.name if self.args.quick else RESULTS, out)
        draw(out, self.args.run if self.args.quick else DOCS)


def draw(rows: list[dict], folder: Path = DOCS) -> None:
    """camvid.png: mIoU on val against GMACs and the throughput ratio, before and after fine-tuning."""
    keys = {"GMACs per image": "gmacs",
            f"throughput over the dense model's, same run\n(float32, batch {BATCH})": "ratio"}
    dense, panels = rows[0], {label: {} for label in keys}

    def point(row: dict, key: str, stage: str = "closed") -> tuple:
        return row[key], row[f"{stage}_val_miou_pct"], row.get(f"{stage}_val_miou_se"), span_of(
            row) if key == "ratio" else None
    for row in rows[1:]:
        for label, key in keys.items():
            for stage, words in (("closed", "off the shelf"), ("tuned", "fine-tuned")):
                if row[f"{stage}_val_miou_pct"] is not None and row[key]:
                    panels[label].setdefault(f"{row['family']}, {words}", []).append(point(row, key, stage))
    panels = {label: lines for label, lines in panels.items() if lines}
    if panels:
        save_figure(trade_offs(panels, "mIoU on CamVid's val images (%)",
                               {label: point(dense, keys[label]) for label in panels}), folder,
                    "camvid", caveat(quick=any(row["conditions"].get("quick") for row in rows)))


def span_of(row: dict) -> list[float] | None:
    """The range of the throughput ratio over the rounds of timing; rows of before have it beside the speed's
    conditions."""
    return row["conditions"]["speed"].get("ratio_range") or row["conditions"].get("ratio_range")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--dense", "--data"):
        parser.add_argument(option, required=True)
    parser.add_argument("--run", required=True, type=Path, help="folder for scores, fine-tuned models and rows")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="8 images, one epoch, one keep rate, rows in RUN: to see "
                                                             "that it runs")
    args = parser.parse_args()
    args.limit = 8 if args.quick else None
    if args.quick:
        args.epochs, args.keeps, args.repeats = 1, args.keeps[:1], 1
    args.run.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for part in args.parts:
        if part in ("closed", "tuned"):
            getattr(bench, part)("val")
        elif part == "test":
            bench.closed("test")
            bench.tuned("test")
        else:
            getattr(bench, part)()
    bench.write()
