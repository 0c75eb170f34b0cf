"""Where TensorRT keeps the engines of a model. Building them takes minutes, which each load would otherwise repeat."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.files.checksums import sha256_of
from dinokit.model_folder.contract import data_file_of

__all__ = ["cache_options", "engine_folder"]


def engine_folder(model: bytes | Path, weights: Mapping[str, NDArray[np.float32]]) -> Path | None:
    """The folder for the engines of this model and these versions; None if it cannot be made.

    ONNX Runtime names an engine after its graph, not its weights: in one folder, a model would run with the weights of
    another one of the same architecture. Nor does it notice that an engine was built by another version.

    Args:
        model: an .onnx file, or the content of one.
        weights: those that are passed beside it.
    """
    from dinokit.sources.copies import cache_folder

    folder = cache_folder() / "tensorrt" / _digest(model, weights)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def cache_options(folder: Path) -> dict[str, Any]:
    """Options of ONNX Runtime's TensorRT provider: engines, and the timings that shorten the building of others."""
    return {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(folder),  # by default the current folder
    }


def _digest(model: bytes | Path, weights: Mapping[str, NDArray[np.float32]]) -> str:
    made = hashlib.sha256()
    for distribution in ("onnxruntime-gpu", "onnxruntime", "tensorrt"):
        try:
            made.update(f"{distribution} {importlib.metadata.version(distribution)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    if isinstance(model, bytes):
        made.update(model)
    else:
        data = data_file_of(model)
        for file in (model, data):
            if file is not None:
                made.update(sha256_of(file).encode())
    for name, array in weights.items():
        made.update(name.encode())
        made.update(np.ascontiguousarray(array).data)
    return made.hexdigest()
