"""Attention as pictures: a map laid over its photograph, and masks.

The colours are computed: a path through the OKLab space whose lightness only rises and whose steps are equally far
apart, so that equal differences of attention look equally large, also in grey.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dinokit.errors import UsageError
from dinokit.pictures.preprocess import picture_of

__all__ = ["colour_table", "mask_picture", "overlay"]


# -- colours


@functools.cache
def colour_table() -> NDArray[np.uint8]:
    """256 colours from near black over violet and orange to pale yellow, (256, 3) uint8 RGB.

    Lightness rises steadily, and neighbours are equally far apart in OKLab (Ottosson 2020,
    https://bottosson.github.io/posts/oklab/).
    """
    t = np.linspace(0, 1, 2001)
    lightness = 0.16 + 0.80 * t
    hue = np.radians(285 + 180 * t)
    # As colourful as a screen can show at each lightness and hue, then smoothed so that the path has no corners.
    low, high = np.zeros_like(t), np.full_like(t, 0.4)
    for _ in range(24):
        middle = (low + high) / 2
        rgb = _linear_rgb(lightness, hue, middle)
        inside = ((rgb >= 0) & (rgb <= 1)).all(axis=-1)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    width = 301
    padded = np.pad(low, width // 2, mode="edge")
    chroma = np.minimum(low, 0.92 * np.convolve(padded, np.full(width, 1 / width), mode="valid"))
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    length = np.concatenate([[0], np.linalg.norm(np.diff(lab, axis=0), axis=1).cumsum()])
    even = np.interp(np.linspace(0, length[-1], 256), length, t)
    rgb = _linear_rgb(*(np.interp(even, t, values) for values in (lightness, hue, chroma))).clip(0, 1)
    encoded = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)  # sRGB's gamma
    table: NDArray[np.uint8] = np.rint(255 * encoded).astype(np.uint8)
    return table


def _linear_rgb(
    lightness: NDArray[np.float64], hue: NDArray[np.float64], chroma: NDArray[np.float64]
) -> NDArray[np.float64]:
    """OKLab in polar form to linear sRGB, (…, 3); outside 0…1 if a screen cannot show it."""
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    to_lms = [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.291485548],
    ]
    to_rgb = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
    rgb: NDArray[np.float64] = (lab @ np.transpose(to_lms)) ** 3 @ np.transpose(to_rgb)
    return rgb


# -- one picture

_UNLIKE = (
    0.03  # by how much a picture's aspect ratio may differ from its map's, for pictures that were scaled down
)


def overlay(
    image: Image.Image | NDArray[np.uint8],
    attention: NDArray[np.floating[Any]],
    *,
    opacity: float = 0.65,
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """Lays one attention map over its picture, in colours from dark (low) to yellow (high).

    Args:
        image: the network's input (``backbone.preprocessing.crop``), (H, W, 3) uint8 or a Pillow image. Channels that
            are not colours are first converted by :func:`dinokit.pictures.preprocess.picture_of`. Its aspect ratio
            must be the map's: a photograph of another shape was not the network's input.
        attention: (h, w), one head's map or a mean of several; enlarged to the picture's size, bicubic.
        opacity: of the colours, from 0 (the picture only) to 1 (the map only).
        limits: the values of the first and the last colour; by default the map's minimum and maximum. Pass the
            same limits for several maps to compare them.

    Returns:
        an RGB picture of the size of ``image``.

    Raises:
        UsageError: an invalid shape or value, or a map with values that are not finite.
    """
    picture = _as_rgb(image)
    values = np.asarray(attention, np.float32)
    if values.ndim != 2 or not values.size:
        raise UsageError(
            f"the attention map has shape {values.shape}; expected (h, w): one head, maps[0], or maps.mean(axis=0)"
        )
    if not np.isfinite(values).all():
        raise UsageError("the attention map contains values that are not finite; expected probabilities")
    (height, width), (rows, columns) = picture.size[::-1], values.shape
    if abs(height * columns - width * rows) > _UNLIKE * max(height * columns, width * rows):
        raise UsageError(
            f"the picture is {width}x{height} and the map {columns}x{rows}, so it was not the network's input; draw "
            "the map over the crop: overlay(backbone.preprocessing.crop(open_image(path)), map)"
        )
    if not 0 <= opacity <= 1:
        raise UsageError(f"opacity={opacity} must lie between 0 (the picture only) and 1 (the map only)")
    low, high = (float(values.min()), float(values.max())) if limits is None else limits
    if low > high:
        raise UsageError(f"limits={limits} are in the wrong order; expected (low, high)")
    share = (values - low) / max(high - low, 1e-12)  # a flat map is all dark
    large = Image.fromarray(share.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    # Bicubic interpolation overshoots a little.
    steps = np.rint(255 * np.asarray(large).clip(0, 1)).astype(np.uint8)
    return Image.blend(picture, Image.fromarray(colour_table()[steps]), opacity)


def mask_picture(mask: NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
    """A mask as a grey picture, 255 where it is true: (h, w) bool to ``size`` (H, W), each cell a flat square."""
    height, width = size
    return Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.NEAREST)


def _as_rgb(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    array = np.asarray(image)
    if array.dtype not in (np.uint8, np.float32) or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise UsageError(
            f"the image is {array.dtype} of shape {array.shape}; expected a Pillow image or uint8 or float32 "
            "(H, W, 3) in 0…255"
        )
    return picture_of(array)
