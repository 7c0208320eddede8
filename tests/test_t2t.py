"""T2T-ViT: the stem is that of slow loops written from the paper's formulas, sizes are the published ones, published
files open."""
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from training_fixtures import full_plan, logits, one_thread  # noqa: F401

from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.create import create_model
from vitlab.models.opening import open_model
from vitlab.plan import CompressionPlan
from vitlab.runtime.files import InputError

CUT = {"depth": 2, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 4.0}
SIZE = {**CUT, "img_size": 32, "num_classes": 5}           # 4 patches


def small(name: str) -> nn.Module:
    """Every parameter moved, so that no norm or bias is 1 or 0."""
    generator = torch.Generator().manual_seed(0)
    model = create_model(name, **SIZE)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key != "pos_embed":
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def windows(x: Tensor, size: int, stride: int, pad: int) -> Tensor:
    """(C, H, W) -> (N, C size^2): each window's numbers, channel by channel, row by row; zeros beyond the edge."""
    channels, height, width = x.shape
    rows = []
    for top in range(-pad, height + pad - size + 1, stride):
        for left in range(-pad, width + pad - size + 1, stride):
            rows.append([float(x[c, i, j]) if 0 <= i < height and 0 <= j < width else 0.0 for c in range(channels)
                         for i in range(top, top + size) for j in range(left, left + size)])
    return torch.tensor(rows)


def mixed(x: Tensor, state: dict[str, Tensor], at: str) -> Tensor:
    """Of published weights under `at`: tokens (N, dim) -> (N, 64), query by query."""
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{at}{name}.weight"].T + state.get(f"{at}{name}.bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{at}{name}.weight"] + state[
            f"{at}{name}.bias"]

    performer, y, out = f"{at}w" in state, norm(x, "norm1"), []
    if performer:
        k, q, v = linear(y, "kqv").split(64, dim=1)
        w = state[f"{at}w"]

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            """The mean over random rows w of exp(w a - |a|^2 / 2) exp(w b - |b|^2 / 2)."""
            return (torch.exp(w @ a - a @ a / 2) * torch.exp(w @ b - b @ b / 2)).mean()
    else:
        q, k, v = linear(y, "attn.qkv").split(64, dim=1)

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(a @ b / math.sqrt(x.shape[1]))
    for query in q:
        weights = torch.stack([kernel(query, key) for key in k])
        out.append((weights.unsqueeze(1) * v).sum(0) / (weights.sum() + 1e-8 * performer))
    z = v + linear(torch.stack(out), "proj" if performer else "attn.proj")
    hidden = gelu(linear(norm(z, "norm2"), "mlp.0" if performer else "mlp.fc1"))
    return z + linear(hidden, "mlp.2" if performer else "mlp.fc2")


def published(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names of the published files."""
    performer = "patch_embed.attention1.w" in model.state_dict()
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("patch_embed.proj.", "patch_embed.project.").replace("patch_embed.", "tokens_to_token.")
        if performer and "tokens_to_token" in name:
            name = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
        state[name] = value
    return state


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_the_stem_is_the_papers_and_a_published_file_opens_with_the_same_logits(name, tmp_path):
    model, image = small(name), torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(1))
    state = published(model)
    x = mixed(windows(image, 7, 4, 2), state, "tokens_to_token.attention1.")                    # (4 x 12, 64)
    x = mixed(windows(x.T.reshape(64, 4, 12), 3, 2, 1), state, "tokens_to_token.attention2.")   # (2 x 6, 64)
    x = windows(x.T.reshape(64, 2, 6), 3, 2, 1)                                                 # (1 x 3, 576)
    x = x @ state["tokens_to_token.project.weight"].T + state["tokens_to_token.project.bias"]
    torch.save({"state_dict_ema": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "t2t.pth.tar")
    found = open_model(tmp_path / "t2t.pth.tar", model=name, img_size=32, **CUT)
    assert torch.equal(logits(found.model), logits(model)) and found.plan.shape.num_classes == 5
    model.set_input_size((16, 48))
    # sums of up to 576 products in other orders
    torch.testing.assert_close(model.patch_embed(image.unsqueeze(0))[0], x, rtol=1e-4, atol=1e-4)


def test_positions_are_sines_and_cosines_and_not_trained():
    positions = create_model("t2t_vit_7", **SIZE).pos_embed
    assert positions.shape == (1, 5, 24) and not positions.requires_grad
    for n, d in ((3, 0), (4, 5), (2, 22)):
        angle = n / 10000 ** (2 * (d // 2) / 24)
        assert positions[0, n, d].item() == pytest.approx(math.cos(angle) if d % 2 else math.sin(angle), abs=1e-6)


# millions of parameters, as published
SIZES = {"t2t_vit_7": 4.3, "t2t_vit_12": 6.9, "t2t_vit_14": 21.5, "t2t_vit_t_24": 64.1}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.06)


def test_it_is_compressed_deployed_and_saved_as_any_other(tmp_path):
    dense = small("t2t_vit_7")
    assert torch.equal(logits(compress(dense, CompressionPlan.empty(shape_of(dense)))), logits(dense))
    plan = full_plan(dense)
    model = compress(dense, plan)
    again = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan)).model
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(deploy(model)), logits(model), rtol=1e-4, atol=1e-5)      # folded matrices


@pytest.mark.parametrize("args", [{"img_size": 40}, {"patch_size": 8}])
def test_other_patches_are_refused(args):
    with pytest.raises(InputError, match="tokens of T2T-ViT stand 16 pixels apart, and images are multiples of that"):
        create_model("t2t_vit_7", **{**SIZE, **args})
