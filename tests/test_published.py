"""The published layout of Prune and Merge (methods A9), built by hand here, and read."""
import argparse
from pathlib import Path

import pytest
import torch
from training_fixtures import by_hand, compressed, full_plan, images, logits, one_thread, tiny  # noqa: F401

from vitlab.models import compress
from vitlab.models.published import load_published
from vitlab.runtime.files import InputError

# The regions of rule `merge` for 16 patches by hand: patches 1 and 2 are a run that is pruned as a whole, 6 a run of
# one
# that is pruned, and 9 to 11 a run with one pruned: merge rows of zeros for the first two (A4).
HAND_PRUNED = (1, 2, 6, 10)
HAND_ROWS = [[0], [1, 2], [3], [4], [5], [6], [7], [8], [9, 10, 11], [12], [13, 14, 15]]


def trained(rule: str = "center", **settings):
    """A compressed model whose trained matrices are no longer what its plan says."""
    model, plan = compressed(rule=rule, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            matrices = [block.tokens.reconstruct_matrix] + [block.tokens.merge_matrix] * (rule == "center")
            for matrix in matrices:
                matrix.add_(0.02 * torch.randn(matrix.shape, generator=generator))
    return model, plan


def write(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path


def hand_made_rule() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(merge, recover, mask) of the runs above; nothing of vitlab's selection is used."""
    merge = torch.zeros(1 + len(HAND_ROWS), 17)
    merge[0, 0] = 1
    for row, patches in enumerate(HAND_ROWS):
        for j in patches:
            merge[1 + row, 1 + j] = 0.0 if j in HAND_PRUNED else 1 / len(patches) + 0.1 * j
    mask = torch.ones(17)
    mask[[1 + j for j in HAND_PRUNED]] = 0
    return merge, torch.linalg.pinv(merge.double()).float(), mask


def slow_forward(content: dict, x: torch.Tensor) -> torch.Tensor:
    """Logits by the published equations on a dense timm model, y = recover @ Block(merge @ x) + (1 - mask) * x (A6)."""
    state = dict(content["model"])
    extra = {k: state.pop(k) for k in list(state)
             if k.split(".")[-1] in ("merge_matrix", "recover_matrix", "token_mask")
             or k.endswith("attn.bias")}
    dense = tiny(seed=9)
    dense.load_state_dict(state)
    with torch.inference_mode():
        tokens = dense.norm_pre(dense._pos_embed(dense.patch_embed(x)))
        for i, block in enumerate(dense.blocks):
            merge, recover, mask = (extra[f"blocks.{i}.attn.{k}"]
                                    for k in ("merge_matrix", "recover_matrix", "token_mask"))
            tokens = recover @ block(merge @ tokens) + (1 - mask)[:, None] * tokens
        return dense.forward_head(dense.norm(tokens))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    # the same float32 products in the same order, logits about 1
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["center", "merge"])
def test_a_written_model_reads_back_with_the_same_logits_and_matrices(tmp_path, rule):
    model, plan = trained(rule)
    write(tmp_path / "pm.pth", by_hand(model))
    found, found_plan = load_published(tmp_path / "pm.pth", tiny(seed=9))
    close(logits(found), logits(model))
    for a, b, cut in zip(found.blocks, model.blocks, found_plan.blocks):
        assert torch.equal(a.tokens.merge_matrix, b.tokens.merge_matrix)
        assert torch.equal(a.tokens.reconstruct_matrix, b.tokens.reconstruct_matrix)
        assert torch.equal(a.tokens.token_mask, b.tokens.token_mask)
        assert cut.tokens.num_merged + 1 == len(b.tokens.merge_matrix)
    assert [b.tokens.pruned for b in found_plan.blocks] == [b.tokens.pruned for b in plan.blocks]


def test_an_untrained_file_reads_back_as_the_very_same_plan(tmp_path):
    model, plan = compressed(rule="center")
    write(tmp_path / "pm.pth", by_hand(model))
    _, found = load_published(tmp_path / "pm.pth", tiny(seed=9))
    for a, b in zip(found.blocks, plan.blocks):
        assert a.tokens.regions == b.tokens.regions and a.tokens.pruned == b.tokens.pruned
        assert a.tokens.weights == pytest.approx(b.tokens.weights, rel=1e-6)    # the file holds float32


@pytest.mark.parametrize("rule, settings", [
    ("center", {"boundary": "reference", "weights": "reference"}), ("center", {}),
    ("merge", {"weights": "reference"}), ("merge", {"weights": "reference", "prune_rate": 0.7, "keep_rate": 0.2})])
def test_a_file_built_by_hand_gives_the_logits_of_the_published_equations(tmp_path, rule, settings):
    model, _ = trained(rule, **settings)
    content = by_hand(model)
    found, _ = load_published(write(tmp_path / "pm.pth", content), tiny(seed=9))
    close(logits(found), slow_forward(content, images()))
    close(logits(found), logits(model))


def test_runs_pruned_as_a_whole_stay_tokens_of_zeros_that_attention_sees(tmp_path):
    model, _ = compressed()
    content = by_hand(model)
    merge, recover, mask = hand_made_rule()
    content["model"] |= {"blocks.1.attn.merge_matrix": merge, "blocks.1.attn.recover_matrix": recover,
                         "blocks.1.attn.token_mask": mask, "blocks.1.attn.bias": torch.zeros(len(merge))}
    content["channels"][1] = len(merge)
    found, plan = load_published(write(tmp_path / "pm.pth", content), tiny(seed=9))
    assert (merge.abs().sum(dim=1) == 0).sum() == 2             # two rows of zeros
    assert plan.blocks[1].tokens.num_merged == 11 and plan.blocks[1].tokens.pruned == HAND_PRUNED
    close(logits(found), slow_forward(content, images()))


def test_a_plan_read_from_a_file_rebuilds_a_model_of_the_same_sizes(tmp_path):
    model, _ = trained("merge", weights="reference")
    found, plan = load_published(write(tmp_path / "pm.pth", by_hand(model)), tiny(seed=9))
    again = compress(tiny(seed=9), plan)
    again.load_state_dict(found.state_dict())
    close(logits(again), logits(model))


def test_a_mask_of_any_shape_that_has_one_entry_a_token_is_taken(tmp_path):
    model, _ = trained()
    content = by_hand(model)
    for i in range(2):
        content["model"][f"blocks.{i}.attn.token_mask"] = content["model"][f"blocks.{i}.attn.token_mask"].reshape(1, -1,
                                                                                                                  1)
    found, _ = load_published(write(tmp_path / "pm.pth", content), tiny(seed=9))
    close(logits(found), logits(model))


# ---------------------------------------------------------------- faults

def refused(tmp_path: Path, content: dict, says: str, dense=None) -> None:
    path = write(tmp_path / "pm.pth", content)
    with pytest.raises(InputError, match=f"{path}: .*{says}"):
        load_published(path, dense if dense is not None else tiny(seed=9))


@pytest.mark.parametrize("name", ["merge_matrix", "recover_matrix", "token_mask"])
def test_a_missing_matrix_is_refused_naming_file_and_key(tmp_path, name):
    content = by_hand(trained()[0])
    del content["model"][f"blocks.1.attn.{name}"]
    refused(tmp_path, content, f"blocks.1.attn.{name}")


@pytest.mark.parametrize("name, shape",
                         [("merge_matrix", (5, 16)), ("recover_matrix", (17, 3)), ("recover_matrix", (4, 17)),
                                         ("token_mask", (16,)), ("merge_matrix", (17,)), ("merge_matrix", ())])
def test_a_matrix_of_another_shape_is_refused_naming_file_and_key(tmp_path, name, shape):
    content = by_hand(trained()[0])
    content["model"][f"blocks.1.attn.{name}"] = torch.ones(shape)
    refused(tmp_path, content, f"blocks.1.attn.*{name}")


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("blocks.0.mlp.fc1.weight"), "missing keys blocks.0.block.mlp.fc1.weight|blocks.0.mlp.fc1.weight"),
    (lambda s: s.update({"head.weight": torch.zeros(7, 24)}), r"head.weight is \(7, 24\)"),
    (lambda s: s.update({"decoder.weight": torch.zeros(2)}), "unknown keys decoder.weight"),
], ids=["missing", "shape", "unknown"])
def test_other_weights_that_do_not_fit_are_refused_naming_file_and_key(tmp_path, change, says):
    content = by_hand(trained()[0])
    change(content["model"])
    refused(tmp_path, content, f"({says})")


@pytest.mark.parametrize("args", [{"depth": 3}, {"img_size": 48}, {"embed_dim": 36}, {"depth": 1}])
def test_a_dense_model_of_another_size_is_refused_by_file(tmp_path, args):
    refused(tmp_path, by_hand(trained()[0]), "", tiny(**args))


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": 3}, {"state_dict": {}}])
def test_another_layout_is_refused_by_file_and_says_what_is_missing(tmp_path, content):
    refused(tmp_path, content, "not a Prune and Merge checkpoint.*blocks.i.attn.merge_matrix")


def test_a_dense_checkpoint_is_refused_by_file(tmp_path):
    refused(tmp_path, {"model": tiny().state_dict()}, "not a Prune and Merge checkpoint")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="absent.pth: no such file"):
        load_published(tmp_path / "absent.pth", tiny())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.6])
def test_a_file_cut_short_is_refused_by_name(tmp_path, share):
    path = write(tmp_path / "pm.pth", by_hand(trained()[0]))
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    with pytest.raises(InputError, match=f"{path}: "):
        load_published(path, tiny())


class Malice:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "owned")


@pytest.mark.parametrize("place", ["args", "model"])
def test_a_malicious_pickle_is_refused_by_name_and_its_code_is_not_run(tmp_path, place):
    content = by_hand(trained()[0])
    if place == "args":
        content["args"] = argparse.Namespace(trap=Malice(tmp_path / "owned"))
    else:
        content["model"]["norm.bias"] = Malice(tmp_path / "owned")
    refused(tmp_path, content, "nothing of it was run")
    assert not (tmp_path / "owned").exists()
