"""The pictures of a run: all sources that ``dinokit embed`` reads, by number and in any order.

==================================  ======================================================================
files, folders, patterns, lists     read in place; a listed file that does not exist is left out, counted
                                    and named, as a corrupt one is
``.tar``, ``.zip``                  members read in place; nothing is unpacked
Parquet                             written once as an Arrow file into the cache, and mapped
Arrow, ``save_to_disk``             mapped in place
archives at ``https://``, ``s3://``  copied once into the cache (``dinokit.sources.copies``)
Parquet there, ``hf://datasets/…``  read once, its pictures only, into an Arrow file in the cache
pictures there                      fetched again in every epoch
==================================  ======================================================================

The order of an epoch and an exact resume need a number for every picture, and several worker processes: no source
keeps a file open that two processes would share, and all can be pickled.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from dinokit.errors import DinokitError, UsageError
from dinokit.pictures.bands import is_photographic, must_read
from dinokit.pictures.image_files import suffixes_of
from dinokit.sources import Item, Picture, PictureList, search_pictures
from dinokit.sources.columns import Rows
from dinokit.sources.copies import copy_of_archive, rows_in_any_order
from dinokit.sources.names import is_address, is_parquet, split_member
from dinokit.sources.pictures import FileList, Part
from dinokit.sources.storage import addresses_opened_by

__all__ = ["TrainingPictures", "Pictures", "digest_of_names", "collect_pictures"]

_MOST_NAMES = 10_000

Tell = Callable[[str], None]


class Pictures(Protocol):
    """Encoded pictures by number."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | Path:
        """The encoded picture, or the file that has it. Raises ImageError."""
        ...

    def name(self, index: int) -> str:
        """What to call it in a message."""
        ...


class TrainingPictures:
    """Pictures of any kind that :mod:`dinokit.sources` knows."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> bytes | Path:
        item = self.items[index]
        return item.read() if isinstance(item, Picture) else item

    def name(self, index: int) -> str:
        return str(self.items[index])


def digest_of_names(pictures: Pictures) -> str:
    """Identifies these pictures in this order: SHA-256 of their names, hexadecimal.

    Only the last part of a name counts, so that a folder may be moved. Of more than 10,000 pictures, an evenly spaced
    sample is used.
    """
    step = max(1, len(pictures) // _MOST_NAMES)
    names = (os.path.basename(pictures.name(index)) for index in range(0, len(pictures), step))  # noqa: PTH119 - texts
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def collect_pictures(
    sources: Sequence[str | os.PathLike[str]],
    *,
    channels: int = 3,
    run: Path | None = None,
    warn: Tell | None = None,
    tell: Tell | None = None,
) -> TrainingPictures:
    """Collects the pictures of all sources, in their order; see the table above.

    A folder gives its picture files, or the shards in it if it has none. A source named twice counts twice.

    Args:
        sources: paths, patterns and addresses.
        channels: of the recipe: for other than 1 and 3, the pictures of folders and archives are ``.npy`` and TIFF.
        run: the run folder, which may be among the pictures: its contents were drawn by the run, and are left out.
        warn: called with each problem of a source, such as a damaged end of an archive; the rest of it is used.
        tell: called before a source is copied, which may take long.

    Raises:
        UsageError: a source does not exist, cannot be read or gives no picture at all, or can only be read in its
            own order. The message has a line for each.
        MissingExtraError: an address, or a TIFF file of many channels, needs a package that is not installed.
    """
    parts: list[PictureList] = []
    wrong: list[str] = []
    with addresses_opened_by(lambda file: copy_of_archive(file, tell)):
        for group in _groups([os.fspath(source) for source in sources], suffixes_of(channels)):
            found = search_pictures(group, channels=channels)
            usable, problems = _in_any_order(found.pictures.parts, tell)
            problems = [*found.problems, *problems]
            missing = [f"{text}: no such file" for text in group if _is_missing(text)]
            wrong += missing if usable else missing or problems
            if usable and warn is not None:
                for sentence in problems:
                    warn(sentence)
            parts.append(PictureList(usable))
    if wrong:
        raise UsageError("\n".join(wrong))
    pictures = PictureList(_outside(part, run) for found in parts for part in found.parts)
    if not len(pictures):
        raise UsageError(
            f"no pictures in {', '.join(map(str, sources))}; expected files ending in "
            f"{', '.join(sorted(suffixes_of(channels)))}, or archives, Parquet or Arrow files with such pictures"
        )
    if not is_photographic(channels):
        must_read(pictures)
    return TrainingPictures(pictures)


def _outside(part: Part, run: Path | None) -> Part:
    """The part without files in the run folder, and without the attention pictures drawn by other runs."""
    if not isinstance(part, FileList):
        return part
    whole = run.resolve() if run is not None and run.is_dir() else None
    inside: dict[str, bool] = {}  # of each folder, which may have a million files
    kept = []
    for file in (str(part[number]) for number in range(len(part))):
        folder = os.path.dirname(file)  # noqa: PTH120 - a text, which may be no path
        if folder not in inside:
            place = Path(os.path.realpath(folder))
            drawn = place.name == "attention" and (place.parent / "recipe.yaml").is_file()
            inside[folder] = drawn or (whole is not None and place.is_relative_to(whole))
        if not inside[folder]:
            kept.append(file)
    return part if len(kept) == len(part) else FileList(kept)


def _groups(sources: list[str], suffixes: frozenset[str]) -> list[list[str]]:
    """Each source by itself, so that an empty one can be named; consecutive single files together, which may be very
    many."""
    groups: list[list[str]] = []
    files_before = False
    for text in sources:
        is_file = os.path.splitext(text)[1].lower() in suffixes and os.path.isfile(text)  # noqa: PTH113, PTH122
        if is_file and files_before:
            groups[-1].append(text)
        else:
            groups.append([text])
        files_before = is_file
    return groups


def _is_missing(text: str) -> bool:
    if text == "-" or is_address(text) or os.path.lexists(text) or glob.has_magic(text):
        return False
    return split_member(text) is None and "::" not in text


def _in_any_order(parts: Sequence[Part], tell: Tell | None) -> tuple[list[Part], list[str]]:
    """The parts of a source that can be read in any order, and the problems of the others."""
    usable: list[Part] = []
    problems: list[str] = []
    for part in parts:
        first = part[0]
        container = str(first).partition("::")[0]
        try:
            if isinstance(part, Rows):
                usable.append(rows_in_any_order(part, tell) if is_parquet(container) else part)
            elif isinstance(first, Picture) and first.in_order and container.lower().endswith(("gz", "tgz")):
                problems.append(
                    f"{container} is compressed, so its pictures can only be read one after the other, and "
                    "training reads them in random order. Unpack it to a plain .tar, for instance with gunzip"
                )
            else:
                usable.append(part)
        except DinokitError as error:
            problems.append(str(error))
    return usable, problems
