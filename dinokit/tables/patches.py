"""Tables of patch tokens: what ``dinokit embed --what patches`` writes, and :func:`read_patches` reads.

One row per picture, as in ``embeddings.py``, with the tokens of its (h, w) grid of patches, D numbers each:

=============  ====================================================================================
``.parquet``   a column ``patches`` instead of ``embedding``: h·w lists of D numbers, row by row of the grid from
               the upper left corner; null if the picture failed
``.npy``       (N, h, w, D), failed rows NaN, for ``np.load(…, mmap_mode="r")``; the other columns beside it in
               ``NAME.npy.paths.csv``
=============  ====================================================================================

The origin holds ``grid`` [h, w] and ``embed_dim`` D. Numbers are float16 by default: half the bytes, rounded to
11 bits; float32 keeps them as they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import DinokitError, UsageError
from dinokit.files.npy_files import load_npy
from dinokit.tables.arrow import rows_of
from dinokit.tables.parquet import RowGroups, parquet_file, shape_of_rows
from dinokit.tables.writers import write_npy, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

    from dinokit.features.backbone import Backbone

__all__ = [
    "DTYPES",
    "PATCHES",
    "PATCH_SUFFIXES",
    "PatchTable",
    "check_dtype",
    "check_patch_output",
    "read_patches",
    "rows_of_a_shard",
    "tokens_shape",
    "to_dtype",
    "write_patches",
]

PATCHES = "patches"
"""The ``what`` of these tables, and their column."""
DTYPES = ("float16", "float32")
PATCH_SUFFIXES = (".parquet", ".npy")
_SHARD_BYTES = 64 * 2**20


def check_dtype(dtype: str) -> str:
    """``dtype`` itself. Raises UsageError when it is not one of ``DTYPES``."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is not known; expected one of {', '.join(DTYPES)}")
    return dtype


def check_patch_output(output: str | os.PathLike[str]) -> None:
    """Raises UsageError unless patch tokens can be written to a file with this suffix."""
    if Path(output).suffix.lower() not in PATCH_SUFFIXES:
        raise UsageError(
            f"{output}: patch tokens are thousands of numbers per picture, so they are only written as "
            f"{' or '.join(PATCH_SUFFIXES)}; for instance {Path(output).with_suffix('.npy')}"
        )


def tokens_shape(backbone: Backbone) -> tuple[int, int]:
    """(h·w, D): the shape of a picture's tokens in a table."""
    height, width, dim = backbone.patch_shape
    return height * width, dim


def rows_of_a_shard(backbone: Backbone, dtype: str) -> int:
    """Number of pictures whose tokens are held at a time: 64 MB of tokens, at most 256 pictures."""
    return max(1, min(256, _SHARD_BYTES // (math.prod(tokens_shape(backbone)) * np.dtype(dtype).itemsize)))


def to_dtype(tokens: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Converts tokens to another precision.

    Raises:
        DinokitError: a number is too large for it.
    """
    with np.errstate(over="ignore"):
        made: NDArray[Any] = tokens.astype(dtype)
    if dtype == np.float16 and not np.isfinite(made).all() and np.isfinite(tokens).all():
        raise DinokitError(
            f"a token contains the number {float(np.abs(tokens).max()):.0f}, and float16 ends at 65504; use "
            "--dtype float32 (dtype='float32')"
        )
    return made


# -- writing


def write_patches(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    """As ``embeddings.write_embeddings``, for parts with a column ``patches``."""
    check_patch_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".parquet":
        write_parquet(output, parts, origin)
        return
    shape = (rows, *origin["grid"], origin["embed_dim"])
    write_npy(output, parts, origin, PATCHES, tokens_of, shape, np.dtype(origin["dtype"]))


def tokens_of(table: pa.Table) -> NDArray[Any]:
    """(N, h·w, D) of a table's column ``patches``, float16 or float32; null rows are NaN."""
    return rows_of(table, PATCHES)


# -- reading


class PatchTable:
    """A table of patch tokens on disk; opened by :func:`read_patches`.

    ``table[i]`` are the tokens of one picture, (h, w, D); ``table[a:b]`` those of several, (b - a, h, w, D), float16 or
    float32 as written, NaN for a picture that could not be read; ``table[rows]`` those of a list or array of numbers,
    such as a search returns, or of a mask. Nothing else is loaded into memory. Reading pictures in order is fastest.
    """

    paths: list[str]
    """The N names, as in a table of embeddings."""
    sizes: list[tuple[int, int] | None]
    """(width, height) of each upright picture, None if it could not be read."""
    errors: list[str | None]
    """Why a picture could not be read, None if it was read."""
    labels: list[str | None] | None
    """The pictures' labels from their sources; None as a whole if there are no labels."""
    origin: dict[str, Any]
    """Which model made it and how, as in a table of embeddings, with ``grid`` and ``dtype``."""

    def __init__(self, path: Path) -> None:
        from dinokit.tables.origin import read_origin
        from dinokit.tables.readers import TableColumns, read_npy_paths

        self.origin = read_origin(path)
        if self.origin.get("what") != PATCHES:
            raise UsageError(
                f"{path} holds {self.origin.get('what', 'vectors')}, not patch tokens; expected a table written by "
                "dinokit embed --what patches (read others with read_embeddings)"
            )
        columns = TableColumns()
        self._rows: _ParquetTokens | _NpyTokens
        if path.suffix.lower() == ".npy":
            read_npy_paths(path, columns)
            self._rows = _NpyTokens(path)
        else:
            self._rows = _ParquetTokens(path, columns)
        self.paths, self.sizes, self.errors = columns.paths, columns.sizes, columns.errors
        self.labels = columns.labels if any(columns.labels) else None
        height, width = self.origin["grid"]
        self._shape = (len(self.paths), int(height), int(width), int(self.origin["embed_dim"]))
        if self._rows.count != len(self.paths) or self._rows.numbers != math.prod(self._shape[1:]):
            raise ValueError(
                f"{self._rows.count} rows of {self._rows.numbers} numbers, expected {self._shape}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, h, w, D)."""
        return self._shape

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): rows and columns of patches."""
        return self._shape[1:3]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the tokens."""
        kind: np.dtype[Any] = np.dtype(self.origin["dtype"])
        return kind

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: int | slice | list[int] | NDArray[Any]) -> NDArray[Any]:
        if isinstance(index, list):
            index = np.array(index, np.intp if not index else None)
        if isinstance(index, slice | np.ndarray):
            numbers = np.arange(len(self))[index].tolist()
            out = np.empty((len(numbers), *self._shape[1:]), self.dtype)
            for place, number in enumerate(numbers):
                out[place] = self._rows.read(number).reshape(self._shape[1:])
            return out
        number = range(len(self))[index]  # negative and invalid numbers as for a list
        return self._rows.read(number).reshape(self._shape[1:]).copy()

    def batches(self, size: int = 64) -> Iterator[NDArray[Any]]:
        """The tokens of all pictures in order, (B, h, w, D) with B = ``size``; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def __repr__(self) -> str:
        n, h, w, d = self.shape
        return f"<PatchTable {n} pictures of {h}x{w} patches, {d} numbers each, {self.dtype}>"


def read_patches(path: str | os.PathLike[str]) -> PatchTable:
    """Opens a table of patch tokens written by ``dinokit embed --what patches``.

    Args:
        path: a ``.parquet`` or ``.npy`` file.

    Raises:
        UsageError: another suffix, no such file, or a table of vectors.
        DinokitError: the file is damaged.
    """
    path = Path(path)
    check_patch_output(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected a table written by dinokit embed --what patches")
    try:
        return PatchTable(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise DinokitError(f"{path} is not a table of patch tokens, or it is damaged ({error})") from error


class _NpyTokens:
    def __init__(self, path: Path) -> None:
        self._array: NDArray[Any] = load_npy(path, mmap_mode="r")
        self.count, self.numbers = len(self._array), math.prod(self._array.shape[1:])

    def read(self, number: int) -> NDArray[Any]:
        tokens: NDArray[Any] = self._array[number]
        return tokens


class _ParquetTokens:
    def __init__(self, path: Path, columns: Any) -> None:
        from dinokit.tables.readers import add_columns

        with parquet_file(path) as file:
            add_columns(file, columns)
            self.numbers = math.prod(shape_of_rows(file.schema_arrow.field(PATCHES)) or ())
        self._groups = RowGroups([path], [PATCHES], tokens_of)
        self.count = len(self._groups)

    def read(self, number: int) -> NDArray[Any]:
        group, place = self._groups.at(number)
        tokens: NDArray[Any] = group[place]
        return tokens
