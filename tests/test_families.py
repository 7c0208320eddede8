"""Every pretrained vision transformer that timm names is handled or refused by name; of every structure among them a
small model keeps the invariants that a plan promises."""
import pytest
import registry
import torch
from conftest import randomise
from timm.layers import RelPosBias, RelPosMlp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models import check_supported, compress, deploy, shape_of
from vitlab.models.families import mixing_layer
from vitlab.models.support import attention_block, refuse
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.plan.rules import Match, MergeReconstruct, ReadOut, SharedUpdate
from vitlab.plan.shape import POOL_TOKEN
from vitlab.runtime.files import InputError

HANDLED = 440                       # of the weights, at least


def handled() -> dict[str, list[str]]:
    return {name: like for name, like in registry.structures().items() if refuse(registry.tiny(name)) is None}


def test_most_pretrained_weights_are_of_models_that_are_handled_and_the_rest_is_refused_by_name():
    weights, counted = registry.pretrained(), 0
    for name, like in registry.structures().items():
        model = registry.tiny(name)
        if refuse(model) is None:
            counted += sum(weights[each] for each in like)
        else:
            with pytest.raises(InputError, match=rf"can't be handled: {type(model).__name__} "):
                check_supported(model)
    assert counted >= HANDLED


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = registry.tiny(name, "cpu")
    randomise(model, 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model.requires_grad_(False)


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def near(a: torch.Tensor, b: torch.Tensor, by: float = 1e-4) -> bool:
    """Of logits computed in another order in float32."""
    return bool(((a - b).abs().max() / b.abs().max()).item() < by)


def some_units(shape) -> tuple[BlockPlan, ...]:
    """What can go of heads and neurons in each block: other ones in each."""
    blocks = []
    for index in range(shape.depth):
        heads = tuple(h for h in range(shape.num_heads) if h != index % shape.num_heads)
        neurons = tuple(n for n in range(shape.num_neurons) if n % 3 != index % 3)
        blocks.append(BlockPlan(heads=heads if shape.cuts("heads") else None,
                                neurons=neurons if shape.cuts("neurons") else None))
    return tuple(blocks)


def by_place(shape) -> list[tuple]:
    """Per block, a rule that merges by place."""
    n, columns = shape.num_patches, shape.grid_size[1]
    pairs = tuple(j // 2 for j in range(n))
    rows = tuple(j // columns for j in range(n))
    weights = tuple(1 / rows.count(r) for r in rows)
    merge = MergeReconstruct(regions=pairs, weights=tuple(1 / pairs.count(p) for p in pairs))
    return [merge, SharedUpdate(regions=rows, weights=weights), merge]


def by_content(shape) -> list:
    protect = 0.1 if shape.class_token else 0.0
    rules: list = [Match(merged=shape.num_patches // 4, protect=protect) for _ in range(shape.depth)]
    if shape.pool == POOL_TOKEN and shape.num_prefix_tokens:
        rules[-1] = ReadOut()
    return rules


class Without(nn.Module):
    """Sets what goes into a layer to 0 for units that a plan cuts."""

    def __init__(self, kept, width: int, total: int) -> None:
        super().__init__()
        gone = torch.ones(total // width, dtype=torch.bool)
        gone[list(kept)] = False
        self.gone = gone.repeat_interleave(width)

    def __call__(self, module, inputs):
        return (inputs[0].masked_fill(self.gone, 0),)


STRUCTURES = list(handled())


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_plan_holds_what_it_promises_for_every_structure(name):
    model = made(name)
    x, shape = images(model), shape_of(model)
    dense = model(x)
    empty = CompressionPlan.empty(shape)
    assert torch.equal(compress(model, empty)(x), dense)
    # Heads and neurons: cut is masked.
    plan = CompressionPlan(shape=shape, blocks=some_units(shape))
    cut, masked = compress(model, plan), compress(model, empty)
    for index, block in enumerate(plan.blocks):
        for kind in ("heads", "neurons"):
            kept = getattr(block, kind)
            if kept is not None:
                linear, width = mixing_layer(attention_block(masked.blocks[index]), kind)
                linear.register_forward_pre_hook(Without(kept, width, linear.in_features))
    assert near(cut(x), masked(x), 1e-5)
    assert plan == empty or not near(cut(x), dense, 1e-3)
    check_cost(cut, plan, x)
    # Tokens: a deployed model is the trained one.
    if not shape.cuts("tokens"):
        with pytest.raises(InputError, match="tokens of this model can't be cut"):
            CompressionPlan(shape=shape, blocks=tuple(BlockPlan(tokens=rule) for rule in by_place(shape)[:shape.depth]))
        return
    for rules in (by_place(shape)[:shape.depth], by_content(shape)):
        plan = CompressionPlan(shape=shape, blocks=tuple(
            BlockPlan(heads=block.heads, neurons=block.neurons, tokens=rule)
            for block, rule in zip(some_units(shape), rules)))
        trained = compress(model, plan)
        deployed = deploy(trained)
        assert near(deployed(x), trained(x)) and not near(trained(x), dense, 1e-3)
        check_cost(deployed, plan, x)


def check_cost(model: nn.Module, plan: CompressionPlan, x: torch.Tensor) -> None:
    """MACs are torch's own count, but for what scales rows (cost counts it, torch does not), and biases by distance,
    which are made once for all images (torch counts it, cost does not)."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False           # torch counts no fused attention on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x[:1])
    with FlopCounterMode(display=False) as once:
        for module in model.modules():
            if isinstance(module, (RelPosMlp, RelPosBias)):
                module.get_bias()
    scaled = sum(flow.pooled for flow in plan.flows()) * plan.shape.embed_dim
    assert (counter.get_total_flops() - once.get_total_flops()) // 2 == cost.macs(plan)["total"] - scaled
