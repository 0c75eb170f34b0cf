"""k-means (Lloyd's iteration). The caller supplies the starting centres and the search for the nearest centre."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["k_means"]

Float = TypeVar("Float", np.float32, np.float64)


def k_means(
    rows: NDArray[Float],
    centres: NDArray[Float],
    assign: Callable[[NDArray[Float]], NDArray[np.intp]],
    *,
    rounds: int,
    directions: bool = False,
) -> tuple[NDArray[np.intp], NDArray[Float]]:
    """Moves each centre to the mean of its rows until no row changes its centre.

    Args:
        rows: (N, D) float32 or float64.
        centres: (K, D), the starting centres.
        assign: returns the number of each row's nearest centre, (N,), for centres (K, D).
        rounds: the largest number of iterations.
        directions: keep the centres L2-normalised, for rows that are ("spherical" k-means).

    Returns:
        (N,) numbers of the centres, and the centres, (K, D). A centre that loses all its rows stays where it was.
    """
    groups = np.full(len(rows), -1, np.intp)
    for _ in range(rounds):
        found = assign(centres)
        if np.array_equal(found, groups):
            break
        groups = found
        sums = _sums(rows, groups, len(centres))
        sizes = np.bincount(groups, minlength=len(centres))[:, None]
        lengths = np.linalg.norm(sums, axis=1, keepdims=True) if directions else sizes
        centres = np.where(lengths > 0, sums / np.where(lengths > 0, lengths, 1), centres).astype(rows.dtype)
    return groups, centres


def _sums(rows: NDArray[Float], groups: NDArray[np.intp], count: int) -> NDArray[Float]:
    """The sum of each group's rows, (count, D); of sorted rows, which takes a third of the time of ``np.add.at``."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sums = np.zeros((count, rows.shape[1]), rows.dtype)
    sums[groups[order[starts]]] = np.add.reduceat(rows[order], starts, axis=0)
    return sums
