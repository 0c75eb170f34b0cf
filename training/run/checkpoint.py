"""Resumable state on disk: written whole or not at all, read without pickled code.

A run folder keeps the last few checkpoints as ``checkpoint/step-0000001234.pt``. Each is a dict of tensors and
plain values that ``torch.load(weights_only=True)`` accepts. If the newest is damaged, the one before is used.
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

__all__ = ["checkpoints", "load_newest", "save_checkpoint", "what_is_kept"]

_NAME = re.compile(r"step-(\d{10})\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name))


def what_is_kept(folder: Path) -> str:
    """What the same command will do next, as a sentence without a full stop."""
    saved = checkpoints(folder)
    if not saved:
        return "Nothing was saved yet; the same command starts again"
    return (
        f"The same command resumes from the last save, after step {int(saved[-1].stem.removeprefix('step-'))}"
    )


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
    except (OSError, RuntimeError) as error:
        cause = _cause(error)
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        reason = getattr(cause, "strerror", None) or cause
        raise TrainingError(
            f"the checkpoint {path} cannot be written: {reason}. Free some space, then run the same command again. "
            f"{what_is_kept(folder)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    for left in folder.glob("step-*.partial"):  # left by runs that were killed while writing
        left.unlink(missing_ok=True)
    return path


def _cause(error: BaseException) -> BaseException:
    """The error behind a failed write: after a full disk or Ctrl-C, torch's zip writer reports only its position."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError | KeyboardInterrupt):
            return found
        found = found.__cause__ or found.__context__
    return error


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Loads the newest checkpoint that can be read.

    Returns:
        The state, or None if there is no checkpoint; and a warning for each damaged file that was skipped.

    Raises:
        TrainingError: there are checkpoints and none can be read.
    """
    found = checkpoints(folder)
    damaged: list[tuple[Path, str]] = []
    for path in reversed(found):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            # Only the first sentence: torch adds long guesses at the cause.
            damaged.append(
                (path, str(error).splitlines()[0].partition(". ")[0] if str(error) else "it is empty")
            )
            continue
        if not isinstance(state, dict) or "step" not in state:
            damaged.append((path, "it is not a checkpoint"))
            continue
        return state, [
            f"the checkpoint {passed_over.name} is damaged ({reason}); the one before is used"
            for passed_over, reason in damaged
        ]
    if damaged:
        newest, reason = damaged[0]
        raise TrainingError(
            f"none of the {len(found)} checkpoints in {folder} can be read; the newest, {newest.name}: {reason}. "
            "Remove that folder to start the run again"
        )
    return None, []
