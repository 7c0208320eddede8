"""Energy that the machine uses, where it can tell: an NVIDIA GPU by NVML (Volta or newer, with pynvml), the CPU
packages by RAPL, as Linux shows it to who may read it. Whatever else runs there is counted along."""
import importlib
from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
NVML, RAPL = "GPU by NVML", "CPU packages by RAPL"
Counter = tuple[Callable[[], int], int, float]  # (what reads it, where it begins again, joules of one)


def _gpu(device: torch.device) -> list[Counter]:
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:                           # no pynvml, no driver, an old or a shared GPU: it can't tell
        return []
    return [(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 2**64, 1e-3)]


def _packages() -> list[Counter]:
    found: list[Counter] = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):          # AMD's too
        energy = zone / "energy_uj"
        try:
            if not (zone / "name").read_text().startswith("package"):       # a part of one, or psys, which holds them
                continue
            energy.read_text()
            found.append((lambda energy=energy: int(energy.read_text()),
                          int((zone / "max_energy_range_uj").read_text()), 1e-6))
        except (OSError, ValueError):           # for the administrator alone, on most machines
            return []
    return found


class Meter:
    """Counts from when it was made, or last asked. by: what tells; None where nothing does, or a counter failed."""

    def __init__(self, device: str | torch.device) -> None:
        device = torch.device(device)
        self.counters = _gpu(device) if device.type == "cuda" else _packages() if device.type == "cpu" else []
        self.by = None if not self.counters else NVML if device.type == "cuda" else RAPL
        self.before, self.used = [0] * len(self.counters), 0.0
        self.joules()

    def keep_up(self) -> None:
        """To be called before a counter turns over twice: of a package that is after minutes, of a GPU never."""
        if self.by == RAPL:
            self._count()

    def _count(self) -> None:
        try:
            now = [read() for read, _, _ in self.counters]
        except Exception:                       # what could be read when it was made: no reason to end a run
            self.counters, self.by = [], None
            return
        self.used += sum((a - b) % turn * unit for a, b, (_, turn, unit) in zip(now, self.before, self.counters))
        self.before = now

    def joules(self) -> float | None:
        """Used since it was last asked; None where nothing tells."""
        self._count()
        used, self.used = self.used, 0.0
        return used if self.counters else None
