"""Access to the bytes of an archive, a table or a list: a local file, or an address that fsspec knows."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from dinokit.errors import DinokitError, ImageError, MissingExtraError, UsageError
from dinokit.sources.names import is_address, is_web, without_password

__all__ = [
    "UNKNOWN",
    "LocalFile",
    "RemoteFile",
    "Storage",
    "addresses_opened_by",
    "filesystem_of",
    "retried",
    "state_from",
    "storage_of",
    "time_from",
]

T = TypeVar("T")

UNKNOWN = "unknown"
"""The state of a file about which nothing is known."""


class Storage(Protocol):
    """A file with random access. Can be pickled."""

    @property
    def name(self) -> str:
        """As the user gave it."""

    def open(self) -> IO[bytes]:
        """A seekable file object."""

    def read_range(self, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``, fewer at the end. May be called from several threads."""

    def state(self) -> str:
        """A string that changes when the file does."""

    def changed_at(self) -> float | None:
        """When it last changed, seconds since 1970; None if unknown."""


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    name: str

    def open(self) -> IO[bytes]:
        """Raises OSError."""
        return Path(self.name).open("rb")

    def read_range(self, start: int, size: int) -> bytes:
        """Opens the file for each call, which takes microseconds and keeps threads independent."""
        with Path(self.name).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def state(self) -> str:
        """Size and time of change."""
        status = self._status
        return f"{status.st_size} {status.st_mtime_ns}" if status else "missing"

    def changed_at(self) -> float | None:
        """Of the content or of the inode, whichever is later (see ``pictures.changed_at``)."""
        status = self._status
        return max(status.st_mtime, status.st_ctime) if status else None

    @functools.cached_property
    def _status(self) -> os.stat_result | None:
        # Read once for all members, not once per member.
        try:
            return Path(self.name).stat()
        except OSError:
            return None


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address: ``s3://…``, ``gs://…``, ``hf://…``, ``https://…``."""

    name: str

    def open(self) -> IO[bytes]:
        """Raises what its file system raises."""
        filesystem, path = filesystem_of(self.name)
        file: IO[bytes] = filesystem.open(path, "rb")
        return file

    def read_range(self, start: int, size: int) -> bytes:
        """One request for just these bytes; temporary failures are retried."""
        filesystem, path = filesystem_of(self.name)
        data = bytes(retried(lambda: filesystem.cat_file(path, start=start, end=start + size)))
        if len(data) > size:  # the whole file, which would be transferred for every member
            raise ImageError(
                "the server sends whole files only, not parts of them (HTTP range requests); download the file first"
            )
        return data

    def size(self) -> int | None:
        """In bytes; None if the server does not report it."""
        size = self._info.get("size")
        return int(size) if size is not None else None

    def state(self) -> str:
        """Size, and entity tag or time of change if the server reports them."""
        return state_from(self._info)

    def changed_at(self) -> float | None:
        """As reported by the server."""
        return time_from(self._info)

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        filesystem, path = filesystem_of(self.name)
        try:
            return dict(filesystem.info(path))
        except Exception:  # every file system has errors of its own
            return {}


_TRIES, _PAUSE_S, _LATE_S = 3, 0.5, 10.0
_LASTING = (
    DinokitError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
)
_PASSING_STATUS = (408, 425, 429)


def retried(read: Callable[[], T]) -> T:
    """The result of ``read``, tried three times while its failure may be temporary, with pauses between.

    Some file systems of fsspec retry by themselves, as that of S3, and then fail late; that of HTTP does not.
    """
    for attempt in range(1, _TRIES):
        started = time.monotonic()
        try:
            return read()
        except _LASTING:
            raise
        except Exception as error:  # every file system has its own errors
            status = getattr(error, "status", None)
            is_final = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS
            if is_final or time.monotonic() - started > _LATE_S:
                raise
        time.sleep(_PAUSE_S * 2 ** (attempt - 1))
    return read()


_opened_by: ContextVar[Callable[[RemoteFile], Storage] | None] = ContextVar("opened_by", default=None)


@contextlib.contextmanager
def addresses_opened_by(opener: Callable[[RemoteFile], Storage]) -> Iterator[None]:
    """Within this context, ``opener`` opens archives, tables and lists behind addresses, for instance as copies."""
    token = _opened_by.set(opener)
    try:
        yield
    finally:
        _opened_by.reset(token)


def storage_of(text: str) -> Storage:
    """The file or address with this name."""
    if not is_address(text):
        return LocalFile(text)
    opener = _opened_by.get()
    return RemoteFile(text) if opener is None else opener(RemoteFile(text))


@functools.lru_cache(maxsize=1024)
def filesystem_of(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it.

    Raises, without the address:
        MissingExtraError: fsspec or the package for this kind of address is not installed.
        UsageError: this kind of address is unknown.
    """
    protocol, mark, rest = address.partition("://")
    address = f"{protocol.lower()}{mark}{rest}"  # schemes ignore case, but fsspec accepts only lower case
    if any(part.lower().startswith("reference:") for part in address.split("::")):
        # It opens what a reference file names, by templates that older versions of fsspec run as code.
        raise UsageError("reference:// is not followed")
    if is_web(address) and without_password(address) != address:
        raise UsageError(
            "web addresses with a user name or password are not fetched, since "
            "picture names are written to tables; use an address without them"
        )
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingExtraError(f"{protocol}://", extra="remote", package="fsspec") from error
    try:
        filesystem, path = url_to_fs(address)
    except ImportError as error:  # fsspec says which: "Install s3fs to access S3"
        match = re.search(r"\b(s3fs|gcsfs|adlfs|aiohttp|requests|paramiko|smbprotocol)\b", str(error))
        package = match[1] if match else f"a package ({error})"
        raise MissingExtraError(f"{protocol}://", extra="remote", package=package) from error
    except ValueError as error:
        raise UsageError(
            f"addresses that start with {protocol}:// are not known ({error}); expected a path, "
            "http(s)://, s3://, gs://, hf:// or another that fsspec knows"
        ) from error
    return filesystem, str(path)


if hasattr(os, "register_at_fork"):
    # Many file systems use threads of their own, which a forked process (a training worker) lacks.
    os.register_at_fork(after_in_child=filesystem_of.cache_clear)


def state_from(info: dict[str, Any]) -> str:
    """The state of a file's content from fsspec's ``info``, as one string; ``UNKNOWN`` if it has none."""
    keys = (
        *("size", "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id"),
        *("LastModified", "Last-Modified", "last_modified", "mtime", "created"),
    )
    found = [f"{key}={info[key]}" for key in keys if info.get(key) is not None]
    return " ".join(found) or UNKNOWN


def time_from(info: dict[str, Any]) -> float | None:
    """When a file last changed according to fsspec's ``info``, seconds since 1970; None if unknown."""
    for key in ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            # ISO 8601; of HTTP "Wed, 21 Oct 2015 07:28:00 GMT"
            for read in (datetime.datetime.fromisoformat, email.utils.parsedate_to_datetime):
                with contextlib.suppress(ValueError):
                    return read(value).timestamp()
    return None
