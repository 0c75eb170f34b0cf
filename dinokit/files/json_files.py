"""JSON files: one kind of error for all damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_json"]


def read_json(file: Path) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or nested too deeply for Python's parser.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
