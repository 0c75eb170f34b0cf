"""Pictures of n channels, from satellites, microscopes and other cameras that record more, or less, than RGB.

Such a picture is a stack of grey Pillow images. Every operation is applied to each of them, so that each channel is
exactly what Pillow would make of a grey picture; 8 bits stay 8 bits, everything finer is float32.

A network of 1 or 3 channels takes photographs as Pillow images (``images.py``), and those with more than 8 bits as
:class:`Bands`, converted to grey or repeated to three channels as needed. For any other number of channels nothing is
converted: a picture must have the channels of the network.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.errors import ImageError
from dinokit.pictures.band_files import (
    has_tiff,
    in_levels,
    is_npy,
    is_tiff,
    must_have_tiff,
    read_npy,
    read_tiff,
    with_channels_last,
)
from dinokit.pictures.file_kinds import why_unreadable
from dinokit.pictures.images import Extent, decode_keeping_bits, is_tensor, open_stored
from dinokit.pictures.picture_bytes import encoded, naming
from dinokit.pictures.picture_limit import apply_variable
from dinokit.pictures.planes import Bands

__all__ = [
    "Bands",
    "decode_bands",
    "decode_picture",
    "decode_picture_with_extent",
    "is_photographic",
    "must_read",
    "open_picture",
]


def is_photographic(channels: int) -> bool:
    """Whether a network of this many channels takes photographs, in colour or grey; others take separate channels."""
    return channels in (1, 3)


def open_picture(source: Any, channels: int) -> Image.Image | Bands:
    """One picture for a network of this many channels: for 1 and 3 upright RGB, or, if it is finer than 8 bits,
    :class:`Bands`; for other numbers always :class:`Bands`.

    Args:
        source: what :func:`dinokit.pictures.images.open_image` takes, also arrays and tensors of uint16; for other
            numbers of channels also ``.npy`` and TIFF files, arrays (H, W, C) or (C, H, W) and tensors (C, H, W) of
            the types that ``band_files.py`` lists.
        channels: C.

    Raises:
        ImageError: it cannot be read, or has another number of channels; the message names it and says why.
        MissingExtraError: it is a TIFF file, and tifffile is not installed.
    """
    with naming(source):
        return decode_picture(source, channels)


def decode_picture(source: Any, channels: int, *, least_px: int | None = None) -> Image.Image | Bands:
    """As :func:`open_picture`, but the ImageError contains only the reason. ``least_px`` as for photographs."""
    return decode_picture_with_extent(source, channels, least_px=least_px)[0]


def decode_picture_with_extent(
    source: Any, channels: int, *, least_px: int | None = None
) -> tuple[Image.Image | Bands, Extent]:
    """As :func:`decode_picture`, with the extent of the full picture, whatever size it was decoded at."""
    if not is_photographic(channels):
        bands = decode_bands(source, channels)
    else:
        picture, extent = decode_keeping_bits(source, least_px=least_px)
        if isinstance(picture, Image.Image):
            return picture, extent
        bands = picture.for_photographs(channels)
    return bands, Extent(bands.size, (0, 0, *bands.size))


def decode_bands(source: Any, channels: int) -> Bands:
    """As :func:`decode_picture`, whatever the number of channels.

    Files other than ``.npy`` and TIFF are read by Pillow, for 2 and 4 channels (grey or RGB, and alpha); only these
    have an EXIF orientation.
    """
    apply_variable()
    try:
        if isinstance(source, Bands):
            return _checked(source, channels)
        if isinstance(source, Image.Image):
            source.load()
            return _of_pillow(source, channels)
        if isinstance(source, np.ndarray):
            return Bands.of(in_levels(with_channels_last(source, channels)))
        if is_tensor(source):
            return Bands.of(in_levels(_of_tensor(source, channels)))
        data = encoded(source)
        if is_npy(data):
            return Bands.of(in_levels(with_channels_last(read_npy(data), channels)))
        if is_tiff(data):
            return Bands.of(in_levels(read_tiff(data, channels)))
        with open_stored(io.BytesIO(data)) as image:
            image.load()
            return _of_pillow(image, channels)
    except ImageError:
        raise
    except (ImportError, KeyboardInterrupt):  # including MissingExtraError: not the picture's fault
        raise
    except Exception as error:
        raise ImageError(why_unreadable(error)) from error


def must_read(names: Iterable[object]) -> None:
    """Checks early: raises MissingExtraError if one of these is a TIFF file and tifffile is not installed.

    For networks of other than 1 or 3 channels.
    """
    if not has_tiff() and any(str(name).lower().endswith((".tif", ".tiff")) for name in names):
        must_have_tiff()


def _checked(bands: Bands, channels: int) -> Bands:
    if bands.channels != channels:
        raise ImageError(f"it has {bands.channels} channels; the model expects {channels}")
    return bands


def _of_pillow(image: Image.Image, channels: int) -> Bands:
    names = image.getbands()
    if len(names) != channels:
        raise ImageError(
            f"it has {len(names)} channel{'s' if len(names) > 1 else ''} ({', '.join(names)}); the model expects "
            f"{channels}. Use a .npy or TIFF file or an array of {channels} channels"
        )
    if image.mode == "P" or np.asarray(image).dtype != np.uint8:
        raise ImageError(
            f"its colour mode {image.mode} does not have channels of 8 bits; save it as .npy or TIFF"
        )
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # damaged EXIF must not cost a picture whose pixels are fine
        image = ImageOps.exif_transpose(image)
    return Bands(image.split())


def _of_tensor(tensor: Any, channels: int) -> NDArray[Any]:
    shape = tuple(tensor.shape)
    if len(shape) != 3 or shape[0] != channels:
        raise ImageError(f"the tensor has shape {shape}; expected ({channels}, H, W), channels first")
    if str(tensor.dtype) == "torch.bfloat16":  # numpy does not have it
        tensor = tensor.float()
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return np.moveaxis(array, 0, 2)
