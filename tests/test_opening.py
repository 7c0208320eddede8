"""Models of others: files as their tools write them open with the same logits, at the sizes and with the image settings
they are of."""
import argparse
import collections
import datetime
import json
import pickle
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import nn
from training_fixtures import NAME, SIZE, by_hand, compressed, logits, one_thread, tiny  # noqa: F401

from vitlab import cli
from vitlab.models import checkpoint, compress, shape_of
from vitlab.models.hub import download
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.workbench import steps
from vitlab.workbench.notebooks import NOTEBOOKS

SETTINGS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.75, "crop_mode": "squash",
            "interpolation": "nearest"}
CUT = {"depth": 2, "embed_dim": 24, "num_heads": 3}


def under(prefix: str, state: dict, **more: torch.Tensor) -> dict:
    return {**{prefix + name: value for name, value in state.items()}, **more}


def lightning(state: dict, prefix: str) -> dict:
    """As Lightning's Trainer saves a module that holds the model and a criterion."""
    return {"epoch": 1, "global_step": 20, "pytorch-lightning_version": "2.5.0", "state_dict": under(prefix, state) | {
        "criterion.weight": torch.ones(3)}, "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'x'}": {
            "best_model_score": torch.tensor(0.5), "best_model_path": "a.ckpt", "best_k_models": {}}},
            "optimizer_states": [
                {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
            "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1, "out": Path("runs")}}


def averaged(state: dict) -> dict:
    """As timm's train.py saves: the average is what it reports."""
    return {"epoch": 3, "arch": NAME, "args": argparse.Namespace(lr=0.1), "version": 2, "metric": 71.5,
            "state_dict": {name: value + 1 for name, value in state.items()}, "state_dict_ema": state}


WRITERS = {             # a file's name, and its content for a model's state dict
    "timm's train.py": ("model_best.pth.tar", averaged),
    "DataParallel": ("w.pth", lambda s: {"state_dict": under("module.", s), "best_acc1": torch.tensor(70.0)}),
    "torch.compile": ("w.pth", lambda s: under("_orig_mod.", s)),
    "torch.compile in DDP": ("w.pth", lambda s: {"model": under("module._orig_mod.", s)}),
    "Fabric": ("w.ckpt", lambda s: {"model": under("_forward_module.", s)}),
    "Lightning, model": ("last.ckpt", lambda s: lightning(s, "model.")),
    "Lightning, net": ("last.ckpt", lambda s: lightning(s, "net.")),
    "Lightning, backbone, compiled": ("last.ckpt", lambda s: lightning(s, "backbone._orig_mod.")),
    "the tutorial's": ("w.pt",
                       lambda s: {"epoch": 5, "model_state_dict": s,
                                  "optimizer_state_dict": {"state": {}, "param_groups": []},
                                          "loss": np.float64(0.25), "history": np.arange(3), "best": np.bool_(True)}),
    "a list of the wrong name": ("w.bin", lambda s: {"net": s, "acc": 94.3}),
    "texts, times and counts": ("w.pth", lambda s: {
        "net": s, "names": np.array(["a", "b"]), "best": np.str_("x"), "seen": np.array([b"a"]),
        "day": np.datetime64("2026-01-02"), "took": np.timedelta64(3, "s"),
        "at": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), "since": datetime.date(2026, 1, 1),
        "left": datetime.timedelta(1), "losses": collections.defaultdict(list, {"train": [0.5]}),
        "seconds": collections.defaultdict(float), "counts": collections.defaultdict(int, a=1),
        "runs": collections.defaultdict(dict)}),
    "an average beside": ("w.pth",
                          lambda s: {"model_state_dict": {name: value + 1 for name, value in s.items()},
                                     "ema_state_dict": s}),
    "Lightning, with an average": ("w.ckpt", lambda s: lightning(
        {name: value + 1 for name, value in s.items()}, "model.") | {"state_dict": under("model.", {
            name: value + 1 for name, value in s.items()}) | under("ema.module.", s)}),
    "safetensors": ("w.safetensors", lambda s: under("model.", s)),
    "DINOv2's training": ("teacher_checkpoint.pth", lambda s: {"teacher": under("backbone.", {
        name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): value for name,
        value in s.items()}, **{
            "backbone.mask_token": torch.ones(1, 24), "dino_head.mlp.weight": torch.ones(2, 2),
            "ibot_head.last.weight": torch.ones(2)})}),
    "MAE's": ("mae.pth",
              lambda s: {"model": under("", s, mask_token=torch.ones(1, 1, 8), decoder_pos_embed=torch.ones(1, 17, 8),
                                        **{
        "decoder_embed.weight": torch.ones(8, 24), "decoder_blocks.0.norm1.weight": torch.ones(8)}), "epoch": 3,
        "args": argparse.Namespace(mask_ratio=0.75), "optimizer": {"state": {}, "param_groups": []}, "scaler": {}}),
    "a student and its larger teacher": ("w.ckpt", lambda s: {"state_dict": under("student.", s) | under(
        "teacher.", tiny(embed_dim=48).state_dict())}),
}


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_opens_with_its_own_logits_however_it_was_written(writer, tmp_path):
    dense, (name, content) = tiny(), WRITERS[writer]
    (save_file if name.endswith(".safetensors") else torch.save)(content(dense.state_dict()), tmp_path / name)
    found = steps.open_model(tmp_path / name, model=NAME, **SIZE)
    assert torch.equal(logits(found.model), logits(dense)) and found.model.num_classes == 3
    assert shape_of(found.model) == found.plan.shape == shape_of(dense)


def script(path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(path)


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("name, write, says", [
    ("w.pth", lambda f: torch.save({"a": np.array([(1, 2)], dtype="i4,i4")}, f), "was run or loaded "
                                                                                 "(numpy.dtypes.VoidDType; save mo"),
    ("w.pth", lambda f: f.write_bytes(pickle.dumps(nn.ReLU(), protocol=2)), "loaded (torch.nn.modules.activation.ReLU; "
                                                                            "save mo"),
    ("w.pth", lambda f: f.write_bytes(pickle.dumps({"a": 1}, protocol=4)), "holds more than weights, or is damaged"),
    ("w.pth", script, "nothing of it was run or loaded (TorchScript; save model.state_dict() alone)"),
    ("w.pth", lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     "a Git LFS pointer in place of"),
    ("w.safetensors", lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "fetch them with `git "
                                                                                              "lfs pull`"),
])
def test_a_refused_file_is_named_in_one_line_without_torchs_advice_to_run_it(name, write, says, tmp_path):
    write(tmp_path / name)
    with pytest.raises(InputError) as refused:
        steps.open_model(tmp_path / name, model=NAME)
    said = str(refused.value)
    assert says in said and str(
        tmp_path / name) in said and "weights_only" not in said and "PyTorch" not in said and "\n" not in said


@pytest.mark.parametrize("content, says", [
    (lambda s: {"a": s, "b": s}, "'a', 'b' each hold weights; save those that are meant"),
    (lambda s: {"state_dict": under("student.", s) | under("teacher.", s)}, "the weights below 'student.' and "
                                                                            "'teacher.' fit alike"),
    (lambda s: {"model": s, "config": torch.nn.ReLU()}, "nothing of it was run or loaded "
                                                        "(torch.nn.modules.activation.ReLU; save mo"),
    (lambda s: {"model": s, "names": np.array([object()])}, "holds more than weights"),
    (lambda s: {"model": under("", s, **{"other.weight": torch.ones(1)})}, "unknown keys other.weight"),
])
def test_a_file_of_which_it_is_unclear_what_is_meant_is_refused(content, says, tmp_path):
    torch.save(content(tiny().state_dict()), tmp_path / "w.pth")
    with pytest.raises(InputError) as refused:
        steps.open_model(tmp_path / "w.pth", model=NAME, **SIZE)
    assert says in str(refused.value) and str(tmp_path / "w.pth") in str(refused.value)


def test_one_of_several_shards_is_refused_not_taken_for_the_whole(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match="one of several files that only together hold a model"):
        steps.open_model(tmp_path / "model-00001-of-00002.safetensors", model=NAME)


def test_what_is_left_out_of_a_file_is_said_and_kept(tmp_path):
    torch.save(WRITERS["MAE's"][1](tiny().state_dict()), tmp_path / "mae.pth")
    with pytest.warns(UserWarning, match="left out, since the model has no such part: mask_token, decoder_pos_embed, "
                                         "decoder_embed, decod"):
        found = steps.open_model(tmp_path / "mae.pth", model=NAME, **SIZE)
    assert "decoder_blocks" in found.info["made_by"]["notes"][0]


# ---- Sizes

def weights_of(tmp_path, **args) -> tuple[Path, nn.Module]:
    dense = tiny(**args)
    torch.save(dense.state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth", dense


@pytest.mark.filterwarnings("ignore:.*for images of")
@pytest.mark.parametrize("args",
                         [{"img_size": 64}, {"num_classes": 7}, {"in_chans": 1}, {"global_pool": "avg"},
                          {"num_classes": 0},
                                  {"img_size": 64, "num_classes": 0}, {"img_size": 64, "global_pool": "avg"}])
def test_sizes_that_are_not_given_are_those_of_the_weights(args, tmp_path):
    path, dense = weights_of(tmp_path, **args)
    found = steps.open_model(path, model=NAME, **SIZE)
    x = torch.randn(3, found.model.in_chans, *found.model.patch_embed.img_size,
                    generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(found.model, x), logits(dense, x)) and shape_of(found.model) == shape_of(dense)


def test_position_embeddings_are_resampled_for_a_size_that_is_given_and_it_is_said(tmp_path):
    path, dense = weights_of(tmp_path, img_size=64)
    with pytest.warns(UserWarning, match="position embeddings resampled from 8 x 8 to 4 x 4 patches"):
        found = steps.open_model(path, model=NAME, img_size=32, **SIZE)
    dense.set_input_size((32, 32))
    assert torch.equal(logits(found.model), logits(dense))
    assert found.info["made_by"]["notes"] == ["position embeddings resampled from 8 x 8 to 4 x 4 patches"]


def test_a_patch_size_is_never_resampled_unless_it_is_given(tmp_path):
    path, dense = weights_of(tmp_path)                                  # 8 x 8; the model's are 4 x 4
    with pytest.raises(InputError, match="its patches are of 8 x 8 pixels, those of vit_nano_patch4_32 of 4 x 4; name "
                                         "the model of such"):
        steps.open_model(path, model=NAME, **CUT)
    assert torch.equal(logits(steps.open_model(path, model=NAME, patch_size=8, **CUT).model), logits(dense))
    with pytest.warns(UserWarning, match="patch embedding resampled from 8 x 8 to 4 x 4 pixels"):
        steps.open_model(path, model=NAME, patch_size=4, img_size=16, **CUT)


def test_position_embeddings_of_no_square_need_their_size(tmp_path):
    path, dense = weights_of(tmp_path, img_size=(32, 64))
    with pytest.raises(InputError, match="position embeddings are of 32 patches, which make no square; give the "
                                         "img_size"):
        steps.open_model(path, model=NAME, **SIZE)
    found = steps.open_model(path, model=NAME, img_size=(32, 64), **SIZE)
    x = torch.randn(2, 3, 32, 64)
    assert torch.equal(logits(found.model, x), logits(dense, x))


BESIDE = {              # arguments of the weights, those of the model, what alone is wrong
    "distilled": ({}, {"model": "deit_tiny_distilled_patch16_224", "img_size": 32}, "missing keys dist_token, "
                                                                                    "head_dist.bias, head_dist"),
    "fewer blocks": ({"depth": 1}, {}, "missing keys blocks.1.attn.proj.bias, blocks.1.attn.proj.weight"),
    "more blocks": ({"depth": 3}, {}, "unknown keys blocks.2.attn.proj.bias, blocks.2.attn.proj.weight"),
    "no class token": ({"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}, "missing keys cls_token"),
    "a class token": ({"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}, "unknown keys cls_token"),
    "registers": ({"reg_tokens": 4}, {"reg_tokens": 2}, "wrong shapes: reg_token is (1, 4, 24), the model's is (1, 2, "
                                                        "24)"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_makes_weights_another_models_is_named_and_not_the_patches_that_follow_from_it(case, tmp_path):
    of_weights, of_model, says = BESIDE[case]
    path, _ = weights_of(tmp_path, **{"img_size": 64, **of_weights})
    with pytest.raises(InputError) as refused:
        steps.open_model(path, **{"model": NAME, **SIZE, **of_model})
    assert says in str(refused.value) and "pos_embed" not in str(refused.value) and "square" not in str(refused.value)


def test_a_classifier_of_another_kind_is_named_and_not_the_patches(tmp_path):
    path, dense = weights_of(tmp_path, img_size=64)
    dense.head = nn.Sequential(nn.Dropout(0.1), dense.head)
    torch.save(dense.state_dict(), path)
    with pytest.raises(InputError, match=r"missing keys head.bias, head.weight; unknown keys head.1.bias, "
                                         r"head.1.weight \(the model is"):
        steps.open_model(path, model=NAME, **SIZE)


def test_a_size_is_taken_or_refused_but_never_ignored(tmp_path):
    path, dense = weights_of(tmp_path)
    checkpoint.save(tmp_path / "c", dense, CompressionPlan.empty(shape_of(dense)))
    for source in (tmp_path / "c", checkpoint.load(tmp_path / "c")):
        with pytest.raises(InputError, match="holds a model of its own sizes; img_size is for weights of others"):
            steps.open_model(source, img_size=64)


def test_weights_without_a_classifier_are_no_classifier(tmp_path):
    path, _ = weights_of(tmp_path, num_classes=0)
    with pytest.raises(InputError, match="holds no classifier, so num_classes can't be 5; without it the model gives "
                                         "features"):
        steps.open_model(path, model=NAME, num_classes=5, **SIZE)
    with pytest.raises(InputError, match="the model has no classifier; the model it was made from"):
        steps.evaluate(steps.open_model(path, model=NAME, **SIZE), "digits", config=RunConfig(device="cpu"))


def test_a_published_checkpoint_says_its_sizes_too(tmp_path):
    model, plan = compressed()
    torch.save(by_hand(model), tmp_path / "w.pth")
    assert torch.equal(logits(steps.open_model(tmp_path / "w.pth", model=NAME, **SIZE).model), logits(model))


# ---- config.json beside the weights, the hub, and settings that are given

def hub_folder(folder: Path, dense: nn.Module | None = None, **config) -> tuple[Path, nn.Module]:
    """As timm writes a model for the hub."""
    dense = dense or tiny()
    dense.pretrained_cfg = {**dense.pretrained_cfg, **SETTINGS}
    save_for_hf(dense, folder, model_config={"label_names": ["ant", "bee", "cat"], **config}, safe_serialization=True)
    return folder, dense


def settings_of(found: checkpoint.Checkpoint) -> dict:
    return {key: tuple(value) if isinstance(value, (list, tuple)) else value
            for key, value in found.model.pretrained_cfg.items() if key in SETTINGS}


@pytest.mark.parametrize("source, args", [("{}", {}), ("local-dir:{}", {}), ("{}/model.safetensors", {}),
                                          ("{}/model.safetensors", {"model": NAME, **SIZE})])
def test_a_folder_that_timm_wrote_opens_with_its_settings_and_classes_and_so_do_its_weights(source, args, tmp_path):
    folder, dense = hub_folder(tmp_path / "m")
    found = steps.open_model(source.format(folder), **args)
    assert torch.equal(logits(found.model), logits(dense)) and found.info["classes"] == ["ant", "bee", "cat"]
    assert settings_of(found) == SETTINGS


def test_settings_survive_a_checkpoint_and_a_plan_and_those_that_are_given_come_first(tmp_path):
    folder, dense = hub_folder(tmp_path / "m")
    found = steps.open_model(folder, settings={"mean": [0.7], "crop_pct": 0.9})
    plan = CompressionPlan(shape=found.plan.shape, blocks=(BlockPlan(heads=(0,)), BlockPlan()))
    again = steps.open_model(checkpoint.save(tmp_path / "c", compress(found.model, plan), plan))
    assert settings_of(again) == {**SETTINGS, "mean": (0.7, 0.7, 0.7), "crop_pct": 0.9}
    assert settings_of(steps.open_model(tmp_path / "c", settings={"crop_mode": "border"}))["crop_mode"] == "border"


def test_an_old_flat_config_with_a_numbered_list_of_labels_is_read(tmp_path):
    folder, dense = hub_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    flat = {"architecture": config["architecture"], **config["pretrained_cfg"],
            "labels": {"0": "a", "1": "b", "2": "c"}}
    (folder / "config.json").write_text(json.dumps(flat))
    found = steps.open_model(folder / "model.safetensors", model=NAME, **SIZE)
    assert settings_of(found) == SETTINGS and found.info["classes"] == ["a", "b", "c"]


def edited(folder: Path, **change) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        (config["pretrained_cfg"] if key in SETTINGS else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change, says", [
    (lambda f: edited(f, mean=[1, 2]), "config.json: mean is [1, 2]; needed: 1 or 3 numbers"),
    (lambda f: edited(f, std=[0, 1, 1]), "config.json: std is [0, 1, 1]; needed: 1 or 3 numbers above 0, to 3, of "
                                         "pixels from 0 to 1"),
    (lambda f: edited(f, crop_mode="all"), "config.json: crop_mode is all; needed: center or squash or border"),
    (lambda f: edited(f, model_args={"pretrained_cfg": {"file": "/x"}}), "'pretrained_cfg' is not one of a vision "
                                                                         "transformer's"),
    (lambda f: edited(f, model_args={"depth": 10 ** 9}), "tensors are no model of 1000000000 blocks"),
    (lambda f: edited(f, architecture="resnet18"), "resnet18: timm could not build it"),
    (lambda f: edited(f, pretrained_cfg=[3]), "config.json: not a config.json of timm's"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    (lambda f: (f / "config.json").write_text('{"model_type": 3}'), "or a config.json of timm or transformers beside"),
    (lambda f: (f / "config.json").write_text('{"model_type": "swin"}'), "a swin of transformers can't be opened; th"),
    (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors or pytorch_model.bin beside config.json"),
    (lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json"), "index.json: not valid JSON"),
])
def test_a_damaged_folder_is_refused_by_name(change, says, tmp_path):
    folder, _ = hub_folder(tmp_path / "m")
    change(folder)
    with pytest.raises(InputError) as refused:
        steps.open_model(folder)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_on_the_hub_is_its_folder_in_the_cache(tmp_path, monkeypatch):
    folder, dense = hub_folder(tmp_path / "m")

    def downloaded(repository: str, file: str, revision: str | None = None) -> str:
        assert (repository, revision) == ("me/ants", "v1")
        return str(folder / file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloaded)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = steps.open_model("hf-hub:me/ants@v1")
    assert torch.equal(logits(found.model), logits(dense)) and settings_of(found) == SETTINGS


@pytest.mark.parametrize("source", ["hf-hub:me/ants", "hf-hub:me/ants@a@b", "hf-hub:", "deit_tiny_patch16_224"])
def test_a_hub_that_does_not_answer_is_one_line_at_once(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))       # where nothing was downloaded

    def silent():
        raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "get_session", silent)
    with pytest.raises(InputError) as refused:
        steps.open_model(source)
    assert source in str(refused.value) and "\n" not in str(refused.value) and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("settings, says", [
    ({"mean": [0.5, 0.5]}, "mean is"), ({"crop_mode": "all"}, "crop_mode is all; needed: center"),
    ({"mean": [127, 127, 127]}, "mean is .127, 127, 127.; needed: 1 or 3 numbers from -3 to 3, of pixels from 0 to 1"),
    ({"std": [50, 50, 50]}, "std is .50, 50, 50.; needed: 1 or 3 numbers above 0, to 3, of pixels from 0 to 1"),
    ({"gamma": 2}, "image setting 'gamma' is not known; known are mean, std")])
def test_settings_that_can_not_be_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        steps.open_model(NAME, pretrained=False, settings=settings)


@pytest.mark.filterwarnings("ignore:.*resampled")
def test_evaluate_takes_settings_and_says_which_it_used(tmp_path, capsys):
    folder, _ = hub_folder(tmp_path / "m", tiny(num_classes=10), label_names=None)
    rest = ["--data", "digits", "--images", "8", "--device", "cpu", "--quiet"]
    assert cli.main(["evaluate", "--checkpoint", str(folder), *rest, "--std", "0.5", "--crop-pct", "0.9"]) == 0
    assert "32 x 32, nearest, squash crop 0.9, mean 0.1 0.2 0.3, std 0.5 0.5 0.5" in capsys.readouterr().out
    assert cli.main(["evaluate", "--checkpoint", str(folder), "--img-size", "16", *rest]) == 0
    assert "16 x 16, nearest, squash crop 0.75" in capsys.readouterr().out


def test_the_first_notebook_shows_how_a_model_takes_its_images(tmp_path, capsys):
    folder, _ = hub_folder(tmp_path / "m")
    names = {"checkpoint": str(folder), "image_settings": {"crop_pct": 0.9}}
    known = {}
    for cell in json.loads((NOTEBOOKS / "00_check_setup.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), known)
        if "parameters" in cell["metadata"].get("tags", ()):
            known.update(names)
    said = capsys.readouterr().out
    assert "images: 32 x 32, nearest, squash crop 0.9, mean 0.1 0.2 0.3, std 0.4 0.5 0.6" in said
    assert "classes: 3 ant bee cat\n" in said


@pytest.mark.parametrize("index", [False, True])
def test_of_a_model_of_transformers_on_the_hub_all_files_are_fetched(index, tmp_path, monkeypatch):
    files = {"config.json": "{}", "preprocessor_config.json": "{}"}
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    files |= {"model.safetensors.index.json": json.dumps({"weight_map": shards}), **dict.fromkeys(shards.values(), "")
              } if index else {"model.safetensors": ""}
    (tmp_path / "there").mkdir()
    fetched = []

    def downloaded(repository: str, file: str, revision: str | None = None) -> str:
        if file not in files:
            raise huggingface_hub.errors.EntryNotFoundError(file)
        fetched.append(file)
        (tmp_path / "there" / file).write_text(files[file])
        return str(tmp_path / "there" / file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloaded)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("me/ants") == tmp_path / "there" and set(fetched) == set(files)


# ---- What is saved can be loaded

def deeper(model: nn.Module) -> None:
    model.blocks.append(type(model.blocks[0])(24, 3, qkv_bias=True))


CHANGES = {
    "another classifier": lambda m: setattr(m, "head", nn.Linear(24, 5)),
    "no classifier": lambda m: setattr(m, "head", nn.Identity()),
    "fewer blocks": lambda m: m.blocks.__delitem__(slice(1, None)),
    "one block more": deeper,
    "reset_classifier": lambda m: m.reset_classifier(5),
    "reset_classifier, average": lambda m: m.reset_classifier(5, "avg"),
    "the pool alone": lambda m: setattr(m, "global_pool", "avg"),
    "set_input_size": lambda m: m.set_input_size((32, 32), (4, 4)),
    "set_input_size of a rectangle": lambda m: m.set_input_size((32, 48)),
}
BEYOND = {
    "a classifier of two layers": (lambda m: setattr(m, "head",
                                                     nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 5))),
                                   "head"),
    "a dropout before it": (lambda m: setattr(m, "head", nn.Sequential(nn.Dropout(0.1), nn.Linear(24, 5))), "head"),
    "no last norm": (lambda m: setattr(m, "norm", nn.Identity()), "norm"),
    "another activation": (lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()), "blocks.1.mlp.act is ReLU() in place "
                                                                                 "of GELU("),
    "another epsilon": (lambda m: setattr(m.norm, "eps", 1e-3), "norm is LayerNorm((24,), eps=0.001"),
}


@pytest.mark.filterwarnings("ignore:.*resiz")
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_by_hand_is_saved_as_it_is_now(change, tmp_path):
    model = tiny()
    CHANGES[change](model)
    found = checkpoint.load(checkpoint.save(tmp_path / "c", model, CompressionPlan.empty(shape_of(model))))
    x = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(found.model, x), logits(model, x)) and shape_of(found.model) == shape_of(model)


@pytest.mark.parametrize("change", BEYOND)
def test_a_model_that_no_checkpoint_can_hold_is_refused_when_it_is_saved(change, tmp_path):
    model, (act, says) = tiny(), BEYOND[change]
    act(model)
    with pytest.raises(InputError) as refused:
        checkpoint.save(tmp_path / "c", model, CompressionPlan.empty(shape_of(model)))
    assert says in str(refused.value) and "not written" in str(refused.value) and not list(tmp_path.iterdir())


def test_an_argument_that_is_no_data_is_named(tmp_path):
    model = timm.create_model(NAME, act_layer=nn.ReLU, **SIZE)
    with pytest.raises(InputError, match="the model was made with act_layer=.*, which no file can hold"):
        checkpoint.save(tmp_path / "c", model, CompressionPlan.empty(shape_of(model)))


def test_saving_draws_no_random_numbers(tmp_path):
    model, plan = compressed()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    checkpoint.save(tmp_path / "c", model, plan)
    checkpoint.save(tmp_path / "d", steps.deploy(model), plan)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits(checkpoint.load(tmp_path / "c").model), logits(model))
