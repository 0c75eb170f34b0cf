"""Draws patch features of photographs as colours into a folder, for `dinokit pca`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.drawing.contact_sheet import contact_sheet
from dinokit.drawing.picture_folder import check_folder, file_names, sheet_name, write_index
from dinokit.errors import UsageError
from dinokit.features.batching import batched, check_batch_size, count_workers, decode_ahead
from dinokit.features.pca import PatchPCA, fit_patch_pca
from dinokit.files.outputs import save_picture
from dinokit.pictures.preprocess import picture_of
from dinokit.sources.names import text_of
from dinokit.tables.origin import origin_of
from dinokit.tables.shards import Failure

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.features.batching import Workers
    from dinokit.sources import Item

__all__ = ["PcaRun", "write_pca"]

_ON_A_SHEET = 120  # photographs; viewers could not open a sheet of many more
_IN_A_ROW = 3
_INDEX = "pca.json"

T = TypeVar("T", bound=np.generic)


@dataclass
class PcaRun:
    """The result of :func:`write_pca`."""

    folder: Path
    written: list[dict[str, Any]] = field(default_factory=list)
    """For each photograph that could be read: its ``path`` and its ``file``, relative to the folder."""
    failures: list[Failure] = field(default_factory=list)
    sheets: list[str] = field(default_factory=list)
    pca: PatchPCA | None = None
    """None if no photograph could be read."""
    interrupted: bool = False


def write_pca(
    pictures: Sequence[Item],
    folder: str | os.PathLike[str],
    backbone: Backbone,
    *,
    foreground: bool = False,
    form: str = "png",
    overwrite: bool = False,
    batch_size: int = 4,
    workers: Workers = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> PcaRun:
    """Draws the patch features of photographs as colours that all of them share, into a folder.

    ``png``: for ``cat.jpg`` a picture ``cat.png`` of the size of the model's input, and for all together
    ``contact-sheet.png``. ``npy``: ``cat.npy``, (h, w, 3) float32, the principal components themselves, and
    ``pca.npz`` with their directions. In both, ``pca.json`` records the file of each photograph, the model, and the
    share of the variance that the components explain.

    The network runs once per photograph. Its tokens are collected in a temporary file in the folder, so memory does
    not grow with the number of photographs.

    Args:
        pictures: the result of ``find_pictures`` or ``search_pictures``; those that cannot be read are listed, not
            fatal.
        foreground: leave the background black (:func:`dinokit.features.pca.fit_patch_pca`).
        form: ``png`` or ``npy``.
        overwrite: accept a folder that is not empty: files of the same names are replaced, others stay.
        batch_size: pictures per run of the network.
        on_progress: called with the numbers of photographs and of failures since its last call.

    Raises:
        UsageError: an invalid argument, or the folder is not empty and ``overwrite`` was not given.
    """
    folder = Path(folder)
    if form not in ("png", "npy"):
        raise UsageError(f"form={form!r} is not known; expected png (pictures) or npy (numbers)")
    check_batch_size(batch_size)
    threads = count_workers(workers)
    drawings = [f"{name}.png" for name in file_names(pictures)] if form == "png" else []
    check_folder(folder, overwrite, pictures, drawings)
    folder.mkdir(parents=True, exist_ok=True)
    run = PcaRun(folder)
    read: list[str] = []  # the photographs whose tokens are in the files
    token_shape = backbone.patch_shape
    crop_shape = (*backbone.image_size, 3)
    with (
        _Spool(folder, token_shape, np.float32) as tokens,
        _Spool(folder, crop_shape, np.uint8) as crops,
    ):
        try:
            for path, found in _features(pictures, backbone, batch_size, threads, run, on_progress):
                tokens.append(found[0])
                crops.append(found[1])
                read.append(path)
        except KeyboardInterrupt:
            run.interrupted = True  # photographs that were read are still drawn
        if not read:
            _write_index(run, backbone, foreground)
            return run
        all_tokens, all_crops = tokens.array(len(read)), crops.array(len(read))
        run.pca = fit_patch_pca(all_tokens, foreground=foreground)
        rows: list[tuple[str, Image.Image, Image.Image]] = []
        for path, name, own, crop in zip(read, file_names(read), all_tokens, all_crops, strict=True):
            if form == "npy":
                np.save(folder / f"{name}.npy", run.pca.scores(own))
            else:
                drawn = _enlarged(run.pca.colours(own), backbone.patch_size)
                save_picture(drawn, folder / f"{name}.png")
                rows.append((path, Image.fromarray(crop), drawn))
            run.written.append({"path": path, "file": f"{name}.{form}"})
            if len(rows) == _ON_A_SHEET:
                _finish_sheet(run, rows, backbone)
        _finish_sheet(run, rows, backbone)
    if form == "npy":
        _save_directions(folder / "pca.npz", run.pca)
    _write_index(run, backbone, foreground)
    return run


def _features(
    pictures: Sequence[Item],
    backbone: Backbone,
    batch_size: int,
    threads: int,
    run: PcaRun,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, tuple[NDArray[np.float32], NDArray[np.uint8]]]]:
    """Path, tokens (h, w, D) and crop to show (H, W, 3) of each readable photograph; failures are added to the run."""
    channels = backbone.preprocessing.channels
    decoded = decode_ahead(pictures, channels, workers=threads, ahead=2 * batch_size)
    for batch in batched(decoded, batch_size):
        good = [(str(path), image) for path, image in batch if not isinstance(image, str)]
        failed = [Failure(str(path), error) for path, error in batch if isinstance(error, str)]
        # The same call as a user's in Python; the picture is cropped again only to be shown.
        tokens = backbone.patch_tokens([image for _, image in good], batch_size=batch_size, workers=0)
        for (path, image), own in zip(good, tokens, strict=True):
            yield path, (own, np.asarray(picture_of(backbone.preprocessing.crop(image))))
        run.failures += failed
        if on_progress:
            on_progress(len(batch), len(failed))


class _Spool(Generic[T]):
    """Collects arrays of one shape in a temporary file, and returns them as one array."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: type[T]) -> None:
        self._shape, self._dtype = shape, dtype
        # In the output folder, which is on a disk; /tmp may be in memory.
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> _Spool[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, values: NDArray[T]) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())

    def array(self, count: int) -> NDArray[T]:
        """The first ``count`` arrays, (count, …)."""
        self._file.flush()
        return np.memmap(self._file, self._dtype, mode="r", shape=(count, *self._shape))


def _enlarged(colours: NDArray[np.uint8], patch_size: int) -> Image.Image:
    """(h, w, 3) to a picture in which each patch is a flat square: interpolation would show what is not there."""
    height, width = colours.shape[:2]
    size = (width * patch_size, height * patch_size)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def _finish_sheet(run: PcaRun, rows: list[tuple[str, Image.Image, Image.Image]], backbone: Backbone) -> None:
    if not rows:
        return
    assert run.pca is not None
    pairs = min(_IN_A_ROW, len(rows))
    blank = Image.new("RGB", rows[0][1].size, "white")
    table = []
    for start in range(0, len(rows), pairs):
        part = rows[start : start + pairs]
        tiles = [tile for _, crop, drawn in part for tile in (crop, drawn)]
        labels = [text_of(path) for path, _, _ in part] + [""] * (pairs - len(part))
        table.append((labels, tiles + [blank] * (2 * pairs - len(tiles))))
    height, width = backbone.image_size
    held = " + ".join(f"{100 * share:.0f}" for share in run.pca.explained)
    title = f"{backbone.name}, {height}x{width} px: three components of the patches, {held} % of the variance"
    run.sheets.append(sheet_name(len(run.sheets) + 1))
    sheet = contact_sheet(table, ["picture", "patches"] * pairs, title=title)
    save_picture(sheet, run.folder / run.sheets[-1])
    rows.clear()


def _save_directions(path: Path, pca: PatchPCA) -> None:
    arrays = {"mean": pca.mean, "components": pca.components, "low": pca.low, "high": pca.high}
    if pca.foreground is not None:
        arrays |= {
            "foreground_mean": pca.foreground.mean,
            "foreground_direction": pca.foreground.direction,
            "foreground_threshold": np.asarray(pca.foreground.threshold, np.float32),
        }
    np.savez(path, allow_pickle=False, **arrays)


def _write_index(run: PcaRun, backbone: Backbone, foreground: bool) -> None:
    index = {
        "origin": {**origin_of(backbone), "what": "patches", "foreground": foreground},
        "explained": None if run.pca is None else run.pca.explained.tolist(),
        "photos": run.written,
        "failures": [{"path": failure.path, "error": failure.error} for failure in run.failures],
        "sheets": run.sheets,
    }
    write_index(run.folder / _INDEX, index)
