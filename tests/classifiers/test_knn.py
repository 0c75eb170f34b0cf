"""Weighted k-NN, held to the percentages of facebookresearch/dino's own code."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dinokit.classifiers.knn
from dinokit import KNNClassifier
from dinokit.errors import UsageError
from dinokit.neighbours.nearest import nearest

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "knn.npz", allow_pickle=False)


@pytest.mark.parametrize("k", [5, 10, 20, 100])
def test_accuracy_equals_the_reference(k: int) -> None:
    knn = KNNClassifier(k=k, temperature=0.07).fit(GOLDEN["train"], GOLDEN["train_labels"])
    shares = knn.predict_proba(GOLDEN["query"])
    ranked = knn.classes_[np.argsort(-shares, axis=1, kind="stable")]
    truth = GOLDEN["query_labels"][:, None]
    top1 = 100 * np.mean(ranked[:, :1] == truth)
    # The reference ranks 1000 classes whatever the labels; a label without a vote is not among its five.
    voted = np.take_along_axis(shares, knn.classes_.searchsorted(ranked[:, :5]), axis=1) > 0
    top5 = 100 * np.mean(((ranked[:, :5] == truth) & voted).any(axis=1))
    np.testing.assert_allclose([top1, top5], GOLDEN[f"top1_top5.k{k}"], atol=1e-9)
    assert knn.score(GOLDEN["query"], GOLDEN["query_labels"]) == pytest.approx(top1 / 100)


def small_tiles(monkeypatch: pytest.MonkeyPatch, references: int, queries: int) -> None:
    monkeypatch.setattr("dinokit.neighbours.nearest._REFERENCES", references)
    monkeypatch.setattr("dinokit.neighbours.nearest._TILE_BYTES", 4 * references * queries)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    knn = KNNClassifier(k=7).fit(GOLDEN["train"], GOLDEN["train_labels"])
    whole, labels = knn.predict_proba(GOLDEN["query"]), knn.predict(GOLDEN["query"])
    small_tiles(monkeypatch, 50, 11)
    monkeypatch.setattr("dinokit.classifiers.votes._VOTES", 100)
    np.testing.assert_allclose(knn.predict_proba(GOLDEN["query"]), whole, atol=1e-12)
    assert (knn.predict(GOLDEN["query"]) == labels).all()


def test_labels_can_be_names_and_lengths_do_not_matter() -> None:
    names = np.array(["cat", "dog"])
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], np.float32)
    knn = KNNClassifier(k=2).fit(vectors * [[1], [5], [0.1], [7]], names[[0, 0, 1, 1]])
    assert knn.predict([[20.0, 1.0], [0.01, 0.5]]).tolist() == ["cat", "dog"]
    similarity, neighbour = knn.kneighbors([[1.0, 0.0]])
    assert neighbour.tolist() == [[0, 1]]
    np.testing.assert_allclose(similarity, [[1.0, 0.9 / np.hypot(0.9, 0.1)]], rtol=1e-6)


def test_a_vote_weighs_exp_similarity_over_temperature() -> None:
    # One close neighbour of "a" against two further ones of "b"; the shares follow in closed form.
    angles = np.array([0.1, 0.5, 0.5])
    references = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    knn = KNNClassifier(k=3, temperature=0.5).fit(references, ["a", "b", "b"])
    a, b = np.exp(np.cos(0.1) / 0.5), 2 * np.exp(np.cos(0.5) / 0.5)
    np.testing.assert_allclose(knn.predict_proba([[1.0, 0.0]]), [[a / (a + b), b / (a + b)]], rtol=1e-5)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UsageError, match="k=0 must be at least 1; the paper uses 20"):
        KNNClassifier(k=0).fit(np.eye(2), [0, 1])
    with pytest.raises(UsageError, match="temperature=0 must be above 0"):
        KNNClassifier(temperature=0).fit(np.eye(2), [0, 1])
    with pytest.raises(UsageError, match=r"the labels of 2 embeddings have shape \(3,\); expected \(2,\)"):
        KNNClassifier(k=1).fit(np.eye(2), [0, 1, 1])
    with pytest.raises(UsageError, match="call fit"):
        KNNClassifier().predict(np.eye(2))
    knn = KNNClassifier(k=1).fit(np.eye(2), [0, 1])
    with pytest.raises(UsageError, match=r"shape \(3, 3\); expected \(M, 2\)"):
        knn.predict(np.eye(3))
    with pytest.raises(UsageError, match=r"the queries contain NaN, first in row 1; leave out the rows"):
        knn.predict([[0.0, 1.0], [np.nan, 0.0]])
    with pytest.raises(UsageError, match=r"shape \(2,\); expected \(N, D\).*Reshape your data"):
        knn.predict([0.0, 1.0])


def test_of_fewer_references_than_k_all_vote() -> None:
    few = KNNClassifier(k=20).fit(GOLDEN["train"][:6], GOLDEN["train_labels"][:6])
    six = KNNClassifier(k=6).fit(GOLDEN["train"][:6], GOLDEN["train_labels"][:6])
    assert few.k_ == 6 and few.k == 20
    np.testing.assert_array_equal(
        few.predict_proba(GOLDEN["query"][:9]), six.predict_proba(GOLDEN["query"][:9])
    )


@pytest.mark.parametrize("tile", [8, 32, 1000])
def test_neighbours_of_tied_vectors_come_in_the_order_of_the_references(
    monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    rng = np.random.default_rng(3)
    # Many equal similarities, most of them at the border of the k nearest.
    references = rng.integers(0, 2, (300, 4)).astype(np.float32)
    queries = rng.integers(0, 2, (40, 4)).astype(np.float32)
    for k in (1, 2, 5, 8):
        small_tiles(monkeypatch, tile, 9)
        similarities, neighbours = nearest(queries, references, k)
        exact = queries.astype(np.float64) @ references.T.astype(np.float64)
        expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(neighbours, expected)
        np.testing.assert_array_equal(similarities, np.take_along_axis(exact, expected, axis=1))
        np.fill_diagonal(exact, -np.inf)
        _, others = nearest(queries, queries, k, leave_out=True)
        own = queries.astype(np.float64) @ queries.T.astype(np.float64)
        np.fill_diagonal(own, -np.inf)
        np.testing.assert_array_equal(others, np.argsort(-own, axis=1, kind="stable")[:, :k])


@pytest.mark.parametrize("tile", [8, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_references_left_out_neither_are_found_nor_vote(
    monkeypatch: pytest.MonkeyPatch, tile: int, k: int
) -> None:
    rng = np.random.default_rng(5)
    references = rng.integers(-1, 2, (30, 6)).astype(np.float32)  # many ties
    references[:, 0] += 3
    queries = references[rng.integers(0, 30, 50)]
    labels = rng.integers(0, 3, 30)
    left_out = rng.integers(-1, 30, (50, 2))
    unit = references.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    knn = KNNClassifier(k).fit(references, labels)
    small_tiles(monkeypatch, tile, 7)
    shares = knn.predict_proba(queries, leave_out=left_out)
    similarities, neighbours = knn.kneighbors(queries, leave_out=left_out)
    for i, query in enumerate(queries.astype(np.float64)):
        kept = np.setdiff1d(np.arange(30), left_out[i])
        cosines = unit[kept] @ (query / np.linalg.norm(query))
        order = np.argsort(-cosines.round(6), kind="stable")[:k]  # what is equal differs in the last digits
        count = len(order)
        np.testing.assert_allclose(similarities[i, :count], cosines[order], atol=1e-6)
        assert np.isneginf(similarities[i, count:]).all() and set(neighbours[i, count:]) <= set(left_out[i])
        assert not set(neighbours[i, :count]) & set(left_out[i])
        votes = np.zeros(3)
        np.add.at(votes, labels[neighbours[i, :count]], np.exp(cosines[order] / 0.07))
        np.testing.assert_allclose(shares[i], votes / votes.sum(), atol=1e-4)


@pytest.mark.parametrize("votes_at_once", [1, 40, 1 << 22])
def test_a_judgement_is_all_by_one_search(monkeypatch: pytest.MonkeyPatch, votes_at_once: int) -> None:
    monkeypatch.setattr("dinokit.classifiers.votes._VOTES", votes_at_once)
    knn = KNNClassifier(k=5).fit(GOLDEN["train"], GOLDEN["train_labels"])
    left_out = np.arange(len(GOLDEN["query"]))
    shares = knn.predict_proba(GOLDEN["query"], leave_out=left_out)
    similarities, neighbours = knn.kneighbors(GOLDEN["query"], leave_out=left_out)
    searches = []
    search = dinokit.classifiers.knn.nearest
    monkeypatch.setattr(
        "dinokit.classifiers.knn.nearest", lambda *args, **named: searches.append(1) or search(*args, **named)
    )
    given = left_out % len(knn.classes_)
    judged = knn.judge(GOLDEN["query"], leave_out=left_out, given=given)
    assert len(searches) == 1
    expected = (shares.argmax(axis=1), shares.max(axis=1), shares[left_out, given], similarities, neighbours)
    for ours, theirs in zip(judged, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours is not None and ours.dtype == theirs.dtype
    assert knn.judge(GOLDEN["query"]).given_shares is None


def test_what_cannot_be_left_out() -> None:
    knn = KNNClassifier(k=2).fit(np.eye(3), list("abc"))
    np.testing.assert_array_equal(
        knn.kneighbors(np.eye(3), leave_out=[-1, 1, -1])[1], [[0, 1], [0, 2], [2, 0]]
    )
    with pytest.raises(
        UsageError, match=r"leave_out has shape \(2,\) and dtype int64; expected whole .*\(3,\)"
    ):
        knn.predict_proba(np.eye(3), leave_out=[0, 1])
    with pytest.raises(UsageError, match="dtype bool; expected whole numbers"):
        knn.predict_proba(np.eye(3), leave_out=[True, False, True])
    with pytest.raises(UsageError, match="all references are left out for query 1"):
        knn.predict_proba(np.eye(3)[:2], leave_out=[[0, -1, -1], [0, 1, 2]])


def test_neighbours_equal_scikit_learns() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    references, queries = rng.normal(size=(500, 16)), 9 * rng.normal(size=(60, 16))
    labels = rng.integers(0, 5, 500)
    ours = KNNClassifier(k=12).fit(references, labels)
    theirs = neighbors.KNeighborsClassifier(
        12, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(references, labels)
    similarities, found = ours.kneighbors(queries)
    distances, expected = theirs.kneighbors(queries)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(queries), theirs.predict_proba(queries), atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"k": 5}])
def test_scikit_learns_own_checks(arguments: dict[str, int]) -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    results = checks.check_estimator(KNNClassifier(**arguments), on_skip=None)  # raises where one fails
    assert len(results) > 40
    skipped = [r["check_name"] for r in results if r["status"] != "passed"]
    # These two are skipped where array API support is not switched on, and where pandas is not installed.
    assert set(skipped) <= {"check_array_api_input", "check_classifier_data_not_an_array"}


def test_in_a_grid_search() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    search = selection.GridSearchCV(KNNClassifier(), {"k": [1, 20], "temperature": [0.07]}, cv=3)
    search.fit(GOLDEN["train"], GOLDEN["train_labels"])
    assert search.best_score_ > 0.5 and search.best_estimator_.k in (1, 20)


def test_memory_does_not_grow_with_the_square_of_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 256, 64)
    count = 3_000
    vectors = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    knn = KNNClassifier(k=3).fit(vectors, np.arange(count) % 7)
    tracemalloc.start()
    knn.leave_one_out_score()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * count**2 / 20  # all similarities at once would be 4 * count**2 bytes


def test_without_scikit_learn_it_is_the_same_object() -> None:
    """In a process where scikit-learn cannot be imported."""
    code = """
import sys
sys.modules["sklearn"] = None
import numpy as np
import dinokit.classifiers.knn
from dinokit import KNNClassifier
from dinokit.errors import UsageError
knn = KNNClassifier(k=2)
assert knn.get_params() == {"k": 2, "temperature": 0.07} and repr(knn) == "KNNClassifier(k=2, temperature=0.07)"
assert knn.set_params(k=1) is knn and knn.k == 1
for call, words in [(lambda: knn.set_params(n=1), "no parameter 'n'"), (lambda: knn.predict([[1]]), "call fit")]:
    try:
        call()
    except UsageError as error:
        assert words in str(error)
    else:
        raise AssertionError(words)
print(*knn.fit(np.eye(2), ["a", "b"]).predict([[0.1, 2]]), "sklearn.base" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "b False\n", done.stderr


def test_leaving_one_out_equals_fitting_without_it() -> None:
    vectors, labels = GOLDEN["train"][:60], GOLDEN["train_labels"][:60]
    knn = KNNClassifier(k=7).fit(vectors, labels)
    shares = knn.leave_one_out_proba()
    right = []
    for i in range(len(vectors)):
        rest = np.arange(len(vectors)) != i
        without = KNNClassifier(k=7).fit(vectors[rest], labels[rest])
        columns = knn.classes_.searchsorted(without.classes_)
        np.testing.assert_allclose(
            shares[i, columns], without.predict_proba(vectors[i : i + 1])[0], atol=1e-5
        )
        right.append(without.predict(vectors[i : i + 1])[0] == labels[i])
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert knn.leave_one_out_score() == pytest.approx(np.mean(right))


def test_leaving_one_out_in_blocks_and_with_all_references(monkeypatch: pytest.MonkeyPatch) -> None:
    knn = KNNClassifier(k=60).fit(GOLDEN["train"][:60], GOLDEN["train_labels"][:60])  # 59 of them vote
    whole = knn.leave_one_out_proba()
    small_tiles(monkeypatch, 60, 7)
    np.testing.assert_allclose(knn.leave_one_out_proba(), whole, atol=1e-6)
    with pytest.raises(UsageError, match="fit at least 2"):
        KNNClassifier(k=1).fit(np.eye(1), [0]).leave_one_out_score()
    with pytest.raises(UsageError, match="call fit"):
        KNNClassifier().leave_one_out_proba()


def test_leaving_one_out_with_copies_finds_the_copy() -> None:
    knn = KNNClassifier(k=1).fit(np.array([[1, 0], [1, 0], [0, 1]]), ["a", "b", "b"])
    assert (
        knn.leave_one_out_score() == 0.0
    )  # the copies bear other labels, and the third is equally far from both


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.array(["a", None, "b"], object), "NaN or None, first in row 1"),
        (np.array(["a", "b", float("nan")], object), "NaN or None, first in row 2"),
        (np.array(["a", 1, "b"], object), "several kinds"),
    ],
)
def test_labels_that_cannot_be_sorted_are_told(labels: np.ndarray, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        KNNClassifier().fit(np.eye(3), labels)


@pytest.mark.parametrize(
    ("k", "temperature", "says"),
    [
        ("5", 0.07, "k='5' is not a whole number"),
        (2.0, 0.07, "k=2.0 is not a whole number"),
        (2, float("nan"), "temperature=nan must be above 0"),
        (2, "0.07", "temperature='0.07' is not a number"),
    ],
)
def test_arguments_that_are_no_numbers_are_told(k: object, temperature: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        KNNClassifier(k, temperature).fit(np.eye(3), list("abc"))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_score_of_labels_in_a_column(shape: tuple[int, ...]) -> None:
    knn = KNNClassifier(k=1).fit(np.eye(6), list("aabbcc"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of columns
        assert knn.score(np.eye(6), np.array(list("aabbbb")).reshape(shape)) == 4 / 6
    with pytest.raises(UsageError, match=r"the labels of 6 embeddings have shape \(1,\)"):
        knn.score(np.eye(6), ["a"])


class NA:
    """As pandas' missing value: neither true nor false."""

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


def test_missing_labels_of_pandas_and_rows_of_several_lengths() -> None:
    with pytest.raises(UsageError, match="Input y contains NaN or None, first in row 1"):
        KNNClassifier().fit(np.eye(3), np.array(["a", NA(), "b"], object))
    with pytest.raises(UsageError, match="the embeddings are not numbers"):
        KNNClassifier().fit([[1.0, 2.0], [3.0]], ["a", "b"])
