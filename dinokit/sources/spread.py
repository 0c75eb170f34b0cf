"""Indices spread evenly over many pictures."""

from __future__ import annotations

__all__ = ["evenly_spaced"]


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """Up to ``at_most`` different indices below ``count``, evenly spread from the first to the last, ascending."""
    import numpy as np

    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(at_most, count)).round())]
