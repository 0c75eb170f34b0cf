"""Where the pictures of a table lie now."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["find_again"]


def find_again(path: str, roots: Sequence[Path]) -> str:
    """Where a picture lies that a table names: under the first root that has it, or the name itself.

    Args:
        path: as it stands in the table; of an archive's member the archive is looked for.
        roots: folders that the name may be relative to.
    """
    if "://" in path:  # an address is looked for nowhere else
        return path
    # A table shows bytes of a name that are not UTF-8 as \xe9; the file has the byte.
    names = (path, os.fsdecode(re.sub(rb"\\x([89a-f][0-9a-f])", _byte, os.fsencode(path))))
    for name in dict.fromkeys(names):
        for root in roots:
            # Of a.tar::1.jpg the archive is what is looked for.
            if os.path.lexists(root / name) or os.path.lexists(root / name.partition("::")[0]):
                return str(root / name)
    return path


def _byte(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 16)])
