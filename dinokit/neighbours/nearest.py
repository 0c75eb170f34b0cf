"""The most similar of many vectors: exact, in bounded memory, with the same result on every machine.

Similarities are computed in float32, one tile of queries and references at a time. A few more than k are kept, and the
k largest of them are found in float64: matrix products round differently for every shape, so a query on its own would
otherwise get other neighbours and weights than the same query among others. Where so many vectors are so similar that
rounding could have lost one (a burst of photographs, frames of a film, many copies), all similarities of that query are
computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_cosines", "finite_rows", "nearest", "normalised"]

_TILE_BYTES = 64 * 2**20  # similarities held at a time
_REFERENCES = 16384  # of a tile: enough for a fast product, few enough to leave room for many queries
_SPARE = 16  # kept in addition to the k
_DIGITS = 12  # of a float64 product that do not depend on the shape of the matrices


def nearest(
    queries: NDArray[np.float32],
    references: NDArray[np.float32],
    k: int,
    *,
    leave_out: bool | NDArray[np.intp] = False,
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The k references with the largest inner product with each query.

    Args:
        queries: (M, D), L2-normalised or zero (:func:`normalised`).
        references: (N, D), likewise.
        k: from 1 to N.
        leave_out: (M, L) numbers of references that a query must not find, -1 for none; or True if query i is
            reference i and must not find itself.

    Returns:
        (M, k) inner products in descending order, and (M, k) numbers of references. Among equal products, the earlier
        reference comes first. If fewer than k references are not left out, others follow with an inner product of
        minus infinity. Besides arguments and result, about 200 MB are held, whatever M and N.
    """
    kept = min(len(references), k + _SPARE)
    tile = min(len(references), max(_REFERENCES, 4 * k, kept))
    rows = max(1, _TILE_BYTES // (4 * max(tile, kept * references.shape[1])))
    values = np.empty((len(queries), k), np.float64)
    numbers = np.empty((len(queries), k), np.intp)
    if isinstance(leave_out, bool):
        leave_out = np.arange(len(queries))[:, None] if leave_out else np.empty((len(queries), 0), np.intp)
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        values[part], numbers[part] = _nearest(queries[part], references, k, kept, tile, leave_out[part])
    return values, numbers


def _nearest(
    queries: NDArray[np.float32],
    references: NDArray[np.float32],
    k: int,
    kept: int,
    tile: int,
    left_out: NDArray[np.intp],
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    best, found = _search(queries, references, kept, tile, left_out)
    order = np.argsort(-best, axis=1)
    best, found = np.take_along_axis(best, order, axis=1), np.take_along_axis(found, order, axis=1)
    values, numbers = _ranked_exactly(queries, references, found[:, :k], left_out)
    if kept == k:
        return values, numbers
    # The sum of D products of float32, whose absolute values add up to 1 at most, is wrong by D·2^-24 at most.
    rounding = queries.shape[1] * 2.0**-24
    # The k are certain where the next one is farther than that from all of them. Otherwise the spare ones are compared.
    next_one = best[:, k].astype(np.float64)
    unsure = np.flatnonzero(~np.isneginf(next_one) & (next_one + rounding >= values[:, -1]))
    again, of_again = _ranked_exactly(queries[unsure], references, found[unsure], left_out[unsure])
    values[unsure], numbers[unsure] = again[:, :k], of_again[:, :k]
    if kept == len(references):
        return values, numbers
    least = best[unsure, -1].astype(np.float64)
    unsure = unsure[~np.isneginf(least) & (least + rounding >= values[unsure, -1])]
    rows = max(1, _TILE_BYTES // (16 * tile))
    for start in range(0, len(unsure), rows):
        some = unsure[start : start + rows]
        _, found = _search(queries[some].astype(np.float64), references, k, tile, left_out[some])
        values[some], numbers[some] = _ranked_exactly(queries[some], references, found, left_out[some])
    return values, numbers


def _search(
    queries: NDArray[Any],
    references: NDArray[np.float32],
    k: int,
    tile: int,
    left_out: NDArray[np.intp],
) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The k nearest references by products in the queries' precision, unordered: (Q, k) similarities and numbers;
    those in ``left_out``, (Q, L), come last."""
    best = np.empty((len(queries), k), queries.dtype)
    numbers = np.empty((len(queries), k), np.intp)
    for start in range(0, len(references), tile):
        block = queries @ references[start : start + tile].T.astype(queries.dtype, copy=False)
        if block.dtype == np.float64:
            np.round(block, _DIGITS, out=block)
        column = left_out - start
        inside = (column >= 0) & (column < block.shape[1])
        block[np.nonzero(inside)[0], column[inside]] = -np.inf
        if start == 0:
            best, numbers = _largest(block, k)
            continue
        # An equal similarity in a later tile does not displace an earlier one.
        better = np.flatnonzero(block.max(axis=1) > best.min(axis=1))
        if not len(better):
            continue
        new, where = _largest(block[better], min(k, block.shape[1]))
        pool = np.concatenate([best[better], new], axis=1)
        origin = np.concatenate([numbers[better], where + start], axis=1)
        order = np.lexsort((origin, -pool), axis=1)[:, :k]
        best[better] = np.take_along_axis(pool, order, axis=1)
        numbers[better] = np.take_along_axis(origin, order, axis=1)
    return best, numbers


def _largest(block: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The k largest of each row with their columns, unordered; among equal ones, the first columns."""
    if k == block.shape[1]:
        return block, np.broadcast_to(np.arange(k), block.shape).copy()
    least = np.partition(block, block.shape[1] - k, axis=1)[:, block.shape[1] - k, None]
    kept = block > least
    equal = block == least
    room = k - kept.sum(axis=1, keepdims=True)
    crowded = np.flatnonzero(equal.sum(axis=1, keepdims=True) > room)
    equal[crowded] &= equal[crowded].cumsum(axis=1, dtype=np.int32) <= room[crowded]
    columns = np.nonzero(kept | equal)[1].reshape(len(block), k)
    return np.take_along_axis(block, columns, axis=1), columns


def _ranked_exactly(
    queries: NDArray[np.float32],
    references: NDArray[np.float32],
    numbers: NDArray[np.intp],
    left_out: NDArray[np.intp],
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    values = np.einsum("qd,qkd->qk", queries, references[numbers], dtype=np.float64)
    for column in left_out.T:
        values[numbers == column[:, None]] = -np.inf
    order = np.lexsort((numbers, -values), axis=1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, D), L2-normalised, as a new array; rows of zeros stay zero and are equally far from everything."""
    # np.linalg.norm would square all of it into a second array, in float32, where 1e20 overflows.
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    scale = 1 / np.where(lengths == 0, 1, lengths)
    scaled = np.empty(vectors.shape, np.float32)
    for start in range(
        0, len(vectors), 8192
    ):  # not all in float64, and not in float32, where 1e-41 has no scale
        part = slice(start, start + 8192)
        np.multiply(vectors[part], scale[part, None], out=scaled[part], casting="same_kind")
    return scaled


def as_cosines(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products of L2-normalised vectors clipped to -1…1, as arccos needs them: in float32 their length is 1 to seven
    digits only. Minus infinity stays."""
    return np.where(np.isneginf(products), products, np.clip(products, -1, 1))


def finite_rows(vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(N,) bool: which rows of (N, D) hold neither NaN nor infinity, found without a copy of the array."""
    fine = np.empty(len(vectors), np.bool_)
    for start in range(0, len(vectors), 65536):
        part = slice(start, start + 65536)
        fine[part] = np.isfinite(vectors[part]).all(axis=1)
    return fine
