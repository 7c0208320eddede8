"""What other families are worth right after compression: three small models trained on the digits, one that turns
queries and keys by place and has gated neurons, one that pools by attention, and one without a classifier that has
learned the features of the first.

    python benchmarks/families.py --run RUN [--kinds NAME ...] [--quick]

Each is cut to 0.75 and 0.6 of its MACs by merging by content, by heads and neurons, and by all together, as the curves
of a survey on train say, refitted in the form that is nearest on images apart; ToMe's rule is adapted to each
(tome.py). All is measured on the test split, which nothing else sees: the distance to the dense model, top-1, and
without a classifier top-1 by the nearest neighbours among the images of train. Of the first, merged tokens are also
turned as the token that the others were merged into, in place of the mean of their patches' rotations. Rows go to
benchmarks/results/families.jsonl; a run that was stopped goes on. --quick: to see that it runs; its rows stay in RUN.
"""
import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from off_the_shelf import measures
from tome import tome, tome_gmacs, tome_within
from torch import Tensor, nn

from vitlab.data import open_data
from vitlab.measure.distance import output_of
from vitlab.measure.features import features_of, nearest_neighbours
from vitlab.models import checkpoint, compress, deploy, held, match, read_out
from vitlab.models.opening import open_model
from vitlab.plan import CompressionPlan, cost, matching
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import append_line, read_lines, write_lines
from vitlab.runtime.uncertainty import standard_error
from vitlab.training.recipes import recipe
from vitlab.training.self_distillation import Divergence
from vitlab.workbench import training
from vitlab.workbench.survey import Survey

RESULTS, DATA, RATIOS = Path(__file__).parent / "results" / "families.jsonl", "digits", (0.75, 0.6)
RULES = ("merging by content", "heads and neurons", "all together")
APART = ("right", "plan")                       # of a row, what stays in RUN
SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4}
# kind: (timm's name, arguments beside SIZE, epochs, the kind that it learns the features of)
MODELS = {
    "RoPE and SwiGLU": ("vit_small_plus_patch16_dinov3",
                        {"num_classes": 10, "num_reg_tokens": 0, "init_values": 1.0, "global_pool": "token"}, 24, None),
    "attention pooling": ("vit_base_patch16_siglip_224", {"num_classes": 10}, 36, None),
    "no classifier": ("vit_small_patch14_dinov2", {"num_classes": 0, "init_values": 1.0}, 16, "RoPE and SwiGLU")}


def train(kind: str, args: argparse.Namespace) -> Path:
    """The run folder of a kind's model; a training that was killed goes on."""
    name, more, epochs, teacher = MODELS[kind]
    out, settings = args.run / kind.replace(" ", "-"), recipe("digits").replace(epochs=1 if args.quick else epochs)
    how = {"images": 64 if args.quick else None, "config": RunConfig(workers=0, quiet=True)}
    if (out / checkpoint.FOLDER).exists():
        return out
    if teacher is None:
        return training.pretrain(model=name, data=DATA, out=out, recipe=settings, model_args=SIZE | more, **how)
    taught = open_model(train(teacher, args))
    taught.model.reset_classifier(0)
    return training.finetune(open_model(name, pretrained=False, **SIZE, **more), DATA, out, teacher=taught,
                             recipe=settings.replace(distill="soft"), **how)


@contextlib.contextmanager
def turned_as_target() -> Iterator[None]:
    """Inside, a merged token is turned by place as the token that the others were merged into."""
    state: dict[str, Tensor] = {}
    place = matching.new_places

    def new_places(order: Tensor, into: Tensor, count: int) -> Tensor:
        """Also keeps whose place each token that is left has, of the grid's patches."""
        was = state["of"] if state and state["of"].shape == (len(order), count) else \
            torch.arange(count).expand(len(order), -1)
        state["of"] = torch.cat([was[:, ::2].gather(1, order[:, into.shape[1]:]), was[:, 1::2]], dim=1)
        return place(order, into, count)

    def rotation_of(merged: held.Merged, rope: Tensor) -> Tensor:
        return rope[state["of"]][:, None]                                           # (n, 2 d) -> (B, 1, N - P, 2 d)
    with mock.patch.object(matching, "new_places", new_places), mock.patch.object(match, "rotation_of", rotation_of), \
            mock.patch.object(read_out, "rotation_of", rotation_of):
        yield


class Bench:
    """Rows of one kind by name, each measured once and written at once."""

    def __init__(self, kind: str, args: argparse.Namespace) -> None:
        self.kind, self.args, self.path = kind, args, args.run / "rows.jsonl"
        self.dense = open_model(train(kind, args))
        self.model, data, limit = self.dense.model.eval(), open_data(DATA), 24 if args.quick else None
        self.test, self.train = (list(data.batches(split, self.model, limit=limit, workers=0))
                                 for split in ("held_out", "train"))
        self.apart = Divergence(self.model, [(images, None) for images, _ in self.test])
        self.rows = {row["model"]: row for row in read_lines(self.path) if row["conditions"]["kind"] == kind} \
            if self.path.exists() else {}
        amounts = {"images": 16, "report_images": 16, "score_images": 32} if args.quick else {}
        self.survey = Survey(self.dense, DATA, args.run / "survey" / kind.replace(" ", "-"), **amounts,
                             config=RunConfig(workers=0, quiet=True))
        self.gmacs = cost.gmacs(CompressionPlan.empty(self.survey.shape))

    @torch.inference_mode()
    def right(self, model: nn.Module) -> list[int]:
        """Whether each image of test is told right."""
        if output_of(self.model).labelled:
            return [int(v) for images, targets in self.test for v in model(images).argmax(dim=1) == targets]
        (known, labels, *_), (given, targets, *_) = (features_of(model, batches, progress=False)
                                                     for batches in (self.train, self.test))
        return (nearest_neighbours(known, labels)(given) == targets).int().tolist()

    def add(self, name: str, make: Callable[[], tuple[nn.Module, float, dict]]) -> None:
        """make: gives a model, its GMACs and what else the row says."""
        if name in self.rows:
            return
        model, gmacs, more = make()
        right, distances = self.right(model.eval()), self.apart.each(model)
        dense = self.rows["dense"]["conditions"]["right"] if self.rows else right
        self.rows[name] = {"model": name, "gmacs": gmacs, **measures(right, dense, distances), "conditions": {
            "kind": self.kind, "of": MODELS[self.kind][0], "distance": output_of(self.model).distance,
            "unit": output_of(self.model).unit, "macs_ratio": gmacs / self.gmacs,
            "top1": "top-1" if output_of(self.model).labelled else "kNN top-1", "images": len(right), "right": right,
            **({"quick": True} if self.args.quick else {}), **more}}
        append_line(self.path, self.rows[name])
        print(f"{self.kind:20s} {name:50s} {gmacs / self.gmacs:.3f}  {self.rows[name]['top1_pct']:.2f}  "
              f"{self.rows[name]['distill_loss']:.4f}", flush=True)

    def cut(self, rule: str, ratio: float) -> tuple[nn.Module, float, dict]:
        """The plan of a rule, in its nearest form."""
        plan, form = self.survey.best([self.survey.plan(rule, ratio * self.gmacs)])
        return deploy(self.survey.in_form(form, plan)), cost.gmacs(plan), {"form": form,
                                                                           "plan": json.loads(plan.to_json())}

    def tome(self, ratio: float) -> tuple[nn.Module, float, dict]:
        counts = tome_within(self.model, ratio * self.gmacs)
        return tome(self.model, counts), tome_gmacs(self.model, counts), {"merged": counts}

    def all(self) -> None:
        self.add("dense", lambda: (self.model, self.gmacs, {}))
        for ratio in RATIOS:
            self.add(f"ToMe, {ratio}", lambda ratio=ratio: self.tome(ratio))
            for rule in RULES:
                self.add(f"{rule}, {ratio}", lambda rule=rule, ratio=ratio: self.cut(rule, ratio))

    def rotations(self) -> None:
        """Distances of test with merged tokens turned either way, at equal MACs: what the means cost is spent on tokens
        where there are none."""
        def turning(plan: CompressionPlan) -> float:
            return 2 * plan.shape.head_dim * plan.shape.rotary * int(cost.counts_of(plan).turned.sum()) / 1e9
        for ratio in (*RATIOS, 0.45):
            limit = ratio * self.gmacs
            plan = self.survey.plan(RULES[0], limit)
            other = self.survey.plan(RULES[0], limit + turning(plan))
            mean = np.array(self.apart.each(compress(self.model, plan).eval()))
            with turned_as_target():
                own = np.array(self.apart.each(compress(self.model, other).eval()))
            print(f"mean rotation {mean.mean():.4f} at {cost.gmacs(plan) / self.gmacs:.3f} of the MACs, that of the "
                  f"token merged into {own.mean():.4f} at {(cost.gmacs(other) - turning(other)) / self.gmacs:.3f}; the "
                  f"difference {(own - mean).mean():+.4f} ± {standard_error(own - mean):.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="folder for trainings, surveys and rows")
    parser.add_argument("--kinds", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    for kind in args.kinds:
        bench = Bench(kind, args)
        bench.all()
        if bench.survey.shape.rotary:
            bench.rotations()
    if not args.quick:
        order, rows = list(MODELS), read_lines(args.run / "rows.jsonl")
        write_lines(RESULTS, [row | {"conditions": {k: v for k, v in row["conditions"].items() if k not in APART}}
                              for row in sorted(rows, key=lambda row: order.index(row["conditions"]["kind"]))])
