"""Models without a class token, with registers in its place or no prefix token at all: every default works, and what
needs one says so."""
import dataclasses
import json

import pytest
import torch
from training_fixtures import logits, one_thread, tiny, write_easy_folder  # noqa: F401

from vitlab.measure.capture import token_scores
from vitlab.models import compress, shape_of
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.rules import PROTECT, Match, Select
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.search.strategies import Settings
from vitlab.search.token_dimensions import default_tokens, token_dimensions
from vitlab.workbench import comparing, cutting, scoring, searching, steps, tonight

FEW = RunConfig(device="cpu", quiet=True, workers=0)
KINDS = {"no prefix token": {"class_token": False, "global_pool": "avg"},
         "registers alone": {"class_token": False, "reg_tokens": 3, "global_pool": "avg"}}
SHORT = Settings(population=2, evaluations=2, candidates=20, refinements=1)


@pytest.fixture(params=list(KINDS))
def found(request):
    model = tiny(**KINDS[request.param])
    return steps.Checkpoint(model=model, plan=CompressionPlan.empty(shape_of(model)), info={})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_easy_folder(tmp_path_factory.mktemp("easy"))


def with_rule(shape, rule) -> CompressionPlan:
    return CompressionPlan(shape=shape, blocks=(BlockPlan(tokens=rule),) * shape.depth)


def test_a_class_token_is_known_from_the_model_and_stored_where_the_number_of_prefix_tokens_does_not_say_it(found):
    shapes = [shape_of(found.model), shape_of(tiny()), shape_of(tiny(reg_tokens=3))]
    assert [shape.class_token for shape in shapes] == [False, True, True]
    assert [shape.stored().get("class_token") for shape in shapes] == [False if shapes[0].num_prefix_tokens else None,
                                                                       None, None]
    for shape in shapes:
        assert CompressionPlan.from_json(json.loads(CompressionPlan.empty(shape).to_json())).shape == shape


def test_defaults_follow_from_the_model(found):
    shape = shape_of(found.model)
    assert default_tokens(shape) == "match" and default_tokens(shape_of(tiny())) == "select"
    assert default_tokens(dataclasses.replace(shape_of(tiny()), decoder="linear")) == "match"
    assert token_dimensions("match", shape,
                            {}).protect == 0 and token_dimensions("match", shape_of(tiny()), {}).protect == PROTECT


def test_what_ranks_by_the_class_token_is_refused_by_name_with_what_needs_none(found, data, tmp_path):
    shape, batches = shape_of(found.model), steps.open_data(data).batches("train", found.model, limit=8, workers=0)
    with pytest.raises(InputError,
                       match=r"^block 0: tokens are selected by the class token.*has no class token.*match"):
        with_rule(shape, Select(kept=5))
    with pytest.raises(InputError, match="^block 0: tokens are protected by the class token.*has no class token: "
                                         "protect 0"):
        with_rule(shape, Match(merged=1))
    with pytest.raises(InputError, match="class_attention needs a class token; the model has none: gradient and hsic"):
        token_scores(found.model, batches, criterion="class_attention", progress=False)
    for run in (lambda: searching.search(found, data, tmp_path / "s", macs_ratio=0.8, tokens="select", images=16,
                                         score_images=16, config=FEW),
                lambda: cutting.prune_units(found,
                                            scoring.score_units(found, data, tmp_path / "u", criterion="weight",
                                                                config=FEW),
                                            tmp_path / "p", rho=0.3)):
        with pytest.raises(InputError, match="tokens are selected by the class token.*has no class token: match, "
                                             "share, merge or none"):
            run()


def test_a_plan_of_a_model_with_a_class_token_is_refused_where_it_ranks_by_it_and_taken_where_it_does_not():
    model = tiny(**KINDS["registers alone"])
    other = dataclasses.replace(shape_of(model), class_token=True)              # as plans for such models once said
    with pytest.raises(InputError, match="block 0: tokens are selected by the class token.*has no class token"):
        compress(model, CompressionPlan(shape=other, blocks=(BlockPlan(tokens=Select(kept=5)), BlockPlan())))
    heads = CompressionPlan(shape=other, blocks=(BlockPlan(heads=(0, 2)), BlockPlan()))
    assert compress(model, heads).blocks[0].attn.num_heads == 2


def test_scores_cuts_and_a_search_that_name_no_rule_run(found, data, tmp_path):
    scores = scoring.score_units(found, data, tmp_path / "units", criterion="weight", config=FEW)
    small = cutting.prune_units(found, scores, tmp_path / "pruned", head_ratio=0.4)
    assert small.plan.blocks[0].heads is not None and small.plan.blocks[0].tokens is None
    rows = comparing.sensitivity(found, data, tmp_path / "s", criteria=(), ratio=0.4, images=16, score_images=16,
                                 config=FEW)
    assert {(r["criterion"], r["block"]) for r in rows if r["dimension"] == "tokens"} == {("alike keys", 0),
                                                                                          ("alike keys", 1)}
    study = searching.search(found, data, tmp_path / "search", macs_ratio=0.75, settings=SHORT, images=16,
                             score_images=16, config=FEW)
    plan = study.space.plan(study.best.policy, **{k: getattr(scores, k) for k in ("heads", "neurons")})
    assert study.space.tokens == "match" and {type(b.tokens) for b in plan.blocks} <= {type(None), Match}
    images = torch.randn(2, 3, *plan.shape.img_size, generator=torch.Generator().manual_seed(0))
    assert logits(compress(found.model, plan), images).isfinite().all()


@pytest.mark.parametrize("found", ["registers alone"], indirect=True)
def test_tonight_gives_a_model_that_no_register_ranks_for(found, data, tmp_path):
    dense = gmacs(CompressionPlan.empty(shape_of(found.model)))
    made = tonight.tonight(found, data, tmp_path / "t", macs_ratio=0.7, rules=("merging by content",), ratios=(),
                           evaluations=0, images=16, score_images=16, config=FEW)
    assert gmacs(made.plan) <= 0.7 * dense
    assert {block.tokens.protect for block in made.plan.blocks if isinstance(block.tokens, Match)} == {0.0}
