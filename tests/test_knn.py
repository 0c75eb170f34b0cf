"""Weighted k-NN, held to the percentages of facebookresearch/dino's own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinokit import KNNClassifier
from dinokit.errors import UsageError

GOLDEN = np.load(Path(__file__).parent / "golden" / "knn.npz", allow_pickle=False)


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


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    knn = KNNClassifier(k=7).fit(GOLDEN["train"], GOLDEN["train_labels"])
    whole = knn.predict_proba(GOLDEN["query"])
    monkeypatch.setattr("dinokit.knn._BLOCK_BYTES", 4 * 900 * 11)
    np.testing.assert_allclose(knn.predict_proba(GOLDEN["query"]), whole, atol=1e-6)


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
    with pytest.raises(UsageError, match="k=5 must lie between 1 and the number of references, 2"):
        KNNClassifier(k=5).fit(np.eye(2), [0, 1])
    with pytest.raises(UsageError, match=r"embeddings \(2, 2\) and labels \(3,\) do not fit"):
        KNNClassifier(k=1).fit(np.eye(2), [0, 1, 1])
    with pytest.raises(UsageError, match="call fit"):
        KNNClassifier().predict(np.eye(2))
    knn = KNNClassifier(k=1).fit(np.eye(2), [0, 1])
    with pytest.raises(UsageError, match=r"shape \(3, 3\); expected \(M, 2\)"):
        knn.predict(np.eye(3))


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
    monkeypatch.setattr("dinokit.knn._BLOCK_BYTES", 4 * 60 * 7)
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
