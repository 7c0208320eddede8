"""What to measure next: Gaussian process with Expected Improvement, and the baselines random and uniform."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from vitlab.runtime.files import check_known, require
from vitlab.search.acquisition import log_expected_improvement
from vitlab.search.sampling import Problem, neighbours, random_policies, uniform_policies, varied_policies
from vitlab.search.surrogate import Surrogate

INITIAL = {"varied": varied_policies, "random": random_policies,
           "sensitivity": varied_policies}      # and half the population from what each dimension loses alone
STRATEGIES = {"gp": None, "random": random_policies, "uniform": uniform_policies}
BLOCKS = 20                     # of `population` policies, drawn until enough are new; then a space counts as used up
LEADERS = 5                     # best policies that candidates are drawn around; as the numbers of `sampling`


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the search goes on. "published" in SETTINGS has the numbers of arXiv 2201.00043; the defaults are those of
    the tables of docs/search.md, and the population was chosen with the first of these in sight."""

    source: str = "vitlab"
    population: int = 10                        # policies before the first proposal of the Gaussian process
    evaluations: int = 80                       # in all, the population included
    initial: str = "varied"                     # how the population is drawn: a name of INITIAL
    noise: float | None = None                  # variance of standardised values; None fits it
    candidates: int = 600                       # feasible policies that the acquisition is computed on
    refinements: int = 4                        # rounds of local search around the best candidates
    batch: int = 1                              # proposals at a time, for parallel evaluation

    def __post_init__(self) -> None:
        check_known("initial", self.initial, INITIAL)
        lowest = {"population": 2, "evaluations": 1, "candidates": 10, "refinements": 0, "batch": 1}
        for name, low in lowest.items():
            require(getattr(self, name) >= low, f"{name} is {getattr(self, name)}; at least {low} is needed")
        require(self.noise is None or self.noise > 0,
                f"noise is {self.noise}; a positive variance, or None to fit it, is needed")


SETTINGS = {"default": Settings(),
            "published": Settings(source="arXiv 2201.00043 (methods B6)", population=100, evaluations=200,
                                  initial="random", noise=1e-5, refinements=0)}


def settings(name: str) -> Settings:
    """By name. Raises InputError that lists the known ones."""
    require(name in SETTINGS, f"search settings {name!r} are not known; known are {sorted(SETTINGS)}")
    return SETTINGS[name]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A policy to measure, who proposed it, and what was expected of it."""

    policy: np.ndarray                          # (D)
    by: str
    expected: dict[str, float]                  # log_ei, mean, deviation; empty where nothing was predicted


def _fresh(problem: Problem, policies: np.ndarray, seen: set[tuple[int, ...]]) -> np.ndarray:
    """Without those already measured, and without repeats."""
    first: dict[tuple[int, ...], int] = {}
    for place, key in enumerate(problem.space.keys(policies) if len(policies) else ()):
        first.setdefault(key, place)
    return policies[[place for key, place in first.items() if key not in seen]]


Trend = Callable[[np.ndarray], np.ndarray]      # policies (P, D) -> (P, G), whose weighted sum is about the objective


def predictor(problem: Problem, policies: np.ndarray, values: np.ndarray, options: Settings, trend: Trend | None,
              ) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """policies (P, D) -> (mean, deviation) of the objective, (P) each: a Gaussian process around a + trend @ b, b >= 0
    (G), both fitted by least squares first. What is cut together loses more or less than the sum of what is cut alone,
    and each group's weight says how much."""
    features, known = problem.space.features, np.zeros((len(policies), 1)) if trend is None else trend(policies)
    weights = nnls(known - known.mean(axis=0), values - values.mean())[0]
    surrogate = Surrogate(features(policies), values - known @ weights, noise=options.noise)

    def predict(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = surrogate.predict(features(p))
        return mean if trend is None else mean + trend(p) @ weights, deviation
    return predict


def incumbent(predict: Callable, policies: np.ndarray, values: np.ndarray, options: Settings) -> float:
    """What Expected Improvement improves on: the largest value measured, or, where noise is fitted, the largest that
    `predict` believes of the measured policies (P, D), as the largest value (P) would be the luckiest."""
    return float((predict(policies)[0] if options.noise is None else values).max())


def _improving(problem: Problem, policies: np.ndarray, values: np.ndarray, options: Settings, rng: np.random.Generator,
               trend: Trend | None) -> Proposal | None:
    """The feasible policy with the largest log EI of those drawn: half as the population is, half near the leaders,
    then, refined, near the best of them. None where no drawn one is new."""
    predict, seen = predictor(problem, policies, values, options, trend), set(problem.space.keys(policies))
    best, half = incumbent(predict, policies, values, options), options.candidates // 2

    def log_ei(p: np.ndarray) -> np.ndarray:
        return log_expected_improvement(*predict(p), best)
    leaders = policies[np.argsort(-values)[:LEADERS]]
    pool = _fresh(problem, np.concatenate([INITIAL[options.initial](problem, half, rng),
                                           neighbours(problem, leaders, half, rng)]), seen)
    if not len(pool):
        return None
    for _ in range(options.refinements):
        top = pool[np.argsort(-log_ei(pool))[:LEADERS]]
        pool = _fresh(problem, np.concatenate([top, neighbours(problem, top, half // 2, rng)]), seen)
    scores = log_ei(pool)
    chosen = pool[int(scores.argmax())]
    mean, deviation = (float(v[0]) for v in predict(chosen[None]))
    return Proposal(policy=chosen, by="gp", expected={"log_ei": float(scores.max()), "mean": mean,
                                                      "deviation": deviation})


def _gaussian_process(problem: Problem, policies: np.ndarray, values: np.ndarray, options: Settings, count: int,
                      seed: int, trend: Trend | None) -> list[Proposal]:
    """Up to `count`, each believed to come out at its mean when the next is proposed."""
    rng, proposals = np.random.default_rng([1, seed, len(policies)]), []
    while len(proposals) < count:
        found = _improving(problem, policies, values, options, rng, trend)
        if found is None:
            break
        proposals.append(found)
        policies, values = np.vstack([policies, found.policy]), np.append(values, found.expected["mean"])
    return proposals


def propose(strategy: str, problem: Problem, policies: np.ndarray, values: np.ndarray, options: Settings, count: int,
            seed: int, start: np.ndarray | None = None, trend: Trend | None = None) -> list[Proposal]:
    """Up to `count` policies to measure after those measured (P, D) with their values (P), larger is better.

    start: policies (K, D) that the population begins with; trend: what is known of the objective beforehand. A pure
    function of its arguments, so a search that was killed proposes the same again. Fewer, or none, where nothing
    feasible is left that was not measured. Raises InputError for an unknown strategy.
    """
    check_known("strategy", strategy, STRATEGIES)
    done, by_gp, space = len(policies), strategy == "gp", problem.space
    draw, by = (INITIAL[options.initial], "population") if by_gp else (STRATEGIES[strategy], strategy)
    filled = by_gp and done >= options.population
    proposals = _gaussian_process(problem, policies, values, options, count, seed, trend) if filled else []
    seen = set(space.keys(policies)) if done else set()

    def add(drawn: np.ndarray, by: str) -> None:
        fresh = _fresh(problem, drawn, seen | {space.keys(p.policy)[0] for p in proposals})
        proposals.extend(Proposal(policy=policy, by=by, expected={}) for policy in fresh[:count - len(proposals)])
    if start is not None and done < options.population:
        add(start, "sensitivity")
    first = done // options.population          # the same blocks every time, whatever was measured of them already
    for block in range(first, first + BLOCKS):
        if len(proposals) < count:
            add(draw(problem, options.population, np.random.default_rng([0, seed, block])), by)
    if by_gp and not filled and not proposals and done >= 2:                    # the population can't be filled
        proposals = _gaussian_process(problem, policies, values, options, count, seed, trend)
    return proposals
