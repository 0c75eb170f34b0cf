"""Local copies of sources that do not support efficient random access.

Training reads pictures in random order in every epoch. A remote archive would need a request per picture, and a row of
a Parquet file requires reading the rows around it. So a remote archive is copied once, and the pictures of a Parquet
file are written once as an Arrow file, which is memory-mapped and shared by all processes.

Others do the same: MosaicML's StreamingDataset, litdata and webdataset's ``cache_dir`` keep whole shards on disk, and
huggingface/datasets writes Parquet as Arrow files into its cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dinokit.errors import DinokitError, ImageError, UsageError
from dinokit.files.locks import held
from dinokit.sources.arrow_files import arrow_of
from dinokit.sources.columns import Rows, picture_beside, picture_column
from dinokit.sources.labels import declared_features
from dinokit.sources.names import is_address, is_archive
from dinokit.sources.pictures import Part, Picture
from dinokit.sources.storage import UNKNOWN, LocalFile, RemoteFile, Storage, retried

__all__ = ["CopiedFile", "cache_folder", "copy_of_archive", "rows_in_any_order"]

Tell = Callable[[str], None]

_BLOCK = 8 * 2**20
_ROWS_AT_ONCE = 16
_STALE_S = 3600
_BATCH_BYTES = 16 * 2**20


def cache_folder() -> Path:
    """The folder of the copies: ``DINOKIT_CACHE``, or the user's cache folder. It may be emptied whenever no
    training is running."""
    named = os.environ.get("DINOKIT_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dinokit" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dinokit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinokit"


@dataclass(frozen=True)
class CopiedFile:
    """A remote file, read from its local copy."""

    name: str
    copy: LocalFile
    origin: RemoteFile

    def open(self) -> IO[bytes]:
        """Raises OSError."""
        return self.copy.open()

    def read_range(self, start: int, size: int) -> bytes:
        """From the copy."""
        return self.copy.read_range(start, size)

    def state(self) -> str:
        """Of the original."""
        return self.origin.state()

    def changed_at(self) -> float | None:
        """Of the original."""
        return self.origin.changed_at()


def copy_of_archive(file: RemoteFile, tell: Tell | None = None) -> Storage:
    """The copy of an archive, made unless one of the same state exists; other files are not copied.

    Raises:
        UsageError: it cannot be read, or there is no room for it.
        MissingExtraError: its address needs a package that is not installed.
    """
    if not is_archive(file.name):
        return file
    size = file.size()

    def write(target: IO[bytes]) -> None:
        count = 0
        for block in _blocks(file):
            count += len(block)
            target.write(block)
        if size is not None and count != size:
            raise UsageError(f"{file.name} ended after {count:,} of {size:,} bytes; try again")

    path = _kept(file.name, file.name, file.state(), Path(file.name).suffix, size, write, tell)
    return CopiedFile(file.name, LocalFile(str(path)), file)


def rows_in_any_order(rows: Rows, tell: Tell | None = None) -> Part:
    """The same pictures of a Parquet file, read from its copy: names, states and labels are those of the original.

    Raises:
        UsageError: it cannot be read, or there is no room for the copy.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    first: Any = rows[0]
    storage: Storage = first.storage
    with _reading(storage.name), storage.open() as stream, pq.ParquetFile(stream) as file:
        schema = file.schema_arrow
        column = picture_column(schema, declared_features(schema))
        if column is None:  # it had one before
            raise UsageError(f"{storage.name} has changed: its column of pictures is gone; try again")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        size = sum(_bytes_of(group, column) for group in groups)

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    written_schema = pa.schema([("image", kind)])

    def write(target: IO[bytes]) -> None:
        with pa.ipc.new_file(target, written_schema) as writer:
            for batch in _encoded(storage, column):
                writer.write_batch(pa.record_batch([pa.array(batch, kind)], schema=written_schema))

    place = storage.name if is_address(storage.name) else str(Path(storage.name).absolute())
    path = _kept(storage.name, f"{place}#{column}", storage.state(), ".arrow", size, write, tell)
    return Rows(storage, len(rows), _CopiedRows(str(path)), first.labels)


class _CopiedRows:
    """The rows of a copy, memory-mapped on first use in each process."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._rows: Part | None = None

    def __reduce__(self) -> tuple[type[_CopiedRows], tuple[str]]:
        return _CopiedRows, (self._path,)

    def read(self, row: int, last: bool) -> bytes:
        """The encoded picture. Raises ImageError."""
        if self._rows is None:
            try:
                self._rows = arrow_of(LocalFile(self._path))
            except (OSError, UsageError) as error:
                raise ImageError(f"its copy in {cache_folder()} cannot be read ({error})") from error
        assert self._rows is not None  # else it has raised
        item = self._rows[row]
        assert isinstance(item, Picture)
        return item.read()


def _encoded(storage: Storage, column: str) -> Iterator[list[dict[str, Any]]]:
    """The values of a column of pictures in batches of some megabytes, with absolute paths."""
    import pyarrow.parquet as pq

    batch, size = [], 0
    with _reading(storage.name), storage.open() as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        for rows in file.iter_batches(_ROWS_AT_ONCE, columns=[column], use_threads=False):
            for value in rows.column(0).to_pylist():
                if not isinstance(value, dict):
                    value = {"bytes": value}
                data, path = value["bytes"], value.get("path")
                batch.append(
                    {"bytes": data, "path": _place(storage.name, path) if path and data is None else None}
                )
                size += len(data or b"")
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _place(table: str, path: str) -> str | None:
    """The location of a picture named by the table; None if it must not be read from there."""
    try:
        return picture_beside(table, path)
    except ImageError:
        return None


def _bytes_of(group: Any, column: str) -> int:
    """Compressed bytes of the pictures in a row group."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    return sum(
        chunk.total_compressed_size
        for chunk in chunks
        if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
    )


# -- the folder of copies


def _kept(
    name: str,
    key: str,
    state: str,
    suffix: str,
    size: int | None,
    write: Callable[[IO[bytes]], None],
    tell: Tell | None,
) -> Path:
    """The copy for this key and state, written by one process while others wait. Older states are removed."""
    folder = cache_folder() / "pictures" / _digest(os.fsencode(key))
    path = folder / (_digest(os.fsencode(state)) + suffix)
    is_known = state != UNKNOWN  # otherwise a copy may be outdated
    if is_known and path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder / "lock", wait=True):
            if is_known and path.is_file():  # another process has written it meanwhile
                return path
            for stale in folder.glob("partial-*"):  # of a process that was killed
                with contextlib.suppress(OSError):
                    if time.time() - stale.stat().st_mtime > _STALE_S:
                        stale.unlink()
            free = shutil.disk_usage(folder).free
            if size is not None and size > free:
                raise UsageError(
                    f"{name} needs a copy of {_megabytes(size)} in {cache_folder()}, where {_megabytes(free)} are "
                    "free. Free some space there, or set DINOKIT_CACHE to a folder with more"
                )
            if tell is not None:
                amount = f" ({_megabytes(size)})" if size else ""
                tell(f"copying {name}{amount} to {cache_folder()}, once, to read it in any order")
            # A name of its own per process, for file systems without locks.
            partial = folder / f"partial-{os.getpid()}-{secrets.token_hex(4)}"
            try:
                with partial.open("wb") as target:
                    write(target)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            for other in folder.glob(f"*{suffix}") if is_known else ():
                if other != path:
                    other.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{name} cannot be copied to {cache_folder()} ({error.strerror or error}). Random access needs "
            "the copy; free some space, or set DINOKIT_CACHE to a writable folder"
        ) from error
    return path


def _blocks(file: RemoteFile) -> Iterator[bytes]:
    count = 0
    with _reading(file.name), file.open() as source:
        while block := _block(source, count):
            count += len(block)
            yield block


def _block(source: IO[bytes], start: int) -> bytes:
    """The next bytes of a remote file; a temporary failure is retried from here, not from the start."""

    def read() -> bytes:
        if source.tell() != start:
            source.seek(start)
        return source.read(_BLOCK)

    return retried(read)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns any error of reading into a UsageError, since every file system has its own errors."""
    try:
        yield
    except DinokitError:
        raise
    except Exception as error:
        raise UsageError(f"{name} cannot be read ({type(error).__name__}: {error})") from error


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:24]


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MB"
