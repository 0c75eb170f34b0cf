"""Parquet files, and how fixed-size lists are stored in them.

Files are passed to pyarrow as open streams: it takes a name such as ``run:1.parquet`` for an address and accepts only
names in UTF-8.

In memory, vectors are ``fixed_size_list``; in a file, they are variable-length lists, with the size in the field's
metadata. Before version 26, pyarrow neither writes nor reads a null row of fixed-size lists
(``ArrowNotImplementedError``, ``Expected all lists to be of size=…``), so one unreadable picture would make the whole
table unusable, here and for everyone who opens it with pandas.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from dinokit.tables.arrow import valid_rows, vectors_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = [
    "RowGroups",
    "for_parquet",
    "from_parquet",
    "parquet_file",
    "shape_of_rows",
    "vectors_in",
    "write_parquet_file",
]

_SHAPE = b"dinokit.shape"
_ROWS_AT_ONCE = 4096
T = TypeVar("T")


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """An open Parquet file. Read it with ``use_threads=False``.

    A thread of pyarrow that lets go of a buffer of ``stream`` while Python ends aborts the process, and it has such
    threads to read ahead and to decode.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a Parquet file (ArrowInvalid).
    """
    import pyarrow.parquet as pq  # not pq.read_table: that imports pyarrow.compute and dataset

    with path.open("rb") as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        yield file


class RowGroups(Generic[T]):
    """Rows of Parquet files, one file after the other, with one row group in memory at a time.

    Args:
        files: with the same columns.
        columns: those that are read.
        values: what is kept of a row group.
    """

    def __init__(
        self, files: Sequence[Path], columns: Sequence[str], values: Callable[[pa.Table], T]
    ) -> None:
        self._columns, self._values = list(columns), values
        self._groups: list[tuple[Path, int]] = []
        counts: list[int] = []
        for path in files:
            with parquet_file(path) as file:
                groups = range(file.num_row_groups)
                self._groups += [(path, group) for group in groups]
                counts += [file.metadata.row_group(group).num_rows for group in groups]
        self._ends = list(itertools.accumulate(counts))
        self._loaded: tuple[int, T] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, number: int) -> tuple[T, int]:
        """The values of the row group that holds a row, and the row's number in it; fast if the rows come in order.

        Several threads may call this.
        """
        group = bisect.bisect_right(self._ends, number)
        loaded = self._loaded
        if loaded is None or loaded[0] != group:
            self._loaded = None  # not two at a time
            path, of_file = self._groups[group]
            with parquet_file(path) as file:
                table = file.read_row_group(of_file, columns=self._columns, use_threads=False)
            loaded = (group, self._values(from_parquet(table)))
        self._loaded = loaded
        return loaded[1], number - (self._ends[group - 1] if group else 0)


def write_parquet_file(path: Path, table: pa.Table, **options: Any) -> None:
    """A table as one Parquet file, with ``pq.write_table``'s options."""
    import pyarrow.parquet as pq

    with path.open("wb") as stream:
        pq.write_table(for_parquet(table), stream, **options)


def vectors_in(file: pq.ParquetFile, column: str = "embedding") -> NDArray[np.float32]:
    """(N, D) float32 of a file's column, with NaN for null rows; little more than that is in memory.

    Raises:
        KeyError: there is no such column.
        ValueError: it is of another type, or its rows differ in length.
    """
    import pyarrow as pa

    if column not in file.schema_arrow.names:
        raise KeyError(column)
    shape = shape_of_rows(file.schema_arrow.field(column))
    if shape is None or len(shape) > 1:  # another program wrote it, or it holds no vectors
        return vectors_of(file.read([column], use_threads=False), column)
    # Not all at once: pyarrow would hold it three times, and supports at most 2^31 numbers in one column.
    out = np.empty((file.metadata.num_rows, *shape), np.float32)
    start = 0
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column], use_threads=False):
        stop = start + len(batch)
        out[start:stop] = vectors_of(from_parquet(pa.Table.from_batches([batch])), column)
        start = stop
    return out


def shape_of_rows(field: pa.Field) -> tuple[int, ...] | None:
    """(D,) of vectors, (P, D) of patch tokens, in memory or as a file holds them; None for other columns.

    Raises:
        ValueError: the shape in the file is invalid.
    """
    import pyarrow as pa

    kind, sizes = field.type, []
    while pa.types.is_fixed_size_list(kind):
        sizes.append(kind.list_size)
        kind = kind.value_type
    if sizes:
        return tuple(sizes) if kind in (pa.float16(), pa.float32()) else None
    if not pa.types.is_list(kind) or _SHAPE not in (field.metadata or {}):
        return None
    depth = 0
    while pa.types.is_list(kind):
        depth, kind = depth + 1, kind.value_type
    try:
        shape = json.loads(field.metadata[_SHAPE])
    except (ValueError, RecursionError):
        shape = None
    fits = isinstance(shape, list) and len(shape) == depth and all(type(s) is int and s > 0 for s in shape)
    if not fits or kind not in (pa.float16(), pa.float32()):
        recorded = field.metadata[_SHAPE][:100].decode(errors="replace")
        raise ValueError(
            f"its column {field.name!r} holds {field.type}, but its metadata describe it as {recorded}"
        )
    return tuple(shape)


def for_parquet(table: pa.Table) -> pa.Table:
    """The table with variable-length lists instead of fixed-size ones."""
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        shape = shape_of_rows(field)
        if shape and pa.types.is_fixed_size_list(field.type):
            lists = [_any_length(part, shape) for part in table.column(place).chunks]
            kind = _kind(field.type, shape, one_size=False)
            metadata = {**(field.metadata or {}), _SHAPE: json.dumps(shape).encode()}
            table = table.set_column(
                place, pa.field(field.name, kind, metadata=metadata), pa.chunked_array(lists, kind)
            )
    return table


def from_parquet(table: pa.Table) -> pa.Table:
    """The inverse of :func:`for_parquet`. Columns that other programs wrote stay as they are.

    Raises:
        ValueError: lists do not have the size that the file records.
    """
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        shape = shape_of_rows(field)
        if shape and not pa.types.is_fixed_size_list(field.type):
            lists = [_one_size(part, shape, field.name) for part in table.column(place).chunks]
            kind = _kind(field.type, shape, one_size=True)
            metadata = {key: value for key, value in field.metadata.items() if key != _SHAPE}
            table = table.set_column(
                place, pa.field(field.name, kind, metadata=metadata), pa.chunked_array(lists, kind)
            )
    return table


def _kind(kind: pa.DataType, shape: tuple[int, ...], *, one_size: bool) -> pa.DataType:
    """The type of rows of this shape, as fixed-size or variable-length lists."""
    import pyarrow as pa

    for _ in shape:
        kind = kind.value_type
    for size in reversed(shape):
        kind = pa.list_(kind, size) if one_size else pa.list_(kind)
    return kind


def _any_length(part: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    """Variable-length lists, without numbers for null rows. Nothing is copied if there are no null rows."""
    import pyarrow as pa

    if not len(part):
        return pa.nulls(0, _kind(part.type, shape, one_size=False))
    first, inner = part.offset, part
    for size in shape:
        inner = inner.values
        first = inner.offset + first * size
    row = math.prod(shape)
    numbers = pa.Array.from_buffers(inner.type, len(part) * row, [None, inner.buffers()[1]], offset=first)
    valid = valid_rows(part)
    if not valid.all():
        kept = _numbers(numbers).reshape(len(part), row)[valid]
        numbers = pa.Array.from_buffers(inner.type, kept.size, [None, pa.py_buffer(kept)])
    for depth in range(len(shape) - 1, 0, -1):
        count = int(valid.sum()) * math.prod(shape[:depth])
        numbers = _lists(numbers, np.full(count, shape[depth]))
    return _lists(numbers, np.where(valid, shape[0], 0), None if valid.all() else valid)


def _lists(values: pa.Array, lengths: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> pa.Array:
    import pyarrow as pa

    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError("more than 2^31 numbers in one part of a table")
    bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    offsets = pa.py_buffer(ends.astype(np.int32))
    return pa.Array.from_buffers(pa.list_(values.type), len(lengths), [bits, offsets], children=[values])


def _one_size(part: pa.Array, shape: tuple[int, ...], name: str) -> pa.Array:
    """The inverse of :func:`_any_length`."""
    import pyarrow as pa

    if not len(part):
        return pa.nulls(0, _kind(part.type, shape, one_size=True))
    valid = valid_rows(part)
    inner, first, last = part, part.offset, part.offset + len(part)
    for depth, size in enumerate(shape):
        offsets = np.frombuffer(inner.buffers()[1], np.int32, last - first + 1, offset=4 * first)
        expected = np.where(valid, size, 0) if depth == 0 else size
        if (np.diff(offsets) != expected).any() or (depth and inner.null_count):
            raise ValueError(
                f"its column {name!r} does not have {' times '.join(map(str, shape))} numbers in each row"
            )
        inner = inner.values
        first, last = inner.offset + int(offsets[0]), inner.offset + int(offsets[-1])
    if inner.null_count:
        raise ValueError(f"its column {name!r} contains null numbers")
    numbers = pa.Array.from_buffers(inner.type, last - first, [None, inner.buffers()[1]], offset=first)
    if not valid.all():
        kept = _numbers(numbers).reshape(-1, math.prod(shape))
        rows = np.zeros((len(part), kept.shape[1]), kept.dtype)
        rows[valid] = kept
        numbers = pa.Array.from_buffers(inner.type, rows.size, [None, pa.py_buffer(rows)])
    for depth in range(len(shape) - 1, 0, -1):
        kind = pa.list_(numbers.type, shape[depth])
        count = len(part) * math.prod(shape[:depth])
        numbers = pa.Array.from_buffers(kind, count, [None], children=[numbers])
    bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(pa.list_(numbers.type, shape[0]), len(part), [bits], children=[numbers])


def _numbers(part: pa.Array) -> NDArray[Any]:
    """A view of numbers, none of which is null."""
    kind = np.dtype(np.float32 if part.type.bit_width == 32 else np.float16)
    return np.frombuffer(part.buffers()[1], kind, len(part), offset=kind.itemsize * part.offset)
