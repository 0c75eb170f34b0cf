"""LinearClassifier: scikit-learn's logistic regression, whose map is of the embeddings as they are."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import dinokit.classifiers.linear_classifier
from dinokit import LinearClassifier
from dinokit.classifiers.linear_probe import linear_probe
from dinokit.errors import DinokitError, UsageError
from dinokit.estimator import NotFittedError

linear_model = pytest.importorskip("sklearn.linear_model")


def clouds(count: int, classes: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """A cloud a class, away from the origin and of another scale than 1."""
    rng = np.random.default_rng(seed)
    codes = np.arange(count) % classes
    centres = np.random.default_rng(9).normal(size=(classes, 6))
    vectors = 30 * (centres[codes] + 0.8 * rng.normal(size=(count, 6))) + 100
    return vectors.astype(np.float32), np.array([f"kind {code}" for code in codes])


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_its_probabilities_are_scikit_learns(classes: int, strength: float | None) -> None:
    (vectors, labels), (others, _) = clouds(120, classes, 0), clouds(50, classes, 1)
    ours = LinearClassifier(C=strength).fit(vectors, labels)
    assert ours.converged_ and strength in (None, ours.C_)
    mean = vectors.mean(0, dtype=np.float64)
    scale = np.sqrt(np.mean((vectors - mean) ** 2))
    theirs = linear_model.LogisticRegression(C=ours.C_, max_iter=1000)
    theirs.fit((vectors - mean) / scale, labels)
    expected = theirs.predict_proba((others - mean) / scale)
    np.testing.assert_allclose(ours.predict_proba(others), expected, atol=1e-8)
    np.testing.assert_array_equal(ours.predict(others), theirs.predict((others - mean) / scale))
    logits = theirs.decision_function((others - mean) / scale)
    np.testing.assert_allclose(ours.decision_function(others), logits, atol=1e-7)
    assert ours.coef_.shape == (classes, 6) and ours.intercept_.shape == (classes,)
    assert 0.6 < ours.score(vectors, labels) <= 1


def test_scikit_learns_own_checks() -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    results = checks.check_estimator(LinearClassifier(), on_skip=None)  # raises where one fails
    assert len(results) > 40
    skipped = [r["check_name"] for r in results if r["status"] != "passed"]
    assert set(skipped) <= {"check_array_api_input", "check_classifier_data_not_an_array"}


def test_a_strength_that_is_given_is_not_searched() -> None:
    steps: list[int] = []
    vectors, labels = clouds(30, 3, 0)
    LinearClassifier(C=1.0).fit(vectors, labels, on_progress=steps.append)
    assert steps == [1]
    LinearClassifier().fit(vectors, labels, on_progress=steps.append)
    assert len(steps) == 1 + len(dinokit.classifiers.linear_classifier.STRENGTHS) + 1


def test_few_pictures_that_all_strengths_label_alike_do_not_make_all_classes_equally_probable() -> None:
    rng = np.random.default_rng(0)
    for seed in range(4):
        vectors = np.repeat(np.eye(3, 16), 10, axis=0) + rng.normal(0, 0.1, (30, 16))
        classifier = LinearClassifier(seed=seed).fit(vectors, np.repeat(["a", "b", "c"], 10))
        assert classifier.score(vectors, np.repeat(["a", "b", "c"], 10)) == 1
        assert classifier.predict_proba(vectors).max(axis=1).min() > 0.9


def test_what_cannot_be_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = clouds(12, 3, 0)
    with pytest.raises(UsageError, match="one class, 'a'; a classifier needs at least two"):
        LinearClassifier().fit(vectors, ["a"] * 12)
    with pytest.raises(UsageError, match="C=0 must be above 0"):
        LinearClassifier(C=0).fit(vectors, labels)
    with pytest.raises(UsageError, match="seed=-1 must not be negative"):
        LinearClassifier(seed=-1).fit(vectors, labels)
    with pytest.raises(UsageError, match=r"seed=0\.5 is not a whole number"):
        linear_probe(vectors, labels, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(NotFittedError, match="call fit"):
        LinearClassifier().predict(vectors)
    with pytest.raises(UsageError, match=r"expected \(M, 6\)"):
        LinearClassifier(C=1).fit(vectors, labels).predict(vectors[:, :5])
    monkeypatch.setattr(dinokit.classifiers.linear_classifier, "have_sklearn", lambda: False)
    with pytest.raises(DinokitError, match="pip install scikit-learn"):
        LinearClassifier().fit(vectors, labels)
