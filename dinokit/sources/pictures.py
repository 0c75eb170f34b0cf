"""The items of a list of pictures: files, and pictures inside archives, tables or behind addresses."""

# ruff: noqa: PTH116
# os.stat and os.path accept names that pathlib rejects.

from __future__ import annotations

import bisect
import itertools
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar, overload

from dinokit.errors import ImageError

__all__ = [
    "MOST_BYTES",
    "FileList",
    "Item",
    "Part",
    "Picture",
    "PictureList",
    "StandIn",
    "TextList",
    "changed_at",
    "in_order",
    "is_there",
    "label_of",
    "labelled",
    "state_of",
    "within_limit",
]

MOST_BYTES = 256 * 2**20
"""Maximum bytes of an encoded picture inside an archive, a table or behind an address. Photographs have a few million;
larger ones are more likely meant to exhaust the memory."""


def within_limit(data: bytes) -> bytes:
    """Returns ``data``. Raises ImageError if they exceed ``MOST_BYTES``."""
    if len(data) > MOST_BYTES:
        raise ImageError(
            f"it is refused, since it has more than {MOST_BYTES:,} bytes, the maximum for a picture"
        )
    return data


class Picture(ABC):
    """A picture that is not a file of its own: a member of an archive, a row of a table, an address.

    It can be pickled, and ``read`` may be called from several threads.
    """

    __slots__ = ()

    in_order: ClassVar[bool] = False
    """Whether reading is cheap only in the order of the list; :func:`in_order` then reads ahead."""
    name: str
    """The picture's name in tables and messages; the same in every run."""

    @property
    def label(self) -> str | None:
        """The label from its source; None if there is none."""
        return None

    @abstractmethod
    def read(self) -> bytes:
        """The encoded picture. Raises ImageError with the reason, without the picture's name."""

    @abstractmethod
    def state(self) -> str:
        """A string that changes with the picture, as far as can be known without reading it."""

    @abstractmethod
    def changed_at(self) -> float | None:
        """When it last changed, seconds since 1970; None if unknown."""

    def is_there(self) -> bool:
        """Whether the picture exists, as far as can be known without reading it."""
        return True

    def __str__(self) -> str:
        return self.name


Item = Path | Picture
T = TypeVar("T")


def state_of(item: Item) -> str:
    """Size and time of change of a picture; ``missing`` if it does not exist."""
    if isinstance(item, Picture):
        return item.state()
    try:
        status = os.stat(item)
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def changed_at(item: Item) -> float | None:
    """When a picture last changed, seconds since 1970; None if unknown."""
    if isinstance(item, Picture):
        return item.changed_at()
    try:
        status = os.stat(item)
    except (OSError, ValueError):
        return None
    # The inode's time also reveals an older file moved or copied to this path.
    return max(status.st_mtime, status.st_ctime)


def is_there(item: Item) -> bool:
    """Whether the file exists; for pictures that are not files, as far as can be known without reading them."""
    return item.is_there() if isinstance(item, Picture) else os.path.lexists(item)


def label_of(item: Item) -> str | None:
    """The label from a picture's source, such as a column of its table; None if it has none.

    Raises:
        UsageError: the labels cannot be read.
    """
    return item.label if isinstance(item, Picture) else None


def labelled(pictures: Sequence[Item]) -> bool:
    """Whether a list of pictures, or a slice of one, has sources with labels."""
    return bool(getattr(pictures, "labelled", False))


@dataclass(frozen=True)
class StandIn(Picture):
    """Wraps another picture to add something; name, state and time are the original's."""

    item: Item

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.item)

    def is_there(self) -> bool:
        return is_there(self.item)

    def state(self) -> str:
        return state_of(self.item)

    def changed_at(self) -> float | None:
        return changed_at(self.item)


# -- reading in order


@dataclass(frozen=True)
class _Loaded(StandIn):
    """A picture that was read before its turn to be decoded."""

    data: bytes | ImageError

    def read(self) -> bytes:
        if isinstance(self.data, ImageError):
            raise self.data
        return self.data


def in_order(items: Iterable[T]) -> Iterator[T | Picture]:
    """The same pictures; those that are cheap to read only in order are read here, one by one.

    For use before handing pictures to threads, which request them only roughly in order.
    """
    for item in items:
        if isinstance(item, Picture) and item.in_order:
            try:
                yield _Loaded(item, item.read())
            except ImageError as error:
                yield _Loaded(item, error)
        else:
            yield item


# -- lists


class Part(Protocol):
    """The pictures of one source (a folder, an archive, a table) by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


class TextList:
    """Strings in one block of memory, a tenth of the size of a list of ``str`` or ``Path``."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._ends = array("Q")
        self._bytes = bytearray()
        for text in texts:
            self._bytes += os.fsencode(text)
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int, /) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[index]]))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class FileList:
    """Picture files by number."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = TextList(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int, /) -> Item:
        return Path(self._paths[index])


class PictureList(Sequence[Item]):
    """The concatenated pictures of several sources. Items are created on access, so that a list of millions stays
    small; a slice is a view and can be pickled."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))

    @property
    def parts(self) -> Sequence[Part]:
        """The pictures of each source; none is empty."""
        return self._parts

    @property
    def labelled(self) -> bool:
        """Whether any source has labels."""
        return any(getattr(part, "labelled", False) for part in self._parts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return _View(self, range(len(self))[index])
        number = range(len(self))[index]  # negative and out-of-range indices as for a list
        part = bisect.bisect_right(self._ends, number)
        return self._parts[part][number - (self._ends[part - 1] if part else 0)]


class _View(Sequence[Item]):
    """Some pictures of a list."""

    def __init__(self, base: PictureList, numbers: range) -> None:
        self._base, self._numbers = base, numbers

    @property
    def labelled(self) -> bool:
        return self._base.labelled

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return _View(self._base, self._numbers[index])
        return self._base[self._numbers[index]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self._numbers)

    def __reduce__(self) -> tuple[type[tuple[Item, ...]], tuple[tuple[Item, ...]]]:
        return tuple, (tuple(self),)  # another process gets only its pictures, not the whole list
