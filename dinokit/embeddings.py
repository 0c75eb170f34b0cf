"""The embeddings table: its columns, its origin, and the file formats it is written in and read from.

One row an input, in input order, always: ``path``, ``embedding`` (D float32), ``width``, ``height`` (of the
upright picture), ``error`` (null when fine; a picture that cannot be read keeps its row, with a null
embedding).

=============  ====================================================================================
``.parquet``   the table; its origin stands in the schema's metadata, under keys that start ``dinokit.``
``.npy``       (N, D) float32, failed rows NaN; the other columns beside it in ``NAME.npy.paths.csv``
``.csv``       path, width, height, error, e0 … e(D-1); failed rows have empty numbers
``.jsonl``     an object a line with the five columns
=============  ====================================================================================

The origin of the last three stands beside them in ``NAME.SUFFIX.origin.json``. Numbers are written with as
many digits as float32 needs to come back bit for bit.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit._version import __version__
from dinokit.errors import DinokitError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from dinokit.backbone import Backbone

__all__ = [
    "SUFFIXES",
    "check_suffix",
    "files_of",
    "origin_of",
    "read_embeddings",
    "read_origin",
    "table_of",
    "write_embeddings",
]

_KEY = "dinokit."  # before every key of the origin in Parquet metadata


def origin_of(backbone: Backbone) -> dict[str, Any]:
    """Where vectors of this backbone come from, as plain JSON values.

    Two tables may be compared when ``weights_sha256`` and ``preprocessing`` are equal.
    """
    return {
        "model": backbone.name,
        "source": backbone.source,
        "revision": backbone.revision,
        "weights_sha256": backbone.weights_sha256,
        "preprocessing": backbone.preprocessing.to_json(),
        "embed_dim": backbone.embed_dim,
        "engine": backbone.engine,
        "precision": backbone.precision,
        "dinokit_version": __version__,
    }


def check_suffix(output: str | os.PathLike[str]) -> str:
    """The suffix of an output's name. Raises UsageError when it is none that dinokit writes."""
    suffix = Path(output).suffix.lower()
    if suffix not in SUFFIXES:
        near = difflib.get_close_matches(suffix, SUFFIXES, n=1, cutoff=0.4)
        raise UsageError(
            f"{output}: the suffix {suffix!r} is not known; expected one of {', '.join(SUFFIXES)}"
            + (f". Did you mean {Path(output).with_suffix(near[0])}?" if near else "")
        )
    return suffix


def files_of(output: Path) -> list[Path]:
    """All files that a table named ``output`` consists of, itself first."""
    suffix = check_suffix(output)
    files = [output]
    if suffix != ".parquet":
        files.append(_beside(output, ".origin.json"))
    if suffix == ".npy":
        files.append(_beside(output, ".paths.csv"))
    return files


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)


# -- the table


def table_of(
    paths: Sequence[str | os.PathLike[str]],
    embeddings: NDArray[np.float32],
    sizes: Sequence[tuple[int, int] | None],
    errors: Sequence[str | None],
) -> pa.Table:
    """Rows as an Arrow table.

    Args:
        paths: as the user gave or the search found them.
        embeddings: (N, D); rows of failed pictures are ignored.
        sizes: (width, height) of each picture, None where it failed.
        errors: why a picture failed, None where it did not.
    """
    import pyarrow as pa

    count, dim = embeddings.shape
    assert count == len(paths) == len(sizes) == len(errors)
    # From buffers, because from_arrays with a mask imports pyarrow.compute: a tenth of a second of start-up.
    valid = np.packbits([error is None for error in errors], bitorder="little")
    flat = pa.py_buffer(np.ascontiguousarray(embeddings, np.float32))
    numbers = pa.Array.from_buffers(pa.float32(), count * dim, [None, flat])
    vectors = pa.Array.from_buffers(
        pa.list_(pa.float32(), dim), count, [pa.py_buffer(valid)], children=[numbers]
    )
    columns = {
        "path": pa.array([_text(path) for path in paths], pa.string()),
        "embedding": vectors,
        "width": pa.array([size and size[0] for size in sizes], pa.int32()),
        "height": pa.array([size and size[1] for size in sizes], pa.int32()),
        "error": pa.array(errors, pa.string()),
    }
    return pa.table(columns)


def _text(path: str | os.PathLike[str]) -> str:
    # File names are bytes; those that are not UTF-8 keep their odd bytes visible: caf\xe9.jpg
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _vectors(table: pa.Table) -> NDArray[np.float32]:
    """(N, D) of a table or a part of it; null rows are NaN."""
    column = table.column("embedding").combine_chunks()
    dim = column.type.list_size
    out = np.full((len(column), dim), np.nan, np.float32)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    out[valid] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return out


# -- writing


def write_embeddings(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    """Writes a table that comes in parts, one in memory at a time. The file appears whole or not at all.

    Args:
        output: its suffix says the format.
        parts: gives the parts from the first one, each time it is called.
        rows: of all parts together, at least one.
        origin: as :func:`origin_of`.
    """
    write = _WRITERS[check_suffix(output)]
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() != ".parquet":
        with _atomic(_beside(output, ".origin.json")) as file:
            file.write_text(json.dumps(dict(origin), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write(output, parts, rows, origin)


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    import pyarrow.parquet as pq

    metadata = {_KEY + key: _to_metadata(value) for key, value in origin.items() if value is not None}
    with _atomic(output) as file:
        tables = parts()
        first = next(tables)
        schema = first.schema.with_metadata(metadata)
        # Vectors are as good as random: a dictionary only costs, and they hardly shrink.
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["error"]) as writer:
            writer.write_table(first.replace_schema_metadata(metadata))
            for table in tables:
                writer.write_table(table.replace_schema_metadata(metadata))


def _write_npy(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    from numpy.lib.format import open_memmap

    with (
        _atomic(_beside(output, ".paths.csv")) as file,
        file.open("w", newline="", encoding="utf-8") as stream,
    ):
        write = csv.writer(stream).writerow
        write(["path", "width", "height", "error"])
        for table in parts():
            for row in table.drop_columns("embedding").to_pylist():
                write([row["path"], row["width"], row["height"], row["error"]])
    with _atomic(output) as file:
        array = open_memmap(file, "w+", np.float32, (rows, int(origin["embed_dim"])))
        start = 0
        for table in parts():
            array[start : start + len(table)] = _vectors(table)
            start += len(table)
        array.flush()
        del array  # Windows renames no file that is mapped


def _write_csv(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    dim = int(origin["embed_dim"])
    with _atomic(output) as file, file.open("w", newline="", encoding="utf-8") as stream:
        write = csv.writer(stream).writerow
        write(["path", "width", "height", "error", *(f"e{i}" for i in range(dim))])
        for table in parts():
            for row, vector in zip(table.drop_columns("embedding").to_pylist(), _vectors(table), strict=True):
                # str of a numpy float32 is the shortest text that reads back as the same float32.
                numbers = [""] * dim if row["error"] is not None else map(str, vector)
                write([row["path"], row["width"], row["height"], row["error"], *numbers])


def _write_jsonl(
    output: Path, parts: Callable[[], Iterator[pa.Table]], rows: int, origin: Mapping[str, Any]
) -> None:
    with _atomic(output) as file, file.open("w", newline="\n", encoding="utf-8") as stream:
        for table in parts():
            for row, vector in zip(table.drop_columns("embedding").to_pylist(), _vectors(table), strict=True):
                numbers = None if row["error"] is not None else [float(str(v)) for v in vector]
                line = {"path": row["path"], "embedding": numbers, **row}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


_WRITERS = {".parquet": _write_parquet, ".npy": _write_npy, ".csv": _write_csv, ".jsonl": _write_jsonl}
SUFFIXES = tuple(_WRITERS)


def _to_metadata(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- reading


def read_embeddings(
    path: str | os.PathLike[str],
) -> tuple[NDArray[np.float32], list[str], dict[str, Any]]:
    """Reads a table of any format that dinokit writes.

    Returns:
        (N, D) float32, failed rows NaN; the N paths; the origin (``{}`` where a file has none).

    Raises:
        UsageError: an unknown suffix, or no such file.
        DinokitError: it is not a table of embeddings.
    """
    path = Path(path)
    suffix = check_suffix(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected a table that dinokit embed has written")
    try:
        vectors, paths = _READERS[suffix](path)
    except (OSError, ValueError, KeyError, StopIteration) as error:  # ArrowInvalid is a ValueError
        raise DinokitError(f"{path} is not a table of embeddings, or it is damaged ({error})") from error
    return vectors, paths, read_origin(path)


def read_origin(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The origin of a table (see :func:`origin_of`) without reading its rows; ``{}`` when it has none."""
    path = Path(path)
    if check_suffix(path) != ".parquet":
        try:
            values = json.loads(_beside(path, ".origin.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, ValueError):
        return {}
    texts = {key.decode(): value.decode() for key, value in metadata.items()}
    origin: dict[str, Any] = {
        key.removeprefix(_KEY): value for key, value in texts.items() if key.startswith(_KEY)
    }
    for key in origin.keys() & {"preprocessing", "embed_dim", "rows", "failed"}:
        origin[key] = json.loads(origin[key])
    if origin:
        origin.setdefault("revision", None)
    return origin


def _read_parquet(path: Path) -> tuple[NDArray[np.float32], list[str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["path", "embedding"])
    return _vectors(table), table.column("path").to_pylist()


def _read_npy(path: Path) -> tuple[NDArray[np.float32], list[str]]:
    vectors = np.load(path, allow_pickle=False)
    with _beside(path, ".paths.csv").open(newline="", encoding="utf-8") as stream:
        paths = [row["path"] for row in csv.DictReader(stream)]
    if vectors.ndim != 2 or len(paths) != len(vectors):
        raise ValueError(f"an array of shape {vectors.shape} beside {len(paths)} paths")
    return vectors.astype(np.float32, copy=False), paths


def _read_csv(path: Path) -> tuple[NDArray[np.float32], list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = csv.reader(stream)
        header = next(rows)
        first = header.index("e0")
        paths, vectors = [], []
        for row in rows:
            paths.append(row[header.index("path")])
            vectors.append(np.array([v or "nan" for v in row[first:]], np.float32))
    return np.stack(vectors) if vectors else np.empty((0, len(header) - first), np.float32), paths


def _read_jsonl(path: Path) -> tuple[NDArray[np.float32], list[str]]:
    paths: list[str] = []
    vectors: list[NDArray[np.float32] | None] = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            paths.append(row["path"])
            vectors.append(None if row["embedding"] is None else np.array(row["embedding"], np.float32))
    dim = next((len(v) for v in vectors if v is not None), int(read_origin(path).get("embed_dim", 0)))
    missing = np.full(dim, np.nan, np.float32)
    stacked = [missing if v is None else v for v in vectors]
    return np.stack(stacked) if stacked else np.empty((0, dim), np.float32), paths


_READERS = {".parquet": _read_parquet, ".npy": _read_npy, ".csv": _read_csv, ".jsonl": _read_jsonl}
