"""Pictures in Arrow files, as ``datasets`` stores them: record batches, memory-mapped and never read whole."""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.errors import ImageError, UsageError
from dinokit.sources.columns import Rows, no_pictures, picture_column
from dinokit.sources.labels import Labels, declared_features, label_column
from dinokit.sources.pictures import Part
from dinokit.sources.storage import LocalFile, Storage

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["arrow_of"]


def arrow_of(storage: Storage, *, pictures_only: bool = False) -> Part | None:
    """The pictures of an Arrow file, named ``FILE::ROW`` with rows counted from 0.

    Both of Arrow's formats are read: the stream, which ``datasets`` writes, and the file.

    Args:
        storage: the file; on this machine, because the length of a stream is known only once it has been read.
        pictures_only: return None instead of an error if no column has encoded pictures.

    Raises:
        UsageError: it is not an Arrow file, has no pictures, or is behind an address.
        OSError: it cannot be opened.
    """
    from pyarrow import ArrowException

    if not isinstance(storage, LocalFile):
        raise UsageError(
            f"{storage.name}: Arrow files are read from this machine only; copy the dataset here first, for example "
            "with hf download --repo-type dataset, or name its Parquet files"
        )
    try:
        with _Mapped(storage.name) as file:
            schema, count = file.schema, len(file)
            _ = schema.names  # not UTF-8 if they are damaged
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # the system's, not one that Arrow raises for damage
            raise
        raise UsageError(f"{storage.name} cannot be read as an Arrow file ({error})") from error
    features = declared_features(schema, storage.name)
    column = picture_column(schema, features)
    if column is None:
        if pictures_only:
            return None
        raise UsageError(no_pictures(storage.name, schema))
    found = label_column(schema, features)
    labels = Labels(*found, functools.partial(_values, storage)) if found else None
    return Rows(storage, count, _Reader(storage, column), labels)


class _Mapped:
    """An open Arrow file: its batches by reference, so that only what is used is read into memory."""

    def __init__(self, name: str) -> None:
        import pyarrow as pa

        with Path(name).open("rb") as file:  # whose errors are the system's: "no such file"
            is_file = file.read(6) == b"ARROW1"
        self._map = pa.memory_map(name)
        try:
            if is_file:
                reader = pa.ipc.open_file(self._map)
                self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            else:
                reader = pa.ipc.open_stream(self._map)
                self.batches = list(reader)
        except Exception:
            self._map.close()
            raise
        self.schema: pa.Schema = reader.schema
        self._checked: dict[tuple[str, int], pa.Array] = {}
        self.ends = list(itertools.accumulate(batch.num_rows for batch in self.batches))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def value(self, column: str, row: int) -> Any:
        number = bisect.bisect_right(self.ends, row)
        if number == len(self.ends):
            raise ImageError("the table has changed: it has fewer rows than before")
        return self._column(column, number)[row - (self.ends[number - 1] if number else 0)].as_py()

    def values(self, column: str) -> Iterator[Any]:
        """Those of all rows, in order."""
        for number in range(len(self.batches)):
            yield from self._column(column, number).to_pylist()

    def _column(self, name: str, batch: int) -> pa.Array:
        """A column of a batch. Raises ArrowException if it is damaged."""
        if (name, batch) not in self._checked:
            # By number: of two columns with the same name the first.
            column = self.batches[batch].column(self.schema.names.index(name))
            # Arrow believes a file's offsets, and ends the process on wrong ones. The pictures themselves are not read.
            column.validate(full=True)
            self._checked[name, batch] = column
        return self._checked[name, batch]

    def __enter__(self) -> _Mapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches, self._checked = [], {}  # these refer to the map
        self._map.close()


class _Reader:
    """One column of an Arrow file, open from the first read to that of the last row."""

    def __init__(self, storage: LocalFile, column: str) -> None:
        self._storage, self._column = storage, column
        self._lock = threading.Lock()
        self._file: _Mapped | None = None

    def __reduce__(self) -> tuple[type[_Reader], tuple[LocalFile, str]]:
        return _Reader, (self._storage, self._column)

    def read(self, row: int, last: bool) -> Any:
        """The value of a row: bytes, a dict with ``bytes`` and ``path``, or None."""
        with self._lock:
            try:
                if self._file is None:
                    self._file = _Mapped(self._storage.name)
                value = self._file.value(self._column, row)
            except ImageError:
                raise
            except Exception as error:  # of Arrow or the disk
                raise ImageError(f"{self._storage.name} cannot be read ({error})") from error
            if last:  # so that a thousand tables are not a thousand open files
                self._file = None
            return value


def _values(storage: LocalFile, column: str) -> Iterator[Any]:
    from pyarrow import ArrowException

    try:
        with _Mapped(storage.name) as file:
            yield from file.values(column)
    except ArrowException as error:
        raise UsageError(f"{storage.name}: its column {column!r} cannot be read ({error})") from error
