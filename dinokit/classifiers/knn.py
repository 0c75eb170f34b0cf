"""Weighted k-nearest-neighbour classification of embeddings by the paper's protocol.

Source: Caron et al. 2021, §3.2, and Wu et al. 2018; facebookresearch/dino `eval_knn.py`. Each of the k nearest
references by cosine similarity votes for its label with weight exp(similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.classifiers.votes import (
    check_temperature,
    nearest_others,
    parts_of_queries,
    shares_of_votes,
)
from dinokit.errors import UsageError
from dinokit.estimator import (
    BaseEstimator,
    ClassifierMixin,
    NotFittedError,
    accuracy,
    check_columns,
    check_labels,
    check_matrix,
    check_whole,
    check_width,
    remember_columns,
)
from dinokit.neighbours.nearest import as_cosines, nearest, normalised

__all__ = ["Judged", "KNNClassifier"]


class Judged(NamedTuple):
    """What :meth:`KNNClassifier.judge` returns for M queries."""

    winners: NDArray[np.intp]
    """(M,) numbers in ``classes_``; with equal votes, the first."""
    shares: NDArray[np.float64]
    """(M,) the winners' shares of the votes."""
    given_shares: NDArray[np.float64] | None
    """(M,) the shares of the given classes."""
    similarities: NDArray[np.float32]
    """(M, k_), as :meth:`KNNClassifier.kneighbors` returns them; so are the neighbours."""
    neighbours: NDArray[np.intp]


class KNNClassifier(ClassifierMixin, BaseEstimator):
    """Labels by the votes of the k nearest references.

    A scikit-learn estimator if scikit-learn is installed, with the same behaviour without it. Exact, in bounded
    memory: the references in float32 plus a few hundred megabytes.

    Args:
        k: number of neighbours; the paper finds 20 best in all its runs. If there are fewer references, all vote.
        temperature: 0.07 in the paper. A lower one gives near neighbours more weight.

    After :meth:`fit`, ``classes_`` holds the sorted labels, ``k_`` the number of neighbours that vote (``k``, or the
    number of references if there are fewer), ``n_features_in_`` the width D, and ``feature_names_in_`` the column names
    if X was a data frame with names.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        self.k = k
        self.temperature = temperature

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Keeps the references.

        Args:
            X: (N, D) embeddings of any length; they are L2-normalised here.
            y: (N,) labels: names or whole numbers.

        Raises:
            UsageError: shapes do not match, values are not finite, or k or temperature is invalid.
        """
        references = check_matrix(X)
        labels = check_labels(y, len(references))
        classes, codes = np.unique(labels, return_inverse=True)
        k = check_whole(self.k, "k")
        if k < 1:
            raise UsageError(f"k={self.k} must be at least 1; the paper uses 20")
        check_temperature(self.temperature)
        remember_columns(self, X)
        self.classes_, self._codes = classes, codes
        self.k_ = min(k, len(references))
        self._references = normalised(references)
        self.n_features_in_ = references.shape[1]
        return self

    def kneighbors(
        self, X: ArrayLike, leave_out: ArrayLike | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """The k nearest references of each query.

        Args:
            X: (M, D) embeddings.
            leave_out: (M,) or (M, L) numbers of the references that each query is not compared with, -1 for none;
                for queries that are references themselves.

        Returns:
            (M, k_) cosine similarities in descending order, and (M, k_) reference numbers; among equally similar
            references, the earlier comes first. An embedding of zeros has similarity 0 to all. References that are
            left out have minus infinity and come last, if fewer than k_ others remain.

        Raises:
            UsageError: not fitted, shapes do not match, values are not finite, or no reference remains.
        """
        similarities, neighbours = self._nearest(X, leave_out)
        return as_cosines(similarities).astype(np.float32), neighbours

    def judge(
        self, X: ArrayLike, leave_out: ArrayLike | None = None, *, given: ArrayLike | None = None
    ) -> Judged:
        """The results of :meth:`predict` and :meth:`kneighbors` from one search, with the winners' shares of the votes
        but no table of all votes.

        Args:
            X: (M, D) embeddings.
            leave_out: as for :meth:`kneighbors`.
            given: (M,) numbers of classes whose shares are also returned.
        """
        similarities, neighbours = self._nearest(X, leave_out)
        count = len(neighbours)
        winners, shares, of_given = np.empty(count, np.intp), np.empty(count), np.empty(count)
        for part in self._parts(count):
            votes = self._shares(similarities[part], neighbours[part])
            rows = np.arange(len(votes))
            winners[part] = votes.argmax(axis=1)
            shares[part] = votes[rows, winners[part]]
            if given is not None:
                of_given[part] = votes[rows, np.asarray(given)[part]]
        found = as_cosines(similarities).astype(np.float32)
        return Judged(winners, shares, None if given is None else of_given, found, neighbours)

    def predict_proba(self, X: ArrayLike, leave_out: ArrayLike | None = None) -> NDArray[np.float64]:
        """(M, D) embeddings to (M, n_classes) shares of the votes; a row sums to 1, columns as ``classes_``.

        ``leave_out``: references that do not vote for a query, as for :meth:`kneighbors`.
        """
        return self._shares(*self._nearest(X, leave_out))

    def leave_one_out_proba(self) -> NDArray[np.float64]:
        """Each reference classified by the others: (N, n_classes) shares, as :meth:`predict_proba` returns them.

        Every reference is a query that is left out of its own k nearest (at most N - 1). The share of right answers is
        what to expect of the classifier on pictures like these; copies of one picture among the references make it
        look better than it is.

        Raises:
            UsageError: not fitted, or there is only one reference.
        """
        return self._shares(*self._nearest_others())

    def leave_one_out_score(self) -> float:
        """Share of the references that the others label correctly (:meth:`leave_one_out_proba`), 0 to 1."""
        return float(np.mean(self._winners(*self._nearest_others()) == self._codes))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """(M, D) embeddings to (M,) labels; with equal votes, the first in ``classes_``."""
        winners = self._winners(*self._nearest(X))
        labels: NDArray[Any] = self.classes_[winners]
        return labels

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Share of the queries (M, D) whose label in ``y`` (M,) is predicted: top-1 accuracy, 0 to 1."""
        return accuracy(self.predict(X), y, sample_weight)

    # -- how

    def _nearest(
        self, X: ArrayLike, leave_out: ArrayLike | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        queries = self._checked(X)
        if leave_out is None:
            return nearest(queries, self._references, self.k_)
        numbers = np.asarray(leave_out)
        if numbers.ndim not in (1, 2) or len(numbers) != len(queries) or numbers.dtype.kind not in "iu":
            raise UsageError(
                f"leave_out has shape {numbers.shape} and dtype {numbers.dtype}; expected whole numbers, "
                f"({len(queries)},) or ({len(queries)}, L), -1 for none"
            )
        numbers = (numbers if numbers.ndim == 2 else numbers[:, None]).astype(np.intp)
        similarities, neighbours = nearest(queries, self._references, self.k_, leave_out=numbers)
        alone = np.flatnonzero(np.isneginf(similarities[:, 0]))
        if len(alone):
            raise UsageError(
                f"all references are left out for query {alone[0]}; expected at least one to vote"
            )
        return similarities, neighbours

    def _nearest_others(self) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        self._must_be_fitted()
        return nearest_others(self._references, self.k_)

    def _shares(self, similarities: NDArray[np.float64], neighbours: NDArray[np.intp]) -> NDArray[np.float64]:
        return shares_of_votes(
            similarities,
            self._codes[neighbours],
            n_classes=len(self.classes_),
            temperature=self.temperature,
        )

    def _winners(self, similarities: NDArray[np.float64], neighbours: NDArray[np.intp]) -> NDArray[np.intp]:
        """(M,) numbers of the labels with most votes, found without a table of all votes of all queries."""
        winners = np.empty(len(neighbours), np.intp)
        for part in self._parts(len(neighbours)):
            winners[part] = self._shares(similarities[part], neighbours[part]).argmax(axis=1)
        return winners

    def _parts(self, count: int) -> Iterator[slice]:
        return parts_of_queries(count, len(self.classes_))

    def _must_be_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise NotFittedError(
                "this KNNClassifier has no references yet; call fit(embeddings, labels) first"
            )

    def _checked(self, X: ArrayLike) -> NDArray[np.float32]:
        """Queries as normalised float32."""
        self._must_be_fitted()
        check_columns(X, getattr(self, "feature_names_in_", None), type(self).__name__)
        queries = check_matrix(X, "queries")
        check_width(queries, self, "queries")
        return normalised(queries)
