"""Rows of a table that is there already, taken over when more pictures are embedded into it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.arrow import vectors_of
from dinokit.embedding_patches import PATCHES, PatchTable, read_patches
from dinokit.embeddings import EmbeddingTable, read_embeddings, read_origin
from dinokit.sources import Item, changed_at, state_of
from dinokit.sources.names import text_of

__all__ = ["EarlierRows", "KnownRows"]

# File systems stamp with a clock that is a little coarser than ours.
_MARGIN_S = 0.05


@dataclass(frozen=True)
class KnownRows:
    """Rows of a shard that need not be computed, of equal length."""

    places: list[int]
    """Their numbers within the shard, rising."""
    embeddings: NDArray[Any]
    """(K, D), or (K, h·w, D) patch tokens."""
    sizes: list[tuple[int, int]]
    """(width, height) of each picture."""


class EarlierRows:
    """The rows of a table by the names of their pictures.

    A picture is taken over when the table has its name, with a vector, and nothing changed it since the run that
    wrote the table began; as ``make`` decides by times. Pictures of which nobody says when they changed (web
    addresses) are taken over by name.
    """

    def __init__(self, table: Path) -> None:
        origin = read_origin(table)
        self._began = origin.get("began")
        self._rows: _PatchRows | _ParquetRows | _LoadedRows
        if origin.get("what") == PATCHES:
            self._rows = _PatchRows(table)
        else:
            self._rows = _ParquetRows(table) if table.suffix.lower() == ".parquet" else _LoadedRows(table)
        self._numbers = self._rows.numbers() if self._began is not None else {}

    def known(self, pictures: Sequence[Item]) -> KnownRows:
        """What the table knows of some pictures."""
        found = [(place, self._number(item)) for place, item in enumerate(pictures)]
        places = [place for place, number in found if number is not None]
        embeddings, sizes = self._rows.fetch([number for _, number in found if number is not None])
        return KnownRows(places, embeddings, sizes)

    def _number(self, item: Item) -> int | None:
        number = self._numbers.get(text_of(item))
        if number is None or self._began is None or state_of(item) == "missing":
            return None
        changed = changed_at(item)
        fresh = changed is None or changed < float(self._began) - _MARGIN_S
        return number if fresh else None


class _ParquetRows:
    """Rows of a Parquet table; one row group in memory at a time."""

    def __init__(self, table: Path) -> None:
        import pyarrow.parquet as pq

        self._table = table
        with pq.ParquetFile(table) as file:
            groups = range(file.num_row_groups)
            self._ends = list(itertools.accumulate(file.metadata.row_group(g).num_rows for g in groups))
        self._loaded: tuple[int, NDArray[np.float32], list[tuple[int, int]]] | None = None

    def numbers(self) -> dict[str, int]:
        """{name: row} of all rows that have a vector."""
        import pyarrow.parquet as pq

        numbers: dict[str, int] = {}
        start = 0
        with pq.ParquetFile(self._table) as file:
            for batch in file.iter_batches(columns=["path", "error"]):
                names, errors = (batch.column(name).to_pylist() for name in ("path", "error"))
                for row, (name, error) in enumerate(zip(names, errors, strict=True), start):
                    if error is None:
                        numbers[name] = row
                start += len(names)
        return numbers

    def fetch(self, numbers: Sequence[int]) -> tuple[NDArray[np.float32], list[tuple[int, int]]]:
        """Vectors and sizes of some rows. Cheap where the numbers rise from call to call."""
        vectors: list[NDArray[np.float32]] = []
        sizes: list[tuple[int, int]] = []
        for number in numbers:
            group = bisect.bisect_right(self._ends, number)
            if self._loaded is None or self._loaded[0] != group:
                self._loaded = (group, *self._load(group))
            place = number - (self._ends[group - 1] if group else 0)
            vectors.append(self._loaded[1][place])
            sizes.append(self._loaded[2][place])
        return np.stack(vectors) if vectors else np.empty((0, 0), np.float32), sizes

    def _load(self, group: int) -> tuple[NDArray[np.float32], list[tuple[int, int]]]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._table) as file:
            table = file.read_row_group(group, columns=["embedding", "width", "height"])
        sizes = zip(table.column("width").to_pylist(), table.column("height").to_pylist(), strict=True)
        return vectors_of(table), list(sizes)


def _numbers_of(table: EmbeddingTable | PatchTable) -> dict[str, int]:
    """{name: row} of all rows that have no error."""
    rows = enumerate(zip(table.paths, table.errors, strict=True))
    return {name: row for row, (name, error) in rows if error is None}


class _PatchRows:
    """Rows of a table of patch tokens, read when they are wanted."""

    def __init__(self, table: Path) -> None:
        self._table = read_patches(table)

    def numbers(self) -> dict[str, int]:
        return _numbers_of(self._table)

    def fetch(self, numbers: Sequence[int]) -> tuple[NDArray[Any], list[Any]]:
        _, height, width, dim = self._table.shape
        tokens = np.empty((len(numbers), height * width, dim), self._table.dtype)
        for place, number in enumerate(numbers):
            tokens[place] = self._table[number].reshape(height * width, dim)
        return tokens, [self._table.sizes[number] for number in numbers]


class _LoadedRows:
    """Rows of a table in another format, which has to be read whole."""

    def __init__(self, table: Path) -> None:
        self._table: EmbeddingTable = read_embeddings(table)

    def numbers(self) -> dict[str, int]:
        return _numbers_of(self._table)

    def fetch(self, numbers: Sequence[int]) -> tuple[NDArray[np.float32], list[Any]]:
        sizes = self._table.sizes
        return self._table.embeddings[list(numbers)], [sizes[number] for number in numbers]
