"""What is to be labelled by `dinokit knn` and `dinokit classify`: photographs, or a table of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from dinokit.cli._messages import list_messages
from dinokit.cli._references import Vectors

if TYPE_CHECKING:
    from dinokit.sources import Item

__all__ = ["Queries", "find_queries"]


@dataclass(frozen=True)
class Queries:
    """A table's vectors, or else the pictures and what matched none."""

    vectors: Vectors | None
    pictures: Sequence[Item] = ()
    problems: list[str] = field(default_factory=list)

    def are_there(self) -> bool:
        """Whether there is anything to label; where not, that is told on stderr."""
        from dinokit.sources import is_there

        if self.vectors is not None or any(is_there(path) for path in self.pictures):
            return True
        list_messages([f"{path}: no such file or folder" for path in self.pictures], "Warning: ")
        click.echo("Error: there is nothing to label; name photographs, or folders that hold some", err=True)
        return False


def find_queries(photos: Sequence[str], channels: int) -> Queries:
    """What names on the command line mean.

    Args:
        photos: names of pictures and of what holds some, or of one table.
        channels: of the network.

    Raises:
        click.UsageError: a table is not alone, or has no rows.
        DinokitError: the table cannot be read.
    """
    from dinokit.classifiers.labelled import is_table
    from dinokit.sources import search_pictures

    tables = [name for name in photos if is_table(name)]
    if tables and len(photos) > 1:
        raise click.UsageError(
            f"{tables[0]} is a table of embeddings; expected it alone, or photographs only"
        )
    if not tables:
        found = search_pictures(photos, channels=channels)
        return Queries(None, found.pictures, found.problems)
    from dinokit.neighbours.nearest import finite_rows
    from dinokit.tables.embeddings import read_embeddings

    vectors, paths, origin = read_embeddings(tables[0])
    if not paths:
        raise click.UsageError(f"{tables[0]} has no rows; there is nothing to label")
    failed: list[bool] = (~finite_rows(vectors)).tolist()
    errors = [f"it has no embedding in {tables[0]}" if bad else None for bad in failed]
    return Queries(Vectors(vectors, paths, errors, origin))
