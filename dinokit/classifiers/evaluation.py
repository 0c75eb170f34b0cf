"""How good features are on labelled pictures: the field's protocols for a frozen backbone.

k-NN: Caron et al. 2021, §3.2, and facebookresearch/dino's ``eval_knn.py`` (k = 10, 20, 100; votes weighted by
exp(similarity / 0.07); top-1 and top-5). The linear probe is in ``linear_probe.py``. Proportions come with the 95 %
interval of Wilson 1927, which also holds for few pictures and near 0 and 1. Two kinds of features are compared picture
by picture (McNemar 1947), which is more sensitive than comparing two such intervals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.classifiers.votes import (
    check_temperature,
    nearest_others,
    parts_of_queries,
    shares_of_votes,
)
from dinokit.errors import ImageError, UsageError
from dinokit.estimator import check_labels, check_matrix, check_whole
from dinokit.features.batching import Workers, count_workers, map_ahead
from dinokit.neighbours.nearest import nearest, normalised
from dinokit.pictures.bands import is_photographic
from dinokit.sources import Item, in_order

__all__ = [
    "KNNScore",
    "NEIGHBOURS",
    "Paired",
    "RAW_PIXELS",
    "Proportion",
    "compare",
    "knn_scores",
    "raw_pixels",
    "proportion_of",
]

NEIGHBOURS = (10, 20, 100)
RAW_PIXELS = "raw 16x16 pixels"
_Z = 1.959963984540054  # 97.5 % of the normal distribution lie below


@dataclass(frozen=True)
class Proportion:
    """A proportion of pictures, 0 to 1, with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int
    """Number of pictures."""


def proportion_of(right: int, count: int) -> Proportion:
    """``right`` of ``count`` pictures with Wilson's interval, the uncertainty about other pictures like these.

    Raises:
        UsageError: ``count`` is 0.
    """
    if count < 1:
        raise UsageError("there are no pictures to judge by")
    share, z2 = right / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return Proportion(share, max(0.0, middle - half), min(1.0, middle + half), count)


@dataclass(frozen=True)
class Paired:
    """Two kinds of features on the same pictures."""

    only_first: int
    """Pictures that only the first gets right."""
    only_second: int
    p: float
    """Probability of a split at least this uneven by chance, two-sided: McNemar's exact test, 0 to 1."""


def compare(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """Compares two kinds of features by which of the same pictures each gets right, (M,) bool as ``KNNScore.right``."""
    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    # Under the null hypothesis each is a fair coin toss. In logarithms, as there may be very many.
    total = one + other
    whole = math.lgamma(total + 1) - total * math.log(2)
    tail = (
        math.exp(whole - math.lgamma(count + 1) - math.lgamma(total - count + 1))
        for count in range(min(one, other) + 1)
    )
    return Paired(one, other, min(1.0, 2 * math.fsum(tail)))


@dataclass(frozen=True)
class KNNScore:
    """Accuracy of the weighted vote of k neighbours."""

    k: int
    """If there are fewer references, all of them vote."""
    top1: Proportion
    top5: Proportion
    """The label is among the five with most votes, and has at least one vote."""
    right: NDArray[np.bool_] = field(repr=False, compare=False)
    """(M,) for which pictures the right label has most votes."""


def knn_scores(
    references: ArrayLike,
    labels: ArrayLike,
    queries: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    *,
    ks: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
) -> list[KNNScore]:
    """k-NN accuracy for several k; the neighbours are searched once, exactly.

    Args:
        references: (N, D) embeddings, of any length.
        labels: (N,) their labels.
        queries: (M, D); without them each reference is classified by all the others (leave one out).
        truth: (M,) the queries' labels. A label that no reference has counts as wrong.
        ks: numbers of neighbours, from 1.
        temperature: of the votes.

    Raises:
        UsageError: shapes do not match, values are not finite, or there are no queries.
    """
    if not ks or min(ks) < 1:
        raise UsageError(f"ks={list(ks)!r} is invalid; use whole numbers, 1 or more, such as 10, 20, 100")
    known = check_matrix(references)
    classes, known_codes = np.unique(check_labels(labels, len(known)), return_inverse=True)
    temperature = check_temperature(temperature)
    known, most = normalised(known), min(max(check_whole(k, "k") for k in ks), len(known))
    if queries is None:
        similarities, neighbours = nearest_others(known, most)
        codes = known_codes
    else:
        vectors = np.asarray(queries, np.float32)
        answers = np.asarray(truth)
        if vectors.ndim != 2 or vectors.shape[1] != known.shape[1] or len(answers) != len(vectors):
            raise UsageError(
                f"the queries have shape {vectors.shape} and {answers.size} labels; expected (M, {known.shape[1]}) "
                "and M"
            )
        vectors = check_matrix(vectors, "queries")
        similarities, neighbours = nearest(normalised(vectors), known, most)
        codes = _codes(classes, answers)
    voters = known_codes[neighbours]
    found = []
    for k in ks:
        ranks = _ranks(similarities[:, :k], voters[:, :k], codes, len(classes), temperature)
        count = len(codes)
        found.append(
            KNNScore(
                k,
                proportion_of(int((ranks < 1).sum()), count),
                proportion_of(int((ranks < 5).sum()), count),
                ranks < 1,
            )
        )
    return found


def _codes(classes: NDArray[np.generic], labels: NDArray[np.generic]) -> NDArray[np.intp]:
    """The number of each label among the sorted classes, -1 if it is not one of them."""
    places = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    return np.where(classes[places] == labels, places, -1)


def _ranks(
    similarities: NDArray[np.float64],
    voters: NDArray[np.intp],
    codes: NDArray[np.intp],
    n_classes: int,
    temperature: float,
) -> NDArray[np.intp]:
    """How many labels have more votes than the right one; with equal votes, the first of the sorted labels wins.

    ``voters``: (M, k) labels of the neighbours; ``codes``: (M,) the right ones, -1 where no neighbour can have it.
    """
    ranks = np.empty(len(codes), np.intp)
    for part in parts_of_queries(len(codes), n_classes):
        shares = shares_of_votes(
            similarities[part], voters[part], n_classes=n_classes, temperature=temperature
        )
        right = codes[part]
        own = shares[np.arange(len(shares)), right][:, None]
        before = (shares > own) | ((shares == own) & (np.arange(n_classes) < right[:, None]))
        ranks[part] = np.where((right >= 0) & (own[:, 0] > 0), before.sum(axis=1), n_classes + 5)
    return ranks


def raw_pixels(
    pictures: Sequence[Item],
    *,
    channels: int = 3,
    workers: Workers = "auto",
    on_progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float32], list[str | None]]:
    """A baseline that features must beat: the whole picture at 16x16 (Pillow, bicubic) with its mean subtracted.

    Args:
        pictures: files, or what ``dinokit.sources.search_pictures`` returns.
        channels: of the models that are evaluated; 1 counts as 3.
        workers: decoding threads.
        on_progress: called with the number of pictures since its last call.

    Returns:
        (N, 16 · 16 · C) float32, (N, 768) for photographs, with NaN in the rows of failed pictures; and why each
        failed, None if it did not.
    """
    width = 3 if is_photographic(channels) else channels
    vectors = np.full((len(pictures), 16 * 16 * width), np.nan, np.float32)
    errors: list[str | None] = []
    pixels = functools.partial(_pixels, channels=channels)
    ahead = map_ahead(pixels, in_order(pictures), workers=count_workers(workers), ahead=64)
    for number, made in enumerate(ahead):
        errors.append(made if isinstance(made, str) else None)
        if not isinstance(made, str):
            vectors[number] = made
        if on_progress:
            on_progress(1)
    return vectors, errors


def _pixels(picture: Item, channels: int) -> NDArray[np.float32] | str:
    from PIL import Image

    from dinokit.pictures.bands import Bands, decode_picture

    seen = 3 if is_photographic(channels) else channels
    try:
        small = decode_picture(picture, seen).resize((16, 16), Image.Resampling.BICUBIC)
    except ImageError as error:
        return str(error)
    levels = small.array if isinstance(small, Bands) else np.asarray(small)
    flat: NDArray[np.float32] = levels.astype(np.float32).reshape(-1) / np.float32(255)
    made: NDArray[np.float32] = flat - flat.mean()
    return made
