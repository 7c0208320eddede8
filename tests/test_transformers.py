"""Folders that transformers writes open with its own outputs, and what vitlab writes transformers opens: random models
of two blocks, 24 wide."""
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_fixtures import compressed, logits, one_thread, tiny  # noqa: F401

from vitlab.measure.distance import output_of
from vitlab.models import checkpoint, compress, shape_of
from vitlab.models.opening import open_model
from vitlab.models.transformers_saving import save_transformers
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.runtime.files import InputError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*left out, since")

WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
SIZES, DINO = {**WIDE, "intermediate_size": 40}, {**WIDE, "mlp_ratio": 2}
LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
TOWER = {"text_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                         "vocab_size": 50, "eos_token_id": 1, "bos_token_id": 0}, "vision_config": SIZES, **LABELS}
MODELS = {              # transformers' class, its configuration, which of its outputs is timm's
    "ViT": ("ViTForImageClassification", "ViTConfig", {**SIZES, **LABELS}, "logits"),
    "ViT without a classifier or bias": ("ViTModel", "ViTConfig", {**SIZES, "qkv_bias": False}, "class token"),
    "ViT of a rectangle": ("ViTModel", "ViTConfig", {**SIZES, "image_size": [32, 48]}, "class token"),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", {**SIZES, **LABELS}, "logits"),
    "DeiT with its teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**SIZES, **LABELS}, "logits"),
    "DINOv2": ("Dinov2Model", "Dinov2Config", DINO, "pooler_output"),
    "DINOv2 with SwiGLU": ("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}, "pooler_output"),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, "pooler_output"),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**SIZES, "num_register_tokens": 4}, "pooler_output"),
    "DINOv3 with SwiGLU": ("DINOv3ViTModel", "DINOv3ViTConfig",
                           {**SIZES, "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False,
                            "value_bias": False}, "pooler_output"),
    "CLIP's tower": ("CLIPVisionModel", "CLIPVisionConfig", SIZES, "pooler_output"),
    "CLIP's tower, projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**SIZES, "projection_dim": 16},
                                "image_embeds"),
    "CLIP": ("CLIPModel", "CLIPConfig", {**TOWER, "projection_dim": 16}, "image_embeds"),
    "CLIP, classifying": ("CLIPForImageClassification", "CLIPConfig", TOWER, "logits"),
    "SigLIP's tower": ("SiglipVisionModel", "SiglipVisionConfig", SIZES, "pooler_output"),
    "SigLIP, classifying": ("SiglipForImageClassification", "SiglipConfig", TOWER, "logits")}
# by the outputs that are compared
UNUSED = "pooler|mask_token|register_tokens|text_model|logit_|post_layernorm|vision_model.head"


def theirs(name: str) -> nn.Module:
    """Every parameter is moved off its initial value, so that none is 0 or 1 by luck."""
    cls, config, args, _ = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**args)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def output(name: str, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        if hasattr(model, "get_image_features"):
            return model.get_image_features(pixel_values=images).pooler_output
        found = model(pixel_values=images)
        return found.last_hidden_state[:, 0] if MODELS[name][3] == "class token" else getattr(found, MODELS[name][3])


def images_for(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To 1e-5, of outputs of about 1: fused and unfused products round otherwise."""
    return a.shape == b.shape and (a - b).abs().max() < 1e-5 and b.abs().mean() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_transformers_opens_with_its_outputs_and_what_is_written_of_it_opens_there(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "m")
    found = open_model(tmp_path / "m")
    x = images_for(found.model)
    assert close(logits(found.model, x), output(name, model, x))
    assert output_of(found.model).labelled == (MODELS[name][3] == "logits")
    classes = found.info["classes"]
    assert classes == (["ant", "bee", "cat"] if MODELS[name][3] == "logits" else None)
    checkpoint.save(tmp_path / "c", found.model, found.plan, classes=classes)
    assert torch.equal(logits(checkpoint.load(tmp_path / "c").model, x), logits(found.model, x))
    save_transformers(tmp_path / "back", found.model, classes=classes)
    written = getattr(transformers, json.loads((tmp_path / "back" / "config.json").read_text())["architectures"][0])
    model, keys = written.from_pretrained(tmp_path / "back", output_loading_info=True)
    odd = [key for key in (*keys["missing_keys"], *keys["unexpected_keys"]) if not re.search(UNUSED, key)]
    assert not odd and not keys["mismatched_keys"] and close(output(name, model.eval(), x), logits(found.model, x))
    assert classes is None or model.config.id2label == LABELS["id2label"]


def test_a_model_of_timms_with_as_few_neurons_in_each_block_is_written_with_its_image_settings(tmp_path):
    dense = tiny()
    plan = CompressionPlan(shape=shape_of(dense), blocks=tuple(BlockPlan(neurons=(0, 3, 5 + i)) for i in range(2)))
    model = compress(dense, plan)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
                            "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"}
    save_transformers(tmp_path / "m", model)
    found = open_model(tmp_path / "m")
    assert torch.equal(logits(found.model), logits(model)) and found.plan.shape.num_neurons == 3
    assert all(found.model.pretrained_cfg[key] == model.pretrained_cfg[key]
               for key in ("mean", "std", "crop_mode", "interpolation"))
    assert math.floor(32 / found.model.pretrained_cfg["crop_pct"]) == math.floor(32 / 0.9)


def cut(**blocks: Any) -> nn.Module:
    dense = tiny()
    return compress(dense, CompressionPlan(shape=shape_of(dense), blocks=(BlockPlan(**blocks), BlockPlan())))


@pytest.mark.parametrize("make, says", [
    (lambda: cut(heads=(0, 1)), "block 0 has 2 heads of 8; in transformers' vit all heads together are as wide as the"),
    (lambda: cut(neurons=(0, 1)), "block 1 has 96 neurons, block 0 has 2; transformers' vit has one number for all"),
    (lambda: compressed()[0], "tokens are merged or selected in blocks; transformers' vit has no words for that"),
    (lambda: tiny(global_pool="avg"), "fc_norm.weight has no place in transformers' ViTForImageClassification"),
    (lambda: tiny(global_pool="avg", fc_norm=False), "transformers' ViTForImageClassification computes something"),
    (lambda: tiny(act_layer="mish"), "the activation is Mish; those that transformers' configuration names are"),
    (lambda: tiny(qk_norm=True), "blocks.0.attn.q_norm.weight has no place in transformers' ViTForImageClass")])
def test_what_transformers_has_no_words_for_is_refused_by_name(make, says, tmp_path):
    with pytest.raises(InputError) as refused:
        save_transformers(tmp_path / "m", make())
    assert says in str(refused.value) and "\n" not in str(refused.value) and not list(tmp_path.iterdir())


# ---- Sizes and settings

def test_several_files_with_an_index_are_one_model(tmp_path):
    model = theirs("ViT")
    model.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    found = open_model(tmp_path / "m")
    assert close(logits(found.model, images_for(found.model)), output("ViT", model, images_for(found.model)))


@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 with registers", "DINOv3"])
def test_images_are_of_the_size_that_the_image_processor_says_where_the_model_takes_any(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "m")
    transformers.BitImageProcessor(size={"shortest_edge": 55}, crop_size={"height": 48, "width": 48}).save_pretrained(
        tmp_path / "m")
    found = open_model(tmp_path / "m")
    assert found.model.patch_embed.img_size == (48, 48) and found.model.pretrained_cfg["crop_mode"] == "center"
    assert math.floor(48 / found.model.pretrained_cfg["crop_pct"]) == 55
    x = images_for(found.model)
    assert close(logits(found.model, x), output(name, model, x))
    given = open_model(tmp_path / "m", img_size=64)
    assert close(logits(given.model, images_for(given.model)), output(name, model, images_for(given.model)))


@pytest.mark.parametrize("content, settings", [
    ({"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]},
     {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)}),
    ({"size": 40, "crop_size": 32, "do_center_crop": True, "resample": 3},          # as releases of old wrote it
     {"crop_mode": "squash", "crop_pct": 0.8, "interpolation": "bicubic"}),
    ({"image_processor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
                          "do_center_crop": True, "do_normalize": False}},
     {"crop_mode": "center", "crop_pct": 0.8, "mean": (0.0,) * 3, "std": (1.0,) * 3})])
def test_image_settings_are_those_of_the_image_processor(content, settings, tmp_path):
    theirs("ViT").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(content))
    found = open_model(tmp_path / "m")
    assert {key: found.model.pretrained_cfg[key] for key in settings} == settings
    assert open_model(tmp_path / "m", settings={"mean": [0.7]}).model.pretrained_cfg["mean"] == (0.7,) * 3


def edited(folder: Path, **change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


def weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def index(folder: Path, places: dict) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("change, says", [
    (lambda f: edited(f, hidden_size="x"), "config.json: hidden_size is x; an integer from 1 to"),
    (lambda f: edited(f, num_hidden_layers=10 ** 9), "config.json: num_hidden_layers is 1000000000; an integer from 1"),
    (lambda f: edited(f, num_hidden_layers=60000), "num_hidden_layers is 60000, but model.safetensors has"),
    (lambda f: edited(f, num_hidden_layers=3), "encoder.layer.2.attention.attention.query.weight is missing"),
    (lambda f: edited(f, num_hidden_layers=1), "encoder.layer.1.attention.attention.key.bias has no pla"),
    (lambda f: edited(f, intermediate_size=41), "does not fit the model: wrong shapes: blocks.0.mlp.fc1"),
    (lambda f: edited(f, hidden_size=48), "is (24, 24), which does not fit the configuration"),
    (lambda f: edited(f, num_attention_heads=5), "config.json: vit_base_patch16_224: timm could not build it"),
    (lambda f: edited(f, hidden_act=["gelu"]), "config.json: hidden_act is ['gelu']; timm's model has gelu, "),
    (lambda f: edited(f, image_size=[32]), "config.json: image_size is [32]; one or two integers from 1 to"),
    (lambda f: edited(f, layer_norm_eps="x"), "norm_eps is 'x'; a number from 0 to 1 is needed"),
    (lambda f: (f / "preprocessor_config.json").write_text("[]"), "preprocessor_config.json: not an image processor"),
    (lambda f: (f / "preprocessor_config.json").write_text('{"size": {"height": 0}}'), "size.height and width is (0,"),
    (lambda f: (f / "preprocessor_config.json").write_text('{"resample": 9}'), "interpolation is 9; needed: bicubic"),
    (lambda f: weights(f, lambda s: s.pop("vit.layernorm.bias")), "model.safetensors: layernorm.bias is missing"),
    (lambda f: weights(f, lambda s: s.update(odd=torch.ones(1))), "odd has no place in a vit of transformers"),
    (lambda f: index(f, {"a": "../a.safetensors"}), 'index.json: not an index whose "weight_map" says in which file'),
    (lambda f: index(f, {"a": "b.safetensors"}), "b.safetensors: no such file, but model.safetensors.index.json says"),
    (lambda f: index(f, {"a": "a.safetensors"}), "a.safetensors: a is missing"),
])
def test_a_damaged_folder_is_refused_by_name(change, says, tmp_path):
    theirs("ViT").save_pretrained(tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(InputError) as refused:
        open_model(tmp_path / "m")
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_the_epsilon_of_all_norms_is_saved_with_a_model(tmp_path):
    model = tiny(norm_eps=1e-3)
    again = checkpoint.load(checkpoint.save(tmp_path / "c", model, CompressionPlan.empty(shape_of(model)))).model
    assert again.norm.eps == 1e-3 and torch.equal(logits(again), logits(model))
    with pytest.raises(InputError, match="norm_eps is 2; a number from 0 to 1 is needed"):
        tiny(norm_eps=2)
    assert timm.create_model("vit_nano_patch4_32").norm.eps == 1e-6
