"""The embeddings of one set of photographs, or of two to compare: read from a table, or computed from pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._messages import list_messages
from dinokit.cli._model_options import (
    MODEL_SETTINGS,
    batch_size_option,
    go_offline,
    image_size_option,
    json_rows_option,
    model_options,
    must_not_be_given,
    offline_option,
    quiet_option,
    reduced_decoding_option,
    with_values,
)
from dinokit.cli._outputs import check_output, must_not_be_an_input
from dinokit.cli._pictures import nothing_found, search_for, silence_decoders, table_among
from dinokit.sources.names import resolved

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.tables.embeddings import EmbeddingTable

__all__ = ["Sides", "SidesOptions", "count_embedded", "each_file_once", "sides_options"]


@dataclass
class Sides:
    """The tables of the sides, in order, and what went wrong with their pictures."""

    tables: list[EmbeddingTable] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SidesOptions:
    """The values of the shared options."""

    photos: tuple[str, ...]
    output: str | None
    sheet: str | None
    model: str
    revision: str | None
    engine: str
    device: str
    image_size: int | tuple[int, int] | None
    reduced_decoding: bool
    batch_size: int
    overwrite: bool
    offline: bool
    as_json: bool
    quiet: bool

    def check_outputs(self, suffixes: Sequence[str], example: str, others: str | None) -> None:
        """Makes sure that the output, and the sheet, can be written, as ``check_output`` does."""
        from dinokit.drawing.table_sheets import check_sheet

        inputs = (*self.photos, others)
        if self.output is not None:
            check_output(Path(self.output), suffixes, example, overwrite=self.overwrite, inputs=inputs)
        if self.sheet is not None:
            must_not_be_an_input(self.sheet, inputs)
            check_sheet(self.sheet, overwrite=self.overwrite)

    def read(self, verb: str, others: str | None) -> Sides:
        """The embeddings of the photographs and, if given, of the others.

        Args:
            verb: what is done with them, for the error.
            others: the name of the second side.

        Raises:
            UsageError: the vectors of the two sides are not comparable.
            NothingToDoError: a side names no photograph.
        """
        silence_decoders()
        if self.offline:
            go_offline()
        return _vectors_of_sides(
            [self.photos] if others is None else [self.photos, (others,)],
            self.model,
            verb=verb,
            batch_size=self.batch_size,
            quiet=self.quiet,
            engine=self.engine,
            device=self.device,
            revision=self.revision,
            image_size=self.image_size,
            reduced_decoding=self.reduced_decoding,
        )


def sides_options(*own: Callable[[Any], Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Adds the shared options, and passes their values to the function as ``SidesOptions``, its first argument.

    Args:
        own: further options, which come first in ``--help``; ``output`` and ``sheet`` are among them.
    """
    options = (
        click.argument("photos", nargs=-1, required=True),
        *own,
        model_options,
        image_size_option,
        reduced_decoding_option,
        batch_size_option,
        click.option("--overwrite", is_flag=True, help="Replace the output and the sheet if they exist."),
        offline_option,
        json_rows_option,
        quiet_option,
    )
    return with_values(SidesOptions, options)


def _table_in(photos: Sequence[str]) -> EmbeddingTable | None:
    """The table of embeddings that was named, or None if pictures were."""
    from dinokit.tables.embeddings import read_embeddings

    name = table_among(photos)
    return None if name is None else read_embeddings(name)


def _vectors_of_sides(
    named: Sequence[Sequence[str]],
    model: str,
    *,
    verb: str,
    batch_size: int,
    quiet: bool,
    reduced_decoding: bool,
    **settings: Any,
) -> Sides:
    """Reads the tables that are named, and embeds the pictures.

    Args:
        named: the arguments of each side.
        verb: what is done with them, for the error.
        model, settings: of ``load_backbone``.
        reduced_decoding: requested by the user; a table may require it as well.

    Raises:
        UsageError: the vectors of the two sides are not comparable.
    """
    from dinokit.cli._embed_pictures import embed_pictures
    from dinokit.sources import is_there, search_pictures
    from dinokit.tables.origin import must_be_comparable, origin_of

    tables = [_table_in(names) for names in named]
    known = [
        (table.origin, names[0]) for table, names in zip(tables, named, strict=True) if table is not None
    ]
    if len(known) == len(named):
        must_not_be_given(MODEL_SETTINGS, "has no effect on tables of embeddings; leave it out")
    if len(known) == 2:
        must_be_comparable(*known[0], *known[1])
    as_there = known[0][0] if known else {}
    what = str(as_there.get("what", "cls"))
    settings["reduced_decoding"] = reduced_decoding or bool(as_there.get("reduced_decoding"))
    compared = Sides()
    backbone: Backbone | None = None
    for table, names in zip(tables, named, strict=True):
        if table is None:
            if backbone is None:
                found, backbone = search_for(names, model, **settings)
            else:
                found = search_pictures(names, channels=backbone.preprocessing.channels)
            list_messages(found.problems, "Warning: ")
            compared.problems += found.problems
            if backbone is None or not any(map(is_there, found.pictures)):
                raise nothing_found(verb, found.pictures)
            if known:
                must_be_comparable(*known[0], origin_of(backbone, what=what), f"the model {model}")
            table = embed_pictures(found.pictures, backbone, what=what, batch_size=batch_size, quiet=quiet)
            failures = [
                {"path": path, "error": error}
                for path, error in zip(table.paths, table.errors, strict=True)
                if error is not None
            ]
            list_messages([f"{failure['path']}: {failure['error']}" for failure in failures], "Failed: ")
            compared.failures += failures
        compared.tables.append(table)
    return compared


def each_file_once(table: EmbeddingTable) -> tuple[EmbeddingTable, int]:
    """The table without the vectors of files that an earlier row has too, and the number of these."""
    import numpy as np

    seen: set[str] = set()
    again = np.zeros(len(table), np.bool_)
    for row, path in enumerate(table.paths):
        name = resolved(path)
        again[row] = name in seen
        if name:  # tables of other programs may lack paths
            seen.add(name)
    if not again.any():
        return table, 0
    before = count_embedded(table)
    table = replace(table, embeddings=np.where(again[:, None], np.float32(np.nan), table.embeddings))
    return table, before - count_embedded(table)


def count_embedded(table: EmbeddingTable) -> int:
    """How many of its photographs have an embedding."""
    from dinokit.neighbours.nearest import finite_rows

    return int(finite_rows(table.embeddings).sum())
