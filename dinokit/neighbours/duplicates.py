"""Exact search for near-duplicates among embeddings: groups within a set, where every row is compared with every other,
and the rows of one set that another set also has.

Two pictures are linked if the cosine similarity of their embeddings reaches a threshold, and a group is a connected
component of these links. So two pictures in a group may be less similar and connected only by a chain of others; the
similarity of each to the picture to keep is reported.

With the models that dinokit knows, a threshold of 0.95 finds pictures that were saved again, made smaller or brightened
a little. A crop of a few per cent, a rotation or a mirror image changes an embedding about as much as another
photograph of the same object does: to find these, lower the threshold and check the results.
``tests/neighbours/test_duplicates.py`` measures this on photographs (``-m slow``).
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
_SIDE = 1024  # rows and columns of a tile of similarities; it takes 100 MB if all of its pairs are linked
_ROUNDING = 1e-6  # of a float32 product of two L2-normalised vectors: identical ones must reach 1


@dataclass(frozen=True)
class DuplicateGroup:
    """Pictures that are near-duplicates of each other, the one to keep first."""

    rows: list[int]
    """Numbers of the rows, at least two: first the one to keep, then the others in their order."""
    similarities: list[float]
    """Of each row to the first, whose own is 1. Below the threshold if only a chain connects them."""


@dataclass(frozen=True)
class DuplicatePair:
    """A picture and the most similar one of another set."""

    row: int
    """Its row."""
    other: int
    """The row of the most similar picture in the other set; the first among equally similar ones."""
    similarity: float
    """Of the two pictures; at least the threshold."""


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
            were saved again or made smaller; see the top of this module.
        quality: (N,) numbers, or (N, Q) where the first column decides, then the second …: in each group, the row
            with the greatest value is the one to keep. An example is the number of pixels. Among equals, and by
            default, it is the first row.
        on_progress: called with the number of tiles compared since its last call; :func:`count_tiles` gives the total.

    Returns:
        groups in the order of their first rows. Time grows with N squared; besides the embeddings and a copy of them,
        memory stays below 200 MB plus the groups themselves.

    Raises:
        UsageError: shapes do not match, or the threshold is invalid.
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

    Rows of the same set are not compared.

    Args:
        embeddings: (N, D), of any length. Rows that are not finite are left out, here and in ``against``.
        against: (M, D), the other set.
        threshold: cosine similarity from which two pictures count as the same, as for :func:`find_duplicates`.
        on_progress: called with the number of rows compared since its last call, not counting those left out.

    Returns:
        a pair for each row of ``embeddings`` whose most similar row in ``against`` reaches the threshold, in the order
        of the rows. Exchange the two sets for a pair for each row of the other. Time grows with N M; besides the two
        sets and a copy of them, about 200 MB are held.

    Raises:
        UsageError: shapes do not match, or the threshold is invalid.
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
    """The numbers of the finite rows, these rows L2-normalised, and the number of all rows."""
    vectors = np.asarray(embeddings, np.float32)
    if vectors.ndim != 2:
        raise UsageError(f"{name} of shape {vectors.shape} cannot be compared; expected (N, D)")
    fine = finite_rows(vectors)
    return np.flatnonzero(fine), normalised(vectors if fine.all() else vectors[fine]), len(vectors)


def count_tiles(count: int) -> int:
    """Number of tiles that :func:`find_duplicates` compares for ``count`` rows, not counting those left out."""
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


# -- connected components: a forest in which every row points to an earlier one, or to itself


def _join(roots: NDArray[np.intp], one: NDArray[np.intp], other: NDArray[np.intp]) -> None:
    """Connects each pair: the later root is put below the earlier one until both rows have the same root."""
    while True:
        one, other = _root_of(roots, one), _root_of(roots, other)
        apart = one != other
        if not apart.any():
            return
        # Many pairs connect the same two trees; do each once.
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
        roots[rows] = higher  # shortens the path, also for later calls


def _components(roots: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Components of two or more rows, in the order of their first rows; each in ascending order."""
    labels = _root_of(roots, np.arange(len(roots)))  # the earliest row of each component, by construction
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    return [part for part in np.split(order, cuts) if len(part) > 1]


# -- which one to keep


def _ranks(quality: ArrayLike | None, count: int) -> NDArray[np.intp]:
    """(N,) the rank of each row, 0 for the best."""
    if quality is None:
        return np.arange(count)
    values = np.asarray(quality, np.float64)
    if values.ndim not in (1, 2) or len(values) != count:
        raise UsageError(f"quality has shape {values.shape}; expected ({count},) or ({count}, Q)")
    if np.isnan(values).any():
        raise UsageError("quality contains NaN; use 0 where it is not known")
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
