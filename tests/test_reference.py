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

from vitlab import tokens
from vitlab.criteria.hsic import redundancy, relevance
from vitlab.criteria.planning import prune_and_merge
from vitlab.criteria.units import head_scores, neuron_scores
from vitlab.models import compress, deploy, shape_of
from vitlab.training.capture import token_scores

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
    sizes = {key: int(meta[key]) for key in ("img_size", "patch_size", "embed_dim", "num_heads", "depth", "num_classes")}
    dense = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes).eval()
    dense.load_state_dict({key.removeprefix("dense."): value for key, value in tensors.items() if key.startswith("dense.")})
    return dense


@functools.cache
def load(path: Path) -> SimpleNamespace:
    """Tensors, metadata and dense model of one file."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    dense = dense_model(meta, tensors)
    rates = {"keep_rate": float(meta["keep_rate"]), "prune_rate": float(meta["prune_rate"])}
    return SimpleNamespace(meta=meta, tensors=tensors, dense=dense, shape=shape_of(dense), rule=meta["variant"], rates=rates)


def plan_from(case: SimpleNamespace, scores: torch.Tensor):
    """The plan in its published form."""
    return prune_and_merge(scores, case.shape, rule=case.rule, boundary="reference", weights="reference", **case.rates)


def reference_matrices(case: SimpleNamespace, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(merge, reconstruct, token mask) of one block as the file holds them."""
    return tuple(case.tensors[f"pruned.blocks.{index}.attn.{name}"] for name in ("merge_matrix", "recover_matrix", "token_mask"))


@functools.cache
def scored(path: Path) -> torch.Tensor:
    """Token scores computed by vitlab from the file's images, the absolute value after the sum over the batch (A1)."""
    case = load(path)
    return token_scores(case.dense, list(zip(case.tensors["input"], case.tensors["target"])), absolute="batch", progress=False)


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
    assert [block.tokens.num_merged + 1 for block in plan.blocks] == json.loads(case.meta["channels"])      # + class token
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
    model = compress(case.dense, plan_from(case, case.tensors["token_scores"] if source == "reference scores" else scored(path)))
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


def activations(dense, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """(hidden (B, N, M) per block, head outputs (B, N, H, d) per block, softmax output) of a dense model."""
    hidden, heads, handles = [], [], []
    for block in dense.blocks:
        handles.append(block.mlp.fc2.register_forward_pre_hook(lambda _, x: hidden.append(x[0])))
        handles.append(block.attn.proj.register_forward_pre_hook(
            lambda _, x, a=block.attn: heads.append(x[0].unflatten(2, (a.num_heads, a.head_dim)))))
    with torch.inference_mode():
        logits = dense(images)
    for handle in handles:
        handle.remove()
    return hidden, heads, logits


mdc_files = sorted(FOLDER.glob("mdc*.safetensors"))
each_mdc = pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in mdc_files] or [
    pytest.param(None, marks=pytest.mark.skip(reason=f"no mdc*.safetensors in {FOLDER}; set {VARIABLE} to the folder that holds them"))])


@each_mdc
def test_hsic_values_are_the_reference_ones(path):
    tensors = load_file(path)
    x, z = tensors["hsic.x"][None], tensors["hsic.z"][None]
    assert relative(relevance(x, tensors["hsic.y_prob"]), tensors["hsic.relevance"]) < AGREEMENT
    assert relative(redundancy(x, z)[0], tensors["hsic.redundancy"]) < AGREEMENT


@each_mdc
def test_neuron_and_head_scores_are_the_reference_ones(path):
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    dense = dense_model(meta, tensors)
    hidden, heads, logits = activations(dense, tensors["input"])
    assert relative(logits, tensors["dense_logits"]) < AGREEMENT
    # In float64: the reference is float32 itself and about half of the agreement away from the exact value.
    probabilities = logits.softmax(dim=1).double()
    assert relative(torch.stack([neuron_scores(h.double(), probabilities) for h in hidden]), tensors["neuron_score"]) < AGREEMENT
    assert relative(torch.stack([head_scores(h.double(), probabilities) for h in heads]), tensors["head_score"]) < AGREEMENT
