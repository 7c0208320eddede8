"""vitlab.plan: what a plan may hold, and that damage is named."""
import dataclasses
import json
import math

import pytest

from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import PROTECT, Match, MergeReconstruct, Select, SharedUpdate
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError

SHAPE = ViTShape(img_size=(48, 80), patch_size=(16, 16), embed_dim=33, depth=3, num_heads=3, head_dim=11,
                 num_neurons=41, num_prefix_tokens=2, num_classes=7)
N = 15          # 48 / 16 * 80 / 16
RULE = MergeReconstruct(regions=(0, 0, 1, -1, 2, 2, 2, 1, 0, 3, 3, 4, 4, 4, -1),
                        weights=(0.5, 0.5, 0.1, 0, 0.2, 0.3, 0.5, 0.9, 1 / 3, 1, 1, 1, 0.7, 0.25, 0), pruned=(3, 14))
PLAN = CompressionPlan(shape=SHAPE, made_by={"seed": 5, "rate": 0.6}, blocks=(
    BlockPlan(heads=(0, 2), tokens=RULE), BlockPlan(),
    BlockPlan(neurons=(1, 5, 40), tokens=dataclasses.replace(RULE, trains="reconstruct"))))


def as_data() -> dict:
    return json.loads(PLAN.to_json())


def test_plan_comes_back_from_json_equal():
    assert CompressionPlan.from_json(as_data()) == PLAN
    empty = CompressionPlan.empty(SHAPE)
    assert CompressionPlan.from_json(json.loads(empty.to_json())) == empty


def test_a_plan_is_shown_in_one_line_of_blocks_counts_and_gmacs():
    assert repr(PLAN) == (f"CompressionPlan(3 blocks: heads 2 to 3 of 3, neurons 3 to 41 of 41, tokens 7 to 17 of 17; "
                          f"{gmacs(PLAN):.4g} of {gmacs(CompressionPlan.empty(SHAPE)):.4g} GMACs)")
    alike = CompressionPlan(shape=SHAPE, blocks=(BlockPlan(heads=(0, 2)),) * 3)
    assert f"{[alike]}".startswith("[CompressionPlan(3 blocks: heads 2 of 3, neurons 41, tokens 17; ")
    assert max(len(repr(plan)) for plan in (PLAN, SELECTING, MATCHING, SHARING)) < 150


def test_plan_comes_back_from_its_file_equal(tmp_path):
    PLAN.save(tmp_path / "sub" / "plan.json")
    assert CompressionPlan.load(tmp_path / "sub" / "plan.json") == PLAN


def test_weights_keep_every_bit_through_json():
    assert CompressionPlan.from_json(as_data()).blocks[0].tokens.weights == RULE.weights


def test_load_names_the_file_the_block_and_the_field(tmp_path):
    data = as_data()
    data["blocks"][2]["neurons"] = [99]
    (tmp_path / "my_plan.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="my_plan.json.*block 2.*neurons"):
        CompressionPlan.load(tmp_path / "my_plan.json")


def test_empty_plan_cuts_nothing():
    assert CompressionPlan.empty(SHAPE).blocks == (BlockPlan(),) * SHAPE.depth
    assert BlockPlan() == BlockPlan(heads=None, neurons=None, tokens=None)


def test_tokens_per_block_counts_prefix_tokens_and_regions():
    merged = len(set(RULE.regions) - {-1})
    assert PLAN.tokens_per_block() == [2 + merged, 2 + N, 2 + merged]


def test_shape_counts_whole_patches_by_rows_and_columns():
    shape = dataclasses.replace(SHAPE, img_size=(47, 95), patch_size=(8, 16))
    assert shape.grid_size == (5, 5) and dataclasses.replace(shape, img_size=(47, 47)).grid_size == (5, 2)
    assert SHAPE.grid_size == (3, 5) and SHAPE.num_patches == N and SHAPE.num_tokens == N + 2


def test_regions_with_a_gap_are_refused():
    with pytest.raises(InputError, match="gap"):
        MergeReconstruct(regions=(0, 2), weights=(1.0, 1.0))
    with pytest.raises(InputError, match="gap"):                                # at once: a file may say any number
        MergeReconstruct(regions=(0, 10**15), weights=(1.0, 1.0))


def test_a_rule_for_another_number_of_patches_is_refused_by_block():
    with pytest.raises(InputError, match="block 1: tokens.regions has 2 entries.*15"):
        CompressionPlan(shape=SHAPE,
                        blocks=(BlockPlan(), BlockPlan(tokens=MergeReconstruct(regions=(0, 1), weights=(1, 1))),
                                             BlockPlan()))


def test_plan_fits_its_own_shape_and_one_with_another_classifier():
    PLAN.check_fits(SHAPE)
    PLAN.check_fits(dataclasses.replace(SHAPE, num_classes=0, num_classifiers=2, pool="avg"))


@pytest.mark.parametrize("change",
                         [{"embed_dim": 44}, {"depth": 4}, {"num_heads": 1}, {"head_dim": 13}, {"num_neurons": 40},
                                    {"num_prefix_tokens": 1}, {"img_size": (80, 48)}, {"patch_size": (8, 16)}],
                         ids=lambda c: next(iter(c)))
def test_a_plan_for_another_model_is_refused_by_each_size_that_differs(change):
    (name, value), = change.items()
    other = dataclasses.replace(SHAPE, **change)
    with pytest.raises(InputError) as error:
        PLAN.check_fits(other)
    message = str(error.value)
    assert f"{name} {value}" in message and f"(plan: {getattr(SHAPE, name)})" in message
    same = [f.name for f in dataclasses.fields(SHAPE) if f.name != name and f" {f.name} " in message]
    assert not same, f"sizes that agree are named: {same}"


def test_rules_with_no_region_at_all_are_legal_when_every_patch_is_pruned():
    rule = MergeReconstruct(regions=(-1,) * N, weights=(0,) * N, pruned=tuple(range(N)))
    assert rule.num_merged == 0
    assert rule.flow(SHAPE, SHAPE.num_tokens).carried == N


def test_plan_parts_can_not_be_changed_after_the_check():
    for thing, name in ((PLAN, "blocks"), (PLAN.blocks[0], "heads"), (RULE, "weights"), (SHAPE, "depth")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)
        assert not isinstance(getattr(thing, name), list)


# ---- Selection: 15 patches and 2 prefix tokens

def with_tokens(*rules) -> CompressionPlan:
    return CompressionPlan(shape=SHAPE, blocks=tuple(BlockPlan(tokens=rule) for rule in rules))


SELECTING = with_tokens(RULE, None, Select(kept=5, ranked_by="all"))


def test_a_plan_that_selects_comes_back_from_json_and_file_equal(tmp_path):
    text = SELECTING.to_json()
    found = CompressionPlan.from_json(json.loads(text))
    assert found == SELECTING and found.to_json() == text
    assert [b.tokens and b.tokens.kind for b in found.blocks] == ["merge_reconstruct", None, "select"]
    assert found.blocks[2].tokens == Select(kept=5, ranked_by="all") != Select(kept=5)
    SELECTING.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == SELECTING


def test_select_ranks_by_the_kept_heads_where_a_file_does_not_say():
    data = json.loads(SELECTING.to_json())
    del data["blocks"][2]["tokens"]["ranked_by"]
    assert CompressionPlan.from_json(data).blocks[2].tokens == Select(kept=5, ranked_by="kept")


def test_tokens_after_a_selection_are_prefix_and_kept_and_one_mean():
    assert with_tokens(Select(kept=11), None, Select(kept=3)).tokens_per_block() == [17, 2 + 11 + 1, 2 + 11 + 1]
    first, second, third = with_tokens(Select(kept=11), Select(kept=9, ranked_by="all"), Select(kept=1)).flows()
    assert (first.attended, first.in_mlp, first.after) == (17, 14, 14)          # before its own selection, and after it
    assert (second.attended, second.in_mlp, second.after) == (14, 12, 12)
    assert (third.attended, third.in_mlp, third.after) == (12, 4, 4)
    assert [flow.ranked_by for flow in (first, second, third)] == ["kept", "all", "kept"]
    assert not any(flow.carried or flow.merges or flow.reconstructs for flow in (first, second, third))
    assert [flow.ranked_by for flow in SELECTING.flows()] == ["", "", "all"]


def test_all_tokens_reach_the_block_that_selects_after_one_that_merges():
    assert SELECTING.tokens_per_block() == [2 + 5, 17, 17]


def test_a_selection_right_after_a_merge_is_refused_by_its_block():
    with pytest.raises(InputError, match="^block 1: tokens are selected right after a block that merged"):
        with_tokens(RULE, Select(kept=7), None)


@pytest.mark.parametrize("rules, block", [((Select(kept=7), RULE, None), 1), ((Select(kept=7), None, RULE), 2),
                                          ((Select(kept=7), Select(kept=3), RULE), 2),
                                          ((None, Select(kept=13), RULE), 2)])
def test_a_merge_after_a_selection_is_refused_by_its_block(rules, block):
    with pytest.raises(InputError, match=f"^block {block}: tokens are merged by their place.*a block before has "
                                         f"selected"):
        with_tokens(*rules)


@pytest.mark.parametrize("rules, block, limit", [
    ((Select(kept=14), None, None), 0, 13), ((None, Select(kept=99), None), 1, 13),
    ((Select(kept=7), Select(kept=7), None), 1, 6), ((Select(kept=7), None, Select(kept=11)), 2, 6)])
def test_a_selection_that_drops_less_than_two_tokens_is_refused_by_its_block_with_the_limit(rules, block, limit):
    with pytest.raises(InputError, match=f"^block {block}: .*tokens are kept; at most {limit} of the {limit + 2} "):
        with_tokens(*rules)


def test_all_but_two_of_the_tokens_that_come_in_may_be_kept():
    with_tokens(Select(kept=13), Select(kept=12), Select(kept=11))


@pytest.mark.parametrize("field, value", [
    *[("kept", v) for v in (0, -1, True, False, 7.0, "7", None, [7])],
    *[("ranked_by", v) for v in ("", "cut", "All", None, True, 1, ["kept"])]], ids=str)
def test_a_selection_with_a_wrong_field_is_refused_by_block_and_field(field, value):
    data = json.loads(SELECTING.to_json())
    data["blocks"][2]["tokens"][field] = value
    with pytest.raises(InputError, match=f"here: block 2: tokens: {field}"):
        CompressionPlan.from_json(data, where="here")
    with pytest.raises(InputError, match=field):
        Select(**{"kept": 7, field: value})


@pytest.mark.parametrize("change, named", [({"kept": 99}, "99 tokens are kept"), ({"keep": 7}, "tokens.*keep"),
                                           ({"regions": [0]}, "tokens.*regions"), ({"kind": "Select"}, "kind")])
def test_a_selection_that_a_file_gets_wrong_is_refused_naming_the_file_and_block(tmp_path, change, named):
    data = json.loads(SELECTING.to_json())
    data["blocks"][2]["tokens"].update(change)
    (tmp_path / "my_plan.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=f"my_plan.json: block 2: .*{named}"):
        CompressionPlan.load(tmp_path / "my_plan.json")


def test_a_selection_without_kept_is_refused_by_block():
    data = json.loads(SELECTING.to_json())
    del data["blocks"][2]["tokens"]["kept"]
    with pytest.raises(InputError, match="block 2.*kept"):
        CompressionPlan.from_json(data)


def test_a_selection_for_a_model_without_a_class_token_is_refused_by_block():
    shape = dataclasses.replace(SHAPE, num_prefix_tokens=0)
    with pytest.raises(InputError, match="^block 1: .*no class token"):
        CompressionPlan(shape=shape, blocks=(BlockPlan(), BlockPlan(tokens=Select(kept=7)), BlockPlan()))


def test_plan_files_from_before_selection_still_load_as_models_without_qk_norm(tmp_path):
    data = as_data()
    assert data["shape"].pop("qk_norm") is False
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert CompressionPlan.load(tmp_path / "old.json") == PLAN
    PLAN.check_fits(dataclasses.replace(SHAPE, qk_norm=True))   # and are good for a model that has it, too


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_qk_norm_other_than_true_or_false_is_refused_by_name(value):
    data = as_data()
    data["shape"]["qk_norm"] = value
    with pytest.raises(InputError, match="shape: shape.qk_norm"):
        CompressionPlan.from_json(data)


# ---- Matching, and proportional attention of regions

MATCHING = with_tokens(Match(merged=5), Match(merged=0, protect=0.25, by_size=False),
                       Match(merged=4, protect=0))
SHARE = SharedUpdate(regions=tuple(j // 2 for j in range(N)), weights=(0.5,) * (N - 1) + (1.0,))
SHARING = with_tokens(dataclasses.replace(SHARE, proportional=True, own=0.5), SHARE, None)


def test_plans_that_match_or_count_regions_come_back_from_json_and_file_equal(tmp_path):
    for plan in (MATCHING, SHARING, with_tokens(RULE, None, Match(merged=7)),
                 with_tokens(SHARE, Match(merged=7), Match(merged=4))):
        text = plan.to_json()
        found = CompressionPlan.from_json(json.loads(text))
        assert found == plan and found.to_json() == text
        plan.save(tmp_path / "plan.json")
        assert CompressionPlan.load(tmp_path / "plan.json") == plan
    assert [b.tokens for b in CompressionPlan.from_json(json.loads(MATCHING.to_json())).blocks] == [
        Match(merged=5, protect=PROTECT, by_size=True), Match(merged=0, protect=0.25, by_size=False),
        Match(merged=4, protect=0, by_size=True)]
    # as files were before sizes counted: such a file goes on to mean that they don't
    assert json.loads(MATCHING.to_json())["blocks"][1]["tokens"] == {"kind": "match", "merged": 0, "protect": 0.25}
    assert json.loads(MATCHING.to_json())["blocks"][2]["tokens"]["by_size"] is True


@pytest.mark.parametrize("plan, field, meant",
                         [(MATCHING, "protect", PROTECT), (SHARING, "proportional", False), (SHARING, "own", 1.0)])
def test_what_a_file_does_not_say_is_the_default(plan, field, meant):
    data = json.loads(plan.to_json())
    del data["blocks"][0]["tokens"][field]
    assert getattr(CompressionPlan.from_json(data).blocks[0].tokens, field) == meant


@pytest.mark.parametrize("plan, field, value", [
    *[(MATCHING, "merged", v) for v in (-1, True, False, 7.0, "7", None, [7])],
    *[(MATCHING, "protect", v) for v in (-0.1, math.nan, math.inf, True, "0.1", None, [0.1], 10 ** 400)],
    *[(SHARING, "proportional", v) for v in (0, 1, "true", None, [True])]], ids=lambda v: str(v)[:9])
def test_a_rule_with_a_wrong_field_is_refused_by_block_and_field(plan, field, value):
    data = json.loads(plan.to_json())
    data["blocks"][1]["tokens"][field] = value
    with pytest.raises(InputError, match=f"here: block 1: tokens: {field}"):
        CompressionPlan.from_json(json.loads(json.dumps(data)), where="here")


def test_a_matching_with_an_unknown_or_missing_field_is_refused_by_block():
    for change in (lambda rule: rule.pop("merged"), lambda rule: rule.update(keep=3),
                   lambda rule: rule.update(kind="Match")):
        data = json.loads(MATCHING.to_json())
        change(data["blocks"][2]["tokens"])
        with pytest.raises(InputError, match="block 2.*tokens.*(merged|keep|kind)"):
            CompressionPlan.from_json(data)


def test_tokens_are_fewer_by_those_merged_from_the_mlp_of_their_block_on():
    first, second, third = MATCHING.flows()
    assert [(f.attended, f.in_mlp, f.after) for f in (first, second, third)] == [(17, 12, 12), (12, 12, 12), (12, 8, 8)]
    assert MATCHING.tokens_per_block() == [17, 12, 12]
    assert [(f.compared, f.pooled) for f in (first, second, third)] == [(8 * 7 + 17, 5 + 7), (0, 0),
                                                                        (5 * 5 + 12, 4 + 5)]
    assert all(f.matched and not (f.merges or f.reconstructs or f.carried or f.ranked_by)
               for f in (first, second, third))


@pytest.mark.parametrize("merged, block, limit, left",
                         [((8, 0, 0), 0, 7, 15), ((7, 5, 0), 1, 4, 8), ((7, 4, 3), 2, 2, 4)])
def test_more_than_half_of_the_tokens_are_refused_by_block(merged, block, limit, left):
    with pytest.raises(InputError, match=f"^block {block}: {merged[block]} tokens are merged; at most half of the "
                                         f"{left} "):
        with_tokens(*(Match(merged=m) for m in merged))
    with_tokens(*(Match(merged=limit if i == block else m) for i, m in enumerate(merged[:block + 1])),
                *(Match(merged=0),) * (2 - block))


@pytest.mark.parametrize("rules, block, says", [
    ((Match(merged=3), None, None), 1, "tokens were merged by content before.*\"match\""),
    ((Match(merged=3), Match(merged=0), SHARE), 2, "tokens share an update by their place"),
    ((Match(merged=3), Match(merged=0), RULE), 2, "tokens are merged by their place"),
    ((Match(merged=0), RULE, None), 1, "tokens were merged by content before"),
    ((Match(merged=3), Match(merged=0), Select(kept=3)), 2, "tokens were merged by content before"),
    ((Select(kept=3), Match(merged=0), Match(merged=0)), 1, "tokens are matched, but a block before has selected"),
    ((Select(kept=3), None, Match(merged=0)), 2, "tokens are matched, but a block before has selected"),
    ((None, RULE, Match(merged=3)), 2, "tokens are matched right after a block that merged")])
def test_what_cant_follow_is_refused_by_block(rules, block, says):
    with pytest.raises(InputError, match=f"^block {block}: {says}"):
        with_tokens(*rules)


def test_matching_none_may_follow_a_merge_at_once():
    assert with_tokens(RULE, Match(merged=0), Match(merged=3)).flows()[2].after == 14


def test_protection_needs_a_class_token():
    shape = dataclasses.replace(SHAPE, num_prefix_tokens=0)
    with pytest.raises(InputError, match="^block 1: .*no class token: protect 0 is needed"):
        CompressionPlan(shape=shape, blocks=(BlockPlan(), *(BlockPlan(tokens=Match(merged=3)),) * 2))
    CompressionPlan(shape=shape, blocks=(BlockPlan(), *(BlockPlan(tokens=Match(merged=3, protect=0)),) * 2))


# ---- Spans: 15 patches, 2 prefix tokens, 5 regions and 2 patches pruned

SPAN = dataclasses.replace(RULE, span=2)


def test_a_plan_with_a_span_comes_back_from_json_and_file_equal(tmp_path):
    plan = with_tokens(SPAN, None, RULE)
    text = plan.to_json()
    found = CompressionPlan.from_json(json.loads(text))
    assert found == plan and found.to_json() == text and found.blocks[0].tokens == SPAN != RULE
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan


def test_a_file_says_a_span_only_where_there_is_one_and_none_is_one_block():
    first, _, last = json.loads(with_tokens(SPAN, None, RULE).to_json())["blocks"]
    assert first["tokens"]["span"] == 2 and "span" not in last["tokens"] and RULE.span == 1


def test_tokens_stay_merged_in_the_blocks_of_a_span_and_all_come_back_after_its_last():
    first, inside, last = with_tokens(dataclasses.replace(RULE, span=3), None, None).flows()
    for flow in (first, inside, last):
        assert (flow.attended, flow.in_mlp,
                flow.carried) == (7, 7, 2) and not (flow.ranked_by or flow.matched or flow.compared)
    assert [flow.after for flow in (first, inside, last)] == [7, 7, 17]
    assert [(flow.merges, flow.reconstructs) for flow in (first, inside, last)] == [(True, False), (False, False),
                                                                                    (False, True)]
    one, _, whole = with_tokens(SPAN, None, None).flows()
    assert (one.after, whole.attended, whole.carried, whole.merges, whole.reconstructs) == (7, 17, 0, False, False)


def test_rules_name_the_rule_that_each_block_runs_by_and_its_place_in_the_span():
    assert with_tokens(None, SPAN, None).rules() == [(None, 0), (SPAN, 0), (SPAN, 1)]
    assert with_tokens(SPAN, None, None).rules() == [(SPAN, 0), (SPAN, 1), (None, 0)]
    assert with_tokens(SPAN, None, RULE).rules()[2] == (RULE, 0)


@pytest.mark.parametrize("span", [0, -1, 1.0, "2", None, True])
def test_a_span_that_is_no_number_of_blocks_is_refused(span):
    with pytest.raises(InputError, match=f"span is {span!r}; an integer of at least 1 is needed"):
        dataclasses.replace(RULE, span=span)


@pytest.mark.parametrize("rules, message", [
    ((None, dataclasses.replace(RULE, span=3), None), "block 1: tokens stay merged for 3 blocks from here, but 2 are "
                                                      "left; a span of"),
    ((None, None, SPAN), "block 2: tokens stay merged for 2 blocks from here, but 1 is left; a span of at most 1 is "
                         "needed"),
    ((SPAN, RULE, None), "block 1: it stays merged in the span that begins in block 0, and can have no token rule of "
                         "its own; null"),
    ((dataclasses.replace(RULE, span=3), None, Select(kept=3)), "block 2: it stays merged in the span that begins in "
                                                                "block 0"),
    ((SPAN, Match(merged=0), Match(merged=0)), "block 1: it stays merged in the span that begins in block 0"),
    ((SPAN, None, Select(kept=3)), "block 2: tokens are selected right after a block that merged"),
], ids=["too long by one", "at the end", "a rule inside", "a selection in its last block", "matching inside",
        "selected right after"])
def test_a_span_that_does_not_fit_is_refused_by_block(rules, message):
    with pytest.raises(InputError, match=message):
        with_tokens(*rules)
