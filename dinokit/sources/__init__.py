"""Sources of pictures: files, folders, patterns, lists, archives, Parquet and addresses, as one list.

``find.py`` resolves what a user names; ``pictures.py`` defines the list and its items.
"""

from __future__ import annotations

from dinokit.sources.find import (
    FoundPictures,
    find_pictures,
    is_collection,
    picture_named,
    search_pictures,
)
from dinokit.sources.pictures import (
    Item,
    Picture,
    PictureList,
    changed_at,
    in_order,
    is_there,
    label_of,
    labelled,
    state_of,
)

__all__ = [
    "FoundPictures",
    "Item",
    "Picture",
    "PictureList",
    "changed_at",
    "find_pictures",
    "in_order",
    "is_collection",
    "is_there",
    "label_of",
    "labelled",
    "picture_named",
    "search_pictures",
    "state_of",
]
