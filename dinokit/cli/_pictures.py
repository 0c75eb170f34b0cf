"""Pictures for a model: which files of a folder these are depends on its channels, which only the model knows."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._messages import NothingToDoError, list_messages

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.sources import FoundPictures

__all__ = ["channels_of", "nothing_found", "search_for", "silence_decoders", "table_among"]

_BANDS = 0  # any number but 1 and 3
_BOXES = (
    ("x", "y", "width", "height"),
    ("x", "y", "w", "h"),
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("left", "top", "right", "bottom"),
    ("bbox",),
)
"""Columns that say which part of a picture is meant. width and height alone are those of the whole one."""


def channels_of(model: str, revision: str | None = None) -> int:
    """How many channels a model sees, before it is loaded. Raises UsageError or ModelError where there is none."""
    from dinokit.loading.locate import locate

    return locate(model, revision=revision).config.preprocessing.channels


def search_for(photos: Sequence[str], model: str, **settings: Any) -> tuple[FoundPictures, Backbone | None]:
    """The pictures that ``photos`` name, and the model; None for it where there is no picture for any model.

    Nothing is loaded, and from the Hub fetched, for the sake of a folder that is empty.

    Args:
        photos: as the command got them.
        model, settings: of `load_backbone`.
    """
    from dinokit.loading.load import load_backbone
    from dinokit.pictures.bands import is_photographic, must_read
    from dinokit.sources import is_there, search_pictures

    for name in photos:
        _warn_of_boxes(name)
    if "-" in photos:  # what names the pictures can be read once
        backbone = load_backbone(model, **settings)
        found = search_pictures(photos, channels=backbone.preprocessing.channels)
        return found, backbone if any(map(is_there, found.pictures)) else None
    found = search_pictures(photos)
    if not any(map(is_there, found.pictures)):
        bands = search_pictures(photos, channels=_BANDS)
        if not any(map(is_there, bands.pictures)):
            return found, None
    backbone = load_backbone(model, **settings)
    if not is_photographic(backbone.preprocessing.channels):
        found = search_pictures(photos, channels=backbone.preprocessing.channels)
        must_read(found.pictures)
    return found, backbone if any(map(is_there, found.pictures)) else None


def nothing_found(verb: str, pictures: Sequence[object]) -> NothingToDoError:
    """Lists names that no file has, and gives the error to raise."""
    list_messages([f"{picture}: no such file or folder" for picture in pictures], "Warning: ")
    return NothingToDoError(f"there is nothing to {verb}; name photographs, or folders that contain some")


def table_among(names: Sequence[str]) -> str | None:
    """The table of embeddings that was named, or None. Raises click.UsageError if it is not alone."""
    from dinokit.classifiers.labelled import is_table

    tables = [name for name in names if is_table(name)]
    if tables and len(names) > 1:
        raise click.UsageError(
            f"{tables[0]} is a table of embeddings; expected it alone, or photographs only"
        )
    return tables[0] if tables else None


def silence_decoders() -> None:
    """Pillow and pydicom warn of damaged EXIF, odd values and the like; what cannot be read is reported by us, and the
    rest is fine."""
    warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\.")


def _warn_of_boxes(name: str) -> None:
    """Nobody should take vectors of whole pictures for those of boxes that a list has beside the paths."""
    if not name.lower().endswith((".csv", ".tsv")) or not Path(name).is_file():
        return
    try:
        with Path(name).open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = next(csv.reader(file, delimiter="\t" if name.lower().endswith(".tsv") else ","), [])
    except (OSError, csv.Error):  # told by what reads the whole file
        return
    columns = [column.strip().lower() for column in header]
    box = next((names for names in _BOXES if all(part in columns for part in names)), None)
    if box is not None:
        click.echo(
            f"Warning: {name} has boxes ({', '.join(box)}), which are not used: each row is the whole picture. To "
            "embed parts of pictures, cut them out first, or in Python: backbone.embed(Image.open(path).crop(box))",
            err=True,
        )
