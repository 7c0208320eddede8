"""Merging by content (arXiv 2210.09461, section 3) as pure functions, against slow loops over one image's tokens."""
import math
import random

import pytest
import torch

from vitlab.plan import matching

EXACT = 1e-12           # float64: only the order of the sums differs
# tokens, and how many of them go
COUNTS = [(2, 0), (2, 1), (3, 1), (7, 0), (7, 3), (12, 5), (12, 6), (13, 1), (13, 6)]
ROUNDS = [(11, (5, 3, 0, 1)), (12, (6, 3, 1, 1)), (17, (2, 0, 7, 4, 1, 1, 1)), (30, (1, 1, 13, 5))]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- The oracle: one image, one pair of tokens at a time.

def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot, aa, bb = (sum(float(p) * float(q) for p, q in zip(u, v)) for u, v in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


def match_slowly(keys: torch.Tensor, importance: list[float], sizes: list[float] | None = None
                 ) -> list[tuple[int, int]]:
    """(source, target) as tokens, those that go first in front; of equals the first."""
    n, pairs = len(keys), []
    for source in range(0, n, 2):
        alike = {target: cosine(keys[source], keys[target]) for target in range(1, n, 2)}
        if sizes:
            s = sizes[source]
            alike = {t: (a - 1) * math.sqrt(2 * s * sizes[t] / (s + sizes[t])) for t, a in alike.items()}
        target = max(alike, key=lambda t: (alike[t], -t))
        pairs.append((alike[target] - importance[source], source, target))
    return [(source, target) for _, source, target in sorted(pairs, key=lambda pair: (-pair[0], pair[1]))]


def as_pairs(order: torch.Tensor, into: torch.Tensor) -> list[tuple[int, int]]:
    """What `match` gives for one image, as tokens; only of those that go is the target told."""
    return [(2 * source, 2 * target + 1) for source, target in zip(order.tolist(), into.tolist())]


def merged_sets(sets: list[frozenset], order: torch.Tensor, into: torch.Tensor) -> list[frozenset]:
    """The patches of each token after a round, from those before it: sources that stay, in their order, then the
    targets."""
    found, pairs = list(sets), as_pairs(order, into)
    for source, target in pairs:
        found[target] = found[target] | found[source]
    gone = [source for source, _ in pairs]
    return [found[2 * s] for s in order.tolist() if 2 * s not in gone] + [found[t] for t in range(1, len(sets), 2)]


# ---- match

@pytest.mark.parametrize("n, gone", COUNTS)
@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_sources_go_by_their_cosine_less_importance_each_into_the_target_most_alike(n, gone, protected, sized):
    keys, importance = drawn(3, n, 5, seed=n), drawn(3, n, seed=1).abs() if protected else None
    sizes = (1 + 20 * drawn(3, n, seed=2).abs()).round() if sized else None
    order, into = matching.match(keys, gone, importance, sizes)
    assert order.shape == (3, n - n // 2) and into.shape == (3, gone)
    for b in range(3):
        wanted = match_slowly(keys[b], importance[b].tolist() if protected else [0.0] * n,
                              sizes[b].tolist() if sized else None)
        going = [source for source, _ in wanted[:gone]]
        # who stays, in order of place
        assert [2 * s for s in order[b].tolist()] == going + sorted(set(range(0, n, 2)) - set(going))
        assert as_pairs(order[b], into[b]) == wanted[:gone]


def test_keys_are_compared_whatever_their_length():
    keys = drawn(3, 13, 5)
    scaled = keys * drawn(3, 13, 1, seed=1).exp()
    for given, same in zip(matching.match(keys, 4), matching.match(scaled, 4)):
        assert torch.equal(given, same)


def test_a_source_that_matters_stays_and_what_targets_matter_has_no_say():
    keys = drawn(1, 12, 5)
    first = 2 * int(matching.match(keys, 1)[0][0, 0])
    importance = torch.zeros(1, 12, dtype=torch.float64)
    importance[0, first] = 2.1                                                  # cosines are 2 apart at most
    importance[0, 1::2] = drawn(6, seed=1)
    order, into = matching.match(keys, 5, importance)
    assert first in (2 * order[0, 5:]).tolist() and first not in [source for source, _ in as_pairs(order[0], into[0])]
    importance[0, first] = 0
    assert torch.equal(matching.match(keys, 5, importance)[0], matching.match(keys, 5)[0])


def test_of_tokens_that_are_alike_to_the_bit_the_first_goes_first_into_the_first():
    # sources 0 0 1 2 0 1, targets 0 1 0 1 0 2
    keys = torch.eye(3, dtype=torch.float64)[[0, 0, 0, 1, 1, 0, 2, 1, 0, 0, 1, 2]][None]
    order, into = matching.match(keys, 6)
    assert as_pairs(order[0], into[0]) == [(0, 1), (2, 1), (4, 3), (6, 11), (8, 1), (10, 3)]
    order, into = matching.match(torch.ones(2, 7, 5), 3)
    assert as_pairs(order[1], into[1]) == [(0, 1), (2, 1), (4, 1)]


def test_tokens_without_any_direction_are_matched_too():
    order, into = matching.match(torch.zeros(2, 7, 5), 3)
    assert sorted(order[0].tolist()) == [0, 1, 2, 3] and bool((into >= 0).all() and (into < 3).all())


# ---- merge

@pytest.mark.parametrize("by_product", [False, True])
@pytest.mark.parametrize("n, gone", COUNTS)
def test_merging_is_the_mean_weighted_by_sizes(n, gone, by_product):
    x, sizes = drawn(3, n, 5, seed=n), drawn(3, n, seed=2).abs().mul(7).ceil()
    order, into = matching.match(drawn(3, n, 3, seed=4), gone)
    merged, new_sizes = matching.merge(x, sizes, order, into, by_product)
    assert merged.shape == (3, n - gone, 5) and new_sizes.shape == (3, n - gone)
    for b in range(3):
        for token, inside in enumerate(merged_sets([frozenset([j]) for j in range(n)], order[b], into[b])):
            total = sum(float(sizes[b, j]) for j in inside)
            mean = sum(float(sizes[b, j]) * x[b, j] for j in inside) / total
            assert float(new_sizes[b, token]) == total
            assert float((merged[b, token] - mean).abs().max()) < EXACT


def test_merging_of_identical_tokens_changes_none_of_them():
    # few bits: sums are exact
    token = torch.randint(-100, 100, (5,), generator=torch.Generator().manual_seed(0)) / 8
    x, sizes = token.expand(2, 13, 5), torch.arange(1.0, 14).expand(2, 13)
    for gone in (0, 1, 6):
        merged, new_sizes = matching.merge(x, sizes, *matching.match(x, gone))
        assert torch.equal(merged, token.expand(2, 13 - gone, 5)) and new_sizes.sum(dim=1).tolist() == [91, 91]


def test_merging_has_the_gradient_of_the_mean():
    x = drawn(2, 7, 3).requires_grad_()
    order, into = matching.match(drawn(2, 7, 5, seed=1), 3)
    sizes = drawn(2, 7, seed=2).abs().mul(5).ceil()
    assert torch.autograd.gradcheck(lambda t: matching.merge(t, sizes, order, into)[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tokens_keep_their_dtype_and_sizes_stay_exact(dtype):
    x, sizes = drawn(2, 700, 3).to(dtype), torch.full((2, 700), 331.0)          # 662 and more need 10 bits and more
    order, into = matching.match(x, 350)
    merged, new_sizes = matching.merge(x, sizes, order, into)
    assert merged.dtype == dtype and new_sizes.dtype == torch.float32
    assert bool((new_sizes % 331 == 0).all()) and new_sizes.sum(dim=1).tolist() == [700 * 331] * 2


# ---- Several rounds

def rounds(x: torch.Tensor, merged: tuple[int, ...], seed: int):
    """(x, sizes, places, sets) after each round, matched by noise; sets (B lists) by the oracle."""
    batch, n = x.shape[:2]
    sizes, places = x.new_ones(batch, n), torch.arange(n).expand(batch, -1)
    sets = [[frozenset([j]) for j in range(n)] for _ in range(batch)]
    for index, gone in enumerate(merged):
        count = x.shape[1]
        order, into = matching.match(drawn(batch, count, 5, seed=100 * seed + index), gone)
        x, sizes = matching.merge(x, sizes, order, into)
        places = matching.new_places(order, into, count).gather(1, places)
        sets = [merged_sets(inside, *each) for inside, *each in zip(sets, order, into)]
        yield x, sizes, places, sets


@pytest.mark.parametrize("n, merged", ROUNDS)
def test_after_any_rounds_places_and_sizes_are_those_of_tracked_sets_and_tokens_their_plain_means(n, merged):
    patches = drawn(3, n, 5, seed=n)
    for x, sizes, places, sets in rounds(patches, merged, seed=n):
        assert sizes.sum(dim=1).tolist() == [n] * 3
        for b in range(3):
            assert [len(inside) for inside in sets[b]] == sizes[b].tolist() and len(sets[b]) == x.shape[1]
            assert [[j in inside for inside in sets[b]].index(True) for j in range(n)] == places[b].tolist()
            for token, inside in enumerate(sets[b]):
                assert float((x[b, token] - sum(patches[b, j] for j in inside) / len(inside)).abs().max()) < EXACT


@pytest.mark.parametrize("n", [7, 12])
def test_where_nothing_goes_every_token_is_still_there(n):
    x = drawn(2, n, 5)
    order, into = matching.match(x, 0)
    merged, sizes = matching.merge(x, x.new_ones(2, n), order, into)
    places = matching.new_places(order, into, n)
    assert torch.equal(matching.give_back(merged, places, 0), x) and bool((sizes == 1).all())
    assert places.sort(dim=1).values.tolist() == [list(range(n))] * 2


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_every_patch_of_well_separated_clusters_gets_back_its_clusters_mean(prefix):
    # One target, at an odd place, for each of 7 clusters; sources of any cluster at the even ones: all of them can go.
    chance, clusters = random.Random(0), 7
    for n in (14, 15):
        labels = [[chance.randrange(clusters) for _ in range(n)] for _ in range(3)]
        for row in labels:
            row[1::2] = chance.sample(range(clusters), clusters)
        labels = torch.tensor(labels)
        x = 10 * torch.eye(clusters, dtype=torch.float64)[labels] + 0.1 * drawn(3, n, clusters)
        gone = n // 2
        order, into = matching.match(x, gone)
        merged, _ = matching.merge(x, x.new_ones(3, n), order, into)
        first = drawn(3, prefix, clusters, seed=1)
        back = matching.give_back(torch.cat([first, merged], dim=1), matching.new_places(order, into, n), prefix)
        assert torch.equal(back[:, :prefix], first)
        for b in range(3):
            left = {2 * s for s in order[b, gone:].tolist()}                    # with an odd count one source can't go
            for j in range(n):
                inside = [j] if j in left else [i for i in range(n) if labels[b, i] == labels[b, j] and i not in left]
                mean = sum(x[b, i] for i in inside) / len(inside)
                assert float((back[b, prefix + j] - mean).abs().max()) < EXACT * 10      # of values near 10


def test_giving_back_takes_each_image_by_its_own_places():
    x = drawn(3, 2 + 5, 3)
    places = torch.randint(0, 5, (3, 11), generator=torch.Generator().manual_seed(0))
    back = matching.give_back(x, places, 2)
    for b in range(3):
        assert torch.equal(back[b], torch.stack([*x[b, :2], *(x[b, 2 + p] for p in places[b].tolist())]))
