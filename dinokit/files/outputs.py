"""Output files: a check before the work whether they can be written, and files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dinokit.errors import DinokitError, UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "atomic",
    "atomic_folder",
    "atomic_together",
    "must_be_drawn",
    "must_be_writable",
    "save_picture",
]

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SOFTWARE, _NAME = 305, "dinokit"
"""The EXIF tag for the software that wrote a picture, and its value in drawings."""


def must_be_writable(output: str | os.PathLike[str]) -> None:
    """Tries to write in the folder of a future file, or in the nearest existing folder above it.

    Missing folders are not created here but with the file, so that a command that fails leaves none behind.

    Raises:
        DinokitError: nothing can be written there; the message says why.
    """
    folder = Path(output).parent
    try:
        folder = next(parent for parent in Path(output).absolute().parents if parent.exists())
        # Only an attempt is certain: permissions do not apply to root and do not show that a disk is read-only.
        with tempfile.TemporaryFile(dir=folder, prefix=".dinokit-"):
            pass
    except OSError as error:
        raise DinokitError(
            f"{output} cannot be written: no file can be made in {folder} ({error.strerror or error}); choose another "
            "place"
        ) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write to; the file becomes ``path`` when the block ends without an error.

    An OSError from inside that names no file, such as that of a full disk, gets the name of this one.
    """
    with atomic_together([path]) as (temporary,):
        yield temporary


@contextmanager
def atomic_together(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """As :func:`atomic`, for files that belong together: none is replaced until all are written.

    The last file vouches for the others. The old one goes before the first rename and the new one comes last, so that
    it is never beside files of another run, even if the process is killed between two renames.
    """
    # Processes on several machines may write here, and every container counts its processes from 1.
    temporaries = [p.with_name(f".{p.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp") for p in paths]
    voucher, old = paths[-1], temporaries[-1].with_suffix(".old")
    try:
        yield temporaries
        if len(paths) > 1 and voucher.exists():
            voucher.replace(old)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
            old.unlink(missing_ok=True)
    except OSError as error:
        of = {None: paths[0]} | {str(t): path for t, path in zip(temporaries, paths, strict=True)}
        if error.errno is not None and error.filename in of:
            raise type(error)(error.errno, error.strerror, str(of[error.filename])) from error
        raise
    finally:
        if old.exists():  # nothing was replaced
            old.replace(voucher)
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary name for a new folder, which becomes ``path`` when the block ends without an error.

    An existing folder is then removed; if ``path`` is a link, it stays and the folder behind it is replaced.

    If the block or the renaming fails, the old folder is restored. An empty folder is not replaced but filled:
    a disk or a container's volume may be mounted there, or it may be the working directory.

    Raises:
        UsageError: a disk with files on it is mounted there.
    """
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp: its folders can be read only by their owner, and this one stays.
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    if path.is_dir() and not any(path.iterdir()):
        yield from _filled(path, path / f".new-{mark}")
        return
    if path.is_mount():
        raise UsageError(f"{path} is a mount point and cannot be replaced; name a folder inside it")
    new, old = (path.with_name(f".{path.name}.{what}-{mark}") for what in ("new", "old"))
    try:
        yield new
        if path.exists():  # a folder with files in it cannot be replaced in one step
            path.replace(old)
        new.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _filled(path: Path, new: Path) -> Iterator[Path]:
    """As :func:`atomic_folder` of an empty folder."""
    try:
        yield new
        # config.json marks a model folder, so it comes last.
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == "config.json"):
            entry.replace(path / entry.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Saves a picture as .png, .jpg or .webp, whole or not at all, with dinokit's mark."""
    from PIL import Image

    mark = Image.Exif()
    mark[_SOFTWARE] = _NAME
    with atomic(path) as file:
        picture.save(file, _FORMATS[path.suffix.lower()], exif=mark)


def must_be_drawn(path: Path) -> None:
    """Raises UsageError if a file exists that :func:`save_picture` has not written: ``--overwrite`` replaces drawings
    but not photographs."""
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        return
    try:
        with Image.open(path) as picture:
            is_drawn = picture.getexif().get(_SOFTWARE) == _NAME
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        is_drawn = False
    if not is_drawn:
        raise UsageError(
            f"{path} exists and was not drawn by dinokit, so it is not replaced. Choose another name, or remove it"
        )
