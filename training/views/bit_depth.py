"""Reports before a run whether photographs have more than 8 bits, and whether they are dark."""

from __future__ import annotations

import numpy as np

from dinokit.errors import ImageError
from dinokit.pictures.bands import Bands, decode_picture, is_photographic
from dinokit.sources.spread import evenly_spaced
from dinokit.training.recipe import Recipe
from dinokit.training.views.pictures import Pictures

__all__ = ["bits_found"]

_LOOKED_AT = 8
_DARK = 0.25
# Formats of at most 8 bits, which need not be decoded.
_OF_8_BITS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def bits_found(pictures: Pictures, recipe: Recipe) -> str | None:
    """A sentence on pictures with more than 8 bits, from a few evenly spaced ones; None if all of these have 8.

    Args:
        pictures: of the run.
        recipe: its channels, and whether ``mean`` and ``std`` are given or ``auto``.
    """
    if not is_photographic(recipe.channels):  # other bands always keep their bits, and are measured
        return None
    chosen = evenly_spaced(len(pictures), _LOOKED_AT)
    shares = [share for index in chosen if (share := _bright(pictures, index, recipe.channels)) is not None]
    if not shares:
        return None
    found = f"{len(shares)} of {len(chosen)} sampled pictures have more than 8 bits, which are kept"
    if max(shares) >= _DARK or not (recipe.mean is None or recipe.std is None):
        return found
    return (
        f"{found}. 99 % of their pixels are below {max(shares):.2%} of white, as in 12 bits stored in 16: "
        "--set mean=auto --set std=auto normalises them by their own mean and standard deviation, not by ImageNet's"
    )


def _bright(pictures: Pictures, index: int, channels: int) -> float | None:
    """The share of white below which 99 % of the pixels lie; None for 8 bits and for an unreadable picture."""
    if pictures.name(index).lower().endswith(_OF_8_BITS):
        return None
    try:
        picture = decode_picture(pictures.read(index), channels)
    except (ImageError, OSError):  # the run reports it later
        return None
    return float(np.percentile(picture.array, 99)) / 255 if isinstance(picture, Bands) else None
