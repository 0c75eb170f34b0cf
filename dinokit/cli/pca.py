"""`dinokit pca`: draws patch features of photographs as colours."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._drawing import DrawingOptions, draw, drawing_options

if TYPE_CHECKING:
    from dinokit.drawing.pca_pictures import PcaRun
    from dinokit.features.backbone import Backbone

__all__ = ["pca"]


@click.command()
@drawing_options(
    "pca",
    "Pictures, or the components themselves: (h, w, 3) float32.",
    click.option(
        "--foreground",
        is_flag=True,
        help="Leave the background black: colour only what the first component separates from the borders.",
    ),
)
def pca(options: DrawingOptions, foreground: bool) -> int:
    """Draw the patch features of PHOTOS as colours, into a folder.

    The first three principal components of all patches of all PHOTOS are shown as red, green and blue: similar
    features have similar colours, within a photograph and between photographs. PHOTOS are files, folders, quoted
    patterns and archives.

    OUTPUT/cat.png is drawn for cat.jpg; contact-sheet.png shows all photographs. A larger --image-size gives finer
    maps. A picture that cannot be read is listed. --foreground is for photographs of one kind of object, and for models
    that separate it from its surroundings; the starter does so only sometimes.

    \b
    dinokit pca photos/ -o out/
    dinokit pca photos/ -o out/ -m dino_vits16 --image-size 480 --foreground
    dinokit pca photos/ -o components/ --format npy
    """
    from dinokit.drawing.pca_pictures import write_pca

    write = functools.partial(write_pca, foreground=foreground)
    return draw(
        options,
        write,
        task="reading",
        index="pca.json",
        first_line=_first_line,
        report=_report,
        further=_explained,
    )


def _first_line(backbone: Backbone) -> str:
    (height, width), (rows, columns) = backbone.image_size, backbone.grid
    return (
        f"{backbone.name} ({backbone.source}): {height}x{width} px in {rows}x{columns} patches, "
        f"{backbone.engine} on {backbone.device}"
    )


def _report(run: PcaRun, total: int) -> list[str]:
    if run.interrupted and not run.written:
        return ["Interrupted before the first photograph was read; nothing was drawn"]
    if run.interrupted:
        return [
            f"Interrupted: {len(run.written)} of {total} were read and are drawn in {run.folder}, "
            "with the components of these only"
        ]
    if run.pca is None:
        return []
    failed = f", {len(run.failures)} failed" if run.failures else ""
    held = " + ".join(f"{100 * share:.0f}" for share in run.pca.explained)
    sheet = f" · see {run.folder / run.sheets[0]}" if run.sheets else ""
    return [f"{len(run.written)} drawn{failed}; components hold {held} % of the variance{sheet}"]


def _explained(run: PcaRun) -> dict[str, Any]:
    return {"explained": None if run.pca is None else run.pca.explained.tolist()}
