"""The output folder of drawings: checks it, names its files, and writes the JSON index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinokit.errors import UsageError
from dinokit.files.outputs import must_be_drawn
from dinokit.sources.names import split_member, text_of

__all__ = ["check_folder", "file_names", "sheet_name", "write_index"]

_INDICES = {"attention.json", "pca.json"}
_LONGEST_NAME = 120  # bytes of a photograph's name that are kept for its files


def check_folder(
    folder: Path, overwrite: bool, paths: Sequence[object] = (), drawings: Sequence[str] = ()
) -> None:
    """Raises UsageError unless the folder is new, empty, or may be overwritten, which photographs in it may not.

    A folder that contains only an index counts as empty: a run in which no photograph could be read leaves it.

    Args:
        folder: to draw into.
        overwrite: whether drawings in it may be replaced.
        paths: the photographs.
        drawings: names of the pictures to write, relative to the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; expected a folder for the pictures, or the name of a new one")
    if not overwrite and folder.is_dir() and {entry.name for entry in folder.iterdir()} - _INDICES:
        raise UsageError(
            f"{folder} is not empty; choose another folder, or give --overwrite (overwrite=True) to replace "
            "files of the same names in it"
        )
    if not folder.is_dir():
        return
    here = folder.resolve()
    for path in paths:
        if isinstance(path, Path) and path.parent.resolve() == here:
            raise UsageError(f"{path} is inside {folder}; choose another folder to draw into")
    for name in (sheet_name(1), *drawings):
        must_be_drawn(folder / name)


def file_names(paths: Sequence[object]) -> list[str]:
    """A name for each photograph's files: its own without suffix and unsafe characters, numbered if it repeats.

    No name contains a separator, starts with a dot or differs from another in case only.
    """
    taken = {"con", "prn", "aux", "nul"}  # devices on Windows
    numbers: dict[str, int] = {}
    names = []
    for path in paths:
        stem = _stem(text_of(path))
        name = stem
        while name.casefold() in taken:
            numbers[stem.casefold()] = numbers.get(stem.casefold(), 1) + 1
            name = f"{stem}-{numbers[stem.casefold()]}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _stem(text: str) -> str:
    """A photograph's name without folder, suffix and unsafe characters."""
    text = re.sub(r"\.parquet::(\d+)$", r"-\1", text, flags=re.IGNORECASE)  # a row of a table has no suffix
    if member := split_member(text):
        text = member[1]
    text = text.replace("\\", "_")  # a separator on Windows, nothing special elsewhere
    stem = re.sub(r"[^\w.,()+= -]", "_", Path(text).stem)
    # contact-sheet.png.jpg must not conflict with contact-sheet.png
    stem = re.sub(r"\.(png|npy|json)$", r"_\1", stem, flags=re.IGNORECASE)
    return stem.encode()[:_LONGEST_NAME].decode(errors="ignore").strip(" .") or "photo"


def sheet_name(number: int) -> str:
    """The name of a folder's contact sheet, counted from 1."""
    return "contact-sheet.png" if number == 1 else f"contact-sheet-{number}.png"


def write_index(file: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON."""
    text = (
        json.dumps(values, indent=2, ensure_ascii=True) + "\n"
    )  # ASCII keeps undecodable bytes of file names
    file.write_text(text, encoding="utf-8")
