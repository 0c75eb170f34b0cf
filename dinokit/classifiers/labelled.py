"""Labelled reference sets: one subfolder per class, a CSV of paths and labels, or a table of embeddings.

================================  ===========================================================
``shoes/boot/1.jpg`` …            a folder: the name of each folder inside it is a class
``labels.csv``                    columns ``path`` and ``label``; paths are relative to the CSV
``embeddings.parquet`` …          a table written by ``dinokit embed``; its labels are its column ``label``, else the
                                  names of the pictures' folders, or come from a CSV as above
================================  ===========================================================
"""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.errors import UsageError
from dinokit.pictures.image_files import is_passed_over, search_images, suffixes_of
from dinokit.sources.names import split_member, text_of
from dinokit.tables.parquet import parquet_file
from dinokit.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dinokit.sources import Item

__all__ = [
    "LabelledPictures",
    "LabelledTable",
    "find_labelled",
    "folder_of",
    "is_table",
    "must_have_classes",
    "read_labelled_table",
    "why_missing",
]

_TABLES = (".parquet", ".npy", ".jsonl", ".csv", ".lance")


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures and their labels, of equal length. ``problems``: what was left out, and why."""

    paths: Sequence[Item]
    labels: list[str]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LabelledTable:
    """Embeddings (N, D) float32, their paths and labels, and which model made them. ``problems`` as above."""

    embeddings: NDArray[np.float32]
    paths: list[str]
    labels: list[str]
    origin: dict[str, Any]
    problems: list[str] = field(default_factory=list)


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a table of embeddings, as opposed to pictures or a CSV of labels."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".lance" and path.is_dir():
        return True
    if suffix not in _TABLES or not path.is_file():
        return False
    if suffix == ".parquet":
        return _holds_embeddings(path)
    if suffix == ".npy":  # pictures of several channels are such files, too
        return path.with_name(path.name + ".paths.csv").is_file()
    if suffix != ".csv":
        return True
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return "e0" in next(csv.reader(stream), [])
    except (UnicodeDecodeError, csv.Error):
        return False


def _holds_embeddings(path: Path) -> bool:
    """Whether a Parquet file is a table of embeddings, not of pictures. What cannot be read is left to the reader."""
    try:
        with parquet_file(path) as file:
            return "embedding" in file.schema_arrow.names
    except (OSError, ValueError):
        return True


# -- pictures with labels


def find_labelled(source: str | os.PathLike[str], *, channels: int = 3) -> LabelledPictures:
    """The pictures of a folder with one subfolder per class, or of a CSV with the columns ``path`` and ``label``.

    Args:
        source: the folder or the CSV.
        channels: of the network; they determine which files in a folder are pictures.

    Raises:
        UsageError: there is no such source, it has no classes, no pictures or not these columns, or a picture has two
            labels.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folders(path, suffixes_of(channels))
    if path.suffix.lower() == ".csv" and path.is_file():
        return _from_csv(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; expected {_EXPECTED}")
    raise UsageError(f"{path} is not a reference set; expected {_EXPECTED}")


_EXPECTED = (
    "a folder with one subfolder per class, a CSV with the columns path and label, a dataset with labels (Parquet, "
    "Arrow, hf://datasets/…), or a table of dinokit embed (.parquet, .npy, .jsonl)"
)


def _from_folders(root: Path, suffixes: frozenset[str]) -> LabelledPictures:
    entries = sorted((e for e in root.iterdir() if not is_passed_over(e.name)), key=os.fsencode)
    classes = [entry for entry in entries if entry.is_dir()]
    loose = len(search_images([e for e in entries if e.is_file()]).paths)
    if not classes:
        holds = f"holds {counted(loose, 'file')} and no folders" if loose else "is empty, it has no folders"
        raise UsageError(
            f"{root} {holds}; expected one subfolder per class, for instance "
            f"{root / 'cat' / '1.jpg'} and {root / 'dog' / '2.jpg'}, or a CSV with the columns path and label"
        )
    paths: list[Path] = []
    labels: list[str] = []
    problems = (
        [f"{root}: files outside the folders of classes are left out, {counted(loose, 'file')}"]
        if loose
        else []
    )
    for folder in classes:
        found = search_images(folder, suffixes)
        paths += found.paths
        labels += [text_of(folder.name)] * len(found.paths)
        left_out = "" if found.paths else f"; the class {text_of(folder.name)!r} is left out"
        problems += [f"{problem}{left_out}" for problem in found.problems]
    if not paths:
        raise UsageError(
            "\n".join([f"{root} has {counted(len(classes), 'folder')} but no picture:", *problems])
        )
    return LabelledPictures(paths, labels, problems)


def _from_csv(path: Path) -> LabelledPictures:
    rows, problems = _read_label_csv(path)
    # Joined, not resolved: the user sees paths as written.
    return LabelledPictures([path.parent / name for name in rows], list(rows.values()), problems)


def _read_label_csv(path: Path) -> tuple[dict[str, str], list[str]]:
    """{path as written: label} in the order of the lines, and what was left out."""
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    problems: list[str] = []
    try:
        with path.open(
            newline="", encoding="utf-8-sig"
        ) as stream:  # -sig: Excel starts files with a byte order mark
            reader = csv.DictReader(
                stream, strict=True
            )  # else an open quotation mark swallows the rest of the file
            _must_have_columns(path, reader.fieldnames or [])
            for row in reader:
                name, label = (row["path"] or "").strip(), (row["label"] or "").strip()
                if not name or not label:
                    problems.append(
                        f"{path}, line {reader.line_num}: no {'label' if name else 'path'}; left out"
                    )
                elif labels.setdefault(name, label) != label:
                    raise UsageError(
                        f"{path}: {name} is {labels[name]!r} on line {lines[name]} and {label!r} on line "
                        f"{reader.line_num}; expected one label per picture; correct one of the lines"
                    )
                elif name in lines:
                    problems.append(f"{path}, line {reader.line_num}: {name} again; counted once")
                else:
                    lines[name] = reader.line_num
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected a CSV with the columns path and label") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error}); save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read as CSV ({error})") from error
    if not labels:
        raise UsageError(f"{path} names no picture with a label; expected lines such as cats/1.jpg,cat")
    return labels, problems


def _must_have_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if not missing:
        return
    found = f"its first line has the columns {', '.join(map(repr, columns))}" if columns else "it is empty"
    hint = ""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        hint = ". The columns must be separated by commas"
    else:
        near = {name: difflib.get_close_matches(name, columns, n=1, cutoff=0.5) for name in missing}
        renames = [f"{match[0]!r} to {name!r}" for name, match in near.items() if match]
        hint = f". Rename {' and '.join(renames)}?" if renames else ""
    raise UsageError(
        f"{path} lacks the column{'s' if len(missing) > 1 else ''} {' and '.join(missing)}; {found}, expected "
        f"path,label{hint}"
    )


# -- tables with labels


def read_labelled_table(
    table: str | os.PathLike[str], labels: str | os.PathLike[str] | None = None
) -> LabelledTable:
    """The rows of a table of embeddings that have a label and a vector.

    Args:
        table: written by ``dinokit embed``, in any of its formats.
        labels: a CSV with the columns ``path`` and ``label``; its paths are as in the table or relative to the CSV.
            Without it, labels come from the table's column ``label``, or if there is none, from the names of the
            pictures' folders.

    Raises:
        UsageError: no row has a label and a vector, or the CSV is not as expected.
        DinokitError: the file is not a table of embeddings.
    """
    from dinokit.neighbours.nearest import finite_rows
    from dinokit.tables.embeddings import read_embeddings

    read = read_embeddings(table)
    vectors, paths, origin = read
    problems: list[str] = []
    if labels is None and read.labels is not None:
        found = [label or "" for label in read.labels]
        missing = "has no label in the table"
    elif labels is None:
        found = [folder_of(path) for path in paths]
        missing = "lies in no named folder"
    else:
        given, problems = _read_label_csv(Path(labels))
        found = _matched(paths, given, Path(labels))
        missing = f"has no label in {labels}"
    failed: list[bool] = (~finite_rows(vectors)).tolist()
    problems += [
        f"{path}: {why_missing(table, error)}; left out"
        for path, error, bad in zip(paths, read.errors, failed, strict=True)
        if bad
    ]
    unlabelled = [
        path for path, label, bad in zip(paths, found, failed, strict=True) if not label and not bad
    ]
    if unlabelled:
        more = f" and {len(unlabelled) - 1} more" if len(unlabelled) > 1 else ""
        problems.append(f"{unlabelled[0]}{more}: {missing}; left out")
    kept = [i for i, label in enumerate(found) if label and not failed[i]]
    if not kept:
        first = f" The table's first path is {paths[0]!r}." if paths else ""
        raise UsageError(
            f"{table}: no row has both an embedding and a label.{first} Labels are the table's column label, or else "
            "the names of the pictures' folders; dinokit knn also takes a CSV with the columns path and label "
            "(--labels), its paths written as in the table or relative to the CSV"
        )
    return LabelledTable(vectors[kept], [paths[i] for i in kept], [found[i] for i in kept], origin, problems)


def why_missing(table: str | os.PathLike[str], error: str | None) -> str:
    """Why a row has no embedding, for a message. ``error``: of the row, if it is recorded."""
    return f"it has no embedding in {table}" + (f" ({error})" if error else "")


def folder_of(path: str) -> str:
    """The name of a picture's folder; for ``shard.tar::cats/1.jpg``, the folder inside the archive."""
    member = split_member(path)
    return os.path.basename(os.path.dirname(member[1] if member else path))  # noqa: PTH119, PTH120 - texts


def _matched(paths: Sequence[str], given: Mapping[str, str], source: Path) -> list[str]:
    """The label of each path in the table, empty if it has none."""
    absolute = {os.path.abspath(source.parent / name): label for name, label in given.items()}  # noqa: PTH100
    return [given.get(path) or absolute.get(os.path.abspath(path), "") for path in paths]  # noqa: PTH100


# -- checks


def must_have_classes(labels: Collection[str], source: str) -> None:
    """Raises UsageError unless there are at least two classes."""
    classes = sorted(set(labels))
    if len(classes) < 2:
        only = f"one class only, {classes[0]!r}" if classes else "no class"
        raise UsageError(
            f"{source} has {only}, so every photograph would get that label; expected at least two classes"
        )
