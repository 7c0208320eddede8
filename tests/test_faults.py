"""Every kind of bad input, at the command line: one line that names it, exit code 2, and every file as it was.

The tables below are the list; docs/faults.md is written from them (`python tests/test_faults.py`), and a test compares
the two.
"""
import dataclasses
import io
import json
import math
import os
import shutil
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from safetensors.torch import load_file, save_file

from vitlab import cli
from vitlab.models import checkpoint, compress, shape_of
from vitlab.models.create import create_model
from vitlab.models.segmenter import Segmenter, as_encoder
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import MergeReconstruct, Select, SharedUpdate
from vitlab.runtime.files import LOCK, read_lines, write_lines
from vitlab.workbench import batch

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
SIZE = {"depth": 5, "embed_dim": 32, "num_heads": 4}
PATCHES = 64
Plant = Callable[[], Any]                       # makes the fault, in a copy of the world that is the current folder


@dataclass(frozen=True)
class Fault:
    """One kind of bad input: `plant` makes it, `command` meets it, and the one line of the error holds each text of
    `says`."""

    area: str
    what: str
    plant: Plant | None
    command: str
    says: tuple[str, ...]


# ---- Ways to make a fault

GONE = object()


def put(path: str, content: str | bytes) -> Plant:
    return lambda: Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(path: str, share: float = 0.5) -> Plant:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:int(Path(path).stat().st_size * share)])


def gone(path: str) -> Plant:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def folder(path: str) -> Plant:
    """A folder where a file should be."""
    def plant() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir(parents=True)
    return plant


def edit(path: str, way: str, value: Any) -> Plant:
    """Another value, or GONE, at a place of a JSON file: "blocks.0.heads"."""
    def plant() -> None:
        data = place = json.loads(Path(path).read_text())
        *inner, last = [int(key) if key.isdigit() else key for key in way.split(".")]
        for key in inner:
            place = place[key]
        if value is GONE:
            del place[last]
        else:
            place[last] = value
        Path(path).write_text(json.dumps(data))
    return plant


def line(path: str, number: int, change: Callable[[dict], Any] | str) -> Plant:
    """Another text, or a changed record, in the line of that number, from 1."""
    def plant() -> None:
        lines = Path(path).read_text().splitlines()
        record = json.loads(lines[number - 1])
        lines[number - 1] = change if isinstance(change, str) else json.dumps(change(record) or record)
        Path(path).write_text("\n".join(lines) + "\n")
    return plant


def less(path: str, number: int, change: Callable[[dict], Any] | str) -> Plant:
    """`line`, in a study that is to go on: its last evaluation is not there yet."""
    return lambda: (line(path, number, change)(), put(JOURNAL, Path(JOURNAL).read_text().rsplit("\n", 2)[0] + "\n")())


def tensors(path: str, **change: Any) -> Plant:
    """Other tensors, or GONE, by name, "." written as "__"; of a .pth where `path` is one."""
    def plant() -> None:
        safe = path.endswith(".safetensors")
        state = load_file(path) if safe else torch.load(path)
        for name, value in change.items():
            state.pop(name.replace("__", "."), None)
            if value is not GONE:
                state[name.replace("__", ".")] = value
        save_file(state, path) if safe else torch.save(state, path)
    return plant


def pth(content: Any) -> Plant:
    return lambda: torch.save(content, "dense.pth")


def picture(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)


def mask(path: str, ids: list[int], size: tuple[int, int] = (32, 32), mode: str = "L") -> Plant:
    """A mask of these ids in turn."""
    def plant() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.resize(np.array(ids, dtype=np.uint8), size)).convert(mode).save(path)
    return plant


def notebook(path: str, *parameters: str, cell: str = "pass") -> None:
    cells = [new_code_cell(text, metadata={"tags": ["parameters"]}) for text in parameters]
    nbformat.write(new_notebook(cells=[*cells, new_code_cell(cell)]), path)


# ---- The world: one of everything, small and whole

def make_world(root: Path) -> None:
    os.chdir(root)
    torch.manual_seed(0)
    dense = create_model("vit_nano_patch4_32", **SIZE)
    shape, classes = shape_of(dense), [str(d) for d in range(10)]
    half = tuple(j // 2 for j in range(PATCHES))
    merge = MergeReconstruct(regions=(-1, -1, *half[:-2]), weights=(0.0, 0.0, *[0.5] * (PATCHES - 2)), pruned=(0, 1))
    plan = CompressionPlan(shape=shape, blocks=(
        BlockPlan(heads=(0, 2, 3), neurons=tuple(range(100)), tokens=merge),
        BlockPlan(tokens=SharedUpdate(regions=half, weights=(0.5,) * PATCHES)), BlockPlan(),
        BlockPlan(tokens=Select(kept=40)), BlockPlan()))
    plan.save("plan.json")
    checkpoint.save("two", create_model("vit_nano_patch4_32", num_classes=2, **SIZE), CompressionPlan.empty(
        dataclasses.replace(shape, num_classes=2)), classes=["ant", "bee"])
    checkpoint.save("dense", dense, CompressionPlan.empty(shape), classes=classes)
    features = create_model("vit_nano_patch4_32", num_classes=0, **SIZE)
    checkpoint.save("features", features, CompressionPlan.empty(shape_of(features)))
    checkpoint.save("pruned", compress(dense, plan), plan, classes=classes)
    torch.save(create_model("vit_nano_patch4_32").state_dict(), "dense.pth")
    save_file({"token_scores": torch.rand(5, PATCHES) + 0.1}, "scores.safetensors")
    save_file({"head_scores": torch.rand(5, 4), "neuron_scores": torch.rand(5, 128)}, "units.safetensors")
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            picture(f"images/{split}/{name}/0.png")
            picture(f"images/{split}/{name}/1.png")
    picture("pictures/0.png")
    seg = Segmenter(as_encoder(create_model("vit_nano_patch4_32", **{**SIZE, "img_size": (64, 96), "patch_size": 16})),
                    11)
    checkpoint.save("seg", seg, CompressionPlan.empty(shape_of(seg)), classes=["background", *classes])
    seg = Segmenter(as_encoder(dense), 2, "linear")
    checkpoint.save("two-seg", seg, CompressionPlan.empty(shape_of(seg)))
    eleven = create_model("vit_nano_patch4_32", num_classes=11, **SIZE)
    checkpoint.save("eleven", eleven, CompressionPlan.empty(shape_of(eleven)))
    for split in ("train", "val"):
        for i in range(2):
            picture(f"scenes/{split}/images/{i}.png")
            mask(f"scenes/{split}/masks/{i}.png", [0, 1, 255])()
    Path("scenes/classes.txt").write_text("ground\nthing\n")
    notebook("write.ipynb", 'run: str = ""\nvalue: int = 1\nscale: float = 1.0\nname: str = ""\ndata: str = ""')
    notebook("read.ipynb", 'run: str = ""\nfactor: float = 2.0\nsource: str = ""')
    Path("batch.yaml").write_text(TWO)
    os.makedirs("report/entries/w")
    Path("report/summary.json").write_text(json.dumps({"file": "batch.yaml", "counts": {}, "entries": [
        {"name": "w", "notebook": "write.ipynb", "state": "done", "seconds": 1.0, "why": None}]}))
    Path("report/entries/w/status.json").write_text(json.dumps({"state": "done", "call": "1", "error": None,
                                                                "inherited": 0}))
    write_lines("report/entries/w/results.jsonl", [{"model": "a", "top1_pct": 50.0, "conditions": {"seed": 0}}] * 2)
    assert cli.main([*SEARCH.split(), "--evaluations", "4", "--start", "sensitivity"]) == 0


TWO = "entries:\n  w: {notebook: write.ipynb}\n  r: {notebook: read.ipynb, after: w}\n"
PRUNE = "prune plan --checkpoint dense --plan plan.json --out out"
MERGE = "prune tokens --checkpoint dense --scores scores.safetensors --out out"
CUT = "prune units --checkpoint dense --scores units.safetensors --neuron-ratio 0.25 --out out"
MATCH = "prune match --checkpoint dense --out out --ratio 0.25"
EVALUATE = "evaluate --checkpoint {} --data digits --images 8 --quiet --device cpu --out out"
IMAGES = "evaluate --checkpoint two --data images --quiet --device cpu --workers 0 --out out"
WEIGHTS = "prune match --checkpoint dense.pth --model vit_nano_patch4_32 --ratio 0.25 --out out"
SEARCH = ("search --checkpoint dense --data digits --macs-ratio 0.9 --units neurons --tokens none --population 2 "
          "--images 16 "
          "--criterion weight --quiet --device cpu --out study")
ASK = "search --checkpoint dense --data digits --images 16 --criterion weight --quiet --device cpu --out out"
TRAIN = "pretrain --model vit_nano_patch4_32 --data digits --device cpu --quiet --out out"
TUNE = "finetune --checkpoint pruned --data digits --recipe digits_pm --device cpu --quiet --out out"

SEGMENT = "segment --checkpoint dense --data scenes --epochs 1 --batch-size 2 --workers 0 --device cpu --quiet --out out"  # noqa: E501
PREDICT = "predict --checkpoint seg --folder pictures --device cpu --quiet --out out"
PIXELS = "evaluate --checkpoint seg --data digit_scenes --images 2 --workers 0 --quiet --device cpu --out out"
MASKS = "evaluate --checkpoint two-seg --data scenes --workers 0 --quiet --device cpu --out out"
ASK_PIXELS = "search --checkpoint seg --data digit_scenes --macs-ratio 0.9 --images 4 --quiet --device cpu --out out"

# ---- The tables. Each row: what is wrong, how it is made, what the line says

PLAN = [
    ("The file is not there", gone("plan.json"), "no such file"),
    ("It is a folder", folder("plan.json"), "can't be read (Is a directory)"),
    ("It is empty", put("plan.json", ""), "not valid JSON"),
    ("It was cut short", cut("plan.json"), "not valid JSON"),
    ("It is no text", put("plan.json", b"\xff\xfe\x00\x80" * 9), "not valid JSON"),
    ("Brackets nested 100,000 deep", put("plan.json", "[" * 100_000), "not valid JSON"),
    ("A number of 5,000 digits", put("plan.json", "1" * 5000), "not valid JSON"),
    ("JSON, but no object", put("plan.json", "[1, 2]"), '"format" must be "vitlab.plan"'),
    ("Another format", edit("plan.json", "format", "other"), '"format" must be'),
    ("No format", edit("plan.json", "format", GONE), '"format" must be'),
    ("A version to come", edit("plan.json", "version", 3), "version 3 is not known; this vitlab reads versions 1 and 2"),
    ("No version", edit("plan.json", "version", GONE), "version None is not known"),
    ("`made_by` is no object", edit("plan.json", "made_by", []), '"made_by" must be an object'),
    ("`blocks` is no list", edit("plan.json", "blocks", {}), '"blocks" must be a list'),
    ("No `blocks`", edit("plan.json", "blocks", GONE), '"blocks" must be a list'),
    ("A block too few", edit("plan.json", "blocks.4", GONE), "the plan has 4 blocks; the model has 5"),
    ("No `shape`", edit("plan.json", "shape", GONE), "shape must be an object"),
    ("A size is missing", edit("plan.json", "shape.depth", GONE), "shape: ['depth'] missing"),
    ("A size that is none", edit("plan.json", "shape.colour", 1), "shape: unknown ['colour']; known are"),
    ("A size of zero", edit("plan.json", "shape.num_heads", 0), "shape.num_heads is 0; an integer of at least 1"),
    ("A size below zero", edit("plan.json", "shape.num_prefix_tokens", -1), "shape.num_prefix_tokens is -1; an integer "
                                                                            "of at least 0"),
    ("A size with a fraction", edit("plan.json", "shape.depth", 5.0), "shape.depth is 5.0; an integer"),
    ("A size that is a truth value", edit("plan.json", "shape.num_heads", True), "shape.num_heads is True; an integer"),
    ("A size that is a text", edit("plan.json", "shape.embed_dim", "32"), "shape.embed_dim is '32'; an integer"),
    ("One side of an image", edit("plan.json", "shape.img_size", [32]), "shape.img_size is (32,); two positive "
                                                                        "integers"),
    ("A patch of no height", edit("plan.json", "shape.patch_size", [0, 4]), "shape.patch_size is (0, 4); two positive "
                                                                            "integers"),
    ("A patch larger than the image", edit("plan.json", "shape.patch_size", [64, 4]), "holds no patch of (64, 4)"),
    ("`pool` is no text", edit("plan.json", "shape.pool", 3), "shape.pool is 3; a string"),
    ("`qk_norm` is no truth value", edit("plan.json", "shape.qk_norm", "yes"), "shape.qk_norm is 'yes'; true or false"),
    ("A block that is no object", edit("plan.json", "blocks.1", 7), "block 1 must be an object"),
    ("A block's field that is none", edit("plan.json", "blocks.1.head", [0]), "block 1: unknown ['head']; known are"),
    ("No head stays", edit("plan.json", "blocks.0.heads", []), "block 0: no head or no neuron stays, or qk_width is "
                                                              "given, which version 1 has no words for; version 2"),
    ("A head that the model lacks", edit("plan.json", "blocks.0.heads", [0, 4]), "block 0: heads must be integers from "
                                                                                 "0 to 3"),
    ("A head below zero", edit("plan.json", "blocks.0.heads", [-1]), "block 0: heads must be integers from 0 to 3"),
    ("A head twice", edit("plan.json", "blocks.0.heads", [1, 1]), "block 0: heads must ascend without repeats"),
    ("Heads out of order", edit("plan.json", "blocks.0.heads", [2, 0]), "block 0: heads must ascend without repeats"),
    ("A head that is no integer", edit("plan.json", "blocks.0.heads", [0.0]), "block 0: heads must be integers"),
    ("A head that is a truth value", edit("plan.json", "blocks.0.heads", [True]), "block 0: heads must be integers"),
    ("A head that is a list", edit("plan.json", "blocks.0.heads", [[0]]), "block 0: heads must be integers"),
    ("Heads that are a number", edit("plan.json", "blocks.0.heads", 2), "block 0: heads must be a list or null"),
    ("Heads that are a text", edit("plan.json", "blocks.0.heads", "02"), "block 0: heads must be a list or null"),
    ("A neuron that the model lacks", edit("plan.json", "blocks.2.neurons", [128]), "block 2: neurons must be integers "
                                                                                    "from 0 to 127"),
    ("A neuron that is null", edit("plan.json", "blocks.2.neurons", [None]), "block 2: neurons must be integers"),
    ("A token rule that is no object", edit("plan.json", "blocks.0.tokens", 5), "block 0: tokens.kind must be one of"),
    ("A token rule without kind", edit("plan.json", "blocks.0.tokens.kind", GONE), "block 0: tokens.kind must be one "
                                                                                   "of"),
    ("A token rule unheard of", edit("plan.json", "blocks.0.tokens.kind", "x"), "block 0: tokens.kind must be one of "
                                                                                "['match'"),
    ("A kind that is a list", edit("plan.json", "blocks.0.tokens.kind", ["match"]), "block 0: tokens.kind must be one "
                                                                                    "of"),
    ("A rule's field that is none, such as a file to read", edit("plan.json", "blocks.0.tokens.file", "../x"),
     "block 0: tokens: unknown ['file']"),
    ("A rule's field is missing", edit("plan.json", "blocks.0.tokens.regions", GONE), "block 0: tokens: ['regions'] "
                                                                                      "missing"),
    ("Regions that are a number", edit("plan.json", "blocks.0.tokens.regions", 15), "block 0: tokens: "),
    ("Regions that are null", edit("plan.json", "blocks.0.tokens.regions", None), "block 0: tokens: "),
    ("A region below -1", edit("plan.json", "blocks.0.tokens.regions.2", -2), "block 0: tokens: regions must be "
                                                                              "integers of at least -1"),
    ("A region with a fraction", edit("plan.json", "blocks.0.tokens.regions.2", 0.5), "block 0: tokens: regions must "
                                                                                      "be integers"),
    ("Regions numbered with a gap", edit("plan.json", "blocks.0.tokens.regions.2", 99), "regions must be numbered 0 to "
                                                                                        "99 without a gap"),
    ("Regions of another number of patches",
     edit("plan.json", "blocks.0.tokens", {"kind": "merge_reconstruct", "regions": [0, 1], "weights": [1, 1]}),
     "block 0: tokens.regions has 2 entries; the model has 64 patches"),
    ("A weight too few", edit("plan.json", "blocks.0.tokens.weights.3", GONE), "block 0: tokens: 64 regions but 63 "
                                                                               "weights"),
    ("A weight that is not a number (NaN)", edit("plan.json", "blocks.0.tokens.weights.3", math.nan),
     "weights must be finite numbers"),
    ("A weight that is infinite", edit("plan.json", "blocks.0.tokens.weights.3", math.inf), "weights must be finite "
                                                                                            "numbers"),
    ("A weight of 400 digits", edit("plan.json", "blocks.0.tokens.weights.3", 10 ** 400), "weights must be finite "
                                                                                          "numbers"),
    ("A weight that is a text", edit("plan.json", "blocks.0.tokens.weights.3", "1"), "weights must be finite numbers"),
    ("A weight that is a truth value", edit("plan.json", "blocks.0.tokens.weights.3", True), "weights must be finite "
                                                                                             "numbers"),
    ("A patch that is nowhere", edit("plan.json", "blocks.0.tokens.regions.2", -1), "patch 2 is in no region and not "
                                                                                    "pruned"),
    ("A pruned patch with a weight", edit("plan.json", "blocks.0.tokens.weights.0", 0.5), "patch 0 is pruned; its "
                                                                                          "weight must be 0"),
    ("A pruned patch that the model lacks", edit("plan.json", "blocks.0.tokens.pruned", [0, 1, 64]),
     "pruned must be patches from 0 to 63"),
    ("Pruned patches out of order", edit("plan.json", "blocks.0.tokens.pruned", [1, 0]), "pruned must be patches from "
                                                                                         "0 to 63, ascending"),
    ("A pruned patch that is a list", edit("plan.json", "blocks.0.tokens.pruned", [[0], 1]), "block 0: tokens: "),
    ("A span that runs past the last block", edit("plan.json", "blocks.0.tokens.span", 6),
     "block 0: tokens stay merged for 6 blocks from here, but 5 are left; a span of at most 5 is needed"),
    ("A token rule inside a span", edit("plan.json", "blocks.0.tokens.span", 2),
     "block 1: it stays merged in the span that begins in block 0, and can have no token rule of its own; null is "
     "needed"),
    ("A span of no block", edit("plan.json", "blocks.0.tokens.span", 0), "block 0: tokens: span is 0; an integer of at "
                                                                         "least 1"),
    ("`trains` unheard of", edit("plan.json", "blocks.0.tokens.trains", "merge"), "trains is 'merge'; 'both' or "
                                                                                  "'reconstruct'"),
    ("Shares of a region that don't sum to 1", edit("plan.json", "blocks.1.tokens.weights.0", 0.25),
     "block 1: tokens: the weights of region 0 sum to 0.75; 1 is needed"),
    ("A share below zero", edit("plan.json", "blocks.1.tokens.weights.0", -0.5), "block 1: tokens: weights must be "
                                                                                 "numbers from 0 to 1"),
    ("`own` above 1", edit("plan.json", "blocks.1.tokens.own", 1.5), "own is 1.5; a number from 0 to 1"),
    ("`proportional` is a number", edit("plan.json", "blocks.1.tokens.proportional", 1), "proportional is 1; true or "
                                                                                         "false"),
    ("More tokens selected than come in", edit("plan.json", "blocks.3.tokens.kept", 99), "block 3: 99 tokens are kept; "
                                                                                         "at most 62"),
    ("No token selected", edit("plan.json", "blocks.3.tokens.kept", 0), "block 3: tokens: kept is 0; an integer of at "
                                                                        "least 1"),
    ("Tokens selected right after a merge", edit("plan.json", "blocks.1.tokens", {"kind": "select", "kept": 9}),
     "block 1: tokens are selected right after a block that merged"),
    ("Tokens merged by place after a selection", edit("plan.json", "blocks.4.tokens", {"kind": "shared_update",
     "regions": [0] * PATCHES, "weights": [1 / PATCHES] * PATCHES}), "block 4: tokens share an update by their place, "
                                                                     "but only 42 of 65"),
    ("Tokens matched after a selection", edit("plan.json", "blocks.4.tokens", {"kind": "match", "merged": 1}),
     "block 4: tokens are matched, but a block before has selected"),
    ("Merging by content that is not gone on with",
     edit("plan.json", "blocks.2.tokens", {"kind": "match", "merged": 1}), "block 3: tokens were merged by content "
                                                                           "before"),
    ("More than half of the tokens merged", edit("plan.json", "blocks.2.tokens", {"kind": "match", "merged": 33}),
     "block 2: 33 tokens are merged; at most half of the 64"),
    ("Sizes that count a little", edit("plan.json", "blocks.2.tokens", {"kind": "match", "merged": 1, "by_size": 0.5}),
     "block 2: tokens: by_size is 0.5; true or false is needed"),
    ("Protection below zero", edit("plan.json", "blocks.2.tokens", {"kind": "match", "merged": 1, "protect": -0.1}),
     "block 2: tokens: protect is -0.1; a number of at least 0"),
    ("Tokens read out before the last block", edit("plan.json", "blocks.2.tokens", {"kind": "read_out"}),
     "block 2: tokens are read out, but another block follows"),
    ("A plan for another model", edit("plan.json", "shape.embed_dim", 48), "the plan is for another model; this one "
                                                                           "has embed_dim 32"),
]

INFO = "pruned/checkpoint.json"
CHECKPOINT = [
    ("The folder is not there", gone("pruned"), "'pruned': no such file or folder, and no timm model"),
    ("A folder with something else in it", gone(INFO), "pruned: not a checkpoint; a folder with checkpoint.json, "
                                                       "plan.json"),
    ("No plan", gone("pruned/plan.json"), "pruned/plan.json: no such file"),
    ("No weights", gone("pruned/weights.safetensors"), "pruned/weights.safetensors: no such file"),
    ("checkpoint.json was cut short", cut(INFO), f"{INFO}: not valid JSON"),
    ("checkpoint.json is no object", put(INFO, "[]"), f"{INFO}: not a vitlab.checkpoint of version 1"),
    ("Another format", edit(INFO, "format", "vitlab.plan"), f"{INFO}: not a vitlab.checkpoint of version 1"),
    ("Another version", edit(INFO, "version", 2), f"{INFO}: not a vitlab.checkpoint of version 1"),
    ("No model", edit(INFO, "model", GONE), f'{INFO}: "model" must hold "name" and "args"'),
    ("A model without name", edit(INFO, "model.name", GONE), f'{INFO}: "model" must hold "name" and "args"'),
    ("A model's arguments that are a list", edit(INFO, "model.args", [3]), f'{INFO}: "model" must hold "name" and '
                                                                           f'"args"'),
    ("A model unheard of", edit(INFO, "model.name", "vit_nano_patch4_33"), f"{INFO}: 'vit_nano_patch4_33': no such "
                                                                           f"file or folder"),
    ("A model that is a file elsewhere", edit(INFO, "model.name", "local-dir:/tmp"), f"{INFO}: 'local-dir:/tmp': no "
                                                                                     f"such file"),
    ("A model that can't be handled", edit(INFO, "model.name", "swin_tiny_patch4_window7_224"), INFO),
    ("An argument that reads weights from elsewhere", edit(INFO, "model.args.pretrained_cfg", {"file": "/x"}),
     f"{INFO}: model argument 'pretrained_cfg' is not one of a vision transformer's"),
    ("A model without blocks", edit(INFO, "model.args.depth", 0), INFO),
    ("A model of a million blocks", edit(INFO, "model.args.depth", 10 ** 6), f"{INFO}: a model of 1000000 blocks, but "
                                                                             f"the plan has 5"),
    ("A model of 10^15 parameters", edit(INFO, "model.args.embed_dim", 4 * 10 ** 6), f"{INFO}: a model of "),
    ("A size that is a text", edit(INFO, "model.args.img_size", "big"), INFO),
    ("Image settings that are a list", edit(INFO, "config", ["nearest"]), f'{INFO}: "config" must hold mean, std, '
                                                                          f'crop_pct'),
    ("A mean of two channels", edit(INFO, "config.mean", [1, 2]), f'{INFO}: "config" must hold'),
    ("A mean that is not a number", edit(INFO, "config.mean", [math.nan] * 3), f'{INFO}: "config" must hold'),
    ("A deviation of zero", edit(INFO, "config.std", [0, 0, 0]), f'{INFO}: "config" must hold'),
    ("A crop larger than the image", edit(INFO, "config.crop_pct", 2), f'{INFO}: "config" must hold'),
    ("An interpolation unheard of", edit(INFO, "config.interpolation", "zzz"), f'{INFO}: "config" must hold'),
    ("Class names that are a number", edit(INFO, "classes", 5), f'{INFO}: "classes" must be a list of names'),
    ("A class name that is a number", edit(INFO, "classes", [1]), f'{INFO}: "classes" must be a list of names'),
    ("`deployed` is no truth value", edit(INFO, "deployed", "no"), f'{INFO}: "deployed" must be true or false'),
    ("The plan was cut short", cut("pruned/plan.json"), "pruned/plan.json: not valid JSON"),
    ("The plan cuts another head than the weights", edit("pruned/plan.json", "blocks.0.heads", [2]),
     "pruned/weights.safetensors: does not fit the model: wrong shapes: "),
    ("The plan is for another model", edit("pruned/plan.json", "shape.img_size", [64, 64]), "pruned/plan.json: "),
    ("The weights are empty", put("pruned/weights.safetensors", b""), "pruned/weights.safetensors: can't be read, it "
                                                                      "may be cut short"),
    ("The weights were cut short", cut("pruned/weights.safetensors"), "pruned/weights.safetensors: can't be read, it "
                                                                      "may be cut short"),
    ("The weights claim a header of 2^60 bytes", put("pruned/weights.safetensors", struct.pack("<Q", 2 ** 60) + b"{}"),
     "pruned/weights.safetensors: can't be read, it may be cut short"),
    ("A tensor is missing", tensors("pruned/weights.safetensors", head__bias=GONE), "does not fit the model: missing "
                                                                                    "keys head.bias"),
    ("A tensor too many", tensors("pruned/weights.safetensors", extra=torch.zeros(3)), "does not fit the model: "
                                                                                       "unknown keys extra"),
    ("A tensor of another shape", tensors("pruned/weights.safetensors", head__bias=torch.zeros(9)),
     "wrong shapes: head.bias is (9,), the model's is (10,)"),
    ("A tensor of complex numbers",
     tensors("pruned/weights.safetensors", head__bias=torch.zeros(10, dtype=torch.complex64)),
     "pruned/weights.safetensors: 'head.bias' is complex64, strided, on cpu; real numbers"),
]

STATE = [
    ("The file is not there", gone("dense.pth"), "dense.pth: no such file"),
    ("It is a folder that is no checkpoint", folder("dense.pth"), "dense.pth is a folder"),
    ("It is empty", put("dense.pth", b""), "dense.pth: can't be read, it may be cut short"),
    ("It was cut short", cut("dense.pth"), "dense.pth: can't be read, it may be cut short"),
    ("It is a text", put("dense.pth", "weights"), "dense.pth: "),
    ("It holds a list", pth([1, 2]), "dense.pth: holds a list, not a state dict"),
    ("It holds nothing", pth({}), "dense.pth: holds no weights"),
    ("It holds other things than tensors", pth({"model": {"a": "text"}}), "dense.pth: 'a' is not a tensor, or not its "
                                                                          "name"),
    ("A number in the place of a name", pth({3: torch.zeros(2)}), "dense.pth: 3 is not a tensor, or not its name"),
    ("It would run code", pth({"model": {}, "args": os.system}),
     "dense.pth: holds more than weights, or is damaged; nothing of it was run"),
    ("A tensor that is sparse", tensors("dense.pth", head__bias=torch.zeros(10).to_sparse()), "dense.pth: 'head.bias' "
                                                                                              "is "),
    ("A tensor without numbers", tensors("dense.pth", head__bias=torch.zeros(10, device="meta")), "dense.pth: "
                                                                                                  "'head.bias' is "),
    ("Position tokens that are no table", tensors("dense.pth", pos_embed=torch.zeros(3)), "dense.pth: does not fit the "
                                                                                          "model"),
    ("Position tokens of no grid", tensors("dense.pth", pos_embed=torch.zeros(1, 4, 64)), "dense.pth: does not fit the "
                                                                                          "model"),
    ("The first layer is a vector", tensors("dense.pth", patch_embed__proj__weight=torch.zeros(3)),
     "dense.pth: does not fit the model"),
]

SCORES = [
    ("The file is not there", gone("scores.safetensors"), MERGE, "scores.safetensors: no such file; `vitlab score` "
                                                                 "writes it"),
    ("It was cut short", cut("scores.safetensors"), MERGE, "scores.safetensors: can't be read, it may be cut short"),
    ("It holds no scores of tokens", tensors("scores.safetensors", token_scores=GONE, x=torch.zeros(1)), MERGE,
     "scores.safetensors: holds no token_scores"),
    ("Scores that are integers", tensors("scores.safetensors", token_scores=torch.ones(5, 64, dtype=torch.int64)),
     MERGE, "token_scores are torch.int64; float32 is needed"),
    ("Scores of another model", tensors("scores.safetensors", token_scores=torch.ones(5, 9)), MERGE, "(5, 9)"),
    ("Scores in one row", tensors("scores.safetensors", token_scores=torch.ones(320)), MERGE, "(320,)"),
    ("A score that is not a number", tensors("scores.safetensors", token_scores=torch.full((5, 64), math.nan)), MERGE,
     "token scores of block 0 must be finite, not negative and not all zero"),
    ("Scores that are all zero", tensors("scores.safetensors", token_scores=torch.zeros(5, 64)), MERGE, "not all zero"),
    ("Scores of units where those of tokens are needed", None, MERGE.replace("scores.safetensors", "units.safetensors"),
     "holds no token_scores"),
    ("No file of unit scores", gone("units.safetensors"), CUT, "units.safetensors: no such file"),
    ("Unit scores were cut short", cut("units.safetensors"), CUT, "units.safetensors: can't be read"),
    ("No scores of heads", tensors("units.safetensors", head_scores=GONE), CUT, "units.safetensors: holds no "
                                                                                "head_scores"),
    ("Unit scores that are integers", tensors("units.safetensors", head_scores=torch.ones(5, 4, dtype=torch.int32)),
     CUT, "head_scores are torch.int32; float32 is needed"),
    ("Unit scores of another model", tensors("units.safetensors", neuron_scores=torch.ones(5, 9)), CUT, "(5, 9)"),
    ("A unit score that is not a number", tensors("units.safetensors", neuron_scores=torch.full((5, 128), math.nan)),
     CUT, "units.safetensors: neuron_scores must be finite"),
    ("Unit scores under another ending", None, CUT.replace("units.safetensors", "plan.json"),
     "plan.json: not a .safetensors file"),
]

JOURNAL, CUTS = "study/journal.jsonl", "study/sensitivity.jsonl"
STUDY = [
    ("study.json was cut short", cut("study/study.json"), "study/study.json: not valid JSON"),
    ("study.json is another thing", put("study/study.json", "[]"), "study/study.json: another study (no vitlab.study "
                                                                   "of version 1)"),
    ("The folder of another study", edit("study/study.json", "seed", 1), "study/study.json: another study (seed 1, now "
                                                                         "0); choose another"),
    ("A journal without study.json", gone("study/study.json"), "a journal without study.json, which says what was "
                                                               "searched"),
    ("The journal is a folder", folder(JOURNAL), f"{JOURNAL}: Is a directory"),
    ("A line was cut short", line(JOURNAL, 2, '{"index": 1, "pol'), f"{JOURNAL}: line 2 is damaged"),
    ("An empty line", line(JOURNAL, 2, ""), f"{JOURNAL}: line 2 is damaged"),
    ("A line that is no object", line(JOURNAL, 2, "[1]"), f"{JOURNAL}: line 2 is damaged"),
    ("A line nested 100,000 deep", line(JOURNAL, 2, "[" * 100_000), f"{JOURNAL}: line 2 is damaged"),
    ("A line missing", line(JOURNAL, 2, lambda r: r.update(index=2)), f"{JOURNAL}: line 2 is damaged (index 2"),
    ("A value that is not a number", line(JOURNAL, 2, lambda r: r.update(value=math.nan)), f"{JOURNAL}: line 2 is "
                                                                                           f"damaged"),
    ("A value that is a text", line(JOURNAL, 2, lambda r: r.update(value="good")), f"{JOURNAL}: line 2 is damaged"),
    ("A field unheard of", line(JOURNAL, 2, lambda r: r.update(who="x")), f"{JOURNAL}: line 2 is damaged"),
    ("A policy that is not a number", line(JOURNAL, 2, lambda r: r.update(policy=[math.nan] * 5)), f"{JOURNAL}: line 2 "
                                                                                                   f"is damaged"),
    ("A ratio of 400 digits", line(JOURNAL, 2, lambda r: r.update(policy=[10 ** 400] * 5)), f"{JOURNAL}: line 2 is "
                                                                                            f"damaged"),
    ("A ratio above the largest", line(JOURNAL, 2, lambda r: r.update(policy=[7.0] * 5)),
     f"{JOURNAL}: line 2: neurons 0 is 7.0; it must lie in [0, 0.5]"),
    ("A measure that is a text", line(JOURNAL, 2, lambda r: r.update(measures={"top1_pct": "x"})), f"{JOURNAL}: line 2 "
                                                                                                   f"is damaged"),
    ("A policy of too many dimensions", line(JOURNAL, 2, lambda r: r["policy"].append(0.1)), f"{JOURNAL}: line 2: a "
                                                                                             f"policy of 6 numbers"),
    ("Cuts of another study", less(CUTS, 2, lambda r: r.update(dimension="heads 77")), f"{CUTS}: heads 77 by "),
    ("A row of the cuts that is none", less(CUTS, 2, "3"), f"{CUTS}: holds something else than the cuts of this study"),
    ("A row of the cuts without its loss", less(CUTS, 2, lambda r: r.pop("loss") and r), f"{CUTS}: holds something "
                                                                                         f"else"),
    ("Scores of another study", tensors("study/unit_scores.safetensors"), "study/unit_scores.safetensors: scores of "
                                                                          "something else"),
]

MANY = ", ".join(f"a{i}: {{x: {{value: 1}}, y: {{value: 2}}}}" for i in range(20))
LAUGHS = "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p,
                                 c in zip("abcdefghijklm", "bcdefghijklmn"))
ONE = "entries: {w: {notebook: write.ipynb, %s}}"
BATCH = [
    ("An empty file", "", "entries: none"),
    ("It is no text", b"\xff\xfe\x00\x80", "not valid YAML"),
    ("A list", "[1, 2]", "the file: a mapping"),
    ("Entries that are a list", "entries: [write]", "entries: a mapping"),
    ("A key unheard of", "entries: {w: {notebook: write.ipynb}}\nsteps: 3", "unknown key 'steps'; known are defaults, "
                                                                            "entries"),
    ("An entry's key unheard of", ONE % "params: {}",
     "entries.w: unknown key 'params'; known are notebook, parameters"),
    ("An entry without notebook", "entries: {w: {}}", "entries.w.notebook"),
    ("A notebook that is not there", "entries: {w: {notebook: 77_nothing}}", "entries.w.notebook: no such notebook"),
    ("A notebook outside the folder of the file (`..`)", "entries: {w: {notebook: ../write.ipynb}}",
     "entries.w.notebook: '../write.ipynb' is not in the folder"),
    ("A notebook by an absolute path", "entries: {w: {notebook: /etc/write.ipynb}}", "'/etc/write.ipynb' is not in the "
                                                                                     "folder"),
    ("A notebook through a link that leads out", "entries: {w: {notebook: out.ipynb}}", "'out.ipynb' is not in the "
                                                                                        "folder"),
    ("A project's notebook by a path", "entries: {w: {notebook: ../01_baseline}}", "entries.w.notebook: "
                                                                                   "'../01_baseline' is no name"),
    ("A notebook's name with a NUL", 'entries: {w: {notebook: "a\\0.ipynb"}}', "entries.w.notebook: "),
    ("A notebook that can't be read", "entries: {w: {notebook: broken.ipynb}}", "broken.ipynb can't be read as a "
                                                                                "notebook"),
    ("A notebook nested 100,000 deep", "entries: {w: {notebook: deep.ipynb}}",
     "deep.ipynb can't be read as a notebook"),
    ("A notebook without a cell of parameters", "entries: {w: {notebook: none.ipynb}}", "0 cells are tagged "
                                                                                        "`parameters`; one is needed"),
    ("A notebook with two of them", "entries: {w: {notebook: both.ipynb}}", "2 cells are tagged `parameters`; one is "
                                                                            "needed"),
    ("A parameters cell that calls something", "entries: {w: {notebook: calls.ipynb}}", "calls.ipynb can't be read as "
                                                                                        "a notebook"),
    ("An entry's name that leads out (`../w`)", "entries: {../w: {notebook: write.ipynb}}", "entries: '../w' is no "
                                                                                            "name"),
    ("An entry named `..`", "entries: {'..': {notebook: write.ipynb}}", "entries: '..' is no name"),
    ("An entry's name with a way out inside", "entries: {w/../../x: {notebook: write.ipynb}}", "entries: 'w/../../x' "
                                                                                               "is no name"),
    ("An absolute path as an entry's name", "entries: {/tmp/w: {notebook: write.ipynb}}", "entries: '/tmp/w' is no "
                                                                                          "name"),
    ("A Windows path as an entry's name", "entries: {'C:\\w': {notebook: write.ipynb}}", "is no name"),
    ("An entry's name with a NUL", 'entries: {"w\\0": {notebook: write.ipynb}}', "is no name"),
    ("An entry's name with a line break", 'entries: {"w\\n": {notebook: write.ipynb}}', "is no name"),
    ("An entry's name that is a number", "entries: {3: {notebook: write.ipynb}}", "entries: a mapping with texts as "
                                                                                  "keys"),
    ("An entry twice", "entries: {w: {notebook: write.ipynb}, w: {notebook: read.ipynb}}",
     "line 1: 'w' is given twice"),
    ("After an entry that is not there", TWO.replace("after: w", "after: v"), "entries.r.after: no entry 'v'; there "
                                                                              "are w, r"),
    ("`after` that is a mapping", TWO.replace("after: w", "after: {w: 1}"), "entries.r.after: the name of an entry"),
    ("Entries that wait for each other", TWO.replace("write.ipynb", "write.ipynb, after: r"), "comes after itself (w "
                                                                                              "-> r -> w)"),
    ("An entry after itself", ONE % "after: [w]", "comes after itself (w -> w)"),
    ("A parameter that the notebook lacks", ONE % "parameters: {valeu: 1}", "entries.w: "),
    ("A parameter of another type", ONE % "parameters: {value: half}", "value is 'half'; a int such as 1"),
    ("A truth value for a number", ONE % "parameters: {value: true}", "value is True"),
    ("A list for a number", ONE % "parameters: {value: [1]}", "value is [1]; a int such as 1"),
    ("A date in a list", ONE % "parameters: {data: [2020-01-01]}", "entries.w.parameters.data: a list; a text, number"),
    ("A list that holds itself", ONE % "parameters: {data: &a [*a]}", "entries.w.parameters.data: a list; a text, "
                                                                      "number"),
    ("The run folder as a parameter", ONE % "parameters: {run: /tmp/x}", "entries.w.parameters.run: can't be set"),
    ("A parameter without value", ONE % "parameters: {data: }", "entries.w: data has no value; give it with --set "
                                                                "data="),
    ("A default that no notebook has", "defaults: {valeu: 1}\n" + TWO, "defaults.valeu: no notebook"),
    ("A grid of one number", ONE % "grid: {value: 3}", "entries.w.grid.value: a list of different values"),
    ("A grid with a value twice", ONE % "grid: {value: [1, 1]}", "entries.w.grid.value: a list of different values"),
    ("A grid without values", ONE % "grid: {value: []}", "entries.w.grid.value: a list of different values"),
    ("A grid of a parameter that is none", ONE % "grid: {valeu: [1, 2]}", "entries.w.grid.valeu: no notebook"),
    ("A grid's value that leads out", ONE % "grid: {data: [../a, b]}", "entries.w.grid.data: '../a' is no name"),
    ("A grid's name that leads out", ONE % "grid: {kind: {../a: {value: 1}}}",
     "entries.w.grid.kind: '../a' is no name"),
    ("A parameter beside its grid", ONE % "parameters: {value: 3}, grid: {value: [1, 2]}", "the grid gives it too"),
    ("An axis twice", "entries: {w: {notebook: write.ipynb, grid: {value: [1, 2]}},\n"
     " r: {notebook: read.ipynb, after: w, grid: {value: [1, 2]}}}", "entries.r.grid: another axis 'value'"),
    ("A grid of a million entries", ONE % f"grid: {{{MANY}}}", "more than 5000 entries"),
    ("A reference to no entry before", TWO.replace("after: w", "after: w, parameters: {source: '{v}/made'}"),
     "entries.r: {v} is no single entry that it comes after"),
    ("A reference without `after`", TWO.replace("after: w", "parameters: {source: '{w}/made'}"), "those are none"),
    ("Broken YAML", "entries: {w: [", "not valid YAML (line 1"),
    ("A tag that would run code", "entries: !!python/object/apply:os.system ['touch owned']", "not valid YAML"),
    ("A date that is none", "entries: {w: {notebook: 2020-99-99}}", "not valid YAML"),
    ("Brackets nested 100,000 deep", "[" * 100_000, "not valid YAML"),
    ("A file of 300,000 bytes", "#" + "x" * 300_000, "larger than"),
    ("Anchors that multiply (a billion laughs)", LAUGHS + ONE % "parameters: {value: *n}", "unknown key 'a'"),
    ("A list in the place of a name", "entries:\n  w: {notebook: &a [x, x]}\n", "entries.w.notebook: the name of a "
                                                                                "notebook"),
    ("Merge keys that multiply", "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nentries: {}", "<< takes one mapping"),
]
CHANGES = [
    ("--set of a parameter that is none", "valeu=1", "--set valeu: no notebook"),
    ("--set of another type", "value=x", "value is 'x'"),
    ("--set of the run folder", "run=x", "--set.run"),
    ("--set with broken YAML", "value=[1", "--set value: '[1'"),
    ("--set of a place that is not there", "entries.v.parameters.value=1", "there is no such place in the file ('v' is "
                                                                           "not among w, r)"),
    ("--set without a value", "value", "'value' is not KEY=VALUE"),
    ("--set without a key", "=1", "is not KEY=VALUE"),
]


def odd_notebooks() -> None:
    Path("broken.ipynb").write_text("{no")
    Path("deep.ipynb").write_text("[" * 100_000)
    Path("out.ipynb").symlink_to("/etc/hostname")
    notebook("none.ipynb")
    notebook("both.ipynb", "a: int = 1", "b: int = 1")
    notebook("calls.ipynb", "a: int = print(1)")


DATA = [
    ("The folder is not there", gone("images"), "images: no such folder; give 'digits', or a folder that holds train/"),
    ("A file where the folder should be", lambda: (gone("images")(), put("images", "x")()), "images: no such folder"),
    ("No splits in it", lambda: [gone(f"images/{split}")() for split in ("train", "val")],
     "images: holds none of train/, val/, validation/, test/"),
    ("Class folders that are in no split",
     lambda: (gone("images/val")(), os.rename("images", "up"), os.rename("up/train", "images")), "images: images "
                                                                                                 "without labels, "
                                                                                                 "which this step "
                                                                                                 "needs; it holds none "
                                                                                                 "of train/, val/"),
    ("One folder too high", lambda: (os.rename("images", "up"), os.mkdir("images"), os.rename("up", "images/up")),
     "images: one folder too high; up/ in it holds train/ and val/: give images/up"),
    ("No split to report on", gone("images/val"), "images: no held-out split to report on"),
    ("A split without class folders", lambda: [gone(f"images/val/{name}")() for name in ("ant", "bee")],
     "images/val: holds no class folders; images must lie in val/CLASS/"),
    ("A class folder without images", lambda: [gone(f"images/val/bee/{i}.png")() for i in (0, 1)],
     "images/val/bee: a class folder without images"),
    ("Splits of different classes", lambda: picture("images/train/cat/0.png"), "train/ and val/ hold different classes "
                                                                               "('cat' is in one"),
    ("Classes that are not the model's", edit("two/checkpoint.json", "classes", ["ant", "cat"]),
     "its classes are not the model's ('bee' is in one of them only)"),
    ("Another number of classes than the model's",
     lambda: [picture(f"images/{s}/cat/0.png") for s in ("train", "val")] +
     [edit("two/checkpoint.json", "classes", None)()], "images: 3 classes, but the model's classifier has 2"),
    ("A folder that links to itself", lambda: os.symlink("..", "images/val/ant/again"), "images/val/ant/again: "),
    ("Images without labels", lambda: (gone("images")(), shutil.copytree("pictures", "images")), "images: images "
                                                                                                 "without labels"),
    ("No image of a split can be read", lambda: [cut(str(p), 0.3)() for p in Path("images/val").rglob("*.png")],
     "no image"),
    ("Another order of a class map than the model's", put("images/class_index.json", '{"ant": 1, "bee": 0}'),
     "its classes are not the model's: their order differs, number 0 is 'bee' here and 'ant' there"),
    ("class_index.json was cut short", put("images/class_index.json", '{"ant": 0, "bee'), "class_index.json: not valid "
                                                                                          "JSON"),
    ("class_index.json is a list of numbers", put("images/class_index.json", "[1, 0]"), "class_index.json: must be an "
                                                                                        "object of class"),
    ("class_index.json names a class twice", put("images/class_index.json", '["ant", "ant"]'), "class_index.json: must "
                                                                                               "be an object"),
    ("A class number that is a text", put("images/class_index.json", '{"ant": "0", "bee": 1}'), "class_index.json: "
                                                                                                "must be an object"),
    ("A class number below zero", put("images/class_index.json", '{"ant": -1, "bee": 1}'), "class_index.json: must be "
                                                                                           "an object"),
    ("Two classes of one number", put("images/class_index.json", '{"ant": 1, "bee": 1}'), "two classes have the same "
                                                                                          "number"),
    ("A class that the map lacks", put("images/class_index.json", '{"ant": 1}'), "images/train/bee: not in the class "
                                                                                 "map"),
    ("A class number that the model lacks", put("images/class_index.json", '{"ant": 1, "bee": 99}'),
     "100 classes, but the model's"),
]

REPORT = [
    ("A folder that is no run", gone("report/summary.json"), "report: no run of a batch, which has a summary.json"),
    ("summary.json was cut short", cut("report/summary.json"), "report/summary.json: not valid JSON"),
    ("summary.json is a list", put("report/summary.json", "[]"), "report/summary.json: not the summary of a batch"),
    ("summary.json without entries", edit("report/summary.json", "entries", GONE), "report/summary.json: not the "
                                                                                   "summary of a batch"),
    ("An entry that is no object", edit("report/summary.json", "entries.0", 3), "report/summary.json: not the summary "
                                                                                "of a batch"),
    ("An entry whose name leads out", edit("report/summary.json", "entries.0.name", "../../dense"),
     "report/summary.json: '../../dense' is no name of an entry"),
    ("A notebook whose name leads out", edit("report/summary.json", "entries.0.notebook", "/etc/passwd"),
     "report/summary.json: not the summary of a batch"),
    ("status.json is a list", put("report/entries/w/status.json", "[]"), "report/entries/w/status.json: "),
    ("status.json was cut short", cut("report/entries/w/status.json"), "report/entries/w/status.json: not valid JSON"),
    ("A row that is none", line("report/entries/w/results.jsonl", 1, "[1]"), "results.jsonl: holds a line that is no "
                                                                             "result row"),
    ("A row without a model", line("report/entries/w/results.jsonl", 1, '{"top1_pct": 3}'), "results.jsonl: holds a "
                                                                                            "line that is no"),
    ("A top-1 above 100", line("report/entries/w/results.jsonl", 2, lambda r: r.update(top1_pct=101)),
     "results.jsonl: top1_pct is 101; a percentage from 0 to 100"),
    ("A top-1 that is a text", line("report/entries/w/results.jsonl", 2, lambda r: r.update(top1_pct="good")),
     "results.jsonl: top1_pct is 'good'; a number"),
    ("A number of GMACs that is a list", line("report/entries/w/results.jsonl", 2, lambda r: r.update(gmacs=[1])),
     "results.jsonl: gmacs is '[1]'; a number"),
    ("A data set that is a number", line("report/entries/w/results.jsonl", 2, lambda r: r.update(dataset=3)),
     "results.jsonl: dataset is '3'; a text is needed"),
    ("Conditions that are a text", line("report/entries/w/results.jsonl", 2, lambda r: r.update(conditions="x")),
     "results.jsonl: conditions is 'x'; a mapping is needed"),
]

COMMANDS = [
    ("No command", "", "a COMMAND is needed"),
    ("A command unheard of", "frobnicate", "'frobnicate' is no COMMAND: one of pretrain, "),
    ("A command misspelt", "finetuen", "'finetuen' is no COMMAND, finetune is near"),
    ("A command of several, without which", "prune --checkpoint dense", "'--checkpoint' is no COMMAND: one of tokens, units, match, plan (see vitlab prune --help)"),
    ("A flag unheard of", f"{MATCH} --speed 3", "Unknown option: --speed"),
    ("A flag misspelt", f"{MERGE} --keeprate 0.5", "Unknown option: --keeprate. Did you mean --keep-rate? (see vitlab prune tokens --help)"),
    ("A flag misspelt, and so missing", MATCH.replace("--checkpoint", "--chekpoint"),
     "Unknown option: --chekpoint. Did you mean --checkpoint? (see vitlab prune match --help)"),
    ("A flag is missing", "prune tokens --keep-rate 0.5", "--checkpoint"),
    ("A flag without value", "prune match --checkpoint", "--checkpoint"),
    ("An empty text for a path", ["prune", "match", "--checkpoint", "", "--ratio", "0.2", "--out", "out"], "an empty text names "
                                                                                                  "nothing"),
    ("A path with a NUL", ["prune", "match", "--checkpoint", "dense", "--ratio", "0.2", "--out", "o\0"], "'o\\x00': a NUL is in "
                                                                                                "no name"),
    ("A name of 5,000 letters", MATCH.replace(" out ", f" {'x' * 5000} "), "File name too long"),
    ("A number that is a text", f"{MERGE} --keep-rate half", "'half' is not a fraction from 0 to 1"),
    ("A number out of range", f"{MERGE} --keep-rate 1.5", "'1.5' is not a fraction from 0 to 1"),
    ("A number that is none (nan)", f"{MERGE} --keep-rate nan", "'nan' is not a fraction from 0 to 1"),
    ("Nothing kept", f"{MERGE} --keep-rate 0", "keep_rate is 0.0; with 64 patches it must lie in [0.01562, 1]"),
    ("Everything pruned", f"{MERGE} --prune-rate 1", "prune_rate is 1.0; it must lie in [0, 1)"),
    ("A span that is none", f"{MERGE} --spans 0-2", "'0-2' is not FIRST-LAST:RATE, as in 3-5:0.7,6-11:0.5"),
    ("A span of a block that the model lacks", f"{MERGE} --spans 2-5:0.5", "span 2-5: its blocks must lie from 0 to 4"),
    ("Spans with a block in common", f"{MERGE} --spans 0-2:0.5,2-4:0.5", "span 2-4 begins before the one that ends "
                                                                         "with block 2 is over"),
    ("Spans and a keep rate", f"{MERGE} --spans 0-2:0.5 --keep-rate 0.5", "spans do not go with a keep rate: each span has its own"),
    ("Reading out of a span", f"{ASK} --macs-ratio 0.9 --tokens merge_per_span --read-out", "read_out: the last block "
                                                                                            "stays merged in"),
    ("Matrices that learn at no rate", f"{TUNE} --matrices-lr 0", "'0' is not a number from 1e-6"),
    ("A count of zero", f"{TRAIN} --epochs 0", "'0' is not an integer of at least 1"),
    ("A count with a fraction", f"{TRAIN} --epochs 1.5", "'1.5' is not an integer of at least 1"),
    ("A seed below zero", f"{TRAIN} --seed -1", "'-1' is not an integer from 0"),
    ("A choice unheard of", f"{MERGE} --rule best", '"best" for --rule. Choose from: "center", "merge"'),
    ("A flag twice", f"{MATCH} --ratio 0.5", "--ratio specified multiple times"),
    ("A flag of another command", f"{PRUNE} --keep-rate 0.5", "Unknown option: --keep-rate (see vitlab prune plan"),
    ("Two budgets to cut to", f"{MATCH.replace('--ratio 0.25', '')} --gmacs 1 --macs-ratio 0.5", "one of the three is needed"),
    ("A boundary for a rule that has none", f"{MERGE} --rule merge --boundary grid", "boundary is of rule center"),
    ("Scores of units without a ratio", CUT.replace("--neuron-ratio 0.25 ", ""), "nothing says how much is cut; a policy, head_ratio"),
    ("A policy unheard of", CUT.replace("--neuron-ratio 0.25", "--policy best"), "best"),
    ("A policy for another model", CUT.replace("--neuron-ratio 0.25", "--policy deit_small_60"),
     "deit_small_60 is for 12 blocks; the model has 5"),
    ("A policy and ratios", f"{CUT} --policy deit_small_60", "give the policy or ratios, not both"),
    ("A model without a classifier, to evaluate", EVALUATE.format("features"), "the model has no classifier; the model it was made from (dense) says how far its features are from that one's, knn and classes what classes they tell"),
    ("A model without a classifier, to search by top-1", f"{ASK.replace('dense', 'features')} --macs-ratio 0.6 --metric top1_pct",
     "metric 'top1_pct' is of another task; for this model 'distill_loss' is"),
    ("A model without a classifier, to fine-tune without a teacher", TUNE.replace("pruned", "features"),
     "a model without a classifier learns a teacher's features; the dense model is needed as teacher"),
    ("A teacher without a classifier", f"{TUNE} --teacher features", "the teacher has 0 classes, the student 10"),
    ("Features by neighbours and by embeddings", f"{EVALUATE.format('features')} --knn --classes scores.safetensors",
     "knn and classes both give a top-1; one of them is needed"),
    ("More neighbours than images", f"{EVALUATE.format('features')} --knn --neighbours 2000",
     "2000 nearest neighbours of 1437 images; so many at most can be asked for"),
    ("Embeddings of other classes", f"{EVALUATE.format('features')} --classes scores.safetensors",
     "scores.safetensors: embeddings of 5 classes; digits has 10"),
    ("A model that is compressed already", MATCH.replace("dense", "pruned"), "the model is already compressed; the "
                                                                             "dense one is needed"),
    ("A model unheard of", MATCH.replace("dense", "resnet5"), "'resnet5': no such file or folder, and no timm model; "
                                                              "near are"),
    ("A model that can't be handled", TRAIN.replace("vit_nano_patch4_32", "swin_tiny_patch4_window7_224"),
     "SwinTransformer"),
    ("A name without weights to download", MATCH.replace("dense", "vit_nano_patch4_32"), "No pretrained weights"),
    ("A weights file without its model's name", MATCH.replace("dense", "dense.pth"), "a weights file needs the timm "
                                                                                     "name of its model"),
    ("A model's name beside a checkpoint", f"{MATCH} --model vit_nano_patch4_32", "dense is a folder and says itself "
                                                                                  "which model it holds"),
    ("A file that is no weights file", MATCH.replace("dense", "batch.yaml"), "batch.yaml: not a weights file; one that "
                                                                             "ends in"),
    ("An image size below one patch", f"{TRAIN} --img-size 3", "vit_nano_patch4_32: an image of (3, 3) holds no patch "
                                                               "of (4, 4)"),
    ("A device unheard of", TRAIN.replace("cpu", "gpu9"), "device 'gpu9' can't be used here"),
    ("A device that can't compute", TRAIN.replace("cpu", "meta"), "device 'meta' can't compute"),
    ("A recipe unheard of", f"{TRAIN} --recipe best", "recipe 'best' is not known; known are ["),
    ("A data set unheard of", TRAIN.replace("digits", "nowhere"),
     "nowhere: no such folder; give 'digits', or a folder"),
    ("A timm data set unheard of", TRAIN.replace("digits", "torch/nothing"), "torch/nothing: timm could not open it"),
    ("A class map for the digits", f"{TRAIN} --class-map plan.json", "digits takes no class map"),
    ("A class map that is not there", f"{IMAGES} --class-map absent.json", "absent.json: no such file"),
    ("A split that is not there", EVALUATE.format("dense") + " --split val", "digits: no split 'val'; it has ['test', "
                                                                             "'train']"),
    ("A crop larger than the image", EVALUATE.format("dense") + " --crop-pct 1.5", "'1.5' is not a fraction from 0.1 "
                                                                                   "to 1"),
    ("Loader processes below zero", f"{TRAIN} --workers -1", "'-1' is not an integer from 0 to 256"),
    ("A batch larger than the memory", "throughput dense --batch-size 1000000000 --device cpu --quiet",
     "out of memory"),
    ("A criterion of tokens unheard of", "score tokens --checkpoint dense --data digits --images 8 --criterion x --out "
                                         "s.safetensors", "'x'"),
    ("A criterion of units unheard of", "score units --checkpoint dense --data digits --criterion x --out "
                                        "s.safetensors", "'x'"),
    ("One image where two are needed", "score units --checkpoint dense --data digits --images 1 --out "
                                       "s.safetensors --quiet", "image"),
    ("A flag of tokens for units", "score units --checkpoint dense --data digits --absolute batch --out "
                                   "s.safetensors", "Unknown option: --absolute"),
    ("Scores of a compressed model", "score tokens --checkpoint pruned --data digits --images 8 --out s.safetensors",
     "token scores are of the dense model"),
    ("No budget", ASK, "--gmacs"),
    ("A budget below zero", f"{ASK} --gmacs -1", "'-1' is not a positive number"),
    ("Two budgets", f"{ASK} --gmacs 1 --latency-ms 3", "one of the three is needed"),
    ("A budget that can't be met", f"{ASK} --gmacs 0.000001", "gmacs"),
    ("A ratio of nothing as budget", f"{ASK} --macs-ratio 0", "0"),
    ("Search settings unheard of", f"{ASK} --gmacs 1 --settings best", "'best' are not known; known are ['default', "
                                                                       "'published']"),
    ("A strategy unheard of", f"{ASK} --macs-ratio 0.6 --strategy best", "strategy 'best' is not known; known are ["),
    ("A start that is another strategy's", f"{ASK} --macs-ratio 0.6 --strategy random --start sensitivity",
     'a start of strategy "gp"'),
    ("Units unheard of", f"{ASK} --macs-ratio 0.6 --units toes", "units 'toes' are not known; known are ['neurons', "
                                                                 "'heads', 'widths']"),
    ("Token dimensions unheard of", f"{ASK} --macs-ratio 0.6 --tokens best", "'best'"),
    ("Nothing to search", f"{ASK} --macs-ratio 0.6 --units none --tokens none", "nothing is searched: neither heads "
                                                                                "nor neurons nor"),
    ("A type for a budget of multiply-adds", f"{ASK} --gmacs 1 --dtype bfloat16", "are those of a latency"),
    ("The published count with a latency", f"{ASK} --latency-ms 1 --published-count", "published_count is of multiply-adds"),
    ("A teacher that is not there", f"{TUNE} --teacher nowhere", "'nowhere': no such file or folder"),
    ("Steps without a plan", f"{TUNE} --steps 2", "pruning in several steps needs the dense model and a plan"),
    ("A plan for a compressed model", f"{TUNE} --plan plan.json", "the model is already compressed"),
    ("A step size that is none", f"{TUNE} --lr nan", "'nan' is not a positive number"),
    ("The result would replace the model that is read", MATCH.replace("--out out", "--out dense"), "--out dense would "
                                                                                                   "replace dense"),
    ("A file where the run folder should be", MATCH.replace("--out out", "--out plan.json"),
     "plan.json: is a file; a run folder is needed"),
    ("A run folder below a file", MATCH.replace("--out out", "--out plan.json/a/b"), "plan.json is a file, not a "
                                                                                     "folder"),
    ("A folder where the scores' file should be", "score tokens --checkpoint dense --data digits --out dense",
     "dense: is a folder; a file"),
    ("Scores under another ending", "score units --checkpoint dense --data digits --out s.txt", "s.txt: scores are written "
                                                                                          "as .safetensors"),
    ("A batch file that is not there", "batch nowhere.yaml", "nowhere.yaml: can't be read (No such file or directory)"),
    ("A batch file that is a folder", "batch dense", "dense: can't be read (Is a directory)"),
    ("Words that are quoted by half", ["batch", "batch.yaml", "--snakemake", "a 'b"], "No closing quotation"),
    ("A model of the hub, to be pushed", "push hf-hub:a/b c/d", "hf-hub:a/b is on the hub already; a run folder"),
    ("A name that is none on the hub", "push dense ants", "'ants' is no name on the hub; OWNER/NAME is needed"),
    ("A run without a checkpoint for the hub", "push images me/ants", "images: not a checkpoint; a folder with "),
    ("A hub that can't be reached", "push dense me/ants", "does not answer within 5 s; --out FOLDER writes what would"),
    ("A logger that is not known", "pretrain --model vit_nano_patch4_32 --data digits --out out --log clearml",
     "log 'clearml' is not known; known are tensorboard, trackio, wandb"),
]


SEG = "seg/checkpoint.json"
SEGMENTERS = [          # what is wrong, how it is made, the command, what the line says
    ("`segmenter` is a number", edit(SEG, "segmenter", 5), PIXELS, f'{SEG}: "segmenter": num_classes is 5'),
    ("A billion classes", edit(SEG, "segmenter.num_classes", 10 ** 9), PIXELS, f'{SEG}: "segmenter": num_classes is '
                                                                               f'1000000000'),
    ("A decoder unheard of", edit(SEG, "segmenter.decoder", "conv"), PIXELS,
     f"{SEG}: \"segmenter\": decoder is 'conv'"),
    ("A decoder of a million blocks", edit(SEG, "segmenter.args", {"depth": 10 ** 6}), PIXELS, f'{SEG}: "segmenter": '
                                                                                               f'args is '),
    ("A decoder with heads of no width", edit(SEG, "segmenter.args", {"head_dim": 0}), PIXELS, f'{SEG}: "segmenter": '
                                                                                               f'args is '),
    ("A decoder's argument that is none, such as a file to read", edit(SEG, "segmenter.args", {"file": "/x"}), PIXELS,
     f'{SEG}: "segmenter": args is '),
    ("An epsilon of zero in its norms", edit(SEG, "segmenter.norm_eps", 0), PIXELS, f'{SEG}: "segmenter": norm_eps is '
                                                                                    f'0'),
    ("A decoder other than that of the weights", edit(SEG, "segmenter.decoder", "linear"), PIXELS,
     "seg/weights.safetensors: does not fit the model: missing keys decoder.head"),
    ("A Segmenter that says it is none", edit(SEG, "segmenter", GONE), PIXELS, "seg/weights.safetensors: does not fit "
                                                                               "the model"),
    ("A plan with a decoder unheard of", edit("seg/plan.json", "shape.decoder", "conv"), PIXELS, "shape.decoder is "
                                                                                                 "'conv'; one of"),
    ("A plan that selects tokens, which leaves no grid",
     edit("seg/plan.json", "blocks.3.tokens", {"kind": "select", "kept": 9}), PIXELS, "seg/plan.json: block 3: tokens "
                                                                                      "are selected, but a class for "
                                                                                      "each pixel needs the whole grid"),  # noqa: E501
    ("A folder of classes where masks are needed", None, PIXELS.replace("digit_scenes", "images"), "images: has none "
                                                                                                   "of the layouts"),
    ("A data set unheard of", None, PIXELS.replace("digit_scenes", "nowhere"), "nowhere: no such folder"),
    ("No list of classes", gone("scenes/classes.txt"), SEGMENT, "classes.txt"),
    ("An image without its mask", gone("scenes/train/masks/1.png"), SEGMENT, "scenes/train/"),
    ("No masks", gone("scenes/train/masks"), SEGMENT, "scenes/train/"),
    ("A mask with a class that is in no list", mask("scenes/val/masks/0.png", [0, 7]),
     MASKS, "masks/0.png: holds id 7, which is unknown; ids are"),
    ("A mask of another size than its image", mask("scenes/val/masks/0.png", [0, 1], (16, 32)),
     MASKS, "masks/0.png: is 16 x 32, its image "),
    ("A mask in colours", mask("scenes/val/masks/0.png", [0, 1], mode="RGB"),
     MASKS, "masks/0.png: has 3 channels (RGB)"),
    ("Masks of which no pixel counts", lambda: [mask(f"scenes/val/masks/{i}.png", [255])() for i in (0, 1)],
     MASKS, "no pixel of the split counts"),
    ("Masks of one class alone", lambda: [mask(f"scenes/val/masks/{i}.png", [1, 255])() for i in (0, 1)],
     MASKS, "every pixel that counts is of class 'thing', so that mIoU would say nothing"),
    ("Another number of classes than the decoder's", None, SEGMENT.replace("dense", "seg"), "scenes: 2 classes, but "
                                                                                            "the model's decoder"),
    ("A decoder for a model that has one", None, f"{SEGMENT.replace('dense', 'seg').replace('scenes', 'digit_scenes')} "
                                                 f"--decoder linear",
     "the model has a decoder already (mask_transformer)"),
    ("A decoder unheard of, as a flag", None, f"{SEGMENT} --decoder conv", "conv"),
    ("One side of an image", None, f"{SEGMENT} --img-size 64", "--img-size"),
    ("An encoder that is compressed already", None, SEGMENT.replace("dense", "pruned"), "the model is already "
                                                                                        "compressed; the dense one"),
    ("A recipe whose augmentation can't be done to masks", None, f"{SEGMENT} --recipe deit",
     "augmentation 'auto_augment' can't be done to an image and its mask; scale, hflip, color_jitter can"),
    ("A class map for masks", None, f"{SEGMENT} --class-map plan.json", "Unknown option: --class-map"),
    ("The trained model would replace its encoder", None, SEGMENT.replace("--out out", "--out dense"),
     "--out dense would replace dense"),
    ("A crop for scenes, which are not resized", None, f"{PIXELS} --crop-pct 0.9", "crop_pct is 0.9, but scenes are "
                                                                                   "taken as they are"),
    ("Windows of a model that gives one class", None, EVALUATE.format("dense") + " --flip", "flip is of segmentation; "
                                                                                            "the model gives one"),
    ("Windows that leave gaps", None, f"{PIXELS} --stride 65 96", "a stride of 65 x 96 for windows of 64 x 96"),
    ("A scale of zero", None, f"{PIXELS} --scales 1 0", "'0' is not a positive number"),
    ("Tokens that leave no grid, in a search", None, f"{ASK_PIXELS} --tokens select", "tokens 'select': a class for "
                                                                                      "each pixel needs"),
    ("Reading out, in a search", None, f"{ASK_PIXELS} --read-out", "read_out: a class for each pixel needs the whole "
                                                                   "grid"),
    ("The metric of another task", None, f"{ASK_PIXELS} --criterion weight --metric top1_pct", "metric 'top1_pct' is "
                                                                                               "of another task"),
    ("A teacher that gives one class", None, "finetune --checkpoint seg --teacher eleven --data digit_scenes --recipe "
                                             "segmenter_pm "
     "--device cpu --quiet --out out", "the teacher and the student are of different tasks"),
    ("A model that gives one class for an image, to predict with", None, PREDICT.replace("seg", "dense"),
     "the model gives one class for an image; a Segmenter is needed"),
    ("A folder to predict that is not there", gone("pictures"), PREDICT, "pictures: no such folder of images"),
    ("A folder to predict without images", lambda: (gone("pictures/0.png")(), put("pictures/a.txt", "x")()), PREDICT,
     "pictures: holds no images"),
    ("A folder of which no image can be read", put("pictures/0.png", b"no image"), PREDICT,
     "pictures: none of its 1 images can be read"),
    ("Two images whose predictions have one name", lambda: picture("pictures/0.jpg"), PREDICT, "both would be written "
                                                                                               "to 0.png"),
    ("Predictions over the images themselves", None, PREDICT.replace("--out out", "--out pictures"),
     "pictures: the predictions would be written over the images"),
    ("An opacity above 1", None, f"{PREDICT} --opacity 1.5", "'1.5' is not a fraction from 0 to 1"),
    ("A window of no height", None, f"{PREDICT} --window 0 96", "'0' is not an integer of at least 1"),
    ("A window of another size than the encoder's", None, f"{PREDICT} --window 32 32", "the encoder is for 64 x 96"),
]


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (1, 1)) -> bytes:
    """A PNG of these chunks after a header that claims `size`."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")))


PIXEL = (b"IDAT", zlib.compress(b"\0" * 4))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(owned) (w) file closefile\n%%EOF\n"
BROKEN = [          # what is wrong, name, content or what makes it
    ("A JPEG that was cut short", "cut.jpg", encoded("JPEG")[:700]),
    ("A PNG that was cut short", "cut.png", encoded("PNG")[:900]),
    ("A GIF that was cut short", "gif.png", encoded("GIF")[:20]),
    ("A TIFF that was cut short", "tiff.jpg", encoded("TIFF")[:60]),
    ("A WebP that was cut short", "webp.jpg", encoded("WEBP")[:90]),
    ("A BMP that was cut short", "bmp.png", encoded("BMP")[:200]),
    ("A header and nothing after it", "header.jpg", b"\xff\xd8\xff"),
    ("An empty file", "empty.png", b""),
    ("Zeros, as a crash of a disk leaves them", "zeros.jpg", bytes(5000)),
    ("A text", "text.jpg", b"not an image at all\n"),
    ("A web page, as a failed download leaves it", "page.jpeg", b"<!doctype html><title>404</title>"),
    ("A drawing in SVG", "drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"),
    ("PostScript, which is a program", "script.jpg", POSTSCRIPT),
    ("A pickle", "pickle.png", b"\x80\x04cos\nsystem\n."),
    ("A PNG with a damaged checksum", "checksum.png", png(PIXEL).replace(b"IDAT", b"IDaT")),
    ("A PNG whose pixels are no data", "pixels.png", png((b"IDAT", b"\xff" * 40), size=(9, 9))),
    ("A PNG of no height", "flat.png", png(PIXEL, size=(9, 0))),
    ("A decompression bomb: 60,000 x 60,000 pixels claimed", "bomb.png", png(PIXEL, size=(60000, 60000))),
    ("A strip of 30,000 pixels by 1, of which a resize would make gigabytes", "strip.png",
     lambda path: Image.new("1", (30_000, 1)).save(path)),
    ("HEIC, which Pillow has no decoder of", "IMG_0001.HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)),
    ("A decompression bomb in a text: 200 MB from 200 KB", "words.png",
     lambda path: path.write_bytes(png((b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 1)), PIXEL))),
    ("A link to nothing", "gone.png", lambda path: path.symlink_to("nowhere.png")),
    ("A link to itself", "self.png", lambda path: path.symlink_to("self.png")),
    ("A pipe, which never ends", "pipe.png", os.mkfifo),
]


def faults() -> list[Fault]:
    """All rows of all tables."""
    def same(area: str, rows: list, command: str, *also: str) -> list[Fault]:
        return [Fault(area, what, plant, command, (*also, says)) for what, plant, says in rows]
    grid = TWO.replace("after: w", "after: w, grid: {factor: [2, 3]}")
    return [
        *same("Plans", PLAN, PRUNE, "plan.json"),
        *same("Checkpoint folders", CHECKPOINT, EVALUATE.format("pruned")),
        *same("Weights files", STATE, WEIGHTS),
        Fault("Weights files", "A model of another size", None, f"{WEIGHTS} --num-classes 7",
              ("dense.pth: does not fit the model: wrong shapes: head.weight is (10, 64), the model's is (7, 64)",)),
        *[Fault("Scores", what, plant, command, (says,)) for what, plant, command, says in SCORES],
        *same("Studies and journals", STUDY, f"{SEARCH} --evaluations 4 --start sensitivity"),
        *[Fault("Batch files", what, lambda text=text: (odd_notebooks(), put("batch.yaml", text)()),
                "batch batch.yaml --out out", ("batch.yaml: ", says)) for what, text, says in BATCH],
        *[Fault("Batch files", what, put("batch.yaml", grid), f"batch batch.yaml --out out --set {change}", (says,))
          for what, change, says in CHANGES],
        *same("Image folders", DATA, IMAGES),
        *[Fault("Segmenters", what, plant, command, (says,)) for what, plant, command, says in SEGMENTERS],
        *same("Runs and reports", REPORT, "report report"),
        *[Fault("Commands", what, None, command, (says,)) for what, command, says in COMMANDS],
    ]


FAULTS = faults()


# ---- The tests

@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root, before = tmp_path_factory.mktemp("world"), os.getcwd()
    try:
        make_world(root)
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def copy(world, tmp_path, monkeypatch) -> Path:
    """The world once more, as the current folder."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def everything(root: Path) -> dict[str, bytes | str]:
    """{path: content, or what it is} of all below a folder."""
    return {str(p.relative_to(root)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
            for p in root.rglob("*") if p.name != LOCK}


def run(command: str | list[str], capsys) -> tuple[int, str, list[str]]:
    """(exit code, output, lines of errors and warnings); whatever else is raised goes through, as a traceback would."""
    with warnings.catch_warnings():                             # as outside of pytest
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, kind, file, number, *_: sys.stderr.write(warnings.formatwarning(message,
                                                                                                               kind,
                                                                                                               file,
                                                                                                               number))
        try:
            code = cli.main(command.split() if isinstance(command, str) else command)
        except SystemExit as stop:
            code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.area}: {f.what}" for f in FAULTS])
def test_a_fault_gets_one_line_that_names_it_and_nothing_is_changed(fault, copy, capsys, monkeypatch):
    if fault.area == "Batch files":
        pytest.importorskip("snakemake", reason="batches need Snakemake, which needs Python 3.11 or newer")
    if fault.command == "push dense me/ants":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")        # where nobody listens
    if fault.plant:
        fault.plant()
    before = everything(copy)
    code, out, lines = run(fault.command, capsys)
    assert (code, out) == (2, ""), lines
    assert all(text in lines[-1] for text in fault.says), lines[-1]
    assert all(line.startswith("vitlab") and len(line) < 6000 and "Traceback" not in line for line in lines)
    # these with warnings before
    assert len(lines) == 1 or fault.area in ("Image folders", "Segmenters", "Weights files"), lines
    assert everything(copy) == before


def test_the_world_without_a_fault_is_taken_by_every_command(copy, capsys, monkeypatch):
    """Else a row could pass for another reason than its own."""
    monkeypatch.setattr(batch, "run_batch", lambda *a, **k: {"entries": [{"name": "w"}], "counts": {"failed": 0}})
    for command in dict.fromkeys(f.command if isinstance(f.command, str) else " ".join(f.command) for f in FAULTS
                                 if f.plant):
        if command == "report report" or "--set" in command or ".json" in command.replace("plan.json", "", 1):
            continue
        code, _, lines = run(command, capsys)
        assert code == 0, (command, lines)


def test_every_kind_of_broken_image_is_left_out_by_name_and_the_others_are_counted(copy, capsys):
    inside = copy / "images" / "val" / "ant"
    for start in range(0, len(BROKEN), 11):                     # more than 16 are refused
        for _, name, content in BROKEN[start:start + 11]:
            content(inside / name) if callable(content) else (inside / name).write_bytes(content)
        before = {path.name for path in inside.iterdir()}
        code, out, lines = run(IMAGES, capsys)
        names = [name for _, name, _ in BROKEN[start:start + 11]]
        assert code == 0 and "top1_pct" in out and all("Traceback" not in line for line in lines)
        assert [sum(f"ant/{name}: can't be read as an image (" in line for line in lines)
                for name in names] == [1] * len(names)
        conditions = read_lines("out/results.jsonl")[-1]["conditions"]
        assert (conditions["images"], conditions["broken"]) == (4, len(names))
        assert {path.name for path in inside.iterdir()} == before
        for name in names:
            (inside / name).unlink()
    assert not (copy / "owned").exists()


@pytest.mark.parametrize("kind, what", [("images", "an image"), ("masks", "a mask")])
def test_a_scene_of_which_a_file_was_cut_short_is_left_out_by_name_and_the_others_are_counted(kind, what, copy, capsys):
    cut(f"scenes/val/{kind}/0.png", 0.3)()
    code, out, lines = run(MASKS, capsys)
    assert code == 0 and "miou_pct" in out
    assert len([line for line in lines if f"scenes/val/{kind}/0.png: can't be read as {what} (" in line]) == 1
    conditions = read_lines("out/results.jsonl")[-1]["conditions"]
    assert (conditions["images"], conditions["broken"]) == (1, 1)


def test_the_page_holds_the_table_of_faults():
    assert len({(f.area, f.what) for f in FAULTS}) == len(FAULTS) >= 100
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/test_faults.py"


def page() -> str:
    """docs/faults.md."""
    def table(head: str, rows: list[tuple[str, str]]) -> str:
        lines = [f"| {head} |", "| --- | --- |",
                 *(f"| {what.replace('|', chr(92) + '|')} | {then} |" for what, then in rows)]
        return "\n".join(lines) + "\n"

    def said(fault: Fault) -> str:
        return " ... ".join(f"`{text.strip().replace('`', '').replace('|', '/')}`" for text in fault.says)
    areas = dict.fromkeys(fault.area for fault in FAULTS)
    tables = [f"## {area}\n\n"
              + table("what is wrong | what the line says", [(f.what, said(f)) for f in FAULTS if f.area == area])
              for area in areas]
    left_out = table("broken image | what happens", [(what, "left out, named, counted") for what, _, _ in BROKEN])
    tables.append(f"## Broken images\n\n{LEFT_OUT}\n\n{left_out}")
    return "\n".join([INTRODUCTION.format(count=len(FAULTS) + len(BROKEN)), *tables])


INTRODUCTION = """# What bad input gets

Each of these {count} kinds of bad input is made in `tests/test_faults.py`, which this page is written from (`python tests/test_faults.py`).
At the command line each gets one line that names the file, the place in it or the value, and what would be right; the exit code is 2, and
every file that was there is as it was. Broken images, in the last table, are left out by name instead. In Python, what concerns files and
values is an `InputError` with the same words.

No file that is loaded can run code: weights and scores are safetensors, or read by torch with `weights_only=True`; batch files are plain
YAML; images of a format that needs another program are not decoded. `tests/test_security.py` holds traps for each.
"""
LEFT_OUT = ("Evaluation and training go on without them; more than 16, or than 1 % of a split, are an error. A photograph "
            "is left out with\nits mask where either can't be read.")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
