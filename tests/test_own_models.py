"""Models of one's own code: a class that is timm's, and an encoder inside another module."""
import pytest
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training_fixtures import SIZE, full_plan, images, logits, one_thread, tiny, token_plan  # noqa: F401

from vitlab.models import checkpoint, compress, deploy, shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.runtime.files import InputError


class Detector(nn.Module):
    """A score for each patch from the last blocks' grids; the encoder is used under two names."""

    def __init__(self, **args) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.encoder = self.backbone.again = tiny(num_classes=0, **args)
        self.head = nn.Conv2d(48, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        grids = self.backbone.encoder.forward_intermediates(x, 2, intermediates_only=True)
        return self.head(torch.cat(grids, dim=1))


class Scored(Detector):
    """The same from the tokens at the end."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.encoder.forward_features(x)[:, 1:]
        return self.head(tokens.transpose(1, 2).unflatten(2, (4, 4)).repeat(1, 2, 1, 1))


def test_an_encoder_inside_another_module_is_cut_where_it_stands_and_nothing_else_changes():
    whole = Detector().eval()
    before = logits(whole)
    plan = full_plan(whole.backbone.encoder)
    smaller = compress(whole, plan, at="backbone.encoder")
    expected = Detector().eval()
    expected.load_state_dict(whole.state_dict())
    expected.backbone.encoder = compress(whole.backbone.encoder, plan)
    assert torch.equal(logits(smaller), logits(expected)) and torch.equal(logits(whole), before)
    assert smaller.backbone.again is smaller.backbone.encoder and smaller.head is not whole.head
    empty = CompressionPlan.empty(shape_of(whole.backbone.encoder))
    assert torch.equal(logits(compress(whole, empty, at="backbone.encoder")), before)
    again = compress(smaller, plan, before=plan, at="backbone.encoder")
    assert torch.equal(logits(again), logits(smaller))


def test_a_deployed_encoder_gives_the_whole_grid_whatever_it_pools():
    whole = Scored().eval()
    smaller = compress(whole, token_plan(whole.backbone.encoder), at="backbone.encoder")
    assert whole.backbone.encoder.global_pool == "token"
    torch.testing.assert_close(logits(deploy(smaller, at="backbone.encoder")), logits(smaller), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", [lambda whole, plan: compress(whole, plan, at="encoder"),
                                 lambda whole, plan: deploy(whole, at="backbone.encodr")])
def test_a_path_that_is_none_is_refused_with_those_that_are(act):
    whole = Detector()
    with pytest.raises(InputError, match="Detector has no '.*'; vision transformers stand at backbone.encoder$"):
        act(whole, full_plan(whole.backbone.encoder))


class Doubled(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return 2 * super().forward_head(x, pre_logits)


@register_model
def vit_doubled(pretrained: bool = False, **args) -> Doubled:
    return build_model_with_cfg(Doubled, "vit_doubled", pretrained, **args)


def test_a_class_of_ones_own_is_cut_saved_and_opened_under_its_name(tmp_path):
    dense = create_model("vit_doubled", img_size=32, num_classes=3, **SIZE)
    plan = full_plan(dense)
    model = compress(dense, plan)
    assert isinstance(model, Doubled)
    again = checkpoint.load(checkpoint.save(tmp_path / "c", model, plan)).model
    assert isinstance(again, Doubled) and torch.equal(logits(again, images()), logits(model, images()))
    with pytest.raises(InputError, match="its name is not known; make it there .a class of your own under"):
        checkpoint.save(tmp_path / "d", Doubled(img_size=32, **SIZE), CompressionPlan.empty(shape_of(dense)))
