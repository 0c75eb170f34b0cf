"""The exact search: among vectors that lie close together, and at the edges of float32."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import dinokit.neighbours.nearest
from dinokit import KNNClassifier
from dinokit.neighbours.nearest import as_cosines, nearest, normalised


def burst(noise: float, count: int = 600) -> NDArray[np.float32]:
    """Vectors around one point, as of the frames of a film."""
    rng = np.random.default_rng(3)
    return normalised(
        (rng.standard_normal(192) + noise * rng.standard_normal((count, 192))).astype(np.float32)
    )


@pytest.mark.parametrize("tile", [64, 16384])
@pytest.mark.parametrize("noise", [1.0, 0.01, 0.001])
def test_of_close_vectors_the_nearest_are_those_of_float64(
    noise: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dinokit.neighbours.nearest, "_REFERENCES", tile)
    references = burst(noise)
    queries = references[::7]
    products = queries.astype(np.float64) @ references.astype(np.float64).T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :20]
    values, numbers = nearest(queries, references, 20)
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_allclose(values, np.take_along_axis(products, expected, axis=1), atol=1e-13)
    for row in (0, 11, 50):  # alone as among others
        np.testing.assert_array_equal(nearest(queries[row : row + 1], references, 20)[1][0], numbers[row])


def test_close_vectors_that_are_left_out() -> None:
    references = burst(0.001)
    _, numbers = nearest(references, references, 20, leave_out=True)
    products = references.astype(np.float64) @ references.astype(np.float64).T
    np.fill_diagonal(products, -np.inf)
    np.testing.assert_array_equal(numbers, np.argsort(-products, axis=1, kind="stable")[:, :20])


def test_of_many_copies_the_earliest_are_found() -> None:
    """More of them than are kept beside the k."""
    rng = np.random.default_rng(4)
    vectors = normalised(rng.standard_normal((20, 33)).astype(np.float32))
    _, numbers = nearest(vectors, np.tile(vectors, (40, 1)), 10)
    np.testing.assert_array_equal(numbers, np.arange(20)[:, None] + 20 * np.arange(10))


def test_lengths_at_the_edges_of_float32() -> None:
    vectors = np.array([[1e-41, 0], [3e20, 4e20], [0, 0], [3e-30, -4e-30]], np.float32)
    np.testing.assert_allclose(normalised(vectors), [[1, 0], [0.6, 0.8], [0, 0], [0.6, -0.8]], atol=1e-6)


def test_cosines_are_within_one() -> None:
    np.testing.assert_array_equal(
        as_cosines(np.array([1 + 1e-7, -1 - 1e-7, 0.5, -np.inf])), [1, -1, 0.5, -np.inf]
    )
    many = np.random.default_rng(0).standard_normal((500, 192)).astype(np.float32)
    similarities, _ = KNNClassifier(k=3).fit(many, np.arange(500) % 2).kneighbors(many)
    assert similarities.max() == 1 and np.isfinite(np.arccos(similarities)).all()
