"""Where the pictures of a table lie now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dinokit.sources.names import as_on_disk

__all__ = ["find_again"]


def find_again(path: str, roots: Sequence[Path]) -> str:
    """Where a picture lies that a table names: under the first root that has it, or the name itself.

    Args:
        path: as it stands in the table; of an archive's member the archive is looked for.
        roots: folders that the name may be relative to.
    """
    if "://" in path:  # an address is looked for nowhere else
        return path
    for root in roots:
        # A table shows bytes of a name that are not UTF-8 as \xe9; the file has the byte.
        name = as_on_disk(str(root / path))
        # Of a.tar::1.jpg the archive is what is looked for.
        if os.path.lexists(name) or os.path.lexists(name.partition("::")[0]):
            return name
    return path
