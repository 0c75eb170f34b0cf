"""Tables and file names on the screen."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

__all__ = ["as_columns", "visible"]


def as_columns(lines: Sequence[Sequence[str]]) -> str:
    """Aligns lines of cells in columns, two spaces apart."""
    shown = [[visible(text) for text in line] for line in lines]
    widths = [max(map(_width, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(
            text + " " * (width - _width(text)) for text, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in shown
    )


def visible(text: str) -> str:
    """The text in one line. File names may hold anything: what a terminal obeys (line ends, escapes) is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # Python's form of a byte that is not UTF-8; tables have \xff too
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _width(text: str) -> int:
    """Columns on a terminal: Chinese, Japanese and Korean characters take two, combining accents none."""
    if text.isascii():
        return len(text)
    places = (0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
    return sum(places)
