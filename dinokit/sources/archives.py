"""Pictures inside .tar, .tar.gz and .zip files, webdataset shards among them; nothing is unpacked to disk."""

from __future__ import annotations

import gzip
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, ClassVar

from dinokit.errors import ImageError, UsageError
from dinokit.pictures.image_files import IMAGE_SUFFIXES
from dinokit.sources.pictures import MOST_BYTES, Item, Part, Picture, TextList
from dinokit.sources.storage import Storage
from dinokit.wording import counted

__all__ = ["archive_of"]

# gzip does not shrink photographs; zeros shrink a thousandfold.
_MOST_EXPANSION = 100
_EXPANSION_ALLOWED = 64 * 2**20  # bytes before the ratio is checked
_LONGEST_LABEL = 1000  # bytes


class _Labels:
    """Labels of an archive's pictures from its ``.cls`` files."""

    def __init__(self) -> None:
        self._by_stem: dict[str, str] = {}
        self._by_key: dict[str, str | None] = {}  # None if several disagree

    def __bool__(self) -> bool:
        return bool(self._by_stem)

    def add(self, member: str, text: str) -> None:
        """Adds the content of a member such as ``000001.cls``."""
        self._by_stem[_stem(member)] = text
        key = _key(member)
        self._by_key[key] = text if self._by_key.get(key, text) == text else None

    def of(self, member: str) -> str | None:
        """The label of ``000001.jpg``: by its own name, else by its sample, as webdataset groups members."""
        return self._by_stem.get(_stem(member)) or self._by_key.get(_key(member))


def _stem(name: str) -> str:
    """The path without its suffix: of ``img.0001.jpg``, ``img.0001``."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.rpartition('.')[0]}"


def _key(name: str) -> str:
    """webdataset's key: the path up to the first dot of the file name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"


def archive_of(storage: Storage, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> tuple[Part, str | None]:
    """The pictures of an archive in its own order, named ``ARCHIVE::MEMBER``, and a problem, if any.

    Members are files with one of the ``suffixes``; hidden ones, symbolic links and macOS metadata are skipped, hard
    links are reported. A truncated archive gives the members before the damage.

    Raises:
        UsageError: it is not such an archive.
        OSError: it cannot be opened.
    """
    lower = storage.name.lower()
    if lower.endswith(".zip"):
        return _zip(storage, suffixes)
    return _tar_gz(storage, suffixes) if lower.endswith((".gz", ".tgz")) else _tar(storage, suffixes)


def _is_picture(member: str, suffixes: frozenset[str]) -> bool:
    path = PurePosixPath(member.replace("\\", "/"))
    hidden = any(part.startswith(".") and part not in (".", "..") for part in path.parts)
    return path.suffix.lower() in suffixes and not hidden and "__MACOSX" not in path.parts


def _must_be_small(size: int) -> None:
    if size > MOST_BYTES:
        raise ImageError(
            f"it is refused: {size:,} bytes are more than the {MOST_BYTES:,} allowed for a picture in an archive; "
            "unpack it if you trust it"
        )


# -- members that can be read in place


@dataclass(frozen=True)
class _Member(Picture):
    """Bytes at a known offset; ``method``: zip's compression method (0 stored, 8 deflate)."""

    storage: Storage
    member: str
    start: int
    packed: int
    size: int
    method: int = 0
    crc: int = 0
    text: str | None = field(default=None, compare=False, kw_only=True)
    """Its label, if the archive has labels."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.storage.name}::{self.member}"

    @property
    def label(self) -> str | None:
        return self.text

    def state(self) -> str:
        return f"{self.storage.state()} {self.start} {self.size}"

    def changed_at(self) -> float | None:
        return self.storage.changed_at()

    def read(self) -> bytes:
        _must_be_small(max(self.size, self.packed))
        return self._fetch(self.start, self.size)

    def _fetch(self, start: int, size: int) -> bytes:
        try:
            data = self.storage.read_range(start, size)
        except ImageError:
            raise
        except Exception as error:  # of the disk or of any file system behind fsspec
            raise ImageError(f"{self.storage.name} cannot be read ({error})") from error
        if len(data) < size:
            raise ImageError("the archive ends before this member does")
        return data


class _ZipMember(_Member):
    def read(self) -> bytes:
        _must_be_small(max(self.size, self.packed))
        if self.method < 0:
            raise ImageError("it is encrypted; unpack it with its password")
        if self.method not in (0, 8):
            raise ImageError(
                f"it is packed with zip's method {self.method}; only stored and deflate are read"
            )
        if self.size > _EXPANSION_ALLOWED and self.size > _MOST_EXPANSION * self.packed:
            raise ImageError(
                f"it is refused as a decompression bomb: {self.packed:,} bytes claim to become {self.size:,}"
            )
        header = self._fetch(self.start, 30)
        if header[:4] != b"PK\3\4":
            raise ImageError("the archive is damaged: this member is not where its directory points")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        data = self._fetch(self.start + 30 + name_length + extra_length, self.packed)
        if self.method == 8:
            try:
                # Never decompress more than the declared and checked size.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
            except zlib.error as error:
                raise ImageError(f"its data in the archive are damaged ({error})") from error
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise ImageError("its data in the archive are damaged (size or checksum differ)")
        return data


class _Members:
    """The members of one archive by number; 50 bytes and a name each."""

    def __init__(
        self,
        storage: Storage,
        kind: type[_Member],
        rows: Iterator[tuple[str, tuple[int, ...]]],
        labels: _Labels | None = None,
    ) -> None:
        self._storage, self._kind = storage, kind
        self._numbers = array("q")

        def names() -> Iterator[str]:
            for name, numbers in rows:
                self._numbers.extend(numbers)
                yield name

        self._names = TextList(names())
        self._columns = len(self._numbers) // max(len(self._names), 1)
        self._labels = _labels_of(self._names, labels)

    @property
    def labelled(self) -> bool:
        """Whether its pictures have labels."""
        return bool(self._labels)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int, /) -> Item:
        first = index * self._columns
        numbers = self._numbers[first : first + self._columns]
        text = self._labels[index] if self._labels else None
        return self._kind(self._storage, self._names[index], *numbers, text=text)


def _zip(storage: Storage, suffixes: frozenset[str]) -> tuple[Part, str | None]:
    try:
        with storage.open() as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, UnicodeDecodeError) as error:
        raise UsageError(f"{storage.name} cannot be read as a zip archive ({error})") from error
    rows = (
        (
            info.filename,
            (
                info.header_offset,
                info.compress_size,
                info.file_size,
                -1 if info.flag_bits & 1 else info.compress_type,
                info.CRC,
            ),
        )
        for info in infos
        if not info.filename.endswith("/") and _is_picture(info.filename, suffixes)
    )
    try:
        return _Members(storage, _ZipMember, rows), None
    except OverflowError as error:
        raise UsageError(f"{storage.name} cannot be read as a zip archive (an impossible size)") from error


def _tar(storage: Storage, suffixes: frozenset[str]) -> tuple[Part, str | None]:
    problems: list[str] = []
    labels = _Labels()

    def rows(archive: tarfile.TarFile) -> Iterator[tuple[str, tuple[int, ...]]]:
        for member in _walk(archive, problems.append, storage.name, suffixes, labels):
            yield member.name, (member.offset_data, member.size, member.size)

    try:
        with storage.open() as file, tarfile.open(fileobj=file, mode="r:") as archive:
            return _Members(storage, _Member, rows(archive), labels), problems[0] if problems else None
    except tarfile.TarError as error:
        raise UsageError(
            f"{storage.name} cannot be read as an uncompressed tar archive ({error}); compressed ones are named "
            ".tar.gz or .tgz"
        ) from error
    except OverflowError as error:
        raise UsageError(f"{storage.name} cannot be read as a tar archive (an impossible size)") from error


def _labels_of(names: TextList, labels: _Labels | None) -> list[str | None] | None:
    """Labels in picture order: ``000001.cls`` is the label of ``000001.jpg``. None if no picture has one."""
    if not labels:
        return None
    # Interned, since thousands of pictures share a few labels.
    return [sys.intern(text) if (text := labels.of(name)) else None for name in names]


def _walk(
    archive: tarfile.TarFile,
    report: Callable[[str], None],
    name: str,
    suffixes: frozenset[str],
    labels: _Labels | None = None,
) -> Iterator[tarfile.TarInfo]:
    """The pictures of an open tar file; a damaged end and, if ``labels`` are collected, hard links are reported.

    Each ``.cls`` is added to ``labels``: its few bytes follow the header just read, so a remote archive needs no
    further request.
    """
    seen = links = 0
    while True:
        try:
            member = archive.next()
            is_label = member is not None and member.isfile() and member.name.endswith(".cls")
            if member is not None and is_label and labels is not None:
                content = archive.extractfile(member)
                text = content.read(_LONGEST_LABEL).decode("utf-8", "replace").strip() if content else ""
                if text:
                    labels.add(member.name, text)
        except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
            if isinstance(error, tarfile.TarError) and not seen:
                raise
            report(f"{name}: the archive is damaged after {seen} members ({error}); the rest is left out")
            return
        if member is None:
            if links and labels is not None:
                report(
                    f"{name}: left out {counted(links, 'hard link')} to other members; pack the archive again with "
                    "tar --hard-dereference"
                )
            return
        seen += 1
        links += member.islnk() and _is_picture(member.name, suffixes)
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a kilobyte for each
        if member.isfile() and not member.issparse() and _is_picture(member.name, suffixes):
            yield member


# -- members of a compressed archive: readable only from the start


class _Expanding:
    """A gzip stream that stops when it expands more than any archive of pictures would."""

    def __init__(self, file: IO[bytes]) -> None:
        self._packed, self._stream, self._given = file, gzip.GzipFile(fileobj=file), 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._given += len(data)
        if self._given > _EXPANSION_ALLOWED and self._given > _MOST_EXPANSION * max(self._packed.tell(), 1):
            raise tarfile.ReadError("refused as a decompression bomb: it grows more than a hundredfold")
        return data


class _Stream:
    """A compressed tar file, read forwards. For an earlier member it starts again."""

    def __init__(self, storage: Storage, suffixes: frozenset[str]) -> None:
        self._storage, self._suffixes = storage, suffixes
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._members: Iterator[tarfile.TarInfo] = iter(())
        self._archive: tarfile.TarFile | None = None
        self._next = 0

    def __reduce__(self) -> tuple[type[_Stream], tuple[Storage, frozenset[str]]]:
        return _Stream, (self._storage, self._suffixes)

    def __del__(self) -> None:
        self.close()

    def open(self, report: Callable[[str], None], labels: _Labels | None = None) -> Iterator[tarfile.TarInfo]:
        """The archive's pictures from the first; see :func:`_walk`."""
        self.close()
        self._file = self._storage.open()
        expanding: Any = _Expanding(self._file)
        try:
            self._archive = tarfile.open(fileobj=expanding, mode="r|")  # noqa: SIM115 - closed with its file
        except BaseException:
            self.close()
            raise
        self._next = 0
        self._members = _walk(self._archive, report, self._storage.name, self._suffixes, labels)
        return self._members

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._archive = None
        self._members = iter(())

    def read(self, index: int, last: bool) -> bytes:
        """The bytes of the picture with this number."""
        problems: list[str] = []
        with self._lock:
            try:
                if self._archive is None or index < self._next:
                    self.open(problems.append)
                assert self._archive is not None
                for member in self._members:
                    self._next += 1
                    if self._next > index:
                        _must_be_small(member.size)
                        stream = self._archive.extractfile(member)
                        data = stream.read() if stream else b""
                        if len(data) != member.size:
                            raise ImageError("the archive ends before this member does")
                        if last:  # so that a thousand shards are not a thousand open files
                            self.close()
                        return data
            except (OSError, tarfile.TarError, EOFError, zlib.error, ValueError) as error:
                self.close()
                raise ImageError(f"its data in the archive are damaged ({error})") from error
            self.close()
        raise ImageError(
            problems[0] if problems else "the archive has changed: this member is no longer there"
        )


@dataclass(frozen=True)
class _StreamMember(Picture):
    in_order: ClassVar[bool] = True

    stream: _Stream
    storage: Storage
    member: str
    index: int
    last: bool
    text: str | None = field(default=None, compare=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.storage.name}::{self.member}"

    @property
    def label(self) -> str | None:
        return self.text

    def read(self) -> bytes:
        return self.stream.read(self.index, self.last)

    def state(self) -> str:
        return f"{self.storage.state()} {self.index}"

    def changed_at(self) -> float | None:
        return self.storage.changed_at()


class _StreamMembers:
    def __init__(self, storage: Storage, names: TextList, suffixes: frozenset[str], labels: _Labels) -> None:
        self._storage, self._names, self._stream = storage, names, _Stream(storage, suffixes)
        self._labels = _labels_of(names, labels)

    @property
    def labelled(self) -> bool:
        """Whether its pictures have labels."""
        return bool(self._labels)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int, /) -> Item:
        last = index == len(self._names) - 1
        text = self._labels[index] if self._labels else None
        return _StreamMember(self._stream, self._storage, self._names[index], index, last, text)


def _tar_gz(storage: Storage, suffixes: frozenset[str]) -> tuple[Part, str | None]:
    problems: list[str] = []
    stream = _Stream(storage, suffixes)
    labels = _Labels()
    try:
        names = TextList(member.name for member in stream.open(problems.append, labels))
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(
            f"{storage.name} cannot be read as a tar archive packed with gzip ({error})"
        ) from error
    finally:
        stream.close()
    return _StreamMembers(storage, names, suffixes, labels), problems[0] if problems else None
