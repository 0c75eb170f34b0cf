"""Embed many pictures into a table, shard by shard: bad pictures are tolerated, an interrupted run resumes.

:func:`embed_to_table` runs the shards of ``shards.py`` one after the other, in one process. Finished shards are kept
in ``OUTPUT.parts/`` until the whole table is written and takes its name in one step.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.errors import DinokitError, ImageError, UsageError
from dinokit.features.batching import BatchSize, Halving, Workers, first_batch_size
from dinokit.features.pooling import outputs_for
from dinokit.sources import Item, Picture, PictureList, find_pictures, state_of
from dinokit.tables.begun import begun_rows
from dinokit.tables.earlier_rows import EarlierRows, KnownRows
from dinokit.tables.embeddings import write_embeddings
from dinokit.tables.formats import check_output, files_of
from dinokit.tables.labels import labels_in_origin, origin_with_labels
from dinokit.tables.origin import origin_of
from dinokit.tables.parquet import from_parquet, parquet_file
from dinokit.tables.parts import (
    claimed_parts,
    clear_parts,
    difference,
    has_earlier_parts,
    open_parts,
    other_inputs,
    other_vectors,
    parts_folder,
    remove_left_parts,
    remove_parts,
    resumes_overwrite,
)
from dinokit.tables.patches import (
    PATCHES,
    check_dtype,
    check_patch_output,
    rows_of_a_shard,
    write_patches,
)
from dinokit.tables.shards import Failure, OnProgress, Shard, failures_of, plan, run_shard
from dinokit.tables.share import Share, sole_writer

if TYPE_CHECKING:
    import pyarrow as pa

    from dinokit.features.backbone import Backbone

__all__ = [
    "Failure",
    "Interrupted",
    "RunSummary",
    "Shard",
    "Share",
    "embed_to_table",
    "parts_folder",
    "plan",
    "run_shard",
]

_LISTED_FAILURES = 1000  # kept in memory for the summary; the table has them all


@dataclass
class RunSummary:
    """What a run did. ``failures`` holds the first thousand failures."""

    output: Path
    rows: int
    embedded: int = 0
    failed: int = 0
    resumed: int = 0
    """Rows that an earlier, interrupted run or another share had computed."""
    kept: int = 0
    """Rows taken from the existing table (``update``)."""
    waiting: int = 0
    """Rows that other shares have not finished. If there are any, ``rows`` counts this share's only."""
    unlike: str | None = None
    """A name in the old table, if none of its rows was of one of these pictures (``update``)."""
    already_done: bool = False
    """The output existed, made by this very command."""
    written: bool = False
    """The whole table exists. False if other shares are not finished, or one of them is writing it."""
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`embed_to_table`: how many pictures are done, and where they are kept."""

    def __init__(self, done: int, rows: int, parts: Path) -> None:
        super().__init__(f"{done} of {rows} pictures are done")
        self.done, self.rows, self.parts = done, rows, parts


def embed_to_table(
    paths: str | os.PathLike[str] | Iterable[Item],
    output: str | os.PathLike[str],
    backbone: Backbone,
    *,
    what: str = "cls",
    normalize: bool = False,
    dtype: str | None = None,
    batch_size: BatchSize = 32,
    workers: Workers = "auto",
    overwrite: bool = False,
    update: bool = False,
    max_failures: int | None = None,
    shard_size: int | None = None,
    share: Share | None = None,
    on_planned: Callable[[int], None] | None = None,
    on_progress: OnProgress | None = None,
) -> RunSummary:
    """Embeds ``paths`` into the table ``output``, one row per picture, in order.

    The same call resumes after an interruption, and finds the work done once it is finished.

    Args:
        paths: a list, a generator or a column of files; what ``dinokit.sources.search_pictures`` returns; or the name
            of one source, such as a folder, which is searched.
        output: the table: ``.parquet``, ``.npy``, ``.csv``, ``.jsonl`` or ``.lance`` (see ``embeddings.py``).
        backbone: the model.
        what: ``cls``, ``mean``, ``cls:4`` …, as for ``Backbone.embed``; or ``patches`` for a table of patch tokens,
            ``.parquet`` or ``.npy`` (see ``patches.py``).
        normalize: as for ``Backbone.embed``.
        dtype: of patch tokens, ``float16`` (the default) or ``float32``; vectors are float32.
        batch_size: the largest batch; ``auto`` starts with one that suits the device and halves it when memory runs
            out.
        workers: decoding threads: ``auto`` or a number.
        overwrite: embed everything again and replace the existing table. The same call resumes an interrupted run
            with ``overwrite``.
        update: if the table exists and the same model made it, embed only pictures that are new, have changed or
            had failed; rows of pictures that are not in ``paths`` are dropped (see ``earlier_rows.py``).
        max_failures: stop when more pictures than this cannot be read.
        shard_size: rows per shard; by default :func:`plan` chooses it.
        share: which of several processes this is that make the same call at the same time, on one disk. Each embeds
            its share; the one that finds all shares done writes the table (``written``).
        on_planned: called once with the number of pictures that this call embeds.
        on_progress: called with the numbers of pictures and of failures since its last call.

    Raises:
        UsageError: no inputs; an unknown suffix; the output was made from other inputs or by another model and
            ``overwrite`` was not given; ``overwrite`` in a share; another process is at work on ``output`` and is
            not another share of this run.
        ImageError: more than ``max_failures`` pictures failed.
        DinokitError: the disk is full; finished shards are kept.
        Interrupted: Ctrl-C; what is done is kept.
    """
    output = Path(output)
    check_output(output)
    pictures = _pictures(paths, backbone)
    if overwrite and share:
        raise UsageError(
            "overwrite in a share would discard the work of the other shares; remove the table and its folder "
            f"{parts_folder(output).name} once, before the shares start"
        )
    began = time.monotonic()
    origin = _origin(backbone, output, what=what, normalize=normalize, dtype=dtype)
    origin["began"] = time.time()  # before any file is examined, so that update notices later changes
    origin["inputs_sha256"] = _fingerprint(pictures)
    origin |= labels_in_origin(pictures)
    summary = RunSummary(output, len(pictures))
    at_most = first_batch_size(batch_size, backbone.device)
    if what == PATCHES and shard_size is None:
        shard_size = rows_of_a_shard(backbone, origin["dtype"])
        at_most = min(at_most, shard_size)
    shards = plan(pictures, parts_folder(output), batch_size=at_most, shard_size=shard_size)

    table: EarlierRows | None = None
    before = origin_with_labels(output, origin) if output.exists() else None
    if before is not None and not overwrite:
        if not update or _nothing_new(before, origin):
            return _already_done(summary, before, origin)
        _must_take_rows(output, before, origin)
        table = EarlierRows.of_table(output)
        summary.unlike = table.first_name if len(table) and not table.has_any_of(pictures) else None

    run = _Run(
        backbone=backbone,
        origin=origin,
        shards=shards,
        mine=share.of(shards) if share else shards,
        alone=share is None,
        parts=parts_folder(output),
        workers=workers,
        halving=Halving(at_most) if batch_size == "auto" else None,
        max_failures=max_failures,
        before=before,
        table=table,
        summary=summary,
    )
    if on_planned:
        on_planned(_count_pictures(run.mine))
    with claimed_parts(run.parts, output, alone=run.alone):
        if overwrite and not resumes_overwrite(run.parts, origin, shards, before):
            clear_parts(run.parts)
        run.interrupted = open_parts(
            run.parts,
            origin,
            shards,
            pictures,
            output,
            alone=run.alone,
            overwrite=overwrite,
            before=before,
        )
        with _keeping_what_is_done(output, run.mine, run.parts, alone=run.alone):
            for shard in run.mine:
                run.finish(shard, on_progress)
            if run.alone:
                run.write_table()
            else:
                run.write_table_if_last()
    summary.seconds = time.monotonic() - began
    return summary


@dataclass
class _Run:
    """One call of :func:`embed_to_table`, once it is known that there is work to do."""

    backbone: Backbone
    origin: dict[str, Any]
    shards: Sequence[Shard]
    mine: Sequence[Shard]
    """Those of this share; all of them if there are no shares."""
    alone: bool
    """There are no shares."""
    parts: Path
    workers: Workers
    halving: Halving | None
    max_failures: int | None
    before: dict[str, Any] | None
    """The origin of the table that existed before."""
    table: EarlierRows | None
    """Its rows, if they may be kept (``update``)."""
    summary: RunSummary
    interrupted: Sequence[EarlierRows] = ()
    """Rows of runs that were interrupted."""

    def finish(self, shard: Shard, on_progress: OnProgress | None) -> None:
        """Computes a shard, unless an earlier run or another share has."""
        if shard.part.is_file():
            failures = failures_of(shard, _read_part(shard).column("error").to_pylist())
            self.summary.resumed += len(shard.paths)
            if on_progress:
                on_progress(len(shard.paths), len(failures))
        else:
            failures = run_shard(
                shard,
                self.backbone,
                what=self.origin["what"],
                normalize=self.origin["normalize"],
                dtype=self.origin.get("dtype", "float32"),
                workers=self.workers,
                known=self._known_rows(shard),
                halving=self.halving,
                on_progress=on_progress,
            )
        _count(self.summary, shard, failures, self.max_failures)

    def write_table(self) -> None:
        # Known only now. They are in the origin because a later call needs them without reading the rows.
        self.origin.update(rows=self.summary.rows, failed=self.summary.failed)
        write = write_patches if self.origin["what"] == PATCHES else write_embeddings
        write(self.summary.output, lambda: map(_read_part, self.shards), self.summary.rows, self.origin)
        remove_parts(self.parts)
        self.summary.written = True

    def write_table_if_last(self) -> None:
        """Writes the table if all shares are done and no other share is writing it or has written it."""
        waiting = _count_pictures(shard for shard in self.shards if not shard.part.is_file())
        if waiting:
            self.summary.rows = _count_pictures(self.mine)
            # Finished shards disappear once the table exists, so check for the table after them.
            if self._is_written():
                self.summary.written = True
                remove_parts(self.parts)
            else:
                self.summary.waiting = waiting
            return
        with sole_writer(self.parts) as first:
            if first:
                own = {shard.index for shard in self.mine}
                for shard in self.shards:
                    if shard.index not in own:
                        self.finish(shard, None)
                self.write_table()
            else:
                self.summary.rows = _count_pictures(self.mine)
                self.summary.written = not self.parts.exists()  # the writer clears it away at its end

    def _is_written(self) -> bool:
        output = self.summary.output
        there = origin_with_labels(output, self.origin) if output.exists() else None
        return there is not None and there != self.before and not difference(there, self.origin)

    def _known_rows(self, shard: Shard) -> KnownRows:
        """Rows that need not be computed: of interrupted shards, this one first, and then of the existing table."""
        known = begun_rows(shard.part) or KnownRows.none()
        for rows in self.interrupted:
            known = known.and_then(rows.known(shard.paths, but=set(known.places)))
        self.summary.resumed += len(known.places)
        if self.table is not None:
            kept = self.table.known(shard.paths, but=set(known.places))
            self.summary.kept += len(kept.places)
            known = known.and_then(kept)
        return known


def _pictures(paths: str | os.PathLike[str] | Iterable[Item], backbone: Backbone) -> Sequence[Item]:
    pictures: Sequence[Item]
    if isinstance(paths, str | os.PathLike):
        pictures = find_pictures([os.fspath(paths)], channels=backbone.preprocessing.channels)
    else:  # also a column of a data frame, an array, what Path.glob returns
        pictures = paths if isinstance(paths, PictureList) else list(paths)
    if not pictures:
        raise UsageError("there are no pictures to embed")
    _must_have_names(pictures)
    return pictures


def _must_have_names(paths: Sequence[Item]) -> None:
    """Rows are identified by their pictures' names; pictures in memory have none. Checks the first picture only."""
    first = paths[0]
    if not isinstance(first, str | os.PathLike | Picture):
        raise UsageError(
            f"a table names its pictures, and a {type(first).__name__} has no name; pass files, or embed pictures in "
            "memory with Backbone.embed"
        )


@contextmanager
def _keeping_what_is_done(
    output: Path, shards: Sequence[Shard], parts: Path, *, alone: bool
) -> Iterator[None]:
    """Turns Ctrl-C and a full disk into errors that report how much is done; ``alone``: this run is not a share."""
    total = _count_pictures(shards)
    try:
        yield
    except KeyboardInterrupt as error:
        done = _count_kept(shards)
        if alone and not done and not has_earlier_parts(parts):
            shutil.rmtree(parts, ignore_errors=True)
        raise Interrupted(done, total, parts) from error
    except UsageError:  # this network or engine cannot do it, so no later run will resume
        if alone and not _count_kept(shards) and not has_earlier_parts(parts):
            shutil.rmtree(parts, ignore_errors=True)
        raise
    except OSError as error:  # the disk is full, or is gone
        if isinstance(error, DinokitError):
            raise
        kept = f"; {_count_kept(shards)} of {total} pictures are done and kept in {parts}"
        raise DinokitError(
            f"{output} cannot be written ({error.strerror or error}){kept}. The same command resumes from there"
        ) from error


def _count_pictures(shards: Iterable[Shard]) -> int:
    return sum(len(shard.paths) for shard in shards)


def _count_kept(shards: Sequence[Shard]) -> int:
    """How many pictures an interrupted run will not have to embed again."""
    begun = (begun_rows(shard.part) for shard in shards if not shard.part.is_file())
    whole = _count_pictures(shard for shard in shards if shard.part.is_file())
    return whole + sum(len(known.places) for known in begun if known is not None)


def _origin(
    backbone: Backbone, output: Path, *, what: str, normalize: bool, dtype: str | None
) -> dict[str, Any]:
    if what != PATCHES:
        if dtype not in (None, "float32"):
            raise UsageError(f"dtype={dtype!r} is for patches; vectors are float32")
        outputs_for(what, backbone.config)  # an error comes before anything is written
        return origin_of(backbone, what=what, normalize=normalize)
    check_patch_output(output)
    if normalize:
        raise UsageError("normalize is for one vector per picture; patch tokens are written as they are")
    height, width, dim = backbone.patch_shape
    own = {
        "what": PATCHES,
        "grid": [height, width],
        "embed_dim": dim,
        "dtype": check_dtype(dtype or "float16"),
    }
    return origin_of(backbone) | own


class _TooManyFailures(ImageError):
    exit_code = 1  # some inputs failed and are listed, and what is done is kept


def _count(summary: RunSummary, shard: Shard, failures: list[Failure], max_failures: int | None) -> None:
    summary.failed += len(failures)
    summary.embedded += len(shard.paths) - len(failures)
    summary.failures += failures[: _LISTED_FAILURES - len(summary.failures)]
    if max_failures is not None and summary.failed > max_failures:
        first, seen = summary.failures[0], summary.embedded + summary.failed
        raise _TooManyFailures(
            f"{summary.failed} of the first {seen} pictures cannot be read, more than the {max_failures} "
            f"allowed; the first is {first.path}: {first.error}. Check the inputs, or allow more failures"
        )


def _read_part(shard: Shard) -> pa.Table:
    with parquet_file(shard.part) as file:
        return from_parquet(file.read(use_threads=False))


def _fingerprint(paths: Sequence[Item]) -> str:
    """A checksum of names, sizes and times of change, which shows changed inputs without reading them."""
    digest = hashlib.sha256()
    for item in paths:
        digest.update(os.fsencode(str(item)) + b"\0" + state_of(item).encode() + b"\0")
    return digest.hexdigest()


def _nothing_new(there: dict[str, Any], origin: dict[str, Any]) -> bool:
    return not there.get("failed") and not other_inputs(there, origin)


def _must_take_rows(output: Path, there: dict[str, Any], origin: dict[str, Any]) -> None:
    """Raises UsageError unless new rows may join those of the table ``output``, whose origin is ``there``."""
    differs = other_vectors(there, origin)
    if differs or not all(file.exists() for file in files_of(output)):
        what = f"made {differs}" if differs and there else "not made by this command"
        raise UsageError(
            f"{output} exists, {what}, so its rows cannot be kept with new ones; choose another output, or give "
            "--overwrite (overwrite=True) to embed everything again"
        )


def _already_done(summary: RunSummary, there: dict[str, Any], origin: dict[str, Any]) -> RunSummary:
    differs = difference(there, origin)
    whole = all(file.exists() for file in files_of(summary.output))
    if differs or not whole or "failed" not in there:
        what = f"made {differs}" if differs and there else "not made by this command"
        of_this_model = there and whole and not other_vectors(there, origin)
        newer = "--update (update=True) to embed only what is new or changed, or " if of_this_model else ""
        raise UsageError(
            f"{summary.output} exists, {what}; choose another output, or give {newer}--overwrite "
            "(overwrite=True) to replace it"
        )
    remove_left_parts(parts_folder(summary.output), summary.output, there)
    summary.already_done = summary.written = True
    summary.failed = int(there["failed"])
    summary.embedded = summary.rows - summary.failed
    return summary
