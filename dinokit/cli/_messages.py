"""What commands say: lists of failures and warnings (the first twenty, and how many more there are)."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dinokit.cli._tables import visible

__all__ = ["LISTED", "list_messages"]

LISTED = 20
"""Of more, the rest is in the output, the JSON file or --json."""


def list_messages(sentences: Sequence[str], before: str, *, count: int = 0, see: str = "") -> None:
    """Says each sentence with what stands ``before`` it, such as ``"Failed: "``.

    ``count``: how many there are, where ``sentences`` has the first of them; ``see``: where the rest is.
    """
    for sentence in sentences[:LISTED]:
        click.echo(before + visible(sentence), err=True)
    count = max(count, len(sentences))
    if count > LISTED:
        click.echo(f"… and {count - LISTED} more{f': see {see}' if see else ''}", err=True)
