"""Draws attention maps of photographs into a folder, for `dinokit attention`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.drawing.overlays import mask_picture, overlay
from dinokit.drawing.picture_folder import check_folder, file_names, sheet_name, write_index
from dinokit.errors import UsageError
from dinokit.features.attention import check_mass, mass_masks
from dinokit.features.batching import batched, check_batch_size, count_workers, decode_ahead
from dinokit.files.outputs import save_picture
from dinokit.pictures.preprocess import picture_of
from dinokit.sources.names import text_of
from dinokit.tables.origin import origin_of
from dinokit.tables.shards import Failure

if TYPE_CHECKING:
    from PIL import Image

    from dinokit.features.backbone import Backbone
    from dinokit.features.batching import Workers
    from dinokit.pictures.bands import Bands
    from dinokit.sources import Item

__all__ = ["AttentionRun", "write_attention"]

_ROWS_OF_A_SHEET = 100  # photographs; viewers could not open a sheet of many more
_TILE_PX = 192
_INDEX = "attention.json"


@dataclass
class AttentionRun:
    """The result of :func:`write_attention`."""

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
    """Draws the model's attention for each photograph, into a folder.

    ``png``: for a photograph ``cat.jpg`` the folder ``cat`` with ``picture`` (the model's input), ``mean``
    and ``head-0`` … (:func:`dinokit.drawing.overlays.overlay`), ``mask-mean`` and ``mask-head-0`` …
    (:func:`dinokit.features.attention.mass_masks`), and for all together ``contact-sheet.png``. ``npy``: ``cat.npy``,
    (heads, h, w) float32, the attention itself. In both, ``attention.json`` records the files of each photograph and
    the model.

    Args:
        paths: files, or the result of ``dinokit.sources.search_pictures``; those that cannot be read are listed,
            not fatal.
        mass: share of the attention that a mask covers; ``png`` only.
        heads: heads to draw, counted from 0; all by default. The mean is always over all heads. ``png`` only: ``npy``
            contains all heads.
        form: ``png`` or ``npy``.
        overwrite: accept a folder that is not empty: files of the same names are replaced, others stay.
        batch_size: pictures per run of the network.
        workers: threads that decode.
        on_progress: called with the numbers of photographs and of failures since its last call.

    Raises:
        UsageError: an invalid argument, or the folder is not empty and ``overwrite`` was not given.
    """
    folder = Path(folder)
    backbone.must_have_attention()
    chosen = _check_heads(heads, backbone.num_heads)
    if form not in ("png", "npy"):
        raise UsageError(f"form={form!r} is not known; expected png (pictures) or npy (numbers)")
    check_mass(mass)
    check_batch_size(batch_size)
    kinds = _kinds(chosen) if form == "png" else ()
    check_folder(
        folder, overwrite, paths, [f"{name}/{kind}.png" for name in file_names(paths) for kind in kinds]
    )
    folder.mkdir(parents=True, exist_ok=True)
    run = AttentionRun(folder)
    drawing = _Drawing(run, backbone, mass, chosen)
    try:
        decoded = decode_ahead(
            paths, backbone.preprocessing.channels, workers=count_workers(workers), ahead=2 * batch_size
        )
        for batch in batched(zip(file_names(paths), decoded, strict=True), batch_size):
            read = [(name, path, image) for name, (path, image) in batch if not isinstance(image, str)]
            failed = [Failure(str(path), error) for _, (path, error) in batch if isinstance(error, str)]
            # The same call as a user's in Python; the picture is cropped again only to be shown.
            maps = backbone.attention([image for *_, image in read], batch_size=batch_size, workers=0)
            for (name, path, image), attention in zip(read, maps, strict=True):
                if form == "npy":
                    np.save(folder / f"{name}.npy", attention)
                    files = [f"{name}.npy"]
                else:
                    files = drawing.add(name, path, image, attention)
                run.written.append({"path": str(path), "files": files})
            run.failures += failed
            if on_progress:
                on_progress(len(batch), len(failed))
    except KeyboardInterrupt:
        run.interrupted = True  # finished drawings stay, with their sheet and index
    drawing.finish_sheet()
    index = {
        "origin": {**origin_of(backbone), "what": "attention"}
        | ({"mass": mass, "heads": chosen} if form == "png" else {}),
        "photos": run.written,
        "failures": [{"path": failure.path, "error": failure.error} for failure in run.failures],
        "sheets": run.sheets,
    }
    write_index(folder / _INDEX, index)
    return run


def _kinds(heads: Sequence[int]) -> list[str]:
    """The names of the pictures of one photograph."""
    shown = ["mean", *(f"head-{head}" for head in heads)]
    return ["picture", *shown, *(f"mask-{name}" for name in shown)]


def _check_heads(heads: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if heads is None else list(heads)
    wrong = [head for head in chosen if not 0 <= head < count]
    if wrong:
        raise UsageError(
            f"there is no head {wrong[0]}; this model has {count}, counted from 0 to {count - 1}"
        )
    return list(dict.fromkeys(chosen))


class _Drawing:
    """The pictures of each photograph, and the sheets of all."""

    def __init__(self, run: AttentionRun, backbone: Backbone, mass: float, heads: Sequence[int]) -> None:
        self._run, self._backbone, self._mass, self._heads = run, backbone, mass, heads
        self._rows: list[tuple[str, list[Image.Image]]] = []

    def add(
        self, name: str, path: object, image: Image.Image | Bands, attention: NDArray[np.float32]
    ) -> list[str]:
        """Draws one photograph; returns its files, relative to the folder. ``attention``: (heads, h, w)."""
        from dinokit.pictures.display import as_tile

        drawn = self._overlays(self._backbone.preprocessing.crop(image), attention)
        folder = self._run.folder
        (folder / name).mkdir(exist_ok=True)
        files = []
        pictures = drawn | self._masks(attention)
        for kind in _kinds(self._heads):
            files.append(f"{name}/{kind}.png")
            save_picture(pictures[kind], folder / files[-1])
        self._rows.append((text_of(path), [as_tile(picture, _TILE_PX) for picture in drawn.values()]))
        if len(self._rows) == _ROWS_OF_A_SHEET:
            self.finish_sheet()
        return files

    def finish_sheet(self) -> None:
        """Writes a sheet of the rows that are not on one yet."""
        from dinokit.drawing.contact_sheet import contact_sheet

        if not self._rows:
            return
        height, width = self._backbone.image_size
        title = f"{self._backbone.name}, {height}x{width} px: attention of the CLS token in the last block"
        columns = ["picture", "mean", *(f"head {head}" for head in self._heads)]
        self._run.sheets.append(sheet_name(len(self._run.sheets) + 1))
        sheet = contact_sheet(self._rows, columns, title=title, tile_px=_TILE_PX)
        save_picture(sheet, self._run.folder / self._run.sheets[-1])
        self._rows.clear()

    def _overlays(self, crop: NDArray[Any], attention: NDArray[np.float32]) -> dict[str, Image.Image]:
        shown = picture_of(crop)
        drawn = {"picture": shown, "mean": overlay(shown, attention.mean(axis=0))}
        return drawn | {f"head-{head}": overlay(shown, attention[head]) for head in self._heads}

    def _masks(self, attention: NDArray[np.float32]) -> dict[str, Image.Image]:
        size = self._backbone.image_size
        kept = mass_masks(attention.reshape(len(attention), -1), self._mass).reshape(attention.shape)
        mean = mass_masks(attention.mean(axis=0).reshape(-1), self._mass).reshape(attention.shape[1:])
        return {"mask-mean": mask_picture(mean, size)} | {
            f"mask-head-{head}": mask_picture(kept[head], size) for head in self._heads
        }
