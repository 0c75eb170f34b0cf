"""Weights to int8 so that the products with real activations change least, not the weights themselves.

A layer's inputs are far from equal in all directions, so of all ways to round a weight matrix, the one that moves
each number least is not the one that moves the layer's output least. As in GPTQ (Frantar et al. 2022, after Optimal
Brain Surgeon), the rows of a kernel are rounded one after the other, and what each is off by is made up for in the
rows that are still to come, as far as the inputs go together. The scales stay those of each column's largest number.

With H = E[x xᵀ] over tokens of photographs (``calibration.py``), the error of the output is tr((W - Q)ᵀ H (W - Q)). If
U is the upper triangle with H⁻¹ = Uᵀ U, rounding row i by e_i = W_i - Q_i costs least when W_j -= U_ij / U_ii · e_i for
all j > i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVELS", "Rounded", "round_by_moments", "round_to_nearest"]

LEVELS = 127
"""Integers are -LEVELS … LEVELS."""

_DAMPING = 0.03
"""Of the mean of H's diagonal: directions that the photographs never showed still count."""
_BLOCK = 128  # rows that are made up for at once


@dataclass(frozen=True)
class Rounded:
    """``integers * scale`` stands for a kernel (K, N)."""

    integers: NDArray[np.int8]
    """(K, N), -127 … 127."""
    scale: NDArray[np.float32]
    """(N,), positive."""

    @property
    def values(self) -> NDArray[np.float32]:
        """(K, N) float32: the kernel that is computed with."""
        return self.integers.astype(np.float32) * self.scale


def round_to_nearest(kernel: NDArray[np.float32]) -> Rounded:
    """Each number by itself; kernel (K, N)."""
    scale = _scale(kernel)
    return Rounded(np.rint(kernel / scale).astype(np.int8), scale)


def round_by_moments(kernel: NDArray[np.float32], moments: NDArray[np.floating[Any]]) -> Rounded:
    """So that ``x @ kernel`` changes least.

    Args:
        kernel: (K, N) float32.
        moments: (K, K), the sum or mean of x xᵀ over many rows x; its size does not matter.

    Returns:
        As :func:`round_to_nearest` where the moments are all zero or not finite: then nothing is known.
    """
    h = moments.astype(np.float64)
    level = float(np.mean(np.diag(h)))
    if not np.isfinite(h).all() or level <= 0 or not np.isfinite(kernel).all():
        return round_to_nearest(kernel)
    scale = _scale(kernel)
    # What counts most is rounded while most can still be made up for.
    order = np.argsort(-np.diag(h), kind="stable")
    h = h[np.ix_(order, order)] / level
    h[np.diag_indices_from(h)] += _DAMPING
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    left = kernel.astype(np.float64)[order] / scale  # in steps
    rounded = np.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        off = np.empty((stop - start, left.shape[1]))
        for i in range(start, stop):
            rounded[i] = np.rint(left[i]).clip(-LEVELS, LEVELS)
            off[i - start] = (left[i] - rounded[i]) / upper[i, i]
            left[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], off[i - start])
        left[stop:] -= upper[start:stop, stop:].T @ off
    integers = np.empty(kernel.shape, np.int8)
    integers[order] = rounded
    return Rounded(integers, scale)


def _scale(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    scale: NDArray[np.float32] = (np.abs(kernel).max(axis=0) / LEVELS).astype(np.float32)
    scale[scale == 0] = 1  # a column of zeros
    return scale
