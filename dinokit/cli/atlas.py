"""`dinokit atlas`: a map of photographs, as one web page."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._messages import echo_path, list_messages
from dinokit.cli._model_options import quiet_option
from dinokit.cli._outputs import ROW_SUFFIXES, check_output, write_rows
from dinokit.cli._pictures import silence_decoders
from dinokit.cli._tables import visible
from dinokit.wording import counted

if TYPE_CHECKING:
    from dinokit.atlas.make import Atlas
    from dinokit.cli._progress import Progress

__all__ = ["atlas"]

_PLACE_TYPES = {"path": "text", "x": "number", "y": "number", "cluster": "whole", "cluster_name": "text"}


@click.command()
@click.argument("table")
@click.option("-o", "--output", default="atlas.html", show_default=True, help="The page to write.")
@click.option(
    "--table",
    "places",
    metavar="FILE",
    help="Also write each photograph's position and cluster: .csv, .jsonl or .parquet.",
)
@click.option(
    "--root",
    metavar="FOLDER",
    help="Folder that the table's relative paths start from.  [default: here, then beside the table]",
)
@click.option(
    "--clusters",
    type=click.IntRange(1, 24),
    help="Number of clusters.  [default: chosen automatically, 4 to 16]",
)
@click.option(
    "-k",
    "--neighbours",
    type=click.IntRange(1, 100),
    default=12,
    show_default=True,
    help="Number of similar photographs to list for each.",
)
@click.option(
    "--thumbnail-px",
    type=click.IntRange(16, 256),
    default=64,
    show_default=True,
    help="Longer side of a thumbnail.",
)
@click.option(
    "--max-photos",
    type=click.IntRange(1, 50_000),
    default=10_000,
    show_default=True,
    help="If there are more, choose this many, evenly over the table.",
)
@click.option(
    "--layout",
    type=click.Choice(["builtin", "pca", "umap", "tsne"]),
    default="builtin",
    show_default=True,
    help="builtin and pca need no further package; umap needs umap-learn; tsne needs openTSNE or scikit-learn.",
)
@click.option("--title", help="Title of the page.  [default: the table's name]")
@click.option("--overwrite", is_flag=True, help="Replace the page and the table if they exist.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON instead of the page's path.")
@quiet_option
def atlas(
    table: str,
    output: str,
    places: str | None,
    root: str | None,
    clusters: int | None,
    neighbours: int,
    thumbnail_px: int,
    max_photos: int,
    layout: str,
    title: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Draw a map of the photographs in TABLE, a table written by dinokit embed.

    The page is one file that works offline and contacts no server: photographs that resemble each other lie together.
    Zoom and pan, hover to see a photograph, click for those most similar, search file names, colour and filter by
    cluster, label or folder. Press ? in the page for its keys.

    Thumbnails are made from the photographs themselves, so run it where the table's paths are valid, or give --root;
    photographs that cannot be read stay on the map, in grey. A page holds at most 80 million pixels
    of thumbnails (19,531 of 64 px) and at most 64 MB of them; one of 64 px takes about 2 kB.

    The file of --table has a row for each photograph on the map: path, x (to the right) and y (up) between -1 and 1,
    and cluster and cluster_name as in the page.

    \b
    dinokit embed photos/ -o embeddings.parquet
    dinokit atlas embeddings.parquet -o atlas.html
    dinokit atlas embeddings.parquet --table clusters.csv
    dinokit atlas embeddings.parquet --clusters 10 --thumbnail-px 96 --max-photos 4000
    """
    from dinokit.tables.embeddings import read_embeddings

    silence_decoders()
    page = Path(output)
    check_output(page, (".html", ".htm"), "atlas.html", overwrite=overwrite, inputs=(table,))
    if places is not None:
        check_output(Path(places), ROW_SUFFIXES, "clusters.csv", overwrite=overwrite, inputs=(table,))
    if root is not None and not Path(root).is_dir():
        raise click.UsageError(
            f"--root {root}: no such folder; expected the folder that the table's relative paths start from"
        )
    read = read_embeddings(table)
    embeddings, paths, origin = read

    from dinokit.atlas.make import make_atlas

    with ExitStack() as stack:
        made = make_atlas(
            embeddings,
            paths,
            title=title or visible(Path(table).name),
            labels=read.labels,
            origin=origin,
            roots=[root] if root is not None else [".", Path(table).parent],
            layout=layout,
            clusters=clusters,
            neighbours=neighbours,
            thumbnail_px=thumbnail_px,
            max_photos=max_photos,
            on_progress=_Bars(stack, min(len(paths), max_photos), quiet=quiet),
        )
    _write(page, made.page)
    if places is not None:
        _write_places(Path(places), made, {**origin, "layout": layout})
    _report(made, page, quiet=quiet)
    if as_json:
        click.echo(json.dumps(_as_json(made, page, table) | {"places": places}))
    else:
        for name in (output, places):
            if name:
                echo_path(name)
    return 1 if made.problems else 0


class _Bars:
    """A bar for the layout, then one for the thumbnails."""

    def __init__(self, stack: ExitStack, photos: int, *, quiet: bool) -> None:
        self._stack, self._quiet = stack, quiet
        self._totals = {"layout": (100, "%"), "thumbnails": (photos, "photos")}
        self._task = ""
        self._bar: Progress | None = None
        self._failed = 0

    def __call__(self, task: str, done: int, failed: int) -> None:
        if task != self._task:
            from dinokit.cli._progress import open_progress

            self._stack.close()
            self._task = task
            total, unit = self._totals[task]
            self._bar = self._stack.enter_context(
                open_progress(total, task=task, unit=unit, quiet=self._quiet)
            )
        assert self._bar is not None
        self._failed += failed
        self._bar.advance(done, f"{self._failed} failed" if self._failed else None)


def _write(page: Path, text: str) -> None:
    """Writes the page, completely or not at all."""
    from dinokit.files.outputs import atomic

    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic(page) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _write_places(output: Path, made: Atlas, origin: dict[str, Any]) -> None:
    """A row for each photograph on the map."""
    rows = [
        {
            "path": path,
            "x": round(x, 6),
            "y": round(y, 6),
            "cluster": cluster + 1,  # as in its name
            "cluster_name": made.clusters[cluster],
        }
        for path, (x, y), cluster in zip(
            made.paths, made.places.tolist(), made.cluster_of.tolist(), strict=True
        )
    ]
    lines: list[list[Any]] = [list(_PLACE_TYPES), *(list(row.values()) for row in rows)]
    write_rows(output, rows, lines, _PLACE_TYPES, origin)


def _report(made: Atlas, page: Path, *, quiet: bool) -> None:
    list_messages([f"{path}: {reason}" for path, reason in made.problems], "Failed: ", see="--json")
    if len(made.problems) == made.photos:
        click.echo(
            "Warning: none of the photographs could be read, so all are grey. Run this where the table was made, "
            "or give --root, the folder that its relative paths start from",
            err=True,
        )
    if quiet:
        return
    parts = [f"{counted(made.photos, 'photograph')} in {counted(len(made.clusters), 'cluster')}"]
    if made.sampled_from > made.photos:
        parts.append(f"chosen evenly from {made.sampled_from:,} (--max-photos)")
    if made.left_out:
        parts.append(f"{counted(made.left_out, 'row')} without an embedding left out")
    if made.problems:
        parts.append(f"{len(made.problems):,} grey")
    click.echo(f"{', '.join(parts)}; {max(page.stat().st_size / 1e6, 0.1):.1f} MB", err=True)


def _as_json(made: Atlas, page: Path, table: str) -> dict[str, Any]:
    return {
        "output": str(page),
        "table": table,
        "photos": made.photos,
        "with_embedding": made.sampled_from,
        "left_out": made.left_out,
        "clusters": len(made.clusters),
        "bytes": page.stat().st_size,
        "problems": [],
        "failures": [{"path": path, "error": reason} for path, reason in made.problems],
    }
