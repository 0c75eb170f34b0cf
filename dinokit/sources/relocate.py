"""Finds the pictures of a table again, after the table or the current folder has moved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dinokit.sources.names import as_on_disk

__all__ = ["find_again"]


def find_again(path: str, roots: Sequence[Path]) -> str:
    """The path of a picture that a table names: in the first root that has it, or else the name itself.

    Args:
        path: as in the table; for an archive's member, the archive is looked for.
        roots: folders that the name may be relative to.
    """
    if "://" in path:  # an address is absolute
        return path
    for root in roots:
        # A table shows bytes of a name that are not UTF-8 as text, \xe9; the file's name has the byte.
        name = as_on_disk(str(root / path))
        # For a.tar::1.jpg, the archive.
        if os.path.lexists(name) or os.path.lexists(name.partition("::")[0]):
            return name
    return path
