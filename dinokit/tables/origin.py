"""The origin of a table: which model made its vectors, and how; whether two tables may be compared.

It is a dict of plain JSON values, written with each table: in the schema's metadata of Parquet and Lance, beside the
other formats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit._version import __version__
from dinokit.errors import UsageError
from dinokit.features.pooling import check_what, vector_length
from dinokit.files.json_files import read_json
from dinokit.tables.formats import WITH_ORIGIN, beside, check_suffix
from dinokit.tables.lance import LANCE_SUFFIX, read_lance_metadata
from dinokit.tables.parquet import parquet_file

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone

__all__ = [
    "differing_space",
    "metadata_of",
    "must_be_as_embedded",
    "must_be_comparable",
    "origin_of",
    "parquet_metadata_of",
    "read_origin",
]

_KEY = "dinokit."
"""Prefix of every key of the origin in the metadata of Parquet and Lance."""
_PANDAS_ATTRS = "PANDAS_ATTRS"
"""The key of the Parquet metadata that pandas 2.1 and later reads into ``DataFrame.attrs``, keeps when rows are
selected and writes again. It holds the origin of the vectors, so a table filtered by pandas still records its model."""
_OF_ALL_ROWS = ("rows", "failed", "began", "inputs_sha256", "labels_sha256")
"""Keys of the origin that are no longer true when rows are added or removed."""

# Values of an origin that are not text; Parquet and Lance store all as text.
_NOT_TEXT = frozenset(
    ("preprocessing", "normalize", "reduced_decoding", "embed_dim", "rows", "failed", "began", "grid")
)

_KINDS: dict[str, type | tuple[type, ...]] = {
    "what": str,
    "preprocessing": dict,
    "embed_dim": int,
    "rows": int,
    "failed": int,
    "began": (int, float),
    "grid": list,
    "dtype": str,
}
"""Types of the values that are computed with; the others are only shown."""

# Vectors that differ in one of these are in different spaces. A table that does not record what its vectors are was
# written when there was only the CLS token.
_SAME_SPACE = {"weights_sha256": None, "preprocessing": None, "what": "cls"}


def origin_of(backbone: Backbone, *, what: str = "cls", normalize: bool = False) -> dict[str, Any]:
    """Where vectors of this backbone come from, as plain JSON values.

    :func:`differing_space` decides by them whether two tables may be compared.

    Args:
        backbone: the model.
        what: which vectors, as for ``Backbone.embed``.
        normalize: whether they are L2-normalised.
    """
    return {
        "model": backbone.name,
        "source": backbone.source,
        "revision": backbone.revision,
        "weights_sha256": backbone.weights_sha256,
        "preprocessing": backbone.preprocessing.to_json(),
        "what": check_what(what),
        "normalize": normalize,
        "reduced_decoding": backbone.reduced_decoding,
        "embed_dim": vector_length(what, backbone.embed_dim),
        "engine": backbone.engine,
        "precision": backbone.precision,
        "dinokit_version": __version__,
    }


# -- stored with a table


def metadata_of(origin: Mapping[str, Any]) -> dict[str, str]:
    """An origin as metadata of an Arrow schema, whose values are text; None is left out."""
    return {
        _KEY + key: value if isinstance(value, str) else json.dumps(value)
        for key, value in origin.items()
        if value is not None
    }


def parquet_metadata_of(origin: Mapping[str, Any]) -> dict[str, str]:
    """:func:`metadata_of`, and once more where pandas keeps it."""
    of_vectors = {key: value for key, value in origin.items() if key not in _OF_ALL_ROWS}
    return metadata_of(origin) | {_PANDAS_ATTRS: json.dumps({"dinokit": of_vectors})}


def read_origin(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The origin of a table (see :func:`origin_of`) without reading its rows; ``{}`` if it has none or it is
    damaged."""
    path = Path(path)
    suffix = check_suffix(path)
    try:
        inside = suffix in WITH_ORIGIN
        origin = _origin_inside(path, suffix) if inside else read_json(beside(path, ".origin.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(origin, dict) or not all(
        isinstance(origin[key], kind) for key, kind in _KINDS.items() if key in origin
    ):
        return {}
    return origin


def _origin_inside(path: Path, suffix: str) -> dict[str, Any]:
    texts = read_lance_metadata(path) if suffix == LANCE_SUFFIX else _parquet_metadata(path)
    origin: dict[str, Any] = {
        key.removeprefix(_KEY): value for key, value in texts.items() if key.startswith(_KEY)
    }
    for key in origin.keys() & _NOT_TEXT:
        origin[key] = json.loads(origin[key])
    if not origin and _PANDAS_ATTRS in texts:  # pandas has written the table again
        attrs = json.loads(texts[_PANDAS_ATTRS])
        kept = attrs.get("dinokit") if isinstance(attrs, dict) else None
        origin = kept if isinstance(kept, dict) else {}
    if origin:
        origin.setdefault("revision", None)
    return origin


def _parquet_metadata(path: Path) -> dict[str, str]:
    with parquet_file(path) as file:
        metadata = file.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


# -- compared


def differing_space(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two origins differ so that their vectors must not be compared; empty if they may be.

    ``normalize`` does not count, since similarity is the cosine. Nor does ``reduced_decoding``, which changes a vector
    far less than another picture does.
    """
    return [key for key, default in _SAME_SPACE.items() if one.get(key, default) != other.get(key, default)]


def must_be_comparable(
    one: Mapping[str, Any], one_name: str, other: Mapping[str, Any], other_name: str
) -> None:
    """Raises UsageError unless both origins (:func:`origin_of`) have the same model, preprocessing and kind of
    vector (:func:`differing_space`)."""
    for origin, name in ((one, one_name), (other, other_name)):
        if not origin.get("weights_sha256"):
            raise UsageError(
                f"{name} does not record which model made it, so its vectors cannot be compared with others; "
                "embed its pictures again with dinokit embed"
            )
    differs = differing_space(one, other)
    if not differs:
        return
    if differs == ["what"]:
        kinds = [origin.get("what", "cls") for origin in (one, other)]
        raise UsageError(
            f"{one_name} holds other vectors ({kinds[0]}) than {other_name} ({kinds[1]}), by the same model; they "
            "cannot be compared. Embed one of them again with the --what of the other"
        )
    if "weights_sha256" in differs:
        what = f"by another model ({_model(one)}) than {other_name} ({_model(other)})"
    else:
        what = (
            f"with another preprocessing ({_crop(one)}) than {other_name} ({_crop(other)}), by the same model"
        )
    raise UsageError(
        f"{one_name} was made {what}; their vectors cannot be compared. Choose the same model and size with -m MODEL "
        "and --image-size, or embed one of them again"
    )


def must_be_as_embedded(origin: Mapping[str, Any], name: str) -> None:
    """Raises UsageError if a table's vectors were L2-normalised: a linear map depends on their lengths."""
    if origin.get("normalize"):
        raise UsageError(
            f"{name} holds L2-normalised vectors (--normalize), and a linear classifier takes them as the model makes "
            "them; embed its pictures again without --normalize"
        )


def _model(origin: Mapping[str, Any]) -> str:
    return f"{origin.get('model')} from {origin.get('source')}, weights {str(origin['weights_sha256'])[:8]}"


def _crop(origin: Mapping[str, Any]) -> str:
    values = origin.get("preprocessing") or {}
    return f"crop {values.get('crop_px')} of {values.get('resize_px')} px"
