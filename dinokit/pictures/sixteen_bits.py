"""Levels finer than 8 bits, on a scale of 0…255, not rounded.

Pillow keeps grey pictures of 16 and 32 bits (modes I;16, I and F). From 48-bit colour it keeps only the high byte of
each value; the name of its unpacker (``RGB;16B`` or ``RGB;16L``) decides which byte counts as the high one. So the file
is decoded a second time with the other unpacker, and both together give all 16 bits. This is done for PNG and TIFF; for
other formats, and for pictures with alpha, Pillow's 8 bits remain.
"""

from __future__ import annotations

import sys
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from dinokit.errors import ImageError

__all__ = [
    "NODATA",
    "grey_levels",
    "has_finer_levels",
    "is_deep",
    "levels_beyond_8_bits",
    "mend_planes",
    "without_data",
]

# 65535 = 257 * 255: the exact inverse of how 8 bits become 16.
_STEP = np.float32(1 / 257)
# Floats made from 8 bits are this close to whole levels; a step of 16 bits is 40 times as much.
_AS_GOOD_AS_WHOLE = 1e-4
_ROWS = 64


def is_deep(mode: str) -> bool:
    """Whether Pillow's images of this mode are grey and may be finer than 8 bits."""
    return mode.startswith("I;16") or mode in ("I", "F")


def grey_levels(image: Image.Image) -> NDArray[np.float32] | NDArray[np.float64]:
    """(H, W) on a scale of 0…255, for an image whose mode :func:`is_deep`.

    16 bits are divided by 257. Integers and floats of 32 bits keep their values if these lie in 0…255; floats in 0…1
    and integers in 0…65535 are scaled; anything else is stretched from its minimum to its maximum. The levels of a TIFF
    whose zero is white are inverted, as Pillow does with 8 bits; pixels without data (GDAL's nodata) are black and do
    not affect the stretch; transparent ones are white, as everywhere.

    Raises:
        ImageError: it has NaN or infinite pixels.
    """
    values: NDArray[Any] = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (_UNSIGNED,):
        values = values.view(np.uint32)  # Pillow has signed integers only
    absent = without_data(values, tags.get(NODATA))
    levels = _scaled(image, values if absent is None else np.where(absent, _any_of(values[~absent]), values))
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    if absent is not None:
        levels[absent] = 0
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        levels[values == clear] = 255
    return levels


# TIFF 6.0, and GDAL's own tag: the number of pixels without data, as text.
_BITS, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, 1
_PHOTOMETRIC, _WHITE_IS_ZERO, NODATA = 262, 0, 42113


def without_data(values: NDArray[Any], nodata: Any) -> NDArray[np.bool_] | None:
    """Where an array is without data; None if it has data everywhere. ``nodata``: of GDAL's tag, a number as text."""
    try:
        number = float(str(nodata).strip(" \0"))
    except ValueError:
        return None
    if values.dtype.kind == "f":  # the text may have more digits than the type
        with np.errstate(over="ignore"):  # or be beyond the type's range
            absent = np.isnan(values) if np.isnan(number) else values == values.dtype.type(number)
    else:
        absent = values == number
    return absent if absent.any() else None


def _any_of(values: NDArray[Any]) -> Any:
    return values[0] if values.size else 0


def _scaled(image: Image.Image, values: NDArray[Any]) -> NDArray[np.float32] | NDArray[np.float64]:
    if image.mode.startswith("I;16"):
        return values.astype(np.float32) * _STEP
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("it has pixels that are not numbers (NaN or infinite)")
    # Pillow opens 16-bit PNG (before 11) and PGM as "I"; their range is that of the format, not of the values.
    is_16_bit = image.mode == "I" and (
        getattr(image, "format", None) in ("PNG", "PPM") or (low >= 0 and 255 < high <= 65535)
    )
    if is_16_bit:
        return values / 257
    if image.mode == "F" and low >= 0 and high <= 1:
        return values * 255
    if low < 0 or high > 255:
        return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return values


def has_finer_levels(levels: NDArray[Any]) -> bool:
    """Whether levels on a scale of 0…255 need more than 8 bits; a picture of 8 bits saved as 16 does not."""
    # The first part decides for most pictures.
    parts = np.array_split(levels, max(1, len(levels) // _ROWS))
    return any((np.abs(part - np.rint(part)) > _AS_GOOD_AS_WHOLE).any() for part in parts)


def levels_beyond_8_bits(image: Image.Image, file: IO[bytes] | None) -> NDArray[np.float32] | None:
    """Decodes a picture and returns its levels if they are finer than 8 bits.

    Args:
        image: opened; is decoded.
        file: where it was opened from; None if it was passed as an image.

    Returns:
        (H, W, 1) or (H, W, 3) float32 on a scale of 0…255, as stored, perhaps not upright; None if the picture has only
        the image's own 8 bits, or no more can be read.
    """
    swapped = _swapped(image) if file is not None else None
    image.load()
    if swapped is not None and file is not None and not image.has_transparency_data:
        high, low = np.asarray(image), _decoded_with(swapped, image.format, file)
        if np.array_equal(high, low):  # multiples of 257
            return None
        return (high.astype(np.float32) * 256 + low) * _STEP
    if is_deep(image.mode):
        levels = grey_levels(image)
        if has_finer_levels(levels):
            return levels.astype(np.float32, copy=False)[:, :, None]
    return None


_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_PLANES_OF_TIFF = ("R", "G", "B")


def _swapped(image: Image.Image) -> list[Any] | None:
    """The tiles with which Pillow unpacks the low bytes of 48-bit colour; None for other pictures."""
    tiles: list[Any] = list(getattr(image, "tile", None) or ())  # None in Pillow 10
    found = []
    for tile in tiles:
        rawmode = _rawmode(tile)
        if image.mode != "RGB" or rawmode[:-1] not in ("RGB;16", "R;16", "G;16", "B;16"):
            return None
        found.append(_with_rawmode(tile, rawmode[:-1] + _OTHER_ORDER[rawmode[-1]]))
    return found or None


def _rawmode(tile: Any) -> str:
    """Of a tile (codec, extents, offset, arguments), the first or only argument."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    codec, extents, offset, arguments = tile
    made = (codec, extents, offset, (rawmode, *arguments[1:]) if isinstance(arguments, tuple) else rawmode)
    return made if type(tile) is tuple else type(tile)(*made)  # Pillow had plain tuples before 11


def _decoded_with(tiles: list[Any], form: str | None, file: IO[bytes]) -> NDArray[np.uint8]:
    file.seek(0)
    with Image.open(file, formats=None if form is None else (form,)) as again:
        assert isinstance(again, ImageFile.ImageFile)
        again.tile = tiles
        again.load()
        return np.asarray(again)


def mend_planes(image: Image.Image) -> None:
    """Corrects how Pillow reads 16-bit uncompressed TIFFs with one plane per colour: as twice as many 8-bit pixels."""
    tiles: list[Any] = list(getattr(image, "tile", None) or ())  # None in Pillow 10
    if image.format != "TIFF" or image.mode != "RGB" or not tiles:
        return
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_BITS) == (16, 16, 16) and all(_rawmode(tile) in _PLANES_OF_TIFF for tile in tiles):
        order = "L" if tags.prefix == b"II" else "B"
        image.tile = [_with_rawmode(tile, f"{_rawmode(tile)};16{order}") for tile in tiles]  # type: ignore[attr-defined]
