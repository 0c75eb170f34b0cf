"""`dinokit select`: a few representative photographs."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._compared_sets import SidesOptions, count_embedded, each_file_once, sides_options
from dinokit.cli._messages import NothingToDoError, echo_path
from dinokit.cli._outputs import write_csv
from dinokit.wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["select"]

_ON_A_ROW = 8  # pictures of the sheet


def _parse_count(ctx: click.Context, param: click.Parameter, value: object) -> int | float:
    """A whole number as int, a percentage as the float share."""
    text = str(value).strip()
    if re.fullmatch(r"[1-9]\d{0,8}", text):
        return int(text)
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?) ?%", text)
    if match and 0 < float(match[1]) <= 100:
        return float(match[1]) / 100
    raise click.BadParameter(f"{text!r}; expected a number from 1, or a share such as 5%")


@click.command()
@sides_options(
    click.option(
        "-n",
        "--count",
        callback=_parse_count,
        required=True,
        metavar="N|P%",
        help="Number or percentage to choose.",
    ),
    click.option(
        "--by",
        type=click.Choice(["typical", "diverse"]),
        default="typical",
        show_default=True,
        help="typical: the one in the middle of each of N groups; diverse: repeatedly the one least like those chosen.",
    ),
    click.option(
        "--having",
        metavar="OTHERS",
        help="Pictures you already have; choose ones that differ from these: a table, files, a folder, an archive …",
    ),
    click.option(
        "-o",
        "--output",
        metavar="LIST",
        help="The paths as .txt, or with similarities as .csv; every command reads both.  [default: print the paths]",
    ),
    click.option("--sheet", metavar="PNG", help="Draw the chosen photographs: .png, .jpg or .webp."),
)
def select(
    options: SidesOptions,
    count: int | float,
    by: str,
    having: str | None,
) -> int:
    """Choose a few representative PHOTOS: to label by hand, for a small test set, for a first look.

    By default the photographs are grouped, and the one in the middle of each group is chosen, the largest group first.
    --by diverse repeatedly takes the photograph least like those already chosen: rare pictures come early, and so do
    broken and odd ones. No labels are needed; nothing is moved or copied.

    PHOTOS are either one table written by dinokit embed, which needs no model, or files, folders, patterns and
    archives as for dinokit embed.

    With --having, the chosen photographs differ from OTHERS, for instance from those already labelled.

    \b
    dinokit select photos/ -n 100 --sheet chosen.png
    dinokit select embeddings.parquet -n 5% -o to-label.txt
    dinokit select embeddings.parquet -n 40 --by diverse --sheet odd.png
    dinokit select embeddings.parquet -n 50 --having labelled.parquet -o next.csv
    dinokit select photos/ -n 20 -q | xargs -d '\\n' cp -t chosen/
    """
    from dinokit.cli._progress import counting_steps, open_progress
    from dinokit.neighbours.selection import select_diverse, select_typical

    options.check_outputs((".txt", ".csv"), "chosen.txt", having)
    sides = options.read("choose from", having)
    if not count_embedded(sides.tables[0]):
        raise NothingToDoError(
            "there is nothing to choose from: no photograph has an embedding; name other photographs"
        )
    table, _ = each_file_once(sides.tables[0])
    usable = count_embedded(table)
    wanted = count if isinstance(count, int) else math.ceil(round(count * usable, 6))  # 0.07 · 100 is above 7
    choose = select_typical if by == "typical" else select_diverse
    with open_progress(wanted, task="choosing", unit="steps", quiet=options.quiet) as progress:
        chosen = choose(
            table.embeddings,
            wanted,
            having=sides.tables[1].embeddings if having else None,
            on_progress=counting_steps(progress),
        )
    rows: list[dict[str, Any]] = [
        {"path": table.paths[row], "similarity": None if math.isnan(similarity) else round(similarity, 6)}
        for row, similarity in zip(chosen.rows, chosen.similarities, strict=True)
    ]
    if not options.quiet:
        fewer = f", fewer than the {wanted} requested" if len(rows) < wanted else ""
        others = f"; each of the others has a similarity of at least {chosen.farthest:.3f} to its nearest chosen one"
        click.echo(
            f"{len(rows)} of {counted(usable, 'photograph')} chosen{fewer}{others if len(rows) < usable else ''}",
            err=True,
        )
    placed = [row | {"path": _placed(row["path"], Path(options.photos[0]).parent)} for row in rows]
    if options.output is not None:
        _write(Path(options.output), placed)
    if options.sheet is not None:
        _draw(options.sheet, rows, [Path(), Path(options.photos[0]).parent], quiet=options.quiet)
    if options.as_json:
        summary = {
            "photos": len(table),
            "usable": usable,
            "chosen": len(rows),
            "by": by,
            "having": having,
            "farthest": round(chosen.farthest, 6),
            "model": table.origin.get("model"),
            "output": options.output,
            "sheet": options.sheet,
            "failures": sides.failures,
            "problems": sides.problems,
        }
        click.echo(json.dumps(summary if options.output else {**summary, "rows": rows}))
    else:
        for name in (options.output, options.sheet) if options.output else [row["path"] for row in placed]:
            if name:
                echo_path(name)
        if options.sheet and not options.output and not options.quiet:  # stdout is the list
            click.echo(f"Wrote {options.sheet}", err=True)
    return 1 if sides.failures or sides.problems else 0


def _placed(path: str, folder: Path) -> str:
    """The path from here: a table may name pictures relative to the folder where it was made, often its own folder."""
    from dinokit.sources.lists import exists
    from dinokit.sources.names import is_address

    beside = os.fspath(folder / path)
    return path if is_address(path) or exists(path) or not exists(beside) else beside


def _write(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The file appears whole or not at all."""
    from dinokit.files.outputs import atomic

    if output.suffix.lower() == ".txt":
        output.parent.mkdir(parents=True, exist_ok=True)
        names = [row["path"] for row in rows]
        of_one_line = not any(mark in name for name in names for mark in "\n\r")
        end = "\n" if of_one_line else "\0"  # lists are read with both
        with atomic(output) as temporary:
            temporary.write_bytes(b"".join(os.fsencode(name + end) for name in names))
        return
    write_csv(output, [("path", "similarity"), *((row["path"], row["similarity"]) for row in rows)])


def _draw(sheet: str, rows: Sequence[dict[str, Any]], folders: Sequence[Path], *, quiet: bool) -> None:
    from dinokit.drawing.table_sheets import Tile, draw_sheet

    lines = []
    for start in range(0, len(rows), _ON_A_ROW):
        tiles = [
            Tile(row["path"], "" if row["similarity"] is None else f"{row['similarity']:.3f}")
            for row in rows[start : start + _ON_A_ROW]
        ]
        last = start + len(tiles)
        lines.append((f"{start + 1} to {last}" if last > start + 1 else f"{last}", tiles))
    drawn = draw_sheet(
        sheet,
        lines,
        [""] * min(_ON_A_ROW, len(rows)),
        title="each with its similarity to those before it",
        roots=folders,
    )
    if drawn < len(lines) and not quiet:
        click.echo(f"Note: {sheet} holds the first {drawn * _ON_A_ROW} of {len(rows)}", err=True)
