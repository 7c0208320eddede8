"""Recipes: complete, checked, and scaled as their source says."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from training_fixtures import small_recipe

from vitlab.data.order import drawing
from vitlab.runtime.files import InputError
from vitlab.training.recipes import DISTILL, RECIPES, Recipe, recipe


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_named_recipe_says_its_source_command_and_what_to_expect(name):
    found = recipe(name)
    assert found.name == name and found.source and found.expected
    assert found.command.startswith("vitlab ") and f"--recipe {name}" in found.command
    assert found.distill in DISTILL
    # a recipe that distils needs its teacher named
    assert ("--teacher" in found.command) == (found.distill != "none")


@pytest.mark.parametrize("name, alpha", [("deit_tiny_pm", 0.8), ("deit_small_pm", 1.0), ("mae_base_pm", 1.0)])
def test_the_published_recipes_have_the_settings_of_the_paper(name, alpha):
    """Methods A8, by hand: tau 20, AdamW, lr 1e-4 * batch / 512, cosine, weight decay 1e-3, no auto-augment, 30
    epochs."""
    r = recipe(name)
    assert (r.distill, r.alpha, r.tau) == ("soft", alpha, 20)
    assert (r.optimizer, r.schedule, r.epochs, r.weight_decay) == ("adamw", "cosine", 30, 1e-3)
    assert (r.lr, r.lr_batch) == (1e-4, 512)
    assert not r.augment.get("auto_augment")


@pytest.mark.parametrize("field, value", [
    ("epochs", 0), ("epochs", -1), ("batch_size", 0), ("lr", 0.0), ("lr", -1e-3), ("lr", math.nan), ("lr_batch", 0),
    ("weight_decay", -1e-9), ("alpha", -0.01), ("alpha", 1.01), ("tau", 0.0), ("tau", -1.0),
    ("smoothing", 1.0), ("smoothing", -0.1), ("distill", "gentle"), ("trainable", "some"),
])
def test_a_value_out_of_range_is_refused_naming_recipe_and_field(field, value):
    with pytest.raises(InputError, match=f"recipe test: {field} is {value!r}"):
        small_recipe(**{field: value})


@pytest.mark.parametrize("field, value", [
    ("epochs", 1), ("batch_size", 1), ("weight_decay", 0.0), ("alpha", 0.0), ("alpha", 1.0), ("smoothing", 0.0)])
def test_the_ends_of_a_range_belong_to_it(field, value):
    assert getattr(small_recipe(**{field: value}), field) == value


def test_a_changed_copy_is_checked_too_and_none_changes_nothing():
    base = small_recipe()
    assert base.replace(lr=None, epochs=7) == small_recipe(epochs=7)
    assert base.epochs == 2                                                     # the original stays
    with pytest.raises(InputError, match="recipe test: lr"):
        base.replace(lr=-1.0)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(InputError, match="'digit' is not known") as caught:
        recipe("digit")
    assert all(name in str(caught.value) for name in RECIPES)


@pytest.mark.parametrize("batch_size, wanted", [(512, 1e-4), (128, 2.5e-5), (1024, 2e-4)])
def test_the_step_size_scales_linearly_with_the_batch(batch_size, wanted):
    scaled = Recipe(name="a", source="b", command="c", lr=1e-4, lr_batch=512, batch_size=batch_size).scaled_lr
    assert scaled == pytest.approx(wanted, rel=1e-12)           # two float64 operations


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_augmentation_of_a_recipe_can_be_drawn_again_and_again(name):
    """RandAugment has operations, and magnitudes of them, that are drawn once in a thousand images."""
    transform = create_transform(32, is_training=True, **RECIPES[name].augment)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for seed in range(3000 if "auto_augment" in RECIPES[name].augment else 100):
        with drawing((seed,)):
            assert torch.isfinite(transform(image)).all(), f"seed {seed}"
