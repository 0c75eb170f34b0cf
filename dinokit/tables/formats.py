"""The formats of a table by the suffix of its name, and the files that belong to it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from dinokit.errors import UsageError
from dinokit.tables.lance import LANCE_SUFFIX, check_lance_output, must_have_lance

__all__ = ["FILE_SUFFIXES", "SUFFIXES", "WITH_ORIGIN", "beside", "check_output", "check_suffix", "files_of"]

FILE_SUFFIXES = (".parquet", ".npy", ".csv", ".jsonl")
"""Suffixes of formats that are single files and need no further package."""
SUFFIXES = (*FILE_SUFFIXES, LANCE_SUFFIX)
WITH_ORIGIN = (".parquet", LANCE_SUFFIX)
"""Formats that contain their origin; for the others, it is in a file beside the table."""


def check_suffix(output: str | os.PathLike[str]) -> str:
    """The suffix of an output's name.

    Raises:
        UsageError: it is not a suffix that dinokit writes.
        MissingExtraError: it needs a package that is not installed.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in SUFFIXES:
        near = difflib.get_close_matches(suffix, SUFFIXES, n=1, cutoff=0.6)
        problem = f"the suffix {suffix!r} is not known" if suffix else "a table's name ends in its format"
        raise UsageError(
            f"{os.fspath(output) or 'an empty name'}: {problem}; expected one of "
            + ", ".join(SUFFIXES)
            + (f". Did you mean {Path(output).with_suffix(near[0])}?" if near else "")
        )
    if suffix == LANCE_SUFFIX:
        must_have_lance()  # here, not after an hour of embedding
    return suffix


def check_output(output: str | os.PathLike[str]) -> None:
    """Raises UsageError unless a table can be written under this name: the suffix is known (:func:`check_suffix`), and
    no folder has the name; for Lance, nothing but a dataset has it."""
    if check_suffix(output) == LANCE_SUFFIX:
        check_lance_output(Path(output))
    elif Path(output).is_dir():
        raise UsageError(
            f"{os.fspath(output)} is a folder; expected the name of a table, which is a file. Choose another name, or "
            "remove the folder"
        )


def files_of(output: Path) -> list[Path]:
    """All files of a table named ``output``, itself first."""
    suffix = check_suffix(output)
    files = [output]
    if suffix not in WITH_ORIGIN:
        files.append(beside(output, ".origin.json"))
    if suffix == ".npy":
        files.append(beside(output, ".paths.csv"))
    return files


def beside(output: Path, ending: str) -> Path:
    """The name of a file that belongs to a table."""
    return output.with_name(output.name + ending)
