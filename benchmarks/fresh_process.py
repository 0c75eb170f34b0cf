"""Python in a process of its own: its time and its peak memory, as the operating system tells them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Usage", "run_python"]


class Usage(NamedTuple):
    """What a process took, with those that it started and waited for."""

    seconds: float
    """From its start to its end."""
    processor_seconds: float
    """Of all threads, which hardly depend on what else the machine does."""
    peak_mib: float
    """Peak resident memory; of several processes, that of the largest."""


# A process inherits the peak of the one that started it, and those here hold numpy and more: a small one starts it.
_LAUNCHER = """
import os, sys, time
began = time.perf_counter()
identity = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(identity, 0)
print(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_python(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Runs ``python ARGUMENTS`` to its end; not on Windows, which has no wait4. SystemExit when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCHER, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"python {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    seconds, processor_seconds, peak = done.stderr.split()[-3:]
    per_mib = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return Usage(float(seconds), float(processor_seconds), int(peak) / per_mib)
