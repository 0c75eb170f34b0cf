"""Groups of similar photographs by deterministic k-means.

The result of k-means depends on its start. Here it starts by repeatedly splitting the group with the largest spread
along its main axis (PCA-Part: Su and Dy 2007, "In search of deterministic methods for
initializing k-means and Gaussian mixture clustering"). This needs no random numbers, and one pass gives the starts for
every number of groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError
from dinokit.neighbours.k_means import k_means

__all__ = ["MOST_CLUSTERS", "cluster"]

MOST_CLUSTERS = 24  # more colours cannot be told apart
_FEWEST_TO_TRY = 4
_MOST_TO_TRY = 16
_ROUNDS = 100
_FEWEST_PHOTOS = 8  # below, all are one group unless asked otherwise


def cluster(rows: NDArray[np.floating[Any]], count: int | None = None) -> NDArray[np.int32]:
    """The group of each row.

    Args:
        rows: (N, D), for instance the first principal components of embeddings.
        count: of groups, from 1 to ``MOST_CLUSTERS``; None chooses, from 4 to 16, the number for which rows lie
            best in their group rather than the next one (simplified silhouette: Hruschka et al. 2006).

    Returns:
        (N,) int32 from 0, the largest group first. Groups are fewer than ``count`` where rows are equal.

    Raises:
        UsageError: ``count`` is out of range.
    """
    if count is not None and not 1 <= count <= MOST_CLUSTERS:
        raise UsageError(
            f"clusters={count} must lie between 1 and {MOST_CLUSTERS}; leave it out to have it chosen"
        )
    data = np.asarray(rows, np.float64)
    if count is None and len(data) < _FEWEST_PHOTOS:
        count = 1
    fewest, most = (count, count) if count else (_FEWEST_TO_TRY, min(_MOST_TO_TRY, len(data) // 2))
    starts = list(_starts(data, most))
    best, best_score = np.zeros(len(data), np.int32), -np.inf
    # Equal rows allow fewer groups than requested: then as many as possible.
    for start in starts[min(fewest, len(starts)) - 1 :]:
        labels, centres = k_means(
            data, start, lambda centres: _squared_distances(data, centres).argmin(axis=1), rounds=_ROUNDS
        )
        score = _silhouette(data, labels, centres)
        if score > best_score:
            best, best_score = labels.astype(np.int32), score
    return _largest_first(best)


def _starts(data: NDArray[np.float64], most: int) -> Iterator[NDArray[np.float64]]:
    """Centres of 1, 2, … groups, until ``most`` or until all groups hold equal rows only."""
    groups = [np.arange(len(data))]
    while True:
        yield np.stack([data[group].mean(axis=0) for group in groups])
        if len(groups) >= most:
            return
        spread = [float(((data[group] - data[group].mean(axis=0)) ** 2).sum()) for group in groups]
        widest = int(np.argmax(spread))
        halves = _halves(data, groups[widest]) if spread[widest] > 1e-9 else None
        if halves is None:
            return
        groups[widest : widest + 1] = halves


def _halves(data: NDArray[np.float64], group: NDArray[np.intp]) -> list[NDArray[np.intp]] | None:
    centred = data[group] - data[group].mean(axis=0)
    axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    axis = axis * np.sign(axis[np.abs(axis).argmax()])
    side = centred @ axis > 0
    return [group[~side], group[side]] if side.any() and not side.all() else None


def _squared_distances(data: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = (
        (data**2).sum(axis=1, keepdims=True) + (centres**2).sum(axis=1) - 2 * data @ centres.T
    )
    return np.maximum(squares, 0)


def _silhouette(data: NDArray[np.float64], labels: NDArray[np.intp], centres: NDArray[np.float64]) -> float:
    """How much nearer rows are to the centre of the others in their group than to the next one, on average, -1 to 1; a
    row alone in its group counts 0 (Rousseeuw 1987). Its own share in the centre would favour groups of very few."""
    if len(centres) < 2:
        return 0.0
    distances = np.sqrt(_squared_distances(data, centres))
    rows, sizes = np.arange(len(data)), np.bincount(labels, minlength=len(centres))[labels]
    own = distances[rows, labels] * sizes / np.maximum(sizes - 1, 1)
    distances[rows, labels] = np.inf
    other = distances.min(axis=1)
    nearness = (other - own) / np.maximum(np.maximum(own, other), 1e-12)
    return float(np.mean(np.where(sizes > 1, nearness, 0)))


def _largest_first(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    names, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    rank = np.empty(len(names), np.int32)
    rank[np.lexsort((first, -sizes))] = np.arange(len(names))
    return rank[np.searchsorted(names, labels)]
