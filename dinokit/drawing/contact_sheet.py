"""Contact sheets: a table of pictures with labels, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from dinokit.drawing.lettering import draw_text, font_for, wrapped
from dinokit.errors import UsageError
from dinokit.pictures.display import as_tile

__all__ = ["contact_sheet"]

_TITLE_PX, _TITLE_LINES = 16, 3
_LEAST_COLUMN_PX = 120


def contact_sheet(
    rows: Sequence[tuple[str | Sequence[str], Sequence[Image.Image]]],
    columns: Sequence[str],
    *,
    title: str = "",
    tile_px: int = 192,
) -> Image.Image:
    """Draws pictures in a table with labels, on white.

    Args:
        rows: (label, pictures) of each row; every row has a picture for each column. Several labels share the row's
            width evenly; a label that is too long is cut at its start.
        columns: the heading of each column.
        title: above the table, on three lines at most.
        tile_px: the longer side of a picture on the sheet.

    Raises:
        UsageError: there are no rows, or the number of pictures in a row differs from the number of columns.
    """
    for label, tiles in rows:
        if len(tiles) != len(columns):
            raise UsageError(f"row {label!r} has {len(tiles)} pictures for {len(columns)} columns")
    if not rows or not columns:
        raise UsageError("a contact sheet needs at least one picture")
    shrunk = [
        ((label,) if isinstance(label, str) else label, [as_tile(picture, tile_px) for picture in tiles])
        for label, tiles in rows
    ]
    # Tiles of a tall crop are narrow, but the labels above them should be legible.
    width = max(min(tile_px, _LEAST_COLUMN_PX), *(tile.width for _, tiles in shrunk for tile in tiles))
    gap, margin, caption, head = 6, 14, 22, 26
    total_width = 2 * margin + len(columns) * (width + gap) - gap
    lines = wrapped(title, font_for(title, _TITLE_PX), total_width - 2 * margin, most=_TITLE_LINES)
    top = margin + (head + _TITLE_PX * 5 // 4 * (len(lines) - 1) if title else 0) + caption
    heights = [caption + max(tile.height for tile in tiles) + gap for _, tiles in shrunk]
    sheet = Image.new("RGB", (total_width, top + sum(heights) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        place = (margin, margin + _TITLE_PX * 5 // 4 * number)
        draw_text(draw, place, line, _TITLE_PX, "black", total_width - 2 * margin)
    for column, name in enumerate(columns):
        x = margin + column * (width + gap)
        draw_text(draw, (x, top - caption + 2), name, 13, "black", width)
    for (labels, tiles), y in zip(shrunk, top + np.cumsum([0, *heights[:-1]]), strict=True):
        room = (total_width - 2 * margin + gap) // len(labels)
        for number, label in enumerate(labels):
            place = (margin + number * room, int(y) + 4)
            draw_text(draw, place, label, 13, "#555555", room - gap, keep="end")
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (margin + column * (width + gap), int(y) + caption))
    return sheet
