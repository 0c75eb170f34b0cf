"""Pictures per second of several engines, measured in turn so that other work on the machine affects all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["images_per_second"]

_ROUNDS = 7
_MOST_SECONDS = 20.0  # for all engines together; a large model gets fewer rounds


def images_per_second(runs: Mapping[str, Callable[[], object]], batch_size: int) -> dict[str, float]:
    """The best of several rounds, which other work on the machine disturbs least, after a warm-up.

    Args:
        runs: name to a function that runs one batch.
        batch_size: pictures per batch.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > _MOST_SECONDS:
            break
    return {name: batch_size / min(times) for name, times in seconds.items()}
