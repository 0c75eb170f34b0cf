"""Writes an ONNX model as one file, or as two if the weights are too large for one.

Protobuf serialises less than 2 GiB. From that size on, or on request, the weights are in ``model.onnx_data`` beside
``model.onnx``, the name that optimum writes and Transformers.js expects. The model records the other file's name in
every tensor and in its metadata (:data:`DATA_KEY`), so that it can be fetched or copied along, and its SHA-256
(:data:`DATA_DIGEST_KEY`), so that another model's weights are not taken for its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError
from dinokit.files.checksums import sha256_of
from dinokit.model_folder.contract import DATA_DIGEST_KEY, DATA_KEY, data_file_of
from dinokit.vit_graph.storage import LARGEST_FILE, FileStorage, data_file

if TYPE_CHECKING:
    import onnx

__all__ = ["put_onnx", "write_onnx"]


def write_onnx(
    model: onnx.ModelProto,
    file: Path,
    store: Mapping[str, NDArray[Any]] | None = None,
    *,
    largest: int = LARGEST_FILE,
) -> tuple[Path, ...]:
    """Writes a model.

    Args:
        model: not modified.
        file: the path; its folder exists.
        store: the values of the tensors that are outside the model; None: all are inside, and fit into one file.
        largest: size in bytes, of the model with all weights, from which on the weights go into a second file.

    Returns:
        ``file``, and the second one, if there is one.
    """
    outside = [t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    if not outside or store is None:
        file.write_bytes(model.SerializeToString())
        return (file,)
    written = type(model)()
    written.CopyFrom(model)
    tensors = [tensor for tensor in written.graph.initializer if tensor.data_location == tensor.EXTERNAL]
    for tensor in tensors:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    size = written.ByteSize() + sum(store[name].nbytes for name in outside)
    if size < largest:
        for tensor in tensors:
            tensor.raw_data = np.ascontiguousarray(store[tensor.name]).tobytes()
        file.write_bytes(written.SerializeToString())
        return (file,)
    data = data_file(file)
    with data.open("wb") as stream:
        place = FileStorage(stream, data.name)
        for tensor in tensors:
            place(tensor, store[tensor.name])
    digest = sha256_of(data)
    with data.open("ab") as stream:
        stream.write(bytes.fromhex(digest))
    for key, value in ((DATA_KEY, data.name), (DATA_DIGEST_KEY, digest)):
        written.metadata_props.add(key=key, value=value)
    file.write_bytes(written.SerializeToString())
    return file, data


def put_onnx(new: Path, file: Path) -> None:
    """Moves a model, and its weight file if there is one, to their destination, in place of an earlier model.

    Two files cannot be replaced atomically, so the old graph is removed first: it is never paired with other weights.
    """
    before, data = data_file(file), data_file(new)
    belongs = file.is_file() and _names_data(file)
    if belongs or data.is_file():
        file.unlink(missing_ok=True)
    if belongs:
        before.unlink(missing_ok=True)
    if data.is_file():
        data.replace(before)
    new.replace(file)


def _names_data(file: Path) -> bool:
    try:
        return data_file_of(file) == data_file(file)
    except ModelError:  # damaged, or another kind of file
        return False
