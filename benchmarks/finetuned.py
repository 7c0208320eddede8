"""After fine-tuning, on a model that is good: a pretrained vision transformer fine-tuned on CIFAR-10 at a larger
resolution is the dense model; then every method at a part of its MACs with the same fine-tuning, the dense one too.

    python benchmarks/finetuned.py --weights deit_tiny_patch16_224.safetensors --data CIFAR10 --run RUN \\
        [--resolution 128] [--dense-epochs 4] [--epochs 3] [--train-images N] [--seeds 0 1 2] [--methods NAME ...] \\
        [--device cuda] [--quick]

CIFAR10 is a folder train/CLASS/*, test/CLASS/*. Scores, searches and refits see images of train alone, test is for
reporting; all are distilled from the dense model, and the dense model trained on in the same way is the control. Each
row has top-1 on test as it is cut and after fine-tuning, its differences to the dense model and to the control of its
seed, each with the standard error over images, and the throughput beside the dense model's, both timed in turn. Rows
are appended to benchmarks/results/finetuned.jsonl as they are measured, and a run that was stopped goes on, also within
a training. --quick: a small model on the digits, to see that it runs; its rows stay in RUN.
"""
import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from off_the_shelf import measures
from tome import tome, tome_gmacs, tome_within
from torch import Tensor, nn

from vitlab.criteria.planning import prune_and_merge
from vitlab.data import open_data
from vitlab.measure import throughput
from vitlab.measure.distance import outputs
from vitlab.measure.evaluate import each_divergence
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.opening import open_model
from vitlab.plan import CompressionPlan, cost
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import append_line, atomic_write, read_json, read_lines
from vitlab.runtime.uncertainty import standard_error
from vitlab.search import SearchSpace
from vitlab.training.loop import fit
from vitlab.training.recipes import recipe
from vitlab.workbench import scoring, searching, training
from vitlab.workbench.cutting import even_within
from vitlab.workbench.steps import TRAINING, pick_device
from vitlab.workbench.survey import Survey

RESULTS = Path(__file__).parent / "results" / "finetuned.jsonl"
NAME, QUICK, DENSE, CONTROL = "deit_tiny_patch16_224", "vit_nano_patch4_32", "dense", "dense, fine-tuned alike"
RATIO, LESS, STEPS, EVALUATIONS, FINALISTS = 0.6, 0.45, 3, 40, 2
# of a pretrained model on CIFAR-10, and of one that was compressed, distilled from it
TO_CIFAR = recipe("cifar10").replace(lr=4e-4, layer_decay=0.9, warmup_epochs=0.2)
ALIKE = recipe("cifar10_pm").replace(lr=1e-4, warmup_epochs=0.2)


class Start(NamedTuple):
    """What is fine-tuned."""

    model: nn.Module
    plan: CompressionPlan | None                # None: it is no plan's model
    gmacs: float
    steps: int = 1                              # more: the dense model, which the plan cuts in so many turns


class Bench:
    """Rows by (method, seed), each measured once and written at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.path = args, pick_device(args.device), args.run / "rows.jsonl"
        self.data = open_data(args.data)
        self.limit = 64 if args.quick else args.train_images                    # of a fine-tuning that methods share
        self.scored_on = 64 if args.quick else 512
        self.dense = self.made()
        self.model = self.dense.model.eval().to(self.device)
        self.shape, self.gmacs = shape_of(self.model), cost.gmacs(self.dense.plan)
        about = {"model": QUICK if args.quick else args.model, "data": self.data.name,
                 "resolution": self.shape.img_size[0], "epochs": args.epochs, "train_images": self.limit}
        self.about, self.expected, self.surveys = about, self.given(self.model), dict[int, Survey]()
        self.rows = {(r["method"], r["seed"]): r for r in read_lines(self.path) if about.items() <= r.items()}

    def config(self, seed: int) -> RunConfig:
        return RunConfig(seed=seed, device=str(self.device), workers=self.args.workers, quiet=True)

    def made(self) -> Checkpoint:
        """The dense model, fine-tuned from the weights given where it is not there yet."""
        out, args = self.args.run / "dense", self.args
        if not (out / checkpoint.FOLDER).exists():
            found = (open_model(QUICK, pretrained=False) if args.quick else
                     open_model(args.weights) if Path(args.weights).is_dir() else
                     open_model(args.weights, model=args.model, img_size=args.resolution))
            if found.model.num_classes != self.data.num_classes:
                torch.manual_seed(0)
                found.model.reset_classifier(self.data.num_classes)
            training.train_dense("finetune", found.model, self.data, out, TO_CIFAR.replace(epochs=args.dense_epochs),
                                 self.config(0), images=64 if args.quick else None, device=self.device)
        return open_model(out)

    @torch.inference_mode()
    def given(self, model: nn.Module) -> list[Tensor]:
        """Log-probabilities of each batch of test."""
        self.targets, found = [], []
        for images, targets in self.data.batches("test", self.model, limit=48 if self.args.quick else None,
                                                 workers=self.args.workers):
            found.append(outputs(model.to(self.device).eval(), images.to(self.device), False).cpu())
            self.targets.append(targets)
        return found

    def measured(self, model: nn.Module) -> tuple[list[int], list[float]]:
        """(right or not, distance to the dense model) of each image of test."""
        given = self.given(model)
        return ([int(v) for g, t in zip(given, self.targets) for v in g.argmax(dim=1) == t],
                [float(v) for g, e in zip(given, self.expected) for v in each_divergence(g, e)])

    # ---- What methods are made from, all of it kept in the run's folder

    def tokens(self, seed: int, absolute: str = "image") -> Tensor:
        path = self.args.run / f"tokens-{absolute}-{seed}.safetensors"
        if not path.exists():
            scoring.score_tokens(self.dense, self.args.data, path, absolute=absolute, images=self.scored_on,
                                 config=self.config(seed))
        return scoring.read_scores(path)[0]

    def units(self, seed: int) -> dict[str, Tensor]:
        """As published: by HSIC."""
        path = self.args.run / f"units-{seed}.safetensors"
        if not path.exists():
            scoring.score_units(self.dense, self.args.data, path, images=self.scored_on, config=self.config(seed))
        found = scoring.read_units(path)
        return {"heads": found.heads, "neurons": found.neurons}

    def survey(self, seed: int) -> Survey:
        if seed not in self.surveys:            # one at a time: it holds images
            few = {"images": 8, "report_images": 8, "score_images": 16} if self.args.quick else {}
            self.surveys = {seed: Survey(self.dense, self.args.data, self.args.run / f"survey-{seed}", **few,
                                         config=self.config(seed))}
        return self.surveys[seed]

    def best(self, seed: int, rule: str, ratio: float, searched: bool) -> tuple[CompressionPlan, str]:
        """(plan, form) of a rule, by its curves, or by a search too; what either took is kept in its folder."""
        survey, limit = self.survey(seed), ratio * self.gmacs
        plans = [survey.plan(rule, limit)]
        if searched:
            plans += survey.search(rule, limit, self.args.evaluations)[:FINALISTS]
        return survey.best(plans)

    def cut(self, plan: CompressionPlan) -> Start:
        return Start(compress(self.model, plan), plan, cost.gmacs(plan))

    # ---- A row

    def add(self, method: str, seed: int, make: Callable[[], Start]) -> None:
        if (method, seed) in self.rows:
            return
        began = time.perf_counter()
        start = make()
        before = start.model if start.steps == 1 else compress(self.model, start.plan)
        as_cut = self.measured(before)[0]
        model = before if method == DENSE else self.trained(method, seed, start)
        right, distances = self.measured(model)
        dense = self.rows[DENSE, 0]["right"] if self.rows else right
        control = self.rows.get((CONTROL, seed), {}).get("right")
        against = None if control is None else 100 * (np.array(right) - np.array(control))
        row = {**self.about, "method": method, "seed": seed, "gmacs": start.gmacs,
               "macs_ratio": start.gmacs / self.gmacs, "as_cut_top1_pct": 100 * sum(as_cut) / len(as_cut),
               **measures(right, dense, distances),
               "against_control": None if against is None else float(against.mean()),
               "against_control_se": None if against is None else standard_error(against), **self.timed(start, model),
               "seconds": round(time.perf_counter() - began, 1),
               "plan": None if start.plan is None else json.loads(start.plan.to_json()), "right": right}
        self.rows[method, seed] = row
        append_line(self.path, row)
        shown = {key: value for key, value in row.items() if key not in ("plan", "right")}
        if not self.args.quick:
            append_line(RESULTS, shown)
        print(shown, flush=True)

    def trained(self, method: str, seed: int, start: Start) -> nn.Module:
        """The model after fine-tuning; one that was killed goes on from the model that it began with."""
        out = self.args.run / f"{method.replace(' ', '-')}-{seed}"
        settings = ALIKE.replace(epochs=self.args.epochs)
        if start.plan is None:
            fit(start.model, self.data, settings, out / TRAINING, teacher=self.model, seed=seed, device=self.device,
                limit=self.limit, workers=self.args.workers, progress=False)
            return start.model
        if not (out / checkpoint.FOLDER).exists():
            source, plan = self.dense, {"plan": start.plan, "steps": start.steps}
            if start.steps == 1:
                source, plan = out / "start", {}
                if not source.exists():
                    checkpoint.save(source, start.model.cpu(), start.plan, classes=self.data.classes)
            training.finetune(source, self.args.data, out, teacher=self.dense, recipe=settings, images=self.limit,
                              config=self.config(seed), **plan)
            self.model.to(self.device)
        return open_model(out).model

    def timed(self, start: Start, model: nn.Module) -> dict:
        """Throughput of the deployed model, in turn with the dense one."""
        small = model if start.plan is None else deploy(model)
        size, repeats = (2, 2) if self.args.quick else (self.args.batch_size, self.args.repeats)
        speed = throughput.measure({"dense": self.model, "small": small}, batch_size=size, repeats=repeats,
                                   device=self.device, min_seconds=0.0 if self.args.quick else 0.2,
                                   progress=False)["small"]
        return {"throughput_img_s": speed.throughput_img_s, "ratio": speed.ratio, "conditions": {
            "speed": throughput.conditions(self.device, "float32", size, repeats)
            | {"ratio_range": [speed.ratio_min, speed.ratio_max]}, **({"quick": True} if self.args.quick else {})}}


def published(keep_rate: float) -> Callable[[Bench, int], Start]:
    """Prune and Merge as its code has it."""
    def make(bench: Bench, seed: int) -> Start:
        return bench.cut(prune_and_merge(bench.tokens(seed, "batch"), bench.shape, keep_rate=keep_rate,
                                         boundary="reference", weights="reference"))
    return make


def even(units: Sequence[str], tokens: str, ratio: float = RATIO) -> Callable[[Bench, int], Start]:
    """One ratio for all blocks."""
    def make(bench: Bench, seed: int) -> Start:
        space = SearchSpace(shape=bench.shape, units=tuple(units), tokens=tokens, max_ratio=0.9,
                            read_out=tokens == "match")
        scores = bench.units(seed) if units else {"tokens": bench.tokens(seed)} if space.by_place else {}
        return bench.cut(space.plan(even_within(space, ratio * bench.gmacs), **scores))
    return make


def searched_as_published(ratio: float) -> Callable[[Bench, int], Start]:
    """Heads and neurons by HSIC and one selection ratio, by the published search on top-1 of images of train, of fewer
    evaluations."""
    def make(bench: Bench, seed: int) -> Start:
        out, quick, count = bench.args.run / f"published-{ratio}-{seed}", bench.args.quick, bench.args.evaluations
        few = {"images": 8, "score_images": 16} if quick else {}
        searching.search(bench.dense, bench.args.data, out, macs_ratio=ratio, tokens="select", metric="top1_pct",
                         settings="published", evaluations=count, population=max(2, count // 2),
                         config=bench.config(seed), **few)
        return bench.cut(CompressionPlan.load(out / searching.PLAN, bench.shape))
    return make


def ours(rule: str, ratio: float, searched: bool) -> Callable[[Bench, int], Start]:
    """A rule's plan in the form that is nearest to the dense model, refitted or not."""
    def make(bench: Bench, seed: int) -> Start:
        plan, form = bench.best(seed, rule, ratio, searched)
        return Start(bench.survey(seed).in_form(form, plan), plan, cost.gmacs(plan))
    return make


def not_refitted(steps: int) -> Callable[[Bench, int], Start]:
    """Our joint plan, cut at once or in so many turns."""
    def make(bench: Bench, seed: int) -> Start:
        start = bench.cut(bench.best(seed, "all together", RATIO, True)[0])
        return start if steps == 1 else start._replace(model=bench.model, steps=steps)
    return make


def tome_alike(bench: Bench, seed: int) -> Start:
    counts = tome_within(bench.model, RATIO * bench.gmacs)
    return Start(tome(bench.model, counts), None, tome_gmacs(bench.model, counts))


METHODS: dict[str, Callable[[Bench, int], Start]] = {
    CONTROL: lambda bench, seed: bench.cut(CompressionPlan.empty(bench.shape)),
    "Prune and Merge as published, keep 0.7": published(0.7),
    "Prune and Merge as published, keep 0.6": published(0.6),
    "Prune and Merge, our boundary": even((), "merge"),
    "shared updates": even((), "share"),
    "spans": even((), "merge_per_span"),
    "merging by content": even((), "match"),
    "ToMe": tome_alike,
    "selection by class attention": even((), "select"),
    "heads and neurons by HSIC": even(("heads", "neurons"), "none"),
    "heads and neurons, ours": ours("heads and neurons", RATIO, False),
    "joint search as published, 0.6": searched_as_published(RATIO),
    "our joint plan, 0.6": ours("all together", RATIO, True),
    "our joint plan, 0.6, not refitted": not_refitted(1),
    f"our joint plan, 0.6, not refitted, in {STEPS} steps": not_refitted(STEPS),
    "joint search as published, 0.45": searched_as_published(LESS),
    "our joint plan, 0.45": ours("all together", LESS, True)}


def main(argv: Sequence[str] | None = None) -> Bench:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="file of the pretrained weights, or a checkpoint of a run to go on from")
    parser.add_argument("--model", default=NAME, help="timm name of their model")
    parser.add_argument("--data", help="folder of CIFAR-10")
    parser.add_argument("--run", required=True, type=Path, help="folder for trainings, searches and rows")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--dense-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=STEPS, help="of every method's fine-tuning")
    parser.add_argument("--train-images", type=int, help="of every epoch of that, of train (default: all)")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="of a search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME",
                        help=", ".join(METHODS))
    parser.add_argument("--device", help="(default: a GPU where there is one)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32, help="of the timing")
    parser.add_argument("--repeats", type=int, default=15, help="of the timing")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.data, args.dense_epochs, args.epochs, args.evaluations, args.workers = "digits", 1, 1, 4, 0
    elif args.epochs % STEPS:
        parser.error(f"--epochs {args.epochs}: a plan is also cut in {STEPS} turns of as many epochs; a multiple of "
                     f"{STEPS} is needed")
    settings = {name: str(getattr(args, name)) for name in
                ("weights", "model", "data", "resolution", "dense_epochs", "epochs", "train_images", "evaluations",
                 "quick")}
    kept = args.run / "settings.json"
    if kept.exists() and read_json(kept) != settings:
        parser.error(f"--run {args.run}: its trainings are of other settings ({read_json(kept)}); another folder is "
                     f"needed")
    args.run.mkdir(parents=True, exist_ok=True)
    atomic_write(kept, json.dumps(settings))
    bench = Bench(args)
    bench.add(DENSE, 0, lambda: bench.cut(CompressionPlan.empty(bench.shape)))
    for seed in args.seeds:
        for method in dict.fromkeys([CONTROL, *args.methods]):                  # which the others stand beside
            bench.add(method, seed, lambda method=method, seed=seed: METHODS[method](bench, seed))
    return bench


if __name__ == "__main__":
    main()
