"""Every rule's model on a GPU, without one: tensors without numbers that stand on "cuda", refuse to meet those of
another device, and refuse whatever needs their numbers, for which a GPU would be waited for."""
import copy
import dataclasses
import random

import pytest
import torch
from conftest import random_rule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitlab.models import compress, deploy, shape_of
from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.rules import TOKEN_RULES, Match, ReadOut, Select, TokenRule


class NoNumbers(FakeTensorMode):
    """One for all copies of what was made in it."""

    def __deepcopy__(self, memo: dict) -> "NoNumbers":
        return self


def applied(self: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """What `to` does, by new parameters: torch's own can't swap tensors without numbers."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fn(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


# a copy of a parameter asks whether it has one
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")


@pytest.fixture
def without_numbers(monkeypatch):
    """without_numbers(model, device): it, its tensors of the same sizes on that device."""
    monkeypatch.setattr(nn.Module, "_apply", applied)
    with NoNumbers(), torch.no_grad():
        yield lambda model, device: model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


def plan_of(model: nn.Module, rules: list[TokenRule | None]) -> CompressionPlan:
    """Besides, block 0 loses a head and some neurons."""
    shape = shape_of(model)
    units = {"heads": tuple(range(1, shape.num_heads)), "neurons": tuple(range(3, shape.num_neurons))}
    return CompressionPlan(shape=shape,
                           blocks=tuple(BlockPlan(tokens=rule, **({} if i else units)) for i, rule in enumerate(rules)))


def rules_by_place(n: int) -> list[TokenRule | None]:
    one, other, span = (random_rule(n, random.Random(seed)) for seed in (1, 2, 3))
    return [one, tokens.shared(other, own=0.5), dataclasses.replace(span, span=2), None, None,
            Select(kept=n - 3, ranked_by="all"), Select(kept=n - 5)]


def rules_by_content(n: int) -> list[TokenRule | None]:
    return [None, Match(merged=2, protect=1.0), Match(merged=0, protect=1.0), ReadOut()]


@pytest.fixture(params=[rules_by_place, rules_by_content])
def cut(request, tiny_vit) -> tuple[nn.Module, CompressionPlan]:
    """(a dense model, a plan for it), made before numbers are gone."""
    sizes = {"img_size": (48, 80), "num_heads": 2, "embed_dim": 26}
    depth = len(request.param(15))
    dense = tiny_vit("deit", depth=depth, **sizes)
    return dense, plan_of(dense, request.param(shape_of(dense).num_patches))


def test_the_plans_have_every_token_rule():
    kinds = {rule.kind for rules in (rules_by_place(15), rules_by_content(15)) for rule in rules if rule is not None}
    assert kinds == set(TOKEN_RULES)


def check(model: nn.Module) -> None:
    x = torch.empty(2, model.in_chans, *model.patch_embed.img_size, device="cuda")
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"cuda"}
    given = model(x)
    assert given.device.type == "cuda" and given.shape == (2, model.num_classes)


def test_a_model_that_is_on_a_gpu_is_compressed_deployed_and_run_there(cut, without_numbers):
    dense, plan = cut
    dense = without_numbers(dense, "cuda")
    model = compress(dense, plan)
    check(model)
    check(deploy(model))


def test_a_model_that_is_compressed_or_deployed_before_it_moves_to_a_gpu_runs_there(cut, without_numbers):
    dense, plan = cut
    model = compress(without_numbers(dense, "cpu"), plan)
    check(copy.deepcopy(model).to("cuda"))
    check(deploy(model).to("cuda"))
