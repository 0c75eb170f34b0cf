"""How many processors this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["compute_threads", "usable_cpus"]

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus(quota_file: Path = _QUOTA) -> int:
    """Processors that this process may use: by its affinity and the container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or the quota is "max"
        quota, period = quota_file.read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus)


def compute_threads(quota_file: Path = _QUOTA) -> int:
    """Threads for a computation: :func:`usable_cpus`, at most ``OMP_NUM_THREADS`` (its first number, if several).

    Not for threads that decode pictures: torchrun sets the variable to 1 in each of its processes.
    """
    threads = usable_cpus(quota_file)
    with contextlib.suppress(ValueError):
        wished = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])
        threads = min(threads, wished) if wished > 0 else threads
    return threads
