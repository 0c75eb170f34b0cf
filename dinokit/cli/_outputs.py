"""Whether a command may write its output, asked before the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

__all__ = ["check_output"]


def check_output(output: Path, suffixes: Sequence[str], example: str, *, overwrite: bool) -> None:
    """Makes sure that a file of this name can be written.

    Args:
        output: the file.
        suffixes: those that the command writes.
        example: a name for the file, for the message where ``output`` is a folder.
        overwrite: whether a file that is there may be replaced.

    Raises:
        click.UsageError: another suffix, a folder, or a file that is there.
        DinokitError: the folder cannot be written to.
    """
    from dinokit.outputs import must_be_writable

    if output.suffix.lower() not in suffixes:
        expected = suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"
        raise click.UsageError(f"{output}: the suffix {output.suffix!r} is not known; expected {expected}")
    if output.is_dir():
        raise click.UsageError(f"{output} is a folder; expected the name of a file, {output / example}")
    if output.exists() and not overwrite:
        raise click.UsageError(f"{output} exists; choose another name, or give --overwrite to replace it")
    must_be_writable(output)
