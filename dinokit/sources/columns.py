"""Pictures in Parquet files: encoded, as stored by Hugging Face, or as paths."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dinokit.errors import ImageError, UsageError
from dinokit.sources.addresses import address_of
from dinokit.sources.labels import (
    Labels,
    declared_features,
    holds_text,
    label_column,
    label_text,
    named_like,
    type_of,
)
from dinokit.sources.names import is_address
from dinokit.sources.pictures import MOST_BYTES, Item, Part, Picture, within_limit
from dinokit.sources.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = [
    "PATH_COLUMNS",
    "Rows",
    "no_pictures",
    "parquet_of",
    "path_column",
    "picture_beside",
    "picture_column",
]

PATH_COLUMNS = ("path", "file", "image", "file_name", "filename", "file_path", "filepath", "url", "image_url")
"""Names of columns with paths or addresses of pictures in order of preference, case-insensitive."""
_IMAGE_COLUMNS = ("image", "img", "picture")
_ROWS_AT_ONCE = 16


def parquet_of(
    storage: Storage, *, pictures_only: bool = False
) -> tuple[Part | None, list[str], list[str | None] | None]:
    """The pictures of a Parquet file, named ``FILE::ROW`` with rows counted from 0, or else its column of paths; with
    labels if it has a label column.

    Args:
        storage: the file.
        pictures_only: return an empty result, not paths or an error, if no column has encoded pictures.

    Raises:
        UsageError: it is not a Parquet file, or has neither pictures nor paths.
        OSError: it cannot be opened.
    """
    from pyarrow import ArrowException

    try:
        with storage.open() as stream, _open(stream) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
            features = declared_features(schema)
            column = picture_column(schema, features)
            if column is not None:
                found = label_column(schema, features)
                labels = Labels(*found, functools.partial(_values, storage)) if found else None
                return Rows(storage, count, _Reader(storage, column), labels), [], None
            if pictures_only:
                return None, [], None
            column = path_column(schema.names)
            if column is None or not holds_text(type_of(schema, column)):
                raise UsageError(
                    f"{no_pictures(storage.name, schema)}, or one of {', '.join(PATH_COLUMNS)} with paths"
                )
            found = label_column(schema, features)
            of_labels, names = found if found and found[0] != column else (None, None)
            rows = [
                (str(row[column]), label_text(row[of_labels], names) if of_labels else None)
                for batch in file.iter_batches(
                    columns=[column, of_labels] if of_labels else [column], use_threads=False
                )
                for row in batch.to_pylist()
                if row[column]
            ]
            return None, [text for text, _ in rows], [label for _, label in rows] if of_labels else None
    except (ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{storage.name} cannot be read as a Parquet file ({error})") from error


def path_column(names: list[str]) -> str | None:
    """The first of ``PATH_COLUMNS`` among the names, as spelt there."""
    return next(iter(named_like(PATH_COLUMNS, names)), None)


def _open(stream: Any) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    # Without a buffer, a row group's whole column, often the whole file, is read at once.
    return pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)


def picture_column(schema: pa.Schema, features: dict[str, Any]) -> str | None:
    """The column of encoded pictures: the first declared in Hugging Face's metadata, or else by name."""
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    names = [*declared, *named_like(_IMAGE_COLUMNS, schema.names)]
    return next((name for name in names if _holds_pictures(type_of(schema, name))), None)


def no_pictures(name: str, schema: pa.Schema) -> str:
    """The message about a table without a :func:`picture_column`."""
    columns = ", ".join(f"{column} ({type_of(schema, column)})" for column in schema.names)
    return (
        f"{name} has no column of pictures; its columns are {columns}. Expected 'image' with encoded pictures (binary, "
        "or Hugging Face's struct of bytes and path)"
    )


def _holds_pictures(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _values(storage: Storage, column: str) -> Iterator[Any]:
    """The values of a column, in order."""
    from pyarrow import ArrowException

    try:
        with storage.open() as stream, _open(stream) as file:
            for batch in file.iter_batches(columns=[column], use_threads=False):
                yield from batch.column(0).to_pylist()
    except ArrowException as error:
        raise UsageError(f"{storage.name}: its column {column!r} cannot be read ({error})") from error


class RowReader(Protocol):
    """Random access to a column of a table. Can be pickled; thread-safe."""

    def read(self, row: int, last: bool) -> Any:
        """The value of a row: bytes, a dict with ``bytes`` and ``path``, or None. ``last``: no further reads."""


class _Reader:
    """A column of a Parquet file, read forwards. For an earlier row it restarts at that row's group."""

    def __init__(self, storage: Storage, column: str) -> None:
        self._storage, self._column = storage, column
        self._lock = threading.Lock()
        self._stream: Any = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: list[Any] = []
        self._first = 0  # number of the first row of the batch

    def __reduce__(self) -> tuple[type[_Reader], tuple[Storage, str]]:
        return _Reader, (self._storage, self._column)

    def __del__(self) -> None:
        self._close()

    def read(self, row: int, last: bool) -> Any:
        """The value of a row: bytes, a dict with ``bytes`` and ``path``, or None."""
        with self._lock:
            try:
                if self._stream is None or row < self._first:
                    self._open_at(row)
                while row >= self._first + len(self._batch):
                    self._first += len(self._batch)
                    self._batch = next(self._batches).column(0).to_pylist()
                value = self._batch[row - self._first]
            except StopIteration:
                self._close()
                raise ImageError("the table has changed: it has fewer rows than before") from None
            except Exception as error:  # of Arrow, the disk or any file system behind fsspec
                self._close()
                raise ImageError(f"{self._storage.name} cannot be read ({error})") from error
            if last:  # so that a thousand tables are not a thousand open files
                self._close()
            return value

    def _open_at(self, row: int) -> None:
        self._close()
        self._stream = self._storage.open()
        file = _open(self._stream)
        group, self._first = 0, 0
        while group < file.num_row_groups:
            rows = file.metadata.row_group(group).num_rows
            if row < self._first + rows:
                break
            self._first += rows
            group += 1
        self._batches = file.iter_batches(
            _ROWS_AT_ONCE,
            row_groups=range(group, file.num_row_groups),
            columns=[self._column],
            use_threads=False,
        )

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._batches, self._batch = None, iter(()), []


@dataclass(frozen=True)
class _Row(Picture):
    in_order: ClassVar[bool] = True

    reader: RowReader
    storage: Storage
    row: int
    last: bool
    labels: Labels | None

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.storage.name}::{self.row}"

    @property
    def label(self) -> str | None:
        return self.labels.of(self.row) if self.labels else None

    def read(self) -> bytes:
        value = self.reader.read(self.row, self.last)
        if isinstance(value, dict):
            if value["bytes"] is None and value.get("path"):
                return _read_beside(self.storage, value["path"])
            value = value["bytes"]
        if value is None:
            raise ImageError("this row of the table has no picture (null)")
        return within_limit(bytes(value))

    def state(self) -> str:
        return f"{self.storage.state()} {self.row}"

    def changed_at(self) -> float | None:
        return self.storage.changed_at()


def picture_beside(table: str, path: str) -> str:
    """The location of a picture that a table only names by path, relative to the table.

    Raises:
        ImageError: a remote table names something outside its folder, such as a file on this machine.
    """
    if not is_address(table):
        return path if is_address(path) else str(Path(table).absolute().parent / path)
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if is_address(path) or PureWindowsPath(path).drive or not parts or parts[0] == "/" or ".." in parts:
        raise ImageError(
            f"the table names {path}, which is outside its folder; a table behind an address must not name such files"
        )
    return "/".join((table.rpartition("/")[0], *parts))


def _read_beside(storage: Storage, path: str) -> bytes:
    """Reads a picture that the table only names by path."""
    place = picture_beside(storage.name, path)
    if is_address(place):
        return address_of(place).read()
    try:
        with Path(place).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"the table has only a path, {path}, which cannot be read ({error})") from error
    return within_limit(data)


class Rows:
    """The pictures of a table by number.

    Args:
        storage: the file; a picture's name consists of its name and the row.
        count: how many rows it has.
        reader: reads its column of pictures.
        labels: its column of labels, if it has one.
    """

    def __init__(self, storage: Storage, count: int, reader: RowReader, labels: Labels | None = None) -> None:
        self._storage, self._count, self._reader, self._labels = storage, count, reader, labels

    @property
    def labelled(self) -> bool:
        """Whether its pictures have labels."""
        return self._labels is not None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Item:
        return _Row(self._reader, self._storage, index, index == self._count - 1, self._labels)
