"""What is to be labelled by `dinokit knn` and `dinokit classify`: photographs, or a table of embeddings."""

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
    """A table's vectors, or else the pictures, and a sentence for each name that matched none."""

    vectors: Vectors | None
    pictures: Sequence[Item] = ()
    problems: list[str] = field(default_factory=list)

    def must_be_there(self) -> None:
        """Raises NothingToDoError if there is nothing to label."""
        from dinokit.sources import is_there

        if self.vectors is None and not any(is_there(path) for path in self.pictures):
            raise nothing_found("label", self.pictures)


def find_queries(photos: Sequence[str], channels: int) -> Queries:
    """What names on the command line mean.

    Args:
        photos: names of pictures and of what holds some, or of one table.
        channels: of the network.

    Raises:
        click.UsageError: a table is not alone, or has no rows.
        DinokitError: the table cannot be read.
    """
    from dinokit.sources import search_pictures

    table = table_among(photos)
    if table is None:
        found = search_pictures(photos, channels=channels)
        return Queries(None, found.pictures, found.problems)
    from dinokit.neighbours.nearest import finite_rows
    from dinokit.tables.embeddings import read_embeddings

    vectors, paths, origin = read_embeddings(table)
    if not paths:
        raise click.UsageError(f"{table} has no rows; there is nothing to label")
    failed: list[bool] = (~finite_rows(vectors)).tolist()
    errors = [f"it has no embedding in {table}" if bad else None for bad in failed]
    return Queries(Vectors(vectors, paths, errors, origin))
