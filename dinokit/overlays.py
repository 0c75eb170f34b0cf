"""Pictures of attention: a map laid over its photograph, masks, a contact sheet, a folder of all these.

The colours are computed, not looked up: a path through the OKLab space whose lightness only rises and whose
steps are all equally far apart, so that equal differences of attention look equally large, also in grey.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.errors import ImageError, UsageError
from dinokit.preprocess import picture_of

if TYPE_CHECKING:
    from dinokit.backbone import Backbone
    from dinokit.bands import Bands
    from dinokit.batching import Workers
    from dinokit.embedding_run import Failure
    from dinokit.sources import Item

__all__ = [
    "AttentionRun",
    "check_folder",
    "colour_table",
    "contact_sheet",
    "file_names",
    "mask_picture",
    "overlay",
    "save_whole",
    "write_attention",
]

_ROWS_OF_A_SHEET = 100  # photographs; more go to a second sheet, which viewers can still open
_LONGEST_NAME = 120  # bytes of a photograph's name that are kept for its files
_INDEX = "attention.json"
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


# -- colours


@functools.cache
def colour_table() -> NDArray[np.uint8]:
    """256 colours from near black over violet and orange to pale yellow, (256, 3) uint8 RGB.

    Lightness rises steadily, and neighbours are equally far apart in OKLab (Ottosson 2020,
    https://bottosson.github.io/posts/oklab/).
    """
    t = np.linspace(0, 1, 2001)
    lightness = 0.16 + 0.80 * t
    hue = np.radians(285 + 180 * t)
    # As colourful as a screen can show at each lightness and hue, without corners in the path.
    low, high = np.zeros_like(t), np.full_like(t, 0.4)
    for _ in range(24):
        middle = (low + high) / 2
        rgb = _linear_rgb(lightness, hue, middle)
        inside = ((rgb >= 0) & (rgb <= 1)).all(axis=-1)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    width = 301
    padded = np.pad(low, width // 2, mode="edge")
    chroma = np.minimum(low, 0.92 * np.convolve(padded, np.full(width, 1 / width), mode="valid"))
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    length = np.concatenate([[0], np.linalg.norm(np.diff(lab, axis=0), axis=1).cumsum()])
    even = np.interp(np.linspace(0, length[-1], 256), length, t)
    rgb = _linear_rgb(*(np.interp(even, t, values) for values in (lightness, hue, chroma))).clip(0, 1)
    encoded = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)  # sRGB's gamma
    table: NDArray[np.uint8] = np.rint(255 * encoded).astype(np.uint8)
    return table


def _linear_rgb(
    lightness: NDArray[np.float64], hue: NDArray[np.float64], chroma: NDArray[np.float64]
) -> NDArray[np.float64]:
    """OKLab in polar form to linear sRGB, (…, 3); outside 0…1 where no screen can show it."""
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    to_lms = [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.291485548],
    ]
    to_rgb = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
    rgb: NDArray[np.float64] = (lab @ np.transpose(to_lms)) ** 3 @ np.transpose(to_rgb)
    return rgb


# -- one picture


def overlay(
    image: Image.Image | NDArray[np.uint8],
    attention: NDArray[np.floating[Any]],
    *,
    opacity: float = 0.65,
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """Lays one attention map over its picture, in colours: dark is little, yellow is much.

    Args:
        image: what the network saw (``backbone.preprocessing.crop``), (H, W, 3) uint8 or a Pillow image. Channels that
            are no colours are first made a picture by :func:`dinokit.preprocess.picture_of`.
        attention: (h, w), one head's map or the mean of some; drawn as large as the picture, bicubic.
        opacity: of the colours, from 0 (the picture only) to 1 (the map only).
        limits: the values that the first and the last colour stand for; by default the map's least and
            greatest. Give the same to several maps to compare them.

    Returns:
        an RGB picture of the size of ``image``.

    Raises:
        UsageError: shapes or values that cannot be; a map with values that are not finite.
    """
    picture = _as_rgb(image)
    values = np.asarray(attention, np.float32)
    if values.ndim != 2 or not values.size:
        raise UsageError(
            f"the attention map has shape {values.shape}; expected (h, w): one head, maps[0], or maps.mean(axis=0)"
        )
    if not np.isfinite(values).all():
        raise UsageError("the attention map holds values that are not finite; expected probabilities")
    if not 0 <= opacity <= 1:
        raise UsageError(f"opacity={opacity} must lie between 0 (the picture only) and 1 (the map only)")
    low, high = (float(values.min()), float(values.max())) if limits is None else limits
    if low > high:
        raise UsageError(f"limits={limits} are the wrong way round; expected (least, greatest)")
    share = (values - low) / max(high - low, 1e-12)  # a flat map is all "little"
    large = Image.fromarray(share.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    # Bicubic swings a little beyond its values.
    steps = np.rint(255 * np.asarray(large).clip(0, 1)).astype(np.uint8)
    return Image.blend(picture, Image.fromarray(colour_table()[steps]), opacity)


def mask_picture(mask: NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
    """A mask as a grey picture, 255 where it is true: (h, w) bool to ``size`` (H, W), each cell a flat square."""
    height, width = size
    return Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.NEAREST)


def _as_rgb(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise UsageError(
            f"the image is {array.dtype} of shape {array.shape}; expected a Pillow image or uint8 (H, W, 3)"
        )
    return picture_of(array)


# -- many pictures on one sheet


def contact_sheet(
    rows: Sequence[tuple[str | Sequence[str], Sequence[Image.Image]]],
    columns: Sequence[str],
    *,
    title: str = "",
    tile_px: int = 192,
) -> Image.Image:
    """Pictures in a table with labels, white.

    Args:
        rows: (label, pictures) of each row; every row has a picture for each column. Several labels share the row's
            width evenly; of one that is too long the end is kept.
        columns: what stands over the columns.
        title: what stands over all.
        tile_px: the longer side of a picture on the sheet.

    Raises:
        UsageError: there are no rows, or a row has another number of pictures than there are columns.
    """
    from PIL import ImageDraw  # here, because every `dinokit embed` imports this module

    from dinokit.lettering import draw_text

    for label, tiles in rows:
        if len(tiles) != len(columns):
            raise UsageError(f"row {label!r} has {len(tiles)} pictures for {len(columns)} columns")
    if not rows or not columns:
        raise UsageError("a contact sheet needs at least one picture")
    shrunk = [
        ((label,) if isinstance(label, str) else label, [_tile(picture, tile_px) for picture in tiles])
        for label, tiles in rows
    ]
    width = max(tile.width for _, tiles in shrunk for tile in tiles)
    gap, margin, caption, head = 6, 14, 22, 26
    top = margin + (head if title else 0) + caption
    heights = [caption + max(tile.height for tile in tiles) + gap for _, tiles in shrunk]
    total_width = 2 * margin + len(columns) * (width + gap) - gap
    sheet = Image.new("RGB", (total_width, top + sum(heights) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw_text(draw, (margin, margin), title, 16, "black", total_width - 2 * margin)
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


def _tile(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


# -- a folder of them


def file_names(paths: Sequence[object]) -> list[str]:
    """A name for each photograph's files: its own without suffix, made safe; a number where one comes again.

    No name holds a separator, starts with a dot or differs from another in capitals only.
    """
    taken = {"con", "prn", "aux", "nul"}  # devices on Windows
    numbers: dict[str, int] = {}
    names = []
    for path in paths:
        text = _text(path).replace("\\", "_")  # a separator on Windows, nothing special elsewhere
        stem = Path(
            re.sub(r"\.parquet::(\d+)$", r"-\1", text, flags=re.IGNORECASE)
        ).stem  # a row has no suffix
        stem = re.sub(r"[^\w.,()+= -]", "_", stem)
        # contact-sheet.png.jpg is not to be in the way of contact-sheet.png
        stem = re.sub(r"\.(png|npy|json)$", r"_\1", stem, flags=re.IGNORECASE)
        stem = stem.encode()[:_LONGEST_NAME].decode(errors="ignore").strip(" .") or "photo"
        name = stem
        while name.casefold() in taken:
            numbers[stem.casefold()] = numbers.get(stem.casefold(), 1) + 1
            name = f"{stem}-{numbers[stem.casefold()]}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _text(path: object) -> str:
    # File names are bytes; those that are not UTF-8 cannot be drawn or encoded otherwise.
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


@dataclass
class AttentionRun:
    """What :func:`write_attention` did."""

    folder: Path
    written: list[dict[str, Any]] = field(default_factory=list)
    """For each photograph that could be read: its ``path`` and its ``files``, relative to the folder."""
    failures: list[Failure] = field(default_factory=list)
    sheets: list[str] = field(default_factory=list)
    interrupted: bool = False


def write_attention(
    paths: Sequence[Item],
    folder: str | os.PathLike[str],
    backbone: Backbone,
    *,
    mass: float = 0.6,
    heads: Sequence[int] | None = None,
    form: str = "png",
    overwrite: bool = False,
    batch_size: int = 4,
    workers: Workers = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> AttentionRun:
    """Draws what the model attends to in each photograph, into a folder.

    ``png``: for a photograph ``cat.jpg`` the folder ``cat`` with ``picture`` (what the model sees), ``mean``
    and ``head-0`` … (:func:`overlay`), ``mask-mean`` and ``mask-head-0`` … (:func:`dinokit.attention.mass_masks`),
    and for all together ``contact-sheet.png``. ``npy``: ``cat.npy``, (heads, h, w) float32, the attention as it
    is. In both, ``attention.json`` says which files belong to which photograph, and which model made them.

    Args:
        paths: files, or what ``dinokit.sources.search_pictures`` gives; those that cannot be read are listed, not
            fatal.
        mass: share of the attention that a mask holds.
        heads: which of them to draw, counted from 0; all by default. The mean is always over all.
        form: ``png`` or ``npy``.
        overwrite: write although the folder holds something: files of the same names are replaced, others stay.
        batch_size: pictures in a run of the network.
        on_progress: called with the numbers of photographs and of failures since its last call.

    Raises:
        UsageError: an argument that cannot be, or the folder holds something and ``overwrite`` was not given.
    """
    from dinokit.attention import mass_masks
    from dinokit.bands import decode_picture
    from dinokit.batching import batched, check_batch_size, count_workers, map_ahead
    from dinokit.embedding_run import Failure
    from dinokit.embeddings import origin_of
    from dinokit.sources import in_order

    folder = Path(folder)
    backbone.must_have_attention()
    chosen = _check_heads(heads, backbone.num_heads)
    if form not in ("png", "npy"):
        raise UsageError(f"form={form!r} is not known; expected png (pictures) or npy (numbers)")
    mass_masks(np.ones(1, np.float32), mass)  # raises for an impossible mass before any work is done
    check_batch_size(batch_size)
    check_folder(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    run = AttentionRun(folder)
    columns = ["picture", "mean", *(f"head {head}" for head in chosen)]
    height, width = backbone.image_size
    title = f"{backbone.name}, {height}x{width} px: attention of the CLS token in the last block"
    rows: list[tuple[str, list[Image.Image]]] = []

    def decode(item: tuple[Item, str]) -> tuple[Item, str, Image.Image | Bands | str]:
        path, name = item
        try:
            return path, name, decode_picture(path, backbone.preprocessing.channels)
        except ImageError as error:
            return path, name, str(error)

    def finish_sheet() -> None:
        if rows:
            number = len(run.sheets) + 1
            run.sheets.append("contact-sheet.png" if number == 1 else f"contact-sheet-{number}.png")
            save_whole(contact_sheet(rows, columns, title=title), folder / run.sheets[-1])
            rows.clear()

    items = zip(in_order(paths), file_names(paths), strict=True)
    try:
        decoded = map_ahead(decode, items, workers=count_workers(workers), ahead=2 * batch_size)
        for batch in batched(decoded, batch_size):
            read = [(path, name, image) for path, name, image in batch if not isinstance(image, str)]
            failed = [Failure(str(path), error) for path, _, error in batch if isinstance(error, str)]
            images = [image for _, _, image in read]
            # The very call that a user makes in Python; the crop is taken again only to be shown.
            maps = backbone.attention(images, batch_size=batch_size, workers=0)
            for (path, name, image), attention in zip(read, maps, strict=True):
                if form == "npy":
                    np.save(folder / f"{name}.npy", attention)
                    files = [f"{name}.npy"]
                else:
                    crop = backbone.preprocessing.crop(image)
                    drawn = _draw(crop, attention, chosen)
                    masks = _masks(attention, mass, chosen, backbone.image_size)
                    files = _save(folder, name, drawn | masks)
                    rows.append((_text(path), [_tile(picture, 192) for picture in drawn.values()]))
                run.written.append({"path": str(path), "files": files})
                if len(rows) == _ROWS_OF_A_SHEET:
                    finish_sheet()
            run.failures += failed
            if on_progress:
                on_progress(len(batch), len(failed))
    except KeyboardInterrupt:
        run.interrupted = True  # what is drawn stays, with the sheet and the list of it
    finish_sheet()
    _write_index(run, {**origin_of(backbone), "mass": mass, "heads": chosen})
    return run


def _draw(crop: NDArray[Any], attention: NDArray[np.float32], heads: Sequence[int]) -> dict[str, Image.Image]:
    shown = picture_of(crop)
    drawn = {"picture": shown, "mean": overlay(shown, attention.mean(axis=0))}
    return drawn | {f"head-{head}": overlay(shown, attention[head]) for head in heads}


def _masks(
    attention: NDArray[np.float32], mass: float, heads: Sequence[int], size: tuple[int, int]
) -> dict[str, Image.Image]:
    from dinokit.attention import mass_masks

    grid = attention.shape[1:]
    kept = mass_masks(attention.reshape(len(attention), -1), mass).reshape(attention.shape)
    mean = mass_masks(attention.mean(axis=0).reshape(-1), mass).reshape(grid)
    return {"mask-mean": mask_picture(mean, size)} | {
        f"mask-head-{head}": mask_picture(kept[head], size) for head in heads
    }


def _save(folder: Path, name: str, pictures: dict[str, Image.Image]) -> list[str]:
    (folder / name).mkdir(exist_ok=True)
    files = []
    for kind, picture in pictures.items():
        files.append(f"{name}/{kind}.png")
        save_whole(picture, folder / files[-1])
    return files


def save_whole(picture: Image.Image, path: Path) -> None:
    """Saves a picture as .png, .jpg or .webp, whole or not at all."""
    from dinokit.outputs import atomic

    with atomic(path) as file:
        picture.save(file, _FORMATS[path.suffix.lower()])


def _write_index(run: AttentionRun, origin: dict[str, Any]) -> None:
    failures = [{"path": failure.path, "error": failure.error} for failure in run.failures]
    index = {"origin": origin, "photos": run.written, "failures": failures, "sheets": run.sheets}
    text = json.dumps(index, indent=2, ensure_ascii=True) + "\n"  # ASCII: odd bytes of file names survive
    (run.folder / _INDEX).write_text(text, encoding="utf-8")


def _check_heads(heads: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if heads is None else list(heads)
    wrong = [head for head in chosen if not 0 <= head < count]
    if wrong:
        raise UsageError(
            f"there is no head {wrong[0]}; this model has {count}, counted from 0 to {count - 1}"
        )
    return list(dict.fromkeys(chosen))


def check_folder(folder: Path, overwrite: bool) -> None:
    """A folder for pictures must be new, empty, or allowed to be overwritten; otherwise a UsageError."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; expected a folder for the pictures, or the name of a new one")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty; choose another folder, or give --overwrite (overwrite=True) to replace "
            "files of the same names in it"
        )
