"""Exact search for the most similar pictures in a table of embeddings.

::

    index = SearchIndex.read("embeddings.parquet")
    similarities, rows = index.search_images("new.jpg", k=5)     # with the model that made the table
    similarities, rows = index.search_rows(index.row_of("photos/cat.jpg"), k=5)
    [index.paths[row] for row in rows]

Every vector is compared with every query, so no near one is missed, and no index has to be built or kept. For many
queries in many millions of vectors, an approximate index (``ann.py``) is faster; it is used only on request.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinokit.errors import DinokitError, ModelError, UsageError
from dinokit.neighbours.nearest import as_cosines, finite_rows, nearest, normalised
from dinokit.sources.names import text_of

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.loading.load import EngineName
    from dinokit.neighbours.ann import AnnIndex

__all__ = ["SearchIndex"]

Found = tuple[NDArray[np.float64], NDArray[np.intp]]


class SearchIndex:
    """The rows of a table of embeddings, ready to be searched by cosine similarity.

    Args:
        embeddings: (N, D), of any length. Rows that are not finite (NaN for pictures that could not be read) are
            never found.
        paths: the N names of the pictures.
        origin: which model made the embeddings (``read_embeddings(…).origin``); only :meth:`search_images` needs it.
        name: what messages call the table.
        index: an approximate index of exactly these embeddings and paths (``dinokit index``), to search with.

    The vectors are held a second time, L2-normalised. A search needs about 200 MB more, whatever N and the number of
    queries.

    Raises:
        UsageError: shapes do not match, no row can be found, or ``index`` is of another table.
    """

    def __init__(
        self,
        embeddings: ArrayLike,
        paths: Sequence[str] | None = None,
        origin: Mapping[str, Any] | None = None,
        *,
        name: str = "the table",
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        vectors = np.asarray(embeddings, np.float32)
        if vectors.ndim != 2:
            raise UsageError(f"the embeddings have shape {vectors.shape}; expected (N, D)")
        if paths is not None and len(paths) != len(vectors):
            raise UsageError(
                f"{len(vectors)} embeddings and {len(paths)} paths; expected a path for each row"
            )
        self.paths: list[str] = (
            [str(row) for row in range(len(vectors))] if paths is None else [text_of(path) for path in paths]
        )
        self.origin: dict[str, Any] = dict(origin or {})
        self.name = name
        fine = finite_rows(vectors)
        self._rows = np.flatnonzero(fine)  # of the table, for each searchable vector
        if not len(self._rows):
            what = f"none of its {len(vectors)} rows has an embedding" if len(vectors) else "it has no rows"
            raise UsageError(f"{name} cannot be searched: {what}")
        self._vectors = normalised(vectors if fine.all() else vectors[fine])
        self._numbers: dict[str, int] | None = None
        self._ann: AnnIndex | None = None
        if index is not None:
            from dinokit.neighbours.ann import AnnIndex, table_sha256

            self._ann = AnnIndex.open(index, table_sha256(vectors, self.paths), name=name)

    @classmethod
    def read(
        cls, table: str | os.PathLike[str], *, index: str | os.PathLike[str] | None = None
    ) -> SearchIndex:
        """Reads a table written by ``dinokit embed``, in any of its formats.

        Args:
            table: the file.
            index: an approximate index of it, to search with (``dinokit index``); by default all rows are compared.

        Raises:
            UsageError: no such file, an unknown suffix, no row has an embedding, or ``index`` is of another table.
            DinokitError: the file is not a table of embeddings.
        """
        from dinokit.tables.embeddings import read_embeddings

        read = read_embeddings(table)
        return cls(read.embeddings, read.paths, read.origin, name=str(table), index=index)

    def __repr__(self) -> str:
        return (
            f"<SearchIndex of {self.name}: {len(self)} rows of {self.dim} numbers, {self.left_out} left out>"
        )

    def __len__(self) -> int:
        """Rows that can be found."""
        return len(self._rows)

    @property
    def dim(self) -> int:
        """D."""
        return int(self._vectors.shape[1])

    @property
    def left_out(self) -> int:
        """Rows of the table without an embedding, which are never found."""
        return len(self.paths) - len(self._rows)

    # -- searching

    def search(self, queries: ArrayLike, k: int = 10) -> Found:
        """The k most similar rows.

        Args:
            queries: (D,) for one query, (M, D) for several; of any length.
            k: at least 1; if there are fewer rows, all are found.

        Returns:
            cosine similarities in descending order, and the rows' numbers in the table: (k,) for one query, (M, k) for
            several. Among equally similar rows, the earlier one comes first.

        Raises:
            UsageError: another shape, values that are not finite, or an invalid k.
        """
        _check_k(k)
        vectors = np.asarray(queries, np.float32)
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != self.dim:
            raise UsageError(
                f"the queries have shape {vectors.shape}; expected ({self.dim},) or (M, {self.dim}), as "
                f"{self.name} has"
            )
        if not np.isfinite(vectors).all():
            raise UsageError("the queries contain values that are not finite; leave out pictures that failed")
        several = np.atleast_2d(vectors)
        similarities, found = self._nearest(normalised(several), min(k, len(self)))
        rows = self._rows[found]
        return (similarities, rows) if vectors.ndim == 2 else (similarities[0], rows[0])

    def search_rows(self, rows: int | Sequence[int] | NDArray[np.integer[Any]], k: int = 10) -> Found:
        """The k rows that are most similar to rows of the table; a row does not find itself.

        Args:
            rows: the number of one row, as :meth:`row_of` returns it, or M numbers.
            k: as for :meth:`search`.

        Returns:
            as :meth:`search`.

        Raises:
            UsageError: there is no such row, it has no embedding, or k is invalid.
        """
        _check_k(k)
        given = np.atleast_1d(np.asarray(rows))
        if given.size and given.dtype.kind not in "iu":
            raise UsageError(f"rows are {given.dtype}; expected whole numbers, as row_of returns them")
        wanted = given.astype(np.intp)
        place = np.minimum(np.searchsorted(self._rows, wanted), len(self._rows) - 1)
        wrong = wanted[self._rows[place] != wanted]
        if len(wrong):
            row = int(wrong[0])
            what = f"row {row} has no embedding" if 0 <= row < len(self.paths) else f"there is no row {row}"
            raise UsageError(f"{what} in {self.name}, whose rows are 0 to {len(self.paths) - 1}")
        similarities, found = self._nearest(self._vectors[place], min(k + 1, len(self)))
        others = found != place[:, None]
        others[others.all(axis=1), -1] = False  # many copies come before it: drop the last one
        shape = (len(wanted), found.shape[1] - 1)
        similarities = similarities[others].reshape(shape)
        numbers = self._rows[found[others].reshape(shape)]
        return (similarities[0], numbers[0]) if np.ndim(rows) == 0 else (similarities, numbers)

    def search_images(self, images: Any, k: int = 10, *, backbone: Backbone | None = None) -> Found:
        """The k rows that are most similar to pictures.

        Args:
            images: as for ``Backbone.embed``: one picture, or several.
            k: as for :meth:`search`.
            backbone: the model that made the table. By default it is loaded (:meth:`load_backbone`); for many calls,
                load it once. If the table has no origin, it is not checked.

        Returns:
            as :meth:`search`.

        Raises:
            UsageError: ``backbone`` is not the model that made the table, or has another preprocessing.
            ImageError: a picture cannot be read.
        """
        if backbone is None:
            backbone = self.load_backbone()
        elif self.origin:  # only the caller knows where vectors made in the same program come from
            self.check_backbone(backbone)
        return self.search(backbone.embed(images, what=self.what), k)

    def _nearest(self, queries: NDArray[np.float32], k: int) -> Found:
        search = nearest if self._ann is None else self._ann.nearest
        similarities, rows = search(queries, self._vectors, k)
        return as_cosines(similarities), rows

    # -- rows and models

    @property
    def what(self) -> str:
        """The kind of vectors in the table, as for ``Backbone.embed``: ``cls``, ``mean``, ``cls+mean`` …"""
        return str(self.origin.get("what", "cls"))

    def has_embedding(self, row: int) -> bool:
        """Whether this row of the table can be found and searched for."""
        place = int(np.searchsorted(self._rows, row))
        return place < len(self._rows) and int(self._rows[place]) == row

    def row_of(self, path: str | os.PathLike[str]) -> int | None:
        """The first row of this path, whether written as in the table or in another way; None if there is none."""
        if self._numbers is None:
            numbers: dict[str, int] = {}
            for row, name in enumerate(self.paths):
                numbers.setdefault(name, row)
            # Names as written take precedence: these must not displace one of them.
            for row, name in enumerate(self.paths):
                numbers.setdefault(_absolute(name), row)
            self._numbers = numbers  # set when complete: several threads may read it
        text = text_of(path)
        return self._numbers.get(text, self._numbers.get(_absolute(text)))

    def load_backbone(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        engine: EngineName = "auto",
        device: str = "auto",
        revision: str | None = None,
    ) -> Backbone:
        """The backbone that made the table, with the table's image size.

        Args:
            model: where the model is now, if it was moved; by default where the table says it came from.
            engine: as for ``load_backbone``.
            device: likewise.
            revision: of ``model``.

        Raises:
            UsageError: the table does not record which model made it, or ``model`` is another one.
            ModelError: the model cannot be loaded.
        """
        from dinokit.loading.load import load_backbone
        from dinokit.pictures.preprocess import Preprocessing

        origin = self.origin
        if not origin.get("weights_sha256"):
            raise UsageError(
                f"{self.name} does not record which model made it, so pictures cannot be compared with it; embed its "
                "pictures again with dinokit embed, or search for rows of the table"
            )
        moved = model is not None
        if model is None:
            model, revision = _name_in(origin), origin.get("revision")
        size = Preprocessing.from_json(origin.get("preprocessing") or {}).crop_px
        try:
            backbone = load_backbone(
                model,
                engine=engine,
                device=device,
                revision=revision,
                image_size=size,
                reduced_decoding=bool(origin.get("reduced_decoding")),
            )
        except DinokitError as error:
            if moved or not isinstance(error, (ModelError, UsageError)):
                raise
            raise ModelError(
                f"{self.name} was made by {origin.get('model')} from {origin.get('source')}, which cannot be loaded "
                f"now: {error}. If the model was moved, name its new location with -m MODEL (model=)"
            ) from error
        self.check_backbone(backbone)
        return backbone

    def check_backbone(self, backbone: Backbone) -> None:
        """Raises UsageError unless this backbone's vectors may be compared with the table's."""
        from dinokit.tables.origin import must_be_comparable, origin_of

        other = origin_of(backbone, what=self.what)
        must_be_comparable(self.origin, self.name, other, f"the requested model {backbone.name}")


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise UsageError(f"k={k!r} is invalid; use a whole number, 1 or more")


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path and "\0" not in path else path  # noqa: PTH100 - texts


def _name_in(origin: Mapping[str, Any]) -> str:
    """The name under which ``load_backbone`` finds the model of an origin."""
    from dinokit.loading.zoo import STARTER, ZOO

    name, source = str(origin.get("model")), str(origin.get("source"))
    if source == "bundled":
        return STARTER
    # Some repositories of known models can be read only under the known name.
    return name if name in ZOO and ZOO[name].repo == source else source
