"""Towers of models of images and texts: a head that is a projection gives features, and it is known that it does."""
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from registry import pretrained
from safetensors.torch import load_file, save_file
from timm.data import infer_imagenet_subset
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlab.measure.distance import Classes, Features, output_of
from vitlab.models import checkpoint, compress, ends, shape_of
from vitlab.models.create import create_model
from vitlab.models.opening import open_model
from vitlab.plan import CompressionPlan, cost

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
TOWER, PLAIN = "vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_224"
BAMBOO = 115217                                 # classes of the Bamboo data set, which timm has no list of


def test_projections_are_told_from_classifiers_in_all_of_timms_registry():
    """Of what the rule does not look at: the number of classes of a set of labels that timm knows."""
    found, names = {True: 0, False: 0}, pretrained()
    for name in (each for each in timm.list_pretrained() if each.split(".")[0] in names):
        config = timm.get_pretrained_cfg(name).to_dict()
        count = config["num_classes"]
        head = nn.Linear(1, count, device="meta") if count else nn.Identity()
        known = infer_imagenet_subset(config) is not None or count == BAMBOO
        told = ends.projects(SimpleNamespace(pretrained_cfg=config, head=head))
        assert told == (bool(count) and not known), (name, count)
        found[told] += 1
    assert found[True] >= 80 and found[False] >= 300


def test_a_tower_gives_features_until_it_has_another_head(tmp_path):
    model = create_model(TOWER, **SIZE)
    assert model.head.out_features == 512 and type(output_of(model)) is type(output_of(shape_of(model))) is Features
    plan = CompressionPlan.empty(shape_of(model))
    assert plan.shape.projection and CompressionPlan.from_json(json.loads(plan.to_json())) == plan
    assert cost.macs(plan)["classifier"] == 24 * 512
    loaded = open_model(checkpoint.save(tmp_path / "m", compress(model, plan), plan)).model
    assert type(output_of(loaded)) is Features and loaded.head.out_features == 512
    loaded.reset_classifier(5)
    plan.check_fits(shape_of(loaded))                           # what is cut of a tower can be cut of a classifier
    assert type(output_of(loaded)) is type(output_of(create_model(TOWER, num_classes=5, **SIZE))) is Classes


@pytest.mark.parametrize("bias, kind", [(0.0, Features), (0.1, Classes)])
def test_weights_whose_head_has_no_bias_are_a_towers_whatever_tag_is_named(bias, kind, tmp_path):
    model = timm.create_model(PLAIN, num_classes=13, **SIZE)
    model.head.bias.data.fill_(bias)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found = open_model(tmp_path / "w.safetensors", model=PLAIN, patch_size=8, embed_dim=24, depth=1, num_heads=3,
                       img_size=32).model
    assert type(output_of(found)) is kind and found.head.out_features == 13
    assert type(output_of(open_model(checkpoint.save(tmp_path / "m", found, CompressionPlan.empty(shape_of(found)))
                                     ).model)) is kind
    assert torch.equal(load_file(tmp_path / "m" / checkpoint.WEIGHTS)["head.weight"], model.head.weight)


def test_a_head_of_every_token_is_counted_for_every_token():
    model = create_model("vit_nano_patch4_32", num_classes=13, global_pool="", depth=1).requires_grad_(False)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, 32, 32))
    assert cost.macs(CompressionPlan.empty(shape_of(model)))["total"] * 2 == counted.get_total_flops()
