"""`dinokit search`: the most similar pictures of a table."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._messages import echo_path, list_messages
from dinokit.cli._model_options import (
    batch_size_option,
    device_option,
    engine_option,
    go_offline,
    offline_option,
    origin_in_words,
    quiet_option,
)
from dinokit.cli._outputs import must_not_be_an_input
from dinokit.cli._pictures import silence_decoders
from dinokit.cli._tables import as_columns
from dinokit.wording import counted

if TYPE_CHECKING:
    from dinokit.loading.load import EngineName
    from dinokit.neighbours.search import SearchIndex
    from dinokit.sources import Item

__all__ = ["search"]

_ON_A_SHEET = 20  # neighbours per query; with more, viewers refuse the picture as too large
_SUGGESTED_FROM = 50_000  # rows at most: comparing letters takes seconds beyond


@dataclass
class _Query:
    """A picture to look for: a row of the table, or else one to embed."""

    name: str
    row: int | None = None
    picture: Item | None = None
    error: str | None = None
    found: list[dict[str, Any]] = field(default_factory=list)


@click.command()
@click.argument("queries", nargs=-1, required=True, metavar="QUERY...")
@click.option("--in", "table", required=True, metavar="TABLE", help="A table written by dinokit embed.")
@click.option(
    "--index", "approximate", metavar="FOLDER", help="Use an approximate index built by dinokit index."
)
@click.option(
    "-k", type=click.IntRange(1), default=10, show_default=True, help="Number of pictures to find per query."
)
@click.option("--sheet", metavar="PNG", help="Draw each query with its results: .png, .jpg or .webp.")
@click.option(
    "-m", "--model", help="The table's model, if it has moved.  [default: as recorded in the table]"
)
@click.option("--revision", help="Branch, tag or commit of a model given with -m.")
@engine_option
@device_option
@batch_size_option
@click.option("--overwrite", is_flag=True, help="Replace the sheet if it exists.")
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
def search(
    queries: tuple[str, ...],
    table: str,
    approximate: str | None,
    k: int,
    sheet: str | None,
    model: str | None,
    revision: str | None,
    engine: EngineName,
    device: str,
    batch_size: int,
    overwrite: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Find the pictures of a table that are most similar to each QUERY.

    QUERY is the path of a row of the table, which is left out of its own result, or any picture, folder, pattern or
    archive as for dinokit embed. Pictures are embedded with the model that made the table. Similarity is the
    cosine, at most 1. All rows with an embedding are compared; with --index, only those that the index proposes.

    \b
    dinokit search new.jpg --in embeddings.parquet
    dinokit search photos/cat.jpg --in embeddings.parquet -k 5 --json
    dinokit search 'new/*.jpg' --in embeddings.parquet --sheet found.png
    """
    from dinokit.drawing.table_sheets import check_sheet
    from dinokit.neighbours.search import SearchIndex

    silence_decoders()
    if sheet is not None:
        must_not_be_an_input(sheet, (table, *queries))
        check_sheet(sheet, overwrite=overwrite)
    if revision is not None and model is None:
        raise click.UsageError(
            f"--revision {revision} needs a model given with --model; give both, or leave it out"
            + origin_in_words("revision")
        )
    if offline:
        go_offline()
    index = SearchIndex.read(table, index=approximate)
    if not quiet:
        click.echo(_first_line(index), err=True)
    wanted, problems = _resolve(queries, index)
    pictures = [query for query in wanted if query.picture is not None]
    if pictures:
        backbone = index.load_backbone(model, engine=engine, device=device, revision=revision)
        from dinokit.cli._embed_pictures import embed_pictures

        made = embed_pictures(
            [query.picture for query in pictures if query.picture is not None],
            backbone,
            what=index.what,
            batch_size=batch_size,
            quiet=quiet,
        )
        for query, error in zip(pictures, made.errors, strict=True):
            query.error = error
        good = [number for number, error in enumerate(made.errors) if error is None]
        if good:
            _fill([pictures[number] for number in good], index, index.search(made.embeddings[good], k))
    rows = [query for query in wanted if query.row is not None]
    if rows:
        numbers = [query.row for query in rows if query.row is not None]
        _fill(rows, index, index.search_rows(numbers, k))

    failed = [query for query in wanted if query.error is not None]
    list_messages(problems, "Warning: ")
    list_messages([f"{query.name}: {query.error}" for query in failed], "Failed: ")
    answered = [query for query in wanted if query.error is None]
    if not answered:
        click.echo("Error: there is nothing to search for: every query failed", err=True)
    elif sheet is not None:
        _draw(sheet, answered, index, k, quiet=quiet)
    if as_json:
        click.echo(
            json.dumps(
                _as_json(wanted, index, k, sheet if answered else None, problems) | {"index": approximate}
            )
        )
    elif answered:
        if sheet is not None:
            echo_path(sheet)
        else:
            click.echo(_as_text(answered))
    if not answered:
        return 3
    return 1 if failed or problems else 0


# -- queries


def _first_line(index: SearchIndex) -> str:
    left_out = f", {index.left_out} without an embedding are left out" if index.left_out else ""
    model = index.origin.get("model")
    return f"{index.name}: {counted(len(index), 'picture')}{f' by {model}' if model else ''}{left_out}"


def _resolve(arguments: Sequence[str], index: SearchIndex) -> tuple[list[_Query], list[str]]:
    """The queries that each argument names, in order, and a sentence for each that names none."""
    from dinokit.pictures.preprocess import Preprocessing
    from dinokit.sources import is_there, search_pictures
    from dinokit.sources.names import text_of

    queries: list[_Query] = []
    problems: list[str] = []
    channels = Preprocessing.from_json(index.origin.get("preprocessing") or {}).channels
    for argument in arguments:
        row = index.row_of(argument)
        if row is not None:
            queries.append(_of_row(text_of(argument), row, index))
            continue
        found = search_pictures(argument, channels=channels)
        problems += found.problems
        for item in found.pictures:
            name = text_of(item)
            row = index.row_of(name)
            if row is not None:
                queries.append(_of_row(name, row, index))
            elif is_there(item):
                queries.append(_Query(name, picture=item))
            else:
                queries.append(_Query(name, error=_no_such(name, index)))
    return queries, problems


def _of_row(name: str, row: int, index: SearchIndex) -> _Query:
    if not index.has_embedding(row):
        return _Query(name, error=f"it has no embedding in {index.name} (row {row})")
    return _Query(name, row=row)


def _no_such(name: str, index: SearchIndex) -> str:
    near = [path for path in index.paths if path.endswith(f"/{name}")][:3]
    if not near and len(index.paths) <= _SUGGESTED_FROM:
        near = difflib.get_close_matches(name, index.paths, n=1, cutoff=0.8)
    hint = f". Did you mean {' or '.join(near)}?" if near else f"; its first path is {index.paths[0]}"
    return f"no such file, and no row of {index.name} has this path{hint}"


def _fill(queries: Sequence[_Query], index: SearchIndex, found: tuple[Any, Any]) -> None:
    for query, similarities, rows in zip(queries, *found, strict=True):
        query.found = [
            {"path": index.paths[row], "row": int(row), "similarity": round(float(similarity), 6)}
            for similarity, row in zip(similarities, rows, strict=True)
        ]


# -- results


def _as_text(queries: Sequence[_Query]) -> str:
    lines = [("query", "rank", "similarity", "path")]
    for query in queries:
        for rank, other in enumerate(query.found, start=1):
            lines.append((query.name, f"{rank:>4}", f"{other['similarity']:.4f}", other["path"]))
    return as_columns(lines)


def _as_json(
    queries: Sequence[_Query], index: SearchIndex, k: int, sheet: str | None, problems: Sequence[str]
) -> dict[str, Any]:
    return {
        "table": index.name,
        "model": index.origin.get("model"),
        "rows": len(index.paths),
        "left_out": index.left_out,
        "k": k,
        "queries": [
            {"query": query.name, "row": query.row, "error": query.error, "found": query.found}
            for query in queries
        ],
        "problems": list(problems),
        "failures": [{"path": q.name, "error": q.error} for q in queries if q.error is not None],
        "sheet": sheet,
    }


def _draw(sheet: str, queries: Sequence[_Query], index: SearchIndex, k: int, *, quiet: bool) -> None:
    from dinokit.drawing.table_sheets import Tile, draw_sheet

    most = min(_ON_A_SHEET, max(len(query.found) for query in queries))
    rows = [
        (
            query.name,
            [
                Tile(query.name, "query", marked=True),
                *(Tile(other["path"], f"{other['similarity']:.4f}") for other in query.found[:most]),
            ],
        )
        for query in queries
    ]
    title = f"{index.name}: the {most} most similar of {len(index)}"
    columns = ["query", *(str(rank) for rank in range(1, most + 1))]
    drawn = draw_sheet(sheet, rows, columns, title=title, roots=(Path(), Path(index.name).parent))
    if drawn < len(rows) and not quiet:
        click.echo(f"Note: {sheet} holds the first {drawn} of {len(rows)} queries", err=True)
