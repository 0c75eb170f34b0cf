"""Resolves the inputs that a user names to one list of pictures, in the order of the inputs.

===========================  ==========================================================================
a file                       that picture
a folder                     its pictures, including those in subfolders, sorted by path bytes; if it has
                             none, the archives, Parquet and Arrow files in it
a Hugging Face dataset       a folder of ``save_to_disk``, or one laid out as on the Hub (``datasets.py``)
``DATASET::train``           one split of it
a pattern                    ``photos/**/*.jpg``: what it matches, sorted by path bytes
``.tar .tar.gz .tgz .zip``   the pictures inside, in the archive's order, named ``ARCHIVE::MEMBER``
``ARCHIVE::MEMBER``          that one picture
``.parquet``                 a column of pictures, named ``FILE::ROW``, or else a column of paths
``.arrow``                   a column of pictures, named ``FILE::ROW``
``.txt .lst .csv .tsv``      the pictures they name: one path per line, or a column ``path``, ``file``, ``image``
``-``                        paths on standard input, one per line or separated by NUL
``https://…``                that picture
``s3://… gs://… hf://…``     a file, folder, pattern, archive, table or list there, through fsspec
===========================  ==========================================================================

Nothing is unpacked, and only lists and tables of contents are read. Which files of a folder or archive count as
pictures depends on the channels of the network (:func:`dinokit.pictures.image_files.suffixes_of`); a file that is named
directly is taken whatever its suffix.
"""

# ruff: noqa: PTH112, PTH113, PTH120
# os.path answers False where pathlib raises (names too long, NUL bytes).

from __future__ import annotations

import functools
import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dinokit.errors import ImageError, MissingExtraError, UsageError
from dinokit.pictures.image_files import FolderFiles, glob_files, suffixes_of
from dinokit.pictures.picture_bytes import encoded
from dinokit.sources.addresses import ListedAddresses, address_of
from dinokit.sources.archives import archive_of
from dinokit.sources.arrow_files import arrow_of
from dinokit.sources.columns import parquet_of
from dinokit.sources.datasets import is_cache, is_dataset, of_split, saved_files, split_dataset
from dinokit.sources.lists import beside, exists, read_list, read_stdin
from dinokit.sources.names import (
    PICTURE_SUFFIXES,
    as_on_disk,
    is_address,
    is_archive,
    is_arrow,
    is_container,
    is_parquet,
    is_picture_name,
    is_shard,
    is_web,
    split_member,
    without_password,
)
from dinokit.sources.pictures import (
    FileList,
    Item,
    Part,
    Picture,
    PictureList,
    StandIn,
    TextList,
    is_there,
)
from dinokit.sources.storage import LocalFile, Storage, filesystem_of, retried, storage_of

__all__ = ["FoundPictures", "find_pictures", "is_collection", "picture_named", "search_pictures"]

T = TypeVar("T")
Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True)
class FoundPictures:
    """The result of a search. ``problems`` has one sentence per input with no pictures, or fewer than expected."""

    pictures: PictureList
    problems: list[str]


def find_pictures(inputs: Inputs, *, channels: int = 3) -> PictureList:
    """The pictures of all inputs, in their order; see the table above. ``channels``: of the network.

    Raises:
        UsageError: an input does not exist, cannot be read or holds no picture. The message has one line per input.
        MissingExtraError: an address needs a package that is not installed.
    """
    found = search_pictures(inputs, channels=channels)
    missing = [f"{item}: no such file" for item in found.pictures if not is_there(item)]
    if found.problems or missing:
        raise UsageError("\n".join([*found.problems, *missing]))
    return found.pictures


def search_pictures(inputs: Inputs, *, channels: int = 3) -> FoundPictures:
    """As :func:`find_pictures`, but tolerant: a missing file stays in the list (it keeps its row and fails when read),
    and an input without pictures becomes a sentence in ``problems``."""
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    open_one = functools.partial(_parts_of, suffixes=suffixes_of(channels))
    parts, problems = _gather([os.fspath(argument) for argument in inputs], open_one)
    return FoundPictures(PictureList(_joined(parts)), problems)


def is_collection(text: str | os.PathLike[str]) -> bool:
    """Whether an input may contain several pictures, even if it happens to have only one."""
    text = os.fspath(text)
    if split_member(text) and not os.path.lexists(text):
        return False
    if split_dataset(text):
        return True
    if is_address(text):
        return is_container(_target(text)) or not (is_web(text) or is_picture_name(_target(text)))
    if os.path.isdir(text) or text == "-":
        return True
    if os.path.lexists(text):
        return is_container(text)
    return glob.has_magic(text)


def picture_named(name: str) -> Item:
    """The picture of a row, by its path in the table: a file, ``ARCHIVE::MEMBER``, ``TABLE::ROW`` or an address.

    Raises:
        ImageError: the archive or table cannot be read, or has no such picture.
    """
    name = as_on_disk(name)
    if os.path.lexists(name):
        return Path(name)
    split = split_member(name)
    if split is not None:
        return _member(*split)
    return address_of(name) if is_address(name) else Path(name)


# -- one input


def _parts_of(text: str, suffixes: frozenset[str]) -> tuple[list[Part], list[str]]:
    if not text:  # an unset variable in a script; as a path it would mean the current folder
        return [], ["an empty name was given; expected a file, a folder or a pattern"]
    text = as_on_disk(text)
    if text == "-":
        listed = read_stdin()
        return [_Named(listed)], [] if listed else [
            "standard input does not name any picture; expected one path per line"
        ]
    named = split_dataset(text)
    if named is not None:
        return (
            _parts_at(*named, suffixes=suffixes) if is_address(text) else _parts_in(*named, suffixes=suffixes)
        )
    if is_address(text):
        return _parts_at(text, suffixes=suffixes)
    if os.path.isdir(text):
        return _parts_in(text, suffixes=suffixes)
    if os.path.isfile(text) and is_container(text):
        return _contents(LocalFile(text), os.path.dirname(text), suffixes)
    if split_member(text) and not os.path.lexists(text):
        return [_Named([text])], []
    if os.path.lexists(text) or not glob.has_magic(text):
        return [FileList([text])], []
    locked: list[str] = []
    matches = glob_files(text, locked.append)
    if not matches:
        return [], locked or [f"{text}: the pattern matches no file"]
    parts, problems = _gather(matches, functools.partial(_parts_of, suffixes=suffixes))
    return parts, [*locked, *problems]


def _gather(
    names: Iterable[str], open_one: Callable[[str], tuple[list[Part], list[str]]]
) -> tuple[list[Part], list[str]]:
    """The parts of several inputs; an unreadable one does not stop the others."""
    parts: list[Part] = []
    problems: list[str] = []
    for name in names:
        try:
            found, sentences = open_one(name)
        except (UsageError, MissingExtraError) as error:
            text, shown = str(error), without_password(name)
            found, sentences = [], [text if shown in text else f"{shown}: {text}"]
        except OSError as error:
            found, sentences = [], [f"{name}: cannot be opened ({error.strerror or error})"]
        parts += found
        problems += sentences
    return parts, problems


def _parts_in(
    folder: str, split: str | None = None, *, suffixes: frozenset[str]
) -> tuple[list[Part], list[str]]:
    saved = saved_files(folder, split)
    if saved is not None:
        return _gather(saved, lambda name: _contents(LocalFile(name), "", suffixes))
    files = FolderFiles.of(folder)
    # Only the last part of a suffix counts: .gz for .tar.gz.
    shards = files.ending_in({".tar", ".gz", ".tgz", ".zip", ".parquet", ".arrow"})
    found = _chosen(
        folder,
        split,
        files.ending_in(suffixes),
        [name for name in shards if is_shard(name)],
        FileList,
        lambda name: _shard(LocalFile(name), suffixes),
    )
    if found is None:
        return [], files.problems(suffixes) or [files.why_empty(suffixes)]
    parts, problems = found
    return parts, [*files.problems(suffixes), *problems]


def _chosen(
    root: str,
    split: str | None,
    pictures: list[str],
    shards: list[str],
    listed: Callable[[list[str]], Part],
    open_shard: Callable[[str], tuple[list[Part], list[str]]],
) -> tuple[list[Part], list[str]] | None:
    """The pictures, or else the contents of the shards. In a Hugging Face dataset the shards come first, since its
    loose pictures may belong to its card. None if there are neither."""
    shards = [name for name in shards if not (is_arrow(name) and is_cache(name))]
    if pictures and not (shards and is_dataset(root)):
        return [listed(of_split(pictures, root, split))], []
    parts, problems = _gather(of_split(shards, root, split), open_shard)
    if parts or problems or not pictures:
        return (parts, problems) if parts or problems else None
    return [listed(of_split(pictures, root, split))], []


def _shard(storage: Storage, suffixes: frozenset[str]) -> tuple[list[Part], list[str]]:
    """An archive or a table found in a folder, where a table without pictures is not an error."""
    if is_parquet(storage.name):
        part, _, _ = parquet_of(storage, pictures_only=True)
        return ([part] if part is not None else []), []
    if is_arrow(storage.name):
        part = arrow_of(storage, pictures_only=True)
        return ([part] if part is not None else []), []
    return _contents(storage, "", suffixes)


def _contents(storage: Storage, folder: str, suffixes: frozenset[str]) -> tuple[list[Part], list[str]]:
    """The pictures in a container file; paths in a list are relative to ``folder``."""
    if is_archive(storage.name):
        part, problem = archive_of(storage, suffixes)
        problems = [problem] if problem else []
        if not len(part) and not problem:
            problems = [f"{storage.name}: the archive contains no pictures"]
        return [part], problems
    if is_arrow(storage.name):
        rows = arrow_of(storage)
        assert rows is not None  # else it has raised
        return [rows], [] if len(rows) else [f"{storage.name}: the table has no rows"]
    if is_parquet(storage.name):
        rows, listed, labels = parquet_of(storage)
        if rows is not None:
            return [rows], [] if len(rows) else [f"{storage.name}: the table has no rows"]
        if not listed:
            return [], [f"{storage.name}: the table does not name any picture"]
    else:
        listed, labels = read_list(storage)
    placed = beside(listed, folder)
    if not any(is_address(text) or exists(text) for text in placed):
        return [], [
            f"{storage.name} was read as a list of pictures, but none of its {len(placed)} lines names a file; "
            f"the first is {listed[0][:100]!r}. Expected paths, relative to the list or to the current folder"
        ]
    return [_Named(placed, labels)], []


def _parts_at(
    address: str, split: str | None = None, *, suffixes: frozenset[str]
) -> tuple[list[Part], list[str]]:
    if split_member(address):
        return [_Named([address])], []
    magic = glob.has_magic(address) and not is_web(address)  # the ? of a query is not a pattern
    if is_web(address) and "?" in address and is_container(_target(address)):
        return [], [
            f"{without_password(address)}: archives, tables and lists are not read at addresses with a query (?…), "
            "which would become part of each picture's name; leave the query out, or download the file first"
        ]
    if is_container(_target(address)) and not magic:
        storage = storage_of(address)
        return _ask(address, lambda: _contents(storage, address.rpartition("/")[0], suffixes))
    if is_web(address) or (is_picture_name(_target(address)) and not magic):
        return [_Named([address])], []
    filesystem, path = filesystem_of(address)
    if magic:
        listing = _ask(address, lambda: filesystem.glob(path, detail=True))
        above = re.split(r"[*?\[]", path)[0]
        if path.lower().endswith(".npy"):  # the suffix was named
            suffixes = PICTURE_SUFFIXES
        return _listed(address, filesystem, listing, above, suffixes=suffixes)
    if _ask(address, lambda: filesystem.isdir(path)):
        listing = _ask(address, lambda: filesystem.find(path, detail=True))
        return _listed(address, filesystem, listing, path, split, suffixes=suffixes)
    if address.startswith("hf://datasets/") and not is_picture_name(_target(address)):
        _ask(address, lambda: filesystem.ls(path))  # isdir returns False for any error; ls raises it
        return [], [f"{address}: no such dataset or folder"]
    return [_Named([address])], []


def _listed(
    address: str,
    filesystem: Any,
    listing: dict[str, dict[str, Any]],
    above: str,
    split: str | None = None,
    *,
    suffixes: frozenset[str],
) -> tuple[list[Part], list[str]]:
    """The pictures of a remote listing by path bytes, or its shards; hidden files below ``above`` are skipped."""
    _, chain, target = address.partition("::")  # zip://*.jpg::s3://bucket/a.zip
    files = {
        filesystem.unstrip_protocol(path) + chain + target: info
        for path, info in listing.items()
        if info.get("type") != "directory" and "/." not in path.removeprefix(above)
    }
    names = sorted(files, key=os.fsencode)
    root = filesystem.unstrip_protocol(above) + chain + target
    found = _chosen(
        root,
        split,
        [name for name in names if is_picture_name(_target(name), suffixes)],
        [name for name in names if is_shard(name)],
        lambda chosen: ListedAddresses((name, files[name]) for name in chosen),
        lambda name: _ask(name, lambda: _shard(storage_of(name), suffixes)),
    )
    return found or ([], [f"{address}: no pictures found{_converted(address)}"])


def _converted(address: str) -> str:
    """Hint at the Hub's Parquet conversion of a dataset in another format (JSON, a script)."""
    match = re.match(r"hf://datasets/[^/@]+/[^/@]+", address)
    return f". The Hub's own conversion to Parquet may be at {match[0]}@~parquet" if match else ""


def _ask(address: str, question: Callable[[], T]) -> T:
    """Asks a remote file system; any error there becomes a UsageError, temporary ones after three tries."""
    try:
        return retried(question)
    except (UsageError, MissingExtraError):
        raise
    except Exception as error:  # every file system has its own errors
        shown, reason = without_password(address), str(error)
        if isinstance(error, FileNotFoundError) and reason.strip("/") in address:  # it only repeats the name
            raise UsageError(f"{shown}: no such file or folder") from error
        reason = reason.replace(address, shown)
        raise UsageError(f"{shown} cannot be read ({type(error).__name__}: {reason})") from error


# -- names


def _target(address: str) -> str:
    """The part of an address that ends in the file's suffix: a web address without its query; of fsspec's chains the
    first, ``zip://1.jpg`` of ``zip://1.jpg::s3://bucket/a.zip``."""
    return address.partition("?")[0] if is_web(address) else address.partition("::")[0]


def _member(container: str, member: str) -> Item:
    storage = storage_of(container)
    try:
        part, numbers = _opened(container, storage.state())
    except OSError as error:
        raise ImageError(f"{container} cannot be opened ({error.strerror or error})") from error
    except (UsageError, MissingExtraError) as error:
        raise ImageError(str(error)) from error
    if member not in numbers:
        raise ImageError(f"{container} has no picture with this name")
    return part[numbers[member]]


@functools.lru_cache(maxsize=8)
def _opened(container: str, state: str) -> tuple[Part, dict[str, int]]:
    """The pictures of an archive or table, and their numbers by name. ``state`` invalidates the cache on changes."""
    storage = storage_of(container)
    if is_arrow(container):
        arrow = arrow_of(storage)
        assert arrow is not None  # else it has raised
        return arrow, {str(number): number for number in range(len(arrow))}
    if is_parquet(container):
        rows, _, _ = parquet_of(storage)
        if rows is None:
            raise UsageError(f"{container} contains paths, not pictures")
        return rows, {str(number): number for number in range(len(rows))}
    part, _ = archive_of(storage, PICTURE_SUFFIXES)
    start = len(container) + 2
    return part, {str(part[number])[start:]: number for number in range(len(part))}


@dataclass(frozen=True)
class _Unreadable(Picture):
    """Stands in for a picture that could not be found."""

    name: str
    reason: str

    def read(self) -> bytes:
        raise ImageError(self.reason)

    def state(self) -> str:
        return "missing"

    def changed_at(self) -> float | None:
        return None


@dataclass(frozen=True)
class _Labelled(StandIn):
    """A picture of a list with labels."""

    text: str | None

    @property
    def in_order(self) -> bool:  # type: ignore[override]
        return isinstance(self.item, Picture) and self.item.in_order

    @property
    def label(self) -> str | None:
        return self.text

    def read(self) -> bytes:
        return encoded(self.item) if isinstance(self.item, Path) else self.item.read()


class _Named:
    """Pictures by their names.

    Args:
        names: paths, addresses, members of archives.
        labels: one per picture; None if it has none.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[str | None] | None = None) -> None:
        self._names = TextList(names)
        self._labels = [label and sys.intern(label) for label in labels] if labels and any(labels) else None

    @property
    def labelled(self) -> bool:
        """Whether its pictures have labels."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int, /) -> Item:
        name = self._names[index]
        try:
            item = picture_named(name)
        except ImageError as error:
            item = _Unreadable(name, str(error))
        return _Labelled(item, self._labels[index]) if self._labels else item


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Merges single files into one list, so that a million named files do not become a million lists."""
    joined: list[Part] = []
    run: list[str] = []
    for part in parts:
        if isinstance(part, FileList) and len(part) == 1:
            run.append(str(part[0]))
            continue
        if run:
            joined.append(FileList(run))
            run = []
        joined.append(part)
    return [*joined, FileList(run)] if run else joined
