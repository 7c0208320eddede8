"""Published Segmenter checkpoints: small files in the published layout, written here key by key, against the formula on
raw tensors."""
import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from vitlab.models import deploy, shape_of
from vitlab.models.checkpoint import load, save
from vitlab.models.published import load_segmenter
from vitlab.plan import CompressionPlan
from vitlab.runtime.files import InputError
from vitlab.workbench.steps import open_model

HEIGHT, WIDTH, PATCH, DIM, HEADS, DEPTH, CLASSES = 32, 48, 16, 128, 4, 3, 5
DECODER_HEADS = 2                                                       # DIM // 64, whatever the encoder's
NET = {"backbone": "vit_tiny_patch16_384", "image_size": (HEIGHT, WIDTH), "patch_size": PATCH, "d_model": DIM,
       "n_heads": HEADS, "n_layers": DEPTH, "normalization": "vit", "distilled": False, "dropout": 0.0,
       "drop_path_rate": 0.1, "n_cls": CLASSES,
       "decoder": {"name": "mask_transformer", "n_layers": 2, "dropout": 0.1, "drop_path_rate": 0.0}}


def block_shapes() -> dict[str, tuple[int, ...]]:
    return {"norm1.weight": (DIM,), "norm1.bias": (DIM,), "norm2.weight": (DIM,), "norm2.bias": (DIM,),
            "attn.qkv.weight": (3 * DIM, DIM), "attn.qkv.bias": (3 * DIM,), "attn.proj.weight": (DIM, DIM),
            "attn.proj.bias": (DIM,), "mlp.fc1.weight": (4 * DIM, DIM), "mlp.fc1.bias": (4 * DIM,),
            "mlp.fc2.weight": (DIM, 4 * DIM), "mlp.fc2.bias": (DIM,)}


def shapes(distilled: bool, linear: bool) -> dict[str, tuple[int, ...]]:
    """Every key of a published state dict."""
    tokens = HEIGHT // PATCH * (WIDTH // PATCH) + 1 + distilled
    found = {"encoder.cls_token": (1, 1, DIM), "encoder.pos_embed": (1, tokens, DIM), "encoder.norm.weight": (DIM,),
             "encoder.patch_embed.proj.weight": (DIM, 3, PATCH, PATCH), "encoder.patch_embed.proj.bias": (DIM,),
             "encoder.norm.bias": (DIM,), "encoder.head.weight": (1000, DIM), "encoder.head.bias": (1000,)}
    found |= {f"encoder.blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in block_shapes().items()}
    if distilled:
        found |= {"encoder.dist_token": (1, 1, DIM), "encoder.head_dist.weight": (1000, DIM),
                  "encoder.head_dist.bias": (1000,)}
    if linear:
        return found | {"decoder.head.weight": (CLASSES, DIM), "decoder.head.bias": (CLASSES,)}
    found |= {"decoder.cls_emb": (1, CLASSES, DIM), "decoder.proj_patch": (DIM, DIM),
              "decoder.proj_classes": (DIM, DIM), "decoder.proj_dec.weight": (DIM, DIM),
              "decoder.proj_dec.bias": (DIM,), "decoder.decoder_norm.weight": (DIM,),
              "decoder.decoder_norm.bias": (DIM,), "decoder.mask_norm.weight": (CLASSES,),
              "decoder.mask_norm.bias": (CLASSES,)}
    return found | {f"decoder.blocks.{i}.{name}": shape for i in range(2) for name, shape in block_shapes().items()}


def content(distilled: bool = False, linear: bool = False, seed: int = 0) -> dict:
    """What a published training saves. Tokens are so small at first that the norms' epsilon of 1e-5 counts."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(distilled, linear).items():
        state[name] = torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 5)
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
        if name.split(".")[1] in ("patch_embed", "pos_embed", "cls_token", "dist_token"):
            state[name] *= 0.02
    schedule = {"base_lrs": [1e-3], "last_epoch": 9, "_last_lr": [5e-4], "iter_max": 100, "power": 0.9, "min_lr": 1e-5}
    return {"model": state, "n_cls": CLASSES, "epoch": 63, "lr_scheduler": schedule, "loss_scaler": {"scale": 65536.0},
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}},
                          "param_groups": [{"lr": 1e-3, "params": [0]}]}}


def write(folder: Path, saved: dict, net: dict | None = None) -> Path:
    """checkpoint.pth and variant.yml, the latter as yaml.dump writes it: a tuple is tagged as Python's."""
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / "checkpoint.pth")
    variant = {"amp": False, "log_dir": "seg_tiny_mask", "world_batch_size": 8,
               "net_kwargs": NET if net is None else net,
               "inference_kwargs": {"im_size": 512, "window_size": 512, "window_stride": 512}}
    (folder / "variant.yml").write_text(yaml.dump(variant))
    return folder / "checkpoint.pth"


def slow_forward(state: dict, images: torch.Tensor, distilled: bool, linear: bool) -> torch.Tensor:
    """The published forward on the raw tensors, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def dense(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def block(x, name, heads):
        q, k, v = dense(norm(x, f"{name}.norm1"),
                        f"{name}.attn.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / math.sqrt(DIM // heads)).softmax(3) @ v
        x = x + dense(mixed.transpose(1, 2).flatten(2), f"{name}.attn.proj")
        return x + dense(F.gelu(dense(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    patches = F.conv2d(images, state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"],
                       stride=PATCH)
    extra = ["encoder.cls_token", "encoder.dist_token"][:1 + distilled]
    x = torch.cat([*(state[name].expand(len(images), -1, -1) for name in extra), patches.flatten(2).transpose(1, 2)], 1)
    x = x + state["encoder.pos_embed"]
    for i in range(DEPTH):
        merge, recover, mask = (state.get(f"encoder.blocks.{i}.attn.{name}")
                                for name in ("merge_matrix", "recover_matrix", "token_mask"))
        if merge is None:
            x = block(x, f"encoder.blocks.{i}", HEADS)
        else:
            x = recover @ block(merge @ x, f"encoder.blocks.{i}", HEADS) + (1 - mask)[:, None] * x
    x = norm(x, "encoder.norm")[:, len(extra):]
    if linear:
        masks = dense(x, "decoder.head")
    else:
        count = x.shape[1]
        x = torch.cat([dense(x, "decoder.proj_dec"), state["decoder.cls_emb"].expand(len(images), -1, -1)], 1)
        for i in range(2):
            x = block(x, f"decoder.blocks.{i}", DECODER_HEADS)
        x = norm(x, "decoder.decoder_norm")
        rows, classes = x[:, :count] @ state["decoder.proj_patch"], x[:, count:] @ state["decoder.proj_classes"]
        rows, classes = rows / rows.norm(dim=-1, keepdim=True), classes / classes.norm(dim=-1, keepdim=True)
        masks = norm(rows @ classes.transpose(1, 2), "decoder.mask_norm")
    masks = masks.transpose(1, 2).unflatten(2, (HEIGHT // PATCH, WIDTH // PATCH))
    return F.interpolate(masks, size=(HEIGHT, WIDTH), mode="bilinear")


@pytest.mark.parametrize("distilled", [False, True], ids=["vit", "distilled"])
@pytest.mark.parametrize("linear", [False, True], ids=["mask", "linear"])
def test_a_published_checkpoint_gives_the_published_forward(tmp_path, distilled, linear):
    saved = content(distilled, linear)
    net = {**NET, "distilled": distilled, "normalization": "deit" if distilled else "vit"}
    net["decoder"] = {"name": "linear"} if linear else NET["decoder"]
    path = write(tmp_path / "seg", saved, net)
    assert "!!python/tuple" in (tmp_path / "seg" / "variant.yml").read_text()
    model, plan = load_segmenter(path)
    assert plan == CompressionPlan.empty(shape_of(model))
    images = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(images)
        assert torch.equal(load_segmenter(path.parent)[0](images), found)        # the folder will do
    wanted = slow_forward(saved["model"], images.double(), distilled, linear).float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)        # float32, logits about 1
    assert not model.training and model.img_size == (HEIGHT, WIDTH)
    mean, std = model.encoder.pretrained_cfg["mean"], model.encoder.pretrained_cfg["std"]
    assert (mean, std) == (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if distilled else ((0.5,) * 3, (0.5,) * 3))


def test_the_rates_of_the_decoder_are_the_files_and_a_plain_list_is_a_size(tmp_path):
    decoder = {"name": "mask_transformer", "n_layers": 2, "dropout": 0.25, "drop_path_rate": 0.5}
    net = {**NET, "image_size": [HEIGHT, WIDTH], "decoder": decoder}
    del net["distilled"]                                                # vit_large_patch16_384 has none
    model, _ = load_segmenter(write(tmp_path / "seg", content(), net))
    assert [b.mlp.drop1.p for b in model.decoder.blocks] == [0.25,
                                                             0.25] and model.decoder.blocks[
                                                                 1].drop_path1.drop_prob == 0.5


def merging(blocks: tuple[int, ...], rows: int = 4) -> dict:
    """A published state dict with trained matrices, (rows, 7) of 7 tokens, in some blocks of the encoder; patch 3 skips
    them."""
    saved, generator = content(), torch.Generator().manual_seed(3)
    for i in blocks:
        mask = torch.ones(7)
        mask[4] = 0
        saved["model"] |= {f"encoder.blocks.{i}.attn.merge_matrix": torch.rand(rows, 7, generator=generator) * mask,
                           f"encoder.blocks.{i}.attn.recover_matrix": torch.rand(7, rows,
                                                                                 generator=generator) / rows * mask[:,
                                                                                                                    None],
                           f"encoder.blocks.{i}.attn.token_mask": mask,
                           f"encoder.blocks.{i}.attn.bias": torch.zeros(rows)}
    return saved


@pytest.mark.parametrize("blocks", [(0, 1, 2), (0, 2)], ids=["all", "some"])
def test_published_matrices_in_the_encoder_give_the_published_forward_and_a_plan(tmp_path, blocks):
    saved = merging(blocks)
    found = open_model(write(tmp_path / "seg", saved))
    assert [block.tokens is not None for block in found.plan.blocks] == [i in blocks for i in range(DEPTH)]
    assert all(found.plan.blocks[i].tokens.pruned == (3,) and found.plan.tokens_per_block()[i] == 4 for i in blocks)
    images = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given, fast = found.model(images), deploy(found.model)(images)
    wanted = slow_forward(saved["model"], images.double(), False, False).float()
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-4)                # float32, logits about 1
    torch.testing.assert_close(fast, wanted, rtol=0, atol=1e-4)
    save(tmp_path / "kept", found.model, found.plan)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "kept").model(images), given)


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("encoder.blocks.2.attn.recover_matrix"), "encoder.blocks.2.attn.recover_matrix is missing"),
    (lambda s: s.update({"encoder.blocks.0.attn.merge_matrix": torch.ones(4, 6)}), "don't fit 7 tokens"),
    (lambda s: s.pop("encoder.blocks.0.norm1.bias"), "missing keys encoder.blocks.0.block.norm1.bias"),
], ids=["part", "size", "key"])
def test_published_matrices_that_do_not_fit_are_refused_by_file_and_key(tmp_path, change, says):
    saved = merging((0, 2))
    change(saved["model"])
    path = write(tmp_path / "seg", saved)
    with pytest.raises(InputError, match=f"{path}.*{says}"):
        open_model(path)


# ---------------------------------------------------------------- faults

def refused(path: Path, says: str, where: str = "checkpoint.pth") -> None:
    with pytest.raises(InputError, match=f"{path.parent / where}.*{says}"):
        load_segmenter(path)


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("encoder.blocks.1.mlp.fc1.weight"), "missing keys encoder.blocks.1.mlp.fc1.weight"),
    (lambda s: s.pop("decoder.cls_emb"), "missing keys decoder.cls_emb"),
    (lambda s: s.update({"encoder.blocks.0.attn.merge_matrix": torch.ones(3, 7)}),
     "encoder.blocks.0.attn.recover_matrix is missing"),
    (lambda s: s.update({"encoder.blocks.0.attn.scale": torch.ones(1)}), "unknown keys encoder.blocks.0.attn.scale"),
    (lambda s: s.update({"decoder.cls_emb": torch.ones(1, 6, DIM)}), r"decoder.cls_emb is \(1, 6, 128\), the model's "
                                                                     r"is \(1, 5, 128\)"),
    (lambda s: s.update({"encoder.blocks.3.norm1.weight": torch.ones(DIM)}), "4 blocks in the encoder; .*variant.yml "
                                                                             "says 3"),
    (lambda s: s.update({"decoder.cls_emb": 3}), "'decoder.cls_emb' is not a tensor"),
], ids=["encoder", "decoder", "matrix", "unknown", "shape", "depth", "kind"])
def test_weights_that_do_not_fit_are_refused_by_file_and_key(tmp_path, change, says):
    saved = content()
    change(saved["model"])
    refused(write(tmp_path / "seg", saved), says)


@pytest.mark.parametrize("change, says", [
    ({"d_model": 64}, "encoder.cls_token is"), ({"image_size": (32, 32)}, "encoder.pos_embed is"),
    ({"n_cls": 6}, "decoder.cls_emb is"),
])
def test_sizes_of_the_variant_that_are_not_the_weights_are_refused_by_key(tmp_path, change, says):
    refused(write(tmp_path / "seg", content(), {**NET, **change}), f"does not fit the model: .*{says}")


@pytest.mark.parametrize("change, says", [
    ({"d_model": None}, r"net_kwargs.d_model is None"), ({"n_layers": -3}, "net_kwargs.n_layers is -3"),
    ({"patch_size": True}, "net_kwargs.patch_size is True"), ({"image_size": 512}, "net_kwargs.image_size is 512"),
    ({"d_model": 2**60}, "net_kwargs.d_model is 1152921504606846976"), ({"d_model": 2**14}, "a model of [0-9,]+ "
                                                                                            "parameters"),
    ({"n_layers": 1000}, None), ({"n_cls": 10**9}, "net_kwargs.n_cls"),
    ({"normalization": "clip"}, "net_kwargs.normalization is 'clip'"),
    ({"decoder": {"name": "deeplab_dec"}}, "net_kwargs.decoder.name is 'deeplab_dec'"),
    ({"decoder": None}, "net_kwargs.decoder is None"),
    ({"decoder": {"name": "mask_transformer"}}, "net_kwargs.decoder.n_layers is None"),
    ({"n_heads": 3}, "timm could not build it"), ({"decoder": {"name": ["linear"]}}, "net_kwargs.decoder.name is"),
])
def test_a_variant_that_asks_for_no_segmenter_is_refused_by_its_key(tmp_path, change, says):
    path = write(tmp_path / "seg", content(), {**NET, **change})
    refused(path, says or "says 1000", "variant.yml" if says else "checkpoint.pth")


def test_a_missing_variant_and_a_missing_checkpoint_are_named(tmp_path):
    path = write(tmp_path / "seg", content())
    (path.parent / "variant.yml").unlink()
    refused(path, "no such file; a published Segmenter has it beside its checkpoint", "variant.yml")
    refused(tmp_path / "nowhere" / "checkpoint.pth", "no such file")


@pytest.mark.parametrize("text", ["", "- 1", "net_kwargs: 3", "other: {}"])
def test_a_variant_without_net_kwargs_is_refused(tmp_path, text):
    path = write(tmp_path / "seg", content())
    (path.parent / "variant.yml").write_text(text)
    refused(path, "holds no net_kwargs", "variant.yml")


class Writes:
    """A pickle that writes a file where it is loaded by pickle."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return exec, (f"open({self.target!r}, 'w').write('run')",)


def test_a_pickle_that_would_write_a_file_writes_none(tmp_path):
    target = tmp_path / "written"
    refused(write(tmp_path / "seg", {**content(), "optimizer": Writes(target)}), "holds more than weights.*nothing of "
                                                                                 "it was run")
    assert not target.exists()
    torch.load(tmp_path / "seg" / "checkpoint.pth", weights_only=False)
    assert target.exists()                                              # the file would have written it


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"])
def test_a_variant_that_would_run_code_runs_none(tmp_path, tag):
    path = write(tmp_path / "seg", content())
    (path.parent / "variant.yml").write_text(f"net_kwargs: {tag} ['touch {tmp_path / 'written'}']\n")
    refused(path, "not plain YAML; nothing of it was run", "variant.yml")
    assert not (tmp_path / "written").exists()


def test_a_variant_of_aliases_upon_aliases_is_refused_at_once(tmp_path):
    path = write(tmp_path / "seg", content())
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (path.parent / "variant.yml").write_text("\n".join(lines) + "\nnet_kwargs: {image_size: *a29}\n")
    refused(path, "net_kwargs.image_size is", "variant.yml")


def test_a_namespace_beside_the_weights_is_allowed(tmp_path):
    load_segmenter(write(tmp_path / "seg", {**content(), "args": argparse.Namespace(lr=1e-3)}))
