"""The checksum of a run's labels in its table's origin, so that changed labels are noticed, as changed pictures are.

It is separate from that of the pictures, so tables of unlabelled pictures are the same as before it was introduced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dinokit.errors import DinokitError
from dinokit.sources import Item, label_of, labelled
from dinokit.tables.embeddings import read_embeddings
from dinokit.tables.origin import read_origin
from dinokit.tables.patches import PATCHES, read_patches

__all__ = ["LABELS", "labels_in_origin", "origin_with_labels"]

LABELS = "labels_sha256"
"""The key of the origin. It is missing where no picture has a label, and in tables written before it was introduced."""


def labels_in_origin(pictures: Sequence[Item]) -> dict[str, str]:
    """The entry for the labels of these pictures in their table's origin; ``{}`` if there are none.

    Raises:
        UsageError: the labels cannot be read.
    """
    return _entry(map(label_of, pictures)) if labelled(pictures) else {}


def origin_with_labels(table: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The origin of an existing table, with the checksum of its labels even if it was written without one; ``{}`` if
    dinokit did not write this file.

    Args:
        table: its name.
        new: the origin to compare with; the table's labels are read only where this one has some.
    """
    origin = read_origin(table)
    if "inputs_sha256" not in origin:  # pandas has written it again, perhaps with other rows or columns
        return {}
    if LABELS in origin or LABELS not in new:
        return origin
    try:
        read = read_patches(table) if origin.get("what") == PATCHES else read_embeddings(table)
    except DinokitError:  # damaged: its labels are not these
        return origin
    return origin | _entry(read.labels or [])


def _entry(labels: Iterable[str | None]) -> dict[str, str]:
    digest, some = hashlib.sha256(), False
    for label in labels:
        some = some or bool(label)
        # As a table writes them, in which none and an empty one are the same in CSV.
        digest.update((label or "").encode("utf-8", "backslashreplace") + b"\0")
    return {LABELS: digest.hexdigest()} if some else {}
