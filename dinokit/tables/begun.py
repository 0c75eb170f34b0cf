"""The rows of a shard that is not finished, kept beside the finished shards and reused when the run resumes.

A shard has 256 pictures, for which a large network on a CPU takes minutes. Its rows are kept twice a minute, for a run
that is killed, and on Ctrl-C.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.files.outputs import atomic
from dinokit.tables.earlier_rows import KnownRows

__all__ = ["BEGUN", "BegunRows", "begun_rows", "forget_begun", "keep_begun"]

BEGUN = ".begun.npz"
"""Ending of the names of their files."""


def _file_of(part: Path) -> Path:
    return part.with_suffix(BEGUN)


def keep_begun(
    part: Path, names: Sequence[str], vectors: NDArray[Any], sizes: Sequence[tuple[int, int] | None]
) -> None:
    """Writes the rows of a shard that have a size, all or none.

    Args:
        part: the file for the finished shard.
        names: of its K pictures.
        vectors: (K, …) of all its rows.
        sizes: K times (width, height), or None for rows that were not computed or failed.
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
            names=np.array([names[place] for place in places]),
            embeddings=vectors[places],
            sizes=np.array([sizes[place] for place in places]),
        )


def begun_rows(part: Path) -> KnownRows | None:
    """The rows that :func:`keep_begun` has written for this shard; None if there are none."""
    found = _read(_file_of(part))
    return None if found is None else found[0]


def _read(file: Path) -> tuple[KnownRows, list[str]] | None:
    """The rows and the names of their pictures."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            sizes = [(int(width), int(height)) for width, height in arrays["sizes"]]
            return KnownRows(arrays["places"].tolist(), arrays["embeddings"], sizes), arrays["names"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # missing or damaged: compute again
        return None


class BegunRows:
    """The rows of several such files by the names of their pictures; damaged files are ignored.

    Args:
        files: their names end in :data:`BEGUN`.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._numbers: dict[str, int] = {}
        self._rows: list[tuple[NDArray[Any], tuple[int, int]]] = []
        for file in files:
            known = _read(file)
            if known is not None:
                rows, names = known
                self._numbers |= {name: len(self._rows) + row for row, name in enumerate(names)}
                self._rows += zip(rows.embeddings, rows.sizes, strict=True)

    def numbers(self) -> dict[str, int]:
        """{name: row}"""
        return self._numbers

    def fetch(self, numbers: Sequence[int]) -> tuple[NDArray[Any], list[tuple[int, int]]]:
        """Vectors and sizes of some rows."""
        vectors = [self._rows[number][0] for number in numbers]
        return (
            np.stack(vectors) if vectors else np.empty((0, 0), np.float32),
            [self._rows[n][1] for n in numbers],
        )


def forget_begun(part: Path) -> None:
    """Removes the rows of a shard that is now finished."""
    _file_of(part).unlink(missing_ok=True)
