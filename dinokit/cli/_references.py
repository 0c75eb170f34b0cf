"""Vectors of labelled and other pictures in `dinokit knn`, and the accuracy to expect from the labelled ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from dinokit.sources.names import resolved

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dinokit.classifiers.knn import KNNClassifier
    from dinokit.tables.embeddings import EmbeddingTable

__all__ = [
    "NO_VOTERS",
    "References",
    "Vectors",
    "as_vectors",
    "expectation",
    "fit",
    "in_words",
    "leave_one_out",
    "left_without_voters",
    "most_frequent",
    "own_references",
    "readable",
]


_JUDGED_AT_ONCE = 4096
NO_VOTERS = "every reference is this photograph itself, so none is left to label it by"


@dataclass(frozen=True)
class Vectors:
    """Embedded pictures: rows of failed ones are NaN, and ``errors`` has the reason."""

    embeddings: NDArray[np.float32]
    paths: list[str]
    errors: list[str | None]
    origin: dict[str, Any]


@dataclass(frozen=True)
class References:
    """Labelled pictures that can be read: (N, D) float32 ``embeddings``, and those left out in ``failures``."""

    embeddings: NDArray[np.float32]
    paths: list[str]
    labels: list[str]
    origin: dict[str, Any]
    failures: list[dict[str, str]] = field(default_factory=list)


def readable(vectors: Vectors, labels: Sequence[str]) -> References:
    """The labelled pictures without those that cannot be read, which are listed in ``failures``."""
    kept = [i for i, error in enumerate(vectors.errors) if error is None]
    return References(
        vectors.embeddings[kept],
        [vectors.paths[i] for i in kept],
        [labels[i] for i in kept],
        vectors.origin,
        [
            {"path": path, "error": error}
            for path, error in zip(vectors.paths, vectors.errors, strict=True)
            if error is not None
        ],
    )


def fit(references: References, k: int, temperature: float, *, quiet: bool) -> KNNClassifier:
    """A classifier on the references; if these are fewer than ``k``, all vote, and a note is printed on stderr."""
    from dinokit.classifiers.knn import KNNClassifier

    count = len(references.labels)
    if k > count and not quiet:
        click.echo(f"Note: -k {k} is more than the {count} references, so all {count} vote", err=True)
    return KNNClassifier(min(k, count), temperature).fit(references.embeddings, references.labels)


def leave_one_out(classifier: KNNClassifier, references: References, *, quiet: bool) -> float:
    """``KNNClassifier.leave_one_out_score``, which takes minutes for many references, with a progress bar on stderr."""
    import numpy as np

    from dinokit.cli._progress import open_progress

    rows = np.arange(len(references.labels))
    codes = np.searchsorted(classifier.classes_, references.labels)
    right = 0
    with open_progress(len(rows), task="estimating accuracy", unit="references", quiet=quiet) as progress:
        for start in range(0, len(rows), _JUDGED_AT_ONCE):
            part = rows[start : start + _JUDGED_AT_ONCE]
            judged = classifier.judge(references.embeddings[part], leave_out=part)
            right += int((judged.winners == codes[part]).sum())
            progress.advance(len(part))
    return right / len(rows)


def as_vectors(table: EmbeddingTable) -> Vectors:
    """The vectors of a table that has just been embedded."""
    return Vectors(table.embeddings, table.paths, table.errors, table.origin)


def most_frequent(labels: Sequence[str]) -> tuple[str, float]:
    """The most frequent label (of several, the first by name) and its share, 0 to 1."""
    counts = Counter(labels)
    most = max(sorted(counts), key=counts.__getitem__)
    return most, counts[most] / len(labels)


def expectation(references: References, accuracy: float) -> dict[str, Any]:
    """What to expect: leave-one-out ``accuracy`` of the references, 0 to 1, beside the most frequent class."""
    most, share = most_frequent(references.labels)
    return {
        "references": len(references.labels),
        "classes": dict(sorted(Counter(references.labels).items())),
        "leave_one_out_accuracy": accuracy,
        "most_frequent_class": most,
        "most_frequent_share": share,
    }


def in_words(expected: dict[str, Any]) -> str:
    """One line of :func:`expectation`."""
    alone = [name for name, count in expected["classes"].items() if count == 1]
    return (
        f"Leave-one-out accuracy of the reference set: {100 * expected['leave_one_out_accuracy']:.1f} % "
        f"({expected['references']} photographs, {len(expected['classes'])} classes; always predicting "
        f"{expected['most_frequent_class']!r} would reach {100 * expected['most_frequent_share']:.1f} %)"
    ) + (f". Classes with one photograph only are always wrong here: {', '.join(alone[:5])}" if alone else "")


def own_references(paths: Sequence[str], references: References) -> NDArray[np.intp]:
    """(M, L) indices of the references with the same path as a picture, however it is written; -1 for none."""
    import numpy as np

    numbers: dict[str, list[int]] = {}
    for number, path in enumerate(references.paths):
        if path:  # tables of other programs may lack paths
            numbers.setdefault(resolved(path), []).append(number)
    found = [numbers.get(resolved(path), []) for path in paths]
    own = np.full((len(paths), max(map(len, found), default=0)), -1, np.intp)
    for row, same in enumerate(found):
        own[row, : len(same)] = same
    return own


def left_without_voters(own: NDArray[np.intp], count: int) -> NDArray[np.bool_]:
    """(M,) bool: photographs for which all ``count`` references are themselves; ``own``: :func:`own_references`."""
    import numpy as np

    return np.array([len(set(row.tolist()) - {-1}) >= count for row in own], np.bool_)
