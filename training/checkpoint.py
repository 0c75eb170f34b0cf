"""Resumable state on disk: written whole or not at all, read without pickled code.

A run folder keeps the last few checkpoints as ``checkpoint/step-0000001234.pt``. Each is a dict of tensors and
plain values that ``torch.load(weights_only=True)`` accepts. A damaged newest one gives way to the one before.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from dinokit.errors import TrainingError

__all__ = ["checkpoints", "load_newest", "save_checkpoint"]

_NAME = re.compile(r"step-(\d{10})\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes ``state`` as the checkpoint of ``step`` and removes all but the newest ``keep``.

    The file appears under its name only when it is complete and on disk, so that a run killed at any moment
    leaves the one before.

    Raises:
        TrainingError: it cannot be written, for instance because the disk is full.
    """
    path = folder / f"step-{step:010d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise TrainingError(
            f"the checkpoint {path} cannot be written: {error}. Free some space or choose another -o folder, then "
            "run the same command again; it goes on from the checkpoint before"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Loads the newest checkpoint that can be read.

    Returns:
        The state, None when there is no checkpoint, and a warning for each damaged file passed over.

    Raises:
        TrainingError: there are checkpoints and none can be read.
    """
    found = checkpoints(folder)
    warnings: list[str] = []
    for path in reversed(found):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state, warnings
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.append(f"the checkpoint {path.name} is damaged ({reason}); the one before is used")
    if found:
        raise TrainingError(
            f"none of the {len(found)} checkpoints in {folder} can be read; the newest: {warnings[0]}. "
            "Remove the folder to start the run anew"
        )
    return None, warnings
