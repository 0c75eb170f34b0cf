"""The linear probe: multinomial logistic regression on frozen features, by scikit-learn where it is installed.

As Radford et al. 2021 (CLIP, appendix A.3) and DINOv2's ``log_regression.py``: L-BFGS, and the strength of the L2
penalty chosen on a part of the training pictures that is held out, then fitted on all of them. Features are shifted to
mean 0 and divided by one number, their root mean square, so that the strengths mean the same for every model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.errors import DinokitError
from dinokit.estimator import check_labels, check_matrix
from dinokit.evaluation import Share, share_of

__all__ = ["FOLDS", "ProbeScore", "STRENGTHS", "have_sklearn", "linear_probe"]

STRENGTHS = tuple(10.0**power for power in (-4, -3, -2, -1, 0, 1, 2))
"""scikit-learn's C, the inverse of the penalty's strength."""
FOLDS = 5
_HELD_OUT = 0.2
_STEPS = 1000


@dataclass(frozen=True)
class ProbeScore:
    """What the probe reached."""

    top1: Share
    strength: float
    """C, as chosen; with folds of the last one."""
    folds: int
    """0 where there were queries; otherwise the references were judged in so many parts, each by the others."""
    converged: bool


def have_sklearn() -> bool:
    """Whether scikit-learn is installed."""
    import importlib.util

    return importlib.util.find_spec("sklearn") is not None


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
    """Accuracy of a linear classifier that was fitted to the references.

    Args:
        references: (N, D) embeddings, as they are.
        labels: (N,) their labels, two at least.
        queries: (M, D); without them each of five parts of the references is judged by the other four.
        truth: (M,) the queries' labels.
        strengths: values of C to choose from.
        seed: of what is held out, and of the parts.
        on_progress: called with 1 for each fit; there are ``len(strengths) + 1`` of them for each part.

    Raises:
        DinokitError: scikit-learn is not installed.
        UsageError: shapes do not fit, or values are not finite.
    """
    if not have_sklearn():
        raise DinokitError("the linear probe needs scikit-learn: pip install scikit-learn")
    vectors = check_matrix(references).astype(np.float64)
    classes, codes = np.unique(check_labels(labels, len(vectors)), return_inverse=True)
    rng = np.random.default_rng(seed)
    step = on_progress or (lambda _: None)
    if queries is not None:
        others = check_matrix(queries, "queries").astype(np.float64)
        made, strength, converged = _fit(vectors, codes, strengths, rng, step)
        right = classes[made(others)] == np.asarray(truth)
        return ProbeScore(share_of(int(right.sum()), len(right)), strength, 0, converged)
    parts = _parts(codes, FOLDS, rng)
    right_in_all, strength, converged = 0, float("nan"), True
    for part in range(FOLDS):
        inside = parts == part
        if not inside.any() or len(np.unique(codes[~inside])) < 2:
            continue
        made, strength, well = _fit(vectors[~inside], codes[~inside], strengths, rng, step)
        right_in_all += int((made(vectors[inside]) == codes[inside]).sum())
        converged &= well
    return ProbeScore(share_of(right_in_all, len(codes)), strength, FOLDS, converged)


Predict = Callable[[NDArray[np.float64]], NDArray[np.intp]]


def _fit(
    vectors: NDArray[np.float64],
    codes: NDArray[np.intp],
    strengths: Sequence[float],
    rng: np.random.Generator,
    step: Callable[[int], None],
) -> tuple[Predict, float, bool]:
    """A classifier with the strength that did best on held-out references; of equals the strongest penalty."""
    mean = vectors.mean(axis=0)
    scale = 1 / max(float(np.sqrt(np.mean((vectors - mean) ** 2))), 1e-12)
    scaled = (vectors - mean) * scale
    held = _held_out(codes, rng)
    best, best_share = strengths[len(strengths) // 2], -1.0
    if held.any() and len(np.unique(codes[~held])) > 1:
        model: Any = None
        for strength in sorted(strengths):  # each begins where the one before has ended
            model, _ = _regression(scaled[~held], codes[~held], strength, model)
            share = float((model.predict(scaled[held]) == codes[held]).mean())
            if share > best_share:
                best, best_share = strength, share
            step(1)
    model, converged = _regression(scaled, codes, best, None)
    step(1)

    def predict(others: NDArray[np.float64]) -> NDArray[np.intp]:
        found: NDArray[np.intp] = model.predict((others - mean) * scale)
        return found

    return predict, best, converged


def _regression(
    vectors: NDArray[np.float64], codes: NDArray[np.intp], strength: float, before: Any
) -> tuple[Any, bool]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = before or LogisticRegression(C=strength, max_iter=_STEPS, warm_start=True)
    model.set_params(C=strength)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(vectors, codes)
    return model, not any(issubclass(warning.category, ConvergenceWarning) for warning in said)


def _held_out(codes: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A fifth of each class; of classes with one picture none."""
    held = np.zeros(len(codes), np.bool_)
    for code in np.unique(codes):
        members = rng.permutation(np.flatnonzero(codes == code))
        count = min(len(members) - 1, max(1, round(_HELD_OUT * len(members))))
        held[members[:count]] = True
    return held


def _parts(codes: NDArray[np.intp], count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """A part for each reference, so that every class is spread evenly."""
    parts = np.empty(len(codes), np.intp)
    start = 0
    for code in np.unique(codes):
        members = rng.permutation(np.flatnonzero(codes == code))
        parts[members] = (np.arange(len(members)) + start) % count
        start += len(members)
    return parts
