"""Single pictures behind addresses: http(s) with the standard library, everything else through fsspec."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dinokit.errors import DinokitError, ImageError
from dinokit.sources.names import is_web
from dinokit.sources.pictures import MOST_BYTES, Item, Picture, TextList, within_limit
from dinokit.sources.storage import RemoteFile, filesystem_of, retried, state_from, time_from

__all__ = ["ListedAddresses", "address_of"]


def address_of(address: str) -> Picture:
    """The picture at an address; no request is sent before it is read."""
    return _WebPicture(address) if is_web(address) else _RemotePicture(address)


@dataclass(frozen=True)
class _WebPicture(Picture):
    name: str

    def read(self) -> bytes:
        from dinokit.sources.web import fetch  # imports urllib, which takes 20 ms

        return fetch(self.name)

    def state(self) -> str:
        return "web"  # would take one request per picture

    def changed_at(self) -> float | None:
        return None


@dataclass(frozen=True)
class _RemotePicture(Picture):
    name: str
    known: tuple[str, float | None] | None = field(default=None, compare=False)
    """State and time of change, if a listing reported them; otherwise the file system is asked."""

    def read(self) -> bytes:
        try:
            data = retried(self._read)
        except FileNotFoundError as error:
            raise ImageError("no such file") from error
        except IsADirectoryError as error:
            raise ImageError("this is a folder, not a picture") from error
        except DinokitError as error:  # a package is missing
            raise ImageError(str(error)) from error
        except Exception as error:  # every file system has its own errors
            raise ImageError(f"it cannot be read ({type(error).__name__}: {error})") from error
        return within_limit(data)

    def _read(self) -> bytes:
        filesystem, path = filesystem_of(self.name)
        with filesystem.open(path, "rb") as file:
            return bytes(file.read(MOST_BYTES + 1))

    def state(self) -> str:
        return self._known[0]

    def changed_at(self) -> float | None:
        return self._known[1]

    @functools.cached_property
    def _known(self) -> tuple[str, float | None]:
        if self.known is not None:
            return self.known
        file = RemoteFile(self.name)
        try:
            return file.state(), file.changed_at()
        except DinokitError:
            return "unknown", None


class ListedAddresses:
    """Pictures of a remote folder by number, with the state from its listing."""

    def __init__(self, listing: Iterable[tuple[str, dict[str, Any]]]) -> None:
        rows = list(listing)
        self._names = TextList(name for name, _ in rows)
        self._states = TextList(state_from(info) for _, info in rows)
        self._times = [time_from(info) for _, info in rows]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int, /) -> Item:
        return _RemotePicture(self._names[index], (self._states[index], self._times[index]))
