"""Convert plain values to Arrow columns and back.

Columns are built from buffers: ``pa.array`` and ``to_numpy`` import pandas if it is installed, which takes half a
second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "int_column",
    "rows_of",
    "text_column",
    "tokens_column",
    "valid_rows",
    "vector_column",
    "vectors_of",
]


def text_column(values: Sequence[str | None]) -> pa.Array:
    """A column of strings; None becomes null."""
    import pyarrow as pa

    encoded = [b"" if value is None else value.encode("utf-8", "backslashreplace") for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError("more than two gigabytes of text in one column")
    offsets, data = pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(encoded))
    return pa.Array.from_buffers(pa.string(), len(values), [_valid(values), offsets, data])


def int_column(values: Sequence[int | None]) -> pa.Array:
    """A column of int32; None becomes null."""
    import pyarrow as pa

    numbers = np.array([0 if value is None else value for value in values], np.int32)
    return pa.Array.from_buffers(pa.int32(), len(values), [_valid(values), pa.py_buffer(numbers)])


def vector_column(vectors: NDArray[np.float32], failed: Sequence[bool]) -> pa.Array:
    """(N, D) as a column fixed_size_list<float32>[D]; rows that failed are null."""
    import pyarrow as pa

    count, dim = vectors.shape
    flat = pa.py_buffer(np.ascontiguousarray(vectors, np.float32))
    numbers = pa.Array.from_buffers(pa.float32(), count * dim, [None, flat])
    valid = _valid([None if bad else 0 for bad in failed])
    return pa.Array.from_buffers(pa.list_(pa.float32(), dim), count, [valid], children=[numbers])


def tokens_column(tokens: NDArray[Any], failed: Sequence[bool]) -> pa.Array:
    """(N, P, D) float16 or float32 as a column of P lists of D numbers; rows that failed are null."""
    import pyarrow as pa

    count, patches, dim = tokens.shape
    kind = pa.float16() if tokens.dtype == np.float16 else pa.float32()
    flat = pa.py_buffer(np.ascontiguousarray(tokens, tokens.dtype))
    numbers = pa.Array.from_buffers(kind, count * patches * dim, [None, flat])
    inner = pa.Array.from_buffers(pa.list_(kind, dim), count * patches, [None], children=[numbers])
    valid = _valid([None if bad else 0 for bad in failed])
    return pa.Array.from_buffers(pa.list_(inner.type, patches), count, [valid], children=[inner])


def _valid(values: Sequence[object]) -> pa.Buffer:
    import pyarrow as pa

    valid = np.array([value is not None for value in values], np.bool_)
    return pa.py_buffer(np.packbits(valid, bitorder="little"))


def vectors_of(table: pa.Table, column: str = "embedding") -> NDArray[np.float32]:
    """(N, D) float32 of a column as :func:`vector_column` makes it, or of lists of equal length as pandas and datasets
    write them; null rows are NaN.

    Raises:
        ValueError: the column is of another type, or its rows differ in length.
    """
    import pyarrow as pa

    chunks = table.column(column)
    kind = chunks.type
    if pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32():
        return rows_of(table, column)
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise ValueError(
            f"its column {column!r} holds {kind}, expected the same number of floats in each row"
        )
    return _of_equal_lists(chunks, column)


def _of_equal_lists(chunks: pa.ChunkedArray, column: str) -> NDArray[np.float32]:
    """(N, D) of variable-length lists that all have the same length."""
    valid = np.concatenate([np.asarray(part.is_valid()) for part in chunks.chunks] or [np.empty(0, np.bool_)])
    lengths = np.concatenate(
        [np.asarray(part.value_lengths().drop_null()) for part in chunks.chunks] or [valid]
    )
    dim = int(lengths[0]) if len(lengths) else 0
    if (lengths != dim).any():
        number = int(np.flatnonzero(valid)[np.argmax(lengths != dim)])
        raise ValueError(f"its column {column!r} has {dim} numbers in its first row, but not in row {number}")
    out = np.full((len(valid), dim), np.nan, np.float32)
    numbers = [np.asarray(part.flatten()) for part in chunks.chunks]  # of valid rows only
    out[valid] = np.concatenate(numbers or [np.empty(0)]).reshape(len(lengths), dim)
    return out


def rows_of(table: pa.Table, column: str) -> NDArray[Any]:
    """A column of fixed-size lists, or of lists of these, as :func:`vector_column` and :func:`tokens_column` make them:
    (N, D) or (N, P, D), float16 or float32; null rows are NaN.

    Raises:
        ValueError: the column is of another type.
    """
    import pyarrow as pa

    chunks = table.column(column)
    kind, shape = chunks.type, []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    if not shape or kind not in (pa.float16(), pa.float32()):
        raise ValueError(f"its column {column!r} holds {chunks.type}, expected fixed-size lists of floats")
    out = np.full((len(chunks), *shape), np.nan, np.float16 if kind == pa.float16() else np.float32)
    start = 0
    for chunk in chunks.chunks:
        _copy(chunk, out[start : start + len(chunk)])
        start += len(chunk)
    return out


def _copy(chunk: pa.Array, out: NDArray[Any]) -> None:
    """Copies the valid rows of a part of a column; a part may be a view into longer buffers."""
    if not out.size:
        return
    first, inner = chunk.offset, chunk
    for size in out.shape[1:]:
        inner = inner.values
        first = inner.offset + first * size
    data = inner.buffers()[1]
    numbers = np.frombuffer(data, out.dtype, out.size, offset=out.itemsize * first).reshape(out.shape)
    if chunk.null_count:
        valid = valid_rows(chunk)
        out[valid] = numbers[valid]
    else:
        out[:] = numbers


def valid_rows(part: pa.Array) -> NDArray[np.bool_]:
    """(N,): which rows of a part of a column are not null."""
    bits = part.buffers()[0]
    if bits is None:
        return np.ones(len(part), np.bool_)
    valid = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[part.offset :][: len(part)]
    return valid.astype(np.bool_)
