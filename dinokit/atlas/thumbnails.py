"""Small pictures of many photographs on a few sheets, as a web page can hold them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dinokit.errors import ImageError, UsageError
from dinokit.features.batching import batched, count_workers, map_ahead
from dinokit.pictures.display import as_tile, picture_to_show
from dinokit.sources.relocate import find_again

__all__ = ["MOST_BYTES", "MOST_PIXELS", "Sheets", "check_size", "make_sheets"]

MOST_PIXELS = 80_000_000
"""Of all thumbnails together: a browser holds four bytes for each when it draws them."""
MOST_BYTES = 48_000_000
"""Of all sheets together, as JPEG; as text in a page a third more."""

_SHEET_PX = 2048
# JPEG with halved colour works in such blocks: no thumbnail's edge shows its neighbour's colour.
_BLOCK_PX = 16
_QUALITIES = (82, 70, 55, 40, 25, 10)
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Sheets:
    """Thumbnails of N photographs, row after row on square sheets."""

    cell_px: int
    """Side of the square that holds each thumbnail, at its upper left corner."""
    columns: int
    """Thumbnails in a row, and rows on a full sheet."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of each in pixels; (0, 0) where a photograph could not be read."""
    uris: list[str] = field(default_factory=list)
    """The sheets, as ``data:image/jpeg`` addresses."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of the photographs that could not be read."""


def check_size(count: int, thumbnail_px: int) -> None:
    """Raises UsageError when so many thumbnails of this size are too much for a page."""
    most = MOST_PIXELS // _cell(thumbnail_px) ** 2
    if count > most:
        raise UsageError(
            f"{count} thumbnails of {thumbnail_px} px are too much for one page, which holds {most} of this size; "
            "choose a smaller --thumbnail-px or a smaller --max-photos"
        )


def make_sheets(
    paths: Sequence[str],
    thumbnail_px: int,
    *,
    roots: Sequence[Path] = (Path(),),
    on_progress: Callable[[int, int], None] | None = None,
) -> Sheets:
    """Reads photographs and draws each small, its longer side ``thumbnail_px``, whole and upright.

    One sheet is in memory at a time beside the finished ones, which are ``MOST_BYTES`` at most: where they would
    be more, JPEG's quality is lowered.

    Args:
        paths: as they are in a table of embeddings.
        thumbnail_px: at least 16.
        roots: folders in which a relative path is looked for, the first one first.
        on_progress: called for each photograph with 1, and with 1 again when it could not be read, else 0.

    Raises:
        UsageError: too many for a page (:func:`check_size`).
    """
    check_size(len(paths), thumbnail_px)
    cell = _cell(thumbnail_px)
    columns = _SHEET_PX // cell
    on_a_sheet = columns**2
    budget = MOST_BYTES // max(1, -(-len(paths) // on_a_sheet))
    sheets = Sheets(cell, columns)
    workers = count_workers("auto")
    thumbnails = map_ahead(
        lambda path: _thumbnail(path, thumbnail_px, roots), paths, workers=workers, ahead=4 * workers
    )
    for part in batched(zip(paths, _counted(thumbnails, on_progress), strict=True), on_a_sheet):
        size = (min(len(part), columns) * cell, -(-len(part) // columns) * cell)
        sheet = Image.new("RGB", size, _GREY)
        for place, (path, thumbnail) in enumerate(part):
            if isinstance(thumbnail, ImageError):
                sheets.problems.append((path, str(thumbnail)))
                sheets.sizes.append((0, 0))
            else:
                sheet.paste(thumbnail, (place % columns * cell, place // columns * cell))
                sheets.sizes.append(thumbnail.size)
        sheets.uris.append("data:image/jpeg;base64," + base64.b64encode(_jpeg(sheet, budget)).decode())
    return sheets


def _counted(
    thumbnails: Iterator[Image.Image | ImageError], on_progress: Callable[[int, int], None] | None
) -> Iterator[Image.Image | ImageError]:
    for thumbnail in thumbnails:
        if on_progress is not None:
            on_progress(1, int(isinstance(thumbnail, ImageError)))
        yield thumbnail


def _cell(thumbnail_px: int) -> int:
    return -(-thumbnail_px // _BLOCK_PX) * _BLOCK_PX


def _thumbnail(path: str, side: int, roots: Sequence[Path]) -> Image.Image | ImageError:
    try:
        # Twice the size is enough for a good small picture, and a large JPEG is read many times faster so.
        return as_tile(picture_to_show(find_again(path, roots), least_px=2 * side), side)
    except ImageError as error:
        return error


def _jpeg(sheet: Image.Image, budget: int) -> bytes:
    """The best quality that fits; the least one in any case, which no photographs exceed."""
    data = b""
    for quality in _QUALITIES:
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality, optimize=True)
        data = file.getvalue()
        if len(data) <= budget:
            break
    return data
