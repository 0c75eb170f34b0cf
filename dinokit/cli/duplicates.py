"""`dinokit duplicates`: near-duplicates among photographs. Nothing is deleted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._compared_sets import SidesOptions, count_embedded, each_file_once, sides_options
from dinokit.cli._messages import NothingToDoError, echo_path
from dinokit.cli._model_options import FiniteRange, must_not_be_given
from dinokit.cli._outputs import write_csv
from dinokit.cli._tables import as_columns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dinokit.neighbours.duplicates import DuplicateGroup
    from dinokit.tables.embeddings import EmbeddingTable

__all__ = ["duplicates"]

_ON_A_SHEET = 8  # pictures of a group
_SHARE_OF_A_CHAIN = 0.5  # of all pictures in one group: the threshold is too low for these
_GROUP_COLUMNS = ("group", "keep", "similarity", "width", "height", "path")
_PAIR_COLUMNS = ("path", "similarity", "against")


@click.command()
@sides_options(
    click.option(
        "--against",
        metavar="OTHERS",
        help="Compare PHOTOS with these only, not with each other: a table, files, a folder, an archive …",
    ),
    click.option(
        "--threshold",
        type=FiniteRange(-1, 1, min_open=True),
        default=0.95,
        show_default=True,
        help="Cosine similarity from which two photographs count as near-duplicates.",
    ),
    click.option(
        "--keep",
        type=click.Choice(["largest", "first"]),
        default="largest",
        show_default=True,
        help="Photograph of a group to mark: the one with the most pixels, then the most bytes; or the first.",
    ),
    click.option("-o", "--output", metavar="CSV", help="Output file, .csv.  [default: print a table]"),
    click.option("--sheet", metavar="PNG", help="Draw the result: .png, .jpg or .webp."),
)
def duplicates(
    options: SidesOptions,
    against: str | None,
    threshold: float,
    keep: str,
) -> int:
    """Find groups of near-duplicates among PHOTOS. Nothing is deleted or moved.

    PHOTOS are either one table written by dinokit embed, which needs no model, or files, folders, patterns and
    archives as for dinokit embed. If there are many, embed them first: the table is kept, so another threshold is
    quick to try.

    The default threshold finds photographs that were saved again, made smaller or brightened a little. Crops, rotations
    and mirror images are less similar: a lower threshold finds some of them, but soon also photographs that only look
    alike. --sheet draws the result. A group is linked pair by pair, so two photographs in it may be less similar than
    the threshold. A file that is named twice is counted once.

    With --against, the result is those PHOTOS that have a near-duplicate among OTHERS, each with its most similar one:
    test pictures that are in the training set, or new photographs that you already have.

    \b
    dinokit duplicates photos/ --sheet duplicates.png
    dinokit duplicates embeddings.parquet --threshold 0.9 -o duplicates.csv
    dinokit duplicates embeddings.parquet --json
    dinokit duplicates test.parquet --against train.parquet -o leaks.csv
    """
    options.check_outputs((".csv",), "duplicates.csv", against)
    if against is not None:
        must_not_be_given(
            ("keep",), "chooses within a group, and --against makes no groups; leave out one of them"
        )
    compared = options.read("compare", against)
    table, again = each_file_once(compared.tables[0])
    counts = [count_embedded(side) for side in (table, *compared.tables[1:])]
    if not all(counts):
        raise NothingToDoError(
            "there is nothing to compare: no photograph has an embedding; name other photographs"
        )
    summary: dict[str, Any] = {
        "photos": len(table),
        "compared": counts[0],
        "left_out": len(table) - counts[0] - again,
        "named_again": again,
        "threshold": threshold,
    }
    columns: Sequence[str]
    if against is None:
        groups = _find(table, threshold, keep, quiet=options.quiet)
        rows, columns = _rows(groups, table), _GROUP_COLUMNS
        summary |= {"keep": keep, "groups": len(groups), "duplicates": len(rows) - len(groups)}
        if not options.quiet:
            _report(summary, groups)
    else:
        other = compared.tables[1]
        rows, columns = _pairs(table, other, threshold, quiet=options.quiet), _PAIR_COLUMNS
        summary |= {"against": against, "others": counts[1], "duplicates": len(rows)}
        if not options.quiet:
            _report_pairs(summary)
    if options.output is not None:
        _write(Path(options.output), rows, columns)
    if options.sheet is not None and rows:
        folders = (Path(), Path(options.photos[0]).parent, Path(against or "").parent)
        if against is None:
            _draw(options.sheet, groups, table, folders, threshold, quiet=options.quiet)
        else:
            _draw_pairs(options.sheet, rows, folders, threshold, quiet=options.quiet)
    if options.sheet is not None and not rows and not options.quiet:
        click.echo(f"{options.sheet} is not written: there are no near-duplicates to draw", err=True)
    if options.as_json:
        summary |= {
            "model": table.origin.get("model"),
            "output": options.output,
            "sheet": options.sheet if rows else None,
            "failures": compared.failures,
            "problems": compared.problems,
        }
        click.echo(json.dumps(summary if options.output else {**summary, "rows": rows}))
    elif options.output is not None or (options.sheet is not None and rows):
        for name in (options.output, options.sheet if rows else None):
            if name:
                echo_path(name)
    elif rows:
        click.echo(_as_text(rows) if against is None else _pairs_as_text(rows))
    return 1 if compared.failures or compared.problems else 0


# -- comparing


def _find(table: EmbeddingTable, threshold: float, keep: str, *, quiet: bool) -> list[DuplicateGroup]:
    from dinokit.cli._progress import open_progress
    from dinokit.neighbours.duplicates import count_tiles, find_duplicates

    quality = _quality(table) if keep == "largest" else None
    tiles = count_tiles(count_embedded(table))
    with open_progress(tiles, task="comparing", unit="tiles", quiet=quiet) as progress:
        return find_duplicates(
            table.embeddings, threshold, quality=quality, on_progress=lambda count: progress.advance(count)
        )


def _pairs(
    table: EmbeddingTable, other: EmbeddingTable, threshold: float, *, quiet: bool
) -> list[dict[str, Any]]:
    """A row for each photograph that has a near-duplicate in the other table."""
    from dinokit.cli._progress import open_progress
    from dinokit.neighbours.duplicates import find_duplicates_against

    with open_progress(count_embedded(table), task="comparing", unit="photos", quiet=quiet) as progress:
        pairs = find_duplicates_against(
            table.embeddings, other.embeddings, threshold, on_progress=lambda count: progress.advance(count)
        )
    return [
        {
            "path": table.paths[pair.row],
            "similarity": round(pair.similarity, 6),
            "against": other.paths[pair.other],
            "row": pair.row,
            "against_row": pair.other,
        }
        for pair in pairs
    ]


def _quality(table: EmbeddingTable) -> NDArray[np.int64]:
    """(N, 2): pixels, then bytes of the file if it exists: of two equal sizes, the smaller file lost more."""
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
    click.echo(
        f"{summary['compared']} compared{_not_compared(summary)}; groups of near-duplicates: {summary['groups']}; "
        f"photographs besides those to keep: {summary['duplicates']}. Nothing was deleted",
        err=True,
    )
    largest = max((len(group.rows) for group in groups), default=0)
    if largest > 2 and largest > _SHARE_OF_A_CHAIN * summary["compared"]:
        click.echo(
            f"Note: one group holds {largest} of {summary['compared']} photographs; threshold "
            f"{summary['threshold']} is probably too low for them",
            err=True,
        )


def _report_pairs(summary: dict[str, Any]) -> None:
    click.echo(
        f"{summary['compared']} compared with {summary['others']}{_not_compared(summary)}; with a near-duplicate among "
        f"these: {summary['duplicates']}. Nothing was deleted",
        err=True,
    )


def _not_compared(summary: dict[str, Any]) -> str:
    left_out = f", {summary['left_out']} left out that have no embedding" if summary["left_out"] else ""
    again = f", {summary['named_again']} that are named twice counted once" if summary["named_again"] else ""
    return left_out + again


def _write(output: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    cells = [[("no", "yes")[row[name]] if name == "keep" else row[name] for name in columns] for row in rows]
    write_csv(output, [columns, *cells])


def _as_text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("group", "keep", "similarity", "pixels", "path")]
    for row in rows:
        pixels = f"{row['width']}x{row['height']}" if row["width"] else ""
        keep = "keep" if row["keep"] else ""
        lines.append((str(row["group"]), keep, f"{row['similarity']:.4f}", pixels, row["path"]))
    return as_columns(lines)


def _pairs_as_text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("photo", "similarity", "near-duplicate")]
    return as_columns(lines + [(row["path"], f"{row['similarity']:.4f}", row["against"]) for row in rows])


def _draw(
    sheet: str,
    groups: Sequence[DuplicateGroup],
    table: EmbeddingTable,
    folders: Sequence[Path],
    threshold: float,
    *,
    quiet: bool,
) -> None:
    from dinokit.drawing.table_sheets import Tile, draw_sheet

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
    drawn = draw_sheet(sheet, rows, columns, title=title, roots=folders)
    if drawn < len(rows) and not quiet:
        click.echo(f"Note: {sheet} holds the first {drawn} of {len(rows)} groups", err=True)


def _draw_pairs(
    sheet: str, rows: Sequence[dict[str, Any]], folders: Sequence[Path], threshold: float, *, quiet: bool
) -> None:
    from dinokit.drawing.table_sheets import Tile, draw_sheet

    pairs = [
        (row["path"], [Tile(row["path"]), Tile(row["against"], f"{row['similarity']:.4f}")]) for row in rows
    ]
    title = f"near-duplicates in another set at a similarity of {threshold}"
    drawn = draw_sheet(sheet, pairs, ("photo", "near-duplicate"), title=title, roots=folders)
    if drawn < len(pairs) and not quiet:
        click.echo(f"Note: {sheet} holds the first {drawn} of {len(pairs)} pairs", err=True)
