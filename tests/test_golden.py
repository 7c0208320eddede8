"""Golden numbers in a clean clone: the slice of the reference tensors in tests/golden (its README says how it was
cut)."""
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from test_reference import AGREEMENT, FOLDER, best, relative

from vitlab.criteria.hsic import dependence, gaussian_kernels, shared_dependence
from vitlab.criteria.planning import prune_and_merge
from vitlab.criteria.units import heads_by_hsic, neurons_by_hsic
from vitlab.measure.capture import token_scores
from vitlab.models import compress, deploy
from vitlab.plan import CompressionPlan, tokens
from vitlab.plan.cost import mdc_macs
from vitlab.plan.shape import ViTShape

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

import cut  # noqa: E402

both = pytest.mark.parametrize("name", ["pm_center", "pm_merge"])


@functools.cache
def golden() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, str]]]:
    """Tensors by "name.key", and the metadata of each file that they were cut from."""
    tensors, meta = cut.read(GOLDEN / "reference.safetensors")
    return tensors, {name: json.loads(text) for name, text in meta.items()}


def of(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, meta = golden()
    return {key.removeprefix(f"{name}."): value for key,
            value in tensors.items() if key.startswith(f"{name}.")}, meta[name]


def shape(meta: dict[str, str]) -> ViTShape:
    sizes = {key: int(meta[key]) for key in ("embed_dim", "depth", "num_heads")}
    return ViTShape(img_size=(int(meta["img_size"]),) * 2, patch_size=(int(meta["patch_size"]),) * 2,
                    num_neurons=4 * sizes["embed_dim"], head_dim=sizes["embed_dim"] // sizes["num_heads"], **sizes)


def published_plan(name: str) -> CompressionPlan:
    tensors, meta = of(name)
    return prune_and_merge(tensors["token_scores"], shape(meta), rule=meta["variant"],
                           keep_rate=float(meta["keep_rate"]), prune_rate=float(meta["prune_rate"]),
                           boundary="reference", weights="reference")


def last_block(states: list[torch.Tensor]) -> torch.nn.Module:
    """The dense model's last block and classifier, as a model of depth 1 whose tokens are the next of `states`,
    whatever the images."""
    model = cut.dense_model(*of("pm_center"), depth=1)
    # the last thing before the blocks
    model.pos_drop.register_forward_hook(lambda module, inputs, output: states.pop(0))
    return model


def test_the_slice_is_small():
    assert (GOLDEN / "reference.safetensors").stat().st_size < 2**20


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER} to cut the slice from")
def test_the_slice_is_what_is_cut_from_the_reference():
    tensors, meta = cut.cut(FOLDER)
    assert tensors.keys() == golden()[0].keys() and {name: json.loads(text) for name,
                                                     text in meta.items()} == golden()[1]
    for key, value in tensors.items():
        # States are float32 sums of this machine's order; whatever is the reference's own is the same.
        torch.testing.assert_close(golden()[0][key], value, rtol=1e-4,
                                   atol=1e-4 * max(1.0, float(value.double().abs().max())), msg=key)


def test_token_scores_of_the_last_block_agree():
    tensors, _ = of("pm_center")
    states = tensors["entering_last_block"]
    batches = [(torch.zeros(len(state), 3, 64, 64), target) for state, target in zip(states, tensors["target"])]
    got = token_scores(last_block(list(states)), batches, absolute="batch", progress=False)
    assert relative(got[0], tensors["token_scores"][-1]) < AGREEMENT


@both
def test_masks_counts_and_matrices_from_the_scores_agree(name):
    tensors, meta = of(name)
    plan = published_plan(name)
    assert plan.tokens_per_block() == json.loads(meta["channels"])
    for block, mask in zip(plan.blocks, tensors["token_masks"], strict=True):
        assert torch.equal(tokens.token_mask(block.tokens, 1), mask.bool())
    for index in cut.BLOCKS:
        merge = tokens.merge_matrix(plan.blocks[index].tokens, 1)
        assert torch.equal(merge != 0, tensors[f"merge_matrix.{index}"] != 0)
        assert relative(merge, tensors[f"merge_matrix.{index}"]) < AGREEMENT
        assert relative(tokens.reconstruct_matrix(merge), tensors[f"recover_matrix.{index}"]) < AGREEMENT


@pytest.mark.parametrize("form", ["dense", "training", "deployed"])
def test_logits_through_the_last_block_agree(form):
    tensors, meta = of("pm_center")
    dense = form == "dense"
    states = tensors["entering_last_block"][0] if dense else tensors["pruned_entering_last_block"]
    model = last_block([states])
    if not dense:
        one = ViTShape(**vars(shape(meta)) | {"depth": 1})
        model = compress(model, CompressionPlan(shape=one, blocks=published_plan("pm_center").blocks[-1:]))
    if form == "deployed":
        model = deploy(model)
    with torch.no_grad():
        got = model(torch.zeros(len(states), 3, 64, 64))
    assert relative(got, tensors["dense_logits" if dense else "pruned_logits"]) < AGREEMENT
    assert relative(tensors["dense_logits"][:len(tensors["pruned_logits"])], tensors["pruned_logits"]) > 10 * AGREEMENT


def test_hsic_values_agree():
    tensors, _ = of("mdc")
    x, z = (gaussian_kernels(tensors[name][None]) for name in ("hsic.x", "hsic.z"))
    assert relative(dependence(x, tensors["hsic.y_prob"]), tensors["hsic.relevance"]) < AGREEMENT
    assert relative(shared_dependence(torch.cat([x, z]))[0, 1:], tensors["hsic.redundancy"]) < AGREEMENT


@pytest.mark.parametrize("index", cut.UNIT_BLOCKS)
def test_head_and_neuron_scores_agree(index):
    tensors, _ = of("mdc")
    probabilities = tensors["dense_logits"].double().softmax(dim=1)
    # means of one are themselves
    heads = heads_by_hsic(tensors[f"head_means.{index}"].double()[..., None])(probabilities)
    assert relative(heads, tensors["head_score"][index]) < AGREEMENT
    numbers = tensors[f"neuron_numbers.{index}"]
    neurons = neurons_by_hsic(tensors[f"neurons.{index}"].double()[..., None])(probabilities)
    assert relative(neurons, tensors["neuron_score"][index, numbers]) < AGREEMENT


def test_masks_by_policy_and_costs_agree():
    tensors, meta = of("mdc")
    depth = int(meta["depth"])
    for policy, heads, neurons in zip(tensors["policy"].tolist(), tensors["head_mask"], tensors["neuron_mask"]):
        for index in range(depth):
            for scores, ratio, mask in ((tensors["neuron_score"][index], policy[index], neurons[index]),
                                        (tensors["head_score"][index], policy[depth + index], heads[index])):
                assert mask.nonzero().flatten().tolist() == list(best(scores, ratio))
    kept = [tensors[name].sum(dim=2).long().numpy() for name in ("head_mask", "neuron_mask")]
    found = mdc_macs(shape(meta), *kept, tensors["policy"][:, -1].numpy())
    assert (found / 1e9).tolist() == pytest.approx(tensors["policy_gmacs"].tolist(), rel=1e-12)
