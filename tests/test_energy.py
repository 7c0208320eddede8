"""Joules by counters that a folder or a module stands in for, as Linux and NVML show them."""
import sys
from types import SimpleNamespace

import pytest
import torch
from training_fixtures import one_thread, small_recipe, tiny, write_easy_folder  # noqa: F401

from vitlab.data import open_data
from vitlab.measure import throughput
from vitlab.runtime import energy
from vitlab.runtime.energy import Meter
from vitlab.runtime.results import ResultRow
from vitlab.training.loop import fit
from vitlab.training.stepping import Training
from vitlab.workbench.said import said


@pytest.fixture
def zones(tmp_path, monkeypatch):
    """Two packages, the cores of one, which are counted in it, and the whole machine, in which both are."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for name, called, microjoules in (("intel-rapl:0", "package-0", 3_000_000), ("intel-rapl:0:0", "core", 7),
                                      ("intel-rapl:1", "package-1", 900), ("intel-rapl:2", "psys", 4_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{called}\n")
        (tmp_path / name / "energy_uj").write_text(f"{microjoules}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("5000000\n")
    return tmp_path


def test_the_packages_are_added_and_one_that_began_again_is_counted_on(zones):
    meter = Meter("cpu")
    assert meter.by == "CPU packages by RAPL" and meter.joules() == 0
    (zones / "intel-rapl:0" / "energy_uj").write_text("1000000")            # 2 J to its end, and 1 J
    (zones / "intel-rapl:1" / "energy_uj").write_text("500900")
    for other in ("intel-rapl:0:0", "intel-rapl:2"):
        (zones / other / "energy_uj").write_text("4900000")
    assert meter.joules() == pytest.approx(3.5, rel=1e-12)
    assert meter.joules() == 0


def test_a_training_counts_every_turn_and_goes_on_where_a_counter_fails(zones, tmp_path, monkeypatch):
    """4 J a step, whose counter turns over at 5: in three steps twice. The files go in the second epoch."""
    counter, taken = zones / "intel-rapl:0" / "energy_uj", Training.take_step

    def takes(self, batches):
        if self.step == 4:
            counter.unlink()
        elif self.step < 4:
            counter.write_text(str((int(counter.read_text()) + 4_000_000) % 5_000_000))
        return taken(self, batches)
    monkeypatch.setattr(Training, "take_step", takes)
    data = open_data(write_easy_folder(tmp_path / "easy"))
    recipe = small_recipe(epochs=2, batch_size=16)
    first, second = fit(tiny(), data, recipe, tmp_path / "run", workers=0, progress=False)
    assert first["step"] == 3 and first["joules"] == 12 and "joules" not in second


@pytest.mark.parametrize("what", ["nothing", "unreadable"])
def test_a_machine_that_can_not_tell_says_so(zones, what, monkeypatch):
    if what == "nothing":
        monkeypatch.setattr(energy, "POWERCAP", zones / "nowhere")
    else:                                       # a folder is as unreadable as another's file, for the administrator too
        (zones / "intel-rapl:1" / "energy_uj").unlink()
        (zones / "intel-rapl:1" / "energy_uj").mkdir()
    meter = Meter("cpu")
    assert (meter.by, meter.joules()) == (None, None)
    assert Meter("meta").by is None


def test_a_gpu_tells_by_its_own_counter_of_millijoules(monkeypatch):
    counted = iter([10_000, 10_000, 12_500])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-1"))
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-ab-1": 7}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counted)))
    meter = Meter("cuda:0")
    assert meter.by == "GPU by NVML" and meter.joules() == pytest.approx(2.5, rel=1e-12)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Meter("cuda:0").joules() is None


def test_throughput_says_the_energy_of_an_image_or_a_dash(monkeypatch):
    class Fixed:                                # 2 J between any two questions
        by = "a meter"

        def __init__(self, device):
            pass

        def joules(self):
            return 2.0
    fast = {"batch_size": 4, "repeats": 3, "warmup": 1, "min_seconds": 1e-9, "progress": False}
    assert throughput.measure({"dense": tiny()}, **fast)["dense"].energy_mj_img is None
    monkeypatch.setattr(throughput, "Meter", Fixed)
    speed = throughput.measure({"dense": tiny()}, **fast)["dense"]
    assert speed.energy_mj_img == pytest.approx(1000 * 2 / 4, rel=1e-12)    # a forward a round, of 4 images
    assert throughput.conditions(torch.device("cpu"), "float32", 4, 3)["energy"] == "a meter"
    for value, says in ((500.0, "energy an image: dense 500 mJ"), (None, "energy an image: -")):
        how = {"ratio_range": [1, 1], "peak_memory_mb": None, "energy_mj_img": value, "timing": "", "batch_size": 4,
               "repeats": 3}
        row = ResultRow(model="dense", dataset="", split="", throughput_img_s=9.0, ratio=1.0, latency_ms=1.0,
                        conditions={"speed": how})
        assert says in said([row], None).splitlines()
