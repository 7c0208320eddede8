"""The steps on heads, neurons and policies: what is written, read back, refused, and never looked at."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixtures import logits, one_thread, small_recipe, tiny, write_easy_folder  # noqa: F401

from vitlab.criteria.planning import prune_and_merge
from vitlab.data import ImageData
from vitlab.measure.objective import PlanObjective
from vitlab.models import checkpoint, shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import counts_of, gmacs, macs
from vitlab.plan.rules import ReadOut
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, read_lines
from vitlab.search import SearchSpace
from vitlab.search.allocation import levels
from vitlab.search.published import POLICIES
from vitlab.search.sensitivity import SENSITIVITY
from vitlab.search.strategies import Settings
from vitlab.workbench import calibrating, comparing, cutting, scoring, searching, steps, training

FEW = RunConfig(device="cpu", quiet=True, workers=0)
SHORT = Settings(population=3, evaluations=5, candidates=20, refinements=1)


def dense_checkpoint(**args) -> steps.Checkpoint:
    model = tiny(**args)
    return steps.Checkpoint(model=model, plan=CompressionPlan.empty(shape_of(model)), info={})


@pytest.fixture
def data(tmp_path):
    return write_easy_folder(tmp_path / "data")


def test_unit_scores_are_written_and_read_back(tmp_path, data):
    found = dense_checkpoint()
    made = scoring.score_units(found, data, tmp_path / "u.safetensors", images=32,
                               config=dataclasses.replace(FEW, batch_size=16))
    read = scoring.read_units(tmp_path / "u.safetensors")
    assert torch.equal(made.heads, read.heads) and torch.equal(made.neurons, read.neurons)
    other = scoring.score_units(found, data, tmp_path / "v.safetensors", criterion="weight", config=FEW)
    assert not torch.equal(made.neurons, other.neurons)


@pytest.mark.parametrize(("name", "write", "says"), [
    ("u.safetensors", lambda p: None, "no such file"),
    ("u.pth", lambda p: p.write_bytes(b""), "not a .safetensors file"),
    ("u.safetensors", lambda p: p.write_bytes(b"x" * 9), "cut short"),
    ("u.safetensors", lambda p: save_file({"head_scores": torch.ones(2, 3)}, p), "holds no neuron_scores"),
    ("u.safetensors",
     lambda p: save_file({"head_scores": torch.ones(2, 3, dtype=torch.int64), "neuron_scores": torch.ones(2, 96)}, p),
     "head_scores are torch.int64"),
    ("u.safetensors", lambda p: save_file({"head_scores": torch.ones(2, 5), "neuron_scores": torch.ones(2, 96)}, p),
     r"heads.*\(2, 5\)"),
])
def test_bad_unit_scores_are_refused_by_name_or_size(tmp_path, name, write, says):
    write(tmp_path / name)
    with pytest.raises(InputError, match=says):
        cutting.prune_units(dense_checkpoint(), tmp_path / name, tmp_path / "out", head_ratio=0.4)
    assert not (tmp_path / "out").exists()


def test_ratios_cut_the_lowest_scores_of_every_block_and_the_file_shrinks(tmp_path, data):
    found = dense_checkpoint()
    scores = scoring.score_units(found, data, tmp_path / "u.safetensors", images=32,
                                 config=dataclasses.replace(FEW, batch_size=16))
    small = cutting.prune_units(found, tmp_path / "u.safetensors", tmp_path / "out", head_ratio=0.4, neuron_ratio=0.5,
                                rho=0.25)
    for index, block in enumerate(small.plan.blocks):
        assert set(block.heads) == set(scores.heads[index].topk(int(3 * 0.6)).indices.tolist())
        assert set(block.neurons) == set(scores.neurons[index].topk(48).indices.tolist())
    assert [f.ranked_by
            for f in small.plan.flows()] == ["",
                                             "kept"] or [f.ranked_by for f in small.plan.flows()] == ["kept", "kept"]
    saved = load_file(tmp_path / "out/checkpoint/weights.safetensors")
    dense = sum(p.numel() for p in found.model.parameters())
    # Per block 2 heads of 8 wide leave qkv (with bias) and proj, 48 neurons fc1 (with bias) and fc2; 24 is the width.
    assert dense - sum(t.numel() for t in saved.values()) == 2 * (2 * 8 * (3 * 24 + 3 + 24) + 48 * (24 + 1 + 24))
    assert torch.equal(logits(checkpoint.load(tmp_path / "out").model), logits(small.model))


def test_what_a_model_cant_lose_is_refused_with_its_reason_and_the_rest_is_cut(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "num_heads": 3, "depth": 2, "depth_token_only": 1}
    model = create_model("cait_xxs24_224", num_classes=10, **sizes)
    plan = CompressionPlan.empty(shape_of(model))
    found = steps.Checkpoint(model=model, plan=plan, info={"made_by": {}, "classes": None})
    scores = cutting.UnitScores(heads=torch.rand(2, 3), neurons=torch.rand(2, plan.shape.num_neurons), made_by={})
    with pytest.raises(InputError, match="heads of this model can't be cut: they are mixed"):
        cutting.prune_units(found, scores, tmp_path / "out", head_ratio=0.4, neuron_ratio=0.5)
    windowed = create_model("samvit_base_patch16", img_size=32, patch_size=8, embed_dim=36, num_heads=3, depth=2,
                            num_classes=10, window_size=2)
    no_tokens = steps.Checkpoint(model=windowed, plan=CompressionPlan.empty(shape_of(windowed)), info={})
    with pytest.raises(InputError, match="tokens of this model can't be cut: attention is within windows"):
        cutting.prune_units(no_tokens, scores, tmp_path / "out", neuron_ratio=0.5, rho=0.1)
    small = cutting.prune_units(found, scores, tmp_path / "out", neuron_ratio=0.5)
    for block, ranked in zip(small.plan.blocks, scores.neurons):
        assert block.heads is None and set(block.neurons) == set(ranked.topk(len(ranked) // 2).indices.tolist())


def test_a_published_policy_gives_its_counts_and_only_for_its_depth(tmp_path):
    found = dense_checkpoint(depth=12, num_heads=6, embed_dim=48)
    shape = shape_of(found.model)
    scores = cutting.UnitScores(heads=torch.rand(12, 6), neurons=torch.rand(12, shape.num_neurons), made_by={})
    small = cutting.prune_units(found, scores, tmp_path / "out", policy="deit_small_60")
    policy = POLICIES["deit_small_60"]
    counts = counts_of(small.plan)
    assert counts.neurons.tolist() == [int(shape.num_neurons * (1 - r)) for r in policy[:12]]
    assert counts.heads.tolist() == [int(6 * (1 - r)) for r in policy[12:24]]
    assert [b.tokens.ranked_by for b in small.plan.blocks if b.tokens] == ["all"] * 3
    assert [i for i, b in enumerate(small.plan.blocks) if b.tokens] == [3, 6, 9]
    with pytest.raises(InputError, match="deit_small_60 is for 12 blocks; the model has 2"):
        cutting.prune_units(dense_checkpoint(), scores, tmp_path / "o2", policy="deit_small_60")
    with pytest.raises(InputError, match="'nope' is not known.*deit_base_60"):
        cutting.prune_units(found, scores, tmp_path / "o2", policy="nope")
    with pytest.raises(InputError, match="not both"):
        cutting.prune_units(found, scores, tmp_path / "o2", policy="deit_small_60", rho=0.1)


def budgeted(way: str, found: steps.Checkpoint, folder: Path, **amount: float) -> CompressionPlan:
    """The plan of a way to prune that takes a budget, by random scores."""
    shape, draw = shape_of(found.model), torch.Generator().manual_seed(0)
    if way.startswith("match"):
        return cutting.prune_match(found, folder, read_out=way == "match and read out", **amount).plan
    if way == "units":
        scores = cutting.UnitScores(heads=torch.rand(shape.depth, shape.num_heads, generator=draw),
                                    neurons=torch.rand(shape.depth, shape.num_neurons, generator=draw), made_by={})
        return cutting.prune_units(found, scores, folder, **amount).plan
    save_file({"token_scores": torch.rand(shape.depth, shape.num_patches, generator=draw) + 0.1},
              folder.parent / "s.safetensors")
    return cutting.prune_tokens(found, folder.parent / "s.safetensors", folder, prune_rate=0.0, share=way == "share",
                                **amount).plan


WAYS = ("match", "match and read out", "units", "merge", "share")


@pytest.mark.parametrize("way", WAYS)
def test_an_amount_may_be_a_budget_of_which_as_much_is_used_as_counts_allow(tmp_path, way):
    found = dense_checkpoint(depth=4, img_size=48)
    dense = gmacs(found.plan)
    plan = budgeted(way, found, tmp_path / "a", macs_ratio=0.8)
    assert budgeted(way, found, tmp_path / "b", gmacs=0.8 * dense).blocks == plan.blocks
    shape = shape_of(found.model)
    if way.startswith("match"):                 # all that ratios give
        space = SearchSpace(shape=shape, units=(), tokens="match", read_out=way == "match and read out")
        every = [gmacs(space.plan([ratio])) for ratio in np.linspace(0, 0.5, 501)]
    elif way == "units":
        # GMACs of a neuron
        counts, one = [len(block.neurons) for block in plan.blocks], 2 * shape.embed_dim * shape.num_tokens / 1e9
        assert 0 <= 0.8 * dense - gmacs(plan) < one and max(counts) - min(counts) <= 1
        return
    else:
        scores, _ = scoring.read_scores(tmp_path / "s.safetensors")
        every = [gmacs(prune_and_merge(scores, shape, keep_rate=(centers + 0.5) / shape.num_patches, prune_rate=0.0,
                                       share=way == "share"))
                 for centers in range(1, shape.num_patches)]
    assert gmacs(plan) == max(price for price in every if price <= 0.8 * dense)


@pytest.mark.parametrize("way", WAYS)
def test_a_budget_out_of_range_is_one_line_that_says_the_range(tmp_path, way):
    found = dense_checkpoint(depth=4)
    for amount, named in (({"macs_ratio": 0.01}, "can't be met.*ratios.* from 0.[0-9]* to below 1"),
                          ({"gmacs": 1e3}, "a budget of 1000 gmacs can't be met")):
        with pytest.raises(InputError, match=named) as error:
            budgeted(way, found, tmp_path / "out", **amount)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_where_reading_out_is_enough_for_a_budget_nothing_is_merged(tmp_path):
    plan = budgeted("match and read out", dense_checkpoint(depth=4), tmp_path / "out", macs_ratio=0.99)
    assert [block.tokens for block in plan.blocks] == [None, None, None, ReadOut()]


@pytest.mark.parametrize("way, amount, named", [
    ("match", {"ratio": 0.2, "gmacs": 1.0}, "one of the three is needed"), ("match", {}, "one of the three is needed"),
    ("merge", {"keep_rate": 0.5, "macs_ratio": 0.6}, "a keep rate is given; one of the two"),
    ("merge", {"spans": [(0, 1, 0.5)], "macs_ratio": 0.6}, "a rate for each span is given; one of the two"),
    ("units", {"head_ratio": 0.5, "macs_ratio": 0.6}, "one of the two is needed"),
    ("units", {"gmacs": 1.0, "macs_ratio": 0.6}, "either in GMACs or a ratio")])
def test_two_amounts_are_refused(tmp_path, way, amount, named):
    with pytest.raises(InputError, match=named):
        budgeted(way, dense_checkpoint(depth=4), tmp_path / "out", **amount)


def test_a_search_leaves_a_plan_that_meets_the_budget_and_goes_on_where_it_was_killed(tmp_path, data):
    found = dense_checkpoint()
    options = {"macs_ratio": 0.7, "settings": SHORT, "images": 24, "score_images": 32, "config": FEW}
    study = searching.search(found, data, tmp_path / "a", **options)
    plan = CompressionPlan.load(tmp_path / "a" / searching.PLAN)
    limit = 0.7 * gmacs(CompressionPlan.empty(plan.shape))
    assert 0.98 * limit <= gmacs(plan) <= limit
    assert gmacs(plan) == pytest.approx(study.best.cost, rel=1e-12)
    # on these the best of many was not chosen
    parts = steps.open_data(data).parts(0, report=24)
    worth = PlanObjective(found.model, parts.batches("report", found.model, workers=0))(plan)
    said = searching.reported(tmp_path / "a")
    assert said == plan.made_by["reported"] == {"evaluation": study.best.index,
                                                "images": 7} | {k: pytest.approx(v, rel=1e-5) for k, v in
                                                                                              worth.items()
                                                                if k != "value"}
    assert said["distill_loss"] != study.best.measures["distill_loss"] and said["distill_loss_se"] > 0
    assert plan.made_by["roles"]["choose"] == 7 and study.info["about"]["metric"] == "distill_loss"
    killed = searching.search(found, data, tmp_path / "b",
                              **options | {"settings": dataclasses.replace(SHORT, evaluations=2)})
    assert len(killed.evaluations) == 2
    again = searching.search(found, data, tmp_path / "b", **options)
    assert [(e.policy, e.value, e.by)
            for e in again.evaluations] == [(e.policy, e.value, e.by) for e in study.evaluations]
    assert (tmp_path / "a" / searching.PLAN).read_text() == (tmp_path / "b" / searching.PLAN).read_text()


@pytest.mark.parametrize("compensated", [False, True])
def test_a_search_from_sensitivity_begins_in_the_budget_and_goes_on_where_it_was_killed(tmp_path, data, monkeypatch,
                                                                                        compensated):
    found, options = dense_checkpoint(), {"macs_ratio": 0.7,
                                          "settings": dataclasses.replace(SHORT, initial="sensitivity"), "images": 24,
                                          "score_images": 32, "metric": "distill_loss", "compensate": compensated,
                                          "config": FEW}
    study = searching.search(found, data, tmp_path / "a", **options)
    # half of 3 of the population
    assert [e.by for e in study.evaluations] == ["sensitivity"] + ["population"] * 2 + ["gp"] * 2
    assert study.budget.meets(np.array(study.evaluations[0].policy)).all()
    rows = read_lines(tmp_path / "a" / SENSITIVITY)
    assert {row["dimension"] for row in rows} == {"",
                                                  *study.space.names} and rows[0]["value"] == pytest.approx(0, abs=1e-6)
    assert all(row["loss"] >= 0 and row["saved"] > 0 for row in rows[1:])
    whole, calls = PlanObjective.__call__, []

    def killed(self, plan):
        calls.append(plan)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return whole(self, plan)
    monkeypatch.setattr(PlanObjective, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        searching.search(found, data, tmp_path / "b", **options)
    again = searching.search(found, data, tmp_path / "b", **options)
    # the killed one alone is begun twice; and the report
    assert len(calls) == len(rows) + len(study.evaluations) + 2
    assert [(e.policy, e.value, e.by)
            for e in again.evaluations] == [(e.policy, e.value, e.by) for e in study.evaluations]
    assert read_lines(tmp_path / "b" / SENSITIVITY) == rows


@pytest.mark.parametrize("initial", ["varied", "sensitivity"])
def test_a_search_says_what_it_will_do_and_keeps_to_the_minutes_it_is_given(tmp_path, data, capsys, monkeypatch,
                                                                            initial):
    options = {"macs_ratio": 0.7, "settings": dataclasses.replace(SHORT, initial=initial), "images": 24,
               "score_images": 32, "criterion": "weight", "config": FEW}
    # 7 images at 0.7 of the cost: 70 s a policy
    monkeypatch.setattr(searching, "images_per_second", lambda *args: 0.07)
    cuts = 1 + sum(map(len, levels(searching.SearchSpace(shape=shape_of(tiny()))))) if initial == "sensitivity" else 0

    shown = dataclasses.replace(FEW, quiet=False)

    def said(**changes) -> tuple[str, str]:
        captured = capsys.readouterr()
        searching.search(dense_checkpoint(), data, tmp_path / "s", **options | changes)
        captured = capsys.readouterr()
        return captured.out, captured.err
    assert said(minutes=0.0) == ("", "") if not cuts else True                  # without progress nothing is said
    if cuts:
        with pytest.warns(UserWarning, match=f"alone first, which takes about {cuts * 70 / 60:.1f} minutes, more than "
                                             "the 1 minutes given"):
            searching.search(dense_checkpoint(), data, tmp_path / "s", **options, minutes=1)
    assert len(read_lines(tmp_path / "s/journal.jsonl")) == 1 and searching.reported(tmp_path / "s")["evaluation"] == 0
    out, err = said(config=shown, minutes=100)
    assert out == ""
    assert f"search: 4 policies to measure on 7 images, about {4 * 70 / 60:.1f} minutes; it ends after 100 with" in err
    assert len(read_lines(tmp_path / "s/journal.jsonl")) == 5
    assert "to measure" not in "".join(said(config=shown))                     # nothing is left


def test_a_search_ends_before_the_policy_and_the_report_that_its_minutes_leave_no_room_for(tmp_path, data, monkeypatch):
    ends, plain = [], searching.Study.run
    # 7 images at 0.7 of the cost: 0.7 s a policy
    monkeypatch.setattr(searching, "images_per_second", lambda *args: 7.0)
    monkeypatch.setattr(searching.Study, "run", lambda self, *args, until,
                        **settings: ends.append(until) or plain(self, *args, **settings))
    began = searching.time.monotonic()
    searching.search(dense_checkpoint(), data, tmp_path / "s", macs_ratio=0.7, settings=SHORT, images=24,
                     criterion="weight", minutes=5, config=FEW)
    # two of 0.7 s less, from when the command began
    assert 300 - 1.4 <= ends[0] - began < 301


def test_a_search_never_reads_the_held_out_split(tmp_path, data, monkeypatch):
    read = []
    whole = ImageData.batches

    def watched(self, split, *args, **settings):
        read.append(split)
        return whole(self, split, *args, **settings)
    monkeypatch.setattr(ImageData, "batches", watched)
    searching.search(dense_checkpoint(), data, tmp_path / "s", macs_ratio=0.7, tokens="merge", settings=SHORT,
                     images=24, score_images=32, config=FEW)
    assert set(read) == {"score", "choose", "report"}                           # parts of train


def test_another_model_data_or_budget_in_the_same_folder_is_refused(tmp_path, data):
    options = {"settings": SHORT, "images": 24, "score_images": 32, "config": FEW}
    searching.search(dense_checkpoint(), data, tmp_path / "s", macs_ratio=0.7, **options)
    for change, named in (({"found": dense_checkpoint(seed=1)}, "about"), ({"macs_ratio": 0.8}, "budget"),
                          ({"config": dataclasses.replace(FEW, seed=2)}, "seed"), ({"tokens": "none"}, "space"),
                          ({"metric": "top1_pct"}, "about"),
                          ({"strategy": "random"}, "strategy")):
        found = change.pop("found", dense_checkpoint())
        with pytest.raises(InputError, match=rf"another study \(.*{named}[. ].*, now "):
            searching.search(found, data, tmp_path / "s", **{"macs_ratio": 0.7, **options, **change})


def test_scores_of_something_else_in_the_folder_of_a_study_are_refused(tmp_path, data):
    options = {"macs_ratio": 0.7, "settings": SHORT, "images": 24, "score_images": 32, "config": FEW}
    searching.search(dense_checkpoint(), data, tmp_path / "other", criterion="random", **options)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / scoring.UNIT_SCORES).write_bytes((tmp_path / "other" / scoring.UNIT_SCORES).read_bytes())
    with pytest.raises(InputError, match="unit_scores.safetensors: scores of something else than this study"):
        searching.search(dense_checkpoint(), data, tmp_path / "s", **options)


@pytest.mark.parametrize(("settings", "says"), [
    ({}, "one of the three is needed"), ({"gmacs": 1.0, "macs_ratio": 0.5}, "one of the three is needed"),
    ({"macs_ratio": 0.01}, "can't be met"), ({"gmacs": 99.0}, "can't be met"),
    ({"macs_ratio": 0.7, "tokens": "merge", "published_count": True}, "one selection ratio"),
    ({"macs_ratio": 0.7, "tokens": "melt"}, "melt"), ({"macs_ratio": 0.7, "strategy": "luck"}, "luck"),
    ({"macs_ratio": 0.7, "metric": "joy"}, "joy"), ({"macs_ratio": 0.7, "criterion": "looks"}, "looks"),
    ({"macs_ratio": 0.7, "units": (), "tokens": "none"}, "nothing is searched"),
])
def test_what_can_not_be_searched_is_refused(tmp_path, data, settings, says):
    with pytest.raises(InputError, match=says):
        searching.search(dense_checkpoint(), data, tmp_path / "s", settings=SHORT, images=24, score_images=32,
                         config=FEW, **settings)


def test_a_search_meets_a_budget_that_only_whole_sublayers_can_meet(tmp_path, data):
    options = {"macs_ratio": 0.35, "tokens": "none", "settings": SHORT, "images": 24, "score_images": 32, "config": FEW}
    with pytest.raises(InputError, match="can't be met"):
        searching.search(dense_checkpoint(depth=4), data, tmp_path / "plain", **options)
    study = searching.search(dense_checkpoint(depth=4), data, tmp_path / "s", sublayers=True, compensate=True,
                             **options)
    plan = CompressionPlan.load(tmp_path / "s" / searching.PLAN)
    assert any(block.leaves_out(kind) for block in plan.blocks for kind in ("heads", "neurons"))
    nothing = load_file(tmp_path / "s" / scoring.REPLACEMENTS)["nothing"]
    assert nothing.shape == (4, 2) and [block.nothing for block in plan.blocks] == [
        tuple(kind for kind, zero in zip(("heads", "neurons"), row) if zero and block.leaves_out(kind))
        for row, block in zip(nothing.tolist(), plan.blocks)]
    assert gmacs(plan) == pytest.approx(study.best.cost) and study.budget.meets(np.array([study.best.policy]))[0]


@pytest.mark.parametrize("more", [{"sublayers": True}, {"units": ("heads", "neurons", "widths")}], ids=str)
def test_published_count_knows_no_sublayers_and_no_widths(more):
    found = dense_checkpoint(depth=12)
    space = searching.SearchSpace(shape=shape_of(found.model), tokens="select", settings={"ranked_by": "all"}, **more)
    with pytest.raises(InputError, match="heads and neurons alone"):
        searching.cost_function(space, "published_gmacs", found.model)


def test_published_count_is_a_budget_of_its_own(tmp_path, data):
    found = dense_checkpoint(depth=12)
    space = searching.SearchSpace(shape=shape_of(found.model), tokens="select", settings={"ranked_by": "all"})
    price = searching.cost_function(space, "published_gmacs", found.model)
    shape = shape_of(found.model)
    n, d, m, w = shape.num_tokens, shape.embed_dim, shape.num_neurons, shape.num_heads * shape.head_dim
    assert float(price(np.zeros((1, 25)))[0]) == pytest.approx(12 * (4 * n * d * w + 2 * n * n * w
                                                                     + 2 * n * d * m) / 1e9, rel=1e-12)


def test_sensitivity_cuts_one_dimension_of_one_block_at_a_time(tmp_path, data):
    found = dense_checkpoint()
    rows = comparing.sensitivity(found, data, tmp_path, criteria=("weight", "random"), ratio=0.5, images=24,
                                 score_images=32, metric="distill_loss", config=FEW)
    assert {(r["criterion"], r["dimension"], r["block"]) for r in rows} == (
        {(c, d, b) for c in ("weight", "random") for d in ("neurons", "heads") for b in (0, 1)}
        | {("class attention", "tokens", b) for b in (0, 1)})
    shape = shape_of(found.model)
    removed = {r["dimension"]: r["gmacs_removed"] for r in rows if r["block"] == 0}
    assert removed["neurons"] == pytest.approx(48 * 2 * shape.num_tokens * shape.embed_dim / 1e9, rel=1e-9)
    assert all(r["drop_per_gmac"] == r["drop"] / r["gmacs_removed"] for r in rows)
    assert all(r["drop_se"] >= 0 for r in rows)
    drops = {(r["criterion"], r["dimension"], r["block"]): r["drop"] for r in rows}
    # Tokens that leave after the last block's attention can no longer reach the class token; float32 rounding is left.
    assert abs(drops.pop(("class attention", "tokens", 1))) < 1e-6
    assert all(drop > 1e-6 for drop in drops.values())                          # any other cut moves the output
    assert json.loads(json.dumps(rows)) == read_lines(tmp_path / comparing.SENSITIVITY)


def test_fine_tuning_by_a_plan_in_steps_ends_at_the_plan_and_keeps_training_between(tmp_path, data):
    found = dense_checkpoint()
    study = searching.search(found, data, tmp_path / "s", macs_ratio=0.6, settings=SHORT, images=24, score_images=32,
                             config=FEW)
    plan = study.folder / searching.PLAN
    once = training.finetune(found, data, tmp_path / "once", teacher=found, plan=plan, recipe=small_recipe(),
                             config=FEW)
    turns = training.finetune(found, data, tmp_path / "turns", teacher=found, plan=plan, steps=2,
                              recipe=small_recipe(), config=FEW)
    for run in (once, turns):
        tuned = checkpoint.load(run)
        assert tuned.plan.blocks == CompressionPlan.load(plan).blocks
        assert macs(tuned.plan)["total"] < macs(CompressionPlan.empty(tuned.plan.shape))["total"]
    assert len(read_lines(tmp_path / "turns/training/step-1/log.jsonl")) == 1       # 2 epochs in 2 turns
    again = training.finetune(found, data, tmp_path / "turns", teacher=found, plan=plan, steps=2,
                              recipe=small_recipe(), config=FEW)
    assert torch.equal(logits(checkpoint.load(again).model), logits(checkpoint.load(turns).model))
    with pytest.raises(InputError, match="needs the dense model and a plan"):
        training.finetune(found, data, tmp_path / "x", teacher=found, steps=2, recipe=small_recipe(), config=FEW)


def test_calibration_writes_the_refitted_model_of_the_plan(tmp_path, data):
    found = dense_checkpoint()
    study = searching.search(found, data, tmp_path / "s", macs_ratio=0.6, compensate=True, criterion="reconstruction",
                             settings=SHORT, images=24, score_images=32, config=FEW)
    plan = study.folder / searching.PLAN
    made = calibrating.calibrate(found, data, tmp_path / "out", plan, images=32, config=FEW)
    plain = cutting.prune_plan(found, plan, tmp_path / "plain")
    assert made.plan.blocks == plain.plan.blocks and macs(made.plan) == macs(plain.plan)
    x, _ = next(iter(steps.open_data(data).batches("val", found.model, workers=0)))
    wanted = logits(found.model, x)
    assert (logits(made.model, x) - wanted).norm() < 0.9 * (logits(plain.model, x) - wanted).norm()


def test_a_compensated_search_measures_other_models_than_a_plain_one(tmp_path, data):
    options = {"macs_ratio": 0.6, "settings": SHORT, "metric": "distill_loss", "images": 24, "score_images": 32,
               "config": FEW}
    plain = searching.search(dense_checkpoint(), data, tmp_path / "a", **options)
    better = searching.search(dense_checkpoint(), data, tmp_path / "b", compensate=True, **options)
    assert plain.evaluations[0].policy == better.evaluations[0].policy
    assert better.evaluations[0].value > plain.evaluations[0].value
