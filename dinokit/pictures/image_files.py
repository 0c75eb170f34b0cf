"""Find pictures: files, folders and patterns to one list of files, in the order of the arguments."""

# ruff: noqa: PTH112, PTH113, PTH116, PTH118, PTH122, PTH123, PTH206, PTH207
# os.path answers False where pathlib raises (names too long, NUL bytes); Path.glob takes no absolute pattern.

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinokit.errors import UsageError
from dinokit.wording import counted

__all__ = [
    "BAND_SUFFIXES",
    "IMAGE_SUFFIXES",
    "FolderFiles",
    "FoundImages",
    "find_images",
    "glob_files",
    "is_passed_over",
    "search_images",
    "suffixes_of",
]

# Pillow alone cannot read HEIC, DICOM and JPEG XL, but a folder must not shrink in silence: such files are found, and
# where they cannot be read each gets an error that says what to do.
_SUFFIXES = """
    .jpg .jpeg .jpe .jfif .mpo .png .apng .gif .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .jpf .jpx .avif
    .tga .psd .heic .heics .heif .hif .jxl .dcm .dicom
"""
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())

# Cameras' raw data, which nothing here develops to pictures.
_RAW = """
    .3fr .arw .cr2 .cr3 .crw .dng .erf .fff .iiq .kdc .mef .mrw .nef .nrw .orf .pef .raf .rw2 .rwl .sr2 .srf .srw .x3f
"""
_RAW_SUFFIXES = frozenset(_RAW.split())

# How many files of a folder without pictures are opened to look for DICOM.
_LOOKED_INTO = 20

# The files of pictures of other than 1 or 3 channels. Photographs beside them are taken for previews.
BAND_SUFFIXES = frozenset({".npy", ".tif", ".tiff"})


def suffixes_of(channels: int) -> frozenset[str]:
    """Which files of a folder or archive are pictures, for a network of so many channels.

    A ``.npy`` may contain anything, so for a network of photographs it counts only if it is named itself.
    """
    return IMAGE_SUFFIXES if channels in (1, 3) else BAND_SUFFIXES


@dataclass(frozen=True)
class FoundImages:
    """The result of a search; ``problems`` has a sentence for each argument with fewer pictures than expected."""

    paths: list[Path]
    problems: list[str]


def find_images(inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files, folders and glob patterns to a list of files, in the order of the arguments.

    - A file that is named is kept, whatever its suffix; named twice, it stays twice.
    - A folder is searched with its subfolders for names ending in one of ``IMAGE_SUFFIXES``, sorted by the bytes of the
      path. Hidden files and folders are skipped; links are followed, loops are cut.
    - A pattern (``*``, ``?``, ``[…]``, ``**`` for any depth) is tried if no file has that very name; its matches are
      sorted by bytes, and folders among them are searched (not with ``**``, which matches their files).

    Raises:
        UsageError: an argument does not exist, matches nothing, or is a folder without pictures, with a subfolder that
            cannot be read, or with raw photographs that were not developed. The message has a line for each.
    """
    found = search_images(inputs)
    problems = [*found.problems, *(f"{p}: no such file" for p in found.paths if not os.path.lexists(p))]
    if problems:
        raise UsageError("\n".join(problems))
    return found.paths


def search_images(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    suffixes: Container[str] = IMAGE_SUFFIXES,
) -> FoundImages:
    """As :func:`find_images`, but tolerant: a missing file stays in ``paths`` (so that it keeps its row and fails when
    opened), and a pattern or folder without pictures becomes a sentence in ``problems``.

    ``suffixes``: those of the pictures in folders."""
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    paths: list[Path] = []
    problems: list[str] = []
    for argument in inputs:
        text = os.fspath(argument)
        if os.path.isdir(text):
            inside = FolderFiles.of(text)
            found = inside.ending_in(suffixes)
            problems += inside.problems(suffixes) or ([] if found else [inside.why_empty(suffixes)])
            paths += map(Path, found)
        elif os.path.lexists(text) or not glob.has_magic(text):
            paths.append(Path(text))
        else:
            locked: list[str] = []
            matches = glob_files(text, locked.append)
            problems += locked
            if not (matches or locked):
                problems.append(f"{text}: the pattern matches no file")
            for match in matches:
                if os.path.isdir(match):
                    inside = FolderFiles.of(match)
                    problems += inside.problems(suffixes)
                    paths += map(Path, inside.ending_in(suffixes))
                else:
                    paths.append(Path(match))
    return FoundImages(paths, problems)


@dataclass(frozen=True)
class FolderFiles:
    """The visible files of a folder and its subfolders, read from the disk once."""

    folder: str
    names: list[str]
    """Their paths, in no order."""
    locked: list[str]
    """A sentence on each folder that cannot be read, which does not cost the rest."""

    @classmethod
    def of(cls, folder: str) -> FolderFiles:
        """Those of this folder."""
        locked: list[str] = []
        return cls(folder, list(_walk(folder, locked.append)), locked)

    def ending_in(self, suffixes: Container[str]) -> list[str]:
        """Those with one of these suffixes, sorted by path bytes."""
        return sorted((name for name in self.names if _suffix(name) in suffixes), key=os.fsencode)

    def problems(self, suffixes: Container[str]) -> list[str]:
        """Sentences on what is left out besides the files with one of these suffixes, which are the pictures."""
        if ".npy" in suffixes:
            return self.locked
        raw = [name for name in self.names if _suffix(name) in _RAW_SUFFIXES]
        if raw:  # cameras write both on request
            developed = {os.path.splitext(name)[0] for name in self.names if _suffix(name) in suffixes}
            raw = [name for name in raw if os.path.splitext(name)[0] not in developed]
        if not raw:
            return self.locked
        kinds = ", ".join(sorted(set(map(_suffix, raw))))
        return [
            *self.locked,
            f"{self.folder}: left out {counted(len(raw), 'raw photograph')} ({kinds}) without a developed picture of "
            f"the same name; develop them to JPEG or PNG, or name the others, as '{self._pattern('*.jpg')}'",
        ]

    def why_empty(self, suffixes: Container[str]) -> str:
        """A sentence on why no file has one of these suffixes."""
        others = len(self.names)
        only = f"only {counted(others, 'file')} with other suffixes"
        if others and ".npy" in suffixes:
            return f"{self.folder}: no .npy or TIFF files in this folder, as pictures of many channels are; {only}"
        if any(_suffix(name) == ".npy" for name in self.names):
            return (
                f"{self.folder}: no pictures in this folder, but .npy files, which may hold anything; name them, as "
                f"'{self._pattern('*.npy')}', or use a model of their channels (when training, "
                "--channels)"
            )
        if any(map(_is_dicom, self.names[:_LOOKED_INTO])):
            return (
                f"{self.folder}: no pictures with a known suffix in this folder, but DICOM files without one; name "
                f"them, as '{self._pattern('*')}'"
            )
        if others:
            return f"{self.folder}: no pictures in this folder, {only}"
        return f"{self.folder}: no pictures in this folder; it is empty"

    def _pattern(self, name: str) -> str:
        return os.path.join(self.folder, _DEEP, name)


def _walk(
    folder: str, report: Callable[[str], None] = lambda _: None, *, hidden: bool = False
) -> Iterator[str]:
    """Every file in a folder and its subfolders, in no order; hidden ones only on request. Links are followed."""
    # Not recursive: a path may have more folders than Python's stack allows calls. Each comes with (device, inode) of
    # the folders it is in.
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, ())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(folder)
            here = (status.st_dev, status.st_ino)
            if here in above:  # a link to a folder that it is in
                continue
            entries = list(os.scandir(folder))
        except OSError as error:
            report(f"{folder}: the folder cannot be read ({(error.strerror or str(error)).lower()})")
            continue
        for entry in entries:
            if is_passed_over(entry.name) and not (hidden and entry.name.startswith(".")):
                continue
            if _is_folder(entry):
                waiting.append((entry.path, (*above, here)))
            else:
                yield entry.path


def is_passed_over(name: str) -> bool:
    """Whether a file or folder of this name is skipped: hidden, or the system's at the top of a disk."""
    return name.startswith(".") or name == "lost+found"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link to itself; the reason is reported when it is read
        return False


def glob_files(pattern: str, report: Callable[[str], None] = lambda _: None) -> list[str]:
    """The files and folders that a pattern matches, as :mod:`glob` does, sorted by path bytes.

    With ``**``, which matches in all subfolders: only files, and loops of links are cut, which glob follows 40 times.
    ``report`` gets a sentence for each folder that cannot be read.
    """
    parts = pattern.replace(os.altsep or os.sep, os.sep).split(os.sep)
    if _DEEP not in parts:
        return sorted(glob.glob(pattern), key=os.fsencode)
    at = parts.index(_DEEP)
    above = os.sep.join([*parts[:at], ""])
    below = [part for part in parts[at:] if part]
    hidden = any(part.startswith(".") for part in below)
    matches = set()  # a set, since one folder above may be in another
    for root in glob.glob(above) if glob.has_magic(above) else [above]:
        start = len(root or _HERE)
        files = (root + file[start:] for file in _walk(root or _HERE, report, hidden=hidden))
        matches |= {file for file in files if _fits(file[len(root) :].split(os.sep), below)}
    return sorted(matches, key=os.fsencode)


_HERE = os.path.join(os.curdir, "")
_DEEP = "**"


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the folders and the name of a file match the parts of a pattern; ``**`` matches any number of folders."""
    if _DEEP not in patterns:
        return len(names) == len(patterns) and all(map(_fits_name, names, patterns))
    at = patterns.index(_DEEP)
    below = patterns[at + 1 :] or ["*"]  # at the end, every file
    starts = range(at, len(names)) if _DEEP in below else range(max(at, len(names) - len(below)), len(names))
    return _fits(names[:at], patterns[:at]) and any(
        _fits(names[start:], below)
        for start in starts
        if not any(name.startswith(".") for name in names[at:start])
    )


def _fits_name(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) and (pattern[0] == "." or name[0] != ".")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_dicom(file: str) -> bool:
    from dinokit.pictures.dicom_files import DICOM_HEAD, is_dicom

    try:
        if not os.path.isfile(file):  # a pipe would be waited for
            return False
        with open(file, "rb") as opened:
            return is_dicom(opened.read(DICOM_HEAD))
    except OSError:
        return False
