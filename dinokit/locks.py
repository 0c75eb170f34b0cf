"""Who is at work on a result: locks that the system takes away with the process, however that ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["HeldElsewhereError", "held"]


class HeldElsewhereError(Exception):
    """Another process holds the lock. ``holder`` says which, where it is known."""

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
        HeldElsewhereError: another process holds it; nobody waits.
        OSError: the file cannot be made.
    """
    with file.open("a+", encoding="utf-8") as stream:
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
