"""How many processors this process may use, and memory that it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

__all__ = ["compute_threads", "return_freed_memory", "usable_cpus"]

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


def return_freed_memory() -> None:
    """Returns freed memory to the system, where glibc's allocator would keep it.

    It keeps blocks of up to 32 MiB, which most weights are: a ViT-B took 1.3 GB instead of 0.45 GB after its graph had
    been written twice.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
