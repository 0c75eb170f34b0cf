"""Any picture in a form for display: contact sheets, atlases and thumbnails.

Pictures that are finer than 8 bits and dark, as from microscopes and telescopes, are stretched (``picture_of``).
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from dinokit.errors import ImageError, MissingExtraError
from dinokit.pictures.band_files import guess_channels, is_npy, is_tiff, read_npy, read_tiff
from dinokit.pictures.bands import decode_bands, decode_picture
from dinokit.pictures.picture_bytes import encoded
from dinokit.pictures.preprocess import picture_of

__all__ = ["as_tile", "picture_to_show"]


def picture_to_show(source: Any, *, least_px: int | None = None) -> Image.Image:
    """A photograph as upright RGB; of a ``.npy`` or TIFF file of other channels, their mean, stretched.

    Args:
        source: what :func:`dinokit.pictures.images.open_image` takes.
        least_px: as there.

    Raises:
        ImageError: it cannot be read; only the reason, without the picture's name.
    """
    try:
        picture = decode_picture(source, 3, least_px=least_px)
        return picture if isinstance(picture, Image.Image) else picture_of(picture.array)
    except ImageError:
        # Reads the file again, but only if it is not a photograph.
        try:
            data = encoded(source)
            if is_npy(data):
                array = read_npy(data)
            elif is_tiff(data):
                array = read_tiff(data, None)
            else:
                raise
            return picture_of(decode_bands(array, guess_channels(array.shape)).array)
        except MissingExtraError as missing:
            raise ImageError(str(missing)) from missing


def as_tile(picture: Image.Image, side: int) -> Image.Image:
    """A picture as RGB, its longer side ``side`` pixels."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
