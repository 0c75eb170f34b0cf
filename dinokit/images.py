"""Open any picture as one upright RGB picture.

A photograph gives the same pixels however its camera stored them: EXIF orientation, CMYK, palette, 16 bits,
alpha. Finding pictures is in ``image_files.py``.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dinokit.errors import ImageError
from dinokit.image_files import find_images

__all__ = ["decode_image", "find_images", "is_tensor", "open_image"]


def open_image(source: Any, *, least_px: int | None = None) -> Image.Image:
    """Any picture as one upright RGB Pillow image, fully decoded.

    Args:
        source: a path, an address (``https://…``, ``s3://…``), a picture in an archive (``a.tar::1.jpg``), a
            Pillow image, the bytes of an image file, a binary file object, a uint8 array (H, W, 3),
            (H, W, 4) with alpha or (H, W) grey, or a torch tensor. Tensors follow torchvision: uint8,
            channels first, (3, H, W) or (1, H, W); other layouts are refused, not guessed.
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
        raise ImageError(f"{_name_of(source)}: {error}") from error.__cause__


def decode_image(source: Any, *, least_px: int | None = None) -> Image.Image:
    """As :func:`open_image`, but the ImageError holds the reason only, without the picture's name."""
    try:
        if isinstance(source, Image.Image):
            source.load()
            return _upright_rgb(source)
        if isinstance(source, str | os.PathLike):
            found = _found_elsewhere(os.fspath(source))
            if found is not None:
                return _decode_file(io.BytesIO(found), least_px)
            with _open_file(source) as file:
                return _decode_file(file, least_px)
        if isinstance(source, bytes | bytearray | memoryview):
            return _decode_file(io.BytesIO(source), least_px)
        if isinstance(source, np.ndarray):
            return _from_array(source)
        if is_tensor(source):
            return _from_tensor(source)
        if hasattr(source, "read"):
            # The file may be a socket or at some offset; Pillow wants to seek.
            return _decode_file(io.BytesIO(source.read()), least_px)
    except ImageError:
        raise
    # Pillow's decoders raise nearly anything on damaged data: OSError, SyntaxError, struct.error, ValueError,
    # IndexError, … and MemoryError on absurd sizes. All of these mean that this one picture cannot be read.
    except Exception as error:
        raise ImageError(_reason(error)) from error
    raise ImageError(
        f"a {type(source).__name__} is not a picture; expected a path, a Pillow image, bytes, a file object, "
        "a uint8 array (H, W, 3) or a uint8 torch tensor (3, H, W)"
    )


def _found_elsewhere(text: str | bytes) -> bytes | None:
    """The bytes of a picture behind an address or inside an archive or table; None for a path to a file."""
    if not isinstance(text, str) or ("://" not in text and "::" not in text):
        return None
    from dinokit.sources import Picture, picture_named

    item = picture_named(text)
    return item.read() if isinstance(item, Picture) else None


def _open_file(path: str | os.PathLike[str]) -> IO[bytes]:
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


def _decode_file(file: IO[bytes], least_px: int | None) -> Image.Image:
    head = file.read(64)
    file.seek(0)
    if not head:
        raise ImageError("the file is empty (0 bytes)")
    try:
        try:
            image = Image.open(file, formats=_COMMON_FORMATS)
        except UnidentifiedImageError:
            Image.init()
            file.seek(0)
            others = [name for name in Image.ID if name not in _REFUSED_FORMATS]
            image = Image.open(file, formats=others)
    except UnidentifiedImageError as error:
        raise ImageError(_what_it_is_instead(head)) from error
    with image:
        if least_px is not None:  # only JPEG knows how, the other formats ignore it
            image.draft(None, (least_px, least_px))
        image.load()
        return _upright_rgb(image)


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(
            f"the array has dtype {array.dtype}, expected uint8 (0…255); convert it first, "
            "for floats in 0…1 with (255 * array).round().astype('uint8')"
        )
    if 0 in array.shape:
        raise ImageError(f"the array is empty, its shape is {array.shape}")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        return _upright_rgb(Image.fromarray(np.ascontiguousarray(array)))
    hint = "; it looks channels-first, use array.transpose(1, 2, 0)" if array.shape[0] in (1, 3, 4) else ""
    raise ImageError(f"the array has shape {array.shape}, expected (H, W, 3), (H, W, 4) or (H, W){hint}")


def is_tensor(source: object) -> bool:
    """Whether this is a torch tensor, told without importing torch."""
    return type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "detach")


def _from_tensor(tensor: Any) -> Image.Image:
    shape = tuple(tensor.shape)
    if str(tensor.dtype) != "torch.uint8":
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
    return _from_array(array[:, :, 0] if shape[0] == 1 else array)


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


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Needs a loaded image: Pillow turns TIFFs while loading, and PNG may have its EXIF after the pixels."""
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # damaged EXIF must not cost a picture whose pixels are fine
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey(_from_16_bit(np.asarray(image)))
    if mode in ("I", "F"):
        return _grey(_from_32_bit(image))
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


def _from_16_bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    # 65535 = 257 * 255: the exact inverse of how 8 bits become 16. Pillow's own convert("L") clips at 255.
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_32_bit(image: Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("it has pixels that are not numbers (NaN or infinite)")
    # Pillow gives 16-bit PNG (before 11) and PGM as "I"; there the range is the file's, not the picture's.
    is_16_bit = image.mode == "I" and (
        getattr(image, "format", None) in ("PNG", "PPM") or (low >= 0 and 255 < high <= 65535)
    )
    if is_16_bit:
        return _from_16_bit(values)
    if image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return np.rint(values).astype(np.uint8)


def _grey(values: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(values).convert("RGB")


# --------------------------------------------------------------------------------------------- reasons


def _name_of(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return str(os.fspath(source))
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if isinstance(name, str) and name else f"the picture given as {type(source).__name__}"


def _what_it_is_instead(head: bytes) -> str:
    start = head.lstrip().lower()
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim", b"heis"):
        return (
            "HEIC pictures cannot be read by Pillow alone; convert it to JPEG, or register pillow-heif first"
        )
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


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut in two by our own slice
    return True


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS or 0
        return (
            f"it claims more pixels than the limit against decompression bombs allows ({2 * limit:,}); "
            "if you trust it, make it smaller or raise PIL.Image.MAX_IMAGE_PIXELS"
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
