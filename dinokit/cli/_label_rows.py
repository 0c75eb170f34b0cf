"""The result rows of `dinokit knn` and `dinokit classify`, as lines of a CSV and on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dinokit.cli._tables import as_columns

__all__ = [
    "CLASS_TYPES",
    "LABEL_TYPES",
    "SUSPECT_TYPES",
    "classes_as_lines",
    "classes_as_text",
    "failures_of",
    "labels_as_lines",
    "labels_as_text",
    "suspects_as_text",
]

LABEL_TYPES = {
    "path": "text",
    "label": "text",
    "probability": "number",
    "nearest": "texts",
    "nearest_labels": "texts",
    "similarities": "numbers",
    "error": "text",
}
SUSPECT_TYPES = {
    "path": "text",
    "label": "text",
    "neighbours_say": "text",
    "probability": "number",
    "given_probability": "number",
    "nearest": "text",
}
CLASS_TYPES = {
    "path": "text",
    "label": "text",
    "probability": "number",
    "labels": "texts",
    "probabilities": "numbers",
    "error": "text",
}


def failures_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Path and error of the rows that have one, for ``--json``."""
    return [{"path": row["path"], "error": row["error"]} for row in rows if row["error"] is not None]


def labels_as_lines(rows: Sequence[dict[str, Any]], nearest: int) -> list[list[Any]]:
    """Lines of a CSV, whose cells hold one thing each."""
    columns = {"nearest": "nearest", "nearest_labels": "nearest_label", "similarities": "similarity"}
    return _as_lines(rows, columns, nearest)


def classes_as_lines(rows: Sequence[dict[str, Any]], top: int) -> list[list[Any]]:
    """Lines of a CSV, whose cells hold one thing each."""
    return _as_lines(rows, {"labels": "label", "probabilities": "probability"}, top)


def _as_lines(rows: Sequence[dict[str, Any]], columns: Mapping[str, str], count: int) -> list[list[Any]]:
    """``columns``: the lists in a row and the names of their numbered columns; ``count`` columns each."""
    numbered = [f"{name}_{i + 1}" for i in range(count) for name in columns.values()]
    lines: list[list[Any]] = [["path", "label", "probability", *numbered, "error"]]
    for row in rows:
        cells = [row[kind][i] if i < len(row[kind]) else None for i in range(count) for kind in columns]
        lines.append([row["path"], row["label"], row["probability"], *cells, row["error"]])
    return lines


def labels_as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the screen: the label of each photograph and its nearest reference."""
    lines = [("photo", "label", "probability", "nearest reference", "similarity")]
    for row in rows:
        if row["error"] is not None:
            lines.append((row["path"], "", "", f"({row['error']})", ""))
        else:
            near, similarity = row["nearest"][0], f"{row['similarities'][0]:.3f}"
            lines.append((row["path"], row["label"] or "", f"{row['probability']:.3f}", near, similarity))
    return as_columns(lines)


def classes_as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the screen: the two most probable labels of each photograph."""
    lines = [("photo", "label", "probability", "next", "probability")]
    for row in rows:
        if row["error"] is not None:
            lines.append((row["path"], "", "", f"({row['error']})", ""))
        else:
            shown = [f"{probability:.3f}" for probability in row["probabilities"][:2]] + [""]
            second = row["labels"][1] if len(row["labels"]) > 1 else ""
            lines.append((row["path"], row["label"] or "", shown[0], second, shown[1]))
    return as_columns(lines)


def suspects_as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the screen: the given label of each reference and what its neighbours say."""
    lines = [("photo", "label", "probability", "neighbours say", "probability", "nearest reference")]
    for row in rows:
        given, said = f"{row['given_probability']:.3f}", f"{row['probability']:.3f}"
        lines.append((row["path"], row["label"], given, row["neighbours_say"], said, row["nearest"]))
    return as_columns(lines)
