"""Writes an ONNX model as one file, or as two where the weights are too large for one.

Protobuf serialises less than 2 GiB. From there on, and where it is asked for, the weights stand in ``model.onnx_data``
beside ``model.onnx``, the name that optimum writes and Transformers.js expects. The two belong together: the model says
the other's name, in every tensor and in its metadata under :data:`DATA_KEY`, so that whoever fetches or copies the one
knows of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.model_folder.contract import DATA_KEY
from dinokit.vit_graph.storage import LARGEST_FILE, FileStorage, data_file

if TYPE_CHECKING:
    import onnx

__all__ = ["write_onnx"]


def write_onnx(
    model: onnx.ModelProto,
    file: Path,
    store: Mapping[str, NDArray[Any]] | None = None,
    *,
    largest: int = LARGEST_FILE,
) -> tuple[Path, ...]:
    """Writes a model.

    Args:
        model: it stays as it is.
        file: where; its folder is there.
        store: the values of the tensors that the model has outside; None: all are inside, and fit one file.
        largest: bytes of the model with all its weights from which on these go into a second file.

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
    written.metadata_props.add(key=DATA_KEY, value=data.name)
    with data.open("wb") as stream:
        place = FileStorage(stream, data.name)
        for tensor in tensors:
            place(tensor, store[tensor.name])
    file.write_bytes(written.SerializeToString())
    return file, data
