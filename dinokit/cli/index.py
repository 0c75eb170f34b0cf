"""`dinokit index`: build an approximate index of a table, for `dinokit search --index`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from dinokit.cli._model_options import quiet_option
from dinokit.wording import counted

__all__ = ["index"]


@click.command()
@click.argument("table")
@click.option("-o", "--output", metavar="FOLDER", help="Folder of the index.  [default: TABLE.ann]")
@click.option(
    "--links",
    type=click.IntRange(4, 256),
    default=32,
    show_default=True,
    help="Links per vector in the graph; more find more neighbours and take more memory.",
)
@click.option(
    "--effort",
    type=click.IntRange(8, 2000),
    default=200,
    show_default=True,
    help="Candidates examined to place a vector; more find more neighbours and take more time.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing index.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a summary of the index as JSON instead of its path."
)
@quiet_option
def index(
    table: str, output: str | None, links: int, effort: int, overwrite: bool, as_json: bool, quiet: bool
) -> int:
    """Build an approximate index of TABLE, a table written by dinokit embed.

    Without an index, dinokit search compares all rows and misses none. An index is for millions of rows and many
    queries: it proposes rows, which are then compared exactly. The share of the ten nearest that it finds is measured
    and printed. The index is valid only for the table as it is now; after an update, build it again.

    \b
    dinokit index embeddings.parquet
    dinokit search 'new/*.jpg' --in embeddings.parquet --index embeddings.parquet.ann
    """
    from dinokit.cli._progress import open_progress
    from dinokit.neighbours.ann import build_index, check_index_output, must_have_faiss

    must_have_faiss()
    folder = Path(output or f"{table.rstrip('/')}.ann")
    check_index_output(folder, overwrite=overwrite)
    began = time.monotonic()
    with open_progress(_rows_of(table), task="indexing", unit="vectors", quiet=quiet) as progress:

        def on_start(count: int) -> Callable[[int], None]:
            progress.expect(count)
            return progress.advance

        info = build_index(table, folder, links=links, effort=effort, overwrite=overwrite, on_start=on_start)
    if not quiet:
        found = (
            "" if info.recall_at_10 is None else f"; finds {100 * info.recall_at_10:.1f} % of the ten nearest"
        )
        click.echo(f"{counted(info.rows, 'vector')} in {time.monotonic() - began:.1f} s{found}", err=True)
    # The bytes of the name, valid UTF-8 or not.
    click.echo(json.dumps({"output": str(folder), **asdict(info)}) if as_json else os.fsencode(folder))
    return 0


def _rows_of(table: str) -> int:
    """For the progress bar, before the table is read; some rows may have no embedding."""
    from dinokit.tables.formats import check_suffix
    from dinokit.tables.origin import read_origin

    check_suffix(table)
    return int(read_origin(table).get("rows") or 1)
