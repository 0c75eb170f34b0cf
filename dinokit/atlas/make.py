"""Makes the page from a table of embeddings: selects photographs, lays them out, groups them, adds thumbnails."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.atlas.clusters import cluster
from dinokit.atlas.layout import lay_out, principal_components
from dinokit.atlas.page import MOST_PHOTOS, AtlasData, Grouping, render
from dinokit.atlas.thumbnails import check_size, make_sheets
from dinokit.errors import DinokitError, UsageError
from dinokit.neighbours.nearest import finite_rows, nearest, normalised

__all__ = ["Atlas", "make_atlas"]

_GRAPH_K = 15  # neighbours that hold the map together: UMAP's number, and enough for t-SNE (see layout.py)
_CLUSTER_DIMENSIONS = 50
_MOST_GROUPS = 12  # of folders and of labels, each with a colour of its own

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Atlas:
    """The result of :func:`make_atlas`."""

    page: str = field(repr=False)
    photos: int
    """Number on the map."""
    left_out: int
    """Rows of the table with an error instead of an embedding."""
    sampled_from: int
    """Photographs with an embedding; more than ``photos`` where ``max_photos`` chose among them."""
    paths: Sequence[str] = field(repr=False)
    """Of the N photographs on the map, in the order of the table."""
    places: NDArray[np.float64] = field(repr=False)
    """(N, 2) x to the right and y up, the widest of all sides from -1 to 1."""
    cluster_of: NDArray[np.int32] = field(repr=False)
    """(N,) numbers in ``clusters``, the largest cluster first."""
    clusters: Sequence[str]
    """Names of the clusters, as the page shows them."""
    problems: list[tuple[str, str]]
    """(path, reason) of the photographs that could not be read again: grey on the map."""


def make_atlas(
    embeddings: NDArray[np.float32],
    paths: Sequence[str],
    *,
    title: str = "Atlas",
    labels: Sequence[str | None] | None = None,
    origin: dict[str, Any] | None = None,
    roots: Sequence[str | os.PathLike[str]] = (".",),
    layout: str = "builtin",
    clusters: int | None = None,
    neighbours: int = 12,
    thumbnail_px: int = 64,
    max_photos: int = 10_000,
    on_progress: OnProgress | None = None,
) -> Atlas:
    """A map of photographs as one self-contained HTML page.

    Args:
        embeddings: (N, D) float32; rows that are not finite are left out.
        paths: of the N photographs, from which the thumbnails are made.
        title: of the page.
        labels: one per photograph, None if it has none, to colour the map by.
        origin: of the embeddings, as :func:`dinokit.tables.embeddings.read_embeddings` returns it.
        roots: folders in which relative paths are searched, in this order.
        layout: see :func:`dinokit.atlas.layout.lay_out`.
        clusters: their number; chosen by default, see :func:`dinokit.atlas.clusters.cluster`.
        neighbours: how many of the most similar photographs the page names for each, by cosine, exact.
        thumbnail_px: longer side of a thumbnail, from 16 to 256.
        max_photos: maximum number of photographs, chosen evenly over the table; at most 50,000.
        on_progress: called with the task (``layout``, ``thumbnails``), how many units of it are done now, and
            how many of them failed. The layout has 100 units.

    Raises:
        UsageError: an argument is out of range, or shapes do not fit.
        DinokitError: no photograph has an embedding, or a library for the layout is missing.
    """
    vectors = np.asarray(embeddings, np.float32)
    _check(vectors, paths, labels, thumbnail_px, max_photos, neighbours)
    finite = np.flatnonzero(finite_rows(vectors))
    if not len(finite):
        raise DinokitError("no row of the table has an embedding: there is nothing to draw a map of")
    chosen = finite[np.arange(min(len(finite), max_photos)) * len(finite) // min(len(finite), max_photos)]
    check_size(len(chosen), thumbnail_px)
    report = on_progress or (lambda task, done, failed: None)

    rows = normalised(vectors[chosen])
    names = [paths[i] for i in chosen]
    k = min(max(neighbours, _GRAPH_K), len(rows) - 1)
    similar, near = _neighbours(rows, k)
    places = lay_out(rows, near[:, :_GRAPH_K], layout, lambda done: report("layout", done, 0))
    cluster_of = cluster(principal_components(rows, _CLUSTER_DIMENSIONS), clusters)
    sheets = make_sheets(
        names,
        thumbnail_px,
        roots=[Path(root) for root in roots],
        on_progress=lambda done, failed: report("thumbnails", done, failed),
    )
    left_out = len(vectors) - len(finite)
    groups = _clusters(cluster_of, rows)
    given = _by_label([labels[i] for i in chosen], rows) if labels is not None else []
    data = AtlasData(
        title=title,
        summary=_summary(len(rows), len(finite), left_out, len(sheets.problems)),
        origin=_origin(origin or {}, layout),
        paths=names,
        places=places,
        similarities=similar[:, :neighbours],
        neighbours=near[:, :neighbours],
        groupings=[groups, *given, *_folders(names, rows)],
        thumbnails=sheets,
        thumbnail_px=thumbnail_px,
    )
    return Atlas(
        page=render(data),
        photos=len(rows),
        left_out=left_out,
        sampled_from=len(finite),
        paths=names,
        places=places,
        cluster_of=cluster_of,
        clusters=groups.labels,
        problems=sheets.problems,
    )


def _check(
    vectors: NDArray[np.float32],
    paths: Sequence[str],
    labels: Sequence[str | None] | None,
    thumbnail_px: int,
    max_photos: int,
    neighbours: int,
) -> None:
    if vectors.ndim != 2 or len(paths) != len(vectors):
        raise UsageError(
            f"embeddings of shape {vectors.shape} and {len(paths)} paths do not fit; expected (N, D) and N"
        )
    if labels is not None and len(labels) != len(vectors):
        raise UsageError(
            f"{len(labels)} labels for {len(vectors)} embeddings; expected one for each, or None"
        )
    for name, value, low, high in (
        ("thumbnail_px", thumbnail_px, 16, 256),
        ("max_photos", max_photos, 1, MOST_PHOTOS),
        ("neighbours", neighbours, 1, 100),
    ):
        if not low <= value <= high:
            raise UsageError(f"{name}={value} must lie between {low} and {high:,}")


def _neighbours(rows: NDArray[np.float32], k: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    if k == 0:  # one photograph
        return np.empty((1, 0)), np.empty((1, 0), np.intp)
    return nearest(rows, rows, k, leave_out=True)


# -- groups


def _clusters(labels: NDArray[np.int32], rows: NDArray[np.float32]) -> Grouping:
    names = [f"Cluster {number + 1}" for number in range(int(labels.max()) + 1)]
    return Grouping("Clusters", names, labels, _typical(labels, rows, len(names)))


def _folders(paths: Sequence[str], rows: NDArray[np.float32]) -> list[Grouping]:
    """Colours by folder, if there are several: people often sort photographs by content."""
    parents = [str(PurePosixPath(path.replace("\\", "/")).parent) for path in paths]
    largest, of, others = _largest(parents)
    if len(largest) < 2:
        return []
    names, other = _without_common_start(largest), None
    if others:
        other = len(names)
        names.append(f"{others} other folders")
    return [Grouping("Folders", names, of, _typical(of, rows, len(names)), other)]


def _by_label(labels: Sequence[str | None], rows: NDArray[np.float32]) -> list[Grouping]:
    """Colours by the labels of the table, if it has any."""
    largest, of, others = _largest([label or "" for label in labels], without="")
    if not largest:
        return []
    rest = [f"{others} other labels"] if others else []
    if not all(labels):
        rest.append("no label")
    names, other = list(largest), None
    if rest:
        other = len(names)
        names.append(" or ".join(rest))
    return [Grouping("Labels", names, of, _typical(of, rows, len(names)), other)]


def _largest(values: Sequence[str], without: str | None = None) -> tuple[list[str], NDArray[np.intp], int]:
    """The most frequent values; for each photograph the number of its value among them, or their count if it is not
    among them; and how many further values there are. ``without``: what counts as no value."""
    counts = Counter(value for value in values if value != without)
    # Sorted by size, equal ones by name.
    largest = sorted(counts, key=lambda value: (-counts[value], value))[:_MOST_GROUPS]
    number = {value: i for i, value in enumerate(largest)}
    of = np.array([number.get(value, len(largest)) for value in values], np.intp)
    return largest, of, len(counts) - len(largest)


def _without_common_start(folders: list[str]) -> list[str]:
    if len(folders) < 2:
        return folders
    parts = [folder.split("/") for folder in folders]
    common = 0
    while common < min(map(len, parts)) - 1 and len({part[common] for part in parts}) == 1:
        common += 1
    return ["/".join(part[common:]) for part in parts]


def _typical(labels: NDArray[np.integer[Any]], rows: NDArray[np.float32], count: int) -> list[int]:
    """For each group, the photograph nearest to its mean."""
    found = []
    for group in range(count):
        members = np.flatnonzero(labels == group)
        middle = rows[members].mean(axis=0)
        found.append(int(members[np.argmax(rows[members] @ middle)]))
    return found


# -- words


def _summary(photos: int, with_embedding: int, left_out: int, gone: int) -> str:
    parts = [f"{photos:,} photographs" if photos != 1 else "1 photograph"]
    if with_embedding > photos:
        parts[0] += f" of {with_embedding:,}, evenly chosen"
    if left_out:
        parts.append(f"{left_out:,} without an embedding left out")
    if gone:
        parts.append(f"{gone:,} could not be read again (grey)")
    return " · ".join(parts)


def _origin(origin: dict[str, Any], layout: str) -> str:
    model = f"Embeddings of {origin['model']}" if origin.get("model") else "Embeddings of an unknown model"
    revision = f", revision {origin['revision']}" if origin.get("revision") else ""
    how = {
        "builtin": "t-SNE",
        "pca": "two principal components",
        "umap": "UMAP",
        "tsne": "t-SNE of a library",
    }
    return (
        f"{model}{revision}. The map ({how[layout]}) shows which photographs are near each other; distances between "
        "far groups mean little. Most similar: by cosine of the embeddings themselves, exact."
    )
