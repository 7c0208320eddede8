"""The benchmarks: each can be imported, what they say of images and draws is right, and tables and figures say how sure
they are."""
import importlib
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitlab.models import shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(name)
    sys.modules.pop(name)


def test_measures_of_images_have_errors_and_the_difference_to_dense_is_paired():
    found = importlib.import_module("off_the_shelf").measures
    rng = np.random.default_rng(0)
    dense = rng.integers(0, 2, 101).tolist()
    right = [1 - each if i < 7 else each for i, each in enumerate(dense)]               # seven images change
    distances = rng.random(101).tolist()
    measured = found(right, dense, distances)
    differences = [100 * (a - b) for a, b in zip(right, dense)]
    mean = sum(differences) / 101
    slow = math.sqrt(sum((each - mean) ** 2 for each in differences) / 100 / 101)
    assert measured["top1_pct"] == pytest.approx(100 * sum(right) / 101) and measured["images"] == 101
    assert measured["against_dense"] == pytest.approx(mean) and measured["against_dense_se"] == pytest.approx(slow)
    assert measured["distill_loss_se"] == pytest.approx(statistics.stdev(distances) / math.sqrt(101))
    # the other 94 say nothing of the difference
    assert measured["against_dense_se"] < 0.6 * measured["top1_se"]


def test_a_median_has_the_error_of_the_draw_that_it_is():
    middle = importlib.import_module("off_the_shelf").middle
    assert middle([3, 1, 2], [.3, .1, .2]) == (2, .2)
    assert middle([3, 1, 2, None], [.3, .1, .2, None]) == (2, .2)
    assert middle([1, 2], [.1, .4]) == (1.5, .4)
    assert middle([1, 2, 3], [None, None, .3]) == (2, None)


def test_draws_of_an_earlier_run_stay_where_this_one_has_other_seeds():
    with_earlier = importlib.import_module("off_the_shelf").with_earlier

    def row(seeds, draws, errors, **more):
        return {"ratio": None, "throughput_img_s": None,
                "conditions": {"seeds": seeds, "draws": draws, "draws_se": errors, "against": [d - 80 for d in draws],
                               "against_se": errors, "distances": [.1] * len(draws), "distances_se": [.01] * len(draws),
                               **more}}
    old = {"top1_pct": 70, "against_dense": -10, "distill_loss": .2, "ratio": 1.5, "throughput_img_s": 9.0,
           "conditions": {"seeds": [0, 3], "draws": [60, 80], "speed": {"batch_size": 32}, "of_mac_ratio": .9}}
    made = with_earlier(row([1, 0], [71.0, 72.0], [1.0, 2.0]), old)
    assert made["conditions"]["seeds"] == [0, 1, 3] and made["conditions"]["draws"] == [72, 71, 80]
    assert made["conditions"]["draws_se"] == [2, 1, None] and made["conditions"]["against"] == [-8, -9, 0]
    assert (made["top1_pct"], made["top1_se"], made["against_dense"], made["distill_loss"]) == (72, 2, -8, .1)
    assert made["ratio"] == 1.5 and made["conditions"]["of_mac_ratio"] == .9


def test_tables_show_errors_ranges_and_the_batch_and_define_the_ratio_once():
    tables = importlib.import_module("tables")

    def row(name, top1, ratio, span, **more):
        return {"model": name, "family": name, "gmacs": 1.0, "top1_pct": top1, "against_dense": top1 - 80,
                "distill_loss": .1, "ratio": ratio,
                "conditions": {"draws": [top1], "dtype": "float32", "images": 101, "of_mac_ratio": 1.0,
                               "speed": {"batch_size": 32, "ratio_range": span}}} | more
    errors = {"top1_se": 1.5, "against_dense_se": .5, "distill_loss_se": .01}
    text = tables.off_the_shelf([row("dense", 80.0, 1.0, [1.0, 1.0]), row("a", 79.0, 1.69, [.84, 2.54], **errors),
                                 row("b", 78.0, 1.5, [1.44, 1.567], **errors)])
    head, _, dense, first, second, empty, notes = text.splitlines()
    assert "throughput ratio (batch 32)" in head and "| 1.00 |" in dense and "(1.00" not in dense
    assert "| 79.00 ± 1.50 | -1.00 ± 0.50 | 0.100 ± 0.010 | 1.69 (0.84 to 2.54), too noisy to tell |" in first
    assert "| 1.50 (1.44 to 1.57) |" in second and "noisy" not in second
    assert not empty and notes.count("one standard error over images") == 1 and notes.count("median over rounds") == 1


def test_a_quick_row_is_said_below_its_table():
    tables = importlib.import_module("tables")
    row = {"model": "a", "gmacs": 1.0, "top1_pct": 50.0, "distill_loss": .1,
           "conditions": {"images": 20, "quick": True}}
    assert "quick: says nothing about quality" in tables.per_block([row]) and "50.00 ± 10" in tables.per_block([row])


def test_no_table_of_a_page_has_a_speed_without_its_batch():
    tables = importlib.import_module("tables")
    heads = [line for page in tables.PAGES for line in page.read_text(encoding="utf-8").splitlines()
             if re.match(r"\|.*throughput ratio", line)]
    assert heads and all("batch" in head or "conditions" in head for head in heads)


def test_the_benchmark_of_a_gpu_runs_on_a_cpu_and_its_rows_stand_beside_the_mac_ratio(tmp_path):
    gpu, tables = importlib.import_module("gpu"), importlib.import_module("tables")
    bench = gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
    rows = tables.read_lines(tmp_path / "rows.jsonl")
    assert len(rows) == len(bench.rows) and not bench.left_out
    assert not [(r["model"], r["conditions"]["error"]) for r in rows if "error" in r["conditions"]]
    models = {r["conditions"]["rule"]: r for r in rows if r["conditions"]["kind"] == "model"}
    assert list(models)[0] == "dense" and set(gpu.MAIN) < set(models) and len(models) == 12
    dense = models["dense"]["gmacs"]
    for rule, row in models.items():
        found = row["conditions"]
        assert found["mac_ratio"] == pytest.approx(dense / row["gmacs"]) and row["throughput_img_s"] > 0
        assert found["of_mac_ratio"] == pytest.approx(row["ratio"] / found["mac_ratio"])
        # of 6 blocks of 4 heads, a step is at most a tenth
        near = re.search(r", (0\.6)(, neurons|$)|ToMe", rule)
        assert not near or row["gmacs"] / dense == pytest.approx(0.6, abs=0.1)
    names = {r["model"].split(":")[0] for r in rows} - {r["model"].split(":")[0] for r in models.values()}
    assert names == {"attention over 13 tokens, 12 heads", "fold of 137 tokens, 384 wide", f"training step, {gpu.TINY}",
                     f"token scores, {gpu.TINY}", "one process by gloo", "ONNX Runtime on the GPU"}
    assert next(r for r in rows if r["model"] == "one process by gloo")["conditions"]["sum"] == 1024
    text = tables.gpu(rows)
    assert "ToMe" in text and "| mask (B, 1, 1, N) |" in text and "quick" in text


def test_the_benchmark_of_a_gpu_goes_on_after_what_fails_and_names_what_does_not_fit(monkeypatch):
    gpu = importlib.import_module("gpu")
    bench = gpu.Bench("cpu", 8, None, quick=True)

    def broken():
        raise RuntimeError("CUDA error: invalid argument")
    made = gpu.candidates
    monkeypatch.setattr(gpu, "candidates",
                        lambda *given: {**{k: v for k, v in made(*given).items() if k == "dense"}, "ToMe": broken})
    bench.models(gpu.TINY, 2, "eager")
    failed, dense = bench.rows
    assert failed.conditions["error"] == "RuntimeError: CUDA error: invalid argument" and dense.ratio == 1
    late = gpu.Bench("cpu", 0, None, quick=True)
    late.run()
    assert not late.rows and late.left_out[0] == f"{gpu.TINY}, batch 2, eager" and "fold" in late.left_out


@pytest.mark.parametrize("kind", ["RoPE and SwiGLU", "attention pooling", "no classifier"])
def test_tomes_rule_fits_every_family_and_merging_nothing_is_the_dense_model(kind):
    tome = importlib.import_module("tome")
    name, more, *_ = importlib.import_module("families").MODELS[kind]
    model = create_model(name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, **more)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        # one product of all heads in another order
        torch.testing.assert_close(tome.tome(model, 0)(x), model(x), atol=1e-5, rtol=1e-4)
        counts = tome.tome_within(model, 0.8 * tome.tome_gmacs(model, 0))
        merged = tome.tome(model, counts)(x)
    assert merged.shape == model(x).shape and not torch.allclose(merged, model(x), atol=1e-6)
    assert tome.tome_gmacs(model, counts) <= 0.8 * tome.tome_gmacs(model, 0)
    fewer = [(sum(counts) - 1) // 2 + (block < (sum(counts) - 1) % 2) for block in range(2)]
    assert tome.tome_gmacs(model, fewer) > 0.8 * tome.tome_gmacs(model, 0)


def test_every_rule_that_is_timed_saves_what_it_is_said_to():
    runtimes, shape = importlib.import_module("runtimes"), shape_of(create_model("deit_tiny_patch16_224"))
    limit = 0.6 * gmacs(CompressionPlan.empty(shape))
    found = runtimes.plans(shape, limit)
    assert found.keys() == runtimes.RULES.keys()
    # one ratio for all blocks meets no budget exactly, but none by much less
    assert all(0.93 * limit <= gmacs(plan) <= limit for plan in found.values())


def test_a_profile_tells_products_from_the_rest_and_counts_the_bytes_that_they_move(tmp_path):
    roofline = importlib.import_module("roofline")
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8)).eval()
    program = roofline.traced(model, torch.zeros(2, 64))
    roofline.RUNTIMES["onnx"].write(program, tmp_path / "model.onnx")
    profiled = roofline.Profiled(tmp_path / "model.onnx", threads=1)
    for _ in range(3):
        profiled.run(np.zeros((5, 64), dtype=np.float32))
    ms, found = profiled.told()
    fused = found["others_mb"] == 0                                     # ReLU, into the product before it
    assert ms.shape == (2, 2) and (ms[:, 0] > 0).all() and (ms[:, 1] == 0).all() == fused
    assert found["products_mb"] == pytest.approx(4e-6 * 5 * (64 + 48 + 48 + 8))                 # without weights
    assert found["operations"] == 3 - fused and (fused or found["others_mb"] == pytest.approx(4e-6 * 2 * 5 * 48))


def test_methods_are_fine_tuned_alike_beside_a_control_and_a_run_that_was_stopped_goes_on(tmp_path, capsys):
    finetuned, tables = importlib.import_module("finetuned"), importlib.import_module("tables")
    asked = [finetuned.CONTROL, "merging by content", "ToMe"]
    common = ["--quick", "--run", str(tmp_path), "--device", "cpu", "--seeds", "0", "--methods"]
    finetuned.main([*common, *asked[:2]])
    first = (tmp_path / "rows.jsonl").read_bytes()
    assert capsys.readouterr().out.count("'method'") == 3
    bench = finetuned.main([*common, *asked])
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(first) and capsys.readouterr().out.count("'method'") == 1
    assert [method for method, _ in bench.rows] == [finetuned.DENSE, *asked]
    dense, control, *others = bench.rows.values()
    assert dense["against_dense"] == 0 and dense["against_control"] is control["against_control"] is None
    assert control["as_cut_top1_pct"] == dense["top1_pct"] and control["macs_ratio"] == 1
    for row in others:
        assert 0.55 < row["macs_ratio"] <= 0.6 and row["throughput_img_s"] > 0
        right = [np.array(each["right"]) for each in (row, dense, control)]
        assert row["top1_pct"] == pytest.approx(100 * right[0].mean())
        assert row["against_dense"] == pytest.approx(100 * (right[0] - right[1]).mean())
        assert row["against_control"] == pytest.approx(100 * (right[0] - right[2]).mean())
    assert [row["plan"] is None for row in others] == [False, True]
    text = tables.finetuned(list(bench.rows.values()))
    assert text.count("\n") == 7 and "quick" in text and "| ToMe |" in text and "fine-tuned alike | 1.00 |" in text
