"""Checkpoints: the same logits from the folder alone, every fault named, and weights read without running code."""
import argparse
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from segmenting_fixtures import masks, match_plan, pictures, small, units_plan
from training_fixtures import NAME, SIZE, compressed, full_plan, images, logits, one_thread, tiny  # noqa: F401

import vitlab
from vitlab.data import open_data
from vitlab.models import attention_block, checkpoint, compress, deploy, shape_of
from vitlab.models.checkpoint import INFO, PLAN, WEIGHTS
from vitlab.models.create import create_model
from vitlab.models.segmenter import Segmenter, set_norm_eps
from vitlab.plan import CompressionPlan
from vitlab.plan.rules import MergeReconstruct
from vitlab.runtime.files import InputError

FORMS = ("dense", "compressed", "deployed")


def make(form: str, seed: int = 0):
    """(model, plan) of one form; the compressed ones lack tokens, a head and neurons."""
    dense = tiny(seed=seed)
    if form == "dense":
        return dense, CompressionPlan.empty(shape_of(dense))
    plan = full_plan(dense, seed)
    model = compress(dense, plan)
    # trained matrices differ from the plan's starting values
    with torch.no_grad():
        for block in model.blocks:
            block.tokens.merge_matrix.mul_(1.1)
            block.tokens.reconstruct_matrix.add_(0.01)
    return (deploy(model) if form == "deployed" else model), plan


@pytest.fixture
def saved(tmp_path):
    """The folder of a compressed model."""
    return checkpoint.save(tmp_path / "saved", *make("compressed"))


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


# ---------------------------------------------------------------- round trip

@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_model_gives_bit_equal_logits_and_the_same_plan(tmp_path, form):
    model, plan = make(form)
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan))
    assert torch.equal(logits(found.model), logits(model))
    assert found.plan == plan
    assert not any(m.training for m in found.model.modules())
    assert checkpoint.is_deployed(found.model) == (form == "deployed")


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_model_saves_and_loads_again_alike(tmp_path, form):
    model, plan = make(form)
    once = checkpoint.load(checkpoint.save(tmp_path / "a", model, plan))
    twice = checkpoint.load(checkpoint.save(tmp_path / "b", once.model, once.plan))
    assert torch.equal(logits(twice.model), logits(model))
    assert (tmp_path / "a" / PLAN).read_bytes() == (tmp_path / "b" / PLAN).read_bytes()


def test_saving_leaves_the_model_as_it_was_trainable_and_in_its_mode(tmp_path):
    model, plan = make("compressed")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoint.save(tmp_path / "c", model, plan)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_keeps_classes_origin_versions_and_the_preprocessing(tmp_path):
    model, plan = make("dense")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
                            "interpolation": "nearest"}
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan, classes=["a", "b", "c"], made_by={"seed": 7}))
    assert found.info["classes"] == ["a", "b", "c"] and found.info["made_by"] == {"seed": 7}
    assert found.info["versions"]["torch"] == torch.__version__
    config = found.model.pretrained_cfg
    assert tuple(config["mean"]) == (0.1, 0.2, 0.3) and tuple(config["std"]) == (0.4, 0.5, 0.6)
    assert config["interpolation"] == "nearest"


def test_a_loaded_model_takes_batches_as_the_saved_one_does(tmp_path):
    model = tiny(num_classes=10)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    plan = CompressionPlan.empty(shape_of(model))
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan)).model
    first, second = (next(iter(open_data("digits").batches("test", m, limit=5)))[0] for m in (model, found))
    assert torch.equal(first, second)


CHILD = """
import sys
import torch
torch.set_num_threads(1)
from vitlab.models import checkpoint
x, out = torch.load(sys.argv[1], weights_only=True), {}
for folder in sys.argv[3:]:
    with torch.inference_mode():
        out[folder] = checkpoint.load(folder).model(x)
torch.save(out, sys.argv[2])
"""


def test_the_folder_alone_moved_elsewhere_is_enough_for_a_fresh_process(tmp_path):
    wanted = {}
    for form in FORMS:
        model, plan = make(form)
        folder = tmp_path / "moved" / form
        shutil.move(checkpoint.save(tmp_path / "first" / form, model, plan), folder)
        wanted[str(folder)] = logits(model)
    torch.save(images(), tmp_path / "x.pt")
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "x.pt"), str(tmp_path / "out.pt"), *wanted],
                          cwd=tmp_path / "empty",
                          env={**os.environ, "PYTHONPATH": str(Path(vitlab.__file__).parents[1])}, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(found[folder], wanted[folder]) for folder in wanted)


def test_a_run_folder_stands_for_the_checkpoint_in_it(tmp_path):
    model, plan = make("compressed")
    checkpoint.save(tmp_path / "run" / "checkpoint", model, plan)
    assert checkpoint.find(tmp_path / "run") == tmp_path / "run" / "checkpoint"
    assert torch.equal(logits(checkpoint.load(tmp_path / "run").model), logits(model))


def test_a_model_not_made_by_timm_is_refused(tmp_path):
    model, plan = make("dense")
    del model.pretrained_cfg
    with pytest.raises(InputError, match="not made by timm.create_model"):
        checkpoint.save(tmp_path / "c", model, plan)
    assert not (tmp_path / "c").exists()


def test_a_number_of_a_layer_that_was_changed_is_refused_by_its_name(tmp_path):
    model, plan = make("compressed")
    attention_block(model.blocks[1]).attn.scale *= 2
    with pytest.raises(InputError, match=r"blocks\.1\.(block\.)?attn\.scale is .* in place of"):
        checkpoint.save(tmp_path / "c", model, plan)
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------- faults

@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path, path):
    with pytest.raises(InputError, match=f"{tmp_path / path}: not a checkpoint.*{INFO}"):
        checkpoint.load(tmp_path / path)


@pytest.mark.parametrize("name", [WEIGHTS, PLAN, INFO])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        checkpoint.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_cut_short_are_refused_by_name(saved, share):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:int(len(content) * share)])
    with pytest.raises(InputError, match=f"{saved / WEIGHTS}: can't be read"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", [PLAN, INFO])
def test_json_cut_short_is_refused_by_name(saved, name):
    text = (saved / name).read_text()
    (saved / name).write_text(text[:len(text) // 2])
    with pytest.raises(InputError, match=f"{saved / name}: not valid JSON"):
        checkpoint.load(saved)


@pytest.mark.parametrize("args", [{"depth": 3}, {"embed_dim": 36}, {"img_size": 48}])
def test_a_plan_for_another_model_is_refused_naming_the_file(saved, args):
    full_plan(tiny(**args)).save(saved / PLAN)
    with pytest.raises(InputError, match=f"{saved / PLAN}: "):
        checkpoint.load(saved)


@pytest.mark.parametrize("change, says", [
    (lambda p: p["blocks"][1].update(heads=[0, 3]), "block 1: heads must be integers from 0 to 2"),
    (lambda p: p["blocks"][0].update(neurons=[5, 5]), "block 0: neurons must ascend"),
    (lambda p: p["blocks"][1]["tokens"].update(pruned=[16]), "block 1: tokens: pruned must be patches from 0 to 15"),
    (lambda p: p["blocks"][0]["tokens"]["regions"].__setitem__(0, 99), "block 0: tokens: "),
    (lambda p: p["blocks"].pop(), "the plan has 1 blocks; the model has 2"),
    (lambda p: p.update(version=99), "version 99 is not known"),
], ids=["head", "neurons", "pruned", "regions", "a block less", "version"])
def test_a_plan_edited_to_something_impossible_is_refused_naming_file_block_and_field(saved, change, says):
    edit_json(saved / PLAN, change)
    with pytest.raises(InputError, match=f"{saved / PLAN}: {says}"):
        checkpoint.load(saved)


def test_a_plan_that_cuts_otherwise_than_the_weights_is_refused_naming_the_key(saved):
    edit_json(saved / PLAN, lambda p: p["blocks"][1].update(heads=[2]))
    says = r"wrong shapes: blocks.1.block.attn.qkv.weight is \(48, 24\), the model's is \(24, 24\)"
    with pytest.raises(InputError, match=f"{saved / WEIGHTS}: .*{says}"):
        checkpoint.load(saved)


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("blocks.1.tokens.merge_matrix"), "missing keys blocks.1.tokens.merge_matrix"),
    (lambda s: s.pop("head.bias"), "missing keys head.bias"),
    (lambda s: s.update({"blocks.9.extra": torch.zeros(3)}), "unknown keys blocks.9.extra"),
    (lambda s: s.update({"norm.weight": torch.zeros(23)}), r"wrong shapes: norm.weight is \(23,\), the model's is "
                                                           r"\(24,\)"),
], ids=["no matrix", "no bias", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused_naming_file_and_key(saved, change, says):
    edit_weights(saved, change)
    with pytest.raises(InputError, match=f"{saved / WEIGHTS}: does not fit the model: {says}"):
        checkpoint.load(saved)


# ---------------------------------------------------------------- whole, or as it was

def failing(*args, **kwargs):
    raise OSError("disk full")


@pytest.mark.parametrize("name", ["plan.save", "to_bytes"])
def test_a_save_that_fails_half_way_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, name):
    old, new = make("compressed", seed=0), make("compressed", seed=1)
    folder = checkpoint.save(tmp_path / "c", *old)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(*((CompressionPlan, "save") if name == "plan.save" else (checkpoint, "to_bytes")), failing)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(folder, *new)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["c"]        # nothing half-written is left beside it
    assert torch.equal(logits(checkpoint.load(folder).model), logits(old[0]))


def test_a_kill_between_the_two_renames_leaves_the_old_checkpoint_to_be_found(tmp_path, monkeypatch):
    old, new = make("compressed", seed=0), make("compressed", seed=1)
    folder = checkpoint.save(tmp_path / "run" / "checkpoint", *old)
    plain = Path.rename

    def killed(self, target):
        if Path(target) == folder:
            raise KeyboardInterrupt
        return plain(self, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder, *new)
    assert not folder.exists()
    assert torch.equal(logits(checkpoint.load(tmp_path / "run").model), logits(old[0]))


def test_a_save_over_an_old_checkpoint_leaves_only_the_new_one(tmp_path):
    folder = checkpoint.save(tmp_path / "c", *make("compressed"))
    (folder / "stray").write_text("")
    model, plan = make("dense", seed=1)
    checkpoint.save(folder, model, plan)
    assert {f.name for f in folder.iterdir()} == {WEIGHTS, PLAN, INFO} and [f.name for f in tmp_path.iterdir()] == ["c"]
    assert torch.equal(logits(checkpoint.load(folder).model), logits(model))


# ---------------------------------------------------------------- Segmenters

def make_segmenter(form: str, decoder: str = "mask_transformer",
                   plan_of=full_plan) -> tuple[Segmenter, CompressionPlan]:
    """As published ones are: 1e-5 in every norm, a mean and deviation of its own."""
    dense = small(decoder, **({"depth": 1, "drop": 0.05, "head_dim": 12} if decoder == "mask_transformer" else {}))
    set_norm_eps(dense.encoder, 1e-5)
    dense.encoder.pretrained_cfg = {**dense.encoder.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    if form == "dense":
        return dense, CompressionPlan.empty(shape_of(dense))
    plan = plan_of(dense)
    model = compress(dense, plan)
    return (deploy(model) if form == "deployed" else model), plan


@pytest.mark.parametrize("form, decoder, plan_of", [
    *((form, decoder, full_plan) for form in FORMS for decoder in ("linear", "mask_transformer")),
    ("compressed", "mask_transformer", units_plan), ("deployed", "mask_transformer", match_plan)])
def test_a_loaded_segmenter_gives_bit_equal_logits_the_same_plan_norms_and_statistics(tmp_path, form, decoder, plan_of):
    model, plan = make_segmenter(form, decoder, plan_of)
    found, x = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan, classes=list("abcde"))), pictures(2,
                                                                                                              (21, 40))
    assert torch.equal(logits(found.model, x), logits(model, x)) and found.model.num_classes == 5
    assert found.plan == plan and found.info["classes"] == list("abcde")
    assert {norm.eps for norm in found.model.encoder.modules() if isinstance(norm, torch.nn.LayerNorm)} == {1e-5}
    assert tuple(found.model.pretrained_cfg["mean"]) == (0.1, 0.2,
                                                         0.3) and tuple(found.model.pretrained_cfg["std"]) == (0.4, 0.5,
                                                                                                               0.6)
    assert not any(m.training
                   for m in found.model.modules()) and checkpoint.is_deployed(found.model) == checkpoint.is_deployed(
                       model)
    again = checkpoint.load(checkpoint.save(tmp_path / "again", found.model, found.plan, classes=list("abcde")))
    assert torch.equal(logits(again.model, x), logits(model, x))
    assert all((tmp_path / "c" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
               for name in (WEIGHTS, PLAN, INFO))


def test_a_loaded_segmenter_trains_as_the_saved_one_would(tmp_path):
    model, plan = make_segmenter("dense")
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan)).model
    rates = {(b.attn.attn_drop.p, b.attn.proj_drop.p, b.mlp.drop1.p) for b in found.decoder.blocks}
    assert rates == {(0.05, 0.05, 0.05)} and found.decoder_depth == 1 and found.decoder.blocks[0].attn.num_heads == 2
    gradients = []
    for each in (model, found):
        torch.nn.functional.cross_entropy(each(pictures(2)), masks(2), ignore_index=255).backward()
        gradients.append(each.encoder.blocks[0].mlp.fc1.weight.grad)
    assert torch.equal(*gradients)


def test_a_segmenter_at_another_size_is_rebuilt_at_that_size(tmp_path):
    model = small().at_size((20, 60))
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, CompressionPlan.empty(shape_of(model)))).model
    assert found.img_size == (24, 64)
    assert torch.equal(logits(found, pictures(2, (24, 64))), logits(model, pictures(2, (24, 64))))


def put(way: str, value):
    """A change of a checkpoint.json's "segmenter"."""
    def change(info: dict) -> None:
        *inner, last = ("segmenter", *way.split(".")) if way else ("segmenter",)
        for key in inner:
            info = info[key]
        info[last] = value
    return change


@pytest.mark.parametrize("way, value, says", [
    ("", 5, "num_classes is 5"), ("", [], r"num_classes is \[\]"), ("", "x" * 10 ** 5, "num_classes is 'xxx"),
    ("", {}, "num_classes is None"), ("num_classes", 10 ** 9, "num_classes is 1000000000"),
    ("num_classes", 1, "num_classes is 1"), ("num_classes", True, "num_classes is True"),
    ("num_classes", "5", "num_classes is '5'"), ("num_classes", 5.0, "num_classes is 5.0"),
    ("num_classes", None, "num_classes is None"), ("decoder", "conv", "decoder is 'conv'"),
    ("decoder", ["linear"], r"decoder is \['linear'\]"), ("decoder", None, "decoder is None"),
    ("norm_eps", 0, "norm_eps is 0"), ("norm_eps", -1e-6, "norm_eps is -1e-06"),
    ("norm_eps", float("nan"), "norm_eps is nan"), ("norm_eps", "small", "norm_eps is 'small'"),
    ("norm_eps", 1, "norm_eps is 1"), ("args", None, "args is None"), ("args", [], r"args is \[\]"),
    ("args", {"file": "../x"}, "args is .*file"), ("args", {"depth": 10 ** 6}, "args is .*1000000"),
    ("args", {"depth": 65}, "args is .*65"), ("args", {"depth": 0}, "args is .*0"),
    ("args", {"depth": 2.0}, "args is .*2.0"), ("args", {"depth": True}, "args is .*True"),
    ("args", {"head_dim": 0}, "args is .*0"), ("args", {"head_dim": -8}, "args is .*-8"),
    ("args", {"head_dim": 7}, "24 wide, with heads of 7"), ("args", {"drop": 1.5}, "args is .*1.5"),
    ("args", {"drop": float("nan")}, "args is .*nan"), ("args", {"drop_path": -0.1}, "args is .*-0.1"),
    ("args", {"drop_path": "much"}, "args is .*much"),
], ids=lambda v: str(v)[:24])
def test_a_hostile_segmenter_in_a_checkpoint_is_refused_in_one_line_naming_the_file(tmp_path, way, value, says):
    folder = checkpoint.save(tmp_path / "c", *make_segmenter("dense"))
    edit_json(folder / INFO, put(way, value))
    with pytest.raises(InputError, match=f"{folder / INFO}: .*{says}") as refused:
        checkpoint.load(folder)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def test_a_segmenter_larger_than_its_weights_can_be_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    folder = checkpoint.save(tmp_path / "c", *make_segmenter("dense"))
    # else a file of this size may be of 30 M parameters
    monkeypatch.setattr(checkpoint, "LARGEST_CUT", 1)
    monkeypatch.setattr(Segmenter, "eval", lambda self: pytest.fail("it was built"))
    # 24 wide: 1.6 M numbers and a norm of each
    edit_json(folder / INFO, lambda info: info["segmenter"].update(num_classes=65_536))
    with pytest.raises(InputError, match=f"{folder / INFO}: a Segmenter of 1,7[0-9]{{2}},[0-9]{{3}} parameters; .* at "
                                         f"most"):
        checkpoint.load(folder)


def test_a_linear_decoder_takes_no_blocks_and_other_weights_are_refused_naming_the_key(tmp_path):
    folder = checkpoint.save(tmp_path / "c", *make_segmenter("dense", "linear"))
    edit_json(folder / INFO, put("args", {"depth": 2}))
    with pytest.raises(InputError, match=f"{folder / INFO}: decoder linear: .*depth"):
        checkpoint.load(folder)
    edit_json(folder / INFO, put("args", {}))
    edit_json(folder / INFO, put("num_classes", 7))
    says = r"wrong shapes: decoder.head.weight is \(5, 24\), the model's is \(7, 24\)"
    with pytest.raises(InputError, match=f"{folder / WEIGHTS}: .*{says}"):
        checkpoint.load(folder)
    edit_json(folder / INFO, lambda info: info.pop("segmenter"))
    with pytest.raises(InputError, match=f"{folder / WEIGHTS}: does not fit the model: missing keys"):
        checkpoint.load(folder)


# ---------------------------------------------------------------- create_model: published weights

def write_weights(path: Path, state: dict, layout: str) -> Path:
    if layout == "safetensors":
        save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    content = {
        "plain": state,
        "deit": {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 299,
                 "args": argparse.Namespace(lr=5e-4, data_path="/data")},
        "timm": {"state_dict": state, "arch": "vit", "epoch": 3},
        "module": {"model": {f"module.{k}": v for k, v in state.items()}},
    }[layout]
    torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", ["plain", "deit", "timm", "module", "safetensors"])
def test_published_weights_of_every_layout_give_the_same_logits(tmp_path, layout):
    source = tiny(seed=1)
    path = write_weights(tmp_path / "weights.pth", source.state_dict(), layout)
    found = create_model(NAME, weights=path, num_classes=3, **SIZE)
    assert torch.equal(logits(found), logits(source)) and not found.training


def test_an_ema_state_goes_before_the_raw_one(tmp_path):
    raw, ema = tiny(seed=1), tiny(seed=2)
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict()}, tmp_path / "w.pth")
    assert torch.equal(logits(create_model(NAME, weights=tmp_path / "w.pth", num_classes=3, **SIZE)), logits(ema))


@pytest.mark.parametrize("name, near", [
    ("vit_nano_patch4_33", "vit_nano_patch4_32"), ("deit_tinny_patch16_224", "deit_tiny_patch16_224")])
def test_an_unknown_model_suggests_near_names(name, near):
    with pytest.raises(InputError, match=f"'{name}': no such file or folder, and no timm model; near are .*{near}"):
        create_model(name)


def test_arguments_that_timm_refuses_are_named_with_the_model():
    with pytest.raises(InputError, match=f"{NAME}: timm could not build it .*colour"):
        create_model(NAME, colour="red")


def test_weights_of_another_size_are_refused_naming_file_and_key_and_shapes(tmp_path):
    path = write_weights(tmp_path / "w.pth", tiny(num_classes=7).state_dict(), "deit")
    says = r"wrong shapes: head.weight is \(7, 24\), the model's is \(3, 24\)"
    with pytest.raises(InputError, match=f"{path}: does not fit the model: {says}"):
        create_model(NAME, weights=path, num_classes=3, **SIZE)


class Malice:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "owned")


@pytest.mark.parametrize("torch_format", [True, False])
def test_a_malicious_pickle_is_refused_by_name_and_its_code_is_not_run(tmp_path, torch_format):
    target, path = tmp_path / "owned", tmp_path / "evil.pth"
    content = {"model": tiny().state_dict(), "args": Malice(target)}
    if torch_format:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=f"{path}: "):
        create_model(NAME, weights=path, num_classes=3, **SIZE)
    assert not target.exists()
    pickle.loads(pickle.dumps(Malice(target)))                  # the trap is a real one
    assert target.read_text() == "owned"


def test_a_malicious_pickle_under_the_name_of_a_checkpoints_weights_is_refused(saved, tmp_path):
    torch.save({"model": Malice(tmp_path / "owned")}, saved / WEIGHTS)
    with pytest.raises(InputError, match=f"{saved / WEIGHTS}: "):
        checkpoint.load(saved)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_pth_cut_short_is_refused_by_name(tmp_path, share):
    path = write_weights(tmp_path / "w.pth", tiny().state_dict(), "deit")
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    with pytest.raises(InputError, match=f"{path}: "):
        create_model(NAME, weights=path, num_classes=3, **SIZE)


def test_missing_weights_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="absent.pth: no such file"):
        create_model(NAME, weights=tmp_path / "absent.pth", num_classes=3, **SIZE)


def test_a_plan_with_a_rule_that_trains_reconstruct_alone_keeps_that_after_loading(tmp_path):
    model, plan = compressed(rule="merge")
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan))
    assert all(isinstance(b.tokens, MergeReconstruct) and b.tokens.trains == "reconstruct" for b in found.plan.blocks)
    assert [b.tokens.merge_matrix.requires_grad for b in found.model.blocks] == [False, False]
    assert dataclasses.replace(plan, made_by={}) == dataclasses.replace(found.plan, made_by={})


def test_saving_with_another_plan_than_the_models_is_refused(tmp_path):
    model, plan = make("compressed", seed=0)
    with pytest.raises(InputError, match="block 0 of the model is not what the plan says"):
        checkpoint.save(tmp_path / "c", model, CompressionPlan.empty(plan.shape))
    assert not list(tmp_path.iterdir())


def test_a_saved_checkpoint_can_be_read_by_others(tmp_path):
    folder = checkpoint.save(tmp_path / "c", *make("compressed", seed=0))
    assert len({f.stat().st_mode & 0o777 for f in folder.iterdir()}) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written_and_the_older_ones_stay(tmp_path, value):
    model = tiny()
    checkpoint.save(tmp_path / "kept", model, CompressionPlan.empty(shape_of(model)))
    before = (tmp_path / "kept" / WEIGHTS).read_bytes()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[2, 3] = value
    with pytest.raises(InputError, match=f"{tmp_path / 'kept'}: not written, since blocks.1.mlp.fc1.weight is not "
                                         f"finite"):
        checkpoint.save(tmp_path / "kept", model, CompressionPlan.empty(shape_of(model)))
    assert (tmp_path / "kept" / WEIGHTS).read_bytes() == before
