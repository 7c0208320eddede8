"""HSIC against slow loops written from methods B1, and the scores of methods B2 against theirs."""
import math

import pytest
import torch

from vitlab.criteria.hsic import dependence, gaussian_kernels, shared_dependence
from vitlab.criteria.units import activation_magnitude, heads_by_hsic, neurons_by_hsic, taylor

IMAGES, FEATURES, UNITS, CLASSES = 7, 5, 11, 3
SAME = 1e-9         # float64: only the order of the sums differs


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle_gaussian(x: torch.Tensor) -> list[list[float]]:
    """K[b][c] of x (B, N), entry by entry."""
    def entry(b: int, c: int) -> float:
        squared = sum((float(x[b, n]) - float(x[c, n])) ** 2 for n in range(x.shape[1]))
        return sum(math.exp(-squared / (2 * sigma**2)) for sigma in (1, 2, 4, 8, 16)) / 5
    return [[entry(b, c) for c in range(len(x))] for b in range(len(x))]


def oracle_linear(y: torch.Tensor) -> list[list[float]]:
    return [[sum(float(a) * float(b) for a, b in zip(row, column)) for column in y] for row in y]


def oracle_hsic(k: list[list[float]], l: list[list[float]]) -> float:      # noqa: E741
    """trace(H K H L) with H = I - 1/B, by the definition."""
    n = len(k)
    h = [[(b == c) - 1 / n for c in range(n)] for b in range(n)]

    def product(p: list[list[float]], q: list[list[float]]) -> list[list[float]]:
        return [[sum(p[i][m] * q[m][j] for m in range(n)) for j in range(n)] for i in range(n)]
    full = product(product(product(h, k), h), l)
    return sum(full[i][i] for i in range(n))


def test_gaussian_kernel_is_the_mean_over_the_five_widths():
    x = 3 * random(UNITS, IMAGES, FEATURES)
    expected = torch.tensor([oracle_gaussian(unit) for unit in x], dtype=torch.float64)
    assert float((gaussian_kernels(x) - expected).abs().max()) < SAME


def test_relevance_is_hsic_with_a_linear_kernel_on_the_output():
    x, y = random(UNITS, IMAGES, FEATURES), random(IMAGES, CLASSES, seed=1).softmax(dim=1)
    expected = torch.tensor([oracle_hsic(oracle_gaussian(unit), oracle_linear(y)) for unit in x], dtype=torch.float64)
    assert float((dependence(gaussian_kernels(x), y) - expected).abs().max()) < SAME


def test_redundancy_is_hsic_with_gaussian_kernels_on_both_sides():
    x, z = random(4, IMAGES, FEATURES), random(3, IMAGES, FEATURES + 1, seed=2)
    expected = torch.tensor([[oracle_hsic(oracle_gaussian(a), oracle_gaussian(b)) for b in z] for a in x],
                            dtype=torch.float64)
    both = shared_dependence(torch.cat([gaussian_kernels(x), gaussian_kernels(z)]))
    assert float((both[:4, 4:] - expected).abs().max()) < SAME


def test_a_unit_that_never_changes_depends_on_nothing():
    x, y = torch.ones(1, IMAGES, FEATURES), random(IMAGES, CLASSES).softmax(dim=1).float()
    assert float(dependence(gaussian_kernels(x), y)) == pytest.approx(0, abs=1e-6)     # float32 rounding of a sum of 49


def test_dependence_does_not_change_with_the_order_of_the_images():
    x, y = random(UNITS, IMAGES, FEATURES), random(IMAGES, CLASSES, seed=1).softmax(dim=1)
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    moved = dependence(gaussian_kernels(x[:, order]), y[order])
    assert float((dependence(gaussian_kernels(x), y) - moved).abs().max()) < SAME


def min_max(values: list[float]) -> list[float]:
    return [(v - min(values)) / (max(values) - min(values)) for v in values]


def test_neuron_score_weighs_scaled_relevance_and_magnitude():
    hidden, y = random(IMAGES, FEATURES, UNITS), random(IMAGES, CLASSES, seed=1).softmax(dim=1)
    relevance = [oracle_hsic(oracle_gaussian(hidden[:, :, m]), oracle_linear(y)) for m in range(UNITS)]
    magnitude = [sum(abs(float(v)) for v in hidden[:, :, m].flatten()) for m in range(UNITS)]
    for r, a in ((0.1, 0.9), (0.7, 0.2)):
        expected = [r * x + a * z for x, z in zip(min_max(relevance), min_max(magnitude))]
        given = neurons_by_hsic(hidden[..., None], relevance_weight=r, magnitude_weight=a)(y)
        assert given.tolist() == pytest.approx(expected, abs=SAME)


def test_head_score_is_relevance_less_the_mean_redundancy_with_the_other_heads():
    heads, width = 3, 2
    outputs, y = random(IMAGES, FEATURES, heads, width), random(IMAGES, CLASSES, seed=1).softmax(dim=1)
    features = [(outputs[:, :, h, 0] + outputs[:, :, h, 1]) / 2 for h in range(heads)]
    kernels = [oracle_gaussian(f) for f in features]
    expected = [oracle_hsic(kernels[h], oracle_linear(y))
                - 0.1 * sum(oracle_hsic(kernels[h], kernels[o]) for o in range(heads) if o != h) / 2
                for h in range(heads)]
    assert heads_by_hsic(outputs)(y).tolist() == pytest.approx(expected, abs=SAME)


def test_a_single_head_has_no_redundancy():
    outputs, y = random(IMAGES, FEATURES, 1, 2), random(IMAGES, CLASSES, seed=1).softmax(dim=1)
    kernels = gaussian_kernels(outputs.mean(dim=3).permute(2, 0, 1))
    assert float(heads_by_hsic(outputs)(y)) == pytest.approx(float(dependence(kernels, y)), abs=SAME)


def test_neurons_that_are_all_alike_score_alike():
    hidden = random(IMAGES, FEATURES, 1).expand(-1, -1, UNITS)[..., None]
    assert torch.equal(neurons_by_hsic(hidden)(random(IMAGES, CLASSES).softmax(dim=1)),
                       torch.zeros(UNITS, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_activations_are_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    # 505 of size 30, and squares of 900: beyond 65,504
    hidden = (30 * torch.randn(5, 101, 7, 1, generator=generator)).to(dtype)
    outputs = (3 * torch.randn(5, 101, 3, 2, generator=generator)).to(dtype)
    probabilities = torch.randn(5, 11, generator=generator).softmax(dim=1)
    for got, wanted in ((neurons_by_hsic(hidden)(probabilities), neurons_by_hsic(hidden.float())(probabilities)),
                        (heads_by_hsic(outputs)(probabilities), heads_by_hsic(outputs.float())(probabilities)),
                        (activation_magnitude(outputs), activation_magnitude(outputs.float())),
                        (taylor(outputs, outputs), taylor(outputs.float(), outputs.float()))):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)
