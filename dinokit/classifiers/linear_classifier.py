"""Logistic regression on frozen features: the classifier of a linear probe, which can be kept and used.

As in Radford et al. 2021 (CLIP, appendix A.3) and DINOv2's ``log_regression.py``: L-BFGS; the strength of the L2
penalty is chosen on a held-out part of the training pictures, then the classifier is fitted on all of them. They
choose by accuracy, dinokit by log-loss: several strengths often label a few held-out pictures equally well, and the
strongest penalty among these makes all classes about equally probable. Fitting needs scikit-learn,
prediction only numpy.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.errors import DinokitError, UsageError
from dinokit.estimator import (
    BaseEstimator,
    ClassifierMixin,
    NotFittedError,
    accuracy,
    check_columns,
    check_labels,
    check_matrix,
    check_real,
    check_seed,
    check_width,
    remember_columns,
)

__all__ = [
    "STRENGTHS",
    "LinearClassifier",
    "LogisticFit",
    "fit_logistic",
    "have_sklearn",
    "must_have_sklearn",
]

STRENGTHS = tuple(10.0**power for power in (-4, -3, -2, -1, 0, 1, 2))
"""scikit-learn's C, the inverse of the penalty's strength."""
_HELD_OUT = 0.2
_STEPS = 1000


def have_sklearn() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


class LinearClassifier(ClassifierMixin, BaseEstimator):
    """Labels by a linear map of the embedding and a softmax.

    A scikit-learn estimator if scikit-learn is installed. :meth:`fit` needs it (L-BFGS); a fitted classifier predicts
    without it. ``dinokit fit`` and :func:`dinokit.export.export_classifier` write it with its network to an ONNX file.

    Args:
        C: inverse strength of the L2 penalty, as in scikit-learn, for features of root mean square 1. None: the value
            in ``STRENGTHS`` with the lowest log-loss on a held-out fifth.
        seed: for the choice of what is held out.

    After :meth:`fit`, ``classes_`` holds the sorted labels, ``coef_`` (n_classes, D) and ``intercept_`` (n_classes,)
    float64 the map, ``C_`` the strength, ``converged_`` whether L-BFGS converged, ``n_features_in_`` D, and
    ``feature_names_in_`` the column names if X was a data frame with names.
    """

    def __init__(self, C: float | None = None, seed: int = 0) -> None:
        self.C = C
        self.seed = seed

    def fit(self, X: ArrayLike, y: ArrayLike, *, on_progress: Callable[[int], None] | None = None) -> Self:
        """Fits the map.

        Args:
            X: (N, D) embeddings as the model makes them. They are centred and scaled here; the map is for the
                originals.
            y: (N,) labels, names or whole numbers, of at least two classes.
            on_progress: called with 1 for each of the ``len(STRENGTHS) + 1`` fits.

        Raises:
            DinokitError: scikit-learn is not installed.
            UsageError: shapes do not match, values are not finite, there is only one class, or C is invalid.
        """
        must_have_sklearn()
        vectors = check_matrix(X)
        classes, codes = np.unique(check_labels(y, len(vectors)), return_inverse=True)
        if len(classes) < 2:
            raise UsageError(
                f"all {len(vectors)} embeddings have one class, {str(classes[0])!r}; a classifier needs at least two"
            )
        if self.C is not None and not check_real(self.C, "C") > 0:
            raise UsageError(f"C={self.C} must be above 0, for instance 1.0, or None to have it chosen")
        strengths = STRENGTHS if self.C is None else (float(self.C),)
        rng = np.random.default_rng(check_seed(self.seed))
        remember_columns(self, X)
        made = fit_logistic(
            vectors.astype(np.float64), codes, strengths, rng, on_progress or (lambda _: None)
        )
        self.classes_, self.coef_, self.intercept_ = classes, made.weight, made.bias
        self.C_, self.converged_ = made.strength, made.converged
        self.n_features_in_ = vectors.shape[1]
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """(M, D) embeddings to (M, n_classes) logits; for two classes, as in scikit-learn, (M,) of the second class."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """(M, D) embeddings to (M, n_classes) probabilities; a row sums to 1, columns as ``classes_``."""
        logits = self._logits(X)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
        return shares

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """(M, D) embeddings to (M,) labels; among equally probable ones, the first in ``classes_``."""
        winners = self._logits(X).argmax(axis=1)
        labels: NDArray[Any] = self.classes_[winners]
        return labels

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Share of the embeddings (M, D) whose label in ``y`` (M,) is predicted: top-1 accuracy, 0 to 1."""
        return accuracy(self.predict(X), y, sample_weight)

    def _logits(self, X: ArrayLike) -> NDArray[np.float64]:
        if not hasattr(self, "classes_"):
            raise NotFittedError(
                "this LinearClassifier is not fitted yet; call fit(embeddings, labels) first"
            )
        check_columns(X, getattr(self, "feature_names_in_", None), type(self).__name__)
        queries = check_matrix(X)
        check_width(queries, self)
        logits: NDArray[np.float64] = queries.astype(np.float64) @ self.coef_.T + self.intercept_
        return logits


# -- the fit


def must_have_sklearn() -> None:
    """Raises DinokitError if scikit-learn is not installed."""
    if not have_sklearn():
        raise DinokitError(
            "a linear classifier is fitted by scikit-learn, which is not installed: pip install scikit-learn"
        )


@dataclass(frozen=True)
class LogisticFit:
    """A linear map to logits, ``vectors @ weight.T + bias``; their softmax is the probabilities."""

    weight: NDArray[np.float64]
    """(C, D)."""
    bias: NDArray[np.float64]
    """(C,)."""
    strength: float
    """scikit-learn's C, as chosen."""
    converged: bool


def fit_logistic(
    vectors: NDArray[np.float64],
    codes: NDArray[np.intp],
    strengths: Sequence[float],
    rng: np.random.Generator,
    step: Callable[[int], None],
) -> LogisticFit:
    """The fit with the strength of the lowest log-loss on held-out vectors; among equals, the strongest penalty.

    Features are centred and divided by their root mean square, a single number, so that the strengths mean the same
    for every model.

    Args:
        vectors: (N, D).
        codes: (N,) classes, 0 to C - 1, each of which occurs.
        strengths: to choose from; with only one, nothing is held out.
        rng: draws what is held out.
        step: called with 1 for each fit.
    """
    mean = vectors.mean(axis=0)
    scale = 1 / max(float(np.sqrt(np.mean((vectors - mean) ** 2))), 1e-12)
    scaled = (vectors - mean) * scale
    best, least = strengths[len(strengths) // 2], np.inf
    held = _held_out(codes, rng) if len(strengths) > 1 else np.zeros(len(codes), np.bool_)
    if held.any() and len(np.unique(codes[~held])) > 1:
        model: Any = None
        for strength in sorted(strengths):  # each starts from the result of the one before
            model, _ = _regression(scaled[~held], codes[~held], strength, model)
            shares = model.predict_proba(scaled[held])[range(held.sum()), codes[held]]
            loss = -float(np.log(np.maximum(shares, 1e-15)).mean())
            if loss < least:
                best, least = strength, loss
            step(1)
    model, converged = _regression(scaled, codes, best, None)
    step(1)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # for two classes scikit-learn has one logit, the second minus the first
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight * scale
    return LogisticFit(weight, bias - weight @ mean, best, converged)


def _regression(
    vectors: NDArray[np.float64], codes: NDArray[np.intp], strength: float, before: Any
) -> tuple[Any, bool]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = before or LogisticRegression(C=strength, max_iter=_STEPS, warm_start=True)
    model.set_params(C=strength)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(vectors, codes)
    return model, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _held_out(codes: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A fifth of each class; none of a class with one picture."""
    held = np.zeros(len(codes), np.bool_)
    for code in np.unique(codes):
        members = rng.permutation(np.flatnonzero(codes == code))
        count = min(len(members) - 1, max(1, round(_HELD_OUT * len(members))))
        held[members[:count]] = True
    return held
