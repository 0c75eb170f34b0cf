"""What a training run writes for others to read: ``recipe.yaml`` and ``metrics.jsonl``, as plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["flat_yaml", "logged_lines", "logged_metrics"]


def flat_yaml(text: str) -> dict[Any, Any]:
    """The mapping in a YAML document; an empty document is an empty one.

    Raises:
        ValueError: it is not valid YAML, not a mapping, or has a key twice; the message says which.
    """
    import yaml

    try:
        node = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        at = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise ValueError(f"it is not valid YAML: {error.problem}{at}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-02-30
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from error
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key} is given {keys.count(key)} times; keep one of them")
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"expected flat `key: value` lines, not a {type(values).__name__}")
    return values or {}


def logged_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The text and the values of each line of a metrics.jsonl, one at a time, since a long run logs many.

    The last line of a killed run may be cut off, and a failing disk may damage any: such lines are left out.
    """
    try:
        opened = file.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    with opened:
        for line in opened:
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                yield line.rstrip("\n"), values


def logged_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The values of each line of a run's metrics.jsonl (:func:`logged_lines`)."""
    return (values for _, values in logged_lines(run / "metrics.jsonl"))
