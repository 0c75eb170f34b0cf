"""An approximate index of a table, for many searches in very many vectors (extra ``[ann]``).

``SearchIndex`` compares all rows, and should for as long as that is quick enough. Where millions of rows meet many
queries, a graph of neighbours (HNSW, Malkov and Yashunin 2018, by faiss) proposes a few hundred rows, and these are
compared exactly: what is found has its exact similarity and order, and only a row that was not proposed can be missing.

An index is a folder: ``index.faiss``, which faiss itself opens, and ``index.json``. It belongs to the table whose
vectors and paths have the SHA-256 in it, and to no other.
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
from dinokit.files.outputs import atomic_folder
from dinokit.neighbours.nearest import finite_rows, nearest, normalised

__all__ = ["AnnIndex", "IndexInfo", "build_index", "check_index_output", "must_have_faiss", "table_sha256"]

_FORMAT = 1
_GRAPH, _INFO = "index.faiss", "index.json"
_CHUNK = 8192  # vectors added at a time, between which Ctrl-C is noticed
_SAMPLE = 200  # rows by which the recall is measured
_GATHERED = 64 * 2**20  # bytes of candidates' vectors held at a time


@dataclass(frozen=True)
class IndexInfo:
    """What ``index.json`` says."""

    format: int
    table_sha256: str
    rows: int
    """Vectors in it; rows of the table without an embedding are not."""
    dim: int
    links: int
    effort: int
    recall_at_10: float | None
    """Share of the ten nearest of sampled rows that it finds; None of eleven rows or fewer."""
    faiss_version: str
    dinokit_version: str


def must_have_faiss() -> None:
    """Raises MissingExtraError where the package is not installed."""
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
    """Raises UsageError unless an index can be written as this folder."""
    output = Path(output)
    if not os.path.lexists(output):
        return
    if not _is_only_an_index(output):
        raise UsageError(f"{output} exists and is not an index, so it is left alone; choose another name")
    if not overwrite:
        raise UsageError(f"{output} exists; choose another name, or give --overwrite to replace it")


def _is_only_an_index(folder: Path) -> bool:
    """Whether a folder can be replaced: an index, of whatever format, without files of others beside it."""
    try:
        names = {path.name for path in folder.iterdir()}
        return _INFO in names and names <= {_INFO, _GRAPH} and bool(_read_info(folder))
    except (OSError, ValueError, TypeError):
        return False


def _read_info(folder: Path) -> IndexInfo:
    """What the index's JSON file says. Raises OSError, ValueError or TypeError if it is not such a file."""
    return IndexInfo(**json.loads((folder / _INFO).read_text(encoding="utf-8")))


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
        table: of ``dinokit embed``, in any of its formats.
        output: the folder; it appears whole or not at all.
        links: of a vector in the graph (HNSW's M); more find more, and take memory: 8 bytes each and vector.
        effort: candidates looked at to place a vector (efConstruction); more find more, and take time.
        overwrite: replace an index that is there.
        on_start: called with the number of vectors, gives what is called with the number added since its last call.

    Raises:
        MissingExtraError: faiss is not installed.
        UsageError: ``output`` is there, or the table has no embedding.
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
    # Half precision is enough to propose; what is proposed is compared in full.
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
    """The graph of a table's vectors; made by :meth:`open`."""

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
            DinokitError: it is damaged.
        """
        must_have_faiss()
        import faiss

        path = Path(path)
        if not (path / _INFO).is_file():
            raise UsageError(f"{path} is not an index; expected a folder written by dinokit index")
        try:
            info = _read_info(path)
        except (OSError, ValueError, TypeError) as error:
            raise DinokitError(f"{path / _INFO} cannot be read ({error}); build the index again") from error
        if info.format != _FORMAT:
            raise DinokitError(
                f"{path} is an index of format {info.format}, and dinokit {__version__} reads format {_FORMAT}; build "
                "the index again, or use the version of dinokit that wrote it"
            )
        if info.table_sha256 != sha256:
            raise UsageError(_of_another_table(path, name))
        try:
            # The file is closed again however this ends; by its name faiss would not open one that is not UTF-8.
            graph = faiss.deserialize_index(np.fromfile(path / _GRAPH, np.uint8))
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
        """As ``nearest.nearest``, of what the graph proposes; where that is too little, of all.

        Args:
            queries: (M, D) of length 1.
            references: (N, D) of length 1, those that the index was built from.
            k: from 1 to N.
        """
        import faiss

        count = min(len(references), max(4 * k, k + 32))
        if 4 * count > len(references):  # as good as all
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
        """Share of the ten nearest others that are found, of up to 200 vectors spread over all."""
        k = 11  # itself and ten
        if len(vectors) < k:
            return None
        numbers = np.unique(np.linspace(0, len(vectors) - 1, _SAMPLE).astype(int))
        hits = 0
        exact, found = (search(vectors[numbers], vectors, k) for search in (nearest, self.nearest))
        for place, own in enumerate(numbers):
            # By how near they are: of many copies it does not matter which are found.
            least = exact[0][place][exact[1][place] != own][9]
            others = found[0][place][found[1][place] != own][:10]
            hits += int((others >= least - 1e-9).sum())
        return hits / (10 * len(numbers))


def _of_another_table(index: Path, name: str) -> str:
    """Why an index does not fit a table, and what to do. The name tells whose index it is: to replace that of another
    table would cost that one its index."""
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
    """The k best of each query's proposals, -1 being none."""
    found = proposed >= 0
    values = np.einsum("qd,qkd->qk", queries, references[np.where(found, proposed, 0)], dtype=np.float64)
    values[~found] = -np.inf
    order = np.lexsort((proposed, -values), axis=1)[:, :k]
    best, numbers = np.take_along_axis(values, order, axis=1), np.take_along_axis(proposed, order, axis=1)
    few = np.flatnonzero(found.sum(axis=1) < k)
    if len(few):
        best[few], numbers[few] = nearest(queries[few], references, k)
    return best, numbers.astype(np.intp)
