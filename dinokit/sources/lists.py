"""Lists of pictures: text files with one path per line, CSV files with a column of paths, standard input."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import os
import re
import sys
from pathlib import Path

from dinokit.errors import UsageError
from dinokit.sources.columns import PATH_COLUMNS, path_column
from dinokit.sources.labels import LABEL_COLUMNS, named_like
from dinokit.sources.names import as_on_disk, is_address, split_member
from dinokit.sources.storage import Storage

__all__ = ["beside", "exists", "read_list", "read_stdin"]


def read_list(storage: Storage) -> tuple[list[str], list[str | None] | None]:
    """The paths and addresses of a list, as written there, and their labels if it has a label column.

    Raises:
        UsageError: it is not text, has no column of paths, or is empty.
        OSError: it cannot be opened.
    """
    with storage.open() as file:
        data = _as_utf8(file.read())
    lower = storage.name.lower()
    if lower.endswith((".csv", ".tsv")):
        found, labels = _columns(
            _decode(data, storage.name), storage.name, "\t" if lower.endswith(".tsv") else ","
        )
    else:
        found, labels = _lines(data, storage.name), None
    if not found:
        raise UsageError(f"{storage.name} does not name any picture; expected one path per line")
    return found, labels


def read_stdin() -> list[str]:
    """The paths on standard input, one per line, or separated by NUL as written by ``find -print0``."""
    if sys.stdin is None:  # Python's sign that the shell closed it
        raise UsageError("standard input is closed; expected one path per line there")
    return _lines(_as_utf8(sys.stdin.buffer.read()), "standard input")


def beside(texts: list[str], folder: str) -> list[str]:
    """Resolves the paths of a list in ``folder``: relative to it, or, if only that exists, to the current folder, as
    written by ``find`` and in tables of ``dinokit embed``."""
    if is_address(folder):
        here = [text for text in texts if re.match(r"(file|local):", text, re.IGNORECASE)]
        if here:
            raise UsageError(
                f"a remote list names {here[0]}, a file on this machine, and is not followed; copy the list here if "
                "you trust it"
            )
    return [text if is_address(text) else _placed(text, folder) for text in texts]


def _placed(text: str, folder: str) -> str:
    if is_address(folder):
        return f"{folder}/{text}"
    placed = as_on_disk(str(Path(folder) / text))
    text = as_on_disk(text)
    if placed == text or exists(placed):
        return placed
    return text if exists(text) else placed


def exists(path: str) -> bool:
    """Whether the file exists; for ``shards/a.tar::1.jpg``, the archive."""
    member = split_member(path)
    return os.path.lexists(path) or (member is not None and os.path.lexists(member[0]))


def _as_utf8(data: bytes) -> bytes:
    """Text in UTF-16, as PowerShell's ``>`` writes it, in UTF-8; anything else unchanged."""
    if not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data
    try:
        return data.decode("utf-16").encode()
    except UnicodeError:
        return data


def _lines(data: bytes, name: str) -> list[str]:
    # Before looking for NUL, which occurs in pictures as well as in lists of find -print0.
    if data.startswith((b"\xff\xd8", b"\x89PNG", b"PK\3\4", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")):
        raise UsageError(
            f"{name} is not a list of paths but another kind of file; expected one path per line"
        )
    if data[:100].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UsageError(f"{name} is not a list of paths but a web page (HTML); perhaps the download failed")
    if b"\0" in data:
        return [os.fsdecode(part) for part in data.split(b"\0") if part.strip()]
    # File names are bytes, so no encoding is guessed.
    lines = (_stripped(os.fsdecode(line)) for line in data.removeprefix(b"\xef\xbb\xbf").splitlines())
    return [line for line in lines if line]


def _stripped(line: str) -> str:
    """The line without surrounding spaces, unless they belong to the name of an existing file."""
    plain = line.strip()
    return line if plain != line and plain and not exists(plain) and exists(line) else plain


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")  # -sig: Excel writes a byte order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text ({error}); save it as CSV in UTF-8") from error


def _columns(text: str, name: str, separator: str) -> tuple[list[str], list[str | None] | None]:
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header = next(rows, [])
        column = path_column(header)
        if column is None:
            raise UsageError(_no_column(name, header, separator))
        place = header.index(column)
        chosen = [row for row in rows if len(row) > place and row[place].strip()]
        of_labels = next(
            (header.index(name) for name in named_like(LABEL_COLUMNS, header) if name != column), None
        )
        labels = None
        if of_labels is not None:
            labels = [row[of_labels].strip() or None if len(row) > of_labels else None for row in chosen]
        return [row[place].strip() for row in chosen], labels
    except csv.Error as error:
        raise UsageError(f"{name} cannot be read as CSV ({error})") from error


def _no_column(name: str, header: list[str], separator: str) -> str:
    if not header:
        return f"{name} is empty; expected a first line with the name of a column of paths, such as path"
    hint = ""
    if len(header) == 1 and any(mark in header[0] for mark in ";\t" if mark != separator):
        hint = ". The columns must be separated by " + ("tabs" if separator == "\t" else "commas")
    else:
        near = [match for match in PATH_COLUMNS if difflib.get_close_matches(match, header, n=1, cutoff=0.7)]
        hint = f". Rename one to {near[0]!r}?" if near else ""
    return (
        f"{name} has no column of paths; its first line is {separator.join(header)[:200]!r}, expected one of "
        f"{', '.join(PATH_COLUMNS)} in it{hint}"
    )
