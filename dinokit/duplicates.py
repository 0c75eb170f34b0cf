"""Groups of near-duplicates among embeddings, exactly: every row is compared with every other.

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
from dinokit.nearest import finite_rows, normalised

__all__ = ["DEFAULT_THRESHOLD", "DuplicateGroup", "count_tiles", "find_duplicates"]

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
    vectors = np.asarray(embeddings, np.float32)
    if vectors.ndim != 2:
        raise UsageError(f"the embeddings have shape {vectors.shape}; expected (N, D)")
    if not -1 < threshold <= 1:
        raise UsageError(
            f"threshold={threshold} must be above -1 and at most 1, for instance {DEFAULT_THRESHOLD}"
        )
    ranks = _ranks(quality, len(vectors))
    fine = finite_rows(vectors)
    rows = np.flatnonzero(fine)
    unit = normalised(vectors if fine.all() else vectors[fine])
    roots = np.arange(len(unit))
    for left, right in _linked(unit, threshold, on_progress):
        _join(roots, left, right)
    return [_group(members, unit, rows, ranks) for members in _components(roots)]


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
    columns = values.reshape(count, -1)
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
