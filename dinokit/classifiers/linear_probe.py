"""The linear probe: accuracy of a linear classifier on frozen features (``linear_classifier.py`` fits it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.classifiers.evaluation import Proportion, proportion_of
from dinokit.classifiers.linear_classifier import STRENGTHS, LogisticFit, fit_logistic, must_have_sklearn
from dinokit.estimator import check_labels, check_matrix, check_seed

__all__ = ["FOLDS", "ProbeScore", "linear_probe"]

FOLDS = 5


@dataclass(frozen=True)
class ProbeScore:
    """Result of the probe."""

    top1: Proportion
    strength: float
    """The chosen C; with folds, that of the last one."""
    folds: int
    """0 if there were queries; otherwise the number of parts of the references, each classified by the others."""
    converged: bool


def linear_probe(
    references: ArrayLike,
    labels: ArrayLike,
    queries: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> ProbeScore:
    """Accuracy of a linear classifier fitted to the references.

    Args:
        references: (N, D) embeddings as the model makes them.
        labels: (N,) their labels, of at least two classes.
        queries: (M, D); without them, each of five parts of the references is classified by the other four.
        truth: (M,) the queries' labels.
        strengths: values of C to choose from.
        seed: for the choice of what is held out, and of the parts.
        on_progress: called with 1 for each fit; there are ``len(strengths) + 1`` fits per part.

    Raises:
        DinokitError: scikit-learn is not installed.
        UsageError: shapes do not match, values are not finite, or the seed is negative.
    """
    must_have_sklearn()
    vectors = check_matrix(references).astype(np.float64)
    classes, codes = np.unique(check_labels(labels, len(vectors)), return_inverse=True)
    rng = np.random.default_rng(check_seed(seed))
    step = on_progress or (lambda _: None)
    if queries is not None:
        others = check_matrix(queries, "queries").astype(np.float64)
        made = fit_logistic(vectors, codes, strengths, rng, step)
        right = classes[_winners(made, others)] == np.asarray(truth)
        return ProbeScore(proportion_of(int(right.sum()), len(right)), made.strength, 0, made.converged)
    parts = _parts(codes, FOLDS, rng)
    right_in_all, strength, converged = 0, float("nan"), True
    for part in range(FOLDS):
        inside = parts == part
        known, known_codes = np.unique(codes[~inside], return_inverse=True)
        if not inside.any() or len(known) < 2:
            continue
        made = fit_logistic(vectors[~inside], known_codes, strengths, rng, step)
        strength = made.strength
        right_in_all += int((known[_winners(made, vectors[inside])] == codes[inside]).sum())
        converged &= made.converged
    return ProbeScore(proportion_of(right_in_all, len(codes)), strength, FOLDS, converged)


def _winners(made: LogisticFit, vectors: NDArray[np.float64]) -> NDArray[np.intp]:
    """(M, D) to (M,) classes."""
    winners: NDArray[np.intp] = (vectors @ made.weight.T + made.bias).argmax(axis=1)
    return winners


def _parts(codes: NDArray[np.intp], count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """The part of each reference; every class is spread evenly over the parts."""
    parts = np.empty(len(codes), np.intp)
    start = 0
    for code in np.unique(codes):
        members = rng.permutation(np.flatnonzero(codes == code))
        parts[members] = (np.arange(len(members)) + start) % count
        start += len(members)
    return parts
