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
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import DinokitError, UsageError
from dinokit.sources.names import text_of
from dinokit.tables.arrow import int_column, text_column, tokens_column, vector_column
from dinokit.tables.formats import SUFFIXES, check_suffix
from dinokit.tables.lance import LANCE_SUFFIX, is_lance
from dinokit.tables.origin import read_origin
from dinokit.tables.readers import READERS, TableColumns
from dinokit.tables.writers import WRITERS

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["EmbeddingTable", "read_embeddings", "table_of", "write_embeddings"]


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
        vectors = READERS[suffix](path, columns)
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
