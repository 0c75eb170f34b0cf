"""Finds the pictures for a model: which files of a folder are pictures depends on the model's channels."""

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
"""Columns that select a part of a picture. width and height alone are the size of the whole picture."""


def channels_of(model: str, revision: str | None = None) -> int:
    """The number of a model's input channels, before loading it. Raises UsageError or ModelError if there is none."""
    from dinokit.loading.locate import locate

    return locate(model, revision=revision).config.preprocessing.channels


def search_for(photos: Sequence[str], model: str, **settings: Any) -> tuple[FoundPictures, Backbone | None]:
    """The pictures that ``photos`` name, and the model; None for the model if there are no pictures.

    An empty folder does not load a model or download one from the Hub.

    Args:
        photos: the command's arguments.
        model, settings: arguments of ``load_backbone``.
    """
    from dinokit.loading.load import load_backbone
    from dinokit.pictures.bands import is_photographic, must_read
    from dinokit.sources import is_there, search_pictures

    for name in photos:
        _warn_of_boxes(name)
    if "-" in photos:  # standard input can be read only once
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
    """Warns of names without a file, and returns the error to raise."""
    list_messages([f"{picture}: no such file or folder" for picture in pictures], "Warning: ")
    return NothingToDoError(
        f"there is nothing to {verb}; name photographs, or folders that contain photographs"
    )


def table_among(names: Sequence[str]) -> str | None:
    """The table of embeddings that was named, or None. Raises click.UsageError if it is not alone."""
    from dinokit.classifiers.labelled import is_table

    tables = [name for name in names if is_table(name)]
    if tables and len(names) > 1:
        raise click.UsageError(
            f"{tables[0]} is a table of embeddings; expected one table alone, or photographs only"
        )
    return tables[0] if tables else None


def silence_decoders() -> None:
    """Hides the warnings of Pillow and pydicom about damaged EXIF and odd values: pictures that cannot be read are
    reported anyway, and the others are fine."""
    warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\.")


def _warn_of_boxes(name: str) -> None:
    """Warns if a list has boxes beside the paths: the vectors are of whole pictures, not of the boxes."""
    if not name.lower().endswith((".csv", ".tsv")) or not Path(name).is_file():
        return
    try:
        with Path(name).open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = next(csv.reader(file, delimiter="\t" if name.lower().endswith(".tsv") else ","), [])
    except (OSError, csv.Error):  # reported when the whole file is read
        return
    columns = [column.strip().lower() for column in header]
    box = next((names for names in _BOXES if all(part in columns for part in names)), None)
    if box is not None:
        click.echo(
            f"Warning: {name} has boxes ({', '.join(box)}), which are not used: each row is the whole picture. To "
            "embed parts of pictures, crop them first, or in Python: backbone.embed(Image.open(path).crop(box))",
            err=True,
        )
