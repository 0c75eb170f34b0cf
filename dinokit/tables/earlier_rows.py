"""Rows of an existing table or of an interrupted run, reused when pictures are embedded again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dinokit.sources import Item, changed_at, state_of
from dinokit.sources.names import text_of
from dinokit.tables.arrow import vectors_of
from dinokit.tables.embeddings import EmbeddingTable, read_embeddings
from dinokit.tables.origin import read_origin
from dinokit.tables.parquet import RowGroups, parquet_file
from dinokit.tables.patches import PATCHES, PatchTable, read_patches, tokens_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["EarlierRows", "KnownRows", "ParquetRows", "RowsByName"]

# Time stamps of file systems are a little coarser than our clock.
_MARGIN_S = 0.05
_ALWAYS_THERE = {"path", "width", "height", "error"}


@dataclass(frozen=True)
class KnownRows:
    """Rows of a shard that need not be computed, of equal length."""

    places: list[int]
    """Their numbers within the shard."""
    embeddings: NDArray[Any]
    """(K, D), or (K, h·w, D) patch tokens."""
    sizes: list[tuple[int, int]]
    """(width, height) of each picture."""

    @classmethod
    def none(cls) -> KnownRows:
        """No rows."""
        return cls([], np.empty((0, 0)), [])

    def and_then(self, further: KnownRows) -> KnownRows:
        """These rows and others of the same shard."""
        if not self.places or not further.places:
            return self if self.places else further
        return KnownRows(
            self.places + further.places,
            np.concatenate([self.embeddings, further.embeddings]),
            self.sizes + further.sizes,
        )


class EarlierRows:
    """Rows by the names of their pictures.

    The row of a picture is reused if it has a vector and the picture has not changed since the run that wrote the row
    began, judged by times as in ``make``. Pictures without a time of change (web addresses) are matched by name only.

    Args:
        rows: the rows.
        began: when the run that made them began, in seconds since 1970; if None, no row is reused.
    """

    def __init__(self, rows: RowsByName, began: float | None) -> None:
        self._rows, self._began = rows, began
        self._numbers = rows.numbers() if began is not None else {}

    @classmethod
    def of_table(cls, table: Path) -> EarlierRows:
        """The rows of a finished table."""
        origin = read_origin(table)
        if origin.get("what") == PATCHES:
            return cls(_PatchRows(table), origin.get("began"))
        parquet = table.suffix.lower() == ".parquet"
        return cls(ParquetRows([table]) if parquet else _LoadedRows(table), origin.get("began"))

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def first_name(self) -> str | None:
        """The name of the first row that has a vector; None if there is none."""
        return next(iter(self._numbers), None)

    def has_any_of(self, pictures: Sequence[Item]) -> bool:
        """Whether there is a row for one of these pictures."""
        return any(text_of(item) in self._numbers for item in pictures)

    def known(self, pictures: Sequence[Item], *, but: Collection[int] = ()) -> KnownRows:
        """The reusable rows of some pictures, except those in the places ``but``."""
        found = [(place, self._number(item)) for place, item in enumerate(pictures) if place not in but]
        places = [place for place, number in found if number is not None]
        embeddings, sizes = self._rows.fetch([number for _, number in found if number is not None])
        there = np.ones(len(places), np.bool_)
        if places:  # tables rewritten by other programs may have neither a vector nor an error
            there = ~np.isnan(embeddings.reshape(len(places), -1)[:, 0]) & [bool(size) for size in sizes]
        if not there.all():
            kept = np.flatnonzero(there)
            places, sizes = [places[i] for i in kept], [sizes[i] for i in kept]
            embeddings = embeddings[kept]
        return KnownRows(places, embeddings, sizes)

    def _number(self, item: Item) -> int | None:
        number = self._numbers.get(text_of(item))
        if number is None or self._began is None or state_of(item) == "missing":
            return None
        changed = changed_at(item)
        fresh = changed is None or changed < float(self._began) - _MARGIN_S
        return number if fresh else None


class RowsByName(Protocol):
    """Rows of one or several files."""

    def numbers(self) -> dict[str, int]:
        """{name: row} of all rows that have a vector."""
        ...

    def fetch(self, numbers: Sequence[int]) -> tuple[NDArray[Any], list[tuple[int, int]]]:
        """Vectors and sizes of some rows."""
        ...


class ParquetRows:
    """Rows of Parquet files, one file after the other."""

    def __init__(self, files: Sequence[Path], column: str = "embedding") -> None:
        self._files = files
        vectors = tokens_of if column == PATCHES else vectors_of

        def values(group: pa.Table) -> tuple[NDArray[Any], list[tuple[int, int]]]:
            sizes = zip(group.column("width").to_pylist(), group.column("height").to_pylist(), strict=True)
            return vectors(group), list(sizes)

        self._groups = RowGroups(files, [column, "width", "height"], values)

    def numbers(self) -> dict[str, int]:
        numbers: dict[str, int] = {}
        start = 0
        for path in self._files:
            with parquet_file(path) as file:
                if not set(file.schema_arrow.names) >= _ALWAYS_THERE:  # another program has rewritten it
                    start += file.metadata.num_rows
                    continue
                for batch in file.iter_batches(columns=["path", "error"], use_threads=False):
                    names, errors = (batch.column(name).to_pylist() for name in ("path", "error"))
                    for row, (name, error) in enumerate(zip(names, errors, strict=True), start):
                        if error is None:
                            numbers[name] = row
                    start += len(names)
        return numbers

    def fetch(self, numbers: Sequence[int]) -> tuple[NDArray[Any], list[tuple[int, int]]]:
        """Fast where the numbers rise from call to call."""
        vectors: list[NDArray[Any]] = []
        sizes: list[tuple[int, int]] = []
        for number in numbers:
            (of_group, sizes_of_group), place = self._groups.at(number)
            vectors.append(of_group[place])
            sizes.append(sizes_of_group[place])
        return np.stack(vectors) if vectors else np.empty((0, 0), np.float32), sizes


def _numbers_of(table: EmbeddingTable | PatchTable) -> dict[str, int]:
    """{name: row} of all rows that have no error."""
    rows = enumerate(zip(table.paths, table.errors, strict=True))
    return {name: row for row, (name, error) in rows if error is None}


class _PatchRows:
    """Rows of a table of patch tokens, read on demand."""

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
    """Rows of a table in another format, which must be read whole."""

    def __init__(self, table: Path) -> None:
        self._table: EmbeddingTable = read_embeddings(table)

    def numbers(self) -> dict[str, int]:
        return _numbers_of(self._table)

    def fetch(self, numbers: Sequence[int]) -> tuple[NDArray[np.float32], list[Any]]:
        sizes = self._table.sizes
        return self._table.embeddings[list(numbers)], [sizes[number] for number in numbers]
