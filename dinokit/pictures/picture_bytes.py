"""The encoded bytes of a picture, wherever it is: a path, an address, an archive, bytes in memory or a file object."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dinokit.errors import ImageError

__all__ = ["encoded", "name_of", "naming", "open_encoded"]


def encoded(source: Any) -> bytes:
    """The bytes of a picture's file, given a path, an address, a picture in an archive, bytes, or a file object.

    Raises:
        ImageError: it is empty, cannot be read, or is none of these.
    """
    file = open_encoded(source)
    if file is None:
        raise ImageError(
            f"a {type(source).__name__} is not a picture; expected a path, bytes, a file object, an array or a tensor"
        )
    with file:
        data = file.read()
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    return data


def open_encoded(source: Any) -> IO[bytes] | None:
    """A seekable binary file, at its beginning, of what :func:`encoded` takes; None for anything else.

    Raises:
        ImageError: it cannot be opened.
    """
    if isinstance(source, str | os.PathLike):
        found = _found_elsewhere(os.fspath(source))
        return _open_path(source) if found is None else io.BytesIO(found)
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if hasattr(source, "read"):  # perhaps a socket, or a file not at its beginning; Pillow needs to seek
        return io.BytesIO(_read(source))
    return None


def name_of(source: object) -> str:
    """What a message calls a picture; of an address without its user name and password."""
    if isinstance(source, str | os.PathLike):
        from dinokit.sources.names import without_password

        return without_password(os.fsdecode(source)) or "''"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if isinstance(name, str) and name else f"the picture given as {type(source).__name__}"


@contextlib.contextmanager
def naming(source: object) -> Iterator[None]:
    """Puts the picture's name before the reason of an ImageError."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name_of(source)}: {error}") from error.__cause__


def _read(file: Any) -> bytes:
    """Reads a file object from its current position, or from its beginning if it is at its end, as Pillow does."""
    data = file.read()
    if isinstance(data, str):
        raise ImageError("the file was opened as text; open it with mode 'rb'")
    if not data:
        with contextlib.suppress(AttributeError, OSError):  # raised by a socket
            if file.tell():
                file.seek(0)
                data = file.read()
    return bytes(data)


def _found_elsewhere(text: str | bytes) -> bytes | None:
    """The bytes of a picture behind an address or inside an archive or table; None for a path to a file."""
    if not isinstance(text, str) or ("://" not in text and "::" not in text):
        return None
    from dinokit.sources import Picture, picture_named

    item = picture_named(text)
    return item.read() if isinstance(item, Picture) else None


def _open_path(path: str | os.PathLike[str]) -> IO[bytes]:
    if not os.fspath(path):  # pathlib would take it for the current folder
        raise ImageError("the path is empty")
    if isinstance(path, str) and "\\x" in path:  # a name from a table, where undecodable bytes are escaped
        from dinokit.sources.names import as_on_disk

        path = as_on_disk(path)
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError("this is a folder, not a picture")
        if not stat.S_ISREG(mode):  # a pipe or device could block for ever
            raise ImageError("this is not a regular file")
        return Path(path).open("rb")
    except FileNotFoundError as error:
        dangling = Path(path).is_symlink()
        raise ImageError("the link points to a missing file" if dangling else "no such file") from error
    except PermissionError as error:
        raise ImageError("permission denied") from error
    except OSError as error:
        raise ImageError(f"cannot be opened ({error.strerror or error})") from error
    except ValueError as error:  # a NUL byte in the name
        raise ImageError("this is not a valid file name") from error
