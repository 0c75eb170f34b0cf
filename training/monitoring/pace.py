"""The speed of a run: pictures per second, and the share of time spent waiting for pictures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Pace"]


class Pace:
    """Clocks the steps between two measurements; the first of them begins with the wait for its batch."""

    def __init__(self) -> None:
        self._began = self._waiting_since = time.perf_counter()
        self._waited, self._n_images = 0.0, 0

    def arrived(self) -> None:
        """Called when a batch has arrived."""
        self._waited += time.perf_counter() - self._waiting_since

    def stepped(self, n_images: int) -> None:
        """Called after a step on so many pictures."""
        self._n_images += n_images

    def waiting(self) -> None:
        """Called when the wait for the next batch begins."""
        self._waiting_since = time.perf_counter()

    def measure(self) -> dict[str, float]:
        """``images_per_s`` and ``data_wait`` (share, 0 to 1) since the last call; restarts the measurement."""
        now = time.perf_counter()
        span = max(now - self._began, 1e-9)
        measured = {
            "images_per_s": round(self._n_images / span, 2),
            "data_wait": round(min(self._waited / span, 1.0), 4),
        }
        self._began, self._waited, self._n_images = now, 0.0, 0
        return measured

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block (saving, k-NN) does not count."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - before
