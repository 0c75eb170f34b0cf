"""Select a few of many pictures: those that represent all, or those that differ most from each other.

:func:`select_typical` clusters the pictures and takes the middle of each cluster, for labelling only a few (TypiClust:
Hacohen, Dekel and Weinshall, ICML 2022, who also cluster by k-means). :func:`select_diverse` is greedy k-centre
(Gonzalez, Theor. Comput. Sci. 38, 1985), known in active learning as core-set selection (Sener and Savarese, ICLR 2018,
algorithm 1): the largest angle between any picture and its nearest selected one is at most twice that of the best
selection of the same size. It selects rare pictures, and so outliers, early. ``benchmarks/selection.py`` compares both
with random selection.
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

_MOST_GROUPS = 500  # in addition to those requested, if ``having`` has many rows
_ROUNDS = 30
_FEWEST_DRAWN = 20_000  # rows of which the starts of groups are drawn; fewer rows are all used
_DRAWN_PER_GROUP = 20  # or as many times the number of groups, if that is more
_BLOCK = 2**24  # similarities that are computed at a time
_SEED = 0  # the same choice each time

OnSteps = Callable[[int, int], None]


@dataclass(frozen=True)
class Selection:
    """Some of many rows."""

    rows: list[int]
    """Their numbers, in the order of selection."""
    similarities: list[float]
    """Similarity of each to the most similar row selected before it, -1 to 1; NaN if there was none."""
    farthest: float
    """The lowest similarity of any other row to its most similar selected row; 1 if all are selected."""


def select_diverse(
    embeddings: ArrayLike,
    count: int,
    *,
    having: ArrayLike | None = None,
    on_progress: OnSteps | None = None,
) -> Selection:
    """Selects ``count`` rows, each the least similar to those selected before it, by cosine similarity.

    The first n rows of a larger selection are the selection of n rows.

    Args:
        embeddings: (N, D), numbers. Rows that are not finite, or are zero, are never selected.
        count: how many, from 1; if fewer rows are usable, all of them.
        having: (M, D), rows that are already there (labelled ones, say); the rows least similar to these are selected.
            Without them, the first row is the one nearest to the mean of all.
        on_progress: called with the number of steps done and the total.

    Raises:
        UsageError: invalid shapes or count, or no row is usable.
    """
    unit, usable, held = _usable(embeddings, count, having)
    count = min(count, len(unit))
    to_held = _to_held(unit, held)
    similarity, free = to_held.copy(), np.ones(len(unit), np.bool_)
    rows: list[int] = []
    for done in range(count):
        if not done and not len(held):
            row = int((unit @ unit.mean(axis=0, dtype=np.float64).astype(np.float32)).argmax())
        else:
            row = int(np.where(free, similarity, np.inf).argmin())
        rows.append(row)
        free[row] = False
        np.maximum(similarity, unit @ unit[row], out=similarity)
        if on_progress:
            on_progress(done + 1, count)
    return _selection(unit, to_held, np.array(rows), usable)


def select_typical(
    embeddings: ArrayLike,
    count: int,
    *,
    having: ArrayLike | None = None,
    on_progress: OnSteps | None = None,
) -> Selection:
    """Selects ``count`` rows that represent all: the middle of each of ``count`` groups, the largest group first.

    The groups are those of spherical k-means, initialised by k-means++ from a fixed seed (on 20,000 rows, or 20 per
    group, if there are more).

    Args:
        embeddings: (N, D), numbers. Rows that are not finite, or are zero, are never selected.
        count: how many, from 1; if fewer rows are usable, all of them.
        having: (M, D), rows that are already there: groups without such rows come first, and there are up to 500 more
            groups.
        on_progress: called with the number of steps done and the total.

    Raises:
        UsageError: invalid shapes or count, or no row is usable.
    """
    unit, usable, held = _usable(embeddings, count, having)
    count = min(count, len(unit))
    every = np.concatenate([unit, held]) if len(held) else unit
    groups, likeness = _group(every, min(count + min(len(held), _MOST_GROUPS), len(every)), on_progress)
    mine, theirs = groups[: len(unit)], groups[len(unit) :]
    n_groups = int(groups.max()) + 1
    sizes, held_in = np.bincount(mine, minlength=n_groups), np.bincount(theirs, minlength=n_groups)
    # Round by round: if equal rows leave fewer groups than requested, groups contribute a second row.
    best_first = np.lexsort((np.arange(len(unit)), -likeness[: len(unit)]))
    turn = np.empty(len(unit), np.intp)
    seen = np.zeros(n_groups, np.intp)
    for row in best_first:
        turn[row] = seen[mine[row]]
        seen[mine[row]] += 1
    order = np.lexsort((np.arange(len(unit)), mine, -sizes[mine], held_in[mine], turn))
    return _selection(unit, _to_held(unit, held), order[:count], usable)


def _to_held(unit: NDArray[np.float32], held: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarity of each row to the most similar given row; minus infinity if none is given."""
    if not len(held):
        return np.full(len(unit), -np.inf, np.float32)
    return nearest(unit, held, 1)[0][:, 0].astype(np.float32)


def _selection(
    unit: NDArray[np.float32], to_held: NDArray[np.float32], rows: NDArray[np.intp], usable: NDArray[np.intp]
) -> Selection:
    """The selection of ``rows`` in this order; ``usable``: the caller's numbers of all rows."""
    chosen, similarities, similarity = unit[rows], to_held[rows], to_held.copy()
    step = max(1, _BLOCK // len(rows))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        block = chosen[part] @ chosen[: start + step].T
        block[~np.tri(len(block), block.shape[1], start - 1, np.bool_)] = -np.inf  # itself and later ones
        similarities[part] = np.maximum(similarities[part], block.max(axis=1))
    for start in range(0, len(unit), step):
        part = slice(start, start + step)
        similarity[part] = np.maximum(similarity[part], (unit[part] @ chosen.T).max(axis=1))
    others = np.delete(similarity, rows)
    return Selection(
        usable[rows].tolist(),
        [float(np.clip(value, -1, 1)) if np.isfinite(value) else math.nan for value in similarities],
        float(np.clip(others.min(), -1, 1)) if len(others) else 1.0,
    )


def _group(
    unit: NDArray[np.float32], count: int, on_progress: OnSteps | None
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The group of each row, (N,) from 0, and its cosine with the group's mean; some groups may be empty."""
    # A round compares all centres, and so does drawing all starts: these steps take about as long.
    steps = count * (1 + _ROUNDS)
    done = 0

    def tell(number: int) -> None:
        nonlocal done
        done += number
        if on_progress:
            on_progress(done, steps)

    def assign(centres: NDArray[np.float32]) -> NDArray[np.intp]:
        numbers = np.empty(len(unit), np.intp)
        step = max(1, _BLOCK // len(centres))
        for start in range(0, len(unit), step):
            numbers[start : start + step] = (unit[start : start + step] @ centres.T).argmax(axis=1)
        tell(count)
        return numbers

    groups, centres = k_means(unit, _starts(unit, count, tell), assign, rounds=_ROUNDS, directions=True)
    tell(steps - done)  # it may converge before the last round
    return groups, np.einsum("nd,nd->n", unit, centres[groups], dtype=np.float64)


def _starts(unit: NDArray[np.float32], count: int, tell: Callable[[int], None]) -> NDArray[np.float32]:
    """Rows drawn one by one with a probability that grows with the distance to those before (k-means++: Arthur and
    Vassilvitskii, SODA 2007). A few are drawn at a time and the one that leaves the rest nearest is kept (§4)."""
    rng = np.random.default_rng(_SEED)
    drawn_of = max(_FEWEST_DRAWN, _DRAWN_PER_GROUP * count)
    if len(unit) > drawn_of:  # each start compares all rows
        unit = unit[np.sort(rng.choice(len(unit), drawn_of, replace=False))]
    tries = 2 + int(math.log(count))
    rows = [int(rng.integers(len(unit)))]
    distance = np.maximum(1 - unit @ unit[rows[0]], 0)
    for _ in range(count - 1):
        cumulated = np.cumsum(distance, dtype=np.float64)
        if cumulated[-1] <= 1e-6 * len(unit):  # all other rows equal drawn ones
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
    """The usable rows, L2-normalised; their numbers; and the usable rows of ``having``, L2-normalised."""
    vectors = np.asarray(embeddings, np.float32)
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise UsageError(f"embeddings of shape {vectors.shape}; expected (N, D)")
    if count < 1:
        raise UsageError(f"count={count} is invalid; choose 1 or more")
    usable = np.flatnonzero(finite_rows(vectors) & vectors.any(axis=1))
    if not len(usable):
        raise UsageError("there is nothing to select from: no row is finite and nonzero")
    return normalised(vectors[usable]), usable, _usable_others(having, vectors.shape[1])


def _usable_others(having: ArrayLike | None, dim: int) -> NDArray[np.float32]:
    if having is None:
        return np.empty((0, dim), np.float32)
    others = np.asarray(having, np.float32)
    if others.ndim != 2 or others.shape[1] != dim:
        raise UsageError(f"having of shape {others.shape}; expected (M, {dim}), as the embeddings")
    return normalised(others[finite_rows(others) & others.any(axis=1)])
