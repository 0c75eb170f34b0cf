"""The page itself: one HTML file that holds the map, the thumbnails and the script that draws them.

It needs nothing else, and a content security policy enforces this: the browser runs only the script whose hash is in
the page, shows only pictures that are part of it, and contacts no server. The script treats file names as data and
writes them as text, so a name that looks like HTML is shown, not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit._version import __version__
from dinokit.atlas.thumbnails import Sheets

__all__ = ["MOST_PHOTOS", "AtlasData", "Grouping", "render"]

MOST_PHOTOS = 50_000
"""Browsers draw more points too slowly, and their numbers would not fit in 16 bits."""


@dataclass(frozen=True)
class Grouping:
    """One way to colour the map."""

    title: str
    labels: list[str]
    """Names of the groups, 255 at most."""
    of: NDArray[np.integer[Any]]
    """(N,) the group of each photograph."""
    samples: list[int]
    """For each group, the number of a photograph that represents it."""
    other: int | None = None
    """The group of the photographs that are in none of the others, drawn grey."""


@dataclass(frozen=True)
class AtlasData:
    """What the page shows of N photographs."""

    title: str
    summary: str
    origin: str
    paths: Sequence[str]
    places: NDArray[np.floating[Any]]
    """(N, 2) from -1 to 1."""
    similarities: NDArray[np.floating[Any]]
    """(N, k) cosines, falling."""
    neighbours: NDArray[np.integer[Any]]
    """(N, k) numbers of the most similar photographs."""
    groupings: Sequence[Grouping]
    thumbnails: Sheets
    thumbnail_px: int


def render(data: AtlasData) -> str:
    """The page as HTML."""
    assert 0 < len(data.paths) <= MOST_PHOTOS
    script, style = _part("page.js"), _part("page.css")
    values = {
        "title": html.escape(data.title),
        "version": html.escape(__version__),
        "policy": _policy(script, style),
        "style": style,
        "script": script,
        "data": _for_script(_content(data)),
    }
    # In one pass, so that a file name that looks like a placeholder is not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _part("page.html"))


def _part(name: str) -> str:
    return resources.files("dinokit.atlas").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    # The script sets positions and colours of elements itself, which the policy allows to a script's properties.
    return (
        f"default-src 'none'; img-src data:; script-src {_sha256(script)}; style-src {_sha256(style)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _for_script(content: dict[str, Any]) -> str:
    """JSON for an HTML script element: without ``<``, nothing in it ends the element."""
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _content(data: AtlasData) -> dict[str, Any]:
    places = np.rint((np.asarray(data.places, np.float64).clip(-1, 1) + 1) * 32767.5)
    return {
        "title": data.title,
        "summary": data.summary,
        "origin": data.origin,
        "paths": list(data.paths),
        "places": _packed(places, "<u2"),
        "similarities": _packed(data.similarities, "<f4"),
        "neighbours": _packed(data.neighbours, "<u2"),
        "groupings": [
            {
                "title": grouping.title,
                "labels": grouping.labels,
                "of": _packed(grouping.of, "<u1"),
                "samples": grouping.samples,
                "other": grouping.other,
            }
            for grouping in data.groupings
        ],
        "thumbnails": {
            "px": data.thumbnail_px,
            "cell": data.thumbnails.cell_px,
            "columns": data.thumbnails.columns,
            "sizes": _packed(np.array(data.thumbnails.sizes), "<u2"),
            "sheets": data.thumbnails.uris,
        },
    }


def _packed(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()
