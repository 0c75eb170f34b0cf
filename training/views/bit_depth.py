"""A message before a run on photographs with more than 8 bits: that these are kept, and whether they are dark."""

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
# Formats that hold no more, so that they need not be decoded.
_OF_8_BITS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def bits_found(pictures: Pictures, recipe: Recipe) -> str | None:
    """A sentence on the bits of the pictures, by a few of them, evenly chosen; None where they have 8, as most have.

    Args:
        pictures: of the run.
        recipe: its channels, and whether ``mean`` and ``std`` are given or ``auto``.
    """
    if not is_photographic(recipe.channels):  # whose numbers are always kept and measured
        return None
    chosen = evenly_spaced(len(pictures), _LOOKED_AT)
    shares = [share for index in chosen if (share := _bright(pictures, index, recipe.channels)) is not None]
    if not shares:
        return None
    found = f"{len(shares)} of {len(chosen)} pictures looked at have more than 8 bits, and keep them"
    if max(shares) >= _DARK or not (recipe.mean is None or recipe.std is None):
        return found
    return (
        f"{found}. 99 % of their pixels lie below {max(shares):.2%} of white, as 12 bits do that are stored in 16: "
        "with --set mean=auto --set std=auto the network sees them by their own mean and deviation, not ImageNet's"
    )


def _bright(pictures: Pictures, index: int, channels: int) -> float | None:
    """Below what share of white nearly all pixels lie; None of 8 bits and of what cannot be read."""
    if pictures.name(index).lower().endswith(_OF_8_BITS):
        return None
    try:
        picture = decode_picture(pictures.read(index), channels)
    except (ImageError, OSError):  # the run reports it later
        return None
    return float(np.percentile(picture.array, 99)) / 255 if isinstance(picture, Bands) else None
