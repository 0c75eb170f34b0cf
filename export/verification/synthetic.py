"""Synthetic pictures of n channels, to compare engines on when no photographs have that many."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.pictures.bands import Bands

__all__ = ["made_up_bands"]


def made_up_bands(channels: int, seed: int) -> Bands:
    """A picture of n channels, 240 x 320, with large patches, edges and noise, as photographs have.

    The channels are correlated but not equal, as those of a scene are.
    """
    rng = np.random.default_rng([seed, channels])
    common = _patches(rng)
    own = np.stack([0.6 * common + 0.4 * _patches(rng) for _ in range(channels)], axis=2)
    noisy = own + rng.normal(0, 8, own.shape)
    return Bands.of(noisy.clip(0, 255).round().astype(np.uint8))


def _patches(rng: np.random.Generator) -> NDArray[np.float64]:
    """(240, 320): a smooth background with rectangles on it."""
    ground = Image.fromarray(rng.uniform(0, 255, (4, 5)).astype(np.float32))
    levels = np.asarray(ground.resize((320, 240), Image.Resampling.BICUBIC), np.float64)
    for _ in range(6):
        top, left = rng.integers(0, 200), rng.integers(0, 280)
        height, width = rng.integers(10, 80, 2)
        levels[top : top + height, left : left + width] = rng.uniform(0, 255)
    return levels
