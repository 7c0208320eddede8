"""The published definitions' own numbers (pm_*.safetensors), computed again through the package's public functions."""
import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vitlab.criteria.hsic import dependence, gaussian_kernels, shared_dependence
from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.capture import token_scores
from vitlab.measure.units import unit_scores
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import BlockPlan, CompressionPlan, tokens
from vitlab.plan.cost import mdc_macs
from vitlab.plan.rules import Select

VARIABLE = "VITLAB_REFERENCE_DIR"
FOLDER = Path(os.environ.get(VARIABLE) or Path(__file__).parents[1] / ".." / "shared" / "reference").resolve()
FILES = sorted(FOLDER.glob("pm_*.safetensors"))
WHY_NOT = f"no pm_*.safetensors in {FOLDER}; set {VARIABLE} to the folder that holds them"
# A missing folder is one skipped test per rule, not a silent nothing.
each_file = pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem) for p in FILES] or [pytest.param(None, marks=pytest.mark.skip(reason=WHY_NOT))])
AGREEMENT = 1e-4        # relative, as the reference's README asks


def relative(got: torch.Tensor, reference: torch.Tensor) -> float:
    """max |got - reference| / max |reference|."""
    assert got.shape == reference.shape
    return float((got - reference).abs().max() / reference.abs().max())


def dense_model(meta: dict[str, str], tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The dense model of a file, of the sizes its metadata gives."""
    sizes = {key: int(meta[key])
             for key in ("img_size", "patch_size", "embed_dim", "num_heads", "depth", "num_classes")}
    dense = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes).eval()
    dense.load_state_dict({key.removeprefix("dense."): value for key,
                           value in tensors.items() if key.startswith("dense.")})
    return dense


def read(path: Path) -> tuple[dict[str, torch.Tensor], torch.nn.Module, dict[str, str]]:
    """Tensors, dense model and metadata of one file."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    return tensors, dense_model(meta, tensors), meta


@functools.cache
def load(path: Path) -> SimpleNamespace:
    """Tensors, metadata and dense model of one file."""
    tensors, dense, meta = read(path)
    rates = {"keep_rate": float(meta["keep_rate"]), "prune_rate": float(meta["prune_rate"])}
    return SimpleNamespace(meta=meta, tensors=tensors, dense=dense, shape=shape_of(dense), rule=meta["variant"],
                           rates=rates)


def plan_from(case: SimpleNamespace, scores: torch.Tensor):
    """The plan in its published form."""
    return prune_and_merge(scores, case.shape, rule=case.rule, boundary="reference", weights="reference", **case.rates)


def reference_matrices(case: SimpleNamespace, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(merge, reconstruct, token mask) of one block as the file holds them."""
    return tuple(case.tensors[f"pruned.blocks.{index}.attn.{name}"]
                 for name in ("merge_matrix", "recover_matrix", "token_mask"))


@functools.cache
def scored(path: Path) -> torch.Tensor:
    """Token scores computed by vitlab from the file's images, the absolute value after the sum over the batch (A1)."""
    case = load(path)
    return token_scores(case.dense, list(zip(case.tensors["input"], case.tensors["target"])), absolute="batch",
                        progress=False)


@each_file
def test_dense_logits_agree(path):
    case = load(path)
    with torch.no_grad():
        assert relative(case.dense(case.tensors["input"][0]), case.tensors["dense_logits"]) < AGREEMENT


@each_file
def test_token_scores_agree(path):
    got, reference = scored(path), load(path).tensors["token_scores"]
    assert relative(got, reference) < AGREEMENT
    for block in range(len(reference)):         # a small block does not hide behind a large one
        assert relative(got[block], reference[block]) < AGREEMENT


@each_file
@pytest.mark.parametrize("source", ["reference scores", "own scores"])
def test_masks_and_channels_agree_exactly(path, source):
    case = load(path)
    plan = plan_from(case, case.tensors["token_scores"] if source == "reference scores" else scored(path))
    # + class token
    assert [block.tokens.num_merged + 1 for block in plan.blocks] == json.loads(case.meta["channels"])
    assert plan.tokens_per_block() == json.loads(case.meta["channels"])
    for index, block in enumerate(plan.blocks):
        mask = reference_matrices(case, index)[2]
        assert torch.equal(tokens.token_mask(block.tokens, 1).to(mask.dtype), mask), f"block {index}"


@each_file
def test_merge_and_reconstruct_matrices_agree(path):
    case = load(path)
    for index, block in enumerate(plan_from(case, case.tensors["token_scores"]).blocks):
        merge, reconstruct, _ = reference_matrices(case, index)
        own = tokens.merge_matrix(block.tokens, 1)
        assert torch.equal(own != 0, merge != 0), f"block {index}"
        assert relative(own, merge) < AGREEMENT, f"block {index}"
        assert relative(tokens.reconstruct_matrix(own), reconstruct) < AGREEMENT, f"block {index}"


@each_file
@pytest.mark.parametrize("source", ["reference scores", "own scores"])
@pytest.mark.parametrize("form", ["training", "deployed"])
def test_pruned_logits_agree(path, form, source):
    case = load(path)
    model = compress(case.dense,
                     plan_from(case, case.tensors["token_scores"] if source == "reference scores" else scored(path)))
    model = deploy(model) if form == "deployed" else model
    with torch.no_grad():
        got = model(case.tensors["input"][0])
    assert relative(got, case.tensors["pruned_logits"]) < AGREEMENT
    # The pruned logits are not simply the dense ones, so agreement says something.
    assert relative(case.tensors["dense_logits"], case.tensors["pruned_logits"]) > 10 * AGREEMENT


@each_file
def test_matrices_in_the_compressed_model_are_those_of_the_file(path):
    case = load(path)
    model = compress(case.dense, plan_from(case, case.tensors["token_scores"]))
    for index, block in enumerate(model.blocks):
        merge, reconstruct, mask = reference_matrices(case, index)
        assert relative(block.tokens.merge_matrix.detach(), merge) < AGREEMENT
        assert relative(block.tokens.reconstruct_matrix.detach(), reconstruct) < AGREEMENT
        assert torch.equal(block.tokens.token_mask, mask.to(block.tokens.token_mask.dtype))


mdc_files = sorted(FOLDER.glob("mdc*.safetensors"))
each_mdc = pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in mdc_files] or [
    pytest.param(None, marks=pytest.mark.skip(reason=f"no mdc*.safetensors in {FOLDER}; set {VARIABLE} to the folder "
                                                     f"that holds them"))])


@each_mdc
def test_hsic_values_are_the_reference_ones(path):
    tensors = load_file(path)
    x, z = (gaussian_kernels(tensors[name][None]) for name in ("hsic.x", "hsic.z"))
    assert relative(dependence(x, tensors["hsic.y_prob"]), tensors["hsic.relevance"]) < AGREEMENT
    assert relative(shared_dependence(torch.cat([x, z]))[0, 1:], tensors["hsic.redundancy"]) < AGREEMENT


@each_mdc
def test_neuron_and_head_scores_are_the_reference_ones(path):
    tensors, dense, _ = read(path)
    images = tensors["input"]
    with torch.no_grad():
        assert relative(dense(images), tensors["dense_logits"]) < AGREEMENT
    # In float64: the reference is float32 itself and about half of the agreement away from the exact value.
    scores = unit_scores(dense.double(), [(images.double(), torch.zeros(len(images), dtype=torch.long))],
                         progress=False)
    assert relative(scores.neurons, tensors["neuron_score"]) < AGREEMENT
    assert relative(scores.heads, tensors["head_score"]) < AGREEMENT


# ---- Multi-dimensional compression: policies (methods B3 to B5)

@functools.cache
def load_mdc(path: Path) -> SimpleNamespace:
    """Tensors, dense model and shape of one mdc file; `policies` holds (neuron ratios, head ratios, rho)."""
    tensors, dense, _ = read(path)
    depth = len(dense.blocks)
    policies = [(row[:depth], row[depth:2 * depth], row[-1]) for row in tensors["policy"].tolist()]
    return SimpleNamespace(tensors=tensors, dense=dense, shape=shape_of(dense), policies=policies)


def best(scores: torch.Tensor, ratio: float) -> tuple[int, ...]:
    """The int(count * (1 - ratio)) best-scoring units, ascending (B4)."""
    return tuple(sorted(scores.topk(int(len(scores) * (1 - ratio))).indices.tolist()))


def policy_plan(case: SimpleNamespace, neuron_ratios: list[float], head_ratios: list[float],
                rho: float) -> CompressionPlan:
    """The plan of a policy; the K tokens of B3 include the class token, and cut heads go on ranking, as where they are
    masked."""
    blocks, tokens_now = [], case.shape.num_tokens
    for index in range(case.shape.depth):
        rule, stay = None, int(tokens_now * (1 - rho))
        if index in (3, 6, 9) and stay < tokens_now:            # layers 4, 7 and 10 of B3, counted from 1
            rule, tokens_now = Select(kept=stay - 1, ranked_by="all"), stay + 1
        blocks.append(BlockPlan(heads=best(case.tensors["head_score"][index], head_ratios[index]), tokens=rule,
                                neurons=best(case.tensors["neuron_score"][index], neuron_ratios[index])))
    return CompressionPlan(shape=case.shape, blocks=tuple(blocks))


@each_mdc
def test_mdc_dense_logits_agree(path):
    case = load_mdc(path)
    with torch.no_grad():
        assert relative(case.dense(case.tensors["input"]), case.tensors["dense_logits"]) < AGREEMENT


@each_mdc
def test_masks_from_the_scores_by_policy_agree_exactly(path):
    case = load_mdc(path)
    for number, policy in enumerate(case.policies):
        for index, block in enumerate(policy_plan(case, *policy).blocks):
            for units, name in ((block.heads, "head_mask"), (block.neurons, "neuron_mask")):
                mask = torch.zeros_like(case.tensors[name][number, index])
                mask[list(units)] = 1
                assert torch.equal(mask, case.tensors[name][number, index]), f"policy {number}, block {index}, {name}"


@each_mdc
def test_gmacs_of_each_policy_agree(path):
    case = load_mdc(path)
    kept = [case.tensors[name].sum(dim=2).long().numpy() for name in ("head_mask", "neuron_mask")]
    found = mdc_macs(case.shape, *kept, case.tensors["policy"][:, -1].numpy())
    assert len(found) == len(case.policies)
    # The file holds 10^9 multiply-adds in float64: the same integer but for the division.
    assert (found / 1e9).tolist() == pytest.approx(case.tensors["policy_gmacs"].tolist(), rel=1e-12)


@each_mdc
def test_logits_under_each_policy_agree(path):
    case = load_mdc(path)
    selections = 0
    for number, policy in enumerate(case.policies):
        plan, reference = policy_plan(case, *policy), case.tensors["policy_logits"][number]
        selections += sum(block.tokens is not None for block in plan.blocks)
        with torch.no_grad():
            assert relative(compress(case.dense, plan)(case.tensors["input"]),
                            reference) < AGREEMENT, f"policy {number}"
        assert relative(case.tensors["dense_logits"], reference) > 10 * AGREEMENT       # so agreement says something
    assert selections
