"""Readers of tables of embeddings in each format. They also take tables that other programs wrote for dinokit.

``embeddings.py`` describes the formats; ``writers.py`` writes them.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.files.npy_files import load_npy
from dinokit.sources.labels import class_names, declared_features, label_text
from dinokit.tables.arrow import vectors_of
from dinokit.tables.formats import beside
from dinokit.tables.lance import LANCE_SUFFIX, read_lance
from dinokit.tables.origin import read_origin
from dinokit.tables.parquet import parquet_file, vectors_in

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["READERS", "TableColumns", "add_columns", "read_npy_paths"]

_COLUMNS = ("path", "width", "height", "error", "label")


class TableColumns:
    """What the readers of tables collect, row by row.

    Tables that other programs wrote for dinokit may lack all columns but ``path`` and hold other types of values:
    pandas turns whole numbers into floats if some are missing.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes: list[tuple[int, int] | None] = []
        self.errors: list[str | None] = []
        self.labels: list[str | None] = []

    def add(self, row: Mapping[str, Any], classes: Sequence[str] | None = None) -> None:
        """Adds the columns of one row. ``classes``: names for the numbers in the column ``label``."""
        path, error = row["path"], row.get("error")
        if not isinstance(path, str):
            path = os.fsdecode(path) if isinstance(path, bytes) else "" if path is None else str(path)
        width, height = _pixels(row.get("width")), _pixels(row.get("height"))
        self.paths.append(path)
        self.sizes.append((width, height) if width and height else None)
        self.errors.append(error if error and isinstance(error, str) else None)
        self.labels.append(label_text(row.get("label"), classes))


def _pixels(value: Any) -> int:
    """A width or a height; 0 if there is none."""
    number = float(value or 0)
    return int(number) if math.isfinite(number) else 0


def _read_parquet(path: Path, columns: TableColumns) -> NDArray[np.float32]:
    with parquet_file(path) as file:
        add_columns(file, columns)
        return vectors_in(file)


def add_columns(file: pq.ParquetFile, columns: TableColumns) -> None:
    """Adds all columns of a Parquet table except the vectors."""
    names = [name for name in _COLUMNS if name in file.schema_arrow.names]
    _add_rows(file.read(names, use_threads=False), columns)


def _add_rows(table: pa.Table, columns: TableColumns) -> None:
    names = table.column_names
    classes = class_names(declared_features(table.schema), "label")
    for values in zip(*(table.column(name).to_pylist() for name in names), strict=True):
        columns.add(dict(zip(names, values, strict=True)), classes)


def _read_npy(path: Path, columns: TableColumns) -> NDArray[np.float32]:
    vectors: NDArray[Any] = load_npy(path)
    read_npy_paths(path, columns)
    if vectors.dtype.kind not in "fiu":
        raise ValueError(f"its numbers are {vectors.dtype}; expected floats")
    if vectors.ndim != 2 or len(columns.paths) != len(vectors):
        raise ValueError(f"an array of shape {vectors.shape} beside {len(columns.paths)} paths")
    return vectors.astype(np.float32, copy=False)


def read_npy_paths(path: Path, columns: TableColumns) -> None:
    """Reads the file beside an array (``writers.write_npy``)."""
    with beside(path, ".paths.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream, strict=True):
            columns.add(row)


def _read_csv(path: Path, columns: TableColumns) -> NDArray[np.float32]:
    with path.open(
        newline="", encoding="utf-8-sig"
    ) as stream:  # -sig: Excel starts files with a byte order mark
        rows = csv.reader(stream, strict=True)
        header = next(rows)
        if "e0" not in header or "path" not in header:
            raise ValueError(
                f"its first line is {','.join(header)[:100]!r}; expected the columns path and e0, e1, …, separated by "
                "commas"
            )
        # Other programs add columns anywhere and sort columns by name.
        places = {name: place for place, name in enumerate(header)}
        dim = sum(re.fullmatch(r"e\d+", name) is not None for name in places)
        missing = [f"e{number}" for number in range(dim) if f"e{number}" not in places]
        if missing:
            raise ValueError(f"it has {dim} columns of numbers, but not {missing[0]}")
        numbers = [places[f"e{number}"] for number in range(dim)]
        others = {name: places[name] for name in _COLUMNS if name in places}
        vectors = []
        for row in rows:
            if not row:  # an empty line
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"line {rows.line_num} has {len(row)} values, and the first line {len(header)} columns"
                )
            columns.add({name: row[place] for name, place in others.items()})
            vectors.append(np.array([row[place] or "nan" for place in numbers], np.float32))
    return np.stack(vectors) if vectors else np.empty((0, dim), np.float32)


def _read_jsonl(path: Path, columns: TableColumns) -> NDArray[np.float32]:
    vectors: list[NDArray[np.float32] | None] = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if not line.strip():
                continue
            row = json.loads(line)
            columns.add(row)
            vectors.append(None if row["embedding"] is None else np.array(row["embedding"], np.float32))
    dim = next((len(v) for v in vectors if v is not None), int(read_origin(path).get("embed_dim", 0)))
    missing = np.full(dim, np.nan, np.float32)
    stacked = [missing if v is None else v for v in vectors]
    return np.stack(stacked) if stacked else np.empty((0, dim), np.float32)


def _read_lance(path: Path, columns: TableColumns) -> NDArray[np.float32]:
    table = read_lance(path)
    _add_rows(table.select([name for name in _COLUMNS if name in table.column_names]), columns)
    return vectors_of(table)


READERS = {
    ".parquet": _read_parquet,
    ".npy": _read_npy,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    LANCE_SUFFIX: _read_lance,
}
