"""Ways of running what is timed: files of other runtimes, written and opened as `vitlab.export` does."""
import importlib
import json

import pytest
import torch
from comparing import logits, relative
from test_timm_client import dense, pictures
from training_fixtures import one_thread, tiny  # noqa: F401

from vitlab import CompressionPlan, InputError, shape_of
from vitlab.cli import main
from vitlab.exporting import running, runtimes
from vitlab.exporting.export import exported_form
from vitlab.exporting.running import WAYS, way_of
from vitlab.measure import latency
from vitlab.models import checkpoint
from vitlab.workbench import searching

SAME = 1e-5                                     # float32, other order of additions


def test_a_module_is_written_once_and_runs_for_batches_of_other_sizes(monkeypatch):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, of the extra export, is not installed")
    way, model, calls = way_of("onnxruntime"), tiny(depth=1), []
    write = way.ready.runtime.write
    monkeypatch.setattr(way.ready, "runtime", runtimes.Runtime(**vars(way.ready.runtime) | {
        "write": lambda program, path: (calls.append(path), write(program, path))}))
    assert str(way) == f"onnxruntime {runtime.__version__}"
    for count in (1, 3):
        x = pictures(model, count)
        assert relative(torch.from_numpy(way.ready(model, x)(x)), logits(model, x)) < SAME
    assert len(calls) == 1
    with pytest.raises(InputError, match="onnxruntime compute in float32.*not in bfloat16"):
        way.ready(model, x.bfloat16())
    with pytest.raises(InputError, match="onnxruntime is timed on the CPU, not on meta"):
        way.ready(model, x.to("meta"))


def test_openvino_computes_in_bfloat16_where_the_processor_does_and_else_says_so(tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino, of the extra export, is not installed")
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor computes in bfloat16")
    with pytest.raises(InputError, match="does not compute in bfloat16"):
        runtimes.RUNTIMES["openvino"].open(tmp_path / "a.xml", 1, "bfloat16")


@pytest.mark.parametrize("name, module", [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_runtime_that_is_not_installed_is_said_in_a_line(name, module, monkeypatch):
    found = importlib.import_module

    def missing(asked: str, *args):
        if asked == module:
            raise ImportError(f"No module named {module!r}")
        return found(asked, *args)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=rf"{module} can't be imported.*vitlab\[export\]"):
        way_of(name)


def test_ways_that_compile_say_where_there_is_no_compiler_and_unknown_ones_which_are_known():
    from torch._inductor import config
    for name in ("compiled", "aoti"):
        with config.patch("cpp.cxx", ("no-such-compiler",)), pytest.raises(InputError, match="C.. compiler"):
            way_of(name)
    with pytest.raises(InputError, match="runtime 'tensorrt' is not known; known are .*onnxruntime"):
        way_of("tensorrt")


def test_every_part_of_a_latency_table_can_be_written_and_gives_what_it_gives_in_pytorch():
    model = dense("registers")
    axes = latency.grid_axes(shape_of(model))
    tried = {part: (piece, x) for part, _, piece, x in latency._pieces(model, axes, 3)}
    tried |= {f"{part} at its least": (piece, x) for part, place, piece, x in latency._pieces(model, axes, 3)
              if part in ("pool", "match") and not any(place)}
    assert set(axes) < set(tried)
    for part, (piece, x) in tried.items():
        with torch.inference_mode():
            expected = piece(x)
        written = runtimes.traced(exported_form(piece), x).module()
        assert relative(written(x), expected) < SAME, part


def test_the_command_times_each_model_in_each_runtime(tmp_path, capsys, monkeypatch):
    model = tiny(depth=1)
    checkpoint.save(tmp_path / "run", model, CompressionPlan.empty(shape_of(model)), classes=list("abc"))
    traces = []
    monkeypatch.setattr(running, "FILES", {"pt2": "pt2"})                       # no compiler, no converter
    monkeypatch.setattr(running, "WAYS", ("torch", "pt2"))
    monkeypatch.setattr(running, "traced", lambda *given: traces.append(1) or runtimes.traced(*given))
    assert main(["throughput", str(tmp_path / "run"), "--runtime", "torch,pt2", "--repeats", "1", "--batch-size", "2",
                 "--device", "cpu", "--out", str(tmp_path / "rows"), "--quiet"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows" / "results.jsonl").read_text().splitlines()]
    name = str(tmp_path / "run")
    assert [row["model"] for row in rows] == [name, f"{name} (pt2)"] and rows[0]["ratio"] == 1
    assert [row["conditions"]["speed"]["runtime"] for row in rows] == [f"{way} {torch.__version__}"
                                                                      for way in ("torch", "pt2")]
    assert rows[1]["throughput_img_s"] > 0 and rows[1]["latency_ms"] > 0 and len(traces) == 1
    assert rows[1]["conditions"]["speed"]["threads"] == 1 and f"{name} (pt2)" in capsys.readouterr().out
    assert main(["throughput", str(tmp_path / "run"), "--runtime", "torch,tensorrt"]) == 2
    assert "'tensorrt' is not known" in capsys.readouterr().err


def test_a_searchs_latency_is_of_the_runtime_that_it_names(monkeypatch, tmp_path):
    asked = {}

    class Asked(Exception):
        pass

    def table(model, **timed):
        asked.update(timed)
        raise Asked
    model = tiny(depth=1)
    checkpoint.save(tmp_path / "run", model, CompressionPlan.empty(shape_of(model)), classes=list("0123456789"[:3]))
    monkeypatch.setattr(searching, "latency_table", table)
    monkeypatch.setattr(searching, "open_matching", lambda *given, **options: None)
    pytest.importorskip("onnxruntime", reason="onnxruntime, of the extra export, is not installed")
    with pytest.raises(Asked):
        searching.search(tmp_path / "run", "digits", tmp_path / "study", latency_ms=1, runtime="onnxruntime")
    assert asked["way"].name == "onnxruntime" and asked["batch_size"] == 32
    with pytest.raises(InputError, match="runtime are those of a latency"):
        searching.search(tmp_path / "run", "digits", tmp_path / "study", gmacs=1, runtime="onnxruntime")
    assert set(WAYS) == {"torch", "compiled", "onnxruntime", "openvino", "aoti"}
