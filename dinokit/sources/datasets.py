"""Hugging Face datasets as folders: which of their files hold the pictures, and which hold a split.

==============================================  ====================================================================
a folder of ``save_to_disk``                    ``state.json`` names its Arrow files; caches may be beside them
such a folder for each split                    ``dataset_dict.json`` names the splits
``data/train-00000-of-00002.parquet``           a dataset as on the Hub: the split is in the name …
``train/0000.parquet``, ``train/cat/1.jpg``     … or is the name of a folder
==============================================  ====================================================================

``FOLDER::train`` names one split. Only names and small JSON files are looked at. Source: the documentation of
huggingface/datasets ("Structure your repository", ``Dataset.save_to_disk``) and folders it has written.
"""

# ruff: noqa: PTH112, PTH113, PTH118, PTH119
# Names may be addresses, which are not paths.

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinokit.errors import UsageError
from dinokit.files.json_files import read_json
from dinokit.sources.names import is_address, split_member

__all__ = ["is_cache", "is_dataset", "of_split", "saved_files", "split_dataset", "split_of"]

# The words by which datasets recognises each split.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_KEYWORDS = {word: split for split, words in _SPLITS.items() for word in words}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5,}-of-\d{5,}")  # any split's name, as push_to_hub writes it
_WORD = re.compile(r"(?<![^\W\d_])(" + "|".join(_KEYWORDS) + r")(?![^\W\d_])", re.IGNORECASE)


def split_dataset(text: str) -> tuple[str, str] | None:
    """``hf://datasets/user/name::train`` or ``FOLDER::train`` to its two parts; None for any other name."""
    match = re.fullmatch(r"(.+)::([A-Za-z][\w.]*)", text, re.DOTALL)
    if match is None or split_member(text) is not None or os.path.lexists(text):
        return None
    return (match[1], match[2]) if is_address(match[1]) or os.path.isdir(match[1]) else None


def split_of(name: str) -> str | None:
    """The split that a file belongs to by its name, relative to the dataset; ``val`` and ``dev`` are ``validation``."""
    for part in reversed(name.split("/")):  # the file's own name takes precedence over its folders'
        shard = _SHARD.match(part)
        word = shard[1] if shard else part
        if shard and word.lower() not in _KEYWORDS:
            return word
        found = _WORD.search(word)
        if found:
            return _KEYWORDS[found[1].lower()]
    return None


def of_split(names: Sequence[str], root: str, split: str | None) -> list[str]:
    """The files of a split, in their order; all if ``split`` is None.

    Args:
        names: files below ``root``, paths or addresses.
        root: the dataset.
        split: its name; ``val`` finds ``validation``.

    Raises:
        UsageError: no file belongs to it; the message names the splits there are.
    """
    if split is None or not names:
        return list(names)
    below = len(root.rstrip("/")) + 1
    found = [split_of(name[below:].replace(os.sep, "/")) for name in names]
    kept = [name for name, other in zip(names, found, strict=True) if other == _known(split)]
    if not kept:
        raise UsageError(_no_split(root, split, sorted({other for other in found if other})))
    return kept


def _known(split: str) -> str:
    return _KEYWORDS.get(split.lower(), split)


def _no_split(root: str, split: str, there: Sequence[str]) -> str:
    if not there:
        return (
            f"{root} has no split {split!r}: no file or folder in it has the name of a split; omit ::{split}"
        )
    near = difflib.get_close_matches(split, there, n=1, cutoff=0.5)
    hint = f". Did you mean {root}::{near[0]}?" if near else ""
    return f"{root} has no split {split!r}; there are {', '.join(there)}{hint}"


def saved_files(folder: str, split: str | None = None) -> list[str] | None:
    """The Arrow files of a folder that ``save_to_disk`` wrote, in their order; None for any other folder.

    Raises:
        UsageError: there is no such split, files are missing, or rows were selected by an index, which is not read.
    """
    whole = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(whole):
        splits = _read(whole).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise UsageError(
                f"{whole} is not what save_to_disk writes; expected {{'splits': ['train', …]}}. Save it again"
            )
        if split is not None:
            wanted = [name for name in splits if name == split] or [
                name for name in splits if _known(name) == _known(split)
            ]
            if not wanted:
                raise UsageError(_no_split(folder, split, splits))
            splits = wanted
        # A split's name is a folder beside the file; any other place is ignored.
        inside = [_saved(os.path.join(folder, os.path.basename(name))) for name in splits]
        return [file for files in inside for file in files]
    if not os.path.isfile(os.path.join(folder, "state.json")) or not os.path.isfile(
        os.path.join(folder, "dataset_info.json")
    ):
        return None
    files = _saved(folder)
    if split is not None:
        own = _read(os.path.join(folder, "state.json")).get("_split")
        there = [own] if isinstance(own, str) else []
        if _known(split) not in map(_known, there):
            raise UsageError(_no_split(folder, split, there))
    return files


def _saved(folder: str) -> list[str]:
    path = os.path.join(folder, "state.json")
    if not os.path.isfile(path):
        raise UsageError(f"{path} is missing, so {folder} is incomplete; save it again with save_to_disk")
    state = _read(path)
    try:
        files = [os.path.join(folder, os.path.basename(entry["filename"])) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not what save_to_disk writes; expected '_data_files' in it. Save the dataset again"
        ) from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UsageError(
            f"{folder} was saved by an old version of datasets with rows selected by an index; save it again with "
            "flatten_indices() before save_to_disk"
        )
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UsageError(
            f"{missing[0]} is missing, one of the {len(files)} files that {path} names; copy the whole folder again"
        )
    return files


def _read(path: str) -> dict[str, Any]:
    try:
        values = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error
    return values if isinstance(values, dict) else {}


def is_cache(name: str) -> bool:
    """Whether an Arrow file is a by-product of datasets' own: results of ``map`` and selections of rows."""
    return os.path.basename(name).startswith(("cache-", "indices-", "tmp"))


def is_dataset(folder: str) -> bool:
    """Whether a folder or address is laid out as a dataset on the Hub, whose loose pictures may only illustrate it."""
    if is_address(folder):
        return folder.startswith("hf://datasets/")
    try:
        with Path(folder, "README.md").open("rb") as file:
            card = file.read(4096)
    except OSError:
        return os.path.isfile(os.path.join(folder, "dataset_infos.json"))
    return card.startswith(b"---") and re.search(rb"^(dataset_info|configs):", card, re.MULTILINE) is not None
