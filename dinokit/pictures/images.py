"""Open any picture as one upright RGB picture.

A photograph gives the same pixels however its camera stored them: EXIF orientation, CMYK, palette, 16 bits,
alpha. What is finer than 8 bits is rounded to them, or kept where that is asked for (``sixteen_bits.py``). Finding
pictures is in ``image_files.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import stat
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from dinokit.errors import ImageError
from dinokit.pictures.dicom_files import DICOM_HEAD, is_dicom, read_dicom
from dinokit.pictures.image_files import find_images
from dinokit.pictures.picture_limit import HOW_TO_RAISE, apply_variable, most_pixels
from dinokit.pictures.planes import Bands
from dinokit.pictures.sixteen_bits import (
    grey_levels,
    has_finer_levels,
    is_deep,
    levels_beyond_8_bits,
    mend_planes,
)

__all__ = [
    "Extent",
    "decode_image",
    "decode_keeping_bits",
    "decode_with_extent",
    "encoded",
    "find_images",
    "is_tensor",
    "name_of",
    "open_image",
    "open_stored",
    "why_unreadable",
]


class Extent(NamedTuple):
    """Of what an image shows all: where it was reduced while it was decoded, of a larger picture."""

    size: tuple[int, int]
    """(width, height) of the whole upright picture."""
    box: tuple[float, float, float, float]
    """Where the whole lies in the image: (left, top, right, bottom). A side that the reduction does not divide ends
    within the image's last pixel."""


def open_image(source: Any, *, least_px: int | None = None) -> Image.Image:
    """Any picture as one upright RGB Pillow image, fully decoded.

    Args:
        source: a path, an address (``https://…``, ``s3://…``), a picture in an archive (``a.tar::1.jpg``), a
            Pillow image, the bytes of an image file, a binary file object, a uint8 array (H, W, 3),
            (H, W, 4) with alpha, (H, W) or (H, W, 1) grey, or a torch tensor. Tensors follow torchvision: uint8,
            channels first, (3, H, W) or (1, H, W); other layouts are refused, not guessed. A ``.npy`` file holds an
            array (H, W, 3), (3, H, W) or (H, W) of the numbers that ``band_files.py`` lists, made 8 bits. Of a DICOM
            file, what a viewer shows first (``dicom_files.py``).
        least_px: a JPEG may come at a half, a quarter or an eighth of its size as long as neither side falls
            below this; decoding so is several times faster. None gives all pixels.

    What is done, in this order: the first frame is decoded, 16-bit grey is scaled to 8 bits (divided by
    257), transparent pixels are laid over white, everything else is converted as Pillow does, EXIF
    orientation is applied. Grey pictures of 32-bit integers or floats keep their values when these lie in
    0…255; floats in 0…1 and integers in 0…65535 are scaled; anything else is stretched from its least to
    its greatest value.

    Raises:
        ImageError: the picture cannot be read; the message names it and says why.
    """
    try:
        return decode_image(source, least_px=least_px)
    except ImageError as error:
        raise ImageError(f"{name_of(source)}: {error}") from error.__cause__


def decode_image(source: Any, *, least_px: int | None = None) -> Image.Image:
    """As :func:`open_image`, but the ImageError holds the reason only, without the picture's name."""
    return decode_with_extent(source, least_px=least_px)[0]


def decode_with_extent(source: Any, *, least_px: int | None = None) -> tuple[Image.Image, Extent]:
    """As :func:`decode_image`, with the extent of the picture, which does not come smaller."""
    image, extent = _decoded(source, least_px, keep=False)
    assert isinstance(image, Image.Image)
    return image, extent


def decode_keeping_bits(source: Any, *, least_px: int | None = None) -> tuple[Image.Image | Bands, Extent]:
    """As :func:`decode_with_extent`, but a picture that is finer than 8 bits comes as :class:`Bands` of one channel, or
    of three, float32 on the same scale of 0…255. Takes arrays and tensors of uint16, and :class:`Bands`, as well."""
    return _decoded(source, least_px, keep=True)


def _decoded(source: Any, least_px: int | None, *, keep: bool) -> tuple[Image.Image | Bands, Extent]:
    apply_variable()  # outside of the try: a wrong variable is no fault of the picture
    try:
        if isinstance(source, Image.Image):
            return _whole(_upright(source, None, keep))
        if isinstance(source, str | os.PathLike):
            found = _found_elsewhere(os.fspath(source))
            if found is not None:
                return _decode_file(io.BytesIO(found), least_px, keep)
            with _open_file(source) as file:
                return _decode_file(file, least_px, keep)
        if isinstance(source, bytes | bytearray | memoryview):
            return _decode_file(io.BytesIO(source), least_px, keep)
        if isinstance(source, np.ndarray):
            return _whole(_from_array(source, keep))
        if is_tensor(source):
            return _whole(_from_tensor(source, keep))
        if isinstance(source, Bands) and keep:
            return _whole(source)
        if hasattr(source, "read"):
            # The file may be a socket or at some offset; Pillow wants to seek.
            return _decode_file(io.BytesIO(_read(source)), least_px, keep)
    except ImageError:
        raise
    # Pillow's decoders raise nearly anything on damaged data: OSError, SyntaxError, struct.error, ValueError,
    # IndexError, … and MemoryError on absurd sizes. All of these mean that this one picture cannot be read.
    except Exception as error:
        raise ImageError(why_unreadable(error)) from error
    raise ImageError(
        f"a {type(source).__name__} is not a picture; expected a path, a Pillow image, bytes, a file object, "
        "a uint8 array (H, W, 3) or a uint8 torch tensor (3, H, W)"
    )


def encoded(source: Any) -> bytes:
    """The file of a picture as bytes: of a path, an address, a picture in an archive, bytes, or a file object.

    Raises:
        ImageError: it cannot be read, or this is nothing of these.
    """
    if isinstance(source, str | os.PathLike):
        found = _found_elsewhere(os.fspath(source))
        if found is None:
            with _open_file(source) as file:
                found = file.read()
    elif isinstance(source, bytes | bytearray | memoryview):
        found = bytes(source)
    elif hasattr(source, "read"):
        found = _read(source)
    else:
        raise ImageError(
            f"a {type(source).__name__} is not a picture; expected a path, bytes, a file object, an array or a tensor"
        )
    if not found:
        raise ImageError("the file is empty (0 bytes)")
    return found


def _read(file: Any) -> bytes:
    """From where a file object stands; from its beginning where it was read to the end already, as Pillow does."""
    data = file.read()
    if isinstance(data, str):
        raise ImageError("the file was opened as text; open it with mode 'rb'")
    if not data:
        with contextlib.suppress(AttributeError, OSError):  # that of a socket
            if file.tell():
                file.seek(0)
                data = file.read()
    return bytes(data)


def _found_elsewhere(text: str | bytes) -> bytes | None:
    """The bytes of a picture behind an address or inside an archive or table; None for a path to a file."""
    if not isinstance(text, str) or ("://" not in text and "::" not in text):
        return None
    from dinokit.sources import Picture, picture_named

    item = picture_named(text)
    return item.read() if isinstance(item, Picture) else None


def _open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    if not os.fspath(path):  # which pathlib takes for the current folder
        raise ImageError("it names no file")
    if isinstance(path, str) and "\\x" in path:  # a name in a table, which shows odd bytes so
        from dinokit.sources.names import as_on_disk

        path = as_on_disk(path)
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError("this is a folder, not a picture")
        if not stat.S_ISREG(mode):  # a pipe or device could block for ever
            raise ImageError("this is not a regular file")
        return Path(path).open("rb")
    except FileNotFoundError as error:
        dangling = Path(path).is_symlink()
        raise ImageError("the link points to no file" if dangling else "no such file") from error
    except PermissionError as error:
        raise ImageError("permission denied") from error
    except OSError as error:
        raise ImageError(f"cannot be opened ({error.strerror or error})") from error
    except ValueError as error:  # a NUL byte in the name
        raise ImageError("this is not a possible file name") from error


# What phones and cameras make is tried first: importing all of Pillow's plugins takes longer than a decode.
_COMMON_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM")
# Page descriptions: Pillow would start another program (Ghostscript) on a file of unknown origin.
_REFUSED_FORMATS = frozenset({"EPS", "WMF"})


def _decode_file(file: IO[bytes], least_px: int | None, keep: bool) -> tuple[Image.Image | Bands, Extent]:
    from dinokit.pictures.band_files import is_npy, is_tiff

    head = file.read(DICOM_HEAD)
    file.seek(0)
    if is_npy(head):
        return _whole(_from_npy(file.read(), keep))
    if is_dicom(head):
        return _whole(_from_levels(read_dicom(file), keep))
    try:
        return _decode_with_pillow(file, least_px, keep)
    except (ImageError, ValueError) as error:
        if not (is_tiff(head) and _is_unknown_to_pillow(error)):
            raise
    return _whole(_from_tiff(file, keep))


def _decode_with_pillow(
    file: IO[bytes], least_px: int | None, keep: bool
) -> tuple[Image.Image | Bands, Extent]:
    with open_stored(file) as image:
        stored = image.size
        if least_px is not None:  # only JPEG knows how, the other formats ignore it
            image.draft(None, (least_px, least_px))
        reduced = image.size != stored
        upright = _upright(image, file, keep)
        # A TIFF may have been turned while it was loaded, so the size of what is not reduced is known only now.
        return (upright, _extent(stored, image)) if reduced else _whole(upright)


def _is_unknown_to_pillow(error: Exception) -> bool:
    """Whether a file may be whole, and of a kind that Pillow does not read."""
    return isinstance(error.__cause__, UnidentifiedImageError) or "unknown raw mode" in str(error)


def _from_tiff(file: IO[bytes], keep: bool) -> Image.Image | Bands:
    """Of a TIFF that Pillow does not read: three channels not called colours, colours as floats, floats of 16 bits."""
    from dinokit.pictures.band_files import has_tiff, read_tiff

    if not has_tiff():
        raise ImageError(
            "a TIFF of a kind that Pillow does not read, or damaged; tifffile may: pip install 'dinokit[tiff]'"
        )
    file.seek(0)
    array = read_tiff(file.read(), None)
    if array.shape[2] not in (1, 3):
        raise ImageError(
            f"it has {array.shape[2]} channels, which no photograph has; a network of {array.shape[2]} channels sees it"
        )
    return _from_numbers(array, keep)


def _whole(image: Image.Image | Bands) -> tuple[Image.Image | Bands, Extent]:
    return image, Extent(image.size, (0, 0, *image.size))


# For each EXIF orientation, which stored side (left, top, right, bottom) becomes the upright left, top, right, bottom.
_SIDES = {
    2: (2, 1, 0, 3),
    3: (2, 3, 0, 1),
    4: (0, 3, 2, 1),
    5: (1, 0, 3, 2),
    6: (3, 0, 1, 2),
    7: (3, 2, 1, 0),
    8: (1, 2, 3, 0),
}


def _extent(stored: tuple[int, int], image: Image.Image) -> Extent:
    """Of an image that was reduced from ``stored`` (width, height) and is not upright yet."""
    scale = round(stored[0] / image.width)  # 2, 4 or 8: the image has as many pixels as begin in the picture
    beyond = (0.0, 0.0, image.width - stored[0] / scale, image.height - stored[1] / scale)
    sides = _SIDES.get(_orientation(image), (0, 1, 2, 3))
    left, top, right, bottom = (beyond[side] for side in sides)
    lying = sides[0] % 2 == 1
    width, height = image.size[::-1] if lying else image.size
    return Extent(stored[::-1] if lying else stored, (left, top, width - right, height - bottom))


def open_stored(file: IO[bytes]) -> Image.Image:
    """The picture in a file as Pillow opens it, before it is decoded. Raises ImageError when it is none."""
    head = file.read(DICOM_HEAD)
    file.seek(0)
    if not head:
        raise ImageError("the file is empty (0 bytes)")
    try:
        try:
            return Image.open(file, formats=_COMMON_FORMATS)
        except UnidentifiedImageError:
            Image.init()
            file.seek(0)
            others = [name for name in Image.ID if name not in _REFUSED_FORMATS]
            try:
                return Image.open(file, formats=others)
            except UnidentifiedImageError:
                # After Pillow's own formats, because an AVIF may name itself as a HEIC does.
                if not (_is_heic(head) and _register_heif()):
                    raise
                file.seek(0)
                return Image.open(file, formats=("HEIF",))
    except UnidentifiedImageError as error:
        raise ImageError(_what_it_is_instead(head)) from error


def _from_npy(data: bytes, keep: bool) -> Image.Image | Bands:
    from dinokit.pictures.band_files import read_npy

    return _from_numbers(read_npy(data), keep)


def _from_numbers(array: NDArray[Any], keep: bool) -> Image.Image | Bands:
    """Of (H, W), or of one or three channels, first or last, and any numbers that ``band_files.py`` lists."""
    from dinokit.pictures.band_files import in_levels, with_channels_last

    if array.ndim == 3 and array.size and array.shape[2] == 1:
        return _from_levels(in_levels(array), keep)
    # One row of colours is (1, W, 3), as in arrays of 8 bits; not a grey picture that is 3 pixels wide.
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[0] == 1 and array.shape[2] != 3)
    return _from_levels(in_levels(with_channels_last(array, 1 if grey else 3)), keep)


def _from_levels(levels: NDArray[np.uint8] | NDArray[np.float32], keep: bool) -> Image.Image | Bands:
    """Of (H, W), (H, W, 1) or (H, W, 3) on a scale of 0…255."""
    levels = levels if levels.ndim == 3 else levels[:, :, None]
    if levels.dtype != np.uint8:
        if keep and has_finer_levels(levels):
            return Bands.of(levels)
        levels = np.rint(levels).astype(np.uint8)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)))


def _from_array(array: NDArray[Any], keep: bool) -> Image.Image | Bands:
    if keep and array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return _from_numbers(array, keep)
    if array.dtype != np.uint8:
        expected = "uint8 (0…255) or uint16 (0…65535)" if keep else "uint8 (0…255)"
        raise ImageError(
            f"the array has dtype {array.dtype}, expected {expected}; convert it first, "
            "for floats in 0…1 with (255 * array).round().astype('uint8')"
        )
    if 0 in array.shape:
        raise ImageError(f"the array is empty, its shape is {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))
    hint = (
        "; it looks channels-first, use array.transpose(1, 2, 0)"
        if array.shape[:1] in ((1,), (3,), (4,))
        else ""
    )
    raise ImageError(
        f"the array has shape {array.shape}, expected (H, W, 3), (H, W, 4), (H, W, 1) or (H, W){hint}"
    )


def is_tensor(source: object) -> bool:
    """Whether this is a torch tensor, told without importing torch."""
    torch = sys.modules.get("torch")
    kind = getattr(torch, "Tensor", None)
    return kind is not None and isinstance(source, kind)


def _from_tensor(tensor: Any, keep: bool) -> Image.Image | Bands:
    shape = tuple(tensor.shape)
    if str(tensor.dtype) != "torch.uint8" and not (keep and str(tensor.dtype) == "torch.uint16"):
        raise ImageError(
            f"the tensor has dtype {tensor.dtype}, expected torch.uint8 (0…255); a float tensor could "
            "already be normalised. For floats in 0…1: (255 * tensor).round().to(torch.uint8)"
        )
    if 0 in shape:
        raise ImageError(f"the tensor is empty, its shape is {shape}")
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[2] in (1, 3):
        last = len(shape) == 3 and shape[2] in (1, 3)
        why = (
            (
                "; it could be read both ways, hand it over as a numpy array (H, W, 3)"
                if shape[0] in (1, 3)
                else "; it looks channels-last, use tensor.permute(2, 0, 1)"
            )
            if last
            else ""
        )
        raise ImageError(f"the tensor has shape {shape}, expected (3, H, W) or (1, H, W){why}")
    array = np.asarray(tensor.detach().cpu().permute(1, 2, 0).contiguous())
    return _from_array(array[:, :, 0] if shape[0] == 1 else array, keep)


# --------------------------------------------------------------------------------------------- pixels

_ORIENTATION_TAG = 0x0112
# EXIF 2.32, table "Orientation": what has to be done to the stored rows to see the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, file: IO[bytes] | None, keep: bool) -> Image.Image | Bands:
    """RGB, or bands where it is finer and that is to be kept. Decodes the image; ``file`` is where it lies, or None."""
    mend_planes(image)
    levels = None
    if keep:
        levels = levels_beyond_8_bits(image, file)
    else:
        image.load()
    # Known only now: Pillow turns TIFFs while loading, and PNG may have its EXIF after the pixels.
    turn = _UPRIGHT.get(_orientation(image))
    if levels is not None:
        bands = Bands.of(levels)
        return bands if turn is None else bands.transpose(turn)
    # A file that nobody else has opened: a copy of its pixels would take a third as long as decoding them.
    plain = file is not None and image.format in _COMMON_FORMATS and image.mode == "RGB"
    rgb = image if plain and not image.has_transparency_data else _to_rgb(image)
    if turn is None:
        return rgb
    upright = rgb.transpose(turn)
    upright.info = {}  # Pillow keeps the EXIF; handed over again, the picture would be turned again
    return upright


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # damaged EXIF must not cost a picture whose pixels are fine
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    return 1


# Colours that were multiplied by alpha already, and the mode in which they were not.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if is_deep(mode):  # Pillow's own convert("L") clips 16 bits at 255
        return Image.fromarray(np.rint(grey_levels(image)).astype(np.uint8)).convert("RGB")
    if mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[mode])
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if mode == "RGB":
        # A new object of class Image, so that nothing lazy or mutable of the caller's is kept.
        return image.copy() if type(image) is Image.Image else image.convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"its colour mode {mode} cannot be converted to RGB; save it as RGB") from error


# --------------------------------------------------------------------------------------------- reasons


def name_of(source: object) -> str:
    """What a message calls a picture."""
    if isinstance(source, str | os.PathLike):
        return str(os.fspath(source)) or "an empty path ('')"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if isinstance(name, str) and name else f"the picture given as {type(source).__name__}"


def _what_it_is_instead(head: bytes) -> str:
    start = head.lstrip().lower()
    if _is_heic(head):
        if _register_heif():
            return "a HEIC picture whose beginning is damaged"
        return "a HEIC picture, which pillow-heif reads: pip install 'dinokit[heif]'; or convert it to JPEG"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return (
            "an AVIF picture whose beginning is damaged"
            if features.check("avif")
            else "an AVIF picture, which this Pillow cannot read: pip install -U pillow; or convert it to JPEG"
        )
    if is_dicom(head):
        return "a DICOM picture, which only networks of 1 or 3 channels see; save its pixels as .npy or TIFF"
    if other := next((what for mark, what in _OTHER_FILES if re.match(mark, head, re.DOTALL)), None):
        return other
    if start.startswith((b"<!doctype html", b"<html")):
        return "not a picture but a web page (HTML); perhaps a download that went wrong"
    if start.startswith((b"<svg", b"<?xml")):
        return "not a picture of pixels but XML or SVG; draw it to PNG first"
    if start.startswith(b"%pdf"):
        return "not a picture but a PDF; save its pages as PNG or JPEG first"
    if start.startswith(b"version https://git-lfs"):
        return "not a picture but a Git LFS pointer; fetch the file itself with git lfs pull"
    if all(byte in b"\t\n\r" or byte >= 32 for byte in head) and _is_utf8(head):
        return "not a picture but text"
    return "not a picture in a format that Pillow reads, or its beginning is damaged"


_OTHER_FILES = (
    (rb"PK\x03\x04", "not a picture but a zip archive; with a name that ends in .zip its pictures are read"),
    (
        rb"BZh|\xfd7zXZ\0|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd",
        "not a picture but a packed file; unpack it, or pack it as .zip or .tar.gz",
    ),
    (rb"\x1f\x8b", "not a picture but a gzip file; an archive's name ends in .tar.gz"),
    (rb".{4}ftypcrx ", "a raw photograph (CR3), which Pillow does not read; develop it to JPEG or PNG first"),
    (
        rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ",
        "not a picture but a video; save its frames as JPEG or PNG first",
    ),
    (rb"%!PS", "not a picture of pixels but PostScript (EPS); save it as PNG first"),
    (
        rb"\xff\x0a|\0\0\0\x0cJXL ",
        "a JPEG XL picture, which Pillow does not read; save it as PNG or JPEG first",
    ),
)
"""How files of other kinds begin, and what to do with them."""

# The brands of ISO/IEC 23008-12 that phones and cameras write.
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})


def _is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


def _register_heif() -> bool:
    """Makes Pillow read HEIC, where pillow-heif is installed. It is imported at the first such file only."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return True


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut in two by our own slice
    return True


def why_unreadable(error: Exception) -> str:
    """In words, what a decoder's error says of the picture."""
    text = str(error).strip()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"it claims more pixels than the limit against decompression bombs allows ({most_pixels() or 0:,}); "
            f"{HOW_TO_RAISE}"
        )
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, EOFError) or any(
        s in text.lower() for s in ("truncated", "not processed", "end of")
    ):
        return "the file is truncated: it ends before the picture does"
    if "<" in text or not any(c.isalpha() for c in text):  # an object's repr, or libtiff's bare number
        return "its data are damaged"
    return f"its data are damaged ({text})"
