"""Near-duplicates among embeddings, exactly: groups within a set, every row compared with every other; and the rows
of one set that another set has too.

Two pictures are linked when the cosine similarity of their embeddings reaches a threshold; a group is what hangs
together by links. In a group, two pictures may therefore be joined by a chain of others and be less similar
themselves; how similar each is to the one to keep is told with it.

What the threshold finds, with the models that dinokit knows: from 0.95, pictures that were saved again, made smaller
or brightened a little. A crop of a few per cent, a turn or a mirror image changes an embedding about as much as
another photograph of the same thing does: to find these, lower the threshold and look at what comes.
``tests/test_duplicates.py`` measures it on photographs (``-m slow``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.errors import UsageError
from dinokit.neighbours.nearest import finite_rows, nearest, normalised

__all__ = [
    "DEFAULT_THRESHOLD",
    "DuplicateGroup",
    "DuplicatePair",
    "count_tiles",
    "find_duplicates",
    "find_duplicates_against",
]

DEFAULT_THRESHOLD = 0.95
_SIDE = 1024  # rows and columns of a tile of similarities; where all of its pairs are linked, it takes 100 MB
_ROUNDING = 1e-6  # of a float32 product of two vectors of length 1: identical ones must reach 1


@dataclass(frozen=True)
class DuplicateGroup:
    """Pictures that are near-duplicates of each other, the one to keep first."""

    rows: list[int]
    """Numbers of the rows, at least two; the first is the one to keep, the others follow in their order."""
    similarities: list[float]
    """Of each row to the first, whose own is 1. Below the threshold where only a chain joins them."""


@dataclass(frozen=True)
class DuplicatePair:
    """A picture and the most similar one of another set."""

    row: int
    """Its row."""
    other: int
    """The row of the most similar one in the other set; of equally similar ones the first."""
    similarity: float
    """Of the two, the threshold or more."""


def find_duplicates(
    embeddings: ArrayLike,
    threshold: float = DEFAULT_THRESHOLD,
    *,
    quality: ArrayLike | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[DuplicateGroup]:
    """Finds groups of near-duplicates.

    Args:
        embeddings: (N, D), of any length. Rows that are not finite (pictures that could not be read) are left out.
        threshold: cosine similarity from which two rows are linked, above -1 and at most 1. 0.95 finds pictures that
            were saved again or made smaller; the module's text says more.
        quality: (N,) numbers, or (N, Q) with the first column deciding, then the second …: in each group the row
            with the greatest is the one to keep, for instance the pictures' pixels. Among equals, and by default,
            it is the first row.
        on_progress: called with the number of tiles compared since its last call, of :func:`count_tiles`.

    Returns:
        groups in the order of their first rows. Time grows with N squared; beside the embeddings and a copy of them,
        memory stays below 200 MB and the groups themselves.

    Raises:
        UsageError: shapes do not fit, or the threshold is impossible.
    """
    _check_threshold(threshold)
    rows, unit, count = _readable(embeddings, "the embeddings")
    ranks = _ranks(quality, count)
    roots = np.arange(len(unit))
    for left, right in _linked(unit, threshold, on_progress):
        _join(roots, left, right)
    return [_group(members, unit, rows, ranks) for members in _components(roots)]


def find_duplicates_against(
    embeddings: ArrayLike,
    against: ArrayLike,
    threshold: float = DEFAULT_THRESHOLD,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> list[DuplicatePair]:
    """Finds the pictures of one set that have a near-duplicate in another, such as those of a test set in training.

    Nothing is compared within a set.

    Args:
        embeddings: (N, D), of any length. Rows that are not finite are left out, here and in ``against``.
        against: (M, D), the other set.
        threshold: cosine similarity from which two pictures count as the same, as for :func:`find_duplicates`.
        on_progress: called with the number of rows compared since its last call, of those not left out.

    Returns:
        a pair for each row whose most similar one in ``against`` reaches the threshold, in the order of the rows. The
        other way round, with the two sets exchanged, it is a pair for each row of the other set. Time grows with N M;
        beside the two sets and a copy of them, about 200 MB are held.

    Raises:
        UsageError: shapes do not fit, or the threshold is impossible.
    """
    _check_threshold(threshold)
    rows, unit, _ = _readable(embeddings, "the embeddings")
    others, other_unit, _ = _readable(against, "against")
    if unit.shape[1] != other_unit.shape[1]:
        raise UsageError(
            f"the embeddings have {unit.shape[1]} columns and against has {other_unit.shape[1]}; expected two sets of "
            "one model"
        )
    pairs: list[DuplicatePair] = []
    for start in range(0, len(unit) if len(others) else 0, _SIDE):
        part = unit[start : start + _SIDE]
        similarities, found = nearest(part, other_unit, 1)
        for place in np.flatnonzero(similarities[:, 0] >= threshold - _ROUNDING):
            similarity = min(float(similarities[place, 0]), 1.0)
            pairs.append(DuplicatePair(int(rows[start + place]), int(others[found[place, 0]]), similarity))
        if on_progress:
            on_progress(len(part))
    return pairs


def _check_threshold(threshold: float) -> None:
    if not -1 < threshold <= 1:
        raise UsageError(
            f"threshold={threshold} must be above -1 and at most 1, for instance {DEFAULT_THRESHOLD}"
        )


def _readable(embeddings: ArrayLike, name: str) -> tuple[NDArray[np.intp], NDArray[np.float32], int]:
    """The numbers of the rows that are finite, these scaled to length 1, and the number of all rows."""
    vectors = np.asarray(embeddings, np.float32)
    if vectors.ndim != 2:
        raise UsageError(f"{name} of shape {vectors.shape} cannot be compared; expected (N, D)")
    fine = finite_rows(vectors)
    return np.flatnonzero(fine), normalised(vectors if fine.all() else vectors[fine]), len(vectors)


def count_tiles(count: int) -> int:
    """Tiles that :func:`find_duplicates` compares for so many rows that are not left out."""
    strips = -(-count // _SIDE)
    return strips * (strips + 1) // 2


def _linked(
    unit: NDArray[np.float32], threshold: float, on_progress: Callable[[int], None] | None
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs that reach the threshold, tile by tile of the upper triangle."""
    starts = range(0, len(unit), _SIDE)
    for top in starts:
        strip = unit[top : top + _SIDE]
        for left in range(top, len(unit), _SIDE):
            hits = strip @ unit[left : left + _SIDE].T >= threshold - _ROUNDING
            if top == left:
                hits &= ~np.tri(len(hits), dtype=np.bool_)  # each pair once, and none with itself
            row, column = np.nonzero(hits)
            if len(row):
                yield row + top, column + left
            if on_progress:
                on_progress(1)


# -- what hangs together: a forest in which every row points to an earlier one, or to itself


def _join(roots: NDArray[np.intp], one: NDArray[np.intp], other: NDArray[np.intp]) -> None:
    """Makes each pair hang together: the later root is hung below the earlier, until both have the same."""
    while True:
        one, other = _root_of(roots, one), _root_of(roots, other)
        apart = one != other
        if not apart.any():
            return
        # Many pairs join the same two trees: each once.
        low, high = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
        low, high = np.divmod(np.unique(low * len(roots) + high), len(roots))
        np.minimum.at(roots, high, low)
        one, other = low, high


def _root_of(roots: NDArray[np.intp], rows: NDArray[np.intp]) -> NDArray[np.intp]:
    while True:
        above = roots[rows]
        higher = roots[above]
        if (higher == above).all():
            return above
        roots[rows] = higher  # shortens the way, for the next ones too


def _components(roots: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Rows that hang together, two or more, in the order of their first rows; each in rising order."""
    labels = _root_of(roots, np.arange(len(roots)))  # of each the earliest row, by construction
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    return [part for part in np.split(order, cuts) if len(part) > 1]


# -- which one to keep


def _ranks(quality: ArrayLike | None, count: int) -> NDArray[np.intp]:
    """(N,) places from the best to the worst."""
    if quality is None:
        return np.arange(count)
    values = np.asarray(quality, np.float64)
    if values.ndim not in (1, 2) or len(values) != count:
        raise UsageError(f"quality has shape {values.shape}; expected ({count},) or ({count}, Q)")
    if np.isnan(values).any():
        raise UsageError("quality holds NaN; use 0 where it is not known")
    columns = values[:, None] if values.ndim == 1 else values
    order = np.lexsort((np.arange(count), *(-column for column in columns.T[::-1])))
    ranks = np.empty(count, np.intp)
    ranks[order] = np.arange(count)
    return ranks


def _group(
    members: NDArray[np.intp], unit: NDArray[np.float32], rows: NDArray[np.intp], ranks: NDArray[np.intp]
) -> DuplicateGroup:
    kept = int(ranks[rows[members]].argmin())
    ordered = np.concatenate([members[kept : kept + 1], np.delete(members, kept)])
    similarities = np.einsum("nd,d->n", unit[ordered], unit[ordered[0]], dtype=np.float64)
    similarities[0] = 1.0
    return DuplicateGroup(rows[ordered].tolist(), similarities.clip(-1, 1).tolist())
