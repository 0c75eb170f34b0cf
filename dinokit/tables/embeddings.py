"""The embeddings table: its columns, its origin, and the file formats it is written in and read from.

Always one row per input, in input order: ``path``, ``embedding`` (D float32), ``width``, ``height`` (of the upright
picture), ``error`` (null if the picture was read; a picture that cannot be read keeps its row, with a null embedding).
If a source carries labels, there is a column ``label`` as well.

=============  ====================================================================================
``.parquet``   the table; its origin is in the schema's metadata, under keys that start with ``dinokit.``
               (``parquet.py`` describes how vectors are stored)
``.npy``       (N, D) float32, failed rows NaN; the other columns beside it in ``NAME.npy.paths.csv``
``.csv``       path, width, height, error, (label,) e0 … e(D-1); failed rows have empty numbers
``.jsonl``     one object per line with the columns
``.lance``     a Lance dataset, which is a folder (``lance.py``; extra ``[lance]``)
=============  ====================================================================================

The origin of ``.npy``, ``.csv`` and ``.jsonl`` is in a file beside them, ``NAME.SUFFIX.origin.json``. Numbers are
written with as many digits as float32 needs to be read back bit for bit.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit._version import __version__
from dinokit.errors import DinokitError, UsageError
from dinokit.features.pooling import check_what, vector_length
from dinokit.files.json_files import read_json
from dinokit.files.npy_files import load_npy
from dinokit.sources.labels import class_names, declared_features, label_text
from dinokit.sources.names import text_of
from dinokit.tables.arrow import int_column, text_column, tokens_column, vector_column, vectors_of
from dinokit.tables.lance import (
    LANCE_SUFFIX,
    check_lance_output,
    is_lance,
    must_have_lance,
    read_lance,
    read_lance_metadata,
)
from dinokit.tables.parquet import parquet_file, vectors_in
from dinokit.tables.writers import (
    FILE_SUFFIXES,
    KEY,
    PANDAS_ATTRS,
    SUFFIXES,
    WITH_ORIGIN,
    WRITERS,
    beside,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dinokit.features.backbone import Backbone

__all__ = [
    "FILE_SUFFIXES",
    "SUFFIXES",
    "EmbeddingTable",
    "TableColumns",
    "add_columns",
    "check_output",
    "check_suffix",
    "differing_space",
    "files_of",
    "origin_of",
    "read_embeddings",
    "read_npy_paths",
    "read_origin",
    "table_of",
    "write_embeddings",
]


# Vectors that differ in one of these are in different spaces. A table that does not record what its vectors are was
# written when there was only the CLS token.
_SAME_SPACE = {"weights_sha256": None, "preprocessing": None, "what": "cls"}


def differing_space(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two origins differ so that their vectors must not be compared; empty if they may be.

    ``normalize`` does not count, since similarity is the cosine. Nor does ``reduced_decoding``, which changes a vector
    far less than another picture does.
    """
    return [key for key, default in _SAME_SPACE.items() if one.get(key, default) != other.get(key, default)]


def origin_of(backbone: Backbone, *, what: str = "cls", normalize: bool = False) -> dict[str, Any]:
    """Where vectors of this backbone come from, as plain JSON values.

    :func:`differing_space` decides by them whether two tables may be compared.

    Args:
        backbone: the model.
        what: which vectors, as for ``Backbone.embed``.
        normalize: whether they are L2-normalised.
    """
    return {
        "model": backbone.name,
        "source": backbone.source,
        "revision": backbone.revision,
        "weights_sha256": backbone.weights_sha256,
        "preprocessing": backbone.preprocessing.to_json(),
        "what": check_what(what),
        "normalize": normalize,
        "reduced_decoding": backbone.reduced_decoding,
        "embed_dim": vector_length(what, backbone.embed_dim),
        "engine": backbone.engine,
        "precision": backbone.precision,
        "dinokit_version": __version__,
    }


def check_suffix(output: str | os.PathLike[str]) -> str:
    """The suffix of an output's name.

    Raises:
        UsageError: it is not a suffix that dinokit writes.
        MissingExtraError: it needs a package that is not installed.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in SUFFIXES:
        near = difflib.get_close_matches(suffix, SUFFIXES, n=1, cutoff=0.6)
        problem = f"the suffix {suffix!r} is not known" if suffix else "a table's name ends in its format"
        raise UsageError(
            f"{os.fspath(output) or 'an empty name'}: {problem}; expected one of "
            + ", ".join(SUFFIXES)
            + (f". Did you mean {Path(output).with_suffix(near[0])}?" if near else "")
        )
    if suffix == LANCE_SUFFIX:
        must_have_lance()  # here, not after an hour of embedding
    return suffix


def check_output(output: str | os.PathLike[str]) -> None:
    """Raises UsageError unless a table can be written under this name: the suffix is known (:func:`check_suffix`), and
    no folder has the name; for Lance, nothing but a dataset has it."""
    if check_suffix(output) == LANCE_SUFFIX:
        check_lance_output(Path(output))
    elif Path(output).is_dir():
        raise UsageError(
            f"{os.fspath(output)} is a folder; expected the name of a table, which is a file. Choose another name, or "
            "remove the folder"
        )


def files_of(output: Path) -> list[Path]:
    """All files of a table named ``output``, itself first."""
    suffix = check_suffix(output)
    files = [output]
    if suffix not in WITH_ORIGIN:
        files.append(beside(output, ".origin.json"))
    if suffix == ".npy":
        files.append(beside(output, ".paths.csv"))
    return files


# -- the table


def table_of(
    paths: Sequence[object],
    embeddings: NDArray[Any],
    sizes: Sequence[tuple[int, int] | None],
    errors: Sequence[str | None],
    labels: Sequence[str | None] | None = None,
) -> pa.Table:
    """Rows as an Arrow table.

    Args:
        paths: as the user gave or the search found them; their text is written.
        embeddings: (N, D) float32, or (N, h·w, D) patch tokens, which become the column ``patches``; rows of
            failed pictures are ignored.
        sizes: (width, height) of each picture, None if it failed.
        errors: why a picture failed, None if it did not.
        labels: of the pictures, from their sources; without them there is no such column.
    """
    import pyarrow as pa

    assert len(embeddings) == len(paths) == len(sizes) == len(errors)
    failed = [error is not None for error in errors]
    name = "embedding" if embeddings.ndim == 2 else "patches"
    columns = {
        "path": text_column([text_of(path) for path in paths]),
        name: (vector_column if embeddings.ndim == 2 else tokens_column)(embeddings, failed),
        "width": int_column([size and size[0] for size in sizes]),
        "height": int_column([size and size[1] for size in sizes]),
        "error": text_column(errors),
    }
    if labels is not None:
        columns["label"] = text_column(labels)
    return pa.table(columns)


# -- writing


def write_embeddings(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    """Writes a table that comes in parts, one in memory at a time. Its files are replaced whole or not at all.

    Args:
        output: its suffix sets the format.
        parts: returns all parts from the first one, each time it is called.
        rows: of all parts together, at least one.
        origin: as :func:`origin_of`.
    """
    write = WRITERS[check_suffix(output)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output, parts, rows, origin)


# -- reading


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """A table of embeddings in memory, N rows in the order of the pictures it was made from.

    It can be unpacked: ``vectors, paths, origin = read_embeddings(…)``.
    """

    embeddings: NDArray[np.float32]
    """(N, D) float32; rows of pictures that could not be read are NaN."""
    paths: list[str]
    """The N names, as they were given or found: a path, ``ARCHIVE::MEMBER``, ``TABLE::ROW``, an address."""
    sizes: list[tuple[int, int] | None]
    """(width, height) of each upright picture in pixels, None if it could not be read."""
    errors: list[str | None]
    """Why a picture could not be read, None if it was read."""
    origin: dict[str, Any]
    """Which model made it, and how (``model``, ``weights_sha256``, ``preprocessing``, ``what``, ``normalize`` …);
    ``{}`` if the file does not record it."""
    labels: list[str | None] | None = None
    """The pictures' labels from their sources, None for one without; None as a whole if there are no labels."""

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        failed = sum(error is not None for error in self.errors)
        made = f" by {self.origin['model']}" if self.origin.get("model") else ""
        return (
            f"<EmbeddingTable {len(self)} rows of {self.embeddings.shape[-1]} numbers{made}, {failed} failed>"
        )

    def __iter__(self) -> Iterator[Any]:
        return iter((self.embeddings, self.paths, self.origin))


def read_embeddings(path: str | os.PathLike[str]) -> EmbeddingTable:
    """Reads a table of any format that dinokit writes.

    Raises:
        UsageError: an unknown suffix, or no such file.
        DinokitError: the file is not a table of embeddings.
    """
    path = Path(path)
    _must_not_be_a_folder(path)
    suffix = check_suffix(path)
    if not (is_lance(path) if suffix == LANCE_SUFFIX else path.is_file()):
        raise UsageError(f"{path}: no such file; expected a table written by dinokit embed")
    origin = read_origin(path)
    if origin.get("what") == "patches":
        raise UsageError(
            f"{path} holds patch tokens, several vectors per picture; read it with read_patches, or embed with another "
            "--what for a table of one vector per picture"
        )
    columns = TableColumns()
    try:
        vectors = _READERS[suffix](path, columns)
        if len(columns.paths) != len(vectors):  # a Parquet file without that column
            raise ValueError(
                f"{len(vectors)} vectors and {len(columns.paths)} paths; expected a column 'path'"
            )
        if vectors.ndim != 2 or (len(vectors) and not vectors.shape[1]):
            raise ValueError(
                f"its vectors have the shape {vectors.shape}; expected (rows, numbers), with a number or more"
            )
    except _UNREADABLE as error:
        raise DinokitError(
            f"{path} is not a table of embeddings, or it is damaged ({_why(error)})"
        ) from error
    labels = columns.labels if any(columns.labels) else None
    return EmbeddingTable(vectors, columns.paths, columns.sizes, columns.errors, origin, labels)


def _must_not_be_a_folder(path: Path) -> None:
    if path.is_dir() and path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path} is a folder; expected a table. Make one from its pictures with: dinokit embed {path} -o "
            "embeddings.parquet"
        )


# Values of an origin that are not text; Parquet and Lance store all as text.
_NOT_TEXT = frozenset(
    ("preprocessing", "normalize", "reduced_decoding", "embed_dim", "rows", "failed", "began", "grid")
)

_KINDS: dict[str, type | tuple[type, ...]] = {
    "what": str,
    "preprocessing": dict,
    "embed_dim": int,
    "rows": int,
    "failed": int,
    "began": (int, float),
    "grid": list,
    "dtype": str,
}
"""Types of the values that are computed with; the others are only shown."""


def read_origin(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The origin of a table (see :func:`origin_of`) without reading its rows; ``{}`` if it has none or it is
    damaged."""
    path = Path(path)
    suffix = check_suffix(path)
    try:
        inside = suffix in WITH_ORIGIN
        origin = _origin_inside(path, suffix) if inside else read_json(beside(path, ".origin.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(origin, dict) or not all(
        isinstance(origin[key], kind) for key, kind in _KINDS.items() if key in origin
    ):
        return {}
    return origin


def _origin_inside(path: Path, suffix: str) -> dict[str, Any]:
    texts = read_lance_metadata(path) if suffix == LANCE_SUFFIX else _parquet_metadata(path)
    origin: dict[str, Any] = {
        key.removeprefix(KEY): value for key, value in texts.items() if key.startswith(KEY)
    }
    for key in origin.keys() & _NOT_TEXT:
        origin[key] = json.loads(origin[key])
    if not origin and PANDAS_ATTRS in texts:  # pandas has written the table again
        attrs = json.loads(texts[PANDAS_ATTRS])
        kept = attrs.get("dinokit") if isinstance(attrs, dict) else None
        origin = kept if isinstance(kept, dict) else {}
    if origin:
        origin.setdefault("revision", None)
    return origin


def _parquet_metadata(path: Path) -> dict[str, str]:
    with parquet_file(path) as file:
        metadata = file.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    RecursionError,
    StopIteration,
    csv.Error,
)
"""Errors that foreign and damaged files cause; ArrowInvalid is a ValueError."""


def _why(error: Exception) -> str:
    if isinstance(error, StopIteration):
        return "it is empty"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is missing"
    if isinstance(error, KeyError):
        return str(error.args[0]) if "column" in str(error) or "Field" in str(error) else f"it has no {error}"
    return str(error)


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


_READERS = {
    ".parquet": _read_parquet,
    ".npy": _read_npy,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    LANCE_SUFFIX: _read_lance,
}
