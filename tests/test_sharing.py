"""A run on the hub, by a server on this machine that speaks its API, and in a folder: what is there, what its page
says, and that it opens as the very model."""
import dataclasses
import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, Hub, serving
from huggingface_hub import ModelCard, constants
from segmenting_fixtures import match_plan, small
from timm.models._hub import load_model_config_from_path
from training_fixtures import full_plan, logits, one_thread, tiny  # noqa: F401

import vitlab
from vitlab import cli
from vitlab.models import checkpoint, compress, shape_of
from vitlab.models.opening import open_model
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow, append_row
from vitlab.workbench.card import _cut
from vitlab.workbench.sharing import push

NAMES = ["ant", "bee", "cat"]
FILES = {"README.md", "checkpoint.json", "config.json", "plan.json", "weights.safetensors"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A compressed model of a study, with its rows, and a file for a runtime."""
    folder, model = tmp_path_factory.mktemp("study") / "small", tiny()
    plan = full_plan(model)
    checkpoint.save(folder / checkpoint.FOLDER, compress(model, plan), plan, classes=NAMES,
                    made_by={"step": "finetune", "recipe": {"name": "digits", "epochs": 3}, "data": "insects"})
    (folder / "small.onnx").write_bytes(b"a file for ONNX Runtime")
    (folder / "small.txt").write_text("a note")
    append_row(folder.parent / "results.jsonl", ResultRow(
        model="small", dataset="insects", split="val", top1_pct=81.25, top1_se=1.5, gmacs=cost.gmacs(plan), conditions={
            "device": "cpu", "images": 640, "prepared": "32 x 32", "versions": {"torch": "2"}}))
    append_row(folder.parent / "results.jsonl", ResultRow(
        model="small", dataset="insects", split="val", throughput_img_s=1234.5, ratio=1.6,
        conditions={"speed": {"batch_size": 32, "device": "a|b CPU", "threads": 2, "repeats": 10,
                              "ratio_range": [1.5, 1.7]}}))
    append_row(folder.parent / "results.jsonl", ResultRow(model="other", dataset="insects", split="val", top1_pct=99.0))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            found.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_a_run_is_one_commit_and_opens_from_the_hub_as_the_very_model(run, hub: Hub):
    said = push(run, "me/ants")
    assert said.startswith("hf-hub:me/ants: README.md, checkpoint.json, ") and hub.commits == [
        sorted([*FILES, "small.onnx"])]
    assert hub.repositories["me/ants"]["weights.safetensors"] == (
        run / "checkpoint" / "weights.safetensors").read_bytes()
    dense = checkpoint.load(run)
    for found in (vitlab.load("hf-hub:me/ants"), open_model("hf-hub:me/ants")):
        assert torch.equal(logits(found.model), logits(dense.model)) and found.plan == dense.plan
        assert found.info["classes"] == NAMES
    with pytest.raises(InputError, match="hf-hub:me/ants holds a model of its own sizes; num_classes is for weights"):
        open_model("hf-hub:me/ants", num_classes=5)


def test_a_second_push_adds_a_commit_to_the_same_repository_and_a_private_one_is_made_so(run, hub: Hub):
    for _ in range(2):
        push(run, "me/ants")
        push(run, "me/bees", private=True)
    assert len(hub.commits) == 4 and hub.private == ["me/bees"]
    with pytest.raises(InputError, match="hf-hub:me/ants: others can see it, and private is asked for"):
        push(run, "me/ants", private=True)
    assert len(hub.commits) == 4


def test_a_folder_holds_what_would_be_pushed_and_opens_alike(run, tmp_path):
    said = push(run, "me/ants", out=tmp_path / "hub")
    assert said.startswith(f"{tmp_path / 'hub'}: README.md")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {*FILES, "small.onnx"}
    found = vitlab.load(tmp_path / "hub")
    assert torch.equal(logits(found.model), logits(checkpoint.load(run).model))
    (tmp_path / "hub" / "old.onnx").touch()
    push(run, "me/ants", out=tmp_path / "hub")
    assert not (tmp_path / "hub" / "old.onnx").exists()


def test_a_folder_that_holds_anything_else_is_refused_and_left_alone(run, tmp_path):
    for out in (run, run / "checkpoint", run.parent, run.parent.parent):
        with pytest.raises(InputError, match=f"^{out}: the run itself, or a folder it lies in; another folder is"):
            push(run / "checkpoint", "me/ants", out=out)
    (tmp_path / "photographs").mkdir()
    push(run, "me/ants", out=tmp_path / "photographs")          # was empty
    (tmp_path / "thesis").mkdir()
    for name, content in (("chapter.tex", "all of it"), ("config.json", "{}"), ("config.json", "[")):
        (tmp_path / "thesis" / name).write_text(content)
        for out in (tmp_path / "thesis", tmp_path / "thesis" / name):
            with pytest.raises(InputError, match=f"^{out}: is there, and holds no model that was pushed"):
                push(run, "me/ants", out=out)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "all of it"


def test_config_json_is_timms_of_the_dense_part_with_its_images_and_classes(run, tmp_path):
    push(run, "me/ants", out=tmp_path / "hub")
    config, name, args = load_model_config_from_path(tmp_path / "hub")
    dense = vitlab.create_model(name, **args, num_classes=config["num_classes"]) if "num_classes" not in args else \
        vitlab.create_model(name, **args)
    plan = CompressionPlan.load(tmp_path / "hub" / "plan.json", shape_of(dense))
    assert compress(dense, plan).state_dict().keys() == checkpoint.load(run).model.state_dict().keys()
    assert config["label_names"] == NAMES
    assert {key: tuple(config[key]) for key in ("mean", "std")} == {
        key: tuple(dense.pretrained_cfg[key]) for key in ("mean", "std")}


def test_the_page_says_what_was_measured_and_nothing_else(run, tmp_path):
    push(run, "me/ants", out=tmp_path / "hub", licence="apache-2.0")
    card, plan = ModelCard.load(tmp_path / "hub" / "README.md"), checkpoint.load(run).plan
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == ("apache-2.0", "image-classification",
                                                                                   "vitlab")
    result, = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name, result.dataset_split) == (
        "accuracy", 81.25, "insects", "val")
    text = card.text
    for says in ("81.25 ± 1.50", "1234.5", "1.60 (1.50 to 1.70)", "images 640", "speed.device a|b CPU",
                 f"| this model | {cost.gmacs(plan):.4f} | ",
                 f"| dense | {cost.gmacs(CompressionPlan.empty(plan.shape)):.4f} |",
                 "heads, neurons, tokens of 2 of 2 blocks cut", "- step: \"finetune\"", "- recipe.epochs: 3",
                 'vitlab.load("hf-hub:me/ants")', "- `small.onnx`", "apache-2.0"):
        assert says in text, says
    assert "99.0" not in text and "small.txt" not in text and str(tmp_path) not in text and str(run) not in text


def test_only_rows_that_name_the_run_count_and_those_of_all_images_alone_are_metadata(run, tmp_path, monkeypatch):
    """However it was named: by the run's name, or a path to it or its checkpoint, from anywhere."""
    study = shutil.copytree(run.parent, tmp_path / "study")
    small = study / "small"
    for model, top1, more in (("dense", 99.0, {}), (str(small / "checkpoint"), 55.0, {}),
                              ("runs/elsewhere/small", 98.0, {}), ("../study/small", 40.0, {"quick": True}),
                              ("study/small", 45.0, {"limit": 100}), ("small (compiled)", None, {})):
        append_row(small / "results.jsonl", ResultRow(
            model=model, dataset="town", split=f"of {model.count('/')}", top1_pct=top1, conditions=more,
            throughput_img_s=None if top1 else 77.5))
    for pushed in (small, small / "checkpoint"):
        push(pushed, "me/ants", out=tmp_path / "hub")
        card = ModelCard.load(tmp_path / "hub" / "README.md")
        assert [result.metric_value for result in card.data.eval_results] == [55.0]
        assert "98.0" not in card.text and "99.0" not in card.text and "81.25" not in card.text
        assert all(f"| small | town | of {number}" in card.text for number in (1, 2)) and "quick" in card.text
        assert "| small (compiled) | town" in card.text and (tmp_path / "hub" / "small.onnx").is_file()
    (small / "results.jsonl").unlink()
    monkeypatch.chdir(study)
    push("small/checkpoint", "me/ants", out=tmp_path / "hub")
    result, = ModelCard.load(tmp_path / "hub" / "README.md").data.eval_results
    assert result.metric_value == 81.25


def test_a_plan_that_cuts_widths_of_queries_alone_says_so():
    shape = shape_of(tiny())
    blocks = (dataclasses.replace(BlockPlan(), qk_width=1), BlockPlan())
    assert _cut(CompressionPlan(shape=shape, blocks=blocks)) == "widths of queries of 1 of 2 blocks cut"


def test_a_model_that_was_not_measured_is_said_to_be_and_a_licence_that_is_not_known_too(tmp_path):
    model = tiny()
    model.pretrained_cfg = {**model.pretrained_cfg, "license": "cc0-1.0"}
    checkpoint.save(tmp_path / "alone" / "run", model, CompressionPlan.empty(shape_of(model)))
    push(tmp_path / "alone" / "run", "me/ants", out=tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert "Nothing was measured of it" in card.text and "nothing is cut" in card.text
    assert "Not given by who pushed it" in card.text and not card.data.eval_results and card.data.license is None


def test_a_segmenter_is_pushed_with_its_decoder_and_its_task(tmp_path, hub: Hub):
    model = small()
    plan = match_plan(model)
    checkpoint.save(tmp_path / "run", compress(model, plan), plan, classes=list("abcde"))
    append_row(tmp_path / "results.jsonl", ResultRow(model="run", dataset="town", split="test", miou_pct=40.5))
    push(tmp_path / "run", "me/town")
    found = vitlab.load("hf-hub:me/town")
    assert torch.equal(found.model.state_dict()["decoder.cls_emb"], model.state_dict()["decoder.cls_emb"])
    card = ModelCard(hub.repositories["me/town"]["README.md"].decode())
    assert card.data.pipeline_tag == "image-segmentation" and card.data.eval_results[0].metric_type == "mean_iou"
    assert json.loads(hub.repositories["me/town"]["config.json"])["architecture"] == "vit_nano_patch4_32"


# ---------------------------------------------------------------- faults

def refusal(words: list[str], capsys) -> str:
    assert cli.main(words) == 2
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", ["ants", "me/ants/bees", "me/an ts", "", "../ants", "me/-ants"])
def test_a_name_that_is_none_is_refused_before_anything(run, name, capsys):
    line = refusal(["push", str(run), name], capsys)
    assert "OWNER/NAME is needed" in line or "names nothing" in line


def test_a_run_without_a_checkpoint_is_named(tmp_path, capsys):
    assert f"{tmp_path}: not a checkpoint" in refusal(["push", str(tmp_path), "me/ants"], capsys)


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_without_a_hub_it_is_one_line_within_seconds(run, kind, capsys, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "silent":
            server.listen()                                     # takes a connection, and never answers
            monkeypatch.setattr("vitlab.models.hub.WAIT", 0.3)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        began = time.monotonic()
        line = refusal(["push", str(run), "me/ants"], capsys)
        assert "does not answer within" in line and "--out FOLDER" in line
        assert time.monotonic() - began < 5


def test_a_hub_that_refuses_is_one_line(run, hub: Hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    line = refusal(["push", str(run), "me/ants"], capsys)
    assert "hf-hub:me/ants: can't be pushed (" in line and "HF_TOKEN" in line and not hub.commits


def test_a_damaged_checkpoint_on_the_hub_is_one_line(run, hub: Hub):
    push(run, "me/ants")
    hub.repositories["me/ants"]["plan.json"] = b"{"
    with pytest.raises(InputError, match="plan.json: not valid JSON"):
        vitlab.load("hf-hub:me/ants")
    del hub.repositories["me/ants"]["weights.safetensors"]
    hub.repositories["me/bees"] = hub.repositories["me/ants"]
    with pytest.raises(InputError, match="hf-hub:me/bees: can't be downloaded"):
        vitlab.load("hf-hub:me/bees")


def test_the_command_says_where_the_model_is(run, tmp_path, capsys):
    assert cli.main(["push", str(run), "me/ants", "--out", str(tmp_path / "hub"), "--licence", "mit"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'hub'}: README.md, ")
    assert "license: mit" in (tmp_path / "hub" / "README.md").read_text()
