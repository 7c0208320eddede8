"""Expected Improvement against integrals and series, the surrogate's scale and noise, and proposals on toys with a
known optimum."""
import dataclasses
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from vitlab.plan.cost import macs_of
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError
from vitlab.search import Budget, SearchSpace
from vitlab.search.acquisition import log_expected_improvement
from vitlab.search.sampling import Problem, neighbours, random_policies
from vitlab.search.strategies import SETTINGS, STRATEGIES, Settings, predictor, propose, settings
from vitlab.search.surrogate import Surrogate

# Counts are fine (101 neurons, 13 heads, 77 patches), so that a policy can come close to any optimum. 5 dimensions.
SPACE = SearchSpace(shape=ViTShape(img_size=(112, 176), patch_size=(16, 16), embed_dim=52, depth=2, num_heads=13,
                                   head_dim=4, num_neurons=101, num_classes=10))
# the optimum, near corners, where random policies seldom are
TARGET = np.array([0.45, 0.05, 0.4, 0.1, 0.05])
CURVATURE = np.array([0.3, 1.7, 1.0, 3.0, 0.6])
PRICES = np.array([1.0, 2.0, 1.5, 3.0, 2.5])


def toy_problem() -> Problem:
    """A budget that the target just meets."""
    return Problem(SPACE,
                   Budget(limit=10 - float(TARGET @ PRICES), cost=lambda p: 10 - p @ PRICES, max_ratio=0.5, size=5))


def macs_problem(part: float = 0.65) -> Problem:
    def cost(policies: np.ndarray) -> np.ndarray:
        return macs_of(SPACE.shape, SPACE.counts(policies))["total"] / 1e9
    return Problem(SPACE, Budget(limit=part * float(cost(np.zeros((1, 5)))[0]), cost=cost, max_ratio=0.5, size=5))


def value(policies: np.ndarray) -> np.ndarray:
    """0 at the target, negative elsewhere."""
    return -((np.atleast_2d(policies) - TARGET)**2 @ CURVATURE)


QUICK = Settings(population=8, evaluations=20, initial="random", candidates=60, refinements=1)


def proposed(proposals: list) -> np.ndarray:
    return np.array([p.policy for p in proposals])


def measured(problem: Problem, options: Settings, count: int, seed: int = 0, strategy: str = "gp",
             batch: int = 1) -> tuple[np.ndarray, list]:
    """Policies (count, D) in the order in which they are proposed, and their proposals."""
    policies, proposals = np.empty((0, problem.space.size)), []
    while len(policies) < count:
        first = min(options.population, count) if not len(policies) else min(batch, count - len(policies))
        proposals += propose(strategy, problem, policies, value(policies), options, first, seed)
        policies = proposed(proposals)
    return policies, proposals


# Expected Improvement

# log(phi(z) + z Phi(z)) by mpmath with 50 digits, where the difference of the two loses none that show here.
GOLDEN = [(-0.5, -1.62051626438732), (-1.5, -3.52993592080571), (-3.0, -7.869686059603029),
          (-7.0, -29.36810718314128), (-20.0, -206.9178385094251)]


@pytest.mark.parametrize("mean", [-2.0, -0.5, 0.0, 0.3, 1.7])
@pytest.mark.parametrize("deviation", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("best", [-1.0, 0.0, 0.7])
def test_expected_improvement_is_the_integral_of_what_exceeds_the_best(mean, deviation, best):
    top = max(best, mean) + 12 * deviation                                  # beyond it the density is below 1e-31
    wanted, error = quad(lambda y: (y - best) * norm.pdf(y, mean, deviation), best, top, epsabs=1e-13, epsrel=1e-11,
                         limit=200, points=[min(max(mean, best), top)])
    assert math.exp(log_expected_improvement(mean, deviation, best)) == pytest.approx(wanted, abs=1e-10 + error)
    # below, the integral's own error shows in a logarithm
    if wanted > 1e-6:
        assert log_expected_improvement(mean, deviation, best) == pytest.approx(math.log(wanted), abs=1e-5)


def test_expected_improvement_of_a_worked_example():
    # phi(-0.5) = 0.35206533, Phi(-0.5) = 0.30853754: 0.35206533 - 0.5 * 0.30853754 = 0.1977966
    assert math.exp(log_expected_improvement(-0.5, 1.0, 0.0)) == pytest.approx(0.1977966, abs=5e-8)
    assert math.exp(log_expected_improvement(-1.0, 2.0, 0.0)) == pytest.approx(0.3955931, abs=1e-7)  # in twice the unit
    assert math.exp(log_expected_improvement(0.0, 1.0, 0.0)) == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-15)


def test_a_larger_mean_or_deviation_and_a_smaller_best_improve_more():
    assert (np.diff(log_expected_improvement(np.linspace(-3, 3, 61), 0.7, 0.2)) > 0).all()
    assert (np.diff(log_expected_improvement(-0.4, np.linspace(0.2, 3, 61), 0.2)) > 0).all()
    assert (np.diff([log_expected_improvement(0.1, 0.7, best) for best in np.linspace(-2, 2, 41)]) < 0).all()


def test_shapes_broadcast():
    mean, deviation = np.linspace(-1, 1, 7)[:, None], np.array([0.2, 1.0, 2.0])
    given = log_expected_improvement(mean, deviation, 0.1)
    assert given.shape == (7, 3)
    assert given[5, 2] == log_expected_improvement(mean[5, 0], 2.0, 0.1)
    assert given[0, 1] == log_expected_improvement(mean[0, 0], 1.0, 0.1)


def test_log_expected_improvement_is_the_logarithm_where_that_does_not_vanish():
    z = np.linspace(-5, 40, 1801)
    # h(z) = phi + z Phi is a difference below 0: at z = -5 it loses phi / h = 28, so 1e-13 relative at most.
    given, wanted = log_expected_improvement(z * 0.3 + 2, 0.3, 2.0), np.log(0.3 * (norm.pdf(z) + z * norm.cdf(z)))
    assert np.allclose(given, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("z, wanted", GOLDEN)
def test_log_expected_improvement_of_numbers_with_fifty_digits(z, wanted):
    assert log_expected_improvement(z, 1.0, 0.0) == pytest.approx(wanted, abs=1e-12, rel=1e-13)


@pytest.mark.parametrize("z", [-40.0, -173.0, -999.0, -9999.0, -10001.0, -123456.0, -1e6])
def test_log_expected_improvement_far_below_follows_the_series(z):
    # h(z) = phi(z) / z^2 * (1 - 3 / z^2 + 15 / z^4 - 105 / z^6 + ...), Mills' ratio; the next term is 945 / z^8 <
    # 2e-10.
    wanted = -z * z / 2 - math.log(2 * math.pi) / 2 - 2 * math.log(-z) + math.log1p(-3 / z**2 + 15 / z**4 - 105 / z**6)
    # 1 + z Phi / phi = 1 / z^2 is what is left of two numbers near 1: 1e-16 * z^2, 1e-8 at most before the branch at
    # -1e4.
    assert log_expected_improvement(z, 1.0, 0.0) == pytest.approx(wanted, abs=1e-7, rel=1e-15)
    assert log_expected_improvement(3 * z + 5, 3.0, 5.0) == pytest.approx(wanted + math.log(3), abs=1e-7, rel=1e-14)


def test_log_expected_improvement_is_finite_and_grows_from_minus_a_million():
    z = np.concatenate([-np.logspace(6, -3, 40001), np.logspace(-3, 3, 2001)])
    with np.errstate(all="raise", under="ignore"):
        given = log_expected_improvement(z, 1.0, 0.0)
    assert np.isfinite(given).all() and (np.diff(given) > 0).all()


@pytest.mark.parametrize("branch", [-1.0, -1e4])
def test_log_expected_improvement_has_no_jump_where_formulas_change(branch):
    step = abs(branch) * 1e-9
    below, above = (float(log_expected_improvement(branch + d, 1.0, 0.0)) for d in (-step, step))
    # The slope is Phi / h: 1.9 at -1, |z| far below. What is left is rounding: 1e-16 * z^2 / 2 of the value, and 1e-16
    # * z^2 of 1 / z^2.
    slope = norm.cdf(-1) / (norm.pdf(-1) - norm.cdf(-1)) if branch == -1 else abs(branch)
    assert above - below == pytest.approx(2 * step * slope, abs=1e-14 if branch == -1 else 5e-8)


# Surrogate

def smooth(x: np.ndarray) -> np.ndarray:
    return np.sin(3 * x[:, 0]) + 0.5 * x[:, 1]


def points(count: int, dimensions: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (count, dimensions))


@pytest.mark.parametrize("noise", [None, 1e-5])
@pytest.mark.parametrize("shift, scale", [(1000.0, 1.0), (0.0, 1e3), (-70.0, 1e-3)])
def test_the_surrogate_does_not_depend_on_the_unit_of_the_values(noise, shift, scale):
    x, asked = points(17), points(40, seed=1)
    mean, deviation = Surrogate(x, smooth(x), noise=noise).predict(asked)
    given, spread = Surrogate(x, smooth(x) * scale + shift, noise=noise).predict(asked)
    # The optimiser of the kernel stops where its target's slope is 1e-5, at another place after another rounding.
    assert np.allclose((given - shift) / scale, mean,
                       atol=2e-3) and np.allclose(spread / scale, deviation, rtol=0.05, atol=1e-3)


def test_the_surrogate_goes_through_what_was_measured_and_is_unsure_elsewhere():
    x = points(17)
    surrogate = Surrogate(x, smooth(x), noise=1e-8)
    mean, deviation = surrogate.predict(x)
    # noise 1e-8: 1e-4 of the spread
    assert np.allclose(mean, smooth(x), atol=1e-3) and (deviation < 2e-4 * smooth(x).std()).all()
    away = surrogate.predict(np.array([[2.5, -1.5, 2.5]]))[1]
    assert (away > 100 * deviation.max()).all()
    asked = points(40, seed=1)
    mean, deviation = surrogate.predict(asked)
    assert (np.abs(mean - smooth(asked)) < 4 * deviation + 1e-2).all()


@pytest.mark.parametrize("unit", [1.0, 250.0])
def test_the_deviation_leaves_out_the_noise_of_the_measurement(unit):
    rng = np.random.default_rng(0)
    x = np.repeat([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], 40, axis=0)
    values = unit * (x[:, 0] + rng.normal(0, 1, 160))
    deviation = Surrogate(x, values).predict(x[::40])[1]
    # The mean of 40 is known to 1 / sqrt(40) = 0.16; one measurement would be to 1.
    assert (deviation < 0.3 * unit).all() and (deviation > 0.03 * unit).all()


def test_noise_that_is_given_is_not_fitted():
    rng = np.random.default_rng(0)
    x = points(30, 2)
    values = smooth(x) + rng.normal(0, 0.5, 30)
    fitted, believed = (np.abs(Surrogate(x, values, noise=noise).predict(x)[0] - values).max()
                        for noise in (None, 1e-6))
    assert believed < 1e-2 < 0.2 < fitted


def test_the_dimension_that_matters_has_the_shortest_length_scale():
    for matters in range(3):
        x = points(25)
        for noise in (None, 1e-5):
            kernel = Surrogate(x, np.sin(4 * x[:, matters]), noise=noise).process.kernel_
            scales = (kernel.k1 if noise is None else kernel).k2.length_scale
            assert scales.shape == (3,) and scales.argmin() == matters
            assert (np.delete(scales, matters) > 3 * scales[matters]).all()


def test_equal_values_and_few_points_give_a_flat_finite_surrogate():
    for values in (np.full(6, 71.25), np.zeros(6)):
        mean, deviation = Surrogate(points(6), values).predict(points(9, seed=1))
        assert np.allclose(mean, values[0]) and np.isfinite(deviation).all() and (deviation > 0).all()
    mean, deviation = Surrogate(points(2), np.array([1.0, 2.0])).predict(points(9, seed=1))
    assert np.isfinite(mean).all() and (deviation > 0).all()


# Proposals

def test_gp_comes_closer_to_a_known_optimum_than_random_after_as_many_evaluations():
    problem = toy_problem()
    assert problem.budget.meets(TARGET).all() and value(TARGET)[0] == 0
    regrets = {strategy: np.array([-value(measured(problem, QUICK, QUICK.evaluations, seed, strategy)[0]).max()
                                   for seed in range(20)])
               for strategy in ("gp", "random")}
    # Both start with the same 8 policies, so equal skill would win half of the 20 seeds: 16 or more has a chance of 0.6
    # %.
    # Found when written: 19 wins, medians 0.004 and 0.045; a third leaves room for another version of the optimiser.
    assert (regrets["gp"] < regrets["random"]).sum() >= 16
    assert np.median(regrets["gp"]) < np.median(regrets["random"]) / 3


@pytest.mark.parametrize("strategy, batch", [("gp", 1), ("gp", 3), ("random", 1), ("random", 3)])
def test_every_proposal_meets_the_budget_and_none_is_measured_twice(strategy, batch):
    problem = macs_problem()
    policies, proposals = measured(problem, QUICK, 17, 1, strategy, batch)
    assert problem.budget.meets(SPACE.check(policies)).all() and len(set(SPACE.keys(policies))) == 17
    assert [p.by for p in proposals] == (["population"] * 8 + ["gp"] * 9 if strategy == "gp" else ["random"] * 17)
    assert [bool(p.expected) for p in proposals] == [p.by == "gp" for p in proposals]


def test_a_proposal_is_expected_to_improve_more_than_others_do():
    problem = toy_problem()
    policies, proposals = measured(problem, QUICK, 8, 2)
    found, = propose("gp", problem, policies, value(policies), QUICK, 1, 2)
    surrogate = Surrogate(SPACE.features(policies), value(policies))

    def log_ei(asked: np.ndarray) -> np.ndarray:
        return log_expected_improvement(*surrogate.predict(SPACE.features(asked)),
                                        surrogate.predict(SPACE.features(policies))[0].max())
    others = random_policies(problem, 400, np.random.default_rng(9))
    assert (log_ei(others) < log_ei(found.policy)).mean() > 0.98
    mean, deviation = surrogate.predict(SPACE.features(found.policy))
    assert found.expected == pytest.approx({"log_ei": log_ei(found.policy)[0], "mean": mean[0],
                                            "deviation": deviation[0]}, rel=1e-9)


def test_a_lucky_measurement_is_not_what_improvement_is_measured_by_unless_there_is_no_noise():
    problem = toy_problem()
    policies, _ = measured(problem, QUICK, 30, 2)
    rng = np.random.default_rng(0)
    noisy = value(policies) + rng.normal(0, 0.05, 30)
    lucky = int(value(policies).argsort()[15])                          # no good policy, measured far above all others
    noisy[lucky] = noisy.max() + 0.15
    found, = propose("gp", problem, policies, noisy, QUICK, 1, 2)
    surrogate = Surrogate(SPACE.features(policies), noisy)
    mean, deviation = surrogate.predict(SPACE.features(found.policy))
    level = surrogate.predict(SPACE.features(policies))[0].max()
    assert level < noisy.max() - 0.1
    assert found.expected["log_ei"] == pytest.approx(log_expected_improvement(mean[0], deviation[0], level), rel=1e-9)
    exact = dataclasses.replace(QUICK, noise=1e-5)
    found, = propose("gp", problem, policies, noisy, exact, 1, 2)
    mean, deviation = Surrogate(SPACE.features(policies), noisy, noise=1e-5).predict(SPACE.features(found.policy))
    assert found.expected["log_ei"] == pytest.approx(log_expected_improvement(mean[0], deviation[0], noisy.max()),
                                                     rel=1e-9)


def test_refinements_raise_the_expected_improvement():
    problem = toy_problem()
    gains = []
    for seed in range(5):
        policies, _ = measured(problem, QUICK, 8, seed)
        plain, refined = (propose("gp", problem, policies, value(policies), dataclasses.replace(QUICK, refinements=r),
                                  1, seed)[0]
                          for r in (0, 4))
        gains.append(refined.expected["log_ei"] - plain.expected["log_ei"])
    assert min(gains) >= 0 and max(gains) > 0               # the best so far stays among the candidates


def test_candidates_are_drawn_around_the_best_five(monkeypatch):
    problem, around = toy_problem(), []
    policies, _ = measured(problem, QUICK, 12, 10)

    def seen(problem: Problem, given: np.ndarray, *rest) -> np.ndarray:
        around.append(given)
        return neighbours(problem, given, *rest)
    monkeypatch.setattr("vitlab.search.strategies.neighbours", seen)
    propose("gp", problem, policies, value(policies), QUICK, 1, 10)
    best = sorted(range(12), key=lambda i: -value(policies)[i])[:5]
    assert (around[0] == policies[best]).all()


def test_a_batch_is_distinct_and_each_proposal_believes_the_mean_of_those_before():
    problem = macs_problem()
    policies, _ = measured(problem, QUICK, 9, 3)
    batch = propose("gp", problem, policies, value(policies), QUICK, 3, 3)
    single = propose("gp", problem, policies, value(policies), QUICK, 1, 3)
    pair = propose("gp", problem, policies, value(policies), QUICK, 2, 3)
    assert (proposed(batch)[:1] == proposed(single)).all() and (proposed(batch)[:2] == proposed(pair)).all()
    assert len(set(SPACE.keys(np.concatenate([policies, proposed(batch)])))) == 12
    assert problem.budget.meets(proposed(batch)).all()
    believed = Surrogate(SPACE.features(np.concatenate([policies, proposed(single)])),
                         np.append(value(policies), single[0].expected["mean"]))
    mean, deviation = believed.predict(SPACE.features(batch[1].policy))
    assert batch[1].expected["mean"] == pytest.approx(mean[0], rel=1e-9)
    assert batch[1].expected["deviation"] == pytest.approx(deviation[0], rel=1e-9)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_proposals_depend_on_the_seed_and_on_nothing_else(strategy):
    problem = macs_problem()
    count = 9 if strategy != "uniform" else 5
    one, two = (measured(problem, QUICK, count, 4, strategy)[0] for _ in range(2))
    np.random.default_rng().normal()
    assert (one == two).all()
    assert not (one == measured(problem, QUICK, count, 5, strategy)[0]).all()


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_the_population_is_the_same_however_long_the_search_and_whatever_was_measured(strategy):
    problem = macs_problem()
    whole = proposed(propose(strategy, problem, np.empty((0, 5)), np.empty(0), QUICK, 5, 6))
    for evaluations in (1, 8, 500):
        options = dataclasses.replace(QUICK, evaluations=evaluations)
        assert (proposed(propose(strategy, problem, np.empty((0, 5)), np.empty(0), options, 5, 6)) == whole).all()
    for done in range(1, 5):
        for values in (np.zeros(done), np.arange(done) * 100.0):
            assert (proposed(propose(strategy, problem, whole[:done], values, QUICK, 5 - done,
                                     6)) == whole[done:]).all()


def test_gp_and_random_start_alike_and_a_varied_population_does_not():
    problem, nothing = macs_problem(), (np.empty((0, 5)), np.empty(0))
    gp, random = (proposed(propose(strategy, problem, *nothing, QUICK, 8, 11)) for strategy in ("gp", "random"))
    varied = proposed(propose("gp", problem, *nothing, dataclasses.replace(QUICK, initial="varied"), 8, 11))
    assert (gp == random).all() and not set(SPACE.keys(varied)) & set(SPACE.keys(gp))


def test_uniform_proposals_cut_every_block_alike():
    policies = proposed(propose("uniform", macs_problem(), np.empty((0, 5)), np.empty(0), QUICK, 7, 8))
    assert len(policies) == 7
    for policy in policies:
        # the last unit may be one block's alone: 3 / 2^40 apart
        assert np.ptp(policy[:2]) < 1e-6 and np.ptp(policy[2:4]) < 1e-6


def test_noise_and_settings_reach_the_surrogate():
    problem = toy_problem()
    policies, _ = measured(problem, QUICK, 12, 9)
    noisy = value(policies) + np.random.default_rng(0).normal(0, 0.05, 12)
    exact = propose("gp", problem, policies, noisy, dataclasses.replace(QUICK, noise=1e-6), 1, 9)[0]
    wanted = Surrogate(SPACE.features(policies), noisy, noise=1e-6).predict(SPACE.features(exact.policy))
    assert exact.expected["mean"] == pytest.approx(wanted[0][0], rel=1e-9)


def test_published_settings_are_those_of_the_paper():
    published = settings("published")
    assert (published.population, published.evaluations, published.noise) == (100, 200, 1e-5)
    assert (published.initial, published.batch) == ("random", 1)
    assert published is SETTINGS["published"] and settings("default") == Settings()


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(InputError, match="search settings 'fast' .*default.*published"):
        settings("fast")
    with pytest.raises(InputError, match="strategy 'genetic' .*gp.*random.*uniform"):
        propose("genetic", toy_problem(), np.empty((0, 5)), np.empty(0), QUICK, 1, 0)
    with pytest.raises(InputError, match="initial 'sobol' .*random.*varied"):
        Settings(initial="sobol")


@pytest.mark.parametrize("name, wrong",
                         [("population", 1), ("evaluations", 0), ("candidates", 9), ("refinements", -1), ("batch", 0)])
def test_settings_that_can_not_be_are_refused(name, wrong):
    with pytest.raises(InputError, match=f"{name} is {wrong}; at least {wrong + 1} "):
        Settings(**{name: wrong})
    Settings(**{name: wrong + 1})


def test_what_each_group_loses_alone_is_weighted_as_the_measured_policies_say():
    problem = macs_problem()
    seen, unseen = np.split(random_policies(problem, 40, np.random.default_rng(0)), [20])

    def trend(policies):
        return -np.stack([policies[:, :2].sum(axis=1), policies[:, 2:4].sum(axis=1), policies[:, 4]], axis=1)**2

    def measured(policies, weights):
        return 5.0 + trend(policies) @ weights
    for weights in ((2.0, 0.5, 0.1), (0.3, 4.0, 1.0)):
        mean, _ = predictor(problem, seen, measured(seen, weights), Settings(), trend)(unseen)
        # An exact trend leaves rounding to the Gaussian process; one common weight would miss by some hundredths.
        assert mean == pytest.approx(measured(unseen, weights), abs=1e-6)
    # gains where alone it loses: the weight is 0, not negative
    against = measured(seen, (-1.0, 0.0, 0.0))
    plain = predictor(problem, seen, against, Settings(), None)(unseen)
    mean, deviation = predictor(problem, seen, against, Settings(), lambda p: trend(p)[:, :1])(unseen)
    assert mean == pytest.approx(plain[0], abs=1e-9) and deviation == pytest.approx(plain[1], abs=1e-9)
