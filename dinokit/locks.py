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
_held_here: dict[tuple[int, str], int] = {}
"""Locks that this process holds, by process and file, since the system takes its threads for one: how many share it, or
-1 where one holds it alone."""


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
        HeldElsewhereError: another process holds it, or another thread of this one; nobody waits.
        OSError: the file cannot be made.
    """
    # First: whoever closes a file gives away all that its process holds of it.
    with _held_by_one_thread(file, shared=shared), file.open("a+", encoding="utf-8") as stream:
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
def _held_by_one_thread(file: Path, *, shared: bool) -> Iterator[None]:
    key = os.getpid(), os.path.realpath(file)  # what this process forks holds nothing
    with _lock:
        others = _held_here.get(key, 0)
        if others < 0 or (others and not shared):
            raise HeldElsewhereError(f"in this very process, {os.getpid()}")
        _held_here[key] = others + 1 if shared else -1
    try:
        yield
    finally:
        with _lock:
            _held_here[key] -= 1 if shared else -1
            if not _held_here[key]:
                del _held_here[key]
