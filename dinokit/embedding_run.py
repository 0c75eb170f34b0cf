"""Embed many pictures into a table: in shards, bad pictures tolerated, continued after an interruption.

:func:`plan` cuts the inputs into shards, :func:`run_shard` makes one, each into its own file; any runner can
call these two, in any process. :func:`embed_to_table` is the runner of one process. Finished shards lie in
``OUTPUT.parts/`` until the table is whole and takes its name in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.batching import Workers, batched, check_batch_size, count_workers, even_batch_size, map_ahead
from dinokit.embeddings import check_suffix, files_of, origin_of, read_origin, table_of, write_embeddings
from dinokit.errors import ImageError, UsageError
from dinokit.images import decode_image

if TYPE_CHECKING:
    import pyarrow as pa

    from dinokit.backbone import Backbone

__all__ = [
    "Failure",
    "Interrupted",
    "RunSummary",
    "Shard",
    "embed_to_table",
    "parts_folder",
    "plan",
    "run_shard",
]

_MANIFEST = "manifest.json"
_MANIFEST_FORMAT = 1
_LISTED_FAILURES = 1000  # kept in memory for the summary; the table has them all
# Vectors made with another of these cannot stand in one table.
_SAME_SPACE = ("weights_sha256", "preprocessing", "precision")


@dataclass(frozen=True)
class Shard:
    """A run of consecutive inputs and the file that its part of the table goes to. Can be pickled."""

    index: int
    paths: tuple[Path, ...]
    part: Path
    batch_size: int
    """The constant number of pictures in a run of the network; the last one is padded."""


@dataclass(frozen=True)
class Failure:
    """One picture that could not be read."""

    path: str
    error: str


@dataclass
class RunSummary:
    """What a run did. ``failures`` holds the first thousand."""

    output: Path
    rows: int
    embedded: int = 0
    failed: int = 0
    resumed: int = 0
    """Rows that an earlier, interrupted run had finished."""
    already_done: bool = False
    """The output was there, made by this very command."""
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`embed_to_table`: how far it came, and where that is kept."""

    def __init__(self, done: int, rows: int, parts: Path) -> None:
        super().__init__(f"{done} of {rows} pictures are done")
        self.done, self.rows, self.parts = done, rows, parts


OnProgress = Callable[[int, int], None]
"""Called with (pictures done, failures among them) since the last call."""


def parts_folder(output: Path) -> Path:
    """Where the finished shards of ``output`` lie while it is not whole."""
    return output.with_name(output.name + ".parts")


def plan(
    paths: Sequence[Path], parts: Path, *, batch_size: int = 32, shard_size: int | None = None
) -> list[Shard]:
    """Cuts the inputs into shards.

    Args:
        paths: the inputs, in order (``find_images``).
        parts: the folder for the shards' files.
        batch_size: pictures in a run of the network, at most; evened out so that little is padded.
        shard_size: rows of a shard. By default 256, so that an interruption costs seconds; more for very many
            inputs, so that there are about a thousand files.
    """
    check_batch_size(batch_size)
    # Not a multiple of the batch: a run may be continued with another batch size.
    size = shard_size or max(256, batch_size, len(paths) // 1000)
    even = even_batch_size(min(size, len(paths)), batch_size)
    return [
        Shard(index, tuple(paths[start : start + size]), parts / f"{index:06d}.parquet", even)
        for index, start in enumerate(range(0, len(paths), size))
    ]


def run_shard(
    shard: Shard, backbone: Backbone, *, workers: Workers = "auto", on_progress: OnProgress | None = None
) -> list[Failure]:
    """Embeds one shard and writes its part, whole or not at all. A part that is there already is made anew.

    Returns:
        The pictures that could not be read; they have rows with a null embedding.
    """
    import pyarrow.parquet as pq

    vectors = np.zeros((len(shard.paths), backbone.embed_dim), np.float32)
    sizes: list[tuple[int, int] | None] = []
    errors: list[str | None] = []
    height, width = backbone.image_size
    blank = np.zeros((height, width, 3), np.uint8)

    def prepare(path: Path) -> _Prepared:
        return _prepare(path, backbone)

    decoded = map_ahead(prepare, shard.paths, workers=count_workers(workers), ahead=2 * shard.batch_size)
    for batch in batched(decoded, shard.batch_size):
        # A picture that failed leaves a blank in its place, as does the padding: the shape stays constant.
        crops = [blank if item.crop is None else item.crop for item in batch]
        stacked = np.stack(crops + [blank] * (shard.batch_size - len(batch)))
        start = len(errors)
        if any(item.error is None for item in batch):
            vectors[start : start + len(batch)] = backbone.embed_crops(stacked)[: len(batch)]
        sizes += [item.size for item in batch]
        errors += [item.error for item in batch]
        if on_progress:
            on_progress(len(batch), sum(item.error is not None for item in batch))
    table = table_of(shard.paths, vectors, sizes, errors)
    shard.part.parent.mkdir(parents=True, exist_ok=True)
    temporary = shard.part.with_name(f".{shard.part.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, compression="none", use_dictionary=False)
        temporary.replace(shard.part)
    finally:
        temporary.unlink(missing_ok=True)
    return _failures(shard, errors)


@dataclass(frozen=True)
class _Prepared:
    crop: NDArray[np.uint8] | None = None
    size: tuple[int, int] | None = None
    error: str | None = None


def _prepare(path: Path, backbone: Backbone) -> _Prepared:
    try:
        image = decode_image(path)
        return _Prepared(backbone.preprocessing.crop(image), image.size)
    except ImageError as error:
        return _Prepared(error=str(error))


def _failures(shard: Shard, errors: Sequence[str | None]) -> list[Failure]:
    rows = zip(shard.paths, errors, strict=True)
    return [Failure(str(path), error) for path, error in rows if error is not None]


# -- the runner of one process


def embed_to_table(
    paths: Sequence[Path],
    output: str | os.PathLike[str],
    backbone: Backbone,
    *,
    batch_size: int = 32,
    workers: Workers = "auto",
    overwrite: bool = False,
    max_failures: int | None = None,
    shard_size: int | None = None,
    on_progress: OnProgress | None = None,
) -> RunSummary:
    """Embeds ``paths`` into the table ``output``, one row each, in order.

    The same call after an interruption goes on where it stopped, and after the end finds the work done.

    Args:
        paths: of ``find_images`` or ``search_images``.
        output: ``.parquet``, ``.npy``, ``.csv`` or ``.jsonl`` (see ``embeddings.py``).
        overwrite: begin again whatever is there.
        max_failures: give up when more pictures than this cannot be read.
        on_progress: called with the numbers of pictures and of failures since its last call.

    Raises:
        UsageError: no inputs, an unknown suffix, or what is there was made from other inputs or by another
            model and ``overwrite`` was not given.
        ImageError: more than ``max_failures`` pictures failed.
        Interrupted: Ctrl-C; finished shards are kept.
    """
    output = Path(output)
    check_suffix(output)
    if not paths:
        raise UsageError("there are no pictures to embed")
    began = time.monotonic()
    origin = origin_of(backbone)
    origin["inputs_sha256"] = _fingerprint(paths)
    summary = RunSummary(output, len(paths))
    parts = parts_folder(output)
    shards = plan(paths, parts, batch_size=batch_size, shard_size=shard_size)
    if overwrite:
        shutil.rmtree(parts, ignore_errors=True)
    elif output.exists():
        return _already_done(summary, origin)
    _open_parts(parts, origin, shards, output)

    try:
        for shard in shards:
            if shard.part.is_file():
                failures = _failures(shard, _read_part(shard).column("error").to_pylist())
                summary.resumed += len(shard.paths)
                if on_progress:
                    on_progress(len(shard.paths), len(failures))
            else:
                failures = run_shard(shard, backbone, workers=workers, on_progress=on_progress)
            _count(summary, shard, failures, max_failures)
        # Known only now; in the metadata because a later call wants them without reading the rows.
        origin |= {"rows": summary.rows, "failed": summary.failed}
        write_embeddings(output, lambda: map(_read_part, shards), len(paths), origin)
    except KeyboardInterrupt as error:
        done = sum(len(shard.paths) for shard in shards if shard.part.is_file())
        if not done:
            shutil.rmtree(parts, ignore_errors=True)
        raise Interrupted(done, len(paths), parts) from error

    shutil.rmtree(parts, ignore_errors=True)
    summary.seconds = time.monotonic() - began
    return summary


def _count(summary: RunSummary, shard: Shard, failures: list[Failure], max_failures: int | None) -> None:
    summary.failed += len(failures)
    summary.embedded += len(shard.paths) - len(failures)
    summary.failures += failures[: _LISTED_FAILURES - len(summary.failures)]
    if max_failures is not None and summary.failed > max_failures:
        first, seen = summary.failures[0], summary.embedded + summary.failed
        raise ImageError(
            f"{summary.failed} of the first {seen} pictures cannot be read, more than the {max_failures} "
            f"allowed; the first is {first.path}: {first.error}. Look into the inputs, or allow more failures"
        )


def _read_part(shard: Shard) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard.part) as file:  # pq.read_table would import pyarrow.compute and dataset
        return file.read()


def _fingerprint(paths: Sequence[Path]) -> str:
    """Of names, sizes and times of change: other inputs than before are noticed without reading them."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            state = "missing"
        digest.update(os.fsencode(path) + b"\0" + state.encode() + b"\0")
    return digest.hexdigest()


def _already_done(summary: RunSummary, origin: dict[str, Any]) -> RunSummary:
    there = read_origin(summary.output)
    differs = _difference(there, origin)
    whole = all(file.is_file() for file in files_of(summary.output))
    if differs or not whole or "failed" not in there:
        what = f"made {differs}" if differs and there else "not by this command"
        raise UsageError(
            f"{summary.output} exists, {what}; choose another output, or give --overwrite "
            "(overwrite=True) to replace it"
        )
    shutil.rmtree(parts_folder(summary.output), ignore_errors=True)  # stopped between the last two steps
    summary.already_done = True
    summary.failed = int(there["failed"])
    summary.embedded = summary.rows - summary.failed
    return summary


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What separates two origins, in words; empty when their rows may stand in one table."""
    if any(old.get(key) != new[key] for key in _SAME_SPACE):
        keys = ", ".join(key for key in _SAME_SPACE if old.get(key) != new[key])
        return f"by another model ({old.get('model')}, now {new['model']}; they differ in {keys})"
    if old.get("inputs_sha256") != new["inputs_sha256"]:
        return "from other inputs (pictures were added, removed or changed)"
    return ""


def _open_parts(parts: Path, origin: dict[str, Any], shards: list[Shard], output: Path) -> None:
    """Makes the folder for the parts, or makes sure that the one that is there belongs to this run."""
    manifest = parts / _MANIFEST
    layout = {"format": _MANIFEST_FORMAT, "shards": [len(shard.paths) for shard in shards]}
    if not manifest.exists() and not any(parts.glob("*.parquet")):
        parts.mkdir(parents=True, exist_ok=True)
        temporary = manifest.with_suffix(".tmp")
        temporary.write_text(json.dumps({**layout, "origin": origin}, indent=2), encoding="utf-8")
        temporary.replace(manifest)
        return
    try:
        there = json.loads(manifest.read_text(encoding="utf-8"))
        differs = _difference(there["origin"], origin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        there, differs = {}, "by something else"
    if not differs and {key: there[key] for key in layout} != layout:
        differs = "in shards of another size (batch_size above 256 sets it)"
    if differs:
        raise UsageError(
            f"{parts} holds an interrupted run for {output}, made {differs}; repeat that run's command to "
            "finish it, or give --overwrite (overwrite=True) to begin again"
        )
