"""An approximate index of a table, for many searches in very many vectors (extra ``[ann]``).

``SearchIndex`` compares all rows, which is best for as long as it is fast enough. For millions of rows and many
queries, a graph of neighbours (HNSW, Malkov and Yashunin 2018, from faiss) proposes a few hundred rows, which are then
compared exactly: results have their exact similarity and order, and only a row that was not proposed can be missing.

An index is a folder with ``index.faiss``, which faiss itself can open, and ``index.json``. It belongs only to the table
whose vectors and paths have the recorded SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit._version import __version__
from dinokit.errors import DinokitError, MissingExtraError, UsageError
from dinokit.files.json_files import read_json
from dinokit.files.outputs import atomic_folder
from dinokit.neighbours.nearest import finite_rows, nearest, normalised

__all__ = ["AnnIndex", "IndexInfo", "build_index", "check_index_output", "must_have_faiss", "table_sha256"]

_FORMAT = 1
_GRAPH, _INFO = "index.faiss", "index.json"
_CHUNK = 8192  # vectors added at a time, between which Ctrl-C is noticed
_SAMPLE = 200  # rows on which the recall is measured
_GATHERED = 64 * 2**20  # bytes of candidates' vectors held at a time


@dataclass(frozen=True)
class IndexInfo:
    """The contents of ``index.json``."""

    format: int
    table_sha256: str
    rows: int
    """Vectors in the index; rows of the table without an embedding are not in it."""
    dim: int
    links: int
    effort: int
    recall_at_10: float | None
    """Share of the ten nearest neighbours that it finds, over sampled rows; None for fewer than eleven rows."""
    faiss_version: str
    dinokit_version: str


def must_have_faiss() -> None:
    """Raises MissingExtraError if the package is not installed."""
    if importlib.util.find_spec("faiss") is None:
        raise MissingExtraError("An approximate index", extra="ann", package="faiss-cpu")


def table_sha256(embeddings: NDArray[np.float32], paths: Sequence[str]) -> str:
    """SHA-256 of a table's vectors and paths, whatever format it is written in."""
    digest = hashlib.sha256(f"{embeddings.shape}\0".encode())
    for start in range(0, len(embeddings), _CHUNK):
        digest.update(np.ascontiguousarray(embeddings[start : start + _CHUNK], "<f4").data)
    for path in paths:
        digest.update(path.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


# -- building


def check_index_output(output: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raises UsageError unless an index can be written to this folder."""
    output = Path(output)
    if not os.path.lexists(output):
        return
    if not _is_only_an_index(output):
        raise UsageError(
            f"{output} exists and is not an index without other files, so it is left alone; choose another name, or "
            "remove it"
        )
    if not overwrite:
        raise UsageError(f"{output} exists; choose another name, or give --overwrite to replace it")


def _is_only_an_index(folder: Path) -> bool:
    """Whether a folder may be replaced: an index with no other files."""
    try:
        names = {path.name for path in folder.iterdir()}
        return _INFO in names and names <= {_INFO, _GRAPH} and bool(_read_info(folder))
    except (DinokitError, OSError, ValueError, TypeError):
        return False


def _read_info(folder: Path) -> IndexInfo:
    """Reads ``index.json``.

    Raises:
        DinokitError: it is of another format.
        OSError, ValueError, TypeError: it is damaged.
    """
    values = read_json(folder / _INFO)
    if isinstance(values, dict) and values.get("format", _FORMAT) != _FORMAT:
        raise DinokitError(
            f"{folder} is an index of format {values['format']}, and dinokit {__version__} reads format {_FORMAT}; "
            "build an index under another name, or use the version of dinokit that wrote it"
        )
    return IndexInfo(**values)


def build_index(
    table: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    links: int = 32,
    effort: int = 200,
    overwrite: bool = False,
    on_start: Callable[[int], Callable[[int], None]] | None = None,
) -> IndexInfo:
    """Builds the index of a table of embeddings.

    Args:
        table: written by ``dinokit embed``, in any of its formats.
        output: the folder; it appears whole or not at all.
        links: links per vector in the graph (HNSW's M); more find more neighbours and take 8 bytes each per vector.
        effort: candidates examined to place a vector (efConstruction); more find more neighbours and take more time.
        overwrite: replace an existing index.
        on_start: called with the number of vectors; returns a function that is called with the number added since its
            last call.

    Raises:
        MissingExtraError: faiss is not installed.
        UsageError: ``output`` exists, or the table has no embedding.
        DinokitError: the index cannot be written.
    """
    must_have_faiss()
    output = Path(output)
    check_index_output(output, overwrite=overwrite)
    import faiss

    from dinokit.tables.embeddings import read_embeddings

    read = read_embeddings(table)
    sha256 = table_sha256(read.embeddings, read.paths)
    fine = finite_rows(read.embeddings)
    if not fine.any():
        what = f"none of its {len(read)} rows has an embedding" if len(read) else "it has no rows"
        raise UsageError(f"{table} cannot be indexed: {what}")
    vectors = normalised(read.embeddings if fine.all() else read.embeddings[fine])
    dim = vectors.shape[1]
    # Half precision is enough for proposals, which are then compared in full precision.
    graph = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, links, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = effort
    step = on_start(len(vectors)) if on_start else None
    for start in range(0, len(vectors), _CHUNK):
        part = vectors[start : start + _CHUNK]
        graph.add(part)
        if step:
            step(len(part))
    info = IndexInfo(
        _FORMAT, sha256, len(vectors), dim, links, effort, None, str(faiss.__version__), __version__
    )
    info = IndexInfo(**{**asdict(info), "recall_at_10": AnnIndex(graph, info).recall(vectors)})
    _write(output, graph, info)
    return info


def _write(output: Path, graph: Any, info: IndexInfo) -> None:
    import faiss

    # Not faiss.write_index: it reports no error on a full disk, and takes no name that is not UTF-8.
    data = faiss.serialize_index(graph)
    try:
        with atomic_folder(output) as folder:
            folder.mkdir()
            with (folder / _GRAPH).open("wb") as file:
                file.write(data.data)
            (folder / _INFO).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DinokitError(
            f"{output} cannot be written ({error.strerror or error}): the index needs {len(data) / 2**20:,.1f} MB. "
            "Make room, or choose another place"
        ) from error


# -- searching


class AnnIndex:
    """The graph of a table's vectors; opened by :meth:`open`."""

    def __init__(self, graph: Any, info: IndexInfo) -> None:
        self._graph, self.info = graph, info

    @classmethod
    def open(cls, path: str | os.PathLike[str], sha256: str, *, name: str = "the table") -> AnnIndex:
        """The index of a table.

        Args:
            path: the folder.
            sha256: of the table (:func:`table_sha256`).
            name: what messages call the table.

        Raises:
            MissingExtraError: faiss is not installed.
            UsageError: there is no such index, or it belongs to another table or to an earlier state of this one.
            DinokitError: it is damaged, or of another format.
        """
        must_have_faiss()
        import faiss

        path = Path(path)
        if not (path / _INFO).is_file():
            raise UsageError(f"{path} is not an index; expected a folder written by dinokit index")
        try:
            info = _read_info(path)
        except (OSError, ValueError, TypeError) as error:
            raise DinokitError(
                f"{path / _INFO} cannot be read ({error}); remove {path} and build the index again"
            ) from error
        if info.table_sha256 != sha256:
            raise UsageError(_of_another_table(path, name))
        try:
            # Not faiss.read_index, which opens no name that is not UTF-8. Mapped: not in memory twice.
            graph = faiss.deserialize_index(np.memmap(path / _GRAPH, np.uint8, mode="r"))
        except Exception as error:  # RuntimeError of faiss' C++
            raise DinokitError(f"{path / _GRAPH} cannot be read; build the index again ({error})") from error
        if graph.ntotal != info.rows or graph.d != info.dim:
            raise DinokitError(
                f"{path / _GRAPH} holds {graph.ntotal} vectors of {graph.d} numbers, not the {info.rows} of "
                f"{info.dim} that {_INFO} names; build the index again"
            )
        return cls(graph, info)

    def nearest(
        self, queries: NDArray[np.float32], references: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """As ``nearest.nearest``, among the rows that the graph proposes; among all rows where those are too few.

        Args:
            queries: (M, D), L2-normalised.
            references: (N, D), L2-normalised; those that the index was built from.
            k: from 1 to N.
        """
        import faiss

        count = min(len(references), max(4 * k, k + 32))
        if 4 * count > len(references):  # nearly all rows
            return nearest(queries, references, k)
        values = np.empty((len(queries), k), np.float64)
        numbers = np.empty((len(queries), k), np.intp)
        rows = max(1, _GATHERED // (4 * count * references.shape[1]))
        settings = faiss.SearchParametersHNSW(efSearch=max(128, 2 * count))
        for start in range(0, len(queries), rows):
            part = slice(start, start + rows)
            _, proposed = self._graph.search(np.ascontiguousarray(queries[part]), count, params=settings)
            values[part], numbers[part] = _best(queries[part], references, proposed, k)
        return values, numbers

    def recall(self, vectors: NDArray[np.float32]) -> float | None:
        """Share of the ten nearest others that are found, for up to 200 vectors spread over all."""
        k = 11  # itself and ten
        if len(vectors) < k:
            return None
        numbers = np.unique(np.linspace(0, len(vectors) - 1, _SAMPLE).astype(int))
        hits = 0
        exact, found = (search(vectors[numbers], vectors, k) for search in (nearest, self.nearest))
        for place, own in enumerate(numbers):
            # Compare similarities, not rows: of many copies, any will do.
            least = exact[0][place][exact[1][place] != own][9]
            others = found[0][place][found[1][place] != own][:10]
            hits += int((others >= least - 1e-9).sum())
        return hits / (10 * len(numbers))


def _of_another_table(index: Path, name: str) -> str:
    """Why an index does not fit a table, and what to do.

    ``--overwrite`` is advised only if the index has the default name of this table's index: otherwise it could replace
    the index of another table.
    """
    begin = f"{index} is not an index of {name} as it is now"
    table, folder = shlex.quote(name), shlex.quote(str(index))
    if index == Path(f"{name}.ann"):
        return f"{begin}: the table has changed since. Build it again: dinokit index {table} -o {folder} --overwrite"
    if not Path(name).exists():  # a table in memory
        return f"{begin}: the table has changed since, or the index is of another one. Build an index of this table"
    return (
        f"{begin}: the table has changed since, or the index is of another one. Build an index of this table "
        f"(dinokit index {table}) and search with {table}.ann"
    )


def _best(
    queries: NDArray[np.float32], references: NDArray[np.float32], proposed: NDArray[Any], k: int
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The k best proposals of each query; -1 means no proposal."""
    found = proposed >= 0
    values = np.einsum("qd,qkd->qk", queries, references[np.where(found, proposed, 0)], dtype=np.float64)
    values[~found] = -np.inf
    order = np.lexsort((proposed, -values), axis=1)[:, :k]
    best, numbers = np.take_along_axis(values, order, axis=1), np.take_along_axis(proposed, order, axis=1)
    few = np.flatnonzero(found.sum(axis=1) < k)
    if len(few):
        best[few], numbers[few] = nearest(queries[few], references, k)
    return best, numbers.astype(np.intp)
