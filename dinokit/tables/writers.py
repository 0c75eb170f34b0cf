"""Writers of tables of embeddings in each format. Tables come in parts, one in memory at a time.

``embeddings.py`` describes the formats; ``readers.py`` reads them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.files.outputs import atomic, atomic_together
from dinokit.tables.arrow import vectors_of
from dinokit.tables.formats import beside
from dinokit.tables.lance import LANCE_SUFFIX, write_lance
from dinokit.tables.origin import metadata_of, parquet_metadata_of
from dinokit.tables.parquet import for_parquet

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["WRITERS", "numbers_as_text", "write_array", "write_npy", "write_parquet"]


@contextmanager
def _with_origin(output: Path, origin: Mapping[str, Any], *endings: str) -> Iterator[list[Path]]:
    """Temporary names for a table and the files beside it (``endings``). They take their names together, with the
    origin last: next to other vectors, it would declare them the result of this run."""
    files = [output, *(beside(output, ending) for ending in endings), beside(output, ".origin.json")]
    with atomic_together(files) as temporaries:
        yield temporaries[:-1]
        text = json.dumps(dict(origin), indent=2, ensure_ascii=False) + "\n"
        temporaries[-1].write_text(text, encoding="utf-8")


def _write_parquet(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    write_parquet(output, parts, origin)


def write_parquet(output: Path, parts: Callable[[], Iterator[pa.Table]], origin: Mapping[str, Any]) -> None:
    """Writes a table that comes in parts as Parquet, one row group per part, with its origin in the metadata."""
    import pyarrow.parquet as pq

    metadata = parquet_metadata_of(origin)
    with atomic(output) as temporary, temporary.open("wb") as file:  # an open stream: see parquet.py
        tables = map(for_parquet, parts())
        first = next(tables)
        schema = first.schema.with_metadata(metadata)
        # Vectors are nearly random: a dictionary only costs space, and they hardly compress.
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["error"]) as writer:
            writer.write_table(first.replace_schema_metadata(metadata))
            for table in tables:
                writer.write_table(table.replace_schema_metadata(metadata))


def _write_npy(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    shape = (rows, int(origin["embed_dim"]))
    write_npy(output, parts, origin, "embedding", vectors_of, shape, np.dtype(np.float32))


def write_npy(
    output: Path,
    parts: Callable[[], Iterator[pa.Table]],
    origin: Mapping[str, Any],
    column: str,
    values: Callable[[pa.Table], NDArray[Any]],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> None:
    """Writes a table that comes in parts as ``.npy``, with its other columns and its origin in files beside it.

    Args:
        output: the array.
        parts: returns all parts from the first one, each time it is called.
        origin: as ``origin.origin_of``.
        column: the column that goes into the array.
        values: returns that column of a part.
        shape: of the array.
        dtype: of the array.
    """
    with _with_origin(output, origin, ".paths.csv") as (array, paths):
        _write_npy_paths(paths, parts, column)
        write_array(array, map(values, parts()), shape, dtype)


def write_array(
    file: Path, parts: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Writes an array that comes in parts of its first axis as ``.npy``.

    Not by mapping it into memory: on a full disk the kernel would then kill the process.
    """
    from numpy.lib.format import dtype_to_descr, write_array_header_1_0

    header = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with file.open("wb") as stream:
        write_array_header_1_0(stream, header)
        for part in parts:
            stream.write(np.ascontiguousarray(part, dtype).data)


def _write_npy_paths(file: Path, parts: Callable[[], Iterator[pa.Table]], without: str) -> None:
    """Writes the table's columns except one as CSV."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        write = csv.writer(stream).writerow
        for number, table in enumerate(parts()):
            rows_only = table.drop_columns(without)
            if not number:
                write(rows_only.column_names)
            for row in rows_only.to_pylist():
                write(row.values())


def _write_csv(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    dim = int(origin["embed_dim"])
    with _with_origin(output, origin) as (file,), file.open("w", newline="", encoding="utf-8") as stream:
        cells = io.StringIO()
        write = csv.writer(cells, lineterminator="").writerow
        for number, table in enumerate(parts()):
            rows_only = table.drop_columns("embedding")
            if not number:
                write([*rows_only.column_names, *(f"e{i}" for i in range(dim))])
                stream.write(cells.getvalue() + "\r\n")
            for row, numbers in zip(rows_only.to_pylist(), numbers_as_text(vectors_of(table)), strict=True):
                cells.seek(0)
                cells.truncate()
                write(row.values())
                failed = row["error"] is not None
                stream.write(f"{cells.getvalue()},{',' * (dim - 1) if failed else numbers}\r\n")


def _write_jsonl(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    with _with_origin(output, origin) as (file,), file.open("w", newline="\n", encoding="utf-8") as stream:
        for table in parts():
            rows_only = table.drop_columns("embedding").to_pylist()
            for row, numbers in zip(rows_only, numbers_as_text(vectors_of(table)), strict=True):
                path = json.dumps(row.pop("path"), ensure_ascii=False)
                vector = "null" if row["error"] is not None else f"[{numbers}]"
                others = json.dumps(row, ensure_ascii=False).removeprefix("{")
                stream.write(f'{{"path": {path}, "embedding": {vector}, {others}\n')


def numbers_as_text(vectors: NDArray[np.float32]) -> list[str]:
    """Each row of (N, D) as numbers between commas, valid in CSV and in JSON as Python reads it: the shortest texts
    that are read back as the same float32."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count, dim = vectors.shape
    flat = np.ascontiguousarray(vectors, np.float32)
    numbers = pa.Array.from_buffers(pa.float32(), count * dim, [None, pa.py_buffer(flat)]).cast(pa.string())
    ends = pa.py_buffer((dim * np.arange(count + 1)).astype(np.int32))
    rows = pa.Array.from_buffers(pa.list_(pa.string()), count, [None, ends], children=[numbers])
    texts: list[str] = pc.binary_join(rows, ",").to_pylist()
    # Arrow writes -0.0 as -0, which JSON reads as the whole number 0, and infinity and NaN as JSON does not know them.
    special = ~np.isfinite(flat) | ((flat == 0) & np.signbit(flat))
    for row in np.flatnonzero(special.any(axis=1)):
        texts[row] = ",".join(json.dumps(float(str(number))) for number in flat[row])
    return texts


def _write_lance(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    write_lance(output, parts, metadata_of(origin))


WRITERS = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    LANCE_SUFFIX: _write_lance,
}
