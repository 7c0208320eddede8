"""A NaFlexVit at one size of images is timm's plain VisionTransformer: the same tokens and logits, in
whatever way it came."""
import copy
import json

import pytest
import timm
import torch
from conftest import randomise
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.models.naflexvit import NaFlexVit, batch_patchify
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training_fixtures import one_thread  # noqa: F401

import vitlab
from vitlab import cli
from vitlab.models import checkpoint, compress, deploy, hub, shape_of
from vitlab.models.create import create_model
from vitlab.models.opening import open_model
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import Match
from vitlab.runtime.files import InputError

PRETRAINED = sorted({name.split(".")[0] for name in timm.list_pretrained("naflexvit_*")})
CUT = {"depth": 2, "embed_dim": 26, "num_heads": 2, "patch_size": 4, "num_classes": 7}
GAP = "naflexvit_base_patch16_gap"
# what the pretrained ones have not, or not together
OTHERS = {
    "a table that is no square": (GAP, {"pos_embed_grid_size": (7, 5)}),
    "a table with its corners at those of the grid": (GAP, {"pos_embed_align_corners": True,
                                                            "pos_embed_antialias": False}),
    "rows and columns, each as long as its side": (GAP, {"pos_embed": "factorized", "pos_embed_grid_size": (7, 5)}),
    "no positions": (GAP, {"pos_embed": "none"}),
    "patches that are no square": (GAP, {"patch_size": (8, 4)}),
    "patches channel by channel": (GAP, {"patchify_channels_last": False}),
    "a convolution and a norm": (GAP, {"embed_proj_type": "conv", "embed_norm_layer": "layernorm"}),
    "a norm before the blocks": (GAP, {"pre_norm": True, "qk_norm": True}),
    "a pool of all tokens": (GAP, {"pool_include_prefix": True, "class_token": True}),
    "a map with a class token": ("naflexvit_base_patch16_map", {"class_token": True}),
    "a map of all tokens, by other heads": ("naflexvit_base_patch16_map", {
        "pool_include_prefix": True, "attn_pool_num_heads": 13, "attn_pool_mlp_ratio": 2.0}),
    "features of one channel": ("naflexvit_base_patch16_radio_v3", {"num_classes": 0, "in_chans": 1}),
    "a plain model's name": ("vit_tiny_patch16_224", {"use_naflex": True, "img_size": 64}),
}
STRUCTURES = {**{name: (name, {}) for name in PRETRAINED}, **OTHERS}
SIZES = ((64, 64), (80, 80), (40, 84), (24, 12))        # of 16 x 16 patches, of more, of both, of fewer


def small(name: str, **args) -> NaFlexVit:
    model = timm.create_model(name, **{**CUT, **args})
    randomise(model, 0)
    assert isinstance(model, NaFlexVit)
    return model.eval().requires_grad_(False)


def images(size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def near(a: Tensor, b: Tensor) -> bool:
    """Of float32 numbers added in another order."""
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5 * max(1, b.abs().max()))


def with_places(model: NaFlexVit, x: Tensor) -> dict[str, Tensor]:
    """The images as timm's loader of any size gives them: patches with their coordinates, all of them valid."""
    patches, (rows, columns) = batch_patchify(x, model.embeds.patch_size, channels_last=model.embeds.channels_last)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(len(x), -1, -1)
    return {"patches": patches, "patch_coord": places, "patch_valid": torch.ones(places.shape[:2], dtype=torch.bool)}


def test_all_that_timm_has_weights_of_are_here():
    assert sum(name.startswith("naflexvit") for name in timm.list_pretrained()) == len(PRETRAINED) == 11


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tokens_and_logits_are_timms_own_at_every_size(structure):
    name, args = STRUCTURES[structure]
    model, shapes = small(name, **args), set()
    before = copy.deepcopy(model.state_dict())
    for size in SIZES:
        fixed, x = vitlab.at_fixed_size(model, size), images(size, model.in_chans)
        assert type(fixed) is VisionTransformer and not fixed.training
        assert near(fixed.forward_features(x), model.forward_features(x))
        assert near(fixed(x), model(x))
        if model.embeds.is_linear:
            assert near(fixed(x), model(with_places(model, x)))
        shape = shape_of(fixed)
        assert shape.img_size == size and shape.pool == model.global_pool
        shapes.add(shape)
    assert len(shapes) == len(SIZES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():                                   # of its own weights, not of the other's
        for parameter in fixed.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_size_that_is_not_given_is_what_it_was_made_for_or_that_of_its_weights():
    assert vitlab.at_fixed_size(small(GAP)).patch_embed.img_size == (384, 384)
    assert vitlab.at_fixed_size(small("naflexvit_base_patch16_radio_v3")).patch_embed.img_size == (512, 512)
    assert vitlab.at_fixed_size(small(GAP, img_size=(20, 28))).patch_embed.img_size == (20, 28)


def tokens_and_units(model: nn.Module) -> CompressionPlan:
    blocks = (BlockPlan(heads=(1,), tokens=Match(merged=3, protect=0)),
              BlockPlan(neurons=tuple(range(0, 80, 3)), tokens=Match(merged=0, protect=0)))
    return CompressionPlan(shape=shape_of(model), blocks=blocks)


@pytest.mark.parametrize("structure", [*PRETRAINED, "patches channel by channel", "a plain model's name"])
def test_it_is_cut_deployed_saved_and_opened_as_any_other(structure, tmp_path):
    name, args = STRUCTURES[structure]
    fixed, x = vitlab.at_fixed_size(small(name, **args), (20, 28)), images((20, 28))
    assert torch.equal(compress(fixed, CompressionPlan.empty(shape_of(fixed)))(x), fixed(x))
    plan = tokens_and_units(fixed)
    cut = compress(fixed, plan)
    assert not near(cut(x), fixed(x)) and near(deploy(cut)(x), cut(x))
    for form in (cut, deploy(cut)):
        back = checkpoint.load(checkpoint.save(tmp_path / "cut", form, plan))
        assert near(back.model(x), form(x)) and back.plan == plan
        assert back.info["model"]["name"] == name and back.model.patch_embed.img_size == (20, 28)


WRITERS = {"timm": lambda state: state, "DDP": lambda state: {f"module.{name}": value for name, value in state.items()},
           "a training": lambda state: {f"student.{name}": value for name, value in state.items()}
           | {"criterion.weight": torch.ones(3)}}


@pytest.mark.filterwarnings("ignore:.*left out", "ignore:.*for images of")
@pytest.mark.parametrize("name, writer", [*((name, "timm") for name in PRETRAINED), (GAP, "DDP"), (GAP, "a training")])
def test_a_weights_file_opens_with_the_same_logits_at_its_size_and_at_others(name, writer, tmp_path):
    model, sizes = small(name, patch_size=16), {key: CUT[key] for key in ("depth", "embed_dim", "num_heads")}
    save_file(WRITERS[writer](model.state_dict()), tmp_path / "w.safetensors")
    for size in (None, 64, (48, 112)):
        found = open_model(tmp_path / "w.safetensors", model=name, **sizes, **({} if size is None else {
            "img_size": size})).model
        x = images(found.patch_embed.img_size)
        assert near(found(x), model(x)) and found.num_classes == 7
        assert size is None or found.patch_embed.img_size == ((64, 64) if size == 64 else size)
    # as a file of the model that it has become
    save_file(found.state_dict(), tmp_path / "fixed.safetensors")
    again = create_model(name, weights=tmp_path / "fixed.safetensors", img_size=(48, 112), **sizes)
    assert torch.equal(again(x), found(x))


def test_the_size_that_a_file_is_opened_at_is_said_and_channels_are_its_own(tmp_path):
    model, args = small(GAP, in_chans=1), {key: CUT[key] for key in ("depth", "embed_dim", "num_heads")}
    save_file(small(GAP, in_chans=1, patch_size=16).state_dict(), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="for images of 384 x 384 pixels, of the many that a NaFlexVit takes"):
        found = open_model(tmp_path / "w.safetensors", model=GAP, **args)
    assert found.model.in_chans == 1 and found.info["made_by"]["notes"]
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="can't be converted"):         # 16 numbers are no patch of 16 x 16
        open_model(tmp_path / "w.safetensors", model=GAP, **args)
    save_file(small(GAP).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=f"its patches are of 4 x 4 pixels, those of {GAP} of 16 x 16"):
        open_model(tmp_path / "w.safetensors", model=GAP, **args)
    with pytest.warns(UserWarning, match="patch embedding resampled from 4 x 4 to 8 x 8 pixels"):
        open_model(tmp_path / "w.safetensors", model=GAP, patch_size=8, img_size=64, **args)


@pytest.mark.parametrize("change, name, says", [
    (lambda s: s, "vit_tiny_patch16_224", "holds the weights of a NaFlexVit, and a VisionTransformer is none"),
    (lambda s: s, "naflexvit_base_patch16_parfac_gap", r"wrong shapes: pos_embed is \(1, 16, 16, 26\)"),
    (lambda s: {k: v for k, v in s.items() if "pos_embed" not in k}, GAP, "missing keys pos_embed"),
    (lambda s: {**s, "embeds.pos_embed": torch.ones(3)}, GAP, "does not fit the model; it can't be converted"),
    (lambda s: {**s, "embeds.proj.weight": torch.ones(3)}, GAP, "does not fit the model; it can't be converted"),
    (lambda s: {**s, "embeds.proj.bias": torch.ones(3)}, GAP, r"wrong shapes: patch_embed.proj.bias is \(3,\)"),
])
def test_a_weights_file_that_is_anothers_or_damaged_is_refused_by_name(change, name, says, tmp_path):
    save_file(change(small(GAP).state_dict()), tmp_path / "w.safetensors")
    args = {key: value for key, value in CUT.items() if key != "num_classes"}
    with pytest.raises(InputError, match=says) as refused:
        open_model(tmp_path / "w.safetensors", model=name, img_size=64, **args)
    assert "w.safetensors" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [GAP, "naflexvit_base_patch16_parfac_gap", "naflexvit_base_patch16_radio_v3"])
def test_a_name_of_timms_gives_timms_own_weights_at_a_size(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda: False)
    model = small(name)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found = open_model(name, img_size=(36, 84), pretrained_cfg_overlay={"file": str(tmp_path / "w.safetensors"),
                                                                        "num_classes": 7}, **CUT)
    x = images((36, 84))
    assert near(found.model(x), model(x))


@pytest.mark.filterwarnings("ignore:.*for images of")
def test_a_folder_that_timm_wrote_is_evaluated_by_the_command(tmp_path, capsys):
    model = small(GAP, num_classes=10)
    save_for_hf(model, tmp_path / "m", model_config={"label_names": list("0123456789")}, safe_serialization=True)
    found = open_model(tmp_path / "m", img_size=48)
    assert near(found.model(images((48, 48))), model(images((48, 48)))) and found.info["classes"] == list("0123456789")
    rest = ["--data", "digits", "--images", "8", "--device", "cpu", "--quiet", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "m"), "--img-size", "48", *rest]) == 0
    assert "48 x 48" in capsys.readouterr().out
    # and what is saved of it needs no size again
    checkpoint.save(tmp_path / "c", found.model, found.plan)
    args = json.loads((tmp_path / "c" / "checkpoint.json").read_text())["model"]
    assert args["name"] == GAP and args["args"]["img_size"] == [48, 48]
    assert open_model(tmp_path / "c").model.patch_embed.img_size == (48, 48)


def test_one_that_is_built_already_is_refused_in_a_line_that_says_what_to_do():
    model = small(GAP)
    with pytest.raises(InputError, match=r"NaFlexVit .* any size; vitlab\.at_fixed_size\(model, img_size\)") as refused:
        vitlab.compress(model, CompressionPlan.empty(shape_of(vitlab.at_fixed_size(model, 64))))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model, size, says", [
    (lambda: small(GAP), 30, "img_size is 30; height and width in whole patches of 4 x 4 pixels"),
    (lambda: small(GAP), (32, 32, 3), "img_size is .* height and width in whole"),
    (lambda: small(GAP), 0, "img_size is 0; height and width in whole"),
    (lambda: small(GAP), "64", "img_size is 64; height and width in whole"),
    (lambda: small(GAP), (-4, 4), "img_size is .* height and width in whole"),
    (lambda: small(GAP, patch_drop_rate=0.5), 64, "create it with patch_drop_rate=0"),
    (lambda: small(GAP, rope_type="axial", embed_dim=32), 64, "has blocks of EVA, with which timm has"),
    (lambda: timm.create_model("test_vit"), 64, "a VisionTransformer is no NaFlexVit"),
])
def test_what_can_not_be_had_at_one_size_is_refused(model, size, says):
    with pytest.raises(InputError, match=says):
        vitlab.at_fixed_size(model(), size)
