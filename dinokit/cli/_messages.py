"""Lists of failures and warnings on stderr: the first twenty, and how many more there are."""

from __future__ import annotations

from collections.abc import Sequence

import click

__all__ = ["LISTED", "list_messages"]

LISTED = 20
"""Of more, the rest is in the output, the JSON file or --json."""


def list_messages(sentences: Sequence[str], before: str, *, see: str = "") -> None:
    """Says each sentence with what stands ``before`` it, such as ``"Failed: "``; ``see``: where the rest is."""
    for sentence in sentences[:LISTED]:
        click.echo(before + sentence, err=True)
    if len(sentences) > LISTED:
        click.echo(f"… and {len(sentences) - LISTED} more{f': see {see}' if see else ''}", err=True)
