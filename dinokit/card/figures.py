"""Figures for a card, drawn with the model itself: what it looks at, and what it finds similar.

They are as wide as a page shows them, in few colours, so that a repository stays small.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit._version import __version__
from dinokit.card.facts import FIGURES_FILE
from dinokit.card.write import replace_file
from dinokit.drawing.lettering import draw_text
from dinokit.drawing.overlays import overlay
from dinokit.errors import ImageError, UsageError
from dinokit.files.json_files import read_json
from dinokit.files.outputs import atomic
from dinokit.neighbours.nearest import finite_rows, nearest, normalised
from dinokit.pictures.preprocess import Preprocessing, picture_of

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.pictures.bands import Bands
    from dinokit.sources import Item

__all__ = ["DrawnFigure", "bundled_photos", "draw_attention", "draw_neighbours"]

_WIDTH = 860
_MARGIN, _GAP, _WIDE_GAP = 16, 6, 16
_TITLE, _HEAD = 40, 26  # heights of their lines
_GREY, _SAME, _OTHER = "#555555", "#0b6b70", "#a03020"
_MOST_BYTES = 300_000
_MOST_PHOTOS = 6  # more make the figure longer than a screen
_QUERIES, _NEIGHBOURS = 5, 6


@dataclass(frozen=True)
class DrawnFigure:
    """A figure that was written."""

    file: Path
    failures: tuple[tuple[str, str], ...] = ()
    """(path, reason) of photographs that could not be read."""
    left_out: int = 0
    """The number of photographs that did not fit."""
    entry: Mapping[str, Any] = field(default_factory=dict)
    """Its entry in figures.json."""


def bundled_photos() -> list[Path]:
    """The photographs that come with dinokit: CC0 or in the public domain."""
    return sorted((Path(__file__).parents[1] / "models" / "photos").glob("*.jpg"))


# -- attention


def draw_attention(
    folder: str | Path, backbone: Backbone, photos: Sequence[Item] | None = None
) -> DrawnFigure:
    """Writes ``figures/attention.png``: photographs, and over them the attention of all heads and of each.

    Args:
        folder: gets ``figures/``.
        backbone: of a network with attention. Another image size than its own gives finer or coarser maps.
        photos: at most six are drawn; by default those that come with dinokit, which are for 1 and 3 channels.

    Raises:
        UsageError: the network has no attention, or none of the photographs can be read.
    """
    from dinokit.pictures.bands import decode_picture

    if not backbone.num_heads:
        raise UsageError(f"{backbone.name} has no attention to draw: it is not a Vision Transformer")
    chosen: Sequence[Any] = bundled_photos() if photos is None else photos
    read: list[Image.Image | Bands] = []
    names: list[str] = []
    failures = []
    for photo in chosen:
        if len(read) == _MOST_PHOTOS:
            break
        try:
            read.append(decode_picture(photo, backbone.preprocessing.channels))
            names.append(_name(str(photo)))
        except ImageError as error:
            failures.append((str(photo), str(error)))
    left_out = len(chosen) - len(read) - len(failures)
    if not read:
        reasons = f": {failures[0][1]}" if failures else ""
        raise UsageError(f"none of the photographs can be used to draw attention{reasons}")
    maps = np.stack([backbone.attention(picture, workers=0) for picture in read])
    height, width = backbone.image_size
    picture = _attention_picture(
        [_shown(backbone.preprocessing, image) for image in read],
        maps,
        title=f"{backbone.name}: attention of the CLS token, last block, {height} x {width} pixels",
    )
    entry = {
        "photographs": names,
        "bundled": photos is None,
        "image_size": [height, width],
        "heads": maps.shape[1],
    }
    return _save(Path(folder), "attention", picture, backbone.weights_sha256, entry, failures, left_out)


def _attention_picture(
    pictures: Sequence[Image.Image], maps: NDArray[np.float32], *, title: str
) -> Image.Image:
    """One row per photograph: the photograph, the mean, and beside them the heads in one line or several.

    Args:
        pictures: all of one size.
        maps: (photographs, heads, h, w).
    """
    n_heads = maps.shape[1]
    lines = 1 if n_heads <= 6 else 2 if n_heads <= 16 else 3
    columns = -(-n_heads // lines)
    ratio = pictures[0].height / pictures[0].width
    fixed = _WIDE_GAP + _GAP + (columns - 1) * _GAP
    # Two large tiles as high as all lines of heads together; widths follow from the heights.
    small = min(
        200, int((_WIDTH - 2 * _MARGIN - fixed - 2 * (lines - 1) * _GAP / ratio) / (2 * lines + columns))
    )
    small_h = round(small * ratio)
    large_h = lines * small_h + (lines - 1) * _GAP
    large = round(large_h / ratio)
    xs = [_MARGIN, _MARGIN + large + _GAP, _MARGIN + 2 * large + _GAP + _WIDE_GAP]
    top = _MARGIN + _TITLE + _HEAD
    canvas, draw = _canvas(top + len(pictures) * (large_h + _GAP) - _GAP + _MARGIN)
    _write(draw, (_MARGIN, _MARGIN), title, 20, _WIDTH - 2 * _MARGIN)
    heads = f"each of its {n_heads} heads" if n_heads > 1 else "its head"
    for x, words, room in zip(
        xs, ("photograph", "mean", heads), (large, large, _WIDTH - xs[2] - _MARGIN), strict=True
    ):
        _write(draw, (x, _MARGIN + _TITLE), words, 16, room, _GREY)
    for row, (picture, attention) in enumerate(zip(pictures, maps, strict=True)):
        y = top + row * (large_h + _GAP)
        canvas.paste(_fitted(picture, large, large_h), (xs[0], y))
        canvas.paste(_fitted(overlay(picture, attention.mean(axis=0)), large, large_h), (xs[1], y))
        for head in range(n_heads):
            line, column = divmod(head, columns)
            at = (xs[2] + column * (small + _GAP), y + line * (small_h + _GAP))
            canvas.paste(_fitted(overlay(picture, attention[head]), small, small_h), at)
    return canvas


# -- neighbours


def draw_neighbours(
    folder: str | Path,
    backbone: Backbone,
    pictures: Sequence[Item],
    embeddings: NDArray[np.float32],
    *,
    labels: Sequence[str] | None = None,
) -> DrawnFigure:
    """Writes ``figures/neighbours.png``: a few of the photographs, each with its nearest among the others.

    Args:
        folder: gets ``figures/``.
        backbone: made the embeddings.
        pictures: at least two that could be read.
        embeddings: (N, D); rows that are not finite were not read and are left out.
        labels: of each picture; neighbours with the query's label then get another colour than the others.

    Raises:
        UsageError: fewer than two pictures have an embedding.
    """
    from dinokit.pictures.bands import decode_picture

    open_picture = functools.partial(decode_picture, channels=backbone.preprocessing.channels)
    vectors = np.asarray(embeddings, np.float32)
    fine = np.flatnonzero(finite_rows(vectors))
    if len(fine) < 2:
        raise UsageError(
            f"{len(fine)} of {len(vectors)} photographs can be used; nearest neighbours need at least two"
        )
    unit = normalised(vectors[fine])
    queries = _spread(fine, labels)
    k = min(_NEIGHBOURS, len(fine) - 1)
    # One more than shown: the query itself is found too, and is left out.
    similarities, found = nearest(unit[queries], unit, min(k + 1, len(fine)))
    rows = []
    for query, cosines, numbers in zip(queries, similarities, found, strict=True):
        others = [(int(n), float(c)) for n, c in zip(numbers, cosines, strict=True) if n != query][:k]
        rows.append((int(query), others))

    prepare = backbone.preprocessing

    def tile(number: int) -> Image.Image:
        return _shown(prepare, open_picture(pictures[fine[number]]))

    def label(number: int) -> str | None:
        return None if labels is None else labels[fine[number]]

    drawn = [
        [(tile(query), label(query), None), *((tile(n), label(n), cosine) for n, cosine in others)]
        for query, others in rows
    ]
    picture = _neighbour_picture(
        drawn, title=f"{backbone.name}: nearest of {len(fine):,} photographs, cosine of the features"
    )
    entry = {"pictures": len(fine), "queries": len(queries), "labelled": labels is not None}
    return _save(Path(folder), "neighbours", picture, backbone.weights_sha256, entry)


def _spread(fine: NDArray[np.intp], labels: Sequence[str] | None) -> NDArray[np.intp]:
    """A few of the rows: evenly through the list, or the middle one of classes evenly chosen. Never by hand."""
    if labels is not None:
        classes = sorted({labels[row] for row in fine})
        if len(classes) >= _QUERIES:
            some = [classes[i] for i in _evenly(len(classes), _QUERIES)]
            of_class = [[number for number, row in enumerate(fine) if labels[row] == name] for name in some]
            return np.array([rows[len(rows) // 2] for rows in of_class])
    return _evenly(len(fine), min(_QUERIES, len(fine)))


def _evenly(count: int, wanted: int) -> NDArray[np.intp]:
    return np.array([int((i + 0.5) * count / wanted) for i in range(wanted)])


Tile = tuple[Image.Image, str | None, float | None]


def _neighbour_picture(rows: Sequence[Sequence[Tile]], *, title: str) -> Image.Image:
    """One row per query; below each neighbour its cosine, and its label if it has one."""
    columns = max(len(row) for row in rows)
    first = rows[0][0][0]
    side = min(160, (_WIDTH - 2 * _MARGIN - _WIDE_GAP - (columns - 2) * _GAP) // columns)
    height = round(side * first.height / first.width)
    labelled = any(label is not None for row in rows for _, label, _ in row)
    caption = 46 if labelled else 26
    top = _MARGIN + _TITLE + _HEAD
    canvas, draw = _canvas(top + len(rows) * (height + caption) + _MARGIN // 2)
    _write(draw, (_MARGIN, _MARGIN), title, 20, _WIDTH - 2 * _MARGIN)
    xs = [_MARGIN, *(_MARGIN + side + _WIDE_GAP + i * (side + _GAP) for i in range(columns - 1))]
    _write(draw, (xs[0], _MARGIN + _TITLE), "photograph", 16, side, _GREY)
    _write(draw, (xs[1], _MARGIN + _TITLE), "nearest first", 16, _WIDTH - xs[1] - _MARGIN, _GREY)
    for number, row in enumerate(rows):
        y = top + number * (height + caption)
        own = row[0][1]
        for x, (picture, label, cosine) in zip(xs, row, strict=False):
            canvas.paste(_fitted(picture, side, height), (x, y))
            below = y + height + 3
            if label is not None:
                colour = "black" if cosine is None else _SAME if label == own else _OTHER
                _write(draw, (x, below), label, 15, side, colour)
                below += 20
            if cosine is not None:
                _write(draw, (x, below), f"{cosine:.2f}", 15, side, _GREY)
    return canvas


# -- shared


def _shown(prepare: Preprocessing, picture: Image.Image | Bands) -> Image.Image:
    """What the network sees of a picture, sharper: the same window at no less than 320 pixels."""
    height, width = prepare.crop_px
    factor = max(1, -(-320 // min(height, width)))
    return picture_of(prepare.with_image_size((height * factor, width * factor)).crop(picture))


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _canvas(height: int) -> tuple[Image.Image, Any]:
    from PIL import ImageDraw

    canvas = Image.new("RGB", (_WIDTH, height), "white")
    return canvas, ImageDraw.Draw(canvas)


def _write(draw: Any, at: tuple[int, int], words: str, size: int, room: int, colour: str = "black") -> None:
    draw_text(draw, at, words, size, colour, room)


def _name(path: str) -> str:
    """The file's own name: the card is public, the folders are not."""
    return path.replace("\\", "/").rsplit("/", 1)[-1].rsplit("::", 1)[-1]


def _save(
    folder: Path,
    kind: str,
    picture: Image.Image,
    weights_sha256: str,
    entry: Mapping[str, Any],
    failures: Sequence[tuple[str, str]] = (),
    left_out: int = 0,
) -> DrawnFigure:
    """Writes the picture and its entry in figures.json, each atomically."""
    file = folder / "figures" / f"{kind}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as temporary:
        _save_small(picture, temporary)
    listed_as = {
        "file": f"figures/{kind}.png",
        "weights_sha256": weights_sha256,
        **entry,
        "made_by": f"dinokit {__version__}",
    }
    index = folder / FIGURES_FILE
    try:
        listed = read_json(index)
    except (OSError, ValueError):
        listed = {}
    listed = listed if isinstance(listed, dict) else {}
    listed[kind] = listed_as
    replace_file(index, json.dumps(listed, indent=2, ensure_ascii=False) + "\n")
    return DrawnFigure(file, tuple(failures), left_out, listed_as)


def _save_small(picture: Image.Image, file: Path) -> None:
    """PNG, in fewer colours if it would be large: dithered, or else flat areas of a photograph would show steps."""
    picture.save(file, "PNG", optimize=True)
    for colours in (256, 160, 96, 48):
        if file.stat().st_size <= _MOST_BYTES:
            return
        # Without Pillow's kmeans, which may never finish.
        palette = picture.quantize(colours, Image.Quantize.MEDIANCUT)
        fewer = picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        table = fewer.getpalette() or []
        paper = 3 * int(fewer.getpixel((0, 0)))  # type: ignore[arg-type]  # a palette's index
        table[paper : paper + 3] = [255, 255, 255]  # the palette may only approximate it
        fewer.putpalette(table)
        fewer.save(file, "PNG", optimize=True)
