"""Labels in tables of pictures: Hugging Face's ClassLabel with its names, or a plain column ``label``."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.errors import UsageError
from dinokit.files.json_files import read_json

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "LABEL_COLUMNS",
    "Labels",
    "class_names",
    "declared_features",
    "holds_text",
    "label_column",
    "label_text",
    "named_like",
    "type_of",
]

LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Names of label columns in order of preference, case-insensitive."""


def named_like(wanted: Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that are wanted, in the order of ``wanted``, ignoring case and surrounding spaces."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    return [lower[name] for name in wanted if name in lower]


def declared_features(schema: pa.Schema, name: str = "") -> dict[str, Any]:
    """Hugging Face's metadata of the columns, ``{}`` if there are none.

    Args:
        schema: of the table.
        name: the file; if the schema has no metadata, the ``dataset_info.json`` beside it is tried.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        try:
            features = read_json(Path(name).with_name("dataset_info.json"))["features"]
        except (OSError, KeyError, ValueError, TypeError):
            return {}
    if not isinstance(features, dict):
        return {}
    return {column: value for column, value in features.items() if isinstance(value, dict)}


def label_column(schema: pa.Schema, features: dict[str, Any]) -> tuple[str, list[str] | None] | None:
    """The label column and its class names; None if there is no such column."""
    import pyarrow as pa

    classes = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    for column in [*classes, *named_like(LABEL_COLUMNS, schema.names)]:
        kind = type_of(schema, column)
        if pa.types.is_integer(kind):
            return column, class_names(features, column)
        if holds_text(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            return column, None
    return None


def holds_text(kind: pa.DataType) -> bool:
    """Whether values of this type are text."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def type_of(schema: pa.Schema, column: str) -> pa.DataType:
    """The type of a column's values, of categories too; of several columns with this name, of the first."""
    import pyarrow as pa

    kind = schema.field(schema.names.index(column)).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def class_names(features: dict[str, Any], column: str) -> list[str] | None:
    """The class names of a column; None if unknown."""
    names = features.get(column, {}).get("names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def label_text(value: Any, names: Sequence[str] | None) -> str | None:
    """A label as text; None if it is missing, or a number without a class name."""
    if value is None or value == "" or value != value:  # NaN
        return None
    if (
        isinstance(value, float) and value.is_integer()
    ):  # pandas stores integers as floats if some are missing
        value = int(value)
    if names is None or not isinstance(value, int):
        return str(value)
    return names[value] if 0 <= value < len(names) else None


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a table's rows, read on first use. Can be pickled."""

    column: str
    names: Sequence[str] | None
    read: Callable[[str], Iterable[Any]]
    """The values of a column, in order. Raises UsageError."""

    def of(self, row: int) -> str | None:
        """The label of a row; None if it has none, or a number without a class name (-1 in test sets)."""
        with _LOCK:  # read once, even for several threads
            values = self._values
        if row >= len(values):
            return None
        return label_text(values[row], self.names)

    @functools.cached_property
    def _values(self) -> list[Any]:
        try:
            return list(self.read(self.column))
        except OSError as error:
            raise UsageError(f"its column {self.column!r} cannot be read ({error})") from error

    def __reduce__(self) -> tuple[type[Labels], tuple[Any, ...]]:
        return Labels, (self.column, self.names, self.read)


_LOCK = threading.Lock()
