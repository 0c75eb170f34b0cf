"""Rounds weights to int8 so that their products with real activations change least.

A layer's inputs vary much more in some directions than in others, so rounding each number to the nearest does not
change the layer's output least. As in GPTQ (Frantar et al. 2022, after Optimal Brain Surgeon), the rows of a kernel are
rounded one after the other, and the error of each is compensated in the remaining rows, as far as the inputs are
correlated. The scales follow each column's largest number.

With H = E[x xᵀ] over tokens of photographs (``calibration.py``), the error of the output is tr((W - Q)ᵀ H (W - Q)). If
U is the upper triangle with H⁻¹ = Uᵀ U, rounding row i by e_i = W_i - Q_i costs least when W_j -= U_ij / U_ii · e_i for
all j > i.

The integers do not use all levels of int8: x86 processors without VNNI add two products of uint8 and int8 in 16 bits,
where they saturate without an error. (The starter quantised by ONNX Runtime keeps only 91.7 % of its k-NN labels there:
``benchmarks/int8.py``.) ``quantize.py`` and ``static_int8.py`` choose the levels so that 2 · (largest uint8) · (largest
int8) < 2^15, and the products are exact on every processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rounded", "round_by_moments", "round_to_nearest"]

_DAMPING = 0.03
"""Share of the mean of H's diagonal that is added to it, so that directions absent from the photographs still count."""
_BLOCK = 128  # rows whose errors are compensated together


@dataclass(frozen=True)
class Rounded:
    """A kernel (K, N) as ``integers * scale``."""

    integers: NDArray[np.int8]
    """(K, N)."""
    scale: NDArray[np.float32]
    """(N,), positive."""

    @property
    def values(self) -> NDArray[np.float32]:
        """(K, N) float32: the rounded kernel."""
        return self.integers.astype(np.float32) * self.scale


def round_to_nearest(kernel: NDArray[np.float32], levels: int) -> Rounded:
    """Rounds each number of a kernel (K, N) to the nearest integer of -levels … levels, at a scale per column."""
    scale = _scale(kernel, levels)
    return Rounded(np.rint(kernel / scale).astype(np.int8), scale)


def round_by_moments(kernel: NDArray[np.float32], moments: NDArray[np.floating[Any]], levels: int) -> Rounded:
    """Rounds so that ``x @ kernel`` changes least.

    Args:
        kernel: (K, N) float32.
        moments: (K, K), the sum or mean of x xᵀ over many rows x; its scale does not matter.
        levels: integers are -levels … levels.

    Returns:
        As :func:`round_to_nearest` if the moments are all zero or not finite.
    """
    h = moments.astype(np.float64)
    level = float(np.mean(np.diag(h)))
    if not np.isfinite(h).all() or level <= 0 or not np.isfinite(kernel).all():
        return round_to_nearest(kernel, levels)
    scale = _scale(kernel, levels)
    # The most important rows are rounded first, while the most rows are left to compensate.
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
            rounded[i] = np.rint(left[i]).clip(-levels, levels)
            off[i - start] = (left[i] - rounded[i]) / upper[i, i]
            left[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], off[i - start])
        left[stop:] -= upper[start:stop, stop:].T @ off
    integers = np.empty(kernel.shape, np.int8)
    integers[order] = rounded
    return Rounded(integers, scale)


def _scale(kernel: NDArray[np.float32], levels: int) -> NDArray[np.float32]:
    scale: NDArray[np.float32] = (np.abs(kernel).max(axis=0) / levels).astype(np.float32)
    scale[scale == 0] = 1  # a column of zeros
    return scale
