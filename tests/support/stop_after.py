"""Ctrl-C in the middle of a training run."""

from __future__ import annotations

import os
import signal
from typing import Any


class StopAfter:
    """An observer that presses Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def started(self, *_: Any) -> None: ...
    def saved(self, *_: Any) -> None: ...
    def warned(self, message: str) -> None: ...
    def told(self, message: str) -> None: ...

    def stepped(self, state: Any, n_images: int, metrics: Any) -> None:
        if state.step == self.steps:
            os.kill(os.getpid(), signal.SIGINT)
