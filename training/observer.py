"""What a run reports while it trains."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from dinokit.training.adapt import Choice
from dinokit.training.run.state import TrainingState

__all__ = ["Observer", "PythonWarnings"]


class Observer:
    """Receives what a run reports; every method does nothing until a subclass overrides it."""

    def told(self, message: str) -> None:
        """Called with a message that is not a warning, such as the start of a long copy of remote pictures."""

    def started(self, state: TrainingState, n_images: int, choices: list[Choice]) -> None:
        """Called once, before the first step; ``state.step`` is above 0 when the run resumes."""

    def stepped(self, state: TrainingState, n_images: int, metrics: dict[str, Any] | None) -> None:
        """Called after each step with its number of pictures, and its metrics if they were logged."""

    def saved(self, state: TrainingState, model: Path) -> None:
        """Called after a checkpoint and a model folder were written."""

    def warned(self, message: str) -> None:
        """Called with each warning."""


class PythonWarnings(Observer):
    """Passes warnings to :mod:`warnings`, and is silent otherwise."""

    def warned(self, message: str) -> None:
        warnings.warn(message, stacklevel=2)
