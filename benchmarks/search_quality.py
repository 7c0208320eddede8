"""How good a policy the search finds, evaluation by evaluation, beside random, uniform, Optuna and BoTorch.

    vitlab pretrain --model vit_micro_patch4_32 --data CIFAR10 --recipe cifar10 --out DENSE
    pip install optuna botorch -c constraints.txt
    python benchmarks/search_quality.py --dense DENSE --data CIFAR10 --run RUN

Every (strategy, budget, seed) is EVALUATIONS policies of heads, neurons and token selection, those that a start
measures alone included, measured by top-1 on one slice of train; the best policy of each is then measured on HELD other
images of train, so that over-fitting of the slice shows. Each is a journal in a folder of its own below --run, and all
share the measured policies in RUN/measured.jsonl: nothing is measured twice, and a run that was killed goes on.

The peers propose in the same box, [0, max_ratio] in every dimension, and do not know the budget: their proposals are
brought to it by Budget.project, and the policy it gives is what is measured and counted (one that falls short of the
budget's tolerance costs less and is measured all the same; how many is in the conditions). What they learn from:
"botorch"  LogExpectedImprovement (analytic; Ament et al. 2023, arXiv 2310.20708) of SingleTaskGP with its own priors,
           on standardised values at the projected points; optimised over the whole box by optimize_acqf. SOBOL points
           first.
"optuna"   TPESampler as it comes (multivariate, 10 random points first), told the value at the point that it proposed
           itself, as ask and tell do: of the projection it learns only through the value.
"optuna, projected"  the same, told the projected point instead, by Study.add_trial.
In that box any ratio above 0 cuts one head of few, so that a sampler nearly never leaves the heads of a block whole:
random, TPE and Sobol points all pay for it; ours draws where every number of heads has an equal share
(SearchSpace.even). "..., even heads" are therefore the same peers, told the projected points, in such a box: the
comparison that counts.

Rows go to benchmarks/results/search_quality.jsonl (replaced), the figures to docs/search_quality_60.png and _45.png.
"""
import argparse
import importlib.util
import json
import platform
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitlab.data import open_data
from vitlab.measure.objective import PlanObjective
from vitlab.measure.units import unit_scores
from vitlab.models import shape_of
from vitlab.plan.cost import macs_of
from vitlab.plots import incumbents, save_figure
from vitlab.runtime.files import append_line, atomic_write, read_json, read_lines
from vitlab.runtime.results import ResultRow, write_rows
from vitlab.search import Budget, SearchSpace, Study
from vitlab.search.allocation import levels
from vitlab.search.strategies import Settings
from vitlab.workbench import steps

HERE = Path(__file__).parent
FRACTIONS, SEEDS, EVALUATIONS = (0.6, 0.45), 5, 60
CALIBRATION, SLICE, HELD = 512, 500, 2500       # images of train, disjoint: of the unit scores, the search, the check
SCORE_BATCH, BATCH = 64, 250
SOBOL = 20                                      # points before the first proposal, for 13 dimensions
RESTARTS, RAW_SAMPLES = 10, 512                 # of optimize_acqf, as in BoTorch's tutorials
Measure = Callable[[np.ndarray], dict[str, float]]


def optuna_tpe(points: np.ndarray, values: np.ndarray, seed: int) -> np.ndarray:
    """The next point (D) in [0, 1] after `points` (P, D) with their values (P), larger is better."""
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    box = {str(d): optuna.distributions.FloatDistribution(0, 1) for d in range(points.shape[1])}
    # a new stream at each step: it can be resumed
    sampler = optuna.samplers.TPESampler(seed=1000 * seed + len(points))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([optuna.trial.create_trial(params=dict(zip(box, point)), distributions=box, value=value)
                      for point, value in zip(points.tolist(), values.tolist())])
    return np.array(list(study.ask(fixed_distributions=box).params.values()))


def botorch_log_ei(points: np.ndarray, values: np.ndarray, seed: int) -> np.ndarray:
    """As `optuna_tpe`: Sobol points first, then the maximum of log EI."""
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.optim import optimize_acqf
    from botorch.utils.sampling import draw_sobol_samples, manual_seed
    from gpytorch.mlls import ExactMarginalLogLikelihood
    bounds = torch.tensor([[0.0], [1.0]], dtype=torch.double).expand(2, points.shape[1])
    if len(points) < SOBOL:
        return draw_sobol_samples(bounds, n=SOBOL, q=1, seed=seed)[len(points), 0].numpy()
    x, y = torch.from_numpy(points), torch.from_numpy(values)[:, None]
    with manual_seed(1000 * seed + len(points)):
        model = SingleTaskGP(x, y)                              # standardises y by itself
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        best, _ = optimize_acqf(LogExpectedImprovement(model, best_f=y.max()), bounds, q=1, num_restarts=RESTARTS,
                                raw_samples=RAW_SAMPLES)
    return best[0].numpy()




@dataclass(frozen=True, kw_only=True)
class Peer:
    """A package that proposes."""

    propose: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    package: str
    initial: str                                # what it starts with, before projection
    told: str = "policy"                        # which point it learns from: "policy", the projected one, or "proposed"
    even_heads: bool = False                    # each number of heads takes an equal share of [0, 1]


TPE, LOG_EI = Peer(propose=optuna_tpe, package="optuna", initial="10 random points"), Peer(
    propose=botorch_log_ei, package="botorch", initial=f"{SOBOL} Sobol points")
PEERS = {"optuna": replace(TPE, told="proposed"), "optuna, projected": TPE,
         "optuna, even heads": replace(TPE, even_heads=True), "botorch": LOG_EI,
         "botorch, even heads": replace(LOG_EI, even_heads=True)}
OURS = {"gp": "10 policies, varied: uniform ones first",
        "gp, sensitivity": "each dimension cut alone, then 5 policies that follow from it and 5 varied",
        "random": "random", "uniform": "one ratio for all groups, each group alone, then random"}
LABELS = {"gp": "vitlab, gp", "gp, sensitivity": "vitlab, gp, from sensitivity", "random": "random",
          "uniform": "uniform per group", "optuna": "Optuna TPE",
          "optuna, projected": "Optuna TPE, told the projection", "optuna, even heads": "Optuna TPE, even heads",
          "botorch": "BoTorch log EI", "botorch, even heads": "BoTorch log EI, even heads"}


def heads_cut(space: SearchSpace, policies: np.ndarray) -> tuple[np.ndarray, int]:
    """(heads cut in each block (P, L), the most that can be)."""
    total = space.shape.num_heads
    return total - space.counts(policies).heads, total - int(space.counts(np.full(space.size, space.max_ratio)).heads[0,
                                                                                                                      0])


def to_policies(space: SearchSpace, points: np.ndarray, even_heads: bool) -> np.ndarray:
    """Points (P, D) in [0, 1] to ratios: times max_ratio; with even_heads, floor(point * (most + 1)) heads are cut."""
    policies = points * space.max_ratio
    if even_heads:
        heads, total = np.array(space.groups) == "heads", space.shape.num_heads
        _, most = heads_cut(space, policies)
        cut = np.minimum(np.floor(points[:, heads] * (most + 1)), most)
        policies[:, heads] = np.where(cut > 0, np.minimum((cut - 0.5) / total, space.max_ratio), 0)
    return policies


def to_points(space: SearchSpace, policies: np.ndarray, even_heads: bool) -> np.ndarray:
    """The other way; with even_heads to the middle of each number's share."""
    points = policies / space.max_ratio
    if even_heads and len(points):
        cut, most = heads_cut(space, policies)
        points[:, np.array(space.groups) == "heads"] = (cut + 0.5) / (most + 1)
    return points


def peer(name: str, folder: Path, space: SearchSpace, budget: Budget, seed: int, total: int,
         measure: Measure) -> list[dict]:
    """`total` lines of a journal: {"proposed", "policy", "value", "cost", ...}, its points in [0, max_ratio]."""
    me, lines = PEERS[name], read_lines(folder / "journal.jsonl")
    while len(lines) < total:
        seen = np.array([line[me.told] for line in lines]).reshape(-1, space.size)
        point = me.propose(to_points(space, seen, me.even_heads), np.array([line["value"] for line in lines]),
                           seed).clip(0, 1)
        proposed = to_policies(space, point[None], me.even_heads)
        projected, meets = budget.project(proposed)
        lines.append({"proposed": proposed[0].tolist(), "policy": projected[0].tolist(), "meets": bool(meets[0]),
                      "cost": float(budget.cost(projected)[0]), **measure(projected[0])})
        append_line(folder / "journal.jsonl", lines[-1])
    return lines[:total]


def ours(name: str, folder: Path, space: SearchSpace, budget: Budget, seed: int, total: int,
         measure: Measure) -> list[dict]:
    """The same of a vitlab.search.Study; fewer lines where it finds no other policy. What a start measures beside
    policies of the budget counts as evaluations: lines of their own, without a value, and as many fewer of the
    search."""
    strategy, _, initial = name.partition(", ")
    options = Settings(evaluations=total, initial=initial or Settings.initial)
    if initial:
        options = replace(options, evaluations=max(1, total - 1 - sum(map(len, levels(space)))))
    study = Study(folder, space, budget, strategy=strategy, seed=seed, options=options)
    study.run(measure, progress=False)
    started = [{"policy": None, "meets": True, "cost": None,
                "value": float("nan")}] * (study.spent - len(study.evaluations))
    return [*started,
            *({"policy": list(e.policy), "meets": True, "cost": e.cost, "value": e.value}
              for e in study.evaluations)][:total]


def draw(args: argparse.Namespace, model: torch.nn.Module) -> list[list[tuple[Tensor, Tensor]]]:
    """Batches of the calibration, the slice and the held images: one draw of train, so that they are disjoint."""
    batches = open_data(args.data).batches("train", model, limit=CALIBRATION + SLICE + HELD, seed=1, workers=0)
    images, targets = (torch.cat(part) for part in zip(*batches))
    parts = zip(images.split([CALIBRATION, SLICE, HELD]), targets.split([CALIBRATION, SLICE, HELD]),
                (SCORE_BATCH, BATCH, BATCH))
    return [list(zip(x.split(size), y.split(size))) for x, y, size in parts]


def remembered(path: Path, space: SearchSpace, measure: Measure) -> Measure:
    """`measure`, but of each policy (by its counts) once, whoever proposed it and in whichever run."""
    known = {tuple(line.pop("key")): line for line in read_lines(path)}

    def remember(policy: np.ndarray) -> dict[str, float]:
        key, = space.keys(policy)
        if key not in known:
            known[key] = measure(policy)
            append_line(path, {"key": key, **known[key]})
        return known[key]
    return remember


def check_same(path: Path, about: dict) -> None:
    """Refuse a run folder whose policies were measured under other conditions."""
    if path.exists() and read_json(path) != about:
        raise SystemExit(f"{path} is of another benchmark: {read_json(path)}, not {about}; choose another --run or "
                         f"remove it")
    atomic_write(path, json.dumps(about) + "\n")


def row(name: str, fraction: float, seed: int, lines: list[dict], held: Measure, about: dict) -> ResultRow:
    values = np.array([line["value"] for line in lines])
    best = lines[int(np.nanargmax(values))]
    initial, told = (OURS[name], "policy") if name in OURS else (PEERS[name].initial + ", projected", PEERS[name].told)
    return ResultRow(model=f"{name}, {fraction:.0%} of the MACs, seed {seed}", dataset="cifar10",
                     split=f"{HELD} other images of train", top1_pct=held(np.array(best["policy"]))["top1_pct"],
                     gmacs=best["cost"],
                     conditions={"strategy": name, "fraction": fraction, "seed": seed, "evaluations": len(lines),
                                 "best_so_far": [v if np.isfinite(v) else None
                                                 for v in np.fmax.accumulate(values).tolist()],
                                 "initial": initial, "learns_from": told,
                                 "below_tolerance": sum(not line["meets"] for line in lines), "policy": best["policy"],
                                 **about})


def figures(rows: list[ResultRow], about: dict) -> None:
    """One per budget."""
    for fraction in dict.fromkeys(r.conditions["fraction"] for r in rows):
        curves: dict[str, list] = {}
        for r in rows:
            if r.conditions["fraction"] == fraction:
                curves.setdefault(LABELS[r.conditions["strategy"]], []).append(r.conditions["best_so_far"])
        figure = incumbents(curves, label=f"top-1 % on {SLICE} images of train")
        save_figure(figure, HERE.parent / "docs", f"search_quality_{100 * fraction:.0f}",
                    f"ViT of {about['dense_gmacs']:.3f} GMACs on CIFAR-10 cut to {fraction:.0%} of them (heads, "
                    f"neurons, token selection), "
                    f"not fine-tuned; dense {about['dense_slice_top1_pct']:.1f} %")


def summary(rows: list[ResultRow]) -> str:
    """Median (least to largest of the seeds) of the best so far at three counts and of the best policy on other
    images."""
    def text(values: list[float | None]) -> str:
        return "-" if None in values else f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    lines = []
    for fraction, name in dict.fromkeys((r.conditions["fraction"], r.conditions["strategy"]) for r in rows):
        mine = [r for r in rows if (r.conditions["fraction"], r.conditions["strategy"]) == (fraction, name)]
        curves = [r.conditions["best_so_far"] for r in mine]
        counts = [n for n in (10, 20, 30, 40, 50, 60) if n <= max(map(len, curves))]
        at = [f"{n}: {text([c[min(n, len(c)) - 1] for c in curves])}" for n in counts]
        lines.append(f"{fraction:.0%} {name:18s} {'  '.join(at)}  others: {text([r.top1_pct for r in mine])}  "
                     f"below tolerance: {sum(r.conditions['below_tolerance'] for r in mine)}")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    for name in set(args.strategies) & set(PEERS):
        package = PEERS[name].package
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"the peer {name!r} needs {package}: pip install {package} -c constraints.txt, or name "
                             f"other --strategies "
                             f"(of {list(LABELS)})")
    warnings.filterwarnings("ignore", category=FutureWarning)                   # torch's and Optuna's own
    dense = steps.open_model(args.dense).model
    shape = shape_of(dense)
    space = SearchSpace(shape=shape, tokens="select")
    calibration, searched, others = draw(args, dense)
    scores = unit_scores(dense, calibration, criterion="hsic", progress=False)
    # Both keep the images in memory.
    objectives = [PlanObjective(dense, batches, metric="top1_pct") for batches in (searched, others)]
    measures = [remembered(args.run / f"{name}.jsonl", space,
                           lambda policy,
                           o=objective: o(space.plan(policy, heads=scores.heads, neurons=scores.neurons)))
                for name, objective in zip(("measured", "held"), objectives)]
    whole = np.zeros(space.size)                                                # nothing cut

    def cost(policies: np.ndarray) -> np.ndarray:
        return macs_of(shape, space.counts(policies))["total"] / 1e9
    dense_gmacs = float(cost(whole)[0])
    on_slice, on_others = (measure(whole) for measure in measures)
    about = {"images": SLICE, "held_images": HELD, "score_images": CALIBRATION, "criterion": "hsic",
             "dimensions": space.size, "max_ratio": space.max_ratio, "dense_gmacs": dense_gmacs,
             "dense_slice_top1_pct": on_slice["top1_pct"], "dense_held_top1_pct": on_others["top1_pct"],
             "dense_loss": round(on_slice["loss"], 6)}
    check_same(args.run / "about.json", about)
    about |= {"threads": torch.get_num_threads(), "device": platform.machine() + " CPU",
              **{name: version(name) for name in ("torch", "timm", "scikit-learn", "optuna", "botorch", "gpytorch")
                 if importlib.util.find_spec(name.replace("scikit-learn", "sklearn"))}}
    rows = []
    for seed in range(args.seeds):
        for fraction in FRACTIONS:
            budget = Budget(limit=fraction * dense_gmacs, cost=cost, max_ratio=space.max_ratio, size=space.size)
            for name in args.strategies:
                folder = args.run / f"{name.replace(', ', '-')}-{100 * fraction:.0f}-{seed}"
                lines = (ours if name in OURS else peer)(name, folder, space, budget, seed, args.evaluations,
                                                         measures[0])
                rows.append(row(name, fraction, seed, lines, measures[1], about))
                print(rows[-1].model, [v and round(v, 1) for v in rows[-1].conditions["best_so_far"][9::10]],
                      rows[-1].top1_pct, flush=True)
    rows.sort(key=lambda r: (FRACTIONS.index(r.conditions["fraction"]),
                             args.strategies.index(r.conditions["strategy"])))
    print(summary(rows))
    if not args.dry:
        write_rows(HERE / "results" / "search_quality.jsonl", rows)
        figures(rows, about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", required=True, type=Path, help="folder of a run trained on CIFAR-10")
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", required=True, type=Path, help="folder of the journals")
    parser.add_argument("--strategies", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--dry", action="store_true", help="print only: leave the results and the figures as they are")
    main(parser.parse_args())
