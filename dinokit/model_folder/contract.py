"""The contract of an ONNX file: its input, outputs and metadata.

It is the same for every file that dinokit writes and for both engines, so that code for one model runs any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dinokit._version import __version__
from dinokit.errors import ModelError
from dinokit.model_folder.architecture import Architecture, VitArchitecture
from dinokit.model_folder.config import FORMAT_VERSION, BackboneConfig, is_one_line
from dinokit.model_folder.onnx_metadata import read_onnx_metadata
from dinokit.pictures.preprocess import Preprocessing

__all__ = [
    "ATTENTION",
    "CLASSIFIER_BIAS",
    "CLASSIFIER_KEY",
    "CLASSIFIER_WEIGHT",
    "DATA_DIGEST_KEY",
    "DATA_KEY",
    "EMBEDDING",
    "IMAGE",
    "INPUT",
    "METADATA_KEY",
    "OUTPUTS",
    "POOLED",
    "PROBABILITIES",
    "TOKENS",
    "block_of",
    "block_output",
    "classifier_of",
    "contract",
    "contract_of",
    "data_file_of",
    "declared_shapes",
    "differences",
    "free_sizes",
    "missing_data_file",
    "must_be_known_format",
]

# -- input and outputs: B pictures, R register tokens, N patches, width D

INPUT = "pixel_values"
"""(B, C, H, W) float32, normalised; a ViT's H and W are multiples of the patch."""
TOKENS = "last_hidden_state"
"""(B, 1 + R + N, D) float32: all tokens after the final norm, CLS first, patches row by row.

For a network other than a ViT: its last feature map as tokens, row by row; a few networks have none."""
POOLED = "pooler_output"
"""(B, D) float32, the embedding of the picture: the CLS token of :data:`TOKENS`; without a ViT, pooled features."""
ATTENTION = "attention"
"""(B, heads, N) float32: attention of the last block's CLS token to the patches. Only a ViT has it.

The softmax is over all tokens, but only the patches' columns are kept, so a row sums to a little less than 1
(facebookresearch/dino, ``visualize_attention.py``)."""
OUTPUTS = (TOKENS, POOLED, ATTENTION)

IMAGE, EMBEDDING = "image", "embedding"
"""Input and output of the target ``embedder``: crops (B, H, W, 3) uint8 RGB, and :data:`POOLED`."""
PROBABILITIES = "probabilities"
"""(B, classes) float32, rows sum to 1: a further output of files with a classifier."""
CLASSIFIER_WEIGHT, CLASSIFIER_BIAS = "classifier:weight", "classifier:bias"
"""The constants of a classifier, (D, classes) and (classes,) float32: probabilities = softmax(x @ weight + bias)."""

_BLOCK = re.compile(r"blocks\.(\d+)(\.norm)?")


def block_output(index: int, *, norm: bool) -> str:
    """The name of the output with all tokens of one block of a ViT, (B, 1 + R + N, D) float32.

    No file that dinokit writes has these outputs; an engine adds them on request. For a network other than a
    ViT: the patches' tokens only, (B, N, D).

    Args:
        index: of the block, counted from 0.
        norm: after the network's final norm; otherwise as the next block receives them.
    """
    return f"blocks.{index}.norm" if norm else f"blocks.{index}"


def block_of(output: str) -> tuple[int, bool] | None:
    """The inverse of :func:`block_output`: index and norm; None for other outputs."""
    found = _BLOCK.fullmatch(output)
    return None if found is None else (int(found[1]), found[2] is not None)


def declared_shapes(architecture: Architecture) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the input, which comes first, and of each output of a float32 graph; a name stands for any size."""
    known = architecture
    shapes: dict[str, tuple[int | str, ...]] = {INPUT: ("batch", known.in_chans, "height", "width")}
    if isinstance(known, VitArchitecture):
        return shapes | {
            TOKENS: ("batch", "tokens", known.embed_dim),
            POOLED: ("batch", known.embed_dim),
            ATTENTION: ("batch", known.num_heads, "patches"),
        }
    shapes[POOLED] = ("batch", known.embed_dim)
    if known.token_dim:
        shapes[TOKENS] = ("batch", "tokens", known.token_dim)
    sizes = {} if known.takes_any_size else free_sizes(known, *known.image_size)
    return {name: tuple(sizes.get(str(size), size) for size in shape) for name, shape in shapes.items()}


def free_sizes(architecture: Architecture, height: int, width: int) -> dict[str, int]:
    """The sizes of the names in :func:`declared_shapes`, except the batch, for pictures of one size in pixels."""
    if isinstance(architecture, VitArchitecture):
        rows, columns = height // architecture.patch_size, width // architecture.patch_size
    else:
        rows, columns = architecture.grid(height, width)
    patches = rows * columns
    tokens = architecture.num_prefix_tokens + patches
    return {"height": height, "width": width, "patches": patches, "tokens": tokens}


# -- the metadata of a file

METADATA_KEY = "dinokit"
"""The metadata key of :func:`contract`, as JSON."""
DATA_KEY = "dinokit_external_data"
"""The metadata key of the name of a second file beside the ONNX file, with its weights; absent if there is none."""
DATA_DIGEST_KEY = "dinokit_external_data_sha256"
"""SHA-256 of the weights in that file, hexadecimal. The file ends with the same 32 bytes, so that weights of another
model, or cut short, are recognised without being read. Absent in files of earlier versions."""
CLASSIFIER_KEY = "dinokit_classifier"
"""The metadata key of a description of :data:`PROBABILITIES`, as JSON: ``classes``, their names in order; ``what``, the
vector that is classified (``pooling.py``); and how it was fitted. Absent in a file without a classifier."""

# Files that differ in these give different vectors; the rest (name, licence, writer) are descriptions.
_BINDING = ("format_version", "preprocessing", "architecture", "weights_sha256")
_DEFAULTS = {"precision": "fp32", "target": "portable"}
_WORDS = {"precision": ("fp32", "fp16", "int8"), "target": ("portable", "ort-cuda", "embedder")}


def contract(
    config: BackboneConfig, weights_sha256: str, *, precision: str = "fp32", target: str = "portable"
) -> dict[str, Any]:
    """The contract that an ONNX file states in its metadata, as JSON under :data:`METADATA_KEY`.

    Two files with the same contract take the same pixels through the same weights, in the same precision.
    """
    return {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "preprocessing": config.preprocessing.to_json(),
        "architecture": config.architecture.to_json(),
        "weights_sha256": weights_sha256,
        "licence": config.licence,
        "written_by": config.written_by,
        "precision": precision,
        "target": target,
    }


def contract_of(path: Path) -> dict[str, Any]:
    """The contract in an ONNX file's metadata.

    Raises:
        ModelError: it is missing or incomplete.
    """
    text = read_onnx_metadata(path).get(METADATA_KEY)
    if text is None:
        raise ModelError(
            f"{path} does not describe its preprocessing (it has no metadata {METADATA_KEY!r}), without which its "
            "vectors cannot be trusted; use a file written by `dinokit export`, or a model folder"
        )
    try:
        values = json.loads(text)
        kinds = {"architecture": dict, "preprocessing": dict}
        texts = ("name", "weights_sha256", "licence", "written_by")
        bad = [key for key, kind in kinds.items() if not isinstance(values.get(key), kind)]
        bad += [key for key in texts if not isinstance(values.get(key), str)]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: its metadata {METADATA_KEY!r} is not readable ({error})") from error
    if not bad:  # a missing key would silently default to ImageNet's value
        known = (field.name for field in fields(Preprocessing))
        bad = [f"preprocessing.{key}" for key in known if key not in values["preprocessing"]]
    if bad:
        raise ModelError(f"{path}: its metadata {METADATA_KEY!r} lacks {', '.join(bad)}")
    says = {**_DEFAULTS, **values}
    odd = [
        f"{key} is {says[key]!r}, expected one line of text" for key in texts if not is_one_line(says[key])
    ]
    odd += [
        f"{key} is {says[key]!r}, expected one of {', '.join(words)}"
        for key, words in _WORDS.items()
        if says[key] not in words
    ]
    if odd:
        raise ModelError(
            f"{path}: its metadata {METADATA_KEY!r} are damaged, or of a newer dinokit: {'; '.join(odd)}"
        )
    return says


def must_be_known_format(says: Mapping[str, Any], path: Path) -> None:
    """Raises ModelError if a contract's format is newer than this dinokit, or its version is not a number."""
    version = says.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ModelError(
            f"{path}: its format_version is {version!r}, which is not a valid format number; export it again"
        )
    if version > FORMAT_VERSION:
        raise ModelError(
            f"{path} has format_version {version} ({says['written_by']}); this dinokit {__version__} reads up to "
            f"{FORMAT_VERSION}. Update dinokit"
        )


def classifier_of(path: Path) -> dict[str, Any] | None:
    """A file's metadata about its classifier (:data:`CLASSIFIER_KEY`); None if it has none.

    ``classes`` are text, or integers or booleans if the classifier was fitted to those.

    Raises:
        ModelError: it is not an ONNX file, or its metadata are damaged.
    """
    text = read_onnx_metadata(path).get(CLASSIFIER_KEY)
    if text is None:
        return None
    try:
        values = json.loads(text)
        names = values["classes"]
        whole = isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)
        whole = whole and isinstance(values["what"], str)
        if whole and values.get("class_type") == "int":
            values["classes"] = [int(name) for name in names]
        elif whole and values.get("class_type") == "bool":
            values["classes"] = [{"False": False, "True": True}[name] for name in names]
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ModelError(
            f"{path}: its metadata {CLASSIFIER_KEY!r} are damaged; write it again with `dinokit fit`"
        )
    found: dict[str, Any] = values
    return found


def differences(says: Mapping[str, Any], config: BackboneConfig, weights_sha256: str) -> list[str]:
    """The keys of the contract in which an ONNX file differs from a model; empty if the file belongs to the model."""
    right = json.loads(json.dumps(contract(config, weights_sha256)))
    return [key for key in _BINDING if says.get(key) != right[key]]


def data_file_of(path: Path) -> Path | None:
    """The second file of an ONNX file whose weights are beside it; None if they are inside.

    Raises:
        ModelError: the file is damaged, or names a file elsewhere.
    """
    name = read_onnx_metadata(path).get(DATA_KEY)
    if name is None:
        return None
    if name != Path(name).name or name in ("", ".", ".."):
        raise ModelError(f"{path} has its weights in {name!r}; expected the name of a file beside it")
    return path.parent / name


def missing_data_file(path: Path) -> Path | None:
    """:func:`data_file_of`, if it is missing.

    Raises:
        ModelError: as :func:`data_file_of`, or the second file has the weights of another model, or is cut short.
    """
    data = data_file_of(path)
    if data is None:
        return None
    if not data.is_file():
        return data
    digest = read_onnx_metadata(path).get(DATA_DIGEST_KEY)
    if digest is not None and _last_bytes(data, len(digest) // 2).hex() != digest:
        raise ModelError(
            f"{data.name} beside {path} has the weights of another model, or is incomplete; copy both files "
            "again, or export the model again"
        )
    return None


def _last_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read()
