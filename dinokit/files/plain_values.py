"""Builds dataclasses of numbers and names from JSON, checking each value against the declared type of its field.

Files may come from strangers or be half edited, and a list instead of a number would cause an obscure error later.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dinokit.errors import ModelError

__all__ = ["from_plain"]

T = TypeVar("T")


class _OfAnotherKind(Exception):
    """A value is not of its field's declared type."""


def from_plain(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """Builds a dataclass whose fields are numbers, bools, texts, tuples of these, None, or such dataclasses.

    Args:
        kind: the dataclass.
        values: its fields by name, as ``json.loads`` gives them: lists for tuples. NaN and infinity are no numbers.
        what: the thing as an error names it, such as ``the architecture``.

    Raises:
        ModelError: a key is unknown or missing, or a value is of another kind.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known.keys()):
        raise ModelError(
            f"{what} has unknown keys {unknown}; perhaps a newer dinokit wrote it. Update dinokit."
        )
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ModelError(f"{what} is incomplete: {', '.join(missing)} missing")
    hints = get_type_hints(kind)
    made = {}
    for name, value in values.items():
        try:
            made[name] = _as(hints[name], value, f"{name} of {what}")
        except _OfAnotherKind:
            declared = getattr(hints[name], "__name__", None) if not get_args(hints[name]) else None
            raise ModelError(
                f"{what} is damaged: {name} is {value!r}, expected {declared or hints[name]}"
            ) from None
    return kind(**made)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the greatest float
        return False


def _as(hint: Any, value: Any, what: str) -> Any:
    if get_origin(hint) is types.UnionType:
        for one in get_args(hint):
            try:
                return _as(one, value, what)
            except _OfAnotherKind:
                continue
    elif get_origin(hint) is tuple:
        parts = get_args(hint)
        if isinstance(value, list | tuple):
            if parts[-1] is Ellipsis:
                return tuple(_as(parts[0], one, what) for one in value)
            if len(value) == len(parts):
                return tuple(_as(part, one, what) for part, one in zip(parts, value, strict=True))
    elif is_dataclass(hint):
        if isinstance(value, Mapping):
            return from_plain(hint, value, what)  # type: ignore[arg-type]
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
            return value
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _OfAnotherKind
