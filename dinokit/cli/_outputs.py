"""A command's output: checks before the work whether it can be written; rows as CSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

__all__ = ["ROW_SUFFIXES", "check_output", "must_be_local", "must_not_be_an_input", "write_csv", "write_rows"]

ROW_SUFFIXES = (".csv", ".jsonl", ".parquet")
"""Suffixes that :func:`write_rows` accepts."""


def must_be_local(command: click.Command) -> None:
    """Makes a command refuse an address as ``--output`` before it does anything; as a path it would lose a slash."""
    for parameter in command.params:
        if parameter.name == "output" and parameter.callback is None:
            parameter.callback = _refuse_address


def _refuse_address(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
    # Two letters at least: C:/ is a drive.
    if value is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(value)):
        raise click.BadParameter(
            f"{value} is an address, but results are written on this machine; name a local file, and copy it afterwards"
        )
    return value


def must_not_be_an_input(output: str | os.PathLike[str], inputs: Iterable[str | None]) -> None:
    """Refuses an output that is one of the files the command reads; a file inside a folder that it reads is fine.

    Args:
        output: the file or folder to write.
        inputs: names from the command line; None for an option that was not used.

    Raises:
        click.UsageError: they are the same file, under whatever name.
    """
    for name in inputs:
        if name and "\0" not in name and _is_same_file(os.fspath(output), name):
            raise click.UsageError(
                f"{output} is also an input ({name}), which it would replace; choose another "
                "name for the output"
            )


def _is_same_file(output: str, name: str) -> bool:
    try:
        return Path(output).samefile(name)
    except (OSError, ValueError):  # at least one does not exist
        return False


def check_output(
    output: Path, suffixes: Sequence[str], example: str, *, overwrite: bool, inputs: Iterable[str | None] = ()
) -> None:
    """Makes sure that a file of this name can be written.

    Args:
        output: the file.
        suffixes: those that the command writes.
        example: a name for the file, for the message where ``output`` is a folder.
        overwrite: whether an existing file may be replaced.
        inputs: what the command reads, which is never replaced.

    Raises:
        click.UsageError: another suffix, a folder, an input, or an existing file.
        DinokitError: the folder cannot be written to.
    """
    from dinokit.files.outputs import must_be_writable

    if output.suffix.lower() not in suffixes:
        expected = suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"
        raise click.UsageError(f"{output}: the suffix {output.suffix!r} is not known; expected {expected}")
    if output.is_dir():
        raise click.UsageError(f"{output} is a folder; expected a file name, such as {output / example}")
    must_not_be_an_input(output, inputs)
    if output.exists() and not overwrite:
        raise click.UsageError(f"{output} exists; choose another name, or give --overwrite to replace it")
    must_be_writable(output)


def write_rows(
    output: Path,
    rows: list[dict[str, Any]],
    lines: list[list[Any]],
    types: dict[str, str],
    origin: dict[str, Any],
) -> None:
    """Writes rows to a file, completely or not at all.

    Args:
        output: a file with one of ``ROW_SUFFIXES``.
        rows: the rows.
        lines: the same as lines of a CSV, column names first.
        types: of the values in ``rows``, for Parquet: text, number, whole; with an s, lists of these.
        origin: which model the rows come from, for Parquet.
    """
    from dinokit.files.outputs import atomic

    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as temporary:
        if output.suffix.lower() == ".parquet":
            _write_parquet(temporary, rows, types, origin)
            return
        jsonl = output.suffix.lower() == ".jsonl"
        with temporary.open("w", newline="\n" if jsonl else "", encoding="utf-8") as stream:
            if jsonl:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                csv.writer(stream).writerows(lines)


def write_csv(output: Path, lines: Iterable[Sequence[Any]]) -> None:
    """Writes lines of a CSV, column names first, completely or not at all."""
    from dinokit.files.outputs import atomic

    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(lines)


def _write_parquet(
    path: Path, rows: list[dict[str, Any]], types: dict[str, str], origin: dict[str, Any]
) -> None:
    import pyarrow as pa

    from dinokit.tables.origin import metadata_of
    from dinokit.tables.parquet import write_parquet_file

    known = {"text": pa.string(), "number": pa.float64(), "whole": pa.int64()}
    known |= {f"{name}s": pa.list_(kind) for name, kind in known.items()}
    schema = pa.schema([(name, known[kind]) for name, kind in types.items()], metadata=metadata_of(origin))
    write_parquet_file(path, pa.Table.from_pylist(rows, schema=schema))
