"""What an interrupted shard had computed, kept beside the finished ones and taken over when the run goes on.

A shard holds 256 pictures, which a large network on a CPU takes minutes for.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.earlier_rows import KnownRows
from dinokit.outputs import atomic

__all__ = ["begun_rows", "forget_begun", "keep_begun"]


def _file_of(part: Path) -> Path:
    return part.with_suffix(".begun.npz")


def keep_begun(part: Path, vectors: NDArray[Any], sizes: Sequence[tuple[int, int] | None]) -> None:
    """Writes the rows of a shard that have a size, whole or not at all.

    Args:
        part: the file that the shard will have.
        vectors: (K, …) of all its rows.
        sizes: K (width, height), None of rows that were not computed or failed.
    """
    places = [place for place, size in enumerate(sizes) if size is not None]
    if not places:
        return
    file = _file_of(part)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            places=np.array(places),
            embeddings=vectors[places],
            sizes=np.array([sizes[place] for place in places]),
        )


def begun_rows(part: Path) -> KnownRows | None:
    """The rows that :func:`keep_begun` has written for this shard; None where there are none."""
    try:
        with _file_of(part).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            sizes = [(int(width), int(height)) for width, height in arrays["sizes"]]
            return KnownRows(arrays["places"].tolist(), arrays["embeddings"], sizes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or damaged: computed again
        return None


def forget_begun(part: Path) -> None:
    """The shard is finished."""
    _file_of(part).unlink(missing_ok=True)
