"""Tables on the screen."""

from __future__ import annotations

from dinokit.cli._tables import as_columns


def test_columns_stand_below_each_other() -> None:
    assert as_columns([("a", "bb", "c"), ("aaa", "b", "")]) == "a    bb  c\naaa  b"


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert as_columns([("new\nline\x1b[2J.jpg", "x")]) == "new\\nline\\x1b[2J.jpg  x"


def test_wide_characters_take_two_places_and_accents_none() -> None:
    assert (
        as_columns([("東京", "x"), ("ko\u0308ln", "x"), ("Köln", "x")]) == "東京  x\nko\u0308ln  x\nKöln  x"
    )
