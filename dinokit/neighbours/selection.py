"""A few of many pictures: those that stand for all, or those that differ most from each other.

:func:`select_typical` groups the pictures and takes the middle of each group, for labelling few (TypiClust: Hacohen,
Dekel and Weinshall, ICML 2022, whose groups are k-means', too). :func:`select_diverse` is greedy k-centre (Gonzalez,
Theor. Comput. Sci. 38, 1985), which active learning knows as the core-set choice (Sener and Savarese, ICLR 2018,
algorithm 1): the largest angle of any picture to its nearest chosen one is at most twice what the best choice of as
many would reach. It takes what is rare, and so outliers, early. ``benchmarks/selection.py`` compares both with chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.errors import UsageError
from dinokit.neighbours.k_means import k_means
from dinokit.neighbours.nearest import finite_rows, nearest, normalised

__all__ = ["Selection", "select_diverse", "select_typical"]

_MOST_GROUPS = 500  # beside those that are asked for, where there are many rows that one has
_ROUNDS = 30
_SEED = 0  # the same choice each time

OnSteps = Callable[[int, int], None]


@dataclass(frozen=True)
class Selection:
    """Some of many rows."""

    rows: list[int]
    """Their numbers, in the order of choice."""
    similarities: list[float]
    """Of each, when it was chosen, to the most similar one before it, -1 to 1; NaN where there was none."""
    farthest: float
    """The lowest similarity of any other row to the most similar chosen one; 1 where all are chosen."""


def select_diverse(
    embeddings: ArrayLike,
    count: int,
    *,
    having: ArrayLike | None = None,
    on_progress: OnSteps | None = None,
) -> Selection:
    """Chooses ``count`` rows, each the least similar to those chosen before it, by the cosine.

    Args:
        embeddings: (N, D), numbers. Rows that are not finite, or are zero, are never chosen.
        count: how many, from 1; all usable rows where there are fewer.
        having: (M, D), rows that one has already (labelled ones, say): the choice is of what is least like these.
            Without, it begins with the row nearest to the mean of all.
        on_progress: called with the steps done so far and the steps there are.

    Raises:
        UsageError: the shapes or the count cannot be, or no row is usable.

    The first n of a longer choice are the choice of n.
    """
    unit, usable, held = _usable(embeddings, count, having)
    count = min(count, len(unit))
    chosen = _Chosen(unit, held)
    for done in range(count):
        if not done and not len(held):
            row = int((unit @ unit.mean(axis=0, dtype=np.float64).astype(np.float32)).argmax())
        else:
            row = int(np.where(chosen.free, chosen.similarity, np.inf).argmin())
        chosen.take(row)
        if on_progress:
            on_progress(done + 1, count)
    return chosen.selection(usable)


def select_typical(
    embeddings: ArrayLike,
    count: int,
    *,
    having: ArrayLike | None = None,
    on_progress: OnSteps | None = None,
) -> Selection:
    """Chooses ``count`` rows that stand for all: the middle of each of as many groups, the largest group first.

    The groups are k-means' over the directions, begun by k-means++ from a fixed seed.

    Args:
        embeddings: (N, D), numbers. Rows that are not finite, or are zero, are never chosen.
        count: how many, from 1; all usable rows where there are fewer.
        having: (M, D), rows that one has already: groups without such rows come first, and there are up to 500 more
            groups to be found in.
        on_progress: called with the steps done so far and the steps there are.

    Raises:
        UsageError: the shapes or the count cannot be, or no row is usable.
    """
    unit, usable, held = _usable(embeddings, count, having)
    count = min(count, len(unit))
    every = np.concatenate([unit, held]) if len(held) else unit
    groups, likeness = _group(every, min(count + min(len(held), _MOST_GROUPS), len(every)), on_progress)
    mine, theirs = groups[: len(unit)], groups[len(unit) :]
    n_groups = int(groups.max()) + 1
    sizes, held_in = np.bincount(mine, minlength=n_groups), np.bincount(theirs, minlength=n_groups)
    # Round by round, so that groups of equal rows, of which there are fewer than asked for, give a second one.
    best_first = np.lexsort((np.arange(len(unit)), -likeness[: len(unit)]))
    turn = np.empty(len(unit), np.intp)
    seen = np.zeros(n_groups, np.intp)
    for row in best_first:
        turn[row] = seen[mine[row]]
        seen[mine[row]] += 1
    order = np.lexsort((np.arange(len(unit)), mine, -sizes[mine], held_in[mine], turn))
    chosen = _Chosen(unit, held)
    for row in order[:count].tolist():
        chosen.take(row)
    return chosen.selection(usable)


class _Chosen:
    """What is chosen so far, and how similar every row is to the most similar chosen one, or one that one has."""

    def __init__(self, unit: NDArray[np.float32], held: NDArray[np.float32]) -> None:
        self.unit = unit
        self.free = np.ones(len(unit), np.bool_)
        self.similarity = np.full(len(unit), -np.inf, np.float32)
        if len(held):
            self.similarity[:] = nearest(unit, held, 1)[0][:, 0]
        self.rows: list[int] = []
        self.similarities: list[float] = []

    def take(self, row: int) -> None:
        before = float(self.similarity[row])
        self.rows.append(row)
        self.similarities.append(float(np.clip(before, -1, 1)) if math.isfinite(before) else math.nan)
        self.free[row] = False
        np.maximum(self.similarity, self.unit @ self.unit[row], out=self.similarity)

    def selection(self, usable: NDArray[np.intp]) -> Selection:
        """``usable``: the callers' numbers of the rows."""
        farthest = float(np.clip(self.similarity[self.free].min(), -1, 1)) if self.free.any() else 1.0
        return Selection(usable[self.rows].tolist(), self.similarities, farthest)


def _group(
    unit: NDArray[np.float32], count: int, on_progress: OnSteps | None
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The group of each row, (N,) from 0, and its cosine with the group's mean; some groups may be empty."""
    # A round looks at all centres, as drawing all starts does, so these steps take about as long.
    steps = count * (1 + _ROUNDS)
    done = 0

    def tell(number: int) -> None:
        nonlocal done
        done += number
        if on_progress:
            on_progress(done, steps)

    def assign(centres: NDArray[np.float32]) -> NDArray[np.intp]:
        numbers = nearest(unit, centres, 1)[1][:, 0]
        tell(count)
        return numbers

    groups, centres = k_means(unit, _starts(unit, count, tell), assign, rounds=_ROUNDS, directions=True)
    tell(steps - done)  # it may be settled before the last round
    return groups, np.einsum("nd,nd->n", unit, centres[groups], dtype=np.float64)


def _starts(unit: NDArray[np.float32], count: int, tell: Callable[[int], None]) -> NDArray[np.float32]:
    """Rows drawn one by one with a chance that grows with the distance from those before (k-means++: Arthur and
    Vassilvitskii, SODA 2007); of a few drawn at a time the one that leaves the rest nearest, as their section 4."""
    rng = np.random.default_rng(_SEED)
    tries = 2 + int(math.log(count))
    rows = [int(rng.integers(len(unit)))]
    distance = np.maximum(1 - unit @ unit[rows[0]], 0)
    for _ in range(count - 1):
        cumulated = np.cumsum(distance, dtype=np.float64)
        if cumulated[-1] <= 1e-6 * len(unit):  # what is left equals what was drawn
            break
        drawn = np.searchsorted(cumulated[:-1], rng.random(tries) * cumulated[-1], side="right")
        left = np.minimum(distance[:, None], np.maximum(1 - unit @ unit[drawn].T, 0))
        best = int(left.sum(axis=0, dtype=np.float64).argmin())
        rows.append(int(drawn[best]))
        distance = left[:, best].copy()
        tell(1)
    return unit[rows]


def _usable(
    embeddings: ArrayLike, count: int, having: ArrayLike | None
) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.float32]]:
    """Rows that can be chosen, of length 1; their numbers; and the usable rows of ``having``."""
    vectors = np.asarray(embeddings, np.float32)
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise UsageError(f"embeddings of shape {vectors.shape}; expected (N, D)")
    if count < 1:
        raise UsageError(f"count={count} is not possible; choose 1 or more")
    usable = np.flatnonzero(finite_rows(vectors) & vectors.any(axis=1))
    if not len(usable):
        raise UsageError("there is nothing to choose from: no row is finite and other than zero")
    return normalised(vectors[usable]), usable, _usable_others(having, vectors.shape[1])


def _usable_others(having: ArrayLike | None, dim: int) -> NDArray[np.float32]:
    if having is None:
        return np.empty((0, dim), np.float32)
    others = np.asarray(having, np.float32)
    if others.ndim != 2 or others.shape[1] != dim:
        raise UsageError(f"having of shape {others.shape}; expected (M, {dim}), as the embeddings")
    return normalised(others[finite_rows(others) & others.any(axis=1)])
