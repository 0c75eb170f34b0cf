"""Why a file cannot be read as a picture: what it is instead, or what a decoder's error means."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from PIL import Image, features

from dinokit.errors import ImageError
from dinokit.pictures.dicom_files import is_dicom
from dinokit.pictures.picture_limit import HOW_TO_RAISE, most_pixels

__all__ = ["is_heic", "must_be_developed", "register_heif", "what_it_is_instead", "why_unreadable"]


def what_it_is_instead(head: bytes) -> str:
    """What a file is that Pillow does not recognise, by its first bytes, and what to do with it."""
    start = head.lstrip().lower()
    if is_heic(head):
        if register_heif():
            return "a HEIC picture whose beginning is damaged"
        return "a HEIC picture, which pillow-heif reads: pip install 'dinokit[heif]'; or convert it to JPEG"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return (
            "an AVIF picture whose beginning is damaged"
            if features.check("avif")
            else "an AVIF picture, which this Pillow cannot read: pip install -U pillow; or convert it to JPEG"
        )
    if is_dicom(head):
        return (
            "a DICOM picture, which only models of 1 or 3 channels can read; save its pixels as .npy or TIFF"
        )
    if other := next((what for mark, what in _OTHER_FILES if re.match(mark, head, re.DOTALL)), None):
        return other
    if start.startswith((b"<!doctype html", b"<html")):
        return "not a picture but a web page (HTML); perhaps the download failed"
    if start.startswith((b"<svg", b"<?xml")):
        return "not a picture of pixels but XML or SVG; render it to PNG first"
    if start.startswith(b"%pdf"):
        return "not a picture but a PDF; save its pages as PNG or JPEG first"
    if start.startswith(b"version https://git-lfs"):
        return "not a picture but a Git LFS pointer; fetch the file itself with git lfs pull"
    if all(byte in b"\t\n\r" or byte >= 32 for byte in head) and _is_utf8(head):
        return "not a picture but text"
    return "not a picture in a format that Pillow reads, or its beginning is damaged"


_RAW = "a raw photograph, which is not developed here; develop it to JPEG or PNG first"
_OTHER_FILES = (
    (rb"PK\x03\x04", "not a picture but a zip archive; rename it to end in .zip to have its pictures read"),
    (
        rb"BZh|\xfd7zXZ\0|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd",
        "not a picture but a compressed file; unpack it, or pack it as .zip or .tar.gz",
    ),
    (
        rb"\x1f\x8b",
        "not a picture but a gzip file; if it is an archive, rename it to end in .tar.gz",
    ),
    (rb".{4}ftypcrx |FUJIFILMCCD-RAW|IIU\0|IIR[OS]|MMOR|FOVb", _RAW),
    (
        rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ",
        "not a picture but a video; save its frames as JPEG or PNG first",
    ),
    (rb"%!PS", "not a picture of pixels but PostScript (EPS); save it as PNG first"),
    (
        rb"\xff\x0a|\0\0\0\x0cJXL ",
        "a JPEG XL picture, which Pillow cannot read; save it as PNG or JPEG first",
    ),
)
"""How files of other kinds begin, and what to do with them."""

# TIFF 6.0, TIFF/EP and DNG 1.7.
_SUBFILE, _PHOTOMETRIC, _SUB_IFDS, _DNG_VERSION = 254, 262, 330, 50706
_REDUCED, _MOSAIC, _LINEAR = 1, 32803, 34892


def must_be_developed(tags: Mapping[int, Any]) -> None:
    """Refuses raw photographs, which are TIFF files: their first picture is a thumbnail, or a mosaic of the colours.

    Args:
        tags: of the first picture of a TIFF file.

    Raises:
        ImageError: it is one.
    """
    is_thumbnail = tags.get(_SUBFILE) == _REDUCED and _SUB_IFDS in tags
    if is_thumbnail or _DNG_VERSION in tags or tags.get(_PHOTOMETRIC) in (_MOSAIC, _LINEAR):
        raise ImageError(_RAW)


# The brands of ISO/IEC 23008-12 that phones and cameras write.
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})


def is_heic(head: bytes) -> bool:
    """Whether a file begins as a HEIC does. Some AVIF files do, too."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


def register_heif() -> bool:
    """Makes Pillow read HEIC, if pillow-heif is installed. It is imported only when the first such file is read."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return True


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut in two where the head ends
    return True


def why_unreadable(error: Exception) -> str:
    """What a decoder's error means for the picture, in words."""
    text = str(error).strip()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"it claims more pixels than the limit against decompression bombs allows ({most_pixels() or 0:,}); "
            f"{HOW_TO_RAISE}"
        )
    if isinstance(error, MemoryError):
        return "it needs more memory than is available"
    if isinstance(error, EOFError) or any(
        s in text.lower() for s in ("truncated", "not processed", "end of")
    ):
        return "the file is truncated: it ends before the picture does"
    if "<" in text or not any(c.isalpha() for c in text):  # an object's repr, or libtiff's bare number
        return "its data are damaged"
    return f"its data are damaged ({textwrap.shorten(text, _MOST_OF_A_REASON, placeholder=' …')})"


_MOST_OF_A_REASON = 150  # characters: some decoders quote the file
