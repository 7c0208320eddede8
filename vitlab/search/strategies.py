"""What to measure next: Gaussian process with Expected Improvement, and the baselines random and uniform (methods
B6)."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from vitlab.runtime.files import InputError
from vitlab.search.acquisition import log_expected_improvement
from vitlab.search.sampling import Problem, neighbours, random_policies, uniform_policies, varied_policies
from vitlab.search.surrogate import Surrogate

INITIAL = {"varied": varied_policies, "random": random_policies,
           "sensitivity": varied_policies}      # and half the population from what each dimension loses alone
BLOCKS = 20                                     # of `population` policies, drawn until enough are new
LEADERS = 5                                     # best policies so far that candidates are drawn around


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the search goes on. "published" in SETTINGS has the numbers of arXiv 2201.00043."""

    source: str = "vitlab"
    population: int = 10                        # policies before the first proposal of the Gaussian process
    evaluations: int = 80                       # in all, the population included
    initial: str = "varied"                     # how the population is drawn: a name of INITIAL
    noise: float | None = None                  # variance of standardised values; None fits it
    candidates: int = 600                       # feasible policies that the acquisition is computed on
    refinements: int = 4                        # rounds of local search around the best candidates
    batch: int = 1                              # proposals at a time, for parallel evaluation

    def __post_init__(self) -> None:
        if self.initial not in INITIAL:
            raise InputError(f"initial {self.initial!r} is not known; known are {sorted(INITIAL)}")
        lowest = {"population": 2, "evaluations": 1, "candidates": 10, "refinements": 0, "batch": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; at least {low} is needed")
        if self.noise is not None and not self.noise > 0:
            raise InputError(f"noise is {self.noise}; a positive variance, or None to fit it, is needed")


SETTINGS = {"default": Settings(),
            "published": Settings(source="arXiv 2201.00043 (methods B6)", population=100, evaluations=200,
                                  initial="random", noise=1e-5, refinements=0)}


def settings(name: str) -> Settings:
    """By name. Raises InputError that lists the known ones."""
    if name not in SETTINGS:
        raise InputError(f"search settings {name!r} are not known; known are {sorted(SETTINGS)}")
    return SETTINGS[name]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A policy to measure, who proposed it, and what was expected of it."""

    policy: np.ndarray                          # (D)
    by: str
    expected: dict[str, float]                  # log_ei, mean, deviation; empty where nothing was predicted


def _fresh(problem: Problem, policies: np.ndarray, seen: set[tuple[int, ...]]) -> np.ndarray:
    """Without those already measured, and without repeats."""
    keys = problem.space.keys(policies) if len(policies) else []
    first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in seen}
    return policies[sorted(first.values())]


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
    `predict` believes of the measured policies (P, D), as the largest value (P) would be that of the luckiest
    measurement."""
    return float((predict(policies)[0] if options.noise is None else values).max())


def _gaussian_process(problem: Problem, policies: np.ndarray, values: np.ndarray, options: Settings, count: int,
                      rng: np.random.Generator, trend: Trend | None = None) -> list[Proposal]:
    """The feasible policies with the largest log EI; each proposal of a batch is believed to come out at its mean."""
    space, proposals = problem.space, []
    for _ in range(count):
        predict = predictor(problem, policies, values, options, trend)
        best = incumbent(predict, policies, values, options)

        def acquisition(p: np.ndarray, predict: Callable = predict, best: float = best) -> np.ndarray:
            return log_expected_improvement(*predict(p), best)
        leaders, seen = policies[np.argsort(-values)[:LEADERS]], set(space.keys(policies))
        half = options.candidates // 2
        pool = _fresh(problem, np.concatenate([INITIAL[options.initial](problem, half, rng),
                                               neighbours(problem, leaders, half, rng)]), seen)
        for _ in range(options.refinements if len(pool) else 0):
            top = pool[np.argsort(-acquisition(pool))[:LEADERS]]
            pool = _fresh(problem, np.concatenate([top, neighbours(problem, top, half // 2, rng)]), seen)
        if not len(pool):
            break
        scores = acquisition(pool)
        chosen = pool[int(scores.argmax())]
        mean, deviation = (float(v[0]) for v in predict(chosen[None]))
        proposals.append(Proposal(policy=chosen, by="gp", expected={"log_ei": float(scores.max()), "mean": mean,
                                                                    "deviation": deviation}))
        policies, values = np.concatenate([policies, chosen[None]]), np.append(values, mean)
    return proposals


def propose(strategy: str, problem: Problem, policies: np.ndarray, values: np.ndarray, options: Settings, count: int,
            seed: int, start: np.ndarray | None = None, trend: Trend | None = None) -> list[Proposal]:
    """Up to `count` policies to measure after those measured (P, D) with their values (P), larger is better.

    start: policies (K, D) that the population begins with; trend: what is known of the objective beforehand. A pure
    function of its arguments, so a search that was killed proposes the same again. Fewer, or none, where nothing
    feasible is left that was not measured. Raises InputError for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy {strategy!r} is not known; known are {sorted(STRATEGIES)}")
    done, proposals = len(policies), []
    draw, by = (INITIAL[options.initial], "population") if strategy == "gp" else (STRATEGIES[strategy], strategy)
    if strategy == "gp" and done >= options.population:
        proposals = _gaussian_process(problem, policies, values, options, count, np.random.default_rng([1, seed, done]),
                                      trend)
    first, seen = done // options.population, set(problem.space.keys(policies)) if done else set()

    def add(drawn: np.ndarray, by: str) -> None:
        fresh = _fresh(problem, drawn, seen | {problem.space.keys(p.policy)[0] for p in proposals})
        proposals.extend(Proposal(policy=policy, by=by, expected={}) for policy in fresh[:count - len(proposals)])
    if start is not None and done < options.population:
        add(start, "sensitivity")
    # the same blocks every time, whatever was measured of them already
    for block in range(first, first + BLOCKS):
        if len(proposals) == count:
            break
        add(draw(problem, options.population, np.random.default_rng([0, seed, block])), by)
    if strategy == "gp" and not proposals and 2 <= done < options.population:           # the population can't be filled
        proposals = _gaussian_process(problem, policies, values, options, count, np.random.default_rng([1, seed, done]),
                                      trend)
    return proposals


STRATEGIES = {"gp": None, "random": random_policies, "uniform": uniform_policies}
