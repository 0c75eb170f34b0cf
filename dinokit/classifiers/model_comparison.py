"""Several models on the same labelled pictures: their features, the scores of these, and the figures as JSON.

The protocols are in ``evaluation.py`` and ``linear_probe.py``. `dinokit eval` calls :func:`features_of_tables` or
:func:`features_of_pictures`, then :func:`compare_models`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dinokit import __version__
from dinokit.classifiers.evaluation import (
    RAW_PIXELS,
    KNNScore,
    Proportion,
    compare,
    knn_scores,
    proportion_of,
    raw_pixels,
)
from dinokit.classifiers.labelled import (
    LabelledPictures,
    LabelledTable,
    must_have_classes,
    read_labelled_table,
)
from dinokit.classifiers.labelled_sources import find_labelled_items
from dinokit.classifiers.linear_classifier import STRENGTHS
from dinokit.classifiers.linear_probe import FOLDS, ProbeScore, linear_probe
from dinokit.errors import UsageError
from dinokit.loading.load import load_backbone
from dinokit.loading.locate import locate
from dinokit.pictures.bands import is_photographic
from dinokit.sources import Item
from dinokit.sources.names import resolved
from dinokit.tables.origin import must_be_comparable

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.tables.embeddings import EmbeddingTable

__all__ = [
    "Comparison",
    "Features",
    "LabelledFeatures",
    "ModelScores",
    "OpenProgress",
    "compare_models",
    "features_of_pictures",
    "features_of_tables",
]

_DESCRIBED = ("model", "source", "weights_sha256", "what", "preprocessing")
"""What the JSON keeps of a table's origin."""


class Advances(Protocol):
    """What counts finished work."""

    def advance(self, count: int, note: str | None = None) -> None: ...


class OpenProgress(Protocol):
    """What shows the progress of ``total`` units of work."""

    def __call__(
        self, total: int, *, task: str, unit: str = "images"
    ) -> AbstractContextManager[Advances]: ...


Embed = Callable[[Sequence[Item], "Backbone", str], "EmbeddingTable"]
"""Embeds pictures with a backbone; third, the name under which the model was given."""


@dataclass(frozen=True)
class Features:
    """The vectors of one model."""

    name: str
    references: NDArray[np.float32]
    """(N, D)"""
    queries: NDArray[np.float32] | None
    """(M, D); None where each reference is judged by the others."""
    origin: dict[str, Any] | None
    """How the vectors were made; None for raw pixels."""


@dataclass(frozen=True)
class LabelledFeatures:
    """The features of all models over the same pictures, and the labels of these."""

    reference: str
    queries: str | None
    """The sources, as they were named."""
    features: list[Features]
    labels: list[str]
    """Of the references."""
    truth: list[str] | None
    """Labels of the queries."""
    problems: list[str]
    failures: list[dict[str, str]]
    """Path and error of pictures that at least one model could not embed; no model is judged on them."""
    shared: int
    """Number of queries that are references too, by their paths."""

    def judged(self) -> list[str]:
        """The true labels of the judged pictures: of the queries, or without any, of the references."""
        return self.labels if self.truth is None else self.truth

    def unlabelled(self) -> Counter[str]:
        """Labels of queries that no reference has, and how many queries have each."""
        known = set(self.labels)
        return Counter(label for label in self.judged() if label not in known)

    def most_frequent_class(self) -> tuple[str, Proportion]:
        """The most frequent label of the references, and how often always predicting it is right."""
        label, _ = Counter(sorted(self.labels)).most_common(1)[0]
        judged = self.judged()
        return label, proportion_of(judged.count(label), len(judged))


@dataclass(frozen=True)
class ModelScores:
    """How good the features of one model are."""

    features: Features
    knn: list[KNNScore]
    linear: ProbeScore | None


@dataclass(frozen=True)
class Comparison:
    """The scores of all models, in the order in which they were named."""

    judged: LabelledFeatures
    scores: list[ModelScores]
    temperature: float

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        judged = self.judged
        most, always = judged.most_frequent_class()
        return {
            "dinokit": __version__,
            "reference": judged.reference,
            "queries": judged.queries,
            "protocol": "leave one out" if judged.truth is None else "queries",
            "references": len(judged.labels),
            "judged": len(judged.judged()),
            "queries_among_references": judged.shared,
            "classes": dict(sorted(Counter(judged.labels).items())),
            "temperature": self.temperature,
            "most_frequent_class": {"label": most, **asdict(always)},
            "results": [self._result(place) for place in range(len(self.scores))],
            "unlabelled": sorted(judged.unlabelled()),
            "problems": judged.problems,
            "failures": judged.failures,
        }

    def _result(self, place: int) -> dict[str, Any]:
        first, score = self.scores[0], self.scores[place]
        return {
            "features": score.features.name,
            **_described(score.features.origin),
            "embed_dim": int(score.features.references.shape[1]),
            "knn": [
                {
                    "k": found.k,
                    "top1": asdict(found.top1),
                    "top5": asdict(found.top5),
                    "against_first": asdict(compare(base.right, found.right)) if place else None,
                }
                for base, found in zip(first.knn, score.knn, strict=True)
            ],
            "linear": None
            if score.linear is None
            else {
                "top1": asdict(score.linear.top1),
                "C": score.linear.strength if math.isfinite(score.linear.strength) else None,
                "folds": score.linear.folds,
                "converged": score.linear.converged,
            },
        }


def _described(origin: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if origin is None else {key: origin.get(key) for key in _DESCRIBED}


# -- features


def features_of_tables(reference: str, queries: str | None) -> LabelledFeatures:
    """The vectors of tables of embeddings with labels.

    Raises:
        UsageError: a table has no labels or fewer than two classes, the two tables are not comparable, or all queries
            are references.
    """
    references = read_labelled_table(reference)
    others: LabelledTable | None = None
    if queries is not None:
        others = read_labelled_table(queries)
        must_be_comparable(references.origin, reference, others.origin, queries)
    must_have_classes(references.labels, reference)
    features = Features(
        str(references.origin.get("model") or reference),
        references.embeddings,
        others.embeddings if others else None,
        references.origin,
    )
    return LabelledFeatures(
        reference,
        queries,
        [features],
        references.labels,
        others.labels if others else None,
        references.problems + (others.problems if others else []),
        [],
        _count_shared(references.paths, others.paths if others else None),
    )


def features_of_pictures(
    reference: str,
    queries: str | None,
    models: Sequence[str],
    *,
    embed: Embed,
    open_progress: OpenProgress,
    pixels: bool = True,
    **load: Any,
) -> LabelledFeatures:
    """Embeds labelled pictures with each model; a picture that one model cannot embed is left out for all.

    Args:
        reference, queries: the labelled sources; without ``queries`` each reference is judged by the others.
        models: names, paths or Hub ids.
        embed: embeds all pictures with one model.
        open_progress: shows the progress of the raw pixels.
        pixels: add raw pixels, as the floor that features must beat.
        load: further arguments of ``load_backbone``.

    Raises:
        UsageError: a source has no labels or fewer than two classes, the models take different channels, all queries
            are references, or no query can be read.
    """
    channels = _common_channels(models)
    sets: list[LabelledPictures] = [
        find_labelled_items(source, channels=channels) for source in (reference, queries) if source
    ]
    must_have_classes(sets[0].labels, reference)
    shared = _count_shared(sets[0].paths, sets[1].paths if queries else None)
    items: list[Item] = [item for found in sets for item in found.paths]
    cut = len(sets[0].paths)
    errors: list[str | None] = [None] * len(items)
    made: list[tuple[str, NDArray[np.float32], dict[str, Any] | None]] = []

    def add(
        name: str, vectors: NDArray[np.float32], failed: Sequence[str | None], origin: dict[str, Any] | None
    ) -> None:
        made.append((name, vectors, origin))
        for place, error in enumerate(failed):
            errors[place] = errors[place] or error

    # All models are loaded before the first picture is embedded: a misspelt name costs no hour.
    backbones = [load_backbone(name, **load) for name in models]
    for name, backbone in zip(models, backbones, strict=True):
        table = embed(items, backbone, name)
        add(name, table.embeddings, table.errors, table.origin)
    if pixels:
        with open_progress(len(items), task="raw pixels") as progress:
            vectors, failed = raw_pixels(items, channels=channels, on_progress=progress.advance)
        add(RAW_PIXELS, vectors, failed, None)
    kept = [place for place, error in enumerate(errors) if error is None]
    first = [place for place in kept if place < cut]
    second = [place for place in kept if place >= cut]
    labels = [sets[0].labels[place] for place in first]
    must_have_classes(labels, f"{reference}, without what cannot be read,")
    if queries is not None and not second:
        raise UsageError(f"none of the pictures in {queries} can be read; name others with --queries")
    return LabelledFeatures(
        reference,
        queries,
        [
            Features(name, vectors[first], vectors[second] if queries else None, origin)
            for name, vectors, origin in made
        ],
        labels,
        [sets[1].labels[place - cut] for place in second] if queries else None,
        [problem for found in sets for problem in found.problems],
        [
            {"path": str(item), "error": error}
            for item, error in zip(items, errors, strict=True)
            if error is not None
        ],
        shared,
    )


def _common_channels(models: Sequence[str]) -> int:
    seen = {name: locate(name).config.preprocessing.channels for name in models}
    if len({3 if is_photographic(number) else number for number in seen.values()}) > 1:
        raise UsageError(
            "these models take pictures with different numbers of channels "
            f"({', '.join(f'{name}: {number}' for name, number in seen.items())}); evaluate them one by one"
        )
    return seen[models[0]]


def _count_shared(references: Sequence[object], queries: Sequence[object] | None) -> int:
    """How many queries are references too. Raises UsageError if all are: each would find itself."""
    if queries is None:
        return 0
    theirs = {resolved(str(name)) for name in references} - {""}  # tables of other programs may lack names
    shared = sum(resolved(str(name)) in theirs for name in queries)
    if queries and shared == len(queries):
        raise UsageError(
            "the queries are the references, so each would find itself; leave out --queries, and each reference is "
            "judged by the others"
        )
    return shared


# -- scores


def compare_models(
    judged: LabelledFeatures,
    *,
    ks: Sequence[int],
    temperature: float,
    linear: bool,
    seed: int,
    open_progress: OpenProgress,
) -> Comparison:
    """Weighted k-NN for each of ``ks`` and, with ``linear``, a linear probe, on the features of each model.

    Args:
        judged: the features and labels.
        ks: numbers of neighbours.
        temperature: a vote is weighted by exp(similarity / temperature).
        linear: fit the linear probe, which needs scikit-learn.
        seed: for what the probe holds out.
        open_progress: shows the progress of each probe.
    """
    scores = []
    for features in judged.features:
        vectors = (features.references, judged.labels, features.queries, judged.truth)
        knn = knn_scores(*vectors, ks=ks, temperature=temperature)
        probe = None
        if linear:
            fits = (len(STRENGTHS) + 1) * (FOLDS if judged.truth is None else 1)
            with open_progress(fits, task=f"linear probe of {features.name}", unit="fits") as progress:
                probe = linear_probe(*vectors, seed=seed, on_progress=progress.advance)
        scores.append(ModelScores(features, knn, probe))
    return Comparison(judged, scores, temperature)
