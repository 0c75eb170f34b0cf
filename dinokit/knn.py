"""Weighted k-nearest-neighbour classification of embeddings, the paper's protocol.

Source: Caron et al. 2021, §3.2 and Wu et al. 2018; facebookresearch/dino `eval_knn.py`: cosine similarity, each of
the k nearest references votes for its label with weight exp(similarity / temperature).
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.errors import UsageError

__all__ = ["KNNClassifier"]

_BLOCK_BYTES = 256 * 2**20  # similarities held at a time


class KNNClassifier:
    """Labels by the votes of the k nearest references.

    Args:
        k: number of neighbours; the paper finds 20 best in all its runs.
        temperature: 0.07 in the paper. Lower gives near neighbours more weight.

    After :meth:`fit`, ``classes_`` holds the sorted labels and ``n_features_in_`` the width D.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        self.k = k
        self.temperature = temperature

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Keeps the references.

        Args:
            X: (N, D) embeddings, any length; they are L2-normalised here.
            y: (N,) labels.

        Raises:
            UsageError: shapes do not fit, or there are fewer references than ``k``.
        """
        references, labels = np.asarray(X, np.float32), np.asarray(y)
        if references.ndim != 2 or labels.shape != references.shape[:1]:
            raise UsageError(
                f"embeddings {references.shape} and labels {labels.shape} do not fit; expected (N, D) and (N,)"
            )
        if not 1 <= self.k <= len(references):
            raise UsageError(f"k={self.k} must lie between 1 and the number of references, {len(references)}")
        if self.temperature <= 0:
            raise UsageError(f"temperature={self.temperature} must be above 0, for instance 0.07")
        self.classes_, self._codes = np.unique(labels, return_inverse=True)
        self._references = _normalised(references)
        self.n_features_in_ = references.shape[1]
        return self

    def kneighbors(self, X: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """The k nearest references of each query.

        Args:
            X: (M, D) embeddings.

        Returns:
            (M, k) cosine similarities, falling, and (M, k) reference numbers. Memory stays bounded however many
            queries there are.
        """
        return self._nearest(self._checked(X), self.k)

    def _nearest(
        self, queries: NDArray[np.float32], k: int, *, leave_out: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """The k nearest references of normalised queries; ``leave_out``: query i never finds reference i."""
        rows = max(1, _BLOCK_BYTES // (4 * len(self._references)))
        similarities = np.empty((len(queries), k), np.float32)
        neighbours = np.empty((len(queries), k), np.intp)
        for start in range(0, len(queries), rows):
            block = queries[start : start + rows] @ self._references.T
            if leave_out:
                own = np.arange(len(block))
                block[own, start + own] = -np.inf
            nearest = np.argpartition(-block, k - 1, axis=1)[:, :k]
            found = np.take_along_axis(block, nearest, axis=1)
            # Equal similarities stand in the order of the references, on every machine.
            order = np.lexsort((nearest, -found), axis=1)
            neighbours[start : start + rows] = np.take_along_axis(nearest, order, axis=1)
            similarities[start : start + rows] = np.take_along_axis(found, order, axis=1)
        return similarities, neighbours

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """(M, D) embeddings to (M, n_classes) shares of the votes; a row sums to 1, columns as ``classes_``."""
        return self._shares(*self.kneighbors(X))

    def leave_one_out_proba(self) -> NDArray[np.float64]:
        """Each reference judged by the others: (N, n_classes) shares as of :meth:`predict_proba`.

        Every reference is a query whose own entry is left out of the k nearest (of N - 1 where there are no
        more). The share of right answers says what to expect of the classifier on pictures like these; copies
        of one picture among the references make it look better than it is.

        Raises:
            UsageError: not fitted, or there is one reference only.
        """
        self._must_be_fitted()
        count = len(self._references)
        if count < 2:
            raise UsageError("leaving one out of one reference leaves nothing; fit at least 2")
        return self._shares(*self._nearest(self._references, min(self.k, count - 1), leave_out=True))

    def leave_one_out_score(self) -> float:
        """Share of the references that the others label rightly (:meth:`leave_one_out_proba`), 0 to 1."""
        return float(np.mean(self.leave_one_out_proba().argmax(axis=1) == self._codes))

    def _shares(self, similarities: NDArray[np.float32], neighbours: NDArray[np.intp]) -> NDArray[np.float64]:
        # exp(s / T) of the reference, divided by the largest in the row, which changes no share.
        weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / self.temperature)
        votes = np.zeros((len(weights), len(self.classes_)))
        rows = np.broadcast_to(np.arange(len(weights))[:, None], weights.shape)
        np.add.at(votes, (rows, self._codes[neighbours]), weights)
        shares: NDArray[np.float64] = votes / votes.sum(axis=1, keepdims=True)
        return shares

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """(M, D) embeddings to (M,) labels."""
        winners = self.predict_proba(X).argmax(axis=1)
        labels: NDArray[Any] = self.classes_[winners]
        return labels

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Share of the queries (M, D) whose label in ``y`` (M,) is predicted: top-1 accuracy, 0 to 1."""
        return float(np.mean(self.predict(X) == np.asarray(y)))

    def _must_be_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise UsageError("this KNNClassifier has no references yet; call fit(embeddings, labels) first")

    def _checked(self, X: ArrayLike) -> NDArray[np.float32]:
        self._must_be_fitted()
        queries = np.asarray(X, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.n_features_in_:
            raise UsageError(
                f"queries have shape {queries.shape}; expected (M, {self.n_features_in_}), as the references have"
            )
        return _normalised(queries)


def _normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalised: NDArray[np.float32] = vectors / np.maximum(lengths, np.float32(1e-12))
    return normalised
