"""A few of many pictures that stand for all: each one chosen is the one least like those chosen before it.

That is greedy k-centre (Gonzalez, Theor. Comput. Sci. 38, 1985), which active learning knows as the core-set choice
(Sener and Savarese, ICLR 2018, algorithm 1): the farthest that any picture is from its nearest chosen one is at most
twice what the best choice of as many would reach. It takes what is rare, and so outliers too, early.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.errors import UsageError
from dinokit.nearest import finite_rows, nearest, normalised

__all__ = ["Selection", "select_diverse"]


@dataclass(frozen=True)
class Selection:
    """Rows that stand for all."""

    rows: list[int]
    """Their numbers, in the order of choice: the first n are the choice of n."""
    similarities: list[float]
    """Of each, when it was chosen, to the most similar one before it, -1 to 1; NaN where there was none."""
    farthest: float
    """The lowest similarity of any other row to the most similar chosen one; 1 where all are chosen."""


def select_diverse(
    embeddings: ArrayLike,
    count: int,
    *,
    having: ArrayLike | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Selection:
    """Chooses ``count`` rows, each the least similar to those chosen before it, by the cosine.

    Args:
        embeddings: (N, D), numbers. Rows that are not finite, or are zero, are never chosen.
        count: how many, from 1; all usable rows where there are fewer.
        having: (M, D), rows that one has already (labelled ones, say): the choice is of what is least like these.
            Without, it begins with the row nearest to the mean of all.
        on_progress: called with the number of rows chosen since its last call.

    Raises:
        UsageError: the shapes or the count cannot be, or no row is usable.
    """
    vectors = np.asarray(embeddings, np.float32)
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise UsageError(f"embeddings of shape {vectors.shape}; expected (N, D)")
    if count < 1:
        raise UsageError(f"count={count} is not possible; choose 1 or more")
    usable = np.flatnonzero(finite_rows(vectors) & vectors.any(axis=1))
    if not len(usable):
        raise UsageError("there is nothing to choose from: no row is finite and other than zero")
    unit = normalised(vectors[usable])
    held = _usable_others(having, vectors.shape[1])
    free = np.ones(len(unit), np.bool_)
    similarity = np.full(len(unit), -np.inf, np.float32)  # of each row to the most similar chosen one
    if len(held):
        similarity[:] = nearest(unit, held, 1)[0][:, 0]
    rows: list[int] = []
    similarities: list[float] = []
    for _ in range(min(count, len(unit))):
        if not rows and not len(held):
            chosen = int((unit @ unit.mean(axis=0, dtype=np.float64).astype(np.float32)).argmax())
            similarities.append(float("nan"))
        else:
            chosen = int(np.where(free, similarity, np.inf).argmin())
            similarities.append(float(np.clip(similarity[chosen], -1, 1)))
        rows.append(int(usable[chosen]))
        free[chosen] = False
        np.maximum(similarity, unit @ unit[chosen], out=similarity)
        if on_progress:
            on_progress(1)
    farthest = float(np.clip(similarity[free].min(), -1, 1)) if free.any() else 1.0
    return Selection(rows, similarities, farthest)


def _usable_others(having: ArrayLike | None, dim: int) -> NDArray[np.float32]:
    if having is None:
        return np.empty((0, dim), np.float32)
    others = np.asarray(having, np.float32)
    if others.ndim != 2 or others.shape[1] != dim:
        raise UsageError(f"having of shape {others.shape}; expected (M, {dim}), as the embeddings")
    return normalised(others[finite_rows(others) & others.any(axis=1)])
