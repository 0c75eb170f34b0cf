"""Labelled pictures from any source of pictures.

==========================================  =====================================================================
one subfolder per class, a CSV              as in ``labelled.py``
Parquet, Arrow, a Hugging Face dataset      their column of labels: ClassLabel by its names, or ``label``; beside a
                                            column of paths or of pictures
``.tsv``                                    as a CSV
``.tar``, ``.tar.gz`` of webdataset         the ``.cls`` file beside each picture
other archives and addresses                the name of a picture's folder
==========================================  =====================================================================
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dinokit.classifiers.labelled import LabelledPictures, find_labelled, folder_of
from dinokit.errors import UsageError
from dinokit.sources import Item, label_of, labelled, search_pictures

__all__ = ["find_labelled_items"]


def find_labelled_items(source: str | os.PathLike[str], *, channels: int = 3) -> LabelledPictures:
    """The pictures of a source that carries labels; see the table above. ``channels``: of the network.

    Raises:
        UsageError: there is no such source, or it has no labels. The message says what was expected.
    """
    text, path = os.fspath(source), Path(source)
    if path.suffix.lower() != ".csv" and text != "-":
        found = search_pictures(text, channels=channels)
        names = path.is_dir() or not len(found.pictures) or isinstance(found.pictures[0], Path)
        if labelled(found.pictures):
            return _kept(
                text, found.pictures, [label_of(item) or "" for item in found.pictures], found.problems
            )
        if found.problems and not len(found.pictures) and not path.is_dir():
            raise UsageError("\n".join(found.problems))
        if not names:
            return _kept(
                text, found.pictures, [folder_of(str(item)) for item in found.pictures], found.problems
            )
    return find_labelled(path, channels=channels)


def _kept(
    text: str, items: Sequence[Item], labels: Sequence[str], problems: Sequence[str]
) -> LabelledPictures:
    places = [place for place, label in enumerate(labels) if label]
    if not places:
        raise UsageError(
            f"{text}: none of its {len(items)} pictures has a label; expected a column of labels, a .cls file beside "
            "each picture of a .tar, or folders named after the classes"
        )
    left_out = len(items) - len(places)
    problems = [
        *problems,
        *([f"{text}: {left_out} pictures have no label and are left out"] if left_out else []),
    ]
    if not left_out:
        return LabelledPictures(items, list(labels), problems)
    return LabelledPictures([items[place] for place in places], [labels[place] for place in places], problems)
