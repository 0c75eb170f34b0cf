"""Tables and numbers in Markdown, in one form all over a card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["cell", "line", "millions", "number", "percent", "rounded", "shown", "table"]


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [line(head), "|" + "---|" * len(head)]
    return "\n".join([*lines, *(line(row) for row in rows)])


def line(cells: Sequence[str]) -> str:
    """A row of one."""
    return f"| {' | '.join(cells)} |"


def cell(text: str) -> str:
    """Text that cannot end a cell or begin markup."""
    plain = " ".join(text.split()).replace("|", "/")
    return re.sub(r"([*_`<\[\]])", r"\\\1", plain)


def shown(value: Any) -> str:
    """A setting's value in a cell; – where there is none."""
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else cell(str(value))


def millions(params: int) -> str:
    """A number of parameters."""
    return f"{params / 1e6:.1f} million" if params >= 1e5 else number(params)


def number(value: Any) -> str:
    """A whole number with commas; – for anything else."""
    return f"{value:,}" if isinstance(value, int) else "–"


def rounded(value: Any) -> str:
    """Three digits; – for anything but a number."""
    return f"{value:.3g}" if isinstance(value, int | float) else "–"


def percent(share: Any) -> str:
    """A share as per cent; – for anything but a number."""
    return f"{100 * share:.1f} %" if isinstance(share, int | float) else "–"
