"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, thing: str, things: str | None = None) -> str:
    """``1 picture``, ``1,000 pictures``; ``things``: the plural, if it is not formed with -s."""
    return f"1 {thing}" if count == 1 else f"{count:,} {things or thing + 's'}"
