"""`dinokit attention`: draws a model's attention over photographs."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import click

from dinokit.cli._drawing import DrawingOptions, draw, drawing_options
from dinokit.cli._model_options import FiniteRange, must_not_be_given

if TYPE_CHECKING:
    from dinokit.drawing.attention_pictures import AttentionRun
    from dinokit.features.backbone import Backbone

__all__ = ["attention"]


def _parse_heads(ctx: click.Context, param: click.Parameter, value: str) -> list[int] | None:
    if value == "all":
        return None
    if value == "none":
        return []
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", value):
        raise click.BadParameter(
            f"{value!r}; expected all, none, or numbers from 0, separated by commas: 0,2,5"
        )
    return [int(number) for number in value.split(",")]


@click.command()
@drawing_options(
    "attention",
    "Pictures, or the attention itself: all heads, (heads, h, w) float32.",
    click.option(
        "--mass",
        type=FiniteRange(0, 1, min_open=True),
        default=0.6,
        show_default=True,
        help="Share of the attention that a mask covers.",
    ),
    click.option(
        "--heads",
        callback=_parse_heads,
        default="all",
        show_default=True,
        help="Heads to draw: all, none or 0,2,5.",
    ),
)
def attention(options: DrawingOptions, mass: float, heads: list[int] | None) -> int:
    """Draw the model's attention over PHOTOS, into a folder.

    PHOTOS are files, folders (searched with their subfolders), quoted patterns such as 'photos/**/*.jpg', and the
    other sources of dinokit embed: archives, Parquet files, lists, addresses.

    For cat.jpg, OUTPUT/cat contains the model's input, the attention of each head and their mean drawn over it, and
    masks that cover the share --mass of the attention; contact-sheet.png shows all photographs. A larger
    --image-size gives finer maps. Unreadable pictures are listed.

    \b
    dinokit attention photos/ -o out/
    dinokit attention cat.jpg -o out/ -m dino_vits16 --image-size 480
    dinokit attention photos/ -o maps/ --format npy
    """
    from dinokit.drawing.attention_pictures import write_attention

    if options.form == "npy":
        must_not_be_given(
            ["mass", "heads"],
            "applies to --format png only (npy holds the attention of all heads); leave one out",
        )

    write = functools.partial(write_attention, mass=mass, heads=heads)
    return draw(
        options, write, task="drawing", index="attention.json", first_line=_first_line, report=_report
    )


def _first_line(backbone: Backbone) -> str:
    (height, width), (rows, columns) = backbone.image_size, backbone.grid
    return (
        f"{backbone.name} ({backbone.source}): {backbone.num_heads} heads, {height}x{width} px in "
        f"{rows}x{columns} patches, {backbone.engine} on {backbone.device}"
    )


def _report(run: AttentionRun, total: int) -> list[str]:
    if run.interrupted:
        return [
            f"Interrupted: {len(run.written)} of {total} are drawn and kept in {run.folder}; --overwrite redraws all"
        ]
    failed = f", {len(run.failures)} failed" if run.failures else ""
    sheet = f" · see {run.folder / run.sheets[0]}" if run.sheets else ""
    return [f"{len(run.written)} drawn{failed}{sheet}"]
