"""The votes of the nearest neighbours, for the classifier and for the protocol that judges features by it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError
from dinokit.estimator import check_real
from dinokit.neighbours.nearest import nearest

__all__ = ["check_temperature", "nearest_others", "parts_of_queries", "shares_of_votes"]

_VOTES = 1 << 22  # numbers of a table of votes that are held at a time


def check_temperature(value: object) -> float:
    """The temperature of the votes as a float. Raises UsageError unless it is a number above 0."""
    temperature = check_real(value, "temperature")
    if not temperature > 0:  # also refuses nan
        raise UsageError(f"temperature={value} must be above 0, for instance 0.07")
    return temperature


def nearest_others(references: NDArray[np.float32], k: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The k nearest others of each reference, of N - 1 where there are fewer: (N, k) similarities and numbers.

    Raises:
        UsageError: there is only one reference.
    """
    count = len(references)
    if count < 2:
        raise UsageError("leaving one out of one reference leaves nothing; fit at least 2")
    return nearest(references, references, min(k, count - 1), leave_out=True)


def shares_of_votes(
    similarities: NDArray[np.float64],
    codes: NDArray[np.intp],
    *,
    n_classes: int,
    temperature: float,
) -> NDArray[np.float64]:
    """(M, n_classes) shares of the votes; each row sums to 1.

    Args:
        similarities: (M, k) of each query and its neighbours, falling.
        codes: (M, k) classes of the neighbours, 0 to ``n_classes`` - 1.
        n_classes: number of classes.
        temperature: a neighbour votes with weight exp(similarity / temperature).
    """
    # Divided by the largest weight of the row, which changes no share and avoids overflow.
    weights = np.exp((similarities - similarities[:, :1]) / temperature)
    cells = np.arange(len(weights))[:, None] * n_classes + codes
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(weights) * n_classes)
    shares: NDArray[np.float64] = votes.reshape(len(weights), n_classes) / weights.sum(axis=1, keepdims=True)
    return shares


def parts_of_queries(count: int, n_classes: int) -> Iterator[slice]:
    """Slices of ``count`` queries whose table of votes has a bounded size."""
    rows = max(1, _VOTES // n_classes)
    return (slice(start, start + rows) for start in range(0, count, rows))
