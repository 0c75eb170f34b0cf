"""TensorBoard events beside metrics.jsonl, where tensorboard is installed."""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dinokit.errors import UsageError

__all__ = ["Events"]


class Events:
    """Writes the numbers of each logged step to ``run/tensorboard``; a context manager.

    Args:
        run: the run folder.
        step: events that an earlier start wrote after this step are hidden.
        wanted: True requires tensorboard, False writes nothing, None writes if tensorboard is installed.

    Raises:
        UsageError: wanted is True, and tensorboard is not installed.
    """

    def __init__(self, run: Path, step: int, *, wanted: bool | None = None) -> None:
        self._writer: Any = None
        installed = importlib.util.find_spec("tensorboard") is not None
        if wanted and not installed:
            raise UsageError(
                "tensorboard=true, but it is not installed. Install it with: pip install tensorboard; or leave the "
                "key out: report.html has the same curves"
            )
        if not installed or wanted is False:
            return
        if not step:  # left by a start that saved nothing
            for old in (run / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from its own dependencies; the user cannot act on them
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds every finite number of a line of metrics.jsonl under its own name."""
        if self._writer is None:
            return
        for name, value in metrics.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and name != "step":
                self._writer.add_scalar(name, value, metrics["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
