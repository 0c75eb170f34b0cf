"""Errors that can end a run in the middle of a step though its settings are right: in words, with what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dinokit.errors import TrainingError
from dinokit.training.recipe import Recipe
from dinokit.training.run.checkpoint import what_is_kept

__all__ = ["failures_in_words"]


@contextmanager
def failures_in_words(run: Path | None, recipe: Recipe) -> Iterator[None]:
    """Turns errors about memory, a full disk and the processes that read pictures into TrainingError.

    They can come at any moment, so nothing is saved: the state may be half a step ahead. torch has an exception class
    for CUDA's memory only; the other cases are recognised by their text, and any other error passes through.

    Args:
        run: the run folder; None where nothing is trained.
        recipe: complete settings.
    """

    def kept() -> str:
        return "" if run is None else f". {what_is_kept(run / 'checkpoint')}"

    try:
        yield
    except MemoryError as error:  # of this process, or of a reading process with its traceback as text
        raise TrainingError(f"there is not enough memory. {_smaller(recipe)}{kept()}") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise TrainingError(
            f"there is no space left on the disk of {error.filename or run}. Free some, then run the same command "
            f"again{kept()}"
        ) from error
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text:
            raise TrainingError(
                f"a process that reads pictures ended early ({_cause(text)}){kept()}. If it "
                "happens again, use fewer such processes with --set workers=1, or none with --set workers=0"
            ) from error
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
            where = "memory" if "DefaultCPUAllocator" in text else "memory on the GPU"
            raise TrainingError(
                f"there is not enough {where} for batch_size={recipe.batch_size}. {_smaller(recipe)}{kept()}"
            ) from error
        raise


def _cause(text: str) -> str:
    if "shared memory" in text or "Bus error" in text:
        return (
            "Bus error: the shared memory is full; a container has little of it unless it is started with "
            "--ipc=host or a larger --shm-size"
        )
    return "killed from outside, as the system does when memory runs out"


def _smaller(recipe: Recipe) -> str:
    """Settings that need less memory; the first two do not change the result, so the run can resume with them."""
    pieces = 2 * recipe.accumulate
    piece = recipe.batch_size / (pieces * recipe.devices * recipe.num_nodes)
    ways = []
    if not recipe.gradient_checkpointing:
        ways.append("Keep fewer activations, at more time per step: --set gradient_checkpointing=true")
    if piece >= 2 and piece.is_integer():
        ways.append(f"Compute each batch in more pieces: --set accumulate={pieces}")
    return (
        ". Or: ".join(ways) or "Start a new run with a smaller network, smaller crops or a smaller batch_size"
    )
