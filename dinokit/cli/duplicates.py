"""`dinokit duplicates`: near-duplicates among photographs. Nothing is deleted."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._messages import list_messages
from dinokit.cli._model_options import (
    batch_size_option,
    go_offline,
    image_size_option,
    model_options,
    offline_option,
    quiet_option,
    reduced_decoding_option,
)
from dinokit.cli._outputs import check_output
from dinokit.cli._pictures import search_for, silence_pillow
from dinokit.cli._tables import as_columns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dinokit.duplicates import DuplicateGroup
    from dinokit.embeddings import EmbeddingTable

__all__ = ["duplicates"]

_ON_A_SHEET = 8  # pictures of a group
_SHARE_OF_A_CHAIN = 0.5  # of all pictures in one group: the threshold is too low for these
_COLUMNS = ("group", "keep", "similarity", "width", "height", "path")


@click.command()
@click.argument("photos", nargs=-1, required=True)
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Cosine similarity from which two photographs count as the same.",
)
@click.option(
    "--keep",
    type=click.Choice(["largest", "first"]),
    default="largest",
    show_default=True,
    help="Which one of a group to mark: the one with the most pixels, then the most bytes; or the first.",
)
@click.option("-o", "--output", metavar="CSV", help="The groups as .csv.  [default: a table on the screen]")
@click.option("--sheet", metavar="PNG", help="Draw the groups: .png, .jpg or .webp.")
@model_options
@image_size_option
@reduced_decoding_option
@batch_size_option
@click.option("--overwrite", is_flag=True, help="Replace the output and the sheet if they exist.")
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON; without -o, all groups too.")
@quiet_option
def duplicates(
    photos: tuple[str, ...],
    threshold: float,
    keep: str,
    output: str | None,
    sheet: str | None,
    model: str,
    revision: str | None,
    engine: str,
    device: str,
    image_size: int | tuple[int, int] | None,
    reduced_decoding: bool,
    batch_size: int,
    overwrite: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Find groups of near-duplicates among PHOTOS. Nothing is deleted or moved.

    PHOTOS are one table of dinokit embed, which needs no model, or else files, folders, patterns and archives as
    for dinokit embed. Embed many of them first: the table stays, and trying another threshold is then quick.

    The default threshold finds photographs that were saved again, made smaller or brightened a little. Crops, turned
    and mirrored ones are less similar than that: a lower threshold finds some of them, and before long photographs
    that only look alike. --sheet shows what was found. A group is held together by its most similar pairs, so two
    photographs in it may be less similar than the threshold.

    \b
    dinokit duplicates photos/ --sheet duplicates.png
    dinokit duplicates embeddings.parquet --threshold 0.9 -o duplicates.csv
    dinokit duplicates embeddings.parquet --json
    """
    from dinokit.table_sheets import check_sheet

    silence_pillow()
    if output is not None:
        check_output(Path(output), (".csv",), "duplicates.csv", overwrite=overwrite)
    if sheet is not None:
        check_sheet(sheet, overwrite=overwrite)
    table = _table_in(photos)
    problems: list[str] = []
    failures: list[dict[str, str]] = []
    if table is None:
        if offline:
            go_offline()
        from dinokit.cli._embed_pictures import embed_pictures

        found, backbone = search_for(
            photos,
            model,
            engine=engine,
            device=device,
            revision=revision,
            image_size=image_size,
            reduced_decoding=reduced_decoding,
        )
        problems = found.problems
        list_messages(problems, "Warning: ")
        if backbone is None:
            list_messages([f"{picture}: no such file or folder" for picture in found.pictures], "Warning: ")
            click.echo(
                "Error: there is nothing to compare; name photographs, or folders that hold some", err=True
            )
            return 3
        table = embed_pictures(found.pictures, backbone, batch_size=batch_size, quiet=quiet)
        failures = [
            {"path": path, "error": error}
            for path, error in zip(table.paths, table.errors, strict=True)
            if error is not None
        ]
        list_messages([f"{failure['path']}: {failure['error']}" for failure in failures], "Failed: ")

    groups, compared = _find(table, threshold, keep, quiet=quiet)
    if not compared:
        click.echo("Error: there is nothing to compare; no photograph has an embedding", err=True)
        return 3
    rows = _rows(groups, table)
    if output is not None:
        _write(Path(output), rows)
    if sheet is not None and groups:
        _draw(sheet, groups, table, photos, threshold, quiet=quiet)
    summary = {
        "photos": len(table),
        "compared": compared,
        "left_out": len(table) - compared,
        "threshold": threshold,
        "keep": keep,
        "groups": len(groups),
        "duplicates": len(rows) - len(groups),
    }
    if not quiet:
        _report(summary, groups)
        if sheet is not None and not groups:
            click.echo(f"{sheet} is not written: there is nothing to show", err=True)
    if as_json:
        summary |= {
            "model": table.origin.get("model"),
            "output": output,
            "sheet": sheet if groups else None,
            "failures": failures,
            "unmatched": problems,
        }
        click.echo(json.dumps(summary if output else {**summary, "rows": rows}))
    elif output is not None or (sheet is not None and groups):
        click.echo("\n".join(name for name in (output, sheet if groups else None) if name))
    elif rows:
        click.echo(_as_text(rows))
    return 1 if failures or problems else 0


# -- what to compare


def _table_in(photos: Sequence[str]) -> EmbeddingTable | None:
    """The table of embeddings that was named, or None where pictures were."""
    from dinokit.embeddings import read_embeddings
    from dinokit.labelled import is_table

    tables = [name for name in photos if is_table(name)]
    if not tables:
        return None
    if len(photos) > 1:
        raise click.UsageError(
            f"{tables[0]} is a table of embeddings; expected it alone, or photographs only"
        )
    return read_embeddings(tables[0])


def _find(
    table: EmbeddingTable, threshold: float, keep: str, *, quiet: bool
) -> tuple[list[DuplicateGroup], int]:
    """The groups, and how many photographs were compared."""
    from dinokit.cli._progress import open_progress
    from dinokit.duplicates import count_tiles, find_duplicates
    from dinokit.nearest import finite_rows

    compared = int(finite_rows(table.embeddings).sum())
    quality = _quality(table) if keep == "largest" else None
    with open_progress(count_tiles(compared), task="comparing", unit="tiles", quiet=quiet) as progress:
        groups = find_duplicates(
            table.embeddings, threshold, quality=quality, on_progress=lambda count: progress.advance(count)
        )
    return groups, compared


def _quality(table: EmbeddingTable) -> NDArray[np.int64]:
    """(N, 2): pixels, then bytes of the file where there is one: of two of a size, one was saved with more loss."""
    import numpy as np

    quality = np.zeros((len(table), 2), np.int64)
    for row, (path, size) in enumerate(zip(table.paths, table.sizes, strict=True)):
        quality[row, 0] = size[0] * size[1] if size else 0
        try:
            quality[row, 1] = Path(path).stat().st_size
        except (OSError, ValueError):
            continue
    return quality


# -- results


def _rows(groups: Sequence[DuplicateGroup], table: EmbeddingTable) -> list[dict[str, Any]]:
    """A row for each photograph of a group, the one to keep first."""
    rows: list[dict[str, Any]] = []
    for number, group in enumerate(groups, start=1):
        for place, (row, similarity) in enumerate(zip(group.rows, group.similarities, strict=True)):
            width, height = table.sizes[row] or (None, None)
            rows.append(
                {
                    "group": number,
                    "keep": place == 0,
                    "similarity": round(similarity, 6),
                    "width": width,
                    "height": height,
                    "path": table.paths[row],
                    "row": row,
                }
            )
    return rows


def _report(summary: dict[str, Any], groups: Sequence[DuplicateGroup]) -> None:
    left_out = f", {summary['left_out']} left out that have no embedding" if summary["left_out"] else ""
    click.echo(
        f"{summary['compared']} compared{left_out}; groups of near-duplicates: {summary['groups']}; "
        f"photographs beside the ones to keep: {summary['duplicates']}. Nothing was deleted",
        err=True,
    )
    largest = max((len(group.rows) for group in groups), default=0)
    if largest > 2 and largest > _SHARE_OF_A_CHAIN * summary["compared"]:
        click.echo(
            f"Note: one group holds {largest} of {summary['compared']} photographs; threshold "
            f"{summary['threshold']} is probably too low for them",
            err=True,
        )


def _write(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The file appears whole or not at all."""
    from dinokit.outputs import atomic

    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        write = csv.writer(stream).writerow
        write(_COLUMNS)
        for row in rows:
            cells = row | {"keep": "yes" if row["keep"] else "no"}
            write([cells[name] for name in _COLUMNS])


def _as_text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("group", "keep", "similarity", "pixels", "path")]
    for row in rows:
        pixels = f"{row['width']}x{row['height']}" if row["width"] else ""
        keep = "keep" if row["keep"] else ""
        lines.append((str(row["group"]), keep, f"{row['similarity']:.4f}", pixels, row["path"]))
    return as_columns(lines)


def _draw(
    sheet: str,
    groups: Sequence[DuplicateGroup],
    table: EmbeddingTable,
    photos: Sequence[str],
    threshold: float,
    *,
    quiet: bool,
) -> None:
    from dinokit.table_sheets import Tile, draw_sheet

    rows = []
    for number, group in enumerate(groups, start=1):
        tiles = []
        for row, similarity in list(zip(group.rows, group.similarities, strict=True))[:_ON_A_SHEET]:
            size = table.sizes[row]
            pixels = f", {size[0]}x{size[1]}" if size else ""
            kept = row == group.rows[0]
            tiles.append(
                Tile(table.paths[row], f"{'keep' if kept else f'{similarity:.4f}'}{pixels}", marked=kept)
            )
        more = len(group.rows) - len(tiles)
        rows.append(
            (f"group {number}: {len(group.rows)} photographs{f', {more} not shown' if more else ''}", tiles)
        )
    columns = ["keep", *(str(place) for place in range(1, max(len(tiles) for _, tiles in rows)))]
    title = f"near-duplicates at a similarity of {threshold}"
    drawn = draw_sheet(sheet, rows, columns, title=title, roots=(Path(), Path(photos[0]).parent))
    if drawn < len(rows) and not quiet:
        click.echo(f"Note: {sheet} holds the first {drawn} of {len(rows)} groups", err=True)
