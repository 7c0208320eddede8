"""measure: every model in turn, ratios against the first. No time is asserted, only order."""
import math
import platform
import subprocess
import sys

import pytest
import torch
from training_fixtures import images, one_thread, tiny  # noqa: F401

from vitlab.measure import throughput
from vitlab.measure.throughput import EAGER, Way, conditions, measure, median_range
from vitlab.runtime.files import InputError
from vitlab.runtime.results import NOISY, ResultRow, format_speeds, noisy

FAST = {"batch_size": 4, "repeats": 3, "warmup": 1, "min_seconds": 0.01, "progress": False}


def test_every_model_is_measured_and_the_first_ones_ratio_is_exactly_1():
    models = {"dense": tiny(), "twin": tiny(), "deeper": tiny(depth=3)}
    speeds = measure(models, **FAST)
    assert list(speeds) == list(models)
    first = speeds["dense"]
    assert first.ratio == first.ratio_min == first.ratio_max == 1.0
    for speed in speeds.values():
        assert speed.throughput_img_s > 0 and speed.latency_ms > 0
        assert speed.ratio_min <= speed.ratio <= speed.ratio_max
        assert speed.peak_memory_mb is None                                     # on a CPU


def test_throughput_is_the_batch_over_the_latency():
    speed = measure({"dense": tiny()}, **FAST)["dense"]
    assert speed.throughput_img_s == pytest.approx(4 * 1000 / speed.latency_ms, rel=1e-9)


def test_each_model_is_measured_in_each_way_and_the_first_in_the_first_is_the_baseline():
    inputs = []
    other = Way("other", "1.0", lambda module, x: lambda given: inputs.append(given) or module(given))
    speeds = measure({"dense": tiny(), "twin": tiny()}, **FAST, ways=(other, EAGER))
    assert list(speeds) == ["dense (other)", "dense", "twin (other)", "twin"]
    assert [speed.runtime for speed in speeds.values()] == 2 * ["other 1.0", f"torch {torch.__version__}"]
    assert speeds["dense (other)"].ratio == 1 and {tuple(x.shape) for x in inputs} == {(4, 3, 32, 32)}


def timed(monkeypatch, seconds: dict[int, list[float]]) -> None:
    """A model of that depth takes those seconds a forward in the rounds, and 1 before them."""
    left = {depth: iter([1.0, *values]) for depth, values in seconds.items()}
    monkeypatch.setattr(throughput, "_once", lambda model, x, runs: next(left[len(model.blocks)]))


# Rounds of a machine that gets slower: each pair of times has its ratio, 1.2 to 1.8 and one of 0.5; the dense model's
# median is 2.
DRIFT = {2: [1.0, 1.1, 1.3, 1.5, 1.9, 2.1, 4.0, 6.0, 8.0, 9.0], 3: [2.0, 0.9, 1.0, 1.0, 1.2, 1.4, 2.5, 4.0, 5.0, 5.0]}


def test_the_quotient_of_two_throughputs_is_their_ratio_whatever_the_machine_does_meanwhile(monkeypatch):
    timed(monkeypatch, DRIFT)
    speeds = measure({"dense": tiny(), "other": tiny(depth=3)}, **{**FAST, "repeats": 10, "batch_size": 7})
    dense, other = speeds.values()
    ratios = sorted(a / b for a, b in zip(*DRIFT.values()))
    assert other.ratio == pytest.approx((ratios[4] + ratios[5]) / 2, rel=1e-12)
    assert other.throughput_img_s / dense.throughput_img_s == pytest.approx(other.ratio, rel=1e-12)
    assert dense.latency_ms / other.latency_ms == pytest.approx(other.ratio, rel=1e-12)
    assert dense.throughput_img_s == pytest.approx(7 / 2.0,
                                                   rel=1e-12) and dense.ratio == dense.ratio_min == dense.ratio_max == 1
    # of 10 rounds the second from each end: 1 - 2 (1 + 10) / 1024 = 97.9 %; the one that the machine spoilt is outside
    assert (other.ratio_min,
            other.ratio_max) == pytest.approx((ratios[1], ratios[8]), rel=1e-12) and other.ratio_min > 1


@pytest.mark.parametrize("n", [1, 2, 5, 6, 8, 9, 10, 11, 20, 31])
def test_the_range_holds_the_median_with_its_confidence_and_a_narrower_one_would_not(n):
    """Against a count of all ways in which n values can lie below or above the median: value k is above it where fewer
    than k are below."""
    low, high = median_range(list(range(1, n + 1)))             # the values are their ranks
    assert low + high == n + 1

    def sure(k):
        return sum(math.comb(n, below) for below in range(n + 1) if k <= below <= n - k) / 2**n
    if n < 6:
        assert low == 1 and sure(1) < 0.95
    else:
        assert sure(low) >= 0.95 > (sure(low + 1) if low + 1 <= n - low else 0)


def test_a_ratio_is_noise_where_its_range_holds_1_and_the_baselines_is_not():
    assert [noisy(*pair)
            for pair in ((0.84, 2.54), (1.0, 1.2), (0.9, 1.0), (1.3, 1.3), (1, 1), (1.01, 1.2), (0.5, 0.9))] == [
        True, True, True, True, False, False, False]


def test_the_table_of_speeds_says_what_its_numbers_are_and_what_is_noise():
    rows = [ResultRow(model=name, throughput_img_s=20 * ratio, ratio=ratio, latency_ms=50 / ratio,
                      conditions={"speed": {"batch_size": 32, "repeats": 10, "ratio_range": span}})
            for name, ratio,
            span in (("dense", 1.0, [1.0, 1.0]), ("merged", 1.293, [1.21, 1.331]), ("cut", 1.69, [0.84, 2.54]))]
    lines = format_speeds(rows).splitlines()
    assert lines[0].split("  ")[0] == "model" and "images/s (batch 32)" in lines[0] and "ms (batch 1)" in lines[
        0] and "range" in lines[0]
    assert [line.split() for line in lines[2:5]] == [["dense", "20.0", "1.00", "1.00", "to", "1.00", "50.00"],
                                                     ["merged", "25.9", "1.29", "1.21", "to", "1.33", "38.67"],
                                                     ["cut", "33.8", "1.69", "0.84", "to", "2.54", "29.59",
                                                      *NOISY.split()]]
    assert "median over 10 rounds" in lines[5] and "(95 %)" in lines[5] and "times the ratio" in lines[6]


class Memory:
    """Of a GPU: what torch.cuda says of it, with models of that many bytes on it and a forward that holds more for a
    while."""

    def __init__(self, others: int) -> None:
        self.now = self.most = others

    def hold(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def reset(self, device) -> None:
        self.most = self.now


@pytest.mark.parametrize("others", [0, 10 * 2**20])
def test_the_peak_memory_of_a_model_is_its_own_whatever_lies_beside_it(monkeypatch, others):
    model, x = tiny(), images(3)
    own = 4 * (sum(p.numel() for p in model.parameters()) + x.numel())
    memory = Memory(others + own)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", memory.reset)
    memory.hold(7 * 2**20)                                      # an earlier forward, of another model
    memory.hold(-7 * 2**20)
    for block in model.blocks:                                  # one after the other, each holds 1 MiB while it runs
        block.register_forward_pre_hook(lambda *_: memory.hold(2**20))
        block.register_forward_hook(lambda *_: memory.hold(-2**20))
    assert throughput._peak_memory_mb(model, model, x) == pytest.approx(1 + own / 2**20, rel=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="peak memory is measured on a GPU, and there is none")
def test_the_peak_memory_beside_other_models_is_that_alone():
    alone = [measure({"model": tiny(depth=depth)}, device="cuda", **FAST)["model"].peak_memory_mb for depth in (2, 8)]
    beside = measure({"small": tiny(), "large": tiny(depth=8)}, device="cuda", **FAST)
    # an allocation takes whole blocks of 512 bytes
    assert [speed.peak_memory_mb for speed in beside.values()] == pytest.approx(alone, abs=0.01)


def test_a_model_of_eight_times_the_blocks_is_slower_than_the_first():
    speeds = measure({"short": tiny(depth=1), "long": tiny(depth=8)}, **{**FAST, "batch_size": 8, "repeats": 5})
    # about 1/6 on an idle machine: noise does not turn it round
    assert speeds["long"].ratio < 1
    assert speeds["long"].latency_ms > speeds["short"].latency_ms


def test_models_run_in_eval_mode_on_images_of_their_own_size_and_dtype():
    model, seen = tiny(img_size=48).train(), []
    model.patch_embed.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.training, inputs[0].shape, inputs[0].dtype)))
    measure({"model": model}, **{**FAST, "dtype": "bfloat16"})
    assert set(seen) == {(False, torch.Size((4, 3, 48, 48)), torch.bfloat16)}


def test_an_unknown_dtype_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'float8' is not known; known are \['bfloat16', 'float16', 'float32'\]"):
        measure({"dense": tiny()}, **{**FAST, "dtype": "float8"})


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"batch_size": -1}, {"repeats": 0}])
def test_a_size_below_1_is_refused(change):
    with pytest.raises(InputError, match="at least 1"):
        measure({"dense": tiny()}, **{**FAST, **change})


def test_no_model_is_refused():
    with pytest.raises(InputError, match="needs a model"):
        measure({}, **FAST)


def test_conditions_say_what_a_speed_depends_on():
    found = conditions(torch.device("cpu"), "float32", 4, 3)
    assert found["dtype"] == "float32" and found["batch_size"] == 4 and found["repeats"] == 3
    assert found["threads"] == torch.get_num_threads() and found["device"].endswith("CPU")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose allocator this is "
                                                              "about")
def test_memory_that_is_held_comes_back_without_fresh_pages():
    """In a process of its own: blocks of 40 MB, freed and asked for again, which glibc else never keeps (over 32
    MB)."""
    code = """
import resource, torch
from vitlab.runtime.cores import hold_memory
def faults(count=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(10 * 2**20), torch.ones(10 * 2**20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count
assert hold_memory()
torch.set_num_threads(1)
faults(10)                                      # the heap grows to what is needed at once
print(faults())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # two blocks are 20,480 pages of 4 KiB; what is left is a heap that grew once more
    assert float(found.stdout) < 5000
