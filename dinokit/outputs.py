"""Results on the disk: whether one can be written, asked before the work; and files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinokit.errors import DinokitError

__all__ = ["atomic", "must_be_writable"]


def must_be_writable(output: str | os.PathLike[str]) -> None:
    """Makes the folder of a file that is to be written and tries to write there.

    Raises:
        DinokitError: that fails; the message says why.
    """
    folder = Path(output).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Only trying tells: of permissions root knows nothing, and of read-only disks permissions know nothing.
        with tempfile.TemporaryFile(dir=folder, prefix=".dinokit-"):
            pass
    except OSError as error:
        raise DinokitError(
            f"{output} cannot be written: {folder} does not take files ({error.strerror or error}); choose another "
            "place"
        ) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when all went well.

    An OSError from inside that names no file, as of a full disk, is given this one's name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
