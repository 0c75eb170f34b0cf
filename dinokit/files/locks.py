"""Who is at work on a result: locks that the system takes away with the process, however that ends."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["HeldElsewhereError", "held"]

_lock = threading.Lock()
_held_alone: set[tuple[int, str]] = set()
"""Process and file of the locks that this process holds alone: the system takes its threads for one."""


class HeldElsewhereError(Exception):
    """Another process or thread holds the lock. ``holder`` says which, where it is known."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@contextmanager
def held(file: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds ``file`` as a lock inside the block; it is made where it is missing, and stays.

    Processes that this one forks do not hold it (POSIX record locks). Where there are none, on Windows and on file
    systems that know no locks, nothing is held and nothing is said.

    Args:
        file: of its own, in a folder that is there. It tells who holds it alone.
        shared: others that say so too may hold it at the same time.

    Raises:
        HeldElsewhereError: another process holds it, or another thread of this one holds it alone; nobody waits.
        OSError: the file cannot be made.
    """
    # First: whoever closes a file gives away all that its process holds of it.
    with _alone_here(file, shared=shared), file.open("a+", encoding="utf-8") as stream:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            fcntl.lockf(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                stream.seek(0)
                raise HeldElsewhereError(stream.read().strip() or "of an unknown process") from error
        stream.truncate(0)
        if not shared:
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
        yield


@contextmanager
def _alone_here(file: Path, *, shared: bool) -> Iterator[None]:
    """What another thread holds alone is refused."""
    key = os.getpid(), os.path.realpath(file)  # what this process forks holds nothing
    with _lock:
        if key in _held_alone:
            raise HeldElsewhereError(f"in this very process, {os.getpid()}")
        if not shared:
            _held_alone.add(key)
    try:
        yield
    finally:
        if not shared:
            with _lock:
                _held_alone.discard(key)
