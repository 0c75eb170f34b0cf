"""What `dinokit knn` and `dinokit classify` label: photographs, or a table of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from dinokit.cli._pictures import nothing_found, table_among
from dinokit.cli._references import Vectors

if TYPE_CHECKING:
    from dinokit.sources import Item

__all__ = ["Queries", "find_queries"]


@dataclass(frozen=True)
class Queries:
    """The vectors of a table, or else pictures; and a sentence for each name that matched no picture."""

    vectors: Vectors | None
    pictures: Sequence[Item] = ()
    problems: list[str] = field(default_factory=list)

    def must_be_there(self) -> None:
        """Raises NothingToDoError if there is nothing to label."""
        from dinokit.sources import is_there

        if self.vectors is None and not any(is_there(path) for path in self.pictures):
            raise nothing_found("label", self.pictures)


def find_queries(photos: Sequence[str], channels: int) -> Queries:
    """Resolves the names on the command line.

    Args:
        photos: names of pictures and of what contains them, or of one table.
        channels: the network's input channels.

    Raises:
        click.UsageError: a table is not alone, or has no rows.
        DinokitError: the table cannot be read.
    """
    from dinokit.sources import search_pictures

    table = table_among(photos)
    if table is None:
        found = search_pictures(photos, channels=channels)
        return Queries(None, found.pictures, found.problems)
    from dinokit.classifiers.labelled import why_missing
    from dinokit.neighbours.nearest import finite_rows
    from dinokit.tables.embeddings import read_embeddings

    read = read_embeddings(table)
    if not len(read):
        raise click.UsageError(
            f"{table} has no rows, so there is nothing to label; name another table or photographs"
        )
    fine = finite_rows(read.embeddings).tolist()
    errors = [
        None if good else why_missing(table, error) for good, error in zip(fine, read.errors, strict=True)
    ]
    return Queries(Vectors(read.embeddings, read.paths, errors, read.origin))
