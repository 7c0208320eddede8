"""The survey of a model without labels, the offers that follow, and the model made ready."""
import dataclasses
import re
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import torch
from training_fixtures import logits, one_thread, tiny, write_easy_folder  # noqa: F401

from vitlab.measure.moments import layers_of
from vitlab.measure.objective import PlanObjective
from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import Match, ReadOut, SharedUpdate
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError, read_lines
from vitlab.training.compensate import layers_to_refit
from vitlab.workbench import calibrating, gathered, steps, tonight
from vitlab.workbench.forwards import refit_cost
from vitlab.workbench.pace import Pace

FEW = RunConfig(device="cpu", quiet=True, workers=0)


@pytest.fixture
def dense():
    model = tiny()
    return steps.Checkpoint(model=model, plan=CompressionPlan.empty(shape_of(model)), info={})


@pytest.fixture
def photographs(tmp_path):
    """A folder of images alone."""
    folder = write_easy_folder(tmp_path / "labelled")
    alone = tmp_path / "photographs"
    alone.mkdir()
    for number, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        shutil.copy(path, alone / f"{number:03d}.png")
    return alone


@pytest.fixture
def survey(dense, photographs, tmp_path):
    return tonight.Survey(dense, photographs, tmp_path / "survey", images=16, score_images=24, config=FEW)


def test_offers_meet_their_budget_and_say_what_they_are_worth(survey, dense):
    whole = gmacs(CompressionPlan.empty(survey.shape))
    offers = list(survey.offers(ratios=(0.8, 0.6)))
    assert {offer.rule for offer in offers} == set(tonight.RULES)
    left = [len(block.neurons) for offer in offers for block in offer.plan.blocks if block.neurons is not None]
    assert left and all(count % 8 == 0 for count in left)          # as kernels like
    for offer in offers:
        assert offer.gmacs == gmacs(offer.plan) <= 0.8 * whole and isinstance(offer.plan.blocks[-1].tokens, ReadOut)
    joint = next(offer for offer in offers[::-1] if offer.rule == "merging by content")
    assert any(isinstance(block.tokens, Match) for block in joint.plan.blocks[:-1])
    small = deploy(compress(dense.model, joint.plan))

    def measured(batches) -> tuple[int, list[float]]:
        """(images with the dense model's class, each one's distance to its output)."""
        p, q = (torch.cat([logits(model, images) for images, _ in batches]).double() for model in (dense.model, small))
        each = (p.softmax(dim=1) * (p.log_softmax(dim=1) - q.log_softmax(dim=1))).sum(dim=1)
        return int((p.argmax(dim=1) == q.argmax(dim=1)).sum()), each.tolist()
    same, each = measured(survey.reporting.batches)
    assert len(each) == 7 and joint.agree_pct == pytest.approx(100 * same / 7)
    # of a distance of 1e-5, from float32 logarithms
    rounded = {"rel": 1e-3, "abs": 1e-7}
    assert joint.distill_loss == pytest.approx(sum(each) / 7, **rounded)
    share = (same + 2) / 11
    assert joint.agree_se == pytest.approx(100 * (share * (1 - share) / 11) ** 0.5)
    assert joint.distill_loss_se == pytest.approx((sum((v - sum(each) / 7) ** 2 for v in each) / 6 / 7) ** 0.5,
                                                  **rounded)
    chosen = sum(measured(survey.objective.batches)[1]) / 7
    assert joint.chosen_by == pytest.approx(chosen, **rounded) and abs(chosen - joint.distill_loss) > 3e-7


def test_what_an_offer_is_worth_is_said_of_images_that_served_nothing_before(survey):
    found = [{survey.parts.split(role).path(i) for i in range(count)} for role,
             count in survey.parts.roles.items() if role != "shared"]
    assert list(map(len, found)) == [24, 7, 7] and len(set.union(*found)) == 38
    assert sum(len(x) for x, _ in survey.reporting.batches) == sum(len(x) for x, _ in survey.objective.batches) == 7


def test_scores_moments_and_offers_are_kept_as_they_are_made(survey, dense, photographs, tmp_path, monkeypatch):
    plan = survey.plan("all together", 0.6 * gmacs(CompressionPlan.empty(survey.shape)))
    offer = survey.offer("all together", plan)
    files = {path.name.rsplit("-", 1)[0] for path in survey.folder.iterdir() if path.is_file()}
    # no rule so far needs scores of tokens
    assert files == {"unit-scores", "costs", "measured"} and len(list(survey.folder.glob("moments-*/*"))) == 4
    kept = survey.token_scores

    def never(*args, **settings):
        raise AssertionError("it was made before")
    with monkeypatch.context() as patched:
        for name in ("scores_by_moments", "token_scores", "each_moments", "own_labels", "fisher"):
            patched.setattr(gathered, name, never)
        again = tonight.Survey(dense, photographs, tmp_path / "survey", images=16, score_images=24, config=FEW)
        assert again.scores.keys() == survey.scores.keys() and again.reporting.images == 7
        assert torch.equal(again.token_scores, kept)
    assert again.objective(plan) == survey.objective(plan)                     # moments and scores came back to the bit
    monkeypatch.setattr(PlanObjective, "__call__", never)
    assert again.offer("all together", plan) == offer
    with pytest.raises(AssertionError, match="made before"):
        again.offer("all together", CompressionPlan.empty(survey.shape))


def test_a_killed_tonight_keeps_what_it_had(dense, photographs, tmp_path, monkeypatch):
    def killed(*args, **settings):
        raise KeyboardInterrupt
    monkeypatch.setattr(gathered, "token_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        tonight.tonight(dense, photographs, tmp_path / "out", images=16, rules=("shared updates",), config=FEW)
    kept = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "out" / tonight.SURVEY).iterdir()
                  if path.is_file())
    assert kept == ["amounts.json", "costs", "unit-scores"]


def test_a_budget_that_no_rule_meets_is_refused_before_anything_is_scored(dense, photographs, tmp_path):
    with pytest.raises(InputError, match="a budget of 1e-05 GMACs can't be met"):
        tonight.tonight(dense, photographs, tmp_path / "out", gmacs=1e-5, images=16, config=FEW)
    assert not (tmp_path / "out").exists()


def test_a_cut_is_measured_once_for_all_rules_and_not_again_after_a_kill(survey, dense, photographs, tmp_path,
                                                                         monkeypatch):
    cuts, measure = [], tonight.Survey._measure
    monkeypatch.setattr(tonight.Survey, "_measure", lambda self, problem,
                        policy: cuts.append(policy) or measure(self, problem, policy))
    survey.curves("neurons")
    survey.curves("merging by content")
    before = len(cuts)
    rows = survey.curves("all together")
    heads = [row for row in rows if row["dimension"].startswith("heads")]
    assert len(cuts) - before == len(heads) > 0                 # neurons, tokens and the uncut model were known
    again = tonight.Survey(dense, photographs, tmp_path / "survey", images=16, score_images=24, config=FEW)
    before = len(cuts)
    assert again.curves("all together") == rows and len(cuts) == before
    other = tonight.Survey(dense, photographs, tmp_path / "survey", images=5, score_images=24, config=FEW)
    other.curves("neurons")
    assert len(cuts) > before                                   # other images, other curves


def test_the_search_starts_from_the_offer_and_the_plan_of_tokens_alone(survey):
    whole = gmacs(CompressionPlan.empty(survey.shape))
    limit = 0.6 * whole
    uncut, = survey.search("all together", whole, 6)                            # nothing has to be cut
    assert survey.offer("", uncut).agree_pct == 100
    plans = survey.search("all together", limit, 6)
    lines = list(read_lines(next(survey.folder.glob("*/journal.jsonl"))))
    assert all(gmacs(plan) <= limit for plan in plans) and [line["by"] for line in lines[:2]] == ["sensitivity"] * 2
    assert [plan.made_by["evaluation"]
            for plan in plans] == [line["index"] for line in sorted(lines, key=lambda line: -line["value"])]
    by_number = {plan.made_by["evaluation"]: plan for plan in plans}
    first, alone = (dataclasses.replace(plan, made_by={})
                    for plan in (survey.plan("all together", limit), survey._even(limit)))
    assert dataclasses.replace(by_number[0],
                               made_by={}) == first and dataclasses.replace(by_number[1], made_by={}) == alone


def test_a_time_that_is_over_ends_a_search_with_what_it_has(survey):
    limit = 0.6 * gmacs(CompressionPlan.empty(survey.shape))
    assert len(survey.search("all together", limit, 6, until=0.0)) == 1
    assert len(survey.search("all together", limit, 6)) == 6                    # and it goes on from there


def worth(survey, plan, form) -> np.ndarray:
    """Each image's distance, of the plan's model refitted by the book."""
    model = calibrating.in_form(form, survey.found.model, plan, survey.batches, costs=survey.costs, progress=False)
    return np.array(survey.choosing.each(deploy(model)))


def test_a_plan_is_left_for_a_gain_beyond_its_error_alone(survey, monkeypatch):
    limit, calls = 0.6 * gmacs(CompressionPlan.empty(survey.shape)), []
    plans = [survey.plan("merging by content", limit), survey.plan("neurons", limit),
             survey.plan("all together", limit)]
    def left(each: list[np.ndarray]) -> int:
        """Which one is kept, from the first on."""
        kept = 0
        for number in range(1, len(each)):
            gain = each[kept] - each[number]
            kept = number if gain.mean() > gain.std(ddof=1) / len(gain) ** 0.5 else kept
        return kept
    forms = [min(calibrating.forms_of(plan), key=lambda form: worth(survey, plan, form).mean()) for plan in plans]
    wanted = left([worth(survey, plan, form) for plan, form in zip(plans, forms)])
    assert survey.best(plans) == (plans[wanted], forms[wanted])
    monkeypatch.setattr("vitlab.workbench.calibrating.compensate", lambda *args, **settings: calls.append(args))
    assert survey.best(plans) == (plans[wanted], forms[wanted]) and not calls   # they are measured once
    noisy = [np.array([1.0, 1.2, 1.1, 0.9]) - gain for gain in (0, np.array([0.5, -0.4, 0.4, -0.4]), 0.001)]
    monkeypatch.setattr(survey, "_apart", lambda plan, form: noisy[plans.index(plan)])
    # little, but of every image; the second's is luck
    assert survey.best(plans)[0] == plans[2]


def test_the_best_offer_is_the_nearest_within_the_budget(survey):
    plan = CompressionPlan.empty(survey.shape)
    offers = [tonight.Offer(rule=rule, plan=plan, gmacs=cost, agree_pct=0.0, distill_loss=1 - loss, chosen_by=loss)
              for rule, cost,
              loss in (("neurons", 0.5, 0.3), ("shared updates", 0.6, 0.1), ("all together", 0.7, 0.01))]
    assert tonight.best_offer(offers, 0.6).rule == "shared updates"
    with pytest.raises(InputError, match="no plan was found that costs 0.1 GMACs or less; 0.5 is the least"):
        tonight.best_offer(offers, 0.1)


def test_from_images_alone_to_a_deployed_model(dense, photographs, tmp_path):
    found = tonight.tonight(dense, photographs, tmp_path / "out", macs_ratio=0.6, rules=("merging by content",),
                            ratios=(0.8,), evaluations=3, images=16, score_images=24, config=FEW)
    assert gmacs(found.plan) <= 0.6 * gmacs(CompressionPlan.empty(found.plan.shape))
    read = checkpoint.load(tmp_path / "out" / tonight.DEPLOYED)
    x = torch.randn(2, 3, *found.plan.shape.img_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(read.model, x),
                       logits(found.model, x)) and np.isfinite(found.info["made_by"]["distance_refitted_se"])
    worth, roles = found.plan.made_by["reported"], found.info["made_by"]["roles"]
    assert {"agree_pct", "agree_se", "distill_loss", "distill_loss_se",
            "chosen_by"} == set(worth) and roles["report"] == 7
    rows = list(read_lines(tmp_path / "out" / tonight.OFFERS))
    assert all(row["agree_se"] > 0 and row["distill_loss_se"] > 0 for row in rows)
    assert [row["rule"]
            for row in rows] == ["merging by content"] * 2 and (tmp_path / "out/offers.png").stat().st_size > 0
    assert CompressionPlan.from_json(rows[0]["plan"]).shape == found.plan.shape


SMALL = {"macs_ratio": 0.6, "rules": ("neurons",), "ratios": (), "score_images": 24}


def test_a_time_that_is_too_little_is_said_and_there_are_fewer_evaluations_and_images(dense, photographs, tmp_path,
                                                                                      monkeypatch):
    given, searched, plain = [], [], tonight.Survey.search

    class Noted(tonight.Survey):
        def __init__(self, *args, images, **settings) -> None:
            given.append(images)
            super().__init__(*args, images=images, **settings)

        def search(self, rule, gmacs, evaluations, until):
            searched.append(evaluations)
            return plain(self, rule, gmacs, evaluations, until)
    monkeypatch.setattr(tonight, "Survey", Noted)
    monkeypatch.setattr(tonight, "images_per_second", lambda *args: 1.0)
    with pytest.warns(UserWarning, match="images to compare plans on take about .*; fewer score_images, rules or "
                                         "ratios"), \
            pytest.warns(UserWarning, match="^24 images to refit on: of fewer than 100 it is uncertain which form is "
                                            "the nearest"):
        found = tonight.tonight(dense, photographs, tmp_path / "out", evaluations=30, images=100, minutes=0.01, **SMALL,
                                config=FEW)
    assert given == [100, 64] and searched == [10]
    assert len(read_lines(next((tmp_path / "out").rglob("journal.jsonl")))) == 1            # its time was over
    assert found.info["made_by"]["minutes"] == 0 and "distance_distilled" not in found.info["made_by"]
    assert gmacs(found.plan) <= 0.6 * gmacs(CompressionPlan.empty(found.plan.shape))


def test_what_is_left_of_the_time_is_self_distillation_and_stages_are_said_before(dense, photographs, tmp_path,
                                                                                  monkeypatch, capsys):
    trained, plain, add = [], Pace.stage, Pace.add
    stages, moved = [], Counter()
    monkeypatch.setattr("vitlab.workbench.calibrating.self_distil", lambda *args, minutes,
                        **settings: trained.append(minutes))
    monkeypatch.setattr(Pace, "stage", lambda self, name: stages.append(name) or plain(self, name))
    monkeypatch.setattr(Pace, "add", lambda self, done: moved.update(stages[-1:]) or add(self, done))
    began = time.monotonic()
    tonight.tonight(dense, photographs, tmp_path / "out", evaluations=2, images=16, minutes=100, **SMALL,
                    config=dataclasses.replace(FEW, quiet=False))
    passed, err = (time.monotonic() - began) / 60, capsys.readouterr().err
    # less what the rest took, and the last refit may yet
    assert len(trained) == 1 and 100 - 2 * passed < trained[0] < 100
    assert moved["scores"] > 2 * len(layers_of(dense.model))        # moments of each layer, and its units in order
    assert len(read_lines(next((tmp_path / "out").rglob("journal.jsonl")))) == 2            # there was time for all
    said = re.search(r"tonight: 7 stages, about 100.0 minutes at \d+ images a second \((.*)\)", err).group(1)
    assert re.findall(r"([a-z -]+) \d+ %", said.replace(", ", ",")) == stages and stages[-1] == "self-distillation"
    assert re.findall(r"tonight (\d)/7, ([a-z -]+):", err)[-1] == ("7", "self-distillation")
    again = tonight.tonight(dense, photographs, tmp_path / "out", evaluations=2, images=16, **SMALL, config=FEW)
    assert len(trained) == 1 and again.info["made_by"]["minutes"] == 0          # without a time, none of it
    assert capsys.readouterr() == ("", "")


def test_a_refit_moves_the_bar_layer_by_layer(survey, monkeypatch):
    done, (space, _) = [], survey._problem("heads and neurons")
    plan = survey.plan_of(space, np.full(space.size, 0.5))
    with Pace("a refit", {"refit": 100.0}, 1.0, progress=False) as pace:
        monkeypatch.setattr(survey, "pace", pace)
        monkeypatch.setattr(pace, "add", done.append)
        survey.in_form(calibrating.REFITTED, plan)
    layers = layers_to_refit(plan, every=False)
    assert len(done) == len(layers) > 2 and sum(done) == pytest.approx(refit_cost(survey.shape, 24))


def test_a_compressed_model_or_an_unknown_rule_is_refused(survey, dense, photographs, tmp_path):
    with pytest.raises(InputError, match="rule 'pruning' is not known.*merging by content"):
        survey.curves("pruning")
    plan = survey.plan("merging by content", 0.7 * gmacs(CompressionPlan.empty(survey.shape)))
    small = steps.Checkpoint(model=compress(dense.model, plan), plan=plan, info={})
    with pytest.raises(InputError, match="already compressed"):
        tonight.Survey(small, photographs, tmp_path / "other", config=FEW)


def test_the_same_folder_takes_another_number_of_evaluations(survey):
    limit = 0.6 * gmacs(CompressionPlan.empty(survey.shape))
    many = survey.search("all together", limit, 9)
    assert len(many) == 9 and survey.search("all together", limit, 4) == many  # what is there is not thrown away


def test_images_prepared_otherwise_are_another_survey(survey, dense, photographs, tmp_path):
    dense.model.pretrained_cfg = dense.model.pretrained_cfg | {"std": (0.3, 0.3, 0.3)}
    again = tonight.Survey(dense, photographs, tmp_path / "survey", images=16, score_images=24, config=FEW)
    assert again.inputs != survey.inputs


def test_amounts_once_shrunk_stay_so_however_fast_the_machine_is_then(tmp_path):
    asked = {"evaluations": 40, "finalists": 2, "images": 32}
    shrunk = {"evaluations": 10, "finalists": 1, "images": 32}
    path = tmp_path / "amounts.json"
    assert tonight._amounts(path, asked, shrink=True) == shrunk == tonight._amounts(path, asked, shrink=False)
    other = asked | {"images": 100}
    assert tonight._amounts(path, other, shrink=False) == other


def test_what_takes_too_long_is_shrunk_and_said(dense, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(tonight, "images_per_second", lambda *given: 0.1)
    with pytest.warns(UserWarning, match="would take about .* minutes, and there are 60: 1 evaluations, 1 finalist and "
                                         "16 images"):
        made = tonight.tonight(dense, photographs, tmp_path / "out", macs_ratio=0.6, rules=("merging by content",),
                               ratios=(), images=16, score_images=24, evaluations=1, config=FEW)
    assert CompressionPlan.load(tmp_path / "out" / tonight.PLAN, made.plan.shape).blocks == made.plan.blocks
    with pytest.raises(InputError, match="finalists is 0"):
        tonight.tonight(dense, photographs, tmp_path / "out", finalists=0, config=FEW)


def test_forms_that_refit_the_same_layers_are_one(dense):
    def forms(*blocks: BlockPlan) -> tuple[str, ...]:
        return calibrating.forms_of(CompressionPlan(shape=shape_of(dense.model), blocks=blocks))
    cut, merged = {"heads": (0, 2), "neurons": tuple(range(48))}, BlockPlan(tokens=Match(merged=4))
    assert forms(BlockPlan(**cut), BlockPlan(**cut)) == ("cut", "refitted")
    assert forms(BlockPlan(**cut), BlockPlan()) == ("cut", "refitted", "refitted throughout")
    assert forms(merged, BlockPlan(tokens=Match(merged=0))) == ("cut", "refitted throughout")
    assert forms(BlockPlan(), BlockPlan(tokens=ReadOut())) == ("cut",)


def test_a_model_with_one_head_has_no_curve_of_heads(photographs, tmp_path):
    model = tiny(num_heads=1)
    found = steps.Checkpoint(model=model, plan=CompressionPlan.empty(shape_of(model)), info={})
    survey = tonight.Survey(found, photographs, tmp_path / "one", images=16, score_images=24, config=FEW)
    plan = survey.plan("all together", 0.7 * gmacs(CompressionPlan.empty(survey.shape)))
    assert all(block.heads is None for block in plan.blocks)


def test_shared_updates_of_a_survey_prune_no_token(survey):
    plan = survey.plan("shared updates", 0.7 * gmacs(CompressionPlan.empty(survey.shape)))
    rules = [block.tokens for block in plan.blocks if isinstance(block.tokens, SharedUpdate)]
    assert rules and all(min(rule.regions) >= 0 for rule in rules)
