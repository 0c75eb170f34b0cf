"""Locks that let one process at a time work on a result. The system releases them however the process ends."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["HeldElsewhereError", "held"]

_changed = threading.Condition()
_held_alone: set[tuple[int, str]] = set()
"""Process and file of the locks that this process holds alone; the system does not distinguish its threads."""


class HeldElsewhereError(Exception):
    """Another process or thread holds the lock; ``holder`` names it if it is known."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@contextmanager
def held(file: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds ``file`` as a lock inside the block. The file is created if it is missing, and stays.

    Processes that this one forks do not hold the lock (POSIX record locks). On Windows and on file systems without
    locks, nothing is held and no error is raised.

    Args:
        file: used for nothing else, in a folder that exists. Its text names the process that holds it alone.
        shared: other callers that also pass ``shared`` may hold it at the same time.
        wait: wait until the lock is free.

    Raises:
        HeldElsewhereError: another process holds it, or another thread of this one holds it alone; never with ``wait``.
        OSError: the file cannot be created.
    """
    # This comes first: closing a file releases all locks that the process holds on it.
    with _alone_here(file, shared=shared, wait=wait), file.open("a+", encoding="utf-8") as stream:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.lockf(stream, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and not wait:
                stream.seek(0)
                raise HeldElsewhereError(stream.read().strip() or "of an unknown process") from error
        stream.truncate(0)
        if not shared:
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
        yield


@contextmanager
def _alone_here(file: Path, *, shared: bool, wait: bool) -> Iterator[None]:
    """Refuses, or waits for, a lock that another thread holds alone."""
    key = os.getpid(), os.path.realpath(file)  # a forked process holds nothing
    with _changed:
        if wait:
            _changed.wait_for(lambda: key not in _held_alone)
        if key in _held_alone:
            raise HeldElsewhereError(f"in this very process, {os.getpid()}")
        if not shared:
            _held_alone.add(key)
    try:
        yield
    finally:
        if not shared:
            with _changed:
                _held_alone.discard(key)
                _changed.notify_all()
