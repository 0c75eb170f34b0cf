"""Arrays of n channels from ``.npy`` and TIFF files: channels last, scaled to 0…255.

=======================  =========================================================
uint8                    as they are
uint16, int8, int16      scaled by the maximum of the type: 65535 becomes 255
bool                     0 and 255
floats                   must lie in 0…1, which becomes 0…255
anything else            refused: the type does not define black and white
=======================  =========================================================

Anything but uint8 becomes float32 and is not rounded: a 12-bit sensor stored in 16 bits would keep only 16 levels.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ImageError, MissingExtraError
from dinokit.files.npy_files import load_npy
from dinokit.pictures.file_kinds import must_be_developed, why_unreadable
from dinokit.pictures.picture_limit import HOW_TO_RAISE, most_pixels
from dinokit.pictures.sixteen_bits import NODATA, without_data

__all__ = [
    "guess_channels",
    "has_tiff",
    "in_levels",
    "is_npy",
    "is_tiff",
    "must_have_tiff",
    "read_npy",
    "read_tiff",
    "with_channels_last",
]

_QUIET = logging.NullHandler()  # one, since a logger takes the same handler only once

_NPY = b"\x93NUMPY"
# Little and big endian, and the same of BigTIFF.
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_npy(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a ``.npy``."""
    return head.startswith(_NPY)


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a TIFF."""
    return head.startswith(_TIFF)


def read_npy(data: bytes) -> NDArray[Any]:
    """The array in a ``.npy`` file. Objects, which need unpickling, are refused.

    Raises:
        ImageError: it is damaged, or its elements are not numbers.
    """
    try:
        array = load_npy(io.BytesIO(data))
    except (ValueError, OSError) as error:
        if "pickle" in str(error):
            raise ImageError(
                "it contains Python objects, which are not loaded; save a plain array"
            ) from error
        raise ImageError(why_unreadable(error)) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise ImageError(
            f"its elements are not real numbers but {getattr(array, 'dtype', type(array))}; save integers or floats"
        )
    return array


def has_tiff() -> bool:
    """Whether tifffile is installed."""
    return importlib.util.find_spec("tifffile") is not None


def must_have_tiff() -> None:
    """Raises MissingExtraError if tifffile is not installed."""
    if not has_tiff():
        raise MissingExtraError(
            "a TIFF file of other than 1 or 3 channels (unlike a .npy file)",
            extra="tiff",
            package="tifffile",
        )


def read_tiff(data: bytes, channels: int | None) -> NDArray[Any]:
    """The first picture of a TIFF file, (H, W, C).

    The channels may be samples per pixel, planes, or pages; of a pyramid, the full size is read. Values without data
    (GDAL's nodata) become black.

    Args:
        data: the file.
        channels: C; None takes the shorter of the first and the last axis as the channels.

    Raises:
        ImageError: it is damaged, too large, needs imagecodecs to decompress, or has another number of channels.
        MissingExtraError: tifffile is not installed.
    """
    must_have_tiff()
    import tifffile

    # Or Python would print what tifffile logs about a damaged file, which the error reports.
    logging.getLogger("tifffile").addHandler(_QUIET)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            if not file.series:
                raise ImageError("it is a TIFF file without a picture")
            tags = {tag.code: tag.value for tag in file.pages.first.tags}
            must_be_developed(tags)
            series = file.series[0]
            channels = channels or guess_channels(series.shape)
            _must_fit(series.shape, channels)
            array, axes = series.asarray(maxworkers=1), str(series.axes)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # tifffile raises nearly anything on damaged data
        if "imagecodecs" in str(error):
            raise ImageError(f"it cannot be decompressed: {error}; pip install imagecodecs") from error
        raise ImageError(why_unreadable(error)) from error
    if array.dtype.kind not in "buif":
        raise ImageError(f"its samples are not real numbers but {array.dtype}; save integers or floats")
    absent = without_data(array, tags.get(NODATA))
    if absent is not None:
        array[absent] = 0
    if array.ndim > 3:  # a Z stack or time series of one picture
        kept = [axis for axis, size in enumerate(array.shape) if size > 1]
        array, axes = array.squeeze(), "".join(axes[axis] for axis in kept)
    return with_channels_last(array, channels, axes)


def guess_channels(shape: tuple[int, ...]) -> int:
    """How many channels an array probably has, assuming that no picture is so narrow. Good enough for display."""
    return min(shape[0], shape[-1]) if len(shape) > 2 else 1


def _must_fit(shape: tuple[int, ...], channels: int) -> None:
    """Refuses what Pillow would refuse as a decompression bomb."""
    limit = most_pixels()
    if limit is not None and math.prod(shape) > limit * channels:
        raise ImageError(
            f"it claims {math.prod(shape):,} values, more than the limit against decompression bombs allows "
            f"({limit:,} pixels); {HOW_TO_RAISE}"
        )


def with_channels_last(array: NDArray[Any], channels: int, axes: str = "") -> NDArray[Any]:
    """An array (H, W, C) or (C, H, W) as (H, W, C); (H, W) has one channel.

    Args:
        array: of any type.
        channels: C.
        axes: tifffile's names, one letter each: S (samples) and C are channels.

    Raises:
        ImageError: it has another number of channels or axes, or its layout is ambiguous.
    """
    shape = array.shape
    if 0 in shape:
        raise ImageError(f"it is empty, its shape is {shape}")
    if channels == 1 and array.ndim == 2:
        return array[:, :, None]
    last = array.ndim == 3 and shape[2] == channels
    first = array.ndim == 3 and shape[0] == channels
    if first and last and len(axes) == 3:
        first, last = axes[0] in "SC", axes[2] in "SC"
    if first and last:
        raise ImageError(
            f"its shape {shape} could be (H, W, {channels}) or ({channels}, H, W); make it larger than {channels} "
            "pixels, or pass it as a torch tensor, which has the channels first"
        )
    if last:
        return array
    if first:
        return np.moveaxis(array, 0, 2)
    raise ImageError(
        f"its shape is {shape}; the model has {channels} channels, so expected (H, W, {channels}) or "
        f"({channels}, H, W)"
    )


def in_levels(array: NDArray[Any]) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Scales the values to 0…255: uint8 stays, everything else becomes float32 and is not rounded; see above.

    Raises:
        ImageError: this type has no scale, or the values are outside it.
    """
    dtype = array.dtype
    if dtype == np.uint8:
        return array
    if dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if dtype.kind in "ui":
        if dtype.itemsize > 2:
            raise ImageError(
                f"its values are {dtype}, which does not define what is white; save it as uint8 or uint16, or as "
                "floats in 0…1"
            )
        if dtype.kind == "i" and int(array.min()) < 0:
            raise ImageError(
                f"its values are {dtype} and begin at {int(array.min())}; expected 0 (black) to "
                f"{np.iinfo(dtype).max} (white). Shift them, or save it as floats in 0…1"
            )
        return array.astype(np.float32) * np.float32(255 / np.iinfo(dtype).max)
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("it has values that are NaN or infinite; replace them, for example with 0")
    if low < 0 or high > 1:
        raise ImageError(
            f"its floats lie in {low:.6g}…{high:.6g}; expected 0 (black) to 1 (white). First scale all pictures in the "
            "same way: numpy.clip((x - black) / (white - black), 0, 1)"
        )
    return array.astype(np.float32) * np.float32(255)
