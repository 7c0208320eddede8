"""measure: every model in turn, ratios against the first. No time is asserted, only order."""
import platform
import subprocess
import sys

import pytest
import torch
from training_fixtures import one_thread, tiny  # noqa: F401

from vitlab.files import InputError
from vitlab.training.throughput import conditions, measure

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
    assert speed.throughput_img_s == pytest.approx(4 * 1000 / speed.latency_ms, rel=1e-9)      # the same median, twice


def test_a_model_of_eight_times_the_blocks_is_slower_than_the_first():
    speeds = measure({"short": tiny(depth=1), "long": tiny(depth=8)}, **{**FAST, "batch_size": 8, "repeats": 5})
    assert speeds["long"].ratio < 1                             # about 1/6 on an idle machine: noise does not turn it round
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose allocator this is about")
def test_memory_that_is_held_comes_back_without_fresh_pages():
    """In a process of its own: blocks of 40 MB, freed and asked for again, which glibc else never keeps (over 32 MB)."""
    code = """
import resource, torch
from vitlab.training.throughput import hold_memory
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
    assert float(found.stdout) < 5000           # two blocks are 20,480 pages of 4 KiB; what is left is a heap that grew once more
