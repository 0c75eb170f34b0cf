"""Shards of a long run: consecutive pictures that are embedded together into a file of their own.

:func:`plan` cuts the inputs into shards and :func:`run_shard` embeds one; any process can call them. ``run.py`` runs
all shards in one process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ImageError
from dinokit.features.batching import (
    Halving,
    Workers,
    batched,
    check_batch_size,
    count_workers,
    even_batch_size,
    map_ahead,
)
from dinokit.features.pooling import vector_length
from dinokit.files.outputs import atomic
from dinokit.pictures.bands import decode_picture_with_extent
from dinokit.sources import Item, in_order, label_of, labelled
from dinokit.sources.names import text_of
from dinokit.tables.begun import forget_begun, keep_begun
from dinokit.tables.earlier_rows import KnownRows
from dinokit.tables.embeddings import table_of
from dinokit.tables.parquet import write_parquet_file
from dinokit.tables.patches import PATCHES, check_dtype, to_dtype, tokens_shape

if TYPE_CHECKING:
    import pyarrow as pa

    from dinokit.features.backbone import Backbone

__all__ = ["Failure", "OnProgress", "Shard", "failures_of", "plan", "run_shard"]

_KEEP_EVERY_S = 30.0
"""The most seconds of work in a shard that are lost if the process is killed; Ctrl-C loses none."""


@dataclass(frozen=True)
class Shard:
    """Consecutive inputs and the file for their part of the table. Can be pickled."""

    index: int
    paths: Sequence[Item]
    part: Path
    batch_size: int
    """The constant batch size; the last batch is padded."""
    labelled: bool = False
    """Whether the table gets a column of labels: if any source of the whole run carries labels."""


@dataclass(frozen=True)
class Failure:
    """One picture that could not be read."""

    path: str
    error: str

    def to_json(self) -> dict[str, str]:
        """For ``--json``."""
        return {"path": self.path, "error": self.error}


OnProgress = Callable[[int, int], None]
"""Called with (pictures done, failures among them) since the last call."""


def plan(
    paths: Sequence[Item], parts: Path, *, batch_size: int = 32, shard_size: int | None = None
) -> list[Shard]:
    """Cuts the inputs into shards.

    Args:
        paths: the inputs, in order: files, or what ``dinokit.sources.find_pictures`` returns.
        parts: the folder for the shards' files.
        batch_size: the largest batch; evened out so that there is little padding.
        shard_size: rows per shard. By default 256, so that an interruption costs seconds; more for very many inputs,
            so that there are about a thousand files.
    """
    check_batch_size(batch_size)
    # Not a multiple of the batch size: a run may be resumed with another one.
    size = shard_size or max(256, batch_size, len(paths) // 1000)
    even = even_batch_size(min(size, len(paths)), batch_size)
    with_labels = labelled(paths)
    return [
        Shard(index, _run_of(paths, start, start + size), parts / f"{index:06d}.parquet", even, with_labels)
        for index, start in enumerate(range(0, len(paths), size))
    ]


def _run_of(paths: Sequence[Item], start: int, stop: int) -> Sequence[Item]:
    # A slice of a PictureList is a view, which costs nothing; a list is copied, so that the caller cannot change it.
    run = paths[start:stop]
    return tuple(run) if isinstance(run, list) else run


def run_shard(
    shard: Shard,
    backbone: Backbone,
    *,
    what: str = "cls",
    normalize: bool = False,
    dtype: str = "float16",
    workers: Workers = "auto",
    known: KnownRows | None = None,
    halving: Halving | None = None,
    on_progress: OnProgress | None = None,
) -> list[Failure]:
    """Embeds one shard and writes its part, whole or not at all. An existing part is replaced.

    On Ctrl-C, the rows computed so far are kept beside it (:func:`dinokit.tables.begun.begun_rows`).

    Args:
        shard: from :func:`plan`.
        backbone: the model.
        what: which vectors, as for ``Backbone.embed``, or ``patches``.
        normalize: as for ``Backbone.embed``.
        dtype: of patch tokens.
        workers: decoding threads.
        known: rows that need not be computed.
        halving: what to do when a batch does not fit in memory; by default that is an error.
        on_progress: called with the numbers of pictures and of failures since its last call.

    Returns:
        The pictures that could not be read; they have rows with a null embedding.
    """
    count = len(shard.paths)
    vectors = _no_vectors(count, backbone, what, dtype)
    sizes: list[tuple[int, int] | None] = [None] * count
    errors: list[str | None] = [None] * count
    places: Sequence[int] = range(count)
    batch_size = shard.batch_size
    if known is not None and known.places:
        vectors[known.places] = known.embeddings
        for place, size in zip(known.places, known.sizes, strict=True):
            sizes[place] = size
        places = sorted(set(places).difference(known.places))
        batch_size = even_batch_size(len(places), batch_size) or 1
        if on_progress:
            on_progress(len(known.places), 0)
    height, width = backbone.image_size
    blank = np.zeros((height, width, backbone.preprocessing.channels), np.uint8)
    compute = functools.partial(
        _vectors_of, backbone=backbone, what=what, normalize=normalize, dtype=vectors.dtype
    )
    prepare = functools.partial(_prepare, backbone=backbone)
    items = in_order(shard.paths[place] for place in places)
    decoded = map_ahead(prepare, items, workers=count_workers(workers), ahead=2 * batch_size)
    keep = functools.partial(keep_begun, shard.part, list(map(text_of, shard.paths)), vectors, sizes)
    kept_at = time.monotonic()
    try:
        for batch in batched(zip(places, decoded, strict=True), batch_size):
            # A failed picture is replaced by a blank, as is the padding, so that the shape stays constant.
            crops = [blank if item.crop is None else item.crop for _, item in batch]
            stacked = np.stack(crops + [blank] * (batch_size - len(batch)))
            if any(item.error is None for _, item in batch):
                made = halving.run(compute, stacked) if halving else compute(stacked)
                vectors[[place for place, _ in batch]] = made[: len(batch)]
            for place, item in batch:
                sizes[place], errors[place] = item.size, item.error
            if on_progress:
                on_progress(len(batch), sum(item.error is not None for _, item in batch))
            if time.monotonic() - kept_at >= _KEEP_EVERY_S:
                keep()
                kept_at = time.monotonic()
    except KeyboardInterrupt:
        keep()
        raise
    labels = [label_of(item) for item in shard.paths] if shard.labelled else None
    _write_part(shard.part, table_of(shard.paths, vectors, sizes, errors, labels))
    forget_begun(shard.part)
    return failures_of(shard, errors)


def _no_vectors(count: int, backbone: Backbone, what: str, dtype: str) -> NDArray[Any]:
    """Zeros for ``count`` pictures: (count, D) float32, or (count, h·w, D) patch tokens of ``dtype``."""
    if what == PATCHES:
        return np.zeros((count, *tokens_shape(backbone)), check_dtype(dtype))
    return np.zeros((count, vector_length(what, backbone.embed_dim)), np.float32)


def _vectors_of(
    crops: NDArray[Any], *, backbone: Backbone, what: str, normalize: bool, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The rows of the table for a batch of crops."""
    if what == PATCHES:
        tokens = backbone.patch_tokens_of_crops(crops)
        return to_dtype(tokens.reshape(len(crops), *tokens_shape(backbone)), dtype)
    return backbone.embed_crops(crops, what=what, normalize=normalize)


def _write_part(part: Path, table: pa.Table) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    with atomic(part) as temporary:
        write_parquet_file(temporary, table, compression="none", use_dictionary=False)


@dataclass(frozen=True)
class _Prepared:
    crop: NDArray[Any] | None = None
    size: tuple[int, int] | None = None
    error: str | None = None


def _prepare(item: Item, backbone: Backbone) -> _Prepared:
    try:
        channels, least_px = backbone.preprocessing.channels, backbone.least_px
        image, extent = decode_picture_with_extent(item, channels, least_px=least_px)
        return _Prepared(backbone.preprocessing.crop(image, extent), extent.size)
    except ImageError as error:
        return _Prepared(error=str(error))


def failures_of(shard: Shard, errors: Sequence[str | None]) -> list[Failure]:
    """The pictures of a shard that could not be read, from the errors of its rows."""
    rows = zip(shard.paths, errors, strict=True)
    return [Failure(str(path), error) for path, error in rows if error is not None]
