"""Recognises addresses, archives, tables and lists by their names; opens nothing."""

# ruff: noqa: PTH122
# Names may be addresses, which are not paths.

from __future__ import annotations

import os
import re
from collections.abc import Container

from dinokit.pictures.image_files import BAND_SUFFIXES, IMAGE_SUFFIXES

__all__ = [
    "ARCHIVE_SUFFIXES",
    "ARROW_SUFFIX",
    "LIST_SUFFIXES",
    "PARQUET_SUFFIX",
    "PICTURE_SUFFIXES",
    "as_on_disk",
    "is_address",
    "is_archive",
    "is_arrow",
    "is_container",
    "is_list",
    "is_parquet",
    "is_picture_name",
    "is_shard",
    "is_web",
    "resolved",
    "split_member",
    "text_of",
    "without_password",
]

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv")
PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIX = ".arrow"
PICTURE_SUFFIXES = IMAGE_SUFFIXES | BAND_SUFFIXES

# The shortest container that fits: members may have :: in their names.
_MEMBER = re.compile(
    r"(.+?(?:\.tar|\.tar\.gz|\.tgz|\.zip|\.parquet|\.arrow))::(.+)", re.IGNORECASE | re.DOTALL
)


def is_archive(name: str) -> bool:
    """Whether the suffix is one of ``ARCHIVE_SUFFIXES``."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def is_list(name: str) -> bool:
    """Whether the suffix is one of ``LIST_SUFFIXES``."""
    return name.lower().endswith(LIST_SUFFIXES)


def is_parquet(name: str) -> bool:
    """Whether the suffix is Parquet's."""
    return name.lower().endswith(PARQUET_SUFFIX)


def is_arrow(name: str) -> bool:
    """Whether the suffix is Arrow's."""
    return name.lower().endswith(ARROW_SUFFIX)


def is_shard(name: str) -> bool:
    """Whether the file contains pictures: an archive, Parquet or Arrow."""
    return is_archive(name) or is_parquet(name) or is_arrow(name)


def is_container(name: str) -> bool:
    """Whether the file contains or names several pictures: an archive, Parquet, Arrow or a list."""
    return is_shard(name) or is_list(name)


def is_picture_name(name: str, suffixes: Container[str] = PICTURE_SUFFIXES) -> bool:
    """Whether the suffix is one of these; by default one that a picture of any kind may have."""
    return os.path.splitext(name)[1].lower() in suffixes


def is_address(text: str) -> bool:
    """Whether a text is an address such as ``s3://bucket/a.jpg``, not a path."""
    # Two letters at least: C:// is a drive.
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def is_web(address: str) -> bool:
    """Whether an address is of http or https."""
    return re.match(r"https?://", address, re.IGNORECASE) is not None


def without_password(address: str) -> str:
    """An address for display, without user name and password."""
    return re.sub(r"(?<=://)[^/?#]*@", "…@", address)


def split_member(name: str) -> tuple[str, str] | None:
    """``shards/a.tar::1.jpg`` to (``shards/a.tar``, ``1.jpg``); None for any other name."""
    match = _MEMBER.fullmatch(name)
    # tar://1.jpg::s3://… is fsspec's own way of naming a member.
    return None if match is None or "://" in match[2] else (match[1], match[2])


def as_on_disk(name: str) -> str:
    """The inverse of :func:`text_of`: the file or member that it shows as ``name``, which may have bytes that are not
    UTF-8. A file of this very name comes first."""
    if "\\x" not in name or _exists(name):
        return name
    found = os.fsdecode(re.sub(rb"\\x([89a-f][0-9a-f])", _byte, os.fsencode(name)))
    return found if _exists(found) else name


def _exists(name: str) -> bool:
    return os.path.lexists(name) or os.path.lexists(name.partition("::")[0])


def _byte(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 16)])


def text_of(path: object) -> str:
    """A picture's name as text, as tables and sheets show it."""
    # File names are bytes; bytes that are not UTF-8 become visible: caf\xe9.jpg
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


def resolved(name: str) -> str:
    """The same name however a picture is named: absolute, with links followed. Addresses stay as they are."""
    if is_address(name) or not name or "\0" in name:
        return name
    file, *member = split_member(name) or (name,)
    return "::".join([os.path.realpath(file), *member])
