"""LatencyTable: sums of parts against slow loops on a hand-made table, the cache, the grid. No time is asserted."""
import copy
import dataclasses
import functools
import json
import random
import warnings

import numpy as np
import pytest
import registry
import torch
from segmenting_fixtures import match_plan, small, units_plan
from training_fixtures import full_plan, one_thread, tiny, token_plan  # noqa: F401

from vitlab.criteria.planning import prune_and_merge
from vitlab.exporting import running
from vitlab.measure import latency
from vitlab.measure.latency import grid_axes, latency_table, measure_table
from vitlab.measure.throughput import Way
from vitlab.models import compress, shape_of
from vitlab.models.families import also_taken, attended
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import Counts, counts_of
from vitlab.plan.latency import AXES, LatencyTable
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut, Select
from vitlab.plan.shape import ViTShape
from vitlab.runtime.files import InputError

# 35 patches and a class token; every part's time is linear in each count, so linear interpolation gives it exactly.
SHAPE = ViTShape(img_size=(40, 56), patch_size=(8, 8), embed_dim=33, depth=5, num_heads=3, head_dim=11, num_neurons=131)
TIMES = {"stem": lambda n: 7.0 + 0 * n, "attention": lambda n, h: 0.3 + 0.05 * n + 0.7 * h + 0.011 * n * h,
         "select": lambda n, h: 0.17 + 0.013 * n + 0.023 * h, "mlp": lambda n,
         m: 0.19 + 0.029 * n + 0.0031 * m + 0.0007 * n * m, "fold": lambda r,
         c: 0.071 + 0.0041 * r + 0.0067 * c + 0.0023 * r * c, "carry": lambda r: 0.053 + 0.0037 * r,
         "pool": lambda r: 0.047 + 0.0029 * r, "match": lambda n: 0.083 + 0.0057 * n, "read_out": lambda n,
         h: 0.13 + 0.017 * n + 0.031 * h + 0.0043 * n * h, "head": lambda n: 0.61 + 0.0089 * n,
         "narrow": lambda n, h, w: 0.21 + 0.037 * n + 0.41 * h + 0.0019 * n * h * w}
FAST = {"batch_size": 2, "repeats": 1, "min_seconds": 0.0, "progress": False}


def made(shape: ViTShape = SHAPE, scale: float = 1.0, **conditions) -> LatencyTable:
    axes = grid_axes(shape)
    return LatencyTable(shape=shape, conditions=conditions, axes=axes, scale=scale,
                        ms={part: TIMES[part](*np.meshgrid(*axis, indexing="ij")) * 1.0 for part, axis in axes.items()})


def merging(shape: ViTShape, merged: int, pruned: int, span: int = 1) -> MergeReconstruct:
    n = shape.num_patches
    regions = tuple(-1 if j < pruned else (j - pruned) % merged for j in range(n))
    return MergeReconstruct(regions=regions, weights=tuple(0.0 if r < 0 else 0.5 for r in regions),
                            pruned=tuple(range(pruned)), span=span)


def cut(plan_rules: list, seed: int, shape: ViTShape = SHAPE) -> CompressionPlan:
    chance = random.Random(seed)

    def kept(count: int) -> tuple[int, ...]:
        return tuple(sorted(chance.sample(range(count), chance.randint(1, count))))
    return CompressionPlan(shape=shape,
                           blocks=tuple(BlockPlan(heads=kept(shape.num_heads), neurons=kept(shape.num_neurons),
                                                  tokens=rule)
                                                     for rule in plan_rules))


def by_hand(plan: CompressionPlan) -> float:
    """The deployed model walked through block by block, from the plan itself."""
    shape, total = plan.shape, TIMES["stem"](0)
    # rows on the way; a reconstruct is due
    prefix, here, folding = shape.num_prefix_tokens, plan.shape.num_tokens, False
    # blocks that are still to stay merged
    span, merged = 0, (0, 0)
    for block in plan.blocks:
        heads = shape.num_heads if block.heads is None else len(block.heads)
        neurons = shape.num_neurons if block.neurons is None else len(block.neurons)
        rule, inside, skipping = block.tokens, (shape.num_tokens if folding else here), 0
        if isinstance(rule, MergeReconstruct):
            merged, span = (prefix + len(set(rule.regions) - {-1}), len(rule.pruned)), rule.span
        if span:
            inside, skipping = merged
        if folding or isinstance(rule, MergeReconstruct):
            total += TIMES["fold"](inside + skipping, here)
        if skipping:
            total += TIMES["carry"](inside + skipping)
        if block.qk_width and not isinstance(rule, ReadOut):
            total += TIMES["narrow"](inside, heads, block.qk_width)
        elif heads:
            total += TIMES["read_out" if isinstance(rule, ReadOut) else "attention"](inside, heads)
        if isinstance(rule, ReadOut):
            inside = prefix
        if isinstance(rule, Select):
            total += TIMES["select"](inside, shape.num_heads if rule.ranked_by == "all" else heads)
            inside = prefix + rule.kept + 1
        if isinstance(rule, Match) and rule.merged:
            total += TIMES["match"](inside)
            inside -= rule.merged
        total += TIMES["mlp"](inside, neurons) if neurons else 0
        here, folding, span = inside + skipping, span == 1, max(span - 1, 0)
    if folding:
        wanted = prefix if shape.pool == "token" else shape.num_tokens
        total += TIMES["fold"](wanted, here)
        here = wanted
    if isinstance(rule, Match):
        here = shape.num_tokens                                                 # every patch is given back
    return total + TIMES["head"](here)


PLANS = {
    "dense": lambda s: CompressionPlan.empty(s),
    "heads and neurons": lambda s: cut([None] * 5, 1, s),
    "merged": lambda s: cut([merging(s, 11, 5), merging(s, 7, 0), merging(s, 5, 9), merging(s, 13, 2),
                             merging(s, 3, 1)], 2, s),
    "plain between and at the end": lambda s: cut([None, merging(s, 11, 5), None, merging(s, 5, 0), None], 3, s),
    "merged at both ends": lambda s: cut([merging(s, 11, 5), None, None, None, merging(s, 17, 3)], 4, s),
    "merged at the end alone": lambda s: cut([None, None, None, None, merging(s, 17, 3)], 7, s),
    "spans": lambda s: cut([merging(s, 11, 5, 2), None, merging(s, 7, 0), merging(s, 5, 9, 2), None], 13, s),
    "a span within": lambda s: cut([None, merging(s, 11, 5, 3), None, None, None], 14, s),
    "selected": lambda s: cut([None, Select(kept=19), Select(kept=7, ranked_by="all"), None, Select(kept=2)], 5, s),
    "merged, then selected": lambda s: cut([merging(s, 11, 5), None, Select(kept=23), None, None], 6, s),
    "matched": lambda s: cut([None, Match(merged=13), Match(merged=0), Match(merged=7), Match(merged=2)], 8, s),
    "merged, then matched": lambda s: cut([merging(s, 11, 5), None, Match(merged=11), Match(merged=0), Match(merged=0)],
                                          9, s),
    "read out": lambda s: cut([None, None, None, None, ReadOut()], 11, s),
    "matched, then read out": lambda s: cut([None, Match(merged=17), Match(merged=0), Match(merged=3), ReadOut()], 12,
                                            s),
    "narrow, and without sublayers": lambda s: CompressionPlan(shape=s, blocks=(
        BlockPlan(qk_width=3), BlockPlan(heads=(0, 2), qk_width=10, tokens=Match(merged=5)),
        BlockPlan(heads=(), tokens=Match(merged=0)), BlockPlan(neurons=(), tokens=Match(merged=1)),
        BlockPlan(qk_width=1, tokens=Match(merged=0)))),
    "matched by none": lambda s: cut([None, None, Match(merged=0), Match(merged=0), Match(merged=0)], 10, s),
}


@pytest.mark.parametrize("name, pool", [(name, pool) for name in PLANS for pool in ("token", "avg")
                                        if pool == "token" or "read out" not in name])
def test_a_prediction_is_the_sum_of_the_parts_met_on_the_way(name, pool):
    plan = PLANS[name](dataclasses.replace(SHAPE, pool=pool))
    found = made(plan.shape).predict(counts_of(plan))
    assert float(found) == pytest.approx(by_hand(plan), rel=1e-9)          # the same sums in another order


def stacked(plans: list[CompressionPlan]) -> Counts:
    return Counts(**{name: np.stack([vars(counts_of(p))[name] for p in plans]) for name in vars(counts_of(plans[0]))})


def test_many_policies_at_once_equal_one_by_one_in_any_leading_shape():
    plans, table = [make(SHAPE) for make in PLANS.values()][:6], made(scale=1.3)
    many = Counts(**{name: v.reshape(2, 3, 5) for name, v in vars(stacked(plans)).items()})
    expected = np.array([float(table.predict(counts_of(p))) for p in plans]).reshape(2, 3)
    np.testing.assert_allclose(table.predict(many), expected, rtol=1e-12)
    assert table.predict(counts_of(plans[0])).shape == ()
    assert list(table.by_part(many)) == list(AXES)
    np.testing.assert_allclose(sum(table.by_part(many).values()), expected, rtol=1e-12)


def test_the_scale_multiplies_the_sum():
    counts = counts_of(PLANS["merged"](SHAPE))
    assert float(made(scale=1.25).predict(counts)) == pytest.approx(1.25 * float(made().predict(counts)), rel=1e-12)


def test_between_two_measured_counts_the_time_is_the_middle_of_theirs():
    axes = {**grid_axes(SHAPE), "attention": (np.array([1, 11, 36]), np.array([1, 3]))}
    ms = {**made().ms, "attention": np.array([[1.0, 2.0], [4.0, 8.0], [30.0, 60.0]])}
    table = LatencyTable(shape=SHAPE, conditions={}, axes=axes, ms=ms)
    middle = dataclasses.replace(counts_of(CompressionPlan.empty(SHAPE)), attended=np.full(5, 6), queried=np.full(5, 6),
                                 heads=np.full(5, 2))
    assert float(table.by_part(middle)["attention"]) == pytest.approx(5 * (1 + 2 + 4 + 8) / 4, rel=1e-12)


@pytest.mark.parametrize("field, value, words", [
    ("heads", 4, "attention: 4 to 4 heads wanted; the table holds 1 to 3"),
    ("neurons", 132, "mlp: 132 to 132 neurons wanted; the table holds 1 to 131"), ("attended", 37, "attention: 37 to "
                                                                                                   "37 tokens"),
    ("in_mlp", 0, "mlp: 0 to 0 tokens wanted; the table holds 1 to 36"), ("ranking", 4, "select: 4 to 4 ranking heads"),
])
def test_counts_outside_the_table_are_refused_by_name(field, value, words):
    counts = dataclasses.replace(counts_of(CompressionPlan.empty(SHAPE)),
                                 **{"queried": np.zeros(0), field: np.full(5, value)})
    with pytest.raises(InputError, match=words):
        made().predict(counts)


def test_counts_of_another_depth_are_refused():
    counts = Counts(**{name: v[:3] for name, v in vars(counts_of(CompressionPlan.empty(SHAPE))).items()})
    with pytest.raises(InputError, match="counts of 3 blocks; the table is for 5"):
        made().predict(counts)


def test_a_table_comes_back_from_its_file_as_it_was(tmp_path):
    table = made(scale=1.07, batch_size=3, cpu="a cpu")
    table.save(tmp_path / "t.json")
    back = LatencyTable.load(tmp_path / "t.json")
    assert (back.shape, back.conditions, back.scale) == (table.shape, table.conditions, table.scale)
    for part in AXES:
        assert np.array_equal(back.ms[part], table.ms[part]) and back.ms[part].shape == table.ms[part].shape
        assert all(np.array_equal(a, b) for a, b in zip(back.axes[part], table.axes[part], strict=True))


def damage(kind: str):
    def change(data: dict) -> None:
        mlp = data["parts"]["mlp"]
        if kind == "negative":
            mlp["ms"][0][0] = -1.0
        elif kind == "nan":
            mlp["ms"][0][0] = float("nan")
        elif kind == "ragged":
            mlp["ms"][0].pop()
        elif kind == "short":
            mlp["ms"].pop()
        elif kind == "descending":
            mlp["axes"][0].reverse()
        elif kind == "no part":
            del data["parts"]["fold"]
        elif kind == "version":
            data["version"] = 99
        elif kind == "shape":
            data["shape"]["depth"] = 0
        elif kind == "scale":
            data["scale"] = 0
    return change


@pytest.mark.parametrize("kind",
                         ["negative", "nan", "ragged", "short", "descending", "no part", "version", "shape", "scale"])
def test_a_damaged_table_is_refused_by_the_name_of_its_file(kind, tmp_path):
    path = tmp_path / "t.json"
    made().save(path)
    data = json.loads(path.read_text())
    damage(kind)(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="t.json"):
        LatencyTable.load(path)


@pytest.fixture
def measured(monkeypatch) -> list:
    """Every call of measure_table, which hands out a made table at once."""
    calls = []

    def fake(model, *, batch_size, dtype, device, way, **settings) -> LatencyTable:
        calls.append((batch_size, dtype, settings))
        found = latency.conditions_of(model, batch_size, dtype, device, way)
        return made(shape_of(model), scale=float(len(calls)), **found)
    monkeypatch.setattr(latency, "measure_table", fake)
    return calls


def test_a_table_is_measured_once_for_its_conditions_and_again_for_others(measured, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = latency_table(tiny(), batch_size=3, cache=tmp_path, repeats=7)
        assert measured == [(3, "float32", {"repeats": 7})]
        assert latency_table(tiny(seed=1), batch_size=3, cache=tmp_path).scale == first.scale == 1.0     # other weights
        assert len(measured) == 1
        latency_table(tiny(), batch_size=5, cache=tmp_path)
        latency_table(tiny(), batch_size=3, dtype="bfloat16", cache=tmp_path)
        latency_table(tiny(depth=3), batch_size=3, cache=tmp_path)
        # the same shape, with LayerScale
        latency_table(tiny(init_values=0.1), batch_size=3, cache=tmp_path)
        torch.set_num_threads(2)
        latency_table(tiny(), batch_size=3, cache=tmp_path)
        torch.set_num_threads(1)
        monkeypatch.setattr("platform.node", lambda: "another machine")
        latency_table(tiny(), batch_size=3, cache=tmp_path)
        for way in (Way("other", "1.0", None), Way("other", "1.1", None), Way("other", "1.0", None)):
            latency_table(tiny(), batch_size=3, cache=tmp_path, way=way)
        assert len(measured) == 9 and len(list(tmp_path.iterdir())) == 9


def test_segmenters_whose_decoders_have_other_heads_have_tables_of_their_own(measured, tmp_path):
    wide, narrow = small(head_dim=24), small(head_dim=4)
    assert shape_of(wide) == shape_of(narrow) and latency_table(wide, batch_size=3, cache=tmp_path).scale == 1.0
    assert latency_table(narrow, batch_size=3, cache=tmp_path).scale == 2.0
    assert latency_table(small(seed=1, head_dim=4), batch_size=3, cache=tmp_path).scale == 2.0


def test_the_cache_folder_comes_from_the_environment_and_else_from_home(measured, tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_CACHE", str(tmp_path / "named"))
    latency_table(tiny(), batch_size=3)
    monkeypatch.delenv("VITLAB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    latency_table(tiny(), batch_size=3)
    names = {str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("*.json")}
    assert names == {"named", "home/.cache/vitlab"}


@pytest.mark.parametrize("content", ["cut sh", "{}", "[1]", "another's"])
def test_a_damaged_or_foreign_file_is_measured_anew_with_a_warning_that_names_it(content, measured, tmp_path):
    latency_table(tiny(), batch_size=3, cache=tmp_path)
    path = next(tmp_path.iterdir())
    if content == "another's":
        made(shape_of(tiny()), batch_size=3, cpu="another").save(path)
    else:
        path.write_text(content)
    with pytest.warns(UserWarning, match=f"{path.name}.*measured anew"):
        table = latency_table(tiny(), batch_size=3, cache=tmp_path)
    assert len(measured) == 2 and table.scale == 2.0
    assert latency_table(tiny(), batch_size=3, cache=tmp_path).scale == 2.0 and len(measured) == 2     # mended


def test_a_folder_that_cant_be_written_costs_a_warning_not_the_table(measured, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert latency_table(tiny(), batch_size=3, cache=tmp_path / "file" / "inside").scale == 1.0


def test_every_family_is_measured_on_its_grid_and_stays_as_it_was(family, tiny_vit):
    model = tiny_vit(family).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = measure_table(model, **FAST)
    shape = shape_of(model)
    assert table.shape == shape and table.scale > 0
    assert set(table.ms) == {part for part in AXES if part != "narrow" or shape.cuts("widths")}
    tokens, heads = table.axes["attention"]
    assert tokens[0] == shape.num_prefix_tokens and tokens[-1] == shape.num_tokens and len(tokens) == 6
    assert heads.tolist() == list(range(1, shape.num_heads + 1))
    assert table.axes["mlp"][1][[0, -1]].tolist() == [1, shape.num_neurons] and len(table.axes["mlp"][1]) == 5
    assert all((ms > 0).all() for ms in table.ms.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.blocks[0].attn.num_heads == shape.num_heads


def test_parts_and_whole_models_are_timed_as_they_run_in_the_way_that_is_asked_for():
    ready, ran = [], []

    def prepare(module, x):
        ready.append(module)
        return lambda given: ran.append(module) or module(given)
    table = measure_table(tiny(), **FAST, way=Way("other", "1.0", prepare))
    # each once ready, and run: warm, to see how long it takes, in one round
    assert len(ready) == sum(ms.size for ms in table.ms.values()) + 4 and len(ran) == 3 * len(ready)
    assert table.conditions["runtime"] == "other 1.0"


def test_more_models_of_one_class_than_torch_compiles_by_itself_are_all_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend=lambda graph, inputs: compiled.append(graph) or graph.forward))
    with torch._dynamo.config.patch(recompile_limit=2):                # monkeypatch would leave it without a value
        for width in range(1, 6):
            running._compiled(torch.nn.Linear(3, width), torch.ones(1, 3))(torch.ones(1, 3))
        assert torch._dynamo.config.recompile_limit == 2               # for whatever else this process compiles
    assert len(compiled) == 5


def test_each_piece_is_the_models_own_part(monkeypatch, tiny_vit):
    """At all counts the halves and the ends make the dense model, and a select piece gives its tokens."""
    model = tiny_vit("deit3")
    axes, x = grid_axes(shape_of(model)), torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    pieces = {(part, place): run for part, place, run, _ in latency._pieces(model, axes, 2)}
    full = {part: pieces[part, tuple(len(a) - 1 for a in axes[part])] for part in AXES}
    inputs = {part: [y for p, _, _, y in latency._pieces(model, axes, 2) if p == part]
              for part in ("fold", "carry", "select")}
    with torch.inference_mode():
        y = full["stem"](x)
        torch.testing.assert_close(full["mlp"](full["attention"](y)), model.blocks[0](y), rtol=0, atol=0)
        torch.testing.assert_close(full["head"](model.blocks(y)), model(x), rtol=0, atol=0)
        made = compress(model, CompressionPlan(shape=shape_of(model), blocks=(BlockPlan(qk_width=12),) * 5))
        torch.testing.assert_close(full["mlp"](full["narrow"](y)), made.blocks[0](y), rtol=0, atol=0)
        assert full["select"](inputs["select"][-1]).shape[1] == 1 + (shape_of(model).num_patches // 2) + 1
        assert pieces["fold", (1, 2)](inputs["fold"][4 + 2]).shape[1] == axes["fold"][0][1]
        assert inputs["fold"][4 + 2].shape[1] == axes["fold"][1][2]
        torch.testing.assert_close(full["carry"](y), y, rtol=0, atol=0)
        n, last = y.shape[1] - 1, len(axes["match"][0]) - 1
        assert full["match"](y).shape[1] == 1 + n - n // 4                      # half of what can be merged
        first = int(axes["match"][0][0])
        assert first == 3 and pieces["match", (0,)](y[:, :first]).shape[1] == 2 and axes["match"][0][last] == 1 + n


def test_a_model_without_prefix_tokens_has_no_time_of_selection():
    model = tiny(class_token=False, global_pool="avg")
    table = measure_table(model, **FAST)
    assert "select" not in table.ms and float(table.predict(counts_of(CompressionPlan.empty(table.shape)))) > 0
    counts = dataclasses.replace(counts_of(CompressionPlan.empty(table.shape)), ranking=np.array([0, 3]))
    with pytest.raises(InputError, match="no times of select"):
        table.predict(counts)


@pytest.mark.parametrize("change, words", [
    ({"dtype": "float8"}, "float8"), ({"batch_size": 0}, "batch_size 0"), ({"repeats": 0}, "repeats")])
def test_what_cant_be_measured_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        measure_table(tiny(), **{**FAST, **change})


def test_regions_that_share_an_update_take_the_time_of_their_means_and_no_fold():
    scores = torch.rand(SHAPE.depth, SHAPE.num_patches, generator=torch.Generator().manual_seed(0)) + 0.01
    plan = prune_and_merge(scores, SHAPE, keep_rate=0.5, share=True)
    parts = made().by_part(counts_of(plan))
    assert parts["fold"] == parts["carry"] == 0
    assert float(parts["pool"]) == pytest.approx(sum(TIMES["pool"](n) for n in plan.tokens_per_block()), rel=1e-9)
    # every token has its own stream to the end
    assert float(parts["head"]) == pytest.approx(TIMES["head"](36), rel=1e-12)


def test_matching_takes_its_own_time_and_none_of_regions_nor_of_selection():
    plan = PLANS["matched"](SHAPE)
    parts = made().by_part(counts_of(plan))
    assert parts["fold"] == parts["carry"] == parts["pool"] == parts["select"] == 0
    assert float(parts["match"]) == pytest.approx(TIMES["match"](36) + TIMES["match"](23) + TIMES["match"](16),
                                                  rel=1e-12)
    without = {part: ms for part, ms in made().ms.items() if part != "match"}
    table = dataclasses.replace(made(), ms=without, axes={part: made().axes[part] for part in without})
    assert float(table.predict(counts_of(PLANS["dense"](SHAPE)))) > 0
    with pytest.raises(InputError, match="no times of match"):
        table.predict(counts_of(plan))


def test_a_table_of_an_older_version_is_refused(tmp_path):
    made().save(tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({**data, "version": 1}))
    with pytest.raises(InputError, match="t.json.*vitlab.plan.latency of version 3 is needed"):
        LatencyTable.load(tmp_path / "t.json")


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer", "queries"])
def test_a_segmenter_is_measured_with_its_decoder_on_the_whole_grid_and_its_plans_are_predicted(decoder, tmp_path):
    model = small(decoder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = latency_table(model, cache=tmp_path, **FAST)
    queries = table.shape.queries
    assert [axis.tolist() for axis in table.axes["head"]] == [[16 + queries]]   # the decoder sees every token
    assert table.axes["mlp"][0][-1] == table.axes["attention"][0][-1] == 16 + queries
    for plan in (CompressionPlan.empty(table.shape), units_plan(model), match_plan(model), token_plan(model),
                 full_plan(model), token_plan(model, share=True, prune_rate=0.0)):
        parts = table.by_part(counts_of(plan))
        assert np.isfinite(table.predict(counts_of(plan))) and parts["head"] == table.scale * table.ms["head"][0] > 0
        assert parts["stem"] > 0 and parts["attention"] > 0 and parts["mlp"] > 0
    assert latency_table(model, cache=tmp_path, batch_size=2).ms["head"] == table.ms["head"]    # read, not measured
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = latency_table(small({"linear": "mask_transformer"}.get(decoder, "linear")), cache=tmp_path, **FAST)
    assert other.shape != table.shape and len(list(tmp_path.iterdir())) == 2


@torch.no_grad()
def test_queries_are_timed_among_patches_that_are_turned_by_place_as_they_run():
    """As prefix tokens, which timm's attention does not turn."""
    model = Segmenter(as_encoder(registry.tiny("vit_base_patch16_dinov3", "cpu")), 5, "queries", depth=1, queries=3)
    shape, block = shape_of(model), copy.deepcopy(model.blocks[-1])
    piece, x = max(((piece, x) for part, _, piece, x in latency._pieces(model, grid_axes(shape), 2)
                    if part == "attention"), key=lambda each: each[1].shape[1])
    assert x.shape == (2, shape.num_tokens + 3, 48)
    block.attn.num_prefix_tokens += 3
    wanted = attended(block, torch.cat([x[:, -3:], x[:, :-3]], dim=1), **also_taken(model.encoder)[-1])
    torch.testing.assert_close(piece(x), torch.cat([wanted[:, 3:], wanted[:, :3]], dim=1))


def test_the_head_of_a_segmenters_table_is_its_last_norm_and_decoder(monkeypatch):
    model = small()
    pieces = {part: (piece, x) for part, _, piece, x in latency._pieces(model, grid_axes(shape_of(model)), 2)}
    with torch.no_grad():
        piece, x = pieces["head"]
        assert x.shape == (2, 16, 24)
        grid = model.decoder(model.encoder.norm(x)[:, 1:]).transpose(1, 2).reshape(2, 5, 3, 5)
        assert torch.equal(piece(x), torch.nn.functional.interpolate(grid, scale_factor=8, mode="bilinear"))
        piece, x = pieces["stem"]
        assert x.shape == (2, 3, 24, 40) and piece(x).shape == (2, 16, 24)
