"""Git LFS pointers: small texts that a clone has in place of large files if it was made without Git LFS."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dinokit.errors import ModelError

__all__ = ["must_not_be_a_pointer"]


def must_not_be_a_pointer(path: Path) -> None:
    """Raises ModelError if the file, which could not be read, is a Git LFS pointer."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
