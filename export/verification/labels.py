"""How many pictures get the same k-NN label from a variant's embeddings as from torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ImageError, UsageError
from dinokit.export.graphs.embedder import CropEngine
from dinokit.export.verification.report import LabelAgreement
from dinokit.export.verification.verify import cosines
from dinokit.model_folder.contract import POOLED
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime import Engine
from dinokit.sources.spread import evenly_spaced
from dinokit.wording import counted

__all__ = ["LabelledSample", "agreement", "labelled_sample"]

_MOST = 1000  # pictures; a share of 99 % is then known to half a percent
_BATCH = 32
_K = 20

Say = Callable[[str], None]


@dataclass(frozen=True)
class LabelledSample:
    """Pictures with labels, and torch's embeddings of them."""

    crops: Sequence[NDArray[Any]]
    """N crops (H, W, C), not stacked: a second copy of 1000 crops of 518 px would take 0.8 GB."""
    labels: list[str]
    right: NDArray[np.float32]
    """(N, D)."""
    preprocessing: Preprocessing
    problems: tuple[str, ...]
    """One sentence for each picture or folder left out, with the reason."""


def labelled_sample(
    source: str | Path, reference: Engine, preprocessing: Preprocessing, say: Say
) -> LabelledSample:
    """Reads labelled pictures, at most 1000 evenly over all, and embeds them with torch.

    Args:
        source: one folder per class, a CSV, or any other labelled source
            (``dinokit/classifiers/labelled_sources.py``).
        reference: the torch engine.
        preprocessing: of the pictures.
        say: called with a description of each step.

    Raises:
        UsageError: fewer than two classes have readable pictures.
    """
    from dinokit.classifiers.labelled_sources import find_labelled_items
    from dinokit.pictures.bands import open_picture

    found = find_labelled_items(source, channels=preprocessing.channels)
    chosen = evenly_spaced(len(found.paths), _MOST)
    crops, labels, problems = [], [], list(found.problems)
    for i in chosen:
        try:
            crops.append(preprocessing.crop(open_picture(found.paths[i], preprocessing.channels)))
        except ImageError as error:
            problems.append(str(error))
            continue
        labels.append(found.labels[i])
    if len(set(labels)) < 2:
        raise UsageError(
            f"{source} has {counted(len(labels), 'readable picture')} "
            f"of {counted(len(set(labels)), 'class', 'classes')}; at least two classes are needed to compare labels"
        )
    right = _embed(reference, crops, preprocessing, say, "torch")
    return LabelledSample(crops, labels, right, preprocessing, tuple(problems))


def agreement(candidate: Engine | CropEngine, sample: LabelledSample, say: Say) -> LabelAgreement:
    """Labels each picture by the others, once with each embedding, and compares the labels."""
    from dinokit.classifiers.knn import KNNClassifier

    ours = _embed(candidate, sample.crops, sample.preprocessing, say, "this file")
    k = min(_K, len(sample.labels) - 1)
    truth = np.asarray(sample.labels)
    theirs, mine = (
        classifier.classes_[classifier.leave_one_out_proba().argmax(axis=1)]
        for classifier in (KNNClassifier(k=k).fit(vectors, truth) for vectors in (sample.right, ours))
    )
    found = cosines(sample.right, ours)
    return LabelAgreement(
        pictures=len(truth),
        classes=len(set(sample.labels)),
        k=k,
        equal=float(np.mean(theirs == mine)),
        accuracy_torch=float(np.mean(theirs == truth)),
        accuracy=float(np.mean(mine == truth)),
        cosine_mean=float(found.mean()),
        cosine_p1=float(np.percentile(found, 1)),
        cosine_min=float(found.min()),
    )


def _embed(
    engine: Engine | CropEngine,
    crops: Sequence[NDArray[Any]],
    preprocessing: Preprocessing,
    say: Say,
    whose: str,
) -> NDArray[np.float32]:
    parts = []
    for start in range(0, len(crops), _BATCH):
        say(f"labelled pictures by {whose}: {start} of {len(crops)}")
        batch = np.stack(crops[start : start + _BATCH])
        if isinstance(engine, CropEngine):
            parts.append(engine.embed(batch))
        else:
            parts.append(engine.run(preprocessing.normalise(batch), [POOLED])[POOLED].copy())
    return np.concatenate(parts)
