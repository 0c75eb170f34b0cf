"""Where the weights of a written graph stand: in the model, beside it in a file, or in memory.

Protobuf, ONNX's format, cannot serialise 2 GiB or more, which DINOv2 giant and the larger DINOv3 exceed. Such
weights are *external data*: the model says where they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dinokit.vit_graph.writer import stored

if TYPE_CHECKING:
    import onnx

__all__ = ["LARGEST_FILE", "FileStorage", "MemoryStorage", "data_file", "inside"]

LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights that one ONNX file holds: protobuf serialises less than 2 GiB, the operators included."""

_ALIGNMENT = 4096  # bytes; a page, so that a runtime can map a tensor instead of reading it
_IN_MEMORY = "in memory"
_SMALLEST = 1024  # bytes; smaller tensors stay in the model, where shape inference can read them


def inside(tensor: onnx.TensorProto, values: NDArray[Any]) -> None:
    """Stores the values in the model itself."""
    # The bytes as they are; onnx.helper would go through a Python list.
    tensor.raw_data = stored(values).tobytes()


class MemoryStorage:
    """Keeps the values for a session that is handed them beside the model (``add_external_initializers``)."""

    def __init__(self) -> None:
        self.weights: dict[str, NDArray[np.float32]] = {}

    def __call__(self, tensor: onnx.TensorProto, values: NDArray[Any]) -> None:
        if 4 * values.size < _SMALLEST:
            inside(tensor, values)
        else:
            self.weights[tensor.name] = stored(values)
            _point(tensor, location=_IN_MEMORY)


class FileStorage:
    """Appends the values to a file beside the model.

    Args:
        file: opened for writing, binary.
        location: its name as the model, in the same folder, should know it.
    """

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location = file, location

    def __call__(self, tensor: onnx.TensorProto, values: NDArray[Any]) -> None:
        if values.nbytes < _SMALLEST:
            inside(tensor, values)
            return
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset, array = self._file.tell(), _as_declared(tensor, values)
        self._file.write(array.data)
        _point(tensor, location=self._location, offset=str(offset), length=str(array.nbytes))


def _as_declared(tensor: onnx.TensorProto, values: NDArray[Any]) -> NDArray[Any]:
    """In C order, little-endian, float32 where the tensor is; other kinds (float16, int8) as they are."""
    if tensor.data_type == tensor.FLOAT:
        return stored(values)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))


def _point(tensor: onnx.TensorProto, **where: str) -> None:
    tensor.data_location = tensor.EXTERNAL
    for key, value in where.items():
        tensor.external_data.add(key=key, value=value)


def data_file(path: Path) -> Path:
    """Where the weights of the model at ``path`` go when they do not fit in it: ``model.onnx_data``.

    The name that optimum writes and Transformers.js expects.
    """
    return path.with_name(path.name + "_data")
