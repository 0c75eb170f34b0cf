"""What commands print: paths, and lists of failures and warnings (the first twenty, and the number of the others)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from dinokit.cli._tables import visible
from dinokit.errors import DinokitError

__all__ = ["LISTED", "NothingToDoError", "echo_path", "list_messages"]

LISTED = 20
"""Messages printed at most; the others are in the output, the JSON file or --json."""


class NothingToDoError(DinokitError):
    """The inputs contain nothing to work on (exit code 3)."""


def echo_path(path: str | os.PathLike[str]) -> None:
    """Prints a file name on stdout as the bytes that the file system has, valid UTF-8 or not."""
    click.echo(os.fsencode(path))


def list_messages(sentences: Sequence[str], before: str, *, count: int = 0, see: str = "") -> None:
    """Prints each sentence on stderr.

    Args:
        sentences: all of them, or the first ones.
        before: printed before each, such as ``"Failed: "``.
        count: how many there are, if ``sentences`` holds only the first of them.
        see: where the rest is.
    """
    for sentence in sentences[:LISTED]:
        click.echo(before + visible(sentence), err=True)
    count = max(count, len(sentences))
    if count > LISTED:
        click.echo(f"… and {count - LISTED} more{f': see {see}' if see else ''}", err=True)
