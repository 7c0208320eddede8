"""The steps: what is opened, refused and written; the notebooks and commands test that they work together."""
import argparse
import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from training_fixtures import NAME, by_hand, compressed, logits, one_thread, tiny, write_folder  # noqa: F401

from vitlab.models import checkpoint, shape_of
from vitlab.plan import CompressionPlan
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow, read_rows
from vitlab.workbench import cutting, scoring, steps, training

SIZE = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8, "num_classes": 3}


def saved(folder, classes=None):
    dense = tiny()
    return checkpoint.save(folder, dense, CompressionPlan.empty(shape_of(dense)), classes=classes), dense


def test_a_published_checkpoint_opens_by_name_of_its_model(tmp_path):
    model, plan = compressed(boundary="reference", weights="reference")
    torch.save(by_hand(model), tmp_path / "published.pth")
    found = steps.open_model(tmp_path / "published.pth", model=NAME, **SIZE)
    assert torch.equal(logits(found.model), logits(model))
    assert found.plan.tokens_per_block() == plan.tokens_per_block()


def test_a_plain_training_checkpoint_opens_with_the_empty_plan(tmp_path):
    dense = tiny()
    torch.save({"model": dense.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "deit.pth")
    found = steps.open_model(tmp_path / "deit.pth", model=NAME, **SIZE)
    assert torch.equal(logits(found.model), logits(dense)) and not any(b.tokens for b in found.plan.blocks)


def test_a_weights_file_without_the_name_of_its_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="w.pth: a weights file needs the timm name"):
        steps.open_model(tmp_path / "w.pth")


def test_a_data_set_of_other_classes_than_the_checkpoint_was_trained_on_is_refused_not_renumbered(tmp_path):
    saved(tmp_path / "run", classes=["ant", "bee", "dog"])
    write_folder(tmp_path / "data", {"val": 2})                         # ant, bee, cat
    with pytest.raises(InputError, match="its classes are not the model's.*'cat'|'dog'"):
        steps.evaluate(tmp_path / "run", tmp_path / "data", config=RunConfig(device="cpu", quiet=True))


def test_a_class_map_lets_a_folder_hold_some_of_the_models_classes(tmp_path):
    saved(tmp_path / "run", classes=["ant", "bee", "cat"])
    write_folder(tmp_path / "data", {"val": 2}, classes=("cat",))
    (tmp_path / "data" / "class_index.json").write_text(json.dumps({"ant": 0, "bee": 1, "cat": 2}))
    row = steps.evaluate(tmp_path / "run", tmp_path / "data", config=RunConfig(device="cpu", quiet=True, workers=0))
    found, dense = checkpoint.load(tmp_path / "run"), tiny()
    x, y = next(iter(steps.open_data(tmp_path / "data").batches("val", dense, workers=0)))
    assert set(y.tolist()) == {2}
    assert row.top1_pct == 100 * (logits(found.model, x).argmax(1) == 2).double().mean()


@pytest.mark.parametrize(("write", "says"), [
    (lambda p: None, "no such file"),
    (lambda p: p.write_bytes(b"not tensors"), "cut short"),
    (lambda p: save_file({"other": torch.ones(2)}, p), "holds no token_scores"),
    (lambda p: save_file({"token_scores": torch.ones(2, 15)}, p), r"\(2, 15\).*2 blocks of 16 patches"),
])
def test_bad_scores_are_refused_by_name_or_size(tmp_path, write, says):
    saved(tmp_path / "run")
    write(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=says):
        cutting.prune_tokens(tmp_path / "run", tmp_path / "s.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_score_records_what_made_it_and_is_reproducible(tmp_path):
    dense = tiny(num_classes=10)
    found = steps.Checkpoint(model=dense, plan=CompressionPlan.empty(shape_of(dense)), info={})
    here = RunConfig(batch_size=8, device="cpu", quiet=True)
    options = {"images": 20, "config": here}
    first = scoring.score_tokens(found, "digits", tmp_path / "a.safetensors", **options)
    again, made_by = (scoring.score_tokens(found, "digits", tmp_path / "b.safetensors", **options),
                      scoring.read_scores(tmp_path / "b.safetensors"))
    other = scoring.score_tokens(found, "digits", tmp_path / "c.safetensors", images=20,
                                 config=dataclasses.replace(here, seed=1))
    assert torch.equal(first, again) and torch.equal(first, made_by[0]) and not torch.equal(first, other)
    assert made_by[1] == {"data": "digits", "criterion": "gradient", "images": "20", "batch_size": "8",
                          "absolute": "image", "seed": "0"}


def test_a_deployed_model_is_measured_but_not_trained(tmp_path):
    model, plan = compressed(num_classes=10)
    checkpoint.save(tmp_path / "run", steps.deploy(model), plan)
    row = steps.evaluate(tmp_path / "run", "digits", config=RunConfig(device="cpu", quiet=True))
    trained = steps.evaluate(steps.Checkpoint(model=model, plan=plan, info={}), "digits",
                             config=RunConfig(device="cpu", quiet=True))
    assert (row.top1_pct, row.gmacs) == (trained.top1_pct, trained.gmacs)
    with pytest.raises(InputError, match="deployed model no longer trains"):
        training.finetune(tmp_path / "run", "digits", tmp_path / "out", teacher=None, recipe="digits_pm",
                          config=RunConfig(device="cpu"))


def test_speeds_join_the_accuracy_rows_of_the_same_models(tmp_path):
    saved(tmp_path / "run")
    like = ResultRow(model="dense", dataset="d", split="val", top1_pct=50.0)
    steps.append_row(tmp_path / steps.RESULTS, like)
    steps.throughput({"dense": tmp_path / "run"}, repeats=1, out=tmp_path, like=like,
                     config=RunConfig(batch_size=2, device="cpu", quiet=True))
    row, = read_rows(tmp_path / steps.RESULTS)
    assert row.top1_pct == 50 and row.ratio == 1 and row.throughput_img_s > 0 and row.latency_ms > 0


def test_an_unknown_device_is_refused_by_name():
    with pytest.raises(InputError, match="device 'gpu7' can't be used"):
        steps.pick_device("gpu7")
