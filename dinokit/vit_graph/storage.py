"""Where the weights of a written graph are: in the model, in a file beside it, or in memory.

Protobuf, ONNX's format, cannot serialise 2 GiB or more, which DINOv2 giant and the larger DINOv3 exceed. Their
weights are stored as *external data*: the model records where they are.
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
"""The most bytes of weights in one ONNX file: protobuf serialises less than 2 GiB, including the operators."""

_ALIGNMENT = 4096  # bytes; a page, so that a runtime can map a tensor instead of reading it
_IN_MEMORY = "in memory"
_SMALLEST = 1024  # bytes; smaller tensors stay in the model, where shape inference can read them


def inside(tensor: onnx.TensorProto, values: NDArray[Any]) -> None:
    """Stores the values in the model itself."""
    # Raw bytes; onnx.helper would go through a Python list.
    tensor.raw_data = stored(values).tobytes()


class MemoryStorage:
    """Keeps the values for a session that receives them separately (``add_external_initializers``)."""

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
        location: its name, as the model in the same folder should record it.
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
    """The file for the weights of the model at ``path`` if they do not fit into it: ``model.onnx_data``, the name that
    optimum writes and Transformers.js expects."""
    return path.with_name(path.name + "_data")
