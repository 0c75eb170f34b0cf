"""Contact sheets of pictures named by a table of embeddings: rows of captioned tiles."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dinokit.drawing.contact_sheet import contact_sheet
from dinokit.drawing.lettering import draw_text, font
from dinokit.errors import ImageError, UsageError
from dinokit.files.outputs import must_be_drawn, must_be_writable, save_picture
from dinokit.pictures.display import as_tile, picture_to_show
from dinokit.sources.relocate import find_again

__all__ = ["SHEET_SUFFIXES", "Tile", "check_sheet", "draw_sheet"]

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SIDE = 160  # of a picture
_LINE = 17  # height of a line of its caption
_MOST_PIXELS = 16000  # on a side: what all three formats can hold


@dataclass(frozen=True)
class Tile:
    """A picture with its caption."""

    path: str
    caption: str = ""
    marked: bool = False
    """Whether it has a coloured frame."""


def check_sheet(output: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raises UsageError or DinokitError if a sheet cannot be written under this name."""
    output = Path(output)
    if output.suffix.lower() not in SHEET_SUFFIXES:
        raise UsageError(
            f"{output}: the suffix {output.suffix!r} is not known; expected one of {', '.join(SHEET_SUFFIXES)}"
        )
    if output.is_dir():
        raise UsageError(f"{output} is a folder; expected the name of a picture, {output / 'sheet.png'}")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists; choose another name, or give --overwrite to replace it")
    must_be_drawn(output)
    must_be_writable(output)


def draw_sheet(
    output: str | os.PathLike[str],
    rows: Sequence[tuple[str, Sequence[Tile]]],
    columns: Sequence[str],
    *,
    title: str = "",
    roots: Sequence[Path] = (Path(),),
) -> int:
    """Writes rows of pictures with captions; an unreadable picture becomes a grey square with the reason.

    Args:
        output: checked by :func:`check_sheet`. It appears whole or not at all.
        rows: (label, tiles) of each; tiles may be fewer than the columns.
        columns: the heading of each column.
        title: above the table.
        roots: folders in which to look for relative paths, in this order.

    Returns:
        the number of rows on the sheet, as many as fit in a height of 16000 pixels.
    """
    output = Path(output)
    side = _SIDE + 2 * _LINE
    fitting = max(1, (_MOST_PIXELS - 120) // (side + 28))
    blank = Image.new("RGB", (_SIDE, side), "white")
    drawn = [
        (label, [*(_draw(tile, roots) for tile in tiles), *[blank] * (len(columns) - len(tiles))])
        for label, tiles in rows[:fitting]
    ]
    sheet = contact_sheet(drawn, columns, title=title, tile_px=side)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_picture(sheet, output)
    return len(drawn)


def _draw(tile: Tile, roots: Sequence[Path]) -> Image.Image:
    """A white canvas, of the same size for all tiles, with the picture, its caption and its name."""
    from PIL import ImageDraw

    canvas = Image.new("RGB", (_SIDE, _SIDE + 2 * _LINE), "white")
    draw = ImageDraw.Draw(canvas)
    picture = _open(tile.path, roots)
    if isinstance(picture, str):
        draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), "#dddddd")
        for number, words in enumerate(textwrap.wrap(picture, 22)[:6]):
            draw.text((8, 8 + number * _LINE), words, "#555555", font(12))
        box = (0, 0, _SIDE, _SIDE)
    else:
        left, top = (_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2
        canvas.paste(picture, (left, top))
        box = (left, top, left + picture.width, top + picture.height)
    if tile.marked:
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline="#0b8a8f", width=3)
    name = re.split("/|::", tile.path.replace(os.sep, "/"))[-1]
    draw_text(draw, (0, _SIDE + 2), tile.caption, 12, "black", _SIDE)
    draw_text(draw, (0, _SIDE + 2 + _LINE), name, 12, "#777777", _SIDE)
    return canvas


def _open(path: str, roots: Sequence[Path]) -> Image.Image | str:
    try:
        return as_tile(picture_to_show(find_again(path, roots), least_px=2 * _SIDE), _SIDE)
    except ImageError as error:
        return str(error)
