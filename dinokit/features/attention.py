"""Masks of the CLS token's attention, as facebookresearch/dino draws them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError

__all__ = ["check_mass", "mass_masks", "upsample_nearest"]


def mass_masks(attention: NDArray[np.floating[Any]], mass: float = 0.6) -> NDArray[np.bool_]:
    """The fewest patches that together receive ``mass`` of the attention, for each head.

    As facebookresearch/dino `visualize_attention.py` (``--threshold``): sort ascending, normalise to sum 1,
    keep where the cumulative sum exceeds ``1 - mass``, restore the order. Of equal values the later one is
    kept first (torch.sort does not define their order).

    Args:
        attention: (…, N) probabilities of the N patches, not negative; they need not sum to 1.
        mass: share to keep, in (0, 1].

    Returns:
        (…, N) bool.

    Raises:
        UsageError: ``mass`` is outside (0, 1].
    """
    check_mass(mass)
    order = np.argsort(attention, axis=-1, kind="stable")
    ascending = np.take_along_axis(attention, order, axis=-1).astype(np.float32)
    # If CLS attends to itself alone, float32 rounds the rest to 0.
    ascending /= np.maximum(ascending.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    # As torch.cumsum: adds in float64 and returns float32. At the threshold the last bit decides.
    cumulated = ascending.cumsum(axis=-1, dtype=np.float64).astype(np.float32)
    above = cumulated > np.float32(1 - mass)
    above[..., -1] = True  # the maximum always, since float32 may round a small mass to 0
    kept = np.empty(attention.shape, np.bool_)
    np.put_along_axis(kept, order, above, axis=-1)
    return kept


def check_mass(mass: float) -> None:
    """Raises UsageError if ``mass`` is not in (0, 1]; called before expensive work."""
    if not isinstance(mass, int | float | np.number) or not 0 < mass <= 1:
        raise UsageError(
            f"mass={mass!r} is not a share of the attention; expected 0 < mass <= 1, DINO uses 0.6"
        )


def upsample_nearest(maps: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """(…, h, w) values of patches to (…, h * patch_size, w * patch_size) pixels, each patch a flat square."""
    return maps.repeat(patch_size, axis=-2).repeat(patch_size, axis=-1)
