"""The command that made a result, as it can be typed on another machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

__all__ = ["command"]


def command(data: Path | None = None) -> str:
    """This process's command line. Paths in the folder ``data`` become ``DATA/…``, other absolute paths their names."""
    words = []
    for word in sys.argv[1:]:
        path = Path(word)
        if data is not None and path.is_relative_to(data):
            word = Path("DATA", path.relative_to(data)).as_posix()
        elif path.is_absolute():
            word = path.name
        words.append(word)
    return f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(words)}".strip()
