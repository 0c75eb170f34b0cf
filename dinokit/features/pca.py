"""Patch features as colours: the first three principal components of all patches, as red, green and blue.

As in Oquab et al. 2023 (DINOv2), figure 1: similar features have similar colours, within a picture and between
pictures. Optionally, the first component of a preliminary analysis separates foreground from background, and only the
foreground is coloured.

::

    tokens = backbone.patch_tokens(images)      # (N, h, w, D)
    pca_colours(tokens)                         # (N, h, w, 3) uint8
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError

__all__ = ["Foreground", "PatchPCA", "fit_patch_pca", "otsu_threshold", "pca_colours"]

_CHUNK_BYTES = 64 * 2**20  # of tokens processed at once, in float64
_COLOURS = 3


@dataclass(frozen=True)
class Foreground:
    """Patches whose first component exceeds a threshold."""

    mean: NDArray[np.float32]
    """(D,)"""
    direction: NDArray[np.float32]
    """(D,) of length 1, towards the foreground"""
    threshold: float

    def of(self, tokens: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whether each token is foreground: (…, D) to (…)."""
        inside: NDArray[np.bool_] = (tokens - self.mean) @ self.direction > self.threshold
        return inside


@dataclass(frozen=True)
class PatchPCA:
    """Three directions in the space of patch tokens, and the range of values along each that the colours cover."""

    mean: NDArray[np.float32]
    """(D,) mean of the tokens"""
    components: NDArray[np.float32]
    """(3, D) directions of length 1, by decreasing variance; the largest number in each is positive"""
    explained: NDArray[np.float64]
    """(3,) share of the variance that each explains, 0 to 1"""
    low: NDArray[np.float32]
    """(3,) values that become 0"""
    high: NDArray[np.float32]
    """(3,) values that become 255"""
    foreground: Foreground | None = None
    """The foreground, if it was separated; other patches are black"""

    def scores(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """(…, D) tokens to (…, 3) float32 principal components, centred at 0."""
        return ((tokens - self.mean) @ self.components.T).astype(np.float32, copy=False)

    def colours(self, tokens: NDArray[np.float32]) -> NDArray[np.uint8]:
        """(…, D) tokens to (…, 3) uint8 RGB; patches outside the foreground are black."""
        tokens = np.asarray(tokens)
        span = np.maximum(self.high - self.low, 1e-12)  # a component without variance gives 0
        share = ((self.scores(tokens) - self.low) / span).clip(0, 1)
        colours: NDArray[np.uint8] = np.rint(255 * share).astype(np.uint8)
        if self.foreground is not None:
            colours[~self.foreground.of(tokens)] = 0
        return colours


def pca_colours(
    tokens: NDArray[np.float32],
    *,
    foreground: bool = False,
    percentiles: tuple[float, float] = (1, 99),
) -> NDArray[np.uint8]:
    """Colours patches by their principal components (:func:`fit_patch_pca`).

    Args:
        tokens: (h, w, D) or (N, h, w, D) float32, of ``backbone.patch_tokens``.

    Returns:
        (h, w, 3) or (N, h, w, 3) uint8.
    """
    return fit_patch_pca(tokens, foreground=foreground, percentiles=percentiles).colours(tokens)


def fit_patch_pca(
    tokens: NDArray[np.float32],
    *,
    foreground: bool = False,
    percentiles: tuple[float, float] = (1, 99),
) -> PatchPCA:
    """Principal components of patch tokens.

    Args:
        tokens: (h, w, D) or (N, h, w, D) float32; a ``numpy.memmap`` is read in parts, so it may be larger than
            memory.
        foreground: first split the patches in two by the first component (Otsu's threshold), keep the group
            that touches the pictures' borders less, and fit the colours to that group alone.
        percentiles: of each component, mapped to 0 and 255 of its colour; values beyond are clipped, so that a
            few outliers do not make the rest grey.

    Raises:
        UsageError: another shape, fewer than 3 numbers per token, tokens that are not finite, or invalid
            percentiles.
    """
    tokens = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens, np.float32)
    if tokens.ndim not in (3, 4) or tokens.shape[-1] < _COLOURS or not tokens.size:
        raise UsageError(
            f"the tokens have shape {tokens.shape}; expected (h, w, D) or (N, h, w, D) with at least "
            f"{_COLOURS} numbers per token, as backbone.patch_tokens returns them"
        )
    low, high = percentiles
    if not 0 <= low < high <= 100:
        raise UsageError(f"percentiles={percentiles} are invalid; expected 0 <= low < high <= 100")
    flat = tokens.reshape(-1, tokens.shape[-1])
    gate = _find_foreground(flat, tokens.shape[-3:-1]) if foreground else None
    mean, components, explained = _principal(flat, _COLOURS, gate)
    scores = np.concatenate([(part - mean) @ components.T for part in _parts(flat, gate)])
    ends = np.percentile(scores, percentiles, axis=0).astype(np.float32)
    return PatchPCA(mean, components, explained, ends[0], ends[1], gate)


def _find_foreground(flat: NDArray[np.float32], grid: tuple[int, ...]) -> Foreground:
    mean, components, _ = _principal(flat, 1, None)
    direction = components[0]
    scores = np.concatenate([(part - mean) @ direction for part in _parts(flat, None)])
    threshold = otsu_threshold(scores)
    border = np.ones(grid, np.bool_)
    border[1:-1, 1:-1] = False
    at_border = np.resize(border.ravel(), scores.shape)  # repeated for each picture
    above = scores > threshold
    # The subject of a photograph seldom fills its border. If there is only one group, all of it is foreground.
    if above.all() or at_border[above].mean() <= at_border[~above].mean():
        return Foreground(mean, direction, threshold)
    return Foreground(mean, -direction, -threshold)


def otsu_threshold(values: NDArray[np.floating[Any]]) -> float:
    """The threshold that best separates numbers into two groups (Otsu 1979).

    Exact: without a histogram, over all cuts between different numbers; half-way between the two neighbours. If all
    numbers are equal, it is slightly below them.
    """
    ordered = np.sort(values.ravel()).astype(np.float64)
    count, total = np.arange(1, len(ordered)), ordered.cumsum()
    below, above = total[:-1] / count, (total[-1] - total[:-1]) / (len(ordered) - count)
    between = count * (len(ordered) - count) * (above - below) ** 2
    between[ordered[1:] == ordered[:-1]] = -1  # no cut between equals
    if not len(between) or between.max() <= 0:
        return float(ordered[0] - max(1e-3 * abs(ordered[0]), 1e-6))
    cut = int(between.argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def _principal(
    flat: NDArray[np.float32], count: int, gate: Foreground | None
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Mean (D,), the first components (count, D) and their shares of the variance, of the tokens in the gate.

    From the D × D scatter matrix, accumulated part by part, instead of an SVD of all tokens at once.
    """
    width = flat.shape[1]
    total, n = np.zeros(width), 0
    for part in _parts(flat, gate):
        if not np.isfinite(part).all():
            raise UsageError("some tokens are not finite; check the pictures and the weights for NaN")
        total += part.sum(axis=0, dtype=np.float64)
        n += len(part)
    mean = total / n
    scatter = np.zeros((width, width))
    for part in _parts(flat, gate):
        centred = part - mean
        scatter += centred.T @ centred
    # The singular vectors of a scatter matrix are the principal components, largest first.
    directions, variances, _ = np.linalg.svd(scatter, hermitian=True)
    components = directions.T[:count]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = components * np.where(largest < 0, -1.0, 1.0)
    shares = variances[:count] / max(float(variances.sum()), 1e-300)
    return mean.astype(np.float32), components.astype(np.float32), shares


def _parts(flat: NDArray[np.float32], gate: Foreground | None) -> Iterator[NDArray[np.float32]]:
    rows = max(1, _CHUNK_BYTES // (8 * flat.shape[1]))
    for start in range(0, len(flat), rows):
        part = np.asarray(flat[start : start + rows])
        part = part if gate is None else part[gate.of(part)]
        if len(part):
            yield part
