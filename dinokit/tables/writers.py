"""Writers of tables of embeddings in each format. Tables come in parts, one in memory at a time.

``embeddings.py`` describes the formats and reads them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.files.outputs import atomic, atomic_together
from dinokit.tables.arrow import vectors_of
from dinokit.tables.lance import LANCE_SUFFIX, write_lance
from dinokit.tables.parquet import for_parquet

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "FILE_SUFFIXES",
    "KEY",
    "SUFFIXES",
    "WITH_ORIGIN",
    "WRITERS",
    "beside",
    "write_array",
    "write_npy",
    "write_parquet",
]

KEY = "dinokit."
"""Prefix of every key of the origin in the metadata of Parquet and Lance."""
WITH_ORIGIN = (".parquet", LANCE_SUFFIX)
"""Formats that contain their origin; for the others, it is in a file beside the table."""


def beside(output: Path, ending: str) -> Path:
    """The name of a file that belongs to a table."""
    return output.with_name(output.name + ending)


@contextmanager
def _with_origin(output: Path, origin: Mapping[str, Any], *endings: str) -> Iterator[list[Path]]:
    """Temporary names for a table and the files beside it (``endings``). They take their names together, with the
    origin last: an origin beside other vectors than its own would pass them off as the result of this run."""
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

    metadata = _metadata_of(origin)
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
        origin: as ``embeddings.origin_of``.
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
        write = csv.writer(stream).writerow
        for number, table in enumerate(parts()):
            rows_only = table.drop_columns("embedding")
            if not number:
                write([*rows_only.column_names, *(f"e{i}" for i in range(dim))])
            for row, vector in zip(rows_only.to_pylist(), vectors_of(table), strict=True):
                # str of a numpy float32 is the shortest text that reads back as the same float32.
                numbers = [""] * dim if row["error"] is not None else map(str, vector)
                write([*row.values(), *numbers])


def _write_jsonl(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    with _with_origin(output, origin) as (file,), file.open("w", newline="\n", encoding="utf-8") as stream:
        for table in parts():
            for row, vector in zip(
                table.drop_columns("embedding").to_pylist(), vectors_of(table), strict=True
            ):
                numbers = None if row["error"] is not None else [float(str(v)) for v in vector]
                line = {"path": row["path"], "embedding": numbers, **row}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_lance(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    write_lance(output, parts, _metadata_of(origin))


WRITERS = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    LANCE_SUFFIX: _write_lance,
}
SUFFIXES = tuple(WRITERS)
FILE_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != LANCE_SUFFIX)
"""Suffixes of formats that are single files and need no further package."""


def _metadata_of(origin: Mapping[str, Any]) -> dict[str, str]:
    return {KEY + key: _to_metadata(value) for key, value in origin.items() if value is not None}


def _to_metadata(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
