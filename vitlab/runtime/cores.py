"""The cores and the memory that this process may use, and threads that share them with whatever else runs there."""
import ctypes
import math
import os
import platform
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")          # of a container: microseconds of cores in so many, or "max"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4           # of mallopt(3)


def available_cores(quota: Path = QUOTA) -> int:
    """Cores this process may run on, as many as a container grants at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = map(int, quota.read_text().split())
    except (OSError, ValueError):               # no container, or one without a limit
        return cores
    return min(cores, max(1, math.ceil(granted / period)))


def share_cores() -> None:
    """Let OpenMP's threads sleep while they wait for each other, and start no more of them than a container has cores;
    what the environment says already stays. It holds where torch is imported afterwards.

    Beside other work a thread that spins uses up its turns, and has none when the others come: steps of a small model
    took 2 to 18 times as long so as with threads that sleep (docs/scale.md, "Beside other work").
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if (cores := available_cores()) < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def hold_memory() -> bool:
    """Keep freed memory in this process, where the C library is glibc; says whether it could.

    Else large blocks go back to the system and come again as fresh pages, tens of thousands a forward; how many depends
    on what the process allocated before, and with it a model's speed, by a fifth and more from process to process
    (docs/results.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def load_in_words(load: float | None = None, cores: int | None = None) -> str:
    """How busy the machine is: the mean number of running processes over the last minute, beside the cores."""
    import psutil  # not at the top: this module is the first that `vitlab` loads
    load, cores = psutil.getloadavg()[0] if load is None else load, cores or available_cores()
    over = load > cores
    return f"load {load:.1f} on {cores} core(s)" + (": more than there are, so everything takes longer than it says, "
                                                    "and speeds say little" if over else "")
