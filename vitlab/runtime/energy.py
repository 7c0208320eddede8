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
        if zone.name.count(":") > 1:            # a part of a package, counted in it
            continue
        energy = zone / "energy_uj"
        try:
            energy.read_text()
            found.append((lambda energy=energy: int(energy.read_text()),
                          int((zone / "max_energy_range_uj").read_text()), 1e-6))
        except (OSError, ValueError):           # for the administrator alone, on most machines
            return []
    return found


class Meter:
    """Counts from when it was made, or last asked. by: what tells; None where nothing does."""

    def __init__(self, device: str | torch.device) -> None:
        device = torch.device(device)
        self.counters = _gpu(device) if device.type == "cuda" else _packages() if device.type == "cpu" else []
        self.by = None if not self.counters else NVML if device.type == "cuda" else RAPL
        self.before = self._read()

    def _read(self) -> list[int]:
        return [read() for read, _, _ in self.counters]

    def joules(self) -> float | None:
        """Used since it was last asked; None where nothing tells."""
        now, before = self._read(), self.before
        self.before = now
        return sum((a - b) % turn * unit for a, b, (_, turn, unit) in zip(now, before, self.counters)) \
            if self.counters else None
