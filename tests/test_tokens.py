"""vitlab.plan.tokens against slow loops written from methods A2 to A5 and A7, and the properties they must have."""
import math
import random

import pytest
import torch

from vitlab.plan import tokens
from vitlab.runtime.files import InputError

GRIDS = [(3, 5), (5, 3), (7, 7), (1, 11), (11, 1), (2, 13), (4, 4)]     # rows, columns
FORMS = [(rule, boundary, weights) for rule in ("center", "merge") for boundary in ("reference", "grid")
         for weights in ("reference", "score", "uniform") if rule == "center" or boundary == "reference"]
form = pytest.mark.parametrize("rule, boundary, weights", FORMS)
# Both sides compute in float64; a row's sums and quotients of at most a few hundred terms round by far less.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


# ---- Oracles: plain lists, no tensor operation, from the text of the methods alone.

def normalise_slowly(scores: list[list[float]], decay: float) -> list[list[float]]:
    """A2: s_l <- s_l / ||s_l||_2, then s_l <- s_l * (1 - decay * l)."""
    result = []
    for block, row in enumerate(scores):
        length = math.sqrt(math.fsum(s * s for s in row))
        result.append([s / length * (1 - decay * block) for s in row])
    return result


def choose_slowly(scores: list[list[float]], rule: str, keep_rate: float, prune_rate: float) -> tuple[list, list]:
    """A3, and a block with unpruned patches but no center gets its best one."""
    depth, n = len(scores), len(scores[0])
    n_prune, n_keep = int(n * prune_rate), int(n * keep_rate)
    unpruned, centers = [], []
    for row in scores:
        if rule == "center":
            ordered = sorted(s for each in scores for s in each)
            prune_threshold, keep_threshold = ordered[n_prune * depth], ordered[len(ordered) - n_keep * depth]
        else:
            ordered = sorted(row)
            prune_threshold, keep_threshold = ordered[n_prune], ordered[n - n_keep]
        mask = [1 if s >= prune_threshold else 0 for s in row]
        # s * token_mask >= keep threshold; a pruned patch is never a center
        chosen = [m == 1 and s * m >= keep_threshold for s, m in zip(row, mask)]
        if any(mask) and not any(chosen):
            chosen[row.index(max(row))] = True
        unpruned.append([m == 1 for m in mask])
        centers.append(chosen)
    return unpruned, centers


def center_matrix_slowly(s: list[float], mask: list[bool], centers: list[int], g: int) -> list[list[float]]:
    """A4, rule center, boundary and weights as published. One class token."""
    n = len(s)
    t = [s[j] if mask[j] else 0.0 for j in range(n)]
    rows = [[1.0] + [0.0] * n]
    begin = 0                                       # first patch that no row covers yet
    for i, c in enumerate(centers):
        if i == len(centers) - 1:
            end = n                                 # the last row takes all that is left
        else:
            r = math.ceil((c + centers[i + 1]) / 2) + 1
            if (c + 1) // g < (r - 1) // g:
                r = ((c + 1) // g + 1) * g + 1
            end = r - 1
        row = [0.0] * (n + 1)
        for j in range(begin, end):
            row[1 + j] = t[j] / s[c]
        rows.append(row)
        begin = end
    return rows


def merge_matrix_slowly(s: list[float], mask: list[bool], centers: list[int]) -> list[list[float]]:
    """A4, rule merge. A run in which every patch is pruned is a row of zeros, as published."""
    n = len(s)
    rows = [[1.0] + [0.0] * n]
    run: list[int] = []

    def close_run() -> None:
        if run:
            positive = [s[j] for j in run if mask[j] and s[j] > 0]
            row = [0.0] * (n + 1)
            for j in run:
                if mask[j]:
                    row[1 + j] = s[j] / (sum(positive) / len(positive))
            rows.append(row)
            run.clear()
    for j in range(n):
        if j in centers:
            close_run()
            row = [0.0] * (n + 1)
            row[1 + j] = 1.0
            rows.append(row)
        else:
            run.append(j)
    close_run()
    return rows


# ---- Random cases.

def random_case(seed: int, depth: int = 5):
    """grid, scores (L, n) float64 with no two equal, keep_rate, prune_rate."""
    chance = random.Random(seed)
    grid = GRIDS[seed % len(GRIDS)]
    n = grid[0] * grid[1]
    rows = [[chance.uniform(0.05, 1) * chance.choice([1, 1, 0.3]) for _ in range(n)] for _ in range(depth)]
    keep_rate = chance.uniform(1 / n + 1e-9, 1)
    return grid, torch.tensor(rows, dtype=torch.float64), keep_rate, chance.uniform(0, 0.9)


def random_layers(seed: int, rule: str, keep_rate: float | None = None, prune_rate: float | None = None):
    """(columns, [(scores, unpruned, centers)] per block) after A2 and A3."""
    grid, scores, keep, prune = random_case(seed)
    scores = tokens.normalise_scores(scores, tokens.DECAY[rule])
    unpruned, centers = tokens.choose(scores, rule=rule, keep_rate=keep_rate or keep,
                                      prune_rate=prune if prune_rate is None else prune_rate)
    return grid[1], list(zip(scores, unpruned, centers))


def random_rules(rule: str, boundary: str, weights: str, seeds: int = 9):
    """(scores, unpruned, centers, token rule) of many blocks; blocks where the rule is the identity are left out."""
    for seed in range(seeds):
        columns, layers = random_layers(seed, rule)
        for s, u, c in layers:
            result = tokens.merge_rule(s, u, c, columns=columns, rule=rule, boundary=boundary, weights=weights)
            if result is not None:
                yield s, u, c, result


# ---- A2

@pytest.mark.parametrize("rule", ["center", "merge"])
def test_normalised_scores_follow_the_formula(rule):
    decay = {"center": 0.025, "merge": 0.015}[rule]     # methods A2
    assert tokens.DECAY[rule] == decay
    for seed in range(20):
        _, scores, _, _ = random_case(seed, depth=2 + seed % 11)
        expected = torch.tensor(normalise_slowly(scores.tolist(), decay), dtype=torch.float64)
        torch.testing.assert_close(tokens.normalise_scores(scores, decay), expected, **EXACT)


def test_normalised_scores_do_not_depend_on_the_scale_of_a_block():
    _, scores, _, _ = random_case(3)
    scale = torch.tensor([1e-6, 3.0, 1.0, 1e5, 0.1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(tokens.normalise_scores(scores * scale, 0.025), tokens.normalise_scores(scores, 0.025),
                               **EXACT)


def test_normalise_does_not_change_its_input():
    _, scores, _, _ = random_case(4)
    before = scores.clone()
    tokens.normalise_scores(scores, 0.025)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1, "zero"])
@pytest.mark.parametrize("block", [0, 3])
def test_scores_that_can_not_be_ranked_are_refused_by_block(bad, block):
    _, scores, _, _ = random_case(5)
    if bad == "zero":
        scores[block] = 0
    else:
        scores[block, 2] = bad
    with pytest.raises(InputError, match=f"block {block}\\b"):
        tokens.normalise_scores(scores, 0.025)


@pytest.mark.parametrize("decay", [-0.01, 0.25, 1.0, math.nan])
def test_a_decay_that_makes_a_weight_negative_or_zero_is_refused(decay):
    with pytest.raises(InputError, match="decay"):
        tokens.normalise_scores(torch.ones(5, 3), decay)    # 1 - 0.25 * 4 = 0: the last block would count for nothing


# ---- A3

@pytest.mark.parametrize("rule", ["center", "merge"])
def test_choice_of_centers_follows_the_formula(rule):
    for seed in range(60):
        _, scores, keep_rate, prune_rate = random_case(seed)
        unpruned, centers = tokens.choose(scores, rule=rule, keep_rate=keep_rate, prune_rate=prune_rate)
        expected = choose_slowly(scores.tolist(), rule, keep_rate, prune_rate)
        assert unpruned.tolist() == expected[0], f"seed {seed}"
        assert centers.tolist() == expected[1], f"seed {seed}"


@pytest.mark.parametrize("rule", ["center", "merge"])
def test_centers_are_unpruned_and_every_block_with_unpruned_patches_has_one(rule):
    for seed in range(60):
        _, scores, keep_rate, prune_rate = random_case(seed)
        scores[seed % 5] *= 1e-3        # a block that a global budget would leave with little or nothing
        unpruned, centers = tokens.choose(scores, rule=rule, keep_rate=keep_rate, prune_rate=prune_rate)
        assert not (centers & ~unpruned).any()
        assert torch.equal(centers.any(dim=1), unpruned.any(dim=1))


def test_rule_center_has_one_budget_and_rule_merge_one_per_block():
    _, scores, _, _ = random_case(2)
    depth, n = scores.shape
    scores = scores * torch.tensor([1.0, 0.9, 0.5, 1.3, 0.7], dtype=torch.float64)[:, None]
    for keep_rate, prune_rate in ((0.6, 0.1), (0.31, 0.5), (1.0, 0.0)):
        n_keep, n_prune = int(n * keep_rate), int(n * prune_rate)
        unpruned, centers = tokens.choose(scores, rule="center", keep_rate=keep_rate, prune_rate=prune_rate)
        assert centers.any(dim=1).all()     # no block was given a center beyond the budget in this case
        assert (int(centers.sum()), int((~unpruned).sum())) == (n_keep * depth, n_prune * depth)
        unpruned, centers = tokens.choose(scores, rule="merge", keep_rate=keep_rate, prune_rate=prune_rate)
        assert centers.sum(dim=1).tolist() == [n_keep] * depth
        assert (~unpruned).sum(dim=1).tolist() == [n_prune] * depth


def test_a_block_that_the_global_budget_prunes_whole_has_no_center():
    scores = torch.tensor([[0.01, 0.02, 0.03], [0.5, 0.6, 0.7], [0.8, 0.9, 1.0]])
    unpruned, centers = tokens.choose(scores, keep_rate=0.67, prune_rate=0.34)      # 3 of 9 pruned, 6 kept
    assert unpruned.tolist() == [[False] * 3, [True] * 3, [True] * 3] and torch.equal(centers, unpruned)


def test_a_block_without_a_center_gets_its_best_unpruned_patch():
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.7, 0.8, 0.9]])
    unpruned, centers = tokens.choose(scores, keep_rate=0.34, prune_rate=0.0)       # the 2 best of 6 are in block 1
    assert unpruned.all() and centers.tolist() == [[False, True, False], [False, True, True]]


def test_equal_scores_are_treated_alike():
    scores = torch.full((2, 7), 0.5)
    for rule in ("center", "merge"):
        unpruned, centers = tokens.choose(scores, rule=rule, keep_rate=0.5, prune_rate=0.5)
        assert unpruned.all() and centers.all()


@pytest.mark.parametrize("rule", ["center", "merge"])
@pytest.mark.parametrize("keep_rate", [0.0, -0.5, 1.0001, 0.05, math.nan, math.inf, -math.inf])
def test_keep_rate_out_of_range_is_refused(rule, keep_rate):
    with pytest.raises(InputError, match="keep_rate"):     # 0.05 of 15 patches is none
        tokens.choose(torch.rand(3, 15, generator=torch.Generator().manual_seed(0)), rule=rule, keep_rate=keep_rate)


@pytest.mark.parametrize("rule", ["center", "merge"])
@pytest.mark.parametrize("prune_rate", [-0.01, 1.0, 2.0, math.nan, math.inf])
def test_prune_rate_out_of_range_is_refused(rule, prune_rate):
    with pytest.raises(InputError, match="prune_rate"):
        tokens.choose(torch.rand(3, 15, generator=torch.Generator().manual_seed(0)), rule=rule, prune_rate=prune_rate)


def test_unknown_words_are_refused_and_the_known_ones_listed():
    s, u = torch.rand(6, generator=torch.Generator().manual_seed(0)), torch.ones(6, dtype=torch.bool)
    c = torch.tensor([True, False] * 3)
    with pytest.raises(InputError, match="centre.*center.*merge"):
        tokens.choose(s[None], rule="centre")
    with pytest.raises(InputError, match="line.*grid.*reference"):
        tokens.merge_rule(s, u, c, columns=3, boundary="line")
    with pytest.raises(InputError, match="sum.*reference.*score.*uniform"):
        tokens.merge_rule(s, u, c, columns=3, weights="sum")


# ---- A4

def test_merge_matrix_of_rule_center_follows_the_published_formula():
    blocks = 0
    for seed in range(42):
        columns, layers = random_layers(seed, "center")
        for s, u, c in layers:
            rule = tokens.merge_rule(s, u, c, columns=columns, boundary="reference", weights="reference")
            if rule is None:
                continue
            expected = center_matrix_slowly(s.tolist(), u.tolist(), c.nonzero().flatten().tolist(), columns)
            torch.testing.assert_close(tokens.merge_matrix(rule, 1, torch.float64),
                                       torch.tensor(expected, dtype=torch.float64), **EXACT)
            assert rule.trains == "both"
            blocks += 1
    assert blocks > 100


def test_merge_matrix_of_rule_merge_follows_the_published_formula():
    blocks = 0
    for seed in range(42):
        columns, layers = random_layers(seed, "merge")
        for s, u, c in layers:
            rule = tokens.merge_rule(s, u, c, columns=columns, rule="merge", weights="reference")
            if rule is None:
                continue
            expected = merge_matrix_slowly(s.tolist(), u.tolist(), c.nonzero().flatten().tolist())
            torch.testing.assert_close(tokens.merge_matrix(rule, 1, torch.float64),
                                       torch.tensor(expected, dtype=torch.float64), **EXACT)
            assert rule.trains == "reconstruct"
            blocks += 1
    assert blocks > 100


@form
def test_merge_matrix_rows_cover_every_unpruned_patch_once(rule, boundary, weights):
    for _, unpruned, _, result in random_rules(rule, boundary, weights):
        covered = (tokens.merge_matrix(result, 2, torch.float64) != 0).sum(dim=0)
        assert covered[:2].tolist() == [1, 1]
        assert torch.equal(covered[2:], unpruned.long())
        assert result.pruned == tuple((~unpruned).nonzero().flatten().tolist())


@form
def test_each_center_has_a_row_of_its_own(rule, boundary, weights):
    for _, _, centers, result in random_rules(rule, boundary, weights):
        owners = [result.regions[j] for j in centers.nonzero().flatten().tolist()]
        assert len(set(owners)) == len(owners) and min(owners, default=0) >= 0
        if rule == "center":
            assert owners == list(range(result.num_merged))     # in raster order, and no row beside them


@pytest.mark.parametrize("weights", ["score", "uniform"])
@pytest.mark.parametrize("rule, boundary", [("center", "grid"), ("center", "reference"), ("merge", "reference")])
def test_rows_of_weights_sum_to_one_and_no_row_is_empty(rule, boundary, weights):
    for _, _, _, result in random_rules(rule, boundary, weights):
        total = tokens.merge_matrix(result, 1, torch.float64).sum(dim=1)
        torch.testing.assert_close(total, torch.ones_like(total), **EXACT)


def test_score_weights_are_in_the_proportion_of_the_scores_and_uniform_weights_are_equal():
    for s, _, _, result in random_rules("center", "grid", "score"):
        for region in range(result.num_merged):
            members = [j for j, r in enumerate(result.regions) if r == region]
            for j in members:
                assert result.weights[j] == pytest.approx(float(s[j]) / sum(float(s[k]) for k in members), rel=1e-12)
    for _, _, _, result in random_rules("center", "grid", "uniform"):
        for j, region in enumerate(result.regions):
            expected = 1 / result.regions.count(region) if region >= 0 else 0
            assert result.weights[j] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule, boundary", [("center", "grid"), ("center", "reference"), ("merge", "reference")])
def test_constant_tokens_stay_constant_through_reconstruct_at_merge(rule, boundary):
    # Uniform weights alone: the pseudo-inverse (A5) gives a region back in the proportion of its weights.
    for _, unpruned, _, result in random_rules(rule, boundary, "uniform"):
        merge = tokens.merge_matrix(result, 1, torch.float64)
        back = tokens.reconstruct_matrix(merge) @ merge @ torch.full((len(unpruned) + 1, 1), 3.7, dtype=torch.float64)
        part = tokens.token_mask(result, 1)
        torch.testing.assert_close(back[part], torch.full_like(back[part], 3.7), **EXACT)
        assert not back[~part].any()


@pytest.mark.parametrize("weights", ["score", "uniform"])
def test_constant_tokens_merge_into_the_same_constant(weights):
    for _, unpruned, _, result in random_rules("center", "grid", weights):
        merged = tokens.merge_matrix(result, 1, torch.float64) @ torch.full((len(unpruned) + 1, 1), 3.7,
                                                                            dtype=torch.float64)
        torch.testing.assert_close(merged, torch.full_like(merged, 3.7), **EXACT)


def test_boundary_grid_gives_each_unpruned_patch_to_a_nearest_center():
    for seed in range(21):
        columns, layers = random_layers(seed, "center")
        for s, u, c in layers:
            result = tokens.merge_rule(s, u, c, columns=columns, boundary="grid")
            if result is None:
                continue
            centers = [j for j in range(len(s)) if c[j]]
            for j, region in enumerate(result.regions):
                if not u[j]:
                    assert region == -1
                    continue
                squares = [(j // columns - k // columns) ** 2 + (j % columns - k % columns) ** 2 for k in centers]
                assert region == squares.index(min(squares))        # the first in raster order of those nearest


def test_boundary_grid_is_the_same_picture_when_the_image_is_turned():
    rows, columns = 5, 7
    n = rows * columns
    scores = torch.rand(n, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    centers = scores > 0.7
    turn = torch.arange(n).reshape(rows, columns).T.flatten()           # new position -> old patch
    all_in = torch.ones(n, dtype=torch.bool)
    plain = tokens.merge_rule(scores, all_in, centers, columns=columns)
    turned = tokens.merge_rule(scores[turn], all_in, centers[turn], columns=rows)
    place = {int(old): new for new, old in enumerate(turn)}
    center = centers.nonzero().flatten().tolist()

    def distance(j: int, k: int) -> int:
        return (j // columns - k // columns) ** 2 + (j % columns - k % columns) ** 2
    for j in range(n):
        mine, theirs = plain.regions[j], turned.regions[place[j]]
        other = int(turn[centers[turn].nonzero().flatten()[theirs]])
        assert distance(j, center[mine]) == distance(j, other)                # the same center, or one as near


# ---- A4, the edges

def edge_rule(unpruned: list[int], centers: list[int], weights: str = "score", rule: str = "center",
              boundary: str = "grid"):
    s = torch.tensor([0.2, 0.5, 0.1, 0.9, 0.4, 0.3], dtype=torch.float64)
    return tokens.merge_rule(s, torch.tensor(unpruned).bool(), torch.tensor(centers).bool(), columns=3, rule=rule,
                             boundary=boundary, weights=weights)


@form
def test_every_patch_a_center_is_the_identity(rule, boundary, weights):
    assert edge_rule([1] * 6, [1] * 6, weights, rule, boundary) is None


@form
def test_one_center_takes_every_unpruned_patch_or_stands_between_two_runs(rule, boundary, weights):
    result = edge_rule([1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0], weights, rule, boundary)
    regions = [r for j, r in enumerate(result.regions) if j != 2]       # patch 2 is pruned
    assert regions == ([0] * 5 if rule == "center" else [0, 0, 1, 2, 2])
    assert result.pruned == (2,) and result.weights[2] == 0


@form
def test_a_block_with_every_patch_pruned_merges_into_the_prefix_tokens_alone(rule, boundary, weights):
    result = edge_rule([0] * 6, [0] * 6, weights, rule, boundary)
    assert result.num_merged == 0 and result.pruned == tuple(range(6))
    assert torch.equal(tokens.merge_matrix(result, 2), torch.eye(2, 8))
    assert tokens.token_mask(result, 2).tolist() == [True] * 2 + [False] * 6


@form
def test_unpruned_patches_without_any_center_are_refused(rule, boundary, weights):
    with pytest.raises(InputError, match="no region"):
        edge_rule([1] * 6, [0] * 6, weights, rule, boundary)


@pytest.mark.parametrize("rule", ["center", "merge"])
def test_all_unpruned_patches_centers_leaves_nothing_merged(rule):
    result = edge_rule([1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 0, 1], rule=rule)
    merge = tokens.merge_matrix(result, 1, torch.float64)
    assert torch.equal(merge, torch.eye(7, dtype=torch.float64)[[0, 1, 3, 4, 6]])


@pytest.mark.parametrize("rule", ["center", "merge"])
def test_a_run_of_pruned_patches_is_a_row_of_zeros_only_in_the_published_form(rule):
    mask, centers = [1, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0, 1]
    published = edge_rule(mask, centers, "reference", rule)
    assert published.num_merged == (3 if rule == "center" else 5)      # merge: center, empty run, center, run, center
    assert edge_rule(mask, centers, "score", rule).num_merged == (3 if rule == "center" else 4)
    merge = tokens.merge_matrix(published, 1, torch.float64)
    assert int((merge == 0).all(dim=1).sum()) == (0 if rule == "center" else 1)


@pytest.mark.parametrize("weights", ["reference", "score", "uniform"])
def test_a_run_whose_scores_are_all_zero_is_merged_uniformly(weights):
    s = torch.tensor([0.5, 0.0, 0.0, 0.6, 0.1, 0.3, 0.7], dtype=torch.float64)
    c = torch.tensor([1, 0, 0, 1, 0, 0, 1]).bool()
    result = tokens.merge_rule(s, torch.ones(7).bool(), c, columns=7, rule="merge", weights=weights)
    zero = result.weights[1:3]
    assert zero[0] == zero[1] > 0 and all(map(math.isfinite, result.weights))


@pytest.mark.parametrize("weights", ["reference", "score"])
def test_a_run_whose_scores_are_all_zero_changes_no_other_run(weights):
    # A4: each run has its own mean, 0.1 and 0.3 have 0.2; the run of zeros has none and is no business of theirs.
    s = torch.tensor([0.5, 0.0, 0.0, 0.6, 0.1, 0.3, 0.7], dtype=torch.float64)
    c = torch.tensor([1, 0, 0, 1, 0, 0, 1]).bool()
    result = tokens.merge_rule(s, torch.ones(7).bool(), c, columns=7, rule="merge", weights=weights)
    total = 0.2 if weights == "reference" else 0.4
    assert result.weights[4:6] == pytest.approx((0.1 / total, 0.3 / total))


# ---- A5

@form
def test_reconstruct_matrix_is_the_pseudo_inverse(rule, boundary, weights):
    for _, _, _, result in random_rules(rule, boundary, weights, seeds=7):
        merge = tokens.merge_matrix(result, 1, torch.float64)
        # The SVD behind pinv loses a few digits to the condition number (below 100 here): 1e-10 of values up to 20.
        torch.testing.assert_close(tokens.reconstruct_matrix(merge), torch.linalg.pinv(merge), rtol=1e-10, atol=1e-10)


@form
def test_reconstruct_at_merge_is_a_projection(rule, boundary, weights):
    for _, _, _, result in random_rules(rule, boundary, weights, seeds=7):
        merge = tokens.merge_matrix(result, 1, torch.float64)
        project = tokens.reconstruct_matrix(merge) @ merge
        torch.testing.assert_close(project @ project, project, **EXACT)
        torch.testing.assert_close(project, project.T, **EXACT)
        assert float(project.trace()) == pytest.approx(int((merge != 0).any(dim=1).sum()))     # one dimension a row


def test_prefix_tokens_pass_through_merge_and_reconstruct_unchanged():
    result = edge_rule([1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0])
    for prefix in (0, 1, 2, 5):
        merge = tokens.merge_matrix(result, prefix, torch.float64)
        x = torch.randn(prefix + 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(prefix))
        assert merge.shape == (prefix + 2, prefix + 6)
        back = tokens.reconstruct_matrix(merge) @ merge @ x
        assert torch.equal(back[:prefix], x[:prefix])
        assert tokens.token_mask(result, prefix).tolist() == [True] * prefix + [True, True, False, True, True, True]


# ---- A7

@form
def test_fold_equals_reconstruct_put_back_and_merge_again(rule, boundary, weights):
    generator = torch.Generator().manual_seed(0)
    for seed in range(7):
        columns, layers = random_layers(seed, rule)
        found = [tokens.merge_rule(s, u, c, columns=columns, rule=rule, boundary=boundary, weights=weights) for s, u,
                 c in layers]
        found = [f for f in found if f is not None]
        for first, second in zip(found, found[1:]):
            merge = tokens.merge_matrix(second, 2, torch.float64)
            reconstruct = tokens.reconstruct_matrix(tokens.merge_matrix(first, 2, torch.float64))
            reconstruct = reconstruct + 0.1 * torch.randn(reconstruct.shape, generator=generator, dtype=torch.float64)
            carried, carry_next = [2 + j for j in first.pruned], [2 + j for j in second.pruned]
            b = torch.randn(reconstruct.shape[1], 3, generator=generator, dtype=torch.float64)
            skipped = torch.randn(len(carried), 3, generator=generator, dtype=torch.float64)
            x = reconstruct @ b                                 # A6: y = reconstruct @ b + P x
            for row, token in enumerate(carried):
                x[token] += skipped[row]
            expected = torch.cat([merge @ x, x[carry_next]])
            matrix = tokens.fold(reconstruct, torch.tensor(carried, dtype=torch.long), merge,
                                 torch.tensor(carry_next, dtype=torch.long))
            torch.testing.assert_close(matrix @ torch.cat([b, skipped]), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_of_the_rest_is_summed_in_float32_though_one_channel_is_large(dtype):
    generator = torch.Generator().manual_seed(0)
    x, ranking, kept = torch.randn(3, 197, 7, generator=generator), torch.rand(3, 197, generator=generator), 131
    x[:, :, 2] = 600                                # 196 of them are 117,600: beyond float16's 65,504
    x[:, :, 4] += 30                                # sums of some 4,000, which bfloat16 knows to within 16
    x = x.to(dtype)
    got = tokens.select(x, ranking, kept, 1)
    assert got.dtype == dtype and got.shape == (3, 1 + kept + 1, 7)
    for image in range(3):
        order = sorted(range(1, 197), key=lambda j: -float(ranking[image, j]))
        assert torch.equal(got[image, :-1], x[image, [0, *order[:kept]]])
        rest = [x[image, j].double() for j in order[kept:]]
        mean = sum(rest) / len(rest)
        # The result's own rounding, half an epsilon, and that of sums of 65 numbers in float32 where they are not
        # float64.
        rounding = 0.5 * torch.finfo(dtype).eps + 65 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(got[image, -1].double(), mean, rtol=rounding, atol=rounding)
