"""Places on a plane: photographs that resemble each other lie together.

The built-in layout is t-SNE (van der Maaten and Hinton 2008) in numpy alone, in the form that later work found
best for thousands of points:

- affinities are equal weights on the graph of nearest neighbours, not a perplexity for each point (Böhm, Berens
  and Kobak 2022, "Attraction-repulsion spectrum": the same maps);
- it starts from the two first principal components, which fixes the large arrangement and makes the map the
  same each time (Kobak and Berens 2019, "The art of using t-SNE for single-cell transcriptomics"), with the
  learning rate N / exaggeration (Belkina et al. 2019);
- repulsion is a convolution on a grid by FFT (Linderman et al. 2019, FIt-SNE), in time N rather than N². Where
  FIt-SNE convolves four moments with two kernels, here the points' density is convolved with the force itself,
  two components: its sum over a point's own neighbourhood is zero, so nothing is lost in a difference.

No random number is drawn. On other processors sums come out otherwise in their last digits; the map keeps its
arrangement, not each place to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import DinokitError, UsageError

__all__ = ["LAYOUTS", "lay_out", "principal_components", "repulsion"]

LAYOUTS = ("builtin", "pca", "umap", "tsne")

_STEPS = 750
_EARLY_STEPS = 250  # with attraction multiplied, while the large arrangement forms
_EARLY_EXAGGERATION = 12.0
_EXACT_UP_TO = 300  # points whose repulsion is summed pair by pair, as fast as the grid
_GRID_STEP = 0.33  # of the kernel's own unit
_GRID_MOST = 640  # nodes along a side; a wider map gets a coarser grid

Array = NDArray[np.float64]
Progress = Callable[[int], None]


def lay_out(
    rows: NDArray[np.float32],
    neighbours: NDArray[np.intp],
    method: str = "builtin",
    on_progress: Progress | None = None,
) -> Array:
    """Photographs on a plane.

    Args:
        rows: (N, D) float32 embeddings of length 1.
        neighbours: (N, k) nearest other rows of each, as of :func:`dinokit.neighbours.nearest.nearest`.
        method: ``builtin``, ``pca``, or a library that must be installed: ``umap`` (umap-learn), ``tsne``
            (openTSNE or scikit-learn).
        on_progress: called with the share of a hundred that was done.

    Returns:
        (N, 2) float64, centred, the widest of all sides from -1 to 1.

    Raises:
        UsageError: an unknown method.
        DinokitError: the library is not installed.
    """
    if method not in LAYOUTS:
        raise UsageError(f"the layout {method!r} is not known; expected one of {', '.join(LAYOUTS)}")
    if len(rows) < 4:  # nothing to arrange
        places: Array = np.stack([np.arange(len(rows), dtype=np.float64), np.zeros(len(rows))], axis=1)
    elif method == "pca":
        places = principal_components(rows, 2)
    elif method == "umap":
        places = _umap(rows)
    elif method == "tsne":
        places = _library_tsne(rows)
    else:
        places = _neighbour_embedding(principal_components(rows, 2), neighbours, on_progress)
    places = places - (places.max(axis=0) + places.min(axis=0)) / 2
    widest = np.abs(places).max()
    return places / widest if widest > 0 else places


def principal_components(rows: NDArray[np.float32], count: int) -> Array:
    """Projections on the ``count`` first principal components, (N, count) float64, or (N, D) where D is less.

    The sign of each is chosen so that its largest loading is positive: the same on every machine.
    """
    centred = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    axes = vectors[:, ::-1][:, :count]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    projected: Array = centred.astype(np.float64) @ (axes * signs)
    if projected.shape[1] < count:
        projected = np.pad(projected, ((0, 0), (0, count - projected.shape[1])))
    return projected


# -- the built-in layout


@dataclass(frozen=True)
class _Graph:
    """Affinities p_ij as a sparse symmetric matrix that sums to 1, sorted by ``source``."""

    source: NDArray[np.intp]
    target: NDArray[np.intp]
    weight: Array


def _affinities(neighbours: NDArray[np.intp]) -> _Graph:
    count, k = neighbours.shape
    source = np.repeat(np.arange(count, dtype=np.int64), k)
    target = neighbours.reshape(-1).astype(np.int64)
    both, times = np.unique(
        np.concatenate([source * count + target, target * count + source]), return_counts=True
    )
    return _Graph(both // count, both % count, times / (2 * count * k))


def _neighbour_embedding(start: Array, neighbours: NDArray[np.intp], on_progress: Progress | None) -> Array:
    graph = _affinities(neighbours)
    count = len(start)
    places = start / max(float(start[:, 0].std()), 1e-12) * 1e-4
    # Copies of one picture start, and would stay, at one place: a grain of unevenness lets them part.
    places += 1e-6 * _uneven(count)
    velocity, gains = np.zeros_like(places), np.ones_like(places)
    for step in range(_STEPS):
        early = step < _EARLY_STEPS
        exaggeration = _EARLY_EXAGGERATION if early else 1.0
        force, total = repulsion(places)
        gradient = 4 * (exaggeration * _attraction(places, graph) - force / total)
        # Delta-bar-delta, with van der Maaten's own constants: faster where the direction holds.
        turned = (gradient > 0) == (velocity > 0)
        gains = np.where(turned, gains * 0.8, gains + 0.2).clip(min=0.01)
        rate = max(count / exaggeration, 50.0)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        # A point never jumps further than the map is wide.
        lengths = np.linalg.norm(velocity, axis=1, keepdims=True)
        velocity *= np.minimum(1, 5 / np.maximum(lengths, 1e-12))
        places = places + velocity
        places -= places.mean(axis=0)
        if on_progress is not None and (step + 1) * 100 // _STEPS > step * 100 // _STEPS:
            on_progress((step + 1) * 100 // _STEPS - step * 100 // _STEPS)
    return places


def _uneven(count: int) -> Array:
    """(N, 2) numbers between -1 and 1 that never repeat: multiples of irrational numbers (Weyl's sequence)."""
    steps = np.arange(1, count + 1, dtype=np.float64)[:, None]
    spread: Array = 2 * ((steps * np.array([0.7548776662466927, 0.5698402909980532])) % 1) - 1
    return spread


def _attraction(places: Array, graph: _Graph) -> Array:
    """Sum over j of p_ij (y_i - y_j) / (1 + |y_i - y_j|²), (N, 2)."""
    apart = places[graph.source] - places[graph.target]
    pull = apart * (graph.weight / (1 + np.einsum("ij,ij->i", apart, apart)))[:, None]
    count = len(places)
    return np.stack([np.bincount(graph.source, pull[:, axis], count) for axis in (0, 1)], axis=1)


def repulsion(places: Array, *, exact: bool | None = None) -> tuple[Array, float]:
    """The repulsive half of t-SNE's gradient, before it is normalised.

    Args:
        places: (N, 2).
        exact: sum pair by pair; by default for few points only.

    Returns:
        the sum over j of (y_i - y_j) / (1 + |y_i - y_j|²)², (N, 2), and the normaliser, the sum over all
        i ≠ j of 1 / (1 + |y_i - y_j|²).
    """
    if len(places) <= _EXACT_UP_TO if exact is None else exact:
        return _pairwise_repulsion(places)
    return _grid_repulsion(places)


def _pairwise_repulsion(places: Array) -> tuple[Array, float]:
    squares = np.einsum("ij,ij->i", places, places)
    kernel = 1 / (1 + np.maximum(squares[:, None] + squares - 2 * places @ places.T, 0))
    np.fill_diagonal(kernel, 0)
    total = float(kernel.sum())
    kernel *= kernel
    return kernel.sum(axis=1)[:, None] * places - kernel @ places, max(total, 1e-12)


def _grid_repulsion(places: Array) -> tuple[Array, float]:
    low = places.min(axis=0)
    width = float((places.max(axis=0) - low).max())
    # A map that has hardly opened yet has nodes as fine as its points need them.
    step = max(min(_GRID_STEP, width / 40), width / (_GRID_MOST - 4), 1e-9)
    # Few different sizes, so that the kernels are seldom computed again; all are fast for an FFT.
    side = min(_GRID_MOST, 32 * -(-(int(width / step) + 4) // 32))
    nodes, weights = _stencil((places - low) / step + 1, side)
    density = np.bincount(nodes.reshape(-1), weights.reshape(-1), side * side).reshape(side, side)
    total_kernel, force_kernels = _kernels(side, step)
    spectrum = np.fft.rfft2(density, (2 * side, 2 * side))
    fields = np.fft.irfft2(spectrum * force_kernels, (2 * side, 2 * side))[:, :side, :side].reshape(2, -1)
    force = np.stack([(field[nodes] * weights).sum(axis=1) for field in fields], axis=1)
    # The sum over all pairs, each point with itself included, by Parseval's theorem: no way back is needed.
    power = np.abs(spectrum) ** 2 * total_kernel
    pairs = 2 * power.sum() - power[:, 0].sum() - power[:, -1].sum()
    total = float(pairs / (4 * side * side)) - len(places)
    return force, max(total, 1e-12)


def _stencil(places: Array, side: int) -> tuple[NDArray[np.intp], Array]:
    """The 4 x 4 nodes around each point, (N, 16) numbers, and Lagrange's cubic weights for them."""
    cell = np.floor(places).astype(np.intp)
    t = places - cell
    weights = np.stack(
        [
            -t * (t - 1) * (t - 2) / 6,
            (t + 1) * (t - 1) * (t - 2) / 2,
            -(t + 1) * t * (t - 2) / 2,
            (t + 1) * t * (t - 1) / 6,
        ],
        axis=-1,
    )  # (N, 2, 4)
    around = cell[:, :, None] + np.arange(-1, 3)
    nodes = around[:, 0, :, None] * side + around[:, 1, None, :]
    return nodes.reshape(len(places), 16), (weights[:, 0, :, None] * weights[:, 1, None, :]).reshape(-1, 16)


_kept: dict[tuple[int, float], tuple[Array, NDArray[np.complex128]]] = {}


def _kernels(side: int, step: float) -> tuple[Array, NDArray[np.complex128]]:
    """Spectra of 1 / (1 + d²) and of both components of d / (1 + d²)² on a grid twice as wide: no wrapping."""
    key = (side, step)
    if key not in _kept:
        _kept.clear()  # one grid at a time
        distance = step * ((np.arange(2 * side) + side) % (2 * side) - side)
        kernel = 1 / (1 + distance[:, None] ** 2 + distance**2)
        force = np.stack([distance[:, None] * kernel**2, distance * kernel**2])
        _kept[key] = np.fft.rfft2(kernel).real, np.fft.rfft2(force)
    return _kept[key]


# -- libraries


def _umap(rows: NDArray[np.float32]) -> Array:
    try:
        umap = import_module("umap")
    except ImportError as error:
        raise _missing("umap", "umap-learn") from error
    model: Any = umap.UMAP(n_neighbors=min(15, len(rows) - 1), metric="cosine", random_state=0)
    return np.asarray(model.fit_transform(rows), np.float64)


def _library_tsne(rows: NDArray[np.float32]) -> Array:
    perplexity = min(30.0, (len(rows) - 1) / 3)
    try:
        open_tsne = import_module("openTSNE")
    except ImportError:
        pass
    else:
        return np.asarray(open_tsne.TSNE(perplexity=perplexity, metric="cosine", random_state=0).fit(rows))
    try:
        manifold = import_module("sklearn.manifold")
    except ImportError as error:
        raise _missing("tsne", "openTSNE") from error
    # Rows have length 1: squared Euclidean distances order them as cosines do.
    model = manifold.TSNE(perplexity=perplexity, init="pca", random_state=0)
    return np.asarray(model.fit_transform(rows), np.float64)


def _missing(method: str, package: str) -> DinokitError:
    return DinokitError(
        f"the layout {method!r} needs {package}, which is not installed. Install it with: pip install {package}, "
        "or use --layout builtin, which needs nothing"
    )
