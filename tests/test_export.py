"""Exported files against the model in PyTorch, in the runtime that they are for; what is in a graph, and in a file."""
import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import segmenting_fixtures as segmenting
import torch
from comparing import logits, relative
from PIL import Image
from test_timm_client import dense, made, pictures, rules
from training_fixtures import tiny, token_plan

from vitlab import InputError, compress, deploy, export, shape_of
from vitlab.cli import main
from vitlab.exporting import export as exporting
from vitlab.exporting import runtimes
from vitlab.models import checkpoint
from vitlab.models.create import create_model
from vitlab.plan import BlockPlan, CompressionPlan
from vitlab.plan.rules import TOKEN_RULES, Match, ReadOut, Select

onnx = pytest.importorskip("onnx", reason="onnx, of the extra export, is not installed")
SAME = 1e-5                                     # float32, other order of additions, five blocks
FILES = {"onnx": "a.onnx", "openvino": "a.xml", "pt2": "a.pt2", "aoti": "a.aoti.pt2"}
# Operators with which a backend is known to give other results, or none: TensorRT drops the reduction of scattered
# sums; a stable sort, data-dependent shapes and strings are not in most.
WRONG = re.compile(r"Scatter|NonZero|Unique|Sort|Loop|If$|Scan|Random|Sequence|String|Compress")


PLACE, KEPT = rules(9)["place"][1], Select(kept=4)
# {block: its rule}, as many in a model as it can hold: a graph takes seconds to make
MIXED = {"share, span, place": {0: rules(9)["share"][0], 1: replace(PLACE, span=2), 3: PLACE},
         "place, read out": {0: PLACE, 3: ReadOut()},
         "match, read out": {1: Match(merged=3), 2: Match(merged=0), 3: ReadOut()},
         "select, by all": {1: KEPT, 2: replace(KEPT, kept=2, ranked_by="all")}}


def small(name: str) -> torch.nn.Module:
    """Compressed by a rule of test_timm_client's, or several; heads and neurons are cut too."""
    if name not in MIXED:
        return made("registers", name, "compressed")
    whole = dense("registers")
    blocks = (BlockPlan(tokens=MIXED[name].get(i), heads=(0, 2) if i == 2 else None,
                        neurons=tuple(range(0, 96, 2)) if i == 2 else None) for i in range(4))
    return compress(whole, CompressionPlan(shape=shape_of(whole), blocks=tuple(blocks))).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Of a name of `small` and a runtime, the file and what it says, written once."""
    done = {}

    def write(name: str, to: str) -> tuple[Path, dict]:
        if (name, to) not in done:
            out = tmp_path_factory.mktemp("exported") / FILES[to]
            done[name, to] = out, export(small(name), out, classes=list("abcdefg"))
        return done[name, to]
    return write


def test_every_rule_is_in_a_graph():
    assert {rule.kind for cut in MIXED.values() for rule in cut.values()} == set(TOKEN_RULES)


@pytest.mark.parametrize("name", MIXED)
def test_every_rule_runs_in_onnxruntime_for_any_batch_with_operators_that_backends_treat_right(name, written):
    out, about = written(name, "onnx")
    run, model = runtimes.RUNTIMES["onnx"].open(out, 1), deploy(small(name))
    for count in (1, 7):
        x = pictures(model, count, seed=count)
        assert relative(torch.from_numpy(run(x.numpy())), logits(model, x)) < SAME
    graph = onnx.load(out).graph
    assert not [node.op_type for node in graph.node if WRONG.search(node.op_type)]
    assert not [node.domain for node in graph.node if node.domain not in ("", "ai.onnx")]
    assert about["verified"]["largest_difference"] < SAME and about["verified"]["agree_pct"] == 100


@pytest.mark.parametrize("to", ["openvino", "pt2"])
@pytest.mark.parametrize("rule", ["place", "match, read out"])
def test_a_rule_runs_in_other_runtimes(rule, to, written):
    pytest.importorskip("openvino", reason="openvino, of the extra export, is not installed")
    out, _ = written(rule, to)
    run, model = runtimes.RUNTIMES[to].open(out, 1), deploy(small(rule))
    for count in (1, 3):
        x = pictures(model, count, seed=count)
        assert relative(torch.from_numpy(run(x.numpy())), logits(model, x)) < SAME


@pytest.mark.parametrize("to", ["onnx", "openvino", "pt2"])
def test_a_file_says_what_a_client_needs(to, written):
    pytest.importorskip("openvino", reason="openvino, of the extra export, is not installed")
    out, about = written("match, read out", to)
    assert runtimes.RUNTIMES[to].about(out) == json.loads(json.dumps(about))
    assert about["images"]["input_size"] == (3, 42, 42) and about["classes"] == list("abcdefg")
    assert about["runtime"] == to and about["versions"]["torch"] == torch.__version__
    assert about["verified"]["batch_sizes"] == [1, 2, 5]


# other parts of a graph: queries and keys turned by place, gated neurons; a pool by attention that gives features
FAMILIES = {"RoPE and SwiGLU": ("vit_small_plus_patch16_dinov3", {"num_classes": 7, "num_reg_tokens": 1}, "onnx"),
            "attention pool": ("vit_base_patch16_siglip_224", {"num_classes": 0}, "openvino")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_in_a_runtime_with_all_of_it_cut_and_what_is_compared_is_said(family, tmp_path):
    pytest.importorskip("openvino", reason="openvino, of the extra export, is not installed")
    name, more, to = FAMILIES[family]
    torch.manual_seed(0)
    model = create_model(name, img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, **more)
    block = BlockPlan(heads=(0, 2), neurons=tuple(range(0, 31, 2)), tokens=Match(merged=3, protect=0))
    cut = deploy(compress(model, CompressionPlan(shape=shape_of(model), blocks=(block,))))
    verified = export(cut, tmp_path / FILES[to])["verified"]
    x, run = pictures(cut, 3), runtimes.RUNTIMES[to].open(tmp_path / FILES[to], 1)
    assert relative(torch.from_numpy(run(x.numpy())), logits(cut, x)) < SAME
    assert verified["largest_difference"] < SAME
    if more["num_classes"]:
        assert verified["agree_pct"] == 100 and exporting.in_words(verified) == "100.0 % of classes agree"
    else:
        assert verified["cosine"] == pytest.approx(1, abs=1e-6) and "agree_pct" not in verified
        assert exporting.in_words(verified) == "features have a cosine of 1.000000"


def test_features_of_a_file_are_compared_by_their_cosine_and_those_of_patches_by_its_mean():
    """By the formula: 1 - |u - v|^2 / 2 of unit vectors is u v."""
    u, v = np.float32([[[9, 9], [3, 4], [1, 0]]]), np.float32([[[7, 7], [4, 3], [0, 2]]])        # prefix, two patches
    model = create_model("vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3,
                         num_classes=0)
    assert exporting.likeness(model, u[:, 1], v[:, 1])["cosine"] == pytest.approx(24 / 25)
    model.global_pool, model.num_prefix_tokens = "", 1
    assert exporting.likeness(model, u, v)["cosine"] == pytest.approx((24 / 25 + 0) / 2)


def test_a_file_is_written_once_and_what_was_verified_stands_in_it(tmp_path, monkeypatch):
    calls, pt2 = [], runtimes.RUNTIMES["pt2"]
    monkeypatch.setitem(runtimes.RUNTIMES, "pt2", runtimes.Runtime(**vars(pt2) | {
        "write": lambda program, path: (calls.append(path), pt2.write(program, path))}))
    about = export(made("registers", "units", "deployed"), tmp_path / "a.pt2")
    told = {"vitlab.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=told)           # as torch's own user reads it
    assert len(calls) == 1 and json.loads(told["vitlab.json"])["verified"] == about["verified"]
    x = pictures(made("registers", "units", "deployed"), 3)
    assert relative(program.module()(x), logits(made("registers", "units", "deployed"), x)) < SAME


def test_a_file_compiled_ahead_of_time_runs_for_any_batch_and_says_what_a_client_needs(tmp_path):
    try:
        runtimes.compiler()
    except InputError as error:
        pytest.skip(str(error))
    model, out = tiny(depth=1), tmp_path / "a.aoti.pt2"
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):      # as quick as it can be
        about = export(model, out)
    assert runtimes.RUNTIMES["aoti"].about(out) == json.loads(json.dumps(about)) and about["runtime"] == "aoti"
    run = runtimes.RUNTIMES["aoti"].open(out, 1)
    for count in (1, 7):
        x = pictures(model, count, seed=count)
        assert relative(torch.from_numpy(run(x.numpy())), logits(model, x)) < SAME


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_an_int8_file_holds_weights_in_a_byte_and_says_by_how_much_it_differs(to, tmp_path, caplog):
    pytest.importorskip("openvino", reason="openvino, of the extra export, is not installed")
    model, out = tiny(depth=1, embed_dim=96), tmp_path / FILES[to]
    whole = sum(p.numel() for p in model.parameters()) * 4
    about = export(model, out, images=pictures(model, 5), int8=pictures(model, 11, seed=1))
    assert about["dtype"] == "int8" and 1e-4 < about["verified"]["largest_difference"] < 0.1
    assert not [each.message for each in caplog.records if each.name == "root"]         # the tools' words on themselves
    made = [out] if to == "onnx" else [out, out.with_suffix(".bin")]
    assert sorted(tmp_path.iterdir()) == sorted(made)                           # nothing is left of what was between
    linear = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)  # 3 of 4 bytes less; graph and scales
    assert whole - made[-1].stat().st_size > 2 * linear
    x = pictures(model, 50, seed=2)             # what is outside the ranges of the eleven is cut off: the mean is small
    wanted = logits(model, x)
    apart = (torch.from_numpy(runtimes.RUNTIMES[to].open(out, 1)(x.numpy())) - wanted).abs().mean()
    assert apart < 0.05 * (wanted.max() - wanted.min())
    if to == "onnx":
        graph = onnx.load(out).graph
        assert {tensor.data_type for tensor in graph.initializer} >= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
        assert not [node.op_type for node in graph.node if WRONG.search(node.op_type)]
        # of each product in int8 one side is weights; those of two activations, of attention, stay in float32
        bytes_of = {node.output[0]: node.input[0] in {tensor.name for tensor in graph.initializer}
                    for node in graph.node if node.op_type == "DequantizeLinear"}
        kinds = [[bytes_of.get(name) for name in node.input] for node in graph.node if node.op_type == "MatMul"]
        assert kinds.count([None, None]) == 2 and kinds.count([False, True]) == len(kinds) - 2 > 3


def test_int8_is_refused_where_there_is_none_or_no_images_to_take_ranges_from(tmp_path, capsys):
    model = tiny(depth=1)
    with pytest.raises(InputError, match="pt2 are not quantised; those for onnx, openvino are"):
        export(model, tmp_path / "a.pt2", int8=pictures(model, 3))
    with pytest.raises(InputError, match="at least 2 of"):
        export(model, tmp_path / "a.onnx", int8=torch.zeros(3, 3, 7, 7))
    assert main(["export", "--checkpoint", "no", "--out", str(tmp_path / "a.onnx"), "--int8"]) == 2
    assert "data is needed" in capsys.readouterr().err


SEGMENTERS = {"match": segmenting.match_plan, "place": token_plan,
              "share": lambda model: token_plan(model, share=True, prune_rate=0.0)}


@pytest.mark.parametrize("decoder, rule, to", [("mask_transformer", "match", "onnx"), ("linear", "place", "pt2"),
                                               ("mask_transformer", "share", "pt2"), ("queries", "match", "onnx")])
def test_a_segmenter_gives_its_maps_for_any_batch(decoder, rule, to, tmp_path):
    model = segmenting.small(decoder)
    model = compress(model, SEGMENTERS[rule](model))
    about = export(model, tmp_path / FILES[to], images=segmenting.pictures(8), classes=list("abcde"))
    x, run = segmenting.pictures(3, seed=1), runtimes.RUNTIMES[to].open(tmp_path / FILES[to], 1)
    with torch.inference_mode():
        expected = model.eval()(x)
    found = torch.from_numpy(run(x.numpy()))
    assert found.shape == expected.shape == (3, 5, 24, 40) and relative(found, expected) < SAME
    assert about["verified"]["agree_pct"] > 99.9 and tuple(about["images"]["input_size"]) == (3, 24, 40)


def test_without_a_compiler_it_is_said_before_any_work(tmp_path):
    from torch._inductor import config
    with config.patch("cpp.cxx", ("no-such-compiler",)), pytest.raises(InputError, match="C.. compiler.*g.."):
        export(None, tmp_path / "a.aoti.pt2")


def test_a_file_that_another_wrote_says_nothing(tmp_path):
    from onnx import TensorProto, helper
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])), path)
    with pytest.raises(InputError, match="vitlab did not write it"):
        runtimes.RUNTIMES["onnx"].about(path)
    torch.export.save(torch.export.export(torch.nn.Identity(), (torch.zeros(2),)), tmp_path / "other.pt2")
    with pytest.raises(InputError, match="vitlab did not write it"):
        runtimes.RUNTIMES["pt2"].about(tmp_path / "other.pt2")


def test_a_file_whose_outputs_are_others_is_not_left_behind(tmp_path, monkeypatch):
    write = runtimes.RUNTIMES["pt2"].write
    other = runtimes.traced(exporting.exported_form(made("registers", "read out", "deployed")),
                            pictures(made("registers", "units", "deployed")))
    monkeypatch.setitem(runtimes.RUNTIMES, "pt2", runtimes.Runtime(
        **vars(runtimes.RUNTIMES["pt2"]) | {"write": lambda program, path: write(other, path)}))
    with pytest.raises(InputError, match="outputs are not the model's"):
        export(made("registers", "place", "deployed"), tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file_and_says_what_was_seen(tmp_path, capsys):
    model = dense("vit")
    plan = CompressionPlan.empty(shape_of(model))
    checkpoint.save(tmp_path / "run", model, plan, classes=list("abcdefg"))
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "a.pt2")]) == 0
    assert re.search(r"a.pt2: runs in pt2 as in PyTorch on 2 images, in batches of 1, 2, 5: outputs differ by at "
                     r"most \d.*e-\d+ of their range, 100.0 % of classes agree", capsys.readouterr().out)
    about = runtimes.RUNTIMES["pt2"].about(tmp_path / "a.pt2")
    assert about["classes"] == list("abcdefg") and about["plan"] == json.loads(plan.to_json())
    for words, said in ((["--out", str(tmp_path / "a.bin")], "a.bin: what it is for"),
                        (["--out", str(tmp_path)], "is a folder"),
                        (["--out", str(tmp_path / "a.onnx"), "--to", "pt2"], "end in .pt2")):
        assert main(["export", "--checkpoint", str(tmp_path / "run"), *words]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("out, to, words", [
    ("model.bin", None, "model.bin.*ending.*onnx"), ("model.onnx", "tensorrt", "'tensorrt'.*known are"),
    ("model.onnx", "openvino", "openvino end in .xml")])
def test_a_wrong_name_is_refused_before_any_work(out, to, words, tmp_path):
    with pytest.raises(InputError, match=words):
        export(None, tmp_path / out, to=to)


def test_images_of_another_size_are_refused(tmp_path):
    with pytest.raises(InputError, match="42, 42"):
        export(made("registers", "units", "deployed"), tmp_path / "a.onnx", images=torch.zeros(4, 3, 32, 32))


def test_the_page_runs_where_onnxruntime_numpy_and_pillow_are_alone(written, tmp_path):
    """The example of docs/deploy.md, in a Python that sees neither torch nor vitlab."""
    out, _ = written("match, read out", "onnx")
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, flags=re.S).group(1)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    (tmp_path / "model.onnx").write_bytes(out.read_bytes())
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("onnxruntime", "numpy", "Pillow", "flatbuffers", "protobuf", "packaging"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue                            # other versions need fewer
        for top in {file.parts[0] for file in files if file.parts[0] != ".."}:
            place = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if not (alone / top).exists():
                (alone / top).symlink_to(place)
    ran = subprocess.run([sys.executable, "-S", "-c", f"import sys\nsys.path.append({str(alone)!r})\n{code}\n"
                          "assert 'torch' not in sys.modules and 'vitlab' not in sys.modules\nimport json\n"
                          "print(json.dumps(output.tolist()))"],
                         cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin"})
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    model = deploy(small("match, read out"))
    from timm.data import create_transform

    from vitlab.data.images import image_config
    config = image_config(model)
    x = create_transform(**{k: config[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct")},
                         crop_mode=config["crop_mode"])(picture)[None]
    wanted = logits(model, x)
    # its resizing is Pillow's, as timm's is
    assert relative(torch.tensor(json.loads(said[-1])), wanted) < 1e-4
    assert said[0].split()[0] == "abcdefg"[int(wanted.argmax())]


def test_a_plan_that_cuts_nothing_is_written_too(tmp_path):
    plan = CompressionPlan.empty(shape_of(dense("registers")))
    about = export(compress(dense("registers"), plan), tmp_path / "a.pt2", plan=plan)
    assert about["plan"] == json.loads(plan.to_json()) and about["versions"] == checkpoint.versions()
