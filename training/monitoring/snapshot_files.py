"""Attention through time as files of a run folder: ``attention/step-*.jpg``, and ``photos.jpg`` without attention."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

__all__ = ["forget_snapshots", "photos_file", "snapshots"]

_NAME = re.compile(r"step-(\d{10})\.jpg")


def photos_file(run: Path) -> Path:
    """The pictures that the snapshots show."""
    return run / "attention" / "photos.jpg"


def snapshots(run: Path) -> dict[int, Path]:
    """step → file of the snapshots in a run folder, oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in (run / "attention").glob("step-*.jpg"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def forget_snapshots(run: Path) -> None:
    """Removes what another run has left in the folder; files of other names stay."""
    for path in (*snapshots(run).values(), photos_file(run)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it does not exist, or is not empty
        photos_file(run).parent.rmdir()
