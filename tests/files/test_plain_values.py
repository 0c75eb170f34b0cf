"""Dataclasses from JSON: each value of the kind that its field declares, or a message that says which is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from dinokit.errors import ModelError
from dinokit.files.plain_values import from_plain


@dataclass(frozen=True)
class Inner:
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    count: int
    name: str = "a"
    wide: bool = False
    size: tuple[int, int] | int = 1
    means: tuple[float, ...] = ()
    last: int | None = None
    inner: Inner = Inner()


WHOLE = {
    "count": 3,
    "name": "b",
    "wide": True,
    "size": [4, 5],
    "means": [0, 0.5],
    "last": None,
    "inner": {"share": 1},
}


def test_what_is_as_declared_is_taken() -> None:
    made = from_plain(Outer, json.loads(json.dumps(WHOLE)), "the thing")
    assert made == Outer(3, "b", True, (4, 5), (0, 0.5), None, Inner(1))
    assert from_plain(Outer, {"count": 3}, "the thing") == Outer(3)
    assert from_plain(Outer, {"count": 3, "size": 7, "last": 2}, "the thing") == Outer(3, size=7, last=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": True}, "the thing is damaged: count is True, expected int"),
        ({"count": 3.0}, "count is 3.0, expected int"),
        ({"name": None}, "name is None, expected str"),
        ({"wide": 1}, "wide is 1, expected bool"),
        ({"size": [4, 5, 6]}, "size is [4, 5, 6], expected tuple[int, int] | int"),
        ({"size": ["4", 5]}, "size is ['4', 5], expected"),
        ({"means": 0.5}, "means is 0.5, expected tuple[float, ...]"),
        ({"means": [float("inf")]}, "means is [inf], expected"),
        ({"means": [False]}, "means is [False], expected"),
        ({"last": "x"}, "last is 'x', expected int | None"),
        ({"inner": 3}, "inner is 3, expected Inner"),
        ({"inner": {"share": float("nan")}}, "inner of the thing is damaged: share is nan, expected float"),
        ({"inner": {"part": 1}}, "inner of the thing has unknown keys ['part']"),
        (
            {"more": 1, "again": 2},
            "the thing has unknown keys ['again', 'more']; perhaps a newer dinokit wrote",
        ),
    ],
)
def test_what_is_not_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        from_plain(Outer, WHOLE | changes, "the thing")
    assert message in str(caught.value)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ModelError, match="the thing is incomplete: count missing"):
        from_plain(Outer, {"name": "b"}, "the thing")
